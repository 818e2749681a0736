"""Values and bounds, against brute force over streams, closed forms and exact numbers computed independently."""

import itertools
import math
import statistics

import numpy as np
import pytest

from hf_s3t.plan.bounds import budget_bound, cost_bound
from hf_s3t.plan.sequences import cyclic, expected_surviving_prefix, prune_orders, random_orders, surviving_length
from hf_s3t.plan.streams import Streams
from hf_s3t.plan.survival import (
    Lattice,
    checked_performance,
    checked_prior,
    life_weights,
    set_of,
    weights_after,
    weights_over,
)

PRIORS = {
    "uniform": [0.25] * 4,
    "skewed": [0.4, 0.3, 0.2, 0.1],
    "steep": [0.94, 0.03, 0.02, 0.01],
}
every_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())


def harmonic(count):
    return math.fsum(1 / i for i in range(1, count + 1))


def zipf(num_slices):
    return [1 / j / harmonic(num_slices) for j in range(1, num_slices + 1)]


def two_level(num_slices, hot):
    total = 10 * hot + num_slices - hot
    return [10 / total] * hot + [1 / total] * (num_slices - hot)


def best(orders, hit):
    return max(surviving_length(order, hit) for order in orders)


def members(bits):
    return {j for j in range(20) if bits >> j & 1}


# Weights of the hit sets


@every_prior
@pytest.mark.parametrize("requests", [0, 1, 2, 5])
def test_weights_after_some_requests_equal_all_streams(prior, requests):
    expected = np.zeros(16)
    for stream in itertools.product(range(4), repeat=requests):
        expected[set_of(set(stream))] += math.prod(prior[j] for j in stream)
    assert weights_after(prior, requests) == pytest.approx(expected, abs=1e-12)


@every_prior
def test_weights_over_a_horizon_are_the_mean(prior):
    expected = np.mean([weights_after(prior, requests) for requests in range(1, 8)], axis=0)
    assert weights_over(prior, 7) == pytest.approx(expected, abs=1e-12)


@every_prior
def test_life_weights_are_the_sum_over_all_requests(prior):
    total = weights_over(prior, 4000) * 4000 + weights_after(prior, 0)
    assert life_weights(prior)[:-1] == pytest.approx(total[:-1], rel=1e-9)
    assert life_weights(prior)[-1] == 0


@pytest.mark.parametrize("num_slices", [1, 2, 5, 9])
def test_uniform_life_weights_have_their_closed_form(num_slices):
    for bits, weight in enumerate(life_weights(None, num_slices)[:-1]):
        hit = bin(bits).count("1")
        closed = num_slices / ((num_slices - hit) * math.comb(num_slices, hit))
        assert weight == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize("num_slices, requests", [(4, 9), (6, 3), (9, 20)])
def test_uniform_distinct_hits_have_their_closed_form(num_slices, requests):
    chances = np.zeros(num_slices + 1)
    chances[0] = 1.0
    for _ in range(requests):
        chances = [
            chances[d] * d / num_slices + (chances[d - 1] * (num_slices - d + 1) / num_slices if d else 0)
            for d in range(num_slices + 1)
        ]
    found = np.zeros(num_slices + 1)
    for bits, weight in enumerate(weights_after(None, requests, num_slices)):
        found[bin(bits).count("1")] += weight
    assert found == pytest.approx(chances, abs=1e-12)


@pytest.mark.parametrize("num_slices", [0, 17, True, 4.0])
def test_the_lattice_has_a_limit(num_slices):
    with pytest.raises(ValueError, match="must be an integer from 1 to 16"):
        life_weights(None, num_slices)
    with pytest.raises(ValueError, match="must be an integer from 1 to 16"):
        weights_after(None, 3, num_slices)


@pytest.mark.parametrize("requests", [-1, 0.5, True, 10**7])
def test_an_impossible_number_of_requests_is_refused(requests):
    with pytest.raises(ValueError, match="requests must be an integer"):
        weights_after([0.5, 0.5], requests)
    with pytest.raises(ValueError, match="requests must be an integer from 1"):
        weights_over([0.5, 0.5], 0)


