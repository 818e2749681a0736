"""Promises 1 to 5 over a Llama whose base is held in 8 bits by bitsandbytes, in one process on the CPU, bit by bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import prepare_model_for_kbit_training
from test_promises import (  # noqa: F401  the same tests, over the `world` of this file
    test_a_prefix_is_what_stood_when_its_stage_had_been_trained,
    test_a_stage_changes_what_it_owns_and_nothing_else,
    test_a_stage_stores_its_own_layers_and_heads,
    test_after_delete_nothing_served_ever_saw_the_example,
    test_delete_and_train_is_training_from_scratch_without_the_example,
    test_stock_peft_gives_a_prefix_the_logits_of_that_time,
    test_the_model_in_memory_forgets_too,
    test_the_order_of_the_rows_changes_no_bit,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

import models
from killing import in_child, kill
from trainings import CASES, World

bitsandbytes = pytest.importorskip("bitsandbytes", reason="8-bit layers need bitsandbytes")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    models.tiny_llama(num_hidden_layers=3).save_pretrained(path)
    return path


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("all", "rank_group")]


@pytest.fixture(scope="module", params=["layer_group", *SLOW])
def world(request, saved, tmp_path_factory):
    def load():
        quantization = BitsAndBytesConfig(load_in_8bit=True)
        model = AutoModelForCausalLM.from_pretrained(
            saved, quantization_config=quantization, device_map={"": "cpu"}
        )
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    case = replace(CASES["llama"], make_model=load, layers=3)
    return World(case, request.param, tmp_path_factory.mktemp(f"8bit-{request.param}"))


def test_the_base_is_in_8_bits(world):
    layer = world.case.make_model().model.layers[2].self_attn.q_proj
    assert isinstance(layer, bitsandbytes.nn.Linear8bitLt) and layer.weight.dtype == torch.int8


class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, stage=None, **kwargs):
        if stage.depth == 2 and state.global_step == 4:
            kill()


def test_a_killed_stage_goes_on_and_gives_the_same_bits(world, tmp_path):
    plan = {"sequence_selection": [[0, 1], [1]]}
    assert in_child(lambda: world.trainer(tmp_path / "out", callbacks=[Killer()], **plan).train()) == -9
    assert list(tmp_path.glob("out/.s3t/running/shard-00_0-1/checkpoint-3"))
    world.trainer(tmp_path / "out", **plan).train()
    world.assert_stages(tmp_path / "out", world.trained, "0", "0-1", "1")
