"""How long a plan and its repairs take on some GPUs, and whether a repair ends before the next one is due.

Responsible for hours. GPU hours are expected exactly (`renewal.py`). How well a repair spreads over the GPUs depends
on which stages it lacks: repairs are drawn, always the same ones, and scheduled as a training would hand them out
(`plan/schedule.py`). Their hours per GPU hour, times the expected GPU hours of a repair, are the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..plan.schedule import makespan_of, positions
from ..plan.survival import checked_prior, set_of, surviving_lengths
from ..plan.tree import Plan
from .renewal import Outlook, RepairRule

DRAWS, LEAST_DRAWS = 64, 8
MOST_STAGES = 15_000  # scheduled for one row, about


@dataclass(frozen=True)
class Machines:
    """The GPUs that train.

    Args:
        gpus (`int`): How many there are.
        per_stage (`int`): How many train one stage together; taken to be so many times as fast as one.
        hours_per_epoch (`float`): GPU hours of an epoch over all examples.
    """

    gpus: int
    per_stage: int
    hours_per_epoch: float

    @property
    def workers(self) -> int:
        """Stages that train at the same time."""
        return self.gpus // self.per_stage


class Hours(NamedTuple):
    """What a plan takes on its machines, in hours.

    Args:
        training (`float`): The first training, by list scheduling.
        repair (`float`): A repair that has the GPUs for itself, on average: of one shard, or, on a date, of all.
        longest (`float`): The longest of the drawn ones.
        between (`float`): From one repair of a shard to its next one, on average; infinite without repairs. Other
            shards may be repaired meanwhile.
        share (`float`): Of the hours of all GPUs until the horizon, what repairs take.
    """

    training: float
    repair: float
    longest: float
    between: float
    share: float

    @property
    def fits(self) -> bool:
        """Whether the GPUs suffice, and a shard is repaired before its next repair is due.

        >>> Hours(10, repair=5, longest=9, between=8, share=0.4).fits, Hours(10, 9, 9, 8, 0.4).fits
        (True, False)
        """
        return self.share <= 1 and self.repair <= self.between


def hours_on(
    machines: Machines, plan: Plan, rule: RepairRule, found: Outlook, per_day: float, days: float,
    prior: Sequence[float] | None = None, replay: float = 1.0,
) -> Hours:  # fmt: skip
    """What a plan takes on some machines.

    Args:
        machines ([`Machines`]): The GPUs.
        plan (`Plan`): The plan; every shard has the same sequences.
        rule ([`RepairRule`]): When it is repaired.
        found ([`Outlook`]): What is expected of it, of the same requests.
        per_day, days (`float`): Requests per day, and the horizon.
        prior (`Sequence[float]`, *optional*): Chance that a request to a shard hits each slice.
        replay (`float`, *optional*, defaults to `1.0`): See [`Stage.passes`].

    >>> from .renewal import outlook
    >>> plan, rule = Plan.make(4, 1, [(0,)]), RepairRule(below=1)
    >>> found = outlook(plan, rule, per_day=1, horizon_days=100)
    >>> hours = hours_on(Machines(2, 1, hours_per_epoch=48), plan, rule, found, per_day=1, days=100)
    >>> hours.training, hours.repair, round(hours.between), round(hours.share, 2)
    (24.0, 12.0, 96, 0.25)
    """
    pass_hours = machines.hours_per_epoch / (plan.num_shards * plan.num_slices)  # GPU hours of a slice pass
    drawn = _Drawn(plan, rule, per_day, checked_prior(prior, plan.num_slices), replay)
    stage_hours = pass_hours / machines.per_stage
    training = drawn.hours([(shard, drawn.everything) for shard in range(plan.num_shards)], machines.workers)
    if not found.repairs:
        return Hours(training * stage_hours, 0.0, 0.0, math.inf, 0.0)
    repairs = [(drawn.hours(hits, machines.workers), drawn.work(hits)) for hits in drawn.repairs()]
    spread = sum(hours for hours, _ in repairs) / sum(work for _, work in repairs)
    mean = spread * found.repair_cost / found.repairs
    longest = max(mean, *(hours for hours, _ in repairs))
    share = found.repair_cost * pass_hours / (machines.gpus * 24 * days)
    between = 24 * days / found.repairs * (plan.num_shards if rule.below else 1)
    return Hours(training * stage_hours, mean * stage_hours, longest * stage_hours, between, share)


Hits = list[tuple[int, int]]  # shards, and the slices of each that were hit, as bits


class _Drawn:
    """Repairs as they come: which slices were hit since the last one, and what that costs, in slice passes."""

    def __init__(self, plan: Plan, rule: RepairRule, per_day: float, prior: np.ndarray, replay: float) -> None:
        self.plan, self.rule, self.per_day, self.prior = plan, rule, per_day, prior
        stages = [stage for stage in plan.stages if stage.shard == 0]
        self.parents = positions(stages)
        self.costs = [float(stage.passes(replay)) for stage in stages]
        self.sets = np.array([set_of(stage.prefix) for stage in stages])
        self.lengths = surviving_lengths(plan.sequences[0], plan.num_slices)
        self.everything = len(self.lengths) - 1
        self._known: dict[tuple[int, ...], float] = {}
        self._lost: dict[int, list[int]] = {}

    def repairs(self) -> Iterator[Hits]:
        """As many as time allows, always the same ones."""
        random = np.random.default_rng(0)
        shards = 1 if self.rule.below else self.plan.num_shards
        for _ in range(max(LEAST_DRAWS, min(DRAWS, MOST_STAGES // (shards * len(self.sets))))):
            yield self._below(random) if self.rule.below else self._on_a_date(random)

    def _below(self, random: np.random.Generator) -> Hits:
        """First hits come in the order of exponential times; the rule stops them."""
        with np.errstate(divide="ignore"):
            times = random.exponential(size=len(self.prior)) / self.prior
        hit = 0
        for slice_id in np.argsort(times):
            hit |= 1 << int(slice_id)
            if self.lengths[self.everything ^ hit] < (self.rule.below or 0):
                break
        return [(0, hit)]

    def _on_a_date(self, random: np.random.Generator) -> Hits:
        """Given that there was a request at all: where the first one hit, and what was hit after it."""
        mean = self.per_day * (self.rule.every_days or 0.0)
        first = -math.log1p(random.random() * math.expm1(-mean))  # its moment; the whole time is `mean` long
        hit = random.random((self.plan.num_shards, len(self.prior))) < -np.expm1(
            (first - mean) / self.plan.num_shards * self.prior
        )
        hit[random.integers(self.plan.num_shards), random.choice(len(self.prior), p=self.prior)] = True
        sets = hit @ (1 << np.arange(len(self.prior)))
        return [(int(shard), int(sets[shard])) for shard in np.flatnonzero(sets)]

    def work(self, hits: Hits) -> float:
        """Slice passes of what the hits took."""
        return sum(self.costs[place] for _, hit in hits for place in self._lost_by(hit))

    def hours(self, hits: Hits, workers: int) -> float:
        """How long that takes, with an hour for a slice pass."""
        key = tuple(sorted(hit for _, hit in hits))  # shards are alike
        if key not in self._known:
            parents: list[int] = []
            costs: list[float] = []
            for hit in key:
                lost = self._lost_by(hit)
                where = {place: len(costs) + number for number, place in enumerate(lost)}
                parents += [where.get(self.parents[place], -1) for place in lost]
                costs += [self.costs[place] for place in lost]
            self._known[key] = makespan_of(parents, costs, workers)
        return self._known[key]

    def _lost_by(self, hit: int) -> list[int]:
        if hit not in self._lost:
            self._lost[hit] = np.flatnonzero(self.sets & hit).tolist()
        return self._lost[hit]
