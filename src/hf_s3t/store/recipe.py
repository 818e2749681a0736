"""The recipe: every setting that changes bits, as plain data that may be published.

It holds no local path and no token. Settings that only log, save or evaluate are left out; an argument that this file
has never heard of counts as one that changes bits.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Container, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from ..data_derived import DATA_DERIVED
from ..lora.config import LORA_FIELDS, S3TConfig
from ..lora.heads import tensor_digest
from ..lora.layout import Layout
from ..seams.arguments import CHOOSING, SILENT, is_evaluation_heard
from ..seams.models import computing_settings, tokenizer_rules
from .base_identity import base_digest, base_tensors, tensors_digest
from .ids import encoded
from .partition import canonical, raw_rows, row_digest
from .recipe_differences import UNSET


def make_recipe(
    config: S3TConfig,
    layout: Layout,
    id_column: str | None,
    args: TrainingArguments,
    model: nn.Module,
    processing_class: Any,
    collator: Any,
    base_id: str | None,
    heads: Mapping[str, str],
    user_code: Any = (),
    cached_trunk: bool | dict[str, int] = False,
    steering: Mapping[str, Any] | None = None,
    metrics: Any = None,
) -> dict[str, Any]:
    """The recipe of a run.

    Args:
        heads (`dict[str, str]`): digests of the heads that the base lacked and that were drawn.
        user_code (`tuple`): what else of the user's changes bits: the optimizer with its settings, the loss function.
        cached_trunk (`bool` or `dict[str, int]`): how an activation cache has what enters a stage computed: in
            batches of so many `positions`, or, with `True`, row by row. `False`: there is no cache.
        steering (`dict`, *optional*): what an evaluation steers by; see [`steering_by`].
        metrics (`tuple`, *optional*): functions that compute metrics, which count where one of these steers.
    """
    recipe = {
        "config": _config_section(config, layout),
        "partition": _partition_section(config, id_column),
        "arguments": bit_changing_arguments(args),
        "mixed_precision": str(args.mixed_precision),
        "processes": args.world_size,
        "base": {
            "id": base_id,
            "revision": config.revision,
            "drawn_heads": dict(heads),
            **_base_section(model, layout, has_tokenizer=processing_class is not None),
        },
        "processing": processing_digest(processing_class),
        "collator": type(collator).__name__ if not hasattr(collator, "__name__") else collator.__name__,
        "collator_settings": described(collator),
        "user_code": described(user_code),
        "user_values": {"code": _digest(carried(user_code)), "collator": _digest(carried(collator))},
        "steering": steering,
        "metrics": None if steering is None else _deciding(args, metrics),
        UNSET: unset_arguments(args),
    }
    if cached_trunk:
        recipe["cached_trunk"] = cached_trunk
    if config.data_derived:
        recipe[DATA_DERIVED] = dict(config.data_derived)
    plain: dict[str, Any] = json.loads(json.dumps(recipe, default=str, sort_keys=True))
    _check_texts(plain, "recipe")
    return plain


def _check_texts(value: Any, name: str) -> None:
    """Raises `ValueError` for a text that no manifest can hold, before anything is written."""
    if isinstance(value, str):
        encoded(value, f"Setting {name}")
    elif isinstance(value, dict):
        for key, below in value.items():
            encoded(key, f"A name in setting {name}")
            _check_texts(below, f"{name}.{key}")
    elif isinstance(value, list):
        for below in value:
            _check_texts(below, name)


def _config_section(config: S3TConfig, layout: Layout) -> dict[str, Any]:
    section = {
        **{name: getattr(config, name) for name in LORA_FIELDS if name != "exclude_modules"},
        "target_modules": list(layout.suffixes),
        "modules_to_save": list(layout.heads),
        "groups": [list(group) for group in layout.groups],
        "stage_parameters": config.stage_parameters,
        "task_type": config.task_type,
    }
    if config.replay != 1:  # recipes from before there was a choice do not name it
        section["replay"] = config.replay
    return section


def _partition_section(config: S3TConfig, id_column: str | None) -> dict[str, Any]:
    return {
        "num_shards": config.num_shards,
        "num_slices": config.num_slices,
        "id_column": id_column,
        "group_column": config.group_column,
        "slice_columns": list(config.slice_columns) if config.slice_columns else None,
    }


def _base_section(model: nn.Module, layout: Layout, has_tokenizer: bool) -> dict[str, Any]:
    base = bare(model)
    return {
        "class": type(base).__name__,
        "num_labels": base.config.num_labels if layout.heads else None,
        "dtype": str(base.dtype),
        "quantization": quantization(model),
        "config": base_config(model, has_tokenizer),
        "sha256": base_digest(model, layout.heads),
        "heads": {head: tensors_digest(base_tensors(base.get_submodule(head))) for head in layout.heads},
    }


def base_config(model: nn.Module, has_tokenizer: bool = False) -> dict[str, Any]:
    """What a base's config says of how it computes (dropout, attention kernel, positions and so on), as plain data."""
    config = getattr(bare(model), "config", None)
    if not isinstance(config, PreTrainedConfig):
        return {}
    settings = _without(computing_settings(config), NOT_COMPUTED | (SPECIAL_TOKENS if has_tokenizer else frozenset()))
    if settings.get("problem_type", "") is None:  # the first loss finds it out, and writes it into the config
        del settings["problem_type"]
    return json.loads(json.dumps(settings, default=str))


