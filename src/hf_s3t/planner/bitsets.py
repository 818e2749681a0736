"""The stages of a plan as sets of bits, for many hit sets at once.

Responsible for what a set of hit slices leaves of a shard, and what a repair of it costs. A hit set is one unsigned
64-bit integer: bit `j` stands for slice `j`.
"""

from collections.abc import Iterable

import numpy as np

from ..plan.sequences import Order
from ..plan.tree import Plan

MAX_BITS = 64
TABLE_SLICES = 16  # up to here the answers for all 2^L hit sets are computed once


class StageSets:
    """What is left of each shard, and what is missing, for any hit set.

    Args:
        num_slices (`int`): Bits of a hit set.
        shards (`Iterable[tuple[tuple[int, int], ...]]`): For each shard, for each stage: the bits of its slices; and
            the length that is served when it is the longest live one, which is also its cost in slice passes.
        shard_of (`np.ndarray`): For each place `shard * L + slice` the shard that a request to it hits.
        bit_of (`np.ndarray`): For each place the bit that it hits there.

    >>> sets = StageSets.of(Plan.make(1, 2, [(0, 1), (1, 0)]))
    >>> hits, shards = np.array([0b00, 0b01, 0b10, 0b11], dtype=np.uint64), np.zeros(4, dtype=np.int64)
    >>> sets.lengths(hits, shards), sets.costs(hits, shards)
    (array([2, 1, 1, 0]), array([0, 3, 3, 4]))
    """

    def __init__(
        self,
        num_slices: int,
        shards: Iterable[tuple[tuple[int, int], ...]],
        shard_of: np.ndarray,
        bit_of: np.ndarray,
    ) -> None:
        if num_slices > MAX_BITS:
            raise ValueError(f"num_slices={num_slices}, but a simulation takes at most {MAX_BITS}. Use fewer slices.")
        self.num_slices, self.shard_of, self.bit_of = num_slices, shard_of, bit_of
        kinds: dict[tuple[tuple[int, int], ...], int] = {}
        self.kind_of = np.array([kinds.setdefault(shard, len(kinds)) for shard in shards])
        self.kinds = [[(np.uint64(bits), length) for bits, length in kind] for kind in kinds]
        self.full = np.array([max((length for _, length in kind), default=0) for kind in self.kinds])[self.kind_of]
        self.tables = self._tabulate() if num_slices <= TABLE_SLICES else None

    @classmethod
    def of(cls, plan: Plan) -> "StageSets":
        """The stages of a plan. More than 64 slices are a `ValueError`."""
        kinds = {orders: _bits_and_depths(orders) for orders in set(plan.sequences)}
        slices = np.arange(min(plan.num_slices, MAX_BITS), dtype=np.uint64)
        return cls(
            plan.num_slices,
            [kinds[orders] for orders in plan.sequences],
            np.repeat(np.arange(plan.num_shards), plan.num_slices),
            np.tile(np.uint64(1) << slices, plan.num_shards),
        )

    @classmethod
    def of_one_model(cls, num_shards: int, num_slices: int) -> "StageSets":
        """One model of all the data, which any request hits: one stage that costs `m L` and serves as many slices."""
        places = num_shards * num_slices
        return cls(1, [((1, places),)], np.zeros(places, dtype=np.int64), np.ones(places, dtype=np.uint64))

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return len(self.kind_of)

    @property
    def differ(self) -> bool:
        """Whether the shards have different stages; if not, no question needs to name them."""
        return len(self.kinds) > 1

    def lengths(self, hits: np.ndarray, shards: np.ndarray | None) -> np.ndarray:
        """The length of the served prefix of shard `shards[i]` when the slices in `hits[i]` were hit."""
        return self._look_up(0, hits, shards)

    def costs(self, hits: np.ndarray, shards: np.ndarray | None) -> np.ndarray:
        """The slice passes that a repair of shard `shards[i]` takes when the slices in `hits[i]` were hit."""
        return self._look_up(1, hits, shards)

    def _look_up(self, table: int, hits: np.ndarray, shards: np.ndarray | None) -> np.ndarray:
        kind_of = self.kind_of.take(shards) if self.differ and shards is not None else None
        if self.tables is not None:
            hits = hits.view(np.int64)
            return self.tables[table].take(hits if kind_of is None else hits | kind_of << self.num_slices)
        if kind_of is None:
            return _measure(self.kinds[0], hits)[table]
        found = np.zeros(len(hits), dtype=np.int64)
        for kind, stages in enumerate(self.kinds):
            found[kind_of == kind] = _measure(stages, hits[kind_of == kind])[table]
        return found

    def _tabulate(self) -> tuple[np.ndarray, np.ndarray]:
        every = np.arange(1 << self.num_slices, dtype=np.uint64)
        measured = [_measure(stages, every) for stages in self.kinds]
        return np.concatenate([m[0] for m in measured]), np.concatenate([m[1] for m in measured])


def _bits_and_depths(orders: Iterable[Order]) -> tuple[tuple[int, int], ...]:
    prefixes = dict.fromkeys(order[:depth] for order in orders for depth in range(1, len(order) + 1))
    return tuple((sum(1 << slice_id for slice_id in prefix), len(prefix)) for prefix in prefixes)


def _measure(stages: list[tuple[np.uint64, int]], hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The longest live length, and the cost of what is missing."""
    longest, missing = np.zeros(len(hits), dtype=np.int64), np.zeros(len(hits), dtype=np.int64)
    for bits, length in stages:
        hit = (hits & bits) != 0
        np.maximum(longest, np.where(hit, 0, length), out=longest)
        missing += length * hit
    return longest, missing
