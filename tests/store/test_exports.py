"""Exports: loaded by stock PEFT and transformers they answer as the store does, and a deletion finds every one."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_recovery import Disk, Killed
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import models
from conftest import REPOSITORY
from hf_s3t import Receipt, S3TEnsemble, S3TStore, Stage, StateError, StoreError
from hf_s3t.store.export_records import read_exports
from hf_s3t.store.receipts import read_receipts
from stores import edit_database, index_of, tree
from trainers import BASES, batch, logits, make_trainer

AUTO = {"llama": AutoModelForCausalLM, "bert": AutoModelForSequenceClassification}
SHAPES = {
    "one shard": ("llama", {"num_slices": 2, "budget": 2}),
    "two shards": ("llama", {"num_shards": 2, "num_slices": 3, "budget": 3}),
    "heads": ("bert", {"num_shards": 2, "num_slices": 3, "budget": 3, "modules_to_save": ["classifier"]}),
    "one shard with a head": ("bert", {"num_slices": 2, "budget": 2, "modules_to_save": ["classifier"]}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Stores by shape, trained when first asked for, beside the base that they name."""
    root, ready = tmp_path_factory.mktemp("made"), {}

    def store_of(shape: str) -> Path:
        if shape not in ready:
            base, config = SHAPES[shape]
            kind = root / base
            if not kind.exists():
                BASES[base][0]().save_pretrained(kind)
            ready[shape] = root / shape.replace(" ", "-")
            model = AUTO[base].from_pretrained(kind)
            make_trainer(ready[shape], base=base, model=model, config=config).train()
        return ready[shape]

    return store_of


@pytest.fixture
def open_store(made, tmp_path):
    """A copy of a store, and its base's folder."""

    def copied(shape: str) -> tuple[S3TStore, Path]:
        path = made(shape)
        store = S3TStore(shutil.copytree(path, tmp_path / "out"))
        return store, path.parent / SHAPES[shape][0]

    return copied


def inputs(base: str) -> dict[str, torch.Tensor]:
    return batch(BASES[base][1](8))


def by_peft(base: str, folder: Path, export: Path) -> torch.Tensor:
    """The second stack: nothing of hf_s3t but the file."""
    return logits(PeftModel.from_pretrained(AUTO[base].from_pretrained(folder), export), inputs(base))


def by_transformers(base: str, export: Path) -> torch.Tensor:
    return logits(AUTO[base].from_pretrained(export), inputs(base))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5)


# ---- a second stack loads them ----


@pytest.mark.brief("one shard with a head")
@pytest.mark.parametrize("shape", ["one shard", "one shard with a head"])
def test_the_root_of_one_shard_answers_as_the_served_model(open_store, tmp_path, shape):
    (base, _), (store, folder) = SHAPES[shape], open_store(shape)
    store.export(tmp_path / "adapter")
    store.export(tmp_path / "whole", merge=True, base_model=str(folder))
    served = logits(S3TEnsemble.from_pretrained(store.path, str(folder)), inputs(base))
    bare = logits(AUTO[base].from_pretrained(folder), inputs(base))
    assert (served - bare).abs().max() > 1e-3  # there is something to be seen
    assert close(by_peft(base, folder, tmp_path / "adapter"), served)
    assert close(by_transformers(base, tmp_path / "whole"), served)


def test_the_root_of_two_shards_is_their_weight_average(open_store, tmp_path):
    store, folder = open_store("two shards")
    done = store.export(tmp_path / "adapter")
    store.export(tmp_path / "whole", merge=True, base_model=str(folder))
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for shard, prefix in store.served().items():
        member = store.assemble(shard, prefix)
        for name in [name for name in member.tensors if ".lora_A." in name]:
            path = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            delta = member.tensors[name.replace("lora_A", "lora_B")].double() @ member.tensors[name].double()
            weights[path] = weights[path] + (delta * member.scaling / 2).float()
    expected = AutoModelForCausalLM.from_pretrained(folder)
    expected.load_state_dict(weights)
    assert done.rank == 4 and json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 4
    assert close(by_peft("llama", folder, tmp_path / "adapter"), logits(expected, inputs("llama")))
    assert close(by_transformers("llama", tmp_path / "whole"), logits(expected, inputs("llama")))


