"""Orders of a shard's slices, and what deletions leave of them.

Responsible for choosing the sequences of one shard, and for cutting the tails that no deletion can make useful. It
leaves what survives to `survival.py`, stages and shards to `tree.py`, parameters and data to others.

A sequence is an order of the slice ids `0..L-1`, `L = num_slices`. Once some slices were deleted from, the part before
its first hit slice survives. Whether a prefix survives is thus a matter of its *set* of slices alone.
"""

import math
import random
import warnings
from collections.abc import Iterable, Sequence

Order = tuple[int, ...]

MAX_SLICES = 1000  # more than any model has layers; bounds the work that an untrusted plan can ask for


def check_count(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, not {value!r:.40}. Give one in that range.")


def check_budget(num_slices: int, budget: int) -> None:
    check_count("num_slices", num_slices, 1, MAX_SLICES)
    orders = min(math.factorial(num_slices), 10**9)
    check_count(f"budget, the number of different orders of {num_slices} slices,", budget, 1, orders)


def cyclic(num_slices: int, budget: int) -> list[Order]:
    """The iterative cyclic rotation of the paper (S3T, arXiv 2406.16257).

    The first `L` orders are the rotations of `0..L-1`. The next keep each rotation's first slice and rotate the rest
    to the right, block after block; then the first two slices are kept, and so on, until all `L!` orders were given.
    Beyond `L` a warning says what the extra orders buy: up to `2 L` nothing, they hold the same circular windows.

    Args:
        num_slices (`int`): `L`, the number of slices in the shard.
        budget (`int`): `B`, the number of sequences, at most `L!`.

    Returns:
        `list[Order]`: `budget` distinct orders. Numbers out of range are a `ValueError`.

    >>> cyclic(4, 3)
    [(0, 1, 2, 3), (1, 2, 3, 0), (2, 3, 0, 1)]
    """
    check_budget(num_slices, budget)
    if budget > num_slices:
        message = (
            f"budget={budget} is more than num_slices={num_slices}: rotations beyond {num_slices} add nothing up to "
            f"{2 * num_slices}, and little above, at their full training cost. Consider budget={num_slices}, or "
            "sequence_selection='optimal'."
        )
        warnings.warn(message, stacklevel=2)
    return [rotation(num_slices, number) for number in range(budget)]


def rotation(num_slices: int, number: int) -> Order:
    """Read `number` in the mixed base L, L-1, ..., 1: digit `i` says how far what follows `i` slices is rotated."""
    number, start = divmod(number, num_slices)
    rest = [*range(start, num_slices), *range(start)]
    order = [rest.pop(0)]
    while rest:
        number, turn = divmod(number, len(rest))
        rest = rest[len(rest) - turn :] + rest[: len(rest) - turn]
        order.append(rest.pop(0))
    return tuple(order)


def spaced(num_slices: int, budget: int) -> list[Order]:
    """Rotations that start `L / B` apart.

    They cost as much as the first `B` cyclic ones, but their prefixes share fewer slices, so more survives. At `B = L`
    they are the cyclic ones; beyond, they go on as `cyclic` does and warn as it does. Args and errors: see there.

    >>> spaced(4, 2)
    [(0, 1, 2, 3), (2, 3, 0, 1)]
    """
    check_budget(num_slices, budget)
    if budget > num_slices:
        return cyclic(num_slices, budget)
    return [rotation(num_slices, round(number * num_slices / budget)) for number in range(budget)]


def random_orders(num_slices: int, budget: int, seed: int) -> list[Order]:
    """Distinct random orders, in rounds of `L` that start with every slice once. Args and errors: see `cyclic`.

    The same seed (`int`) gives the same orders on any machine and Python version.

    >>> sorted(order[0] for order in random_orders(4, 4, seed=0))
    [0, 1, 2, 3]
    """
    check_budget(num_slices, budget)
    rng = random.Random(seed)
    orders: dict[Order, None] = {}
    while len(orders) < budget:
        for start in _shuffled(range(num_slices), rng)[: budget - len(orders)]:
            rest = [slice_id for slice_id in range(num_slices) if slice_id != start]
            while (order := (start, *_shuffled(rest, rng))) in orders:
                pass
            orders[order] = None
    return list(orders)


def _shuffled(slices: Iterable[int], rng: random.Random) -> list[int]:
    # Python promises that `random()` never changes, but not `shuffle()`.
    return sorted(slices, key=lambda _: rng.random())


def explicit(orders: Iterable[Sequence[int]], num_slices: int) -> list[Order]:
    """Check orders that a user or a file gives. An order may be truncated: the first slices of a sequence.

    Args:
        orders (`Iterable[Sequence[int]]`): The orders.
        num_slices (`int`): `L`; slice ids run from 0 to `L - 1`.

    Returns:
        `list[Order]`: The same orders as tuples.

    Raises:
        ValueError: If there is no order, or one is empty, repeats a slice, names an unknown one, or is there twice.

    >>> explicit([[0, 1, 2], [2, 0]], num_slices=3)
    [(0, 1, 2), (2, 0)]
    """
    check_count("num_slices", num_slices, 1, MAX_SLICES)
    checked: dict[Order, int] = {}
    for position, order in enumerate(orders):
        if not isinstance(order, (list, tuple)):
            raise ValueError(f"Order {position} is {order!r:.40}. Give a list of lists of slice ids: [[0, 1], ...].")
        for slice_id in order:
            check_count(f"A slice id in order {position}", slice_id, 0, num_slices - 1)
        order = tuple(order)
        if not order:
            raise ValueError(f"Order {position} is empty. Give it at least one slice or remove it.")
        if len(set(order)) < len(order):
            raise ValueError(f"Order {position}, {order}, names a slice twice. Name each slice at most once.")
        if order in checked:
            raise ValueError(f"Order {position}, {order}, is the same as order {checked[order]}. Remove one of them.")
        checked[order] = position
    if not checked:
        raise ValueError("The list of orders is empty. Give at least one order, such as [[0, 1]].")
    return list(checked)


def select_sequences(
    selection: str | Sequence[Sequence[int]], num_slices: int, budget: int | None = None, seed: int = 0
) -> list[Order]:
    """The sequences of one shard, by name or as given; not yet pruned.

    Args:
        selection (`str` or `Sequence[Sequence[int]]`): `"cyclic"`, `"spaced"`, `"random"`, or the orders themselves.
        num_slices (`int`): `L`, the number of slices in the shard.
        budget (`int`, *optional*, defaults to `num_slices`): `B`; of given orders, their number.
        seed (`int`, *optional*, defaults to `0`): Used by `"random"` only.

    Returns:
        `list[Order]`: The orders. A selection, order or budget that does not fit is a `ValueError`.

    >>> select_sequences("spaced", num_slices=4, budget=2)
    [(0, 1, 2, 3), (2, 3, 0, 1)]
    """
    if not isinstance(selection, str):
        orders = explicit(selection, num_slices)
        if budget not in (None, len(orders)):
            raise ValueError(f"budget={budget}, but {len(orders)} orders are given. Drop the budget or correct it.")
        return orders
    budget = num_slices if budget is None else budget
    if selection == "cyclic":
        return cyclic(num_slices, budget)
    if selection == "spaced":
        return spaced(num_slices, budget)
    if selection == "random":
        return random_orders(num_slices, budget, seed)
    raise ValueError(f"Unknown sequence selection {selection!r}. Use 'cyclic', 'spaced', 'random' or explicit orders.")


def prune_orders(orders: Iterable[Order], beside: Iterable[Order] = ()) -> list[Order]:
    """Cut the tails that survival does not need.

    A last slice is cut while the order's slices are, as a set, also a prefix of an order kept before: whatever is
    deleted, both survive or neither does. An order of which nothing is left is dropped. Orders in `beside` count as
    kept before, whatever they share, and do not come back.

    >>> prune_orders([(0, 1, 2), (1, 2, 0), (2, 1, 0)])
    [(0, 1, 2), (1, 2), (2,)]
    """
    covered = {frozenset(order[:depth]) for order in beside for depth in range(1, len(order) + 1)}
    kept = []
    for order in orders:
        while order and frozenset(order) in covered:
            order = order[:-1]
        if order:
            kept.append(order)
            covered.update(frozenset(order[:depth]) for depth in range(1, len(order) + 1))
    return kept


def training_cost(orders: Iterable[Order]) -> int:
    """Slice passes for one shard: a stage at depth `d` costs `d`, and a shared prefix is trained once.

    >>> training_cost([(0, 1, 2), (0, 2)])
    8
    """
    return sum(map(len, {order[:depth] for order in orders for depth in range(1, len(order) + 1)}))
