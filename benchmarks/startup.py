"""How long the command line takes to answer, in seconds of CPU, beside what `import transformers, peft` takes.

Whoever answers erasure requests calls it twenty times a day, and each call is a new process. Every command runs in
one, on a small store: 2 shards of 4 slices, stages of random numbers, nothing is trained. Deletions have a copy each.

* `help_cpu_seconds`, `status_cpu_seconds`, `locate_cpu_seconds`, `delete_cpu_seconds`, `plan_cpu_seconds`: user and
  system time of `hf-s3t --help` and so on; `plan` is asked for one size, so that little is left of its own work.
* `import_cpu_seconds`: of `import hf_s3t` alone. `transformers_peft_cpu_seconds`: of `import transformers, peft`.
* `<name>_over_transformers_peft`: the ratio of the two in the same round.

Rounds go through all commands in turn; a first round, which writes bytecode, does not count.

```bash
python benchmarks/startup.py --json startup.json
python benchmarks/startup.py --quick
```
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from serving import REPOSITORY, build_store, copy_store, ratios, shown, spread
from serving import Settings as StoreSettings

STORE = StoreSettings(
    layers=8, hidden=64, intermediate=128, num_shards=2, num_slices=4, orders=((0, 1, 2, 3), (2, 3, 0, 1)), rows=200
)
HEAVY = "transformers_peft"
PLAN = ("plan", "--examples", "100", "--requests-per-day", "0.1", "--horizon-days", "10", "--shards", "1",
        "--slices", "2")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    repeats: int = 7


QUICK = Settings(repeats=1)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="check the machinery in one round, in under a minute")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seed", type=int, default=0, help="of the store's numbers (default: 0)")
    return parser


def commands(store: Path, copy: Path) -> dict[str, list[str]]:
    """What is measured, by name: each as the arguments of a Python."""
    verb = ["-c", "from hf_s3t.cli.main import app; app()"]  # what the script `hf-s3t` does
    return {
        "help": [*verb, "--help"],
        "status": [*verb, "status", str(store)],
        "locate": [*verb, "locate", str(store), "--ids", "row-3"],
        "delete": [*verb, "delete", str(copy), "--ids", "row-3"],
        "plan": [*verb, *PLAN],
        "import": ["-c", "import hf_s3t"],
        HEAVY: ["-c", "import transformers, peft"],
    }


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of one process, which has to end well."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}: {errors.decode()[-2000:]}")
    return used.ru_utime + used.ru_stime


def run(settings: Settings, seed: int) -> dict[str, Any]:
    """Measures everything.

    Returns:
        `dict`: figures by name.
    """
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = build_store(Path(folder) / "store", STORE, seed)
        for turn in range(settings.repeats + 1):
            copy = copy_store(store, Path(folder) / f"copy-{turn}")
            for name, arguments in commands(store.path, copy.path).items():
                found = cpu_seconds(arguments)
                if turn:
                    seconds.setdefault(name, []).append(found)
    figures: dict[str, Any] = {}
    for name, values in seconds.items():
        figures |= spread(f"{name}_cpu_seconds", values)
        if name != HEAVY:
            figures |= spread(f"{name}_over_{HEAVY}", ratios(values, seconds[HEAVY]))
    return figures


def record(settings: Settings, seed: int, commit: str | None, figures: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file holds."""
    libraries = ("hf_s3t", "huggingface_hub", "numpy", "peft", "torch", "transformers", "typer")
    return {
        "name": "startup",
        "commit": commit,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "settings": {**asdict(settings), "seed": seed},
        "figures": figures,
    }


def print_table(figures: dict[str, Any]) -> None:
    """A line for each command."""
    print("command            CPU seconds      of `import transformers, peft` (deviation in parentheses)")
    for name in (figure.removesuffix("_cpu_seconds") for figure in figures if figure.endswith("_cpu_seconds")):
        ratio = "1" if name == HEAVY else shown(figures, f"{name}_over_{HEAVY}")
        print(f"{name:<18} {shown(figures, f'{name}_cpu_seconds'):<16} {ratio}")


def main() -> None:
    """Runs the benchmark."""
    options = make_parser().parse_args()
    settings = QUICK if options.quick else Settings()
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    figures = run(settings, options.seed)
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(record(settings, options.seed, commit, figures), indent=1) + "\n")


if __name__ == "__main__":
    main()