@pytest.mark.parametrize("prefix", ["shard-01/0", "shard-01/2-0"])
@pytest.mark.parametrize("shape", ["two shards", "heads"])
def test_a_prefix_answers_as_its_member(open_store, tmp_path, shape, prefix):
    (base, _), (store, folder) = SHAPES[shape], open_store(shape)
    store.export(tmp_path / "adapter", prefix)
    store.export(tmp_path / "whole", prefix, merge=True, base_model=str(folder))
    stage = Stage.from_name(prefix)
    member = store.assemble(stage.shard, stage.prefix)
    expected = get_peft_model(AUTO[base].from_pretrained(folder), LoraConfig(**member.config))
    state = {name: value for name, value in member.tensors.items()}
    for name, parameter in expected.named_parameters():
        stored = state.pop(name.replace(".default", "").replace("modules_to_save.", ""), None)
        if stored is not None:
            parameter.data.copy_(stored)
    assert not state
    assert close(by_peft(base, folder, tmp_path / "adapter"), logits(expected, inputs(base)))
    assert close(by_transformers(base, tmp_path / "whole"), logits(expected, inputs(base)))
    if shape == "heads":
        head = load_file(tmp_path / "whole/model.safetensors")["classifier.weight"]
        assert torch.equal(head, member.tensors["base_model.model.classifier.weight"])


def test_several_shards_with_heads_have_no_root_to_export(open_store, tmp_path):
    store, folder = open_store("heads")
    for merge in (False, True):
        with pytest.raises(StoreError, match="several live shards with heads have no single adapter"):
            store.export(tmp_path / "x", merge=merge, base_model=str(folder) if merge else None)
    assert not (tmp_path / "x").exists() and not read_exports(store)


def test_a_trained_head_of_a_tied_base_stays_untied(tmp_path):
    base = partial(models.tiny_llama, num_hidden_layers=4, tie_word_embeddings=True)
    base().save_pretrained(tmp_path / "tied")
    trainer = make_trainer(tmp_path / "out", model=base(), config={"modules_to_save": ["lm_head"]})
    trainer.train()
    trainer.store.export(tmp_path / "whole", merge=True, base_model=str(tmp_path / "tied"))
    expected = logits(S3TEnsemble.from_pretrained(tmp_path / "out", str(tmp_path / "tied")), inputs("llama"))
    assert close(by_transformers("llama", tmp_path / "whole"), expected)
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["tie_word_embeddings"] is False, "for runtimes that believe the config, not the file"


def test_the_base_that_the_store_names_is_found(open_store, tmp_path, monkeypatch):
    store, folder = open_store("one shard")
    monkeypatch.chdir(folder.parent)
    manifest = store.manifest()
    recipe = {**manifest.recipe, "base": {**manifest.recipe["base"], "id": "llama"}}
    store.write_manifest(dataclasses.replace(manifest, recipe=recipe))
    store.export(tmp_path / "whole", merge=True)
    store.export(tmp_path / "same", merge=True, base_model=str(folder))
    assert tree(tmp_path / "whole") == tree(tmp_path / "same")
    assert {record.base for record in read_exports(store).values()} == {str(folder)}


def test_the_page_on_exports_runs_as_it_stands(open_store, tmp_path, monkeypatch):
    store, folder = open_store("two shards")
    manifest = store.manifest()
    (tmp_path / "base").symlink_to(folder)
    recipe = {**manifest.recipe, "base": {**manifest.recipe["base"], "id": "base"}}
    store.write_manifest(dataclasses.replace(manifest, recipe=recipe))
    page = (REPOSITORY / "docs/exports.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(code) == 3
    monkeypatch.chdir(tmp_path)
    answers, names = [], {}
    for block in code:
        exec(compile(block.replace("meta-llama/Llama-3.2-1B", str(folder)), "docs/exports.md", "exec"), names)
        if "model" in names:
            answers.append(logits(names["model"], inputs("llama")))
    assert close(*answers)


def test_what_is_written_is_told(open_store, tmp_path, caplog):
    store, folder = open_store("two shards")
    with caplog.at_level("INFO", "hf_s3t.store.exports"):
        done = store.export(tmp_path / "adapter", "shard-00/0")
        whole = store.export(tmp_path / "whole", merge=True, base_model=str(folder))
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert done.parameters == sum(value.numel() for value in tensors.values())
    for told, name in ((done, "adapter"), (whole, "whole")):
        assert told.bytes == sum(file.stat().st_size for file in (tmp_path / name).iterdir())
    assert whole.stages == ("shard-00/0-1-2", "shard-01/0-1-2") and (done.rank, whole.rank) == (2, 4)
    lines = [record.getMessage() for record in caplog.records if record.name == "hf_s3t.store.exports"]
    size = f"{done.parameters} parameters, {done.bytes} bytes"
    assert lines[0] == f"adapter of shard-00/0 in {tmp_path / 'adapter'}: rank 2, {size}" and len(lines) == 2
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".whole")]


