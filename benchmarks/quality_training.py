"""The trainings of `quality.py`: full LoRA, a store of stages, stages by hand; and the scores of what they leave.

All of them run the Trainer's own loop with the same arguments but for learning rate and epochs. What the rows are and
how a model is scored is for `quality_tasks.py`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from quality_tasks import Score, Task
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_s3t import S3TConfig, S3TTrainer
from hf_s3t.lora.adapter import Adapter, is_lora


def arguments(task: Task, folder: Path, rate: float, epochs: float) -> TrainingArguments:
    """The same for all trainings of a task, but for learning rate and epochs."""
    return TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=task.settings.batch_size,
        learning_rate=rate, warmup_steps=0.1, seed=task.seed, save_strategy="no", logging_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, remove_unused_columns=task.name != "vision",
        train_sampling_strategy=task.sampling,
    )  # fmt: skip


def train_full(task: Task, folder: Path, epochs: float, rows: Any = None) -> tuple[Any, float]:
    """One plain LoRA over all layers, on all rows; returns the model and the seconds it took."""
    model = task.base()
    torch.manual_seed(task.seed)
    model = get_peft_model(model, LoraConfig(r=task.settings.r, lora_alpha=task.settings.r, **task.lora))
    args = arguments(task, folder, task.settings.rates["full"], epochs)
    rows = task.rows["train"] if rows is None else rows
    return model, run(Trainer(model, args, data_collator=task.collate, train_dataset=rows.remove_columns("id")))


def run(trainer: Trainer) -> float:
    """Trains; returns the seconds that it took."""
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    trainer.train()
    return time.monotonic() - started


def train_s3t(
    task: Task, folder: Path, *, epochs: float | None = None, rate: float | None = None, callbacks: Any = (),
    **config: Any,
) -> tuple[S3TTrainer, float]:  # fmt: skip
    """A store of all stages of the config; returns its trainer and the seconds that `train()` took.

    Layer groups run with the activation cache. The partition is the same for all configs of a task and seed.
    """
    kind = config.get("stage_parameters", "layer_group")
    rank = config.pop("r", task.settings.r)
    wanted = {"num_slices": task.settings.num_slices, "budget": 1, "lora_alpha": rank} | config
    if wanted.get("cost_budget"):
        wanted.pop("budget")
    trainer = S3TTrainer(
        task.base(),
        arguments(task, folder, rate or task.settings.rates[kind], epochs or task.settings.epochs),
        data_collator=task.collate,
        train_dataset=task.rows["train"],
        peft_config=S3TConfig(r=rank, id_column="id", **task.lora, **wanted),
        partition_key=f"benchmarks/quality.py, {task.name}, seed {task.seed}",
        activation_cache="memory" if kind == "layer_group" else "off",
        eval_trunk=task.eval_trunk and kind == "layer_group",
        callbacks=list(callbacks),
    )
    return trainer, run(trainer)


class DepthRate(TrainerCallback):
    """Multiplies a stage's learning rate by a power of its depth.

    Args:
        power (`float`): below 0 deeper stages, which take more steps, learn more slowly.
    """

    def __init__(self, power: float):
        self.power = power

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        factor = kwargs["stage"].depth ** self.power
        scheduler = getattr(kwargs["lr_scheduler"], "scheduler", kwargs["lr_scheduler"])
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        for group in kwargs["optimizer"].param_groups:
            group["lr"] *= factor


# ---- what a store holds ----


def served(trainer: S3TTrainer, adapter: Adapter) -> Any:
    """The trainer's model, answering with one assembled adapter."""
    trainer.tuner.serve({"asked": adapter})
    return trainer.model


def without_lora(adapter: Adapter) -> Adapter:
    """The same head on the bare base model."""
    tensors = {name: value * 0 if is_lora(name) else value for name, value in adapter.tensors.items()}
    return Adapter.from_tensors(adapter.config, tensors)


def prefix_scores(trainer: S3TTrainer, task: Task) -> dict[str, list[Score]]:
    """Scores of the prefixes of one sequence, by length from 0 on, on the first test rows; and of their heads alone.

    Length 0 is the base model, with an untrained head where the base has none.
    """
    count = task.settings.prefix_rows
    sequence = trainer.store.served()[0]
    found = {"by_length": [task.score(task.base(), "test", count)]}
    heads = []
    for length in range(1, len(sequence) + 1):
        adapter = trainer.store.assemble(0, sequence[:length])
        found["by_length"].append(task.score(served(trainer, adapter), "test", count))
        if adapter.heads:
            heads.append(task.score(served(trainer, without_lora(adapter)), "test", count))
    return found | ({"head_alone": heads} if heads else {})


