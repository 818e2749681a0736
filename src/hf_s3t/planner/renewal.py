"""What a plan costs and keeps until a horizon, under a rule of repair: exactly, nothing is drawn.

Responsible for one plan under one rule; which plans and rules are compared is for `candidates.py`.

Requests arrive at random moments (a Poisson process), each for one example. So slices are hit independently: at the
time `t` after the last repair of a shard, slice `j` is untouched with the chance `exp(-r_j t)`, and so are all slices
of a set `V` with the chance `exp(-r(V) t)`, where `r(V)` is the sum of their rates. Whatever depends on the set of
untouched slices alone is expected to be a sum of such terms (Moebius inversion over the sets). So is its integral.

A rule by days starts anew on each date. A rule by length starts anew when a shard is repaired. Let `F(t)` be the
chance that this happens before `t`, and `b(t)` what a quantity is until then. The quantity is the solution of the
renewal equation, `x(t) = b(t) + integral from 0 to t of x(t - s) dF(s)` (Feller, An Introduction to Probability
Theory and Its Applications, II, XI). It is solved on a grid, whose steps are a few hundredths of the time between two
repairs. After a dozen repairs all curves are straight lines (the renewal theorem), and go on so until the horizon.
Against a grid eight times as fine, and against closed forms, results are within 0.2 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..plan.survival import ROUNDING, check_few, checked_prior, set_of, subset_sums, surviving_lengths
from ..plan.tree import Plan

STEPS = 512  # of the grid on which the renewal equation is solved
LIVES = 12  # as many repairs, at least, happen on it, unless the horizon comes first


@dataclass(frozen=True)
class RepairRule:
    """When missing stages are trained again. Without arguments: never.

    Args:
        every_days (`float`, *optional*): All shards, on a date.
        below (`int`, *optional*): A shard, as soon as its served prefix is shorter than that.
    """

    every_days: float | None = None
    below: int | None = None


class Outlook(NamedTuple):
    """What is expected until the horizon. Costs are in slice passes, for one training epoch per stage.

    Args:
        repair_cost (`float`): Of all repairs. One that falls on the horizon counts.
        repairs (`float`): Their number; shards repaired at the same moment count as one.
        in_use (`float`): Slices in use on average over the time, as a share of `m L`.
        in_use_at_end (`float`): The same at the horizon, before a repair that falls on it.
        dead (`float`): The chance that nothing of some shard could be served, be it for a moment.
    """

    repair_cost: float
    repairs: float
    in_use: float
    in_use_at_end: float
    dead: float


def outlook(
    plan: Plan, rule: RepairRule, per_day: float, horizon_days: float, prior: Sequence[float] | None = None,
    replay: float = 1.0,
) -> Outlook:  # fmt: skip
    """What is expected of a plan under a rule.

    Args:
        plan (`Plan`): The plan, of at most 16 slices; every shard has the same sequences.
        rule (`RepairRule`): When it is repaired.
        per_day (`float`): Requests per day, to all shards together.
        horizon_days (`float`): Until when.
        prior (`Sequence[float]`, *optional*): Chance that a request to a shard hits each slice; equal ones without.
        replay (`float`, *optional*, defaults to `1.0`): See [`Stage.passes`].

    Returns:
        `Outlook`: What is expected. Shards that differ, more slices and a prior that does not fit are a `ValueError`.

    >>> found = outlook(Plan.make(1, 2, [(0, 1), (1, 0)]), RepairRule(every_days=1), per_day=1, horizon_days=1)
    >>> round(found.in_use, 3), round(found.in_use_at_end, 3), round(found.repair_cost, 3)
    (0.787, 0.607, 2.051)
    """
    return _Shard(plan, per_day, prior, replay).repaired(rule, horizon_days)


def mean_score(
    curve: Sequence[float], plan: Plan, rule: RepairRule, per_day: float, horizon_days: float,
    prior: Sequence[float] | None = None,
) -> float:  # fmt: skip
    """The score of a shard on average over the time until the horizon.

    Args:
        curve (`Sequence[float]`): The score of a prefix by its length, from 0 to the number of slices that were
            measured. For another number of slices, what counts is the share of them, on straight lines in between.

    Returns:
        `float`: What is expected; the other arguments are those of [`outlook`].

    >>> plan, rule = Plan.make(1, 2, [(0, 1), (1, 0)]), RepairRule(every_days=1)
    >>> round(mean_score([0.5, 0.6, 0.7], plan, rule, per_day=1, horizon_days=1), 3)  # 0.5 + 0.2 * in_use
    0.657
    """
    shard, low, high = _Shard(plan, per_day, prior, 1.0), min(curve), max(curve)
    scores = np.interp(shard.lengths / plan.num_slices, np.linspace(0, 1, len(curve)), curve)
    shard.worth = (scores - low) / (high - low or 1.0)
    return low + (high - low) * shard.repaired(rule, horizon_days).in_use


class _Shard:
    """One of the shards, which are all alike: what it serves and lacks, by the set of its untouched slices."""

    def __init__(self, plan: Plan, per_day: float, prior: Sequence[float] | None, replay: float) -> None:
        check_few(plan.num_slices)
        if len(set(plan.sequences)) > 1:
            raise ValueError("The shards of this plan have different sequences. Give a plan of shards that are alike.")
        self.num_shards = plan.num_shards
        self.hits = per_day / plan.num_shards * checked_prior(prior, plan.num_slices)  # per day and slice
        self.rates = subset_sums(self.hits)
        self.lengths = surviving_lengths(plan.sequences[0], plan.num_slices).astype(float)
        stages = np.zeros_like(self.lengths)
        for stage in plan.stages:
            if stage.shard == 0:
                stages[set_of(stage.prefix)] += stage.passes(replay)
        self.costs = stages.sum() - _over_subsets(stages, +1)
        self.costs[np.abs(self.costs) < ROUNDING * stages.sum()] = 0.0  # what is whole lacks nothing
        self.worth = self.lengths / plan.num_slices  # of what is served; its mean is what is in use

    def repaired(self, rule: RepairRule, horizon: float) -> Outlook:
        if rule.below is None:
            return self.repaired_every(min(rule.every_days or math.inf, 2 * horizon), horizon)
        return self.repaired_below(rule.below, horizon)

    # ---- repaired on dates, or never ----

    def repaired_every(self, days: float, horizon: float) -> Outlook:
        periods = math.floor(horizon / days)
        last = horizon - periods * days
        lengths, costs, dead, whole = self._terms(self.worth, self.costs, self.lengths == 0, self.costs == 0)
        in_use = self._until(lengths, last) + (periods * self._until(lengths, days) if periods else 0.0)
        at_end = self._at(lengths, last if last or not periods else days)
        cost = repairs = 0.0
        lives = 1 - self._at(dead, last)
        if periods:
            cost = periods * self.num_shards * self._at(costs, days)
            repairs = periods * (1 - self._at(whole, days) ** self.num_shards)
            lives *= (1 - self._at(dead, days)) ** periods
        return self._outlook(cost, repairs, in_use / horizon, at_end, lives)

    def _outlook(self, cost: float, repairs: float, in_use: float, at_end: float, lives: float) -> Outlook:
        shares = in_use, at_end, lives
        mean, end, alive = (min(1.0, max(0.0, float(share))) for share in shares)  # rounding aside, they are that
        return Outlook(float(cost), float(repairs), mean, end, 1 - alive**self.num_shards)

    # ---- repaired where little is left ----

    def repaired_below(self, length: int, horizon: float) -> Outlook:
        served = self.lengths >= length
        alive, lengths = self._terms(served, np.where(served, self.worth, 0.0))
        spending, dying = self._terms(*self._last_hits(served))
        end = self._grid_end(alive, horizon)
        times = np.linspace(0.0, end, STEPS + 1)
        lasting, in_use = (np.array([self._at(terms, t) for t in times]) for terms in (alive, lengths))
        spent, died = (np.array([self._until(terms, t) for t in times]) for terms in (spending, dying))
        first = 1 - lasting
        repairs, costs = _renewed(first, first), _renewed(spent, first)
        in_use, lives = _renewed(in_use, first), _renewed(lasting, first - died)
        used = np.concatenate([[0.0], np.cumsum(in_use[1:] + in_use[:-1]) * end / STEPS / 2])
        cost, number, mean = (_line(curve, end, horizon) for curve in (costs, repairs, used / horizon))
        return self._outlook(
            self.num_shards * cost, self.num_shards * number, mean, in_use[-1], _power(lives, end, horizon)
        )

    def _last_hits(self, served: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By the set that is untouched before it: what the hit that leads to a repair costs per day, and how often
        such a hit leaves nothing."""
        sets = np.arange(len(served))
        cost, dead = np.zeros_like(self.costs), np.zeros_like(self.costs)
        for j, rate in enumerate(self.hits):
            after = sets & ~(1 << j)
            repaired = served & (after != sets) & ~served[after]
            cost += np.where(repaired, rate * self.costs[after], 0.0)
            dead += np.where(repaired & (self.lengths[after] == 0), rate, 0.0)
        return cost, dead

    def _grid_end(self, alive: _Terms, horizon: float) -> float:
        """The horizon, or an earlier time by which a shard was repaired about a dozen times or more."""
        half_life = horizon
        while half_life > 0 and self._at(alive, half_life / 2) < 0.5:
            half_life /= 2
        return min(horizon, LIVES * half_life)

    # ---- expectations ----

    def _terms(self, *by_untouched_set: np.ndarray) -> tuple[_Terms, ...]:
        """The factors of `exp(-r t)`, for each rate `r` of a set whose factor is not 0."""
        found = []
        for values in by_untouched_set:
            factors = _over_subsets(values.astype(float), -1)
            kept = np.flatnonzero(factors)
            rates, place = np.unique(self.rates[kept], return_inverse=True)
            found.append(_Terms(np.bincount(place, factors[kept], len(rates)), rates))
        return tuple(found)

    def _at(self, terms: _Terms, t: float) -> float:
        return float(terms.factors @ np.exp(-terms.rates * t))

    def _until(self, terms: _Terms, t: float) -> float:
        """The integral from 0 to `t`."""
        moving = terms.rates > 0
        spans = np.divide(-np.expm1(-terms.rates * t), terms.rates, out=np.full(len(moving), float(t)), where=moving)
        return float(terms.factors @ spans)


