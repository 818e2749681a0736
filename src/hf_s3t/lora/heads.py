"""Heads: which modules are trained whole beside the LoRA, and how the ones that a base lacks are drawn."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..seams.models import draw_weights, loaded_parameters, missing_weights
from ..seams.tuners import HEADS_BY_TASK
from .adapter import split_layer_path

if TYPE_CHECKING:  # it registers the tuner, which needs this module
    from .config import S3TConfig


def find_heads(model: nn.Module, config: S3TConfig) -> tuple[str, ...]:
    """Paths of the modules that `modules_to_save` names, as PEFT matches them (by the end of the path)."""
    wanted = {*(config.modules_to_save or ()), *HEADS_BY_TASK.get(config.task_type or "", ())}
    heads = tuple(path for path, _ in model.named_modules() if path and any(path.endswith(name) for name in wanted))
    within = [path for path in heads if split_layer_path(path) is not None]
    if within:
        raise ValueError(
            f"`modules_to_save` names modules inside the numbered layers: {', '.join(within)}. Every stage would "
            "train them again. Target them with LoRA instead."
        )
    return heads


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes."""
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()


def freshly_initialized(model: nn.Module) -> list[str]:
    """Paths of the modules that `from_pretrained` drew at random because the checkpoint lacks them.

    transformers marks every loaded parameter; a model that was built from a config has no marks and is taken as it is.
    What was resized or replaced after loading has no mark either, so the report of the loading decides.
    """
    loaded = loaded_parameters(model)
    fresh = {name for name, value in model.named_parameters() if name not in loaded and value.is_floating_point()}
    missing = missing_weights(model) if loaded and fresh else set()
    return sorted({name.rsplit(".", 1)[0] for name in fresh & missing})


def draw_heads(model: nn.Module, heads: tuple[str, ...], seed: int) -> dict[str, str]:
    """Draws the heads that the base lacks anew, each from a digest of (seed, path); returns their sha256.

    Refuses a base that lacks the weights of anything else.
    """
    fresh = freshly_initialized(model)
    orphans = [path for path in fresh if not any(path == head or path.startswith(f"{head}.") for head in heads)]
    if orphans:
        raise ValueError(
            f"The base model lacks weights for {', '.join(orphans)}, which were drawn at random and would be lost: no "
            f"stage stores them. Add them to the config: `modules_to_save={orphans}`."
        )
    drawn = {}
    for path in fresh:
        module = model.get_submodule(path)
        number = int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:8], "big") >> 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            draw_weights(model, path)
        joined = b"".join(tensor_digest(value).encode() for _, value in sorted(module.named_parameters()))
        drawn[path] = hashlib.sha256(joined).hexdigest()
    return drawn
