"""The search for orders of a number, or for a tree of stages of a cost, that keep most through deletions.

Responsible for the search alone: what a plan is worth, and its best next path of stages, come from a *measure*, a
[`Lattice`] or [`Streams`]. `optimal.py` is the way in.

Taking the best next path again and again is the greedy plan. Then paths are taken out and put in anew while that
helps, from the greedy plan and from rotations, which a greedy plan can lose to. The work is bounded by a number of
searches for a path, never by time, so the same seed finds the same plan.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .sequences import Order, check_budget, check_count, prune_orders, random_orders, rotation, training_cost
from .streams import Streams
from .survival import LATTICE_SLICES, Lattice, Path, path_cost, set_of

Measure = Lattice | Streams
Profiles = dict[Order, np.ndarray]

MAX_COST = 10**9
ROUNDING = 1e-12  # a gain below this part of the value is none
HELD_BYTES = 1 << 28  # more profiles than this are not held at a time: the plan stays greedy
TAKEN_OUT = 6  # at most so many orders at a time
BLUR = 0.3  # gains are seen up to this part too large, mostly much less, so that other orders come back
HASTE = 0.25  # how often a branch may be longer than pays best: it may fill the rest of the cost better
TEMPERATURE = 2e-4  # how much of the value a change may lose at first; falls to 0 as the searches are used up


def best_orders(measure: Measure, budget: int, seed: int = 0, judge: Measure | None = None) -> list[Order]:
    """Complete orders, at most `budget` of them, that are worth most.

    Args:
        measure ([`Lattice`] or [`Streams`]): What to optimise.
        budget (`int`): `B`, at most `L!`. Fewer orders come back where more would add nothing.
        seed (`int`, *optional*, defaults to `0`): For what is taken out and put in anew.
        judge ([`Lattice`] or [`Streams`], *optional*): Compares the candidates instead of `measure`.

    Returns:
        `list[Order]`: The orders, never worth less than the cyclic and the spaced ones to the judge.

    >>> best_orders(Lattice([0.7, 0.2, 0.1]), 1)
    [(2, 1, 0)]
    """
    num_slices = measure.num_slices
    check_budget(num_slices, budget)
    coldest = coldest_first(measure)
    if num_slices <= LATTICE_SLICES and budget >= math.comb(num_slices, num_slices // 2):
        return _renumbered(symmetric_chains(num_slices), coldest)
    rotations = [_spaced(num_slices, budget), [rotation(num_slices, number) for number in range(budget)]]
    starts = [_renumbered(rotations[0], coldest), rotations[0]]
    if num_slices > LATTICE_SLICES:
        starts.append(random_orders(num_slices, budget, seed))
    search = _Search(measure, seed)
    best: list[Order] = []
    if search.left:
        starts = [search.polished(start, budget) for start in ([], *starts)]
        best = search.shaken(max(starts, key=measure.value), budget)
    return _best(judge or measure, [*rotations, *starts, best])


def best_tree(
    measure: Measure,
    cost_budget: int,
    seed: int = 0,
    judge: Measure | None = None,
    alive: Sequence[Order] | None = None,
) -> list[Order]:
    """A tree of stages, at most `cost_budget` slice passes, that is worth most.

    Args:
        measure ([`Lattice`] or [`Streams`]): What to optimise.
        cost_budget (`int`): What the new stages may cost.
        seed (`int`, *optional*, defaults to `0`): For what is taken out and put in anew.
        judge ([`Lattice`] or [`Streams`], *optional*): Compares the candidates instead of `measure`.
        alive (`Sequence[Order]`, *optional*): Prefixes that are there and cost nothing. Without it the plan begins
            with one complete order, and a budget too small for that is a `ValueError`.

    Returns:
        `list[Order]`: What is alive or the complete order, then the other branches of the tree.

    >>> best_tree(Lattice([0.7, 0.2, 0.1]), 7)
    [(2, 1, 0), (1,)]
    """
    num_slices = measure.num_slices
    check_count("cost_budget, in slice passes,", cost_budget, 1, MAX_COST)
    least = path_cost(0, num_slices)
    if alive is None and cost_budget < least:
        found = f"cost_budget={cost_budget} is too small: one complete order of {num_slices} slices costs {least}"
        raise ValueError(f"{found}. Give at least {least}, or fewer slices.")
    coldest = coldest_first(measure)
    kept = [coldest] if alive is None else list(alive)
    if num_slices <= LATTICE_SLICES and cost_budget >= num_slices << (num_slices - 1):
        return prune_orders([*kept, *_renumbered(every_set(num_slices), coldest)])
    tree = _Tree(measure, seed, kept, 0 if alive is None else training_cost(kept), cost_budget)
    starts = [kept] + [tree.widest(_renumbered(orders, coldest) for orders in _rotations(num_slices, cost_budget))]
    if tree.left:
        starts += [tree.grown(start) for start in starts if tree.left > 0]
        starts.append(tree.shaken_tree(max(starts, key=measure.value)))
    own = tree.widest(_rotations(num_slices, cost_budget), kept=() if alive is None else kept)
    return _best(judge or measure, [*starts, own])


def _best(judge: Measure, plans: Iterable[list[Order]]) -> list[Order]:
    """The first of those plans that differ from the best in rounding only."""
    values = [(judge.value(plan) if plan else 0.0, plan) for plan in plans]
    highest = max(value for value, _ in values)
    return next(plan for value, plan in values if value >= highest * (1 - ROUNDING))


def coldest_first(measure: Measure) -> Order:
    """All slices, those that are hit least often first.

    >>> coldest_first(Lattice([0.2, 0.3, 0.1, 0.4]))
    (2, 0, 1, 3)
    """
    return tuple(sorted(range(measure.num_slices), key=lambda slice_id: (measure.prior[slice_id], slice_id)))


def symmetric_chains(num_slices: int) -> list[Order]:
    """`C(L, L // 2)` orders that have every set of slices as a prefix: nothing survives longer than with all `L!`.

    De Bruijn, Tengbergen and Kruyswijk's chains: each chain of one slice less goes on with the new slice at its end,
    and, without its own end, once more with the new slice at its beginning.

    >>> len(symmetric_chains(4))
    6
    """
    chains: list[tuple[Order, Order]] = [((), ())]  # what a chain begins with, and what is added to that one by one
    for new in range(num_slices):
        chains = [
            chain
            for first, added in chains
            for chain in ([(first, (*added, new))] + ([((*first, new), added[:-1])] if added else []))
        ]
    return [(*first, *added, *sorted(set(range(num_slices)).difference(first, added))) for first, added in chains]


def every_set(num_slices: int) -> list[Order]:
    """The branches of the cheapest tree with every set of slices: `2^L - 1` stages, `L 2^(L - 1)` slice passes.

    >>> every_set(3)
    [(0, 1, 2), (1, 2), (0, 2), (2,)]
    """
    orders: list[Order] = [(num_slices - 1,)]
    for slice_id in reversed(range(num_slices - 1)):
        orders = [longer for order in orders for longer in ((slice_id, *order), order)]
    return sorted(orders, key=len, reverse=True)


def _renumbered(orders: Iterable[Order], names: Order) -> list[Order]:
    return [tuple(names[slice_id] for slice_id in order) for order in orders]


def _spaced(num_slices: int, budget: int) -> list[Order]:
    step = max(num_slices / budget, 1.0)
    return [rotation(num_slices, round(number * step)) for number in range(budget)]


def _rotations(num_slices: int, cost_budget: int) -> Iterator[list[Order]]:
    """The spaced rotations of every number that may fit, and the cyclic ones, of which each number begins the next."""
    fitting = min(num_slices, 2 * cost_budget // path_cost(0, num_slices))  # pruning saves less than half
    for budget in range(1, fitting + 1):
        yield _spaced(num_slices, budget)
    most = num_slices**2 if num_slices <= LATTICE_SLICES else fitting
    yield [rotation(num_slices, number) for number in range(min(math.factorial(min(num_slices, 7)), most))]


def _prefixes(orders: Iterable[Order]) -> dict[int, Order]:
    """The nodes of a tree by their set, the root included."""
    return {set_of(order[:depth]): order[:depth] for order in orders for depth in range(len(order) + 1)} | {0: ()}


class _Search:
    """Orders with their profiles, and how many searches for a path are left."""

    def __init__(self, measure: Measure, seed: int) -> None:
        self.measure = measure
        self.left = measure.effort
        self.rng = random.Random(seed)
        self.noise = np.random.default_rng(seed)

    def profiles(self, orders: Iterable[Order]) -> Profiles:
        return {order: self.measure.profile(order) for order in orders}

    def joined(self, profiles: Profiles) -> np.ndarray:
        joined = self.measure.nothing()
        for profile in profiles.values():
            np.maximum(joined, profile, out=joined)
        return joined

    def gains(self, joined: np.ndarray, blur: float) -> np.ndarray:
        gains = self.measure.gains(joined)
        return gains * (1 + blur * self.noise.random(gains.shape)) if blur else gains

    def filled(self, profiles: Profiles, budget: int, blur: float = 0.0) -> tuple[Profiles, float]:
        """Add the best next order until there are enough, or none adds anything. Returns the value as well."""
        profiles, joined = dict(profiles), self.joined(profiles)
        while len(profiles) < budget:
            self.left -= 1
            path = self.measure.whole(self.gains(joined, blur))
            if path.gain <= ROUNDING * self.measure.every_order or path.order in profiles:
                break
            profiles[path.order] = self.measure.profile(path.order)
            np.maximum(joined, profiles[path.order], out=joined)
        return profiles, self.measure.worth(joined)

    def polished(self, orders: Iterable[Order], budget: int) -> list[Order]:
        """Take out one order, then two and three neighbours, and put in the best instead, while that helps."""
        profiles, value = self.filled(self.profiles(orders), budget)
        size = 1
        while size <= min(3, len(profiles)) and self._goes_on(profiles, value):
            before = value
            for first in list(profiles):
                if self.left > 0 and first in profiles:
                    others = _without(profiles, _neighbours(list(profiles), first, size))
                    trial, worth = self.filled(others, budget)
                    if worth > value * (1 + ROUNDING):
                        profiles, value = trial, worth
            size = 1 if value > before else size + 1
        return list(profiles)

    def shaken(self, orders: Iterable[Order], budget: int) -> list[Order]:
        """Take out some orders at random and put in others, while there are searches left. Keeps the best seen."""
        profiles, value = self.filled(self.profiles(orders), budget)
        best, highest, searches = list(profiles), value, self.left
        while len(profiles) > 1 and self._goes_on(profiles, highest):
            others = _without(profiles, self._some(list(profiles)))
            trial, worth = self.filled(others, budget, self._blur())
            if worth > value - self._tolerance(searches):
                profiles, value = trial, worth
            if value > highest:
                best, highest = list(profiles), value
        return best

    def _some(self, orders: Sequence[Order]) -> list[Order]:
        count = 1 + int(self.rng.random() * min(len(orders), TAKEN_OUT))
        return sorted(orders, key=lambda _: self.rng.random())[:count]

    def _blur(self) -> float:
        blur = BLUR * self.rng.random() ** 2
        return blur if self.rng.random() < 0.8 else 10 * blur

    def _tolerance(self, searches: int) -> float:
        """Simulated annealing: how much worse a change may be, drawn from an exponential distribution."""
        temperature = TEMPERATURE * self.measure.every_order * max(self.left, 0) / searches
        return -temperature * math.log(1 - self.rng.random())

    def _goes_on(self, profiles: Profiles, value: float) -> bool:
        held = len(profiles) * self.measure.nothing().nbytes
        return self.left > 0 and held <= HELD_BYTES and value < self.measure.every_order * (1 - ROUNDING)


def _without(profiles: Profiles, taken: Iterable[Order]) -> Profiles:
    gone = set(taken)
    return {order: profile for order, profile in profiles.items() if order not in gone}


def _neighbours(orders: list[Order], first: Order, size: int) -> list[Order]:
    place = orders.index(first)
    return (orders + orders)[place : place + size]


class _Tree(_Search):
    """Trees of stages that begin with the same orders and keep within the same cost."""

    def __init__(self, measure: Measure, seed: int, kept: Sequence[Order], free: int, cost_budget: int) -> None:
        super().__init__(measure, seed)
        self.kept = kept
        self.free = free
        self.cost_budget = cost_budget
        self.rate = 0.0  # gain per slice pass that the next path is expected to have

    def cost(self, orders: Iterable[Order]) -> int:
        return training_cost(orders) - self.free

    def widest(self, plans: Iterable[list[Order]], kept: Sequence[Order] | None = None) -> list[Order]:
        """The best of some plans, joined with what is kept, pruned, and without the orders that do not fit."""
        kept = self.kept if kept is None else kept
        cut = [self._fitting(prune_orders([*kept, *orders])) for orders in plans]
        return max(filter(None, cut), key=self.measure.value, default=list(self.kept))

    def _fitting(self, orders: Iterable[Order]) -> list[Order]:
        """The first orders, as many as fit."""
        room = self.cost_budget + self.free
        stages: set[Order] = set()
        fitting = []
        for order in orders:
            new = {order[:depth] for depth in range(1, len(order) + 1)} - stages
            room -= sum(map(len, new))
            if room < 0:
                break
            stages |= new
            fitting.append(order)
        return fitting

    def grown(self, orders: Iterable[Order], blur: float = 0.0) -> list[Order]:
        """Add the path with the most gain per slice pass, until none fits or adds anything."""
        tree = list(orders)
        joined, nodes = self.joined(self.profiles(tree)), _prefixes(tree)
        room = self.cost_budget - self.cost(tree)
        while room > 0:
            gains = self.gains(joined, blur)
            path = self._densest(gains, nodes, room)
            if path is None:
                break
            if blur and self.rng.random() < HASTE:
                path = self.measure.path(gains, nodes, self.rng.random() * path.gain / path.cost, room) or path
            tree.append(path.order)
            np.maximum(joined, self.measure.profile(path.order), out=joined)
            nodes = _prefixes([path.order]) | nodes
            room -= path.cost
        return self._tidy(tree)

    def _densest(self, gains: np.ndarray, nodes: dict[int, Order], room: int) -> Path | None:
        """Dinkelbach: the best path beyond a rate, at its own rate the next time, until none is beyond it."""
        best, rate = None, self.rate  # of the path before: most are nearly as good
        while True:
            self.left -= 1
            path = self.measure.path(gains, nodes, rate, room)
            if path and path.gain - rate * path.cost > ROUNDING * self.measure.every_order:
                best, rate = path, path.gain / path.cost
            elif best or not rate:
                self.rate = 0.8 * rate if best else 0.0
                return best
            else:
                rate = 0.0

    def shaken_tree(self, orders: Sequence[Order]) -> list[Order]:
        """Cut some branches back at random and let others grow, while there are searches left. Keeps the best seen."""
        best = tree = list(orders)
        highest = value = self.measure.value(tree)
        searches = self.left
        while len(tree) > len(self.kept) and self._goes_on({}, highest):
            self.left -= 1  # also where nothing can grow
            cut = set(self._some([order for order in tree if order not in self.kept]))
            shorter = (order[: int(self.rng.random() * len(order))] if order in cut else order for order in tree)
            trial = self.grown(dict.fromkeys([*self.kept, *filter(None, shorter)]), self._blur())
            worth = self.measure.value(trial)
            if worth > value - self._tolerance(searches):
                tree, value = trial, worth
            if value > highest:
                best, highest = tree, value
        return best

    def _tidy(self, orders: Iterable[Order]) -> list[Order]:
        """What is kept first; the others without those that are the beginning of another."""
        orders = list(orders)
        inner = {order[:depth] for order in orders for depth in range(1, len(order))}
        return prune_orders([*self.kept, *(order for order in orders if order not in inner)])
