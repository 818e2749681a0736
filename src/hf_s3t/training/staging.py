"""What a staged run settles before its first stage: arguments it refuses, the wrapped model, the plan, the seeds."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Callable
from typing import Any, Literal

from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainingArguments

from ..lora.config import S3TConfig
from ..lora.layout import find_heads
from ..lora.tuner import draw_heads
from ..plan.bms import bms
from ..plan.optimal import optimal
from ..plan.search import MAX_COST
from ..plan.sequences import check_count, select_sequences
from ..plan.survival import LATTICE_SLICES
from ..plan.tree import Plan, Stage
from ..seams.arguments import loader_setting, setting
from ..seams.models import is_compiled
from ..seams.tuners import check_base_names, check_heads

logger = logging.getLogger(__name__)

Repair = Literal["all", "best"]


def on_main_process(args: TrainingArguments, function: Callable[[], Any]) -> Any:
    """Runs a function on the main process and gives every process its result, or its error."""
    if args.world_size == 1:
        return function()
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # raised below, on every process: the others must not wait for a result
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


COMPILED = "what is compiled is specialised to the batches of earlier stages, which moves last bits of later ones"


def refuse_arguments(model: Any, args: Any, kwargs: dict[str, Any], missing: str) -> None:
    """Raises `ValueError` for what can not work stage by stage, with the way out."""
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
            f"The model, or a module of it, was compiled: {COMPILED}. Pass it as it was loaded; the ensemble that is "
            "served may be compiled."
        )
    refusals = {
        "auto_find_batch_size": "it starts again on weights that were updated already; set the batch size",
        "ignore_data_skip": "a killed stage would begin with rows that it has seen, and miss others; leave it out",
        "bf16_full_eval": "an evaluation would leave the base and the stages in bfloat16; load the base in bfloat16",
        "fp16_full_eval": "an evaluation would leave the base and the stages in float16; load the base in float16",
        "packing": "it joins examples of different slices; set `packing=False`",
        "fsdp": "stages need whole tensors on every process; use DDP",
        "deepspeed": "stages need whole tensors on every process; use DDP",
        "torch_compile": f"{COMPILED}; leave it out",
        "use_liger_kernel": "it patches the model at every stage; patch it once before you pass it",
    }
    for name, reason in refusals.items():
        if setting(args, name):
            raise ValueError(f"S3T does not work with `{name}={getattr(args, name)!r}`: {reason}.")
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
            "`extend=True` trains live stages again, whatever they cost, which a cost budget forbids. Run `train()` "
            "without `repair` for the new rows, or make a trainer without `extend` for the repair."
        )
    if cost_budget is not None:
        check_count("cost_budget, in slice passes per epoch over all shards,", cost_budget, 1, MAX_COST)
        if num_slices > LATTICE_SLICES:
            found = f"`repair='best'` is searched for up to {LATTICE_SLICES} slices, and there are {num_slices}"
            raise ValueError(f"{found}. Run `train()` without `repair`.")


def check_processes(args: TrainingArguments) -> None:
    """Raises `ValueError` where a launcher started several processes that do not know of each other.

    They would all write the same store. It happens on machines without a GPU unless `use_cpu=True` is passed.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"The launcher started {launched} processes, but each of them would train alone (world size "
            f"{args.world_size}). On machines without a GPU pass `use_cpu=True` in the TrainingArguments."
        )


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


def wrap_model(model: nn.Module, config: S3TConfig | None, seed: int) -> tuple[PeftModel, S3TConfig, dict[str, str]]:
    """The base model with S3T adapters, the config with what it left open filled in, and digests of drawn heads.

    Raises:
        ValueError: no config, adapters of another type, or a freshly drawn module that no stage would store.
    """
    if isinstance(model, PeftModel):
        config = config or next(iter(model.peft_config.values()))
        _refuse_trained(model)
        model = model.unload()
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "The model holds an adapter already (`add_adapter`, `load_adapter`), and no stage is stored beside it. "
            f"{BASE_OF_ADAPTER}"
        )
    if not isinstance(config, S3TConfig):
        raise ValueError(f"`peft_config` must be an S3TConfig, got {type(config).__name__}.")
    config = copy.deepcopy(config)
    heads = find_heads(model, config)
    drawn = draw_heads(model, heads, seed)
    config.modules_to_save = list(heads) or None
    names = list(model.state_dict())
    wrapped = get_peft_model(model, copy.deepcopy(config))
    check_heads(heads, wrapped)
    check_base_names(names, wrapped)
    return wrapped, config, drawn


BASE_OF_ADAPTER = (
    "If it belongs to the base, merge it first (`base = PeftModel.from_pretrained(...).merge_and_unload()`, "
    "`base.save_pretrained(folder)`) and pass the model that is loaded from there; if not, pass the base model alone."
)


def _refuse_trained(model: PeftModel) -> None:
    """Raises `ValueError` if taking the adapters off a model would lose something."""
    other = [name for name, config in model.peft_config.items() if not isinstance(config, S3TConfig)]
    trained = [name for name, value in model.named_parameters() if ".lora_B." in name and bool(value.detach().any())]
    if other or trained:
        what = f"adapters of another type ({', '.join(other)})" if other else "an S3T adapter that was trained"
        raise ValueError(f"The model holds {what}, which S3T would take off without a trace. {BASE_OF_ADAPTER}")


def public_id(model: nn.Module) -> str | None:
    """The base model's id on the Hub; `None` where it is a local path or was built from a config."""
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if os.path.exists(str(name)) else name


def make_plan(config: S3TConfig, seed: int) -> Plan:
    """The tree of stages that a config asks for; random orders differ between shards, the best ones do not."""
    num_slices, budget, prior = config.num_slices, config.budget, config.deletion_prior
    if config.sequence_selection == "optimal":
        best = optimal(num_slices, budget, config.cost_budget, prior)
        logger.info(
            "the plan keeps %.1f %% of what training every order would, over the whole life of a shard",
            100 * best.value / best.every_order,
        )
        return Plan.make(config.num_shards, num_slices, best.orders, prune=config.prune)
    numbers = [_number(f"orders of shard {shard}, seed {seed}") for shard in range(config.num_shards)]
    if config.sequence_selection == "bms":
        chosen = [bms(num_slices, config.sequences_wanted, prior, seed=number) for number in numbers]
    else:
        chosen = [select_sequences(config.sequence_selection, num_slices, budget, seed=number) for number in numbers]
    return Plan.make_per_shard(config.num_slices, chosen, prune=config.prune)


def stage_seed(seed: int, stage: Stage) -> int:
    """A stage's seed: a digest of the run's seed, the shard and the prefix, so that no other stage moves it."""
    return _number(f"seed {seed}, stage {stage.name}")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
