"""Instruction tuning that can forget: the embedded demo, and the paper's Llama systems.

Without arguments, a small Llama learns facts about invented persons, forgets one of them and is repaired, in minutes
on a CPU:

```bash
accelerate launch recipes/alpaca.py
```

With a model it is the paper's instruction tuning (S3T, arXiv 2406.16257, section 5 and appendix), here on several GPUs
with an 8-bit base. Flags, or a YAML or JSON file named first, override the preset. `--method sisa` and `--method full`
run the paper's alternatives on the same engine; `--delete_ids FILE` deletes the examples whose ids stand in FILE, one
a line, and repairs; `--lm_eval` (the extra `eval`) asks lm-evaluation-harness at each of these points:

```bash
accelerate launch --config_file accelerate_configs/multi_gpu_ddp.yaml recipes/alpaca.py \
    --model_name_or_path meta-llama/Llama-2-7b-hf --preset llama-2-7b --load_in_8bit --output_dir out/llama-2-7b-alpaca
```

The presets are the paper's, layer groups. For instruction tuning `--stage_parameters rank_group` with `--r` of about
twice the preset's over L, here 16, learns more for twice the storage (`docs/quality.md`).

The harness runs on the main process while the others wait: with several, `--ddp_timeout` has to last for it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from accelerate import PartialState
from common import (
    Figures,
    RecipeArguments,
    check_rows,
    finish,
    load_split,
    make_config,
    metrics_of,
    need_split,
    read_arguments,
    run,
    start_logging,
)
from instructions import ALL_PROJECTIONS, InstructionCollator, load_model, load_tokenizer
from people_demo import demo
from transformers import TrainingArguments

from hf_s3t import S3TEnsemble, S3TTrainer

PAPER = {"num_shards": 1, "num_slices": 4, "r": 32, "lora_alpha": 64, "learning_rate": 2e-5, "num_train_epochs": 3}
PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": PAPER | {"layers_per_slice": 8},
    "llama-2-13b": PAPER | {"layers_per_slice": 10},
    "llama-3-8b": PAPER | {"layers_per_slice": 8},
    "llama-2-7b-qlora": PAPER | {"layers_per_slice": 8, "load_in_4bit": True},
    "llama-3-8b-qlora": PAPER | {"layers_per_slice": 8, "load_in_4bit": True},
}
"""The paper's Llama systems; all with B=L and rsLoRA. Those with QLoRA are not the paper's: the base is in 4 bits."""

ZERO_SHOT = [
    "mmlu", "hellaswag", "piqa", "winogrande", "arc_challenge", "arc_easy", "truthfulqa_mc2", "openbookqa",
]  # fmt: skip
"""The paper's tasks, as lm-evaluation-harness names them."""


@dataclass
class AlpacaArguments(RecipeArguments):
    """What this recipe adds to the TrainingArguments."""

    dataset_name: str = field(default="tatsu-lab/alpaca", metadata={"help": "Dataset id, in the Alpaca format."})
    preset: str | None = field(default=None, metadata={"help": f"One of {', '.join(PRESETS)}."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base with bitsandbytes."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base to 4 bits, as QLoRA does."})
    max_length: int = field(default=512, metadata={"help": "Longest example, in tokens; longer ones are cut."})
    train_on_prompt: bool = field(default=False, metadata={"help": "Loss on the whole text, as in the paper."})
    lm_eval: bool = field(default=False, metadata={"help": "Evaluate with lm-evaluation-harness."})
    lm_eval_tasks: list[str] = field(
        default_factory=lambda: list(ZERO_SHOT), metadata={"help": "Its tasks; by default the paper's."}
    )
    lm_eval_include_path: str | None = field(default=None, metadata={"help": "Folder of more tasks, as YAML files."})


