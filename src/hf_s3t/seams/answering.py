"""Seams of answering: what a forward pass of several members knows of transformers', PEFT's and TRL's insides.

What can be found out by trying is not here: see `Members.look` in `serving/members.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from . import broken, lost, seam
from .models import is_encoder_decoder

FUSED_HEAD = "fused_lm_head"
"""The argument by which TRL's SFTTrainer asks for values per token instead of logits, since 1.16."""

WHOLE = ("cache_position", "logits_to_keep")
"""Arguments of a model with one dimension, which is not that of the rows."""

BY_ROW = ("start_positions", "end_positions", "cls_index", "is_impossible", "next_sentence_label", "lengths")
"""Arguments of a model with one dimension, which is that of the rows."""


def check_one_dimension(name: str, count: int) -> bool:
    """Whether an argument of one dimension, as long as there are rows, has a value per row; an error if not known."""
    if name in WHOLE or name in BY_ROW:
        return name in BY_ROW
    raise ValueError(
        f"`{name}` has {count} values for {count} rows, and it is not known whether each of them is one row's. Give "
        "it two dimensions, or answer with another number of rows."
    )


CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What a forward pass and `generate` call a cache, since transformers 5.24 and before. Under any other name a cache is
known by its type alone."""


def caches_given(values: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """What stands for a cache among arguments: all of that type, and whatever has a `name` that a cache goes by."""
    named = {key: values[key] for key in (*CACHE_ARGUMENTS, name) if key is not None and values.get(key) is not None}
    return {**caches_in(values), **named}


def caches_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """The key-value caches among arguments or outputs, whatever they are called."""
    return {name: value for name, value in values.items() if isinstance(value, Cache)}


def room_of(kwargs: Mapping[str, Any], defaults: Any, prompt: torch.Tensor) -> tuple[int, int]:
    """Rows of a cache that `generate` needs at most, and positions, by its arguments and a `GenerationConfig`."""

    def setting(name: str) -> int | None:
        return kwargs[name] if kwargs.get(name) is not None else getattr(defaults, name, None)

    rows = len(prompt) * max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
    return rows, prompt.shape[1] + (setting("max_new_tokens") or setting("max_length") or 20)


def first_argument(forward: Callable[..., Any]) -> str:
    """Name of the argument by which a layer's forward takes its hidden states, where not by position."""
    return next(iter(inspect.signature(forward).parameters))


def taken_labels(kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Takes out of the arguments of a forward pass what its loss compares the answer with, if a loss is due."""
    names = ("start_positions", "end_positions") if "start_positions" in kwargs else ("labels",)
    taken = {name: kwargs.pop(name, None) for name in names}
    return {} if any(value is None for value in taken.values()) else taken


def loss_of(base: Any, output: Any, labels: dict[str, torch.Tensor], items: Any) -> torch.Tensor:
    """The loss that a model computes from its logits and from what [`taken_labels`] took."""
    if "ForMultipleChoice" in type(base).__name__:  # transformers has no loss by that name
        return cross_entropy(output["logits"], labels["labels"])
    if is_encoder_decoder(base) and "labels" in labels and labels["labels"].ndim > 1:  # theirs is of causal models
        return cross_entropy(output["logits"].flatten(0, -2).float(), labels["labels"].flatten())
    with seam("models_loss"):
        compute = base.loss_function
    if "start_positions" in labels:
        return compute(output["start_logits"], output["end_logits"], **labels)
    logits = output["logits"]
    kwargs = {"logits": logits, **labels, "config": base.config, "pooled_logits": logits}
    if items is not None:
        kwargs["num_items_in_batch"] = items
    return compute(**kwargs, vocab_size=getattr(base.config.get_text_config(), "vocab_size", None))


def check_logits(names: Iterable[str]) -> None:
    """Raises [`CompatibilityError`] where no output is a kind of logits, which is what members are averaged by."""
    if not any(name == "logits" or name.endswith("_logits") for name in names):
        raise broken("logits", f"The model gives {sorted(names)}, and no logits that could be averaged")


def introduce_to_pipelines(name: str) -> None:
    """Keeps `pipeline(...)` from logging an error about a class that it knows no more than PEFT's."""
    try:
        from transformers.pipelines.base import SUPPORTED_PEFT_TASKS
    except ImportError:
        lost("pipelines", "transformers.pipelines.base has no SUPPORTED_PEFT_TASKS")
        return
    for names in (*SUPPORTED_PEFT_TASKS.values(), SUPPORTED_PEFT_TASKS.setdefault("image-classification", [])):
        if name not in names:
            names.append(name)


@seam("activation_checkpointing")
def runs_again(model: nn.Module, layers: Iterable[nn.Module]) -> nn.Module | None:
    """A layer that a backward pass runs again from outside, hooks included: under activation checkpointing, layers
    that do not do it themselves."""
    outside = [layer for layer in layers if not isinstance(layer, GradientCheckpointingLayer)]
    return outside[0] if outside and model.is_activation_checkpointing else None
