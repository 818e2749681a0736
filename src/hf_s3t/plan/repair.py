"""What to train again after deletions, where the money does not suffice for everything that is missing.

Responsible for sharing a number of slice passes out among damaged shards. How one shard spends its share is searched
for by `trees.py`, and the defaults are those of `optimal.py`.
"""

import itertools
from collections.abc import Sequence

from .optimal import measures
from .search import Measure, first_best
from .sequences import Order, check_count, explicit, training_cost
from .survival import LATTICE_SLICES, Path
from .trees import MAX_COST, Growth, Tree, best_tree, tidied

LEAST_EFFORT = 50  # searches for a path that every damage state gets, however many there are
TRIED = 30  # trees that are tried for shares around the first ones, over all shards


def best_repair(
    num_slices: int,
    alive: Sequence[Sequence[Order]],
    cost_budget: int,
    prior: Sequence[float] | None = None,
    performance: Sequence[float] | None = None,
    seed: int = 0,
) -> list[tuple[Order, ...]]:
    """Choose what every shard trains from now on, for a cost over all shards together.

    Slice passes go where they add most: path after path, to the shard in which the next one adds most per slice pass.
    That gives every shard its share. Whole stages seldom fit, so shares around it are tried as well, and a search for
    the best tree of each share follows. What is optimised for is the sum over the shards of the performance over the
    whole life, from the repair until nothing is left.

    Args:
        num_slices (`int`): `L`, the number of slices in every shard.
        alive (`Sequence[Sequence[Order]]`): For each shard the prefixes that deletions have left, only the longest of
            each branch; none of a dead shard. They cost nothing.
        cost_budget (`int`): Slice passes per epoch that may be spent on new stages, over all shards; at least 1.
        prior (`Sequence[float]`, *optional*): The chance that a request to a shard hits each of its slices. Optimised
            for as in [`optimal`].
        performance (`Sequence[float]`, *optional*): What a model of 1, 2, ..., L surviving slices is worth, not
            falling; their number without.
        seed (`int`, *optional*, defaults to `0`): The same seed gives the same repair.

    Returns:
        `list[tuple[Order, ...]]`: For each shard what is alive, as given and in the same order, so that it goes on
        being served where others are as long; then the orders to train. Where nothing fits or adds anything, only
        what is alive. For [`Plan.make_per_shard`] with `prune=False`, as pruning could cut what is alive.

    Raises:
        ValueError: If a number is out of range, there is no shard, or a prefix is not an order of the slices.

    Example: a dead shard, and one that has lost slice 2. Two slice passes go to a first stage in each.

    >>> best_repair(3, [[], [(0, 1)]], cost_budget=2)
    [((0,),), ((0, 1), (1,))]
    """
    check_count("cost_budget, in slice passes over all shards,", cost_budget, 1, MAX_COST)
    check_count("seed", seed, 0, 2**32 - 1)
    measure, judge = measures(prior, num_slices, performance, None, seed)
    kept = _checked(alive, num_slices)
    repair = _Repair(measure, judge, seed, kept)
    if num_slices <= LATTICE_SLICES and cost_budget >= len(kept) * num_slices << (num_slices - 1):
        trees = [best_tree(measure, cost_budget, alive=orders) for orders in kept]  # every set of every shard
    elif measure.effort:
        trees = repair.searched(repair.rounded(repair.shared_out(kept, cost_budget), cost_budget))
        trees = repair.topped_up(trees, cost_budget - repair.cost(trees))
        trees = repair.shared_out(trees, cost_budget - repair.cost(trees))
    else:
        trees = repair.evenly(cost_budget)
    return [tuple(tidied(orders, tree[len(orders) :])) for orders, tree in zip(kept, trees, strict=True)]


def _checked(alive: Sequence[Sequence[Order]], num_slices: int) -> list[list[Order]]:
    if not isinstance(alive, (list, tuple)) or not alive:
        raise ValueError(f"alive must be a list with the live prefixes of each shard, not {alive!r:.100}. Give it.")
    kept = []
    for shard, prefixes in enumerate(alive):
        if not isinstance(prefixes, (list, tuple)):
            found = f"The live prefixes of shard {shard} are {prefixes!r:.100}"
            raise ValueError(f"{found}. Give a list of orders, an empty one if nothing is alive.")
        try:
            kept.append(explicit(prefixes, num_slices) if prefixes else [])
        except ValueError as error:
            raise ValueError(f"Shard {shard}: {error}") from error
    return kept


