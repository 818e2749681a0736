"""What users bring along keeps working stage by stage: losses, collators, metrics, datasets, callbacks, models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback, default_data_collator

import models
from hf_s3t import IsolationError, S3TTrainer, Stage
from trainers import KEY, ROWS, Recorder, artefacts, batch, logits, make_config, make_trainer, tensors_of

FIRST, SECOND = "shard-00/0", "shard-00/0-1"


class Interrupt(TrainerCallback):
    """Ends the process's training in the second stage, as a crash between two steps would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, stage: Stage, **kwargs: Any) -> None:
        if stage.depth == 2 and state.global_step == self.step:
            raise KeyboardInterrupt


# Losses, collators, metrics


def test_an_overridden_loss_is_what_trains(tmp_path: Path) -> None:
    class Scaled(S3TTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            _, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = 3 * outputs.logits.mean()
            return (loss, outputs) if return_outputs else loss

    args = {"learning_rate": 0.05, "num_train_epochs": 4}
    trainer = make_trainer(tmp_path, trainer_class=Scaled, args=args)
    inputs = batch(models.llama_rows(6))
    before = logits(trainer.model, inputs).mean()
    trainer.train()
    after = logits(trainer.model, inputs).mean()
    assert after < before - 0.3
    loss = trainer.evaluate(models.llama_rows(6))["eval_loss"]
    assert loss == pytest.approx(3 * after.item(), rel=1e-4)


def test_a_collator_of_the_users_makes_the_batches(tmp_path: Path) -> None:
    def reversing(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert set(rows[0]) == {"input_ids", "attention_mask", "labels"}  # ids and persons stay outside
        made = default_data_collator(rows)
        return {name: value.flip(1) for name, value in made.items()}

    make_trainer(tmp_path / "reversing", data_collator=reversing).train()
    rows = models.llama_rows(ROWS)
    columns = ("input_ids", "attention_mask", "labels")
    flipped = rows.map(lambda row: {name: row[name][::-1] for name in columns}, keep_in_memory=True)
    make_trainer(tmp_path / "flipped", train_dataset=flipped).train()
    assert artefacts(tmp_path / "reversing") == artefacts(tmp_path / "flipped")


def test_metrics_and_several_evaluation_sets(tmp_path: Path) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    class Names(TrainerCallback):
        seen: set[str] = set()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            self.seen |= set(logs)

    rows, names = models.bert_rows(32, seed=1), Names()
    sets = {"near": rows.select(range(16)), "far": rows.select(range(16, 32))}
    trainer = make_trainer(
        tmp_path, base="bert", args={"eval_strategy": "epoch"}, eval_dataset=sets, compute_metrics=accuracy,
        callbacks=[names],
    )  # fmt: skip
    trainer.train()
    assert {f"eval_{which}_accuracy" for which in sets} <= names.seen
    metrics = trainer.evaluate()
    for which, held_out in sets.items():
        inputs = batch(held_out, 16)
        right = (logits(trainer.model, inputs).argmax(-1) == inputs["labels"]).float().mean().item()
        assert metrics[f"eval_{which}_accuracy"] == pytest.approx(right)


def test_a_random_collator_starts_the_killed_stage_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def shifting(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        made = default_data_collator(rows)
        made["input_ids"] = (made["input_ids"] + torch.randint(0, 9, (len(rows), 1))) % models.VOCABULARY
        return made

    saving = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "never", args=saving, data_collator=shifting).train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "killed", args=saving, data_collator=shifting, callbacks=[Interrupt(3)]).train()
    assert (tmp_path / "killed/.s3t/running/shard-00_0-1/checkpoint-2/hf_s3t.json").exists()
    steps = Recorder("on_step_end")
    make_trainer(tmp_path / "killed", args=saving, data_collator=shifting, callbacks=[steps]).train()
    assert f"stage {SECOND} starts again: its batches are random" in caplog.text
    assert steps.steps()[SECOND][0] == 1
    assert artefacts(tmp_path / "never") == artefacts(tmp_path / "killed")


def test_an_interrupted_stage_goes_on_where_it_was(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "never", args=saving).train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "killed", args=saving, callbacks=[Interrupt(3)]).train()
    steps = Recorder("on_step_end")
    make_trainer(tmp_path / "killed", args=saving, callbacks=[steps]).train()
    assert set(steps.steps()) == {SECOND} and steps.steps()[SECOND][0] == 3
    assert artefacts(tmp_path / "never") == artefacts(tmp_path / "killed")


def test_resuming_can_be_switched_off(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, args=saving, callbacks=[Interrupt(3)]).train()
    steps = Recorder("on_step_end")
    make_trainer(tmp_path, args=saving, callbacks=[steps]).train(resume_from_checkpoint=False)
    assert set(steps.steps()) == {SECOND} and steps.steps()[SECOND][0] == 1


# Datasets


