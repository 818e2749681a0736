"""What a stage begins from and what it sees: its recipe, its parent and rows of its own prefix, whoever feeds it."""

from __future__ import annotations

import copy
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import EarlyStoppingCallback, TrainerCallback, default_data_collator

import models
from hf_s3t import IsolationError, RecipeError, S3TStore, S3TTrainer, Stage
from hf_s3t.seams.arguments import CHOOSING, SILENT
from hf_s3t.trunk.row_numbers import ROW_NUMBER, NumberedRows, RowGuard
from stores import records_of
from trainers import ROWS, artefacts, make_trainer

SECOND = "shard-00/0-1"
LIVE = {"num_slices": 2, "budget": None}
"""Stages 0, 0-1 and 1."""


def names(store: S3TStore) -> list[str]:
    return [stage.name for stage in store.manifest().stages]


# ---- rows: whatever feeds a stage ----


def plain(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return default_data_collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows])


class KeptLoader(S3TTrainer):
    """Makes its loader once."""

    loader: Any = None

    def get_train_dataloader(self) -> Any:
        self.loader = self.loader or super().get_train_dataloader()
        return self.loader


class KeptRows(S3TTrainer):
    """Keeps the rows of the first stage."""

    kept: Any = None

    def get_train_dataloader(self) -> Any:
        self.kept = self.kept or self.train_dataset
        return DataLoader(self.kept, batch_size=4, collate_fn=self.data_collator)


class OwnDataset(S3TTrainer):
    """A loader over the user's own rows."""

    def get_train_dataloader(self) -> Any:
        return DataLoader(models.llama_rows(ROWS), batch_size=4, collate_fn=plain)


class OwnCollator(S3TTrainer):
    """A loader over the right rows with a collator that knows no marks."""

    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=plain)


class Generated(S3TTrainer):
    """Batches that come from nowhere."""

    def get_train_dataloader(self) -> Any:
        class Batches(list[Any]):
            dataset = self.train_dataset

        return Batches([plain([models.llama_rows(4)[row] for row in range(4)])])


class OwnStep(S3TTrainer):
    """Replaces the step without calling ours."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        inputs = {name: value for name, value in inputs.items() if name != ROW_NUMBER}
        loss = model(**{name: value.to(self.args.device) for name, value in inputs.items()}).loss
        self.accelerator.backward(loss)
        return loss.detach()


class WholeSampler(S3TTrainer):
    """Draws from the whole train set."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(range(ROWS))


