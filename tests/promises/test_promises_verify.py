"""What an auditor finds out by training again, over a Llama-, a BERT- and a ViT-shaped model and every kind of stage.

After training, deletion and repair every stage comes out equal. Where one row was changed in silence, the stages whose
slices hold it differ, and no other.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hf_s3t import S3TStore, Stage
from hf_s3t.store.partition import keyed_digest
from hf_s3t.store.retraining import ROWS_CHECK
from stores import edit_database
from trained_stores import broken, tree
from trainings import CASES, KEY, VICTIM_SLICE, WORLDS, World, logits_of, without


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory):
    case, kind = request.param
    return World(CASES[case], kind, tmp_path_factory.mktemp(f"{case}-{kind}"))


def changed(world: World):
    """The rows with one of slice 1 changed: what the model sees of it, under the same id."""
    name = next(name for name in sorted(world.slice_ids) if name != world.victim)

    def change(row):
        if row["id"] != name:
            return row
        if "pixel_values" in row:
            return row | {"pixel_values": row["pixel_values"][::-1]}
        return row | {"input_ids": row["input_ids"][::-1]}

    return name, without(world.rows, {world.victim}).map(change, keep_in_memory=True, load_from_cache_file=False)


@pytest.mark.brief("bert-layer_group")
def test_after_deletion_and_repair_every_stage_is_equal(world, tmp_path):
    store = world.copy(tmp_path)
    store.delete(ids=[world.victim])
    trainer = world.trainer(store.path)  # the deleted row is handed in again
    trainer.train()
    before, answers = tree(store.path), logits_of(trainer.model, world.case)
    report = trainer.verify("all")
    assert report.ok and report.complete and (report.influence_free, report.bit_equal) == ("holds", "equal")
    assert [stage.stage for stage in report.retrained] == sorted(stage.name for stage in store.manifest().plan.stages)
    assert tree(store.path) == before and trainer.store.path == store.path
    assert logits_of(trainer.model, world.case).equal(answers), "it serves what it served"
    assert trainer.train().global_step == 0


@pytest.mark.brief("bert-layer_group")
def test_a_row_that_was_changed_in_silence_shows_at_the_stages_that_saw_it(world, tmp_path):
    """The store was trained on it as it is now, and the index says what it was: nothing but training tells."""
    path, honest = tmp_path / "out", without(world.rows, {world.victim})
    name, rows = changed(world)
    world.trainer(path, rows).train()
    contents = world.trainer(tmp_path / "other", honest).rows.entries
    digest = keyed_digest(bytes.fromhex(KEY), "id", name)
    values = bytes.fromhex(contents[digest].content), bytes.fromhex(digest)
    edit_database(path, "UPDATE examples SET content = ? WHERE digest = ?", *values)
    edit_database(path, "UPDATE records SET record = json_remove(record, '$.index')")
    report = S3TStore(path).verify("all", make_trainer=lambda out: world.trainer(Path(out), honest))
    different = {stage.stage for stage in report.retrained if stage.outcome == "different"}
    saw = {name for name in report.stages if (0, VICTIM_SLICE) in Stage.from_name(name).slices}
    assert different == saw and len(report.retrained) - len(saw) == 3
    assert {stage.outcome for stage in report.retrained} == {"equal", "different"} and not report.ok
    assert all(tensor.largest > 0 for stage in report.retrained for tensor in stage.tensors)
    assert report.influence_free == "holds"


@pytest.mark.brief("bert-layer_group")
def test_a_row_that_is_handed_in_otherwise_is_told_by_the_index(world, tmp_path):
    store = S3TStore(shutil.copytree(world.never_had, tmp_path / "out"))
    _, rows = changed(world)
    report = store.verify(sample=3, seed=1, make_trainer=lambda out: world.trainer(Path(out), rows))
    assert "another content than the index knows (shard:slice 0:1)" in broken(report)[ROWS_CHECK]
    told = [stage for stage in report.retrained if stage.outcome == "different"]
    assert told and all("another content" in stage.reasons[0] for stage in told)
