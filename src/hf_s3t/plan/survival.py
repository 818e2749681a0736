"""What a plan is worth: the performance that deletions are expected to leave, exactly.

Responsible for how likely each set of hit slices is, for the value of orders over all of those sets, and for the best
next path of stages. It leaves more than 16 slices to `streams.py`, bounds to `bounds.py`, and the search for plans to
`optimal.py`.

An order survives as long as its prefixes do, and a prefix survives a hit set `D` while it has no slice in common with
it. So everything here is indexed by sets, written as bits: slice `j` is in set `U` if `U >> j & 1`.

              {0,1,2}              An order is a way up from {} to the top. `untouched` is the complement of `D`: the
            /    |    \\            prefixes below it survive, and the value of `D` is the performance of the longest.
       {0,1}   {0,2}   {1,2}
         |   X       X   |         What a prefix adds to a plan is summed over the untouched sets above it that the
        {0}     {1}     {2}        plan serves with less; the best next order is the way up that adds most.
           \\     |     /
                {}
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .sequences import Order, check_count

LATTICE_SLICES = 16  # up to here all 2^L sets are held in memory
MAX_REQUESTS = 10**6


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


def checked_performance(performance: Sequence[float] | None, num_slices: int) -> np.ndarray:
    """`f(0), f(1), ..., f(L)`, `(num_slices + 1,)`; the length itself without a performance.

    >>> checked_performance([0.7, 0.9], 2)
    array([0. , 0.7, 0.9])
    """
    curve = np.asarray(range(1, num_slices + 1) if performance is None else performance, dtype=float)
    if curve.shape != (num_slices,):
        found = f"must be {num_slices} numbers, of 1 to {num_slices} surviving slices, not {performance!r:.100}"
        raise ValueError(f"The performance {found}. Correct it.")
    curve = np.concatenate([[0.0], curve])
    if not np.isfinite(curve).all() or (np.diff(curve) < 0).any():
        raise ValueError(f"The performance must not fall from 0 on, not {performance!r:.100}. Sort or shift it.")
    return curve


# How likely each hit set is


def weights_after(prior: Sequence[float] | None, requests: int, num_slices: int | None = None) -> np.ndarray:
    """The chance of every hit set after a number of requests.

    `P_{r+1}(D) = P_r(D) p(D) + sum_{j in D} P_r(D - j) p_j`: sums of what is not negative, so nothing cancels.

    Args:
        prior (`Sequence[float]`, *optional*): The chance that a request hits each slice; equal ones without.
        requests (`int`): How many requests there were.
        num_slices (`int`, *optional*): Needed without a prior.

    Returns:
        `np.ndarray`: `(2^L,)`, by the bits of the hit set. Numbers out of range are a `ValueError`.

    >>> weights_after([0.5, 0.5], requests=2)
    array([0.  , 0.25, 0.25, 0.5 ])
    """
    return _history(prior, requests, num_slices)[0]


def weights_over(prior: Sequence[float] | None, requests: int, num_slices: int | None = None) -> np.ndarray:
    """The mean of [`weights_after`] over 1 to `requests` requests; arguments and errors as there.

    >>> weights_over([0.5, 0.5], requests=2)
    array([0.   , 0.375, 0.375, 0.25 ])
    """
    check_count("requests", requests, 1, MAX_REQUESTS)
    return _history(prior, requests, num_slices)[1] / requests


def _history(prior: Sequence[float] | None, requests: int, num_slices: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The chances after the last request, and their sum over all requests."""
    check_count("requests", requests, 0, MAX_REQUESTS)
    chances = _lattice_prior(prior, num_slices)
    inside = _subset_sums(chances)
    current = np.zeros(len(inside))
    current[0] = 1.0
    total = np.zeros(len(inside))
    for _ in range(requests):
        following = current * inside
        for j, chance in enumerate(chances):  # the middle axis of the reshaped arrays is bit j
            following.reshape(-1, 2, 1 << j)[:, 1] += chance * current.reshape(-1, 2, 1 << j)[:, 0]
        current = following
        total += current
    return current, total


