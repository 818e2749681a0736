"""The planner: its numbers against closed forms and the plan itself, its marks, its rule, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from hf_s3t import Plan, S3TConfig, S3TPlanner
from hf_s3t.cli.plan import shortlist
from hf_s3t.plan.life import cyclic_slices_in_use, sisa_cost_per_request
from hf_s3t.plan.sequences import cyclic
from hf_s3t.planner.arrivals import DeletionRequests, RepairPolicy
from hf_s3t.planner.candidates import BASELINES, Candidate, Measure, Setting, expected_in_use, marked
from hf_s3t.training.staging import make_plan

ASKED = {"examples": 52_002, "requests_per_day": 2, "horizon_days": 60, "shards": 5, "slices": 4, "budget": 4}
NEVER = RepairPolicy()


@pytest.fixture(scope="module")
def planner() -> S3TPlanner:
    return S3TPlanner(**ASKED, streams=200, gpu_hours_per_epoch=6, adapter_mb=40)


@pytest.fixture(scope="module")
def rows(planner: S3TPlanner) -> list[Candidate]:
    return planner.candidates()


def given(rows: list[Candidate], policy: RepairPolicy) -> Candidate:
    (row,) = [row for row in rows if row.setting.given and row.policy == policy]
    return row


def within(estimate, expected: float, errors: float = 4) -> bool:
    """Streams that all agree may have missed what is very rare."""
    reach = errors * estimate.standard_error if estimate.standard_error else 1e-3
    return abs(estimate.mean - expected) <= reach + 1e-9


def with_same_rows(planner: S3TPlanner, **changes: float) -> S3TPlanner:
    """Another rule or unit, without simulating again."""
    other = dataclasses.replace(planner, **changes)
    vars(other)["_candidates"] = tuple(planner.candidates())
    return other


# ---- the numbers ----


def test_the_given_plan_comes_first_under_every_policy(rows):
    own = [row for row in rows if row.setting.given]
    assert rows[: len(own)] == own and len(own) == 7
    assert {(row.policy.below, row.policy.every_days) for row in own} == {
        (None, None), (1, None), (2, None), (4, None), (None, 1), (None, 7), (None, 30)
    }  # fmt: skip
    assert {row.setting.config for row in own} == {
        'S3TConfig(num_shards=5, num_slices=4, budget=4, sequence_selection="cyclic")'
    }


def test_every_line_makes_the_plan_of_its_row(rows):
    lines = {row.setting.config: row for row in rows if row.setting.size == (5, 4) and row.setting.config}
    assert len(lines) == 5
    for line, row in lines.items():
        plan = make_plan(eval(line, {"S3TConfig": S3TConfig}), seed=0)
        assert (plan.cost, len(plan.stages)) == (row.training_cost, row.stages)
        assert (plan.num_shards, plan.num_slices) == row.setting.size


def test_lives_are_those_of_the_closed_forms(rows):
    lives = given(rows, NEVER).lives
    assert round(lives.all_dead, 2) == 71.95 and round(lives.first_dead, 1) == 19.3
    for row in rows:
        exact, estimates = row.lives[:2], row.lives[2:]
        assert all(within(estimate, mean) for mean, estimate in zip(exact, estimates, strict=True))


def test_slices_in_use_are_those_of_the_closed_forms(rows):
    known = [row for row in rows if row.in_use_at_horizon_exact is not None]
    assert len(known) > 10
    assert all(within(row.in_use_at_horizon, row.in_use_at_horizon_exact) for row in known)


def test_expected_in_use_is_the_mixture_of_the_closed_form_over_requests():
    requests = 9.0
    chances = [math.exp(-requests) * requests**r / math.factorial(r) for r in range(80)]
    mixed = sum(chance * cyclic_slices_in_use(5, 4, r) / 20 for r, chance in enumerate(chances))
    assert expected_in_use(Plan.make(5, 4, cyclic(4, 4)), requests) == pytest.approx(mixed)


def test_repair_costs_are_those_of_the_closed_forms(rows):
    known = [row for row in rows if row.repair_cost_exact is not None]
    assert {row.setting.method for row in known} == {"s3t", *BASELINES}
    assert all(within(row.repair_cost, row.repair_cost_exact) for row in known)


def test_repair_after_each_hit_costs_with_one_sequence_what_sisa_costs(rows):
    (row,) = [row for row in rows if row.setting.method == "sisa"]
    requests = ASKED["requests_per_day"] * ASKED["horizon_days"]
    assert row.repair_cost_exact == requests * sisa_cost_per_request(4) == requests * 7.5
    assert row.policy.below == 4 and row.in_use.mean == 1


def test_units(rows):
    row = given(rows, RepairPolicy(below=2))
    assert row.training_cost == 5 * 28 and row.stages == 5 * 13 and row.storage_mb == 65 * 10
    assert row.epochs == pytest.approx((140 + row.repair_cost.mean) / 20)
    (sisa,) = [row for row in rows if row.setting.method == "sisa"]
    assert sisa.storage_mb == sisa.stages * 40, "its stages hold all layers"


@pytest.mark.parametrize(
    ("size", "days", "expected"),
    [
        ((1, 1), 1, -math.expm1(-3) / 3),
        ((5, 4), 1, 0.926),
        ((5, 4), None, None),
    ],
)
def test_slices_in_use_are_a_mean_over_time(size, days, expected):
    requests, period = DeletionRequests(per_day=3), days or 30
    setting, plan = Setting("s3t", *size, "cyclic", size[1]), Plan.make(*size, cyclic(size[1], size[1]))
    (row,) = Measure(requests, 30, 20, 0).candidates(setting, plan, [RepairPolicy(every_days=days)])
    moments = [expected_in_use(plan, 3 * period * (n + 0.5) / 2000) for n in range(2000)]
    assert row.in_use_exact == row.mean_in_use == pytest.approx(sum(moments) / 2000, abs=1e-4)
    if days:
        assert row.in_use_exact == pytest.approx(expected, abs=5e-4)


def test_the_last_period_counts_for_what_it_is():
    setting, plan = Setting("s3t", 1, 1, "cyclic", 1), Plan.make(1, 1, [(0,)])
    (row,) = Measure(DeletionRequests(per_day=0.5), 10, 20, 0).candidates(setting, plan, [RepairPolicy(every_days=7)])
    assert row.in_use_exact == pytest.approx((2 - math.exp(-3.5) - math.exp(-1.5)) / 0.5 / 10)


@pytest.mark.parametrize("policy", [RepairPolicy(), RepairPolicy(every_days=7), RepairPolicy(every_days=30)])
@pytest.mark.parametrize("more", [{}, {"examples": 3}, {"burst": 2, "examples": 2}])
def test_daily_means_agree_with_the_mean_over_time(policy, more):
    requests, setting = DeletionRequests(per_day=0.2, **more), Setting("s3t", 2, 4, "cyclic", 4)
    (row,) = Measure(requests, 65, 2000, 0).candidates(setting, setting.plan(), [policy])
    assert within(row.in_use, row.in_use_exact) and within(row.in_use_at_horizon, row.in_use_at_horizon_exact)


def test_what_is_repaired_at_a_length_is_seen_at_the_middle_of_the_days():
    setting = Setting("s3t", 1, 1, "cyclic", 1)
    (row,) = Measure(DeletionRequests(per_day=1), 1, 2000, 0).candidates(setting, setting.plan(), [RepairPolicy()])
    assert row.in_use.mean == pytest.approx((1 + math.exp(-1)) / 2, abs=0.03), "not at its end"
    (row,) = Measure(DeletionRequests(per_day=3), 9, 500, 0).candidates(
        setting, setting.plan(), [RepairPolicy(every_days=1)]
    )
    assert row.in_use.mean == pytest.approx((1 + math.exp(-3)) / 2, abs=0.02) and row.in_use.standard_error < 0.02


def test_shards_may_differ():
    plan = Plan.make_per_shard(2, [[(0, 1)], [(0, 1), (1, 0)]])
    alone = [Plan.make(2, 2, orders) for orders in plan.sequences]
    both = sum(expected_in_use(one, 1.5, [0.7, 0.3]) for one in alone) / 2
    assert expected_in_use(plan, 1.5, [0.7, 0.3]) == pytest.approx(both)


def test_the_mean_over_the_days_lies_between_the_whole_and_the_end(rows):
    row = given(rows, NEVER)
    assert row.in_use_at_horizon.mean < row.in_use.mean < 1
    assert row.in_use.low < row.in_use.mean < row.in_use.high


# ---- marks and the rule ----


def beats(one: Candidate, other: Candidate) -> bool:
    pairs = list(zip(one.objectives, other.objectives, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def assert_marked(rows: list[Candidate]) -> None:
    for row in rows:
        assert row.pareto != any(beats(other, row) for other in rows)


def test_the_marked_rows_are_those_that_no_row_beats(rows):
    assert_marked(rows)
    assert 0 < sum(row.pareto for row in rows) < len(rows)


@pytest.mark.parametrize("seed", range(20))
def test_any_rows_are_marked_so(rows, seed):
    rng = np.random.default_rng(seed)

    def drawn(row: Candidate) -> Candidate:
        numbers = {
            name: dataclasses.replace(getattr(row, name), mean=float(rng.integers(4)) / 4)
            for name in ("repair_cost", "in_use", "dead")
        }
        return dataclasses.replace(row, setting=Setting("s3t", int(rng.integers(1, 3)), 4), training_cost=0, **numbers)

    assert_marked(marked([drawn(row) for row in rows]))


def test_the_recommended_row_obeys_the_rule(planner, rows):
    chosen = planner.recommended
    assert chosen.setting.size == (5, 4) and chosen.dead.mean < 0.05 and chosen.in_use.mean >= 0.5
    for row in rows:
        obeys = row.setting.method == "s3t" and row.setting.size == (5, 4)
        if obeys and row.dead.mean < 0.05 and row.in_use.mean >= 0.5:
            assert chosen.epochs <= row.epochs
    assert "Of the plans of this size where the chance of a dead shard is at most 5%" in planner.reason
    assert f"{chosen.repairs.mean:.0f} times until day 60" in planner.advice


def test_more_slices_in_use_can_be_asked_for(planner):
    more = S3TPlanner(**ASKED, min_in_use=0.99, streams=50).recommended
    assert more.in_use.mean >= 0.99 and more.policy == RepairPolicy(below=4)
    assert more.epochs > planner.recommended.epochs


def test_where_nothing_obeys_it_says_so():
    planner = S3TPlanner(**ASKED | {"examples_per_person": 8, "slices": 2, "budget": 1}, streams=50)
    assert planner.reason.startswith("There are no plans of this size where")
    assert planner.recommended.dead.mean == min(r.dead.mean for r in planner.candidates() if r.setting.size == (5, 2))


@pytest.mark.parametrize(
    ("asked", "advice"),
    [
        ({"requests_per_day": 0.01}, "Repair nothing until day 60."),
        ({"min_in_use": 1}, "Repair, by train() again, after each deletion: about"),
    ],
)
def test_the_advice_fits_the_policy(asked, advice):
    small = {"examples": 500, "requests_per_day": 0.5, "horizon_days": 60, "shards": 1, "slices": 2, "budget": 2}
    assert S3TPlanner(**small | asked, streams=50).advice.startswith(advice)


def test_the_shortlist_has_what_was_asked_the_choice_and_the_baselines(planner, rows):
    short = shortlist(planner)
    assert len(short) <= 26 and planner.recommended in short
    assert [row for row in rows if row.setting.given] == short[:7]
    assert {row.setting.method for row in short} == {"s3t", *BASELINES}
    assert {row.setting.size for row in short} >= {(5, 4), (2, 4), (10, 4), (1, 1)}


# ---- what is compared ----


def test_the_same_seed_gives_the_same_numbers(planner):
    few = dataclasses.replace(planner, streams=10)
    again = dataclasses.replace(few)
    assert again.candidates() == few.candidates() and again.to_json() == few.to_json()
    assert dataclasses.replace(few, seed=1).candidates() != few.candidates()


def test_everything_is_plain_data(planner):
    told = json.loads(json.dumps(planner.to_json(), allow_nan=False))
    row = told["candidates"][0]
    assert row["lives"]["all_dead"] == pytest.approx(71.95, abs=0.01)
    assert row["lives"]["all_dead_estimate"]["mean"] == pytest.approx(72, rel=0.1)
    assert told["recommended"]["config"] == planner.recommended.setting.config


def test_what_never_ends_is_null():
    planner = S3TPlanner(52_002, 2, 20, shards=2, prior=[0.5, 0.5, 0.0], streams=20)
    lives = planner.candidates()[0].lives
    assert planner.slices == 3 and lives.all_dead == math.inf and lives.all_dead_estimate is None
    assert planner.candidates()[0].to_json()["lives"]["all_dead"] is None


def test_a_prior_is_part_of_the_line():
    planner = S3TPlanner(52_002, 2, 20, shards=2, slices=3, prior=(0.6, 0.3, 0.1), streams=20)
    lines = [row.setting.config for row in planner.candidates() if row.setting.selection == "optimal"]
    assert lines and all(line.endswith("deletion_prior=[0.6, 0.3, 0.1])") for line in lines)
    chosen = next(row for row in planner.candidates() if row.setting.config == lines[0])
    assert make_plan(eval(lines[0], {"S3TConfig": S3TConfig}), 0).cost == chosen.training_cost
    assert {row.setting.num_slices for row in planner.candidates()} == {3, 1}, "it is that of three slices"


def test_a_cost_budget_can_be_what_is_given():
    planner = S3TPlanner(52_002, 1, 20, shards=2, slices=4, cost_budget=17, streams=20)
    own = [row for row in planner.candidates() if row.setting.given]
    assert own and {row.setting.cost_budget for row in own} == {17} and own[0].training_cost <= 2 * 17


def test_without_shards_and_slices_several_are_compared():
    planner = S3TPlanner(3_000, 0.2, 60, layers=4, streams=20)
    sizes = {row.setting.size for row in planner.candidates() if row.setting.method == "s3t"}
    assert sizes == {(m, n) for m in (1, 2, 5, 10) for n in (2, 4) if m * n * 100 <= 3_000}
    assert not any(row.setting.given for row in planner.candidates())
    assert planner.recommended in shortlist(planner)


def test_lives_and_costs_with_bursts_and_people_have_no_closed_forms():
    rows = S3TPlanner(52_002, 1, 20, shards=2, slices=2, budget=2, examples_per_person=2, burst=2, streams=20)
    row = given(rows.candidates(), NEVER)
    assert row.lives.all_dead is None and row.lives.all_dead_estimate
    daily = given(rows.candidates(), RepairPolicy(every_days=1))
    assert daily.repair_cost_exact is None and within(daily.in_use_at_horizon, daily.in_use_at_horizon_exact)


def test_small_slices_are_noted():
    planner = S3TPlanner(60, 0.05, 30, shards=2, slices=4, streams=20)
    assert planner.notes[1:] == [
        "There are only 7.5 examples per slice on average; 0.0027 of 8 slices are expected to be empty."
    ]
    assert len(S3TPlanner(60_000, 0.05, 30, shards=2, slices=4, streams=20).notes) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"examples": 0}, "examples must be an integer from 1"),
        ({"shards": 0}, "shards must be an integer from 1"),
        ({"slices": 17}, "slices=17, but more than 16 take too long to compare"),
        ({"requests_per_day": 0}, "requests_per_day must be a number above 0, not 0"),
        ({"requests_per_day": math.nan}, "requests_per_day must be a number above 0, not nan"),
        ({"horizon_days": 0}, "horizon_days must be a number above 0, not 0"),
        ({"horizon_days": 0.5}, "horizon_days must be from 1 to 36525, not 0.5"),
        ({"horizon_days": math.inf}, "horizon_days must be a number above 0, not inf"),
        ({"gpu_hours_per_epoch": -1}, "gpu_hours_per_epoch must be a number above 0, not -1"),
        ({"adapter_mb": 0}, "adapter_mb must be a number above 0, not 0"),
        ({"horizon_days": 10_000_000}, "horizon_days must be from 1 to 36525, not 10000000"),
        ({"min_in_use": 90}, "min_in_use must be from 0 to 1, not 90"),
        ({"max_dead": 5}, "max_dead must be from 0 to 1, not 5"),
        ({"streams": 1}, "streams must be an integer from 2"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"cost_budget": 20}, "budget=4 and cost_budget=20 are both given. Give one."),
        ({"slices": None}, "budget=4 is given, but not of how many slices. Give slices, too, or leave budget out."),
        ({"budget": None, "slices": None, "cost_budget": 9}, "cost_budget=9 is given, but not of how many slices"),
        ({"budget": 25}, "budget, the number of different orders of 4 slices, must be an integer from 1 to 24"),
        ({"budget": None, "cost_budget": 9}, "cost_budget=9, but one whole sequence of 4 slices costs 10"),
        ({"layers": 3}, "slices=4 for a model of 3 layers"),
        ({"examples": 19}, "20 slices in all for 19 examples: some would be empty"),
        ({"examples": 100}, "120 examples would be deleted until the horizon, but there are 100"),
        ({"requests_per_day": 200}, "12000 requests until the horizon take too long to simulate"),
        ({"prior": [0.5, 0.5]}, "The prior must have one number per slice, 4"),
        ({"prior": [0.5, 0.5, 0.5, 0.5]}, "The prior must be non-negative and sum to 1"),
        ({"examples_per_person": 0}, "examples_per_person must be an integer from 1"),
        ({"burst": 0}, "burst must be an integer from 1"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError) as caught:
        S3TPlanner(**ASKED | wrong)
    assert message in str(caught.value) and str(caught.value).endswith(".")


# ---- what was found in review ----


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({"examples": 1_000, "layers": 1}, (1, 1)),
        ({"examples": 1}, (1, 1)),
        ({"examples": 30, "shards": 3}, (3, 2)),
        ({"examples": 4, "shards": 3}, (3, 1)),
        ({"examples": 60, "slices": 8}, (1, 8)),
    ],
)
def test_where_all_is_small_it_recommends_what_fits(asked, size):
    planner = S3TPlanner(**{"requests_per_day": 0.01, "horizon_days": 40, "streams": 20} | asked)
    assert {row.setting.size for row in planner.candidates() if row.setting.method == "s3t"} == {size}
    assert planner.recommended.setting.size == size and planner.recommended_plan.num_slices == size[1]


def test_the_line_names_the_cost_that_is_used(rows):
    trees = {row.setting: row for row in rows if row.setting.selection == "optimal"}
    assert len(trees) > 5
    for setting, row in trees.items():
        assert setting.cost_budget * setting.num_shards == row.training_cost
    for setting, row in {(one.num_slices, one.cost_budget): (one, trees[one]) for one in trees}.values():
        if setting.num_slices > 4:
            continue
        plan = make_plan(eval(setting.config, {"S3TConfig": S3TConfig}), seed=0)
        assert plan == setting.plan() and plan.cost == row.training_cost


def test_a_cost_that_gives_another_plan_is_not_named(monkeypatch):
    trees = {14: ((0, 1), (1,)), 4: ((1, 0), (0,))}
    monkeypatch.setattr("hf_s3t.planner.candidates._optimal", lambda slices, cost_budget, prior: trees[cost_budget])
    assert Setting("s3t", 1, 2, "optimal", cost_budget=14).with_cost_used().cost_budget == 14


def test_a_cost_budget_that_was_given_is_named_as_it_was_given():
    planner = S3TPlanner(52_002, 1, 20, shards=2, slices=4, cost_budget=14, streams=20)
    assert {row.setting.cost_budget for row in planner.candidates() if row.setting.given} == {14}


def test_baselines_are_what_people_think_of_first(rows, planner):
    others = [row for row in rows if row.setting.method != "s3t"]
    baselines = {(row.setting.method, row.setting.size, row.policy): row for row in others}
    each, requests = RepairPolicy(below=1), ASKED["requests_per_day"] * ASKED["horizon_days"]
    assert set(baselines) == {
        ("sisa", (5, 4), RepairPolicy(below=4)),
        ("shards alone", (5, 1), each),
        ("full retraining", (1, 1), each),
        ("full retraining", (1, 1), RepairPolicy(every_days=7)),
        ("full retraining", (1, 1), RepairPolicy(every_days=30)),
    }
    alone = baselines["shards alone", (5, 1), each]
    assert alone.repair_cost_exact == requests and alone.training_cost == 5 and alone.mean_in_use == 1
    weekly = baselines["full retraining", (1, 1), RepairPolicy(every_days=7)]
    assert weekly.repair_cost.mean == pytest.approx(8) and weekly.mean_in_use == pytest.approx(0.075, abs=1e-3)
    assert set(map(id, others)) <= set(map(id, shortlist(planner)))


def test_a_cheaper_baseline_is_told():
    planner = S3TPlanner(52_002, 0.2, 365, shards=5, slices=4, budget=4, streams=10, min_in_use=0.99)
    (note,) = planner.notes
    chosen = planner.recommended
    assert note.startswith(f"Training and repairs cost {chosen.epochs / 73:.2g} epochs per request.")
    assert f"Cheaper than its {chosen.epochs:.0f} epochs until day 365: " in note
    assert "shards alone after each deletion (" in note
    assert "from scratch every 30 days (" in note and "epochs, 17% in use" in note
    assert "What S3T buys is that a request waits for no training while no shard is dead." in note
    hours = with_same_rows(planner, gpu_hours_per_epoch=6).notes[0]
    assert f"cost {6 * chosen.epochs / 73:.2g} GPU hours per request." in hours and "GPU hours, 17% in use" in hours


def test_where_no_baseline_is_cheaper_only_the_cost_per_request_is_told():
    planner = S3TPlanner(52_002, 0.2, 6, shards=5, slices=4, budget=1, streams=50, max_dead=1, min_in_use=0)
    epochs = planner.recommended.epochs
    cheaper = [row for row in planner.candidates() if row.setting.method != "s3t" and row.epochs < epochs]
    assert bool(cheaper) == ("Cheaper" in planner.notes[0]) and "epochs per request." in planner.notes[0]


def test_the_chance_of_a_dead_shard_can_be_chosen(planner, rows):
    loose = with_same_rows(planner, max_dead=1)
    assert 0.05 < loose.recommended.dead.mean and loose.recommended.epochs < planner.recommended.epochs
    assert "the chance of a dead shard is at most 100% and" in loose.reason
    strict = with_same_rows(planner, max_dead=0.005)
    assert strict.recommended.dead.mean == 0 and "at most 0.5%" in strict.reason


def test_without_shards_it_says_what_the_table_does_not_know():
    free = S3TPlanner(3_000, 0.2, 20, slices=2, streams=10)
    assert "More shards are always cheaper here: what they cost in quality is not known to the table." in free.notes
    assert "More shards" not in str(S3TPlanner(3_000, 0.2, 20, shards=1, slices=2, streams=5).notes)


def test_dead_least_often_is_not_said_where_all_are_alike():
    planner = S3TPlanner(500, 0.5, 60, shards=1, slices=1, streams=20, min_in_use=1, max_dead=0)
    assert {row.dead.mean for row in planner.candidates()} == {1}
    assert planner.reason.endswith(" All have dead shards equally often; of those compared it has most in use.")
