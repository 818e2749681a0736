"""How long a plan lasts and what it costs to keep: streams of deletion requests against a plan, all at once.

Responsible for the state of many streams under a repair policy. The streams are drawn by `arrivals.py`, estimates are
made by `estimates.py`, and what is known without drawing is in `plan/life.py`.

The state of a shard is the set of slices that were hit since its last repair, as the bits of one integer. A prefix is
alive while its own set of bits has none in common with it. Requests are taken one after the other, over all streams.
A repair takes no time, and a shard is dead when nothing of it can be served until it is trained again, if only for
that moment.
"""

import math
from collections.abc import Iterator

import numpy as np

from ..plan.life import first_slice_chances, place_chances
from ..plan.sequences import check_count
from ..plan.tree import Plan
from .arrivals import BLOCK, MAX_REQUESTS, DeletionRequests, RepairPolicy, check_horizon
from .bitsets import StageSets
from .estimates import Curve, Simulation

MAX_CELLS = 5 * 10**7  # numbers in the largest array: 400 MB
NEVER = np.iinfo(np.int64).max


def simulate(
    plan: Plan,
    requests: DeletionRequests | None = None,
    policy: RepairPolicy | None = None,
    *,
    streams: int = 2000,
    seed: int = 0,
    max_requests: int | None = None,
    horizon_days: float | None = None,
) -> Simulation:
    """Send streams of deletion requests to a trained plan and repair it as the policy says.

    A repair trains every missing stage of the shards that it repairs; a stage at depth `d` costs `d` slice passes. A
    shard without orders stays dead and does not count as one that dies.

    Args:
        plan (`Plan`): The plan, of at most 64 slices per shard.
        requests (`DeletionRequests`, *optional*): How requests come. By default one by one, all places equally likely.
        policy (`RepairPolicy`, *optional*): When to repair. By default never.
        streams (`int`, *optional*, defaults to 2000): How many streams.
        seed (`int`, *optional*, defaults to 0): The same seed gives every plan of the same size and every policy the
            same streams.
        max_requests (`int`, *optional*): The horizon, as a number of requests.
        horizon_days (`float`, *optional*): The horizon in days instead; needs `requests.per_day`. A policy that
            repairs needs one of the two.

    Returns:
        `Simulation`: Lifetimes, costs and curves, with their uncertainty.

    Raises:
        ValueError: If a number is out of range, the horizon is missing or given twice, or the prior or the policy does
            not fit the plan.

    >>> result = simulate(Plan.make(1, 2, [(0, 1), (1, 0)]))
    >>> bool(result.requests_until_all_dead.low < 3 < result.requests_until_all_dead.high)
    True
    """
    if not isinstance(plan, Plan) or not isinstance(requests, DeletionRequests | None):
        found = f"a {type(plan).__name__} and a {type(requests).__name__}"
        raise ValueError(f"simulate() takes a Plan and a DeletionRequests, not {found}. Name the others: policy=...")
    sets = StageSets.of(plan)
    requests, policy = requests or DeletionRequests(), policy or RepairPolicy()
    if policy.below is not None and policy.below > sets.full.min():
        found = f"the longest sequence of shard {sets.full.argmin()} has {sets.full.min()} slices"
        raise ValueError(f"below={policy.below}, but {found}, and no repair gives it more. Give at most as many.")
    if not policy.repairs and max_requests is None and horizon_days is None:
        rarest = min(chance for shard in first_slice_chances(plan, requests.prior) for chance in shard)
        if rarest * MAX_REQUESTS < 1:
            found = f"Nothing ends these streams soon: a slice that starts a sequence has the chance {rarest:.3g}"
            raise ValueError(f"{found} to be hit by a request. Give max_requests, or horizon_days.")
    chances = place_chances(plan.num_shards, plan.num_slices, requests.prior)
    state = _Streams(sets, requests, policy, streams, max_requests, horizon_days)
    return state.run(requests.blocks(chances, streams, seed), plan.cost)


