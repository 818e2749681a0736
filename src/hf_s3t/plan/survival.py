"""What a plan is worth: the length that deletions are expected to leave, exactly.

Responsible for how long each set of hit slices is expected to last, for the value of orders over all of those sets,
and for the best next path of stages. It leaves the search for plans to `search.py`.

An order survives as long as its prefixes do, and a prefix survives a hit set `D` while it has no slice in common with
it. So everything here is indexed by sets, written as bits: slice `j` is in set `U` if `U >> j & 1`.

              {0,1,2}              An order is a way up from {} to the top. `untouched` is the complement of `D`: the
            /    |    \\            prefixes below it survive, and the value of `D` is the length of the longest.
       {0,1}   {0,2}   {1,2}
         |   X       X   |         What a prefix adds to a plan is summed over the untouched sets above it that the
        {0}     {1}     {2}        plan serves with less; the best next order is the way up that adds most.
           \\     |     /
                {}
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .sequences import Order, check_count

LATTICE_SLICES = 16  # up to here all 2^L sets are held in memory
ROUNDING = 1e-12  # a gain below this part of the value is none


def checked_prior(prior: Sequence[float] | None, num_slices: int) -> np.ndarray:
    """The chances that a request hits each slice, `(num_slices,)`; equal ones without a prior.

    >>> checked_prior(None, 4)
    array([0.25, 0.25, 0.25, 0.25])
    """
    check_count("num_slices", num_slices, 1, 1000)
    chances = np.asarray([1 / num_slices] * num_slices if prior is None else prior, dtype=float)
    if chances.shape != (num_slices,):
        raise ValueError(f"The prior must have one number per slice, {num_slices}, not {prior!r:.100}. Correct it.")
    if not (chances >= 0).all() or abs(chances.sum() - 1) > 1e-6:
        raise ValueError(f"The prior must be non-negative and sum to 1, not {prior!r:.100}. Divide it by its sum.")
    return chances


def check_few(num_slices: int) -> None:
    """Raises `ValueError` if there are too many slices to look at all their sets."""
    if num_slices > LATTICE_SLICES:
        found = f"num_slices={num_slices}, but the best plan is searched for up to {LATTICE_SLICES} slices"
        raise ValueError(f'{found}. Give fewer slices, or choose the sequences by "spaced" or "random".')


def subset_sums(numbers: Iterable[float]) -> np.ndarray:
    """The sum over each set, `(2^L,)`.

    >>> subset_sums([1.0, 10.0])
    array([ 0.,  1., 10., 11.])
    """
    sums = np.zeros(1)
    for number in numbers:
        sums = np.concatenate([sums, sums + number])
    return sums


def life_weights(prior: Sequence[float]) -> np.ndarray:
    """How many requests every hit set is expected to last, from the first request to the last untouched slice.

    `w({}) = 1`, `w(D) = sum_{j in D} p_j w(D - j) / (1 - p(D))`: the expected number of visits to `D` of the chain in
    which each request adds its slice. The set of all slices lasts for ever and has weight 0: nothing survives it.

    Args:
        prior (`Sequence[float]`): The chance that a request hits each slice, of at most 16. A chance of 0 is a
            `ValueError`: such a slice would live for ever.

    Returns:
        `np.ndarray`: `(2^L,)`, by the bits of the hit set.

    >>> life_weights([0.5, 0.5])
    array([1., 1., 1., 0.])
    """
    check_few(len(prior))
    chances = checked_prior(prior, len(prior))
    if not (chances > 0).all():
        raise ValueError(f"No slice may have the chance 0: it would live for ever, in {prior!r:.100}. Raise it.")
    outside = subset_sums(chances)[::-1]  # 1 - p(D), without the cancellation
    weights = np.zeros(len(outside))
    weights[0] = 1.0
    for depth, (level, before) in enumerate(_levels(len(chances))[:-1], start=1):
        weights[level] = (chances[_slices_in(level, depth)] * weights[before]).sum(axis=1) / outside[level]
    return weights


def _slices_in(level: np.ndarray, depth: int) -> np.ndarray:
    """The slices of sets of equal size, `(sets, depth)`."""
    return np.nonzero(level[:, None] >> np.arange(LATTICE_SLICES) & 1)[1].reshape(len(level), depth)


def _levels(num_slices: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For 1 to L slices: the sets of that many, `(sets,)`, and each of them without one slice, `(sets, slices)`."""
    sizes = subset_sums([1] * num_slices)
    levels = []
    for depth in range(1, num_slices + 1):
        level = np.flatnonzero(sizes == depth)
        levels.append((level, level[:, None] ^ 1 << _slices_in(level, depth)))
    return levels


