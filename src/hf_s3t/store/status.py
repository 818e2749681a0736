"""What a store tells of itself: what is trained, served, missing and deleted, and where one example is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from ..plan.life import LifeLeft, life_left
from ..plan.tree import Stage
from .database import Kind, Place, StateDatabase
from .export_records import carrying, read_exports
from .folder import StoreFolder
from .ids import id_text
from .key_place import KeyPlace, key_place
from .recipe_differences import Accepted


@dataclass(frozen=True)
class Location:
    """Where one asked-for id or group is.

    Args:
        asked (`str`): as it was asked.
        found (`str`): `"live"`, `"deleted"` (a tombstone) or `"unknown"`.
        places (`tuple[tuple[int, int], ...]`): its `(shard, slice)`s.
        stages (`tuple[str, ...]`): live stages that were computed with it, or would be.
        looks_like (`str`): nobody asked for this one: it is another spelling of what was asked for.
    """

    asked: str
    found: str
    places: tuple[Place, ...]
    stages: tuple[str, ...]
    looks_like: str = ""


@dataclass(frozen=True)
class Status:
    """A store at a glance; see [`S3TStore.status`].

    `dark_examples` lie in slices that are in no served prefix: nothing that answers has seen them until a repair;
    `None` without the state. `requests` are the deletions received. `life` says how many more requests, each for one
    example, the store is expected to take without a repair: `"uniform"` if they hit all places alike, `"given"` under
    the prior.
    `repair_budget` is there where the plan is that of a repair by cost: the config's may lack more. `stacks` says how
    many live stages each set of versions trained: what is bit-equal is so within one. `accepted` are settings that
    were changed while stages lived: what is trained since is not bit-equal to training from scratch. `key` says where
    the partition key is: whoever has it and the state can confirm the name of a deleted person.
    """

    path: str
    generation: int
    num_shards: int
    num_slices: int
    repair_budget: int | None
    planned: int
    trained: int
    missing: tuple[str, ...]
    repair_slice_passes: float
    served: dict[str, tuple[int, ...]]
    dead_shards: tuple[int, ...]
    examples: int | None
    deleted_examples: int | None
    dark_examples: int | None
    requests: int
    interrupted_deletions: int
    exports: tuple[str, ...]
    stale_exports: tuple[str, ...]
    life: dict[str, LifeLeft]
    stacks: dict[str, int]
    accepted: tuple[Accepted, ...]
    key: KeyPlace

    def to_json(self) -> dict[str, Any]:
        """Plain data. A life that does not end, because the prior rules its end out, is `None`."""
        life = {
            under: {
                until: {"mean": _finite(life.mean), "standard_deviation": _finite(life.standard_deviation)}
                for until, life in left._asdict().items()
            }
            for under, left in self.life.items()
        }
        return {**asdict(self), "life": life}

    @property
    def requests_left(self) -> float:
        """Expected requests until the first shard is dead, under the prior that leaves fewer."""
        return min(left.until_first_dead.mean for left in self.life.values())


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def status_of(store: StoreFolder, prior: Sequence[float] | None) -> Status:
    """See [`S3TStore.status`]."""
    manifest = store.live()
    priors = {"uniform": None, "given": manifest.deletion_prior if prior is None else prior}
    served = manifest.served_ends
    alive = {end.shard for end in served}
    missing = manifest.plan.missing(manifest.stages)
    examples: int | None = None
    deleted: int | None = None
    dark: int | None = None
    stale: list[str] = []  # with the state lost the record of exports is lost, too
    stacks: dict[str, int] = {}
    exports: list[str] = []
    if store.has_state:
        exports = list(read_exports(store))
        with store.reading() as state:
            examples, deleted = state.count, state.deleted
            seen = {(end.shard, at) for end in served for at in end.prefix}
            dark = sum(count for place, count in state.counts().items() if place not in seen)
            stacks, newest = state.stacks(manifest.names), state.newest_deletions()
        stale = carrying(store, newest)
    return Status(
        path=str(store.path),
        generation=manifest.generation,
        num_shards=manifest.plan.num_shards,
        num_slices=manifest.plan.num_slices,
        repair_budget=manifest.repair.cost_budget if manifest.repair else None,
        planned=len(manifest.plan.stages),
        trained=len(manifest.stages),
        missing=tuple(stage.name for stage in missing),
        repair_slice_passes=round(sum(stage.passes(manifest.replay) for stage in missing), 2),
        served={end.name: end.prefix for end in served},
        dead_shards=tuple(shard for shard in range(manifest.plan.num_shards) if shard not in alive),
        examples=examples,
        deleted_examples=deleted,
        dark_examples=dark,
        requests=manifest.deletions,
        interrupted_deletions=len(store.intents()),
        exports=tuple(exports),
        stale_exports=tuple(stale),
        life={
            under: life_left(manifest.plan, chances, manifest.stages)
            for under, chances in priors.items()
            if under == "uniform" or chances is not None
        },
        stacks=stacks,
        accepted=manifest.accepted,
        key=key_place(store),
    )


def seen_by(trained: Iterable[Stage]) -> Callable[[tuple[Place, ...]], tuple[str, ...]]:
    """Tells which of the trained stages saw some places: of thousands of examples there are few."""
    ordered = sorted(trained)
    return cache(lambda places: tuple(stage.name for stage in ordered if not stage.slices.isdisjoint(places)))


def location_of(
    value: Any, digest: str, kind: Kind, state: StateDatabase, stages: Callable[[tuple[Place, ...]], tuple[str, ...]]
) -> Location:
    """Where something is, and which stages saw it; `stages` is what [`seen_by`] gave."""
    if kind == "id":
        entry = state.entry(digest)
        places: tuple[Place, ...] = (entry[:2],) if entry is not None else ()
    else:
        places = tuple(sorted({entry[:2] for entry in state.members(digest).values()}))
    if places:
        return Location(id_text(value), "live", places, stages(places))
    stone = state.tombstone(kind, digest)
    if stone is not None:
        return Location(id_text(value), "deleted", tuple(sorted(stone.places)), ())
    return Location(id_text(value), "unknown", (), ())
