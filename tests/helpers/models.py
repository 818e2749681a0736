"""Tiny models and the rows that go with them, the same on every call.

Models are built from configs: fp32, on the CPU, a forward pass in milliseconds. Weights come from a seed of their own
and leave the global random state as it was. They are drawn ten times wider than usual (0.2 instead of 0.02), so that
one layer more or less moves the logits far beyond rounding. Dropout inside the base is what the architecture has by
default (0.1 for GPT-2, BERT and RoBERTa); any config field can be given: `tiny_bert(hidden_dropout_prob=0.0)`.

Row `i` is the same whatever the number of rows. It has an `id` (128 random bits as hex), a `person` it is about (three
rows each, not next to one another), and columns of one length: `transformers.default_data_collator` makes the batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 64
HIDDEN = 32
LENGTH = 12
"""Tokens per row."""
IMAGE = 8
"""Pixels along an edge; a patch has half of them."""
TOKENS = List(Value("int64"))
PIXELS = List(List(List(Value("float32"))))


def _build(model_class: Callable[[Any], PreTrainedModel], config: PretrainedConfig, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).float().eval()


def tiny_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A causal language model of 8 layers, grouped-query attention, rotary positions.

    Args:
        seed (`int`, *optional*, defaults to `0`): what its weights are drawn from.
        config: fields of its `LlamaConfig`.

    >>> tiny_llama().config.num_hidden_layers
    8
    """
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return _build(LlamaForCausalLM, LlamaConfig(**fields | config), seed)


class Renamed(nn.Module):
    """A decoder layer whose arguments have names that nobody has heard of."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def __call__(self, states: torch.Tensor, **kwargs: Any) -> Any:
        return super().__call__(states2=states, **{f"{name}2": value for name, value in kwargs.items()})

    def forward(self, states2: torch.Tensor, attention_mask2: Any = None, cache2: Any = None, **kwargs: Any) -> Any:
        known = {"attention_mask2": attention_mask2, "cache2": cache2, **kwargs}
        given = {name.removesuffix("2"): value for name, value in known.items() if value is not None}
        return self.layer(states2, **given)


def renamed(base: Any) -> Any:
    """A model whose layers are [`Renamed`]."""
    base.model.layers = nn.ModuleList(Renamed(layer) for layer in base.model.layers)
    return base


def tiny_llama_12(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """`tiny_llama` with 12 layers: whoever takes `layers.1` for the beginning of `layers.10` trains the wrong ones."""
    return tiny_llama(seed, **{"num_hidden_layers": 12} | config)


def tiny_gpt2(seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """A causal language model of 8 layers whose weights are transposed (`Conv1D`, `fan_in_fan_out=True`) and tied."""
    fields = {
        "vocab_size": VOCABULARY,
        "n_embd": HIDDEN,
        "n_layer": 8,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return _build(GPT2LMHeadModel, GPT2Config(**fields | config), seed)


def _encoder_fields(num_labels: int) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "num_labels": num_labels,
    }


def tiny_bert(num_labels: int = 3, seed: int = 0, **config: Any) -> BertForSequenceClassification:
    """An encoder of 4 layers, a pooler outside them, and a fresh head `classifier`."""
    fields = _encoder_fields(num_labels) | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
    return _build(BertForSequenceClassification, BertConfig(**fields | config), seed)


def tiny_roberta(num_labels: int = 3, seed: int = 0, **config: Any) -> RobertaForSequenceClassification:
    """An encoder of 4 layers whose fresh head `classifier` is two linear layers deep."""
    fields = _encoder_fields(num_labels) | {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 66,
        "type_vocab_size": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return _build(RobertaForSequenceClassification, RobertaConfig(**fields | config), seed)


def tiny_vit(num_labels: int = 3, seed: int = 0, **config: Any) -> ViTForImageClassification:
    """An image encoder of 4 layers over 4 patches, and a fresh head `classifier`."""
    fields = _encoder_fields(num_labels) | {"image_size": IMAGE, "patch_size": IMAGE // 2}
    return _build(ViTForImageClassification, ViTConfig(**fields | config), seed)


def _rows(kind: str, n: int, seed: int, columns: dict[str, Any], draw_row: Callable[[random.Random], dict]) -> Dataset:
    """`n` rows, each from a random source of its own: its id, its person, and what `draw_row` adds."""
    rows = []
    for row in range(n):
        draw = random.Random(f"{kind} {seed} {row}")
        who = {"id": f"{draw.getrandbits(128):032x}", "person": f"person-{row // 12 * 4 + row % 4}"}
        rows.append(who | draw_row(draw))
    return Dataset.from_list(rows, features=Features({"id": Value("string"), "person": Value("string")} | columns))


def _tokens(draw: random.Random) -> list[int]:
    """Tokens past the special ones that count up by a step of the row's own: something there is to learn."""
    first, step = draw.randrange(VOCABULARY), draw.randrange(1, 6)
    return [3 + (first + step * position) % (VOCABULARY - 3) for position in range(LENGTH)]


def llama_rows(n: int, seed: int = 0) -> Dataset:
    """Rows for a causal language model: 12 tokens, of which the first three (the prompt) carry no label.

    >>> llama_rows(2).column_names
    ['id', 'person', 'input_ids', 'attention_mask', 'labels']
    >>> llama_rows(2)["id"][1] == llama_rows(9)["id"][1]
    True
    """

    def draw_row(draw: random.Random) -> dict[str, Any]:
        tokens = _tokens(draw)
        return {"input_ids": tokens, "attention_mask": [1] * LENGTH, "labels": [-100] * 3 + tokens[3:]}

    return _rows("llama", n, seed, {"input_ids": TOKENS, "attention_mask": TOKENS, "labels": TOKENS}, draw_row)


def bert_rows(n: int, num_labels: int = 3, seed: int = 0) -> Dataset:
    """Rows for a text classifier: 6 to 12 tokens, padded to 12, and a label that the first token decides."""

    def draw_row(draw: random.Random) -> dict[str, Any]:
        tokens, length = _tokens(draw), draw.randrange(LENGTH // 2, LENGTH + 1)
        padding = [0] * (LENGTH - length)
        return {
            "input_ids": tokens[:length] + padding,
            "attention_mask": [1] * length + padding,
            "labels": tokens[0] % num_labels,
        }

    return _rows("bert", n, seed, {"input_ids": TOKENS, "attention_mask": TOKENS, "labels": Value("int64")}, draw_row)


def vit_rows(n: int, num_labels: int = 3, seed: int = 0) -> Dataset:
    """Rows for an image classifier: noise of shape `(3, 8, 8)` whose mean tells the label."""

    def draw_row(draw: random.Random) -> dict[str, Any]:
        label = draw.randrange(num_labels)
        mean = label - (num_labels - 1) / 2
        pixels = [[[draw.gauss(mean, 1.0) for _ in range(IMAGE)] for _ in range(IMAGE)] for _ in range(3)]
        return {"pixel_values": pixels, "labels": label}

    return _rows("vit", n, seed, {"pixel_values": PIXELS, "labels": Value("int64")}, draw_row)
