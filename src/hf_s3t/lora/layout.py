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
        ValueError: targets outside the numbered layers, layers in several lists, or more layer groups than layers.
    """
    resolved, everything_linear = _resolve_targets(model, config)
    heads = find_heads(model, config)
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
    container = _only_container(inside, config)
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
    layout = Layout(container, targets, groups, heads, ())
    return replace(layout, suffixes=_shortest_suffixes(model, layout))


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


def _only_container(inside: Mapping[str, Any], config: S3TConfig) -> str:
    if not inside:
        raise ValueError(
            f"`target_modules` ({config.target_modules!r}) match no module in numbered layers such as `layers.0`. "
            "S3T trains by layer groups; name linear modules inside the layers, or use 'all-linear'."
        )
    if len(inside) > 1:
        raise ValueError(
            f"`target_modules` match layers in several lists: {', '.join(sorted(inside))}. S3T needs one stack of "
            f"layers, and a plain PEFT config names modules of all stacks alike. {_of_one_stack(inside)}"
        )
    return next(iter(inside))


def _of_one_stack(inside: Mapping[str, Mapping[int, list[str]]]) -> str:
    """Which of the matched modules only one stack has."""
    suffixes = {stack: {name for names in layers.values() for name in names} for stack, layers in inside.items()}
    for stack, own in sorted(suffixes.items()):
        alone = own.difference(*(others for other, others in suffixes.items() if other != stack))
        if alone:
            return f"Name modules that {stack} alone has: `target_modules={sorted(alone)}`."
    return "None of them is in one stack alone: take a model of one stack."


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


def _shortest_suffixes(model: nn.Module, layout: Layout) -> tuple[str, ...]:
    """`target_modules` by which stock PEFT, given the layer numbers, finds exactly the layout's targets.

    Those that name nothing outside the layers come first: a store's reader finds the layout by them alone.
    """
    layers = list(layout.grouped_layers)
    full = {suffix for layer in layers for suffix in layout.targets[layer]}
    shortest = {suffix.rsplit(".", 1)[-1] for suffix in full}
    pattern = layers_pattern(layout.container)
    fitting = []
    for suffixes in (shortest, full):
        stock = LoraConfig(target_modules=sorted(suffixes), layers_to_transform=layers, layers_pattern=pattern)
        if _found(model, stock) == layout.module_names(layers):
            fitting.append(tuple(sorted(suffixes)))
    if not fitting:
        raise ValueError(
            "`target_modules` pick different modules in different layers, which plain PEFT configs cannot express. "
            "Name modules that are targeted in every layer where they occur."
        )
    inside = [suffixes for suffixes in fitting if not _outside(model, suffixes)]
    return (inside or fitting)[0]


def _found(model: nn.Module, config: LoraConfig) -> set[str]:
    return {path for path, _ in model.named_modules() if is_targeted(config, path)}


def _outside(model: nn.Module, suffixes: tuple[str, ...]) -> bool:
    """Whether the suffixes alone also name modules outside the numbered layers."""
    return any(split_layer_path(path) is None for path in _found(model, LoraConfig(target_modules=list(suffixes))))


def layers_pattern(container: str) -> str:
    """The last part of the path of the list of layers: what PEFT calls `layers_pattern`."""
    return container.rsplit(".", 1)[-1]
