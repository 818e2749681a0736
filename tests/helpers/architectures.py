"""Tiny models of the architectures that docs/models.md lists, built from configs, and the rows that go with them.

Each is a [`Case`], as those of `trainings.py`. Weights are random and drawn wide, see `models.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset, List, Value
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
    default_data_collator,
)

import models
from models import HIDDEN, LENGTH, TOKENS, VOCABULARY
from trainings import Case

LAYERS = 3
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE_TOKEN, VISION_START, VISION_END = 60, 61, 62
FRAMES, MELS = 16, 8


def tiny_t5(seed: int = 0, **config: Any) -> T5ForConditionalGeneration:
    """An encoder and a decoder of 3 layers each."""
    fields = {
        "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 2 * HIDDEN, "num_layers": LAYERS,
        "num_heads": 4, "initializer_factor": 4.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    return models._build(T5ForConditionalGeneration, T5Config(**fields | config), seed)


def tiny_bart(seed: int = 0, **config: Any) -> BartForConditionalGeneration:
    """An encoder and a decoder of 3 layers each, whose modules have the same names."""
    fields = {
        "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 2 * HIDDEN,
        "decoder_ffn_dim": 2 * HIDDEN, "max_position_embeddings": 64, "init_std": 0.2, "decoder_start_token_id": 2,
        "forced_eos_token_id": None, **SPECIAL,
    }  # fmt: skip
    return models._build(BartForConditionalGeneration, BartConfig(**fields | config), seed)


def tiny_whisper(seed: int = 0, **config: Any) -> WhisperForConditionalGeneration:
    """An encoder of sounds and a decoder of words, of 3 layers each."""
    fields = {
        "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 2 * HIDDEN,
        "decoder_ffn_dim": 2 * HIDDEN, "num_mel_bins": MELS, "max_source_positions": FRAMES // 2,
        "max_target_positions": 64, "init_std": 0.2, "decoder_start_token_id": 1, "begin_suppress_tokens": None,
        **SPECIAL,
    }  # fmt: skip
    return models._build(WhisperForConditionalGeneration, WhisperConfig(**fields | config), seed)


def tiny_bert_qa(seed: int = 0) -> BertForQuestionAnswering:
    """BERT with a head that finds where an answer begins and ends."""
    fields = models._encoder_fields(2) | {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS}
    return models._build(BertForQuestionAnswering, BertConfig(**fields, max_position_embeddings=64), seed)


def tiny_bert_tokens(seed: int = 0) -> BertForTokenClassification:
    """BERT with a head that names every token's class."""
    fields = models._encoder_fields(3) | {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS}
    return models._build(BertForTokenClassification, BertConfig(**fields, max_position_embeddings=64), seed)


_DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    **SPECIAL,
}  # fmt: skip


def tiny_mixtral(seed: int = 0, **config: Any) -> MixtralForCausalLM:
    """A decoder of 3 layers with 4 experts each, of which 2 answer."""
    fields = _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}
    return models._build(MixtralForCausalLM, MixtralConfig(**fields | config), seed)


def tiny_qwen3_moe(seed: int = 0, **config: Any) -> Qwen3MoeForCausalLM:
    """A decoder of 3 layers with 4 experts each, of which 2 answer."""
    fields = _DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN, "head_dim": 8}
    return models._build(Qwen3MoeForCausalLM, Qwen3MoeConfig(**fields | config), seed)


