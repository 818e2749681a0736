"""Trainers over tiny models that a test can vary one thing of, and what they leave behind."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments, default_data_collator

import models
from hf_s3t import S3TConfig, S3TTrainer, Stage

KEY = "00112233445566778899aabbccddeeff"
ROWS = 24
BASES = {
    "llama": (partial(models.tiny_llama, num_hidden_layers=4), models.llama_rows, "CAUSAL_LM"),
    "bert": (models.tiny_bert, models.bert_rows, "SEQ_CLS"),
}
TARGETS = {"CAUSAL_LM": ["q_proj", "down_proj"], "SEQ_CLS": ["query", "output.dense"]}


def make_args(path: Path | str, **changes: Any) -> TrainingArguments:
    """Arguments of a short run that logs, saves and draws nothing."""
    quiet = {"report_to": [], "save_strategy": "no", "logging_steps": 1000, "disable_tqdm": True, "use_cpu": True}
    brief = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    return TrainingArguments(str(path), **quiet | brief | changes)


def make_config(task: str = "CAUSAL_LM", **changes: Any) -> S3TConfig:
    """One shard of two slices; one sequence of two stages."""
    fields = {"num_slices": 2, "budget": 1, "target_modules": TARGETS[task], "task_type": task, "r": 2}
    return S3TConfig(**fields | changes)


def make_trainer(
    path: Path | str,
    *,
    base: str = "llama",
    trainer_class: type[S3TTrainer] = S3TTrainer,
    config: dict[str, Any] | None = None,
    args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> S3TTrainer:
    """A trainer of two stages, unless `config` says otherwise; `kwargs` go to the trainer."""
    build, rows, task = BASES[base]
    given = {
        "args": make_args(path, **args or {}),
        "data_collator": default_data_collator,
        "peft_config": make_config(task, **config or {}),
        "partition_key": KEY,
    } | kwargs
    model = given.pop("model") if "model" in given else build()
    if "train_dataset" not in given:
        given["train_dataset"] = rows(ROWS)
    return trainer_class(model, **given)


def artefacts(path: Path | str) -> dict[str, str]:
    """sha256 of every adapter file of a store, by its path."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(Path(path).rglob("*"))
        if (file.suffix == ".safetensors" or file.name == "adapter_config.json") and ".s3t" not in file.parts
    }


def tensors_of(trainer: S3TTrainer, name: str = "shard-00/0-1") -> dict[str, torch.Tensor]:
    """Tensors of one stored stage."""
    return trainer.store.read_stage(Stage.from_name(name)).tensors


def batch(rows: Any, count: int = 6) -> dict[str, torch.Tensor]:
    """The first rows as the models read them, with their labels."""
    columns = [name for name in rows.column_names if name not in ("id", "person")]
    return default_data_collator([{name: row[name] for name in columns} for row in rows.select(range(count))])


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model answers, without dropout."""
    return model.eval()(**{name: value for name, value in inputs.items() if name != "labels"}).logits


def plain_member(base: str, trainer: S3TTrainer, folder: Path, prefix: str | None = None) -> PeftModel:
    """A prefix, or the root adapter, on a fresh base, exported and loaded by stock PEFT."""
    trainer.store.export(folder, prefix=prefix)
    return PeftModel.from_pretrained(BASES[base][0](), folder).eval()


class Recorder(TrainerCallback):
    """Notes `(event, stage name, global step)` of every event that it is told to listen to."""

    def __init__(self, *events: str):
        self.seen: list[tuple[str, str | None, int]] = []
        for event in events:
            setattr(self, event, self._note(event))

    def _note(self, event: str) -> Any:
        def note(args: Any, state: Any, control: Any, stage: Stage | None = None, **kwargs: Any) -> None:
            self.seen.append((event, stage and stage.name, state.global_step))

        return note

    def steps(self, event: str = "on_step_end") -> dict[str | None, list[int]]:
        """Step numbers per stage."""
        found: dict[str | None, list[int]] = {}
        for name, stage, step in self.seen:
            if name == event:
                found.setdefault(stage, []).append(step)
        return found
