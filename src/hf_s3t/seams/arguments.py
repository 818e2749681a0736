"""The seam to the names of training arguments: which of them change no bit, and which must be there to be refused."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from . import broken, seam

SILENT = frozenset({
    "auto_find_batch_size", "dataloader_persistent_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "debug", "deepspeed", "disable_tqdm", "do_eval",
    "do_predict", "do_train", "enable_jit_checkpoint", "fsdp", "fsdp_config", "hub_always_push",
    "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token",
    "include_for_metrics", "include_num_input_tokens_seen", "local_rank", "log_level", "log_level_replica",
    "log_on_each_node", "logging_dir", "logging_first_step", "logging_nan_inf_filter", "logging_steps",
    "logging_strategy", "output_dir", "place_model_on_device", "project", "push_to_hub", "report_to",
    "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "run_name", "skip_memory_metrics",
    "torch_empty_cache_steps", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "use_cpu",
})  # fmt: skip
"""Arguments that change no bit of a stage. One that is not listed counts as one that does."""

CHOOSING = frozenset({
    "batch_eval_metrics", "eval_accumulation_steps", "eval_delay", "eval_do_concat_batches", "eval_on_start",
    "eval_packing", "eval_steps", "eval_strategy", "eval_use_gather_object", "greater_is_better",
    "metric_for_best_model", "per_device_eval_batch_size", "prediction_loss_only", "save_on_each_node",
    "save_only_model", "save_steps", "save_strategy", "save_total_limit",
})  # fmt: skip
"""They count only with `load_best_model_at_end`: then the evaluation set chooses the weights."""

BY_METRICS = ("reduce_lr_on_plateau", "greedy")
"""Schedules of the learning rate that an evaluation drives."""

OF_TRL = {"packing": "SFTConfig", "padding_free": "SFTConfig", "precompute_ref_log_probs": "DPOConfig"}
"""Arguments that are refused of these classes of TRL's; all others that are refused are of `TrainingArguments`."""


LAUNCHED = {
    "ACCELERATE_USE_FSDP": "fsdp",
    "ACCELERATE_USE_DEEPSPEED": "deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
    "ACCELERATE_DYNAMO_BACKEND": "torch_compile",
}
"""Variables by which `accelerate launch` asks for what an argument may ask for, too, and the name of that argument."""


def launched() -> dict[str, str]:
    """What is on by such a variable: its name and value, by the name of the argument."""
    found = {argument: f"{name}={os.environ.get(name, '')}" for name, argument in LAUNCHED.items()}
    off = ("", "0", "false", "no", "off", "n", "f")
    return {argument: text for argument, text in found.items() if text.split("=", 1)[1].strip().lower() not in off}


def is_evaluation_heard(args: TrainingArguments) -> bool:
    """Whether what an evaluation finds changes how a stage goes on."""
    return bool(args.load_best_model_at_end) or getattr(args.lr_scheduler_type, "value", None) in BY_METRICS


@seam("refused_arguments")
def loader_setting(args: Any, name: str) -> Any:
    """The value of one of `accelerator_config`'s fields."""
    return getattr(setting(args, "accelerator_config"), name)


def setting(args: Any, name: str) -> Any:
    """The value of an argument that may have to be refused; `None` where this kind of arguments never had it."""
    known = {field.name for field in fields(args)}
    if name not in OF_TRL:
        if isinstance(args, TrainingArguments) and name not in known:
            raise broken("refused_arguments", f"`TrainingArguments` have no `{name}`")
    elif name not in known and any(
        cls.__name__ == OF_TRL[name] and cls.__module__.startswith("trl.") for cls in type(args).__mro__
    ):
        raise broken("refused_arguments_of_trl", f"TRL's `{OF_TRL[name]}` has no `{name}`")
    return getattr(args, name, None)
