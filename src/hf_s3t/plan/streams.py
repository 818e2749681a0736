"""What a plan of many slices is worth: the performance that deletions are expected to leave, over sampled streams.

Responsible for drawing streams of deletion requests, for the value of orders over them, and for a good next path of
stages. It is to more than 16 slices what `survival.py` is to fewer, and leaves the search for plans to `optimal.py`.

A stream matters only by when it first hits each slice. A prefix lives until its first slice is hit, so per stream and
length the best prefix's end is a maximum over the orders of a minimum over slices; one stream stands for all the hit
sets that it passes through.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .sequences import Order
from .survival import Path, checked_performance, checked_prior, joined, path_cost, set_of

SEARCHED_STREAMS = 1200  # each passes through more than 16 hit sets
HELD_OUT_STREAMS = 5000
BEAM_WIDTH = 4
BEAM_SLICES = 40  # with more slices, a search for a path takes minutes


class Streams:
    """Values of plans over sampled deletion streams; the methods of [`Lattice`], for any number of slices.

    A plan's profile is, per length and stream, how long the last prefix of that length lives, `(L, streams)`.

    Args:
        prior (`Sequence[float]`): The chance that a request hits each slice.
        performance (`Sequence[float]`, *optional*): What 1 to L surviving slices are worth; their number without.
        requests (`int`, *optional*): Look at the mean over the first so many requests; at the whole life without.
        seed (`int`, *optional*, defaults to `0`): The same seed draws the same streams.
        count (`int`, *optional*, defaults to `1200`): How many streams.
        uniform_share (`float`, *optional*, defaults to `0.0`): In how many of them all slices are equally likely to be
            hit; see [`Lattice`].

    >>> abs(Streams([0.25] * 4).value([(0, 1, 2, 3)]) - 25 / 3) < 0.5  # 4 (1 + 1/2 + 1/3 + 1/4), sampled
    True
    """

    def __init__(
        self,
        prior: Sequence[float],
        performance: Sequence[float] | None = None,
        requests: int | None = None,
        seed: int = 0,
        count: int = SEARCHED_STREAMS,
        uniform_share: float = 0.0,
    ) -> None:
        self.num_slices = len(prior)
        self.performance = checked_performance(performance, self.num_slices)
        self.prior = checked_prior(prior, self.num_slices)
        if not (self.prior > 0).all():
            raise ValueError(f"No slice may have the chance 0: it would live for ever, in {prior!r:.100}. Raise it.")
        rng, uniform = np.random.default_rng(seed), round(uniform_share * count)
        under = ((self.prior, count - uniform), (checked_prior(None, self.num_slices), uniform))
        self._lifetimes = np.concatenate([_lifetimes(chances, requests, rng, number) for chances, number in under], 1)
        self._steps = np.diff(self.performance)
        self._promises: dict[Order, float] = {}  # what one more slice added when last looked at, by node
        # The value of training every order: of each length, those slices together that are hit last.
        self.every_order = self.worth(-np.sort(-self._lifetimes, axis=0))

    @property
    def effort(self) -> int:
        """How many searches for a path take a few seconds; 0 where already one takes long."""
        if self.num_slices > BEAM_SLICES:
            return 0
        return int(6e8 / (self.num_slices**2 * BEAM_WIDTH * self._lifetimes.shape[1]))

    def profile(self, order: Order) -> np.ndarray:
        """Per length and stream, how long the prefix of one order lives, `(L, streams)`."""
        profile = self.nothing()
        np.minimum.accumulate(self._lifetimes[list(order)], axis=0, out=profile[: len(order)])
        return profile

    def nothing(self) -> np.ndarray:
        """The profile of a plan without stages."""
        return np.zeros_like(self._lifetimes)

    def worth(self, profile: np.ndarray) -> float:
        """The value of the plan with this profile."""
        return float(self._steps @ profile.mean(axis=1))

    def value(self, orders: Iterable[Order]) -> float:
        """The mean over the streams of the performance that the longest surviving prefix has over the stream."""
        return self.worth(joined(map(self.profile, orders), self.nothing()))

    def gains(self, profile: np.ndarray) -> np.ndarray:
        """What the search for a path starts from: here the profile itself."""
        return profile

    def whole(self, profile: np.ndarray) -> Path:
        """The complete order that adds most among those that a beam of prefixes keeps."""
        ends = self._beam(profile, {0: ()}, 0.0, path_cost(0, self.num_slices))
        return max((path for path in ends if len(path.order) == self.num_slices), key=lambda path: path.gain)

    def path(self, profile: np.ndarray, nodes: Mapping[int, Order], rate: float, limit: int) -> Path | None:
        """The path with the most gain beyond `rate` times its cost that a beam finds; see [`Lattice.path`]."""
        ends = self._beam(profile, nodes, rate, limit)
        return max(ends, key=lambda path: path.gain - rate * path.cost, default=None)

    def _beam(self, profile: np.ndarray, nodes: Mapping[int, Order], rate: float, limit: int) -> list[Path]:
        """Go down depth by depth, from the nodes and from the best paths found so far."""
        ends: list[Path] = []
        beam: list[Path] = []
        held: list[list[Order]] = [[] for _ in range(self.num_slices + 1)]
        for order in nodes.values():
            held[len(order)].append(order)
        for depth in range(self.num_slices):
            # A plan that grows makes its nodes less promising, so what was found for one before bounds it now.
            here = heapq.nsmallest(BEAM_WIDTH, held[depth], key=lambda order: -self._promises.get(order, np.inf))
            beam += [Path(order, depth, 0.0) for order in here]
            longer = [path for path in beam if path_cost(path.start, depth + 1) <= limit]
            offers = [offer for path in longer for offer in self._longer(path, profile[depth])]
            offers.sort(key=lambda path: rate * path.cost - path.gain)
            kept: dict[int, Path] = {}
            for path in offers:
                reached = set_of(path.order)
                if reached not in nodes:
                    kept.setdefault(reached, path)
                if len(kept) == BEAM_WIDTH:
                    break
            beam = list(kept.values())
            ends += beam
        return ends

    def _longer(self, path: Path, served: np.ndarray) -> list[Path]:
        """A path with each other slice added, where `served` is how long the plan has a prefix of the new length."""
        depth = len(path.order)
        others = [j for j in range(self.num_slices) if j not in path.order]
        lives = self._lifetimes[others]  # of the longer prefixes, and then of the plan with them
        np.minimum(lives, self._end(path.order), out=lives)
        np.maximum(lives, served, out=lives)
        gains = path.gain + self._steps[depth] * (lives.sum(axis=1) - served.sum()) / len(served)
        if path.start == depth:
            self._promises[path.order] = float(gains.max())
        best = np.argsort(-gains, kind="stable")[:BEAM_WIDTH]
        return [Path((*path.order, others[i]), path.start, float(gains[i])) for i in best]

    def _end(self, order: Order) -> np.ndarray | float:
        """Per stream, how long a prefix lives, `(streams,)`; the empty one for ever."""
        return self._lifetimes[list(order)].min(axis=0) if order else np.inf


def _lifetimes(chances: np.ndarray, requests: int | None, rng: np.random.Generator, count: int) -> np.ndarray:
    """How long each slice lives in each stream, `(L, streams)`: in requests, or as a part of the horizon.

    The order of first hits is that of exponential clocks; how many requests pass between them is geometric. Over the
    whole life only the mean of those is needed, which is less noisy than numbers drawn.
    """
    order = np.argsort(rng.exponential(size=(count, len(chances))) / chances, axis=1)
    untouched = np.cumsum(chances[order][:, ::-1], axis=1)[:, ::-1]
    untouched = np.clip(untouched, 1e-12, 1.0)
    waits = 1 / untouched if requests is None else rng.geometric(untouched)
    ends = np.cumsum(waits, axis=1, dtype=float)
    if requests is not None:
        ends = np.minimum(ends - 1, requests) / requests
    lifetimes = np.empty_like(ends)
    np.put_along_axis(lifetimes, order, ends, axis=1)
    return np.ascontiguousarray(lifetimes.T)
