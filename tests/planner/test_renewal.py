"""What is expected until a horizon: against closed forms, all hit sets, and a plain simulation of requests."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from hf_s3t.plan.optimal import optimal
from hf_s3t.plan.sequences import cyclic, spaced
from hf_s3t.plan.tree import Plan
from hf_s3t.planner import renewal
from hf_s3t.planner.renewal import RepairRule, outlook

NEVER = RepairRule()
TREE = Plan.make(3, 4, optimal(4, cost_budget=16).orders)
SKEWED = [0.5, 0.25, 0.15, 0.1]


def left_of(plan: Plan, hit: set[int]) -> int:
    return max((len(s.prefix) for s in plan.stages if s.shard == 0 and not hit & set(s.prefix)), default=0)


def missing_of(plan: Plan, hit: set[int]) -> int:
    return sum(stage.depth for stage in plan.stages if stage.shard == 0 and hit & set(stage.prefix))


def one_stream(
    plan: Plan, rule: RepairRule, per_day: float, days: float, prior: list[float], rng: random.Random
) -> tuple[float, ...]:
    """What an [`Outlook`] names, for one stream of requests."""
    hits: list[set[int]] = [set() for _ in range(plan.num_shards)]
    now, area, cost, repairs, dead, due = 0.0, 0.0, 0, 0, False, rule.every_days or math.inf
    while True:
        following = now + rng.expovariate(per_day)
        while due <= min(following, days):
            at_end = sum(left_of(plan, hit) for hit in hits)
            area, now, due = area + (due - now) * at_end, due, due + (rule.every_days or math.inf)
            missing = [missing_of(plan, hit) for hit in hits]
            cost, repairs, hits = cost + sum(missing), repairs + any(missing), [set() for _ in hits]
        served = sum(left_of(plan, hit) for hit in hits)
        area += (min(following, days) - now) * served
        if following > days:
            at_end = served if now < days else at_end
            places = plan.num_shards * plan.num_slices
            return cost, repairs, area / days / places, at_end / places, dead
        now, shard = following, rng.randrange(plan.num_shards)
        hits[shard].add(rng.choices(range(plan.num_slices), prior)[0])
        left = left_of(plan, hits[shard])
        dead |= not left
        if rule.below and left < rule.below:
            cost, repairs, hits[shard] = cost + missing_of(plan, hits[shard]), repairs + 1, set()


@pytest.mark.parametrize(
    "plan, prior", [(Plan.make(1, 3, spaced(3, 2)), [1 / 3] * 3), (TREE, SKEWED)], ids=["rotations", "tree"]
)
@pytest.mark.parametrize("rule", [NEVER, RepairRule(every_days=7), *(RepairRule(below=k) for k in (1, 2, 3))])
def test_it_is_the_mean_over_streams_of_requests(plan, prior, rule):
    for days, count in ((14, 500), (60, 300)):
        rng, found = random.Random(1), outlook(plan, rule, 0.5, days, prior)
        streams = [one_stream(plan, rule, 0.5, days, prior, rng) for _ in range(count)]
        for expected, numbers in zip(found, zip(*streams, strict=True), strict=True):
            mean = sum(numbers) / count
            error = math.sqrt(sum((number - mean) ** 2 for number in numbers)) / count
            assert abs(mean - expected) <= 4 * error + (
                1e-9 if error else 5 / count
            )  # what is rare may be in no stream


def test_without_repair_it_is_the_sum_over_all_hit_sets():
    """Every slice is hit or not, whatever happens to the others."""
    plan, requests, in_use, dead, cost = Plan.make(2, 3, [(0, 1, 2), (1, 2)]), 4.0, 0.0, 0.0, 0.0
    prior = [0.5, 0.3, 0.2]
    for hit in itertools.product((False, True), repeat=3):
        spared = [math.exp(-requests * p / 2) for p in prior]
        chances = [1 - s if h else s for h, s in zip(hit, spared, strict=True)]
        chance, gone = math.prod(chances), {j for j in range(3) if hit[j]}
        in_use += chance * left_of(plan, gone) / 3
        dead += chance * (left_of(plan, gone) == 0)
        cost += 2 * chance * missing_of(plan, gone)
    found = outlook(plan, NEVER, requests / 8, 8, prior)
    assert (found.in_use_at_end, found.dead) == pytest.approx((in_use, 1 - (1 - dead) ** 2), rel=1e-12)
    assert found.repairs == found.repair_cost == 0
    repaired = outlook(plan, RepairRule(every_days=8), requests / 8, 24, prior)
    assert repaired.repair_cost == pytest.approx(3 * cost, rel=1e-12)
    assert repaired.in_use_at_end == pytest.approx(in_use) and repaired.in_use == pytest.approx(found.in_use)


def test_the_mean_over_time_is_the_integral():
    ends = [outlook(TREE, NEVER, 1, 20 * (i + 0.5) / 500, SKEWED).in_use_at_end for i in range(500)]
    assert outlook(TREE, NEVER, 1, 20, SKEWED).in_use == pytest.approx(sum(ends) / 500, rel=1e-4)
    for rule in (RepairRule(every_days=6), RepairRule(below=2)):
        ends = [outlook(TREE, rule, 1, 20 * (i + 0.5) / 100, SKEWED).in_use_at_end for i in range(100)]
        assert outlook(TREE, rule, 1, 20, SKEWED).in_use == pytest.approx(sum(ends) / 100, rel=2e-3)


@pytest.mark.parametrize("days", [2, 30, 4000])
def test_repairs_of_dead_shards_have_their_renewal_function(days):
    """Two slices, hit at the rate `r` each: a life is a wait at `2 r` and one at `r`. For waits at `a` and `b` the
    renewal function is `a b / (a + b) t - a b / (a + b)^2 (1 - exp(-(a + b) t))`."""
    a, b = 1.0, 0.5
    expected = a * b / (a + b) * days - a * b / (a + b) ** 2 * -math.expm1(-(a + b) * days)
    found = outlook(Plan.make(1, 2, [(0,), (1,)]), RepairRule(below=1), 1, days)
    assert found.repairs == pytest.approx(expected, rel=2e-3)
    assert found.repair_cost == pytest.approx(2 * expected, rel=2e-3)
    alive = 1 - (1 - math.exp(-days / 2)) ** 2
    assert found.dead == pytest.approx(1 - alive, abs=1e-3)


@pytest.mark.parametrize("num_slices", [1, 3, 4])
def test_sisa_retrains_from_the_hit_slice_on(num_slices):
    """`j + .. + L` slice passes for a hit of slice `j`: on average `(L + 1) (2 L + 1) / 6`."""
    found = outlook(Plan.make(5, num_slices, cyclic(num_slices, 1)), RepairRule(below=num_slices), 3, 100)
    assert found.repairs == pytest.approx(300, rel=1e-3)
    assert found.repair_cost / 300 == pytest.approx((num_slices + 1) * (2 * num_slices + 1) / 6, rel=1e-3)
    assert (found.in_use, found.in_use_at_end, found.dead) == pytest.approx((1, 1, 1), rel=1e-3)


def test_a_shard_that_is_repaired_only_when_dead_is_dead_as_without_repair():
    for days in (3, 20, 200):
        never, repaired = (outlook(TREE, rule, 1, days, SKEWED) for rule in (NEVER, RepairRule(below=1)))
        assert repaired.dead == pytest.approx(never.dead, abs=1e-4)
        assert repaired.in_use > never.in_use
    assert outlook(TREE, RepairRule(below=2), 1, 5000, SKEWED).dead < 1e-9, "a hit takes no two slices at once"


def test_a_shard_may_be_dead_at_one_hit_of_many():
    """SISA with `below=2` of 3: hits of slice 0 kill, each with the chance 1/3, and hits of slice 1 repair first."""
    found = outlook(Plan.make(1, 3, cyclic(3, 1)), RepairRule(below=2), 0.3, 40)
    assert found.dead == pytest.approx(1 - math.exp(-40 * 0.3 / 3), abs=2e-3)


def test_the_grid_is_fine_enough(monkeypatch):
    rules, coarse = [RepairRule(below=k) for k in (1, 2, 4)], {}
    for steps in (renewal.STEPS, 8 * renewal.STEPS):
        monkeypatch.setattr(renewal, "STEPS", steps)
        for rule, days in itertools.product(rules, (20, 500)):
            found = outlook(TREE, rule, 1, days, SKEWED)
            assert found == pytest.approx(coarse.setdefault((rule, days), found), rel=2e-3, abs=1e-4)


def test_a_slice_that_is_never_hit():
    plan = Plan.make(1, 2, cyclic(2, 2))
    found = outlook(plan, RepairRule(below=1), 1, 1000, [1.0, 0.0])
    assert found.repairs == 0 and found.in_use_at_end == pytest.approx(0.5)


@pytest.mark.parametrize(
    "plan, prior, message",
    [
        (Plan.make(1, 17, [(0,)]), None, "num_slices=17, but .* up to 16 slices"),
        (Plan.make_per_shard(2, [[(0, 1)], [(1, 0)]]), None, "have different sequences. Give a plan of shards"),
        (Plan.make(1, 2, [(0, 1)]), [1.0], "must have one number per slice, 2"),
    ],
)
def test_what_is_not_known_is_refused(plan, prior, message):
    with pytest.raises(ValueError, match=message):
        outlook(plan, NEVER, 1, 10, prior)