def surviving_lengths(orders: Iterable[Order], num_slices: int) -> np.ndarray:
    """The longest surviving prefix of some orders per set of untouched slices, `(2^L,)`.

    >>> surviving_lengths([(0, 1), (1,)], num_slices=2)
    array([0, 1, 1, 2], dtype=int8)
    """
    sets = np.arange(1 << num_slices)
    longest = np.zeros(len(sets), dtype=np.int8)
    for order in orders:
        alive, length = np.ones_like(longest), np.zeros_like(longest)
        for slice_id in order:
            alive &= (sets >> slice_id & 1).astype(np.int8)
            length += alive
        np.maximum(longest, length, out=longest)
    return longest


def path_cost(start: int, end: int) -> int:
    """Slice passes of the stages at depths `start + 1` to `end`.

    >>> path_cost(0, 4)
    10
    """
    return (end * (end + 1) - start * (start + 1)) // 2


def set_of(order: Iterable[int]) -> int:
    """The slices of an order as bits.

    >>> bin(set_of((0, 3)))
    '0b1001'
    """
    return sum(1 << slice_id for slice_id in order)


class Path(NamedTuple):
    """Stages to add to a plan: `order` from depth `start + 1` on. What is above is trained already.

    Args:
        order (`Order`): The slices from depth 1 on.
        start (`int`): How many of them the plan has as a node.
        gain (`float`): What the plan's value grows by.
    """

    order: Order
    start: int
    gain: float

    @property
    def cost(self) -> int:
        """Slice passes of the stages that are new."""
        return path_cost(self.start, len(self.order))