def life_weights(prior: Sequence[float] | None, num_slices: int | None = None) -> np.ndarray:
    """How many requests every hit set is expected to last, from the first request to the last untouched slice.

    `w({}) = 1`, `w(D) = sum_{j in D} p_j w(D - j) / (1 - p(D))`. The set of all slices lasts for ever and has weight 0
    here: nothing survives it. Arguments and errors as in [`weights_after`]; a chance of zero is refused, since such a
    slice outlives every number of requests.

    >>> life_weights([0.5, 0.5])
    array([1., 1., 1., 0.])
    """
    chances = _lattice_prior(prior, num_slices)
    if not (chances > 0).all():
        raise ValueError(f"No slice may have the chance 0: it would live for ever, in {prior!r:.100}. Raise it.")
    outside = _subset_sums(chances)[::-1]  # 1 - p(D), without the cancellation
    weights = np.zeros(len(outside))
    weights[0] = 1.0
    for depth, (level, before) in enumerate(_levels(len(chances))[:-1], start=1):
        weights[level] = (chances[_slices_in(level, depth)] * weights[before]).sum(axis=1) / outside[level]
    return weights


def _lattice_prior(prior: Sequence[float] | None, num_slices: int | None) -> np.ndarray:
    if num_slices is None:
        num_slices = 0 if prior is None else len(prior)
    check_count("num_slices, where all hit sets are enumerated,", num_slices, 1, LATTICE_SLICES)
    return checked_prior(prior, num_slices)


