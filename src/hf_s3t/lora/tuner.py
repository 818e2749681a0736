"""Which parameters a stage owns, which of them trains, and which prefix is active: with PEFT's own means.

```
layer          stage 1        stage 2        stage 3        a served prefix of length 2
  7 ┐ group 1  default  ●     prefix   ○     prefix   ○     shard-00 ○
  6 ┘          default  ●     prefix   ○     prefix   ○     shard-00 ○
  5 ┐ group 2     -           default  ●     prefix   ○     shard-00 ○       ● trains
  4 ┘             -           default  ●     prefix   ○     shard-00 ○       ○ frozen
  3 ┐ group 3     -              -           default  ●        -             - no LoRA, not computed
  2 ┘             -              -           default  ●        -
  head         default  ●     default  ●     default  ●     shard-00 ○
```

The model holds at most two adapters while it trains: `default`, what the running stage owns plus its head, and
`prefix`, its parent assembled into one plain frozen LoRA. A kind of stage is nothing but the answer to two questions,
[`owned_layers`] and [`frozen_layers`]: with rank groups every layer has both adapters, and `prefix` the ranks of all
stages above it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import set_seed

from ..errors import IsolationError
from ..seams.tuners import LORA, TunerSeam, activate, adapter_parameters, add_adapter, base_name, set_active
from .adapter import Adapter
from .config import LORA_FIELDS, S3TConfig, register
from .fingerprints import fingerprints
from .layout import Layout, find_layout

Tensors = dict[str, torch.Tensor]


class S3TModel(TunerSeam):
    """A [`~peft.LoraModel`] whose adapters live in the layers that their [`S3TConfig`] owns (`stage_layers`)."""

    def look_at(self, model: nn.Module, config: S3TConfig) -> None:
        """Finds the layers of the base model."""
        self.layout = find_layout(model, config)

    def target_suffixes(self) -> set[str]:
        """What PEFT would find the layout's targets by."""
        return set(self.layout.suffixes)

    def is_target(self, config: S3TConfig, key: str) -> bool:
        """Whether a module is a target, in a layer that the adapter owns."""
        layers = config.stage_layers
        return key in self.layout.module_names(self.layout.grouped_layers if layers is None else layers)


register(S3TModel)


def owned_layers(config: S3TConfig, layout: Layout, depth: int) -> tuple[int, ...]:
    """Layers whose LoRA the stage at `depth` (1 is the first) trains."""
    return layout.groups[depth - 1] if config.stage_parameters == "layer_group" else layout.grouped_layers


def frozen_layers(config: S3TConfig, layout: Layout, depth: int) -> tuple[int, ...]:
    """Layers whose LoRA comes from the stage's parent and stays as it is."""
    if config.stage_parameters == "all" or depth == 1:
        return ()
    if config.stage_parameters == "rank_group":
        return layout.grouped_layers
    return tuple(sorted(layer for group in layout.groups[: depth - 1] for layer in group))


def plain_lora_config(config: S3TConfig, layout: Layout, layers: tuple[int, ...]) -> dict[str, Any]:
    """The `adapter_config.json` of a LoRA in `layers`, for stock PEFT: type `LORA`, and the same bytes every time."""
    plain = LoraConfig(
        **{name: getattr(config, name) for name in LORA_FIELDS if name not in ("target_modules", "exclude_modules")},
        target_modules=list(layout.suffixes),
        layers_to_transform=sorted(layers),
        layers_pattern=layout.pattern,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    ).to_dict()
    plain["modules_to_save"] = list(layout.heads) or None
    return {name: sorted(value) if isinstance(value, set) else value for name, value in plain.items()}


