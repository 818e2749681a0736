"""The search for orders of a number that keep most through deletions, and what it shares with the search for trees.

Responsible for the search alone: what a plan is worth, and its best next path of stages, come from a *measure*, a
[`Lattice`] or [`Streams`]. Trees of stages are in `trees.py`; `optimal.py` is the way in.

Taking the best next path again and again is the greedy plan. Then paths are taken out and put in anew while that
helps, from the greedy plan and from rotations, which a greedy plan can lose to. The work is bounded by a number of
searches for a path, never by time, so the same seed finds the same plan.
"""

import math
import random
from collections.abc import Iterable, Sequence

import numpy as np

from .sequences import Order, check_budget, random_orders, rotation
from .streams import Streams
from .survival import LATTICE_SLICES, Lattice, joined

Measure = Lattice | Streams
Profiles = dict[Order, np.ndarray]

ROUNDING = 1e-12  # a gain below this part of the value is none
HELD_BYTES = 1 << 28  # more profiles than this are not held at a time: the plan stays greedy
TAKEN_OUT = 6  # at most so many orders at a time
BLUR = 0.3  # gains are seen up to this part too large, mostly much less, so that other orders come back
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
        return renumbered(symmetric_chains(num_slices), coldest)
    rotations = [spaced_starts(num_slices, budget), [rotation(num_slices, number) for number in range(budget)]]
    starts = [renumbered(rotations[0], coldest), rotations[0]]
    if num_slices > LATTICE_SLICES:
        starts.append(random_orders(num_slices, budget, seed))
    search = Search(measure, seed)
    best: list[Order] = []
    if search.left:
        starts = [search.polished(start, budget) for start in ([], *starts)]
        best = search.shaken(max(starts, key=measure.value), budget)
    return first_best(judge or measure, [*rotations, *starts, best])


def first_best(judge: Measure, plans: Iterable[list[Order]]) -> list[Order]:
    """The first of those plans that differ from the best in rounding only."""
    values = [(judge.value(plan), plan) for plan in plans]
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


def renumbered(orders: Iterable[Order], names: Order) -> list[Order]:
    return [tuple(names[slice_id] for slice_id in order) for order in orders]


def spaced_starts(num_slices: int, budget: int) -> list[Order]:
    step = max(num_slices / budget, 1.0)
    return [rotation(num_slices, round(number * step)) for number in range(budget)]


class Search:
    """Orders with their profiles, and how many searches for a path are left."""

    def __init__(self, measure: Measure, seed: int) -> None:
        self.measure = measure
        self.left = measure.effort
        self.rng = random.Random(seed)
        self.noise = np.random.default_rng(seed)

    def profiles(self, orders: Iterable[Order]) -> Profiles:
        return {order: self.measure.profile(order) for order in orders}

    def gains(self, profile: np.ndarray, blur: float) -> np.ndarray:
        gains = self.measure.gains(profile)
        return gains * (1 + blur * self.noise.random(gains.shape)) if blur else gains

    def filled(self, profiles: Profiles, budget: int, blur: float = 0.0) -> tuple[Profiles, float]:
        """Add the best next order until there are enough, or none adds anything. Returns the value as well."""
        profiles, held = dict(profiles), joined(profiles.values(), self.measure.nothing())
        while len(profiles) < budget:
            self.left -= 1
            path = self.measure.whole(self.gains(held, blur))
            if path.gain <= ROUNDING * self.measure.every_order or path.order in profiles:
                break
            profiles[path.order] = self.measure.profile(path.order)
            np.maximum(held, profiles[path.order], out=held)
        return profiles, self.measure.worth(held)

    def polished(self, orders: Iterable[Order], budget: int) -> list[Order]:
        """Take out one order, then two and three neighbours, and put in the best instead, while that helps."""
        profiles, value = self.filled(self.profiles(orders), budget)
        size = 1
        while size <= min(3, len(profiles)) and self.goes_on(profiles, value):
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
        while len(profiles) > 1 and self.goes_on(profiles, highest):
            others = _without(profiles, self.some(list(profiles)))
            trial, worth = self.filled(others, budget, self.blur())
            if worth > value - self.tolerance(searches):
                profiles, value = trial, worth
            if value > highest:
                best, highest = list(profiles), value
        return best

    def some(self, orders: Sequence[Order]) -> list[Order]:
        count = 1 + int(self.rng.random() * min(len(orders), TAKEN_OUT))
        return sorted(orders, key=lambda _: self.rng.random())[:count]

    def blur(self) -> float:
        blur = BLUR * self.rng.random() ** 2
        return blur if self.rng.random() < 0.8 else 10 * blur

    def tolerance(self, searches: int) -> float:
        """Simulated annealing: how much worse a change may be, drawn from an exponential distribution."""
        temperature = TEMPERATURE * self.measure.every_order * max(self.left, 0) / searches
        return -temperature * math.log(1 - self.rng.random())

    def goes_on(self, profiles: Profiles, value: float) -> bool:
        held = len(profiles) * self.measure.nothing().nbytes
        return self.left > 0 and held <= HELD_BYTES and value < self.measure.every_order * (1 - ROUNDING)


def _without(profiles: Profiles, taken: Iterable[Order]) -> Profiles:
    gone = set(taken)
    return {order: profile for order, profile in profiles.items() if order not in gone}


def _neighbours(orders: list[Order], first: Order, size: int) -> list[Order]:
    place = orders.index(first)
    return (orders + orders)[place : place + size]
