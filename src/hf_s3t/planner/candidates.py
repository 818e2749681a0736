"""One plan under one rule of repair: what it costs until a horizon, how long it lasts, how much of it is in use.

Responsible for a row of the planner's table, for S3T, SISA and retraining from scratch. Which plans and rules are
compared is for `planner.py`; what is expected of one comes from `renewal.py`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ..plan.life import life_left
from ..plan.optimal import optimal
from ..plan.sequences import Order, select_sequences
from ..plan.tree import Plan
from .renewal import Outlook, RepairRule, outlook

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
    """

    method: Method
    num_shards: int
    num_slices: int
    selection: str = "cyclic"
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
class Candidate:
    """A plan under a rule of repair, until the horizon.

    Args:
        setting ([`Setting`]): How the plan is chosen.
        rule ([`RepairRule`]): When it is repaired.
        training_cost (`int`): Before the first request, in slice passes for one training epoch per stage.
        stages (`int`): Stages that are stored.
        storage_mb (`float`, *optional*): Their size in MB, without heads.
        first_dead, all_dead (`float`): Requests until the first shard, or every shard, is dead if nothing is repaired.
        outlook ([`Outlook`]): What is expected until the horizon.
    """

    setting: Setting
    rule: RepairRule
    training_cost: int
    stages: int
    storage_mb: float | None
    first_dead: float
    all_dead: float
    outlook: Outlook

    @classmethod
    def of(
        cls, setting: Setting, plan: Plan, rule: RepairRule, per_day: float, days: float, adapter_mb: float | None
    ) -> Candidate:
        """Look at a plan; `adapter_mb` is the size of the adapter of a whole sequence."""
        life = life_left(plan, setting.prior)
        whole = setting.num_slices if setting.method == "S3T" else 1  # stages that make up the size of an adapter
        return cls(
            setting=setting,
            rule=rule,
            training_cost=plan.cost,
            stages=len(plan.stages),
            storage_mb=None if adapter_mb is None else len(plan.stages) * adapter_mb / whole,
            first_dead=life.until_first_dead.mean,
            all_dead=life.until_all_dead.mean,
            outlook=outlook(plan, rule, per_day, days, setting.prior),
        )

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
        return data | lives | {"outlook": self.outlook._asdict()}