def _subset_sums(chances: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for chance in chances:
        sums = np.concatenate([sums, sums + chance])
    return sums


def _sizes(num_slices: int) -> np.ndarray:
    """How many slices each set has, `(2^L,)`."""
    return _subset_sums(np.ones(num_slices)).astype(np.int8)


def _slices_in(level: np.ndarray, depth: int) -> np.ndarray:
    """The slices of sets of equal size, `(sets, depth)`."""
    return np.nonzero(level[:, None] >> np.arange(LATTICE_SLICES) & 1)[1].reshape(len(level), depth)


def _levels(num_slices: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For 1 to L slices: the sets of that many, `(sets,)`, and each of them without one slice, `(sets, slices)`."""
    sizes = _sizes(num_slices)
    levels = []
    for depth in range(1, num_slices + 1):
        level = np.flatnonzero(sizes == depth)
        levels.append((level, level[:, None] ^ 1 << _slices_in(level, depth)))
    return levels


# The value of plans, and the best next path


@dataclass(frozen=True)
class Path:
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


def joined(profiles: Iterable[np.ndarray], nothing: np.ndarray) -> np.ndarray:
    """The profile of several orders: the elementwise maximum of theirs, written into that of a plan without stages."""
    for profile in profiles:
        np.maximum(nothing, profile, out=nothing)
    return nothing


def _weights(prior: Sequence[float], requests: int | None) -> np.ndarray:
    return life_weights(prior) if requests is None else weights_over(prior, requests)


class Lattice:
    """Values of plans, over all hit sets of up to 16 slices.

    A plan is known here by its *profile*: per untouched set the longest surviving length, `(2^L,)`. The profile of
    several orders is the elementwise maximum of theirs.

    Args:
        prior (`Sequence[float]`): The chance that a request hits each slice.
        performance (`Sequence[float]`, *optional*): What 1 to L surviving slices are worth; their number without.
        requests (`int`, *optional*): Look at the mean over the first so many requests; at the whole life without.
        uniform_share (`float`, *optional*, defaults to `0.0`): How much of a value is what the plan is worth if all
            slices are equally likely to be hit; the rest is what it is worth under the prior.

    >>> Lattice([0.5, 0.5]).value([(0, 1), (1, 0)])
    4.0
    """

    def __init__(
        self,
        prior: Sequence[float],
        performance: Sequence[float] | None = None,
        requests: int | None = None,
        uniform_share: float = 0.0,
    ) -> None:
        self.num_slices = len(prior)
        self.prior = checked_prior(prior, self.num_slices)
        uniform = checked_prior(None, self.num_slices)
        shares = ((1 - uniform_share, self.prior.tolist()), (uniform_share, uniform.tolist()))
        weights = np.sum([share * _weights(chances, requests) for share, chances in shares if share], axis=0)
        self.performance = checked_performance(performance, self.num_slices)
        self._weights = weights[::-1].copy()  # by untouched set
        self._sets = np.arange(len(weights))
        self._sizes = _sizes(self.num_slices)
        self._levels = _levels(self.num_slices)
        self.every_order = self.worth(self._sizes)  # the value of training every order: what is untouched survives

    @property
    def effort(self) -> int:
        """How many searches for a path take a few seconds; fewer where there are few sets to choose from."""
        return int(min(8000, 250 << self.num_slices, 6e8 / (self.num_slices**2 << self.num_slices)))

    def profile(self, order: Order) -> np.ndarray:
        """Per untouched set, how many slices of one order survive, `(2^L,)`."""
        alive = np.ones(len(self._sets), dtype=np.int8)
        length = np.zeros_like(alive)
        for slice_id in order:
            alive &= (self._sets >> slice_id & 1).astype(np.int8)
            length += alive
        return length

    def nothing(self) -> np.ndarray:
        """The profile of a plan without stages."""
        return np.zeros(len(self._sets), dtype=np.int8)

    def worth(self, profile: np.ndarray) -> float:
        """The value of the plan with this profile."""
        return float((self._weights * self.performance[profile]).sum())

    def value(self, orders: Iterable[Order]) -> float:
        """The value of some orders: the performance of the longest surviving prefix, weighted over the hit sets."""
        return self.worth(joined(map(self.profile, orders), self.nothing()))

    def gains(self, profile: np.ndarray) -> np.ndarray:
        """What each prefix set would add to a plan once all prefixes below it are there, `(2^L,)`.

        `g(U) = (f(|U|) - f(|U|-1)) * sum of the weights of the untouched sets above U that the plan serves with less`.
        """
        depths = np.arange(1, self.num_slices + 1)
        missed = self._weights[:, None] * (profile[:, None] < depths)  # (sets, depth)
        for j in range(self.num_slices):  # sums over supersets, one slice at a time
            view = missed.reshape(-1, 2, self.num_slices << j)
            view[:, 0] += view[:, 1]
        gains = np.diff(self.performance) * missed
        return gains[self._sets, np.maximum(self._sizes - 1, 0)]

    def path(self, gains: np.ndarray, nodes: Mapping[int, Order], rate: float, limit: int) -> Path | None:
        """The path with the most gain beyond `rate` times its cost, among those that cost at most `limit`.

        Args:
            gains (`np.ndarray`): From [`Lattice.gains`].
            nodes (`Mapping[int, Order]`): What a path may hang off: prefixes of the plan by their set, `{0: ()}` for
                the root.
            rate (`float`): Gain per slice pass that has to be exceeded.
            limit (`int`): The most that the path may cost.

        Returns:
            `Path`: The best path, or `None` if none fits.
        """
        path = self._path(gains, nodes, rate, 0, self.num_slices)
        if path is None or path.cost <= limit:
            return path
        found = []
        for start in {len(order) for order in nodes.values()}:
            deepest = start
            while deepest < self.num_slices and path_cost(start, deepest + 1) <= limit:
                deepest += 1
            hung = {node: order for node, order in nodes.items() if len(order) == start}
            found.append(self._path(gains, hung, rate, start, deepest))
        return max((path for path in found if path), key=lambda path: path.gain - rate * path.cost, default=None)

    def whole(self, gains: np.ndarray) -> Path:
        """The complete order that adds most: the heaviest way up, by dynamic programming over the sets."""
        potential, _ = self._potentials(gains, {0: ()}, 0.0, 0, self.num_slices)
        return self._back(potential, gains, {0: ()}, len(gains) - 1)

    def _path(
        self, gains: np.ndarray, nodes: Mapping[int, Order], rate: float, start: int, deepest: int
    ) -> Path | None:
        potential, end = self._potentials(gains, nodes, rate, start, deepest)
        return None if end < 0 else self._back(potential, gains, nodes, end)

    def _potentials(
        self, gains: np.ndarray, nodes: Mapping[int, Order], rate: float, start: int, deepest: int
    ) -> tuple[np.ndarray, int]:
        """Per set the best surplus of a path that ends there, and the set with the best of all (-1: there is none)."""
        potential = np.full(len(gains), -np.inf)
        held = np.fromiter(nodes, dtype=int, count=len(nodes))
        potential[held] = 0.0
        fixed = np.zeros(len(gains), dtype=bool)
        fixed[held] = True
        best, end = -np.inf, -1
        for depth in range(start + 1, deepest + 1):
            level, before = self._levels[depth - 1]
            reached = gains[level] - rate * depth + potential[before].max(axis=1)
            reached[fixed[level]] = -np.inf
            top = int(reached.argmax())
            if reached[top] > best:
                best, end = reached[top], int(level[top])
            potential[level] = np.where(fixed[level], 0.0, reached)
        return potential, end

    def _back(self, potential: np.ndarray, gains: np.ndarray, nodes: Mapping[int, Order], end: int) -> Path:
        slices: list[int] = []
        gain, here = 0.0, end
        while here not in nodes:
            gain += gains[here]
            below = [(potential[here ^ 1 << j], -j) for j in range(self.num_slices) if here >> j & 1]
            j = -max(below)[1]
            slices.append(j)
            here ^= 1 << j
        return Path((*nodes[here], *reversed(slices)), len(nodes[here]), float(gain))
