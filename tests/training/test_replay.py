"""Replay: how much of the earlier slices of its prefix a stage sees again; the promises hold for any share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import concatenate_datasets
from safetensors.torch import load_file

from hf_s3t import RecipeError, S3TStore, Stage
from hf_s3t.store.audit import verify
from hf_s3t.store.partition import keyed_digest, stage_examples
from models import bert_rows
from stores import records_of
from trainings import CASES, KEY, SLICES, WEIGHTS, World, assert_same_stores, place, published, same_tensors, without

PLAN = {"sequence_selection": [[0, 1, 2], [1, 2]], "args": {"per_device_train_batch_size": 8}}
HIT = {"shard-00/0-1", "shard-00/0-1-2", "shard-00/1", "shard-00/1-2"}
CACHED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class ReplayWorld(World):
    """Stages 0, 0-1, 0-1-2, 1 and 1-2, of a share of what came before."""

    share = 0.5

    def trainer(self, path: Path, rows: Any = None, **options: Any) -> Any:
        return super().trainer(path, rows, **PLAN | {"replay": self.share} | options)


def make_world(share: float, kind: str, folder: Path) -> ReplayWorld:
    world = ReplayWorld(CASES["bert"], kind, folder)
    world.share = share
    return world


MORE = [(0.0, "layer_group"), (0.5, "rank_group"), (0.0, "all")]
SLOW = [pytest.param(more, marks=pytest.mark.slow) for more in MORE]


@pytest.fixture(scope="module", params=[(0.5, "layer_group"), *SLOW])
def world(request, tmp_path_factory):
    return make_world(*request.param, tmp_path_factory.mktemp("world"))


def records(path: Path) -> dict[str, int]:
    """How many examples each stage saw."""
    return {name.split("/")[1]: record["examples"] for name, record in records_of(S3TStore(path)).items()}


# Which examples


def digests(slice_id: int, count: int = 2000) -> list[str]:
    return [hashlib.sha256(f"{slice_id} {number}".encode()).hexdigest()[:32] for number in range(count)]


def test_a_stage_sees_all_of_its_newest_slice_and_a_share_of_the_others():
    by_slice, stage = {number: digests(number) for number in range(4)}, Stage(0, (3, 0, 2))
    whole = [digest for number in stage.prefix for digest in sorted(by_slice[number])]
    assert list(stage_examples(stage, by_slice)) == list(stage_examples(stage, by_slice, 1.0)) == whole
    assert list(stage_examples(stage, by_slice, 0.0)) == sorted(by_slice[2])
    seen = stage_examples(stage, by_slice, 0.3)
    assert [digest for digest in whole if digest in set(seen)] == list(seen)
    counts = [len(set(seen) & set(by_slice[number])) for number in range(4)]
    assert counts[1] == 0 and counts[2] == 2000
    assert all(abs(counts[number] - 600) < 100 for number in (0, 3))
    assert set(seen) < set(stage_examples(stage, by_slice, 0.4))


def test_no_example_moves_another():
    by_slice, stage = {0: digests(0, 200), 1: digests(1, 200)}, Stage(0, (0, 1))
    seen = stage_examples(stage, by_slice, 0.5)
    for gone in (by_slice[0][7], seen[0], seen[-1]):
        rest = {number: [digest for digest in own if digest != gone][::-1] for number, own in by_slice.items()}
        assert stage_examples(stage, rest, 0.5) == tuple(digest for digest in seen if digest != gone)
    assert seen != stage_examples(Stage(1, (0, 1)), by_slice, 0.5)  # another stage draws others


# The promises


def test_stages_see_fewer_examples_and_an_audit_knows_which(world):
    counts = [sum(place(name) == (0, number) for name in world.rows["id"]) for number in range(SLICES)]
    seen = records(world.trained)
    assert (seen["0"], seen["1"]) == (counts[0], counts[1])
    assert counts[2] <= seen["0-1-2"] < sum(counts) and (seen["0-1-2"] == counts[2]) == (world.share == 0)
    assert S3TStore(world.trained).manifest().recipe["config"]["replay"] == world.share
    report = verify(world.trained)
    assert report.ok and report.complete


def test_after_delete_nothing_served_ever_saw_the_example(world, tmp_path):
    """A deletion hits every stage whose prefix holds the slice: what it did not see itself its parents saw."""
    store = world.copy(tmp_path)
    assert set(store.delete(ids=[world.victim]).stages_removed) == HIT
    world.trainer(tmp_path / "never", without(world.rows, world.slice_ids), sequence_selection=[[0]]).train()
    assert published(store.path) == published(tmp_path / "never")


def test_delete_and_train_is_training_from_scratch_without_the_example(world, tmp_path):
    store = world.copy(tmp_path)
    store.delete(ids=[world.victim])
    world.trainer(store.path, world.rows).train()  # with it: a tombstone counts whatever the share
    assert_same_stores(store.path, world.never_had)
    trained, repaired = published(world.trained), published(store.path)
    assert {name.rsplit("/", 1)[0] for name in trained if trained[name] != repaired[name] and "/" in name} == HIT


def test_new_rows_of_an_early_slice_train_every_later_stage_again(world, tmp_path):
    """A stage that does not see the new row itself stands on a parent that does."""
    store = world.copy(tmp_path)
    key = bytes.fromhex(KEY)
    unseen = next(
        position
        for position, name in enumerate(bert_rows(200)["id"][24:], 24)
        if place(name) == (0, 0)
        and not stage_examples(Stage(0, (0, 1)), {0: [keyed_digest(key, "id", name)]}, world.share)
    )
    rows = concatenate_datasets([world.rows, bert_rows(200).add_column("note", ["new"] * 200).select([unseen])])
    world.trainer(store.path, rows, extend=True).train()
    world.trainer(tmp_path / "scratch", rows).train()
    assert_same_stores(store.path, tmp_path / "scratch")


@pytest.mark.parametrize("kind", ["layer_group", "all"])
def test_a_stage_whose_newest_slice_is_empty_changes_nothing(kind, tmp_path):
    world = make_world(0.0, kind, tmp_path)
    with pytest.warns(UserWarning, match="1 of 3 slices are empty"):
        rows = without(world.rows, world.slice_ids)
        world.trainer(tmp_path / "out", rows, sequence_selection=[[0, 1, 2]]).train()
    stages = {name: load_file(tmp_path / f"out/shard-00/{name}/{WEIGHTS}") for name in ("0", "0-1", "0-1-2")}
    if kind == "all":
        assert same_tensors(stages["0-1"], stages["0"]) and not same_tensors(stages["0-1-2"], stages["0"])
    else:
        assert not any(value.any() for name, value in stages["0-1"].items() if ".lora_" in name)
        assert all(value.any() for name, value in stages["0-1-2"].items())


# Settings, cost, cache


def test_a_recipe_without_the_field_is_of_stages_that_saw_everything(tmp_path):
    world = make_world(1.0, "layer_group", tmp_path)
    options = {"sequence_selection": [[0, 1]]}
    world.trainer(tmp_path / "out", **options).train()
    manifest = json.loads((tmp_path / "out/s3t.json").read_text())
    assert "replay" not in manifest["recipe"]["config"] and S3TStore(tmp_path / "out").manifest().replay == 1
    before = published(tmp_path / "out")
    world.trainer(tmp_path / "out", **options).train()
    assert published(tmp_path / "out") == before
    with pytest.raises(RecipeError, match=r"config\.replay: the store does not name it, this run has 0\.5"):
        world.trainer(tmp_path / "out", replay=0.5, **options).train()


def test_the_cost_is_told(world, tmp_path, caplog):
    caplog.set_level("INFO")
    world.trainer(tmp_path / "out")._open_store()
    passes = {0.5: 7.0, 0.0: 5.0}[world.share]  # one for each stage, and a share for each of four earlier slices
    assert S3TStore(tmp_path / "out").status().repair_slice_passes == passes
    trainer = world.trainer(tmp_path / "more")
    line = trainer._open_store()
    assert f"5 of 5 stages to train, {passes:g} slice passes = {passes / 3:.1f} x one plain" in line
    assert trainer.progress.total == passes


def test_cached_states_are_fed_to_the_examples_that_are_seen(tmp_path):
    world = make_world(0.5, "layer_group", tmp_path)
    settings = {
        "whole": {"activation_cache": "disk"},
        "nothing": {"activation_cache": "disk", "activation_cache_gb": 1e-9},
    }
    for name, options in settings.items():
        model = world.case.make_model(**CACHED)
        world.trainer(tmp_path / name, model=model, sequence_selection=[[0, 1, 2]], **options).train()
    assert_same_stores(tmp_path / "whole", tmp_path / "nothing")
    assert list((tmp_path / "whole/.s3t/activations").glob("*"))
