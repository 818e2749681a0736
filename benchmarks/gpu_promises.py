"""Whether the promises hold bit by bit on this device: `--part promises` of `gpu.py`.

Small models of random weights, trained in every way that may move bits. Of each case as many stage files as are equal,
and as are not:

* `row_order_*`: of two trainings, one of which gets its rows in another order;
* `surviving_*`: of what a deletion left, and a training that never had the slice;
* `repaired_*`: of the repair, and a training from scratch without the deleted row.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from gpu_runs import Case, Note, NotRun, device, on_gpu, tf32_is_on
from peft import prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_s3t import S3TStore
from training import KEY, Bench, BertBench, Shape

Orders = tuple[tuple[int, ...], ...]
VICTIM_SLICE = 1
"""The deleted row lies here."""
QUANTISED = {
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
}


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is. `Shape.batch` is a slice, trained in `batches`."""

    llama: Shape = Shape(8, 1024, 2816, 8, 128, 2, batch=32, epochs=1, r=8)
    bert: Shape = Shape(8, 768, 3072, 12, 128, 2, batch=32, epochs=1, r=8)
    vit: Shape = Shape(8, 768, 3072, 12, 64, 2, batch=32, epochs=1, r=8)
    orders: Orders = ((0, 1, 2), (1, 2), (2, 0))
    batches: int = 4
    learning_rate: float = 1e-3
    lora_dropout: float = 0.1
    never_cached: tuple[str, ...] = ()  # ways that are not run with the cache


QUICK = Settings(
    llama=Shape(4, 64, 128, 4, 8, 1, vocabulary=64, batch=4, epochs=1, r=2),  # 4-bit blocks have 64 numbers
    bert=Shape(4, 32, 64, 4, 8, 1, vocabulary=64, batch=4, epochs=1, r=2),
    vit=Shape(4, 32, 64, 4, 4, 1, batch=4, epochs=1, r=2),
    orders=((0, 1),),
    batches=2,
    never_cached=("llama fp32", "llama adamw_8bit", "llama full_determinism"),
)  # fmt: skip


class ViTBench(Bench):
    """A ViT-shaped classifier; `Shape.length` patches of 8 x 8 pixels."""

    kind = None
    targets = ("q_proj", "fc1")

    def make(self) -> Any:
        shape = self.shape
        edge = 8 * round(shape.length**0.5)
        return ViTForImageClassification(
            ViTConfig(
                image_size=edge, patch_size=8, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_labels=3,
            )
        )  # fmt: skip

    def inputs(self, row: int, tokens: list[int]) -> dict[str, Any]:
        edge = 8 * round(self.shape.length**0.5)
        pixels = torch.randn(3, edge, edge, generator=torch.Generator().manual_seed(row))
        return {"pixel_values": pixels.tolist(), "labels": row % 3}


@dataclass(frozen=True)
class Way:
    """One way to train, and what it needs."""

    model: str = "llama"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    quantised: str | None = None
    needs_gpu: str = ""  # why
    cache_needs_gpu: str = ""


WAYS = {
    "llama fp32": Way(),
    "llama bf16": Way(arguments={"bf16": True}),
    "llama fp16": Way(arguments={"fp16": True}, needs_gpu="fp16 needs a GPU"),
    "llama tf32 accumulated": Way(arguments={"tf32": True, "gradient_accumulation_steps": 2}),
    "llama 8bit": Way(arguments={"bf16": True}, quantised="8bit"),
    "llama 4bit": Way(
        arguments={"bf16": True},
        quantised="4bit",
        cache_needs_gpu="on the CPU bitsandbytes rounds 4-bit weights in eval mode, in which the cache is filled",
    ),
    "llama adamw_8bit": Way(arguments={"bf16": True, "optim": "adamw_8bit"}),
    "llama full_determinism": Way(arguments={"bf16": True, "full_determinism": True}),
    "llama torch_compile": Way(arguments={"torch_compile": True}),
    "llama rank_group": Way(config={"stage_parameters": "rank_group", "layers_per_slice": None}),
    "bert fp32": Way("bert"),
    "vit fp32": Way("vit", config={"modules_to_save": ["classifier"]}),
}
BENCHES = {"llama": Bench, "bert": BertBench, "vit": ViTBench}
CACHES = {"uncached": "off", "cached": "disk"}


