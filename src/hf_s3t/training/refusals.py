"""What a staged run refuses, with the way out, and the defaults that it sets: both before its first stage."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from transformers import TrainingArguments

from ..plan.search import MAX_COST
from ..plan.sequences import check_count
from ..plan.survival import LATTICE_SLICES
from ..seams.arguments import launched, loader_setting, setting
from ..seams.models import is_compiled

Repair = Literal["all", "best"]
COMPILED = "compiled code is specialised to the batches of earlier stages, which changes last bits of later ones"
WHOLE = "stages need whole tensors on every process; use DDP"
REFUSED = {
    "auto_find_batch_size": "it restarts from weights that are already updated; set the batch size",
    "ignore_data_skip": "a resumed stage would see some rows twice and miss others; leave it out",
    "bf16_full_eval": "an evaluation would leave the base and the stages in bfloat16; load the base in bfloat16",
    "fp16_full_eval": "an evaluation would leave the base and the stages in float16; load the base in float16",
    "packing": "it joins examples of different slices; set `packing=False`",
    "precompute_ref_log_probs": "it computes rows of different slices in one batch, which changes last bits, and "
    "keeps the results in its own cache; leave it out: each step computes the reference",
    "fsdp": WHOLE,
    "deepspeed": WHOLE,
    "parallelism_config": WHOLE,
    "torch_compile": f"{COMPILED}; leave it out",
    "use_liger_kernel": "it patches the model at every stage; patch it once before you pass it",
}
"""Settings of the TrainingArguments, and why none of them may be on."""


def refuse_arguments(model: Any, args: Any, kwargs: dict[str, Any], missing: str) -> None:
    """Raises `ValueError` for what cannot work stage by stage, with the way out."""
    if args is None:
        raise ValueError("S3T needs `args`: `TrainingArguments(output_dir=...)` names the store.")
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be a loaded model, got {type(model).__name__}. Use `from_pretrained`.")
    if kwargs.get("model_init") is not None:
        raise ValueError("`model_init` would make a new base model: all stages share one. Pass `model`.")
    if any(kwargs.get("optimizers") or ()):
        raise ValueError("A ready optimizer holds the parameters of one stage. Use `optimizer_cls_and_kwargs`.")
    if missing not in ("error", "delete", "ignore"):
        raise ValueError(f"`missing` must be 'error', 'delete' or 'ignore', got {missing!r}.")
    if is_compiled(model):
        raise ValueError(
            f"The model, or a module of it, was compiled: {COMPILED}. Pass it as it was loaded. The served ensemble "
            "may be compiled."
        )
    for name, reason in REFUSED.items():
        if setting(args, name):
            raise ValueError(f"S3T does not work with `{name}={getattr(args, name)!r}`: {reason}.")
    for name, variable in launched().items():
        raise ValueError(
            f"S3T does not work with `{variable}`, which `accelerate launch` or earlier TrainingArguments have set in "
            f"the environment: {REFUSED.get(name, WHOLE)}. Choose another configuration, and unset it."
        )
    for name, wanted in {"dispatch_batches": (None, False), "use_seedable_sampler": (None, True)}.items():
        if loader_setting(args, name) not in wanted:
            raise ValueError(
                f"S3T does not work with `accelerator_config={{{name!r}: {loader_setting(args, name)!r}}}`: a killed "
                "stage would go on with other batches. Leave it out."
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"One process would spread every batch over {args.n_gpu} GPUs (`DataParallel`), which changes what a "
            "batch is. Start one process per GPU with `accelerate launch`, or let this one see a single GPU "
            "(`CUDA_VISIBLE_DEVICES=0`)."
        )
    if args.push_to_hub and "checkpoint" in str(args.hub_strategy.value):
        raise ValueError(
            f"`hub_strategy={args.hub_strategy.value!r}` would push running checkpoints, whose optimizer states are "
            "computed from the examples. Use `hub_strategy='every_save'`: the store is pushed when `train()` ends."
        )


def check_repair(repair: Repair, cost_budget: int | None, extend: bool, num_slices: int) -> None:
    """Raises `ValueError` unless a cost budget is given for the best repair, and for nothing else."""
    if repair not in ("all", "best"):
        raise ValueError(f"`repair` must be 'all' or 'best', got {repair!r}.")
    if (repair == "best") != (cost_budget is not None):
        raise ValueError(
            f"`repair={repair!r}` with `cost_budget={cost_budget}`: `repair='best'` needs the number of slice passes "
            "to spend, `repair='all'` trains whatever is missing. Pass `repair='best'` and `cost_budget`, or neither."
        )
    if cost_budget is not None and extend:
        raise ValueError(
            "`extend=True` trains live stages again at any cost, which a cost budget forbids. Run `train()` "
            "without `repair` for the new rows, or make a trainer without `extend` for the repair."
        )
    if cost_budget is not None:
        check_count("cost_budget, in slice passes per epoch over all shards,", cost_budget, 1, MAX_COST)
        if num_slices > LATTICE_SLICES:
            found = f"`repair='best'` is searched for up to {LATTICE_SLICES} slices, and there are {num_slices}"
            raise ValueError(f"{found}. Run `train()` without `repair`.")


def set_stage_defaults(args: TrainingArguments) -> None:
    """Defaults that fit a frozen base and many short stages.

    No search for unused parameters, no checkpointing through input gradients, workers that live as long as a stage.
    """
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
    if args.dataloader_num_workers:
        args.dataloader_persistent_workers = True
    if args.activation_checkpointing:
        args.activation_checkpointing_kwargs = {"use_reentrant": False, **(args.activation_checkpointing_kwargs or {})}
