"""One operation on a store's state, measured in a process of its own; `bookkeeping.py` calls this file.

It prints one line of JSON: `seconds` and `cpu_seconds` of the operation, opening the store and what it imports
included; `peak_mb`, by how much the process grew over what it was when it had imported `hf_s3t` (or, where rows are
hashed, what a training imports); and `written_mb`, what it handed to the operating system to write, `None` where that
does not tell.

```bash
python benchmarks/bookkeeping_operations.py locate STORE 10000
```
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_s3t import S3TStore

Work = Callable[[], dict[str, Any] | None]
"""What is measured; it may return more to tell."""
MANY = 10_000
"""So many examples are deleted at once, or as many as a store has a third of."""


def train_set(examples: int) -> Any:
    """Short rows with an id and a text."""
    import numpy
    import pyarrow
    from datasets import Dataset
    from pyarrow.compute import binary_join_element_wise

    numbers = pyarrow.array(numpy.arange(examples)).cast(pyarrow.string())
    texts = binary_join_element_wise("what person ", numbers, " once said about it is short", "")
    return Dataset(pyarrow.table({"id": binary_join_element_wise("row-", numbers, ""), "text": texts}))


def partition(path: Path, examples: int) -> Work:
    """Rows to places, and the state written; the state must not be there."""
    from hf_s3t.store.hashing import read_rows
    from hf_s3t.store.state import key_check_value

    store, dataset = S3TStore(path), train_set(examples)
    plan = store.manifest().plan
    columns = {"id_column": None, "group_column": None, "slice_columns": None}
    config: Any = SimpleNamespace(num_shards=plan.num_shards, num_slices=plan.num_slices, **columns)  # without PEFT
    places = [(shard, slice_id) for shard in range(plan.num_shards) for slice_id in range(plan.num_slices)]

    def work() -> dict[str, Any]:
        began = time.process_time()
        _, index = read_rows(dataset, store.key, config)
        read = time.process_time() - began
        with store.changing(create=True) as state:
            state.begin(key_check_value(store.key), places)
            state.add_examples(index)
        return {"rows_per_second": examples / read}

    return work


def records(path: Path, examples: int) -> Work:
    """What each stage is on record to have seen: the examples of the index."""
    from hf_s3t.store.partition import examples_digest, stage_examples

    def work() -> None:
        store = S3TStore(path)
        stages = store.manifest().stages
        with store.changing() as state:
            for stage in stages:
                by_slice = {slice_id: state.examples_of((stage.shard, slice_id)) for slice_id in stage.prefix}
                seen = stage_examples(stage, by_slice)
                record = {"generation": 0, "examples": len(seen), "data": examples_digest(seen), "steps": 1}
                state.write_record(stage.name, record)

    return work


def locate(path: Path, examples: int) -> Work:
    """One id."""

    def work() -> None:
        (found,) = S3TStore(path).locate(ids=[f"row-{examples // 3}"])
        assert found.found == "live"

    return work


def delete(path: Path, examples: int) -> Work:
    """One id."""

    def work() -> None:
        assert S3TStore(path).delete(ids=[f"row-{examples // 3}"]).examples == 1

    return work


def delete_10k(path: Path, examples: int) -> Work:
    """Ids from all over the store, in one request."""
    step = max(examples // MANY, 3)
    names = [f"row-{number}" for number in range(0, examples, step)][:MANY]

    def work() -> None:
        assert S3TStore(path).delete(ids=names).examples == len(names)

    return work


def status(path: Path, examples: int) -> Work:
    """A store at a glance."""

    def work() -> None:
        assert S3TStore(path).status().examples == examples

    return work


def verify(path: Path, examples: int) -> Work:
    """An audit of everything."""

    def work() -> None:
        from hf_s3t.store.audit import verify

        report = verify(path)
        assert report.ok and report.complete, [check for check in report.checks if check.outcome != "holds"]

    return work


def export_state(path: Path, examples: int) -> Work:
    """The backup of the state, beside the store."""
    return lambda: S3TStore(path).export_state(path.with_name(f"{path.name}.backup"))


def import_state(path: Path, examples: int) -> Work:
    """The backup brought to a store without a state."""

    def work() -> None:
        store = S3TStore(path)
        store.import_state(path.with_name(f"{path.name}.backup"))
        with store.reading() as state:
            assert state.count == examples

    return work


def second_start(path: Path, examples: int) -> Work:
    """What `train()` does before it trains, with the rows of the first time: they are hashed and compared."""
    from hf_s3t import S3TConfig
    from hf_s3t.training.reconcile import Wanted, reconcile
    from hf_s3t.training.rows import TrainRows

    store, dataset = S3TStore(path), train_set(examples)
    manifest = store.manifest()
    config = S3TConfig(num_shards=manifest.plan.num_shards, num_slices=manifest.plan.num_slices)

    def work() -> None:
        rows = TrainRows(dataset, store.key, config)
        rows.adopt(rows.marked(dataset))
        with store.writing():
            found = reconcile(store, config, Wanted(manifest.recipe, manifest.plan, None, rows, "error", False))
        assert found.stages == manifest.stages

    return work


OPERATIONS: dict[str, Callable[[Path, int], Work]] = {
    work.__name__: work
    for work in (
        partition, records, locate, delete, delete_10k, status, verify, export_state, import_state, second_start
    )
}  # fmt: skip


def peak_bytes() -> int:
    """The most memory that this process ever had. Linux's own count: `ru_maxrss` may be that of the parent."""
    try:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def written_bytes() -> int | None:
    """What this process has written so far, as far as the system tells."""
    try:
        return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])
    except (OSError, IndexError):
        return None


def main() -> None:
    """Measures one operation."""
    name, path, examples = sys.argv[1:]
    work = OPERATIONS[name](Path(path), int(examples))
    memory, written, cpu, began = peak_bytes(), written_bytes(), time.process_time(), time.perf_counter()
    more = work() or {}
    found = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    found["peak_mb"] = (peak_bytes() - memory) / 1e6
    after = written_bytes()
    told = None if written is None or after is None else (after - written) / 1e6
    print(json.dumps({**found, "written_mb": told, **more}))


if __name__ == "__main__":
    main()
