"""The search for the orders, or the tree of stages, that keep most through deletions.

Responsible for the search alone: what a plan is worth, and its best next path of stages, come from `survival.py`;
`optimal.py` is the way in.

Taking the best next path again and again is the greedy plan. Rotations are tried as well, since a greedy plan can lose
to them. Then one order after the other is cut back, and others grow in its place while that helps. The work is bounded
by a number of searches for a path, never by time, so the same question has the same answer.
"""

import math
from collections.abc import Iterable, Sequence

from .sequences import Order, check_budget, check_count, prune_orders, rotation, training_cost
from .survival import ROUNDING, Lattice, Path, path_cost

MAX_COST = 10**9


def best_orders(lattice: Lattice, budget: int) -> list[Order]:
    """Complete orders, at most `budget` of them, that are worth most.

    Args:
        lattice ([`Lattice`]): What orders are worth.
        budget (`int`): `B`, at most `L!`. Fewer orders come back where more would add nothing.

    Returns:
        `list[Order]`: The orders, never worth less than the cyclic and the spaced ones.

    >>> best_orders(Lattice([0.7, 0.2, 0.1]), 1)
    [(2, 1, 0)]
    """
    num_slices = lattice.num_slices
    check_budget(num_slices, budget)
    budget = min(budget, 2 * math.comb(num_slices, num_slices // 2))  # half of them can have every set as a prefix
    rotations = [spaced_starts(num_slices, budget), [rotation(num_slices, number) for number in range(budget)]]
    search = _Search(lattice, budget, by_cost=False)
    starts = [[], renumbered(rotations[0], coldest_first(lattice)), rotations[0]]
    return first_best(lattice, [*rotations, *map(search.polished, starts)])


def best_tree(
    lattice: Lattice, cost_budget: int, alive: Sequence[Order] | None = None, effort: int | None = None
) -> list[Order]:
    """A tree of stages, at most `cost_budget` slice passes, that is worth most.

    Args:
        lattice ([`Lattice`]): What orders are worth.
        cost_budget (`int`): What the new stages may cost.
        alive (`Sequence[Order]`, *optional*): Prefixes that are there and cost nothing. Without it the plan begins
            with one complete order, and a budget too small for that is a `ValueError`.
        effort (`int`, *optional*): About how many searches for a path; as many as the lattice says without.

    Returns:
        `list[Order]`: What is alive or the complete order, then the other branches of the tree.

    >>> best_tree(Lattice([0.7, 0.2, 0.1]), 7)
    [(2, 1, 0), (1,)]
    """
    num_slices = lattice.num_slices
    check_count("cost_budget, in slice passes,", cost_budget, 1, MAX_COST)
    least = path_cost(0, num_slices)
    if alive is None and cost_budget < least:
        found = f"cost_budget={cost_budget} is too small: one complete order of {num_slices} slices costs {least}"
        raise ValueError(f"{found}. Give at least {least}, or fewer slices.")
    coldest = coldest_first(lattice)
    rotations = [spaced_starts(num_slices, budget) for budget in range(1, num_slices + 1)]
    budget = cost_budget if alive is None else cost_budget + training_cost(alive)
    search = _Search(lattice, budget, by_cost=True, kept=[coldest] if alive is None else alive)
    search.left = search.left if effort is None else effort
    widest = search.widest([renumbered(orders, coldest) for orders in rotations], search.kept)
    own = search.widest(rotations, () if alive is None else alive)
    return first_best(lattice, [*map(search.polished, (search.kept, widest)), own])


def first_best(lattice: Lattice, plans: Iterable[list[Order]]) -> list[Order]:
    """The first of the cheapest of those plans that differ from the best in rounding only."""
    values = [(lattice.value(plan), plan) for plan in plans]
    highest = max(value for value, _ in values)
    return min((plan for value, plan in values if value >= highest * (1 - ROUNDING)), key=training_cost)


def coldest_first(lattice: Lattice) -> Order:
    """All slices, those that are hit least often first.

    >>> coldest_first(Lattice([0.2, 0.3, 0.1, 0.4]))
    (2, 0, 1, 3)
    """
    return tuple(sorted(range(lattice.num_slices), key=lambda slice_id: (lattice.prior[slice_id], slice_id)))


def renumbered(orders: Iterable[Order], names: Order) -> list[Order]:
    return [tuple(names[slice_id] for slice_id in order) for order in orders]


def spaced_starts(num_slices: int, budget: int) -> list[Order]:
    step = max(num_slices / budget, 1.0)
    return [rotation(num_slices, round(number * step)) for number in range(budget)]


class _Search:
    """Plans of one budget that begin with the same orders.

    Args:
        lattice ([`Lattice`]): What orders are worth.
        budget (`int`): How many complete orders there may be, or what the new stages may cost.
        by_cost (`bool`): Which of the two.
        kept (`Sequence[Order]`, *optional*): What every plan begins with.
    """

    def __init__(self, lattice: Lattice, budget: int, by_cost: bool, kept: Sequence[Order] = ()) -> None:
        self.lattice, self.budget, self.by_cost, self.kept = lattice, budget, by_cost, list(kept)
        self.left = lattice.effort  # searches for a path; once they are used up, no plan is polished further

    def polished(self, start: Sequence[Order]) -> list[Order]:
        """The plan that grows from a start, with one order after the other cut back and grown anew."""
        plan = self._best_grown(start)
        value, better = self.lattice.value(plan), True
        while better:
            better = False
            for trial in self._cut_back(plan):
                if self.left <= 0:
                    return plan
                best = self._best_grown(trial)
                if self.lattice.value(best) > value * (1 + ROUNDING):
                    plan, value, better = best, self.lattice.value(best), True
                    break
        return plan

    def _cut_back(self, plan: list[Order]) -> Iterable[list[Order]]:
        """The plan with one order less, or shorter; what is kept stays."""
        for place, order in enumerate(plan[len(self.kept) :], start=len(self.kept)):
            for length in range(len(order)) if self.by_cost else (0,):
                yield [*plan[:place], *([order[:length]] if length else []), *plan[place + 1 :]]

    def _best_grown(self, start: Sequence[Order]) -> list[Order]:
        """The better of two ways to grow; whole orders cost the same, so there is one."""
        ways = [self._grown(start, dear) for dear in (False, True)[: 1 + self.by_cost]]
        return first_best(self.lattice, ways)

    def _grown(self, start: Sequence[Order], dear: bool) -> list[Order]:
        """Add the best next path until none fits or adds anything; the first one may be dear: it adds most."""
        plan = list(start)
        while path := self._next(plan, dear):
            plan.append(path.order)
            dear = False
        return tidied(self.kept, plan[len(self.kept) :]) if self.by_cost else plan

    def _next(self, plan: list[Order], dear: bool) -> Path | None:
        self.left -= 1
        if self.by_cost:
            return self.lattice.densest(plan, self.budget - training_cost(plan), dear)
        return self.lattice.whole(plan) if len(plan) < self.budget else None

    def widest(self, plans: Iterable[list[Order]], kept: Sequence[Order]) -> list[Order]:
        """The best of some plans, joined with what is kept, pruned, and without the orders that do not fit."""
        cut = [self._fitting([*kept, *prune_orders(orders, beside=kept)]) for orders in plans]
        return max(cut, key=self.lattice.value)

    def _fitting(self, orders: list[Order]) -> list[Order]:
        """The first orders, as many as fit."""
        while training_cost(orders) > self.budget:
            orders = orders[:-1]
        return orders


def tidied(kept: Sequence[Order], orders: Iterable[Order]) -> list[Order]:
    """What is kept first; the others pruned, and without those that are the beginning of another."""
    orders = list(orders)
    inner = {order[:depth] for order in orders for depth in range(1, len(order))}
    return [*kept, *prune_orders((order for order in orders if order not in inner), beside=kept)]