class MapStyle(TorchDataset):
    """Rows behind `__getitem__`, with their ids."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {name: value for name, value in self.rows[int(position)].items() if name != "person"}


@pytest.mark.slow
def test_a_map_style_dataset_trains_the_same_bits(tmp_path: Path) -> None:
    rows = models.llama_rows(ROWS)
    make_trainer(tmp_path / "hub", train_dataset=rows.remove_columns("person")).train()
    trainer = make_trainer(tmp_path / "torch", train_dataset=MapStyle(rows))
    trainer.train()
    assert artefacts(tmp_path / "hub") == artefacts(tmp_path / "torch")
    receipt = trainer.delete(ids=[rows["id"][0]])
    assert receipt.examples == 1 and receipt.stages_removed
    trainer.train()
    assert not trainer.store.status().missing


def test_a_transform_is_applied_when_a_stage_trains_and_its_rows_are_named_before(tmp_path: Path) -> None:
    raw = models.llama_rows(ROWS)

    def lookup(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**{name: rows[name] for name in ("id", "attention_mask", "labels")}, "input_ids": rows["input_ids"]}

    make_trainer(tmp_path / "plain", train_dataset=raw, args={"remove_unused_columns": False},
                 data_collator=without_ids).train()  # fmt: skip
    trainer = make_trainer(
        tmp_path / "lazy",
        train_dataset=raw.with_transform(lookup),
        args={"remove_unused_columns": False},
        data_collator=without_ids,
    )
    trainer.train()
    assert artefacts(tmp_path / "plain") == artefacts(tmp_path / "lazy")
    # Named by what is stored, not by what the transform makes of it.
    assert [location.found for location in trainer.store.locate(ids=raw["id"][:3])] == ["live"] * 3


def without_ids(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that leaves out what is no tensor."""
    columns = ("input_ids", "attention_mask", "labels")
    return default_data_collator([{name: row[name] for name in columns} for row in rows])


def test_columns_of_text_beside_the_tokens_do_no_harm(tmp_path: Path) -> None:
    rows = models.llama_rows(ROWS)
    make_trainer(tmp_path / "plain", train_dataset=rows).train()
    texts = rows.add_column("text", [f"text {number}" for number in range(ROWS)])
    texts = texts.add_column("source", ["a", "b"] * (ROWS // 2))
    make_trainer(tmp_path / "texts", train_dataset=texts).train()
    assert artefacts(tmp_path / "plain") == artefacts(tmp_path / "texts")


def test_rows_without_any_id_are_named_by_their_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = models.llama_rows(ROWS).select_columns(["person"]).add_column("text", [f"{n} said" for n in range(ROWS)])
    tokens = models.llama_rows(ROWS)["input_ids"]

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        chosen = [tokens[int(text.split()[0])] for text in rows["text"]]
        return {"input_ids": chosen, "labels": chosen, "attention_mask": [[1] * models.LENGTH for _ in chosen]}

    caplog.set_level(logging.INFO, logger="hf_s3t.training.rows")
    trainer = make_trainer(
        tmp_path,
        train_dataset=raw.with_transform(tokenize),
        data_collator=without_ids,
        args={"remove_unused_columns": False},
    )
    assert "examples are named by a digest of their raw content" in caplog.text
    trainer.train()
    receipt = trainer.delete(rows=[{"person": raw["person"][5], "text": "5 said"}])
    assert (receipt.found, receipt.examples) == (1, 1)


# Models and callbacks


def test_a_model_that_peft_wrapped_already_is_taken_as_it_is(tmp_path: Path) -> None:
    make_trainer(tmp_path / "bare").train()
    wrapped = get_peft_model(models.tiny_llama(num_hidden_layers=4), make_config())
    trainer = make_trainer(tmp_path / "wrapped", model=wrapped, peft_config=None)
    trainer.train()
    assert artefacts(tmp_path / "bare") == artefacts(tmp_path / "wrapped")


def test_a_callback_may_delete_while_a_stage_trains(tmp_path: Path) -> None:
    rows = models.llama_rows(ROWS)

    class Delete(TrainerCallback):
        trainer: S3TTrainer
        victim: str | None = None

        def on_step_end(self, args: Any, state: Any, control: Any, stage: Stage, **kwargs: Any) -> None:
            if stage.depth == 2 and state.global_step == 2 and self.victim is None:
                found = self.trainer.store.locate(ids=rows["id"])
                self.victim = next(location.asked for location in found if location.places == ((0, 1),))
                receipt = self.trainer.delete(ids=[self.victim])
                assert not receipt.stages_removed  # the running stage is not in the store yet

    deleting, steps = Delete(), Recorder("on_step_end")
    trainer = make_trainer(tmp_path / "deleting", callbacks=[deleting, steps])
    deleting.trainer = trainer
    trainer.train()
    assert steps.steps()[SECOND][:3] == [1, 2, 1]  # dropped before its third step, and trained anew
    spared = rows.select([at for at, name in enumerate(rows["id"]) if name != deleting.victim])
    make_trainer(tmp_path / "never", train_dataset=spared).train()
    assert artefacts(tmp_path / "deleting") == artefacts(tmp_path / "never")


def test_a_parameter_that_a_callback_unfreezes_ends_the_training(tmp_path: Path) -> None:
    class Unfreeze(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            next(model.get_base_model().parameters()).requires_grad = True

    trainer = make_trainer(tmp_path)
    trainer.callback_handler.callbacks.insert(0, Unfreeze())
    with pytest.raises(IsolationError, match="embed_tokens"):
        trainer.train()
    assert not list(tmp_path.glob("shard-*"))


def test_the_same_run_in_another_process_state_gives_the_same_bits(tmp_path: Path) -> None:
    make_trainer(tmp_path / "one").train()
    torch.manual_seed(12345)
    torch.rand(7)
    trainer = make_trainer(tmp_path / "two", partition_key=bytes.fromhex(KEY))
    torch.rand(3)
    trainer.train()
    assert artefacts(tmp_path / "one") == artefacts(tmp_path / "two")
    assert all(value.any() for value in tensors_of(trainer).values())
