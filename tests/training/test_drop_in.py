"""A script that makes a Trainer makes an S3TTrainer by the same line: arguments by position are the Trainer's."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, default_data_collator
from trl import DPOTrainer, SFTTrainer

import models
from hf_s3t import S3TMixin, S3TTrainer
from trainers import BASES, make_args, make_config, make_trainer

OURS = {"peft_config", "partition_key", "missing", "activation_cache"}


class Weighted(Trainer):
    """As people write one: it passes on what it does not know."""

    def __init__(self, *args: Any, weight: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weight = weight


class S3TWeighted(S3TMixin, Weighted): ...


class S3TSFTTrainer(S3TMixin, SFTTrainer): ...


class S3TDPOTrainer(S3TMixin, DPOTrainer): ...


def names(signature: inspect.Signature, *kinds: Any) -> list[str]:
    return [name for name, parameter in signature.parameters.items() if parameter.kind in kinds]


@pytest.mark.parametrize(
    ("ours", "theirs"), [(S3TTrainer, Trainer), (S3TSFTTrainer, SFTTrainer), (S3TDPOTrainer, DPOTrainer)]
)
def test_arguments_by_position_are_those_of_the_trainer(ours: type, theirs: type) -> None:
    positional, by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    expected = names(inspect.signature(theirs), positional)
    assert names(inspect.signature(ours), positional) == [name for name in expected if name != "peft_config"]
    assert OURS <= {*names(inspect.signature(ours), by_name)}


@pytest.mark.parametrize("ours", [S3TTrainer, S3TWeighted])
def test_every_argument_may_be_given_by_position(ours: type, tmp_path: Path) -> None:
    model, rows, others = BASES["llama"][0](), models.llama_rows(8), models.llama_rows(4, seed=1)
    callback, args = TrainerCallback(), make_args(tmp_path)
    given: dict[str, Any] = {
        "model": model, "args": args, "data_collator": default_data_collator, "train_dataset": rows,
        "eval_dataset": others, "processing_class": None, "model_init": None, "compute_loss_func": None,
        "compute_metrics": lambda prediction: {}, "callbacks": [callback], "optimizers": (None, None),
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}),
        "preprocess_logits_for_metrics": lambda logits, labels: logits,
    }  # fmt: skip
    order = names(inspect.signature(Trainer), inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert {*given} == {*order}
    trainer = ours(*(given[name] for name in order), peft_config=make_config())
    assert (trainer.args, trainer.eval_dataset, trainer.data_collator) == (args, others, default_data_collator)
    assert trainer.compute_metrics is given["compute_metrics"] and callback in trainer.callback_handler.callbacks
    assert trainer.optimizer_cls_and_kwargs == given["optimizer_cls_and_kwargs"]
    assert len(trainer.train_dataset) == 8 and trainer.model.get_base_model() is model


def test_what_is_given_twice_or_beyond_the_last_is_a_type_error(tmp_path: Path) -> None:
    model, rows = BASES["llama"][0](), models.llama_rows(4)
    with pytest.raises(TypeError, match="two values for args: by position and by name"):
        S3TTrainer(model, make_args(tmp_path), args=make_args(tmp_path), peft_config=make_config())
    given = [model, make_args(tmp_path), default_data_collator, rows, *[None] * 9]
    with pytest.raises(TypeError, match=r"Trainer takes 13 arguments by position \(model, .*\), got 14"):
        S3TTrainer(*given, make_config())


def test_a_class_with_a_constructor_of_its_own_shows_that() -> None:
    class Own(S3TTrainer):
        def __init__(self, model: Any, weight: float, **kwargs: Any):
            super().__init__(model, **kwargs)

    assert [*inspect.signature(Own).parameters] == ["model", "weight", "kwargs"]


def test_a_trainer_tells_of_its_store(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", config={"num_slices": 1})
    trainer.train()
    row = models.llama_rows(1)[0]["id"]
    assert trainer.verify().ok and trainer.locate(ids=[row])[0].found == "live"
    done = trainer.export(tmp_path / "adapter", prefix="shard-00/0")
    assert done.stages == ("shard-00/0",) and (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    trainer.delete(ids=[row])
    assert trainer.locate(ids=[row])[0].found == "deleted" and trainer.status().deleted_examples == 1
    assert trainer.status().stale_exports == (str(tmp_path / "adapter"),)
