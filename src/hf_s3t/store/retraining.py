"""Which stages are trained again, where that happens, and whether the rows are those that the store knows.

A trainer does the training (`training/retrain.py`), in a scratch folder that has the store's key and manifest and is
removed afterwards. The store is only read.
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ..plan.tree import Stage
from .audit import Check
from .folder import StoreFolder
from .manifest import Manifest
from .partition import Entry
from .requests import Place
from .stage_comparison import Retrained

ROWS_CHECK = "the rows are those that the index knows"

Retrain = Literal["all"] | Iterable[str]


class Retrainer(Protocol):
    """What a trainer has to know: to train some live stages of a store again, apart from it."""

    store: Any

    def train_again(self, store: StoreFolder, stages: Iterable[Stage]) -> tuple[Check, tuple[Retrained, ...]]: ...


MakeTrainer = Callable[[str], Retrainer]
"""Makes the trainer that trained the store, with another `output_dir`."""


def chosen_stages(
    store: StoreFolder, retrain: Retrain | None, sample: int | None, seed: int | None
) -> tuple[list[Stage], int | None]:
    """The stages to train again, and the seed of the draw, if it is one.

    A draw depends on the seed and the stages' names alone, so anybody can repeat it. Without a seed it is a new one.

    Raises:
        ValueError: what is asked for contradicts itself, or is not a live stage.
    """
    live = sorted(store.live().stages)
    if sample is not None:
        if retrain not in (None, "all") or sample < 1:
            raise ValueError("`sample` is a number of stages, 1 or more, that are drawn from all: name no stages too.")
        seed = secrets.randbelow(2**32) if seed is None else seed
        drawn = sorted(live, key=lambda stage: hashlib.sha256(f"{seed} {stage.name}".encode()).digest())
        return sorted(drawn[:sample]), seed
    if seed is not None:
        raise ValueError("`seed` belongs to a draw: give `sample`, too.")
    if retrain is None or retrain == "all":
        return ([] if retrain is None else live), None
    if isinstance(retrain, str):
        raise ValueError(f"`retrain` is 'all' or a list of stages, not {retrain!r:.80}.")
    names = {stage.name: stage for stage in live}
    unknown = sorted({str(name) for name in retrain} - names.keys())
    if unknown:
        known = ", ".join(names) or "none"
        raise ValueError(f"{unknown[0]} is not a live stage of {store.path}. Live stages: {known}.")
    return sorted(names[str(name)] for name in retrain), None


def train_again(
    store: StoreFolder, stages: Iterable[Stage], make_trainer: MakeTrainer
) -> tuple[Check, tuple[Retrained, ...]]:
    """Has stages trained again by a trainer with the store's model, arguments, config and train set.

    Raises:
        StateError: the state or the key is not here.
        RecipeError: the trainer's settings are not the store's.
        ValueError: the trainer would train somewhere else.
    """
    wanted = sorted(stages)
    with tempfile.TemporaryDirectory(prefix="hf_s3t-") as folder:
        scratch = StoreFolder(Path(folder) / "store")
        scratch.write_private("partition.key", store.key.hex().encode() + b"\n")
        scratch.write_manifest(_without(store.live(), wanted))  # how states are cached, and for which stages
        with store.reading():  # a state that is not there is told of before a model is loaded
            pass
        trainer = make_trainer(str(scratch.path))
        if trainer.store.path.resolve() != scratch.path.resolve():
            raise ValueError(f"The trainer would train into {trainer.store.path}; it must use the given `output_dir`.")
        return trainer.train_again(store, wanted)


def _without(manifest: Manifest, stages: Iterable[Stage]) -> Manifest:
    gone = set(stages)
    kept = {stage: files for stage, files in manifest.stages.items() if stage not in gone}
    return replace(manifest, stages=kept)


class RowDifferences:
    """How the rows that are handed in differ from those of the index, by the slices that they lie in.

    Rows that the index does not know are none of its business: no stage sees them.
    """

    def __init__(self, store: StoreFolder, rows: Mapping[str, Entry]):
        self.changed: dict[Place, int] = {}
        self.gone: dict[Place, int] = {}
        self.moved: dict[Place, int] = {}
        with store.reading() as state:
            for digest, entry in state.examples():
                row = rows.get(digest)
                kind = self.gone if row is None else self.moved if row[:3] != entry[:3] else self.changed
                if row is None or row != entry:
                    kind[entry[:2]] = kind.get(entry[:2], 0) + 1

    def told(self, places: Iterable[Place]) -> list[str]:
        """What is to be said of some slices."""
        found = []
        wanted = set(places)
        for kind, text in (
            (self.changed, "have another content than the index knows"),
            (self.gone, "are in the index and not in the train set"),
            (self.moved, "lie in another slice or group than the index knows"),
        ):
            at = {place: count for place, count in kind.items() if place in wanted}
            if at:
                where = ", ".join(f"{shard}:{slice_id}" for shard, slice_id in sorted(at))
                found.append(f"{sum(at.values())} of its rows {text} (shard:slice {where})")
        return found

    def check(self, stages: Iterable[Stage]) -> Check:
        """As a check of the store, with the stages that saw such rows."""
        broken = []
        for place in sorted({*self.changed, *self.gone, *self.moved}):
            names = [stage.name for stage in sorted(stages) if place in stage.slices]
            for told in self.told([place]):
                broken.append(f"{told.replace('its rows', 'the rows')}; stages that saw it: {', '.join(names)}")
        return Check(ROWS_CHECK, tuple(broken))