class _Repair:
    """Shards with what is kept in each, and the searches that they share."""

    def __init__(self, measure: Measure, judge: Measure, seed: int, kept: Sequence[list[Order]]) -> None:
        self.measure = measure
        self.judge = judge
        self.seed = seed
        self.kept = kept
        self.tried: dict[tuple[tuple[Order, ...], int], list[Order]] = {}

    def cost(self, trees: Sequence[Sequence[Order]]) -> int:
        """Slice passes of all stages that are new."""
        return sum(map(training_cost, trees)) - sum(map(training_cost, self.kept))

    def shared_out(self, trees: Sequence[list[Order]], room: int) -> list[list[Order]]:
        """Add the path with the most gain per slice pass over all shards, until none fits or adds anything."""
        search = Tree(self.measure, self.seed, [], 0, room)
        growths = [Growth(self.measure, tree) for tree in trees]
        found: dict[tuple[Order, ...], Path | None] = {}
        while True:
            offers = [(growth, self._next(search, growth, found, room)) for growth in growths]
            fitting = [(path.gain / path.cost, -shard) for shard, (_, path) in enumerate(offers) if path]
            if not fitting:
                return [growth.orders for growth in growths]
            growth, path = offers[-max(fitting)[1]]
            assert path is not None
            growth.add(path)
            room -= path.cost

    def _next(
        self, search: Tree, growth: Growth, found: dict[tuple[Order, ...], Path | None], room: int
    ) -> Path | None:
        """The next path of a tree, searched for once: shards are often alike."""
        tree = tuple(growth.orders)
        path = found.get(tree)
        if tree not in found or (path and path.cost > room):
            found[tree] = path = search.densest(self.measure.gains(growth.joined), growth.nodes, room)
        return path

    def rounded(self, trees: Sequence[list[Order]], room: int) -> list[list[Order]]:
        """The best shares around those of some trees, by dynamic programming over the shards."""
        shares = [training_cost(tree) - training_cost(kept) for tree, kept in zip(trees, self.kept, strict=True)]
        cases = {(tuple(kept), share) for kept, share in zip(self.kept, shares, strict=True)}
        width = min(TRIED // (2 * len(cases)), self.measure.num_slices)
        plans: dict[int, tuple[float, list[list[Order]]]] = {0: (0.0, [])}  # the best by what it costs so far
        for kept, share, tree in zip(self.kept, shares, trees, strict=True):
            options = {
                near: self._tried(tuple(kept), near) for near in range(max(0, share - width), share + width + 1)
            }
            options[share] = max(tree, options.get(share, tree), key=self.measure.value)
            plans = self._joined(plans, options, room)
        return max(plans.values(), key=lambda plan: plan[0])[1]

    def _joined(
        self, plans: dict[int, tuple[float, list[list[Order]]]], options: dict[int, list[Order]], room: int
    ) -> dict[int, tuple[float, list[list[Order]]]]:
        joined: dict[int, tuple[float, list[list[Order]]]] = {}
        values = {near: self.measure.value(tree) for near, tree in options.items()}
        for (cost, (value, trees)), (near, tree) in itertools.product(plans.items(), options.items()):
            if cost + near <= room and value + values[near] > joined.get(cost + near, (-1.0, []))[0]:
                joined[cost + near] = (value + values[near], [*trees, tree])
        return joined

    def _tried(self, kept: tuple[Order, ...], share: int) -> list[Order]:
        """A good tree for a share, searched for once."""
        if (kept, share) not in self.tried:
            effort = max(LEAST_EFFORT, 2048 >> self.measure.num_slices)  # of few slices the best is soon found
            tree = best_tree(self.measure, share, self.seed, alive=kept, effort=effort) if share else list(kept)
            self.tried[kept, share] = tree
        return self.tried[kept, share]

    def evenly(self, room: int) -> list[list[Order]]:
        """Rotations for an equal share of what is left, shard by shard: for too many slices to search for a path."""
        trees: list[list[Order]] = []
        for kept in self.kept:
            share = room // (len(self.kept) - len(trees))
            trees.append(best_tree(self.measure, share, alive=kept) if share else kept)
            room -= training_cost(trees[-1]) - training_cost(kept)
        return trees

    def searched(self, trees: Sequence[list[Order]]) -> list[list[Order]]:
        """For every shard the best tree found of the same cost, which may be the one that it has."""
        cases = {(tuple(kept), tuple(tree)): tree for kept, tree in zip(self.kept, trees, strict=True)}
        effort = max(LEAST_EFFORT, self.measure.effort // len(cases))
        for kept, tree in cases:
            share = training_cost(tree) - training_cost(kept)
            if share:
                other = best_tree(self.measure, share, self.seed, self.judge, kept, effort)
                cases[kept, tree] = first_best(self.judge, [list(tree), other])
        return [cases[tuple(kept), tuple(tree)] for kept, tree in zip(self.kept, trees, strict=True)]

    def topped_up(self, trees: Sequence[list[Order]], room: int) -> list[list[Order]]:
        """What is left over goes to the one shard in which the best tree of so much more adds most."""
        if not room:
            return list(trees)
        cases = {
            (tuple(kept), tuple(tree)): shard for shard, (kept, tree) in enumerate(zip(self.kept, trees, strict=True))
        }
        effort = max(LEAST_EFFORT, self.measure.effort // len(cases))
        offers = []
        for (kept, tree), shard in cases.items():
            share = training_cost(tree) - training_cost(kept) + room
            other = best_tree(self.measure, share, self.seed, self.judge, kept, effort)
            offers.append((self.judge.value(other) - self.judge.value(tree), shard, other))
        added, chosen, other = max(offers, key=lambda offer: offer[0])
        return [other if shard == chosen and added > 0 else tree for shard, tree in enumerate(trees)]
