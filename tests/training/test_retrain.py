"""Stages that are trained again: which are equal, which differ and how far, and of which nothing follows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import models
import trained_stores
from hf_s3t import RecipeError, S3TStore, Stage, StateError
from hf_s3t.store.audit import verify
from hf_s3t.store.retraining import ROWS_CHECK, chosen_stages
from hf_s3t.store.stage_comparison import Retrained
from stores import edit_database, records_of
from trained_stores import WEIGHTS, broken, edit_json, edit_tensors, tree

AGREEMENT = "stages are those that the state knows"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_stores.train_store(tmp_path_factory.mktemp("retrain") / "trained")


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "store"))


def victim() -> str:
    return models.llama_rows(1)["id"][0]


def stage_of_victim(store: Path) -> str:
    return S3TStore(store).locate(ids=[victim()])[0].stages[0]


def make_trainer(output_dir: str) -> object:
    return trained_stores.make_trainer(output_dir, models.llama_rows(trained_stores.ROWS))


def trained_again(store: Path, *stages: str, make: Callable = make_trainer) -> list[Retrained]:
    return list(S3TStore(store).verify(stages, make_trainer=make).retrained or ())


def test_every_stage_trained_again_is_the_same(store: Path) -> None:
    before, made = tree(store), []

    def make(output_dir: str) -> object:
        made.append(output_dir)
        return make_trainer(output_dir)

    report = S3TStore(store).verify("all", make_trainer=make)
    assert [stage.stage for stage in report.retrained or ()] == list(report.stages)
    assert report.ok and report.complete and (report.influence_free, report.bit_equal) == ("holds", "equal")
    assert {stage.outcome for stage in report.retrained or ()} == {"equal"} and len(made) == 1
    assert tree(store) == before and not Path(made[0]).exists()


def nudge(tensors: dict) -> None:
    next(iter(tensors.values()))[0, 0] += 0.5


def test_changed_stage_is_found_by_training_it_again(store: Path) -> None:
    edit_tensors(store, "shard-01/2", nudge)
    assert set(broken(verify(store))) == {AGREEMENT}  # hashes say nothing: the manifest was rewritten, too
    report = S3TStore(store).verify(["shard-01/1", "shard-01/2", "shard-01/2-0"], make_trainer=make_trainer)
    beside, changed, above = report.retrained or ()
    assert (beside.outcome, changed.outcome, above.outcome) == ("equal", "different", "different")
    (tensor,) = changed.tensors
    assert (tensor.differing, tensor.values, round(tensor.largest or 0, 3)) == (1, 64, 0.5)
    assert above.reasons[-1] == "it begins on shard-01/2, as stored, which differs itself"
    assert report.bit_equal == "different" and not report.ok
    assert any("shard-01/2: what differs: base_model" in finding for finding in report.findings)


INNOCENT = [
    ("""json_set(record, '$.versions', json('{"torch": "1.0"}'))""", "it was trained with torch 1.0, and is now "),
    ("json_set(record, '$.machine.threads', '99')", "it was trained with threads 99, and is now with threads "),
    ("json_remove(record, '$.machine')", "it is not on record on what it was trained"),
    ("json_set(record, '$.machine.processes', '2')", "it was trained with processes 2, and is now with processes 1"),
]


@pytest.mark.parametrize(("change", "reason"), INNOCENT)
def test_stage_of_another_stack_or_machine_is_not_judged(store: Path, change: str, reason: str) -> None:
    edit_tensors(store, "shard-01/2", nudge)
    edit_database(store, f"UPDATE records SET record = {change} WHERE stage = 'shard-01/2'")
    edit_database(store, "UPDATE records SET record = json_remove(record, '$.files')")  # as in old stores
    report = S3TStore(store).verify(["shard-01/2"], make_trainer=make_trainer)
    (found,) = report.retrained or ()
    assert found.outcome == "not comparable" and found.reasons[0].startswith(reason) and found.tensors
    assert report.ok and not report.complete and report.bit_equal == "not comparable"


def test_record_of_a_stage_says_on_what_it_was_trained(store: Path) -> None:
    for record in records_of(S3TStore(store)).values():
        assert record["machine"].keys() == {"device", "processes", "threads", "kernels", "processor"}
        assert (record["machine"]["device"], record["machine"]["processes"]) == ("cpu", "1")


def test_bytes_decide_whatever_the_record_says(store: Path) -> None:
    edit_database(store, """UPDATE records SET record = json_set(record, '$.versions', json('{"torch": "1.0"}'))""")
    (found,) = trained_again(store, "shard-01/2")
    assert found.outcome == "equal"


def test_retraining_after_a_deletion_leaves_the_example_out(store: Path) -> None:
    stage = stage_of_victim(store)
    S3TStore(store).delete(ids=[victim()])
    with pytest.raises(ValueError, match="not a live stage"):
        trained_again(store, stage)
    report = S3TStore(store).verify("all", make_trainer=make_trainer)
    assert report.bit_equal == "equal" and report.ok and stage not in report.stages


def test_stage_that_saw_a_vanished_example_is_found(store: Path, trained: Path) -> None:
    stage = stage_of_victim(store)
    record = json.dumps(records_of(S3TStore(store))[stage])
    entry = json.loads((store / "s3t.json").read_text())["stages"][stage]
    S3TStore(store).delete(ids=[victim()])
    shutil.copytree(trained / stage, store / stage)
    edit_json(store / "s3t.json", lambda manifest: manifest["stages"].update({stage: entry}))
    edit_database(store, "INSERT INTO records VALUES (?, ?)", stage, record)
    (found,) = trained_again(store, stage)
    assert found.outcome == "different" and "one that it saw is gone" in found.reasons[0]


def changed_row(rows: Any, name: str) -> Any:
    """The rows with another token in one of them."""

    def change(row: dict) -> dict:
        return row | {"input_ids": [5, *row["input_ids"][1:]]} if row["id"] == name else row

    return rows.map(change, keep_in_memory=True, load_from_cache_file=False)


def test_changed_row_is_told_with_the_stages_that_saw_it(store: Path) -> None:
    ((shard, slice_id),) = S3TStore(store).locate(ids=[victim()])[0].places
    rows = changed_row(models.llama_rows(trained_stores.ROWS), victim())
    report = S3TStore(store).verify("all", make_trainer=lambda out: trained_stores.make_trainer(out, rows))
    saw = {name for name in report.stages if (shard, slice_id) in Stage.from_name(name).slices}
    assert {stage.stage for stage in report.retrained or () if stage.outcome == "different"} == saw
    assert {stage.stage for stage in report.retrained or () if stage.outcome == "equal"} == {*report.stages} - saw
    told = broken(report)[ROWS_CHECK]
    assert f"1 of the rows have another content than the index knows (shard:slice {shard}:{slice_id})" in told
    assert all(name in told for name in saw)


def test_row_that_is_not_handed_in_is_told(store: Path) -> None:
    rows = models.llama_rows(trained_stores.ROWS).select(range(1, trained_stores.ROWS))
    report = S3TStore(store).verify(sample=20, seed=3, make_trainer=lambda out: trained_stores.make_trainer(out, rows))
    assert "1 of the rows are in the index and not in the train set" in broken(report)[ROWS_CHECK]
    assert report.bit_equal == "different" and len(report.retrained or ()) == 14


def test_rows_that_came_later_make_a_stage_not_comparable_without_training_it(store: Path) -> None:
    rows = models.llama_rows(trained_stores.ROWS + 24)
    trained_stores.make_trainer(str(store), rows).train()  # nothing is missing: the rows come into the index alone
    found = trained_again(store, *verify(store).stages, make=lambda out: trained_stores.make_trainer(out, rows))
    later = [stage for stage in found if stage.outcome != "equal"]
    assert later and {stage.outcome for stage in later} == {"not comparable"}
    assert all("added later" in stage.reasons[0] and not stage.tensors for stage in later)


def test_draw_can_be_repeated_and_is_told(store: Path) -> None:
    s3t = S3TStore(store)
    one, other = (chosen_stages(s3t, None, 4, seed)[0] for seed in (1, 2))
    assert len(one) == 4 and one != other and one == sorted(one)
    assert chosen_stages(s3t, None, 4, 1) == (one, 1) and len(chosen_stages(s3t, "all", 99, 1)[0]) == 14
    seeds = {chosen_stages(s3t, None, 2, None)[1] for _ in range(4)}
    assert len(seeds) > 1 and None not in seeds


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"retrain": "shard-00/0"}, "'all' or a list"),
        ({"retrain": ["shard-00/9"]}, "Live stages: shard-00/0, "),
        ({"retrain": ["shard-00/0"], "sample": 1}, "name no stages"),
        ({"sample": 0}, "1 or more"),
        ({"retrain": "all", "seed": 1}, "give `sample`"),
        ({"make_trainer": make_trainer}, "together"),
        ({"retrain": "all"}, "Give `make_trainer`"),
    ],
)
def test_contradictions_are_refused(store: Path, asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S3TStore(store).verify(**asked)


def test_retraining_refuses_what_it_can_not_compare(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output_dir"):
        trained_again(store, "shard-01/2", make=lambda folder: make_trainer(str(tmp_path / "elsewhere")))
    rows = models.llama_rows(trained_stores.ROWS)
    with pytest.raises(RecipeError, match="config.lora_alpha"):
        trained_again(store, "shard-01/2", make=lambda out: trained_stores.make_trainer(out, rows, lora_alpha=3))
    edit_json(store / "s3t.json", lambda data: data["recipe"].update(processes=2))
    (found,) = trained_again(store, "shard-01/2")
    assert found.outcome == "not comparable" and found.reasons == ("processes: the store has 2, this run 1",)
    shutil.rmtree(store / ".s3t")
    with pytest.raises(StateError):
        trained_again(store, "shard-01/2")


def test_stage_whose_parent_cannot_be_used_is_not_judged(store: Path) -> None:
    (store / "shard-01/2" / WEIGHTS).unlink()
    parent, child = trained_again(store, "shard-01/2", "shard-01/2-0")
    assert parent.outcome == "different" and "is missing" in parent.reasons[0]
    assert child.outcome == "not comparable" and "is missing, but the manifest lists it" in child.reasons[0]
