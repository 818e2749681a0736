"""Which plan to train and when to repair it, for so many deletion requests a day: `S3TPlanner`.

Responsible for what is compared, for what may be asked, and for the rule by which one candidate is recommended. What a
candidate costs and keeps is in `candidates.py`, what is said of the recommendation in `advice.py`, the table in
`cli/plan.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from threading import Timer
from typing import Any

from ..plan.life import life_left
from ..plan.sequences import check_budget, check_count, cyclic, prune_orders, training_cost
from ..plan.survival import check_few, checked_prior, path_cost
from ..plan.tree import Plan
from .advice import cost, what_baselines_lack, what_would_fit
from .candidates import Candidate, Setting, Terms
from .machines import Machines
from .renewal import RepairRule

SHARDS, SLICES = (1, 2, 5, 10), (2, 4, 8)  # compared where nothing is given
MOST_SLICES = 12  # of what is compared beside what was given: more take half a minute
DAYS = (1, 7, 30, 90)  # between repairs
SCRATCH_DAYS = (7, 30)  # between trainings from scratch
FEW_EXAMPLES = 100  # expected in a slice
MAX_DAYS = 36_525  # a hundred years
BAR_SECONDS = 2  # until a bar is shown

Choice = tuple[str, int | None, int | None]  # selection, budget and cost budget of a plan


@dataclass(frozen=True)
class S3TPlanner:
    """Compares plans and rules of repair for a rate of deletion requests, and recommends one.

    The recommendation keeps the shards and slices that you give. Other numbers of them, and other budgets, are
    compared. The recommendation is the cheapest candidate until the horizon that obeys two rules: some shard is dead
    before the horizon with a chance of at most `max_dead`, and on average at least `min_in_use` of the slices are in
    use. With `gpus`, a candidate whose repairs do not fit on them is never recommended. If no candidate both fits and
    obeys the rules, nothing is recommended. Without `shards`, note that more shards are always cheaper here: the
    planner does not know what they cost in quality. All numbers are expected values under one model: requests come at
    random times, each for one example.

    Args:
        examples (`int`): Rows of the train set.
        requests_per_day (`float`): Deletion requests per day. Count a person's examples as that many requests, unless
            a group column keeps them together.
        horizon_days (`float`): Days over which costs and deletions are counted.
        shards (`int`, *optional*): `m`. Without it 1, 2, 5 and 10 are compared.
        slices (`int`, *optional*): `L`, at most 16. Without it 2, 4 and 8 are compared.
        budget (`int`, *optional*): `B`, sequences per shard; needs `slices`.
        cost_budget (`int`, *optional*): Instead of `budget`: slice passes per epoch and shard.
        prior (`Sequence[float]`, *optional*): The chance that a request hits each slice, the same in every shard.
        layers (`int`, *optional*): Layers of the model, the most slices it can have. Not for rank groups.
        gpu_hours_per_epoch (`float`, *optional*): GPU hours of one epoch over all examples.
        gpus (`int`, *optional*): GPUs that train; needs `gpu_hours_per_epoch`.
        gpus_per_stage (`int`, *optional*, defaults to 1): GPUs that train one stage together, with linear speed-up.
        replay (`float`, *optional*, defaults to 1.0): `replay` of [`S3TConfig`], for S3T's candidates.
        adapter_mb (`float`, *optional*): Size in MB of the adapter of a whole sequence, without heads.
        activation_cache_gb (`float`, *optional*): Size of the activation cache in 10^9 bytes, counted as storage of
            S3T's candidates; needs `adapter_mb`.
        quality (`Sequence[float]`, *optional*): The score of a shard that serves 0, 1, ... slices, on held-out rows.
            Gives every candidate an expected score.
        min_in_use (`float`, *optional*, defaults to 0.5): The rule: at least this share of the slices in use.
        max_dead (`float`, *optional*, defaults to 0.05): The rule: at most this chance that, at some moment before the
            horizon, some shard is dead: it serves nothing until it is trained again.

    Raises:
        ValueError: If a number is out of range, or two do not fit together.

    >>> planner = S3TPlanner(1000, requests_per_day=0.1, horizon_days=60, shards=1, slices=2, budget=2)
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
    gpu_hours_per_epoch: float | None = None
    gpus: int | None = None
    gpus_per_stage: int = 1
    replay: float = 1.0
    adapter_mb: float | None = None
    activation_cache_gb: float | None = None
    quality: Sequence[float] | None = None
    min_in_use: float = 0.5
    max_dead: float = 0.05

    def __post_init__(self) -> None:
        if self.prior is not None:
            object.__setattr__(self, "slices", len(self.prior) if self.slices is None else self.slices)
            object.__setattr__(self, "prior", tuple(map(float, checked_prior(self.prior, self.slices or 1))))
        self._check_numbers()
        self._check_machines()
        self._check_plan()

    # ---- what may be asked ----

    def _check_numbers(self) -> None:
        check_count("examples", self.examples, 1, 10**12)
        for name in ("shards", "slices", "layers"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1, 10**4)
        for name in ("requests_per_day", "horizon_days", "gpu_hours_per_epoch", "adapter_mb", "activation_cache_gb"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {value!r:.40}. Correct it.")
        if not 1 <= self.horizon_days <= MAX_DAYS:
            raise ValueError(f"horizon_days must be from 1 to {MAX_DAYS}, not {self.horizon_days!r:.40}. Correct it.")
        for name in ("min_in_use", "max_dead", "replay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)!r:.40}. Correct it.")
        if (places := (self.shards or 1) * (self.slices or 1)) > self.examples:
            found = f"{places} slices in all for {self.examples} examples"
            raise ValueError(f"{found}: some would be empty. Give fewer shards or slices.")
        if (deleted := self.requests_per_day * self.horizon_days) > self.examples:
            found = f"{deleted:.0f} examples would be deleted until the horizon, but there are {self.examples}"
            raise ValueError(f"{found}. Give fewer requests per day or a nearer horizon.")

    def _check_machines(self) -> None:
        if self.gpus is not None:
            check_count("gpus", self.gpus, 1, 10**6)
            check_count("gpus_per_stage", self.gpus_per_stage, 1, self.gpus)
            if self.gpu_hours_per_epoch is None:
                raise ValueError(f"gpus={self.gpus} needs the time that they train. Give gpu_hours_per_epoch, too.")
        elif self.gpus_per_stage != 1:
            raise ValueError(f"gpus_per_stage={self.gpus_per_stage} needs the number of GPUs. Give gpus, too.")
        if self.activation_cache_gb is not None and self.adapter_mb is None:
            raise ValueError("activation_cache_gb counts as storage beside the adapters. Give adapter_mb, too.")
        if self.quality is not None:
            scores = tuple(self.quality)
            if len(scores) < 2 or not all(isinstance(one, int | float) and math.isfinite(one) for one in scores):
                found = f"quality must be two numbers or more, the scores with 0, 1, ... slices, not {scores!r:.100}"
                raise ValueError(f"{found}. Correct it.")

    def _check_plan(self) -> None:
        if self.budget is not None and self.cost_budget is not None:
            raise ValueError(f"budget={self.budget} and cost_budget={self.cost_budget} are both given. Give one.")
        if self.slices is None:
            for name in ("budget", "cost_budget"):
                if getattr(self, name) is not None:
                    found = f"{name}={getattr(self, name)} is given, but not of how many slices"
                    raise ValueError(f"{found}. Give slices, too, or leave {name} out.")
            return
        check_few(self.slices)
        if self.budget is not None:
            check_budget(self.slices, self.budget)
        if self.layers and self.slices > self.layers:
            found = (
                f"slices={self.slices} for a model of {self.layers} layers, but each slice needs a layer of its own"
            )
            raise ValueError(f"{found}. Give at most {self.layers} slices, or, for rank groups, leave layers out.")
        if self.cost_budget is not None and self.cost_budget < path_cost(0, self.slices):
            found = f"cost_budget={self.cost_budget}, but one whole sequence of {self.slices} slices costs"
            raise ValueError(f"{found} {path_cost(0, self.slices)}. Give that or more.")

    # ---- what is compared ----

    @property
    def terms(self) -> Terms:
        """What is the same for every candidate."""
        machines = None
        if self.gpus is not None and self.gpu_hours_per_epoch is not None:
            machines = Machines(self.gpus, self.gpus_per_stage, self.gpu_hours_per_epoch)
        asked = self.examples, self.requests_per_day, self.horizon_days
        return Terms(*asked, machines, self.adapter_mb, 1e3 * (self.activation_cache_gb or 0.0), self.quality)

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """Every candidate: what was given, then by size; the cheapest until the horizon first. Baselines are last."""
        return self._compared(list(self._settings()))

    def compare(self) -> None:
        """Finds the candidates with a bar on standard error, if that takes longer than two seconds."""
        from tqdm.auto import tqdm  # not where nobody looks

        settings = list(self._settings())
        bar = tqdm(settings, "comparing", unit=" plans", delay=BAR_SECONDS, dynamic_ncols=True, leave=False)
        late = Timer(BAR_SECONDS, bar.refresh)  # a search in which it would not move
        late.daemon = True
        late.start()
        try:
            self.__dict__["candidates"] = self._compared(bar)
        finally:
            late.cancel()
            bar.close()

    def _compared(self, settings: Iterable[Setting]) -> tuple[Candidate, ...]:
        found: list[Candidate] = []
        seen = set()
        for setting in settings:
            plan = setting.plan()
            if (setting.method, plan) not in seen:
                seen.add((setting.method, plan))
                found += [Candidate.of(setting, plan, rule, self.terms) for rule in self._rules(setting, plan)]
        order = lambda c: (c.setting.method != "S3T", not c.setting.given, c.setting.size, c.epochs)  # noqa: E731
        return tuple(sorted(found, key=order))

    def _settings(self) -> Iterator[Setting]:
        prior = None if self.prior is None else tuple(self.prior)
        for size in self._sizes():
            for number, (selection, budget, cost_budget) in enumerate(self._choices(size)):
                given = number == 0 and self._is_given(size)
                yield Setting("S3T", *size, selection, budget, cost_budget, prior, given, self.replay)
            if self._may_be_chosen(size) and size[1] > 1:
                yield Setting("SISA", *size, budget=1, prior=prior)
            if self._may_be_chosen(size) and size[0] > 1:
                yield Setting("shards alone", size[0], 1, budget=1)
        yield Setting("from scratch", 1, 1, budget=1)

    def _is_given(self, size: tuple[int, int]) -> bool:
        return size == (self.shards, self.slices)

    def _may_be_chosen(self, size: tuple[int, int]) -> bool:
        return self.shards in (None, size[0]) and self.slices in (None, size[1])

    def _sizes(self) -> list[tuple[int, int]]:
        """Numbers of shards and slices to compare: what was given and its neighbours, or what fits it."""
        if self.shards and self.slices:
            halves = [(max(1, self.shards // 2), self.slices), (self.shards, max(1, self.slices // 2))]
            doubles = [(2 * self.shards, self.slices), (self.shards, 2 * self.slices)]
            sizes = [(self.shards, self.slices), *halves, *doubles]
        else:
            shards = (self.shards,) if self.shards else SHARDS
            slices = (self.slices,) if self.slices else SLICES
            sizes = [(m, n) for m in shards for n in slices]
        fit = [size for size in sizes if self._is_given(size) or self._fits(*size)]
        small = [size for size in sizes[:1] if self._fits(*size, few=1)]
        return list(dict.fromkeys(fit or small or [(self.shards or 1, self.slices or 1)]))

    def _fits(self, shards: int, slices: int, few: int = FEW_EXAMPLES) -> bool:
        if self.prior is not None and slices != self.slices or slices > min(self.layers or slices, MOST_SLICES):
            return False
        return shards * slices * few <= self.examples

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
        rotations: list[Choice] = [("cyclic", slices, None), ("spaced", max(1, slices // 2), None)]
        return [asked, *rotations, ("cyclic", 1, None), half, ("optimal", None, pruned)]

    def _rules(self, setting: Setting, plan: Plan) -> list[RepairRule]:
        """Rules of repair: for what was given all of them, for the others those that leave something in use."""
        if setting.method != "S3T":
            apart = [n for n in SCRATCH_DAYS if n < self.horizon_days and setting.method == "from scratch"]
            return [RepairRule(below=setting.num_slices), *(RepairRule(every_days=n) for n in apart)]
        days = life_left(plan, setting.prior).until_all_dead.mean / self.requests_per_day
        every = [number for number in DAYS if number < self.horizon_days]
        intervals = every if setting.given else [number for number in every if number <= days][-1:]
        lengths = [1] * self._is_given(setting.size) + [math.ceil(setting.num_slices / 2)]
        if self._may_be_chosen(setting.size) and len(plan.sequences[0]) > 1:  # with one sequence it is SISA
            lengths.append(setting.num_slices)
        never = [RepairRule()] if setting.given or self.horizon_days <= days else []
        rules = [RepairRule(below=length) for length in lengths] + [RepairRule(every_days=n) for n in intervals]
        return list(dict.fromkeys(never + rules))

    # ---- what is recommended ----

    def obeys(self, candidate: Candidate) -> bool:
        """Whether it has enough in use, and dead shards seldom enough."""
        return candidate.outlook.dead <= self.max_dead and candidate.outlook.in_use >= self.min_in_use

    @property
    def wanted(self) -> Candidate:
        """What the rule chooses if GPUs do not count; if none obeys it, the one whose shards die least often."""
        return self._choose(self._pool)

    @property
    def recommended(self) -> Candidate | None:
        """What the rule chooses of those that fit; nothing if some obey it, and none of these fits."""
        fitting = [candidate for candidate in self._pool if candidate.fits]
        if not fitting or self.obeys(self.wanted) and not any(map(self.obeys, fitting)):
            return None
        return self._choose(fitting)

    @property
    def _pool(self) -> list[Candidate]:
        return [c for c in self.candidates if c.setting.method == "S3T" and self._may_be_chosen(c.setting.size)]

    def _choose(self, pool: Sequence[Candidate]) -> Candidate:
        obeying = [candidate for candidate in pool if self.obeys(candidate)]
        if obeying:
            return min(obeying, key=lambda c: (c.epochs, c.setting.num_shards))
        return min(pool, key=lambda c: (round(c.outlook.dead, 3), -c.outlook.in_use, c.epochs))

    @cached_property
    def advice(self) -> list[str]:
        """Why it is recommended, when to repair it, and what should be known beside its numbers."""
        chosen, day = self.recommended, f"until day {self.horizon_days:g}"
        if chosen is None:
            others = [c for c in self.candidates if c.setting.method == "S3T" and c.fits]
            told = what_would_fit(self.wanted, self.terms, self.obeys, others)
            return told + what_baselines_lack(self._cheaper, self.terms, self.gpu_hours_per_epoch)
        rule = f"dead at most {100 * self.max_dead:.3g}% and in use at least {self.min_in_use:.0%}"
        those = f"Of those with {rule}" if self.gpus is None else f"Of those that fit with {rule}"
        told = [f"{those} it costs least {day}."]
        if not self.obeys(chosen):
            told = [
                f"None has {rule}. Of those compared this one has dead shards least often, then most in use."
            ]
        told.append(f"Repair: {chosen.when}, about {chosen.outlook.repairs:.0f} times {day}.")
        spent = chosen.epochs / (self.requests_per_day * self.horizon_days)
        told.append(f"Training and repairs cost {cost(spent, self.gpu_hours_per_epoch)} per request.")
        told += what_baselines_lack(self._cheaper, self.terms, self.gpu_hours_per_epoch)
        if self.shards is None:
            told.append("More shards are always cheaper here: the table does not know what they cost in quality.")
        if self.examples < FEW_EXAMPLES * chosen.setting.places:
            told.append(f"There are only {self.examples / chosen.setting.places:.3g} examples per slice on average.")
        return told

    @property
    def _cheaper(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if self.is_cheaper_baseline(candidate)]

    def is_cheaper_baseline(self, candidate: Candidate) -> bool:
        """Whether it is no S3T, fits, and costs less than what is recommended."""
        chosen = self.recommended or self.wanted
        same = candidate.setting.num_shards in (1, chosen.setting.num_shards)
        return candidate.setting.method != "S3T" and same and candidate.fits and candidate.epochs < chosen.epochs

    def to_json(self) -> dict[str, Any]:
        """What was asked, every candidate and the recommendation, as plain data."""
        candidates = [candidate.to_json() for candidate in self.candidates]
        chosen = self.recommended.to_json() if self.recommended else {"config": None}
        return {"asked": asdict(self), "recommended": chosen | {"advice": self.advice}, "candidates": candidates}
