"""What a trainer answers with after training and after a deletion, and what it saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

import models
from hf_s3t import S3TStore, StoreError
from trainers import BASES, batch, logits, make_trainer, plain_member

HELD_OUT = {"llama": models.llama_rows(12, seed=1), "bert": models.bert_rows(12, seed=1)}
BASE_NAMES = pytest.mark.parametrize("base", ["llama", "bert"])


def shifted_loss(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss of probabilities: of the next token where labels are sequences."""
    if labels.dim() == 2:
        probabilities, labels = probabilities[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(probabilities.log(), labels)


def test_metrics_that_fail_do_not_end_the_ensemble(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def metrics(prediction: Any) -> dict[str, float]:
        if broken:
            raise ValueError("no such metric")
        return {"mean": float(prediction.predictions.mean())}

    broken = False
    trainer = make_trainer(tmp_path, base="bert", config={"num_shards": 2}, compute_metrics=metrics)
    trainer.train()
    expected = trainer.evaluate(HELD_OUT["bert"])["eval_mean"]
    broken = True
    with pytest.raises(ValueError, match="no such metric"):
        trainer.evaluate(HELD_OUT["bert"])
    broken = False
    assert trainer.evaluate(HELD_OUT["bert"])["eval_mean"] == expected
    assert "one by one" not in caplog.text


# One shard


@pytest.mark.brief("bert")
@BASE_NAMES
def test_one_shard_is_served_as_its_root_adapter(tmp_path: Path, base: str) -> None:
    trainer = make_trainer(tmp_path / "store", base=base, config={"budget": 2})
    rows, inputs = HELD_OUT[base], batch(HELD_OUT[base], 12)
    untrained = logits(BASES[base][0](), inputs)

    def check() -> None:
        served = PeftModel.from_pretrained(BASES[base][0](), tmp_path / "store")
        expected = logits(served, inputs)
        assert not torch.equal(expected, untrained)
        assert torch.equal(logits(trainer.model, inputs), expected)
        loss = shifted_loss(expected.softmax(-1), inputs["labels"]).item()
        for _ in range(2):  # the same before and after an evaluation
            assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(loss, rel=1e-5)
        prediction = trainer.predict(rows)
        torch.testing.assert_close(torch.tensor(prediction.predictions), expected)
        assert torch.equal(logits(trainer.model, inputs), expected)

    trainer.train()
    assert trainer.store.served() == {0: (0, 1)}
    check()
    trainer.delete(slices=[(0, 1)])
    assert trainer.store.served() == {0: (0,)}
    check()
    trainer.delete(slices=[(0, 0)])
    assert trainer.store.served() == {}
    assert torch.equal(logits(trainer.model, inputs), logits(BASES[base][0](), inputs))


def test_a_dry_run_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    inputs = batch(HELD_OUT["llama"])
    before = logits(trainer.model, inputs)
    receipt = trainer.delete(slices=[(0, 0)], dry_run=True)
    assert receipt.status == "dry run" and receipt.stages_removed
    assert torch.equal(logits(trainer.model, inputs), before)


def test_a_deletion_by_another_process_is_seen_after_the_next_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    S3TStore(tmp_path).delete(slices=[(0, 1)])
    trainer.train()
    inputs = batch(HELD_OUT["llama"])
    expected = logits(PeftModel.from_pretrained(BASES["llama"][0](), tmp_path), inputs)
    assert torch.equal(logits(trainer.model, inputs), expected)


# Several shards


@pytest.mark.brief("bert")
@BASE_NAMES
def test_several_shards_are_served_as_the_average_of_their_probabilities(tmp_path: Path, base: str) -> None:
    trainer = make_trainer(tmp_path / "store", base=base, config={"num_shards": 3})
    trainer.train()
    rows, inputs = HELD_OUT[base], batch(HELD_OUT[base], 12)

    def check(served: list[str]) -> None:
        members = [logits(plain_member(base, trainer, tmp_path / name, prefix=name), inputs) for name in served]
        mean = torch.stack([member.softmax(-1) for member in members]).mean(0)
        assert torch.equal(logits(trainer.model, inputs), members[0])  # the first live shard's
        loss = shifted_loss(mean, inputs["labels"]).item()
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(loss, rel=1e-5)
        prediction = trainer.predict(rows)
        torch.testing.assert_close(torch.tensor(prediction.predictions).softmax(-1), mean)
        assert prediction.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)
        assert torch.equal(logits(trainer.model, inputs), members[0])  # and still after an evaluation
        assert not torch.allclose(members[0].softmax(-1), mean, atol=1e-3)

    check(["shard-00/0-1", "shard-01/0-1", "shard-02/0-1"])
    trainer.delete(slices=[(0, 0), (1, 1)])
    check(["shard-01/0", "shard-02/0-1"])


def test_metrics_are_computed_from_the_ensemble(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(torch.tensor(prediction.predictions))
        return {"mean": float(prediction.predictions.mean())}

    trainer = make_trainer(tmp_path / "store", base="bert", config={"num_shards": 2}, compute_metrics=metrics)
    trainer.train()
    result = trainer.evaluate(HELD_OUT["bert"])
    inputs = batch(HELD_OUT["bert"], 12)
    members = [
        logits(plain_member("bert", trainer, tmp_path / str(shard), f"shard-0{shard}/0-1"), inputs) for shard in (0, 1)
    ]
    mean = torch.stack([member.softmax(-1) for member in members]).mean(0)
    torch.testing.assert_close(seen[-1].softmax(-1), mean)
    assert result["eval_mean"] == pytest.approx(mean.log().mean().item(), rel=1e-4)


# Saving


@pytest.mark.brief("bert")
@BASE_NAMES
def test_save_model_writes_what_export_writes(tmp_path: Path, base: str) -> None:
    trainer = make_trainer(tmp_path / "store", base=base)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    S3TStore(tmp_path / "store").export(tmp_path / "exported")
    names = ("adapter_config.json", "adapter_model.safetensors")
    for name in names:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes()
    assert json.loads((tmp_path / "saved" / names[0]).read_text())["peft_type"] == "LORA"
    saved = PeftModel.from_pretrained(BASES[base][0](), tmp_path / "saved")
    inputs = batch(HELD_OUT[base])
    assert torch.equal(logits(saved, inputs), logits(trainer.model, inputs))
    receipt = trainer.delete(slices=[(0, 0)])
    assert sorted(receipt.exports) == sorted(str(tmp_path / name) for name in ("saved", "exported"))


def test_save_model_into_the_store_changes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trainer.save_model()
    trainer.create_model_card()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(StoreError, match="lies inside the store"):
        trainer.save_model(str(tmp_path / "inside"))


def test_heads_of_several_shards_have_no_single_adapter(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "store", base="bert", config={"num_shards": 2})
    trainer.train()
    assert not (tmp_path / "store/adapter_model.safetensors").exists()
    with pytest.raises(StoreError, match="several live shards with heads have no single adapter"):
        trainer.save_model(str(tmp_path / "saved"))


# Before any training


def test_an_untrained_trainer_serves_the_base_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    rows, inputs = HELD_OUT["llama"], batch(HELD_OUT["llama"], 12)
    expected = logits(BASES["llama"][0](), inputs)
    assert torch.equal(logits(trainer.model, inputs), expected)
    loss = shifted_loss(expected.softmax(-1), inputs["labels"]).item()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_trained_store_is_served_by_a_new_trainer_without_rows(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, config={"num_shards": 2})
    first.train()
    expected = first.evaluate(HELD_OUT["llama"])["eval_loss"]
    second = make_trainer(tmp_path, config={"num_shards": 2}, train_dataset=None)
    assert second.evaluate(HELD_OUT["llama"])["eval_loss"] == expected
    with pytest.raises(ValueError, match="needs a `train_dataset`"):
        second.train()