class StageTuner:
    """Puts one stage at a time into a PEFT model, whose adapters are of type `S3T`, and takes it out again."""

    def __init__(self, model: PeftModel):
        self.model = model
        self.config: S3TConfig = next(iter(model.peft_config.values()))
        self.layout: Layout = model.base_model.layout
        self.active: list[str] = []
        self.training_owned: frozenset[str] = frozenset()
        self._mask: list[tuple[nn.Parameter, bool]] = []
        self._goes_on = False  # from its parent's LoRA, which is not frozen beside it
        self._numel = {name: value.numel() for name, value in self.adapter_parameters("default").items()}

    def begin(self, depth: int, seed: int, parent: Adapter | None) -> None:
        """Makes the model ready to train the stage at `depth` (1 is the first).

        Its own LoRA is drawn from the seed. Of `parent`, the assembled prefix, it takes the head; the LoRA is frozen
        beside its own, or goes on as its own where every stage trains all layers.
        """
        self._clear()
        set_seed(seed)
        owned = owned_layers(self.config, self.layout, depth)
        self._inject("default", owned, heads=True)
        self.active, self._goes_on = ["default"], False
        if parent is not None:
            lora = {key: value for key, value in parent.tensors.items() if LORA in key}
            heads = {key: value for key, value in parent.tensors.items() if LORA not in key}
            frozen = frozen_layers(self.config, self.layout, depth)
            if frozen:
                self._inject("prefix", frozen, heads=False, like=parent)
                self._load("prefix", lora, whole=True)
                self.active.append("prefix")
            # An empty parent stores zeros: no LoRA matrix gets a gradient from there, so the stage's own stay fresh.
            trained = any(bool(value.any()) for value in lora.values())
            self._goes_on = trained and not frozen
            self._load("default", {**heads, **lora} if self._goes_on else heads)
        self.arm(training=True)

    def serve(self, members: Mapping[str, Adapter]) -> None:
        """Replaces whatever is loaded by whole prefixes, one adapter each by its name, and activates the first.

        Without any, an untrained adapter takes their place, which answers exactly as the base model.
        """
        self._clear()
        for name, member in members.items():
            self._inject(name, tuple(member.config["layers_to_transform"]), heads=True, like=member)
            self._load(name, member.tensors, whole=True)
        if not members:
            self._inject("default", self.layout.groups[0], heads=True)
        self.activate(next(iter(members), "default"))

    def activate(self, name: str) -> None:
        """Makes one loaded adapter answer, with its head; nothing trains."""
        self.active = [name]
        self.arm(training=False)

    def arm(self, training: bool) -> None:
        """Sets active adapters, heads and `requires_grad`. Runs after everything that may have changed them."""
        activate(self.model, self.active)
        self.model.requires_grad_(False)
        owned = self.adapter_parameters("default") if training else {}
        for parameter in owned.values():
            parameter.requires_grad = True
        self.training_owned = frozenset(owned)
        self._mask = [(value, name in owned) for name, value in self.model.named_parameters()]

    def hold_mask(self) -> bool:
        """Arms the stage again if something has moved what trains or answers since; whether it had."""
        if not self._mask or not self.training_owned:
            return False
        moved = any(value.requires_grad != trains for value, trains in self._mask)
        if moved or list(self.model.base_model.active_adapters) != self.active:
            self.arm(training=True)
            return True
        return False

    def stage_numel(self, layers: tuple[int, ...]) -> int:
        """Numbers that a stage stores which owns `layers`: its LoRA and its heads."""
        inside = {f"{name}." for name in self.layout.module_names(layers)}
        return sum(
            count
            for name, count in self._numel.items()
            if LORA not in name or any(f".{module}" in name for module in inside)
        )

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Named parameters of one adapter: its LoRA matrices and its heads."""
        return adapter_parameters(self.model, name)

    def check_mask(self) -> None:
        """Raises [`IsolationError`] unless exactly the stage's own parameters train."""
        training = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if training != self.training_owned or not training:
            raise IsolationError(
                "The parameters that train are not the stage's. Unexpected: "
                f"{sorted(training - self.training_owned)[:5]}; missing: "
                f"{sorted(self.training_owned - training)[:5]}. "
                "A callback or a subclass changed `requires_grad`. Remove that change."
            )

    def check_optimizer(self, optimizer: Any) -> None:
        """Raises [`IsolationError`] unless the optimizer holds exactly the stage's own parameters."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        owned = {id(parameter): name for name, parameter in self.adapter_parameters("default").items()}
        if held != set(owned):
            absent = sorted(name for key, name in owned.items() if key not in held)
            raise IsolationError(
                f"The optimizer holds {len(held - set(owned))} tensors that the stage does not own and lacks "
                f"{absent[:5] or 'none'} of its own. Build the optimizer from the parameters that require gradients."
            )

    def frozen_fingerprints(self, known: Mapping[str, str] | None = None) -> dict[str, str]:
        """Fingerprint of every tensor in the model that the running stage does not own; see [`fingerprints`].

        Those of base tensors that are `known`, by [`base_name`], are not computed again.
        """
        frozen = self._frozen()
        names = {name: base_name(name) or "" for name in frozen}
        found = {name: known[plain] for name, plain in names.items() if known and plain in known}
        return found | fingerprints({name: value for name, value in frozen.items() if name not in found})

    def check_frozen(self, before: Mapping[str, str]) -> dict[str, str]:
        """Raises [`IsolationError`] if a tensor outside the stage differs from `before`.

        Returns what the next stage's [`frozen_fingerprints`] may take as known.
        """
        after = fingerprints(self._frozen(), before)
        changed = sorted(name for name in before if after.get(name) != before[name])
        if changed:
            raise IsolationError(
                f"Training changed {len(changed)} tensors that the stage does not own: {', '.join(changed[:5])}. "
                "Running statistics (batch norm), positions that follow the length of rows (dynamic RoPE) and tied "
                "weights cannot be isolated; freeze them first."
            )
        return {plain: found for name, found in after.items() if (plain := base_name(name)) is not None}

    def _frozen(self) -> Tensors:
        """What the running stage does not own: the model's state, and buffers that are no part of it (RoPE's)."""
        tensors = self.model.state_dict() | dict(self.model.named_buffers(remove_duplicate=False))
        return {
            name: value
            for name, value in tensors.items()
            if isinstance(value, torch.Tensor) and name not in self.training_owned
        }

    def stage_tensors(self) -> Tensors:
        """What the running stage stores: its own LoRA and its heads, fp32 on the CPU, under PEFT's names."""
        tensors = get_peft_model_state_dict(self.model, adapter_name="default", save_embedding_layers=False)
        return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in tensors.items()}

    def empty_stage(self) -> None:
        """Makes a stage that has no example one without effect: its LoRA is all zeros, or stays its parent's."""
        with torch.no_grad():
            for name, parameter in self.adapter_parameters("default").items():
                if LORA in name and not self._goes_on:
                    parameter.zero_()

    def _clear(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT warns that it picks a new active adapter; arm() does
            for name in list(self.model.peft_config):
                self.model.delete_adapter(name)
        set_active(self.model, [])

    def _inject(self, name: str, layers: tuple[int, ...], heads: bool, like: Adapter | None = None) -> None:
        """A fresh adapter in some layers, of the config's rank and scaling or of those of another one."""
        of = vars(self.config) if like is None else like.config
        config = replace(  # type: ignore[call-arg]  # S3TConfig inherits from what the type checker is not shown
            self.config,
            stage_layers=list(layers),
            modules_to_save=list(self.layout.heads) if heads and self.layout.heads else None,
            lora_dropout=self.config.lora_dropout if name == "default" else 0.0,
            **{field: of[field] for field in ("r", "lora_alpha", "use_rslora")},
        )
        add_adapter(self.model, name, config, self.layout.module_names(layers))

    def _load(self, name: str, tensors: Tensors, whole: bool = False) -> None:
        keys = set(get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False))
        surplus, missing = sorted(set(tensors) - keys), sorted(keys - set(tensors)) if whole else []
        if surplus or missing:
            raise IsolationError(
                f"The stored tensors do not fit the layers of adapter {name!r}: missing {missing[:3]}, surplus "
                f"{surplus[:3]}. The store was trained with another config or base model."
            )
        set_peft_model_state_dict(self.model, tensors, adapter_name=name)
