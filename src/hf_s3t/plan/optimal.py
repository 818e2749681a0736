"""The best plan for the money: which orders, or which tree of stages, keep most of the model through deletions.

Responsible for what may be asked, the defaults, and the certificates that come with an answer. The searches are in
`search.py` and `trees.py`; what a plan is worth comes from `survival.py`, for more than 16 slices from `streams.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .bounds import budget_bound, cost_bound
from .search import Measure, best_orders
from .sequences import Order, check_count, prune_orders, training_cost
from .streams import HELD_OUT_STREAMS, Streams
from .survival import LATTICE_SLICES, MAX_REQUESTS, Lattice, checked_prior
from .trees import best_tree

UNIFORM_SHARE = 0.5  # of the value that is optimised, where a prior is given
SELDOM = 0.01  # of a uniform chance: no slice counts as hit less often


@dataclass(frozen=True)
class Selection:
    """Orders for one shard, and how good they are.

    Args:
        orders (`tuple[Order, ...]`): The orders, possibly truncated, for [`Plan.make`]. The first is a complete one.
        value (`float`): The performance summed over the requests of the whole life, or its mean over the horizon.
            With a prior the mean of two values, under the given one and under a uniform one.
        bound (`float`, *optional*): No plan of the same budget is worth more. Only for a uniform prior.
        every_order (`float`): The value of training every order.
        cost (`int`): Slice passes per epoch for this shard, pruned.
        held_out (`bool`): Whether the values are means over sampled streams, others than those searched on.
    """

    orders: tuple[Order, ...]
    value: float
    bound: float | None
    every_order: float
    cost: int
    held_out: bool


def optimal(
    num_slices: int,
    budget: int | None = None,
    cost_budget: int | None = None,
    prior: Sequence[float] | None = None,
    performance: Sequence[float] | None = None,
    seed: int = 0,
    requests: int | None = None,
) -> Selection:
    """Choose the sequences of one shard, for a number of sequences or for a cost.

    A number of sequences gives complete orders, fewer than asked for where more would add nothing. A cost gives a tree
    of stages: one complete order, the slice least often hit first, and then whatever adds most per slice pass, mostly
    truncated orders. The result is never worth less than the cyclic and spaced rotations of the same budget or cost
    (pruned, for a cost; should only rotations in the given numbering be as good, the complete order is theirs).

    Args:
        num_slices (`int`): `L`, the number of slices in the shard.
        budget (`int`, *optional*): `B`, the number of sequences; `num_slices` without any budget.
        cost_budget (`int`, *optional*): Instead of `budget`: slice passes per epoch, at least `L (L + 1) / 2`.
        prior (`Sequence[float]`, *optional*): The chance that a request hits each slice; one below a hundredth of
            `1 / L` counts as that. Optimised for is the mean of a plan's values under this prior and under a uniform
            one: a prior that turns out wrong then costs little.
        performance (`Sequence[float]`, *optional*): What a model of 1, 2, ..., L surviving slices is worth, not
            falling; their number without.
        seed (`int`, *optional*, defaults to `0`): The same seed gives the same plan.
        requests (`int`, *optional*): Optimise the mean over the first so many requests to this shard; without, the
            whole life, until nothing is left.

    Returns:
        [`Selection`]: The orders and their certificates.

    Raises:
        ValueError: If an argument is out of range, both budgets are given, or the cost budget does not suffice for one
            complete order.

    >>> optimal(4, budget=2).orders
    ((0, 1, 2, 3), (2, 3, 0, 1))
    """
    if budget is not None and cost_budget is not None:
        raise ValueError(f"budget={budget} and cost_budget={cost_budget} are both given. Give one of them.")
    check_count("seed", seed, 0, 2**32 - 1)
    if requests is not None:
        check_count("requests", requests, 1, MAX_REQUESTS)
    measure, judge = measures(prior, num_slices, performance, requests, seed)
    if cost_budget is not None:
        orders = best_tree(measure, cost_budget, seed, judge)
        cost = training_cost(orders)
        bound = cost_bound(num_slices, cost_budget, performance, requests)
    else:
        budget = num_slices if budget is None else budget
        orders = best_orders(measure, budget, seed, judge)
        cost = training_cost(prune_orders(orders))
        bound = budget_bound(num_slices, budget, performance, requests)
    uniform = np.allclose(measure.prior, 1 / num_slices, rtol=0, atol=1e-12)
    held_out = judge is not measure
    return Selection(tuple(orders), judge.value(orders), bound if uniform else None, judge.every_order, cost, held_out)


def measures(
    prior: Sequence[float] | None,
    num_slices: int,
    performance: Sequence[float] | None,
    requests: int | None,
    seed: int,
) -> tuple[Measure, Measure]:
    """What to optimise, and what to judge by: the same where values are exact, else streams that are held out."""
    share = 0.0 if prior is None else UNIFORM_SHARE
    exact = checked_prior(prior, num_slices)
    raised = np.maximum(exact, SELDOM / num_slices)  # a slice with the chance 0 would live for ever
    chances = exact.tolist() if (raised == exact).all() else (raised / raised.sum()).tolist()
    if num_slices <= LATTICE_SLICES:
        measure = Lattice(chances, performance, requests, share)
        return measure, measure
    held_out = Streams(chances, performance, requests, seed + 1, HELD_OUT_STREAMS, share)
    return Streams(chances, performance, requests, seed, uniform_share=share), held_out
