"""What an ensemble is loaded from: the store, the base model with a slot for every shard, the served prefixes."""

from __future__ import annotations

import os
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..errors import StoreError
from ..lora.adapter import scaling_of, with_rank
from ..lora.config import LORA_FIELDS, S3TConfig
from ..lora.layout import find_layout
from ..lora.tuner import plain_lora_config
from ..store.base_model import check_base, load_base
from ..store.folder import StoreFolder
from ..store.manifest import Manifest
from ..store.sources import is_repo_id
from ..store.store import S3TStore
from .stack import Around, Place, Stack


def member_name(shard: int) -> str:
    """The name of the adapter that answers for a shard."""
    return f"shard-{shard:02d}"


def opened(folder: str | os.PathLike[str] | S3TStore, **how: Any) -> S3TStore:
    """The store that somebody named, or opened already; `how` says how a repository is opened."""
    given = {name: value for name, value in how.items() if value is not None}
    if isinstance(folder, S3TStore):
        if given:
            raise ValueError(f"{sorted(given)} say how to open a store, but one was given. Open it with them.")
        return folder
    if not is_repo_id(folder) and given.keys() & {"revision", "token"}:
        raise ValueError(
            f"`revision` and `token` are for a store in a repository, and {folder} is a folder. For another base, or "
            "with another token, load the base and pass `base_model=`."
        )
    return S3TStore(folder, **how)


def base_of(store: S3TStore, given: nn.Module | str | None, kwargs: dict[str, Any]) -> nn.Module:
    """The base model of a store: the given one, which has to be the store's, or one that is loaded."""
    if not isinstance(given, nn.Module):
        return load_base(store, given, **kwargs)[0]
    if kwargs:
        raise ValueError(f"{sorted(kwargs)} are for loading a base model, but one was given. Leave them out.")
    if any(isinstance(module, LoraLayer | ModulesToSaveWrapper | Around) for module in given.modules()):
        raise StoreError("This base model already carries adapters, maybe of another ensemble. Load it again.")
    check_base(given, store.manifest().recipe)
    return given


def stacked(base: nn.Module, manifest: Manifest, slots: int) -> Stack:
    """The base with stacked LoRA in all grouped layers, zero at first. Rank groups have the ranks of all slices."""
    stored = manifest.recipe["config"]
    kept = (*LORA_FIELDS, "task_type", "stage_parameters", "layers_pattern")
    fields: dict[str, Any] = {name: stored[name] for name in kept if name in stored}
    config = S3TConfig(num_shards=manifest.plan.num_shards, num_slices=manifest.plan.num_slices, **fields)
    layers = tuple(sorted(layer for group in stored["groups"] for layer in group))
    try:
        layout = find_layout(base, config)
        if not set(layers) <= set(layout.targets):
            raise ValueError(
                f"the store has stages for layers up to {layers[-1]}, the model has {len(layout.targets)}"
            )
    except ValueError as error:
        raise StoreError(f"This is not the base model that the store was trained on: {error}") from None
    plain = plain_lora_config(config, layout, layers)
    if config.stage_parameters == "rank_group":
        plain = with_rank(plain, config.r * manifest.plan.num_slices)
    scaling = scaling_of(plain)
    places = {path: Place(base.get_submodule(path), plain["r"], scaling) for path in layout.module_names(layers)}
    places |= {path: Place(base.get_submodule(path), None) for path in layout.heads}
    stack = Stack(base, dict(sorted(places.items())), slots)
    base.requires_grad_(False)
    return stack


def read_members(store: StoreFolder) -> dict[str, Any]:
    """The served prefix of every live shard, assembled, by the name that its adapter gets (`"shard-00"`)."""
    manifest = store.live()
    served = sorted(manifest.plan.served(manifest.stages).items())
    return {member_name(shard): store.assemble(shard, prefix, manifest) for shard, prefix in served}
