"""What the store writes down: the manifest `s3t.json`, which may be published, and the state, which never is.

Both are plain data with strict readers: a manifest may come from a hostile repository. Which file holds which, and
when it is written, is for `folder.py`.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from huggingface_hub.utils import validate_repo_id

from .adapter import CONFIG_FILE, WEIGHTS_FILE
from .errors import StateError, StoreError
from .partition import canonical, keyed_digest
from .plan import Plan, Stage

FORMAT = 1
"""Version of the folder format; a store of another version is refused."""

DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What reading data of another shape can raise."""


NOT_KNOWN = "0" * 64
"""In place of the HMAC of a manifest whose writer had not the tombstones of all its events, or not the key."""


@dataclass(frozen=True)
class Event:
    """A deletion or a readmission that a manifest has obeyed: no stage that it lists was trained before it on these
    places. It has the name of its receipt; nothing in it tells whom it was about.

    Args:
        places (`tuple[tuple[int, int], ...]`): `(shard, slice)`s; none for a readmission.
        named (`bool`): whether it made or lifted tombstones; `False` where whole slices were deleted with the state
            lost: whoever has the index makes the tombstones then.
    """

    places: tuple[tuple[int, int], ...]
    named: bool = True


Log = dict[str, Event]


def places_beyond(log: Log, known: Log) -> set[tuple[int, int]]:
    """Places of the events in a log that another one has not: what stages that know only the other must lose."""
    beyond: set[tuple[int, int]] = set()
    for name, event in log.items():
        beyond |= {*event.places} - {*(known[name].places if name in known else ())}
    return beyond


def merged(first: Log, second: Log) -> Log:
    """The events of two logs. One that both name has the places of both: names alone are easily forged."""
    log = {**first, **second}
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        log[name] = Event(tuple(sorted({*one.places, *other.places})), one.named and other.named)
    return log


@dataclass(frozen=True)
class Manifest:
    """Content of `s3t.json`.

    Args:
        generation (`int`): number of events so far.
        tombstones (`str`): HMAC over the events and their tombstones, or [`NOT_KNOWN`].
        key_check (`str`): tells whether a partition key is this store's.
        recipe (`dict`): every setting that changes bits.
        plan ([`Plan`]): the tree of stages.
        stages (`dict[Stage, dict[str, str]]`): sha256 per file of each trained stage.
        root (`dict`, *optional*): sha256 per file of the root adapter, or `None` while there is none.
        log (`dict[str, Event]`): what its stages have obeyed, by name.
    """

    generation: int
    tombstones: str
    key_check: str
    recipe: dict[str, Any]
    plan: Plan
    stages: dict[Stage, dict[str, str]] = field(default_factory=dict)
    root: dict[str, str] | None = None
    log: Log = field(default_factory=dict)

    @property
    def weights(self) -> set[str]:
        """sha256 of the weights of each trained stage."""
        return {files[WEIGHTS_FILE] for files in self.stages.values()}

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
            "log": _log_json(self.log),
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
            plan, root, log = Plan.from_json(data["plan"]), data["root"], _log(data["log"])
            return cls(
                _generation(data["generation"], log),
                _digest(data["tombstones"], 64),
                _digest(data["key_check"], 32),
                _recipe(data["recipe"]),
                plan,
                {_stage(name, plan): _files(record["sha256"]) for name, record in data["stages"].items()},
                None if root is None else _files(root),
                log,
            )
        except DAMAGED as error:
            what = f"{type(error).__name__} {error}"
            raise StoreError(f"The manifest is damaged: {what}. Restore it from a backup.") from None


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.80} is no number of deletions")
    return value


def _generation(value: Any, log: Log) -> int:
    if _count(value) != len(log):
        raise ValueError(f"generation {value} does not fit {len(log)} events")
    return value


def _digest(value: Any, length: int) -> str:
    if not re.fullmatch(f"[0-9a-f]{{{length}}}", value):
        raise ValueError(f"{value!r:.80} is no digest of {length} hexadecimal digits")
    return value