class OwnSampler(S3TTrainer):
    """A sampler of the stage's own rows."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return RandomSampler(train_dataset, generator=torch.Generator().manual_seed(5))


class OwnLoader(S3TTrainer):
    """A loader anew for each stage, over the stage's rows, with the trainer's collator."""

    def get_train_dataloader(self) -> Any:
        loader = DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


WRONG = {
    KeptLoader: "kept from an earlier stage",
    KeptRows: "kept from an earlier stage",
    OwnDataset: "does not say which rows are in it",
    OwnCollator: "does not say which rows are in it",
    Generated: "does not say which rows are in it",
    OwnStep: "`training_step` was replaced",
    WholeSampler: "A sampler drew a row that stage shard-00/0 does not have",
}


@pytest.mark.parametrize("trainer_class", WRONG, ids=lambda made: made.__name__)
def test_rows_of_no_stage_or_of_another_one_are_refused(tmp_path: Path, trainer_class: type[S3TTrainer]) -> None:
    trainer = make_trainer(tmp_path / "out", trainer_class=trainer_class, args={"remove_unused_columns": False},
                           config=LIVE, data_collator=plain)  # fmt: skip
    with pytest.raises(IsolationError, match=WRONG[trainer_class]):
        trainer.train()
    kept = ["shard-00/0"] if trainer_class in (KeptLoader, KeptRows) else []
    assert names(trainer.store) == kept


@pytest.mark.parametrize("trainer_class", [OwnSampler, OwnLoader], ids=lambda made: made.__name__)
def test_a_loader_and_a_sampler_of_the_stages_own_rows_work(tmp_path: Path, trainer_class: type[S3TTrainer]) -> None:
    seen: dict[str, set[str]] = {}

    def noting(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen.setdefault(trainer.order.stage.name, set()).update(row["id"] for row in rows)
        return plain(rows)

    trainer = make_trainer(tmp_path / "out", trainer_class=trainer_class, args={"remove_unused_columns": False},
                           config=LIVE, data_collator=noting)  # fmt: skip
    trainer.train()
    places = {
        location.asked: location.places[0] for location in trainer.store.locate(ids=models.llama_rows(ROWS)["id"])
    }
    for name, found in seen.items():
        assert found == {row for row, place in places.items() if place in Stage.from_name(name).slices}


def test_one_foreign_row_in_a_batch_is_refused() -> None:
    rows = NumberedRows([{"a": 1}, {"a": 2}], [3, 8], serial=4)
    guard, marks = RowGuard(rows), [row[ROW_NUMBER] for row in rows.__getitems__([0, 1])]
    assert guard.take({ROW_NUMBER: marks}) == [3, 8]
    assert guard.take({ROW_NUMBER: torch.tensor(marks)}) == [3, 8]
    for foreign in (rows.mark(4), NumberedRows([], [], serial=5).mark(3)):
        with pytest.raises(IsolationError, match="1 of 3 rows of a training batch are not rows"):
            guard.take({ROW_NUMBER: [*marks, foreign]})


def test_columns_that_no_batch_has_are_not_fetched(tmp_path: Path) -> None:
    """Marks ride along with rows whose unused columns were taken out, as the Trainer does."""
    trainer = make_trainer(tmp_path / "out")
    fetched: list[set[str]] = []

    class Looking(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kw: Any) -> None:
            fetched.append(set(train_dataloader.dataset.__getitems__([0])[0]))

    trainer.add_callback(Looking())
    trainer.train()
    assert fetched[0] == {"input_ids", "attention_mask", "labels", ROW_NUMBER}


def test_a_callback_may_evaluate_on_rows_of_the_train_set(tmp_path: Path) -> None:
    found: list[float] = []

    class Evaluating(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(trainer.evaluate(trainer.train_dataset)["eval_loss"] if not found else 0.0)

    trainer = make_trainer(tmp_path / "out", callbacks=[Evaluating()])
    trainer.train()
    assert found[0] > 0
    assert ROW_NUMBER not in trainer.train_dataset.column_names


def test_a_batch_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", data_collator=lambda rows: tuple(plain(rows).values()))
    with pytest.raises(IsolationError, match="The collator gives a tuple"):
        trainer.train()


def test_a_stage_smaller_than_a_batch_is_trained_although_batches_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = models.llama_rows(16).add_column("shard", [0] * 16).add_column("slice", [0] * 8 + [1] * 8)
    options: dict[str, Any] = {
        "args": {"per_device_train_batch_size": 8, "dataloader_drop_last": True},
        "config": {"budget": None, "slice_columns": ("shard", "slice")},
    }
    first = make_trainer(tmp_path / "out", train_dataset=rows, **options)
    first.train()
    assert "fewer than a batch" not in caplog.text
    first.delete(ids=[rows["id"][0]])
    rest = rows.select(range(1, 16))
    make_trainer(tmp_path / "out", train_dataset=rest, **options).train()
    assert "stage shard-00/0 has 7 rows, fewer than a batch of 8" in caplog.text
    make_trainer(tmp_path / "scratch", train_dataset=rest, **options).train()
    assert artefacts(tmp_path / "out") == artefacts(tmp_path / "scratch")
    steps = records_of(S3TStore(tmp_path / "out"))
    assert all(record["steps"] for record in steps.values())


# ---- the mask ----


class Reference(S3TTrainer):
    """Asks the model without its adapter first, as a preference loss does."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        with torch.no_grad(), self.model.disable_adapter():
            reference = model(**inputs).logits
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + (outputs.logits - reference).square().mean()
        return (loss, outputs) if return_outputs else loss


