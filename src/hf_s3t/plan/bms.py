"""The paper's choice of sequences for a known deletion prior: by bipartite matching, beyond `L` by sampling.

Responsible for nothing else. It is here to compare with; `optimal.py` finds better orders.
"""

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np

from .sequences import Order, check_budget
from .survival import checked_prior

SCORED_REQUESTS = 100  # the paper's t
REJECTIONS = 1000  # draws of known orders in a row, after which all orders become equally likely


def bms(num_slices: int, budget: int, prior: Sequence[float] | None = None, seed: int = 0) -> list[Order]:
    """Bipartite-matching-based selection, BMS, of the paper (S3T, arXiv 2406.16257).

    Each sequence starts with another slice. Then all sequences get their next slice at once, by the matching of
    sequences and slices with the highest total score: the chance `(1 - p(prefix))^t` that the longer prefix outlives
    `t = 100` requests.

    Ours is: The score has no factor `i`, which expected survival does not have. It is computed in logarithms and
    scaled in each step, so it does not drown in rounding. Below `L` the sequences are those that start with the slices
    least often hit; the others are matched too, at no score, because without them some sequences can be left without a
    slice that they lack. Above `L` the paper samples all sequences; here the first `L` are the matched ones, and only
    the rest is sampled: slice after slice, each with a chance proportional to `1 - p_j` among those that it lacks.

    Args:
        num_slices (`int`): `L`, the number of slices in the shard.
        budget (`int`): `B`, the number of sequences, at most `L!`.
        prior (`Sequence[float]`, *optional*): The chance that a request hits each slice; equal ones without.
        seed (`int`, *optional*, defaults to `0`): Used beyond `L` sequences only.

    Returns:
        `list[Order]`: `budget` distinct orders, those that start with the slices least often hit first. Numbers out of
        range and a prior that does not fit are a `ValueError`.

    >>> bms(4, 2, [0.4, 0.3, 0.2, 0.1])
    [(3, 2, 0, 1), (2, 3, 1, 0)]
    """
    check_budget(num_slices, budget)
    chances = checked_prior(prior, num_slices)
    orders = dict.fromkeys(_matched(chances, budget))
    rng = random.Random(seed)
    for drawn in itertools.count():  # a race of exponential clocks draws slices in proportion to their rates
        if len(orders) >= budget:
            break
        rates = np.maximum(1 - chances, 1e-9) if drawn < REJECTIONS * budget else np.ones(num_slices)
        clocks = [-math.log(1 - rng.random()) / rate for rate in rates]
        orders[tuple(sorted(range(num_slices), key=clocks.__getitem__))] = None
    return list(orders)


def _matched(chances: np.ndarray, budget: int) -> list[Order]:
    from scipy.optimize import linear_sum_assignment  # takes longer to import than most plans to find

    coldest = np.argsort(chances, kind="stable")[:budget]
    orders: list[Order] = [(slice_id,) for slice_id in range(len(chances))]
    for _ in range(len(chances) - 1):
        rows, slices = linear_sum_assignment(_scores(orders, chances, coldest), maximize=True)
        orders = [(*orders[row], int(slice_id)) for row, slice_id in zip(rows, slices, strict=True)]
    return [orders[start] for start in coldest]


def _scores(orders: list[Order], chances: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """The score of each order with each further slice; forbidden is one that it has already."""
    spent = np.array([chances[list(order)].sum() for order in orders])
    with np.errstate(divide="ignore"):  # the logarithm of no chance at all is minus infinity, and its score 0
        logs = SCORED_REQUESTS * np.log(np.maximum(1 - spent[:, None] - chances, 0))
    for row, order in enumerate(orders):
        logs[row, list(order)] = -np.inf
    highest = logs[counted].max()
    scores = np.zeros_like(logs)
    if highest > -np.inf:
        scores[counted] = np.exp(logs[counted] - highest)
    for row, order in enumerate(orders):
        scores[row, list(order)] = -np.inf
    return scores
