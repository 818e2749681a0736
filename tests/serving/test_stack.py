"""Stacked LoRA and heads: the numbers of members one by one, and as many operations for two members as for five."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import models
from hf_s3t import S3TEnsemble
from hf_s3t.seams.answering import caches_in
from hf_s3t.serving.stack import Pass, Place, Route, Stack, StackedHead, StackedLinear, sizes_of
from served import ROUNDING, SHAPES, inputs_of, load, mean_probability, trained
from trainers import logits

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Count(TorchDispatchMode):
    """Counts operations by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def with_adapters(base: Any, names: str, **fields: Any) -> Any:
    """A PEFT model with an adapter of random numbers for each letter."""
    torch.manual_seed(1)
    given = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": PROJECTIONS} | fields
    config = LoraConfig(**given)
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


# Operations


@torch.no_grad()
def step(model: Any) -> Counter[str]:
    """Operations of a step of generation: one token, with a cache."""
    tokens = inputs_of("llama", 1)["input_ids"]
    kept = caches_in(model(tokens, use_cache=True))
    with Count() as counted:
        model(tokens[:, :1], use_cache=True, **kept)
    return counted.found


def ensemble_of(names: str, lowest_layer: int = 0, layers: int = 16) -> S3TEnsemble:
    """Members of random numbers, zero below a layer."""
    model = with_adapters(models.tiny_llama(num_hidden_layers=layers), names)
    for path, value in model.named_parameters():
        if ".lora_B." in path and int(path.split(".layers.")[1].split(".")[0]) < lowest_layer:
            nn.init.zeros_(value)
    return S3TEnsemble(model, dict.fromkeys(names, lowest_layer)).eval()


def test_a_step_of_five_members_has_no_more_operations_than_one_by_peft() -> None:
    one = step(with_adapters(models.tiny_llama(num_hidden_layers=16), "a"))
    five, two = step(ensemble_of("abcde")), step(ensemble_of("ab"))
    assert five.total() <= 1.35 * one.total()
    assert five == two  # none for each member
    assert five["bmm"] + five["baddbmm"] == 2 * 16 * len(PROJECTIONS) and five["index_select"] == five["bmm"] * 2


