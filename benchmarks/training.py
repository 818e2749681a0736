"""What a stage costs: the paper's schedule, stock PEFT, and ours without and with the activation cache.

One sequence of four stages with cumulative data, in four ways, each with the Trainer's own loop:

* (a) the paper's schedule: LoRA in all layers, of which the stage's train, with reentrant checkpointing and gradients
  of the inputs, so that every layer runs forwards twice and backwards once;
* (b) stock Trainer and PEFT with LoRA in the layers of the stage and of its parents, of which the stage's train;
* (c) `S3TTrainer`;
* (d) `S3TTrainer(activation_cache="disk")`, once the cache is filled.

A way's time is that of its training steps, from `on_step_begin` to `on_step_end`: loading data and setting up stages
are not in it. One thread computes, and its CPU time is taken: on an idle machine that is the time that passes. The
ways take turns; a figure is the median of the repeats after a warm-up, `_p10` and `_p90` its 10 to 90 % range.

* `paper_over_cached`, `paper_over_uncached`, `stock_over_uncached`: (a)/(d), (a)/(c) and (b)/(c), of a Llama-shaped
  model.
* `cached_over_predicted`: (d)/(c) over the ratio that counting operations gives: forwards of the layers that run,
  backwards of those down to the stage's lowest, and the head.
* `fill16_over_rows`, `fill96_over_rows`: filling the cache in batches of a fixed shape over filling it row by row, of
  rows of 16 and of 96 tokens; `fill16_over_pass`, `fill96_over_pass`: over one forward pass of the trunk, 8 rows at a
  time. What the probe takes, once for each shape of batch, is apart: `probe16_over_fill`, `probe96_over_fill`.
* `marks_over_step`: what it takes to look at the marks of a batch's rows and at what trains, over the step, of (c).
* `bert_stock_over_cached`: (b)/(d) on a BERT-shaped classifier of which half of the layers are trained.
* `full_budget_paper_over_ours`: every order's retention for four slices. The paper's way trains the 24 orders one by
  one, 240 slice passes; ours the cheapest tree that keeps as much, 32, with a cache. Whole trainings, set-up and
  filling included, of a small model. `full_budget_passes` is 240/32, `full_budget_per_pass` the rest of the factor.

```bash
python benchmarks/training.py --json training.json
python benchmarks/training.py --quick
```
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_s3t import S3TConfig, S3TTrainer
from hf_s3t.training import trunk_cache
from hf_s3t.training.trunk_cache import TrunkCache
from hf_s3t.trunk.row_batches import RowBatches, way_to_compute
from hf_s3t.trunk.row_numbers import RowGuard

REPOSITORY = Path(__file__).resolve().parent.parent
KEY = "benchmarks/training.py"
SLICES = 4


@dataclass(frozen=True)
class Shape:
    """A model, its batches, and the layers that a stage trains."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    length: int
    per_stage: int
    vocabulary: int = 2048
    batch: int = 8
    epochs: int = 2
    r: int = 8


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    llama: Shape = field(default_factory=lambda: Shape(16, 384, 1024, 6, 96, 4))
    bert: Shape = field(default_factory=lambda: Shape(24, 384, 1536, 6, 96, 3))
    small: Shape = field(default_factory=lambda: Shape(8, 160, 432, 5, 96, 2))
    short: Shape = field(default_factory=lambda: Shape(8, 384, 1024, 6, 16, 1, batch=192))
    long: Shape = field(default_factory=lambda: Shape(8, 384, 1024, 6, 96, 1, batch=64))
    repeats: int = 7
    full_repeats: int = 3
    full_orders: int = 24
    threads: int = 1


QUICK = Settings(
    llama=Shape(8, 64, 160, 4, 16, 2), bert=Shape(12, 64, 128, 4, 16, 2), small=Shape(4, 32, 64, 4, 8, 1),
    short=Shape(4, 32, 64, 4, 16, 1), long=Shape(4, 32, 64, 4, 96, 1),
    repeats=1, full_repeats=1, full_orders=2,
)  # fmt: skip

Ways = dict[str, Callable[[], float]]


def make_parser(about: str | None) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models: checks the machinery, not the figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--seed", type=int, default=0, help="draws the rows and the models")
    return parser


# ---- models and rows ----