# ---- what is handed in ----


def test_a_base_that_is_handed_in_stays_as_it_was(open_store, tmp_path):
    store, folder = open_store("one shard with a head")
    base = AutoModelForSequenceClassification.from_pretrained(folder).train()
    before, names = copy.deepcopy(base.state_dict()), [name for name, _ in base.named_modules()]
    store.export(tmp_path / "given", merge=True, base_model=base)
    store.export(tmp_path / "named", merge=True, base_model=str(folder))
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, _ in base.named_modules()] == names and base.training
    assert all(parameter.requires_grad for parameter in base.parameters()) and not hasattr(base, "peft_config")
    assert tree(tmp_path / "given") == tree(tmp_path / "named")


def test_what_can_not_be_merged_is_refused_before_anything_is_written(open_store, tmp_path):
    store, folder = open_store("one shard")
    quantised = tmp_path / "quantised"
    shutil.copytree(folder, quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True).to_dict()
    (quantised / "config.json").write_text(json.dumps(config))
    in_memory = AutoModelForCausalLM.from_pretrained(folder)
    in_memory.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    small = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64))
    wrapped = PeftModel(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    for base, error, message in [
        (str(quantised), ValueError, "quantised is quantised, and an adapter is merged into unquantised weights only"),
        (in_memory, ValueError, "The base model is quantised"),
        (wrapped, ValueError, "has adapters already"),
        (small, StoreError, "not the base model that the store was trained on"),
        (str(tmp_path / "nothing"), OSError, "The base model .*nothing cannot be loaded"),
    ]:
        with pytest.raises(error, match=message):
            store.export(tmp_path / "whole", merge=True, base_model=base)
        assert not (tmp_path / "whole").exists()
    with pytest.raises(ValueError, match="`base_model` is for `merge=True`"):
        store.export(tmp_path / "whole", base_model=str(folder))
    manifest = store.manifest()
    recipe = {**manifest.recipe, "base": {**manifest.recipe["base"], "id": None}}
    store.write_manifest(dataclasses.replace(manifest, recipe=recipe))
    with pytest.raises(ValueError, match="does not say how to load its base model"):
        store.export(tmp_path / "whole", merge=True)


def test_a_folder_with_something_else_is_not_touched(open_store, tmp_path):
    store, folder = open_store("one shard")
    shutil.copytree(folder, tmp_path / "somebody")
    store.export(tmp_path / "adapter")
    store.export(tmp_path / "whole", merge=True, base_model=str(folder))
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for name, merge, message in [
        ("somebody", True, "holds files that are no export of this store"),
        ("adapter", True, "holds an adapter that was exported before"),
        ("whole", False, "holds a merged model that was exported before"),
    ]:
        with pytest.raises(ValueError, match=message):
            store.export(tmp_path / name, merge=merge, base_model=str(folder) if merge else None)
    assert tree(tmp_path) == before
    (tmp_path / "whole/tokenizer.json").write_text("{}")
    for name in ("whole", "empty"):
        store.export(tmp_path / name, merge=True, base_model=str(folder))
    assert (tmp_path / "whole/tokenizer.json").read_text() == "{}", "what its owner put there stays"
    assert (tmp_path / "empty/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


# ---- after a deletion ----


def export_all(store: S3TStore, folder: Path, place: Path) -> None:
    """An export of every kind; all but `other` depend on slice 0 of shard 0."""
    store.export(place / "root")
    store.export(place / "prefix", "shard-00/2-0")
    store.export(place / "gone", "shard-00/0")
    store.export(place / "other", "shard-01/0-1")
    store.export(place / "whole", merge=True, base_model=str(folder))
    store.export(place / "whole-prefix", "shard-00/2-0", merge=True, base_model=str(folder))
    store.export(place / "whole-gone", "shard-00/0-1", merge=True, base_model=str(folder))


HIT = ("gone", "prefix", "root", "whole", "whole-gone", "whole-prefix")


def test_without_being_asked_a_deletion_names_each_and_touches_none(open_store, tmp_path):
    store, folder = open_store("two shards")
    export_all(store, folder, tmp_path / "x")
    before = tree(tmp_path / "x")
    dry = store.delete(slices=[(0, 0)], dry_run=True)
    receipt = store.delete(slices=[(0, 0)])
    assert sorted(receipt.exports) == sorted(dry.exports) == [str(tmp_path / "x" / name) for name in HIT]
    assert receipt.exports_refreshed == receipt.exports_removed == [] and tree(tmp_path / "x") == before
    assert sorted(store.status().stale_exports) == sorted(receipt.exports)
    shutil.rmtree(tmp_path / "x/root")
    assert str(tmp_path / "x/root") not in store.delete(slices=[(0, 0)]).exports
    # Stages that an earlier deletion removed still count: the copy was made of them.
    assert str(tmp_path / "x/whole-prefix") in store.delete(slices=[(0, 2)]).exports


def test_made_anew_each_equals_a_fresh_export(open_store, tmp_path):
    store, folder = open_store("two shards")
    export_all(store, folder, tmp_path / "x")
    before = tree(tmp_path / "x")
    receipt = store.delete(slices=[(0, 0)], refresh_exports=True)
    again = [str(tmp_path / "x" / name) for name in ("prefix", "root", "whole", "whole-prefix")]
    assert receipt.exports == [] and sorted(receipt.exports_refreshed) == again
    assert sorted(receipt.exports_removed) == [str(tmp_path / "x" / name) for name in ("gone", "whole-gone")]
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"prefix", "root", "whole", "whole-prefix", "other"}
    fresh = tmp_path / "fresh"
    store.export(fresh / "root")
    store.export(fresh / "prefix", "shard-00/2")
    store.export(fresh / "whole", merge=True, base_model=str(folder))
    store.export(fresh / "whole-prefix", "shard-00/2", merge=True, base_model=str(folder))
    after = tree(tmp_path / "x")
    assert {name: digest for name, digest in after.items() if not name.startswith("other")} == tree(fresh)
    assert all(after[name] == before[name] for name in after if name.startswith("other"))
    assert not any(after.get(name) == before[name] for name in before if "safetensors" in name and "other" not in name)
    assert store.status().stale_exports == () and len(read_exports(store)) == 9
    records = read_exports(store)
    assert {records[path].generation for path in again} == {1}
    assert records[str(tmp_path / "x/prefix")].stages == ("shard-00/2",)
    assert records[str(tmp_path / "x/prefix")].prefix == "shard-00/2-0", "what was asked for, for the next time"
    assert read_receipts(store)[-1]["exports_refreshed"] == receipt.exports_refreshed
    nothing = store.delete(slices=[(m, l) for m in range(2) for l in range(3)], refresh_exports=True)  # noqa: E741
    assert nothing.exports == [] and len(nothing.exports_removed) == 9 and not read_exports(store)
    assert not list((tmp_path / "x").iterdir()) and not list(fresh.iterdir())


def test_the_root_goes_where_there_is_none_any_more(open_store, tmp_path):
    store, folder = open_store("one shard with a head")
    store.export(tmp_path / "root")
    store.export(tmp_path / "whole", merge=True, base_model=str(folder))
    (tmp_path / "whole/tokenizer.json").write_text("{}")
    receipt = store.delete(slices=[(0, 0), (0, 1)], refresh_exports=True)
    assert len(receipt.exports_removed) == 2 and not (tmp_path / "root").exists()
    assert [file.name for file in (tmp_path / "whole").iterdir()] == ["tokenizer.json"]


def test_what_can_not_be_made_anew_is_named_and_the_deletion_ends(open_store, tmp_path, caplog):
    store, folder = open_store("two shards")
    shutil.copytree(folder, tmp_path / "base")
    store.export(tmp_path / "handed in", merge=True, base_model=AutoModelForCausalLM.from_pretrained(folder))
    store.export(tmp_path / "base gone", merge=True, base_model=str(tmp_path / "base"))
    store.export(tmp_path / "no folder")
    store.export(tmp_path / "fine")
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "no folder")
    (tmp_path / "no folder").write_text("a file")
    receipt = store.delete(slices=[(0, 0)], refresh_exports=True)
    names = ("base gone", "handed in", "no folder")
    assert sorted(receipt.exports) == [str(tmp_path / name) for name in names]
    assert receipt.exports_refreshed == [str(tmp_path / "fine")] and receipt.status == "inactive"
    for name in names:
        assert f"the export in {tmp_path / name} still carries the influence" in caplog.text
    assert not store.intents() and not any((0, 0) in stage.slices for stage in store.manifest().stages)
    assert sorted(store.status().stale_exports) == sorted(receipt.exports)
    # Asked for again, nothing is left to delete, but the copies are.
    (tmp_path / "no folder").unlink()
    (tmp_path / "no folder").mkdir()
    shutil.copytree(folder, tmp_path / "base")
    store.export(tmp_path / "handed in", merge=True, base_model=str(folder))
    again = store.delete(slices=[(0, 0)], refresh_exports=True)
    assert again.exports == [] and len(again.exports_refreshed) == 2 and store.status().stale_exports == ()


