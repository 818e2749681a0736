"""Hours on some GPUs: against every way in which a repair can come, and what is known without drawing."""

from __future__ import annotations

import itertools

import pytest

from hf_s3t.plan.schedule import makespan
from hf_s3t.plan.sequences import cyclic, spaced
from hf_s3t.plan.tree import Plan, Stage
from hf_s3t.planner.machines import Hours, Machines, hours_on
from hf_s3t.planner.renewal import RepairRule, outlook

PLAN = Plan.make(2, 3, spaced(3, 3))
SISA = Plan.make(3, 3, cyclic(3, 1))


def asked(plan, rule, gpus, per_day=1.0, days=200.0, per_stage=1, prior=None, replay=1.0):
    """Hours where a slice pass takes one GPU hour."""
    machines = Machines(gpus, per_stage, hours_per_epoch=plan.num_shards * plan.num_slices)
    found = outlook(plan, rule, per_day, days, prior, replay)
    return hours_on(machines, plan, rule, found, per_day, days, prior, replay), found


def missing(plan, hit, shard=0):
    return [stage for stage in plan.stages if stage.shard == shard and hit & set(stage.prefix)]


@pytest.mark.parametrize("gpus", [1, 2, 3])
@pytest.mark.parametrize("below", [1, 2, 3])
def test_a_repair_takes_as_long_as_over_all_orders_of_hits(gpus, below):
    times, works = [], []
    for order in itertools.permutations(range(3)):
        hit = set()
        for slice_id in order:
            hit.add(slice_id)
            lost = missing(PLAN, hit)
            if max((s.depth for s in PLAN.stages if s.shard == 0 and s not in lost), default=0) < below:
                break
        times.append(makespan(lost, Stage.passes, gpus))
        works.append(sum(map(Stage.passes, lost)))
    hours, found = asked(PLAN, RepairRule(below=below), gpus)
    mean_work = found.repair_cost / found.repairs
    assert hours.repair == pytest.approx(sum(times) / sum(works) * mean_work, rel=0.03)
    assert hours.longest == pytest.approx(max(times), rel=0.02) or hours.longest == hours.repair
    assert hours.between == pytest.approx(2 * 24 * 200 / found.repairs), "of one of two shards"


def test_a_rare_repair_on_a_date_is_of_one_hit_and_a_late_one_of_everything():
    rare, _ = asked(PLAN, RepairRule(every_days=1), 2, per_day=1e-6)
    times = [makespan(missing(PLAN, {slice_id}), Stage.passes, 2) for slice_id in range(3)]
    assert rare.repair == pytest.approx(sum(times) / 3, rel=0.03) and rare.longest == max(times)
    late, _ = asked(PLAN, RepairRule(every_days=100), 2, per_day=50)
    everything = makespan(PLAN.stages, Stage.passes, 2)
    assert late.repair == pytest.approx(late.training) == pytest.approx(everything)
    assert late.between == pytest.approx(2400)


def test_one_gpu_works_off_what_is_expected_and_a_chain_gains_nothing_by_more():
    for plan, rule in ((PLAN, RepairRule(below=2)), (PLAN, RepairRule(every_days=5)), (SISA, RepairRule(below=3))):
        one, found = asked(plan, rule, 1)
        assert one.repair == pytest.approx(found.repair_cost / found.repairs)
        assert one.share == pytest.approx(found.repair_cost / (24 * 200)) and one.training == plan.cost
    many, few = asked(SISA, RepairRule(below=3), 64)[0], asked(SISA, RepairRule(below=3), 1)[0]
    assert many.repair == pytest.approx(few.repair) and many.training == few.training / 3 == 6


def test_gpus_of_one_stage_work_as_one_fast_one():
    apart, together = asked(PLAN, RepairRule(below=2), 2)[0], asked(PLAN, RepairRule(below=2), 8, per_stage=4)[0]
    assert together.training == apart.training / 4 and together.repair == pytest.approx(apart.repair / 4)
    assert together.share == pytest.approx(apart.share / 4)
    assert asked(PLAN, RepairRule(below=2), 11, per_stage=4)[0].training == together.training, "three stand idle"


def test_replay_and_a_prior_count():
    whole, half = asked(PLAN, RepairRule(below=1), 1)[0], asked(PLAN, RepairRule(below=1), 1, replay=0.5)[0]
    stages = len(PLAN.stages)
    assert half.training == stages + 0.5 * (PLAN.cost - stages) and half.repair < whole.repair
    never, found = asked(Plan.make(1, 2, cyclic(2, 2)), RepairRule(below=1), 1, prior=[1.0, 0.0])
    assert found.repairs == 0 and never.fits and never.repair == 0


@pytest.mark.parametrize(
    ("hours", "fits"),
    [
        (Hours(1, 5, 9, 5, 1.0), True),
        (Hours(1, 5, 9, 4.9, 0.5), False),
        (Hours(1, 5, 9, 50, 1.01), False),
        (Hours(99, 5, 60, 50, 0.1), True),
    ],
)
def test_what_fits(hours, fits):
    assert hours.fits == fits