class NoteMask(TrainerCallback):
    """Which parameters have a gradient before each step."""

    def __init__(self) -> None:
        self.with_gradient: dict[str, set[str]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, stage: Stage, **kw: Any) -> None:
        found = {name for name, value in model.named_parameters() if value.grad is not None}
        self.with_gradient.setdefault(stage.name, set()).update(found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_turning_adapters_off_and_on_makes_no_frozen_tensor_train(tmp_path: Path, checkpointing: bool) -> None:
    args, note = {"max_grad_norm": 0.1, "activation_checkpointing": checkpointing}, NoteMask()
    trainer = make_trainer(tmp_path / "out", trainer_class=Reference, args=args, callbacks=[note])
    trainer.train()
    assert names(trainer.store)[-1] == SECOND
    assert not any(".prefix." in name for name in note.with_gradient[SECOND])
    assert note.with_gradient[SECOND]


def test_a_mask_that_moved_between_steps_is_put_right_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Rogue(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, stage: Stage, **kwargs: Any) -> None:
            if stage.depth == 2:
                model.set_adapter("default")
                for value in model.parameters():
                    value.requires_grad = True

    make_trainer(tmp_path / "plain").train()
    note = NoteMask()
    make_trainer(tmp_path / "moved", callbacks=[Rogue(), note]).train()
    assert artefacts(tmp_path / "plain") == artefacts(tmp_path / "moved")
    assert not any(".prefix." in name or "base_layer" in name for name in note.with_gradient[SECOND])
    assert caplog.text.count("changed which parameters train") == 1


# ---- what one stage leaves to the next ----


class Scaler:
    """A stand-in for the scaler of fp16, which a CPU has not: what it has seen decides how large gradients are."""

    def __init__(self) -> None:
        self.seen = 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return loss * (1 + 0.5 * (self.seen % 7))

    def unscale_(self, optimizer: Any) -> None: ...

    def step(self, optimizer: Any, closure: Any = None) -> Any:
        return optimizer.step()

    def update(self) -> None: ...

    def get_scale(self) -> float:
        return 1.0

    def is_enabled(self) -> bool:
        return True

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class Impatient(EarlyStoppingCallback):
    """Stops a stage once it has counted enough evaluations, over all that it was told of."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.early_stopping_patience_counter += 1
        control.should_training_stop = self.early_stopping_patience_counter >= 5


def with_scaler(path: Path, **kwargs: Any) -> S3TTrainer:
    trainer = make_trainer(path, args={"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1.0}, **kwargs)
    trainer.accelerator.scaler = Scaler()
    return trainer


def with_patience(path: Path, **kwargs: Any) -> S3TTrainer:
    args = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_strategy": "steps",
            "save_steps": 1, "num_train_epochs": 2, "metric_for_best_model": "loss"}  # fmt: skip
    callbacks, rows = [Impatient(early_stopping_patience=100)], models.llama_rows(28).select(range(24, 28))
    return make_trainer(path, args=args, eval_dataset=rows, callbacks=callbacks, **kwargs)


def with_accumulation(path: Path, **kwargs: Any) -> S3TTrainer:
    args = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "label_smoothing_factor": 0.1}
    return make_trainer(path, args=args, **kwargs)


def with_dropout(path: Path, **kwargs: Any) -> S3TTrainer:
    args = {"neftune_noise_alpha": 5.0, "train_sampling_strategy": "group_by_length"}
    config = kwargs.pop("config", {}) | {"lora_dropout": 0.2}
    return make_trainer(path, args=args, config=config, **kwargs)


SETTINGS = {
    "scaler": with_scaler, "patience": with_patience, "accumulation": with_accumulation, "dropout": with_dropout,
}  # fmt: skip


def in_this_process(setting: str, path: Path, prefix: tuple[int, ...]) -> None:
    config = {"sequence_selection": [prefix], "num_slices": 2, "budget": None}
    SETTINGS[setting](path, config=config).train()


def in_a_new_process(setting: str, path: Path, prefix: tuple[int, ...]) -> None:
    code = f"import conftest, test_isolation as t; t.in_this_process({setting!r}, t.Path({str(path)!r}), {prefix})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("train", [in_this_process, pytest.param(in_a_new_process, marks=pytest.mark.slow)])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_stage_trained_alone_is_the_one_trained_in_sequence(tmp_path: Path, setting: str, train: Any) -> None:
    """Each of the first stages, by a new trainer on a store that has nothing but what stands above it."""
    whole = SETTINGS[setting](tmp_path / "whole", config=dict(LIVE))
    whole.train()
    expected = artefacts(tmp_path / "whole")
    stages = list(whole.store.manifest().stages)
    assert len(stages) == 3
    for stage in stages:
        path = tmp_path / stage.name.replace("/", "_")
        train(setting, path, stage.prefix)
        found = artefacts(path)
        assert {name: expected[name] for name in found if stage.name in name} == {
            name: digest for name, digest in found.items() if stage.name in name
        }


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_after_an_error_the_same_trainer_goes_on_as_a_new_one(tmp_path: Path, error: type[BaseException]) -> None:
    class Fails(TrainerCallback):
        armed = True

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            assert trainer.accelerator.gradient_state.dataloader_references == [None]
            assert not trainer.control.should_log

        def on_step_end(self, args: Any, state: Any, control: Any, stage: Stage, **kwargs: Any) -> None:
            control.should_log = True
            if self.armed and state.global_step == 2:
                Fails.armed = False
                raise error

    Fails.armed = True
    with_dropout(tmp_path / "never", config=dict(LIVE)).train()
    trainer = with_dropout(tmp_path / "failed", config=dict(LIVE), callbacks=[Fails()])
    rows, collator = trainer.train_dataset, trainer.data_collator
    with pytest.raises(error):
        trainer.train()
    assert (trainer.train_dataset, trainer.data_collator) == (rows, collator)
    assert not trainer.is_in_train and trainer.row_guard is None
    trainer.train()
    assert artefacts(tmp_path / "failed") == artefacts(tmp_path / "never")


# ---- generators ----


class Drawing(TrainerCallback):
    """Draws whenever it looks."""

    def draw(self, *args: Any, **kwargs: Any) -> None:
        random.random()
        np.random.rand()
        torch.rand(3)

    on_log = on_save = on_evaluate = on_prediction_step = draw


LOUD: dict[str, Any] = {
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
}


@pytest.mark.parametrize("what", [["logging_steps"], ["save_strategy", "save_steps"], ["eval_strategy", "eval_steps"]])
def test_what_looks_at_a_stage_moves_no_generator(tmp_path: Path, what: list[str]) -> None:
    rows = models.llama_rows(28).select(range(24, 28))
    make_trainer(tmp_path / "quiet", config={"lora_dropout": 0.3}).train()
    args = {name: LOUD[name] for name in what}
    loud = make_trainer(
        tmp_path / "loud", config={"lora_dropout": 0.3}, args=args, eval_dataset=rows, callbacks=[Drawing()]
    )
    loud.train()
    assert artefacts(tmp_path / "quiet") == artefacts(tmp_path / "loud")


def test_a_repair_with_other_silent_arguments_is_equal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rows = models.llama_rows(ROWS)
    config = {**LIVE, "lora_dropout": 0.3}
    first = make_trainer(tmp_path / "out", config=copy.deepcopy(config))
    first.train()
    first.delete(ids=[rows["id"][0]])
    rest = rows.select(range(1, ROWS))
    evaluating = {"args": LOUD, "eval_dataset": models.llama_rows(28).select(range(24, 28)), "callbacks": [Drawing()]}
    make_trainer(tmp_path / "out", config=copy.deepcopy(config), train_dataset=rest, **evaluating).train()
    make_trainer(tmp_path / "scratch", config=copy.deepcopy(config), train_dataset=rest).train()
    assert artefacts(tmp_path / "out") == artefacts(tmp_path / "scratch")


def test_an_evaluation_set_that_chooses_is_part_of_the_recipe(tmp_path: Path) -> None:
    choosing = LOUD | {"load_best_model_at_end": True, "metric_for_best_model": "loss", "num_train_epochs": 3}
    rows, held_out = models.llama_rows(ROWS), models.llama_rows(28).select(range(24, 28))
    rest = rows.select(range(1, ROWS))

    def make(path: str, some: Any = rows, evaluated: Any = held_out, **kwargs: Any) -> S3TTrainer:
        stop = EarlyStoppingCallback(kwargs.pop("patience", 2))
        given = {"config": copy.deepcopy(LIVE), "args": choosing | kwargs, "callbacks": [stop]}
        return make_trainer(tmp_path / path, train_dataset=some, eval_dataset=evaluated, **given)

    make("out").train()
    S3TStore(tmp_path / "out").delete(ids=[rows["id"][0]])
    before = artefacts(tmp_path / "out")
    for other in ({"evaluated": models.llama_rows(4, seed=9)}, {"patience": 3}, {"eval_steps": 2, "save_steps": 2}):
        with pytest.raises(RecipeError, match=r"steering\."):
            make("out", rest, **other).train()
    assert artefacts(tmp_path / "out") == before
    make("out", rest).train()
    make("scratch", rest).train()
    assert artefacts(tmp_path / "out") == artefacts(tmp_path / "scratch")


def test_a_base_that_computes_otherwise_repairs_nothing(tmp_path: Path) -> None:
    make_trainer(tmp_path / "out", config=copy.deepcopy(LIVE)).train()
    S3TStore(tmp_path / "out").delete(slices=[(0, 1)])
    others = {"attention_dropout": {"attention_dropout": 0.5}, "attention": {"attn_implementation": "eager"}}
    for field, other in others.items():
        model = models.tiny_llama(num_hidden_layers=4, **other)
        with pytest.raises(RecipeError, match=rf"base\.config\.{field}: the store has"):
            make_trainer(tmp_path / "out", config=copy.deepcopy(LIVE), model=model).train()


# ---- arguments that are called silent ----

OTHERWISE: dict[str, Any] = {
    "dataloader_pin_memory": False, "debug": "",
    "ddp_broadcast_buffers": True, "ddp_bucket_cap_mb": 1, "ddp_find_unused_parameters": True, "ddp_timeout": 60,
    "ddp_static_graph": True, "disable_tqdm": False, "do_eval": True, "do_predict": True, "do_train": True,
    "hub_always_push": True, "hub_model_id": "me/x", "hub_private_repo": True,
    "include_for_metrics": ["inputs"], "include_num_input_tokens_seen": "all",
    "log_level": "error", "log_level_replica": "error", "log_on_each_node": False, "logging_first_step": True,
    "logging_nan_inf_filter": False, "logging_steps": 1, "logging_strategy": "epoch", "run_name": "other",
    "restore_callback_states_from_checkpoint": True, "skip_memory_metrics": False, "torch_empty_cache_steps": 1,
    "project": "other", "save_only_model": True, "save_steps": 1, "save_strategy": "epoch", "save_total_limit": 1,
    "save_on_each_node": True, "eval_strategy": "epoch", "eval_steps": 1, "eval_delay": 1, "eval_on_start": True,
    "eval_accumulation_steps": 1, "batch_eval_metrics": False, "eval_do_concat_batches": False,
    "eval_use_gather_object": True, "per_device_eval_batch_size": 2, "prediction_loss_only": True,
    "greater_is_better": True, "metric_for_best_model": "loss",
}  # fmt: skip
"""Another value of each than the default, where one process on a CPU can have one."""
ELSEWHERE = {
    "auto_find_batch_size", "dataloader_persistent_workers", "dataloader_prefetch_factor", "ddp_backend", "deepspeed",
    "fsdp", "fsdp_config",
    "enable_jit_checkpoint", "hub_revision", "hub_strategy", "hub_token", "local_rank", "logging_dir", "output_dir",
    "place_model_on_device", "push_to_hub", "report_to", "resume_from_checkpoint", "trackio_bucket_id",
    "trackio_space_id", "trackio_static_space_id", "use_cpu", "eval_packing",
}  # fmt: skip
"""Refused, or of a tracker, a repository, several processes or another device."""


def test_every_silent_argument_is_tried_or_named() -> None:
    assert SILENT | CHOOSING == OTHERWISE.keys() | ELSEWHERE and not OTHERWISE.keys() & ELSEWHERE


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A training that logs, saves and evaluates nothing."""
    path = tmp_path_factory.mktemp("quiet")
    make_trainer(path, config={"lora_dropout": 0.3}).train()
    return artefacts(path)


@pytest.mark.brief("logging_first_step", "include_num_input_tokens_seen", "eval_on_start")
@pytest.mark.parametrize("name", OTHERWISE)
def test_a_silent_argument_changes_no_bit(tmp_path: Path, quiet: dict[str, str], name: str) -> None:
    more = (
        {"eval_strategy": "steps", "eval_steps": 1} if name.startswith(("eval_", "batch_eval", "per_device")) else {}
    )
    more |= {"save_strategy": "steps", "save_steps": 1} if name.startswith("save_") else {}
    args = more | {name: OTHERWISE[name]}
    rows = models.llama_rows(28).select(range(24, 28))
    make_trainer(tmp_path / "out", config={"lora_dropout": 0.3}, args=args, eval_dataset=rows).train()
    assert artefacts(tmp_path / "out") == quiet