def simulate_sisa(
    num_shards: int,
    num_slices: int,
    requests: DeletionRequests | None = None,
    *,
    streams: int = 2000,
    seed: int = 0,
    max_requests: int | None = None,
    horizon_days: float | None = None,
) -> Simulation:
    """SISA in the same engine: one sequence per shard, retrained from its last clean slice at once.

    A request that hits slice `j` of `1..L` retrains stages `j` to `L`, a stage at depth `d` on its `d` slices: that
    costs `j + .. + L` slice passes, as the same stages of S3T would. It answers every request with gradient steps.

    Args:
        num_shards (`int`): `m`.
        num_slices (`int`): `L`.
        requests, streams, seed, max_requests, horizon_days: See [`simulate`], also for returns and errors.

    >>> bool(simulate_sisa(2, 4, max_requests=5).slices_in_use.mean.min() == 8)
    True
    """
    return simulate(
        Plan.make(num_shards, num_slices, [tuple(range(num_slices))]),
        requests,
        RepairPolicy(below=num_slices),
        streams=streams,
        seed=seed,
        max_requests=max_requests,
        horizon_days=horizon_days,
    )


def simulate_full_retraining(
    num_shards: int,
    num_slices: int,
    requests: DeletionRequests | None = None,
    *,
    streams: int = 2000,
    seed: int = 0,
    max_requests: int | None = None,
    horizon_days: float | None = None,
) -> Simulation:
    """One model of all the data, trained again from scratch after every request, in the same engine.

    A retraining costs `m L` slice passes, one over each slice. A burst is answered by one retraining.

    Args:
        num_shards, num_slices (`int`): `m` and `L` of the plan to compare with: they say how large a slice is.
        requests, streams, seed, max_requests, horizon_days: See [`simulate`], also for returns and errors.

    >>> simulate_full_retraining(2, 4, max_requests=5).repair_cost_per_request.mean
    8.0
    """
    sets, requests = StageSets.of_one_model(num_shards, num_slices), requests or DeletionRequests()
    chances = place_chances(num_shards, num_slices, requests.prior)
    state = _Streams(sets, requests, RepairPolicy(below=chances.size), streams, max_requests, horizon_days)
    return state.run(requests.blocks(chances, streams, seed), chances.size)


