"""`class S3TSFTTrainer(S3TMixin, SFTTrainer)`: TRL tokenises, filters and checkpoints; the store stays ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_s3t import DatasetError, S3TConfig, S3TMixin, S3TStore, Stage
from stores import records_of
from trainers import KEY, Recorder, artefacts

trl = pytest.importorskip("trl")


class S3TSFTTrainer(S3TMixin, trl.SFTTrainer):
    """Supervised fine-tuning that can forget."""


WORDS = "one day a little girl saw the big red ball and her mom said do not go into the dark park with it".split()
# Of TRL 1.16 and transformers 5.23: the first asks for activation checkpointing by its old name unless it is named.
BRIEF = {
    "num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 64, "report_to": [],
    "save_strategy": "steps", "save_steps": 2, "logging_steps": 1000, "disable_tqdm": True, "use_cpu": True,
    "activation_checkpointing": False,
}  # fmt: skip


def texts(count: int = 24) -> Dataset:
    """Rows of raw text with an id."""
    rows = [
        " ".join(WORDS[(3 * row + step * (row % 5 + 1)) % len(WORDS)] for step in range(12)) for row in range(count)
    ]
    return Dataset.from_list([{"id": f"row-{row}", "text": text} for row, text in enumerate(rows)])


@pytest.fixture
def make(shared_data: Path) -> Any:
    """Makes a trainer of the small pretrained Llama: two stages, unless `config` says otherwise."""
    folder = shared_data / "llama_stories260k"

    def make_sft(path: Path, rows: Any = None, config: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        args = trl.SFTConfig(str(path), **BRIEF | kwargs.pop("args", {}))
        fields = {"num_slices": 2, "budget": 1, "target_modules": ["q_proj", "down_proj"], "r": 2}
        return kwargs.pop("trainer_class", S3TSFTTrainer)(
            model=AutoModelForCausalLM.from_pretrained(folder),
            args=args,
            processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=texts() if rows is None else rows,
            peft_config=S3TConfig(task_type="CAUSAL_LM", **fields | (config or {})),
            partition_key=KEY,
            **kwargs,
        )

    return make_sft


def test_raw_text_is_trained_deleted_and_repaired(tmp_path: Path, make: Any) -> None:
    trainer = make(tmp_path / "store")
    trainer.train()
    assert {path.name for path in (tmp_path / "store").glob("shard-00/*")} == {"0", "0-1"}
    whole = artefacts(tmp_path / "store")
    victim = next(where.asked for where in trainer.store.locate(ids=texts()["id"]) if where.places == ((0, 1),))
    receipt = trainer.delete(ids=[victim])
    assert list(receipt.stages_removed) == ["shard-00/0-1"]
    trainer.train()
    repaired = artefacts(tmp_path / "store")
    assert repaired != whole

    spared = texts().filter(lambda row: row["id"] != victim, keep_in_memory=True)
    make(tmp_path / "scratch", spared).train()
    assert artefacts(tmp_path / "scratch") == repaired
    make(tmp_path / "store").train()  # handed in again, and not trained on
    assert artefacts(tmp_path / "store") == repaired


def test_the_trunk_is_run_once(tmp_path: Path, make: Any) -> None:
    """Rows of several lengths, padded by TRL's collator."""
    rows = texts().map(lambda row, at: {"text": row["text"][: 20 + 2 * at]}, with_indices=True, keep_in_memory=True)
    stages = {}
    for cache in ("off", "disk"):
        trainer = make(tmp_path / cache, rows, activation_cache=cache, args={"bf16": False})
        trainer.train()
        stages[cache] = trainer.store.read_stage(Stage(0, (0,))).tensors
    torch.testing.assert_close(stages["disk"], stages["off"], rtol=1e-3, atol=1e-4)
    assert len(list((tmp_path / "disk/.s3t/activations").iterdir())) > 0
    with pytest.raises(ValueError, match="`padding_free=True`: it joins the rows of a batch"):
        make(tmp_path / "free", rows, activation_cache="disk", args={"padding_free": True})


