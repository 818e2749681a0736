"""Repairs for a cost, against every way to spend it, repairs in plan order, and what is alive."""

import functools
import itertools

import pytest

from hf_s3t.plan.repair import best_repair
from hf_s3t.plan.sequences import prune_orders, spaced, training_cost
from hf_s3t.plan.streams import Streams
from hf_s3t.plan.survival import Lattice
from hf_s3t.plan.tree import Plan

SKEWED = [0.5, 0.3, 0.2]


def stages(orders):
    return {order[:depth] for order in orders for depth in range(1, len(order) + 1)}


def measured(prior, num_slices):
    return Lattice(prior or [1 / num_slices] * num_slices, uniform_share=0.5 if prior else 0.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A part of the searches, which suffices for so few slices."""
    for measure in (Lattice, Streams):
        effort = measure.effort.fget
        monkeypatch.setattr(measure, "effort", property(lambda self, effort=effort: effort(self) // 60))


def worth(measure, repair):
    return sum(measure.value(orders) for orders in repair)


def new_cost(alive, repair):
    return sum(map(training_cost, repair)) - sum(map(training_cost, alive))


@functools.cache
def best_by_cost(alive, prior):
    """For every cost the value of the best tree of three slices with what is alive: by all sets of further stages."""
    measure, held = measured(prior, 3), stages(alive)
    free = [o for k in (1, 2, 3) for o in itertools.permutations(range(3), k) if o not in held]
    found = {0: measure.value(alive)}
    for chosen in itertools.product((False, True), repeat=len(free)):
        new = list(itertools.compress(free, chosen))
        cost = sum(map(len, new))
        if cost <= 14 and all(len(o) == 1 or o[:-1] in held or o[:-1] in new for o in new):
            found[cost] = max(found.get(cost, 0.0), measure.value([*held, *new]))
    return found


DAMAGED = [
    ((), ()),
    ((), ((0, 1),)),
    (((0, 1, 2), (1, 2), (2,)), ((1,),)),
    (((2, 1), (0,)), ((0, 1), (1, 0))),
]


@pytest.mark.brief("(2, 7, 9)-skewed-alive2", "(2, 7, 9)-uniform-alive0")
@pytest.mark.parametrize("alive", DAMAGED)
@pytest.mark.parametrize("prior", [None, SKEWED], ids=["uniform", "skewed"])
@pytest.mark.parametrize("budgets", [(2, 7, 9), pytest.param(range(1, 15), marks=pytest.mark.slow)], ids=str)
def test_a_repair_is_the_best_of_all_ways_to_spend_the_budget(alive, prior, budgets):
    tables = [best_by_cost(a, None if prior is None else tuple(prior)) for a in alive]
    for budget in budgets:
        repair = best_repair(3, alive, budget, prior)
        assert new_cost(alive, repair) <= budget
        pairs = itertools.product(*(table.items() for table in tables))
        best = max(one + other for (a, one), (b, other) in pairs if a + b <= budget)
        assert worth(measured(prior, 3), repair) == pytest.approx(best, rel=1e-9), budget


@pytest.mark.parametrize("alive", DAMAGED)
@pytest.mark.parametrize("budget", [1, 4, 9, 1000])
def test_what_is_alive_comes_first_and_stays_whole(alive, budget):
    repair = best_repair(3, alive, budget)
    for kept, orders in zip(alive, repair, strict=True):
        assert orders[: len(kept)] == kept
    if all(repair):
        assert Plan.make_per_shard(3, repair, prune=False).cost == sum(map(training_cost, repair))


@pytest.mark.brief("hits0-4")
@pytest.mark.parametrize(
    "num_slices, prior", [(4, [0.4, 0.3, 0.2, 0.1]), pytest.param(5, None, marks=pytest.mark.slow)], ids=["4", "5"]
)
@pytest.mark.parametrize("hits", [[(0, 1)], [(0, 0), (1, 2), (1, 3)], [(0, j) for j in range(4)] + [(2, 1)]])
def test_never_below_repairing_the_shards_in_plan_order(num_slices, prior, hits):
    plan = Plan.make(3, num_slices, prune_orders(spaced(num_slices, num_slices)))
    trained = [stage for stage in plan.stages if stage not in plan.affected(hits)]
    left = plan.surviving(trained)
    alive = [left.get(shard, ()) for shard in range(3)]
    missing = plan.missing(trained)
    measure = measured(prior, num_slices)
    for budget in (num_slices, sum(stage.depth for stage in missing)):
        room, done = budget, set(trained)
        for stage in missing:
            if stage.depth <= room and (stage.parent is None or stage.parent in done):
                room -= stage.depth
                done.add(stage)
        in_order = sum(measure.value([s.prefix for s in done if s.shard == shard]) for shard in range(3))
        repair = best_repair(num_slices, alive, budget, prior)
        assert new_cost(alive, repair) <= budget
        assert worth(measure, repair) >= in_order * (1 - 1e-12)


def test_dead_shards_come_back_before_whole_ones_grow():
    whole = [(0, 1, 2, 3), (1, 2, 3), (2, 3, 0), (3, 0, 1)]
    repair = best_repair(4, [whole, [], []], cost_budget=20)
    assert repair[0] == tuple(whole)
    assert repair[1] and repair[2] and 18 <= new_cost([whole], repair) <= 20


def test_a_budget_for_everything_reaches_the_value_of_every_order():
    alive = [[], [(2, 1, 0), (1, 2)], [(3,)]]
    measure = measured(None, 4)
    for budget in (3 * 32, 10**6):
        repair = best_repair(4, alive, budget)
        assert new_cost(alive, repair) <= 3 * 32
        assert worth(measure, repair) == pytest.approx(3 * measure.every_order, rel=1e-9)


def test_where_no_path_fits_what_is_alive_is_all_there_is():
    # Every single slice is there, and anything else costs two slice passes or more.
    alive = [[(0, 1), (1, 2), (2, 0)], [(1, 0), (2,), (0, 2)]]
    assert best_repair(3, alive, cost_budget=1) == [tuple(orders) for orders in alive]


def test_the_same_seed_gives_the_same_repair():
    arguments = (5, [[(0, 1)], [], [(4, 2, 1)]], 40)
    assert best_repair(*arguments, seed=2) == best_repair(*arguments, seed=2)


def test_a_performance_that_saturates_prefers_more_short_orders():
    flat = best_repair(3, [[], []], 4, performance=[0.9, 0.95, 1.0])
    assert sorted(map(len, flat)) == [2, 2] and all(len(order) == 1 for orders in flat for order in orders)


@pytest.mark.parametrize("num_slices, cost_budget", [pytest.param(18, 120, marks=pytest.mark.slow), (45, 3500)])
def test_many_slices(num_slices, cost_budget):
    alive = [[], [tuple(range(6))]]
    repair = best_repair(num_slices, alive, cost_budget)
    assert repair[1][0] == tuple(range(6)) and 0 < new_cost(alive, repair) <= cost_budget
    judge = Streams([1 / num_slices] * num_slices, seed=1)
    assert worth(judge, repair) > worth(judge, alive)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"cost_budget": 0}, "cost_budget, in slice passes over all shards, must be an integer from 1"),
        ({"cost_budget": 2.0}, "cost_budget, in slice passes over all shards, must be an integer"),
        ({"num_slices": 0}, "num_slices must be an integer from 1"),
        ({"alive": []}, "alive must be a list with the live prefixes of each shard, not \\[\\]"),
        ({"alive": None}, "alive must be a list"),
        ({"alive": [[(0,)], 3]}, "The live prefixes of shard 1 are 3"),
        ({"alive": [[], [(0, 0)]]}, "Shard 1: Order 0, .* names a slice twice"),
        ({"alive": [[(3,)]]}, "Shard 0: A slice id in order 0 must be an integer from 0 to 2, not 3"),
        ({"prior": [0.5, 0.5]}, "must have one number per slice, 3"),
        ({"performance": [1]}, "must be 3 numbers"),
        ({"seed": -1}, "seed must be an integer from 0"),
    ],
)
def test_impossible_repairs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        best_repair(**{"num_slices": 3, "alive": [[]], "cost_budget": 5} | arguments)
