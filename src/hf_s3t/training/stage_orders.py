"""What a training takes from the store and gives back, one stage at a time: the order to train it, and the result.

Every function runs on the main process, takes the write lock for a moment, and looks for deletions under it. A
training never holds that lock while it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from ..files import remove
from ..lora.adapter import Adapter
from ..plan.tree import Stage
from ..store.partition import entries_digest, examples_digest
from ..store.recipe_differences import recipe_digest
from ..store.store import S3TStore
from .reconcile import check_generation
from .rows import TrainRows


class StageDropped(Exception):
    """A deletion hit the running stage: it is abandoned without a trace."""


@dataclass(frozen=True)
class StageOrder:
    """What every process needs to train one stage."""

    stage: Stage
    examples: tuple[str, ...]  # keyed digests, slice by slice, ordered by digest
    content: str  # one digest for what stands in those examples
    parent: Adapter | None  # the assembled parent prefix
    generation: int  # of the store when the order was given out
    steps_before: int  # optimizer steps of all stages that the store holds: where the run's step count stands
    index: str | None = None  # one digest for what the index knows of them; `None`: its rows are other ones by now

    @property
    def about(self) -> dict[str, Any]:
        """What the store's record of the stage says of its examples."""
        known = {} if self.index is None else {"index": self.index}
        return {"generation": self.generation, "examples": len(self.examples), "data": self.mark["data"], **known}

    @property
    def mark(self) -> dict[str, str]:
        """By what a running checkpoint of this very stage, on these very examples, is known."""
        return {"stage": self.stage.name, "data": examples_digest(self.examples), "content": self.content}


def next_order(
    store: S3TStore, rows: TrainRows, choose: Callable[[tuple[Stage, ...]], Iterable[Stage]] = iter
) -> StageOrder | None:
    """A stage that the store lacks, with its rows as they may be used now; `None` when there is none to train.

    It is the first of those that `choose` gives of all missing ones. Its parent has to be there.
    """
    with store.writing():
        manifest = store.manifest()
        missing = manifest.plan.missing(manifest.stages)
        with store.reading() as state:
            check_generation(store, manifest, state)  # deletions may have come while another stage trained
            stage = next(iter(choose(missing)), None)
            if stage is None:
                return None
            steps, generation, examples = state.steps(), state.generation, rows.examples(stage, state)
        parent = None
        if stage.parent is not None:
            parent = store.assemble(stage.shard, stage.parent.prefix, manifest)
        content = examples_digest([rows.entries[digest].content for digest in examples])
        index = entries_digest(examples, rows.entries) if rows.changed.isdisjoint(examples) else None
        return StageOrder(stage, examples, content, parent, generation, steps, index)


def is_hit(store: S3TStore, order: StageOrder) -> bool:
    """Whether a deletion that began after the order was given out covers a slice of its stage."""
    told = store.manifest().log  # read before the intents, and they before the state: each goes when the next knows
    intents = {intent["receipt"]["receipt"]: intent["places"] for intent in store.intents()}
    with store.reading() as state:
        log = state.log()
        if not told.keys() <= {*intents, *log}:  # it came without its tombstones: whose it was is not known
            return True
        if any(order.stage.slices & places for name, places in intents.items() if name not in log):
            return True
        if len(log) == order.generation:
            return False
        newest = state.newest_deletions()
        if any(newest.get(place, 0) > order.generation for place in order.stage.slices):
            return True
        return not state.has_all(order.examples)  # a tombstone may have been lifted again, but its example is gone


class StoreWatch:
    """Tells a training of deletions, by the store."""

    def __init__(self, store: S3TStore):
        self.store = store
        self._marks: Any = None

    def changed(self) -> bool:
        """Whether a deletion began or ended since this was asked last. Cheap."""
        before, self._marks = self._marks, self.store.marks()
        return self._marks != before

    def is_hit(self, order: StageOrder) -> bool:
        """Whether a deletion hit a stage; see [`is_hit`]."""
        return is_hit(self.store, order)

    def knows_all(self, examples: Iterable[str]) -> bool:
        """Whether all of some examples are in the index."""
        with self.store.reading() as state:
            return state.has_all(examples)

    def writing(self) -> AbstractContextManager[Any]:
        """Inside, no deletion begins."""
        return self.store.writing()


def commit(store: S3TStore, order: StageOrder, adapter: Adapter, record: dict[str, Any]) -> None:
    """Writes a trained stage: its record first, the manifest, which makes it count, last.

    Raises [`StageDropped`], and writes nothing, if a deletion hit it.
    """
    with store.writing():
        if is_hit(store, order):
            raise StageDropped
        files = store.write_stage(order.stage, adapter)
        manifest = store.manifest()
        record = {**record, "recipe": recipe_digest(manifest.recipe)}
        if manifest.accepted:  # which settings it was trained with
            record["accepted"] = len(manifest.accepted)
        with store.changing() as state:
            state.write_record(order.stage.name, {**record, "files": files})
        store.write_manifest(replace(manifest, stages={**manifest.stages, order.stage: files}))
        remove(running_folder(store, order.stage))


def running_folder(store: S3TStore, stage: Stage) -> Any:
    """Where the Trainer puts the checkpoints of a running stage."""
    return store.private / "running" / stage.name.replace("/", "_")