def make_trainer(arguments: AlpacaArguments, args: TrainingArguments) -> S3TTrainer:
    """The trainer of the paper's instruction tuning."""
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    rows = need_split(arguments, "train", arguments.dataset_name)
    held_out = load_split(arguments, "test") if arguments.data_dir else None
    for checked in (rows, *([] if held_out is None else [held_out])):
        check_rows(checked, ("instruction", "output"))
    args.device  # noqa: B018  # starts the processes before the model is placed
    return S3TTrainer(
        model=load_model(arguments.model_name_or_path, arguments.load_in_8bit, arguments.load_in_4bit),
        args=args,
        data_collator=InstructionCollator(tokenizer, arguments.max_length, arguments.train_on_prompt),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=make_config(
            arguments, use_rslora=True, target_modules=ALL_PROJECTIONS, task_type="CAUSAL_LM"
        ),
        partition_key=arguments.partition_key,
        missing=arguments.missing,
        base_model_id=arguments.base_model_id,
    )


def measured(trainer: S3TTrainer, arguments: AlpacaArguments) -> Figures:
    """Loss of held-out responses, where `--data_dir` has a test split, and what lm-evaluation-harness says."""
    figures = {} if trainer.eval_dataset is None else metrics_of(trainer.evaluate())
    if arguments.lm_eval:
        if PartialState().is_main_process:
            figures |= zero_shot(trainer, arguments)
        PartialState().wait_for_everyone()
    return figures


def zero_shot(trainer: S3TTrainer, arguments: AlpacaArguments) -> Figures:
    """Accuracies of the served model on tasks of lm-evaluation-harness."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = trainer.model
    if len(trainer.store.served()) > 1:  # `trainer.model` is one of several: load the ensemble
        base = load_model(arguments.model_name_or_path, arguments.load_in_8bit, arguments.load_in_4bit)
        model = S3TEnsemble.from_pretrained(
            trainer.store, base if arguments.load_in_8bit or arguments.load_in_4bit else base.to(trainer.args.device)
        )
    answer = simple_evaluate(
        HFLM(model, tokenizer=trainer.processing_class, batch_size=trainer.args.per_device_eval_batch_size),
        tasks=arguments.lm_eval_tasks,
        num_fewshot=0,
        task_manager=task_manager(arguments.lm_eval_include_path),
        bootstrap_iters=0,
    )
    found = answer["results"] | answer.get("groups", {})  # MMLU is a group of tasks
    return {
        f"{task} {metric}": found[task][f"{metric},none"]
        for task in arguments.lm_eval_tasks
        for metric in ("acc", "acc_norm")
        if f"{metric},none" in found[task]
    }


@cache
def task_manager(include_path: str | None) -> Any:
    """What the harness knows of tasks; it reads thousands of files for it."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def choose_preset(chosen: Any) -> dict[str, Any]:
    """What the paper's table says of the model; without a preset what its models share."""
    if chosen.preset is not None and chosen.preset not in PRESETS:
        raise ValueError(f"There is no preset {chosen.preset!r}; there are {', '.join(PRESETS)}.")
    folder = "out/demo" if chosen.model_name_or_path is None else f"out/alpaca-{chosen.method}"
    return {"output_dir": folder, **PRESETS.get(chosen.preset, PAPER)}


def refuse_for_demo(arguments: AlpacaArguments) -> None:
    """Raises `ValueError` for what the embedded demo would not heed."""
    left_alone = vars(AlpacaArguments()) | PAPER
    told = [name for name, value in left_alone.items() if getattr(arguments, name, value) != value]
    if told:
        raise ValueError(
            f"Without --model_name_or_path the embedded demo runs, which has its own {', '.join(told)}. Name a model, "
            "or leave them out."
        )


def main(argv: Sequence[str] | None = None) -> dict[str, Figures] | None:
    arguments, args = read_arguments(AlpacaArguments, choose_preset, argv)
    start_logging()
    if arguments.model_name_or_path is None:
        refuse_for_demo(arguments)
        return demo(args)
    if arguments.lm_eval and importlib.util.find_spec("lm_eval") is None:
        raise ImportError("--lm_eval needs lm-evaluation-harness: `pip install 'hf-s3t[eval]'`.")
    trainer = make_trainer(arguments, args)
    return run(trainer, arguments, lambda: measured(trainer, arguments))


if __name__ == "__main__":
    main()
    finish()
