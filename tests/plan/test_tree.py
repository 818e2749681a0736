"""The tree of stages, against brute force over all hit sets."""

import itertools
import json
import random
import warnings
from itertools import permutations

import pytest

from brute_force import best, hit_sets
from hf_s3t.plan.sequences import cyclic, random_orders, spaced, training_cost
from hf_s3t.plan.tree import Plan, Stage


def quiet_cyclic(num_slices, budget):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return cyclic(num_slices, budget)


def stages(*names):
    return [Stage.from_name(f"shard-{name}") for name in names]


def names(some_stages):
    return [stage.name.removeprefix("shard-") for stage in some_stages]


ORDERS = {
    "all 4": list(permutations(range(4))),
    "spaced 5, 2": spaced(5, 2),
    "random 5, 17": random_orders(5, 17, seed=1),
    "truncated": [(3, 1), (0,), (1, 3, 0), (0, 3, 1, 4), (3, 1, 0), (4, 2)],
    "one": [(0,)],
}


# Stage


def test_a_stage_knows_its_path_and_its_slices():
    stage = Stage(3, (2, 0, 11))
    assert (stage.name, stage.depth) == ("shard-03/2-0-11", 3)
    assert stage.parent == Stage(3, (2, 0))
    assert stage.path == (Stage(3, (2,)), Stage(3, (2, 0)), stage)
    assert stage.slices == {(3, 2), (3, 0), (3, 11)}
    assert Stage(3, (2,)).parent is None


def test_stages_sort_by_shard_and_prefix():
    assert names(sorted(stages("10/0", "02/1", "02/0-1", "02/0"))) == ["02/0", "02/0-1", "02/1", "10/0"]


def test_names_round_trip():
    for shard, prefix in itertools.product((0, 7, 10, 100, 99999), [(0,), (2, 0, 3), (999, 10, 1)]):
        stage = Stage(shard, prefix)
        assert Stage.from_name(stage.name) == stage
        assert names([stage])[0].split("/")[0] == f"{shard:02d}"


BAD_NAMES = [
    "",
    "shard-00/",
    "shard-007/1",
    "shard-00/01",
    "shard-00/1-",
    "shard-00/1-1",
    "shard-00/1,2",
    "shard-00/1\n",
    " shard-00/1",
    "shard-00/../../etc",
    "/shard-00/1",
    "shard-٠٠/1",
    "shard-00/99999",
    "shard-00/" + "9" * 10_000,
    "shard-" + "1" * 10_000 + "/0",
    None,
    b"shard-00/1",
]


def test_a_name_that_would_not_round_trip_is_refused():
    for name in BAD_NAMES:
        with pytest.raises(ValueError, match="is not the name of a stage|There is no stage"):
            Stage.from_name(name)


def test_an_impossible_stage_is_refused():
    for shard, prefix in [(0, ()), (-1, (0,)), (0, (1, -1)), (0, (2, 0, 2))]:
        with pytest.raises(ValueError, match="There is no stage of shard"):
            Stage(shard, prefix)


# The tree


def test_training_order_is_shard_by_shard_and_sequence_by_sequence():
    plan = Plan.make(2, 3, [(0, 1, 2), (2, 0, 1), (0, 2)], prune=False)
    shard = ["0", "0-1", "0-1-2", "2", "2-0", "2-0-1", "0-2"]
    assert names(plan.stages) == [f"00/{prefix}" for prefix in shard] + [f"01/{prefix}" for prefix in shard]
    assert plan.stages is plan.stages


def test_every_stage_is_there_once_and_after_its_parent():
    for orders in ORDERS.values():
        plan = Plan.make(2, 5, orders, prune=False)
        assert len(set(plan.stages)) == len(plan.stages)
        for i, stage in enumerate(plan.stages):
            assert stage.parent is None or stage.parent in plan.stages[:i]
        leaves = {Stage(shard, order) for shard, kept in enumerate(plan.sequences) for order in kept}
        assert set(plan.stages) == {ancestor for leaf in leaves for ancestor in leaf.path}


def test_pruning_changes_no_best_surviving_length():
    for orders in ORDERS.values():
        whole, pruned = Plan.make(1, 5, orders, prune=False), Plan.make(1, 5, orders)
        assert set(pruned.stages) <= set(whole.stages)
        assert whole.sequences == (tuple(orders),)
        for hit in hit_sets(5):
            lost = [(0, slice_id) for slice_id in hit]
            served = [
                len(plan.served(set(plan.stages).difference(plan.affected(lost))).get(0, ()))
                for plan in (whole, pruned)
            ]
            assert served[0] == served[1] == best(orders, hit)


def test_pruning_leaves_no_leaf_that_an_earlier_order_covers():
    for orders in ORDERS.values():
        (kept,) = Plan.make(1, 5, orders).sequences
        for i, order in enumerate(kept):
            earlier = {frozenset(other[:depth]) for other in kept[:i] for depth in range(1, 6)}
            assert frozenset(order) not in earlier


