"""A model in memory says once when less of it answers, whoever deleted: itself, another process, or a trainer."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hf_s3t import S3TEnsemble, S3TStore
from hf_s3t.store.outlook import outlook_of
from served import SHAPES, copy, load
from trainers import make_trainer

LOGGER = "hf_s3t.store.outlook"


@pytest.fixture
def store(tmp_path: Path) -> S3TStore:
    return copy("llama", tmp_path)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said since this was asked last; nothing else was, at the default level."""
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return found


def test_a_model_that_deletes_says_it_once(store: S3TStore, caplog: pytest.LogCaptureFixture) -> None:
    ensemble = load(store, "llama")
    counts: Counter[tuple[int, int]] = Counter(
        location.places[0] for location in store.locate(ids=SHAPES["llama"].rows(36)["id"])
    )
    told(caplog)
    receipt = ensemble.delete(slices=[(0, 1)])
    (line,) = told(caplog)
    assert receipt.served_after["0"] == [2, 0]
    assert "shard 0: 0-1-2 -> 2-0." in line and " 0 rows that nobody asked to delete are dark" in line
    wanted = next(
        location.asked
        for location in store.locate(ids=SHAPES["llama"].rows(36)["id"])
        if location.places == ((0, 0),)
    )
    ensemble.delete(ids=[wanted])
    (line,) = told(caplog)
    outlook = outlook_of(store.manifest())
    assert "shard 0: 2-0 -> 2." in line and f" {counts[0, 0] - 1} rows that nobody asked to delete" in line
    assert f"costs {outlook.repair_slice_passes:g} slice passes per epoch ({outlook.repair_stages} stages)" in line
    assert f"About {outlook.requests_left:.1f} more requests until a shard is dead" in line
    ensemble.delete(slices=[(0, 2), (1, 0), (1, 2), (2, 0), (2, 2)])
    (line,) = told(caplog)
    assert "shard 2: 0-1-2 -> none (dead)" in line and "the bare base model answers" in line
    ensemble.refresh()
    assert ensemble.delete(slices=[(0, 2)]).status == "unchanged" and told(caplog) == []


def test_a_pod_says_it_when_it_refreshes(store: S3TStore, tmp_path: Path, caplog: Any) -> None:
    pod = shutil.copytree(store.path, tmp_path / "pod", ignore=shutil.ignore_patterns(".s3t"))
    behind, ensemble = S3TEnsemble.from_pretrained(pod, SHAPES["llama"].build()), load(store, "llama")
    told(caplog)
    store.delete(slices=[(2, 0)])
    (said,) = told(caplog)
    shutil.rmtree(pod)
    shutil.copytree(store.path, pod, ignore=shutil.ignore_patterns(".s3t"))
    assert behind.refresh() is True
    (line,) = told(caplog)
    assert line.startswith(f"{pod} answers with less") and "shard 2: 0-1-2 -> 2." in line
    assert "it is not known how many rows are dark until then" in line
    assert line.split("dark until then.")[1] == said.split("has seen them.")[1]  # cost and cliff, by the manifest
    assert ensemble.refresh() is True
    (line,) = told(caplog)
    assert line == said  # the state is here
    assert behind.refresh() is ensemble.refresh() is False and told(caplog) == []


def test_a_trainer_says_it_once(tmp_path: Path, caplog: Any) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    told(caplog)
    trainer.delete(slices=[(0, 1)])
    (line,) = told(caplog)
    assert "shard 0: 0-1 -> 0." in line and "costs 2 slice passes per epoch (1 stage)" in line


def test_members_that_wait_for_slots_are_not_called_dead(store: S3TStore, caplog: Any) -> None:
    ensemble = load(store, "llama", spare_slots=1)
    told(caplog)
    with ensemble.answering():
        store._delete({"slices": [(0, 1), (1, 1), (2, 1)]})
        ensemble_follower = ensemble._followed()
        ensemble_follower.follow(strict=True, wait=False)
        ensemble_follower.tell()
        (line,) = told(caplog)
        assert ensemble.pending and "wait until running answers end" in line
    assert ensemble.refresh() is True
    (line,) = told(caplog)
    assert line.count("0-1-2 -> 2-0") == 3 and "dead)" not in line