def test_the_card_is_the_stores_own(tmp_path: Path, make: Any) -> None:
    cards = []

    class Cards(Recorder):
        def on_save(self, *args: Any, **kwargs: Any) -> None:
            cards.extend(path.read_text() for path in tmp_path.rglob("README.md"))

    trainer = make(tmp_path, callbacks=[Cards()])
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft") and "An adapter that can forget" in card
    trainer.create_model_card()
    trainer.save_model()
    assert (tmp_path / "README.md").read_text() == card
    assert not any("TRL" in text or "sft" in text for text in [*cards, card])
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {".s3t", "README.md", "s3t.json", "adapter_config.json", "adapter_model.safetensors", "shard-00"}


def test_rows_that_trl_drops_are_known_and_untrained(tmp_path: Path, make: Any, caplog: Any) -> None:
    class Dropping(trl.SFTTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            kept = dataset.filter(lambda row: row["id"] not in ("row-3", "row-8"), keep_in_memory=True)
            return super()._prepare_dataset(kept, *args, **kwargs)

    class S3TDropping(S3TMixin, Dropping): ...

    trainer = make(tmp_path / "dropping", trainer_class=S3TDropping)
    trainer.train()
    assert "2 rows were dropped in the preparation" in caplog.text
    trained = {name: record["examples"] for name, record in records_of(trainer.store).items()}
    assert trained["shard-00/0-1"] == 22
    assert [where.found for where in trainer.store.locate(ids=["row-3", "row-8"])] == ["live"] * 2
    others = texts().filter(lambda row: row["id"] not in ("row-3", "row-8"), keep_in_memory=True)
    make(tmp_path / "without", others).train()
    assert artefacts(tmp_path / "dropping") == artefacts(tmp_path / "without")


@pytest.mark.slow
def test_prompts_and_completions(tmp_path: Path, make: Any) -> None:
    """Only completions carry a loss; TRL's own collator makes the batches, and resuming keeps the bits."""
    rows = texts()
    pairs = Dataset.from_list(
        [{"id": row["id"], "prompt": row["text"][:20], "completion": row["text"][20:]} for row in rows]
    )
    make(tmp_path / "never", pairs).train()

    class Interrupt(Recorder):
        def on_step_end(self, args: Any, state: Any, control: Any, stage: Any = None, **kwargs: Any) -> None:
            if (stage.depth, state.global_step) == (2, 3):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed", pairs, callbacks=[Interrupt()]).train()
    steps = Recorder("on_step_end")
    make(tmp_path / "killed", pairs, callbacks=[steps]).train()
    assert set(steps.steps()) == {"shard-00/0-1"} and steps.steps()["shard-00/0-1"][0] == 3
    assert artefacts(tmp_path / "never") == artefacts(tmp_path / "killed")


@pytest.mark.slow
def test_several_shards_evaluate_as_an_ensemble(tmp_path: Path, make: Any) -> None:
    held_out = Dataset.from_list([{"text": text} for text in texts(28)["text"][24:]])  # one batch
    args = {"bf16": False, "per_device_eval_batch_size": 4}
    trainer = make(tmp_path / "store", config={"num_shards": 2}, eval_dataset=held_out, args=args)
    trainer.train()
    (inputs,) = trainer.get_eval_dataloader()
    labels = inputs.pop("labels")[:, 1:]

    def check() -> float:
        base = AutoModelForCausalLM.from_pretrained
        parts = []
        for name in trainer.store.live().to_json()["served"]:
            trainer.store.export(tmp_path / name, prefix=name)
            model = PeftModel.from_pretrained(base(trainer.model.config._name_or_path), tmp_path / name).eval()
            with torch.no_grad():
                parts.append(model(**inputs).logits[:, :-1].softmax(-1))
        mean, kept = torch.stack(parts).mean(0), labels != -100
        metrics = trainer.evaluate()
        loss = torch.nn.functional.nll_loss(mean[kept].log(), labels[kept]).item()
        assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
        logged = next(logs for logs in reversed(trainer.state.log_history) if "eval_mean_token_accuracy" in logs)
        right = (mean[kept].argmax(-1) == labels[kept]).float().mean().item()
        assert logged["eval_mean_token_accuracy"] == pytest.approx(right)
        entropy = -(mean[kept] * mean[kept].log()).sum(-1).mean().item()
        assert logged["eval_entropy"] == pytest.approx(entropy, rel=1e-4)
        return loss

    together = check()
    trainer.delete(slices=[(1, 0)])
    assert check() != together


def test_packing_is_refused(tmp_path: Path, make: Any) -> None:
    with pytest.raises(ValueError, match=r"does not work with `packing=True`: .* set `packing=False`"):
        make(tmp_path, args={"packing": True})
    assert not list(tmp_path.iterdir())
    assert not S3TStore(tmp_path).exists


# Preferences: a reference model, and rows that other rows are mixed into


class S3TDPOTrainer(S3TMixin, trl.DPOTrainer):
    """Preference optimisation that can forget; the reference is the model without its adapter."""


class S3TKTOTrainer(S3TMixin, trl.KTOTrainer):
    """Its loss compares completions with those of other rows."""


def preferences(count: int = 24) -> Dataset:
    """Prompts with a better and a worse completion."""
    rows = texts(count)["text"]
    pairs = [(text[:20], text[20:], text[20:][::-1]) for text in rows]
    return Dataset.from_list([
        {"id": f"row-{row}", "prompt": prompt, "chosen": chosen, "rejected": rejected}
        for row, (prompt, chosen, rejected) in enumerate(pairs)
    ])  # fmt: skip


@pytest.fixture
def make_dpo(shared_data: Path) -> Any:
    """Makes a DPO trainer of the small pretrained Llama."""
    folder = shared_data / "llama_stories260k"

    def make(path: Path, rows: Any = None, config: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        args = trl.DPOConfig(str(path), **BRIEF | kwargs.pop("args", {}))
        fields = {"num_slices": 2, "target_modules": ["q_proj", "down_proj"], "r": 2, "lora_dropout": 0.1}
        return S3TDPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder),
            args=args,
            processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=preferences() if rows is None else rows,
            peft_config=S3TConfig(task_type="CAUSAL_LM", **fields | (config or {})),
            partition_key=KEY,
            **kwargs,
        )

    return make


