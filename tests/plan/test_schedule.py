"""Schedules against a simulation that goes step by step, and against every order there is."""

import itertools
import random

import pytest

from hf_s3t.plan.schedule import bound, makespan, ready, remaining_seconds
from hf_s3t.plan.sequences import random_orders, spaced
from hf_s3t.plan.tree import Plan, Stage

PLAN = Plan.make(2, 3, spaced(3, 3))
SMALL = [Stage(0, prefix) for prefix in [(0,), (0, 1), (0, 2), (1,), (2,), (2, 1), (2, 1, 0)]]


def by_hand(stages, seconds, workers):
    """Second by second, with `ready` alone: what a driver does. Whole seconds only."""
    missing, running, now = list(stages), {}, 0
    while missing:
        for stage in ready(missing, seconds, running)[: workers - len(running)]:
            running[stage] = now + seconds(stage)
        now += 1
        for stage in [stage for stage, end in running.items() if end == now]:
            del running[stage]
            missing.remove(stage)
    return now


def in_order(order, seconds, workers):
    """How long a fixed order takes: whoever is free takes the first stage of it that can begin."""
    missing, running, now = list(order), {}, 0
    while missing:
        able = [s for s in missing if s not in running and s.parent not in missing][: workers - len(running)]
        running |= {stage: now + seconds(stage) for stage in able}
        now = min(running.values())
        for stage in [stage for stage, end in running.items() if end == now]:
            del running[stage]
            missing.remove(stage)
    return now


def drawn(seed):
    """Whole seconds per stage that no formula gives."""
    return lambda stage: random.Random(f"{seed} {stage.name}").randint(1, 9)


@pytest.mark.parametrize("workers", [1, 2, 3, 100])
@pytest.mark.parametrize("seed", range(4))
def test_a_schedule_is_as_long_as_handing_out_what_is_ready(workers, seed):
    for stages in (PLAN.stages, SMALL, SMALL[1:], PLAN.missing(PLAN.stages[:3])):
        assert makespan(stages, drawn(seed), workers) == by_hand(stages, drawn(seed), workers)


def test_against_every_order_there_is():
    """Never shorter than the best order, and within what is proved of it; mostly as short."""
    longer = []
    for seed, workers in itertools.product(range(6), (2, 3)):
        stages, seconds = SMALL[:6], drawn(seed)
        best = min(in_order(order, seconds, workers) for order in itertools.permutations(stages))
        found = makespan(stages, seconds, workers)
        assert bound(stages, seconds, workers) <= best <= found <= (2 - 1 / workers) * best
        longer.append(found > best)
    assert sum(longer) <= len(longer) / 4


def test_the_longest_path_goes_first():
    """Three shards of equal first stages, one with a long way below: it must not come last."""
    chain = [Stage(2, (0,)), Stage(2, (0, 1)), Stage(2, (0, 1, 2))]
    stages = [*(Stage(shard, (0,)) for shard in (0, 1, 3, 4)), *chain]
    assert ready(stages, Stage.passes)[0] == chain[0]
    assert makespan(stages, Stage.passes, 2) == 6 == bound(stages, Stage.passes, 2)


def test_remaining_seconds_are_the_longest_way_down():
    for stages in (SMALL, list(reversed(SMALL))):
        found = remaining_seconds(stages, drawn(1))
        assert list(found) == stages
        for stage in stages:
            below = [other for other in stages if stage in other.path]
            ways = [sum(drawn(1)(one) for one in end.path if one in below) for end in below]
            assert found[stage] == max(ways)


def test_what_is_ready():
    missing = PLAN.missing([Stage(0, (0,)), Stage(0, (1, 2))])  # 1-2 without its parent is missing, too
    names = [stage.name for stage in ready(missing, Stage.passes)]
    assert names == ["shard-01/0", "shard-00/0-1", "shard-00/1", "shard-00/2", "shard-01/1", "shard-01/2"]
    left = remaining_seconds(missing, Stage.passes)
    keys = [(-left[stage], missing.index(stage)) for stage in ready(missing, Stage.passes)]
    assert keys == sorted(keys), "the longest first, equal ones in the plan's order"
    assert all(stage.parent not in missing for stage in ready(missing, Stage.passes))
    begun = ready(missing, Stage.passes)[:2]
    assert ready(missing, Stage.passes, begun) == ready(missing, Stage.passes)[2:]
    assert ready([], Stage.passes) == []


def test_bounds_are_reached_at_both_ends():
    total = sum(map(Stage.passes, PLAN.stages))
    assert makespan(PLAN.stages, Stage.passes, 1) == bound(PLAN.stages, Stage.passes, 1) == total
    assert makespan(PLAN.stages, Stage.passes, 100) == bound(PLAN.stages, Stage.passes, 100) == 6
    assert makespan([], Stage.passes, 3) == bound([], Stage.passes, 3) == 0


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_no_worker_is_refused(workers):
    for asked in (makespan, bound):
        with pytest.raises(ValueError, match="workers must be an integer from 1 on"):
            asked(SMALL, Stage.passes, workers)


def test_five_thousand_stages_take_linear_work():
    plan = Plan.make(50, 10, random_orders(10, 10, seed=0), prune=False)
    assert len(plan.stages) > 4_500
    calls = []
    found = makespan(plan.stages, lambda stage: calls.append(stage) or stage.depth, 64)
    assert len(calls) == len(plan.stages) and found >= bound(plan.stages, Stage.passes, 64)
