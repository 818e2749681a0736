"""An evaluation set that chooses what is kept of a stage holds nobody who may be deleted, or the config says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import concatenate_datasets
from transformers import EarlyStoppingCallback, Trainer, default_data_collator

import models
from hf_s3t import DatasetError, RecipeError, S3TMixin, S3TStore, S3TTrainer
from hf_s3t.data_derived import TRAIN_SET
from trainers import ROWS, make_trainer

HELD_OUT = models.llama_rows(ROWS + 4).select(range(ROWS, ROWS + 4))
ALL = models.llama_rows(ROWS)
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
BEST = {
    "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
    "save_steps": 1, "max_steps": 1, "metric_for_best_model": "loss",
}  # fmt: skip


def steered(path: Path, evaluated: Any, args: dict[str, Any] = PLATEAU, **given: Any) -> S3TTrainer:
    return make_trainer(path, eval_dataset=evaluated, args=args, **given)


def with_one_of(rows: Any, number: int = 0) -> Any:
    return concatenate_datasets([HELD_OUT, rows.select([number])])


@pytest.mark.parametrize(
    "given",
    [
        {"args": PLATEAU},
        {"args": BEST},
        {"args": BEST, "callbacks": [EarlyStoppingCallback(2)]},
    ],
    ids=["schedule", "best", "stopping"],
)
def test_an_evaluation_that_steers_holds_no_row_of_the_train_set(tmp_path: Path, given: dict[str, Any]) -> None:
    trainer = steered(tmp_path, with_one_of(ALL), **given)
    with pytest.raises(DatasetError, match=r"holds 1 examples of the train set.*'evaluation': 'train set'"):
        trainer.train()
    assert not trainer.store.exists


@pytest.mark.parametrize(
    "sets",
    [
        {"a": HELD_OUT, "b": with_one_of(ALL)},
        with_one_of(ALL).to_iterable_dataset(),
        [dict(row) for row in with_one_of(ALL)],
    ],
    ids=["several", "stream", "list"],
)
def test_in_whatever_form_it_is_given(tmp_path: Path, sets: Any) -> None:
    with pytest.raises(DatasetError, match="holds 1 examples of the train set"):
        steered(tmp_path, sets).train()


def test_a_person_counts_whatever_the_row(tmp_path: Path) -> None:
    group = {"config": {"group_column": "person"}}
    other = models.llama_rows(4, seed=7)  # other rows of the same persons
    with pytest.raises(DatasetError, match="holds 4 examples of the train set"):
        steered(tmp_path / "people", other, **group).train()
    steered(tmp_path / "rows", other).train()  # the store knows no persons
    assert S3TStore(tmp_path / "rows").exists


def of_tokens(rows: list[dict[str, Any]]) -> Any:
    return default_data_collator([{"input_ids": row["tokens"], "labels": row["tokens"]} for row in rows])


def test_rows_that_are_named_by_their_content_are_known_by_it(tmp_path: Path) -> None:
    def unnamed(rows: Any) -> Any:
        return rows.select_columns("input_ids").rename_column("input_ids", "tokens")

    given = {"args": PLATEAU | {"remove_unused_columns": False}, "data_collator": of_tokens}
    with pytest.raises(DatasetError, match="holds 1 examples of the train set"):
        steered(tmp_path, unnamed(with_one_of(ALL)), train_dataset=unnamed(ALL), **given).train()
    steered(tmp_path, unnamed(HELD_OUT), train_dataset=unnamed(ALL), **given).train()


class Preparing(Trainer):
    """Takes off what no batch has, as subclasses do."""

    def __init__(self, *args: Any, eval_dataset: Any = None, **kwargs: Any):
        super().__init__(*args, eval_dataset=eval_dataset.remove_columns("id"), **kwargs)


class S3TPreparing(S3TMixin, Preparing):
    pass


def test_rows_are_known_by_what_they_were_when_they_were_given(tmp_path: Path) -> None:
    trainer = steered(tmp_path, with_one_of(ALL), trainer_class=S3TPreparing)  # type: ignore[arg-type]
    assert "id" not in trainer.eval_dataset.column_names
    with pytest.raises(DatasetError, match="holds 1 examples of the train set"):
        trainer.train()


def test_an_evaluation_set_that_was_set_later_is_looked_at(tmp_path: Path) -> None:
    trainer = steered(tmp_path, HELD_OUT)
    trainer.eval_dataset = with_one_of(ALL)
    with pytest.raises(DatasetError, match="holds 1 examples of the train set"):
        trainer.train()


def test_what_only_looks_may_look_at_anything(tmp_path: Path) -> None:
    looking = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    steered(tmp_path, with_one_of(ALL), args=looking).train()
    assert S3TStore(tmp_path).manifest().stages


def correct(found: Any) -> dict[str, float]:
    return {"right": 1.0}


def test_what_computes_the_metric_that_decides_is_in_the_recipe(tmp_path: Path) -> None:
    args = PLATEAU | {"metric_for_best_model": "right"}
    recipe = steered(tmp_path, HELD_OUT, args=args, compute_metrics=correct).recipe()
    assert recipe["metrics"]["code"] == ["correct", None]
    assert steered(tmp_path, HELD_OUT, compute_metrics=correct).recipe()["metrics"] is None


def test_rows_without_a_name_are_nobodys(tmp_path: Path) -> None:
    steered(tmp_path, with_one_of(ALL).remove_columns("id")).train()
    assert S3TStore(tmp_path).manifest().stages


def test_deleted_examples_are_refused_whatever_the_config_says(tmp_path: Path) -> None:
    named = {"config": {"data_derived": {"evaluation": TRAIN_SET}}}
    evaluated, path = with_one_of(ALL), tmp_path / "out"
    steered(path, evaluated, **named).train()
    store = S3TStore(path)
    limits = " ".join(store.delete(ids=[ALL["id"][0]]).limits)
    assert "Evaluation: computed from the whole train set" in limits and "An evaluation set chose" in limits
    before = store.manifest()
    with pytest.raises(DatasetError, match="holds 1 deleted examples, by id or group.*accept_recipe"):
        steered(path, evaluated, missing="delete", **named).train()
    assert store.manifest() == before
    with pytest.raises(RecipeError, match=r"steering\.evaluation\.: "):
        steered(path, HELD_OUT).train()
    steered(path, HELD_OUT, accept_recipe=["steering.evaluation."]).train()
    assert not store.status().missing and store.manifest().accepted
    assert store.manifest().recipe["data_derived"] == {"evaluation": TRAIN_SET}


def test_a_word_of_an_earlier_run_counts(tmp_path: Path) -> None:
    steered(tmp_path, with_one_of(ALL), config={"data_derived": {"evaluation": TRAIN_SET}}).train()
    trained = S3TStore(tmp_path).manifest()
    steered(tmp_path, with_one_of(ALL)).train()
    assert S3TStore(tmp_path).manifest() == trained
