"""One plan under one repair policy: what it costs until a horizon, how long it lasts, how much of it is in use.

Responsible for a row of the planner's table: from a plan and a policy to estimates, for S3T, SISA and retraining from
scratch, and for which rows no other one beats. Which plans and policies are compared is for `planner.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from ..plan.life import (
    first_slice_chances,
    life_until_all_dead,
    life_until_first_dead,
    place_chances,
    repair_cost,
    sisa_cost_per_request,
)
from ..plan.optimal import optimal
from ..plan.sequences import Order, select_sequences
from ..plan.tree import Plan
from .arrivals import DeletionRequests, RepairPolicy
from .bitsets import StageSets
from .estimates import Curve, Estimate, Simulation
from .simulate import simulate

BASELINES = {"sisa": "SISA", "shards alone": "shards alone", "full retraining": "from scratch"}
LIFE_REQUESTS = 20_000  # a life that is longer in some stream is not estimated


@dataclass(frozen=True)
class Setting:
    """How a plan is chosen: the fields of [`S3TConfig`] that decide it.

    Args:
        method (`str`): `"s3t"`, `"sisa"`, `"shards alone"` (of one slice) or `"full retraining"`.
        num_shards (`int`): `m`.
        num_slices (`int`): `L`.
        selection (`str`): `"cyclic"`, `"spaced"` or `"optimal"`.
        budget (`int`, *optional*): `B`.
        cost_budget (`int`, *optional*): With `"optimal"` instead: slice passes per epoch and shard.
        prior (`tuple[float, ...]`, *optional*): The chance that a request hits each slice.
        given (`bool`): Whether this is what was asked for.
    """

    method: Literal["s3t", "sisa", "shards alone", "full retraining"]
    num_shards: int
    num_slices: int
    selection: str = "spaced"
    budget: int | None = None
    cost_budget: int | None = None
    prior: tuple[float, ...] | None = None
    given: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """`(m, L)`."""
        return self.num_shards, self.num_slices

    @property
    def places(self) -> int:
        """`m L`: slice passes of one epoch over all examples."""
        return self.num_shards * self.num_slices

    @property
    def config(self) -> str | None:
        """The line of Python that asks for this plan; `None` for what is not S3T.

        >>> Setting("s3t", 5, 4, "optimal", cost_budget=20).config
        'S3TConfig(num_shards=5, num_slices=4, sequence_selection="optimal", cost_budget=20)'
        """
        if self.method != "s3t":
            return None
        words = [f"num_shards={self.num_shards}, num_slices={self.num_slices}"]
        if self.selection != "optimal":
            words.append(f"budget={self.budget}")
        words.append(f'sequence_selection="{self.selection}"')
        if self.selection == "optimal":
            words.append(f"cost_budget={self.cost_budget}")
            words += [f"deletion_prior={list(self.prior)}"] if self.prior else []
        return f"S3TConfig({', '.join(words)})"

    def plan(self) -> Plan:
        """The plan that a trainer makes of it."""
        if self.cost_budget is not None:
            orders = _optimal(self.num_slices, self.cost_budget, self.prior)
        else:
            orders = tuple(select_sequences(self.selection, self.num_slices, self.budget))
        return Plan.make(self.num_shards, self.num_slices, orders)

    def with_cost_used(self) -> Setting:
        """The same with the cost that the plan has for its cost budget, where that gives the same plan.

        >>> Setting("s3t", 5, 4, "optimal", cost_budget=14).with_cost_used().cost_budget
        13
        """
        if self.cost_budget is None:
            return self
        used = dataclasses.replace(self, cost_budget=self.plan().cost // self.num_shards)
        return used if used.plan() == self.plan() else self


@cache
def _optimal(num_slices: int, cost_budget: int, prior: tuple[float, ...] | None) -> tuple[Order, ...]:
    return optimal(num_slices, cost_budget=cost_budget, prior=prior).orders


class Lives(NamedTuple):
    """Requests until a shard, or every shard, is dead if nothing is repaired.

    The first two are exact, infinite where that never happens, `None` where a request hits several places. The others
    are estimates, `None` where a stream lived longer than 20,000 requests.
    """

    first_dead: float | None
    all_dead: float | None
    first_dead_estimate: Estimate | None
    all_dead_estimate: Estimate | None


@dataclass(frozen=True)
class Candidate:
    """A plan under a repair policy, until the horizon. Costs are in slice passes, for one training epoch per stage.

    Args:
        setting ([`Setting`]): How the plan is chosen.
        policy ([`RepairPolicy`]): When it is repaired.
        training_cost (`int`): Before the first request.
        repair_cost ([`Estimate`]): Of all repairs until the horizon.
        repair_cost_exact (`float`, *optional*): The same from a closed form, where there is one.
        repairs ([`Estimate`]): Their number; shards repaired at the same moment count as one.
        stages (`int`): Stages that are stored.
        storage_mb (`float`, *optional*): Their size in MB, without heads.
        lives ([`Lives`]): How long it lasts if nothing is repaired.
        in_use ([`Estimate`]): Slices in use over the time until the horizon, as a share of `m L`: the mean of each
            day's start, after a repair, and end. The error is the mean of the daily errors: not smaller than that of
            the average.
        in_use_exact (`float`, *optional*): The same average over time from the chances of all hit sets, where they
            are known.
        in_use_at_horizon ([`Estimate`]): The same at the end of the last day, before a repair that falls on it.
        in_use_at_horizon_exact (`float`, *optional*): The same from the chances of all hit sets, where they are known.
        dead ([`Estimate`]): The share of streams in which some shard was dead before the horizon.
        pareto (`bool`): Whether no other row beats this one; see [`marked`].
    """

    setting: Setting
    policy: RepairPolicy
    training_cost: int
    repair_cost: Estimate
    repair_cost_exact: float | None
    repairs: Estimate
    stages: int
    storage_mb: float | None
    lives: Lives
    in_use: Estimate
    in_use_exact: float | None
    in_use_at_horizon: Estimate
    in_use_at_horizon_exact: float | None
    dead: Estimate
    pareto: bool = False

    @property
    def mean_in_use(self) -> float:
        """Slices in use on average: exact where that is known."""
        return self.in_use.mean if self.in_use_exact is None else self.in_use_exact

    @property
    def epochs(self) -> float:
        """Training and repairs until the horizon, in epochs over all examples."""
        return (self.training_cost + self.repair_cost.mean) / self.setting.places

    @property
    def objectives(self) -> tuple[float, float, float, int]:
        """What is to be small: cost, slices not in use, chance of a dead shard, and shards.

        Shards are among them because each adapter sees one shard's examples only, and what that costs in quality is
        not known here.
        """
        return self.epochs, 1 - self.mean_in_use, self.dead.mean, self.setting.num_shards

    def to_json(self) -> dict[str, Any]:
        """Plain data; what never ends is `None`."""
        data = dataclasses.asdict(self) | {"lives": {}, "config": self.setting.config, "epochs": self.epochs}
        for name, value in self.lives._asdict().items():
            plain = dataclasses.asdict(value) if isinstance(value, Estimate) else value
            data["lives"][name] = None if plain == math.inf else plain
        return data


@dataclass(frozen=True)
class Measure:
    """How candidates are measured.

    Args:
        requests ([`DeletionRequests`]): How requests come, with a rate; the prior is that of each setting.
        horizon_days (`float`): Until when.
        streams (`int`): How many streams of requests are simulated.
        seed (`int`): The same seed gives the same numbers.
        adapter_mb (`float`, *optional*): Size of the adapter of a whole sequence.
    """

    requests: DeletionRequests
    horizon_days: float
    streams: int
    seed: int
    adapter_mb: float | None = None

    @property
    def expected_requests(self) -> float:
        """Requests until the horizon."""
        assert self.requests.per_day is not None
        return self.requests.per_day * self.horizon_days

    @property
    def one_by_one(self) -> bool:
        """Whether each request hits one place, at a moment of its own: what the closed forms take for granted."""
        return self.requests.examples == self.requests.burst == 1

    def candidates(self, setting: Setting, plan: Plan, policies: Iterable[RepairPolicy]) -> list[Candidate]:
        """A plan under several policies. That of another method than S3T has one sequence per shard."""
        requests, lives = dataclasses.replace(self.requests, prior=setting.prior), self.lives(plan, setting)
        run: dict[str, Any] = {"streams": self.streams, "seed": self.seed, "horizon_days": self.horizon_days}
        return [
            self._candidate(setting, plan, policy, lives, simulate(plan, requests, policy, **run))
            for policy in policies
        ]

    def _candidate(
        self, setting: Setting, plan: Plan, policy: RepairPolicy, lives: Lives, result: Simulation
    ) -> Candidate:
        assert result.slices_in_use_by_day is not None
        days, places = result.slices_in_use_by_day, setting.places
        in_use_exact, at_horizon_exact = self._exact_in_use(setting, plan, policy)
        whole = setting.num_slices if setting.method == "s3t" else 1  # stages that make up the size of an adapter
        return Candidate(
            setting=setting,
            policy=policy,
            training_cost=result.training_cost,
            repair_cost=Estimate.of(result.repair_cost),
            repair_cost_exact=self._exact_repair_cost(setting, plan, policy),
            repairs=Estimate.of(result.repairs),
            stages=len(plan.stages),
            storage_mb=None if self.adapter_mb is None else len(plan.stages) * self.adapter_mb / whole,
            lives=lives,
            in_use=_mean_share(days, places, policy),
            in_use_exact=in_use_exact,
            in_use_at_horizon=_estimate(days, places, lambda curve, _: float(curve[-1])),
            in_use_at_horizon_exact=at_horizon_exact,
            dead=result.first_dead_share,
        )

    def lives(self, plan: Plan, setting: Setting) -> Lives:
        """How long a plan lasts if nothing is repaired."""
        chances = first_slice_chances(plan, setting.prior)
        exact = (life_until_first_dead(chances).mean, life_until_all_dead(chances).mean)
        requests = DeletionRequests(setting.prior, self.requests.examples)
        result = simulate(plan, requests, streams=self.streams, seed=self.seed, max_requests=LIFE_REQUESTS)
        first, last = exact if self.requests.examples == 1 else (None, None)
        return Lives(first, last, result.requests_until_first_dead, result.requests_until_all_dead)

    def _exact_repair_cost(self, setting: Setting, plan: Plan, policy: RepairPolicy) -> float | None:
        if setting.method != "s3t" and policy.below and self.one_by_one and setting.prior is None:
            return self.expected_requests * sisa_cost_per_request(setting.num_slices)
        if policy.every_days and self.one_by_one:
            requests = self.expected_requests / self.horizon_days * policy.every_days
            return repair_cost(plan, requests, setting.prior) * (self.horizon_days // policy.every_days)
        return None if policy.repairs else 0.0

    def _exact_in_use(self, setting: Setting, plan: Plan, policy: RepairPolicy) -> tuple[float | None, float | None]:
        """On average until the horizon, and at the end of the last day."""
        if policy.below:
            return (1.0, 1.0) if policy.below == setting.num_slices else (None, None)

        def after(days: float, average: bool) -> float:
            bursts = self.expected_requests / self.horizon_days * days / self.requests.burst
            return expected_in_use(plan, bursts, setting.prior, self.requests.burst * self.requests.examples, average)

        day, period = int(self.horizon_days), min(policy.every_days or math.inf, self.horizon_days)
        left = self.horizon_days % period
        mean = after(period, True) * (1 - left / self.horizon_days) + after(left, True) * left / self.horizon_days
        return mean, after(day - period * max(0, math.ceil(day / period) - 1), False)


def expected_in_use(
    plan: Plan, requests: float, prior: Sequence[float] | None = None, together: int = 1, average: bool = False
) -> float:
    """Slices in use after a Poisson number of requests without repair, as a share of `m L`: exact.

    No slice outside a set is hit with the chance `exp(-n q)`, where a request hits one of them with the chance `q`;
    the chance of each hit set follows by inclusion and exclusion.

    Args:
        plan (`Plan`): The plan, of at most 16 slices.
        requests (`float`): `n`, the mean number of requests to all shards together.
        prior (`Sequence[float]`, *optional*): The chance that an example to be deleted lies in each slice.
        together (`int`, *optional*, defaults to 1): Examples that a request deletes, each in a place of its own.
        average (`bool`, *optional*, defaults to `False`): On average over the time until then instead.

    >>> plan = Plan.make(1, 2, [(0, 1), (1, 0)])
    >>> round(expected_in_use(plan, requests=1), 3), round(expected_in_use(plan, requests=1, average=True), 3)
    (0.607, 0.787)
    """
    outside = np.zeros(1)
    for chance in place_chances(plan.num_shards, plan.num_slices, prior)[0]:
        outside = np.concatenate([outside + chance, outside])
    expected = requests * (1 - (1 - outside) ** together)  # requests that hit a slice outside each set
    weights = np.exp(-expected)
    if average:
        weights = np.divide(-np.expm1(-expected), expected, out=np.ones_like(expected), where=expected > 0)
    for bit in range(plan.num_slices):
        pairs = weights.reshape(-1, 2, 1 << bit)
        pairs[:, 1] -= pairs[:, 0]
    sets = StageSets.of(plan)
    assert sets.tables is not None
    lengths = np.bincount(sets.kind_of) / sets.num_shards @ sets.tables[0].reshape(len(sets.kinds), -1)
    return float(weights @ lengths) / plan.num_slices


def marked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, each with `pareto` set if no other one is as good in all objectives and better in one."""
    goals = np.array([candidate.objectives for candidate in candidates])
    beaten = [((goals <= own).all(axis=1) & (goals < own).any(axis=1)).any() for own in goals]
    return [dataclasses.replace(c, pareto=not b) for c, b in zip(candidates, beaten, strict=True)]


def _mean_share(days: Curve, places: int, policy: RepairPolicy) -> Estimate:
    """The mean over the days: of each the mean of its start, after a repair, and its end."""

    def mean(curve: np.ndarray, full: int) -> float:
        start = curve[:-1].copy()
        if policy.every_days:
            start[np.arange(len(start)) % policy.every_days == 0] = full
        return float((start + curve[1:]).mean()) / 2

    return _estimate(days, places, mean)


def _estimate(days: Curve, places: int, number: Callable[[np.ndarray, int], float]) -> Estimate:
    """A share of `m L`, from the slices in use at the end of each day and how many there are after a repair."""
    curves = ((days.mean, places), (days.standard_error, 0), (days.low, places), (days.high, places))
    return Estimate(*(min(1.0, max(0.0, number(*curve) / places)) for curve in curves))
