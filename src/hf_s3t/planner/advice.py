"""What is said of a comparison in words: what would fit where nothing does, and what cheaper baselines lack.

Responsible for sentences with numbers; which candidate is recommended is for `planner.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from .candidates import Candidate, Setting, Terms

MOST_GPUS, MOST_SHARDS = 2**20, 1024  # tried
FEW_EXAMPLES = 100  # in a slice
HALVINGS = 10


def cost(epochs: float, hours: float | None) -> str:
    """A cost in GPU hours, where an epoch has some.

    >>> cost(3, 400), cost(0.25, None)
    ('1,200 GPU hours', '0.25 epochs')
    """
    number = epochs * (hours or 1)
    shown = f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
    return f"{shown} GPU hours" if hours else f"{shown} epochs"


def name(candidate: Candidate) -> str:
    """A candidate in few words.

    >>> from .renewal import Outlook, RepairRule
    >>> found = Outlook(0.0, 0.0, 1.0, 1.0, 0.0)
    >>> name(Candidate(Setting("S3T", 5, 4, budget=4), RepairRule(below=2), 140, 65, None, 19, 72, found))
    'm=5, L=4, cyclic B=4, below 2'
    """
    setting = candidate.setting
    if setting.method != "S3T":
        return f"{setting.method}, {candidate.when}"
    orders = f"B={setting.budget}" if setting.budget else f"c={setting.cost_budget}"
    return f"m={setting.num_shards}, L={setting.num_slices}, {setting.selection} {orders}, {candidate.when}"


# ---- where nothing fits ----


def what_would_fit(
    wanted: Candidate, terms: Terms, obeys: Callable[[Candidate], bool], fitting: Sequence[Candidate]
) -> list[str]:
    """Why nothing is recommended, and what would change that, one thing at a time.

    Args:
        wanted ([`Candidate`]): What would be recommended if GPUs did not count.
        terms ([`Terms`]): What was asked.
        obeys (`Callable`): The rule.
        fitting (`Sequence[Candidate]`): S3T's candidates of any size that fit.
    """
    hours, machines = wanted.hours, terms.machines
    assert hours is not None and machines is not None
    ruled = obeys(wanted)
    nearest = f"Of what obeys it {name(wanted)} costs least" if ruled else f"Nor does {name(wanted)}, which is nearest"
    told = [
        f"Nothing that obeys the rule fits on {machines.gpus} GPUs. {nearest}: "
        f"repairs take {hours.share:.0%} of the GPUs; one takes {hours.repair:,.3g} hours, and is due every "
        f"{hours.between:,.3g}.",
        "Each of these alone would do, with that plan and rule if it names no other:",
    ]

    def fine(setting: Setting, asked: Terms) -> Candidate | None:
        found = Candidate.of(setting, setting.plan(), wanted.rule, asked)
        return found if found.fits and (obeys(found) or not ruled) else None

    told += [f"  {line}" for line in (
        _gpus(wanted.setting, terms, fine), _requests(wanted.setting, terms, fine),
        _shards(wanted.setting, terms, fine), _replay(wanted, terms, fine), _rarer(wanted, obeys, fitting),
    )]  # fmt: skip
    return told


Try = Callable[[Setting, Terms], Candidate | None]


def _gpus(setting: Setting, terms: Terms, fine: Try) -> str:
    machines = terms.machines
    assert machines is not None

    def enough(groups: int) -> bool:
        return fine(setting, replace(terms, machines=replace(machines, gpus=groups * machines.per_stage))) is not None

    low = machines.workers
    high = 2 * low
    while high * machines.per_stage <= MOST_GPUS and not enough(high):
        low, high = high, 2 * high
    if high * machines.per_stage > MOST_GPUS:
        return "GPUs: no number of them, as stages of one sequence wait for each other."
    while high - low > max(1, low // 50):  # to 2 %
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return f"GPUs: {high * machines.per_stage:,} in place of {machines.gpus:,}."


def _requests(setting: Setting, terms: Terms, fine: Try) -> str:
    low, high = 0.0, terms.per_day
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fine(setting, replace(terms, per_day=middle)) else (low, middle)
    if not low:
        return "Fewer requests: not even one per thousand of them."
    return f"Fewer requests: {low:.2g} a day in place of {terms.per_day:g}."


def _shards(setting: Setting, terms: Terms, fine: Try) -> str:
    shards = 2 * setting.num_shards
    while shards <= MOST_SHARDS and shards * setting.num_slices * FEW_EXAMPLES <= terms.examples:
        if fine(replace(setting, num_shards=shards), terms):
            return f"More shards: {shards} in place of {setting.num_shards}, each of fewer examples."
        shards *= 2
    return f"More shards: not with {shards // 2}, and more would be too small."


def _replay(wanted: Candidate, terms: Terms, fine: Try) -> str:
    setting = wanted.setting
    if not fine(replace(setting, replay=0.0), terms):
        least = Candidate.of(setting := replace(setting, replay=0.0), setting.plan(), wanted.rule, terms).hours
        assert least is not None
        return f"Replay: not even 0; repairs then take {least.share:.0%} of the GPUs, one {least.repair:,.3g} hours."
    low, high = 0.0, setting.replay
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fine(replace(setting, replay=middle), terms) else (low, middle)
    low = int(100 * low) / 100
    return f"Replay: {low:g} in place of {wanted.setting.replay:g}; try on held-out rows what it forgets."


def _rarer(wanted: Candidate, obeys: Callable[[Candidate], bool], fitting: Sequence[Candidate]) -> str:
    """What fits already: another size that obeys the rule, or the asked one under a looser rule."""
    others = [c for c in fitting if obeys(c)]
    if others:
        return f"Another size: {name(min(others, key=lambda c: c.epochs))}."
    same = [c for c in fitting if c.setting.size == wanted.setting.size]
    if not same:
        return "Rarer repairs: none of those compared fits."
    rare = max(same, key=lambda c: (round(c.outlook.in_use, 2), -c.epochs))
    found = rare.outlook
    return f"Rarer repairs: {name(rare)}, with {found.in_use:.0%} in use and dead {found.dead:.0%}."


# ---- what is cheaper ----


def what_baselines_lack(cheaper: Iterable[Candidate], terms: Terms, hours: float | None) -> list[str]:
    """What cheaper ways cost, and what a request waits for there."""
    told = []
    for one in cheaper:
        setting, found = one.setting, one.outlook
        each = cost(found.repair_cost / max(found.repairs, 1e-12) / setting.places, hours)
        size = f" at m={setting.num_shards}, L={setting.num_slices}" if setting.method == "SISA" else ""
        line = f"Cheaper: {name(one)}{size}, {cost(one.epochs, hours)} in all."
        if one.rule.every_days:
            line += f" From a request to the next date nothing is served: {found.in_use:.0%} in use."
        else:
            hit = "the model" if setting.num_shards == 1 else f"a shard, 1/{setting.num_shards} of the data,"
            hit = "what was trained on the hit slice" if setting.method == "SISA" else hit
            line += f" At a request {hit} waits for a training of {each}"
            if one.hours:
                days = found.repairs * one.hours.repair / 24
                line += f", {one.hours.repair:,.3g} hours: {min(terms.days, days):,.0f} days of reduced service"
                if setting.num_shards > 1:
                    out = min(setting.num_shards, days / terms.days)
                    line += f", {out:.2g} of {setting.num_shards} shards wait on average"
            line += "."
        told.append(line)
    buys = "What S3T buys over these is that a request waits for no training while no shard is dead."
    return [*told, buys] if told else []
