"""The best plan for the money: which orders, or which tree of stages, keep most of the model through deletions.

Responsible for what may be asked and for what is optimised. The search is in `search.py`; what a plan is worth comes
from `survival.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .search import best_orders, best_tree
from .sequences import Order
from .survival import Lattice, check_few, checked_prior, life_weights

UNIFORM_SHARE = 0.5  # of the value that is optimised, where a prior is given
SELDOM = 0.01  # of a uniform chance: no slice counts as hit less often


class Selection(NamedTuple):
    """Orders for one shard, and how good they are.

    Args:
        orders (`tuple[Order, ...]`): The orders, possibly truncated, for [`Plan.make`]. The first is a complete one.
        value (`float`): The surviving length summed over the requests of the shard's whole life. With a prior the mean
            of two values, under the given one and under a uniform one.
        every_order (`float`): The value of training every order.
    """

    orders: tuple[Order, ...]
    value: float
    every_order: float


def optimal(
    num_slices: int,
    budget: int | None = None,
    cost_budget: int | None = None,
    prior: Sequence[float] | None = None,
) -> Selection:
    """Choose the sequences of one shard, for a number of sequences or for a cost.

    A number of sequences gives complete orders, fewer than asked for where more would add nothing. A cost gives a tree
    of stages: one complete order, the slice least often hit first, and then whatever adds most per slice pass, mostly
    truncated orders. The result is never worth less than the cyclic and spaced rotations of the same budget or cost
    (pruned, for a cost; should only rotations in the given numbering be as good, the complete order is theirs).

    Args:
        num_slices (`int`): `L`, the number of slices in the shard, at most 16.
        budget (`int`, *optional*): `B`, the number of sequences; `num_slices` without any budget.
        cost_budget (`int`, *optional*): Instead of `budget`: slice passes per epoch, at least `L (L + 1) / 2`.
        prior (`Sequence[float]`, *optional*): The chance that a request hits each slice; see [`lattice_of`].

    Returns:
        [`Selection`]: The orders, and what they are worth.

    Raises:
        ValueError: If an argument is out of range, both budgets are given, or the cost budget does not suffice for one
            complete order.

    >>> optimal(4, budget=2).orders
    ((0, 1, 2, 3), (2, 3, 0, 1))
    """
    if budget is not None and cost_budget is not None:
        raise ValueError(f"budget={budget} and cost_budget={cost_budget} are both given. Give one of them.")
    lattice = lattice_of(prior, num_slices)
    if cost_budget is None:
        orders = best_orders(lattice, num_slices if budget is None else budget)
    else:
        orders = best_tree(lattice, cost_budget)
    return Selection(tuple(orders), lattice.value(orders), lattice.every_order)


def lattice_of(prior: Sequence[float] | None, num_slices: int) -> Lattice:
    """What is optimised: the mean of a plan's values under the prior and under a uniform one.

    A prior that turns out wrong then costs little. A chance below a hundredth of `1 / L` counts as that.
    """
    uniform = checked_prior(None, num_slices)
    check_few(num_slices)
    if prior is None:
        return Lattice(uniform.tolist())
    raised = np.maximum(checked_prior(prior, num_slices), SELDOM / num_slices)
    chances = (raised / raised.sum()).tolist()
    weights = (1 - UNIFORM_SHARE) * life_weights(chances) + UNIFORM_SHARE * life_weights(uniform.tolist())
    return Lattice(chances, weights)
