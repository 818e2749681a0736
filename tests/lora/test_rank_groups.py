"""Rank groups: stages with a LoRA of their own over all layers, stacked along the rank on those of their parents.

The promises hold for them in the tests of the promises; here is what only they do. The trained store has three shards
of three slices, on a model of two layers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from test_tuner import Tuned

from hf_s3t import S3TConfig, S3TStore, S3TTrainer, Stage
from hf_s3t.files import json_bytes
from hf_s3t.store.audit import verify
from served import ROUNDING, SHAPES, copy, inputs_of, load, mean_probability, members, shorten
from trained_stores import CONTENTS, broken, edit_json, forge
from trainers import logits, make_args

SHAPE = "llama-rank"


@pytest.fixture
def store(tmp_path: Path) -> S3TStore:
    return copy(SHAPE, tmp_path)


# What a stage is


def test_there_may_be_more_slices_than_layers(store: S3TStore) -> None:
    recipe = store.manifest().recipe["config"]
    assert recipe["groups"] == [[0, 1]] and store.manifest().plan.num_slices == 3
    for stage in store.manifest().stages:
        config, tensors = store.read_stage(stage)
        assert (config["r"], config["layers_to_transform"]) == (2, [0, 1])
        assert config["auto_mapping"]["stage_parameters"] == "rank_group"
        assert {".layers.0." in name for name in tensors} == {True, False}
        whole = store.assemble(stage.shard, stage.prefix)
        assert whole.config["r"] == 2 * stage.depth and whole.scaling == 8 / 2
    assert verify(store).ok
    store.delete(slices=[(0, 1)])
    assert store.served()[0] == (2, 0) and verify(store).ok


def test_a_stage_says_by_what_it_is_joined(store: S3TStore) -> None:
    def forget(config: dict) -> None:
        del config["auto_mapping"]["stage_parameters"]

    edit_json(store.path / "shard-01/2/adapter_config.json", forget)
    forge(store.path, "shard-01/2")
    assert "shard-01/2: its config says that it owns None, the recipe 'rank_group'" in broken(verify(store))[CONTENTS]


# Joined


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "gpt2", "bert"])
def test_a_joined_prefix_is_its_stages_one_beside_the_other(name: str, use_rslora: bool) -> None:
    """In fp64, where rounding is no excuse: as the model stood, which had the last stage apart."""
    tuned = Tuned(name, stage_parameters="rank_group", use_rslora=use_rslora, r=3, lora_alpha=7, num_slices=20)
    stages = tuned.trained_path(3)
    tuned.model.double()
    stood = tuned.logits()
    tuned.model.float()
    whole = tuned.join(stages)
    assert json.loads(json_bytes(whole.config))["lora_alpha"] == whole.config["lora_alpha"]
    assert (whole.config["r"], whole.config["use_rslora"]) == (9, False)
    tuned.tuner.serve({"shard-00": whole})
    for module in tuned.model.modules():
        if isinstance(module, LoraLayer):
            assert module.scaling == {"shard-00": stages[0].scaling}
    tuned.model.double()
    assert torch.allclose(tuned.logits(), stood, rtol=0, atol=1e-12)


def test_the_root_adapter_of_prefixes_of_several_depths(store: S3TStore, tmp_path: Path) -> None:
    shorten(store)
    moved = []
    for name, prefix in (("root", None), ("first", "shard-00/0-1-2"), ("second", "shard-01/2-0")):
        done = store.export(tmp_path / name, prefix=prefix)
        assert done.rank == {"root": 10, "first": 6, "second": 4}[name]
        model = PeftModel.from_pretrained(SHAPES[SHAPE].build(), tmp_path / name).merge_and_unload()
        base = SHAPES[SHAPE].build().state_dict()
        moved.append({key: value.double() - base[key].double() for key, value in model.state_dict().items()})
    root, first, second = moved
    assert sum(bool(value.any()) for value in root.values()) == 4  # two targets in each of two layers
    for key, value in root.items():
        assert torch.allclose(value, (first[key] + second[key]) / 2, rtol=0, atol=1e-6), key


# Served


def test_the_ensemble_is_its_members(store: S3TStore) -> None:
    inputs, expected = inputs_of(SHAPE), {}
    for name in ("whole", "shortened"):
        if name == "shortened":
            shorten(store)
        expected[name] = mean_probability([logits(part, inputs) for part in members(store, SHAPES[SHAPE].build)])
        assert torch.allclose(logits(load(store, SHAPE), inputs), expected[name], **ROUNDING)
    assert (expected["whole"] - expected["shortened"]).abs().max() > 1e-3


def test_a_trainer_serves_members_of_several_ranks(store: S3TStore) -> None:
    shorten(store)
    shape, recipe = SHAPES[SHAPE], store.manifest().recipe["config"]
    trainer = S3TTrainer(
        shape.build(),
        make_args(store.path, per_device_eval_batch_size=6),
        train_dataset=shape.rows(36),
        peft_config=S3TConfig(num_shards=3, num_slices=3, r=recipe["r"], lora_alpha=8, **shape.config),
        partition_key=b"the partition key of the tests",
    )
    asked = trainer.predict(shape.rows(12, seed=1).select(range(6))).predictions
    assert torch.allclose(torch.tensor(asked), logits(load(store, SHAPE), inputs_of(SHAPE)), **ROUNDING)
    assert {config.r for config in trainer.model.peft_config.values()} == {6, 4}


def test_a_deletion_reaches_a_model_that_was_cast_meanwhile(store: S3TStore) -> None:
    """Casting and moving give parameters other storage."""
    ensemble = load(store, SHAPE)
    ensemble.double()
    ensemble.delete(slices=[(0, 1), (1, 0), (1, 2)])
    assert ensemble.members == ["shard-00", "shard-02"]
    held = {slot.number: 4 if shard == 0 else 6 for shard, slot in ensemble._state.held.items()}
    for number in range(ensemble._stack.slots):
        for name, value in ensemble._stack.tensors(number).items():
            ranks, live = value if ".lora_A." in name else value.T, held.get(number, 0)
            assert value.dtype == torch.float64
            assert [bool(row.any()) for row in ranks] == [True] * live + [False] * (6 - live), name


def test_a_repaired_stage_replaces_its_own_ranks_alone(store: S3TStore) -> None:
    ensemble = load(store, SHAPE)
    slot, manifest = ensemble._state.held[1], store.manifest()
    change = slot.plan(store, manifest, Stage(1, (0, 1)).path)
    assert not change.tensors  # what is left is in the slot already
    change = slot.plan(store, manifest, Stage(1, (2, 0)).path)
    assert {name.rpartition(" ")[2] for name in change.tensors} == {"1", "2"}