@pytest.mark.parametrize(
    "num_slices, budget, prune, count, cost",
    [
        (4, 4, False, 16, 40),
        (4, 4, True, 13, 28),
        (6, 6, False, 36, 126),
        (6, 6, True, 31, 96),
        (4, 24, False, 64, 196),
    ],
)
def test_size_and_cost_are_the_known_ones(num_slices, budget, prune, count, cost):
    orders = quiet_cyclic(num_slices, budget)
    assert sorted(orders) == sorted(permutations(range(4))) or budget < 24
    plan = Plan.make(3, num_slices, orders, prune)
    assert (len(plan.stages), plan.cost) == (3 * count, 3 * cost)
    assert plan.cost == sum(stage.depth for stage in plan.stages)


def test_a_stage_costs_one_pass_over_each_of_its_slices():
    plan = Plan.make(1, 3, [(2, 0, 1)])
    assert [stage.depth for stage in plan.stages] == [1, 2, 3]


def test_shards_may_have_orders_of_their_own():
    plan = Plan.make_per_shard(3, [[(0, 1, 2), (1, 0)], [[2, 1]]])
    assert plan == Plan(2, 3, (((0, 1, 2), (1,)), ((2, 1),)))
    assert plan.cost == 1 + 2 + 3 + 1 + 1 + 2
    unpruned = Plan.make_per_shard(3, [[(0, 1, 2), (1, 0)], [[2, 1]]], prune=False)
    assert unpruned.sequences[0] == ((0, 1, 2), (1, 0))
    assert Plan.make_per_shard(4, [cyclic(4, 4)] * 3) == Plan.make(3, 4, cyclic(4, 4))


def test_impossible_numbers_are_refused():
    for number in (0, -1, True, "2", 10**9):
        with pytest.raises(ValueError, match="num_shards must be an integer from 1"):
            Plan.make(number, 2, [(0, 1)])
        with pytest.raises(ValueError, match="num_slices must be an integer from 1"):
            Plan.make(2, number, [(0, 1)])


def test_invalid_orders_are_refused_with_their_shard():
    with pytest.raises(ValueError, match="Shard 1: Order 0, .* names a slice twice"):
        Plan.make_per_shard(3, [[(0, 1)], [(1, 1)]])
    with pytest.raises(ValueError, match="Shard 0: Order 0 is 0. Give a list of lists"):
        Plan.make_per_shard(3, [[0, 1, 2]])
    with pytest.raises(ValueError, match="num_shards=2, but orders are given for 1 shards"):
        Plan(2, 3, (((0, 1),),))


# Deletion


def test_affected_is_every_stage_that_trained_on_a_hit_slice():
    for orders in ORDERS.values():
        plan = Plan.make(2, 5, orders)
        pairs = list(itertools.product(range(2), range(5)))
        for size in range(3):
            for hit in itertools.combinations(pairs, size):
                by_hand = [s for s in plan.stages if any(s.shard == shard and j in s.prefix for shard, j in hit)]
                assert list(plan.affected(iter(hit))) == by_hand


def test_a_slice_that_does_not_exist_is_refused():
    for pair in [(2, 0), (-1, 0), (0, 4), (0, -1)]:
        with pytest.raises(
            ValueError, match=f"There is no slice {pair[1]} of shard {pair[0]}: the plan has 2 shards of 4"
        ):
            Plan.make(2, 4, cyclic(4, 4)).affected([(0, 0), pair])


def test_what_a_deletion_leaves_stays_live():
    plan = Plan.make(2, 4, cyclic(4, 4))
    for pair in itertools.product(range(2), range(4)):
        left = set(plan.stages).difference(plan.affected([pair]))
        assert set(plan.live(left)) == left
        assert set(plan.missing(left)) == set(plan.affected([pair]))


# What is trained


def test_a_stage_lives_only_with_all_its_parents():
    plan = Plan.make(1, 3, cyclic(3, 3), prune=False)
    trained = stages("00/0-1-2", "00/1-2-0", "00/0", "00/1-2", "00/2")
    assert names(plan.live(trained)) == ["00/0", "00/2"]
    assert names(plan.missing(trained)) == ["00/0-1", "00/0-1-2", "00/1", "00/1-2", "00/1-2-0", "00/2-0", "00/2-0-1"]


def test_stages_of_an_older_plan_still_live_after_the_plans_own():
    plan = Plan.make(2, 3, [(1, 2, 0)])
    old = stages("01/0", "00/2-1", "00/2", "00/1-0", "01/2-0")
    assert names(plan.live([*old, *plan.stages[:2]])) == ["00/1", "00/1-2", "00/1-0", "00/2", "00/2-1", "01/0"]
    assert names(plan.missing([*old, *plan.stages[:2]])) == ["00/1-2-0", "01/1", "01/1-2", "01/1-2-0"]


