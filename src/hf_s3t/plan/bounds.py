"""What no plan of a budget can be worth more than, where all slices are equally likely to be hit.

Responsible for the bounds alone, as certificates of how good a found plan is; values come from `survival.py`. With
equal chances only the number of distinct slices that were hit matters, so both bounds are sums over it, for any number
of slices.
"""

import math
from collections.abc import Sequence

import numpy as np

from .survival import checked_performance, path_cost


def _distinct_weights(num_slices: int, requests: int | None) -> np.ndarray:
    """Uniform prior: the weight of `d` distinct hit slices, for `d` from 0 to L - 1."""
    hit = np.arange(num_slices)
    if requests is None:
        return num_slices / (num_slices - hit)
    current, total = np.zeros(num_slices + 1), np.zeros(num_slices + 1)
    current[0] = 1.0
    missed = (num_slices - np.arange(num_slices)) / num_slices
    for _ in range(requests):
        current = np.append(current[:-1] * (1 - missed), 0) + np.insert(current[:-1] * missed, 0, 0)
        total += current
    return total[:-1] / requests


def _survival_chances(num_slices: int) -> np.ndarray:
    """`q = C(L - d, k) / C(L, k)`: a given set of `k` slices survives `d` distinct hits. `(k from 1, d from 0)`."""
    return np.array(
        [
            [math.comb(num_slices - d, k) / math.comb(num_slices, k) for d in range(num_slices)]
            for k in range(1, num_slices + 1)
        ]
    )


def budget_bound(
    num_slices: int, budget: int, performance: Sequence[float] | None = None, requests: int | None = None
) -> float:
    """No plan of `budget` sequences is worth more, if all slices are equally likely to be hit.

    At each length at most `min(1, B q)` of the streams find a surviving prefix (SEQUENCES.md, 5).

    >>> round(budget_bound(8, 8), 2)
    52.65
    """
    steps = np.diff(checked_performance(performance, num_slices))
    chances = np.minimum(1.0, budget * _survival_chances(num_slices))
    return float(steps @ (chances @ _distinct_weights(num_slices, requests)))


def cost_bound(
    num_slices: int, cost_budget: int, performance: Sequence[float] | None = None, requests: int | None = None
) -> float:
    """No tree that costs at most `cost_budget`, with a complete order in it, is worth more under a uniform prior.

    `n` prefixes of length `k` cost at least `k n` and survive in at most `min(1, n q)` of the streams. So the best
    numbers of prefixes, whether or not a tree has them, come from a fractional knapsack.

    >>> round(cost_bound(4, 32), 9)
    16.0
    """
    steps = np.diff(checked_performance(performance, num_slices))
    weights, chances = _distinct_weights(num_slices, requests), _survival_chances(num_slices)
    value, left = float(steps @ (chances @ weights)), cost_budget - path_cost(0, num_slices)
    offers = []  # (gain per slice pass, depth) of the second, third, ... prefix of each length
    for depth in range(1, num_slices + 1):
        count = min(math.comb(num_slices, depth), 1 + max(left, 0) // depth + 1)
        covered = np.minimum(1.0, np.arange(1, count + 1)[:, None] * chances[depth - 1]) @ weights
        offers += [(gain / depth, depth) for gain in steps[depth - 1] * np.diff(covered)]
    for density, depth in sorted(offers, reverse=True):
        taken = min(depth, left)
        if taken <= 0:
            break
        value, left = value + density * taken, left - taken
    return float(value)
