"""Arithmetic of LoRA adapters on the CPU: stages joined into a prefix, prefixes averaged into the root adapter.

An adapter here is what an adapter folder holds, as numpy arrays. No model is needed, and no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import json_bytes, safetensors_bytes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

if TYPE_CHECKING:
    import numpy as np
    import torch


class Adapter(NamedTuple):
    """Content of an adapter folder."""

    config: dict[str, Any]  # the fields of a plain PEFT config of type `LORA`
    arrays: dict[str, np.ndarray]  # LoRA matrices, A of shape `(r, in)` and B of shape `(out, r)`, and heads

    @classmethod
    def from_tensors(cls, config: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Adapter:
        """An adapter of tensors, whose memory it shares where they are on the CPU."""
        return cls(config, {name: value.detach().cpu().numpy() for name, value in tensors.items()})

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The arrays as tensors, of the same memory."""
        import torch

        return {name: torch.from_numpy(value) for name, value in self.arrays.items()}

    @property
    def scaling(self) -> float:
        """Factor of `B @ A`."""
        return scaling_of(self.config)

    @property
    def heads(self) -> set[str]:
        """Names of the tensors that are no LoRA matrices."""
        return {name for name in self.arrays if not is_lora(name)}

    def files(self, about: dict[str, Any]) -> dict[str, bytes]:
        """The two files of the adapter folder; `about` goes into the metadata, so that no two share their bytes."""
        described = json_bytes(about).decode().strip()
        return {
            CONFIG_FILE: json_bytes(self.config),
            WEIGHTS_FILE: safetensors_bytes(self.arrays, {"format": "pt", "hf_s3t": described}),
        }


def is_lora(name: str) -> bool:
    """Whether a tensor of an adapter is a LoRA matrix, not part of a head."""
    return ".lora_A." in name or ".lora_B." in name


def split_layer_path(path: str) -> tuple[str, int, str] | None:
    """Splits a module path at its first number, which is the layer index (later ones number experts and the like).

    >>> split_layer_path("model.layers.11.mlp.experts.5.up_proj")
    ('model.layers', 11, 'mlp.experts.5.up_proj')
    """
    parts = path.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:position]), int(part), ".".join(parts[position + 1 :])
    return None


def scaling_of(config: Mapping[str, Any]) -> float:
    """Factor of `B @ A` that PEFT takes: `lora_alpha / r`, with rsLoRA `lora_alpha / sqrt(r)`."""
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)


def with_rank(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """A LoRA config with another rank and the same scaling, as plain LoRA without rsLoRA.

    `lora_alpha` is the whole number or the float whose quotient by the rank is the scaling, bit for bit. With rsLoRA,
    or a fraction to begin with, there may be none: then it is the closest.

    >>> with_rank({"r": 2, "lora_alpha": 3, "use_rslora": False}, 6)
    {'r': 6, 'lora_alpha': 9, 'use_rslora': False}
    """
    scaling = scaling_of(config)
    alpha = scaling * rank
    near = (round(alpha), alpha, math.nextafter(alpha, -math.inf), math.nextafter(alpha, math.inf))
    closest = min(near, key=lambda value: abs(value / rank - scaling))
    return {**config, "r": rank, "lora_alpha": closest, "use_rslora": False}


def join(stages: Sequence[Adapter], stage_parameters: str = "layer_group") -> Adapter:
    """Joins the stages along a prefix, the first one first, into one adapter.

    Layer groups are disjoint: their union. Rank groups lie in the same layers: A of shape `(r, in)` is stacked along
    its first dimension, B of shape `(out, r)` along its second, and ranks add up. A stage that owns all layers
    replaces its parent as a whole, as a later head replaces an older one.
    """
    import numpy as np

    arrays: dict[str, np.ndarray] = {}
    layers: set[int] = set()
    for stage in stages:
        arrays.update(stage.arrays)
        layers.update(stage.config["layers_to_transform"])
    config = {**stages[-1].config, "layers_to_transform": sorted(layers), "auto_mapping": None}
    if stage_parameters == "rank_group":
        for name in filter(is_lora, arrays):
            parts = [stage.arrays[name] for stage in stages]
            arrays[name] = np.concatenate(parts, axis=0 if ".lora_A." in name else 1)
        config = with_rank(config, sum(stage.config["r"] for stage in stages))
    return Adapter(config, arrays)


def average(members: Sequence[Adapter]) -> Adapter | None:
    """The weight average of several prefixes as one plain LoRA adapter: `mean_i(scaling_i * B_i @ A_i)`.

    Ranks add up; `lora_alpha = r`, so that the scale is 1; B is multiplied by `scaling_i / members` in fp64 and
    rounded once, A stays as it is; a member without LoRA in a layer gets zero columns there. `None` where there is
    no such adapter: without members, or where several have heads.
    """
    import numpy as np

    if len(members) <= 1:
        return members[0] if members else None
    if any(member.heads for member in members):
        return None
    rank = sum(member.config["r"] for member in members)
    arrays = {}
    for name in sorted(set().union(*(member.arrays for member in members))):
        example = next(member.arrays[name] for member in members if name in member.arrays)
        parts = [_part(member, name, example, len(members)) for member in members]
        arrays[name] = np.concatenate(parts, axis=0 if ".lora_A." in name else 1)
    layers = sorted(set().union(*(member.config["layers_to_transform"] for member in members)))
    config = {**members[0].config, "r": rank, "lora_alpha": rank, "use_rslora": False, "layers_to_transform": layers}
    return Adapter(config, arrays)


def _part(member: Adapter, name: str, example: np.ndarray, count: int) -> np.ndarray:
    import numpy as np

    rank = member.config["r"]
    value = member.arrays.get(name)
    if ".lora_A." in name:
        return np.zeros((rank, *example.shape[1:]), np.float32) if value is None else value
    if value is None:
        return np.zeros((example.shape[0], rank, *example.shape[2:]), np.float32)
    with np.errstate(over="ignore"):  # as in the model itself, what is too large is infinite
        return np.multiply(value, member.scaling / count, dtype=np.float64).astype(np.float32)