class Stop(TrainerCallback):
    """A crash in the second stage."""

    def on_step_end(self, args: Any, state: Any, control: Any, stage: Stage, **kwargs: Any) -> None:
        if stage.depth == 2 and state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("default:.*is deprecated and will be removed:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_preferences_are_trained_resumed_deleted_and_repaired(
    tmp_path: Path, make_dpo: Any, checkpointing: bool
) -> None:
    args = {"activation_checkpointing": checkpointing}
    make_dpo(tmp_path / "never", args=args).train()
    with pytest.raises(KeyboardInterrupt):
        make_dpo(tmp_path / "out", args=args, callbacks=[Stop()]).train()
    trainer = make_dpo(tmp_path / "out", args=args)
    trainer.train()
    assert artefacts(tmp_path / "out") == artefacts(tmp_path / "never")
    trainer.delete(ids=["row-3"])
    rest = preferences().filter(lambda row: row["id"] != "row-3", keep_in_memory=True)
    make_dpo(tmp_path / "out", rows=rest, args=args).train()
    make_dpo(tmp_path / "scratch", rows=rest, args=args).train()
    assert artefacts(tmp_path / "out") == artefacts(tmp_path / "scratch")


def test_preferences_of_several_shards_are_evaluated_one_by_one(
    tmp_path: Path, make_dpo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_dpo(tmp_path / "out", config={"num_shards": 2}, eval_dataset=preferences(4))
    trainer.train()
    found = trainer.evaluate()
    assert "evaluates each shard by itself" in caplog.text
    apart = []
    for name in trainer.store.live().to_json()["served"]:
        trainer.tuner.activate(name.split("/")[0])
        apart.append(trl.DPOTrainer.evaluate(trainer)["eval_loss"])  # TRL's own, of the adapter that is active
    assert found["eval_loss"] == pytest.approx(sum(apart) / len(apart), rel=1e-5)


def test_a_preparation_that_mixes_rows_is_refused(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "llama_stories260k"
    rows = [{"id": f"row-{row}", "prompt": text[:20], "completion": text[20:], "label": row % 2 == 0}
            for row, text in enumerate(texts()["text"])]  # fmt: skip
    with pytest.raises(DatasetError, match="add_kl_completion_ids` prepares a row otherwise alone"):
        S3TKTOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder),
            args=trl.KTOConfig(str(tmp_path / "out"), **BRIEF),
            processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=Dataset.from_list(rows),
            peft_config=S3TConfig(task_type="CAUSAL_LM", num_slices=2, target_modules=["q_proj"], r=2),
            partition_key=KEY,
        )
    assert not (tmp_path / "out/s3t.json").exists()
