"""Streams of deletions on real folders: requests until nothing is left, against the tree of stages and closed forms.

`test_plan.py` plays 20,000 streams on the tree alone; here some of the same kind go through `S3TStore.delete`.
"""

from __future__ import annotations

import os
import random
import statistics
from pathlib import Path

import pytest

from hf_s3t import Plan, S3TStore
from hf_s3t.plan.sequences import cyclic, requests_until_dead
from stores import make_store

PER_SLICE = 40
"""Examples of each slice: more than any stream takes from one."""

Place = tuple[int, int]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Durability is tested elsewhere; here it would be most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def stream(plan: Plan, seed: int) -> list[Place]:
    """Slices that requests hit, uniformly, until by the tree of stages nothing is left."""
    draw, alive, hits = random.Random(seed), set(plan.stages), []
    while alive:
        place = (draw.randrange(plan.num_shards), draw.randrange(plan.num_slices))
        hits.append(place)
        alive.difference_update(plan.affected([place]))
    return hits


def rows(plan: Plan) -> list[dict[str, object]]:
    """Rows that say themselves where they lie."""
    places = [(shard, slice_id) for shard in range(plan.num_shards) for slice_id in range(plan.num_slices)]
    return [
        {"id": f"{shard}-{slice_id}-{number}", "shard": shard, "slice": slice_id}
        for shard, slice_id in places
        for number in range(PER_SLICE)
    ]


def requests_until_nothing_is_left(store: S3TStore, plan: Plan, hits: list[Place]) -> int:
    """Deletes one example after another as the stream says, and checks after each what is left."""
    asked: dict[Place, int] = {}
    left = set(plan.stages)
    for count, (shard, slice_id) in enumerate(hits, start=1):
        number = asked[shard, slice_id] = asked.get((shard, slice_id), -1) + 1
        receipt = store.delete(ids=[f"{shard}-{slice_id}-{number}"])
        gone = left.intersection(plan.affected([(shard, slice_id)]))
        left -= gone
        assert sorted(receipt.stages_removed) == sorted(stage.name for stage in gone)
        assert set(store.manifest().stages) == left
        assert store.served() == plan.served(left)
        if not store.served():
            return count
    raise AssertionError(f"{store.served()} are left of a stream that should leave nothing")


@pytest.mark.parametrize(
    "m, num_slices, budget, seeds",
    [
        (2, 3, 2, range(20, 35)),
        pytest.param(5, 4, 1, range(80, 100), marks=pytest.mark.slow),
        pytest.param(5, 4, 4, range(30, 50), marks=pytest.mark.slow),
        pytest.param(5, 6, 6, range(50, 60), marks=pytest.mark.slow),
    ],
)
def test_a_stream_through_a_real_store_ends_where_the_tree_says(
    tmp_path: Path, m: int, num_slices: int, budget: int, seeds: range
) -> None:
    plan = Plan.make(m, num_slices, cyclic(num_slices, budget))
    columns = {"slice_columns": ("shard", "slice"), "id_column": "id"}
    counts = []
    for seed in seeds:
        hits = stream(plan, seed)
        store = make_store(tmp_path / str(seed), rows(plan), plan=plan, **columns)
        counts.append(requests_until_nothing_is_left(store, plan, hits))
        assert counts[-1] == len(hits)
        assert not list(store.path.glob("shard-*")) and not (store.path / "adapter_model.safetensors").exists()
        assert store.status().requests == counts[-1]
    expected = requests_until_dead(m, num_slices, budget)
    if len(counts) >= 10:  # few streams, so this is wide; the sharp comparison has 20,000
        error = statistics.stdev(counts) / len(counts) ** 0.5
        assert statistics.mean(counts) == pytest.approx(expected, abs=3 * error)