def test_a_second_request_makes_anew_what_the_first_left(open_store, tmp_path):
    store, folder = open_store("one shard")
    store.export(tmp_path / "root")
    digest = next(digest for digest, entry in index_of(store).items() if entry[:2] == (0, 0))
    assert store._delete({"digests": [digest]}).exports == [str(tmp_path / "root")]
    again = store._delete({"digests": [digest]})
    assert (again.status, again.exports) == ("unchanged", [str(tmp_path / "root")])
    called = []
    last = store._delete({"digests": [digest]}, refresh_exports=True, when_durable=lambda: called.append(1))
    assert (last.status, last.exports, last.exports_refreshed) == ("unchanged", [], [str(tmp_path / "root")])
    assert not called and store._delete({"digests": [digest]}).exports == []
    model = AutoModelForCausalLM.from_pretrained(folder)
    make_trainer(store.path, model=model, config=SHAPES["one shard"][1]).train()
    store.export(tmp_path / "repaired")
    assert "shard-00/0" in read_exports(store)[str(tmp_path / "repaired")].stages
    assert store._delete({"digests": [digest]}).exports == [], "the same stages, trained without it"


def test_a_receipt_and_an_intent_of_before_still_load(open_store, tmp_path):
    store, _ = open_store("one shard")
    fields = Receipt("receipt-x", "delete", "inactive", "then", 1).to_json()
    for name in ("exports_refreshed", "exports_removed"):
        del fields[name]
    intent = {"kind": "delete", "receipt": fields, "ids": {}, "groups": {}, "places": [[0, 0]], "generation": 1}
    (store.private / "intents").mkdir(exist_ok=True)
    (store.private / "intents/00000001-x.json").write_text(json.dumps({**intent, "file": "00000001-x.json"}))
    with store.writing():
        pass
    assert not store.intents() and read_receipts(store)[-1]["exports_refreshed"] == []


