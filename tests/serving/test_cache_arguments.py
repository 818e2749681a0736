"""A cache may be called `cache` or `past_key_values`, as transformers has called it: both mean the same here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DynamicCache,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StaticCache,
)

from hf_s3t import S3TEnsemble
from hf_s3t.seams.answering import caches_in
from hf_s3t.serving.member_cache import MemberCache
from served import ROUNDING, copy, inputs_of, load, prompts, trained

GENERATION = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 3}
NAMES = pytest.mark.parametrize("name", ["cache", "past_key_values"])


def by_hand(base: Any, targets: list[str]) -> S3TEnsemble:
    """An ensemble of two members with LoRA in the upper two layers."""
    config = {"r": 2, "target_modules": targets, "layers_to_transform": [2, 3], "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(**config), adapter_name="a")
    model.add_adapter("b", LoraConfig(**config))
    return S3TEnsemble(model, {"a": 2, "b": 2}).eval()


@NAMES
def test_whatever_is_no_cache_of_the_members_is_refused(name: str) -> None:
    ensemble, given = load(trained("llama"), "llama"), prompts()
    pairs = ((torch.zeros(6, 2, 3, 8),) * 2,) * 8
    for other in (DynamicCache(), StaticCache(ensemble.config, 32), pairs, True):
        with pytest.raises(ValueError, match=f"`{name}` is a cache with one row per example"):
            ensemble.generate(**given, **{name: other}, **GENERATION)
        with pytest.raises(ValueError, match=f"`{name}` is a cache with one row per example"):
            ensemble(**given, **{name: other})


@NAMES
def test_no_cache_is_as_if_nothing_was_said(name: str) -> None:
    ensemble, given = load(trained("llama"), "llama"), prompts()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = ensemble.generate(**given, **GENERATION)
        assert torch.equal(ensemble.generate(**given, **{name: None}, **GENERATION), expected)
        with torch.no_grad():
            assert torch.equal(ensemble(**given, **{name: None}).logits, ensemble(**given).logits)


@NAMES
def test_the_cache_that_an_answer_gives_goes_on_by_either_name(name: str) -> None:
    ensemble, tokens = load(trained("llama"), "llama"), inputs_of("llama")["input_ids"]
    with torch.no_grad():
        whole, beginning = ensemble(tokens).logits, ensemble(tokens[:, :7], use_cache=True)
        cache = beginning.past_key_values
        assert isinstance(cache, MemberCache)
        rest = ensemble(tokens[:, 7:], **{name: cache})
    torch.testing.assert_close(rest.logits, whole[:, 7:], **ROUNDING)
    beginning = ensemble(tokens[:, :7], use_cache=True)
    longer = ensemble.generate(tokens[:, :8], **{name: beginning.past_key_values}, **GENERATION)
    assert torch.equal(longer, ensemble.generate(tokens[:, :8], **GENERATION))
    with pytest.raises(ValueError, match="two caches"):
        ensemble(tokens, cache=beginning.past_key_values, past_key_values=rest.past_key_values)


@NAMES
def test_one_member_refuses_the_cache_of_several(name: str, tmp_path: Path) -> None:
    store, tokens = copy("llama", tmp_path), inputs_of("llama")["input_ids"][:1]
    ensemble = load(store, "llama")
    old = ensemble(tokens[:, :7], use_cache=True).past_key_values
    ensemble.delete(slices=[(shard, slice_id) for shard in (0, 1) for slice_id in range(3)])
    assert ensemble.members == ["shard-02"]
    with pytest.raises(ValueError, match=f"`{name}` is a cache of other members"):
        ensemble(tokens[:, 7:], **{name: old})
    own = next(iter(caches_in(ensemble(tokens[:, :7], use_cache=True))))
    ensemble(tokens[:, :7], **{own: DynamicCache()})  # of one member it may be the caller's


def test_a_model_that_does_not_name_use_cache_gives_a_cache_when_asked() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 64, "num_key_value_heads": 2}
    config = GraniteMoeConfig(**sizes, **experts, use_cache=False, pad_token_id=0)
    ensemble = by_hand(GraniteMoeForCausalLM(config).eval(), ["q_proj"])
    tokens = inputs_of("llama")["input_ids"]
    with torch.no_grad():
        assert ensemble(tokens).past_key_values is None
        beginning, whole = ensemble(tokens[:, :7], use_cache=True), ensemble(tokens).logits
        assert isinstance(beginning.past_key_values, MemberCache)
        rest = ensemble(tokens[:, 7:], **caches_in(beginning), use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 7:], **ROUNDING)
    without = ensemble.generate(tokens, use_cache=False, **GENERATION)
    assert torch.equal(ensemble.generate(tokens, use_cache=True, **GENERATION), without)


def test_members_of_a_model_without_a_cache_generate() -> None:
    config = OpenAIGPTConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=4, n_head=4)
    ensemble = by_hand(OpenAIGPTLMHeadModel(config).eval(), ["c_attn"])
    tokens = inputs_of("llama")["input_ids"][:2]
    with torch.no_grad():
        assert caches_in(ensemble(tokens)) == {}
        grown = ensemble.generate(tokens, do_sample=False, **GENERATION)
        for place in range(tokens.shape[1], grown.shape[1]):
            assert torch.equal(ensemble(grown[:, :place]).logits[:, -1].argmax(-1), grown[:, place])
