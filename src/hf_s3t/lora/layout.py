"""Where a model's numbered layers are and how they form layer groups: read from module paths, as whole numbers.

Works on the bare base model. What a stage owns of a layout is for `tuner.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import nn

from ..seams.tuners import is_targeted, name_all_linear
from .adapter import split_layer_path
from .heads import find_heads

if TYPE_CHECKING:  # it registers the tuner, which needs this module
    from .config import S3TConfig

logger = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)
"""Modules whose weights have three dimensions."""


@dataclass(frozen=True)
class Layout:
    """Where a model's numbered layers are, which of their modules are targets, and how they form layer groups.

    `groups[i - 1]` is stage `i`'s. Where stages own no layer groups there is one group, of all targeted layers.
    """

    container: str  # path of the list of layers, for example "model.layers"
    targets: dict[int, tuple[str, ...]]  # per layer, the paths of its targets below the layer
    groups: tuple[tuple[int, ...], ...]  # the top one first
    heads: tuple[str, ...]  # paths of the modules that are trained whole and saved with every stage
    suffixes: tuple[str, ...]  # the shortest `target_modules` that name the same modules to stock PEFT
    stack: str | None = None  # the end of the list's path by which PEFT tells it from others with such modules

    @property
    def pattern(self) -> str:
        """What PEFT calls `layers_pattern`."""
        return self.stack or self.container.rsplit(".", 1)[-1]

    @property
    def grouped_layers(self) -> tuple[int, ...]:
        """All layers that belong to a layer group, ascending."""
        return tuple(sorted(layer for group in self.groups for layer in group))

    def module_names(self, layers: tuple[int, ...] | list[int]) -> set[str]:
        """Full paths of the target modules in `layers`."""
        return {f"{self.container}.{layer}.{suffix}" for layer in layers for suffix in self.targets[layer]}


def find_layout(model: nn.Module, config: S3TConfig) -> Layout:
    """Finds the layers that `config` targets in a bare base model and lays them into layer groups from the top.

    Raises:
        ValueError: targets outside the numbered layers, layers in several stacks and no `layers_pattern` that chooses
            one, or more layer groups than layers.
    """
    resolved, everything_linear = _resolve_targets(model, config)
    heads = find_heads(model, config)
    _check_fused(model, resolved, everything_linear)
    inside: dict[str, dict[int, list[str]]] = {}
    outside: list[str] = []
    for path, _ in model.named_modules():
        if not path or not is_targeted(resolved, path):
            continue
        place = split_layer_path(path)
        if place is None or not place[2]:
            outside.append(path)
        else:
            inside.setdefault(place[0], {}).setdefault(place[1], []).append(place[2])
    container = _chosen_stack(inside, config)
    if outside and not everything_linear:
        raise ValueError(
            f"`target_modules` also match modules outside the numbered layers: {', '.join(outside)}. They belong to "
            "no stage. Leave them out with `exclude_modules`, or train them whole as part of every stage's head with "
            "`modules_to_save`."
        )
    if outside:
        logger.info("all-linear: left out %s, which lie outside the numbered layers", ", ".join(outside))
    targets = {layer: tuple(sorted(suffixes)) for layer, suffixes in sorted(inside[container].items())}
    groups = _layer_groups(len(list(model.get_submodule(container).children())), targets, config)
    suffixes, stack = _shortest_suffixes(model, Layout(container, targets, groups, heads, ()))
    return Layout(container, targets, groups, heads, suffixes, stack)


def _resolve_targets(model: nn.Module, config: S3TConfig) -> tuple[LoraConfig, bool]:
    """A LoRA config with the same targets, PEFT's defaults and "all-linear" filled in."""
    targets = config.target_modules
    if targets is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        targets = DEFAULT_TARGETS.get(model_type)
        if targets is None:
            raise ValueError(f"PEFT knows no default `target_modules` for model type {model_type!r}; name them.")
    everything_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    resolved = LoraConfig(
        target_modules=targets,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
    )
    return (name_all_linear(resolved, model) if everything_linear else resolved), everything_linear


def _check_fused(model: nn.Module, resolved: LoraConfig, everything_linear: bool) -> None:
    """Raises `ValueError` where targets are fused experts, which are no linear modules; "all-linear" leaves them out.

    Experts of a layer that are fused into one parameter have three dimensions.
    """
    fused = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if split_layer_path(path) and not isinstance(module, CONVOLUTIONS)
        for name, value in module.named_parameters(recurse=False)
        if value.ndim == 3
    ]
    hit = [path for path in fused if is_targeted(resolved, path) or is_targeted(resolved, path.rsplit(".", 1)[0])]
    if hit and not everything_linear:
        raise ValueError(
            f"`target_modules` name experts that are fused into one parameter: {', '.join(hit[:2])}. S3T trains LoRA "
            "in linear modules alone. Name those of the attention, or use 'all-linear'; the experts stay as they are."
        )
    if fused and everything_linear:
        names = sorted({path.split(".", path.count(".") - 1)[-1] for path in fused})
        logger.warning("all-linear: left out experts that are fused into one parameter (%s)", ", ".join(names))


