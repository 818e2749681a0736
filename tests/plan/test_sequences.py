"""Orders and survival, against brute force over all hit sets and against exact numbers computed independently."""

import itertools
import math
import random
import statistics
import warnings
from itertools import permutations

import pytest

from hf_s3t.plan import sequences
from hf_s3t.plan.sequences import (
    cyclic,
    expected_surviving_prefix,
    explicit,
    prune_orders,
    random_orders,
    requests_until_dead,
    select_sequences,
    spaced,
    surviving_length,
    training_cost,
)


def quiet(select, *args):
    """Select more orders than slices without the warning, which has tests of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return select(*args)


def hit_sets(num_slices):
    return [set(c) for size in range(num_slices + 1) for c in itertools.combinations(range(num_slices), size)]


def best(orders, hit):
    return max(surviving_length(order, hit) for order in orders)


def starts(orders):
    return [order[0] for order in orders]


# Selection


def test_cyclic_begins_with_the_rotations():
    assert cyclic(5, 3) == [(0, 1, 2, 3, 4), (1, 2, 3, 4, 0), (2, 3, 4, 0, 1)]
    assert cyclic(1, 1) == [(0,)]


def test_cyclic_goes_on_by_rotating_what_follows_the_first_slice():
    assert quiet(cyclic, 4, 9)[4:] == [(0, 3, 1, 2), (1, 0, 2, 3), (2, 1, 3, 0), (3, 2, 0, 1), (0, 2, 3, 1)]


@pytest.mark.parametrize("num_slices", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("select", [cyclic, spaced, lambda *args: random_orders(*args, seed=3)])
def test_every_budget_up_to_all_orders_gives_distinct_orders(select, num_slices):
    everything = set(permutations(range(num_slices)))
    # Every budget where that is quick; for L = 5 each block boundary and its neighbours.
    budgets = range(1, len(everything) + 1)
    if num_slices == 5:
        budgets = [b for b in budgets if b % 20 in (0, 1, 19) or b <= 11]
    for budget in budgets:
        orders = quiet(select, num_slices, budget)
        assert len(orders) == len(set(orders)) == budget
        assert everything.issuperset(orders)


@pytest.mark.parametrize("select", [cyclic, spaced, lambda *args: random_orders(*args, seed=0)])
@pytest.mark.parametrize(
    "num_slices, budget", [(3, 7), (4, 25), (4, 0), (4, -1), (0, 1), (4, 2.0), (4, True), ("4", 1)]
)
def test_impossible_numbers_are_refused(select, num_slices, budget):
    with pytest.raises(ValueError, match="must be an integer from 1 to"):
        select(num_slices, budget)


def test_a_larger_budget_keeps_the_cyclic_orders_of_a_smaller_one():
    assert quiet(cyclic, 4, 24)[:7] == quiet(cyclic, 4, 7)


@pytest.mark.parametrize("num_slices", [4, 5, 6])
def test_up_to_two_rotations_no_hit_set_is_survived_better(num_slices):
    first, twice = cyclic(num_slices, num_slices), quiet(cyclic, num_slices, 2 * num_slices)
    assert all(best(first, hit) == best(twice, hit) for hit in hit_sets(num_slices))
    more = quiet(cyclic, num_slices, 2 * num_slices + 1)
    assert any(best(first, hit) < best(more, hit) for hit in hit_sets(num_slices))


@pytest.mark.parametrize("select", [cyclic, spaced])
def test_the_warning_says_what_the_extra_sequences_add_and_cost(select):
    with pytest.warns(UserWarning, match=r"add 0\.0 % .* at 1\.90 times .* \(1\.00 times with pruning\)") as caught:
        select(4, 8)
    assert len(caught) == 1
    first, all_orders = cyclic(4, 4), list(permutations(range(4)))
    gain = 100 * (expected_surviving_prefix(all_orders, 4) / expected_surviving_prefix(first, 4) - 1)
    assert gain > 5
    with pytest.warns(UserWarning, match=rf"add {gain:.1f} % .* at 4\.90 times .* \(1\.14 times"):  # 196 / 40, 32 / 28
        select(4, 24)


def test_up_to_one_rotation_nothing_is_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(cyclic(6, 6)) == len(spaced(6, 6)) == len(random_orders(4, 24, seed=0)[:6]) == 6


def test_spaced_starts_lie_as_far_apart_as_they_can():
    assert starts(spaced(32, 4)) == [0, 8, 16, 24]
    assert starts(spaced(5, 2)) == [0, 2]
    assert starts(spaced(5, 4)) == [0, 1, 2, 4]
    assert all(order == tuple((order[0] + i) % 5 for i in range(5)) for order in spaced(5, 4))
    assert all(spaced(length, length) == cyclic(length, length) for length in range(1, 9))
    assert quiet(spaced, 4, 7) == quiet(cyclic, 4, 7)


def test_spaced_keeps_more_than_cyclic_below_a_full_rotation():
    far, near = spaced(32, 4), cyclic(32, 4)
    assert training_cost(far) == training_cost(near)
    assert statistics.mean(best(far, {j}) for j in range(32)) == 27.5
    assert statistics.mean(best(near, {j}) for j in range(32)) == pytest.approx(18.3, abs=0.05)


@pytest.mark.parametrize("num_slices, budget", [(4, 3), (4, 4), (4, 10), (4, 24), (32, 64)])
def test_random_orders_start_with_every_slice_once_a_round(num_slices, budget):
    orders = random_orders(num_slices, budget, seed=7)
    for i in range(0, budget, num_slices):
        round_starts = starts(orders[i : i + num_slices])
        assert len(set(round_starts)) == len(round_starts)
    assert all(sorted(order) == list(range(num_slices)) for order in orders)


def test_random_orders_depend_on_the_seed_alone():
    assert random_orders(6, 8, seed=1) == random_orders(6, 8, seed=1) != random_orders(6, 8, seed=2)
    # On every Python version.
    assert random_orders(4, 4, seed=0) == [(3, 1, 0, 2), (2, 0, 1, 3), (1, 3, 2, 0), (0, 3, 2, 1)]


def test_explicit_orders_may_be_truncated():
    assert explicit([[0, 1, 2], (3,), [0, 1]], 4) == [(0, 1, 2), (3,), (0, 1)]


@pytest.mark.parametrize(
    "orders, message",
    [
        ([], "list of orders is empty"),
        ([[0], []], "Order 1 is empty"),
        ([[0], [1, 2, 1]], r"Order 1, \(1, 2, 1\), names a slice twice"),
        ([[0, 1], [2], (0, 1)], r"Order 2, \(0, 1\), is the same as order 0"),
        ([[0, 4]], "A slice id in order 0 must be an integer from 0 to 3, not 4"),
        ([[-1]], "order 0 must be an integer from 0 to 3, not -1"),
        ([[1], [True]], "order 1 must be an integer from 0 to 3, not True"),
        ([[1.0]], "not 1.0"),
        ([["1"]], "not '1'"),
        ([[[1]]], r"not \[1\]"),
        ([[10**100]], "order 0 must be an integer"),
        ([0, 1], "Order 0 is 0. Give a list of lists"),
        (["01"], "Order 0 is '01'. Give a list of lists"),
    ],
)
def test_invalid_orders_are_refused_with_their_place_and_the_reason(orders, message):
    with pytest.raises(ValueError, match=message):
        explicit(orders, 4)


@pytest.mark.parametrize("num_slices", [0, 1001, 10**100, None, True])
def test_an_impossible_number_of_slices_is_refused(num_slices):
    with pytest.raises(ValueError, match="num_slices must be an integer from 1 to 1000"):
        explicit([[0]], num_slices)


def test_select_sequences_by_name_or_given():
    assert select_sequences("cyclic", 6, 2) == cyclic(6, 2)
    assert select_sequences("spaced", 6, 2) == spaced(6, 2) != cyclic(6, 2)
    assert select_sequences("random", 6, 3, seed=5) == random_orders(6, 3, seed=5)
    assert select_sequences("random", 6, 3) == random_orders(6, 3, seed=0)
    assert select_sequences("spaced", 6) == cyclic(6, 6)
    assert select_sequences([[1, 0], [2]], 3) == select_sequences([[1, 0], [2]], 3, budget=2) == [(1, 0), (2,)]


def test_select_sequences_refuses_a_budget_that_does_not_fit_the_orders():
    with pytest.raises(ValueError, match="budget=3, but 2 orders are given"):
        select_sequences([[1, 0], [2]], 3, budget=3)
    with pytest.raises(ValueError, match="Order 1 is empty"):
        select_sequences([[1, 0], []], 3)


@pytest.mark.parametrize("selection", ["bms", "optimal", "Cyclic", ""])
def test_an_unknown_selection_names_what_there_is(selection):
    with pytest.raises(ValueError, match="Use 'cyclic', 'spaced', 'random' or explicit orders"):
        select_sequences(selection, 4)


# Pruning and cost


@pytest.mark.parametrize("num_slices, saved", [(4, 30), (6, 24), (8, 19), (12, 14)])
def test_pruning_a_full_rotation_saves_what_it_should(num_slices, saved):
    orders = cyclic(num_slices, num_slices)
    cost, pruned = training_cost(orders), training_cost(prune_orders(orders))
    assert cost == num_slices * num_slices * (num_slices + 1) // 2
    assert round(100 * (1 - pruned / cost)) == saved


def test_pruning_cuts_tails_only_and_drops_what_vanishes():
    orders = [(0, 1, 2, 3), (1, 0, 3, 2), (1, 0, 2, 3), (3, 2), (2, 3), (1, 0)]
    assert prune_orders(orders) == [(0, 1, 2, 3), (1, 0, 3), (3, 2), (2,)]


def test_pruning_keeps_a_shared_set_that_a_new_one_follows():
    assert prune_orders([(0, 1), (1, 0, 2)]) == [(0, 1), (1, 0, 2)]
    assert prune_orders([(0, 1), (0, 1, 2)]) == [(0, 1), (0, 1, 2)]


def test_training_cost_counts_a_shared_prefix_once():
    assert training_cost([(0, 1, 2), (0, 1, 3), (0, 1)]) == 1 + 2 + 3 + 3
    assert training_cost(permutations(range(4))) == 196


# Survival


@pytest.mark.parametrize("hit, length", [((), 4), ((1,), 3), ((3,), 2), ((0, 1), 1), ((2,), 0), ((0, 1, 2, 3), 0)])
def test_surviving_length_ends_before_the_first_hit(hit, length):
    assert surviving_length((2, 0, 3, 1), hit) == length


def brute_force_expectation(orders, requests, prior):
    streams = itertools.product(range(len(prior)), repeat=requests)
    return sum(math.prod(prior[j] for j in stream) * best(orders, set(stream)) for stream in streams)


@pytest.mark.parametrize("requests", [0, 1, 2, 5])
@pytest.mark.parametrize("prior", [(0.4, 0.3, 0.2, 0.1), (0.25,) * 4, (0.0, 0.5, 0.0, 0.5)])
def test_expected_surviving_prefix_equals_all_streams(requests, prior):
    for orders in ([(3, 2, 1, 0)], cyclic(4, 3), [(1, 2), (3,), (0, 3, 1, 2)]):
        expected = brute_force_expectation(orders, requests, prior)
        assert expected_surviving_prefix(orders, requests, prior) == pytest.approx(expected, abs=1e-12)


def test_without_a_prior_all_slices_are_equally_likely():
    orders = [(1,), (2, 0)]
    assert expected_surviving_prefix(orders, 2) == pytest.approx(brute_force_expectation(orders, 2, (1 / 3,) * 3))


@pytest.mark.parametrize(
    "num_slices, horizon, budget, value", [(4, 9, 4, 1.160), (6, 15, 6, 1.566), (4, 9, 24, 1.233)]
)
def test_expected_surviving_prefix_of_cyclic_has_the_known_values(num_slices, horizon, budget, value):
    orders = quiet(cyclic, num_slices, budget)
    for kept in (orders, prune_orders(orders)):
        mean = statistics.mean(expected_surviving_prefix(kept, requests) for requests in range(1, horizon + 1))
        assert mean == pytest.approx(value, abs=5e-4)


def test_all_orders_survive_the_untouched_slices():
    # With every order there, the best surviving prefix is all of the untouched slices.
    expected = 6 * (5 / 6) ** 7
    assert expected_surviving_prefix(permutations(range(6)), 7) == pytest.approx(expected)


def test_many_slices_are_sampled(monkeypatch):
    # One deletion: 27.5 slices on average, with a deviation of sqrt((8^2 - 1) / 12) over the streams.
    assert expected_surviving_prefix(spaced(32, 4), 1) == pytest.approx(27.5, abs=3 * 2.29 / 20_000**0.5)
    orders, prior = random_orders(8, 5, seed=0), [j / 36 for j in range(1, 9)]
    exact = expected_surviving_prefix(orders, 6, prior)
    monkeypatch.setattr(sequences, "EXACT_SLICES", 7)
    sampled = expected_surviving_prefix(orders, 6, prior)
    assert sampled != exact and sampled == pytest.approx(exact, abs=0.03)
    assert sampled == expected_surviving_prefix(orders, 6, prior)


@pytest.mark.parametrize(
    "orders, requests, prior, message",
    [
        ([(0, 1)], -1, None, "requests must be an integer"),
        ([(0, 1)], 1, (0.5, 0.6), "sum to 1"),
        ([(0, 1)], 1, (1.5, -0.5), "non-negative"),
        ([(0, 1)], 1, (math.nan, 1.0), "non-negative"),
        ([(0, 2)], 1, (0.5, 0.5), "order 0 must be an integer from 0 to 1, not 2"),
        ([], 1, None, "list of orders is empty"),
    ],
)
def test_expected_surviving_prefix_refuses_bad_input(orders, requests, prior, message):
    with pytest.raises(ValueError, match=message):
        expected_surviving_prefix(orders, requests, prior)


@pytest.mark.parametrize(
    "m, num_slices, budget, requests",
    [(5, 4, 4, 71.95), (5, 6, 6, 119.8), (5, 4, 1, 45.67), (10, 8, 4, 342.3), (5, 32, 8, 684.6), (5, 4, 9, 71.95)],
)
def test_requests_until_dead_has_the_known_values(m, num_slices, budget, requests):
    assert requests_until_dead(m, num_slices, budget) == pytest.approx(requests, rel=1e-4, abs=0.05)


def test_requests_until_dead_equals_its_own_simulation():
    rng, streams = random.Random(0), []
    for _ in range(4000):
        waiting, count = {(0, 0), (0, 1), (1, 0), (1, 1)}, 0  # the first slices of 2 shards with 2 of 3 rotations
        while waiting:
            waiting.discard((rng.randrange(2), rng.randrange(3)))
            count += 1
        streams.append(count)
    error = statistics.stdev(streams) / len(streams) ** 0.5
    assert statistics.mean(streams) == pytest.approx(requests_until_dead(2, 3, 2), abs=3 * error)


@pytest.mark.parametrize("numbers", [(0, 4, 4), (5, 0, 4), (5, 4, 0), (5, 4, None)])
def test_requests_until_dead_refuses_impossible_numbers(numbers):
    with pytest.raises(ValueError, match="must be an integer from 1"):
        requests_until_dead(*numbers)
