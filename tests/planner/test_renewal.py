"""The simulator, against a plain loop that asks the plan itself, cases worked out by hand, and the closed forms."""

import dataclasses
import math
import statistics
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hf_s3t.plan.life import (
    cyclic_slices_in_use,
    first_slice_chances,
    life_until_all_dead,
    life_until_first_dead,
    place_chances,
    repair_cost,
    sisa_cost_per_request,
    sisa_slices_in_use,
    uniform_life,
)
from hf_s3t.plan.sequences import cyclic, random_orders, spaced
from hf_s3t.plan.tree import Plan
from hf_s3t.planner import arrivals, bitsets
from hf_s3t.planner.arrivals import DeletionRequests, RepairPolicy
from hf_s3t.planner.estimates import Curve, Estimate
from hf_s3t.planner.simulate import simulate, simulate_full_retraining, simulate_sisa

NEVER = RepairPolicy()


def within(estimate, expected, errors=3):
    return abs(estimate.mean - expected) <= errors * estimate.standard_error


# A plain loop that asks the plan


class PlainStream:
    """One stream, one request after the other; what is served and what is missing is what the plan says."""

    def __init__(self, plan, requests, policy, horizon):
        self.plan, self.requests, self.policy, self.horizon = plan, requests, policy, horizon
        self.trained = set(plan.stages)
        self.received = self.first_dead = self.all_dead = self.repairs = self.cost = self.days = 0
        self.with_orders = len(self.served())
        self.by_request = [self.in_use()]
        self.moments = [(0.0, self.in_use(), False)]  # a change is seen at the end of a day that it falls on, or not

    def served(self):
        return self.plan.served(self.trained)

    def in_use(self):
        return sum(map(len, self.served().values()))

    def repair(self, shards):
        missing = [stage for stage in self.plan.missing(self.trained) if stage.shard in shards]
        self.trained.update(missing)
        self.repairs += bool(missing)
        self.cost += sum(stage.depth for stage in missing)

    def answer(self, places):
        self.received += 1
        hit = [divmod(place, self.plan.num_slices) for place in places]
        self.trained.difference_update(self.plan.affected(hit))
        served = self.served()
        if len(served) < self.with_orders and not self.first_dead:
            self.first_dead = self.received
        if not served and not self.all_dead:
            self.all_dead = self.received

    def run(self, places, moments, max_requests):
        """`places` has one list per request, `moments` one number per burst."""
        due = self.policy.every_days or math.inf
        for number, request in enumerate(places[:max_requests]):
            first, last = number % self.requests.burst == 0, (number + 1) % self.requests.burst == 0
            moment = None if moments is None else moments[number // self.requests.burst]
            while first and moment is not None and due <= min(moment, self.horizon):
                self.repair(range(self.plan.num_shards))
                self.moments.append((due, self.in_use(), True))
                due += self.policy.every_days
            if moment is not None and moment > self.horizon:
                break
            self.answer(request)
            if last and self.policy.below:
                served = self.served()
                shards = range(self.plan.num_shards)
                self.repair([shard for shard in shards if len(served.get(shard, ())) < self.policy.below])
            self.by_request.append(self.in_use())
            if moment is not None:
                self.days = moment
                self.moments.append((moment, self.in_use(), False))
            if not self.policy.repairs and self.all_dead:
                return
        if self.horizon < math.inf:
            self.days = self.horizon

    def by_day(self):
        days = range(int(self.horizon) + 1)
        return [[use for t, use, after in self.moments if t < day or (t == day and not after)][-1] for day in days]


def plain_streams(plan, requests, policy, streams, seed, max_requests, horizon):
    """The same streams as the simulator draws, one after the other."""
    chances = place_chances(plan.num_shards, plan.num_slices, requests.prior)
    blocks = list(islice(requests.blocks(chances, streams, seed), 3))
    places = np.concatenate([block[0] for block in blocks]).reshape(-1, requests.examples, streams)
    moments = None if requests.per_day is None else np.concatenate([block[1] for block in blocks])
    answered = []
    for stream in range(streams):
        plain = PlainStream(plan, requests, policy, math.inf if horizon is None else horizon)
        times = None if moments is None else moments[:, stream].tolist()
        plain.run(places[:, :, stream].tolist(), times, max_requests)
        answered.append(plain)
    return answered


TWO = Plan.make(2, 3, cyclic(3, 3))
KINDS = Plan.make_per_shard(4, [[(0, 1, 2, 3), (2, 1)], [(3, 1, 2)], random_orders(4, 5, seed=2)])
UNFUNDED = Plan(3, 3, ((), ((0, 1, 2), (2, 0)), ((1,),)))  # shard 0 has no orders
PERIODIC = RepairPolicy(every_days=7)
CASES = [
    (TWO, DeletionRequests(), NEVER, {}),
    (TWO, DeletionRequests(), NEVER, {"max_requests": 5}),
    (TWO, DeletionRequests(per_day=2), NEVER, {}),
    (TWO, DeletionRequests(per_day=2), NEVER, {"horizon_days": 6.5}),
    (TWO, DeletionRequests(per_day=0.5), NEVER, {"horizon_days": 100}),
    (TWO, DeletionRequests(examples=3), NEVER, {}),
    (TWO, DeletionRequests(), RepairPolicy(below=1), {"max_requests": 40}),
    (TWO, DeletionRequests(), RepairPolicy(below=3), {"max_requests": 10}),
    (TWO, DeletionRequests(per_day=1), PERIODIC, {"horizon_days": 28}),
    (TWO, DeletionRequests(per_day=1), PERIODIC, {"max_requests": 30}),
    (KINDS, DeletionRequests(), NEVER, {}),
    (KINDS, DeletionRequests(examples=2, burst=3), RepairPolicy(below=2), {"max_requests": 20}),
    (KINDS, DeletionRequests(burst=4, per_day=3), RepairPolicy(below=3), {"horizon_days": 9}),
    (KINDS, DeletionRequests([0.7, 0.1, 0.1, 0.1], 2, 2, 1.5), RepairPolicy(every_days=2.5), {"horizon_days": 21.2}),
    (KINDS, DeletionRequests([[0.3, 0, 0, 0.1], [0.1, 0, 0, 0.1], [0, 0.2, 0.2, 0]]), NEVER, {"max_requests": 30}),
    (UNFUNDED, DeletionRequests([0.2, 0.5, 0.3], examples=2), NEVER, {}),
    (UNFUNDED, DeletionRequests(per_day=1), PERIODIC, {"horizon_days": 28}),
]


@pytest.mark.parametrize("exact", [12, 0], ids=["tables", "masks"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_simulator_does_what_a_plain_loop_does(monkeypatch, case, exact):
    monkeypatch.setattr(bitsets, "TABLE_SLICES", exact)
    plan, requests, policy, horizon = CASES[case]
    streams, seed = 25, case
    found = simulate(plan, requests, policy, streams=streams, seed=seed, **horizon)
    limits = (horizon.get("max_requests"), horizon.get("horizon_days"))
    plain = plain_streams(plan, requests, policy, streams, seed, *limits)
    for field, name in [("requests", "received"), ("repair_cost", "cost")]:
        assert getattr(found, field).tolist() == [getattr(stream, name) for stream in plain]
    for name in ("first_dead", "all_dead", "repairs"):
        assert getattr(found, name).tolist() == [getattr(stream, name) for stream in plain]
    assert found.training_cost == plan.cost
    if requests.per_day is None:
        assert found.days is None
    else:
        assert found.days.tolist() == [stream.days for stream in plain]
    ended = [stream.received for stream in plain if policy.repairs or not stream.all_dead]
    steps = min(ended) if ended and "horizon_days" in horizon else max(stream.received for stream in plain)
    check_curve(found.slices_in_use, [[*stream.by_request, *[0] * steps][: steps + 1] for stream in plain])
    if "horizon_days" in horizon:
        check_curve(found.slices_in_use_by_day, [stream.by_day() for stream in plain])
    else:
        assert found.slices_in_use_by_day is None


def check_curve(curve, rows):
    columns = list(zip(*rows, strict=True))
    assert len(curve.mean) == len(columns) == curve.band.shape[1]
    assert curve.mean.tolist() == [sum(column) / len(rows) for column in columns]
    errors = [statistics.stdev(column) / len(rows) ** 0.5 for column in columns]
    assert curve.standard_error == pytest.approx(errors, abs=1e-6)
    assert curve.high - curve.mean == pytest.approx(stats.t(len(rows) - 1).ppf(0.975) * curve.standard_error)
    for share, line in zip((0.05, 0.95), curve.band, strict=True):
        assert line.tolist() == [sorted(column)[math.ceil(share * len(rows)) - 1] for column in columns]


# The plain loop that the benchmark takes times with


@pytest.mark.parametrize("sizes", [(5, 6, 6, 200), (2, 13, 4, 40), (1, 1, 1, 2)])
def test_the_loop_to_compare_times_with_gives_the_same_lives(monkeypatch, sizes):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from planning import compare_speed

    assert compare_speed(*sizes, seed=3)[2]


# Worked out by hand. The prior leaves only one slice to hit


CHAIN = Plan.make(1, 2, [(0, 1)])
ONLY_FIRST, ONLY_SECOND = [1.0, 0.0], [0.0, 1.0]


def test_a_hit_on_the_first_slice_leaves_nothing():
    found = simulate(CHAIN, DeletionRequests(ONLY_FIRST), streams=3)
    assert found.requests_until_first_dead == found.requests_until_all_dead == Estimate(1.0, 0.0, 1.0, 1.0)
    assert found.slices_in_use.mean.tolist() == [2.0, 0.0]
    assert found.repair_cost_per_request.mean == 0 and found.cost_per_request.mean == CHAIN.cost == 3
    assert found.requests_between_repairs is None and found.days_between_repairs is None


def test_a_repair_costs_what_is_missing():
    first, second = DeletionRequests(ONLY_FIRST), DeletionRequests(ONLY_SECOND)
    every = simulate(CHAIN, first, RepairPolicy(below=1), streams=2, max_requests=7)
    assert every.repair_cost_per_request.mean == 3 and every.repairs.tolist() == [7, 7]
    assert every.cost_per_request.mean == pytest.approx((7 * 3 + 3) / 7)
    assert every.slices_in_use.mean.tolist() == [2.0] * 8  # after the repair
    assert every.first_dead.tolist() == every.all_dead.tolist() == [1, 1]  # before it
    none = simulate(CHAIN, second, RepairPolicy(below=1), streams=2, max_requests=7)
    assert none.repair_cost.sum() == 0 and none.slices_in_use.mean.tolist() == [2.0] + [1.0] * 7
    assert none.requests_until_first_dead is None and none.first_dead_share.mean == 0
    deeper = simulate(CHAIN, second, RepairPolicy(below=2), streams=2, max_requests=7)
    assert deeper.repair_cost_per_request.mean == 2 and deeper.requests_between_repairs.mean == 1


def test_a_repair_waits_for_the_end_of_a_burst():
    requests = DeletionRequests(ONLY_FIRST, burst=3)
    found = simulate(CHAIN, requests, RepairPolicy(below=1), streams=2, max_requests=8)
    assert found.repairs.tolist() == [2, 2] and found.repair_cost.tolist() == [6, 6]
    assert found.slices_in_use.mean.tolist() == [2, 0, 0, 2, 0, 0, 2, 0, 0]


def test_only_the_shard_that_fell_below_is_repaired():
    plan = Plan.make(2, 2, [(0, 1)])
    prior = [[0.0, 0.5], [0.5, 0.0]]
    found = simulate(plan, DeletionRequests(prior), RepairPolicy(below=1), streams=50, max_requests=40)
    assert (found.repair_cost == 3 * found.repairs).all()
    assert found.slices_in_use.mean[-1] == 3  # shard 0 lost its second slice, and nobody misses it
    assert within(found.requests_between_repairs, 2)


def test_repairs_every_few_days_train_what_was_lost_meanwhile():
    requests = DeletionRequests(ONLY_FIRST, per_day=1000)
    found = simulate(CHAIN, requests, RepairPolicy(every_days=2), streams=5, horizon_days=10)
    assert found.repairs.tolist() == [5] * 5 and found.repair_cost.tolist() == [15] * 5
    assert found.days_between_repairs == Estimate(2.0, 0.0, 2.0, 2.0)
    assert found.slices_in_use_by_day.mean.tolist() == [2.0] + [0.0] * 10  # before the repair of that evening
    assert (abs(found.requests - 10_000) < 500).all()


def test_several_examples_hit_several_slices_at_once():
    plan = Plan.make(1, 2, cyclic(2, 2))
    both = simulate(plan, DeletionRequests(examples=40), streams=100)
    assert both.requests_until_all_dead.mean == 1
    two = simulate(plan, DeletionRequests(examples=2), streams=5000)
    # Each request hits the same slice twice with the chance 1/2; then the rest is a coin as well: 1 + 1/2 * 4/3.
    assert within(two.requests_until_all_dead, 1 + 1 / 2 * 4 / 3)


def test_sisa_retrains_from_the_hit_slice_on():
    for slice_id, cost in enumerate([1 + 2 + 3 + 4, 2 + 3 + 4, 3 + 4, 4]):
        prior = [float(number == slice_id) for number in range(4)]
        found = simulate_sisa(3, 4, DeletionRequests(prior), streams=2, max_requests=6)
        assert found.repair_cost_per_request.mean == cost
        assert found.training_cost == 30 and found.slices_in_use.mean.tolist() == [12.0] * 7


def test_full_retraining_trains_everything_again():
    found = simulate_full_retraining(3, 40, DeletionRequests(per_day=2), streams=2, horizon_days=5)
    assert found.repair_cost.tolist() == (120 * found.requests).tolist() and found.training_cost == 120
    assert found.slices_in_use_by_day.mean.tolist() == [120.0] * 6
    together = simulate_full_retraining(3, 40, DeletionRequests(burst=4), streams=2, max_requests=8)
    assert together.repair_cost_per_request.mean == 30 and together.first_dead.tolist() == [1, 1]


def test_64_slices_are_simulated_and_65_refused():
    found = simulate(Plan.make(1, 64, [tuple(range(64))[::-1]]), streams=500)
    assert within(found.requests_until_all_dead, 64)
    with pytest.raises(ValueError, match="num_slices=65, but a simulation takes at most 64. Use fewer"):
        simulate(Plan.make(1, 65, [tuple(range(65))]))


# Streams


def test_the_same_seed_gives_the_same_results():
    def fields(found):
        curves = [dataclasses.asdict(curve) for curve in (found.slices_in_use, found.slices_in_use_by_day)]
        numbers = [found.requests, found.first_dead, found.all_dead, found.repairs, found.repair_cost, found.days]
        return [array.tolist() for array in numbers + [a for curve in curves for a in curve.values()]]

    def run(seed):
        policy = RepairPolicy(every_days=5)
        return fields(simulate(TWO, DeletionRequests(per_day=2), policy, streams=30, seed=seed, horizon_days=20))

    assert run(4) == run(4) != run(5)


def test_plans_and_policies_are_sent_the_same_streams():
    requests = DeletionRequests(per_day=2)
    never = simulate(TWO, requests, streams=30, seed=1, horizon_days=60)
    low = simulate(TWO, requests, RepairPolicy(below=1), streams=30, seed=1, horizon_days=60)
    sisa = simulate_sisa(2, 3, requests, streams=30, seed=1, horizon_days=60)
    assert low.requests.tolist() == sisa.requests.tolist()
    assert never.first_dead.tolist() == low.first_dead.tolist()
    assert (sisa.first_dead <= low.first_dead).all()


def test_streams_follow_the_prior_and_the_rate():
    prior = [[0.1, 0.2, 0.0], [0.3, 0.4, 0.0]]
    requests = DeletionRequests(prior, burst=2, per_day=4)
    places, moments = next(requests.blocks(place_chances(2, 3, prior), 100, seed=0))
    shares = np.bincount(places.ravel(), minlength=6) / places.size
    assert shares == pytest.approx([0.1, 0.2, 0, 0.3, 0.4, 0], abs=3 * 0.5 / places.size**0.5)
    assert moments.shape == (len(places) // 2, 100) and (np.diff(moments, axis=0) > 0).all()
    assert within(Estimate.of(moments[-1]), len(moments) / 2)


@pytest.mark.parametrize("streams, rows", [(2, 256), (2000, 32), (10**5, 1)])
def test_blocks_are_small_enough_to_stay_close(streams, rows):
    assert DeletionRequests().bursts_per_block(streams) == rows <= arrivals.MAX_ROWS


# Estimates


def test_estimates_have_the_interval_of_student():
    values = np.array([1.0, 4.0, 2.0, 2.5, 7.0])
    found = Estimate.of(values)
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert dataclasses.astuple(found) == pytest.approx((3.3, stats.sem(values), low, high))


def test_about_95_of_100_intervals_cover_the_truth():
    covered = 0
    for seed in range(200):
        found = simulate(TWO, streams=50, seed=seed).requests_until_all_dead
        covered += found.low <= uniform_life(2, 3, 3).mean <= found.high
    assert 180 <= covered <= 199


def test_a_ratio_is_that_of_the_sums():
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 15, size=20_000)
    found = Estimate.of_ratio(3.0 * counts + rng.normal(size=20_000), counts)
    assert found.mean == pytest.approx(3, abs=0.003)
    assert found.standard_error == pytest.approx(1 / 9.5 / 20_000**0.5, rel=0.02)


def test_a_curve_of_one_value_has_no_width():
    curve = Curve.of_counts(np.array([[0, 0, 0, 9]]))
    assert (curve.mean, curve.low, curve.high) == (3, 3, 3) and curve.band.tolist() == [[3], [3]]


# Closed forms: 20,000 streams


@pytest.mark.parametrize("m, num_slices, budget", [(5, 4, 4), (5, 6, 6), (5, 4, 1), (10, 8, 4)])
def test_lives_agree_with_the_closed_forms(m, num_slices, budget):
    plan = Plan.make(m, num_slices, spaced(num_slices, budget))
    found = simulate(plan, streams=20_000, seed=1)
    life = uniform_life(m, num_slices, budget)
    assert within(found.requests_until_all_dead, life.mean)
    assert found.all_dead.std() == pytest.approx(life.standard_deviation, rel=0.03)
    first = life_until_first_dead(first_slice_chances(plan))
    assert within(found.requests_until_first_dead, first.mean)
    assert found.first_dead.std() == pytest.approx(first.standard_deviation, rel=0.03)


@pytest.mark.slow
def test_the_life_of_many_slices_agrees_with_the_closed_form():
    plan = Plan.make(5, 32, spaced(32, 8))
    found = simulate(plan, streams=20_000, seed=2)
    assert within(found.requests_until_all_dead, 684.6 + 0.03)
    assert within(found.requests_until_all_dead, uniform_life(5, 32, 8).mean)
    assert within(found.requests_until_first_dead, life_until_first_dead(first_slice_chances(plan)).mean)


def test_lives_under_a_prior_agree_with_the_integral():
    plan = Plan.make_per_shard(4, [[(0, 1, 2, 3), (3, 2)], [(1, 0)], cyclic(4, 4)])
    prior = [[0.2, 0.1, 0.05, 0.02], [0.1, 0.1, 0.1, 0.03], [0.06, 0.08, 0.06, 0.1]]
    found = simulate(plan, DeletionRequests(prior), streams=20_000, seed=1)
    chances = first_slice_chances(plan, prior)
    assert within(found.requests_until_all_dead, life_until_all_dead(chances).mean)
    assert within(found.requests_until_first_dead, life_until_first_dead(chances).mean)


def test_slices_in_use_agree_with_the_closed_forms():
    found = simulate(Plan.make(5, 4, cyclic(4, 4)), streams=20_000, seed=1).slices_in_use
    sisa = simulate(Plan.make(5, 4, [(2, 0, 1, 3)]), streams=20_000, seed=1).slices_in_use
    for requests in (1, 5, 10, 20, 36):
        assert abs(found.mean[requests] - cyclic_slices_in_use(5, 4, requests)) <= 3 * found.standard_error[requests]
        assert abs(sisa.mean[requests] - sisa_slices_in_use(5, 4, requests)) <= 3 * sisa.standard_error[requests]


def test_slices_in_use_by_day_agree_with_a_poisson_number_of_requests():
    found = simulate(Plan.make(5, 4, cyclic(4, 4)), DeletionRequests(per_day=2), streams=20_000, horizon_days=18)
    curve = found.slices_in_use_by_day
    for day in (1, 5, 18):
        number = stats.poisson(2 * day)
        expected = sum(number.pmf(r) * cyclic_slices_in_use(5, 4, r) for r in range(120))
        assert abs(curve.mean[day] - expected) <= 3 * curve.standard_error[day]


@pytest.mark.parametrize("prior", [None, [0.4, 0.3, 0.2, 0.1]])
def test_the_cost_of_periodic_repairs_agrees_with_the_closed_form(prior):
    plan, requests = Plan.make(2, 4, cyclic(4, 4)), DeletionRequests(prior, per_day=0.5)
    found = simulate(plan, requests, RepairPolicy(every_days=6), streams=20_000, horizon_days=30)
    assert within(found.repair_cost_per_request, repair_cost(plan, 3, prior) / 3)
    # A repair trains something unless nobody asked meanwhile.
    assert within(found.days_between_repairs, 6 / -math.expm1(-3))


def test_the_cost_of_sisa_agrees_with_the_closed_form():
    found = simulate_sisa(5, 6, streams=20_000, max_requests=30)
    assert within(found.repair_cost_per_request, sisa_cost_per_request(6))
    assert found.requests_until_first_dead is None
    assert within(found.first_dead_share, 1 - (5 / 6) ** 30)  # a first slice was hit, for a moment


# What is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"per_day": 0}, "per_day must be a number above 0, not 0. Give requests per day"),
        ({"per_day": math.nan}, "per_day must be"),
        ({"examples": 0}, "examples must be an integer from 1"),
        ({"burst": 2.0}, "burst must be an integer from 1"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeletionRequests(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"below": 1, "every_days": 3}, "Both below=1 and every_days=3 are given. Choose one"),
        ({"below": 0}, "below must be an integer from 1"),
        ({"every_days": 0}, "every_days must be a number above 0"),
        ({"every_days": math.inf}, "every_days must be a number above 0"),
    ],
)
def test_impossible_policies_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RepairPolicy(**arguments)


@pytest.mark.parametrize("arguments", [(Plan.make(1, 2, [(0, 1)]), RepairPolicy(below=1)), ([(0, 1)],)])
def test_arguments_in_the_wrong_place_are_named(arguments):
    with pytest.raises(ValueError, match="takes a Plan and a DeletionRequests, not a "):
        simulate(*arguments)


DAILY = DeletionRequests(per_day=1)


@pytest.mark.parametrize(
    "requests, policy, arguments, message",
    [
        (None, None, {"streams": 1}, "streams must be an integer from 2"),
        (None, None, {"max_requests": 0}, "max_requests must be an integer from 1"),
        (DAILY, None, {"horizon_days": 0}, "horizon_days must be a number above 0"),
        (DAILY, None, {"horizon_days": math.nan}, "horizon_days must be a number above 0"),
        (DAILY, None, {"horizon_days": 9, "max_requests": 9}, "are both given. Give one"),
        (
            None,
            None,
            {"horizon_days": 9},
            r"horizon_days=9 is given, but no rate, so there are no days. Give Deletion",
        ),
        (None, RepairPolicy(every_days=3), {"max_requests": 9}, "every_days=3 is given, but no rate"),
        (
            None,
            RepairPolicy(below=1),
            {},
            r"With RepairPolicy\(below=1, .* no end. Give max_requests, or horizon_days",
        ),
        (
            None,
            RepairPolicy(below=4),
            {"max_requests": 9},
            "below=4, but the longest sequence of shard 0 has 3 slices",
        ),
        (DAILY, None, {"horizon_days": 1e7}, "are 1e.07 requests per stream, more than 1e.06. Give a nearer horizon"),
        (DAILY, None, {"horizon_days": 1e5, "streams": 10**4}, "arrays of 1e.09 numbers, .* Use fewer streams"),
        (DeletionRequests([0.5, 0.5, 0.0]), None, {}, "has the chance 0 to be hit by a request. Give max_requests"),
        (DeletionRequests([0.5, 0.5]), None, {}, "The prior must be 3 numbers"),
    ],
)
def test_what_can_not_be_simulated_is_refused(requests, policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(TWO, requests, policy, **arguments)


def test_work_without_end_is_refused_before_it_starts():
    assert arrivals.MAX_REQUESTS * 1e-6 == 1
    with pytest.raises(ValueError, match="has the chance 1e-08 to be hit"):
        simulate(Plan.make(1, 2, [(1, 0), (0, 1)]), DeletionRequests([1 - 1e-8, 1e-8]))
