"""Any Trainer under any settings: repaired is never seen, resumed is never killed, or it is refused at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_trl import BRIEF, S3TDPOTrainer, S3TKTOTrainer, S3TSFTTrainer, preferences, texts
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForTokenClassification,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import models
from hf_s3t import DatasetError, S3TConfig, S3TMixin, S3TStore, S3TTrainer, Stage
from trainers import KEY, artefacts

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.filterwarnings("default:.*is deprecated and will be removed:FutureWarning")

PLAIN = {name: value for name, value in BRIEF.items() if name != "max_length"}


class S3TSeq2SeqTrainer(S3TMixin, Seq2SeqTrainer):
    """Sequences to sequences."""


class S3TRewardTrainer(S3TMixin, trl.RewardTrainer):
    """Which of two completions is better."""


# ---- one maker per trainer: (folder, rows, settings, callbacks) -> a trainer, and its rows ----


def options(settings: dict[str, Any], task: str | None, **fields: Any) -> dict[str, Any]:
    """What all have in common."""
    config = {"num_slices": 2, "num_shards": settings["shards"], "r": 2, "lora_dropout": settings["dropout"]}
    return {"peft_config": S3TConfig(task_type=task, **config | fields), "partition_key": KEY}


def arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """What settings are as TrainingArguments."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 2} if settings["evaluation"] else {}
    return {
        "gradient_accumulation_steps": settings["accumulation"],
        "max_grad_norm": settings["clipping"],
        "activation_checkpointing": settings["checkpointing"],
        "dataloader_num_workers": settings["workers"],
        **evaluation,
    }


def classification(path: Path, rows: Dataset, settings: dict[str, Any], **kwargs: Any) -> Any:
    args = TrainingArguments(str(path), **PLAIN | arguments(settings))
    return S3TTrainer(
        models.tiny_bert(), args, data_collator=default_data_collator, train_dataset=rows,
        eval_dataset=models.bert_rows(28).select(range(24, 28)), **kwargs,
        **options(settings, "SEQ_CLS", target_modules=["query", "output.dense"]),
    )  # fmt: skip


def tokens(count: int = 24) -> Dataset:
    rows = models.bert_rows(count)
    return rows.remove_columns("labels").add_column(
        "labels", [[token % 3 for token in row] for row in rows["input_ids"]]
    )


class Pad:
    """What the collator for tokens needs of a tokenizer: its rows are of one length."""

    padding_side = "right"

    def save_pretrained(self, folder: str) -> None:
        """The Trainer saves it beside every checkpoint."""

    def pad(self, rows: list[dict[str, Any]], **kwargs: Any) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def token_classification(path: Path, rows: Dataset, settings: dict[str, Any], **kwargs: Any) -> Any:
    config = models.tiny_bert().config
    config.num_labels = 3
    torch.manual_seed(0)
    args = TrainingArguments(str(path), **PLAIN | arguments(settings))
    return S3TTrainer(
        BertForTokenClassification(config), args, data_collator=DataCollatorForTokenClassification(Pad()),
        train_dataset=rows, eval_dataset=tokens(28).select(range(24, 28)), **kwargs,
        **options(settings, "TOKEN_CLS", target_modules=["query", "value"]),
    )  # fmt: skip


def seq2seq(path: Path, rows: Dataset, settings: dict[str, Any], **kwargs: Any) -> Any:
    small = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 2, "vocab_size": models.VOCABULARY}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0, dropout_rate=0.1))
    args = Seq2SeqTrainingArguments(str(path), **PLAIN | arguments(settings))
    return S3TSeq2SeqTrainer(
        model, args, data_collator=DataCollatorForSeq2Seq(Pad(), model), train_dataset=rows,
        eval_dataset=models.llama_rows(28).select(range(24, 28)), **kwargs,
        **options(settings, None, target_modules=["EncDecAttention.q"]),
    )  # fmt: skip


def of_trl(trainer: Any, args: Any, auto: Any, make_rows: Callable[[int], Dataset], **fields: Any) -> Any:
    def make(path: Path, rows: Dataset, settings: dict[str, Any], **kwargs: Any) -> Any:
        folder = kwargs.pop("shared_data") / "llama_stories260k"
        model = auto.from_pretrained(folder, **({"num_labels": 1} if fields["task"] == "SEQ_CLS" else {}))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model.config.pad_token_id = tokenizer.pad_token_id
        return trainer(
            model=model, args=args(str(path), **BRIEF | arguments(settings)), train_dataset=rows,
            processing_class=tokenizer, eval_dataset=make_rows(28).select(range(24, 28)), **kwargs,
            **options(settings, fields["task"], target_modules=["q_proj", "down_proj"]),
        )  # fmt: skip

    return make, make_rows