def _recipe(value: Any) -> dict[str, Any]:
    parts = ("config", "partition", "base")
    if not isinstance(value, dict) or not all(isinstance(value[name], dict) for name in parts):
        raise ValueError("the recipe has not the sections config, partition and base")
    if value["base"].get("id") is not None:
        validate_repo_id(value["base"]["id"])
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
    """Where a deleted example was, and since when it must not be trained on.

    Args:
        deletions (`dict[str, tuple[tuple[int, int], ...]]`): by the names of the deletions that made it, the places
            that each found. A readmission lifts those that it knew of; the tombstone stands while one is left.
        generation (`int`): of the state that learned of the newest of them.
    """

    deletions: dict[str, tuple[tuple[int, int], ...]]
    generation: int

    @property
    def places(self) -> set[tuple[int, int]]:
        """`(shard, slice)`s where the example was."""
        return {place for places in self.deletions.values() for place in places}


@dataclass(frozen=True)
class State:
    """The part of the store that is never published, apart from key, index, intents and receipts.

    Args:
        generation (`int`): the manifest's generation that this state belongs to.
        ids, groups (`dict[str, Tombstone]`): tombstones by keyed digest.
        stages (`dict[str, dict]`): per trained stage its generation, number of examples, steps, seconds and versions.
        caches (`tuple[str, ...]`): files of the datasets cache outside the store that may hold the examples' text.
        log (`dict[str, Event]`): every deletion and readmission that this state knows, by name. It only grows.
        key_check (`str`): of the store that it belongs to, as in its manifest.
    """

    generation: int = 0
    ids: dict[str, Tombstone] = field(default_factory=dict)
    groups: dict[str, Tombstone] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    caches: tuple[str, ...] = ()
    log: Log = field(default_factory=dict)
    key_check: str = ""

    def buries(self, digest: str, group: str | None) -> bool:
        """Whether a tombstone stands for an example, or for its group."""
        return digest in self.ids or (group is not None and group in self.groups)

    def digest(self, key: bytes) -> str:
        """HMAC over the events and the tombstones, which the manifest carries."""
        stones = {
            kind: {digest: _deletions_json(stone) for digest, stone in all_.items()}
            for kind, all_ in (("ids", self.ids), ("groups", self.groups))
        }
        return hmac.new(key, b"tombstones\0" + canonical({"log": _log_json(self.log), **stones}), "sha256").hexdigest()

    def knows(self, manifest: Manifest) -> bool:
        """Whether this state has every event that a manifest has obeyed."""
        return manifest.log.keys() <= self.log.keys()

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
            "log": _log_json(self.log),
            "key_check": self.key_check,
        }

    def tombstones_json(self, key: bytes) -> dict[str, Any]:
        """What may travel in a private repository: events and tombstones, nothing of what is live, and their HMAC."""
        kept = ("format", "generation", "ids", "groups", "log", "key_check")
        return {**{name: value for name, value in self.to_json().items() if name in kept}, "hmac": self.digest(key)}

    @classmethod
    def from_tombstones_json(cls, data: Any, key: bytes) -> State:
        """Reads what travelled.

        Raises:
            StateError: it is not of the right form, or was not written by somebody with the key.
        """
        state = cls.from_json(data)
        if not hmac.compare_digest(str(data.get("hmac")).encode(), state.digest(key).encode()):
            raise StateError("The tombstones were not written by somebody who has the partition key.")
        return state

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
                _log(data["log"]),
                str(data["key_check"]),
            )
        except DAMAGED as error:
            what = f"{type(error).__name__} {error}"
            raise StateError(f"The state is damaged: {what}. Restore it from a backup.") from None


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


def _log_json(log: Mapping[str, Event]) -> dict[str, Any]:
    return {name: {"places": [list(place) for place in e.places], "named": e.named} for name, e in log.items()}


def _log(data: Any) -> Log:
    return {str(name): _event(event) for name, event in data.items()}


def _event(data: Any) -> Event:
    places = tuple((_count(shard), _count(slice_id)) for shard, slice_id in data["places"])
    if type(data["named"]) is not bool:
        raise ValueError(f"{data['named']!r:.80} is neither true nor false")
    return Event(places, data["named"])


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