def test_a_slice_that_lives_for_ever_is_refused():
    for measure in (Lattice, Streams, life_weights):
        with pytest.raises(ValueError, match="No slice may have the chance 0"):
            measure([0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    "prior, message",
    [
        ([0.5, 0.6], "must be non-negative and sum to 1"),
        ([1.5, -0.5], "must be non-negative and sum to 1"),
        ([math.nan, 1.0], "must be non-negative and sum to 1"),
        ([1.0], "must have one number per slice, 2"),
        ([[0.5, 0.5]], "must have one number per slice, 2"),
    ],
)
def test_an_impossible_prior_is_refused(prior, message):
    with pytest.raises(ValueError, match=message):
        checked_prior(prior, 2)


@pytest.mark.parametrize(
    "performance, message",
    [
        ([1.0], "must be 2 numbers"),
        ([0.0, 1.0, 2.0], "must be 2 numbers"),
        ([0.9, 0.7], "must not fall"),
        ([-0.1, 0.7], "must not fall from 0 on"),
        ([math.nan, 1.0], "must not fall"),
        ([0.0, math.inf], "must not fall"),
    ],
)
def test_an_impossible_performance_is_refused(performance, message):
    with pytest.raises(ValueError, match=message):
        checked_performance(performance, 2)


# Values


@every_prior
@pytest.mark.parametrize("performance", [None, [0.7, 0.8, 0.85, 0.9], [0, 0, 0, 1]])
def test_a_value_is_the_sum_over_all_hit_sets(prior, performance):
    curve = [0, *(performance or [1, 2, 3, 4])]
    for requests, weights in ((None, life_weights(prior)), (6, weights_over(prior, 6))):
        measure = Lattice(prior, performance, requests)
        for orders in ([(3, 2, 1, 0)], cyclic(4, 3), [(1, 2), (3,), (0, 3, 1, 2)], random_orders(4, 9, seed=1)):
            expected = sum(weight * curve[best(orders, members(bits))] for bits, weight in enumerate(weights))
            assert measure.value(orders) == pytest.approx(expected, rel=1e-12)


@every_prior
def test_the_mean_over_a_horizon_agrees_with_the_core(prior):
    orders = random_orders(4, 3, seed=0)
    mean = statistics.mean(expected_surviving_prefix(orders, r, prior) for r in range(1, 10))
    assert Lattice(prior, requests=9).value(orders) == pytest.approx(mean, rel=1e-12)


@every_prior
def test_one_sequence_has_its_closed_form(prior):
    order, curve = (2, 3, 0, 1), [0.7, 0.8, 0.85, 0.9]
    inside = list(itertools.accumulate(prior[j] for j in order))
    steps = np.diff([0, *curve])
    life = sum(step / p for step, p in zip(steps, inside, strict=True))
    assert Lattice(prior, curve).value([order]) == pytest.approx(life, rel=1e-12)
    mean = statistics.mean(sum(steps * (1 - np.minimum(inside, 1)) ** r) for r in range(1, 8))
    assert Lattice(prior, curve, 7).value([order]) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("num_slices", [1, 2, 5, 8, 12])
def test_uniform_life_areas_have_their_closed_forms(num_slices):
    measure = Lattice([1 / num_slices] * num_slices)
    one = num_slices * harmonic(num_slices)
    assert measure.value([tuple(range(num_slices))]) == pytest.approx(one, rel=1e-12)
    assert measure.every_order == pytest.approx(num_slices**2, rel=1e-12)


@pytest.mark.parametrize("num_slices", [3, 5, 8])
@pytest.mark.parametrize("requests", [2, 7])
def test_uniform_cyclic_survival_has_its_closed_form(num_slices, requests):
    chances = np.zeros(num_slices + 1)
    for bits, weight in enumerate(weights_after(None, requests, num_slices)):
        chances[bin(bits).count("1")] += weight
    expected = 0.0
    for k, d in itertools.product(range(1, num_slices + 1), range(1, num_slices)):
        terms = (
            (-1) ** (i + 1) * math.comb(d, i) * math.comb(num_slices - i * k - 1, d - 1)
            for i in range(1, d + 1)
            if num_slices - i * k - 1 >= 0
        )
        expected += chances[d] * sum(terms) / math.comb(num_slices - 1, d - 1)
    # At least one request hit something, so d = 0 has no share.
    found = expected_surviving_prefix(cyclic(num_slices, num_slices), requests)
    assert found == pytest.approx(expected, abs=1e-12)
    weights = weights_after(None, requests, num_slices)
    lengths = Lattice([1 / num_slices] * num_slices)
    profile = np.max([lengths.profile(order) for order in cyclic(num_slices, num_slices)], axis=0)[::-1]
    assert float(weights @ profile) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_slices, horizon, cyclic_value, every", [(4, 9, 1.160, 1.233), (6, 15, 1.566, 1.870)])
def test_the_known_values_over_a_horizon(num_slices, horizon, cyclic_value, every):
    measure = Lattice([1 / num_slices] * num_slices, requests=horizon)
    orders = cyclic(num_slices, num_slices)
    assert measure.value(orders) == pytest.approx(cyclic_value, abs=1e-3)
    assert measure.value(prune_orders(orders)) == measure.value(orders)
    assert measure.every_order == pytest.approx(every, abs=1e-3)


@pytest.mark.parametrize(
    "prior, area", [([1 / 8] * 8, 50.952), (zipf(8), 80.33), (two_level(8, 2), 130.365)], ids=["flat", "zipf", "two"]
)
def test_the_known_life_areas_of_cyclic(prior, area):
    assert Lattice(prior).value(cyclic(8, 8)) == pytest.approx(area, abs=1e-3)


# Paths


@every_prior
def test_the_heaviest_order_adds_as_much_as_the_best_of_all_orders(prior):
    measure, there = Lattice(prior, [0.5, 0.6, 0.9, 1.0]), [(0, 1, 2, 3), (3, 1)]
    profile = np.max([measure.profile(order) for order in there], axis=0)
    path = measure.whole(measure.gains(profile))
    gains = {o: measure.value([*there, o]) - measure.value(there) for o in itertools.permutations(range(4))}
    assert path.gain == pytest.approx(max(gains.values()), rel=1e-9)
    assert gains[path.order] == pytest.approx(path.gain, rel=1e-9)


@every_prior
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("limit", [1, 2, 4, 7, 100])
def test_the_best_path_is_the_best_of_all_paths(prior, rate, limit):
    measure, there = Lattice(prior), [(0, 1, 2, 3), (0, 3)]
    profile = np.max([measure.profile(order) for order in there], axis=0)
    nodes = {set_of(order[:k]): order[:k] for order in there for k in range(len(order) + 1)}
    surplus = []
    for node in nodes.values():
        rest = set(range(4)).difference(node)
        for count in range(1, len(rest) + 1):
            for more in itertools.permutations(rest, count):
                order = (*node, *more)
                cost = sum(range(len(node) + 1, len(order) + 1))
                if cost <= limit and set_of(order) not in nodes:
                    surplus.append(measure.value([*there, order]) - measure.value(there) - rate * cost)
    path = measure.path(measure.gains(profile), nodes, rate, limit)
    if not surplus:
        assert path is None
    else:
        assert path.cost <= limit and nodes[set_of(path.order[: path.start])] == path.order[: path.start]
        assert path.gain == pytest.approx(measure.value([*there, path.order]) - measure.value(there), abs=1e-9)
        assert path.gain - rate * path.cost == pytest.approx(max(surplus), abs=1e-9)


# Bounds


def test_the_known_bound():
    assert budget_bound(8, 8) == pytest.approx(52.648, abs=1e-3)


@pytest.mark.parametrize("requests", [None, 6])
def test_no_orders_exceed_the_bound_and_enough_reach_it(requests):
    curve = [0.4, 0.8, 0.9, 1.0]
    measure = Lattice([0.25] * 4, curve, requests)
    everything = list(itertools.permutations(range(4)))
    for budget in (1, 2, 3):
        values = (measure.value(orders) for orders in itertools.combinations(everything, budget))
        assert max(values) <= budget_bound(4, budget, curve, requests) * (1 + 1e-12)
    assert measure.value(everything[:1]) == pytest.approx(budget_bound(4, 1, curve, requests), rel=1e-12)
    assert measure.every_order == pytest.approx(budget_bound(4, 24, curve, requests), rel=1e-12)


@pytest.mark.parametrize("requests", [None, 6])
def test_the_bound_of_a_cost_holds_at_its_ends(requests):
    measure = Lattice([0.2] * 5, None, requests)
    assert cost_bound(5, 15, None, requests) == pytest.approx(measure.value([tuple(range(5))]), rel=1e-12)
    for cost in (5 * 2**4, 10_000):
        assert cost_bound(5, cost, None, requests) == pytest.approx(measure.every_order, rel=1e-12)


# Sampled streams


@pytest.mark.parametrize("prior", [[1 / 8] * 8, zipf(8)], ids=["uniform", "zipf"])
@pytest.mark.parametrize("requests", [None, 20])
@pytest.mark.parametrize("performance", [None, [0.7, 0.75, 0.8, 0.84, 0.87, 0.9, 0.91, 0.92]])
def test_streams_agree_with_the_lattice(prior, requests, performance):
    exact = Lattice(prior, performance, requests)
    for orders in (cyclic(8, 3), random_orders(8, 8, seed=0), [(3, 1), (2, 0, 5)]):
        values = [Streams(prior, performance, requests, seed, 500).value(orders) for seed in range(100, 140)]
        error = statistics.stdev(values) / 40**0.5
        assert statistics.mean(values) == pytest.approx(exact.value(orders), abs=3 * error)
    values = [Streams(prior, performance, requests, seed, 500).every_order for seed in range(100, 140)]
    assert statistics.mean(values) == pytest.approx(
        exact.every_order, abs=3 * statistics.stdev(values) / 40**0.5 + 1e-9
    )


def test_streams_depend_on_the_seed_alone():
    orders = random_orders(20, 4, seed=0)
    first, again, other = (Streams([0.05] * 20, seed=seed).value(orders) for seed in (1, 1, 2))
    assert first == again != other


def test_a_path_over_streams_adds_what_it_says():
    measure, there = Streams(zipf(18)), random_orders(18, 3, seed=0)
    profile = np.max([measure.profile(order) for order in there], axis=0)
    path = measure.whole(profile)
    assert sorted(path.order) == list(range(18)) and path.start == 0
    assert path.gain == pytest.approx(measure.value([*there, path.order]) - measure.value(there), rel=1e-9)
    nodes = {set_of(order[:k]): order[:k] for order in there for k in range(19)}
    short = measure.path(profile, nodes, 0.0, 12)
    assert short.cost <= 12 and short.order[: short.start] in nodes.values()
    assert short.gain == pytest.approx(measure.value([*there, short.order]) - measure.value(there), rel=1e-9)
    assert measure.path(profile, {0: ()}, 0.0, 0) is None
