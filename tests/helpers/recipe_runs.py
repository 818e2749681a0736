"""Tiny models and data in the layouts that the recipes read, and the recipes as modules."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import AutoTokenizer, RobertaConfig, RobertaModel, ViTConfig, ViTImageProcessorPil, ViTModel

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
BASE = RECIPES / "demo" / "base"

sys.path.insert(0, str(RECIPES))
import alpaca  # noqa: E402
import common  # noqa: E402
import glue  # noqa: E402
import glue_metrics  # noqa: E402
import instructions  # noqa: E402
import people_demo  # noqa: E402
import vision  # noqa: E402

__all__ = ["alpaca", "common", "glue", "glue_metrics", "instructions", "people_demo", "vision"]

KEY = "746573746b65796f6672656369706573"
SMALL = [
    "--num_train_epochs", "1", "--r", "2", "--lora_alpha", "4", "--learning_rate", "1e-3", "--disable_tqdm", "True",
    "--per_device_train_batch_size", "8", "--report_to", "none", "--partition_key", KEY, "--save_strategy", "no",
]  # fmt: skip
TWO_SLICES = ["--num_slices", "2"]
"""Not with `--method full`, which has one slice of all layers."""


def save_roberta(folder: Path, layers: int = 2) -> Path:
    """An encoder of some layers without a head, and the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.pad_token = tokenizer.eos_token
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=300, type_vocab_size=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_vit(folder: Path, layers: int = 2) -> Path:
    """An image encoder of some layers without a head, and its processor."""
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, image_size=16,
        patch_size=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def glue_row(task: str, number: int) -> dict[str, Any]:
    """A row of a task, with the columns that its dataset has."""
    draw = random.Random(f"{task} {number}")
    label = number % max(glue.TASKS[task].labels, 2)
    mood = ["good", "bad", "odd"][label]
    words = " ".join(draw.choice(["a", "town", "pet", "color"]) for _ in range(4))
    columns = {name: f"{mood} {words} {name}" for text in glue.TASKS[task].texts for name in fields_of(text)}
    if task == "copa":
        columns["question"] = draw.choice(["cause", "effect"])
        columns |= {f"choice{position + 1}": "good" if position == label else "bad" for position in range(2)}
    idx: Any = number
    if task == "multirc":
        idx = {"paragraph": 0, "question": number // 3, "answer": number % 3}
    return columns | {"idx": idx, "label": float(label) + draw.random() if task == "stsb" else label}


def fields_of(template: str) -> list[str]:
    return [part.split("}")[0] for part in template.split("{")[1:]]


def write_glue(folder: Path, task: str, rows: int = 24) -> Path:
    """The splits of a task as JSON lines; every evaluation set has rows of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for split in ("train", *glue.TASKS[task].validation):
        count = rows if split == "train" else 9
        lines = [json.dumps(glue_row(task, number)) for number in range(first, first + count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
        first += count
    return folder


def write_images(folder: Path, dataset: str, rows: int = 24) -> Path:
    """Train and evaluation set of noise around a colour per class, as parquet files, with an id per image."""
    images = vision.DATASETS[dataset]
    names = [f"class-{label}" for label in range(images.labels)]
    features = Features({"id": Value("string"), images.image: Image(), images.label: ClassLabel(names=names)})
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), (images.validation, 8)):
        draw = np.random.default_rng([rows, count])
        pixels = draw.integers(0, 99, (count, 16, 16, 3)) + 50 * (np.arange(count) % 3)[:, None, None, None]
        columns = {
            "id": [f"{split}-{number}" for number in range(count)],
            images.image: [Picture.fromarray(one.astype(np.uint8)) for one in pixels],
            images.label: [number % 3 for number in range(count)],
        }
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def write_instructions(folder: Path, rows: int = 24) -> Path:
    """The demo's rows in the Alpaca format: train and test."""
    lines = (RECIPES / "demo" / "people.jsonl").read_text().splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(lines[:rows]))
    (folder / "test.jsonl").write_text("\n".join(lines[rows : rows + 8]))
    return folder