class _Terms(NamedTuple):
    """A sum of exponentials."""

    factors: np.ndarray
    rates: np.ndarray


def _over_subsets(values: np.ndarray, sign: int) -> np.ndarray:
    """Sums over the subsets of each set (`+1`), or what such sums were made of (`-1`)."""
    values = values.copy()
    bit = 1
    while bit < len(values):
        pairs = values.reshape(-1, 2, bit)
        pairs[:, 1] += sign * pairs[:, 0]
        bit *= 2
    return values


def _renewed(before: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Solves `x(t) = before(t) + integral of x(t - s) d first(s)` on the grid, by the trapezoidal rule."""
    steps = np.diff(first)
    found = np.zeros_like(before)
    found[0] = before[0]
    for i in range(1, len(before)):
        later = found[i - 1 : 0 : -1] + found[i - 2 :: -1][: i - 1]  # x(t - s) at both ends of each further step
        known = steps[0] * found[i - 1] + steps[1:i] @ later
        found[i] = (before[i] + known / 2) / (1 - steps[0] / 2)
    return found


def _line(curve: np.ndarray, end: float, horizon: float) -> float:
    """A curve at the horizon, which beyond its end goes on as straight as in its second half."""
    slope = (curve[-1] - curve[STEPS // 2]) / (end / 2)
    return float(curve[-1] + slope * (horizon - end))


def _power(curve: np.ndarray, end: float, horizon: float) -> float:
    """A chance at the horizon, which beyond the end of its curve falls by the same factor in equal times."""
    half = curve[STEPS // 2]
    factor = max(0.0, curve[-1] / half) if half > 0 else 0.0
    return float(max(0.0, curve[-1]) * factor ** ((horizon - end) / (end / 2)))
