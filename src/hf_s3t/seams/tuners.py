"""The seams to PEFT: its enum of methods, its tuner, its names of parameters, which modules it targets."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, LoraModel, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, register_peft_method
from torch import nn

from . import broken, seam
from .overrides import check_overrides, classes_behind

LORA = "lora_"
"""What the name of a LoRA matrix has in it, and of no other parameter."""

HEADS_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that PEFT's task classes add to `modules_to_save` on their own; see [`check_heads`]."""


# ---- the method S3T ----


@seam("peft_type")
def add_peft_type(name: str) -> PeftType:
    """Adds a member to PEFT's enum of methods, which `register_peft_method` insists on. Idempotent."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
        type.__setattr__(PeftType, name, member)
    known = list(PeftType)
    if name not in known or getattr(PeftType, name, None) is not known[known.index(name)]:
        raise broken("peft_type", f"PEFT's enum of methods does not know {name} after it was added")
    return PeftType(name)


def register_tuner(peft_type: PeftType, config_cls: type[Any], model_cls: type[Any]) -> None:
    """Registers a method with PEFT. Idempotent, so that a reload of the package is harmless."""
    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=peft_type.value.lower(), config_cls=config_cls, model_cls=model_cls, prefix=LORA)
    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise broken("peft_type", f"PEFT has no tuner for {peft_type.value} after it was registered")


class TunerSeam(LoraModel):
    """A [`~peft.LoraModel`] that asks a subclass where its LoRA goes."""

    _trained: list[tuple[nn.Parameter, bool]] | None = None
    """While adapters are off: what trained before."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        overridden = ("_pre_injection_hook", "_prepare_adapter_config", "_check_target_module_exists")
        check_overrides("lora_model", classes_behind(cls, TunerSeam), overridden)

    def look_at(self, model: nn.Module, config: Any) -> None:
        """Hook: sees the base model before the first adapter is put into it."""
        raise NotImplementedError

    def target_suffixes(self) -> set[str]:
        """Hook: `target_modules` of every adapter."""
        raise NotImplementedError

    def is_target(self, config: Any, key: str) -> bool:
        """Hook: whether an adapter has a LoRA in the module of this path."""
        raise NotImplementedError

    def disable_adapter_layers(self) -> None:
        """As PEFT's, which also freezes what trains: what did so is noted."""
        if self._trained is None:
            self._trained = [(value, value.requires_grad) for value in self.model.parameters()]
        super().disable_adapter_layers()

    def enable_adapter_layers(self) -> None:
        """As PEFT's, but what trained before trains again, not every active adapter."""
        trained = self._trained or [(value, value.requires_grad) for value in self.model.parameters()]
        self._trained = None
        super().enable_adapter_layers()
        for value, trains in trained:
            value.requires_grad = trains

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.look_at(model, config)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        peft_config.target_modules = self.target_suffixes()
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:
        return self.is_target(peft_config, key)


# ---- adapters in a model ----


def add_adapter(model: PeftModel, name: str, config: Any, places: Collection[str]) -> None:
    """Puts an adapter into the modules at `places` of a base model, with the heads that its config names alone."""
    if not model.base_model.active_adapters:
        set_active(model, [name])
    # Not `add_adapter` of the task's own class: that one adds heads to every adapter, also to one without.
    PeftModel.add_adapter(model, name, config)
    stored = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    named = {_as_stored(key, name) for key in adapter_parameters(model, name)}
    lora = {key for key in stored if LORA in key}
    found = {(base_name(key.split(f".{LORA}")[0]) or "") for key in lora}
    if found != set(places):
        raise broken("lora_model", f"The adapter lies in {_some(found)}, where {_some(places)} was expected")
    if not named <= stored or {key for key in named if LORA in key} != lora:
        raise broken("peft_names", f"An adapter has the parameters {_some(named)}, and PEFT stores {_some(stored)}")


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Named parameters of one adapter: its LoRA matrices and its heads."""
    return {key: value for key, value in model.named_parameters() if f".{name}." in f"{key}."}


class LoraOf(NamedTuple):
    """What an adapter has in one module: A of shape `(rank, in)`, B `(out, rank)`, and the factor of their product."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


class Mounted(NamedTuple):
    """What PEFT has made of one module of a base model."""

    module: nn.Module  # the base model's own
    lora: dict[str, LoraOf] | None  # by the adapter's name; `None`: a head
    heads: dict[str, nn.Module]


