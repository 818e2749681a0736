"""S3T beside its alternatives, as numbers: what `pictures.py` draws.

Responsible for running the same deletion streams through the ways to answer them, for what each selection of sequences
keeps at which cost, and for what is to be expected of a store as it stands. It draws nothing.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..plan.bms import bms
from ..plan.life import first_slice_chances, life_until_all_dead
from ..plan.optimal import optimal
from ..plan.sequences import Order, check_count, cyclic, prune_orders, random_orders, spaced, training_cost
from ..plan.streams import HELD_OUT_STREAMS, Streams
from ..plan.survival import LATTICE_SLICES, Lattice, checked_prior
from ..plan.tree import Plan, Stage
from .arrivals import DeletionRequests, RepairPolicy
from .bitsets import MAX_BITS
from .estimates import Curve, Simulation
from .simulate import simulate, simulate_full_retraining, simulate_sisa

COST_MARKS = 8  # points at which the cost of training so far is looked at
LONGEST_LIFE = 20  # requests per slice after which a picture ends, however long the plan lives
RANDOM_SEEDS = 5


@dataclass(frozen=True, eq=False)
class Course:
    """One way to answer deletion requests, over the requests or days.

    Args:
        name (`str`): What it is called.
        in_use (`Curve`): Slices in use after 0, 1, 2, ... requests, or at the end of day 0, 1, 2, ...
        moments (`np.ndarray`): After how many requests or days the cost is looked at.
        cost (`np.ndarray`): Slice passes of training up to then, the first training included: the mean.
    """

    name: str
    in_use: Curve
    moments: np.ndarray
    cost: np.ndarray


def default_horizon(plan: Plan, requests: DeletionRequests, trained: Iterable[Stage] | None = None) -> int:
    """After how many requests nothing is left on average, without repair; at most 20 per slice.

    >>> default_horizon(Plan.make(5, 4, [(0, 1, 2, 3), (1, 2, 3), (2, 3, 0), (3, 0, 1)]), DeletionRequests())
    72
    """
    life = life_until_all_dead(first_slice_chances(plan, requests.prior, trained)).mean / requests.examples
    return max(1, math.ceil(min(life, LONGEST_LIFE * plan.num_shards * plan.num_slices)))


def courses(
    plan: Plan,
    requests: DeletionRequests | None = None,
    policy: RepairPolicy | None = None,
    *,
    streams: int = 500,
    seed: int = 0,
    max_requests: int | None = None,
    horizon_days: float | None = None,
) -> list[Course]:
    """The plan without repair, with repair if there is a policy, SISA and full retraining, on the same streams.

    Costs come from simulations that end at each of the moments: with the same seed they see the same streams.

    Args:
        plan, requests, policy, streams, seed, max_requests, horizon_days: See [`simulate`], also for errors. Without a
            horizon it is [`default_horizon`].

    Returns:
        `list[Course]`: In this order, over days if the horizon is in days, else over requests.

    >>> [course.name for course in courses(Plan.make(1, 2, [(0, 1), (1, 0)]), max_requests=2, streams=2)]
    ['S3T without repair', 'SISA, retrained at once', 'full retraining at once']
    """
    requests, policy = requests or DeletionRequests(), policy or RepairPolicy()
    if horizon_days is None and max_requests is None:
        max_requests = default_horizon(plan, requests)
    size = (plan.num_shards, plan.num_slices)
    ways: dict[str, Callable[..., Simulation]] = {
        "S3T without repair": lambda **end: simulate(plan, requests, streams=streams, seed=seed, **end)
    }
    if policy.repairs:
        when = f"below {policy.below} slices" if policy.below else f"every {policy.every_days:g} days"
        ways[f"S3T, repaired {when}"] = lambda **end: simulate(
            plan, requests, policy, streams=streams, seed=seed, **end
        )
    ways["SISA, retrained at once"] = lambda **end: simulate_sisa(*size, requests, streams=streams, seed=seed, **end)
    ways["full retraining at once"] = lambda **end: simulate_full_retraining(
        *size, requests, streams=streams, seed=seed, **end
    )
    return [_course(name, way, max_requests, horizon_days) for name, way in ways.items()]


def _course(name: str, way: Callable[..., Simulation], max_requests: int | None, horizon_days: float | None) -> Course:
    if horizon_days is None:
        assert max_requests is not None
        moments = np.unique(np.linspace(0, max_requests, COST_MARKS + 1).astype(int)).tolist()
        runs = [way(max_requests=moment) for moment in moments[1:]]
        in_use = runs[-1].slices_in_use
    else:
        moments = np.linspace(0, horizon_days, COST_MARKS + 1).tolist()
        runs = [way(horizon_days=moment) for moment in moments[1:]]
        assert runs[-1].slices_in_use_by_day is not None
        in_use = runs[-1].slices_in_use_by_day
    cost = [runs[0].training_cost, *(run.training_cost + run.repair_cost.mean() for run in runs)]
    return Course(name, in_use, np.array(moments), np.array(cost))


def from_now_on(
    plan: Plan,
    trained: Iterable[Stage],
    requests: DeletionRequests | None = None,
    *,
    streams: int = 500,
    seed: int = 0,
) -> Curve | None:
    """Slices in use after 0, 1, 2, ... further requests if nothing is repaired.

    Args:
        plan (`Plan`): The plan.
        trained (`Iterable[Stage]`): What the store holds.
        requests, streams, seed: See [`simulate`].

    Returns:
        `Curve`: Up to [`default_horizon`]. `None` if nothing is live, or a shard has more slices than a simulation
        takes.

    >>> from_now_on(Plan.make(2, 2, [(0, 1)]), [Stage(0, (0,))], streams=2).mean.tolist()[0]
    1.0
    """
    trained, requests = list(trained), requests or DeletionRequests()
    surviving = plan.surviving(trained)
    left = tuple(surviving.get(shard, ()) for shard in range(plan.num_shards))
    if not any(left) or plan.num_slices > MAX_BITS:
        return None
    now, horizon = Plan(plan.num_shards, plan.num_slices, left), default_horizon(plan, requests, trained)
    return simulate(now, requests, streams=streams, seed=seed, max_requests=horizon).slices_in_use


class Kept(NamedTuple):
    """What a selection of sequences costs, and its value as a share of that of every order: mean, lowest, highest."""

    cost: float
    share: float
    low: float
    high: float


class Retention:
    """What selections keep: the area under the performance curve over the whole life, as a share of every order's.

    Exact up to 16 slices; above, the mean over sampled streams other than those that are searched on.

    Args:
        num_slices (`int`): `L`.
        prior (`Sequence[float]`, *optional*): The chance that a request hits each slice. Without it all are equal.
        performance (`Sequence[float]`, *optional*): What 1 to L surviving slices are worth; their number without.
        seed (`int`, *optional*, defaults to `0`): For random orders, for searches and for sampled streams.

    >>> Retention(4).of(cyclic(4, 4)).cost
    28
    """

    def __init__(
        self,
        num_slices: int,
        prior: Sequence[float] | None = None,
        performance: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        self.num_slices, self.performance, self.seed = num_slices, performance, seed
        self.prior = checked_prior(prior, num_slices).tolist()
        self._measure: Lattice | Streams
        if num_slices <= LATTICE_SLICES:
            self._measure = Lattice(self.prior, performance)
        else:
            self._measure = Streams(self.prior, performance, None, seed + 1, HELD_OUT_STREAMS)

    def of(self, orders: Iterable[Order], prune: bool = True) -> Kept:
        """What some orders of one shard keep and cost."""
        orders = list(orders)
        share = self._measure.value(orders) / self._measure.every_order
        return Kept(training_cost(prune_orders(orders) if prune else orders), share, share, share)

    def of_plan(self, plan: Plan) -> Kept:
        """What a plan keeps and costs per shard; mean, lowest and highest over its shards."""
        kept = [(self.of(orders, prune=False), number) for orders, number in Counter(plan.sequences).items()]
        shares = [one.share for one, _ in kept]
        mean = sum(one.share * number for one, number in kept) / plan.num_shards
        return Kept(plan.cost / plan.num_shards, mean, min(shares), max(shares))

    def by_method(self, points: int | None = None) -> dict[str, list[Kept]]:
        """What each method keeps, for budgets from one sequence to `L` of them, or for what those cost.

        Args:
            points (`int`, *optional*): How many budgets; by default fewer for more slices, because each of the optimal
                plans is searched for: for half a minute in all, above 16 slices for several minutes.

        Returns:
            `dict[str, list[Kept]]`: For each method its points, from the least budget on.
        """
        if points is None:
            points = 10 if self.num_slices <= 6 else 5 if self.num_slices <= 12 else 3
        check_count("points", points, 2, 100)
        slices, one = self.num_slices, self.num_slices * (self.num_slices + 1) // 2
        budgets = sorted({round(budget) for budget in np.geomspace(1, slices, min(points, slices))})
        costs = sorted({round(cost) for cost in np.geomspace(one, slices * one, points)})
        return {
            "cyclic, as the paper trains it": [self.of(cyclic(slices, b), prune=False) for b in budgets],
            "cyclic, pruned": [self.of(cyclic(slices, b)) for b in budgets],
            "spaced, pruned": [self.of(spaced(slices, b)) for b in budgets],
            "BMS, pruned": [self.of(bms(slices, b, self.prior, self.seed)) for b in budgets],
            f"random, pruned: {RANDOM_SEEDS} seeds": [self._random(b) for b in budgets],
            "optimal for a number of sequences": [self._optimal(budget=b) for b in budgets],
            "optimal for a cost": list(dict.fromkeys(self._optimal(cost_budget=cost) for cost in costs)),
        }

    def _random(self, budget: int) -> Kept:
        kept = [self.of(random_orders(self.num_slices, budget, self.seed + seed)) for seed in range(RANDOM_SEEDS)]
        shares = [one.share for one in kept]
        return Kept(float(np.mean([one.cost for one in kept])), float(np.mean(shares)), min(shares), max(shares))

    def _optimal(self, budget: int | None = None, cost_budget: int | None = None) -> Kept:
        found = optimal(self.num_slices, budget, cost_budget, self.prior, self.performance, self.seed)
        return self.of(found.orders)
