"""What it costs to know a million examples: to partition them, to find one, to delete one or ten thousand.

No model is trained. A store of 5 shards, 8 slices and 80 stages of small random numbers gets a state of 10,000,
100,000 and 1,000,000 examples, short rows with an id and a text. Each operation runs in a process of its own, on a
copy of the store if it changes it; `bookkeeping_operations.py` says what is measured. Times are medians of repeats.

* `partition_rows_per_second`: hashing rows to ids, contents and places, of the largest store, per second of CPU.
* `partition_seconds_<size>`: that, and the state written. `second_start_seconds_<size>`: what `train()` does with the
  rows of before until it trains: they are hashed again and compared with the index.
* `locate_ms_<size>`, `delete_ms_<size>`: one id. `delete_10k_seconds_<size>`: 10,000 ids in one request, or a third of
  the examples, where that is less. `delete_growth`: CPU time of one deletion, the largest store's over the smallest's.
* `status_ms_<size>`, `verify_seconds_<size>`, `export_seconds_<size>`, `import_seconds_<size>`: of the state's backup.
* `peak_mb_<size>`: the most memory that `locate` and the deletions took above an empty process.
* `status_seconds_5000_stages`: `status` of a store of 50 shards and 5,000 stages.

Everything that was measured is in `by_size`: seconds, seconds of CPU, memory and megabytes written, per operation.

```bash
python benchmarks/bookkeeping.py --json bookkeeping.json
python benchmarks/bookkeeping.py --sizes 10000000
python benchmarks/bookkeeping.py --quick
```
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_s3t import Plan, S3TStore
from hf_s3t.lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from hf_s3t.plan.sequences import cyclic
from serving import REPOSITORY, build_store, copy_store, spread
from serving import Settings as StoreSettings

OPERATIONS_FILE = Path(__file__).with_name("bookkeeping_operations.py")
STORE = StoreSettings(layers=8, hidden=16, intermediate=32, heads=2, vocabulary=64, r=2, rows=40)
FIGURES = {
    "partition": "partition_seconds", "second_start": "second_start_seconds", "locate": "locate_ms",
    "delete": "delete_ms", "delete_10k": "delete_10k_seconds", "status": "status_ms", "verify": "verify_seconds",
    "export_state": "export_seconds", "import_state": "import_seconds",
}  # fmt: skip
"""Operations in the order in which they are shown, and the figure that each gives."""
ONCE = ("partition", "second_start", "verify", "export_state", "import_state")
CHANGING = ("delete", "delete_10k", "second_start")
ERASERS = ("locate", "delete", "delete_10k")

Measured = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    repeats: int = 5


QUICK = Settings(sizes=(1_000, 10_000), repeats=1)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="check the machinery on small states, in under a minute")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of examples (default: 10,000 to 1,000,000)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seed", type=int, default=0, help="of the store's numbers (default: 0)")
    return parser


def called(size: int) -> str:
    """A number of examples, as figures name it.

    >>> called(10_000), called(1_000_000)
    ('10k', '1m')
    """
    return f"{size // 1_000_000}m" if size % 1_000_000 == 0 else f"{size // 1000}k"


# ---- stores ----


def filled(skeleton: S3TStore, path: Path, examples: int) -> tuple[S3TStore, Measured]:
    """A copy of a store whose state knows so many examples, and what it took to fill it."""
    store = copy_store(skeleton, path)
    store.database.unlink()
    found = measured("partition", path, examples)
    measured("records", path, examples)
    return store, found


def with_many_stages(skeleton: S3TStore, path: Path) -> S3TStore:
    """A store that lists 5,000 stages, all of them live; nobody but an audit reads their files, so there are none."""
    store = copy_store(skeleton, path)
    plan = Plan.make(50, 10, cyclic(10, 10), prune=False)
    files = {CONFIG_FILE: "0" * 64, WEIGHTS_FILE: "0" * 64}
    store.write_manifest(replace(store.manifest(), plan=plan, stages=dict.fromkeys(plan.stages, files)))
    store.database.unlink()
    measured("partition", path, 10_000)
    return store


# ---- measuring ----


def measured(operation: str, path: Path, examples: int) -> Measured:
    """One operation in a process of its own, which has to end well."""
    command = [sys.executable, str(OPERATIONS_FILE), operation, str(path), str(examples)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{operation} of {examples} examples ended with {done.returncode}: {done.stderr[-2000:]}")
    found: Measured = json.loads(done.stdout.splitlines()[-1])
    return found


def repeated(operation: str, store: S3TStore, examples: int, repeats: int) -> list[Measured]:
    """An operation several times, each time on the same store as before."""
    found = []
    for _ in range(1 if operation in ONCE else repeats):
        copy = store.path.with_name("copy")
        if operation in CHANGING:
            copy_store(store, copy)
        found.append(measured(operation, copy if operation in CHANGING else store.path, examples))
        shutil.rmtree(copy, ignore_errors=True)
    return found


def middle(runs: Sequence[Measured]) -> Measured:
    """The median of each measure."""
    return {name: None if runs[0][name] is None else statistics.median(run[name] for run in runs) for name in runs[0]}


def of_size(skeleton: S3TStore, folder: Path, examples: int, settings: Settings) -> dict[str, list[Measured]]:
    """Every operation on a store of one size."""
    store, filling = filled(skeleton, folder / "store", examples)
    runs = {"partition": [filling]}
    for operation in FIGURES:
        if operation not in ("partition", "import_state"):
            runs[operation] = repeated(operation, store, examples, settings.repeats)
    shutil.rmtree(store.private)
    runs["import_state"] = repeated("import_state", store, examples, settings.repeats)
    return runs


def run(settings: Settings, seed: int) -> dict[str, Any]:
    """Measures everything.

    Returns:
        `dict`: figures by name.
    """
    figures: dict[str, Any] = {}
    by_size: dict[str, dict[str, Measured]] = {}
    with tempfile.TemporaryDirectory() as name:
        skeleton = build_store(Path(name) / "skeleton", STORE, seed)
        for examples in settings.sizes:
            size = called(examples)
            folder = Path(name) / size
            folder.mkdir()
            runs = of_size(skeleton, folder, examples, settings)
            shutil.rmtree(folder)
            by_size[size] = {operation: middle(found) for operation, found in runs.items()}
            for operation, figure in FIGURES.items():
                factor = 1000 if figure.endswith("_ms") else 1
                figures |= spread(f"{figure}_{size}", [factor * one["seconds"] for one in runs[operation]])
            figures[f"peak_mb_{size}"] = max(by_size[size][operation]["peak_mb"] for operation in ERASERS)
        many = with_many_stages(skeleton, Path(name) / "many")
        seconds = [one["seconds"] for one in repeated("status", many, 10_000, settings.repeats)]
    first, last = (by_size[called(size)] for size in (min(settings.sizes), max(settings.sizes)))
    figures |= spread("status_seconds_5000_stages", seconds)
    figures["delete_growth"] = last["delete"]["cpu_seconds"] / first["delete"]["cpu_seconds"]
    figures["partition_rows_per_second"] = last["partition"]["rows_per_second"]
    return {**figures, "by_size": by_size}


def record(settings: Settings, seed: int, commit: str | None, figures: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file holds."""
    libraries = ("hf_s3t", "datasets", "numpy", "pyarrow", "torch", "transformers")
    return {
        "name": "bookkeeping",
        "commit": commit,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "settings": {**asdict(settings), "seed": seed},
        "figures": figures,
    }


def print_table(figures: dict[str, Any]) -> None:
    """A line for each operation and size."""
    print("examples  operation         seconds   of CPU   MB of memory   MB written")
    for size, operations in figures["by_size"].items():
        for operation in FIGURES:
            one = operations[operation]
            written = "not told" if one["written_mb"] is None else f"{one['written_mb']:.1f}"
            print(
                f"{size:<9} {operation:<15} {one['seconds']:9.3f} {one['cpu_seconds']:8.3f} {one['peak_mb']:14.0f} "
                f"{written:>12}"
            )
    for name in ("partition_rows_per_second", "delete_growth", "status_seconds_5000_stages"):
        print(f"{name}: {figures[name]:.3g}")


def main() -> None:
    """Runs the benchmark."""
    options = make_parser().parse_args()
    settings = QUICK if options.quick else Settings()
    if options.sizes:
        settings = replace(settings, sizes=tuple(options.sizes))
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    figures = run(settings, options.seed)
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(record(settings, options.seed, commit, figures), indent=1) + "\n")


if __name__ == "__main__":
    main()
