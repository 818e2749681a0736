"""What the store writes down: the manifest `s3t.json`, which may be published, and the state, which never is.

Both are plain data with strict readers: a manifest may come from a hostile repository. Which file holds which, and
when it is written, is for `folder.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .adapter import CONFIG_FILE, WEIGHTS_FILE
from .errors import StateError, StoreError
from .partition import canonical, keyed_digest
from .plan import Plan, Stage

FORMAT = 1
"""Version of the folder format; a store of another version is refused."""

DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What reading data of another shape can raise."""


@dataclass(frozen=True)
class Manifest:
    """Content of `s3t.json`.

    Args:
        generation (`int`): number of deletions so far.
        tombstones (`str`): HMAC over the tombstones that belong to this generation.
        key_check (`str`): tells whether a partition key is this store's.
        recipe (`dict`): every setting that changes bits.
        plan ([`Plan`]): the tree of stages.
        stages (`dict[Stage, dict[str, str]]`): sha256 per file of each trained stage.
        root (`dict`, *optional*): sha256 per file of the root adapter, or `None` while there is none.
    """

    generation: int
    tombstones: str
    key_check: str
    recipe: dict[str, Any]
    plan: Plan
    stages: dict[Stage, dict[str, str]] = field(default_factory=dict)
    root: dict[str, str] | None = None

    def without(self, stages: Iterable[Stage]) -> Manifest:
        """The manifest less some stages."""
        gone = set(stages)
        return replace(self, stages={stage: files for stage, files in self.stages.items() if stage not in gone})

    def to_json(self) -> dict[str, Any]:
        """Plain data for `s3t.json`."""
        served = self.plan.served(self.stages)
        return {
            "library": "hf_s3t",
            "format": FORMAT,
            "generation": self.generation,
            "tombstones": self.tombstones,
            "key_check": self.key_check,
            "recipe": self.recipe,
            "plan": self.plan.to_json(),
            "stages": {
                stage.name: {"parent": stage.parent.name if stage.parent else None, "sha256": files}
                for stage, files in sorted(self.stages.items())
            },
            "served": {Stage(shard, prefix).name: list(prefix) for shard, prefix in sorted(served.items())},
            "root": self.root,
        }

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Reads a manifest strictly.

        Raises:
            StoreError: it is of another format version, or not a manifest.
        """
        if not isinstance(data, dict) or data.get("library") != "hf_s3t":
            raise StoreError("This is no manifest of hf_s3t. Give the folder that a training wrote.")
        if data.get("format") != FORMAT:
            raise StoreError(
                f"The store has format {data.get('format')!r}; this version of hf_s3t reads format {FORMAT}. "
                "Use the version that wrote it, or a newer one."
            )
        try:
            plan, root = Plan.from_json(data["plan"]), data["root"]
            return cls(
                _count(data["generation"]),
                _digest(data["tombstones"], 64),
                _digest(data["key_check"], 32),
                _recipe(data["recipe"]),
                plan,
                {_stage(name, plan): _files(record["sha256"]) for name, record in data["stages"].items()},
                None if root is None else _files(root),
            )
        except DAMAGED as error:
            what = f"{type(error).__name__} {error}"
            raise StoreError(f"The manifest is damaged: {what}. Restore it from a backup.") from None


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.80} is no number of deletions")
    return value


def _digest(value: Any, length: int) -> str:
    if not re.fullmatch(f"[0-9a-f]{{{length}}}", value):
        raise ValueError(f"{value!r:.80} is no digest of {length} hexadecimal digits")
    return value


def _recipe(value: Any) -> dict[str, Any]:
    parts = ("config", "partition", "base")
    if not isinstance(value, dict) or not all(isinstance(value[name], dict) for name in parts):
        raise ValueError("the recipe has not the sections config, partition and base")
    return value


def _stage(name: Any, plan: Plan) -> Stage:
    stage = Stage.from_name(name)
    if stage.shard >= plan.num_shards or max(stage.prefix) >= plan.num_slices:
        raise ValueError(f"{name} is no stage of {plan.num_shards} shards of {plan.num_slices} slices")
    return stage


def _files(record: Any) -> dict[str, str]:
    if not isinstance(record, dict) or set(record) != {CONFIG_FILE, WEIGHTS_FILE}:
        raise ValueError(f"{record!r:.200} does not name exactly {CONFIG_FILE} and {WEIGHTS_FILE}")
    return {name: _digest(digest, 64) for name, digest in record.items()}


@dataclass(frozen=True)
class Tombstone:
    """Where a deleted example was, and since when it must not be trained on."""

    places: tuple[tuple[int, int], ...]
    generation: int
    receipt: str


@dataclass(frozen=True)
class State:
    """The part of the store that is never published, apart from key, index, intents and receipts.

    Args:
        generation (`int`): the manifest's generation that this state belongs to.
        ids, groups (`dict[str, Tombstone]`): tombstones by keyed digest.
        stages (`dict[str, dict]`): per trained stage its generation, number of examples, steps, seconds and versions.
        caches (`tuple[str, ...]`): files of the datasets cache outside the store that may hold the examples' text.
        lifted (`dict[str, int]`): keyed digest of what was readmitted, and the generation of that.
        past (`dict[int, str]`): by generation, the digest of the tombstones that there were then.
    """

    generation: int = 0
    ids: dict[str, Tombstone] = field(default_factory=dict)
    groups: dict[str, Tombstone] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    caches: tuple[str, ...] = ()
    lifted: dict[str, int] = field(default_factory=dict)
    past: dict[int, str] = field(default_factory=dict)

    def buries(self, digest: str, group: str | None) -> bool:
        """Whether a tombstone stands for an example, or for its group."""
        return digest in self.ids or (group is not None and group in self.groups)

    def digest(self, key: bytes) -> str:
        """HMAC over the tombstones, which the manifest carries."""
        names = {"ids": sorted(self.ids), "groups": sorted(self.groups)}
        return hmac.new(key, b"tombstones\0" + canonical(names), hashlib.sha256).hexdigest()

    def remembers(self, manifest: Manifest, key: bytes) -> bool:
        """Whether the tombstones of a manifest that is not newer were ours at its generation."""
        since = manifest.generation
        ids, groups = ({d: s for d, s in all_.items() if s.generation <= since} for all_ in (self.ids, self.groups))
        digest = self.past.get(since) or replace(self, ids=ids, groups=groups).digest(key)
        return digest == manifest.tombstones

    def after(self, generation: int) -> set[tuple[int, int]]:
        """Places of the tombstones that are newer than a generation."""
        stones = [*self.ids.values(), *self.groups.values()]
        return {place for stone in stones if stone.generation > generation for place in stone.places}

    def beyond(self, other: State) -> set[tuple[int, int]]:
        """Places of the tombstones that another state has not."""
        pairs = ((self.ids, other.ids), (self.groups, other.groups))
        return {
            place for mine, known in pairs for d, stone in mine.items() if d not in known for place in stone.places
        }

    def only(self, stages: Iterable[Stage]) -> State:
        """The state with the training records of some stages alone."""
        names = {stage.name for stage in stages}
        return replace(self, stages={name: record for name, record in self.stages.items() if name in names})

    def to_json(self) -> dict[str, Any]:
        """Plain data for `.s3t/state.json`."""
        return {
            "format": FORMAT,
            "generation": self.generation,
            "ids": {digest: _tombstone_json(stone) for digest, stone in self.ids.items()},
            "groups": {digest: _tombstone_json(stone) for digest, stone in self.groups.items()},
            "stages": self.stages,
            "caches": list(self.caches),
            "lifted": self.lifted,
            "past": {str(generation): digest for generation, digest in self.past.items()},
        }

    def tombstones_json(self) -> dict[str, Any]:
        """What may travel in a private repository: tombstones and what lifted them, nothing of what is live."""
        kept = ("format", "generation", "ids", "groups", "lifted")
        return {name: value for name, value in self.to_json().items() if name in kept}

    @classmethod
    def from_json(cls, data: Any) -> State:
        """Reads a state strictly.

        Raises:
            StateError: it is of another format version, or not a state.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise StateError(f"The state is not of format {FORMAT}. Use the version of hf_s3t that wrote it.")
        try:
            return cls(
                _count(data["generation"]),
                {digest: _tombstone(stone) for digest, stone in data["ids"].items()},
                {digest: _tombstone(stone) for digest, stone in data["groups"].items()},
                dict(data.get("stages", {})),
                tuple(data.get("caches", ())),
                {digest: _count(generation) for digest, generation in data.get("lifted", {}).items()},
                {int(generation): _digest(digest, 64) for generation, digest in data.get("past", {}).items()},
            )
        except DAMAGED as error:
            what = f"{type(error).__name__} {error}"
            raise StateError(f"The state is damaged: {what}. Restore it from a backup.") from None


