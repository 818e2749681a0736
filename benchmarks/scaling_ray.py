"""How much faster two of Ray's workers train a store than one process does, on this machine.

2 shards of 4 slices with 4 sequences each: 26 stages, 56 slice passes per epoch. A small Llama-shaped model, 320 rows
of 96 tokens in each slice, so that the smallest stage takes 5 seconds and the whole some minutes: starting workers
(imports, the model, the rows) must not dominate, as it does not where people need several machines. Everybody computes
with one thread. The stores are compared file by file, and have to be the same.

* `ray_over_one_process`: from `hf_s3t.ray.train` to its end, workers started and ended, over the same of `train()`.
  Ray itself runs already; `ray_init_seconds` is what that took.
* `ray_over_two_threads`: over one process whose torch computes with two threads, which gives other bits.
* `one_process_seconds`, `ray_seconds`, and of single stages `stage_seconds_shortest` and `stage_seconds_longest`.

They take turns; a figure is the median of the repeats. One repeat takes a quarter of an hour, on two cores that have
nothing else to do.

```bash
python benchmarks/scaling_ray.py --json scaling_ray.json
python benchmarks/scaling_ray.py --quick
```
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments, default_data_collator

from hf_s3t import S3TConfig, S3TStore, S3TTrainer
from hf_s3t.ray import train
from serving import record

KEY = "benchmarks/scaling_ray.py"
SHARDS, SLICES, BUDGET, WORKERS = 2, 4, 4, 2


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    layers: int = 8
    hidden: int = 192
    intermediate: int = 512
    heads: int = 4
    vocabulary: int = 2048
    length: int = 96
    rows_per_slice: int = 320
    batch: int = 8
    repeats: int = 1


QUICK = Settings(hidden=32, intermediate=64, length=16, rows_per_slice=8)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model: checks the machinery, not the figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--repeats", type=int, default=1, help="how often everything is measured")
    parser.add_argument("--seed", type=int, default=0, help="draws the rows and the model")
    return parser


def build(folder: str, settings: Settings, seed: int) -> S3TTrainer:
    """The trainer, on every process."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary, hidden_size=settings.hidden, intermediate_size=settings.intermediate,
            num_hidden_layers=settings.layers, num_attention_heads=settings.heads, use_cache=False,
        )
    )  # fmt: skip
    config = S3TConfig(
        num_shards=SHARDS, num_slices=SLICES, budget=BUDGET, r=8, task_type="CAUSAL_LM", target_modules="all-linear",
        slice_columns=("shard", "slice"),
    )  # fmt: skip
    arguments = TrainingArguments(
        folder, num_train_epochs=1, per_device_train_batch_size=settings.batch, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = S3TTrainer(model, arguments, default_data_collator, drawn_rows(settings, seed), peft_config=config)
    trainer.remove_callback(PrinterCallback)
    return trainer


def drawn_rows(settings: Settings, seed: int) -> Dataset:
    """Random tokens, as many rows in each slice."""
    places = [(shard, slice_id) for shard in range(SHARDS) for slice_id in range(SLICES)] * settings.rows_per_slice
    tokens = np.random.default_rng(seed).integers(3, settings.vocabulary, (len(places), settings.length))
    return Dataset.from_list([
        {"id": str(row), "shard": shard, "slice": slice_id, "input_ids": line, "labels": line,
         "attention_mask": [1] * settings.length}
        for row, ((shard, slice_id), line) in enumerate(zip(places, tokens.tolist(), strict=True))
    ])  # fmt: skip


def published(folder: str) -> dict[str, str]:
    """sha256 of every file of the store's stages."""
    files = sorted(Path(folder).glob("shard-*/*/*"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def one_process(threads: int, settings: Settings, seed: int, folder: str) -> float:
    """Seconds of a whole training."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    build(folder, settings, seed).train()
    return time.perf_counter() - started


def two_workers(settings: Settings, seed: int, folder: str) -> float:
    """Seconds of a whole training, from the first worker's start to the last one's end."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    train(partial(build, folder, settings, seed), WORKERS, {"CPU": 1})
    return time.perf_counter() - started


def measure(settings: Settings, seed: int) -> dict[str, Any]:
    """All figures."""
    os.environ["HF_S3T_KEY"] = KEY
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.perf_counter()
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    figures: dict[str, Any] = {"ray_init_seconds": time.perf_counter() - started}
    ones, twos, rays = [], [], []
    for _ in range(settings.repeats):
        with tempfile.TemporaryDirectory() as folder:
            one, two, on_ray = (f"{folder}/{name}" for name in ("one", "two", "ray"))
            ones.append(one_process(1, settings, seed, one))
            rays.append(two_workers(settings, seed, on_ray))
            twos.append(one_process(2, settings, seed, two))
            if published(one) != published(on_ray):
                raise AssertionError("Ray's workers trained other stages than one process.")
            with S3TStore(one).reading() as state:
                stages = [found["seconds"] for found in state.records().values()]
    ray.shutdown()
    over = [mine / one for mine, one in zip(rays, ones, strict=True)]
    return figures | {
        "ray_over_one_process": statistics.median(over),
        "ray_over_one_process_std": statistics.pstdev(over),
        "ray_over_two_threads": statistics.median(mine / two for mine, two in zip(rays, twos, strict=True)),
        "one_process_seconds": statistics.median(ones),
        "ray_seconds": statistics.median(rays),
        "stages": len(stages),
        "stage_seconds_shortest": min(stages),
        "stage_seconds_longest": max(stages),
    }


def main() -> None:
    """Runs the benchmark."""
    options = make_parser().parse_args()
    settings = replace(QUICK if options.quick else Settings(), repeats=options.repeats)
    logging.getLogger("hf_s3t").setLevel(logging.ERROR)
    figures = measure(settings, options.seed)
    for name, value in figures.items():
        print(f"{name:<26} {value:.3g}")
    if options.json:
        whole = record(settings, options.seed, figures) | {"name": "scaling_ray"}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