def tiny_qwen2_vl(seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """A vision tower of 2 blocks before a language model of 3 layers."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2,
        "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=_DECODER | {"rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE_TOKEN,
        video_token_id=63, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        initializer_range=0.2,
    )  # fmt: skip
    return models._build(Qwen2VLForConditionalGeneration, config, seed)


# ---- rows ----


def pair_rows(n: int, seed: int = 0) -> Dataset:
    """Rows of a sequence and what it becomes: 12 tokens, and their first 6 backwards."""

    def draw_row(draw: random.Random) -> dict[str, Any]:
        tokens = models._tokens(draw)
        return {"input_ids": tokens, "attention_mask": [1] * LENGTH, "labels": tokens[:6][::-1]}

    columns = {"input_ids": TOKENS, "attention_mask": TOKENS, "labels": TOKENS}
    return models._rows("pairs", n, seed, columns, draw_row)


def sound_rows(n: int, seed: int = 0) -> Dataset:
    """Rows of sounds of shape `(8, 16)`, and 6 tokens that they are heard as."""

    def draw_row(draw: random.Random) -> dict[str, Any]:
        tokens = models._tokens(draw)[:6]
        sound = [[draw.gauss(tokens[0] / 10 - 3, 1.0) for _ in range(FRAMES)] for _ in range(MELS)]
        return {"input_features": sound, "labels": tokens}

    columns = {"input_features": List(List(Value("float32"))), "labels": TOKENS}
    return models._rows("sounds", n, seed, columns, draw_row)


def span_rows(n: int, seed: int = 0) -> Dataset:
    """Rows of 12 tokens, and where an answer begins and ends in them."""

    def draw_row(draw: random.Random) -> dict[str, Any]:
        tokens, first = models._tokens(draw), draw.randrange(LENGTH - 3)
        return {
            "input_ids": tokens, "attention_mask": [1] * LENGTH, "start_positions": first, "end_positions": first + 2,
        }  # fmt: skip

    columns = {"input_ids": TOKENS, "attention_mask": TOKENS}
    numbers = {"start_positions": Value("int64"), "end_positions": Value("int64")}
    return models._rows("spans", n, seed, columns | numbers, draw_row)


def tag_rows(n: int, seed: int = 0) -> Dataset:
    """Rows of 12 tokens, and a class of each."""

    def draw_row(draw: random.Random) -> dict[str, Any]:
        tokens = models._tokens(draw)
        return {"input_ids": tokens, "attention_mask": [1] * LENGTH, "labels": [token % 3 for token in tokens]}

    columns = {"input_ids": TOKENS, "attention_mask": TOKENS, "labels": TOKENS}
    return models._rows("tags", n, seed, columns, draw_row)


def picture_rows(n: int, seed: int = 0) -> Dataset:
    """Rows of a picture of 8 x 8 pixels, as 16 patches that become 4 tokens, and 8 tokens about it."""

    def draw_row(draw: random.Random) -> dict[str, Any]:
        tokens = models._tokens(draw)[:8]
        ids = [VISION_START, *[IMAGE_TOKEN] * 4, VISION_END, *[3 + token % 50 for token in tokens]]
        pixels = [[draw.gauss(tokens[0] / 20, 1.0) for _ in range(12)] for _ in range(16)]
        return {
            "input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * 6 + ids[6:],
            "mm_token_type_ids": [int(token == IMAGE_TOKEN) for token in ids],
            "pixel_values": pixels, "image_grid_thw": [[1, 4, 4]],
        }  # fmt: skip

    columns = dict.fromkeys(("input_ids", "attention_mask", "labels", "mm_token_type_ids"), TOKENS)
    pictures = {"pixel_values": List(List(Value("float32"))), "image_grid_thw": List(TOKENS)}
    return models._rows("pictures", n, seed, columns | pictures, draw_row)


def collate_pictures(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch as the processor of such a model makes it: patches of all pictures one after the other."""
    batch = default_data_collator(rows)
    return {
        name: value.flatten(0, 1) if name in ("pixel_values", "image_grid_thw") else value
        for name, value in batch.items()
    }


_qv = {"target_modules": ["q_proj", "v_proj"]}
_attention = {"task_type": "CAUSAL_LM", **_qv}


def _case(name: str, make: Callable[..., Any], rows: Any, config: dict[str, Any], path: str, **more: Any):
    return Case(name, make, rows, config, path, LAYERS, **more)


ARCHITECTURES = {
    case.name: case
    for case in (
        _case("t5", partial(tiny_t5, dropout_rate=0.0), pair_rows,
              {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"], "layers_pattern": "decoder.block"},
              "decoder.block"),
        _case("bart", tiny_bart, pair_rows,
              {"task_type": "SEQ_2_SEQ_LM", **_qv, "layers_pattern": "decoder.layers"},
              "model.decoder.layers"),
        _case("whisper", tiny_whisper, sound_rows,
              {**_qv, "layers_pattern": "decoder.layers"},
              "model.decoder.layers"),
        _case("bert-qa", tiny_bert_qa, span_rows,
              {"task_type": "QUESTION_ANS", "target_modules": ["query", "value"]},
              "bert.encoder.layer", heads=("qa_outputs",)),
        _case("bert-tokens", tiny_bert_tokens, tag_rows,
              {"task_type": "TOKEN_CLS", "target_modules": ["query", "value"]},
              "bert.encoder.layer", heads=("classifier",)),
        _case("mixtral", tiny_mixtral, models.llama_rows, _attention, "model.layers"),
        _case("qwen3-moe", tiny_qwen3_moe, models.llama_rows, _attention, "model.layers"),
        _case("qwen2-vl", tiny_qwen2_vl, picture_rows,
              {**_attention, "layers_pattern": "language_model.layers"},
              "model.language_model.layers", collate=collate_pictures),
    )
}  # fmt: skip
