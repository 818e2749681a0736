"""Orders, their pruning and their cost."""

import itertools
import math
import statistics
import warnings
from itertools import permutations

import pytest

from brute_force import best, hit_sets
from hf_s3t.plan.sequences import (
    cyclic,
    explicit,
    prune_orders,
    random_orders,
    select_sequences,
    spaced,
    training_cost,
)


def quiet(select, *args):
    """Select more orders than slices without the warning, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return select(*args)


def starts(orders):
    return [order[0] for order in orders]


def test_cyclic_begins_with_the_rotations_and_rotates_what_follows_the_first_slice():
    assert cyclic(5, 3) == [(0, 1, 2, 3, 4), (1, 2, 3, 4, 0), (2, 3, 4, 0, 1)]
    assert quiet(cyclic, 4, 9)[4:] == [(0, 3, 1, 2), (1, 0, 2, 3), (2, 1, 3, 0), (3, 2, 0, 1), (0, 2, 3, 1)]


@pytest.mark.parametrize("select", [cyclic, spaced, lambda *args: random_orders(*args, seed=3)])
def test_every_budget_up_to_all_orders_gives_distinct_orders(select):
    for num_slices in range(1, 5):
        everything = set(permutations(range(num_slices)))
        for budget in range(1, len(everything) + 1):
            orders = quiet(select, num_slices, budget)
            assert len(orders) == len(set(orders)) == budget and everything.issuperset(orders)


@pytest.mark.parametrize("select", [cyclic, spaced, lambda *args: random_orders(*args, seed=0)])
def test_impossible_numbers_are_refused(select):
    for num_slices, budget in [(3, 7), (4, 0), (0, 1), (4, 2.0), (4, True), ("4", 1)]:
        with pytest.raises(ValueError, match="must be an integer from 1 to"):
            select(num_slices, budget)


@pytest.mark.parametrize("num_slices", [4, 5])
def test_up_to_two_rotations_no_hit_set_is_survived_better(num_slices):
    first, twice = cyclic(num_slices, num_slices), quiet(cyclic, num_slices, 2 * num_slices)
    assert all(best(first, hit) == best(twice, hit) for hit in hit_sets(num_slices))
    more = quiet(cyclic, num_slices, 2 * num_slices + 1)
    assert any(best(first, hit) < best(more, hit) for hit in hit_sets(num_slices))


def test_a_warning_says_what_more_rotations_are_worth():
    for select in (cyclic, spaced):
        with pytest.warns(UserWarning, match="rotations beyond 4 add nothing up to 8") as caught:
            select(4, 8)
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(cyclic(6, 6)) == len(spaced(6, 6)) == len(random_orders(4, 24, seed=0)[:6]) == 6


def test_spaced_starts_lie_as_far_apart_as_they_can():
    assert starts(spaced(32, 4)) == [0, 8, 16, 24] and starts(spaced(5, 4)) == [0, 1, 2, 4]
    assert all(order == tuple((order[0] + i) % 5 for i in range(5)) for order in spaced(5, 4))
    assert all(spaced(length, length) == cyclic(length, length) for length in range(1, 9))
    assert statistics.mean(best(spaced(32, 4), {j}) for j in range(32)) == 27.5
    assert statistics.mean(best(cyclic(32, 4), {j}) for j in range(32)) == pytest.approx(18.3, abs=0.05)


def test_random_orders_start_with_every_slice_once_a_round_and_depend_on_the_seed_alone():
    for num_slices, budget in [(4, 3), (4, 24), (32, 64)]:
        orders = random_orders(num_slices, budget, seed=7)
        for i in range(0, budget, num_slices):
            assert len(set(starts(orders[i : i + num_slices]))) == len(orders[i : i + num_slices])
        assert all(sorted(order) == list(range(num_slices)) for order in orders)
    assert random_orders(6, 8, seed=1) == random_orders(6, 8, seed=1) != random_orders(6, 8, seed=2)
    # On every Python version.
    assert random_orders(4, 4, seed=0) == [(3, 1, 0, 2), (2, 0, 1, 3), (1, 3, 2, 0), (0, 3, 2, 1)]


def test_explicit_orders_may_be_truncated():
    assert explicit([[0, 1, 2], (3,), [0, 1]], 4) == [(0, 1, 2), (3,), (0, 1)]
    for num_slices in (0, 1001, None, True):
        with pytest.raises(ValueError, match="num_slices must be an integer from 1 to 1000"):
            explicit([[0]], num_slices)


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
        ([["1"]], "not '1'"),
        ([0, 1], "Order 0 is 0. Give a list of lists"),
        (["01"], "Order 0 is '01'. Give a list of lists"),
    ],
)
def test_invalid_orders_are_refused_with_their_place_and_the_reason(orders, message):
    with pytest.raises(ValueError, match=message):
        explicit(orders, 4)


def test_select_sequences_by_name_or_given():
    assert select_sequences("cyclic", 6, 2) == cyclic(6, 2)
    assert select_sequences("spaced", 6, 2) == spaced(6, 2) != cyclic(6, 2)
    assert select_sequences("random", 6, 3, seed=5) == random_orders(6, 3, seed=5)
    assert select_sequences("spaced", 6) == cyclic(6, 6)
    assert select_sequences([[1, 0], [2]], 3) == select_sequences([[1, 0], [2]], 3, budget=2) == [(1, 0), (2,)]
    with pytest.raises(ValueError, match="budget=3, but 2 orders are given"):
        select_sequences([[1, 0], [2]], 3, budget=3)
    with pytest.raises(ValueError, match="Use 'cyclic', 'spaced', 'random' or explicit orders"):
        select_sequences("Cyclic", 4)


# Pruning and cost


def test_pruning_a_full_rotation_saves_what_it_should():
    for num_slices, saved in [(4, 30), (6, 24), (8, 19), (12, 14)]:
        orders = cyclic(num_slices, num_slices)
        full, pruned = training_cost(orders), training_cost(prune_orders(orders))
        assert full == num_slices * num_slices * (num_slices + 1) // 2
        assert round(100 * (1 - pruned / full)) == saved


def test_pruning_cuts_tails_only_and_drops_what_vanishes():
    orders = [(0, 1, 2, 3), (1, 0, 3, 2), (1, 0, 2, 3), (3, 2), (2, 3), (1, 0)]
    assert prune_orders(orders) == [(0, 1, 2, 3), (1, 0, 3), (3, 2), (2,)]
    assert prune_orders([(0, 1), (1, 0, 2)]) == [(0, 1), (1, 0, 2)]
    assert prune_orders([(0, 1), (0, 1, 2)]) == [(0, 1), (0, 1, 2)]
    assert prune_orders([(1, 0, 2), (2, 1)], beside=[(0, 1), (1, 2)]) == [(1, 0, 2), (2,)]


def test_pruning_changes_no_surviving_length():
    for orders in itertools.permutations([(3, 1, 0), (0,), (1, 3, 0, 2), (0, 3, 1, 2), (2, 0)]):
        pruned = prune_orders(orders)
        assert training_cost(pruned) <= training_cost(orders)
        assert all(best(pruned, hit) == best(orders, hit) for hit in hit_sets(4))


def test_training_cost_counts_a_shared_prefix_once():
    assert training_cost([(0, 1, 2), (0, 1, 3), (0, 1)]) == 1 + 2 + 3 + 3
    assert training_cost(permutations(range(4))) == 196 == sum(math.perm(4, k) * k for k in range(1, 5))