def test_the_record_survives_the_loss_of_the_state(open_store, tmp_path):
    store, folder = open_store("one shard")
    export_before = store.export(tmp_path / "whole", "shard-00/0-1", merge=True, base_model=str(folder))
    records = read_exports(store)
    store.export_state(tmp_path / "state.json")
    shutil.rmtree(store.private)
    store.import_state(tmp_path / "state.json")
    assert read_exports(store) == records and list(records) == [export_before.path]
    edit_database(store, "UPDATE exports SET record = '[1]'")
    with pytest.raises(StateError, match="record of exports is damaged"):
        read_exports(store)
    assert store.delete(slices=[(0, 0)]).status == "inactive"  # a record that is only a record stops no deletion


# ---- killed at any instant ----


def influence(path: Path, carried: set[str]) -> bool:
    """Whether a file below a folder is one of those that carry the influence."""
    return any(digest in carried for digest in tree(path).values())


@pytest.mark.slow
def test_killed_at_any_instant_no_copy_carries_the_influence_unreported(made, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_s3t.store.deletion.receipt_name", lambda: "receipt-1")  # it is in the manifest
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    made_store = made("one shard")
    folder, first = made_store.parent / "llama", tmp_path / "first"
    store = S3TStore(shutil.copytree(made_store, first / "out"))
    place = tmp_path / "now"

    def fresh() -> S3TStore:
        shutil.rmtree(place, ignore_errors=True)
        return S3TStore(shutil.copytree(first, place) / "out")

    # The paths on record are those of the copies that the kills are tried on.
    shutil.copytree(first, place)
    store = S3TStore(place / "out")
    store.export(place / "root")
    store.export(place / "whole", merge=True, base_model=str(folder))
    store.export(place / "gone", "shard-00/0")
    shutil.rmtree(first)
    shutil.copytree(place, first)
    weights = {name: digest for name, digest in tree(first).items() if "safetensors" in name and "out" not in name}
    carried = set(weights.values())

    def act(store: S3TStore) -> Receipt:
        return store.delete(slices=[(0, 0)], refresh_exports=True)

    store = fresh()
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        act(store)
        disk.on = False
    after = {name: digest for name, digest in tree(place).items() if ".s3t" not in name}
    expected = {"refreshed": [str(place / name) for name in ("root", "whole")], "removed": [str(place / "gone")]}
    partly = 0
    for instant in range(0, disk.instants, 3):
        store = fresh()
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, instant)
            with pytest.raises(Killed):
                act(store)
        store = S3TStore(store.path)
        records, stones = read_exports(store), store.intents()
        for name in ("root", "whole", "gone"):
            if influence(place / name, carried) or influence(place / f".{name}.hf_s3t", carried):
                assert "shard-00/0" in records[str(place / name)].stages, "what is there is on record"
        receipts = [receipt for receipt in read_receipts(store) if receipt["kind"] == "delete"]
        if receipts:
            assert not any(influence(place / name, carried) for name in ("root", "whole", "gone"))
        elif stones:
            partly += 1
            with store.writing():
                pass
        else:
            act(store)
        (receipt,) = [receipt for receipt in read_receipts(store) if receipt["kind"] == "delete"]
        assert receipt["exports"] == [] and sorted(receipt["exports_refreshed"]) == expected["refreshed"]
        assert receipt["exports_removed"] == expected["removed"]
        with store.writing():
            pass
        assert {n: d for n, d in tree(place).items() if ".s3t" not in n} == after
    assert partly > 20


