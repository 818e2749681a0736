"""Closed forms, against the numbers of an independent computation and against exact enumeration of small cases."""

import itertools
import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest

from hf_s3t.plan.life import (
    cyclic_slices_in_use,
    cyclic_survival,
    distinct_hits,
    first_slice_chances,
    lemma_2,
    life_until_all_dead,
    life_until_first_dead,
    place_chances,
    random_survival,
    repair_cost,
    sisa_cost_per_request,
    sisa_slices_in_use,
    uniform_life,
)
from hf_s3t.plan.sequences import (
    cyclic,
    expected_surviving_prefix,
    prune_orders,
    requests_until_dead,
    spaced,
    surviving_length,
)
from hf_s3t.plan.tree import Plan, Stage


def uniform(num_shards, num_slices, budget):
    return [[1 / (num_shards * num_slices)] * min(budget, num_slices)] * num_shards


def enumerated_life(chances, dead):
    """Mean and deviation of the requests until `dead(hit)`, by recursion over all sets of hit first slices."""
    places = [(shard, number) for shard, firsts in enumerate(chances) for number in range(len(firsts))]

    @cache
    def moments(hit):
        if dead(hit):
            return 0.0, 0.0
        out = [(chances[s][n], moments(hit | {(s, n)})) for s, n in places if (s, n) not in hit and chances[s][n]]
        leave = math.fsum(p for p, _ in out)
        mean = (1 + math.fsum(p * m for p, (m, _) in out)) / leave
        following = (1 - leave) * mean + math.fsum(p * m for p, (m, _) in out)
        return mean, (1 + 2 * following + math.fsum(p * s for p, (_, s) in out)) / leave

    mean, square = moments(frozenset())
    return mean, math.sqrt(square - mean**2)


def shards_dead(chances, hit):
    return [all((s, n) in hit for n in range(len(firsts))) for s, firsts in enumerate(chances)]


# Chances of places


def test_a_prior_over_slices_is_shared_by_the_shards():
    assert place_chances(2, 4).tolist() == [[0.125] * 4] * 2
    assert place_chances(2, 2, [1.0, 0.0]).tolist() == [[0.5, 0.0]] * 2
    assert place_chances(2, 2, [[0.1, 0.2], [0.3, 0.4]]).ravel() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-15)
    assert place_chances(1, 2, np.array([0.5, 0.5])).sum() == 1


