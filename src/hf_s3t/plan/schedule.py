"""Which stage a free worker takes next, and how long a plan then takes: list scheduling of the tree of stages.

    shard-00 --+-- 0 --- 0-1 --- 0-1-2      seconds 1, 2, 3: 6 seconds are left from 0 on,
               +-- 1 --- 1-2                3 from 1 on, 1 from 2 on
               +-- 2                        two workers: 0, 0-1, 0-1-2 on one; 1, 1-2, 2 on the other: 6 seconds

A stage can begin once its parent is trained, and a worker never waits while one can. Of those that can, it takes the
one below which most is left to do, along the longest path (Hu 1961, Operations Research 9). Whichever it took, that
needs at most `2 - 1 / workers` times as long as the best schedule (Graham 1966, Bell System Technical Journal 45):
while a worker waits, the others shorten the longest path that is left.

Responsible for the order and for the length of a schedule. It leaves running stages, and losing workers, to whoever
trains. Seconds are what a caller gives: measured ones, or slice passes.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from heapq import heapify, heappop, heappush

from .tree import Stage

Seconds = Callable[[Stage], float]


def remaining_seconds(stages: Iterable[Stage], seconds: Seconds) -> dict[Stage, float]:
    """The longest path from each stage down through those of the stages that build on it, itself included.

    Args:
        stages (`Iterable[Stage]`): Stages that are still to be trained, in any order.
        seconds (`Callable[[Stage], float]`): How long one takes.

    Returns:
        `dict[Stage, float]`: In the order given, in the unit of `seconds`.

    >>> tree = [Stage(0, prefix) for prefix in [(0,), (0, 1), (1,)]]
    >>> list(remaining_seconds(tree, Stage.passes).values())
    [3, 2, 1]
    """
    given = list(dict.fromkeys(stages))
    parents = positions(given)
    return dict(zip(given, _remaining(parents, [seconds(stage) for stage in given]), strict=True))


def ready(missing: Iterable[Stage], seconds: Seconds, begun: Collection[Stage] = ()) -> list[Stage]:
    """The stages that can begin now, in the order in which free workers take them.

    Args:
        missing (`Iterable[Stage]`): Every stage that is not trained yet, those that run included: [`Plan.missing`].
        seconds (`Callable[[Stage], float]`): How long one takes; [`Stage.passes`] where nothing was measured.
        begun (`Collection[Stage]`, *optional*): Those of them that run.

    Returns:
        `list[Stage]`: Those whose parent is not missing and that do not run. The longest remaining path is first;
        equal ones are in the order of `missing`.

    >>> tree = [Stage(0, prefix) for prefix in [(1,), (0,), (0, 1), (2,)]]
    >>> [stage.name for stage in ready(tree, Stage.passes, begun=[Stage(0, (2,))])]
    ['shard-00/0', 'shard-00/1']
    """
    left = remaining_seconds(missing, seconds)
    running = set(begun)
    able = [stage for stage in left if stage.parent not in left and stage not in running]
    return sorted(able, key=lambda stage: -left[stage])  # sorting keeps the order of equal ones


def makespan(stages: Iterable[Stage], seconds: Seconds, workers: int) -> float:
    """How long the stages take on some workers, each of which trains one at a time, as [`ready`] hands them out.

    Args:
        stages (`Iterable[Stage]`): The stages to train, such as [`Plan.missing`]. A parent that is not among them is
            taken to be trained.
        seconds (`Callable[[Stage], float]`): How long one takes.
        workers (`int`): How many train at the same time. Less than 1 is a `ValueError`.

    Returns:
        `float`: From the first start to the last end, in the unit of `seconds`.

    >>> tree = [Stage(0, prefix) for prefix in [(0,), (0, 1), (0, 1, 2), (1,), (1, 2), (2,)]]
    >>> [makespan(tree, Stage.passes, workers) for workers in (1, 2, 3)]
    [10, 6, 6]
    """
    given = list(dict.fromkeys(stages))
    return makespan_of(positions(given), [seconds(stage) for stage in given], workers)


def bound(stages: Iterable[Stage], seconds: Seconds, workers: int) -> float:
    """No schedule is shorter: the longest path, or all work spread evenly over the workers, whichever is longer.

    >>> tree = [Stage(0, prefix) for prefix in [(0,), (0, 1), (0, 1, 2), (1,), (1, 2), (2,)]]
    >>> [bound(tree, Stage.passes, workers) for workers in (1, 2, 3)]
    [10.0, 6, 6]
    """
    left = remaining_seconds(stages, seconds)
    _check(workers)
    return max(max(left.values(), default=0), sum(map(seconds, left)) / workers)


# ---- the same by position: one tree is scheduled many times ----


def positions(stages: Sequence[Stage]) -> list[int]:
    """For each stage the position of its parent; -1 where the parent is not among them.

    >>> positions([Stage(0, (0,)), Stage(0, (0, 1)), Stage(0, (2, 1))])
    [-1, 0, -1]
    """
    where = {(stage.shard, stage.prefix): position for position, stage in enumerate(stages)}
    return [where.get((stage.shard, stage.prefix[:-1]), -1) for stage in stages]


def makespan_of(parents: Sequence[int], seconds: Sequence[float], workers: int) -> float:
    """[`makespan`] of stages that are known by their position alone.

    Args:
        parents (`Sequence[int]`): See [`positions`], `(stages,)`.
        seconds (`Sequence[float]`): How long each takes, `(stages,)`.
        workers (`int`): How many train at the same time.

    >>> makespan_of([-1, 0, -1], [1.0, 2.0, 1.0], workers=2)
    3.0
    """
    _check(workers)
    left = _remaining(parents, seconds)
    children: list[list[int]] = [[] for _ in parents]
    waiting = []
    for position, parent in enumerate(parents):
        if parent < 0:
            waiting.append((-left[position], position))
        else:
            children[parent].append(position)
    heapify(waiting)
    running: list[tuple[float, int]] = []
    now: float = 0
    while waiting or running:
        while waiting and len(running) < workers:
            _, position = heappop(waiting)
            heappush(running, (now + seconds[position], position))
        now, ended = heappop(running)
        for position in (ended, *_ended_now(running, now)):
            for child in children[position]:
                heappush(waiting, (-left[child], child))
    return now


def _ended_now(running: list[tuple[float, int]], now: float) -> list[int]:
    """Takes those away that end at the same moment: what they free is handed out together."""
    ended = []
    while running and running[0][0] == now:
        ended.append(heappop(running)[1])
    return ended


def _remaining(parents: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """The longest path down from each position."""
    children: list[list[int]] = [[] for _ in parents]
    order = []  # parents before children, wherever they stand
    for position, parent in enumerate(parents):
        if parent < 0:
            order.append(position)
        else:
            children[parent].append(position)
    for position in order:  # it grows while it is walked through
        order += children[position]
    left = list(seconds)
    below: list[float] = [0] * len(left)
    for position in reversed(order):
        left[position] = seconds[position] + below[position]
        if (parent := parents[position]) >= 0:
            below[parent] = max(below[parent], left[position])
    return left


def _check(workers: int) -> None:
    if type(workers) is not int or workers < 1:
        raise ValueError(f"workers must be an integer from 1 on, not {workers!r:.40}. Give how many train at a time.")
