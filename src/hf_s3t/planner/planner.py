"""Which plan to train and when to repair it, for so many deletion requests a day: `S3TPlanner`.

Responsible for what is compared, for what may be asked, and for the rule by which one candidate is recommended. What a
candidate costs and keeps is in `candidates.py`, the table in `cli/plan.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..plan.life import first_slice_chances, life_until_all_dead
from ..plan.sequences import check_budget, check_count, cyclic, prune_orders, training_cost
from ..plan.survival import checked_prior, path_cost
from ..plan.tree import Plan
from .arrivals import DeletionRequests, RepairPolicy
from .bitsets import TABLE_SLICES
from .candidates import BASELINES, Candidate, Measure, Setting, marked

SHARDS, SLICES = (1, 2, 5, 10), (2, 4, 8)  # compared where nothing is given
DAYS = (1, 7, 30, 90)  # between repairs
FEW_EXAMPLES = 100  # expected in a slice
SCRATCH_DAYS = (7, 30)  # between trainings from scratch
MAX_REQUESTS = 10_000  # until the horizon: some minutes
MAX_DAYS = 36_525  # a hundred years

Choice = tuple[str, int | None, int | None]  # selection, budget and cost budget of a plan


@dataclass(frozen=True)
class S3TPlanner:
    """Compares plans and repair policies for a stream of deletion requests, and recommends one.

    Shards and slices that are given stay in the recommendation; other numbers are compared beside them. The budget is
    compared with others, too. The recommendation is, of the candidates where the chance that some shard is dead before
    the horizon is at most `max_dead` and the slices in use are at least `min_in_use` on average, the one that costs
    least until the horizon. Without `shards`, mind that more shards are always cheaper here: what they cost in quality
    is not known.

    Args:
        examples (`int`): Rows of the train set.
        requests_per_day (`float`): Deletion requests per day, at random moments.
        horizon_days (`float`): Until when costs and deletions are counted.
        shards (`int`, *optional*): `m`. Without it 1, 2, 5 and 10 are compared.
        slices (`int`, *optional*): `L`, at most 16. Without it 2, 4 and 8 are compared.
        budget (`int`, *optional*): `B`, sequences per shard; needs `slices`.
        cost_budget (`int`, *optional*): Instead of `budget`: slice passes per epoch and shard.
        prior (`Sequence[float]`, *optional*): The chance that a request hits each slice, the same in every shard.
        layers (`int`, *optional*): Layers of the model: there are at most as many slices. Not for rank groups.
        examples_per_person (`int`, *optional*, defaults to 1): Of whoever asks, each in a place of its own. With a
            group column leave it at 1.
        burst (`int`, *optional*, defaults to 1): Requests that come together and are answered by one repair.
        gpu_hours_per_epoch (`float`, *optional*): Hours of one epoch over all examples.
        adapter_mb (`float`, *optional*): Size in MB of the adapter of a whole sequence, without heads.
        min_in_use (`float`, *optional*, defaults to 0.5): The rule: at least this share of the slices in use.
        max_dead (`float`, *optional*, defaults to 0.05): The rule: at most this chance that, at some moment before the
            horizon, nothing of some shard can be served until it is trained again.
        streams (`int`, *optional*, defaults to 300): Streams of requests that are simulated.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same table.

    Raises:
        ValueError: If a number is out of range, or two do not fit together.

    >>> planner = S3TPlanner(1000, requests_per_day=0.1, horizon_days=60, shards=1, slices=2, budget=2, streams=50)
    >>> planner.recommended.setting.config
    'S3TConfig(num_shards=1, num_slices=2, budget=2, sequence_selection="cyclic")'
    """

    examples: int
    requests_per_day: float
    horizon_days: float
    shards: int | None = None
    slices: int | None = None
    budget: int | None = None
    cost_budget: int | None = None
    prior: Sequence[float] | None = None
    layers: int | None = None
    examples_per_person: int = 1
    burst: int = 1
    gpu_hours_per_epoch: float | None = None
    adapter_mb: float | None = None
    min_in_use: float = 0.5
    max_dead: float = 0.05
    streams: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prior is not None:
            object.__setattr__(self, "slices", len(self.prior) if self.slices is None else self.slices)
        self._check_numbers()
        self._check_plan()
        self._check_requests()

    # ---- what may be asked ----

    def _check_numbers(self) -> None:
        check_count("examples", self.examples, 1, 10**12)
        check_count("examples_per_person", self.examples_per_person, 1, 10**4)
        check_count("burst", self.burst, 1, 10**4)
        for name, most in (("shards", 10**4), ("slices", 10**4), ("layers", 10**4)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1, most)
        if (self.slices or 0) > TABLE_SLICES:
            found = f"slices={self.slices}, but more than {TABLE_SLICES} take too long to compare"
            raise ValueError(f"{found}. Give fewer, or ask `hf_s3t.planner.simulate` about one plan.")
        for name in ("requests_per_day", "horizon_days", "gpu_hours_per_epoch", "adapter_mb"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {value!r:.40}. Correct it.")
        if not 1 <= self.horizon_days <= MAX_DAYS:
            raise ValueError(f"horizon_days must be from 1 to {MAX_DAYS}, not {self.horizon_days!r:.40}. Correct it.")
        for name in ("min_in_use", "max_dead"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)!r:.40}. Correct it.")
        check_count("streams", self.streams, 2, 10**5)
        check_count("seed", self.seed, 0, 2**32 - 1)

    def _check_plan(self) -> None:
        if self.budget is not None and self.cost_budget is not None:
            raise ValueError(f"budget={self.budget} and cost_budget={self.cost_budget} are both given. Give one.")
        if self.slices is None:
            for name in ("budget", "cost_budget"):
                if getattr(self, name) is not None:
                    found = f"{name}={getattr(self, name)} is given, but not of how many slices"
                    raise ValueError(f"{found}. Give slices, too, or leave {name} out.")
        elif self.budget is not None:
            check_budget(self.slices, self.budget)
        if self.slices and self.layers and self.slices > self.layers:
            found = (
                f"slices={self.slices} for a model of {self.layers} layers, but each slice needs a layer of its own"
            )
            raise ValueError(f"{found}. Give at most {self.layers} slices, or, for rank groups, leave layers out.")
        if self.slices and self.cost_budget is not None and self.cost_budget < path_cost(0, self.slices):
            found = f"cost_budget={self.cost_budget}, but one whole sequence of {self.slices} slices costs"
            raise ValueError(f"{found} {path_cost(0, self.slices)}. Give that or more.")
        if self.prior is not None and self.slices is not None:
            checked_prior(self.prior, self.slices)
            object.__setattr__(self, "prior", tuple(map(float, self.prior)))

    def _check_requests(self) -> None:
        places = (self.shards or 1) * (self.slices or 1)
        if places > self.examples:
            found = f"{places} slices in all for {self.examples} examples"
            raise ValueError(f"{found}: some would be empty. Give fewer shards or slices.")
        deleted = self.requests_per_day * self.horizon_days * self.examples_per_person
        if deleted > self.examples:
            found = f"{deleted:.0f} examples would be deleted until the horizon, but there are {self.examples}"
            raise ValueError(f"{found}. Give fewer requests per day or a nearer horizon.")
        if (expected := self.requests_per_day * self.horizon_days) > MAX_REQUESTS:
            found = f"{expected:.0f} requests until the horizon take too long to simulate"
            raise ValueError(f"{found}. Give a horizon of at most {MAX_REQUESTS / self.requests_per_day:.3g} days.")

    @property
    def requests(self) -> DeletionRequests:
        """How deletion requests come."""
        return DeletionRequests(self.prior, self.examples_per_person, self.burst, self.requests_per_day)

    # ---- what is compared ----

    def candidates(self) -> list[Candidate]:
        """Every candidate: what was given, then by size; the cheapest until the horizon first. Baselines are last."""
        return list(self._candidates)

    @cached_property
    def _candidates(self) -> tuple[Candidate, ...]:
        measure = Measure(self.requests, self.horizon_days, self.streams, self.seed, self.adapter_mb)
        found: list[Candidate] = []
        seen = set()
        for setting in self._settings():
            plan = setting.plan()
            if (setting.method, plan) not in seen:
                seen.add((setting.method, plan))
                found += measure.candidates(setting, plan, self._policies(setting, plan))
        return tuple(sorted(marked(found), key=self._position))

    def _position(self, candidate: Candidate) -> tuple[Any, ...]:
        setting = candidate.setting
        return setting.method != "s3t", not setting.given, setting.size, candidate.epochs

    def _settings(self) -> Iterator[Setting]:
        prior = None if self.prior is None else tuple(self.prior)
        for size in self._sizes():
            for number, (selection, budget, cost) in enumerate(self._choices(size)):
                given = number == 0 and self._is_given(size)
                setting = Setting("s3t", *size, selection, budget, cost, prior, given)
                yield setting if given else setting.with_cost_used()
            if self._may_be_chosen(size) and size[1] > 1:
                yield Setting("sisa", *size, "cyclic", 1, prior=prior)
            if self._may_be_chosen(size) and size[0] > 1:
                yield Setting("shards alone", size[0], 1, "cyclic", 1)
        yield Setting("full retraining", 1, 1, "cyclic", 1)

    def _is_given(self, size: tuple[int, int]) -> bool:
        return size == (self.shards, self.slices)

    def _sizes(self) -> list[tuple[int, int]]:
        """Numbers of shards and slices to compare: what was given and its neighbours, or what fits it."""
        if self.shards and self.slices:
            halves = [(max(1, self.shards // 2), self.slices), (self.shards, max(1, self.slices // 2))]
            doubles = [(2 * self.shards, self.slices), (self.shards, 2 * self.slices)]
            sizes = [(self.shards, self.slices), *halves, *doubles]
        else:
            shards, slices = (
                (number,) if number else most for number, most in ((self.shards, SHARDS), (self.slices, SLICES))
            )
            sizes = [(m, n) for m in shards for n in slices]
        fit = [size for size in sizes if self._is_given(size) or self._fits(*size)]
        small = [size for size in sizes[:1] if self._fits(*size, few=1)]
        return list(dict.fromkeys(fit or small or [(self.shards or 1, self.slices or 1)]))

    def _fits(self, shards: int, slices: int, few: int = FEW_EXAMPLES) -> bool:
        if self.prior is not None and slices != self.slices or slices > (self.layers or slices):
            return False
        return shards * slices * few <= self.examples and slices <= TABLE_SLICES

    def _choices(self, size: tuple[int, int]) -> list[Choice]:
        """What was asked for first; then, for the given size, rotations and trees of stages of several costs."""
        slices = size[1]
        budget = self.budget or slices
        budget = budget if self._is_given(size) else min(budget, slices)
        asked: Choice = ("spaced" if budget < slices else "cyclic", budget, None)
        if self.cost_budget is not None and slices == self.slices:
            asked = ("optimal", None, self.cost_budget)
        full = cyclic(slices, slices)
        pruned = training_cost(prune_orders(full))
        half: Choice = ("optimal", None, max(pruned // 2, path_cost(0, slices)))
        if not self._is_given(size):
            return [asked, half]
        rotations: list[Choice] = [
            ("cyclic", slices, None),
            ("spaced", max(1, slices // 2), None),
            ("cyclic", 1, None),
        ]
        return [asked, *rotations, half, ("optimal", None, pruned), ("optimal", None, training_cost(full))]

    def _policies(self, setting: Setting, plan: Plan) -> list[RepairPolicy]:
        """Repair policies: for what was given all of them, for the others those that leave something in use."""
        if setting.method != "s3t":
            apart = [n for n in SCRATCH_DAYS if n < self.horizon_days and setting.method == "full retraining"]
            return [RepairPolicy(below=setting.num_slices), *(RepairPolicy(every_days=n) for n in apart)]
        life = life_until_all_dead(first_slice_chances(plan, setting.prior)).mean
        days = life / self.requests_per_day / self.examples_per_person
        every = [number for number in DAYS if number < self.horizon_days]
        intervals = every if setting.given else [number for number in every if number <= days][-1:]
        lengths = [1] * self._is_given(setting.size) + [math.ceil(setting.num_slices / 2)]
        if self._may_be_chosen(setting.size) and len(plan.sequences[0]) > 1:  # with one sequence it is SISA
            lengths.append(setting.num_slices)
        never = [RepairPolicy()] if setting.given or self.horizon_days <= days else []
        rules = [RepairPolicy(below=length) for length in lengths] + [RepairPolicy(every_days=n) for n in intervals]
        return list(dict.fromkeys(never + rules))

    # ---- what is recommended ----

    def obeys(self, candidate: Candidate) -> bool:
        """Whether it has enough in use, and dead shards seldom enough."""
        return candidate.dead.mean <= self.max_dead and candidate.mean_in_use >= self.min_in_use

    @property
    def _pool(self) -> list[Candidate]:
        return [c for c in self._candidates if c.setting.method == "s3t" and self._may_be_chosen(c.setting.size)]

    @property
    def recommended(self) -> Candidate:
        """The candidate that the rule chooses; if none obeys it, the one whose shards die least often."""
        obeying = [candidate for candidate in self._pool if self.obeys(candidate)]
        if obeying:
            return min(obeying, key=lambda candidate: (candidate.epochs, candidate.setting.num_shards))
        return min(self._pool, key=lambda c: (c.dead.mean, -c.mean_in_use, c.epochs))

    @property
    def recommended_plan(self) -> Plan:
        """The plan that a trainer makes of it."""
        return self.recommended.setting.plan()

    def _may_be_chosen(self, size: tuple[int, int]) -> bool:
        return self.shards in (None, size[0]) and self.slices in (None, size[1])

    @property
    def reason(self) -> str:
        """Why it is recommended."""
        size = "plans of this size" if self.shards and self.slices else "plans"
        in_use = f"at least {self.min_in_use:.0%} of the slices are in use on average"
        rule = f"the chance of a dead shard is at most {100 * self.max_dead:.3g}% and {in_use}"
        if self.obeys(self.recommended):
            return f"Of the {size} where {rule}, it costs least until day {self.horizon_days:g}."
        why = "Of those compared its shards are dead least often."
        if len({candidate.dead.mean for candidate in self._pool}) == 1:
            why = "All have dead shards equally often; of those compared it has most in use."
        return f"There are no {size} where {rule}. {why}"

    @property
    def advice(self) -> str:
        """When to repair it."""
        horizon = f"until day {self.horizon_days:g}"
        if not self.recommended.policy.repairs:
            return f"Repair nothing {horizon}."
        times = f"about {self.recommended.repairs.mean:.0f} times"
        return f"Repair, by train() again, {_when(self.recommended)}: {times} {horizon}."

    @property
    def notes(self) -> list[str]:
        """What should be known of the recommended plan beside its numbers."""
        places = self.recommended.setting.places
        notes = [self._comparison()]
        if self.shards is None:
            notes.append("More shards are always cheaper here: what they cost in quality is not known to the table.")
        if self.examples < FEW_EXAMPLES * places:
            empty = places * (1 - 1 / places) ** self.examples
            per_slice = f"{self.examples / places:.3g} examples per slice on average"
            notes.append(f"There are only {per_slice}; {empty:.2g} of {places} slices are expected to be empty.")
        return notes

    def _comparison(self) -> str:
        """What a request costs, and which baselines are cheaper."""
        chosen, requests = self.recommended, self.requests_per_day * self.horizon_days
        told = f"Training and repairs cost {self._cost(chosen.epochs / requests)} per request."
        cheaper = [
            f"{BASELINES[c.setting.method]} {_when(c)} ({self._cost(c.epochs)}, {c.mean_in_use:.0%} in use)"
            for c in self._candidates
            if c.setting.method != "s3t" and c.setting.num_shards in (1, chosen.setting.num_shards)
            if c.epochs < chosen.epochs
        ]
        if not cheaper:
            return told
        own = f"{self._cost(chosen.epochs)} until day {self.horizon_days:g}"
        buys = "What S3T buys is that a request waits for no training while no shard is dead."
        return f"{told} Cheaper than its {own}: {'; '.join(cheaper)}. {buys}"

    def _cost(self, epochs: float) -> str:
        number = epochs * (self.gpu_hours_per_epoch or 1)
        shown = f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
        return f"{shown} GPU hours" if self.gpu_hours_per_epoch else f"{shown} epochs"

    def to_json(self) -> dict[str, Any]:
        """What was asked, every candidate and the recommendation, as plain data."""
        told = {"reason": self.reason, "advice": self.advice, "notes": self.notes}
        candidates = [candidate.to_json() for candidate in self._candidates]
        return {"asked": asdict(self), "recommended": self.recommended.to_json() | told, "candidates": candidates}


def _when(candidate: Candidate) -> str:
    if candidate.policy.every_days:
        return f"every {candidate.policy.every_days:g} days"
    if candidate.policy.below == candidate.setting.num_slices:
        return "after each deletion"
    return f"as soon as a served prefix in `hf-s3t status` is shorter than {candidate.policy.below}"
