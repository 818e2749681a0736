"""What a training carries along that may have been computed from rows: it is asked about once, and then named."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    ViTImageProcessor,
    default_data_collator,
)

import models
from hf_s3t import S3TStore, S3TTrainer
from hf_s3t.data_derived import TRAIN_SET
from hf_s3t.store.receipts import LIMITS
from hf_s3t.training.carried_along import ask, holds_numbers, questions
from trainers import ROWS, artefacts, make_trainer

BASE = Path(__file__).parents[2] / "recipes/demo/base"
ASKED = "What was this computed from: "


def weighted(outputs: Any, labels: Any, num_items_in_batch: Any = None, weights: Any = None) -> torch.Tensor:
    return outputs.loss


PATCHES = {"target_modules": ["q_proj"], "task_type": None, "modules_to_save": ["classifier"]}


class Weighted(S3TTrainer):
    """Has a loss of its own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class Scaling:
    """A collator that divides by what it was given."""

    def __init__(self, scale: Any):
        self.scale = scale

    def __call__(self, rows: list[Any]) -> Any:
        return default_data_collator(rows)


class Padding(DataCollatorForLanguageModeling):
    """A collator that adds nothing to a library's."""


def closing_over(value: Any) -> Any:
    return lambda rows: (rows, value)


@pytest.mark.parametrize(
    "thing",
    [
        partial(weighted, weights=torch.ones(2)),
        partial(weighted, weights=np.ones(2)),
        partial(weighted, weights=[1, 2]),
        partial(partial(weighted, weights=0.5)),
        closing_over({"a": 3}),
        closing_over(partial(weighted, weights=0.5)),
        closing_over(closing_over((1, 2))),
        Scaling(0.5),
        Scaling(torch.ones(1)),
        Scaling({"label": {"a": 0}}),
        Scaling(0.5).__call__,
        lambda rows, mean=0.5: rows,
    ],
    ids=range(12),
)
def test_numbers_that_something_holds_are_seen(thing: Any) -> None:
    assert holds_numbers(thing)


@pytest.mark.parametrize(
    "thing",
    [weighted, partial(weighted, weights=None), closing_over("text"), closing_over(8), Scaling(8), Scaling("max"),
     Scaling(["a", "b"]), Scaling(True), Scaling(torch.nn.Linear(1, 1)), default_data_collator, None],
    ids=range(11),
)  # fmt: skip
def test_what_holds_none_is_not_asked_about(thing: Any) -> None:
    assert not holds_numbers(thing)


def asked(path: Path, **given: Any) -> dict[str, str]:
    return questions(make_trainer(path, **given))


