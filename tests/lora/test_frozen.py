"""One number that changes in anything frozen stops a stage: weights of all types, quantised states, buffers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_s3t import IsolationError, S3TConfig
from hf_s3t.lora.fingerprints import ON_DEVICE, ON_HOST, fingerprints
from hf_s3t.lora.tuner import StageTuner
from models import tiny_llama

FIELDS = {"task_type": "CAUSAL_LM", "num_slices": 2, "r": 2, "target_modules": ["q_proj", "up_proj"]}
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
KINDS = (ON_HOST, ON_DEVICE)


def tuned(base: nn.Module) -> StageTuner:
    """The first of two stages begins."""
    tuner = StageTuner(get_peft_model(base, S3TConfig(**FIELDS)))
    tuner.begin(1, seed=0, parent=None)
    return tuner


def as_on_device(tuner: StageTuner, kind: str) -> dict[str, str]:
    """What a stage begins from, as fingerprints of one kind: those of a device can be made on the CPU, too."""
    found = tuner.frozen_fingerprints()
    return found if kind == ON_HOST else fingerprints(tuner._frozen(), dict.fromkeys(found, kind))


def check_that_a_change_is_seen(tuner: StageTuner, tensor: torch.Tensor, kind: str, *names: str) -> None:
    """Of its last element, by as little as there is: the lowest bit."""
    before = as_on_device(tuner, kind)
    tuner.check_frozen(before)
    last = tensor.detach().view(-1)[-1:].view(torch.uint8)
    last[0] ^= 1
    with pytest.raises(IsolationError, match=f"Training changed {len(names)} tensors") as error:
        tuner.check_frozen(before)
    assert all(name in str(error.value) for name in names)
    last[0] ^= 1
    tuner.check_frozen(before)


def run(tuner: StageTuner) -> None:
    """One forward pass."""
    tuner.model(input_ids=torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight(dtype, kind):
    tuner = tuned(tiny_llama(num_hidden_layers=2).to(dtype))
    weight = tuner.model.get_submodule(LAYER).base_layer.weight
    assert weight.dtype == dtype
    check_that_a_change_is_seen(tuner, weight, kind, f"{LAYER}.base_layer.weight")


class Buffers(nn.Module):
    """Two buffers, of which a state dict has one; neither takes part in an answer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("stored", torch.ones(3))
        self.register_buffer("left_out", torch.ones(3), persistent=False)
        self.register_buffer("number", torch.tensor(1.5), persistent=False)
        self.register_buffer("flags", torch.tensor([True, False]), persistent=False)
        self.register_buffer("nothing", torch.ones(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["stored", "left_out", "number", "flags"])
def test_a_buffer(name, kind):
    base = tiny_llama(num_hidden_layers=2)
    base.model.more = Buffers()
    tuner = tuned(base)
    check_that_a_change_is_seen(tuner, getattr(base.model.more, name), kind, f"base_model.model.model.more.{name}")


def test_positions_that_follow_the_longest_row():
    """Dynamic RoPE writes its frequencies in a forward pass: later rows would be computed otherwise for it."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    tuner = tuned(tiny_llama(num_hidden_layers=2, max_position_embeddings=8, rope_parameters=scaling))
    before = tuner.frozen_fingerprints()
    tuner.model(input_ids=torch.full((1, 8), 3))
    tuner.check_frozen(before)
    tuner.model(input_ids=torch.full((1, 16), 3))
    with pytest.raises(IsolationError, match=r"changed 1 tensors.*rotary_emb\.inv_freq.*dynamic RoPE"):
        tuner.check_frozen(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_weight_is_named_twice(kind):
    base = tiny_llama(num_hidden_layers=2, tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    names = ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight")
    check_that_a_change_is_seen(tuned(base), base.lm_head.weight, kind, *names)


def test_a_tensor_that_moved_is_compared_all_the_same():
    """Its first fingerprint is of the kind of a device, and it lies on the CPU now."""
    tuner = tuned(tiny_llama(num_hidden_layers=2))
    before = as_on_device(tuner, ON_DEVICE)
    known = tuner.check_frozen(before)
    assert before != tuner.frozen_fingerprints() and tuner.frozen_fingerprints(known).items() <= before.items()
    with torch.no_grad():
        tuner.model.get_submodule(LAYER).base_layer.weight[0, 0] += 1
    with pytest.raises(IsolationError, match="changed 1 tensors"):
        tuner.check_frozen(before)


# Quantised bases


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pytest.importorskip("bitsandbytes", reason="quantised layers need bitsandbytes")
    path = tmp_path_factory.mktemp("base")
    tiny_llama(num_hidden_layers=2).save_pretrained(path)
    return path


def load(path, **settings) -> nn.Module:
    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map={"": "cpu"})
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["weight", "SCB"])
@pytest.mark.parametrize("runs", [0, 1, 2], ids="after {} runs".format)
def test_an_8_bit_layer(saved, runs, what, kind):
    """Its scales move from the weight to the layer at the first forward pass, and are the same tensor."""
    tuner = tuned(load(saved, load_in_8bit=True))
    fresh = as_on_device(tuner, kind)
    for _ in range(runs):
        run(tuner)
    tuner.check_frozen(fresh)
    layer = tuner.model.get_submodule(LAYER).base_layer
    assert layer.weight.dtype == torch.int8 and (layer.state.SCB is None) == (runs == 0)
    scales = layer.weight.SCB if runs == 0 else layer.state.SCB
    check_that_a_change_is_seen(
        tuner, layer.weight if what == "weight" else scales, kind, f"{LAYER}.base_layer.{what}"
    )


STATES: dict[str, tuple[Callable, str]] = {
    "weight": (lambda weight: weight.data, "weight"),
    "absmax": (lambda weight: weight.quant_state.absmax, "weight.absmax"),
    "code": (lambda weight: weight.quant_state.code, "weight.quant_map"),
    "offset": (lambda weight: weight.quant_state.offset, "weight.quant_state.bitsandbytes__nf4"),
    "nested absmax": (lambda weight: weight.quant_state.state2.absmax, "weight.nested_absmax"),
    "nested code": (lambda weight: weight.quant_state.state2.code, "weight.nested_quant_map"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", STATES)
def test_a_4_bit_layer(saved, what, kind):
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    tuner = tuned(load(saved, load_in_4bit=True, **settings))
    fresh = as_on_device(tuner, kind)
    tuner.model.train()
    run(tuner)
    tuner.check_frozen(fresh)
    find, name = STATES[what]
    layer = tuner.model.get_submodule(LAYER).base_layer
    check_that_a_change_is_seen(tuner, find(layer.weight), kind, f"{LAYER}.base_layer.{name}")
