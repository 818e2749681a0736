"""The planner: its numbers against closed forms and the plan itself, its rule, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from hf_s3t import S3TConfig, S3TPlanner
from hf_s3t.cli.plan import shortlist
from hf_s3t.plan.tree import Plan
from hf_s3t.planner.candidates import Candidate
from hf_s3t.planner.renewal import RepairRule, outlook
from hf_s3t.training.stage_plan import make_plan

ASKED = {"examples": 52_002, "requests_per_day": 2, "horizon_days": 60, "shards": 5, "slices": 4, "budget": 4}
NEVER = RepairRule()


@pytest.fixture(scope="module")
def planner() -> S3TPlanner:
    return S3TPlanner(**ASKED, gpu_hours_per_epoch=6, adapter_mb=40)


def given(planner: S3TPlanner, rule: RepairRule) -> Candidate:
    (row,) = [row for row in planner.candidates if row.setting.given and row.rule == rule]
    return row


# ---- the numbers ----


def test_the_given_plan_comes_first_under_every_rule(planner):
    own = [row for row in planner.candidates if row.setting.given]
    assert list(planner.candidates[: len(own)]) == own
    assert {(row.rule.below, row.rule.every_days) for row in own} == {
        (None, None), (1, None), (2, None), (4, None), (None, 1), (None, 7), (None, 30)
    }  # fmt: skip


def test_a_row_says_what_its_plan_costs_and_keeps(planner):
    row, plan = given(planner, NEVER), Plan.make(5, 4, [(0, 1, 2, 3), (1, 2, 3), (2, 3, 0), (3, 0, 1)])
    assert row.setting.plan() == plan
    assert (row.training_cost, row.stages) == (140, 65)
    assert row.storage_mb == pytest.approx(65 * 10 + 52_002 * 88 / 1e6), "stages and the index"
    assert row.epochs == 7 and row.all_dead == pytest.approx(71.95, abs=0.01)
    assert row.first_dead == pytest.approx(19.3, abs=0.05)
    assert row.outlook == outlook(plan, NEVER, 2, 60)


def test_every_tree_is_what_a_trainer_makes_of_its_line(planner):
    trees = {row.setting: row for row in planner.candidates if row.setting.selection == "optimal"}
    assert len(trees) >= 5
    for setting, row in trees.items():
        plan = make_plan(eval(setting.config, {"S3TConfig": S3TConfig}), seed=0)
        assert plan == setting.plan() and plan.cost == row.training_cost <= setting.cost_budget * setting.num_shards


def test_baselines_are_what_people_think_of_first(planner):
    others = [row for row in planner.candidates if row.setting.method != "S3T"]
    baselines = {(row.setting.method, row.setting.size, row.rule): row for row in others}
    each = RepairRule(below=1)
    assert set(baselines) == {
        ("SISA", (5, 4), RepairRule(below=4)),
        ("shards alone", (5, 1), each),
        ("from scratch", (1, 1), each),
        ("from scratch", (1, 1), RepairRule(every_days=7)),
        ("from scratch", (1, 1), RepairRule(every_days=30)),
    }
    alone = baselines["shards alone", (5, 1), each]
    assert alone.outlook.repair_cost == pytest.approx(120, rel=1e-3) and alone.training_cost == 5
    sisa = baselines["SISA", (5, 4), RepairRule(below=4)]
    assert sisa.outlook.repair_cost == pytest.approx(120 * 7.5, rel=1e-3)
    weekly = baselines["from scratch", (1, 1), RepairRule(every_days=7)]
    assert weekly.outlook.repair_cost == pytest.approx(8, abs=1e-4)
    assert weekly.outlook.in_use == pytest.approx(0.075, abs=1e-3)
    assert set(map(id, others)) <= set(map(id, shortlist(planner)))


def test_a_cache_counts_for_what_uses_it(planner):
    cached = dataclasses.replace(planner, activation_cache_gb=2)
    for before, after in zip(planner.candidates, cached.candidates, strict=True):
        assert after.storage_mb - before.storage_mb == (2000 if after.setting.method == "S3T" else 0)
    scratch = next(c for c in cached.candidates if c.setting.method == "from scratch")
    assert scratch.storage_mb == 40, "no index"


def test_replay_is_in_the_costs_and_in_the_line(planner):
    less = dataclasses.replace(planner, replay=0.25)
    for row in less.candidates:
        setting = row.setting
        if setting.method == "S3T":
            plan = make_plan(eval(setting.config, {"S3TConfig": S3TConfig}), seed=0)
            assert row.training_cost == len(plan.stages) + 0.25 * (plan.cost - len(plan.stages))
            assert setting.config.endswith(", replay=0.25)")
        else:
            assert row.training_cost == setting.plan().cost
    assert given(less, NEVER).outlook.in_use == given(planner, NEVER).outlook.in_use


def test_a_curve_gives_an_expected_score(planner):
    """A straight line is the slices in use; a plateau after one slice is the share of shards that live."""
    line = dataclasses.replace(planner, quality=[0.5, 0.6, 0.7, 0.8, 0.9])
    plateau = dataclasses.replace(planner, quality=[3.0, 1.0, 1.0, 1.0, 1.0])
    for one, flat in zip(line.candidates, plateau.candidates, strict=True):
        assert one.score == pytest.approx(0.5 + 0.4 * one.outlook.in_use), "of two slices, and of eight, too"
        if one.setting.num_slices == 4:
            assert 1 <= flat.score <= 3 and (flat.outlook.dead > 0.01 or flat.score == pytest.approx(1, abs=0.02))
    assert all(one.score is None for one in planner.candidates)


# ---- the rule ----


def test_the_recommended_row_is_the_cheapest_that_obeys_the_rule(planner):
    chosen, pool = planner.recommended, [row for row in planner.candidates if row.setting.size == (5, 4)]
    obeying = [c for c in pool if c.setting.method == "S3T" and c.outlook.dead <= 0.05 and c.outlook.in_use >= 0.5]
    assert chosen in obeying and chosen.epochs == min(row.epochs for row in obeying)
    assert planner.advice[0] == "Of those with dead at most 5% and in use at least 50% it costs least until day 60."
    assert planner.advice[1] == f"Repair: below 2, about {chosen.outlook.repairs:.0f} times until day 60."


def test_the_rule_can_be_chosen(planner):
    more = dataclasses.replace(planner, min_in_use=0.99).recommended
    assert more.outlook.in_use >= 0.99 and more.when == "each hit" and more.epochs > planner.recommended.epochs
    loose = dataclasses.replace(planner, max_dead=1).recommended
    assert loose.outlook.dead > 0.05 and loose.epochs < planner.recommended.epochs


def test_where_nothing_obeys_it_says_so():
    planner = S3TPlanner(**ASKED | {"slices": 1, "budget": 1}, max_dead=0)
    assert planner.advice[0].startswith("None has dead at most 0% and in use at least 50%. Of those compared")
    own = [row for row in planner.candidates if row.setting.size == (5, 1) and row.setting.method == "S3T"]
    assert planner.recommended.outlook.dead == pytest.approx(min(row.outlook.dead for row in own), abs=1e-3)


def test_what_should_be_known_is_told():
    planner = S3TPlanner(52_002, 0.2, 365, shards=5, slices=4, budget=4, min_in_use=0.99)
    text = " ".join(planner.advice)
    assert f"Training and repairs cost {planner.recommended.epochs / 73:.2g} epochs per request." in text
    assert "Cheaper: " in text and "shards alone, each hit" in text and "waits for no training" in text
    hours = dataclasses.replace(planner, gpu_hours_per_epoch=6)
    assert f"cost {6 * planner.recommended.epochs / 73:.2g} GPU hours per request." in " ".join(hours.advice)
    small = " ".join(S3TPlanner(60, 0.05, 30, slices=4).advice)
    assert "There are only" in small and "More shards are always cheaper here" in small


# ---- what is compared ----


def test_the_shortlist_has_what_was_asked_the_choice_and_the_baselines(planner):
    short = shortlist(planner)
    assert len(short) <= 26 and planner.recommended in short
    assert [row for row in planner.candidates if row.setting.given] == short[:7]
    assert {row.setting.size for row in short} >= {(5, 4), (2, 4), (10, 4), (1, 1)}


def test_everything_is_plain_data():
    planner = S3TPlanner(52_002, 2, 20, shards=2, prior=[0.5, 0.5, 0.0])
    told = json.loads(json.dumps(planner.to_json(), allow_nan=False))
    assert planner.slices == 3 and planner.candidates[0].all_dead == math.inf
    assert told["candidates"][0]["all_dead"] is None and told["candidates"][0]["outlook"]["in_use"] > 0
    assert told["recommended"]["config"] == planner.recommended.setting.config
    assert told["recommended"]["advice"] == planner.advice and told["asked"]["shards"] == 2


def test_a_prior_is_part_of_the_line():
    planner = S3TPlanner(52_002, 2, 20, shards=2, slices=3, prior=(0.6, 0.3, 0.1))
    lines = [row.setting.config for row in planner.candidates if row.setting.selection == "optimal"]
    assert lines and all(line.endswith("deletion_prior=[0.6, 0.3, 0.1])") for line in lines)
    assert {row.setting.num_slices for row in planner.candidates} == {3, 1}, "it is that of three slices"


def test_a_cost_budget_can_be_what_is_given():
    planner = S3TPlanner(52_002, 1, 20, shards=2, slices=4, cost_budget=17)
    own = [row for row in planner.candidates if row.setting.given]
    assert own and {row.setting.cost_budget for row in own} == {17} and own[0].training_cost <= 2 * 17


def test_without_shards_and_slices_several_are_compared():
    planner = S3TPlanner(3_000, 0.2, 60, layers=4)
    sizes = {row.setting.size for row in planner.candidates if row.setting.method == "S3T"}
    assert sizes == {(m, n) for m in (1, 2, 5, 10) for n in (2, 4) if m * n * 100 <= 3_000}
    assert not any(row.setting.given for row in planner.candidates)


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({"examples": 1_000, "layers": 1}, (1, 1)),
        ({"examples": 30, "shards": 3}, (3, 2)),
        ({"examples": 4, "shards": 3}, (3, 1)),
        ({"examples": 60, "slices": 8}, (1, 8)),
    ],
)
def test_where_all_is_small_it_recommends_what_fits(asked, size):
    planner = S3TPlanner(**{"requests_per_day": 0.01, "horizon_days": 40} | asked)
    assert {row.setting.size for row in planner.candidates if row.setting.method == "S3T"} == {size}
    assert planner.recommended.setting.size == size


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"examples": 0}, "examples must be an integer from 1"),
        ({"shards": 0}, "shards must be an integer from 1"),
        ({"slices": 17}, "num_slices=17, but the best plan is searched for up to 16 slices"),
        ({"requests_per_day": math.nan}, "requests_per_day must be a number above 0, not nan"),
        ({"horizon_days": 0.5}, "horizon_days must be from 1 to 36525, not 0.5"),
        ({"adapter_mb": 0}, "adapter_mb must be a number above 0, not 0"),
        ({"gpus": 0}, "gpus must be an integer from 1"),
        ({"gpus": 8}, "gpus=8 needs the time that they train. Give gpu_hours_per_epoch, too."),
        ({"gpus": 2, "gpus_per_stage": 4}, "gpus_per_stage must be an integer from 1 to 2"),
        ({"gpus_per_stage": 4}, "gpus_per_stage=4 needs the number of GPUs. Give gpus, too."),
        ({"activation_cache_gb": 5}, "Give adapter_mb, too."),
        ({"replay": 1.5}, "replay must be from 0 to 1, not 1.5"),
        ({"quality": [0.5]}, "quality must be two numbers or more, the scores with 0, 1, ... slices, not (0.5,)"),
        ({"quality": [0.5, math.nan]}, "quality must be two numbers or more"),
        ({"min_in_use": 90}, "min_in_use must be from 0 to 1, not 90"),
        ({"cost_budget": 20}, "budget=4 and cost_budget=20 are both given. Give one."),
        ({"slices": None}, "budget=4 is given, but not of how many slices. Give slices, too, or leave budget out."),
        ({"budget": 25}, "budget, the number of different orders of 4 slices, must be an integer from 1 to 24"),
        ({"budget": None, "cost_budget": 9}, "cost_budget=9, but one whole sequence of 4 slices costs 10"),
        ({"layers": 3}, "slices=4 for a model of 3 layers"),
        ({"examples": 19}, "20 slices in all for 19 examples: some would be empty"),
        ({"examples": 100}, "120 examples would be deleted until the horizon, but there are 100"),
        ({"prior": [0.5, 0.5]}, "The prior must have one number per slice, 4"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError) as caught:
        S3TPlanner(**ASKED | wrong)
    assert message in str(caught.value) and str(caught.value).endswith(".")
