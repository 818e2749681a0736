"""A deletion says what it costs those who stay: what answers less, what is dark, what a repair costs, what is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command_line import run
from hf_s3t import Plan, S3TStore
from hf_s3t.plan.life import life_left
from hf_s3t.plan.sequences import cyclic
from hf_s3t.store.outlook import outlook_of
from hf_s3t.store.receipts import read_receipts
from stores import Known, make_store, people

ROWS = people(60)
PLAN = Plan.make(2, 3, cyclic(3, 2), prune=False)  # (0, 1, 2) and (1, 2, 0)


@pytest.fixture
def store(tmp_path: Path) -> S3TStore:
    return make_store(tmp_path / "out", ROWS, plan=PLAN)


@pytest.fixture
def known(store: S3TStore) -> Known:
    return Known.of(store, ROWS)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """Warnings since this was asked last."""

    def since() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        caplog.clear()
        return found

    yield since


def expected_outlook(store: S3TStore) -> tuple[int, float, float]:
    """Counted here from the manifest's own words."""
    status = store.status()
    return len(status.missing), status.repair_slice_passes, status.requests_left


def test_a_deletion_says_once_what_less_answers(store: S3TStore, known: Known, told: Any) -> None:
    told()
    receipt = store.delete(ids=[known.at(0, 1)[0]])
    assert (receipt.served_before["0"], receipt.served_after["0"]) == ([0, 1, 2], [0])
    dark = len(known.at(0, 1)) + len(known.at(0, 2)) - 1
    (line,) = told()
    assert "shard 0: 0-1-2 -> 0." in line and "shard 1" not in line and "dead" not in line.split("until a shard")[0]
    assert f" {dark} rows that nobody asked to delete are dark" in line
    stages, passes, left = expected_outlook(store)
    assert (stages, passes) == (5, 2 + 3 + 1 + 2 + 3)
    assert f"costs {passes:g} slice passes per epoch ({stages} stages)" in line
    assert left == pytest.approx(4) and f"About {left:.1f} more requests until a shard is dead" in line
    assert (receipt.repair_stages, receipt.repair_slice_passes, receipt.requests_left) == (stages, passes, left)
    kept = read_receipts(store)[-1]
    assert kept == json.loads(json.dumps(receipt.to_json())) and kept["requests_left"] == left


def test_a_dead_shard_is_named(store: S3TStore, told: Any) -> None:
    told()
    receipt = store.delete(slices=[(1, 0), (1, 1)])
    (line,) = told()
    assert "shard 1: 0-1-2 -> none (dead)." in line and line.endswith("A shard is dead.")
    assert receipt.requests_left == 0 and "bare base" not in line
    store.delete(slices=[(0, 0), (0, 1)])
    (line,) = told()
    assert "shard 0: 0-1-2 -> none (dead)." in line and "the bare base model answers" in line


def test_where_no_prefix_gets_shorter_nothing_is_said(tmp_path: Path, told: Any) -> None:
    store = make_store(tmp_path / "out", ROWS, plan=Plan.make(1, 3, [(0, 1, 2), (1, 0)], prune=False))
    store.delete(slices=[(0, 2)])
    told()
    assert store.served() == {0: (0, 1)}
    again = store.delete(slices=[(0, 2)])
    assert again.status == "unchanged" and again.repair_stages is None
    shorter = make_store(tmp_path / "two", ROWS, plan=Plan.make(1, 3, [(0, 1), (2, 1)], prune=False))
    assert shorter.delete(slices=[(0, 0)]).served_after == {"0": [2, 1]}
    assert told() == []


def test_a_dry_run_says_it_beforehand(store: S3TStore, known: Known, told: Any) -> None:
    told()
    asked = {"ids": [known.at(0, 1)[0], known.at(1, 0)[0]]}
    before = store.delete(**asked, dry_run=True)
    assert told() == [] and before.status == "dry run"
    after = store.delete(**asked)
    fields = ("repair_stages", "repair_slice_passes", "requests_left", "dark_examples", "served_after")
    assert [getattr(before, name) for name in fields] == [getattr(after, name) for name in fields]
    assert expected_outlook(store) == (after.repair_stages, after.repair_slice_passes, after.requests_left)


def test_the_command_line_names_cost_and_cliff_before_and_after(store: S3TStore, known: Known) -> None:
    asked = ("delete", store.path, "--ids", known.at(0, 1)[0])
    before, after = run(*asked, "--dry-run"), run(*asked)
    _, passes, left = expected_outlook(store)
    for result in (before, after):
        assert result.exit_code == 0
        assert f"{passes:g} slice passes per epoch, 5 stages" in result.stdout
        assert f"about {left:.1f} until a shard is dead, without a repair" in " ".join(result.stdout.split())
    assert "answers with less" not in after.stderr  # the table says it
    dead = run("delete", store.path, "--slices", "0:0", "--dry-run")
    assert "0: a shard is dead" in dead.stdout


def test_without_the_state_it_says_that_the_rows_are_not_known(store: S3TStore, tmp_path: Path, told: Any) -> None:
    shutil.rmtree(store.private)
    bare = S3TStore(store.path)
    told()
    bare.delete(slices=[(0, 1)])
    (line,) = [line for line in told() if "answers with less" in line]
    assert "shard 0: 0-1-2 -> 0." in line and "it is not known how many rows are dark until then" in line


def test_the_outlook_is_that_of_the_status_under_the_prior_that_leaves_fewer(store: S3TStore) -> None:
    manifest = store.manifest()
    uniform = life_left(PLAN, None, manifest.stages).until_first_dead.mean
    assert outlook_of(manifest).requests_left == uniform
    for prior, fewer in (((0.5, 0.5, 0.0), True), ((0.0, 0.0, 1.0), False)):
        given = life_left(PLAN, prior, manifest.stages).until_first_dead.mean
        assert (given < uniform) is fewer
        assert outlook_of(replace(manifest, deletion_prior=prior)).requests_left == min(given, uniform)
    assert outlook_of(manifest)[:2] == (0, 0)


def test_nothing_of_it_is_computed_before_the_deletion_is_on_record(
    store: S3TStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def outlook(manifest: Any) -> Any:
        order.append("outlook")
        return outlook_of(manifest)

    monkeypatch.setattr("hf_s3t.store.deletion.outlook_of", outlook)
    store._delete({"slices": [(0, 1)]}, when_durable=lambda: order.append("durable"))
    assert order == ["durable", "outlook"]


def test_a_repair_with_replay_costs_what_its_stages_see_again(store: S3TStore) -> None:
    """Half of the earlier slices: a stage at depth 3 reads one slice whole and two by half."""
    store.delete(slices=[(0, 0), (0, 1)])
    manifest = store.manifest()
    recipe = {**manifest.recipe, "config": {**manifest.recipe["config"], "replay": 0.5}}
    missing = manifest.plan.missing(manifest.stages)
    whole, half = outlook_of(manifest), outlook_of(replace(manifest, recipe=recipe))
    assert whole.repair_slice_passes == sum(stage.depth for stage in missing)
    assert half.repair_slice_passes == sum(1 + (stage.depth - 1) / 2 for stage in missing) < whole.repair_slice_passes