def mounted_adapters(base: nn.Module, names: Collection[str]) -> dict[str, Mounted]:
    """What some adapters have in a base model, by the path of each module that PEFT has replaced."""
    found = {}
    with seam("peft_names"):
        for path, module in base.named_modules():
            if isinstance(module, LoraLayer):
                here = {name: (module.lora_A[name], module.lora_B[name]) for name in names if name in module.lora_A}
                lora = {name: LoraOf(a.weight, b.weight, module.scaling[name]) for name, (a, b) in here.items()}
                found[path] = Mounted(module.get_base_layer(), lora, {})
            elif isinstance(module, ModulesToSaveWrapper):
                heads = {name: module.modules_to_save[name] for name in names if name in module.modules_to_save}
                found[path] = Mounted(module.original_module, None, heads)
    return found


def _as_stored(key: str, name: str) -> str:
    """The name of an adapter's parameter in its file."""
    return f"{key}.".replace(f".modules_to_save.{name}.", ".").replace(f".{name}.", ".").rstrip(".")


def base_name(name: str) -> str | None:
    """Name of a tensor in the base model, the same with and without adapters around it; `None` for an adapter's own.

    >>> base_name("base_model.model.encoder.query.base_layer.weight")
    'encoder.query.weight'
    >>> base_name("base_model.model.encoder.query.lora_A.default.weight")
    """
    if LORA in name or ".modules_to_save." in f".{name}":  # the model may be a head itself
        return None
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
    return plain.removeprefix("original_module.")


def check_base_names(before: Collection[str], model: nn.Module) -> None:
    """Raises [`CompatibilityError`] unless [`base_name`] finds within adapters the names that a base had `before`."""
    found = {base_name(key) for key in model.state_dict()} - {None}
    if found != set(before):
        raise broken("peft_names", f"Within adapters the base's tensors are called {_some(found ^ set(before))}")


def activate(model: PeftModel, names: list[str]) -> None:
    """Makes some adapters answer, the first of them with its heads: PEFT's own way knows one only where heads are."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(names)
        elif isinstance(module, ModulesToSaveWrapper):
            module.set_adapter(names[0])
    set_active(model, names)
    model.active_adapter = names[0]
    for module in model.modules():
        if isinstance(module, LoraLayer) and list(module.active_adapters) != names:
            raise broken("active_adapters", f"A layer has {module.active_adapters} active, not {names}")


@seam("active_adapters")
def set_active(model: PeftModel, names: list[str]) -> None:
    """Notes in the tuner which adapters are active, without touching a layer."""
    model.base_model.active_adapter = list(names)
    if list(model.base_model.active_adapters) != list(names):
        raise broken("active_adapters", f"The tuner has {model.base_model.active_adapters} active, not {names}")


# ---- which modules are targets, and which are heads ----


@seam("all_linear")
def name_all_linear(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The config, with "all-linear" replaced by what PEFT means by it in this model."""
    config = tuners_utils._maybe_include_all_linear_layers(config, model)
    if isinstance(config.target_modules, str) or not config.target_modules:
        raise broken("all_linear", f"PEFT takes all linear layers to be {config.target_modules!r}")
    return config


def is_targeted(config: LoraConfig, path: str) -> bool:
    """Whether stock PEFT puts a LoRA of this config into the module of a path."""
    _check_targeting()
    return bool(tuners_utils.check_target_module_exists(config, path))


@cache
@seam("targeting")
def _check_targeting() -> None:
    """Raises [`CompatibilityError`] unless PEFT matches module paths as adapters on disk need it."""
    fields = {"target_modules": ["b"], "layers_to_transform": [1], "layers_pattern": "layers"}
    config = LoraConfig(**fields, exclude_modules=["no.b"], modules_to_save=["head"])
    paths = ("layers.1.b", "a.layers.1.x.b", "layers.11.b", "layers.1.ab", "layers.1.no.b", "layers.1.head.b", "x.b")
    found = [path for path in paths if tuners_utils.check_target_module_exists(config, path)]
    if found != list(paths[:2]):
        raise broken("targeting", f"PEFT takes {found} for the targets of a LoRA in layer 1, not {list(paths[:2])}")


def check_heads(expected: Iterable[str], model: PeftModel) -> None:
    """Raises [`CompatibilityError`] unless PEFT trains exactly these modules of the base whole."""
    parts = model.get_base_model().named_modules()
    found = {path for path, module in parts if isinstance(module, ModulesToSaveWrapper)}
    if found != {*expected}:
        raise broken(
            "task_heads",
            f"With this `task_type` PEFT trains {_some(found)} whole, where {_some(expected)} was expected. Naming "
            "them in `modules_to_save` helps, too",
        )


def _some(names: Iterable[Any]) -> str:
    shown = sorted(map(str, names))
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "") or "nothing"