class _Streams:
    """The streams that have not ended, one column each, and what is known of all streams by their ids.

    A row is one example to be deleted: `examples` rows make a request, `burst` requests an event, after which (or
    before which, where a repair was due meanwhile) shards are repaired.
    """

    def __init__(
        self,
        sets: StageSets,
        requests: DeletionRequests,
        policy: RepairPolicy,
        streams: int,
        max_requests: int | None,
        horizon_days: float | None,
    ) -> None:
        check_count("streams", streams, 2, 10**6)
        check_horizon(requests, policy, max_requests, horizon_days)
        self.sets, self.policy = sets, policy
        self.examples, self.rows_per_event = requests.examples, requests.examples * requests.burst
        self.max_requests, self.horizon = max_requests, math.inf if horizon_days is None else horizon_days
        self.full = int(sets.full.sum())
        steps = 0 if horizon_days is None else int(horizon_days) + 1
        rows = requests.bursts_per_block(streams) * self.rows_per_event
        _check_size(streams * max(sets.num_shards, rows, steps), self.full * rows // self.examples)

        self.start = 0  # requests answered so far
        self.ids = np.arange(streams)
        self.hits = np.zeros(streams * sets.num_shards, dtype=np.uint64)  # stream * shards + shard
        self.total = np.full(streams, self.full)  # slices in use
        self.due = np.full(streams, policy.every_days or math.inf)  # the next repair, in days

        self.requests, self.repairs, self.repair_cost = (np.zeros(streams, dtype=np.int64) for _ in range(3))
        self.first_dead, self.all_dead = (np.full(streams, NEVER) for _ in range(2))
        self.days = np.zeros(streams)
        self.has_days = requests.per_day is not None
        self.by_day = np.zeros((steps, streams), dtype=np.int32)  # how slices in use change up to the end of each day
        self.by_day[:1] = self.full
        self.shortest = NEVER  # requests of a stream that ended at the horizon
        self.counts = np.bincount(self.total)  # streams with 0, 1, 2, ... slices in use
        self.curve = [self.counts[None]]  # of every step, until they become curves
        self.curves: list[Curve] = []

    def run(self, blocks: Iterator[tuple[np.ndarray, np.ndarray | None]], training_cost: int) -> Simulation:
        """Answer requests until every stream has ended."""
        while self.ids.size and self.start != self.max_requests:
            places, moments = next(blocks)
            if self.max_requests is not None:
                places = places[: (self.max_requests - self.start) * self.examples]
            if len(self.ids) < len(self.requests):
                places, moments = places[:, self.ids], None if moments is None else moments[:, self.ids]
            self._answer(places, moments)
        self._close_curve()
        if not self.policy.repairs:
            self.requests = np.minimum(self.requests, self.all_dead)
        return Simulation(
            requests=self.requests,
            first_dead=np.where(self.first_dead == NEVER, 0, self.first_dead),
            all_dead=np.where(self.all_dead == NEVER, 0, self.all_dead),
            repairs=self.repairs,
            repair_cost=self.repair_cost,
            days=self.days if self.has_days else None,
            training_cost=training_cost,
            slices_in_use=Curve.joined(self.curves, min(self.shortest, int(self.requests.max())) + 1),
            slices_in_use_by_day=self._curve_by_day() if len(self.by_day) else None,
        )

    def _answer(self, places: np.ndarray, moments: np.ndarray | None) -> None:
        """Take a block of requests, `(rows, streams)`, row by row; count afterwards, over all rows at once."""
        rows, columns = places.shape
        places = places.astype(np.int64)
        bits = self.sets.bit_of.take(places, mode="clip")
        if moments is not None:
            moments = moments.repeat(self.rows_per_event, axis=0)[:rows]
            bits[moments > self.horizon] = 0
        cells = self.sets.shard_of.take(places, mode="clip")
        cells += self.sets.num_shards * np.arange(columns)
        before, after = np.empty_like(bits), np.empty_like(bits)
        gained = np.zeros(places.shape, dtype=np.int64)
        for row in range(rows):
            if moments is not None and self.policy.every_days and row % self.rows_per_event == 0:
                self._repair_due(moments[row], gained[row])
            cell = cells[row]
            before[row] = hit = self.hits.take(cell)
            self.hits[cell] = np.bitwise_or(hit, bits[row], out=after[row])
            if self.policy.below and (row + 1) % self.rows_per_event == 0:
                self._repair_low(cells[row + 1 - self.rows_per_event : row + 1], gained[row])
        self._count(places, before, after, gained, moments)

    def _repair_due(self, moments: np.ndarray, gained: np.ndarray) -> None:
        """Repair every shard of the streams whose repair was due before their next request, or before the horizon."""
        assert self.policy.every_days is not None
        now = np.minimum(moments, self.horizon)
        late = np.flatnonzero(now >= self.due)
        if not late.size:
            return
        self._repair((late[:, None] * self.sets.num_shards + np.arange(self.sets.num_shards)).ravel(), gained)
        self._change_by_day(np.floor(self.due[late]) + 1, late, gained[late])
        self.due[late] = (now[late] // self.policy.every_days + 1) * self.policy.every_days

    def _repair_low(self, cells: np.ndarray, gained: np.ndarray) -> None:
        """Repair the shards that this event has brought below the length of the policy."""
        touched = cells[0] if len(cells) == 1 else np.unique(cells)
        lengths = self.sets.lengths(self.hits.take(touched), touched % self.sets.num_shards)
        self._repair(touched[lengths < self.policy.below], gained)

    def _repair(self, cells: np.ndarray, gained: np.ndarray) -> None:
        cost = self.sets.costs(self.hits[cells], cells % self.sets.num_shards)
        cells, cost = cells[cost > 0], cost[cost > 0]
        columns, shards = np.divmod(cells, self.sets.num_shards)
        np.add.at(gained, columns, self.sets.full[shards] - self.sets.lengths(self.hits[cells], shards))
        np.add.at(self.repair_cost, self.ids[columns], cost)
        self.repairs[self.ids[np.unique(columns)]] += 1
        self.hits[cells] = 0

    def _count(
        self,
        places: np.ndarray,
        before: np.ndarray,
        after: np.ndarray,
        gained: np.ndarray,
        moments: np.ndarray | None,
    ) -> None:
        """What a block of requests did, from the hit sets of the shards that it hit."""
        rows, columns = places.shape
        hit = np.flatnonzero(before != after)  # flat positions; most requests of a long stream hit nothing new
        shards = self.sets.shard_of.take(places.ravel()[hit]) if self.sets.differ else None
        left = self.sets.lengths(after.ravel()[hit], shards)
        lost = self.sets.lengths(before.ravel()[hit], shards) - left
        # For now the changes; most rows change nothing in most streams.
        total = gained.copy() if self.policy.repairs else gained
        total.ravel()[hit] -= lost
        changed = np.flatnonzero(total) if self.policy.repairs else hit
        change = total.ravel()[changed]
        for row, in_use in enumerate(total):
            np.add(in_use, total[row - 1] if row else self.total, out=in_use)
        self._count_in_use(changed // (columns * self.examples), total.ravel()[changed], change, rows // self.examples)
        in_use = total.ravel()[hit] - (gained.ravel()[hit] if self.policy.below else 0)  # before a repair
        self._note(self.first_dead, hit[(left == 0) & (lost > 0)])
        self._note(self.all_dead, hit[in_use == 0])
        if moments is None:
            self.requests[self.ids] += rows // self.examples
        else:
            self._count_days(hit, lost, hit[in_use == 0], gained, moments)
        self.total = total[-1]
        self.start += rows // self.examples
        self._drop_ended(moments)

    def _count_in_use(self, steps: np.ndarray, now: np.ndarray, change: np.ndarray, number: int) -> None:
        """Move streams from one number of slices in use to another, and add a number of steps to the curve."""
        values = self.full + 1
        came = np.bincount(steps * values + now, minlength=number * values)
        went = np.bincount(steps * values + now - change, minlength=number * values)
        counts = self.counts + (came - went).reshape(number, values).cumsum(axis=0)
        self.counts = counts[-1]
        if self.shortest == NEVER:
            self.curve.append(counts)
        if number * values * len(self.curve) > BLOCK:
            self._close_curve()

    def _close_curve(self) -> None:
        """Counts become means and bands, which need less memory."""
        if self.curve:
            self.curves.append(Curve.of_counts(np.concatenate(self.curve)))
            self.curve = []

    def _note(self, first: np.ndarray, positions: np.ndarray) -> None:
        """Keep the first request of each stream among flat positions of a block."""
        rows, columns = np.divmod(positions, len(self.ids))
        np.minimum.at(first, self.ids[columns], self.start + rows // self.examples + 1)

    def _count_days(
        self, hit: np.ndarray, lost: np.ndarray, gone: np.ndarray, gained: np.ndarray, moments: np.ndarray
    ) -> None:
        columns = len(self.ids)
        self.requests[self.ids] += (moments[:: self.examples] <= self.horizon).sum(axis=0)
        self.days[self.ids] = np.minimum(moments[-1], self.horizon)
        if not self.policy.repairs:
            np.minimum.at(self.days, self.ids[gone % columns], moments.ravel()[gone])
        self._change_by_day(np.ceil(moments.ravel()[hit]), hit % columns, -lost)
        if self.policy.below:  # the other rule has counted its repairs, which fall between requests
            repaired = np.flatnonzero(gained)
            self._change_by_day(np.ceil(moments.ravel()[repaired]), repaired % columns, gained.ravel()[repaired])

    def _change_by_day(self, day: np.ndarray, columns: np.ndarray, change: np.ndarray) -> None:
        """Slices in use change by so many, as seen from the end of a day on."""
        seen = day < len(self.by_day)
        np.add.at(self.by_day, (day[seen].astype(np.int64), self.ids[columns[seen]]), change[seen])

    def _curve_by_day(self) -> Curve:
        days = self.by_day.cumsum(axis=0, dtype=np.int64)
        counts = [np.bincount(day, minlength=self.full + 1) for day in days]
        return Curve.of_counts(np.stack(counts))

    def _drop_ended(self, moments: np.ndarray | None) -> None:
        """Streams end at the horizon; without repairs, also when nothing is left."""
        goes_on = np.ones(len(self.ids), dtype=bool) if self.policy.repairs else self.total > 0
        if moments is not None:
            late = moments[-1] > self.horizon
            self.shortest = min(self.shortest, int(self.requests[self.ids[late & goes_on]].min(initial=NEVER)))
            goes_on &= ~late
        if not goes_on.all():
            self.hits = self.hits.reshape(len(self.ids), -1)[goes_on].ravel()
            self.ids, self.total, self.due = self.ids[goes_on], self.total[goes_on], self.due[goes_on]


def _check_size(*cells: int) -> None:
    if max(cells) > MAX_CELLS:
        raise ValueError(
            f"This simulation needs arrays of {max(cells):.3g} numbers, more than {MAX_CELLS:.0e}. "
            "Use fewer streams, a nearer horizon, smaller bursts or a smaller plan."
        )
