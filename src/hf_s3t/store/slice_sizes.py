"""How many rows, and how many groups, lie in each slice; and what to choose where they are too few to lie evenly.

The partition draws each group's slice by chance (each row's, where rows have no group). So a slice of which `n` are
expected has `n` more or less the square root of `n`: of 10 expected it has between 4 and 16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from statistics import median
from typing import NamedTuple

from ..lora.config import S3TConfig
from .database import Place
from .partition import Entry, assign

EVEN = 20
"""So many rows, or groups, are expected in a slice that has, in 99 of 100, more than half of that."""
NAMED = 12
"""Empty slices that are named."""


class SliceSizes(NamedTuple):
    """Rows and groups in each `(shard, slice)`; empty slices are there, with 0."""

    rows: dict[Place, int]
    groups: dict[Place, int]
    units: frozenset[str]  # groups, and rows without one: what is drawn
    config: S3TConfig

    @classmethod
    def of(cls, entries: Mapping[str, Entry], config: S3TConfig) -> SliceSizes:
        """Counts entries of the index, by the keyed digests of their ids."""
        places = [(shard, at) for shard in range(config.num_shards) for at in range(config.num_slices)]
        units = {entry.group or digest: entry[:2] for digest, entry in entries.items()}
        rows, groups = Counter(entry[:2] for entry in entries.values()), Counter(units.values())
        count = lambda found: {place: found[place] for place in places}  # noqa: E731
        return cls(count(rows), count(groups), frozenset(units), config)

    @property
    def empty(self) -> list[Place]:
        """Slices without a row."""
        return [place for place, number in self.rows.items() if not number]

    def lines(self, key: bytes | None) -> list[str]:
        """What a person is told of them, with advice where a key is given: it cuts the rows into other slices."""
        sizes = f"Rows per slice: {_spread(self.rows.values())}, of {len(self.rows)} slices."
        if self.config.group_column is not None:
            sizes += f" Groups ({self.config.group_column}) per slice: {_spread(self.groups.values())}."
        told = [sizes]
        if empty := self.empty:
            names = ", ".join(f"{shard}: {at}" for shard, at in empty[:NAMED])
            more = f" and {len(empty) - NAMED} more" if len(empty) > NAMED else ""
            told.append(f"Empty (shard: slice): {names}{more}. A stage that has only such slices learns nothing.")
        if key is not None and (advice := self.advice(key)):
            told.append(advice)
        return told

    def advice(self, key: bytes) -> str | None:
        """What to choose instead, where there are too few for the slices; `None` where there are enough."""
        m, most, number = self.config.num_shards, self.config.num_slices, len(self.units)
        if number >= EVEN * m * most or m * most == 1:
            return None
        what = "rows" if self.config.group_column is None else "groups"
        few = f"{number} {what} are few for {m * most} slices: chance makes them uneven below {EVEN} per slice."
        if self.config.slice_columns is not None:
            return f"{few} The dataset's own slice columns decide."
        fewer = max(number // (EVEN * m), 1), max(number // (EVEN * most), 1)
        better = [f"num_slices={fewer[0]} ({self._cut(key, m, fewer[0])})"] if fewer[0] < most else []
        better += [f"num_shards={fewer[1]} ({self._cut(key, fewer[1], most)})"] if fewer[1] < m else []
        whole = " A shard of one slice has nothing left to serve after a deletion in it, until the repair."
        return f"{few} Better: {'; or '.join(better)}.{whole if 1 in (most, fewer[0]) else ''}"

    def _cut(self, key: bytes, shards: int, slices: int) -> str:
        """What would lie in so many slices."""
        counts = Counter(assign(key, unit, shards, slices) for unit in self.units)
        return _spread(counts[shard, at] for shard in range(shards) for at in range(slices))


def _spread(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return f"least {found[0]:,}, median {median(found):g}, most {found[-1]:,}"
