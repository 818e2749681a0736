"""What to train again after deletions, where the money does not suffice for everything that is missing.

Responsible for sharing a number of slice passes out among damaged shards. How one shard spends its share is searched
for by `search.py`.
"""

from collections.abc import Sequence

from .optimal import lattice_of
from .search import MAX_COST, best_tree, first_best, tidied
from .sequences import Order, check_count, explicit, training_cost
from .survival import Lattice, Path


def best_repair(
    num_slices: int, alive: Sequence[Sequence[Order]], cost_budget: int, prior: Sequence[float] | None = None
) -> list[tuple[Order, ...]]:
    """Choose what every shard trains from now on, for a cost over all shards together.

    Slice passes go where they add most: path after path, to the shard in which the next one adds most per slice pass.
    That gives every shard its share, for which the best tree is searched; then what is left is shared out. What is
    optimised for is the sum over the shards of the surviving length over the whole life, from the repair until nothing
    is left.

    Args:
        num_slices (`int`): `L`, the number of slices in every shard, at most 16.
        alive (`Sequence[Sequence[Order]]`): For each shard the prefixes that deletions have left, only the longest of
            each branch; none of a dead shard. They cost nothing.
        cost_budget (`int`): Slice passes per epoch that may be spent on new stages, over all shards; at least 1.
        prior (`Sequence[float]`, *optional*): The chance that a request to a shard hits each of its slices; see
            [`lattice_of`].

    Returns:
        `list[tuple[Order, ...]]`: For each shard what is alive, as given and in the same order, so that it goes on
        being served where others are as long; then the orders to train. Where nothing fits or adds anything, only
        what is alive. For [`Plan.make_per_shard`] with `prune=False`, as pruning could cut what is alive.

    Raises:
        ValueError: If a number is out of range, there is no shard, or a prefix is not an order of the slices.

    Example: a dead shard, and one that has lost slice 2. Three slice passes buy first stages in both.

    >>> best_repair(3, [[], [(0, 1)]], cost_budget=3)
    [((0,), (1,)), ((0, 1), (1,))]
    """
    check_count("cost_budget, in slice passes over all shards,", cost_budget, 1, MAX_COST)
    lattice = lattice_of(prior, num_slices)
    kept = _checked(alive, num_slices)
    trees, room = _shared_out(lattice, kept, cost_budget)
    trees, room = _searched(lattice, kept, trees, room)
    trees, room = _shared_out(lattice, trees, room)
    return [tuple(tidied(orders, tree[len(orders) :])) for orders, tree in zip(kept, trees, strict=True)]


def _checked(alive: Sequence[Sequence[Order]], num_slices: int) -> list[list[Order]]:
    if not alive:
        raise ValueError(f"alive must be a list with the live prefixes of each shard, not {alive!r:.100}. Give it.")
    kept = []
    for shard, prefixes in enumerate(alive):
        try:
            kept.append(explicit(prefixes, num_slices) if prefixes else [])
        except ValueError as error:
            raise ValueError(f"Of what is alive in shard {shard}: {error}") from error
    return kept


def _shared_out(lattice: Lattice, trees: list[list[Order]], room: int) -> tuple[list[list[Order]], int]:
    """Add the path with the most gain per slice pass over all shards, until none fits or adds anything.

    Returns:
        `tuple[list[list[Order]], int]`: The trees, and what is left over.
    """
    trees = [list(tree) for tree in trees]
    found: dict[tuple[Order, ...], Path | None] = {}  # shards are often alike
    while True:
        for key in map(tuple, trees):
            known = found.get(key)
            if key not in found or (known and known.cost > room):
                found[key] = lattice.densest(key, room)
        offers = [(path.gain / path.cost, -shard) for shard, tree in enumerate(trees) if (path := found[tuple(tree)])]
        if not offers:
            return trees, room
        tree = trees[-max(offers)[1]]
        path = found[tuple(tree)]
        assert path is not None
        tree.append(path.order)
        room -= path.cost


def _searched(
    lattice: Lattice, kept: list[list[Order]], trees: list[list[Order]], room: int
) -> tuple[list[list[Order]], int]:
    """For every shard in turn the best tree found of the same cost and of what the shards before left over."""
    found = []
    for old, tree in zip(kept, trees, strict=True):
        room += training_cost(tree) - training_cost(old)
        if room:
            tree = first_best(lattice, [tree, best_tree(lattice, room, old, lattice.effort // len(kept))])
        room -= training_cost(tree) - training_cost(old)
        found.append(tree)
    return found, room