class PromiseTrainings:
    """The trainings that one case compares, in folders of their own."""

    def __init__(self, way: Way, cache: str, settings: Settings, seed: int, folder: Path):
        reason = way.needs_gpu or (way.cache_needs_gpu if cache != "off" else "")
        if reason and not on_gpu():
            raise NotRun(reason)
        self.way, self.cache, self.settings, self.folder = way, cache, settings, folder
        self.bench = BENCHES[way.model](getattr(settings, way.model), seed)
        self.bench.arguments = self.arguments  # type: ignore[method-assign]
        self.bench.fresh = self.fresh  # type: ignore[method-assign]
        self.bench.eval_trunk = way.quantised is not None  # such layers may compute otherwise in training
        self.rows = self.bench.rows
        if way.quantised:
            self.bench.base.to(torch.bfloat16).save_pretrained(folder / "base")

    def arguments(self, folder: str) -> TrainingArguments:
        settings = {
            "num_train_epochs": self.bench.shape.epochs,
            "per_device_train_batch_size": self.bench.shape.batch // self.settings.batches,
            "learning_rate": self.settings.learning_rate,
            "save_strategy": "no",
            "logging_strategy": "no",
        }
        return TrainingArguments(
            folder, report_to=[], disable_tqdm=True, use_cpu=not on_gpu(), **settings | self.way.arguments
        )

    def fresh(self) -> Any:
        """The base as users load it."""
        if self.way.quantised is None:
            return Bench.fresh(self.bench)
        model = AutoModelForCausalLM.from_pretrained(
            self.folder / "base", dtype=torch.bfloat16, device_map={"": device()},
            quantization_config=QUANTISED[self.way.quantised],
        )  # fmt: skip
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    def train(self, name: str, rows: Dataset, orders: Orders) -> dict[str, str]:
        """Trains what a store lacks.

        Raises:
            NotRun: the library refuses to train in this way.
        """
        self.bench.rows = rows
        plan = {"sequence_selection": [list(order) for order in orders], "lora_dropout": self.settings.lora_dropout}
        try:
            trainer = self.bench.trainer(
                str(self.folder / name), self.cache, TrainerCallback(), **plan | dict(self.way.config)
            )
        except ValueError as refusal:
            raise NotRun(str(refusal)) from refusal
        assert tf32_is_on() == self.way.arguments.get("tf32", False), "TF32 is not as the arguments say"
        self.mixed_precision = trainer.accelerator.mixed_precision
        trainer.train()
        return self.stage_files(name)

    def stage_files(self, name: str) -> dict[str, str]:
        """sha256 of every file in a stage's folder."""
        store = self.folder / name
        files = sorted(store.glob("shard-*/*/*"))
        return {str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def compare(self) -> Iterator[dict[str, Any]]:
        """Figures of one promise after the other."""
        rows, orders = self.rows, self.settings.orders
        shuffled = rows.select(torch.randperm(len(rows), generator=torch.Generator().manual_seed(5)).tolist())
        trained = self.train("trained", rows, orders)
        yield {"mixed_precision": self.mixed_precision, "stages": len(trained) // 2}
        yield counted("row_order", trained, self.train("shuffled", shuffled, orders))
        other = rows.select([row for row, place in enumerate(rows["slice"]) if place != VICTIM_SLICE])
        left = tuple(dict.fromkeys(cut for order in orders if (cut := before(order, VICTIM_SLICE))))
        victim = rows["slice"].index(VICTIM_SLICE)
        S3TStore(self.folder / "trained", KEY).delete(ids=[rows["id"][victim]])
        yield counted("surviving", self.stage_files("trained"), self.train("never", other, left))
        remaining = rows.select([row for row in range(len(rows)) if row != victim])
        yield counted("repaired", self.train("trained", remaining, orders), self.train("scratch", remaining, orders))


def before(order: tuple[int, ...], slice_id: int) -> tuple[int, ...]:
    """An order up to a slice."""
    return order[: order.index(slice_id)] if slice_id in order else order


def counted(name: str, found: Mapping[str, str], expected: Mapping[str, str]) -> dict[str, int]:
    """How many files are the same in two stores, and how many are not, or only in one of them."""
    names = found.keys() | expected.keys()
    equal = sum(found.get(file) == expected.get(file) for file in names)
    return {f"{name}_equal": equal, f"{name}_unequal": len(names) - equal}


def measure(way: Way, cache: str, settings: Settings, seed: int, note: Note) -> None:
    """One case."""
    with tempfile.TemporaryDirectory() as folder:
        for figures in PromiseTrainings(way, cache, settings, seed, Path(folder)).compare():
            note(**figures)


def left_out_of_quick(note: Note) -> None:
    """Another case checks the same machinery."""
    raise NotRun("too much for --quick")


def cases(settings: Settings, seed: int, scratch: Path) -> Iterator[Case]:
    """Every way with and without the activation cache."""
    for name, way in WAYS.items():
        for cached, cache in CACHES.items():
            task: Callable[[Note], None] = partial(measure, way, cache, settings, seed)
            if cache != "off" and name in settings.never_cached:
                task = left_out_of_quick
            yield Case(f"promises {name} {cached}", "promises", task)
