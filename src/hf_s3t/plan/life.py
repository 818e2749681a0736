"""How long a plan lasts, as formulas: the answers that `planner/simulate.py` estimates, where they are known exactly.

Responsible for chances of places, lifetimes, and what survives of rotations, random orders and SISA; nothing is drawn
here. A request deletes one example, which lies in slice `j` of shard `s` with the chance `p_sj`. A shard is dead once
every slice that starts one of its sequences was hit: nothing of it can be served.

Lifetimes come from a trick: let requests arrive at random moments, one per unit of time on average. The first hits of
different slices are then independent, `P(slice hit by t) = 1 - exp(-p t)`, and so are the shards. The moment `T` of
the `N`-th request has `E[T] = E[N]` and `E[T^2] = E[N^2] + E[N]`, which gives mean and deviation of `N` itself.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .sequences import check_count, requests_until_dead
from .tree import Plan, Stage

Prior = Sequence[float] | Sequence[Sequence[float]] | np.ndarray
"""`L` chances, one per slice (all shards are equally likely), or `m` lists of `L` chances, one per place."""

LOG_STEP = 1 / 16  # of the trapezoidal rule over log(t); exact to 1e-8 up to a thousand shards of 32 first slices
NEVER = 1e-100  # a chance below is that of a slice which is never hit


class Life(NamedTuple):
    """A number of requests: its mean and its standard deviation."""

    mean: float
    standard_deviation: float


def place_chances(num_shards: int, num_slices: int, prior: Prior | None = None) -> np.ndarray:
    """The chance that a request hits each place.

    Args:
        num_shards (`int`): `m`.
        num_slices (`int`): `L`.
        prior (`Prior`, *optional*): One chance per slice, or for each shard one chance per slice. Without it all
            places are equally likely.

    Returns:
        `np.ndarray`: The chances, `(shards, slices)`; their sum is 1. Any other prior is a `ValueError`.

    >>> place_chances(2, 2, [0.75, 0.25])
    array([[0.375, 0.125],
           [0.375, 0.125]])
    """
    check_count("num_shards", num_shards, 1, 10**6)
    check_count("num_slices", num_slices, 1, 10**6)
    places = (num_shards, num_slices)
    if prior is None:
        return np.full(places, 1 / (num_shards * num_slices))
    chances = _numbers(prior)
    if chances is None or chances.shape not in (places, (num_slices,)):
        found = "something else" if chances is None else f"numbers of shape {chances.shape}"
        expected = f"{num_slices} numbers, one per slice, or {num_shards} lists of them, one per shard"
        raise ValueError(f"The prior must be {expected}, not {found}. Correct it.")
    if not (chances >= 0).all() or abs(chances.sum() - 1) > 1e-6:
        found = f"{prior!r:.100} with the sum {chances.sum():.6g}"
        raise ValueError(f"The prior must be non-negative and sum to 1, not {found}. Divide it by its sum.")
    return np.array(np.broadcast_to(chances, places)) / (chances.sum() * (num_shards if chances.ndim == 1 else 1))


def _numbers(prior: Prior) -> np.ndarray | None:
    try:
        return np.asarray(prior, dtype=float)
    except (TypeError, ValueError):  # lists of different lengths, or not numbers
        return None


def first_slice_chances(
    plan: Plan, prior: Prior | None = None, trained: Iterable[Stage] | None = None
) -> list[list[float]]:
    """For every shard the chance that a request hits each slice that starts one of its sequences.

    Args:
        plan (`Plan`): The plan.
        prior (`Prior`, *optional*): See [`place_chances`].
        trained (`Iterable[Stage]`, *optional*): What the store holds; without it the whole plan.

    Returns:
        `list[list[float]]`: What [`life_until_all_dead`] and [`life_until_first_dead`] take. Shards of which nothing
        is left have an empty list.

    >>> first_slice_chances(Plan.make(1, 4, [(0, 1), (2, 3)]))
    [[0.25, 0.25]]
    """
    chances = place_chances(plan.num_shards, plan.num_slices, prior)
    live = plan.stages if trained is None else plan.live(trained)
    firsts: list[list[float]] = [[] for _ in range(plan.num_shards)]
    for stage in live:
        if stage.depth == 1:
            firsts[stage.shard].append(float(chances[stage.shard, stage.prefix[0]]))
    return firsts


def life_until_all_dead(chances: Sequence[Sequence[float]]) -> Life:
    """Requests until no stage of any shard is left: `integral over t of 1 - prod (1 - exp(-p t))`.

    Args:
        chances (`Sequence[Sequence[float]]`): For every shard the chance that a request hits each of its first
            slices, from [`first_slice_chances`].

    Returns:
        `Life`: Mean and standard deviation, both infinite where a first slice is never hit (a chance below 1e-100). A
        chance outside 0 to 1 is a `ValueError`.

    >>> round(life_until_all_dead([[1 / 20] * 4] * 5).mean, 2)
    71.95
    """
    _check_chances(chances)
    if not any(map(len, chances)):
        return Life(0.0, 0.0)
    if min(map(min, filter(len, chances))) < NEVER:
        return Life(math.inf, math.inf)
    every = np.concatenate([np.asarray(shard, dtype=float) for shard in chances])
    return _life(lambda t: -np.expm1(_log_all_hit(every, t)), float(every.max()), float(every.min()))


def life_until_first_dead(chances: Sequence[Sequence[float]]) -> Life:
    """Requests until the first shard is dead: `integral over t of prod over shards (1 - prod (1 - exp(-p t)))`.

    Args and errors: see [`life_until_all_dead`]. Zero if a shard is dead already.

    >>> round(life_until_first_dead([[1 / 20] * 4] * 5).mean, 1)
    19.3
    """
    _check_chances(chances)
    if not all(map(len, chances)):
        return Life(0.0, 0.0)
    mortal = Counter(tuple(sorted(shard)) for shard in chances if min(shard) >= NEVER)
    if not mortal:
        return Life(math.inf, math.inf)

    def none_dead(t: np.ndarray) -> np.ndarray:
        alive = [(-np.expm1(_log_all_hit(np.asarray(shard), t))) ** number for shard, number in mortal.items()]
        return np.prod(alive, axis=0)

    return _life(none_dead, max(map(max, mortal)), min(map(min, mortal)))


class LifeLeft(NamedTuple):
    """How many requests a store is expected to take from now on, without a repair."""

    until_first_dead: Life
    until_all_dead: Life


def life_left(plan: Plan, prior: Prior | None = None, trained: Iterable[Stage] | None = None) -> LifeLeft:
    """What [`life_until_first_dead`] and [`life_until_all_dead`] say of what survives now.

    Args, also for errors: see [`first_slice_chances`].

    >>> round(life_left(Plan.make(1, 2, [(0, 1), (1, 0)]), trained=[Stage(0, (1,))]).until_all_dead.mean, 6)
    2.0
    """
    chances = first_slice_chances(plan, prior, trained)
    return LifeLeft(life_until_first_dead(chances), life_until_all_dead(chances))


def _check_chances(chances: Sequence[Sequence[float]]) -> None:
    for number, shard in enumerate(chances):
        if not all(0 <= chance <= 1 for chance in shard):
            raise ValueError(
                f"The chances of shard {number} must lie between 0 and 1, not {shard!r:.100}. Correct them."
            )
    if not len(chances):
        raise ValueError("There are no shards. Give one list of chances per shard.")


def _log_all_hit(chances: np.ndarray, t: np.ndarray) -> np.ndarray:
    """`log prod (1 - exp(-p t))` for every `t`; equal chances are computed once."""
    total = np.zeros_like(t)
    for chance, number in zip(*np.unique(chances, return_counts=True), strict=True):
        x = chance * t
        small = x < 0.7  # each of the two is exact on its own side
        total += number * np.log(-np.expm1(-x), where=small, out=np.log1p(-np.exp(-np.where(small, 1.0, x))))
    return total


def _life(survival: Callable[[np.ndarray], np.ndarray], largest: float, smallest: float) -> Life:
    """Mean and deviation of `N` from `P(T > t)`; the chances of first slices lie between `smallest` and `largest`."""
    # Over x = log(t) the integrand is analytic and falls off fast on both sides: the trapezoidal rule is exact to
    # rounding. Left of the range it is next to nothing of the mean, right of it as well.
    t = np.exp(np.arange(-math.log(largest) - 50, -math.log(smallest) + math.log(100), LOG_STEP))
    alive = survival(t)
    mean = LOG_STEP * math.fsum(alive * t)
    square = LOG_STEP * math.fsum(2 * alive * t * t)
    return Life(mean, math.sqrt(max(square - mean - mean * mean, 0.0)))


def uniform_life(num_shards: int, num_slices: int, budget: int) -> Life:
    """Requests until nothing is left when all places are equally likely, by [`requests_until_dead`].

    The variance is `sum (1 - p_i) / p_i^2` with `p_i = i / (m L)`, `i = 1 .. m min(B, L)`. With `budget=1` it is that
    of SISA without retraining. Args and errors: see there.

    >>> [round(value, 1) for value in uniform_life(5, 4, 4)]
    [72.0, 23.8]
    """
    mean, places = requests_until_dead(num_shards, num_slices, budget), num_shards * num_slices
    steps = range(1, num_shards * min(budget, num_slices) + 1)
    return Life(mean, math.sqrt(math.fsum((1 - i / places) * (places / i) ** 2 for i in steps)))


def distinct_hits(num_slices: int, requests: int, num_shards: int = 1) -> np.ndarray:
    """The chance that exactly `d` slices of one shard were hit, `d = 0..L`, all places equally likely.

    Args:
        num_slices (`int`): `L`.
        requests (`int`): Requests to all shards together.
        num_shards (`int`, *optional*, defaults to 1): `m`.

    Returns:
        `np.ndarray`: The `L + 1` chances. Numbers out of range are a `ValueError`.

    >>> distinct_hits(4, 3) * 16
    array([0., 1., 9., 6., 0.])
    """
    check_count("num_slices", num_slices, 1, 10**4)
    check_count("num_shards", num_shards, 1, 10**6)
    check_count("requests", requests, 0, 10**6)
    chances = np.zeros(num_slices + 1)
    chances[0] = 1.0
    new = np.arange(num_slices, -1, -1) / (num_shards * num_slices)  # that the next request hits a slice not yet hit
    for _ in range(requests):
        moved = chances * new
        chances = chances - moved
        chances[1:] += moved[:-1]
    return chances


def cyclic_survival(num_slices: int, length: int, distinct: int) -> float:
    """The chance that a full rotation keeps a prefix of a length when a number of distinct slices was hit, uniform.

    `sum_{i >= 1} (-1)^(i+1) C(d, i) C(L - i k - 1, d - 1) / C(L - 1, d - 1)`: some gap between hit slices on the
    circle is long enough. Holds for `cyclic` with any budget from `L` to `2 L`, pruned or not.

    >>> [cyclic_survival(4, length, distinct=2) for length in (1, 2, 3)]
    [1.0, 0.6666666666666666, 0.0]
    """
    _check_prefix(num_slices, length, distinct)
    if distinct == 0:
        return 1.0
    terms = range(1, min(distinct, (num_slices - 1) // length) + 1)
    ways = (
        (-1) ** (i + 1) * math.comb(distinct, i) * math.comb(num_slices - i * length - 1, distinct - 1) for i in terms
    )
    return sum(ways) / math.comb(num_slices - 1, distinct - 1)


def random_survival(num_slices: int, length: int, distinct: int, budget: int) -> float:
    """The same for `budget` orders drawn independently: `1 - (1 - q)^B`, `q = C(L - d, k) / C(L, k)`.

    >>> random_survival(4, length=1, distinct=2, budget=4)
    0.9375
    """
    _check_prefix(num_slices, length, distinct)
    check_count("budget", budget, 1, 10**6)
    one = math.comb(num_slices - distinct, length) / math.comb(num_slices, length)
    return 1 - (1 - one) ** budget


def _check_prefix(num_slices: int, length: int, distinct: int) -> None:
    check_count("num_slices", num_slices, 1, 10**4)
    check_count("length", length, 1, num_slices)
    check_count("distinct", distinct, 0, num_slices)


def lemma_2(num_slices: int, length: int, requests: int, budget: int) -> float:
    """Lemma 2 of the paper (S3T, arXiv 2406.16257): the chance that one of `B` orders keeps a prefix of a length.

    `1 - (1 - (1 - k / L)^r)^B` lets every sequence see deletions of its own. They are shared, so it overstates what
    independent random orders keep, which is the mean of [`random_survival`] over [`distinct_hits`].

    >>> shared = sum(p * random_survival(4, 1, d, budget=4) for d, p in enumerate(distinct_hits(4, requests=3)))
    >>> round(lemma_2(4, length=1, requests=3, budget=4), 3), round(float(shared), 3)
    (0.888, 0.846)
    """
    _check_prefix(num_slices, length, 0)
    check_count("requests", requests, 0, 10**6)
    check_count("budget", budget, 1, 10**6)
    return 1 - (1 - (1 - length / num_slices) ** requests) ** budget


def cyclic_slices_in_use(num_shards: int, num_slices: int, requests: int) -> float:
    """Slices in use after a number of requests, of `m L`: full rotations in every shard, no repair, uniform.

    >>> [round(cyclic_slices_in_use(5, 4, requests), 1) for requests in (1, 5, 10, 20, 36)]
    [19.0, 15.2, 11.4, 6.6, 3.0]
    """
    hits = distinct_hits(num_slices, requests, num_shards)
    kept = (sum(cyclic_survival(num_slices, k, d) for k in range(1, num_slices + 1)) for d in range(num_slices + 1))
    return num_shards * math.fsum(chance * length for chance, length in zip(hits.tolist(), kept, strict=True))


def sisa_slices_in_use(num_shards: int, num_slices: int, requests: int) -> float:
    """The same for one sequence per shard, as in SISA without retraining: `m sum_k (1 - k / (m L))^r`.

    >>> sisa_slices_in_use(1, 4, 1)
    1.5
    """
    check_count("requests", requests, 0, 10**6)
    places = place_chances(num_shards, num_slices).size
    return num_shards * math.fsum((1 - k / places) ** requests for k in range(1, num_slices + 1))


def sisa_cost_per_request(num_slices: int) -> float:
    """Slice passes that SISA retrains after each request, uniform: the mean over `j` of `j + .. + L`.

    >>> sisa_cost_per_request(4)
    7.5
    """
    check_count("num_slices", num_slices, 1, 10**6)
    return (num_slices + 1) * (2 * num_slices + 1) / 6


def repair_cost(plan: Plan, requests: float, prior: Prior | None = None) -> float:
    """Slice passes of a repair after a Poisson number of requests: `sum over stages of depth (1 - exp(-n p(stage)))`.

    Args:
        plan (`Plan`): The plan, all of it live before the first of the requests.
        requests (`float`): `n`, their mean number: requests per day times the days between repairs.
        prior (`Prior`, *optional*): See [`place_chances`].

    Returns:
        `float`: The expected cost. A negative or infinite number of requests is a `ValueError`.

    >>> round(repair_cost(Plan.make(1, 2, [(0, 1)]), requests=1), 3)
    1.658
    """
    if not 0 <= requests < math.inf:
        raise ValueError(f"requests must be a number from 0 on, not {requests!r:.40}. Give their mean number.")
    chances = place_chances(plan.num_shards, plan.num_slices, prior)
    hit = (chances[stage.shard, list(stage.prefix)].sum() for stage in plan.stages)
    return math.fsum(-stage.depth * math.expm1(-requests * p) for stage, p in zip(plan.stages, hit, strict=True))