def test_nothing_is_missing_once_everything_is_trained():
    plan = Plan.make(2, 4, cyclic(4, 4))
    assert plan.missing(plan.stages) == ()
    assert plan.missing([]) == plan.live(reversed(plan.stages)) == plan.stages


def test_served_is_the_longest_live_prefix():
    plan = Plan.make(3, 3, cyclic(3, 3))
    trained = stages("00/0", "00/1", "00/1-2", "02/2", "02/2-0", "02/0-1-2")
    assert plan.served(trained) == {0: (1, 2), 2: (2, 0)}
    assert plan.served([]) == {}
    assert plan.served(plan.stages) == {shard: (0, 1, 2) for shard in range(3)}


def test_ties_go_to_the_sequence_that_the_plan_names_first():
    for orders in ([(0, 1), (1, 2), (2, 0)], [(2, 0), (1, 2), (0, 1)]):
        plan = Plan.make(1, 3, orders)
        trained = [*plan.stages, *stages("00/0-2", "00/2-1")]
        for some_order in (trained, trained[::-1], sorted(trained)):
            assert plan.served(some_order) == {0: orders[0]}
            assert plan.surviving(some_order) == {0: (*orders, (0, 2), (2, 1))}
        # A shorter prefix in the plan gives way to a longer one outside it.
        assert Plan.make(1, 3, [orders[0][:1]]).served(trained) == {0: min(o for o in [*orders, (0, 2), (2, 1)])}


def test_surviving_names_every_maximal_live_prefix_longest_first():
    plan = Plan.make(2, 4, [(0, 1), (2, 3, 1), (0, 2, 3)], prune=False)
    trained = [*stages("01/3", "00/1"), *plan.stages[: len(plan.stages) // 2]]
    assert list(plan.surviving([*stages("00/0"), *plan.stages[len(plan.stages) // 2 :]])) == [0, 1]
    assert plan.surviving(trained) == {0: ((2, 3, 1), (0, 2, 3), (0, 1), (1,)), 1: ((3,),)}


def test_served_is_the_first_of_the_surviving():
    for orders in ORDERS.values():
        plan, rng = Plan.make(2, 5, orders, prune=False), random.Random(0)
        for _ in range(50):
            trained = rng.sample(plan.stages, rng.randint(0, len(plan.stages)))
            surviving = plan.surviving(trained)
            assert plan.served(trained) == {shard: prefixes[0] for shard, prefixes in surviving.items()}
            live = set(plan.live(trained))
            assert {s for shard, prefixes in surviving.items() for p in prefixes for s in Stage(shard, p).path} == live


# The manifest


def test_a_plan_round_trips_through_json():
    for orders in ORDERS.values():
        plan = Plan.make(2, 5, orders, prune=False)
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        assert hash(Plan.from_json(plan.to_json())) == hash(plan)
        assert plan.cost == 2 * training_cost(plan.sequences[0])


def test_a_manifest_without_a_plan_is_refused():
    for data in (None, [], "plan", {}, {"num_shards": 1, "num_slices": 1}):
        with pytest.raises(ValueError, match="A plan must be a dict with exactly"):
            Plan.from_json(data)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extra": 1}, "A plan must be a dict with exactly"),
        ({"num_shards": 2}, "num_shards=2, but orders are given for 1 shards"),
        ({"num_shards": 10**30}, "num_shards must be an integer"),
        ({"num_shards": True}, "num_shards must be an integer"),
        ({"num_slices": 10**30}, "num_slices must be an integer"),
        ({"num_slices": 1}, "order 0 must be an integer from 0 to 0, not 1"),
        ({"sequences": {"0": [[0]]}}, "sequences must be lists of orders"),
        ({"sequences": [{"0": 1}]}, "sequences must be lists of orders"),
        ({"sequences": [[]]}, "Shard 0: The list of orders is empty"),
        ({"sequences": [["01"]]}, "Order 0 is '01'"),
        ({"sequences": [[0, 1]]}, "Order 0 is 0"),
        ({"sequences": [[[0, 2]]]}, "order 0 must be an integer from 0 to 1, not 2"),
        ({"sequences": [[[0], [-1]]]}, "order 1 must be an integer from 0 to 1, not -1"),
        ({"sequences": [[[0.0]]]}, "must be an integer"),
        ({"sequences": [[[0, 0]]]}, "names a slice twice"),
        ({"sequences": [[[0], [0]]]}, "is the same as order 0"),
    ],
)
def test_a_hostile_plan_is_refused(change, message):
    good = {"num_shards": 1, "num_slices": 2, "sequences": [[[0, 1]]]}
    assert Plan.from_json(good).cost == 3
    with pytest.raises(ValueError, match=message):
        Plan.from_json({**good, **change})
