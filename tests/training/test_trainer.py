"""What TrainingArguments mean in a staged run: per stage, or once for the whole plan."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback, TrainerCallback, default_data_collator
from transformers.integrations import integration_utils

import models
from hf_s3t import RecipeError, S3TTrainer, Stage
from stores import index_of, records_of
from trainers import Recorder, artefacts, batch, make_trainer, tensors_of

FIRST, SECOND = "shard-00/0", "shard-00/0-1"


def sizes(trainer: S3TTrainer) -> dict[str, int]:
    """Number of examples that each stage of the plan sees."""
    counts: dict[int, int] = {}
    for entry in index_of(trainer.store).values():
        counts[entry.slice] = counts.get(entry.slice, 0) + 1
    stages = trainer.store.manifest().plan.stages
    return {stage.name: sum(counts[slice_id] for slice_id in stage.prefix) for stage in stages}


def info_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Messages of level INFO, without the rank that accelerate puts before them."""
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    return [message.removeprefix("[RANK 0] ") for message in messages]


class Rates(TrainerCallback):
    """Notes the learning rate with which each step of each stage is made."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def on_step_begin(
        self, args: Any, state: Any, control: Any, stage: Stage, lr_scheduler: Any, **kwargs: Any
    ) -> None:
        self.seen.setdefault(stage.name, []).append(lr_scheduler.get_last_lr()[0])


# Per stage


def test_epochs_are_those_of_a_stage(tmp_path: Path) -> None:
    steps = Recorder("on_step_end")
    trainer = make_trainer(tmp_path, args={"num_train_epochs": 2}, callbacks=[steps])
    trainer.train()
    expected = {name: 2 * math.ceil(size / 4) for name, size in sizes(trainer).items()}
    assert len(set(expected.values())) == 2  # the second stage sees more rows
    assert {name: len(seen) for name, seen in steps.steps().items()} == expected
    assert all(seen == list(range(1, len(seen) + 1)) for seen in steps.steps().values())
    assert {name: record["steps"] for name, record in records_of(trainer.store).items()} == expected
    assert {name: record["examples"] for name, record in records_of(trainer.store).items()} == sizes(trainer)


def test_max_steps_are_those_of_a_stage(tmp_path: Path) -> None:
    steps = Recorder("on_step_end")
    make_trainer(tmp_path, args={"max_steps": 3}, callbacks=[steps]).train()
    assert steps.steps() == {FIRST: [1, 2, 3], SECOND: [1, 2, 3]}


@pytest.mark.parametrize(
    "scheduler, factors",
    [
        ("linear", [0, 1 / 2, 1, 2 / 3, 1 / 3]),
        ("constant_with_warmup", [0, 1 / 2, 1, 1, 1]),
        ("cosine", [0, 1 / 2, 1, 3 / 4, 1 / 4]),
    ],
)
def test_learning_rate_and_warm_up_start_again_in_every_stage(
    tmp_path: Path, scheduler: str, factors: list[float]
) -> None:
    rates = Rates()
    make_trainer(
        tmp_path, args={"max_steps": 5, "warmup_steps": 2, "lr_scheduler_type": scheduler}, callbacks=[rates]
    ).train()
    expected = pytest.approx([1e-2 * factor for factor in factors])
    assert rates.seen == {FIRST: expected, SECOND: expected}


def test_evaluation_and_saving_are_those_of_a_stage(tmp_path: Path) -> None:
    class Folders(TrainerCallback):
        seen: list[str] = []

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen += [str(path.relative_to(tmp_path)) for path in tmp_path.glob(".s3t/running/*/checkpoint-*")]

    events, folders = Recorder("on_evaluate", "on_save"), Folders()
    make_trainer(
        tmp_path,
        args={"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3},
        eval_dataset=models.llama_rows(8, seed=1),
        callbacks=[events, folders],
    ).train()
    assert events.steps("on_evaluate") == {FIRST: [2, 4], SECOND: [2, 4]}
    assert events.steps("on_save") == {FIRST: [3, 4], SECOND: [3, 4]}
    expected = [f".s3t/running/shard-00_{name}/checkpoint-{step}" for name in ("0", "0-1") for step in (3, 3, 4)]
    assert sorted(folders.seen) == sorted(expected)  # each save sees its own checkpoint and the ones before
    assert not (tmp_path / ".s3t/running").exists()
    assert {path.name for path in tmp_path.iterdir()} == {
        ".s3t", "README.md", "s3t.json", "adapter_config.json", "adapter_model.safetensors", "shard-00",
    }  # fmt: skip


# Once for the whole run


def test_one_progress_bar_counts_slice_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: float, **kwargs: Any):
            self.total, self.n, self.closed, self.positions, self.descriptions = total, 0.0, False, [], []
            bars.append(self)

        def refresh(self) -> None:
            self.positions.append(self.n)

        def set_description(self, text: str) -> None:
            self.descriptions.append(text)

        def write(self, text: str) -> None: ...

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr("hf_s3t.training.callbacks.tqdm", Bar)
    places = [(shard, at) for shard in range(2) for at in range(2) for _ in range(8)]
    rows = models.llama_rows(32).add_column("shard", [shard for shard, _ in places])
    rows = rows.add_column("at", [at for _, at in places])
    config = {"num_shards": 2, "budget": None, "slice_columns": ("shard", "at")}
    args = {"disable_tqdm": False, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    make_trainer(tmp_path, config=config, args=args, train_dataset=rows).train()
    (bar,) = bars
    # Stages 0, 0-1 and 1 of two shards: 1 + 2 + 1 slice passes in each of two epochs; a step is one of them.
    per_shard = [1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 8]
    assert bar.total == 16 and bar.closed
    assert bar.positions == per_shard + [8 + position for position in per_shard]
    assert bar.descriptions == [f"shard-0{shard}/{prefix}" for shard in range(2) for prefix in ("0", "0-1", "1")]


def test_a_tracker_sees_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tracker(Recorder):
        def __init__(self) -> None:
            super().__init__("on_train_begin", "on_train_end", "on_log")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recording", Tracker)
    trainer = make_trainer(tmp_path, args={"report_to": ["recording"], "max_steps": 2, "logging_steps": 1})
    trainer.train()
    (tracker,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Tracker))
    assert [event for event, _, _ in tracker.seen] == ["on_train_begin", *["on_log"] * 6, "on_train_end"]
    assert tracker.steps("on_log") == {FIRST: [1, 2, 2], SECOND: [3, 4, 4]}

    trainer.delete(slices=[(0, 1)])
    trainer.train()  # a run of its own
    events = [event for event, _, _ in tracker.seen[8:]]
    assert events == ["on_train_begin", *["on_log"] * 3, "on_train_end"]


@pytest.mark.slow
def test_tensorboard_writes_one_file_beside_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    for name in ("one", "two"):  # in one process, as a notebook does it
        make_trainer(tmp_path / name, args={"report_to": ["tensorboard"], "max_steps": 2, "logging_steps": 1}).train()
    for name in ("one", "two"):
        files = list((tmp_path / f"{name}-runs").rglob("*tfevents*"))
        assert len(files) == 1
    assert not [path for name in ("one", "two") for path in (tmp_path / name).rglob("*tfevents*")]


def test_logs_count_steps_over_the_plan(tmp_path: Path) -> None:
    class Logs(TrainerCallback):
        seen: list[tuple[int, set[str]]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            self.seen.append((state.global_step, set(logs)))

    logs = Logs()
    trainer = make_trainer(
        tmp_path,
        args={"max_steps": 2, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        eval_dataset=models.llama_rows(8, seed=1),
        callbacks=[logs],
    )
    output = trainer.train()
    assert [step for step, _ in logs.seen] == [2, 2, 2, 4, 4, 4]
    for position in (0, 3):
        training, evaluation, end = (names for _, names in logs.seen[position : position + 3])
        assert {"loss", "learning_rate"} <= training and "eval_loss" in evaluation and "train_loss" in end
    assert output.global_step == 4
    assert set(output.metrics) == {f"{FIRST}/loss", f"{SECOND}/loss"}
    assert output.training_loss == pytest.approx(sum(output.metrics.values()) / 2)
    assert trainer.state.global_step == 2  # the last stage's own


def test_every_callback_is_told_the_stage(tmp_path: Path) -> None:
    events = Recorder("on_train_begin", "on_epoch_begin", "on_step_end", "on_log", "on_train_end")
    trainer = make_trainer(tmp_path, args={"max_steps": 1, "logging_steps": 1}, callbacks=[events])
    trainer.train()
    assert [stage for event, stage, _ in events.seen if event == "on_train_begin"] == [FIRST, SECOND]
    assert {stage for _, stage, _ in events.seen} == {FIRST, SECOND}
    outside = Recorder("on_evaluate")
    trainer.add_callback(outside)
    trainer.evaluate(models.llama_rows(4))
    assert [stage for _, stage, _ in outside.seen] == [None]


def test_the_plan_is_announced_and_every_stage_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="hf_s3t.training.trainer")
    trainer = make_trainer(tmp_path, config={"num_slices": 4, "budget": 4})
    trainer.train()
    lines = info_lines(caplog)
    # Four rotations, pruned: 10 + 3 * (1 + 2 + 3) slice passes over 4 slices.
    assert lines[0].startswith("13 of 13 stages to train, 28 slice passes = 7.0 x one plain fine-tuning, ")
    stored = sum(file.stat().st_size for file in tmp_path.glob("shard-*/*/*.safetensors"))
    assert float(lines[0].split(" MB")[0].split(", ")[-1]) == pytest.approx(stored / 1e6, abs=0.06)
    assert len(lines) == 14
    parameters = sum(value.numel() for value in tensors_of(trainer).values())
    examples = sizes(trainer)[SECOND]
    assert f"stage {SECOND}: layers [2], {examples} examples, {parameters} trainable parameters, loss" in lines[2]
    caplog.clear()
    trainer.train()
    assert info_lines(caplog)[0].startswith("0 of 13 stages to train, 0 slice passes")


# Choosing the best checkpoint


def test_the_best_checkpoint_of_a_stage_is_stored_and_the_recipe_says_so(tmp_path: Path) -> None:
    class Losses(TrainerCallback):
        seen: dict[str, list[float]] = {}

        def on_evaluate(self, args: Any, state: Any, control: Any, stage: Stage, metrics: Any, **kwargs: Any) -> None:
            self.seen.setdefault(stage.name, []).append(metrics["eval_loss"])

    choosing = {
        "num_train_epochs": 20, "learning_rate": 0.3, "eval_strategy": "epoch", "save_strategy": "epoch",
        "load_best_model_at_end": True, "metric_for_best_model": "loss",
    }  # fmt: skip
    held_out, losses = models.bert_rows(16, seed=1), Losses()
    settings = {"base": "bert", "args": choosing, "eval_dataset": held_out}
    trainer = make_trainer(tmp_path, callbacks=[losses, EarlyStoppingCallback(2)], **settings)
    trainer.train()
    for name, seen in losses.seen.items():
        assert len(seen) < 20  # stopped early
        assert min(seen) == seen[-3] < seen[-1]  # with patience 2, and the best is not the last
        trainer.store.export(tmp_path.with_name("exported"), prefix=name)
        stored = PeftModel.from_pretrained(models.tiny_bert(), tmp_path.with_name("exported")).eval()
        with torch.no_grad():
            assert stored(**batch(held_out, 16)).loss.item() == pytest.approx(min(seen), rel=1e-5)
    recorded = trainer.store.manifest().recipe["arguments"]
    assert recorded["load_best_model_at_end"] is True and recorded["metric_for_best_model"] == "loss"
    assert recorded["eval_strategy"] == "epoch"
    other = {**choosing, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    with pytest.raises(RecipeError, match="arguments.eval_strategy: the store has 'epoch', this run 'steps'"):
        make_trainer(tmp_path, **{**settings, "args": other}).train()


# How a batch is made


@pytest.mark.slow
def test_accumulated_batches_give_what_one_large_batch_gives(tmp_path: Path) -> None:
    rows = models.llama_rows(16).add_column("shard", [0] * 16).add_column("slice", [0, 1] * 8)
    kwargs = {"train_dataset": rows, "config": {"slice_columns": ("shard", "slice")}}
    one = make_trainer(tmp_path / "one", args={"per_device_train_batch_size": 8}, **kwargs)
    many = make_trainer(
        tmp_path / "many", args={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, **kwargs
    )
    for trainer in (one, many):
        trainer.train()
    assert [record["steps"] for record in records_of(many.store).values()] == [1, 2]
    torch.testing.assert_close(tensors_of(many), tensors_of(one), rtol=1e-4, atol=1e-5)


@pytest.mark.brief("llama")
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_activation_checkpointing_changes_no_bit(tmp_path: Path, base: str) -> None:
    plain = make_trainer(tmp_path / "plain", base=base)
    checkpointed = make_trainer(tmp_path / "checkpointed", base=base, args={"activation_checkpointing": True})
    assert checkpointed.args.activation_checkpointing_kwargs["use_reentrant"] is False
    for trainer in (plain, checkpointed):
        trainer.train()
    assert artefacts(tmp_path / "plain") == artefacts(tmp_path / "checkpointed")


def test_workers_load_the_rows_of_a_stage_and_are_part_of_the_recipe(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, args={"dataloader_num_workers": 2, "max_steps": 2})
    trainer.train()
    assert set(records_of(trainer.store)) == {FIRST, SECOND}
    with pytest.raises(RecipeError, match="dataloader_num_workers: the store has 2, this run 0"):
        make_trainer(tmp_path, args={"max_steps": 2}).train()


class Interrupt(TrainerCallback):
    """Whoever trains presses control and C."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_no_worker_outlives_a_training_that_is_interrupted(tmp_path: Path) -> None:
    """Nobody else ends them at once, as the Trainer and its loaders refer to one another."""
    args = {"dataloader_num_workers": 1, "eval_strategy": "epoch"}
    trainer = make_trainer(tmp_path, args=args, eval_dataset=models.llama_rows(8, seed=1), callbacks=[Interrupt()])
    before = {child.pid for child in multiprocessing.active_children()}
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert {child.pid for child in multiprocessing.active_children()} <= before
    assert trainer.callback_handler.train_dataloader.num_workers == 1


@pytest.mark.slow
def test_a_worker_lives_as_long_as_its_stage(tmp_path: Path) -> None:
    def collate(rows: list[Any]) -> Any:
        with open(tmp_path / "workers", "a") as file:
            file.write(f"{os.getpid()} ")
        return default_data_collator(rows)

    args = {"dataloader_num_workers": 1, "num_train_epochs": 3}
    trainer = make_trainer(tmp_path / "out", data_collator=collate, args=args)
    trainer.train()
    workers = set((tmp_path / "workers").read_text().split()) - {str(os.getpid())}
    assert len(workers) == len(trainer.store.manifest().stages)
