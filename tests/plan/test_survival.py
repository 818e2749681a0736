"""What plans are worth and their best next path, against every hit set, every order and every path."""

import itertools
import random

import numpy as np
import pytest

from brute_force import FAMILIES, best, cost, hit_sets, life_area, life_weights, stages_of, two_level, uniform, zipf
from hf_s3t.plan import survival
from hf_s3t.plan.sequences import cyclic
from hf_s3t.plan.survival import Lattice, checked_prior, path_cost, set_of, surviving_lengths

every_prior = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def some_plans(num_slices, seed, number=6):
    rng = random.Random(seed)
    every = [o for k in range(1, num_slices + 1) for o in itertools.permutations(range(num_slices), k)]
    return [[], *(rng.sample(every, rng.randint(1, 6)) for _ in range(number))]


@every_prior
def test_hit_sets_last_as_long_as_inclusion_and_exclusion_says(family):
    for num_slices in (1, 2, 3, 5):
        prior = family(num_slices)
        weights = survival.life_weights(prior)
        assert weights[-1] == 0
        for hit, weight in life_weights(prior).items():
            assert weights[set_of(hit)] == pytest.approx(float(weight), rel=1e-12)


def test_surviving_lengths_are_those_of_every_hit_set():
    for orders in some_plans(4, seed=1):
        lengths = surviving_lengths(orders, 4)
        for hit in hit_sets(4):
            assert lengths[15 ^ set_of(hit)] == best(orders, hit)


@every_prior
def test_values_equal_the_sum_over_all_hit_sets(family):
    lattice = Lattice(family(4))
    for orders in some_plans(4, seed=2):
        assert lattice.value(orders) == pytest.approx(life_area(orders, family(4)), rel=1e-12)
    assert lattice.every_order == pytest.approx(life_area(itertools.permutations(range(4)), family(4)))


def test_the_known_life_areas():
    """Computed independently; and closed forms: `L H(L)` for one order, `L^2` for all of them, uniform."""
    assert Lattice(uniform(8)).value(cyclic(8, 8)) == pytest.approx(50.9524, abs=5e-5)
    assert Lattice(zipf(8)).value(cyclic(8, 8)) == pytest.approx(80.3292, abs=5e-5)
    assert Lattice(two_level(8)).value(cyclic(8, 8)) == pytest.approx(130.3649, abs=5e-5)
    assert Lattice(uniform(6)).value(cyclic(6, 6)) == pytest.approx(31.4, abs=1e-9)
    for num_slices in (1, 5, 16):
        lattice = Lattice(uniform(num_slices))
        harmonic = num_slices * sum(1 / k for k in range(1, num_slices + 1))
        assert lattice.value([tuple(range(num_slices))]) == pytest.approx(harmonic)
        assert lattice.every_order == pytest.approx(num_slices**2)


@every_prior
def test_gains_along_a_way_add_up_to_what_the_value_grows_by(family):
    lattice = Lattice(family(4))
    for plan, order in itertools.product(some_plans(4, seed=3), [(2, 0, 3, 1), (1, 3)]):
        gains = lattice.gains(lattice.lengths(plan))
        along = sum(gains[set_of(order[:depth])] for depth in range(1, len(order) + 1))
        assert along == pytest.approx(lattice.value([*plan, order]) - lattice.value(plan), abs=1e-9)


@every_prior
def test_the_best_next_order_is_the_best_of_all_orders(family):
    for num_slices in (3, 4, 5):
        lattice = Lattice(family(num_slices))
        for plan in some_plans(num_slices, seed=4, number=3):
            path = lattice.whole(plan)
            values = [lattice.value([*plan, order]) for order in itertools.permutations(range(num_slices))]
            gain = max(values) - lattice.value(plan)
            assert (path is None) == (gain < 1e-9)
            if path:
                assert lattice.value([*plan, path.order]) == pytest.approx(max(values))
                assert path.gain == pytest.approx(gain) and path.cost == path_cost(0, num_slices)


@every_prior
@pytest.mark.parametrize("dear", [False, True])
def test_the_densest_path_is_the_best_of_all_paths(family, dear):
    """Gain per slice pass, or the gain alone; of every way to go on from a node, within every limit."""
    lattice = Lattice(family(4))
    for plan, limit in itertools.product(some_plans(4, seed=5, number=4), (1, 2, 4, 7, 10)):
        held, value, found = stages_of(plan), lattice.value(plan), [0.0]
        for order in (o for k in range(1, 5) for o in itertools.permutations(range(4), k)):
            spent = cost([*held, order]) - cost(held)
            if order not in held and spent <= limit:
                found.append((lattice.value([*plan, order]) - value) / (1 if dear else spent))
        path = lattice.densest(plan, limit, dear)
        assert (path is None) == (max(found) < 1e-9)
        if path:
            gain = lattice.value([*plan, path.order]) - value
            assert path.gain == pytest.approx(gain) and path.order[: path.start] in {(), *held}
            assert path.cost == cost([*held, path.order]) - cost(held) <= limit
            assert gain / (1 if dear else path.cost) == pytest.approx(max(found))


@pytest.mark.parametrize(
    "prior, message",
    [
        ([0.5, 0.5], "must have one number per slice, 3, not"),
        ([0.5, 0.6, 0.1], "non-negative and sum to 1"),
        ([1.5, -0.5, 0.0], "non-negative"),
        ([float("nan"), 0.5, 0.5], "non-negative"),
    ],
)
def test_a_prior_that_does_not_fit_is_refused(prior, message):
    with pytest.raises(ValueError, match=message):
        checked_prior(prior, 3)


def test_what_cannot_be_enumerated_is_refused():
    with pytest.raises(ValueError, match="would live for ever"):
        Lattice([1.0, 0.0])
    with pytest.raises(ValueError, match='17, but .* up to 16 slices. Give fewer slices, or .* "spaced" or "random"'):
        Lattice(uniform(17))
    assert np.isfinite(Lattice(uniform(16)).every_order)
