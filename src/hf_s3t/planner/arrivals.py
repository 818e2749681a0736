"""Deletion requests that may come: what they hit, how many come together, and when; and when a plan is repaired.

Responsible for drawing the streams that `simulate.py` answers, and for what may be asked of it; it knows places and
moments, not stages.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..plan.life import Prior
from ..plan.sequences import check_count

BLOCK = 2**16  # examples drawn at once, over all streams: what a processor keeps close by
MAX_ROWS = 256  # and per stream: a few streams should not draw far beyond their end
MAX_REQUESTS = 10**6  # per stream


@dataclass(frozen=True)
class DeletionRequests:
    """How deletion requests come.

    Args:
        prior (`Prior`, *optional*): The chance that an example to be deleted lies in each slice (shards are equally
            likely), or for each shard in each slice. Without it all places are equally likely.
        examples (`int`, *optional*, defaults to 1): Examples of the person who asks. Each lies in a place of its own
            drawing, so a request may hit several slices at once. With a group column all rows of a person lie in one
            slice, whatever their number: leave it at 1.
        burst (`int`, *optional*, defaults to 1): Requests that come together. A repair waits for the last of them.
        per_day (`float`, *optional*): Requests per day on average; bursts come at random moments (a Poisson process).
            Without it there are no days.

    Raises:
        ValueError: If a number is out of range. The prior is checked against the plan, when there is one.

    >>> DeletionRequests(per_day=3)
    DeletionRequests(prior=None, examples=1, burst=1, per_day=3)
    """

    prior: Prior | None = None
    examples: int = 1
    burst: int = 1
    per_day: float | None = None

    def __post_init__(self) -> None:
        check_count("examples", self.examples, 1, 10**4)
        check_count("burst", self.burst, 1, 10**4)
        if self.per_day is not None and not 0 < self.per_day < math.inf:
            raise ValueError(f"per_day must be a number above 0, not {self.per_day!r:.40}. Give requests per day.")

    def bursts_per_block(self, streams: int) -> int:
        """How many bursts are drawn at once."""
        return max(1, min(BLOCK // streams, MAX_ROWS) // (self.burst * self.examples))

    def blocks(self, chances: np.ndarray, streams: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Draw streams without end. The same seed and number give the same streams, whatever plan or policy answers.

        Args:
            chances (`np.ndarray`): The chance of each place, `(shards, slices)`.
            streams (`int`): How many streams are drawn side by side.
            seed (`int`): For numpy's default generator.

        Yields:
            `tuple[np.ndarray, np.ndarray | None]`: Places, `(bursts * burst * examples, streams)`, as `shard * L +
            slice`; and the moments of the bursts in days, `(bursts, streams)`, if there is a rate.

        >>> next(DeletionRequests(burst=2).blocks(np.full((1, 4), 0.25), streams=3, seed=0))[0].shape
        (256, 3)
        """
        rng, bursts = np.random.default_rng(seed), self.bursts_per_block(streams)
        size = (bursts * self.burst * self.examples, streams)
        now = np.zeros(streams)
        while True:
            places = self._places(chances, size, rng)
            if self.per_day is None:
                yield places, None
                continue
            moments = now + rng.exponential(self.burst / self.per_day, (bursts, streams)).cumsum(axis=0)
            now = moments[-1]
            yield places, moments

    def _places(self, chances: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        if self.prior is None:
            return rng.integers(chances.size, size=size, dtype=np.uint16 if chances.size < 2**16 else np.uint32)
        below = np.cumsum(chances)
        return np.searchsorted(below / below[-1], rng.random(size), side="right")


@dataclass(frozen=True)
class RepairPolicy:
    """When missing stages are trained again: never, or by one of two rules.

    Args:
        below (`int`, *optional*): At once, each shard whose served prefix fell below this length.
        every_days (`float`, *optional*): After every so many days, all shards.

    Raises:
        ValueError: If both are given, or a number is out of range.

    >>> RepairPolicy(below=2)
    RepairPolicy(below=2, every_days=None)
    """

    below: int | None = None
    every_days: float | None = None

    def __post_init__(self) -> None:
        if self.below is not None and self.every_days is not None:
            raise ValueError(f"Both below={self.below} and every_days={self.every_days} are given. Choose one rule.")
        if self.below is not None:
            check_count("below", self.below, 1, 10**9)
        if self.every_days is not None and not 0 < self.every_days < math.inf:
            raise ValueError(f"every_days must be a number above 0, not {self.every_days!r:.40}. Give days.")

    @property
    def repairs(self) -> bool:
        """Whether anything is ever repaired."""
        return self.below is not None or self.every_days is not None


def check_horizon(
    requests: DeletionRequests, policy: RepairPolicy, max_requests: int | None, horizon_days: float | None
) -> None:
    """Refuse a horizon that is missing, given twice, without a rate, or too far away: a `ValueError`."""
    if max_requests is not None and horizon_days is not None:
        raise ValueError(
            f"max_requests={max_requests} and horizon_days={horizon_days} are both given. Give one of them."
        )
    if policy.repairs and max_requests is None and horizon_days is None:
        raise ValueError(f"With {policy} streams have no end. Give max_requests, or horizon_days.")
    if requests.per_day is None and (horizon_days is not None or policy.every_days is not None):
        asked = f"every_days={policy.every_days}" if horizon_days is None else f"horizon_days={horizon_days}"
        raise ValueError(f"{asked} is given, but no rate, so there are no days. Give DeletionRequests(per_day=...).")
    if max_requests is not None:
        check_count("max_requests", max_requests, 1, MAX_REQUESTS)
    if horizon_days is not None and not 0 < horizon_days < math.inf:
        raise ValueError(f"horizon_days must be a number above 0, not {horizon_days!r:.40}. Give days.")
    expected = (horizon_days or 0) * (requests.per_day or 0)
    if expected > MAX_REQUESTS:
        raise ValueError(
            f"horizon_days={horizon_days} at {requests.per_day} requests a day are {expected:.3g} requests per "
            f"stream, more than {MAX_REQUESTS:.0e}. Give a nearer horizon."
        )
