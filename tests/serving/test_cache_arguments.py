"""A cache may be called `cache` or `past_key_values`, as transformers has called it: both mean the same here."""

from __future__ import annotations

import threading
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StaticCache,
)

from hf_s3t import S3TEnsemble
from hf_s3t.seams.answering import caches_in
from hf_s3t.serving.following import State
from hf_s3t.serving.member_cache import MemberCache
from hf_s3t.serving.members import Serving
from hf_s3t.serving.passes import take_caches
from served import ROUNDING, copy, inputs_of, load, prompts, trained

GENERATION = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 3}
DOOMED = [(2, 1)]
"""Slices, after whose deletion as many members answer as before."""
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


@pytest.mark.parametrize("count", [3, 1])
@NAMES
def test_a_cache_that_a_deleted_example_is_in_is_refused(name: str, count: int, tmp_path: Path) -> None:
    """Another prefix answers for the shard, and what a cache looks like says nothing."""
    store, tokens = copy("llama", tmp_path), inputs_of("llama")["input_ids"][:2]
    if count == 1:
        store.delete(slices=[(shard, slice_id) for shard in (0, 1) for slice_id in range(3)])
    ensemble = load(store, "llama")
    shape = ensemble._members.shape(ensemble._state.serving)
    answer = ensemble(tokens[:, :7], use_cache=True)
    (own, old), *_ = caches_in(answer).items()
    within = ensemble.generate(tokens[:, :7], return_dict_in_generate=True, **GENERATION).past_key_values
    copied = deepcopy(old)
    given = DynamicCache()  # of the caller
    if count == 1:
        ensemble.generate(tokens[:, :7], **{own: given}, **GENERATION)
    assert not ensemble.refresh()
    ensemble(tokens[:, 7:8], **{own: old})  # nothing has changed
    ensemble.delete(slices=DOOMED)
    assert len(ensemble.members) == count and ensemble._members.shape(ensemble._state.serving) == shape
    for cache in (old, within, copied, *([given] if count == 1 else [])):
        for ask in (ensemble, ensemble.forward, ensemble.generate):
            with pytest.raises(ValueError, match=f"`{name}` is a cache of other members"):
                ask(tokens, **{name: cache})
    new = ensemble(tokens[:, :7], use_cache=True).past_key_values
    with torch.no_grad():
        rest = ensemble(tokens[:, 7:], **{own: new}).logits
        torch.testing.assert_close(rest, ensemble(tokens).logits[:, 7:], **ROUNDING)


def test_an_answer_that_began_before_a_deletion_goes_on_with_its_cache(tmp_path: Path) -> None:
    store, tokens = copy("llama", tmp_path), inputs_of("llama")["input_ids"][:2]
    ensemble = load(store, "llama")
    with torch.no_grad(), ensemble.answering():
        whole, beginning = ensemble(tokens).logits, ensemble(tokens[:, :7], use_cache=True)
        delete = threading.Thread(target=ensemble.delete, kwargs={"slices": DOOMED})
        delete.start()
        delete.join()
        assert ensemble.generation == store.manifest().generation == 1
        rest = ensemble(tokens[:, 7:], **caches_in(beginning)).logits
    torch.testing.assert_close(rest, whole[:, 7:], **ROUNDING)
    with pytest.raises(ValueError, match="is a cache of other members"):
        ensemble(tokens[:, 7:], **caches_in(beginning))


def test_a_cache_by_position_is_looked_at(tmp_path: Path) -> None:
    store, tokens = copy("llama", tmp_path), inputs_of("llama")["input_ids"][:2]
    ensemble = load(store, "llama")
    old = ensemble(tokens[:, :7], use_cache=True, return_dict=False)
    (cache,) = [value for value in old if isinstance(value, MemberCache)]
    ensemble.delete(slices=DOOMED)
    with pytest.raises(ValueError, match="`argument 4` is a cache of other members"):
        ensemble(tokens[:, 7:], None, None, cache)


def test_a_cache_in_a_cache_is_looked_at() -> None:
    serving = Serving(torch.zeros(1, dtype=torch.long))
    before, after = (State(0, ("shard-00",), serving, paths=((f"{prefix} of some bits",),)) for prefix in ("0", "1"))
    inner = DynamicCache()
    take_caches(before, (), {"past_key_values": EncoderDecoderCache(inner, DynamicCache())})
    take_caches(before, (), {"past_key_values": inner})
    for cache in (inner, EncoderDecoderCache(DynamicCache(), inner)):
        with pytest.raises(ValueError, match="of other members"):
            take_caches(after, (), {"past_key_values": cache})


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