def _chosen_stack(inside: Mapping[str, Mapping[int, list[str]]], config: S3TConfig) -> str:
    """The path of the list of layers that are trained: the only one with targets, or the one that the config names."""
    if not inside:
        raise ValueError(
            f"`target_modules` ({config.target_modules!r}) match no module in numbered layers such as `layers.0`. "
            "S3T trains by layer groups; name linear modules inside the layers, or use 'all-linear'."
        )
    wanted = config.layers_pattern
    chosen = [stack for stack in inside if wanted is None or f".{stack}".endswith(f".{wanted}")]
    if not chosen:
        raise ValueError(
            f"`layers_pattern` ({wanted!r}) is the end of the path of no stack of layers that `target_modules` match; "
            f"those are {', '.join(sorted(inside))}."
        )
    if len(chosen) > 1:
        raise ValueError(
            f"`target_modules` match layers in several stacks: {', '.join(sorted(chosen))}. A stage has layers of "
            "one, as a plain PEFT config numbers those of all stacks alike. Choose it by the end of its path, for "
            f"example `layers_pattern={sorted(chosen)[0]!r}`{_of_one_stack(inside)}. The others stay as they are."
        )
    return chosen[0]


def _of_one_stack(inside: Mapping[str, Mapping[int, list[str]]]) -> str:
    """Which of the matched modules only one stack has, if any, as a way out."""
    suffixes = {stack: {name for names in layers.values() for name in names} for stack, layers in inside.items()}
    for stack, own in sorted(suffixes.items()):
        alone = own.difference(*(others for other, others in suffixes.items() if other != stack))
        if alone:
            return f", or name modules that {stack} alone has, `target_modules={sorted(alone)}`"
    return ""


def _layer_groups(num_layers: int, targets: Mapping[int, Any], config: S3TConfig) -> tuple[tuple[int, ...], ...]:
    if config.stage_parameters != "layer_group":
        return (tuple(sorted(targets)),)
    size = config.layers_per_slice or num_layers // config.num_slices
    if size < 1 or size * config.num_slices > num_layers:
        raise ValueError(
            f"{config.num_slices} slices of {max(size, 1)} layers need {max(size, 1) * config.num_slices} layers, but "
            f"the model has {num_layers}. Use fewer slices (at most {num_layers}) or fewer layers for each "
            "(`layers_per_slice`); with stage_parameters='rank_group' there may be more slices than layers."
        )
    tops = [num_layers - size * index for index in range(config.num_slices)]
    groups = tuple(tuple(range(top - size, top)) for top in tops)
    empty = [group for group in groups if not any(layer in targets for layer in group)]
    if empty:
        raise ValueError(f"`target_modules` match nothing in layers {empty}: a stage would own nothing.")
    return tuple(tuple(layer for layer in group if layer in targets) for group in groups)


def _shortest_suffixes(model: nn.Module, layout: Layout) -> tuple[tuple[str, ...], str | None]:
    """`target_modules` by which stock PEFT, given the layer numbers, finds exactly the layout's targets; its `stack`.

    Those that name nothing outside the layers come first: a store's reader finds the layout by them alone.
    """
    layers = list(layout.grouped_layers)
    full = {suffix for layer in layers for suffix in layout.targets[layer]}
    shortest = {suffix.rsplit(".", 1)[-1] for suffix in full}
    fitting = []
    for suffixes in (shortest, full):
        named = replace(layout, stack=_stack_pattern(model, layout.container, suffixes))
        fields = {"layers_to_transform": layers, "layers_pattern": named.pattern}
        if _found(model, LoraConfig(target_modules=sorted(suffixes), **fields)) == layout.module_names(layers):
            fitting.append((tuple(sorted(suffixes)), named.stack))
    if not fitting:
        raise ValueError(
            "`target_modules` pick different modules in different layers, which plain PEFT configs cannot express. "
            "Name modules that are targeted in every layer where they occur."
        )
    inside = [(suffixes, stack) for suffixes, stack in fitting if not _outside(model, suffixes)]
    return (inside or fitting)[0]


def _stack_pattern(model: nn.Module, container: str, suffixes: set[str]) -> str | None:
    """The shortest end of the path of a list of layers that no other list with such modules has; `None`: none has."""
    found = [split_layer_path(path) for path in _found(model, LoraConfig(target_modules=sorted(suffixes)))]
    others = {place[0] for place in found if place is not None} - {container}
    parts = container.split(".")
    ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
    alone = [end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)]
    return (alone or ends[-1:])[0] if others else None


def _found(model: nn.Module, config: LoraConfig) -> set[str]:
    return {path for path, _ in model.named_modules() if is_targeted(config, path)}


def _outside(model: nn.Module, suffixes: tuple[str, ...]) -> bool:
    """Whether the suffixes alone also name modules outside the numbered layers."""
    return any(split_layer_path(path) is None for path in _found(model, LoraConfig(target_modules=list(suffixes))))
