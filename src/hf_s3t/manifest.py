"""What the store writes down: the manifest `s3t.json`, which may be published, and the state, which never is.

Both are plain data with strict readers: a manifest may come from a hostile repository. Which file holds which, and when
it is written, is for `folder.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import StateError, StoreError
from .partition import canonical, keyed_digest
from .plan import Plan, Stage

FORMAT = 1
"""Version of the folder format; a store of another version is refused."""

HEX = re.compile(r"[0-9a-f]{32,64}")


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
            raise StoreError("This is no manifest of hf_s3t. Give the folder that a training wrote, with its s3t.json.")
        if data.get("format") != FORMAT:
            raise StoreError(
                f"The store has format {data.get('format')!r}; this version of hf_s3t reads format {FORMAT}. "
                "Use the version that wrote it, or a newer one."
            )
        try:
            stages = {Stage.from_name(name): _files(record["sha256"]) for name, record in data["stages"].items()}
            generation, root = int(data["generation"]), data["root"]
            return cls(
                generation,
                str(data["tombstones"]),
                str(data["key_check"]),
                dict(data["recipe"]),
                Plan.from_json(data["plan"]),
                stages,
                None if root is None else _files(root),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"The manifest is damaged: {type(error).__name__} {error}. Restore it from a backup.") from None


def _files(record: Any) -> dict[str, str]:
    for name, digest in record.items():
        if "/" in name or "\\" in name or name.startswith(".") or not HEX.fullmatch(digest):
            raise ValueError(f"{name!r}: {digest!r} is no file with its sha256")
    return dict(record)


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
    """

    generation: int = 0
    ids: dict[str, Tombstone] = field(default_factory=dict)
    groups: dict[str, Tombstone] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    caches: tuple[str, ...] = ()

    def buries(self, digest: str, group: str | None) -> bool:
        """Whether a tombstone stands for an example, or for its group."""
        return digest in self.ids or (group is not None and group in self.groups)

    def digest(self, key: bytes) -> str:
        """HMAC over the tombstones, which the manifest carries."""
        names = {"ids": sorted(self.ids), "groups": sorted(self.groups)}
        return hmac.new(key, b"tombstones\0" + canonical(names), hashlib.sha256).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain data for `.s3t/state.json`."""
        return {
            "format": FORMAT,
            "generation": self.generation,
            "ids": {digest: _tombstone_json(stone) for digest, stone in self.ids.items()},
            "groups": {digest: _tombstone_json(stone) for digest, stone in self.groups.items()},
            "stages": self.stages,
            "caches": list(self.caches),
        }

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
                int(data["generation"]),
                {digest: _tombstone(stone) for digest, stone in data["ids"].items()},
                {digest: _tombstone(stone) for digest, stone in data["groups"].items()},
                dict(data["stages"]),
                tuple(data["caches"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"The state is damaged: {type(error).__name__} {error}. Restore it from a backup.") from None


def _tombstone_json(stone: Tombstone) -> dict[str, Any]:
    return {"places": [list(place) for place in stone.places], "generation": stone.generation, "receipt": stone.receipt}


def _tombstone(data: Any) -> Tombstone:
    places = tuple((int(shard), int(slice_id)) for shard, slice_id in data["places"])
    return Tombstone(places, int(data["generation"]), str(data["receipt"]))


def key_check_value(key: bytes) -> str:
    """A value by which a partition key is recognised without being told."""
    return keyed_digest(key, "key check", "hf_s3t")
