"""Promises 1 to 4 over a Llama whose base is held in 4 bits as QLoRA does, in one process on the CPU, bit by bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_promises import (  # noqa: F401  the same tests, over the `world` of this file
    test_a_prefix_is_what_stood_when_its_stage_had_been_trained,
    test_a_stage_changes_what_it_owns_and_nothing_else,
    test_after_delete_nothing_served_ever_saw_the_example,
    test_delete_and_train_is_training_from_scratch_without_the_example,
    test_stock_peft_gives_a_prefix_the_logits_of_that_time,
    test_the_order_of_the_rows_changes_no_bit,
)

import models
from hf_s3t.seams.models import keep_quantised
from recipe_runs import instructions
from trainings import CASES, World

bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit layers need bitsandbytes")
pytestmark = pytest.mark.slow  # the way is that of 8 bits, which are tried by default


@pytest.fixture(scope="module", params=["layer_group"])
def world(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    models.tiny_llama(num_hidden_layers=3, hidden_size=64, intermediate_size=128).save_pretrained(path)

    def load():
        model = instructions.load_model(str(path), False, True)
        keep_quantised(model)  # stock PEFT's model, too: a CPU that lays weights out anew gives other last bits
        return model

    case = replace(CASES["llama"], layers=3, make_model=load)
    return World(case, request.param, tmp_path_factory.mktemp("4bit"))


def test_the_base_is_in_4_bits(world):
    layer = world.case.make_model().model.layers[2].self_attn.q_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert (layer.weight.quant_type, layer.weight.quant_state.nested) == ("nf4", True)