def test_the_trunk_has_no_lora() -> None:
    found = step(ensemble_of("abc", lowest_layer=6, layers=8))
    assert found["bmm"] + found["baddbmm"] == 2 * 2 * len(PROJECTIONS)


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "transposed", "without a bias"])
def test_a_linear_layer(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = {
        "linear": lambda: nn.Linear(6, 10),
        "transposed": lambda: Conv1D(10, 6),
        "without a bias": lambda: nn.Linear(6, 10, bias=False),
    }[kind]().to(dtype)
    assert sizes_of(base) == (6, 10)
    route = Route()
    module = StackedLinear(Place(base, 2, 1.5), route, 3, 4)
    for tensor in (module.lora_A, module.lora_B):
        assert tensor.dtype == torch.float32 and not tensor.any()
        nn.init.normal_(tensor)
    x = torch.randn(3 * 2, 5, 6, dtype=dtype)
    assert torch.equal(module(x), base(x))  # nobody asks
    slots = torch.tensor([2, 0, 3])
    with route.taking(Pass(slots)):
        found = module(x)
    for member, slot in enumerate(slots.tolist()):
        own = x[2 * member : 2 * member + 2]
        lora = (own.float() @ module.lora_A[slot].T @ module.lora_B[slot].T) * 1.5
        expected = base(own) + lora.to(dtype)
        bounds = ROUNDING if dtype is torch.float32 else {"atol": 0.1, "rtol": 0.02}
        torch.testing.assert_close(found[2 * member : 2 * member + 2], expected, **bounds)
    assert found.dtype == dtype and torch.equal(module(x), base(x))
    with route.taking(Pass(slots, trunk=4)):
        assert torch.equal(module(x), base(x))
    assert module.weight is base.weight and not module.lora_A.requires_grad


class Head(nn.Module):
    """A head with parameters of its own, layers of several kinds, and one that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.LayerNorm(6), nn.Dropout(0.5), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(torch.tanh(self.norm(x[:, 0]) * self.scale)))


class Normed(nn.BatchNorm1d):
    """Buffers that are no floating-point numbers, too."""

    def __init__(self) -> None:
        super().__init__(5)
        self.running_mean = torch.randn(5)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Sequential(nn.GELU(), nn.Linear(6, 3))),
    "own parameters": Head,
    "buffers": Normed,
    "embeddings": lambda: nn.Embedding(7, 4),
    "one layer": lambda: nn.Linear(6, 3, bias=False),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_of_any_layers(kind: str) -> None:
    torch.manual_seed(0)
    own = [HEADS[kind]().eval() for _ in range(3)]
    for head in own:
        for value in head.parameters():
            nn.init.normal_(value)
    route = Route()
    base = HEADS[kind]().eval()
    module = StackedHead(Place(base, None), route, 3)
    for slot, head in enumerate(own):
        module.hold(slot, deepcopy(head))
    x = torch.randint(7, (6, 5)) if kind == "embeddings" else torch.randn(6, 5, 6)
    for slots in ([2, 0], [1], [0, 1, 2]):
        with route.taking(Pass(torch.tensor(slots))), torch.no_grad():
            found = module(x)
        rows = 6 // len(slots)
        for member, slot in enumerate(slots):
            mine = slice(member * rows, (member + 1) * rows)
            torch.testing.assert_close(found[mine], own[slot](x[mine]), **ROUNDING)
    assert torch.equal(module(x), base(x))
    assert set(module.places()) == {*dict(base.named_parameters()), *dict(base.named_buffers())}


def test_adapters_of_several_ranks_and_factors() -> None:
    model, inputs = with_adapters(models.tiny_llama(), "a", r=2, lora_alpha=8), inputs_of("llama")
    model.add_adapter("b", LoraConfig(r=5, lora_alpha=3, init_lora_weights=False, target_modules=["q_proj"]))
    model.eval()
    parts = []
    for name in "ab":
        model.set_adapter(name)
        parts.append(logits(model, inputs))
    graph = {name: type(module) for name, module in model.named_modules()}
    ensemble = S3TEnsemble(model, {"a": 0, "b": 0})
    torch.testing.assert_close(logits(ensemble, inputs), mean_probability(parts), **ROUNDING)
    ensemble.detach()
    assert {name: type(module) for name, module in model.named_modules()} == graph
    assert torch.equal(logits(model, inputs), parts[1])


def test_an_adapter_that_is_no_member_does_not_answer() -> None:
    model, inputs = with_adapters(models.tiny_llama(), "ab"), inputs_of("llama")
    model.set_adapter("a")
    expected = logits(model, inputs)
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False, target_modules=["embed_tokens"]))
    model.set_adapter("other")
    model.base_model.set_adapter("a")
    torch.testing.assert_close(logits(S3TEnsemble(model, {"a": 0}).eval(), inputs), expected, **ROUNDING)


def test_lora_in_what_is_no_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="linear layers, and Conv2d is none. Serve one prefix of the store"):
        Stack(nn.Sequential(nn.Conv2d(1, 2, 3)), {"0": Place(nn.Conv2d(1, 2, 3), 2)}, 2)


def test_what_is_put_in_is_taken_out_again() -> None:
    ensemble = load(trained("roberta"), "roberta")
    names = {name for name, _ in SHAPES["roberta"].build().named_parameters()}
    assert {name for name, _ in ensemble.model.named_parameters()} > {name for name in names if "embed" in name}
    ensemble.detach()
    assert {name for name, _ in ensemble.model.named_parameters()} == names


def test_quantised_layers_are_linear_layers() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for layer in (bitsandbytes.nn.Linear8bitLt(4, 6), bitsandbytes.nn.Linear4bit(4, 6)):
        assert sizes_of(layer) == (4, 6)