def judged(count: int = 24) -> Dataset:
    pairs = [(text[:20], text[20:]) for text in texts(count)["text"]]
    return Dataset.from_list([
        {"id": f"row-{row}", "prompt": prompt, "completion": completion, "label": row % 2 == 0}
        for row, (prompt, completion) in enumerate(pairs)
    ])  # fmt: skip


def better(count: int = 24) -> Dataset:
    return preferences(count).remove_columns("prompt")


TRAINERS = {
    "classification": (classification, models.bert_rows),
    "tokens": (token_classification, tokens),
    "seq2seq": (seq2seq, models.llama_rows),
    "sft": of_trl(S3TSFTTrainer, trl.SFTConfig, AutoModelForCausalLM, texts, task="CAUSAL_LM"),
    "dpo": of_trl(S3TDPOTrainer, trl.DPOConfig, AutoModelForCausalLM, preferences, task="CAUSAL_LM"),
    "kto": of_trl(S3TKTOTrainer, trl.KTOConfig, AutoModelForCausalLM, judged, task="CAUSAL_LM"),
    "reward": of_trl(S3TRewardTrainer, trl.RewardConfig, AutoModelForSequenceClassification, better, task="SEQ_CLS"),
}
REFUSED = {"kto": "prepares a row otherwise alone than in a batch"}
CHOICES = {
    "accumulation": (1, 2), "dropout": (0.0, 0.1), "clipping": (0.0, 0.5), "evaluation": (False, True),
    "checkpointing": (False, True), "workers": (0, 2), "shards": (1, 2),
}  # fmt: skip
EVERY = [dict(zip(CHOICES, chosen, strict=True)) for chosen in product(*CHOICES.values())]
DRAWN = 8
"""Of the 128 settings, as many are tried with each trainer; which ones is drawn by its name."""
BRIEFLY = {"sft": 0, "tokens": 1, "seq2seq": 2}
"""Those of the default run: trainers whose other tests are few, one setting each."""


def test_sequences_of_several_shards_are_evaluated_as_an_ensemble(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An encoder-decoder's loss is that of the mean of its members' probabilities."""
    trainer = seq2seq(tmp_path, models.llama_rows(24), EVERY[0] | {"shards": 2})
    trainer.train()
    found = trainer.evaluate()
    assert "evaluates each shard by itself" not in caplog.text
    (batch,) = trainer.get_eval_dataloader()
    parts, losses = [], []
    for shard in range(2):
        trainer.tuner.activate(f"shard-{shard:02d}")
        trainer.model.eval()
        with torch.no_grad():
            answer = trainer.model(**batch)
        parts.append(answer.logits.softmax(-1))
        losses.append(answer.loss.item())
    log = torch.stack(parts).mean(0).log().flatten(0, 1)
    expected = torch.nn.functional.nll_loss(log, batch["labels"].flatten(), ignore_index=-100).item()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5) and expected < sum(losses) / 2


class Stop(TrainerCallback):
    """A crash in the middle of the second stage."""

    def on_step_end(self, args: Any, state: Any, control: Any, stage: Stage, **kwargs: Any) -> None:
        if stage.depth == 2 and state.global_step == state.max_steps - 1:
            raise KeyboardInterrupt


CASES = [
    pytest.param(name, settings, id=f"{name}-{number}", marks=() if BRIEFLY.get(name) == number else pytest.mark.slow)
    for name in TRAINERS
    for number, settings in enumerate(random.Random(name).sample(EVERY, DRAWN))
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_repaired_is_never_seen_and_resumed_is_never_killed(
    tmp_path: Path, shared_data: Path, name: str, settings: dict[str, Any]
) -> None:
    make, make_rows = TRAINERS[name]
    more = {"shared_data": shared_data} if make.__qualname__.startswith("of_trl") else {}
    rows = make_rows(24)

    def trained(path: Path, some: Dataset = rows, **kwargs: Any) -> dict[str, str]:
        make(tmp_path / path, some, settings, **more, **kwargs).train()
        return artefacts(tmp_path / path)

    if name in REFUSED:
        with pytest.raises(DatasetError, match=REFUSED[name]):
            trained(Path("out"))
        assert not S3TStore(tmp_path / "out").exists
        return
    with pytest.raises(KeyboardInterrupt):
        trained(Path("out"), callbacks=[Stop()])
    assert trained(Path("out")) == trained(Path("never"))
    S3TStore(tmp_path / "out").delete(ids=[rows["id"][3]])
    rest = rows.select([row for row in range(24) if row != 3])
    assert trained(Path("out"), rest) == trained(Path("scratch"), rest)
