"""The part of a store that is never published: what was deleted, with its tombstones, and what each stage trained on.

It is plain data with a strict reader; which file holds it, and when it is written, is for `folder.py`.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import StateError
from ..plan.tree import Stage
from .manifest import DAMAGED, FORMAT, Log, Manifest, log_json, merged, read_count, read_log
from .partition import canonical, keyed_digest


@dataclass(frozen=True)
class Tombstone:
    """Where a deleted example was, and since when it must not be trained on.

    A readmission lifts the deletions that it knew of; the tombstone stands while one is left.
    """

    deletions: dict[str, tuple[tuple[int, int], ...]]  # by the name of each that made it: the places that it found
    generation: int  # of the state that learned of the newest of them

    @property
    def places(self) -> set[tuple[int, int]]:
        """`(shard, slice)`s where the example was."""
        return {place for places in self.deletions.values() for place in places}


@dataclass(frozen=True)
class State:
    """The part of the store that is never published, apart from key, index, intents and receipts."""

    generation: int = 0  # the manifest's that this state belongs to
    ids: dict[str, Tombstone] = field(default_factory=dict)  # by keyed digest
    groups: dict[str, Tombstone] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # generation, examples, steps, seconds, versions
    caches: tuple[str, ...] = ()  # files of the datasets cache outside the store that may hold the examples' text
    log: Log = field(default_factory=dict)  # every deletion and readmission that this state knows; it only grows
    key_check: str = ""  # of the store that it belongs to, as in its manifest

    def buries(self, digest: str, group: str | None) -> bool:
        """Whether a tombstone stands for an example, or for its group."""
        return digest in self.ids or (group is not None and group in self.groups)

    def digest(self, key: bytes) -> str:
        """HMAC over the events and the tombstones, which the manifest carries."""
        stones = {
            kind: {digest: _deletions_json(stone) for digest, stone in all_.items()}
            for kind, all_ in (("ids", self.ids), ("groups", self.groups))
        }
        return hmac.new(key, b"tombstones\0" + canonical({"log": log_json(self.log), **stones}), "sha256").hexdigest()

    def knows(self, manifest: Manifest) -> bool:
        """Whether this state has every event that a manifest has obeyed."""
        return manifest.log.keys() <= self.log.keys()

    def only(self, stages: Iterable[Stage]) -> State:
        """The state with the training records of some stages alone."""
        names = {stage.name for stage in stages}
        return replace(self, stages={name: record for name, record in self.stages.items() if name in names})

    def stacks(self, stages: Iterable[Stage]) -> dict[str, int]:
        """How many of some stages each set of versions trained, as far as it is on record."""
        records = [self.stages.get(stage.name, {}) for stage in stages]
        return dict(Counter(stack_line(record["versions"]) for record in records if "versions" in record))

    def to_json(self) -> dict[str, Any]:
        """Plain data for `.s3t/state.json`."""
        return {
            "format": FORMAT,
            "generation": self.generation,
            "ids": {digest: _tombstone_json(stone) for digest, stone in self.ids.items()},
            "groups": {digest: _tombstone_json(stone) for digest, stone in self.groups.items()},
            "stages": self.stages,
            "caches": list(self.caches),
            "log": log_json(self.log),
            "key_check": self.key_check,
        }

    def tombstones_json(self, key: bytes) -> dict[str, Any]:
        """What may travel in a private repository: events and tombstones, nothing of what is live, and their HMAC."""
        kept = ("format", "generation", "ids", "groups", "log", "key_check")
        return {**{name: value for name, value in self.to_json().items() if name in kept}, "hmac": self.digest(key)}

    @classmethod
    def from_tombstones_json(cls, data: Any, key: bytes) -> State:
        """Reads what travelled. A [`StateError`] if somebody without the key wrote it."""
        state = cls.from_json(data)
        if not hmac.compare_digest(str(data.get("hmac")).encode(), state.digest(key).encode()):
            raise StateError("The tombstones were not written by somebody who has the partition key.")
        return state

    @classmethod
    def from_json(cls, data: Any) -> State:
        """Reads a state strictly. A [`StateError`] if it is none, or of another format version."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise StateError(f"The state is not of format {FORMAT}. Use the version of hf_s3t that wrote it.")
        try:
            return cls(
                read_count(data["generation"]),
                {digest: _tombstone(stone) for digest, stone in data["ids"].items()},
                {digest: _tombstone(stone) for digest, stone in data["groups"].items()},
                dict(data.get("stages", {})),
                tuple(data.get("caches", ())),
                read_log(data["log"]),
                str(data["key_check"]),
            )
        except DAMAGED as error:
            what = f"{type(error).__name__} {error}"
            raise StateError(f"The state is damaged: {what}. Restore it from a backup.") from None


def stack_line(versions: Mapping[str, str]) -> str:
    """Versions of what computed, as one line."""
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def united(ours: State, theirs: State) -> State:
    """Our state with the events and tombstones of another one of the same store; in any order, the same comes out.

    A deletion that one side has not in a tombstone was lifted there if that side knows it, and is new to it if not.
    """
    log = merged(ours.log, theirs.log)
    ids = _joined(ours.ids, theirs.ids, ours.log, theirs.log, len(log))
    groups = _joined(ours.groups, theirs.groups, ours.log, theirs.log, len(log))
    return replace(ours, generation=len(log), ids=ids, groups=groups, log=log)


Stones = Mapping[str, Tombstone]


def _joined(ours: Stones, theirs: Stones, our_log: Log, their_log: Log, generation: int) -> dict[str, Tombstone]:
    none, joined = Tombstone({}, 0), {}
    for digest in {**ours, **theirs}:
        here, there = ours.get(digest, none), theirs.get(digest, none)
        kept = {n: at for n, at in here.deletions.items() if n in there.deletions or n not in their_log}
        new = {n: at for n, at in there.deletions.items() if n not in here.deletions and n not in our_log}
        if kept or new:
            joined[digest] = Tombstone({**kept, **new}, here.generation if kept else generation)
    return joined


def _deletions_json(stone: Tombstone) -> dict[str, Any]:
    return {name: [list(place) for place in places] for name, places in stone.deletions.items()}


def _tombstone_json(stone: Tombstone) -> dict[str, Any]:
    return {"deletions": _deletions_json(stone), "generation": stone.generation}


def _tombstone(data: Any) -> Tombstone:
    deletions = {
        str(name): tuple((int(shard), int(slice_id)) for shard, slice_id in places)
        for name, places in data["deletions"].items()
    }
    return Tombstone(deletions, int(data["generation"]))


def key_check_value(key: bytes) -> str:
    """A value by which a partition key is recognised without being told."""
    return keyed_digest(key, "key check", "hf_s3t")
