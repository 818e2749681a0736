"""Plans and what they are worth, by looking at every hit set: slow, and independent of the library's searches."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction

Order = tuple[int, ...]


def normal(chances: Sequence[float]) -> list[float]:
    return [chance / sum(chances) for chance in chances]


def zipf(num_slices: int) -> list[float]:
    return normal([1 / j for j in range(1, num_slices + 1)])


def two_level(num_slices: int) -> list[float]:
    return normal([10] * max(1, num_slices // 4) + [1] * (num_slices - max(1, num_slices // 4)))


def uniform(num_slices: int) -> list[float]:
    return [1 / num_slices] * num_slices


FAMILIES: dict[str, Callable[[int], list[float]]] = {"uniform": uniform, "zipf": zipf, "two level": two_level}


def hit_sets(num_slices: int) -> list[frozenset[int]]:
    """All sets of slices, the smallest first."""
    sizes = range(num_slices + 1)
    return [frozenset(c) for size in sizes for c in itertools.combinations(range(num_slices), size)]


def surviving_length(order: Order, hit: Iterable[int]) -> int:
    """How many leading slices of an order survive."""
    return next((depth for depth, slice_id in enumerate(order) if slice_id in hit), len(order))


def best(orders: Iterable[Order], hit: Iterable[int]) -> int:
    return max((surviving_length(order, hit) for order in orders), default=0)


def stages_of(orders: Iterable[Order]) -> set[Order]:
    return {order[:depth] for order in orders for depth in range(1, len(order) + 1)}


def cost(orders: Iterable[Order]) -> int:
    return sum(map(len, stages_of(orders)))


def life_weights(prior: Sequence[float]) -> dict[frozenset[int], Fraction]:
    """How many requests each hit set lasts, exactly: `sum over r of P_r(D)`, where after `r` requests exactly `D` was
    hit with the chance `P_r(D) = sum over S in D of (-1)^|D - S| p(S)^r` (inclusion and exclusion)."""
    chances = [Fraction(chance) for chance in prior]
    total = sum(chances)

    def outside(hit: Iterable[int]) -> Fraction:
        return 1 - sum(chances[j] for j in hit) / total

    weights = {}
    for hit in hit_sets(len(prior))[:-1]:
        parts = [frozenset(c) for size in range(len(hit) + 1) for c in itertools.combinations(sorted(hit), size)]
        weights[hit] = sum(((-1) ** len(hit - part) / outside(part) for part in parts), Fraction(0))
    return weights


def life_area(orders: Iterable[Order], prior: Sequence[float]) -> float:
    """The surviving length summed over the requests of a whole life."""
    orders = list(orders)
    return float(sum(weight * best(orders, hit) for hit, weight in life_weights(prior).items()))


def every_tree(num_slices: int, alive: Iterable[Order] = (), most: int = 10**9) -> Iterator[list[Order]]:
    """Every set of stages that can be added to what is alive, with its parents, at a cost of at most `most`."""
    held = stages_of(alive)
    free = [o for k in range(1, num_slices + 1) for o in itertools.permutations(range(num_slices), k) if o not in held]
    for chosen in itertools.product((False, True), repeat=len(free)):
        new = set(itertools.compress(free, chosen))
        if sum(map(len, new)) <= most and all(len(o) == 1 or o[:-1] in held or o[:-1] in new for o in new):
            yield [*held, *new]


def damaged(num_slices: int, num_shards: int, hits: int, seed: int) -> list[list[Order]]:
    """What some deletions leave of pruned rotations, shard by shard: the longest of each branch."""
    rng = random.Random(seed)
    hit: list[set[int]] = [set() for _ in range(num_shards)]
    for _ in range(hits):
        hit[rng.randrange(num_shards)].add(rng.randrange(num_slices))
    rotations = [
        tuple((start + i) % num_slices for i in range(num_slices - (start > 0))) for start in range(num_slices)
    ]
    alive = []
    for shard in hit:
        left = {order[: surviving_length(order, shard)] for order in rotations} - {()}
        inner = {order[:depth] for order in left for depth in range(1, len(order))}
        alive.append([order for order in sorted(left) if order not in inner])
    return alive


def budget_bound(num_slices: int, budget: int) -> float:
    """No plan of `budget` sequences is worth more over its life, uniform: of the hit sets of `d` slices at most
    `min(1, B q)` leave a prefix of a length, `q = C(L - d, k) / C(L, k)`, and they last for `L / (L - d)` requests."""
    return sum(
        num_slices / (num_slices - d) * min(1.0, budget * math.comb(num_slices - d, k) / math.comb(num_slices, k))
        for k in range(1, num_slices + 1)
        for d in range(num_slices)
    )