def united(ours: State, theirs: State) -> State:
    """Our state with their tombstones, and without what was readmitted after it had been deleted.

    Where the newer of the two knows all of it, the generation is its own; else a new one, above both, as a manifest of
    neither generation has obeyed all of it. What is learned is of that generation: our manifest has not obeyed it.
    """
    ids, new_ids = _joined(ours.ids, theirs.ids, ours.lifted, theirs.lifted)
    groups, new_groups = _joined(ours.groups, theirs.groups, ours.lifted, theirs.lifted)
    generation = max(ours.generation, theirs.generation)
    newer = [state for state in (ours, theirs) if state.generation == generation]
    if any((state.ids.keys(), state.groups.keys()) != (ids.keys(), groups.keys()) for state in newer):
        generation += 1
    ids |= {digest: replace(ids[digest], generation=generation) for digest in new_ids}
    groups |= {digest: replace(groups[digest], generation=generation) for digest in new_groups}
    lifted = {d: max(ours.lifted.get(d, 0), theirs.lifted.get(d, 0)) for d in {**ours.lifted, **theirs.lifted}}
    return replace(ours, generation=generation, ids=ids, groups=groups, lifted=lifted)


Stones = Mapping[str, Tombstone]


def _joined(
    ours: Stones, theirs: Stones, we_lifted: Mapping[str, int], they_lifted: Mapping[str, int]
) -> tuple[dict[str, Tombstone], set[str]]:
    """Tombstones of both, and which of them are new to us."""
    kept = {d: s for d, s in ours.items() if d in theirs or they_lifted.get(d, -1) < s.generation}
    learned = {d: s for d, s in theirs.items() if d not in ours and we_lifted.get(d, -1) < s.generation}
    return {**kept, **learned}, set(learned)


def _tombstone_json(stone: Tombstone) -> dict[str, Any]:
    places = [list(place) for place in stone.places]
    return {"places": places, "generation": stone.generation, "receipt": stone.receipt}


def _tombstone(data: Any) -> Tombstone:
    places = tuple((int(shard), int(slice_id)) for shard, slice_id in data["places"])
    return Tombstone(places, int(data["generation"]), str(data["receipt"]))


def key_check_value(key: bytes) -> str:
    """A value by which a partition key is recognised without being told."""
    return keyed_digest(key, "key check", "hf_s3t")