NOT_COMPUTED = frozenset({
    "_commit_hash", "_name_or_path", "architectures", "dtype", "id2label", "label2id", "name_or_path",
    "output_attentions", "output_hidden_states", "quantization_config", "return_dict", "task_specific_params",
    "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Fields of a config, and of the configs in it, that change no bit of a stage or are in the recipe by themselves."""
SPECIAL_TOKENS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
"""Fields that the Trainer brings into line with the tokenizer, if there is one, when it begins."""


def _without(settings: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    return {
        name: _without(value, names) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if name not in names and not _is_path(value)
    }


def steering_by(args: TrainingArguments, callbacks: Iterable[Any], eval_dataset: Any) -> dict[str, Any] | None:
    """What an evaluation steers a stage by, if it does: `None` where it only looks.

    It does where it chooses the weights, drives the learning rate, or where a callback with a state listens to it, as
    one that stops early. Then the evaluation set is part of the recipe, and so is how often it is asked.
    """
    told = [(type(callback).__name__, callback.state().get("args", {})) for callback in callbacks]
    if not told and not is_evaluation_heard(args):
        return None
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    return {
        "callbacks": described(sorted(told, key=canonical)),
        "arguments": {name: value for name, value in sorted(args.to_dict().items()) if name in CHOOSING},
        "evaluation": {name: _digest_of_rows(rows) for name, rows in sets.items() if rows is not None},
    }


def _deciding(args: TrainingArguments, metrics: Any) -> dict[str, Any] | None:
    """The functions behind the metric by which an evaluation steers; `None` where the loss does."""
    if args.metric_for_best_model in (None, "loss", "eval_loss"):
        return None
    return {"code": described(metrics), "values": _digest(carried(metrics))}


def _digest_of_rows(rows: Any) -> str:
    digest = hashlib.sha256()
    for row in raw_rows(rows) if hasattr(rows, "__len__") else rows:
        digest.update(row_digest(row).encode())
    return digest.hexdigest()


def described(thing: Any) -> Any:
    """Plain data by which two optimizers, collators or functions are told apart: names and plain settings."""
    if thing is None or isinstance(thing, str | int | float):
        return None if _is_path(thing) else thing
    if isinstance(thing, Mapping):
        return {str(name): described(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [described(value) for value in thing]
    name = getattr(thing, "__qualname__", None)
    if name is not None:
        return name
    fields = getattr(thing, "__dict__", {}).items()
    plain = {name: value for name, value in fields if isinstance(value, str | int | float)}
    return {"class": type(thing).__name__, **described(plain)}


def _digest(values: Any) -> str:
    """sha256 over plain data that is not published itself."""
    return hashlib.sha256(canonical(values)).hexdigest()


def carried(thing: Any) -> Any:
    """What functions carry along, where it can be seen, as plain data: of tensors and arrays digests.

    That is what a partial was given, the defaults of a function, and the numbers, texts and tensors that it closes
    over: class weights, for one, that were computed from the rows of a train set.
    """
    if isinstance(thing, list | tuple):
        return [carried(value) for value in thing]
    if isinstance(thing, partial):
        given = {"arguments": _values(enumerate(thing.args)), "keywords": _values(thing.keywords.items())}
        return {**given, "name": described(thing.func), "function": carried(thing.func)}
    function = getattr(thing, "__func__", thing)
    if not inspect.isfunction(function):
        return None
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closed = [(name, cell.cell_contents) for name, cell in cells if _is_filled(cell)]
    defaults = [*enumerate(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    return _values([*closed, *defaults]) or None


def _values(named: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """Plain values and digests of tensors and arrays; what else there is, nobody can see into."""
    found: dict[str, Any] = {}
    for name, value in named:
        if isinstance(value, torch.Tensor):
            found[str(name)] = f"{value.dtype} {tuple(value.shape)} {tensor_digest(value)}"
        elif type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            found[str(name)] = f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
        elif isinstance(value, bool | int | float | str) and not _is_path(value):
            found[str(name)] = value
        elif isinstance(value, tuple):
            found[str(name)] = _values(enumerate(value))
        elif isinstance(value, partial) or inspect.isfunction(value):
            found[str(name)] = carried(value)
    return found


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def bit_changing_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The TrainingArguments (of any subclass) that change the bits of a stage."""
    silent = SILENT if args.load_best_model_at_end else SILENT | CHOOSING
    kept = {name: value for name, value in args.to_dict().items() if name not in silent}
    return {name: value for name, value in sorted(kept.items()) if not _is_path(value)}


def unset_arguments(args: TrainingArguments) -> list[str]:
    """Paths of the arguments that change bits and have their defaults, as far as that can be told.

    A default that is worked out from the machine or from other arguments looks like a value that somebody set.
    """
    values, defaults = json.loads(json.dumps([bit_changing_arguments(args), _defaults(args)], default=str))
    return sorted(_alike(values, defaults, "arguments"))


def _defaults(settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name, None)
        if is_dataclass(value):
            found[field.name] = _defaults(value)
        elif field.default is not MISSING:
            found[field.name] = field.default
        elif field.default_factory is not MISSING:
            found[field.name] = field.default_factory()
    return found


def _alike(values: Mapping[str, Any], defaults: Mapping[str, Any], path: str) -> Iterable[str]:
    for name in values.keys() & defaults.keys():
        value, default = values[name], defaults[name]
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            yield from _alike(value, default, f"{path}.{name}")
            default = {known: default[known] for known in value if known in default}  # what it hands out of itself
        if value == default:
            yield f"{path}.{name}"


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and os.path.isabs(value)


def quantization(model: nn.Module) -> dict[str, Any] | None:
    """The settings by which a model is quantised, as plain data."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return None if config is None else json.loads(json.dumps(config.to_dict(), default=str))


def bare(model: Any) -> Any:
    """The base model of a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def processing_digest(processing_class: Any) -> str | None:
    """sha256 over what a tokenizer (its chat template included) or an image processor does to an example."""
    if processing_class is None:
        return None
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        return _digest(processing_class.to_dict())
    rules = tokenizer_rules(processing_class)
    for changing in ("truncation", "padding"):  # what the last call left in the backend
        rules.pop(changing, None)
    about = (rules, processing_class.chat_template, processing_class.special_tokens_map, processing_class.padding_side)
    return _digest(about)
