"""The search for a tree of stages of a cost that keeps most through deletions.

Responsible for trees: what they begin with, how they grow by the path with the most gain per slice pass, and how they
are improved. Measures and the annealing are shared with `search.py`; `optimal.py` is the way in.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from .search import ROUNDING, Measure, Search, coldest_first, first_best, renumbered, spaced_starts
from .sequences import Order, check_count, prune_orders, rotation, training_cost
from .survival import LATTICE_SLICES, Path, joined, path_cost, set_of

MAX_COST = 10**9
EXPECTED = (0.9, 0.6, 0.0)  # parts of the last rate that the next one may exceed, tried in turn
CLOSE = 0.03  # rates that differ by less than this part are as good
HASTE = 0.25  # how often a branch may be longer than pays best: it may fill the rest of the cost better


def best_tree(
    measure: Measure,
    cost_budget: int,
    seed: int = 0,
    judge: Measure | None = None,
    alive: Sequence[Order] | None = None,
    effort: int | None = None,
) -> list[Order]:
    """A tree of stages, at most `cost_budget` slice passes, that is worth most.

    Args:
        measure ([`Lattice`] or [`Streams`]): What to optimise.
        cost_budget (`int`): What the new stages may cost.
        seed (`int`, *optional*, defaults to `0`): For what is taken out and put in anew.
        judge ([`Lattice`] or [`Streams`], *optional*): Compares the candidates instead of `measure`.
        alive (`Sequence[Order]`, *optional*): Prefixes that are there and cost nothing. Without it the plan begins
            with one complete order, and a budget too small for that is a `ValueError`.
        effort (`int`, *optional*): About how many searches for a path; as many as the measure says without.

    Returns:
        `list[Order]`: What is alive or the complete order, then the other branches of the tree.

    >>> from hf_s3t.plan.survival import Lattice
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
        return pruned_after(kept, renumbered(every_set(num_slices), coldest))
    tree = Tree(measure, seed, kept, 0 if alive is None else training_cost(kept), cost_budget)
    if effort is not None:
        tree.left = effort
    starts = [kept] + [tree.widest(renumbered(orders, coldest) for orders in _rotations(num_slices, cost_budget))]
    if tree.left:
        starts += [tree.grown(start) for start in starts if tree.left > 0]
        starts.append(tree.shaken_tree(max(starts, key=measure.value)))
    own = tree.widest(_rotations(num_slices, cost_budget), kept=() if alive is None else kept)
    return first_best(judge or measure, [*starts, own])


def every_set(num_slices: int) -> list[Order]:
    """The branches of the cheapest tree with every set of slices: `2^L - 1` stages, `L 2^(L - 1)` slice passes.

    >>> every_set(3)
    [(0, 1, 2), (1, 2), (0, 2), (2,)]
    """
    orders: list[Order] = [(num_slices - 1,)]
    for slice_id in reversed(range(num_slices - 1)):
        orders = [longer for order in orders for longer in ((slice_id, *order), order)]
    return sorted(orders, key=len, reverse=True)


def _rotations(num_slices: int, cost_budget: int) -> Iterator[list[Order]]:
    """The spaced rotations of every number that may fit, and the cyclic ones, of which each number begins the next."""
    fitting = min(num_slices, 2 * cost_budget // path_cost(0, num_slices))  # pruning saves less than half
    for budget in range(1, fitting + 1):
        yield spaced_starts(num_slices, budget)
    most = num_slices**2 if num_slices <= LATTICE_SLICES else fitting
    yield [rotation(num_slices, number) for number in range(min(math.factorial(min(num_slices, 7)), most))]


def pruned_after(kept: Sequence[Order], orders: Iterable[Order]) -> list[Order]:
    """What is kept as it is, then of the orders what survival needs beside it."""
    return [*kept, *prune_orders(orders, beside=kept)]


def _prefixes(orders: Iterable[Order]) -> dict[int, Order]:
    """The nodes of a tree by their set, the root included."""
    return {set_of(order[:depth]): order[:depth] for order in orders for depth in range(len(order) + 1)} | {0: ()}


def tidied(kept: Sequence[Order], orders: Iterable[Order]) -> list[Order]:
    """What is kept first; the others without those that are the beginning of another."""
    orders = list(orders)
    inner = {order[:depth] for order in orders for depth in range(1, len(order))}
    return pruned_after(kept, (order for order in orders if order not in inner))


class Growth:
    """A tree that grows by paths: its orders, its profile, and its nodes by their sets."""

    def __init__(self, measure: Measure, orders: Iterable[Order]) -> None:
        self.measure = measure
        self.orders = list(orders)
        self.joined = joined(map(measure.profile, self.orders), measure.nothing())
        self.nodes = _prefixes(self.orders)

    def add(self, path: Path) -> None:
        self.orders.append(path.order)
        np.maximum(self.joined, self.measure.profile(path.order), out=self.joined)
        self.nodes = _prefixes([path.order]) | self.nodes


class Tree(Search):
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
        cut = [self._fitting(pruned_after(kept, orders)) for orders in plans]
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
        growth = Growth(self.measure, orders)
        room = self.cost_budget - self.cost(growth.orders)
        while room > 0:
            gains = self.gains(growth.joined, blur)
            path = self.densest(gains, growth.nodes, room)
            if path is None:
                break
            if blur and self.rng.random() < HASTE:
                path = self.measure.path(gains, growth.nodes, self.rng.random() * path.gain / path.cost, room) or path
            growth.add(path)
            room -= path.cost
        return tidied(self.kept, growth.orders)

    def densest(self, gains: np.ndarray, nodes: Mapping[int, Order], room: int) -> Path | None:
        """Dinkelbach: the best path beyond a rate, at its own rate the next time, until none is much beyond it.

        The first rate is a little less than that of the path before, which most are nearly as good as. Once the
        searches are used up, the first path will do.
        """
        for share in EXPECTED:
            best, rate = None, share * self.rate
            while path := self._beyond(rate, gains, nodes, room):
                last = self.left <= 0 < rate or path.gain <= (1 + CLOSE) * rate * path.cost
                best, rate = path, path.gain / path.cost
                if last:
                    break
            if best:
                self.rate = rate
                return best
        return None

    def _beyond(self, rate: float, gains: np.ndarray, nodes: Mapping[int, Order], room: int) -> Path | None:
        self.left -= 1
        path = self.measure.path(gains, nodes, rate, room)
        surplus = path.gain - rate * path.cost if path else 0.0
        return path if surplus > ROUNDING * self.measure.every_order else None

    def shaken_tree(self, orders: Sequence[Order]) -> list[Order]:
        """Cut some branches back at random and let others grow, while there are searches left. Keeps the best seen."""
        best = tree = list(orders)
        highest = value = self.measure.value(tree)
        searches = self.left
        while len(tree) > len(self.kept) and self.goes_on({}, highest):
            self.left -= 1  # also where nothing can grow
            cut = set(self.some([order for order in tree if order not in self.kept]))
            shorter = (order[: int(self.rng.random() * len(order))] if order in cut else order for order in tree)
            trial = self.grown(dict.fromkeys([*self.kept, *filter(None, shorter)]), self.blur())
            worth = self.measure.value(trial)
            if worth > value - self.tolerance(searches):
                tree, value = trial, worth
            if value > highest:
                best, highest = tree, value
        return best
