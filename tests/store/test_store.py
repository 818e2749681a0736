"""What an eraser does with a store, on synthetic stages: no model and no dataset is there."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hf_s3t import Plan, S3TStore, Stage, StateError, StoreError, UnknownExampleError
from hf_s3t.cli.tables import show_status
from hf_s3t.files import read_limited
from hf_s3t.lora.adapter import WEIGHTS_FILE, average, join
from hf_s3t.plan.sequences import cyclic
from hf_s3t.serving.loading import read_members
from hf_s3t.store.card import render_card
from hf_s3t.store.receipts import read_receipts
from stores import EXPORTS, KEY, RECEIPTS, Known, make_store, stage_adapter, stage_folders, state_of, tree


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "out"
    store = make_store(path, group_column="person")
    with store.writing():
        pass
    return path, Known.of(store)


@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "out")
    return S3TStore(tmp_path / "out")


@pytest.fixture
def known(made):
    return made[1]


# Looking


def test_a_fresh_store_at_a_glance(store):
    status = store.status()
    assert (status.planned, status.trained, status.missing, status.repair_slice_passes) == (18, 18, (), 0)
    assert status.served == {"shard-00/0-1-2": (0, 1, 2), "shard-01/0-1-2": (0, 1, 2)}
    assert (status.generation, status.examples, status.deleted_examples, status.requests) == (0, 48, 0, 0)
    assert (status.dead_shards, status.interrupted_deletions, status.exports) == ((), 0, ())
    assert json.loads(json.dumps(status.to_json()))["trained"] == 18


def test_rows_that_no_served_prefix_saw_are_dark_until_the_repair(store, known):
    assert store.status().dark_examples == 0
    receipt = store.delete(ids=["row-1"])
    assert store.status().dark_examples == receipt.dark_examples > 0
    shutil.rmtree(store.private)
    assert store.status().dark_examples is None


def test_the_status_shows_what_trained_the_stages_of_one_stack_too(store):
    console = Console(width=300, file=io.StringIO(), record=True)
    console.print(show_status(dataclasses.replace(store.status(), stacks={"torch 1.0": 18})))
    shown = console.export_text()
    assert "18 stages with torch 1.0" in shown and "bit-equality" not in shown


def test_the_status_needs_neither_key_nor_state(store):
    shutil.rmtree(store.private)
    status = store.status()
    assert (status.examples, status.deleted_examples, status.trained) == (None, None, 18)


def test_a_folder_without_a_store_says_so(tmp_path):
    for ask in ("status", "live", "served"):
        with pytest.raises(StoreError, match="holds no store: there is no s3t.json"):
            getattr(S3TStore(tmp_path / "nothing"), ask)()
    assert not (tmp_path / "nothing").exists()


def test_locate_says_where_and_in_which_stages(store, known):
    (there, group, nobody) = store.locate(ids=["row-3"], groups=["person-1", "nobody"])
    place = known.places["row-3"]
    assert (there.asked, there.found, there.places) == ("row-3", "live", (place,))
    assert (
        there.stages == tuple(sorted(s.name for s in store.manifest().stages if place in s.slices))
        and len(there.stages) == 6
    )
    assert (group.found, group.places, group.stages) == ("live", (place,), there.stages)
    assert (nobody.found, nobody.places, nobody.stages) == ("unknown", (), ())
    store.delete(groups=["person-1"])
    for location in store.locate(ids=["row-3"], groups=["person-1"]):
        assert (location.found, location.places, location.stages) == ("deleted", (place,), ())


def test_looking_changes_nothing(store):
    before = tree(store.path)
    store.status(), store.locate(ids=["row-0", "x"]), store.served(), read_members(store)
    assert tree(store.path) == before


# Adapters


def test_prefixes_and_the_root_adapter_are_the_stages_joined(store):
    path = Stage(0, (1, 2, 0)).path
    expected = join([stage_adapter(stage) for stage in path])
    assembled = store.assemble(0, (1, 2, 0))
    assert assembled.config == expected.config
    assert all(torch.equal(assembled.tensors[name], value) for name, value in expected.tensors.items())
    members = [join([stage_adapter(stage) for stage in Stage(m, (0, 1, 2)).path]) for m in (0, 1)]
    root, stored = average(members), load_file(store.path / "adapter_model.safetensors")
    assert stored.keys() == root.tensors.keys()
    assert all(torch.equal(stored[name], value) for name, value in root.tensors.items())
    assert json.loads((store.path / "adapter_config.json").read_bytes()) == root.config


@pytest.mark.parametrize(
    ("base", "line"),
    [
        ({"class": "LlamaForCausalLM", "revision": "v1"}, 'ForCausalLM.from_pretrained("me/base", revision="v1")'),
        (
            {"class": "ViTForImageClassification", "num_labels": 3},
            'ForImageClassification.from_pretrained("me/base", num_labels=3)',
        ),
        ({"class": "Something(os.system('x'))"}, '.from_pretrained("me/base")'),
    ],
)
def test_the_card_loads_the_base_as_it_was(tmp_path, base, line):
    manifest = make_store(tmp_path / "out").manifest()
    config = {**manifest.recipe["config"], "task_type": None}
    named = dataclasses.replace(manifest, recipe={"base": {"id": "me/base", **base}, "config": config})
    blocks = re.findall("```python\n(.*?)```", render_card(named), re.DOTALL)
    assert len(blocks) == 3 and all(f"\nbase = AutoModel{line}\n" in blocks[at] for at in (0, 2))


def test_the_card_of_a_base_without_an_id_has_no_placeholder(tmp_path):
    card = (make_store(tmp_path / "out").path / "README.md").read_text()
    assert "base_model_id=" in card and "base =" not in card and "from_pretrained(base, store)" in card
    assert re.findall("```python\n(.*?)```", card, re.DOTALL)[0].startswith("store = ")


def test_several_shards_with_heads_have_no_root_adapter_until_one_is_left(tmp_path):
    store = make_store(tmp_path / "out", head=True)
    assert store.manifest().root is None and not (store.path / "adapter_model.safetensors").exists()
    with pytest.raises(StoreError, match="several live shards with heads have no single adapter"):
        store.export(tmp_path / "copy")
    assert "no root adapter: several live shards" in (store.path / "README.md").read_text()
    store.delete(slices=[(0, 0), (0, 1), (0, 2)])
    expected = join([stage_adapter(stage, head=True) for stage in Stage(1, (0, 1, 2)).path])
    stored = load_file(store.path / "adapter_model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in expected.tensors.items())
    store.delete(slices=[(1, 0), (1, 1), (1, 2)])
    assert not (store.path / "adapter_model.safetensors").exists()
    assert not (store.path / "adapter_config.json").exists()
    with pytest.raises(StoreError, match="no stage is live"):
        store.export(tmp_path / "copy")
    assert store.status().dead_shards == (0, 1)


@pytest.mark.parametrize("damage", ["changed", "truncated", "absent", "config"])
def test_a_stage_that_is_not_what_was_trained_is_never_served(store, damage):
    folder = store.path / "shard-00" / "0"
    weights = folder / "adapter_model.safetensors"
    if damage == "changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif damage == "absent":
        weights.unlink()
    else:
        (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(StoreError, match="is missing, but the manifest lists it|is not the file that was trained"):
        store.assemble(0, (0, 1))
    assert store.assemble(0, (1, 2)).tensors


def test_what_was_compared_is_what_is_used(store, monkeypatch):
    stage = next(iter(store.manifest().stages))
    expected = store.read_stage(stage)

    def read_then_replaced(path, limit):
        data = read_limited(path, limit)
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\x40" if path.name == WEIGHTS_FILE else b"{}")
        return data

    monkeypatch.setattr("hf_s3t.store.folder.read_limited", read_then_replaced)
    found = store.read_stage(stage)
    assert found.config == expected.config
    assert all((found.arrays[name] == value).all() for name, value in expected.arrays.items())


@pytest.mark.parametrize("prefix", [(0, 1, 2), (0, 2), (0,)])
def test_a_stage_that_is_not_live_can_not_be_assembled(store, prefix):
    store.delete(slices=[(0, 0)])
    with pytest.raises(StoreError, match="is not in the store: never trained, or removed by a deletion"):
        store.assemble(0, prefix)


@pytest.mark.parametrize("name", ["shard-00/../../x", "../x/0", "/tmp/0", "shard-00/.."])
def test_a_hostile_manifest_is_refused(store, name):
    data = json.loads((store.path / "s3t.json").read_bytes())
    data["stages"][name] = data["stages"]["shard-00/0"]
    (store.path / "s3t.json").write_text(json.dumps(data))
    outside = store.path.parent / "x"
    outside.mkdir()
    for act in (store.status, lambda: store.delete(slices=[(0, 0)]), lambda: read_members(store)):
        with pytest.raises(StoreError, match="manifest is damaged"):
            act()
    assert outside.exists()


def test_a_linked_stage_or_shard_is_neither_read_nor_followed(store, tmp_path):
    shutil.move(store.path / "shard-00", tmp_path / "elsewhere")
    (store.path / "shard-00").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="leaves the store"):
        store.assemble(0, (0,))
    before = tree(tmp_path / "elsewhere")
    store.delete(slices=[(0, 0)])
    assert tree(tmp_path / "elsewhere") == before


# Exports


def test_an_export_is_remembered_and_named_by_later_deletions(store, known, tmp_path):
    store.export(tmp_path / "root")
    store.export(tmp_path / "named", prefix="shard-01/1-2")
    store.export(tmp_path / "bare", prefix=(2,))
    expected = stage_adapter(Stage(0, (2,)))
    assert all(
        torch.equal(value, expected.tensors[name])
        for name, value in load_file(tmp_path / "bare" / "adapter_model.safetensors").items()
    )
    assert {file.name for file in (tmp_path / "root").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert store.status().exports == tuple(sorted(str(tmp_path / name) for name in ("root", "named", "bare")))
    first = store.delete(ids=[known.at(0, 2)[0]])
    assert first.exports == [str(tmp_path / "bare"), str(tmp_path / "root")]
    second = store.delete(ids=[known.at(1, 0)[0]])
    assert second.exports == [str(tmp_path / "root")]


@pytest.mark.parametrize("where", ["adapter", "shard-00/0", ".", ".s3t/x", "../out/x"])
def test_nothing_is_exported_into_the_store(store, where):
    before = tree(store.path)
    with pytest.raises(StoreError, match="lies inside the store"):
        store.export(store.path / where)
    with pytest.raises(StoreError, match="inside the store"):
        store.export_state(store.path / where / "state.json")
    assert tree(store.path) == before


def test_an_export_is_on_record_before_its_first_byte(store, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError):
        store.export(tmp_path / "file")
    assert store.status().exports == (str(tmp_path / "file"),)


# The state's backup


def test_the_state_survives_its_loss(store, known, tmp_path):
    store.delete(ids=["row-0"], reference="DSR-1")
    store.export(tmp_path / "copy")
    store.export_state(tmp_path / "backup.json")
    assert (tmp_path / "backup.json").stat().st_mode & 0o777 == 0o600
    before = tree(store.path)
    shutil.rmtree(store.private)
    store.import_state(tmp_path / "backup.json")
    assert tree(store.path).keys() == before.keys()
    changed = {name for name, digest in tree(store.path).items() if digest != before[name]}
    assert not changed
    assert (store.private / "partition.key").stat().st_mode & 0o777 == 0o600
    assert [receipt["reference"] for receipt in read_receipts(store)] == ["DSR-1"]
    assert store.locate(ids=["row-0"])[0].found == "deleted"
    assert store.delete(ids=["row-0"]).status == "unchanged"


def test_a_newer_state_from_elsewhere_removes_what_was_deleted_there(store, known, made, tmp_path):
    there = S3TStore(shutil.copytree(made[0], tmp_path / "there"))
    name = known.at(0, 1)[0]
    there.delete(ids=[name])
    there.export_state(tmp_path / "state.json")
    store.import_state(tmp_path / "state.json")
    ours, theirs = tree(store.path), tree(there.path)
    assert {file for file in theirs if ours.get(file) != theirs[file]} <= {RECEIPTS, EXPORTS}
    assert not any(Stage.from_name(folder).slices & {(0, 1)} for folder in stage_folders(store.path))


def test_a_foreign_or_damaged_state_is_refused(store, tmp_path):
    store.delete(ids=["row-0"])
    make_store(tmp_path / "foreign", key=b"f" * 32).export_state(tmp_path / "foreign.json")
    (tmp_path / "other.json").write_text('{"hf_s3t_state": 1}')
    shutil.copy(store.database, tmp_path / "no backup.json")
    shutil.copy(tmp_path / "foreign.json", tmp_path / "torn.json")
    os.truncate(tmp_path / "torn.json", (tmp_path / "torn.json").stat().st_size // 2)
    before = tree(store.path)
    for name, message in [
        ("foreign", "belongs to another store"),
        ("other", "damaged"),
        ("no backup", "no state that `export_state` wrote"),
        ("torn", "damaged"),
    ]:
        with pytest.raises(StateError, match=message):
            store.import_state(tmp_path / f"{name}.json")
        assert tree(store.path) == before


def test_an_older_state_makes_nothing_forgotten(store, tmp_path):
    store.export_state(tmp_path / "old.json")
    store.delete(ids=["row-0"])
    before = tree(store.path)
    store.import_state(tmp_path / "old.json")
    assert tree(store.path) == before
    assert store.locate(ids=["row-0"])[0].found == "deleted"


def test_states_that_forked_are_joined_in_any_order(store, known, made, tmp_path):
    elsewhere = next(name for name, place in known.places.items() if place != known.places["row-0"])
    fork = S3TStore(shutil.copytree(made[0], tmp_path / "fork"))
    store.delete(ids=["row-0", "row-3"])
    store.readmit(ids=["row-3"])
    fork.delete(ids=[elsewhere, "row-3"])  # which the other one does not know of when it readmits
    for one, other, file in ((store, fork, "first.json"), (fork, store, "second.json"), (store, fork, "third.json")):
        one.export_state(tmp_path / file)
        other.import_state(tmp_path / file)
    assert state_of(store)[1] == state_of(fork)[1] == store.manifest().tombstones
    assert store.manifest().log == fork.manifest().log and store.manifest().generation == 3
    assert {store.locate(ids=[name])[0].found for name in ("row-0", elsewhere, "row-3")} == {"deleted"}
    gone = {known.places[name] for name in ("row-0", elsewhere, "row-3")}
    for one in (store, fork):
        assert not any(Stage.from_name(folder).slices & gone for folder in stage_folders(one.path))


def test_a_state_of_another_store_deletes_nothing(store, tmp_path):
    other = make_store(tmp_path / "other", key=b"o" * 32)
    other.delete(ids=["row-0"])
    before = tree(store.path)
    shutil.copy(other.database, store.database)
    with pytest.raises(StateError, match="is of another store"):
        store.delete(ids=["row-3"])
    shutil.copytree(tmp_path / "other/.s3t", tmp_path / "wrong")
    wrong = S3TStore(store.path, state=tmp_path / "wrong")
    for act in (lambda: wrong.export(tmp_path / "copy"), lambda: wrong.delete(slices=[(0, 0)])):
        with pytest.raises(StateError, match="another"):
            act()
    after = tree(store.path)
    assert {n: d for n, d in after.items() if ".s3t" not in n} == {n: d for n, d in before.items() if ".s3t" not in n}


def test_a_backup_of_another_store_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """Also where keys come from the environment, so that the backup has none."""
    for name, key in (("other", "other key of 16 bytes"), ("mine", "my own key, 16 bytes")):
        monkeypatch.setenv("HF_S3T_KEY", key)
        make_store(tmp_path / name, key=None).export_state(tmp_path / f"{name}.json")
    store = S3TStore(tmp_path / "mine")
    shutil.rmtree(store.private)
    with pytest.raises(StateError, match="belongs to another store than .*Nothing was changed"):
        store.import_state(tmp_path / "other.json")
    store.import_state(tmp_path / "mine.json")
    assert store.locate(ids=["row-0"])[0].found == "live"


# Keys


@pytest.mark.parametrize("key", ["short", b"x" * 15, "00" * 15, ""])
def test_a_short_key_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match="needs 16 or more"):
        S3TStore(tmp_path / "out", key).ensure_key()


def test_a_wrong_key_is_refused_and_never_written(store):
    before = tree(store.path)
    wrong = S3TStore(store.path, b"w" * 32)
    for act in (lambda: wrong.delete(ids=["row-0"]), lambda: wrong.locate(ids=["row-0"]), wrong.ensure_key):
        with pytest.raises(StateError, match="not the one that .* was trained with"):
            act()
    assert tree(store.path) == before
    assert store.delete(ids=["row-0"]).found == 1


@pytest.mark.parametrize("given", [None, b"n" * 32])
def test_a_store_without_its_key_never_makes_a_new_one(store, given):
    (store.private / "partition.key").unlink()
    store.delete(slices=[(m, l) for m in range(2) for l in range(3)])  # noqa: E741
    with pytest.raises(StateError):
        S3TStore(store.path, given).ensure_key()
    assert not (store.private / "partition.key").exists()


def test_a_new_store_makes_its_key_once_and_keeps_it_private(tmp_path):
    store = S3TStore(tmp_path / "out")
    with pytest.raises(StateError, match="has no partition key"):
        _ = store.key
    key = store.ensure_key()
    assert len(key) == 32 and store.ensure_key() == key == S3TStore(tmp_path / "out").key
    assert (store.private / "partition.key").stat().st_mode & 0o777 == 0o600
    assert S3TStore(tmp_path / "other").ensure_key() != key


def test_a_key_from_the_environment_is_never_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_S3T_KEY", KEY.hex())
    store = make_store(tmp_path / "out", key=None)
    store.delete(ids=["row-0"])
    store.export_state(tmp_path / "state.json")
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert KEY.hex().encode() not in written and KEY not in written
    monkeypatch.delenv("HF_S3T_KEY")
    with pytest.raises(StateError, match="set HF_S3T_KEY"):
        store.locate(ids=["row-1"])


# Readmission


def test_readmission_lifts_a_tombstone_and_brings_nothing_back(store, known):
    store.delete(groups=["person-1"], ids=["row-8"])
    before, generation = stage_folders(store.path), store.manifest().generation
    receipt = store.readmit(groups=["person-1"], ids=["row-8"], reference="consent renewed")
    assert (receipt.kind, receipt.asked, receipt.reference) == ("readmit", 2, "consent renewed")
    assert stage_folders(store.path) == before
    assert store.manifest().generation == state_of(store)[0] == generation + 1
    assert store.manifest().tombstones == state_of(store)[1]
    found = {location.asked: location.found for location in store.locate(ids=["row-8"], groups=["person-1"])}
    assert found == {"row-8": "unknown", "person-1": "unknown"}
    assert store.status().requests == 1


@pytest.mark.parametrize("request_", [{"ids": ["row-0", "row-1"]}, {"groups": ["person-0"]}, {"ids": ["x"]}, {}])
def test_readmitting_what_has_no_tombstone_changes_nothing(store, request_):
    store.delete(ids=["row-0"])
    before = tree(store.path)
    with pytest.raises(UnknownExampleError, match="No tombstone stands for"):
        store.readmit(**request_)
    assert tree(store.path) == before


# Putting right


def test_stage_folders_that_the_manifest_does_not_list_are_swept(store):
    shutil.copytree(store.path / "shard-00" / "0", store.path / "shard-00" / "2-1")
    (store.path / "shard-07" / "0").mkdir(parents=True)
    (store.path / "shard-00" / ".hidden").mkdir()
    (store.path / ".s3t.json.tmp").write_text("half a manifest")
    (store.private / "scratch" / "shard-00_0").mkdir(parents=True)
    before = stage_folders(store.path) - {"shard-00/2-1", "shard-07/0", "shard-00/.hidden"}
    with store.writing():
        pass
    assert stage_folders(store.path) == before == {stage.name for stage in store.manifest().stages}
    assert not (store.path / "shard-07").exists() and not (store.path / ".s3t.json.tmp").exists()
    assert not (store.private / "scratch").exists()


@pytest.mark.parametrize("files_too", [True, False])
def test_an_older_manifest_put_back_under_a_newer_state_is_corrected(store, made, known, files_too):
    store.delete(ids=[known.at(0, 1)[0]])
    after, generation = tree(store.path), 1
    shutil.copy(made[0] / "s3t.json", store.path / "s3t.json")
    if files_too:
        for name in ("shard-00", "shard-01"):
            shutil.copytree(made[0] / name, store.path / name, dirs_exist_ok=True)
    with store.writing():
        pass
    assert tree(store.path) == after
    assert store.manifest().generation == generation


def test_a_changed_plan_keeps_live_stages(store):
    manifest = store.manifest()
    store.write_manifest(dataclasses.replace(manifest, plan=Plan.make(2, 3, cyclic(3, 1))))
    assert store.served() == {0: (0, 1, 2), 1: (0, 1, 2)}
    receipt = store.delete(slices=[(0, 0)])
    assert receipt.served_after == {"0": [1, 2], "1": [0, 1, 2]}
