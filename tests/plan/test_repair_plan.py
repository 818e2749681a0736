"""Repairs for a cost, against every way to spend it, repairs in plan order, and what is alive."""

import itertools
from functools import cache

import pytest

from brute_force import cost, damaged, every_tree, life_area, zipf
from hf_s3t.plan.optimal import lattice_of
from hf_s3t.plan.repair import best_repair
from hf_s3t.plan.sequences import prune_orders, spaced
from hf_s3t.plan.tree import Plan

DAMAGED = [
    [[], []],
    [[], [(0, 1)]],
    [[(0, 1, 2), (1, 2), (2,)], [(1,)]],
    [[(2, 1), (0,)], [(0, 1), (1, 0)]],
]


def new_cost(alive, repair):
    return sum(map(cost, repair)) - sum(map(cost, alive))


@cache
def best_by_cost(alive):
    """For every cost the value of the best tree of three slices with what is alive, uniform."""
    found = {}
    for tree in every_tree(3, alive, most=12):
        spent = cost(tree) - cost(alive)
        found[spent] = max(found.get(spent, 0.0), life_area(tree, [1 / 3] * 3))
    return found


@pytest.mark.parametrize("alive", DAMAGED)
def test_a_repair_is_near_the_best_of_all_ways_to_spend_the_budget(alive):
    tables = [best_by_cost(tuple(one)) for one in alive]
    for budget in range(1, 13):
        repair = best_repair(3, alive, budget)
        assert new_cost(alive, repair) <= budget
        for kept, orders in zip(alive, repair, strict=True):
            assert list(orders[: len(kept)]) == kept, "what is alive comes first and stays whole"
        pairs = itertools.product(*(table.items() for table in tables))
        highest = max(one + other for (a, one), (b, other) in pairs if a + b <= budget)
        assert sum(life_area(orders, [1 / 3] * 3) for orders in repair) >= 0.98 * highest, budget


@pytest.mark.parametrize("num_slices, prior", [(4, zipf(4)), (5, None), (8, None)])
def test_never_below_repairing_the_shards_in_plan_order(num_slices, prior):
    lattice = lattice_of(prior, num_slices)
    plan = Plan.make(3, num_slices, prune_orders(spaced(num_slices, num_slices)))
    for hits in (2, 6):
        alive = damaged(num_slices, 3, hits, seed=hits)
        live = {stage for stage in plan.stages for order in alive[stage.shard] if order[: stage.depth] == stage.prefix}
        missing = plan.missing(live)
        budget = sum(stage.depth for stage in missing) // 2
        repair, spent, in_order = best_repair(num_slices, alive, budget, prior), 0, [list(one) for one in alive]
        for stage in missing:
            spent += stage.depth
            if spent <= budget:
                in_order[stage.shard].append(stage.prefix)
        assert new_cost(alive, repair) <= budget
        assert sum(map(lattice.value, repair)) > sum(map(lattice.value, in_order))


def test_enough_money_buys_every_set_and_no_more():
    repair = best_repair(3, [[(0, 1, 2), (1, 2), (2,)], []], 1000)
    assert [life_area(orders, [1 / 3] * 3) for orders in repair] == pytest.approx([9, 9])
    assert cost(repair[1]) == 3 * 2**2
    assert Plan.make_per_shard(3, repair, prune=False).cost == sum(map(cost, repair))


def test_money_goes_to_the_shard_that_lost_more():
    dead, whole = [], [(0, 1, 2, 3), (1, 2, 3), (2, 3, 0), (3, 0, 1)]
    repair = best_repair(4, [whole, dead], 8)
    assert list(repair[0]) == whole and cost(repair[1]) == 8


def test_shards_that_are_alike_get_alike_and_the_same_question_has_the_same_answer():
    repair = best_repair(3, [[], [], []], 9)
    assert len(set(repair)) == 1 and repair == best_repair(3, [[], [], []], 9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"cost_budget": 0}, "cost_budget, in slice passes over all shards, must be an integer from 1"),
        ({"num_slices": 0}, "num_slices must be an integer from 1"),
        ({"num_slices": 17}, "num_slices=17, but .* up to 16 slices"),
        ({"alive": []}, r"alive must be a list with the live prefixes of each shard, not \[\]"),
        ({"alive": [[], [(0, 0)]]}, "Of what is alive in shard 1: Order 0, .* names a slice twice"),
        ({"prior": [0.5, 0.5]}, "must have one number per slice, 3"),
    ],
)
def test_impossible_repairs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        best_repair(**{"num_slices": 3, "alive": [[]], "cost_budget": 5} | arguments)
