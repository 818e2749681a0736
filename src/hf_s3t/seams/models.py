"""The seams to the models and tokenizers of transformers: marks of loaded weights, how weights are drawn, settings."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from . import broken, lost, seam

LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Names under which configs of models have the chance that a layer is left out in training."""


def loaded_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that came from a checkpoint; none where the model was built from a config."""
    marked = {name for name, value in model.named_parameters() if _is_marked(value)}
    if not marked and getattr(getattr(model, "config", None), "name_or_path", None) and not _marks_are_set():
        raise broken("loading_marks", "transformers does not mark the parameters that it loads")
    return marked


def _is_marked(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))


def missing_weights(model: Any) -> set[str]:
    """Names of the weights that the checkpoint of a loaded model lacks, as `from_pretrained` reports them.

    The checkpoint is loaded once more for it, without its numbers. Where that is impossible, none are and the log says
    so: what the model has is taken as it is.
    """
    config, level = model.config, logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        where = _where_it_lies(config)
        own = type(config).from_pretrained(config.name_or_path, **where)
        own.num_labels = config.num_labels
        with torch.random.fork_rng(devices=[]):
            _, report = type(model).from_pretrained(
                config.name_or_path, config=own, output_loading_info=True, device_map="meta",
                ignore_mismatched_sizes=True, **where,
            )  # fmt: skip
        return {*report["missing_keys"], *(found[0] for found in report["mismatched_keys"])}
    except Exception as error:  # whatever a checkpoint that is no longer there, or of another kind, raises
        lost("loading_report", f"{config.name_or_path!r} cannot be asked ({type(error).__name__}: {error})")
        return set()
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _where_it_lies(config: Any) -> dict[str, Any]:
    """The revision of a model's checkpoint, and that nothing is downloaded."""
    return {"revision": getattr(config, "_commit_hash", None) or "main", "local_files_only": True}


def base_tokenizer(model: Any) -> Any:
    """The tokenizer that lies beside a base's checkpoint on this machine; `None` where there is none."""
    name, level = model.config.name_or_path, logging.get_verbosity()
    if not name:
        return None
    logging.set_verbosity_error()
    try:
        found = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **_where_it_lies(model.config))
    except Exception:  # whatever a folder without one, or with one that needs code of its own, raises
        return None
    finally:
        logging.set_verbosity(level)
    return None if set(found.get_vocab()) <= set(found.all_special_tokens) else found  # made up, from the config


def base_image_settings(model: Any, processor: Any) -> dict[str, Any]:
    """What the image processor beside a base's checkpoint does, as plain data; nothing where there is none."""
    name = model.config.name_or_path
    if not name:
        return {}
    try:
        return processor.get_image_processor_dict(name, **_where_it_lies(model.config))[0]
    except (OSError, ValueError):
        return {}


class _OneNumber(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config: Any):
        super().__init__(config)
        self.number = nn.Linear(1, 1)
        self.post_init()


@cache
def _marks_are_set() -> bool:
    """Whether transformers marks what it loads: a tiny model is saved and loaded, to see."""
    with tempfile.TemporaryDirectory() as folder:
        _OneNumber(PreTrainedConfig()).save_pretrained(folder)
        return all(_is_marked(value) for value in _OneNumber.from_pretrained(folder).parameters())


def draw_weights(model: Any, path: str) -> None:
    """Draws what a checkpoint lacks of a module anew, as the model's class does, from torch's generator."""
    module = model.get_submodule(path)
    drawn = {name: value for name, value in module.named_parameters(recurse=False) if value.is_floating_point()}
    drawn = {name: value for name, value in drawn.items() if not _is_marked(value)}
    with torch.no_grad(), seam("drawn_weights"):
        for value in drawn.values():
            value.fill_(torch.nan)
        model._init_weights(module)
    left = [name for name, value in drawn.items() if bool(value.isnan().any())]
    if left:
        raise broken("drawn_weights", f"{type(model).__name__} does not draw {', '.join(left)} of `{path}`")


@seam("two_trunks")
def is_encoder_decoder(model: Any) -> bool:
    """Whether a model has two stacks of layers."""
    return bool(model.config.is_encoder_decoder)


@seam("compiled")
def is_compiled(model: nn.Module) -> bool:
    """Whether a model, or a module of it, was handed to `torch.compile`."""
    return any(module._compiled_call_impl is not None or original(module) is not module for module in model.modules())


def original(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, of what it returned; of any other module the module itself."""
    return getattr(model, "_orig_mod", model)


@seam("attention")
def computing_settings(config: Any) -> dict[str, Any]:
    """What of a model's config may change the last bit of what it computes, as plain data."""
    loaded = ("_name_or_path", "transformers_version")
    about = {name: value for name, value in config.to_dict().items() if name not in loaded}
    return about | {"attention": config._attn_implementation}


@seam("tokenizer_rules")
def tokenizer_rules(tokenizer: Any) -> dict[str, Any]:
    """All that a tokenizer does to a text, as plain data."""
    return json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