@pytest.mark.parametrize(
    "prior, message",
    [
        (
            [0.5, 0.5],
            r"must be 3 numbers, one per slice, or 2 lists of them, one per shard, not numbers of shape \(2,\)",
        ),
        ([[0.5], [0.25, 0.25]], "not something else"),
        ("uniform", "not something else"),
        ([[0.5, 0.5, 0.0]], r"not numbers of shape \(1, 3\)"),
        ([0.5, 0.6, 0.1], "non-negative and sum to 1, not .* with the sum 1.2. Divide"),
        ([[0.5, 0.5, 0.0]] * 2, "with the sum 2"),
        ([1.5, -0.5, 0.0], "non-negative"),
        ([math.nan, 0.5, 0.5], "non-negative"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused(prior, message):
    with pytest.raises(ValueError, match=message):
        place_chances(2, 3, prior)


def test_first_slices_are_those_that_can_still_be_served():
    plan = Plan.make_per_shard(3, [[(0, 1, 2), (1, 0)], [(2, 0)]])
    prior = [[0.1, 0.2, 0.1], [0.1, 0.2, 0.3]]
    assert first_slice_chances(plan, prior) == [pytest.approx([0.1, 0.2]), pytest.approx([0.3])]
    left = [Stage(0, (1,)), Stage(1, (2, 0))]  # of shard 1 the parent is gone
    assert first_slice_chances(plan, prior, left) == [pytest.approx([0.2]), []]


# Lifetimes


@pytest.mark.parametrize(
    "m, num_slices, budget, requests",
    [(5, 4, 4, 71.95), (5, 6, 6, 119.8), (5, 4, 1, 45.67), (10, 8, 4, 342.3), (5, 32, 8, 684.6)],
)
def test_the_life_of_a_plan_has_the_known_values(m, num_slices, budget, requests):
    closed, integral = uniform_life(m, num_slices, budget), life_until_all_dead(uniform(m, num_slices, budget))
    assert closed.mean == requests_until_dead(m, num_slices, budget) == pytest.approx(requests, abs=0.051)
    assert integral.mean == pytest.approx(closed.mean, rel=1e-12)
    assert integral.standard_deviation == pytest.approx(closed.standard_deviation, rel=1e-11)


@pytest.mark.parametrize(
    "m, num_slices, budget, requests",
    [(5, 4, 4, 19.3), (5, 6, 6, 38.5)],
)
def test_the_first_shard_is_dead_after_the_known_number_of_requests(m, num_slices, budget, requests):
    assert life_until_first_dead(uniform(m, num_slices, budget)).mean == pytest.approx(requests, abs=0.05)


@pytest.mark.parametrize("num_slices", [1, 4, 20, 1000])
def test_the_first_shard_of_sisa_is_dead_after_as_many_requests_as_slices(num_slices):
    life = life_until_first_dead(uniform(5, num_slices, 1))
    assert life.mean == pytest.approx(num_slices, rel=1e-12)
    # Any request hits a first slice with the chance 1 / L: a geometric number of requests.
    assert life.standard_deviation == pytest.approx(math.sqrt(num_slices * (num_slices - 1)), rel=1e-8, abs=1e-6)


LIVES = [
    [[0.5, 0.25, 0.125]],
    [[0.1, 0.2], [0.3, 0.1], [0.05]],
    [[1 / 12] * 4, [1 / 12] * 4, [1 / 6]],
    [[0.001, 0.4], [0.0005, 0.3]],
    [[1.0]],
]


@pytest.mark.parametrize("chances", LIVES)
@pytest.mark.parametrize("ends, life", [(all, life_until_all_dead), (any, life_until_first_dead)])
def test_lives_equal_their_enumeration(chances, ends, life):
    mean, deviation = enumerated_life(chances, lambda hit: ends(shards_dead(chances, hit)))
    found = life(chances)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.standard_deviation == pytest.approx(deviation, rel=1e-10, abs=1e-6)


def test_lives_at_the_edges():
    assert life_until_all_dead([[], []]) == life_until_first_dead([[0.5], []]) == (0, 0)
    assert life_until_all_dead([[0.5], []]).mean == pytest.approx(2, rel=1e-12)
    assert life_until_all_dead([[0.5], [0.0]]) == life_until_first_dead([[0.5, 0.0]]) == (math.inf, math.inf)
    assert life_until_first_dead([[0.5], [0.0, 0.5]]).mean == pytest.approx(2, rel=1e-12)
    rare = life_until_all_dead([[1e-9, 0.9]])
    assert rare.mean == pytest.approx(1e9, rel=1e-9)


@pytest.mark.parametrize("life", [life_until_all_dead, life_until_first_dead])
@pytest.mark.parametrize(
    "chances, message",
    [
        ([], "There are no shards"),
        ([[0.5], [1.5]], "shard 1 must lie between 0 and 1"),
        ([[math.nan]], "shard 0 must"),
    ],
)
def test_impossible_chances_are_refused(life, chances, message):
    with pytest.raises(ValueError, match=message):
        life(chances)


# What survives


@pytest.mark.parametrize("num_slices, requests, num_shards", [(4, 3, 1), (3, 4, 2), (2, 5, 3), (5, 0, 1)])
def test_distinct_hits_equal_all_streams(num_slices, requests, num_shards):
    expected = [Fraction(0)] * (num_slices + 1)
    for stream in itertools.product(range(num_shards * num_slices), repeat=requests):
        expected[len({place for place in stream if place < num_slices})] += Fraction(
            1, (num_shards * num_slices) ** requests
        )
    assert distinct_hits(num_slices, requests, num_shards) == pytest.approx([float(x) for x in expected], abs=1e-12)


@pytest.mark.parametrize("num_slices", range(1, 9))
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.filterwarnings("ignore:budget=")
def test_cyclic_survival_equals_all_hit_sets(num_slices, rounds):
    orders = cyclic(num_slices, min(rounds * num_slices, math.factorial(num_slices)))
    for distinct in range(num_slices + 1):
        hit_sets = list(itertools.combinations(range(num_slices), distinct))
        best = [max(surviving_length(order, hit) for order in orders) for hit in hit_sets]
        for length in range(1, num_slices + 1):
            share = sum(b >= length for b in best) / len(hit_sets)
            assert cyclic_survival(num_slices, length, distinct) == pytest.approx(share, abs=1e-12)


def test_random_survival_equals_all_pairs_of_orders():
    orders = list(itertools.permutations(range(4)))
    for distinct, length in itertools.product(range(5), range(1, 5)):
        kept = [surviving_length(order, range(distinct)) >= length for order in orders]
        share = sum(a or b for a, b in itertools.product(kept, repeat=2)) / len(orders) ** 2
        assert random_survival(4, length, distinct, budget=2) == pytest.approx(share, abs=1e-12)


def test_lemma_2_overstates_what_survives():
    def shared(num_slices, length, requests, budget):
        hits = enumerate(distinct_hits(num_slices, requests))
        return sum(p * random_survival(num_slices, length, d, budget) for d, p in hits)

    assert lemma_2(4, 1, 3, 4) == pytest.approx(0.888, abs=5e-4)
    assert shared(4, 1, 3, 4) == pytest.approx(0.846, abs=5e-4)
    for length, requests in itertools.product((1, 2, 3, 4), (1, 2, 5, 9)):
        assert lemma_2(4, length, requests, 1) == pytest.approx(shared(4, length, requests, 1), abs=1e-12)
        assert lemma_2(4, length, requests, 4) >= shared(4, length, requests, 4) - 1e-12
    # Cyclic does not always beat random: 8 of the 32 rotations share most of their windows. Of the windows that start
    # at 0..7, the first clear one starts at 0, or follows a hit slice.
    eight, nine = (1 - 8 / 32) ** 6, (1 - 9 / 32) ** 6
    assert eight + 7 * (eight - nine) == pytest.approx(0.46, abs=5e-3)
    assert shared(32, 8, 6, 8) == pytest.approx(0.78, abs=5e-3)


def test_slices_in_use_have_the_known_values():
    known = {1: 19.0, 5: 15.2, 10: 11.4, 20: 6.6, 36: 3.0}
    for requests, in_use in known.items():
        assert cyclic_slices_in_use(5, 4, requests) == pytest.approx(in_use, abs=0.05)
    assert cyclic_slices_in_use(5, 4, 0) == sisa_slices_in_use(5, 4, 0) == 20


@pytest.mark.parametrize("num_shards, num_slices, requests", [(2, 3, 4), (1, 5, 4), (3, 2, 5)])
def test_slices_in_use_equal_all_streams(num_shards, num_slices, requests):
    streams = list(itertools.product(range(num_shards * num_slices), repeat=requests))

    def mean_in_use(orders):
        in_use = 0
        for stream in streams:
            for shard in range(num_shards):
                hit = {place % num_slices for place in stream if place // num_slices == shard}
                in_use += max(surviving_length(order, hit) for order in orders)
        return in_use / len(streams)

    rotations = prune_orders(cyclic(num_slices, num_slices))
    assert cyclic_slices_in_use(num_shards, num_slices, requests) == pytest.approx(mean_in_use(rotations), abs=1e-12)
    one = [tuple(range(num_slices))]
    assert sisa_slices_in_use(num_shards, num_slices, requests) == pytest.approx(mean_in_use(one), abs=1e-12)


def test_slices_in_use_of_one_shard_are_its_expected_surviving_prefix():
    for requests in (1, 4, 9):
        expected = expected_surviving_prefix(cyclic(6, 6), requests)
        assert cyclic_slices_in_use(1, 6, requests) == pytest.approx(expected, abs=1e-12)


# Costs


@pytest.mark.parametrize("num_slices", [1, 2, 4, 7])
def test_sisa_retrains_from_the_hit_slice_on(num_slices):
    costs = [sum(range(first, num_slices + 1)) for first in range(1, num_slices + 1)]
    assert sisa_cost_per_request(num_slices) == pytest.approx(sum(costs) / num_slices, abs=1e-12)


@pytest.mark.parametrize("prior", [None, [0.5, 0.3, 0.2]])
def test_the_cost_of_a_repair_equals_all_hit_sets(prior):
    plan = Plan.make_per_shard(3, [[(0, 1, 2), (1, 2)], [(2, 0), (2, 1)]])
    chances = place_chances(2, 3, prior)
    expected = 0.0
    for hit in itertools.product((False, True), repeat=6):
        # A Poisson number of requests: every place is hit or not, whatever happens to the others.
        p = [-math.expm1(-4 * c) if h else math.exp(-4 * c) for c, h in zip(chances.ravel(), hit, strict=True)]
        missing = plan.affected([divmod(place, 3) for place in range(6) if hit[place]])
        expected += math.prod(p) * sum(stage.depth for stage in missing)
    assert repair_cost(plan, 4, prior) == pytest.approx(expected, abs=1e-12)
    assert repair_cost(plan, 0, prior) == 0
    assert repair_cost(plan, 1e9, [1 / 3] * 3) == plan.cost


@pytest.mark.parametrize("requests", [-1, math.inf, math.nan])
def test_the_cost_of_a_repair_needs_a_number_of_requests(requests):
    with pytest.raises(ValueError, match="requests must be a number from 0 on"):
        repair_cost(Plan.make(1, 2, spaced(2, 1)), requests)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cyclic_survival(4, 0, 1),
        lambda: cyclic_survival(4, 5, 1),
        lambda: cyclic_survival(4, 1, 5),
        lambda: random_survival(4, 1, 1, 0),
        lambda: lemma_2(4, 1, -1, 4),
        lambda: distinct_hits(0, 1),
        lambda: distinct_hits(4, 1.5),
        lambda: uniform_life(0, 4, 4),
        lambda: sisa_slices_in_use(1, 4, -1),
        lambda: sisa_cost_per_request(0),
        lambda: place_chances(0, 4),
    ],
)
def test_numbers_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match="must be an integer from"):
        call()
