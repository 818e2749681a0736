"""What is said about the content of a state: tombstones, versions on one line, and by what its key is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .partition import keyed_digest


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


def stack_line(versions: Mapping[str, str]) -> str:
    """Versions of what computed, as one line."""
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def key_check_value(key: bytes) -> str:
    """A value by which a partition key is recognised without being told."""
    return keyed_digest(key, "key check", "hf_s3t")