def test_an_export_killed_at_any_instant_is_on_record(made, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    made_store = made("one shard")
    folder, place = made_store.parent / "llama", tmp_path / "now"
    for kind, options in (("adapter", {}), ("whole", {"merge": True, "base_model": str(folder)})):

        def fresh() -> S3TStore:
            shutil.rmtree(place, ignore_errors=True)
            return S3TStore(shutil.copytree(made_store, place / "out"))

        def act(store: S3TStore, kind: str = kind, options: dict = options) -> None:
            store.export(place / kind, **options)

        store = fresh()
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch)
            act(store)
            disk.on = False
        for instant in range(disk.instants):
            store = fresh()
            with pytest.MonkeyPatch.context() as patch:
                Disk(patch, instant)
                with pytest.raises(Killed):
                    act(store)
            store = S3TStore(store.path)
            begun = [path for path in place.iterdir() if path.name != "out"]
            assert not begun or list(read_exports(store)) == [str(place / kind)]
            receipt = store.delete(slices=[(0, 0)], refresh_exports=instant % 2 == 0)
            left = {path.name for path in place.iterdir() if path.name != "out"}
            if left and not receipt.exports_refreshed:
                assert receipt.exports == [str(place / kind)]
            assert f".{kind}.hf_s3t" not in left
