"""How long a plan lasts if nothing is repaired: requests until the first shard, and until every shard, is dead.

Responsible for formulas; nothing is drawn here. A request deletes one example, which lies in any shard with the same
chance and in slice `j` of it with the chance `p_j`. A shard is dead once every slice that starts one of its sequences
was hit: nothing of it can be served.

Lifetimes come from a trick: let requests arrive at random moments, one per unit of time on average. The first hits of
different slices are then independent, `P(slice hit by t) = 1 - exp(-p t)`, and so are the shards. The moment `T` of
the `N`-th request has `E[T] = E[N]` and `E[T^2] = E[N^2] + E[N]`, which gives mean and deviation of `N` itself.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .survival import checked_prior
from .tree import Plan, Stage

LOG_STEP = 1 / 16  # of the trapezoidal rule over log(t); exact to 1e-8 up to a thousand shards of 32 first slices
NEVER = 1e-100  # a chance below is that of a slice which is never hit


class Life(NamedTuple):
    """A number of requests: its mean and its standard deviation."""

    mean: float
    standard_deviation: float


class LifeLeft(NamedTuple):
    """How many requests a store is expected to take from now on, without a repair."""

    until_first_dead: Life
    until_all_dead: Life


def life_left(plan: Plan, prior: Sequence[float] | None = None, trained: Iterable[Stage] | None = None) -> LifeLeft:
    """How long what survives now is expected to last.

    Args:
        plan (`Plan`): The plan.
        prior (`Sequence[float]`, *optional*): Chance that a request to a shard hits each slice; equal ones without.
        trained (`Iterable[Stage]`, *optional*): What the store holds; without it the whole plan.

    Returns:
        `LifeLeft`: Means and deviations, infinite where a first slice is never hit. A prior that does not fit is a
        `ValueError`.

    >>> round(life_left(Plan.make(1, 2, [(0, 1), (1, 0)]), trained=[Stage(0, (1,))]).until_all_dead.mean, 6)
    2.0
    """
    chances = first_slice_chances(plan, prior, trained)
    return LifeLeft(life_until_first_dead(chances), life_until_all_dead(chances))


def first_slice_chances(
    plan: Plan, prior: Sequence[float] | None = None, trained: Iterable[Stage] | None = None
) -> list[list[float]]:
    """For every shard the chance that a request hits each slice that starts one of its sequences; see [`life_left`].

    >>> first_slice_chances(Plan.make(1, 4, [(0, 1), (2, 3)]))
    [[0.25, 0.25]]
    """
    chances = checked_prior(prior, plan.num_slices)
    chances = chances / (chances.sum() * plan.num_shards)
    firsts: list[list[float]] = [[] for _ in range(plan.num_shards)]
    for stage in plan.stages if trained is None else plan.live(trained):
        if stage.depth == 1:
            firsts[stage.shard].append(float(chances[stage.prefix[0]]))
    return firsts


def life_until_all_dead(chances: Sequence[Sequence[float]]) -> Life:
    """Requests until no stage of any shard is left: `integral over t of 1 - prod (1 - exp(-p t))`.

    Args:
        chances (`Sequence[Sequence[float]]`): From [`first_slice_chances`]; a dead shard has an empty list.

    >>> round(life_until_all_dead([[1 / 20] * 4] * 5).mean, 2)
    71.95
    """
    every = np.concatenate([np.asarray(shard, dtype=float) for shard in chances])
    if not every.size:
        return Life(0.0, 0.0)
    if every.min() < NEVER:
        return Life(math.inf, math.inf)
    return _life(lambda t: -np.expm1(_log_all_hit(every, t)), float(every.max()), float(every.min()))


def life_until_first_dead(chances: Sequence[Sequence[float]]) -> Life:
    """Requests until the first shard is dead: `integral over t of prod over shards (1 - prod (1 - exp(-p t)))`.

    Args: see [`life_until_all_dead`]. Zero if a shard is dead already.

    >>> round(life_until_first_dead([[1 / 20] * 4] * 5).mean, 1)
    19.3
    """
    if not all(map(len, chances)):
        return Life(0.0, 0.0)
    mortal = Counter(tuple(sorted(shard)) for shard in chances if min(shard) >= NEVER)
    if not mortal:
        return Life(math.inf, math.inf)

    def none_dead(t: np.ndarray) -> np.ndarray:
        alive = [(-np.expm1(_log_all_hit(np.asarray(shard), t))) ** number for shard, number in mortal.items()]
        return np.prod(alive, axis=0)

    return _life(none_dead, max(map(max, mortal)), min(map(min, mortal)))


def _log_all_hit(chances: np.ndarray, t: np.ndarray) -> np.ndarray:
    """`log prod (1 - exp(-p t))` for every `t`; equal chances are computed once."""
    total = np.zeros_like(t)
    for chance, number in zip(*np.unique(chances, return_counts=True), strict=True):
        x = chance * t
        small = x < 0.7  # each of the two is exact on its own side
        total += number * np.log(-np.expm1(-x), where=small, out=np.log1p(-np.exp(-np.where(small, 1.0, x))))
    return total


def _life(survival: Callable[[np.ndarray], np.ndarray], largest: float, smallest: float) -> Life:
    """Mean and deviation of `N` from `P(T > t)`; the chances of first slices lie between `smallest` and `largest`."""
    # Over x = log(t) the integrand is analytic and falls off fast on both sides: the trapezoidal rule is exact to
    # rounding. Left of the range it is next to nothing of the mean, right of it as well.
    t = np.exp(np.arange(-math.log(largest) - 50, -math.log(smallest) + math.log(100), LOG_STEP))
    alive = survival(t)
    mean = LOG_STEP * math.fsum(alive * t)
    square = LOG_STEP * math.fsum(2 * alive * t * t)
    return Life(mean, math.sqrt(max(square - mean - mean * mean, 0.0)))