def test_a_plain_training_is_asked_nothing(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for kind in (DataCollatorForLanguageModeling, Padding):
        assert asked(tmp_path, data_collator=kind(tokenizer, mlm=False)) == {}


def test_a_loss_of_ones_own_is_asked_about(tmp_path: Path) -> None:
    assert asked(tmp_path, compute_loss_func=weighted) == {"loss": "`compute_loss_func` is `weighted`"}
    assert "`weighted`" in asked(tmp_path, compute_loss_func=partial(weighted, weights=[1.0]))["loss"]
    assert asked(tmp_path, trainer_class=Weighted) == {"loss": "`Weighted` has a `compute_loss` of its own"}


def test_a_collator_that_holds_numbers_is_asked_about(tmp_path: Path) -> None:
    assert asked(tmp_path, data_collator=Scaling(0.5)) == {"collator": "`Scaling` holds numbers"}
    assert asked(tmp_path, data_collator=Scaling(8)) == {}
    given = partial(default_data_collator, return_tensors="pt")
    assert asked(tmp_path, data_collator=given) == {}


def test_a_transform_is_asked_about(tmp_path: Path) -> None:
    def scaled(batch: Any) -> Any:
        return batch

    rows = models.llama_rows(ROWS)
    assert "scaled` prepares each row" in asked(tmp_path, train_dataset=rows.with_transform(scaled))["transform"]
    assert asked(tmp_path, train_dataset=rows.with_format("torch")) == {}
    listed: Any = [dict(row) for row in rows]
    of_torch = type("Rows", (list,), {"transform": staticmethod(scaled)})(listed)
    assert "scaled` prepares each row" in asked(tmp_path, train_dataset=of_torch)["transform"]


def with_tokenizer(path: Path, tokenizer: Any) -> dict[str, str]:
    return asked(path, model=AutoModelForCausalLM.from_pretrained(BASE), processing_class=tokenizer)


def test_a_tokenizer_that_is_not_the_bases_is_asked_about(tmp_path: Path) -> None:
    assert with_tokenizer(tmp_path / "out", AutoTokenizer.from_pretrained(BASE)) == {}
    marked = AutoTokenizer.from_pretrained(BASE)
    marked.add_special_tokens({"pad_token": "[A PAD]"})
    assert with_tokenizer(tmp_path / "out", marked) == {}
    grown = AutoTokenizer.from_pretrained(BASE)
    grown.add_tokens(["somebody", "nobody"])
    assert with_tokenizer(tmp_path / "out", grown) == {"tokenizer": "it has 2 tokens that the base's has not"}
    collator = DataCollatorForLanguageModeling(grown, mlm=False)
    found = asked(tmp_path / "out", model=AutoModelForCausalLM.from_pretrained(BASE), data_collator=collator)
    assert found.keys() == {"tokenizer"}
    assert with_tokenizer(tmp_path / "out", SimpleNamespace(tokenizer=grown, to_dict=dict)).keys() == {"tokenizer"}
    for file in BASE.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    rules["model"]["vocab"][-1][1] -= 1.0
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    found = with_tokenizer(tmp_path / "out", AutoTokenizer.from_pretrained(tmp_path))
    assert found == {"tokenizer": "it cuts words otherwise than the base's"}


def test_a_base_without_a_tokenizer_is_no_comparison(tmp_path: Path) -> None:
    models.tiny_bert().save_pretrained(tmp_path / "base")  # of its config alone a tokenizer of five tokens is made
    base = models.tiny_bert()
    base.config.name_or_path = str(tmp_path / "base")
    given = {"base": "bert", "model": base, "processing_class": AutoTokenizer.from_pretrained(BASE)}
    assert asked(tmp_path / "out", **given) == {}


def test_statistics_of_images_that_are_not_the_bases_are_asked_about(tmp_path: Path) -> None:
    ViTImageProcessor().save_pretrained(tmp_path / "base")
    base = models.tiny_vit()
    base.config.name_or_path = str(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", base="bert", model=base, train_dataset=models.vit_rows(4), config=PATCHES)
    for processor, found in (
        (ViTImageProcessor(), {}),
        (ViTImageProcessor(size={"height": 8, "width": 8}), {}),
        (ViTImageProcessor(image_mean=[0.1, 0.2, 0.3]), {"image_processor": "its image_mean are not the base's"}),
        (SimpleNamespace(image_processor=ViTImageProcessor(image_std=[1.0] * 3)),
         {"image_processor": "its image_std are not the base's"}),
    ):  # fmt: skip
        trainer.processing_class = processor
        assert questions(trainer) == found


def test_a_word_answers_its_own_question_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, trainer_class=Weighted, data_collator=Scaling(0.5))
    for named, left in (("loss", "collator"), ("class_weights", "collator"), ("collator", "loss"), ("other", "loss")):
        caplog.clear()
        ask(trainer, SimpleNamespace(recipe={"data_derived": {named: "no data"}}))  # type: ignore[arg-type]
        assert f"{ASKED}{left} (" in caplog.text


def test_one_warning_names_all_and_a_config_that_names_them_is_not_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"trainer_class": Weighted, "data_collator": Scaling(0.5), "args": {"max_steps": 1}}
    make_trainer(tmp_path / "asked", **given).train()
    (line,) = [record.getMessage() for record in caplog.records if ASKED in record.getMessage()]
    assert "loss (`Weighted` has" in line and "; collator (`Scaling` holds numbers)? If from the train set" in line
    assert "S3TConfig(data_derived={'loss': ..., 'collator': ...}), with 'train set' or" in line
    caplog.clear()
    make_trainer(tmp_path / "asked", **given).train()  # nothing is missing
    assert ASKED not in caplog.text
    named = {"class_weights": "public counts", "collator": TRAIN_SET}
    make_trainer(tmp_path / "named", config={"data_derived": named}, **given).train()
    assert ASKED not in caplog.text
    # A word that comes later is taken up, is a limit from then on, and changes no bit.
    assert artefacts(tmp_path / "asked") == artefacts(tmp_path / "named")
    make_trainer(tmp_path / "asked", config={"data_derived": named}, **given).train()
    store, first = S3TStore(tmp_path / "asked"), models.llama_rows(1)["id"][0]
    assert store.manifest().recipe["data_derived"] == named and not store.manifest().accepted
    limits = store.delete(ids=[first]).limits
    assert [line.split(":")[0] for line in limits if line not in LIMITS] == ["Class weights", "Collator"]
    make_trainer(tmp_path / "asked", missing="delete", **given).train()  # repairs, and names nothing
    assert ASKED not in caplog.text and store.manifest().recipe["data_derived"] == named


def test_a_class_that_only_deleted_examples_had_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, args = models.bert_rows(ROWS), {"max_steps": 1}
    make_trainer(tmp_path, base="bert", args=args).train()
    told = "have no example in the train set"
    store = S3TStore(tmp_path)
    last, *others = [name for name, label in zip(rows["id"], rows["labels"], strict=True) if label == 1]
    limits = store.delete(ids=others).limits
    assert "Classes and their names stay, even those that only deleted examples had." in limits
    make_trainer(tmp_path, base="bert", args=args).train()
    assert told not in caplog.text, "one example of it is left"
    store.delete(ids=[last])
    make_trainer(tmp_path, base="bert", args=args).train()
    (line,) = [record.getMessage() for record in caplog.records if told in record.getMessage()]
    assert line.startswith("classes 1 of 3 have no example")
