"""How long plans last: against enumeration of small cases, known numbers and closed forms."""

import math
from functools import cache

import pytest

from hf_s3t.plan.life import first_slice_chances, life_left, life_until_all_dead, life_until_first_dead
from hf_s3t.plan.sequences import cyclic, spaced
from hf_s3t.plan.tree import Plan, Stage


def enumerated_life(chances, ends):
    """Mean and deviation of the requests until `ends(shards dead)`, by recursion over all sets of hit first slices."""
    places = [(shard, number) for shard, firsts in enumerate(chances) for number in range(len(firsts))]

    @cache
    def moments(hit):
        if ends([all((s, n) in hit for n in range(len(firsts))) for s, firsts in enumerate(chances)]):
            return 0.0, 0.0
        out = [(chances[s][n], moments(hit | {(s, n)})) for s, n in places if (s, n) not in hit and chances[s][n]]
        leave = math.fsum(p for p, _ in out)
        mean = (1 + math.fsum(p * m for p, (m, _) in out)) / leave
        following = (1 - leave) * mean + math.fsum(p * m for p, (m, _) in out)
        return mean, (1 + 2 * following + math.fsum(p * s for p, (_, s) in out)) / leave

    mean, square = moments(frozenset())
    return mean, math.sqrt(square - mean**2)


LIVES = [
    [[0.5, 0.25, 0.125]],
    [[0.1, 0.2], [0.3, 0.1], [0.05]],
    [[1 / 12] * 4, [1 / 12] * 4, [1 / 6]],
    [[0.001, 0.4], [0.0005, 0.3]],
    [[1.0]],
]


@pytest.mark.parametrize("ends, life", [(all, life_until_all_dead), (any, life_until_first_dead)])
def test_lives_equal_their_enumeration(ends, life):
    for chances in LIVES:
        mean, deviation = enumerated_life(chances, ends)
        found = life(chances)
        assert found.mean == pytest.approx(mean, rel=1e-12)
        assert found.standard_deviation == pytest.approx(deviation, rel=1e-10, abs=1e-6)


@pytest.mark.parametrize(
    "m, num_slices, budget, requests",
    [(5, 4, 4, 71.95), (5, 6, 6, 119.8), (5, 4, 1, 45.67), (10, 8, 4, 342.3), (5, 32, 8, 684.6)],
)
def test_all_dead_has_the_known_values_and_is_the_sum_of_waits(m, num_slices, budget, requests):
    """Uniform: `m L H(m B)`, and the variance `sum (1 - p_i) / p_i^2`, `p_i = i / (m L)`."""
    life, places = life_left(Plan.make(m, num_slices, spaced(num_slices, budget))).until_all_dead, m * num_slices
    steps = range(1, m * budget + 1)
    assert life.mean == pytest.approx(requests, abs=0.051)
    assert life.mean == pytest.approx(places * sum(1 / i for i in steps), rel=1e-12)
    variance = sum((1 - i / places) * (places / i) ** 2 for i in steps)
    assert life.standard_deviation == pytest.approx(math.sqrt(variance), rel=1e-10)


def test_the_first_shard_is_dead_after_the_known_number_of_requests():
    for num_slices, requests in ((4, 19.3), (6, 38.5)):
        found = life_left(Plan.make(5, num_slices, cyclic(num_slices, num_slices)))
        assert found.until_first_dead.mean == pytest.approx(requests, abs=0.05)
    for num_slices in (1, 4, 1000):  # with one order any request hits a first slice with the chance 1 / L
        found = life_left(Plan.make(5, num_slices, cyclic(num_slices, 1))).until_first_dead
        assert found.mean == pytest.approx(num_slices, rel=1e-12)
        assert found.standard_deviation == pytest.approx(math.sqrt(num_slices * (num_slices - 1)), rel=1e-8, abs=1e-6)


def test_lives_at_the_edges():
    assert life_until_all_dead([[], []]) == life_until_first_dead([[0.5], []]) == (0, 0)
    assert life_until_all_dead([[0.5], []]).mean == pytest.approx(2, rel=1e-12)
    assert life_until_all_dead([[0.5], [0.0]]) == life_until_first_dead([[0.5, 0.0]]) == (math.inf, math.inf)
    assert life_until_first_dead([[0.5], [0.0, 0.5]]).mean == pytest.approx(2, rel=1e-12)
    assert life_until_all_dead([[1e-9, 0.9]]).mean == pytest.approx(1e9, rel=1e-9)


def test_first_slices_are_those_that_can_still_be_served():
    plan = Plan.make_per_shard(3, [[(0, 1, 2), (1, 0)], [(2, 0)]])
    assert first_slice_chances(plan, [0.2, 0.4, 0.4]) == [pytest.approx([0.1, 0.2]), pytest.approx([0.2])]
    left = [Stage(0, (1,)), Stage(1, (2, 0))]  # of shard 1 the parent is gone
    assert first_slice_chances(plan, [0.2, 0.4, 0.4], left) == [pytest.approx([0.2]), []]
    with pytest.raises(ValueError, match="must have one number per slice, 3"):
        life_left(plan, [0.5, 0.5])