class Lattice:
    """Values of plans, over all hit sets of up to 16 slices.

    Args:
        prior (`Sequence[float]`): The chance that a request hits each slice.
        weights (`np.ndarray`, *optional*): What each hit set counts, `(2^L,)`; [`life_weights`] without.

    >>> Lattice([0.5, 0.5]).value([(0, 1), (1, 0)])
    4.0
    """

    def __init__(self, prior: Sequence[float], weights: np.ndarray | None = None) -> None:
        check_few(len(prior))
        self.num_slices = len(prior)
        self.prior = checked_prior(prior, self.num_slices)
        self._weights = (life_weights(prior) if weights is None else weights)[::-1].copy()  # by untouched set
        self._sizes = subset_sums([1] * self.num_slices).astype(int)
        self._levels = _levels(self.num_slices)
        self._profiles: dict[Order, np.ndarray] = {}
        self.every_order = float(self._weights @ self._sizes)  # what is untouched survives

    @property
    def effort(self) -> int:
        """How many searches for a path take a few seconds."""
        return int(min(6000, 3e8 / (self.num_slices**2 << self.num_slices)))

    def lengths(self, orders: Iterable[Order]) -> np.ndarray:
        """See [`surviving_lengths`]; each order is looked at once."""
        longest = np.zeros(len(self._sizes), dtype=np.int8)
        for order in orders:
            if order not in self._profiles:
                self._profiles[order] = surviving_lengths([order], self.num_slices)
            np.maximum(longest, self._profiles[order], out=longest)
        return longest

    def value(self, orders: Iterable[Order]) -> float:
        """The value of some orders: the longest surviving prefix, weighted over the hit sets."""
        return float(self._weights @ self.lengths(orders))

    def gains(self, lengths: np.ndarray) -> np.ndarray:
        """What each prefix set would add to a plan once all prefixes below it are there, `(2^L,)`.

        The sum of the weights of the untouched sets above `U` that the plan serves with less than `|U|`.
        """
        missed = self._weights[:, None] * (lengths[:, None] < np.arange(1, self.num_slices + 1))  # (sets, depth)
        for j in range(self.num_slices):  # sums over supersets, one slice at a time
            view = missed.reshape(-1, 2, self.num_slices << j)
            view[:, 0] += view[:, 1]
        return missed[np.arange(len(missed)), np.maximum(self._sizes - 1, 0)]

    def whole(self, orders: Iterable[Order]) -> Path | None:
        """The complete order that adds most to some orders; `None` if none adds anything."""
        gains = self.gains(self.lengths(orders))
        _, ways = self._ways(gains, {0: ()})
        path = self._back(ways[0], gains, {0: ()}, len(gains) - 1)
        return path if path.gain > ROUNDING * self.every_order else None

    def densest(self, orders: Sequence[Order], limit: int, dear: bool = False) -> Path | None:
        """The path with the most gain per slice pass, hung off the tree of some orders, that costs at most `limit`.

        Returns:
            `Path`: The best path; `None` if none fits, or none adds anything.
        """
        prefixes = {order[:depth] for order in orders for depth in range(1, len(order) + 1)}
        nodes = {0: ()} | {set_of(prefix): prefix for prefix in sorted(prefixes)}
        gains = self.gains(self.lengths(orders))
        starts, ways = self._ways(gains, nodes)
        costs = (self._sizes * (self._sizes + 1) - (starts * (starts + 1))[:, None]) // 2  # see path_cost
        fits = (costs > 0) & (costs <= limit)
        rates = np.where(fits, ways / np.where(fits & (not dear), costs, 1), -np.inf)
        if not starts.size or rates.max() <= ROUNDING * self.every_order:
            return None
        row, end = divmod(int(rates.argmax()), len(gains))
        hung = {node: order for node, order in nodes.items() if len(order) == starts[row]}
        return self._back(ways[row], gains, hung, end)

    def _ways(self, gains: np.ndarray, nodes: Mapping[int, Order]) -> tuple[np.ndarray, np.ndarray]:
        """Depths of nodes, and for each depth what the best way from a node of it up to a set adds, `(depths, 2^L)`.

        By dynamic programming over the sets. No way leads through a node: it would better begin there.
        """
        held = np.fromiter(nodes, dtype=int, count=len(nodes))
        starts = np.unique(self._sizes[held])
        starts = starts[starts < self.num_slices]
        ways = np.full((len(starts), len(gains)), -np.inf)
        taken = np.zeros(len(gains), dtype=bool)
        taken[held] = True
        for row, start in enumerate(starts):
            ways[row, held[self._sizes[held] == start]] = 0.0
        for depth, (level, before) in enumerate(self._levels, start=1):
            rows = int(np.searchsorted(starts, depth))  # those that start above
            reached = gains[level] + ways[:rows][:, before].max(axis=2)
            ways[:rows, level] = np.where(taken[level], -np.inf, reached)
        return starts, ways

    def _back(self, way: np.ndarray, gains: np.ndarray, nodes: Mapping[int, Order], end: int) -> Path:
        """The path that a way took, from its end back to its node."""
        slices: list[int] = []
        gain, here = 0.0, end
        while here not in nodes:
            gain += gains[here]
            j = -max((way[here ^ 1 << j], -j) for j in range(self.num_slices) if here >> j & 1)[1]
            slices.append(j)
            here ^= 1 << j
        return Path((*nodes[here], *reversed(slices)), len(nodes[here]), float(gain))