class Bench:
    """One model, its rows by slice, and the ways to train it."""

    kind = "CAUSAL_LM"
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    pattern = "layers"
    eval_trunk = False

    def __init__(self, shape: Shape, seed: int):
        self.shape = shape
        torch.manual_seed(seed)
        self.base = self.make()
        self.rows = self.make_rows(np.random.default_rng(seed), SLICES * shape.batch)
        self.probes: list[float] = []

    def make(self) -> Any:
        shape = self.shape
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, use_cache=False,
            )
        )  # fmt: skip

    def fresh(self) -> Any:
        """The base model as it was made."""
        return copy.deepcopy(self.base)

    def make_rows(self, draw: Any, count: int) -> Dataset:
        tokens = draw.integers(3, self.shape.vocabulary, (count, self.shape.length)).tolist()
        return Dataset.from_list(
            [
                {"id": str(row), "shard": 0, "slice": row // self.shape.batch} | self.inputs(row, tokens[row])
                for row in range(count)
            ]
        )

    def inputs(self, row: int, tokens: list[int]) -> dict[str, Any]:
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": tokens}

    def arguments(self, folder: str, **more: Any) -> TrainingArguments:
        return TrainingArguments(
            folder, num_train_epochs=self.shape.epochs, per_device_train_batch_size=self.shape.batch, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, **more,
        )  # fmt: skip

    def group(self, depth: int) -> list[int]:
        """Layers that the stage at `depth` trains."""
        top = self.shape.layers - self.shape.per_stage * (depth - 1)
        return list(range(top - self.shape.per_stage, top))

    def stock_stage(self, prefix: Sequence[int], everywhere: bool, watch: TrainerCallback) -> None:
        """One stage by stock Trainer and PEFT; `everywhere` is the paper's way."""
        depth = len(prefix)
        layers = list(range(self.shape.layers)) if everywhere else [
            layer for above in range(1, depth + 1) for layer in self.group(above)
        ]  # fmt: skip
        config = LoraConfig(
            r=self.shape.r, target_modules=list(self.targets), layers_to_transform=layers,
            layers_pattern=self.pattern, task_type=self.kind,
        )  # fmt: skip
        model = get_peft_model(self.fresh(), config)
        own = tuple(f".{self.pattern}.{layer}." for layer in self.group(depth))
        for name, parameter in model.named_parameters():
            parameter.requires_grad = parameter.requires_grad and ("lora_" not in name or any(o in name for o in own))
        more: dict[str, Any] = {}
        if everywhere:
            model.enable_input_require_grads()
            more = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
        positions = [row for row in range(len(self.rows)) if row // self.shape.batch in prefix]
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model,
                self.arguments(folder, **more),
                default_data_collator,
                self.rows.select(positions),
                callbacks=[watch],
            )
            trainer.train()

    def stock(self, everywhere: bool, watch: TrainerCallback) -> None:
        """One sequence by stock Trainer and PEFT."""
        for depth in range(1, SLICES + 1):
            self.stock_stage(range(depth), everywhere, watch)

    def trainer(self, folder: str, cache: str, watch: TrainerCallback, **config: Any) -> Any:
        """Ours, for one sequence unless the config says otherwise."""
        plan = {"layers_per_slice": self.shape.per_stage, **(config or {"budget": 1})}
        return S3TTrainer(
            self.fresh(), self.arguments(folder), default_data_collator, self.rows, partition_key=KEY,
            activation_cache=cache, eval_trunk=self.eval_trunk and cache != "off", callbacks=[watch],
            peft_config=S3TConfig(
                num_slices=SLICES, r=self.shape.r, task_type=self.kind, target_modules=list(self.targets),
                slice_columns=("shard", "slice"), **plan,
            ),
        )  # fmt: skip

    def ours(self, cache: str, watch: TrainerCallback) -> None:
        """One sequence by `S3TTrainer`."""
        with tempfile.TemporaryDirectory() as folder:
            self.trainer(folder, cache, watch).train()

    def fill(self, way: Any) -> float:
        """Fills the cache of one slice in a recipe's way; what the probe takes is noted in `probes`."""
        with (
            tempfile.TemporaryDirectory() as folder,
            patch.object(trunk_cache, "way_to_compute", lambda *_: way),
            timed_calls(TrunkCache, "_fill_absent") as filling,
            timed_calls(RowBatches, "_size") as probing,
        ):
            self.trainer(folder, "disk", TrainerCallback(), sequence_selection=[[0]]).train()
        if way is not True:
            self.probes.append(sum(probing))
        return sum(filling) - sum(probing)

    @torch.no_grad()
    def trunk_pass(self, at_once: int = 8) -> float:
        """One forward pass of the trunk over the rows of one slice."""
        model = self.fresh().model.eval()
        model.layers = model.layers[: self.shape.layers - self.shape.per_stage]
        tokens = torch.tensor(self.rows["input_ids"][: self.shape.batch])
        started = time.process_time()
        for first in range(0, len(tokens), at_once):
            some = tokens[first : first + at_once]
            model(input_ids=some, attention_mask=torch.ones_like(some))
        return time.process_time() - started

    # ---- counting ----

    def layer_operations(self) -> tuple[float, float]:
        """Multiplications and additions of one layer's forward and backward pass over a batch, LoRA apart."""
        shape, tokens = self.shape, self.shape.batch * self.shape.length
        linear = 2 * tokens * self.matrix_elements()
        attention = 4 * tokens * shape.length * shape.hidden
        return linear + attention, linear + 2 * attention

    def matrix_elements(self) -> int:
        return 4 * self.shape.hidden**2 + 3 * self.shape.hidden * self.shape.intermediate

    def step_operations(self, depth: int, cached: bool) -> float:
        """Of one step of a stage."""
        shape = self.shape
        forward, backward = self.layer_operations()
        with_lora = depth * shape.per_stage
        tokens = shape.batch * shape.length
        lora = 2 * tokens * shape.r * self.lora_widths()
        head = 2 * 2 * tokens * shape.hidden * shape.vocabulary
        layers = with_lora if cached else shape.layers
        return layers * forward + with_lora * (backward + 2 * lora) + shape.per_stage * lora + head

    def lora_widths(self) -> int:
        return 2 * 4 * self.shape.hidden + 3 * (self.shape.hidden + self.shape.intermediate)

    def operations(self, cached: bool) -> float:
        """Of a sequence: a stage at depth d takes d steps an epoch."""
        steps = {depth: depth * self.shape.epochs for depth in range(1, SLICES + 1)}
        return sum(count * self.step_operations(depth, cached) for depth, count in steps.items())


class BertBench(Bench):
    """The same over a BERT-shaped classifier without dropout, with LoRA where PEFT puts it by default."""

    kind = "SEQ_CLS"
    targets = ("query", "value")
    pattern = "layer"

    def make(self) -> Any:
        shape = self.shape
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_labels=2,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip

    def inputs(self, row: int, tokens: list[int]) -> dict[str, Any]:
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": row % 2}


class StepTimer(TrainerCallback):
    """CPU seconds of the training steps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds -= time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += time.process_time()


# ---- measuring ----


@contextmanager
def timed_calls(owner: Any, name: str) -> Iterator[list[float]]:
    """Notes the CPU seconds of every call of a method."""
    method, seconds = getattr(owner, name), list[float]()

    def timed(*args: Any) -> Any:
        started = time.process_time()
        found = method(*args)
        seconds.append(time.process_time() - started)
        return found

    with patch.object(owner, name, timed):
        yield seconds


def step_seconds(way: Callable[[StepTimer], None]) -> Callable[[], float]:
    """A way to train that returns the seconds of its steps."""

    def timed() -> float:
        timer = StepTimer()
        way(timer)
        return timer.seconds

    return timed


def in_turn(ways: Ways, repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Times of each way, which take turns; the first turns are a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + warm_up):
        for name, way in ways.items():
            seconds = way()
            if turn >= warm_up:
                found[name].append(seconds)
            print(f"  turn {turn}  {name:<10} {seconds:8.2f} s", flush=True)
    return found


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, 10-90 % range and deviation."""
    low, high = np.percentile(values, [10, 90])
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {name: statistics.median(values), f"{name}_p10": low, f"{name}_p90": high, f"{name}_std": deviation}


def over(name: str, above: Sequence[float], below: Sequence[float], by: float = 1.0) -> dict[str, float]:
    """Ratios of what was measured in the same turn."""
    return spread(name, [one / other / by for one, other in zip(above, below, strict=True)])


def measure_llama(settings: Settings, seed: int) -> dict[str, Any]:
    """The four ways on the Llama-shaped model."""
    bench = Bench(settings.llama, seed)
    ways: Ways = {
        "paper": step_seconds(partial(bench.stock, True)),
        "stock": step_seconds(partial(bench.stock, False)),
        "uncached": step_seconds(partial(bench.ours, "off")),
        "cached": step_seconds(partial(bench.ours, "disk")),
    }
    found = in_turn(ways, settings.repeats)
    cached, uncached = found["cached"], found["uncached"]
    predicted = bench.operations(True) / bench.operations(False)
    figures = over("paper_over_cached", found["paper"], cached) | over("paper_over_uncached", found["paper"], uncached)
    figures |= over("stock_over_uncached", found["stock"], uncached)
    figures |= over("cached_over_predicted", cached, uncached, predicted)
    return figures | {f"{name}_seconds": statistics.median(times) for name, times in found.items()}


def measure_marks(settings: Settings, seed: int) -> dict[str, Any]:
    """What promise 1 costs while training: the look at rows and parameters before each step."""
    bench, looking, shares = Bench(settings.llama, seed), [0.0], []

    def timed(plain: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            started = time.process_time_ns()
            try:
                return plain(*args)
            finally:
                looking[0] += (time.process_time_ns() - started) / 1e9

        return wrapper

    take, check, before = RowGuard.take, RowGuard.check_step, S3TTrainer._hold_mask
    patches = ((RowGuard, "take", take), (RowGuard, "check_step", check), (S3TTrainer, "_hold_mask", before))
    try:
        for owner, name, plain in patches:
            setattr(owner, name, timed(plain))
        for _ in range(settings.repeats):
            looking[0] = 0.0
            seconds = step_seconds(partial(bench.ours, "off"))()
            shares.append(looking[0] / seconds)
    finally:
        for owner, name, plain in patches:
            setattr(owner, name, plain)
    return spread("marks_over_step", shares)


def measure_filling(settings: Settings, seed: int) -> dict[str, Any]:
    """The cache filled in batches and row by row."""
    figures: dict[str, Any] = {}
    for shape in (settings.short, settings.long):
        bench, length = Bench(shape, seed), shape.length
        ways: Ways = {
            "batches": partial(bench.fill, way_to_compute(None, "cpu")),
            "rows": partial(bench.fill, True),
            "pass": bench.trunk_pass,
        }
        found = in_turn(ways, settings.repeats)
        figures |= over(f"fill{length}_over_rows", found["batches"], found["rows"])
        figures |= over(f"fill{length}_over_pass", found["batches"], found["pass"])
        figures |= over(f"probe{length}_over_fill", bench.probes[1:], found["batches"])
    return figures


def measure_bert(settings: Settings, seed: int) -> dict[str, Any]:
    """Stock and cached on the BERT-shaped model."""
    bench = BertBench(settings.bert, seed)
    stock, cached = partial(bench.stock, False), partial(bench.ours, "disk")
    found = in_turn({"stock": step_seconds(stock), "cached": step_seconds(cached)}, settings.repeats)
    return over("bert_stock_over_cached", found["stock"], found["cached"])


def measure_full_budget(settings: Settings, seed: int) -> dict[str, Any]:
    """Every order's retention: whole trainings."""
    bench = Bench(settings.small, seed)
    passes = {"paper": 0, "ours": 0}

    def paper() -> float:
        started = time.process_time()
        orders = list(itertools.permutations(range(SLICES)))[: settings.full_orders]
        for order in orders:
            for depth in range(1, SLICES + 1):
                bench.stock_stage(order[:depth], True, TrainerCallback())
        passes["paper"] = len(orders) * sum(range(1, SLICES + 1))
        return time.process_time() - started

    def ours() -> float:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            trainer = bench.trainer(folder, "disk", TrainerCallback(), sequence_selection="optimal", cost_budget=32)
            trainer.train()
            passes["ours"] = sum(stage.depth for stage in trainer.store.manifest().stages)
        return time.process_time() - started

    found = in_turn({"paper": paper, "ours": ours}, settings.full_repeats, warm_up=0)
    by_passes = passes["paper"] / passes["ours"]
    figures = over("full_budget_paper_over_ours", found["paper"], found["ours"])
    figures |= over("full_budget_per_pass", found["paper"], found["ours"], by_passes)
    return figures | {"full_budget_passes": by_passes}


def run(settings: Settings, seed: int) -> dict[str, Any]:
    """All figures by name."""
    figures = {}
    measures = {
        "Llama": measure_llama, "marks": measure_marks, "filling": measure_filling, "BERT": measure_bert,
        "full": measure_full_budget,
    }  # fmt: skip
    for title, measure in measures.items():
        print(title)
        figures |= measure(settings, seed)
    return figures


def commit_of_tree() -> str | None:
    """The commit that is measured; `None` where there is no git, or no repository."""
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def record(name: str, settings: dict[str, Any], seed: int, figures: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file holds."""
    libraries = ("hf_s3t", "torch", "transformers", "peft", "accelerate")
    return {
        "name": name,
        "commit": commit_of_tree(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "settings": {**settings, "seed": seed},
        "figures": figures,
    }


def print_table(figures: dict[str, Any]) -> None:
    """Figures with their ranges."""
    print()
    for name, value in figures.items():
        if name.endswith(("_p10", "_p90", "_std")):
            continue
        ends = f"  ({figures[f'{name}_p10']:.3g} to {figures[f'{name}_p90']:.3g})" if f"{name}_p10" in figures else ""
        print(f"{name:<30} {value:>7.3g}{ends}")


def main() -> None:
    """Runs the benchmark."""
    options = make_parser(__doc__).parse_args()
    settings = QUICK if options.quick else Settings()
    torch.set_num_threads(settings.threads)
    logging.getLogger("hf_s3t").setLevel(logging.ERROR)
    figures = run(settings, options.seed)
    print_table(figures)
    if options.json:
        found = record("training", asdict(settings), options.seed, figures)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