def lora_numbers(trainer: S3TTrainer) -> int:
    """Numbers in all LoRA matrices that the store holds."""
    manifest = trainer.store.manifest()
    return sum(
        value.numel()
        for stage in manifest.stages
        for name, value in trainer.store.read_stage(stage, manifest).tensors.items()
        if is_lora(name)
    )


def full_numbers(model: Any) -> int:
    """Numbers in the LoRA matrices of a plain model."""
    return sum(value.numel() for name, value in model.named_parameters() if is_lora(name))


def s3t_figures(trainer: S3TTrainer, seconds: float, task: Task, whole: bool = True) -> dict[str, Any]:
    """Scores by length, and of the longest prefix on all test rows; what was stored and spent.

    Args:
        whole (`bool`): score the longest prefix on all test rows and on the official ones, too.
    """
    cost = trainer.store.manifest().plan.cost * trainer.args.num_train_epochs
    figures: dict[str, Any] = prefix_scores(trainer, task)
    figures |= {"lora_numbers": lora_numbers(trainer), "slice_passes": cost, "seconds": seconds}
    if whole:
        model = served(trainer, trainer.store.assemble(0, trainer.store.served()[0]))
        figures |= whole_scores(model, task)
    return figures


def whole_scores(model: Any, task: Task) -> dict[str, Score]:
    """Scores on all test rows, and on the official ones where there are any."""
    return {split: task.score(model, split) for split in ("test", "official") if split in task.rows}


# ---- stages by hand ----

# Which layers a stage trains, of `depth` (from 1 on), layers per slice, and all layers.
SHAPES = {
    "top_down": lambda depth, each, layers: range(layers - depth * each, layers - (depth - 1) * each),
    "bottom_up": lambda depth, each, layers: range((depth - 1) * each, depth * each),
    "wedge": lambda depth, each, layers: range(layers - depth * each, layers),
}


def train_by_hand(
    task: Task, folder: Path, shape: str, *, r: int, kind: str = "layer_group", head_stages: int | None = None
) -> tuple[Any, dict[str, Any]]:
    """Stages of another shape than the library's, by plain PEFT; to be compared with `"top_down"` by hand.

    One shard and one sequence on cumulative data; a stage is one more adapter over its parents, which are frozen.
    A head is trained on from stage to stage.

    Args:
        shape (`str`): `"top_down"` are the layer groups of the library; `"bottom_up"` begins at the lowest group; in
            a `"wedge"` a stage owns new ranks in every layer from the top down to its group.
        r (`int`): new ranks of a stage.
        kind (`str`): whose learning rate is taken.
        head_stages (`int`, *optional*): the first stages, which train the head; all by default.

    Returns:
        `tuple`: the model, and the figures that [`s3t_figures`] gives of a store.
    """
    number = task.settings.num_slices
    rows = task.rows["train"]
    cuts = [round(len(rows) * part / number) for part in range(number + 1)]
    model: Any = task.base()
    layers = model.config.num_hidden_layers
    # PEFT would copy a head for each adapter.
    lora = task.lora | {"modules_to_save": None, "task_type": None if task.head else task.lora["task_type"]}
    scores, seconds = [task.score(model, "test", task.settings.prefix_rows)], 0.0
    names: list[str] = []
    for depth in range(1, number + 1):
        owned = list(SHAPES[shape](depth, layers // number, layers))
        config = LoraConfig(r=r, lora_alpha=r, layers_to_transform=owned, **lora)
        names.append(f"stage-{depth}")
        torch.manual_seed(1000 * task.seed + depth)
        if depth == 1:
            model = get_peft_model(model, config, adapter_name=names[0])
        else:
            model.add_adapter(names[-1], config)
        model.base_model.set_adapter(names)
        with_head = bool(task.head) and depth <= (head_stages or number)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = f".{names[-1]}." in name or (with_head and f".{task.head}." in name)
        args = arguments(task, folder / names[-1], task.settings.rates[kind], task.settings.epochs)
        seen = rows.select(range(cuts[depth])).remove_columns("id")
        seconds += run(Trainer(model, args, data_collator=task.collate, train_dataset=seen))
        scores.append(task.score(model, "test", task.settings.prefix_rows))
    passes = number * (number + 1) / 2 * task.settings.epochs
    figures = {"by_length": scores, "lora_numbers": full_numbers(model), "slice_passes": passes, "seconds": seconds}
    return model, figures | whole_scores(model, task)
