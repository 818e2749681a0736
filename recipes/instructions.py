"""Instruction tuning of causal language models: the Alpaca prompts, batches of them, base models in any precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

ALL_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

QLORA = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}  # fmt: skip
"""How QLoRA (arXiv 2305.14314) holds a base: normal floats of 4 bits, their scales quantised once more."""


class InstructionCollator:
    """Makes a batch from raw rows in the Alpaca format: prompt, response and end of text, padded on the right.

    Rows stay raw in the dataset, so that an example's digest is the one of the text that a person can show.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the base model.
        max_length (`int`): longest example, in tokens.
        train_on_prompt (`bool`): whether the prompt counts in the loss.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, train_on_prompt: bool = False):
        self.tokenizer, self.max_length, self.train_on_prompt = tokenizer, max_length, train_on_prompt

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors `input_ids`, `attention_mask` and `labels` of shape `(batch, sequence)`."""
        examples = [self.example(row) for row in rows]
        length = max(len(tokens) for tokens, _ in examples)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([tokens + [pad] * (length - len(tokens)) for tokens, _ in examples]),
            "attention_mask": torch.tensor([[1] * len(t) + [0] * (length - len(t)) for t, _ in examples]),
            "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in examples]),
        }

    def example(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Tokens of a row, and its labels."""
        prompt = self.tokenizer(prompt_of(row))["input_ids"]
        response = self.tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        tokens = (prompt + response + [self.tokenizer.eos_token_id])[: self.max_length]
        masked = 0 if self.train_on_prompt else min(len(prompt), len(tokens))
        return tokens, [-100] * masked + tokens[masked:]


def prompt_of(row: Mapping[str, Any]) -> str:
    """Alpaca's prompt for a row."""
    template = PROMPT_WITH_INPUT if row.get("input") else PROMPT_WITHOUT_INPUT
    return template.format(instruction=row["instruction"], input=row.get("input"))


def load_model(name: str, load_in_8bit: bool, load_in_4bit: bool = False) -> Any:
    """The base model; a quantised one is prepared here, once, and never again per stage. 4 bits are those of QLoRA."""
    if load_in_8bit and load_in_4bit:
        raise ValueError("--load_in_8bit and --load_in_4bit are two ways to hold one base. Leave one of them out.")
    if not load_in_8bit and not load_in_4bit:
        return AutoModelForCausalLM.from_pretrained(name)
    device = PartialState().local_process_index if torch.cuda.is_available() else "cpu"
    settings = BitsAndBytesConfig(load_in_8bit=True) if load_in_8bit else BitsAndBytesConfig(**QLORA)
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=settings, device_map={"": device})
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with some padding token."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
