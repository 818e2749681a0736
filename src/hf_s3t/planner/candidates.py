"""One plan under one rule of repair: what it costs until a horizon, how long it lasts, how much of it is in use.

Responsible for a row of the planner's table, for S3T, SISA and retraining from scratch. Which plans and rules are
compared is for `planner.py`; what is expected of one comes from `renewal.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ..plan.life import life_left
from ..plan.optimal import optimal
from ..plan.sequences import Order, select_sequences
from ..plan.tree import Plan
from .machines import Hours, Machines, hours_on
from .renewal import Outlook, RepairRule, mean_score, outlook

INDEX_BYTES = 88  # of an example in the private state, measured: docs/scaling.md

Method = Literal["S3T", "SISA", "shards alone", "from scratch"]


@dataclass(frozen=True)
class Setting:
    """How a plan is chosen: the fields of [`S3TConfig`] that decide it.

    Args:
        method (`str`): `"S3T"`; `"SISA"`, one sequence per shard; `"shards alone"`, of one slice; `"from scratch"`,
            one shard of one slice.
        num_shards (`int`): `m`.
        num_slices (`int`): `L`.
        selection (`str`): `"cyclic"`, `"spaced"` or `"optimal"`.
        budget (`int`, *optional*): `B`.
        cost_budget (`int`, *optional*): With `"optimal"` instead: slice passes per epoch and shard.
        prior (`tuple[float, ...]`, *optional*): The chance that a request hits each slice.
        given (`bool`): Whether this is what was asked for.
        replay (`float`): See [`Stage.passes`].
    """

    method: Method
    num_shards: int
    num_slices: int
    selection: str = "cyclic"
    budget: int | None = None
    cost_budget: int | None = None
    prior: tuple[float, ...] | None = None
    given: bool = False
    replay: float = 1.0

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

        >>> Setting("S3T", 5, 4, "optimal", cost_budget=20).config
        'S3TConfig(num_shards=5, num_slices=4, sequence_selection="optimal", cost_budget=20)'
        """
        if self.method != "S3T":
            return None
        words = [f"num_shards={self.num_shards}, num_slices={self.num_slices}"]
        words += [] if self.budget is None else [f"budget={self.budget}"]
        words.append(f'sequence_selection="{self.selection}"')
        words += [] if self.cost_budget is None else [f"cost_budget={self.cost_budget}"]
        words += [f"deletion_prior={list(self.prior)}"] if self.prior and self.selection == "optimal" else []
        words += [] if self.replay == 1 else [f"replay={self.replay}"]
        return f"S3TConfig({', '.join(words)})"

    def plan(self) -> Plan:
        """The plan that a trainer makes of it."""
        if self.cost_budget is not None:
            return Plan.make(*self.size, _optimal(self.num_slices, self.cost_budget, self.prior))
        return Plan.make(*self.size, select_sequences(self.selection, self.num_slices, self.budget))


@cache
def _optimal(num_slices: int, cost_budget: int, prior: tuple[float, ...] | None) -> tuple[Order, ...]:
    return optimal(num_slices, cost_budget=cost_budget, prior=prior).orders


@dataclass(frozen=True)
class Terms:
    """What is the same for every candidate; see [`S3TPlanner`].

    Args:
        examples (`int`): Rows of the train set.
        per_day, days (`float`): Requests per day, and the horizon.
        machines ([`Machines`], *optional*): What trains.
        adapter_mb (`float`, *optional*): Size of the adapter of a whole sequence.
        cache_mb (`float`): Size of the activation cache.
        curve (`Sequence[float]`, *optional*): The score by the length of the served prefix.
    """

    examples: int
    per_day: float
    days: float
    machines: Machines | None = None
    adapter_mb: float | None = None
    cache_mb: float = 0.0
    curve: Sequence[float] | None = None


@dataclass(frozen=True)
class Candidate:
    """A plan under a rule of repair, until the horizon.

    Args:
        setting ([`Setting`]): How the plan is chosen.
        rule ([`RepairRule`]): When it is repaired.
        training_cost (`float`): Before the first request, in slice passes for one training epoch per stage.
        stages (`int`): Stages that are stored.
        storage_mb (`float`, *optional*): Their size in MB, without heads; the index of examples and, of S3T, the
            activation cache.
        first_dead, all_dead (`float`): Requests until the first shard, or every shard, is dead if nothing is repaired.
        outlook ([`Outlook`]): What is expected until the horizon.
        hours ([`Hours`], *optional*): What that takes on the machines.
        score (`float`, *optional*): Of a shard on average over the time.
    """

    setting: Setting
    rule: RepairRule
    training_cost: float
    stages: int
    storage_mb: float | None
    first_dead: float
    all_dead: float
    outlook: Outlook
    hours: Hours | None = None
    score: float | None = None

    @classmethod
    def of(cls, setting: Setting, plan: Plan, rule: RepairRule, terms: Terms) -> Candidate:
        """Look at a plan."""
        life = life_left(plan, setting.prior)
        asked = terms.per_day, terms.days, setting.prior
        found = outlook(plan, rule, *asked, setting.replay)
        machines = terms.machines
        if machines and setting.method == "from scratch":  # one training, on all GPUs together
            machines = dataclasses.replace(machines, per_stage=machines.gpus)
        return cls(
            setting=setting,
            rule=rule,
            training_cost=sum(stage.passes(setting.replay) for stage in plan.stages),
            stages=len(plan.stages),
            storage_mb=None if terms.adapter_mb is None else _storage(setting, plan, terms),
            first_dead=life.until_first_dead.mean,
            all_dead=life.until_all_dead.mean,
            outlook=found,
            hours=None if machines is None else hours_on(machines, plan, rule, found, *asked, setting.replay),
            score=None if terms.curve is None else mean_score(terms.curve, plan, rule, *asked),
        )

    @property
    def fits(self) -> bool:
        """Whether the machines suffice for its repairs; where none are named, it is taken to."""
        return self.hours is None or self.hours.fits

    @property
    def epochs(self) -> float:
        """Training and repairs until the horizon, in epochs over all examples."""
        return (self.training_cost + self.outlook.repair_cost) / self.setting.places

    @property
    def when(self) -> str:
        """The rule in few characters."""
        if self.rule.every_days:
            return "1 day" if self.rule.every_days == 1 else f"{self.rule.every_days:g} days"
        if self.rule.below == self.setting.num_slices:
            return "each hit"
        return f"below {self.rule.below}" if self.rule.below else "never"

    def to_json(self) -> dict[str, Any]:
        """Plain data; what never ends is `None`."""
        data = dataclasses.asdict(self) | {"config": self.setting.config, "epochs": self.epochs}
        lives = {name: data[name] if math.isfinite(data[name]) else None for name in ("first_dead", "all_dead")}
        data |= lives | {"outlook": self.outlook._asdict(), "fits": self.fits}
        if self.hours:
            between = self.hours.between
            data["hours"] = self.hours._asdict() | {"between": between if math.isfinite(between) else None}
        return data


def _storage(setting: Setting, plan: Plan, terms: Terms) -> float:
    """MB of stages, of the index and of the cache."""
    whole = setting.num_slices if setting.method == "S3T" else 1  # stages that make up the size of an adapter
    index = 0.0 if setting.method == "from scratch" else terms.examples * INDEX_BYTES / 1e6
    cache = terms.cache_mb if setting.method == "S3T" else 0.0
    return len(plan.stages) * (terms.adapter_mb or 0.0) / whole + index + cache
