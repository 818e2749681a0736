"""Audits: everything that can be wrong with a store is broken on purpose and has to be found, where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import models
import trained_stores
from hf_s3t import S3TStore, StoreError
from hf_s3t.store import deletion
from hf_s3t.store.audit import VerifyReport, verify
from hf_s3t.store.partition import Entry, assign, keyed_digest
from stores import edit_database, index_of, records_of
from trained_stores import CONTENTS, WEIGHTS, broken, edit_json, edit_tensors, forge, tree

FILES = "stage files are the manifest's"
TREE = "parents, plan and served prefixes agree"
SURPLUS = "nothing else lies in the store"
ROOT = "the root adapter is the served model"
INTENTS = "no deletion is unfinished"
DATABASE = "the state's database is whole"
AGREEMENT = "stages are those that the state knows"
GENERATION = "state and manifest are of one generation"
TOMBSTONES = "tombstones are the manifest's"
BURIED = "no stage is older than a deletion from it"
EXAMPLES = "stages saw the examples of the index"
RECEIPTS = "receipts are a chain, and what they say holds"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_stores.train_store(tmp_path_factory.mktemp("verify") / "trained")


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "store"))


def not_checked(report: VerifyReport) -> dict[str, str]:
    return {check.name: "\n".join(check.not_checked) for check in report.checks if check.not_checked}


def victim() -> str:
    return models.llama_rows(1)["id"][0]


def stage_of_victim(store: Path) -> str:
    return S3TStore(store).locate(ids=[victim()])[0].stages[0]


# ---- stores that are as they should be ----


def test_intact_store_holds_and_stays_as_it_is(store: Path) -> None:
    before = tree(store)
    report = verify(str(store))
    assert report.ok and report.complete
    assert {check.outcome for check in report.checks} == {"holds"}
    assert len(report.stages) == 14
    assert json.loads(json.dumps(report.to_json()))["ok"] is True
    assert tree(store) == before


def test_store_after_a_deletion_holds(store: Path) -> None:
    S3TStore(store).delete(ids=[victim()])
    report = verify(store)
    assert report.ok and report.complete and report.generation == 1


@pytest.mark.parametrize(
    ("base", "rows", "config"),
    [
        (models.tiny_llama, models.llama_rows, {"stage_parameters": "all"}),
        (models.tiny_bert, models.bert_rows, {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    ],
    ids=["all", "head"],
)
def test_other_kinds_of_stages_hold(base: Callable, rows: Callable, config: dict, tmp_path: Path) -> None:
    fields = {"num_shards": 1, "num_slices": 2} | config
    path = trained_stores.train_store(tmp_path / "store", rows(12), base=base(), **fields)
    report = verify(path)
    assert report.ok and report.complete, broken(report)
    edit_tensors(path, "shard-00/1", lambda tensors: tensors.update({"base_model.model.scores": torch.zeros(1)}))
    assert "neither LoRA nor part of a head" in broken(verify(path))[CONTENTS]


# ---- published files ----


def test_flipped_byte(store: Path) -> None:
    file = store / "shard-00/1" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = broken(verify(store))
    assert set(found) == {FILES}
    assert "shard-00/1/adapter_model.safetensors" in found[FILES]


def test_missing_file(store: Path) -> None:
    (store / "shard-00/1/adapter_config.json").unlink()
    found = broken(verify(store))
    assert "shard-00/1/adapter_config.json is missing" in found[FILES]
    assert "shard-00/1 cannot be read" in found[CONTENTS]


def test_truncated_file_of_the_served_prefix(store: Path) -> None:
    (store / "shard-00/0" / WEIGHTS).write_bytes(b"\xff" * 5)
    assert {FILES, CONTENTS, ROOT} == set(broken(verify(store)))


@pytest.mark.parametrize("forged", [False, True])
def test_swapped_stage_folders(store: Path, forged: bool) -> None:
    one, other = store / "shard-00/1", store / "shard-00/2"
    one.rename(store / "aside")
    other.rename(one)
    (store / "aside").rename(other)
    if forged:
        forge(store, "shard-00/1")
        forge(store, "shard-00/2")
    found = broken(verify(store))
    assert (FILES in found) is not forged
    assert "shard-00/1: its weights say that they are those of 'shard-00/2'" in found[CONTENTS]


def test_extra_tensor(store: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(store, "shard-01/1", lambda tensors: tensors.update({name: torch.zeros(2, 32)}))
    found = broken(verify(store))
    assert set(found) == {CONTENTS, AGREEMENT}
    assert f"shard-01/1: {name} lies outside its layers [6, 7]" in found[CONTENTS]
    assert "it has other tensors than most stages of its depth" in found[CONTENTS]


def test_missing_layer(store: Path) -> None:
    def drop(tensors: dict) -> None:
        for name in [name for name in tensors if ".layers.6." in name]:
            del tensors[name]

    edit_tensors(store, "shard-01/1", drop)
    assert "shard-01/1: it has no tensor in its layer 6" in broken(verify(store))[CONTENTS]


def test_half_of_a_pair(store: Path) -> None:
    name = "base_model.model.model.layers.6.self_attn.q_proj.lora_A.weight"
    edit_tensors(store, "shard-01/1", lambda tensors: tensors.pop(name))
    assert "lora_B.weight is there without its other half" in broken(verify(store))[CONTENTS]


def test_other_rank_and_type(store: Path) -> None:
    def widen(tensors: dict) -> None:
        for name, value in tensors.items():
            tensors[name] = torch.cat([value, value], dim=0 if ".lora_A." in name else 1).half()

    edit_tensors(store, "shard-01/1", widen)
    found = broken(verify(store))[CONTENTS]
    assert "is of rank 4, the recipe says 2" in found and "is of type F16" in found


def test_changed_config(store: Path) -> None:
    edit_json(store / "shard-01/2/adapter_config.json", lambda config: config.update(lora_alpha=99))
    forge(store, "shard-01/2")
    assert "shard-01/2: `lora_alpha` is 99" in broken(verify(store))[CONTENTS]


STRAYS = ["shard-00/1-0/adapter_model.safetensors", "shard-00/1/optimizer.pt", "old.safetensors", "runs/model.bin",
          ".s3t/keep.pt", "shard-07/0/x"]  # fmt: skip


@pytest.mark.parametrize("name", STRAYS)
def test_stray_file(store: Path, name: str) -> None:
    (store / name).parent.mkdir(parents=True, exist_ok=True)
    (store / name).write_bytes(b"tensors")
    assert list(broken(verify(store))) == [SURPLUS]


def test_empty_stray_folder(store: Path) -> None:
    (store / "shard-00/1-0").mkdir()
    assert "shard-00/1-0/ is no stage" in broken(verify(store))[SURPLUS]


def test_running_checkpoints_and_other_texts_are_no_strays(store: Path) -> None:
    S3TStore(store).private_folder("running")
    for name in (".s3t/running/shard-00_1/checkpoint-1/optimizer.pt", "notes.txt"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(b"x")
    assert verify(store).ok


def test_git_history_is_not_looked_into(store: Path) -> None:
    (store / ".git").mkdir()
    report = verify(store)
    assert report.ok and not report.complete
    assert "history" in not_checked(report)[SURPLUS]


@pytest.mark.parametrize("forged", [False, True])
def test_stale_root_adapter(store: Path, forged: bool) -> None:
    names = ("adapter_config.json", WEIGHTS)
    old = {name: (store / name).read_bytes() for name in names}
    digests = json.loads((store / "s3t.json").read_text())["root"]
    S3TStore(store).delete(slices=[(0, 0)])
    for name in names:
        (store / name).write_bytes(old[name])
    if forged:
        edit_json(store / "s3t.json", lambda manifest: manifest.update(root=digests))
    found = broken(verify(store))
    assert set(found) == {ROOT}
    assert "is not what the served prefixes give" in found[ROOT]


def test_root_adapter_that_should_not_be_there(store: Path) -> None:
    weights = (store / WEIGHTS).read_bytes()
    S3TStore(store).delete(slices=[(shard, number) for shard in range(2) for number in range(3)])
    assert verify(store).ok
    (store / WEIGHTS).write_bytes(weights)
    assert {ROOT, SURPLUS} == set(broken(verify(store)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: data["stages"]["shard-00/0-1"].update(parent="shard-00/1"), "names 'shard-00/1' as its parent"),
        (lambda data: data.update(served={}), "served prefixes"),
        (lambda data: data["stages"].pop("shard-01/2"), "its parent shard-01/2 is not in the store"),
        (lambda data: data["recipe"]["partition"].update(num_slices=4), "plan and partition differ"),
    ],
)
def test_manifest_that_disagrees_with_itself(store: Path, change: Callable, text: str) -> None:
    edit_json(store / "s3t.json", change)
    assert text in broken(verify(store))[TREE]


def test_malformed_recipe_is_reported_and_no_crash(store: Path) -> None:
    edit_json(store / "s3t.json", lambda data: data["recipe"].update(config={"r": 2}))
    assert "could not go on. KeyError: 'stage_parameters'" in broken(verify(store))[CONTENTS]


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no store"):
        verify(tmp_path)


# ---- the state ----


def test_unfinished_deletion(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(deletion, "carry_out", killed)
        with pytest.raises(KeyboardInterrupt):
            S3TStore(store).delete(ids=[victim()])
    found = broken(verify(store))
    assert "was begun and not finished" in found[INTENTS]
    assert ROOT in found  # what stock PEFT would load still holds it
    S3TStore(store).delete(ids=[victim()])
    assert verify(store).ok


def test_tombstone_newer_than_a_stage(store: Path) -> None:
    S3TStore(store).delete(ids=[victim()])
    (stage,) = verify(store).stages[:1]
    shard, slice_id = int(stage[6:8]), int(stage[9])

    edit_database(store, "UPDATE tombstones SET shard = ?, slice = ?", shard, slice_id)
    found = broken(verify(store))
    assert set(found) == {BURIED, TOMBSTONES}
    assert (
        f"{stage} was trained at generation 0, and examples of its slices were deleted at generation 1"
        in found[BURIED]
    )


def test_stage_put_back_after_its_deletion(store: Path, trained: Path) -> None:
    stage = stage_of_victim(store)
    record = json.dumps(records_of(S3TStore(store))[stage])
    entry = json.loads((store / "s3t.json").read_text())["stages"][stage]
    S3TStore(store).delete(ids=[victim()])
    shutil.copytree(trained / stage, store / stage)
    edit_json(store / "s3t.json", lambda manifest: manifest["stages"].update({stage: entry}))
    assert "no record of when" in not_checked(verify(store))[BURIED]
    edit_database(store, "INSERT INTO records VALUES (?, ?)", stage, record)
    found = broken(verify(store))
    assert "may hold their influence" in found[BURIED]
    assert "one that it saw is gone" in found[EXAMPLES]


def test_deleted_example_in_the_index(store: Path, trained: Path) -> None:
    S3TStore(store).delete(ids=[victim()])
    digest = keyed_digest(S3TStore(store).key, "id", victim())
    with S3TStore(store).changing() as state:
        state.add_examples({digest: index_of(S3TStore(trained))[digest]})
    assert "1 deleted examples are still in the index" in broken(verify(store))[BURIED]


def test_generations_that_differ(store: Path) -> None:
    log = {"receipt-1": {"places": [], "named": True}}
    edit_json(store / "s3t.json", lambda data: data.update(generation=1, log=log))
    assert set(broken(verify(store))) == {GENERATION}
    edit_json(store / "s3t.json", lambda data: data.update(generation=0, log={}))
    edit_database(store, "INSERT INTO events (name, named) VALUES ('receipt-1', 1)")
    assert set(broken(verify(store))) == {GENERATION, TOMBSTONES}


def test_lost_tombstone(store: Path) -> None:
    S3TStore(store).delete(ids=[victim()])
    edit_database(store, "DELETE FROM tombstones")
    assert set(broken(verify(store))) == {TOMBSTONES}


def test_example_that_left_the_index_without_a_deletion(store: Path) -> None:
    edit_database(store, "DELETE FROM examples WHERE number = 1")
    found = broken(verify(store))
    assert set(found) == {AGREEMENT, EXAMPLES} and "one that it saw is gone" in found[EXAMPLES]


def test_rows_that_were_added_later_are_told_apart(store: Path) -> None:
    digest = next(d for n in range(100) if assign(S3TStore(store).key, d := f"{n:032x}", 2, 3) == (0, 1))
    with S3TStore(store).changing() as state:
        state.add_examples({digest: Entry(0, 1, None, "00" * 16)})
    report = verify(store)
    assert report.ok and not report.complete
    assert "shard-00/0-1 saw" in not_checked(report)[EXAMPLES] and "added later" in not_checked(report)[EXAMPLES]


def test_lost_state_is_said(store: Path) -> None:
    shutil.rmtree(store / ".s3t")
    report = verify(store)
    assert report.ok and not report.complete
    assert set(not_checked(report)) == {DATABASE, AGREEMENT, GENERATION, TOMBSTONES, BURIED, EXAMPLES, RECEIPTS}
    assert not (store / ".s3t").exists()


def test_damaged_state_is_broken(store: Path) -> None:
    (store / ".s3t/state.sqlite").write_text("{")
    assert {DATABASE, AGREEMENT, GENERATION, TOMBSTONES, BURIED, EXAMPLES} == set(broken(verify(store)))


def test_lost_and_foreign_key(store: Path) -> None:
    (store / ".s3t/partition.key").unlink()
    report = verify(store)
    assert report.ok and set(not_checked(report)) == {TOMBSTONES}
    assert verify(S3TStore(store, trained_stores.KEY)).complete
    assert "not the one" in broken(verify(S3TStore(store, "another key of 16 bytes")))[TOMBSTONES]
