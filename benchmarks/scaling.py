"""How much faster a plan trains on many workers: schedules of real plans, simulated from measured stage times.

A stage waits for its parent and for nothing else, so the stages of a plan can be handed out to workers, those with the
longest remaining path first (`hf_s3t.plan.schedule`). Simulated are 1 to 512 workers, in powers of two, for three
plans: 5 shards of 4 slices with 4 sequences, 20 of 8 with 16 (drawn orders), 100 of 8 with 8.

Stage times: `S3TTrainer` trains one sequence of 4 and one of 8 slices of a small Llama-shaped model here, and every
stage of the same depth takes the mean that was measured for it. `--stage-seconds FILE` takes other ones,
`{"4": [1.0, ...], "8": [...]}`: seconds at depth 1, 2, ... of plans with so many slices. What hands stages out, sends
their files and commits them is not in the simulation.

* `by_plan`: for each number of workers the seconds, the `speed_up` over one worker, and two limits of it.
  `speed_up_most` is what no schedule beats: all work spread evenly, or the critical path, whichever is longer.
  `speed_up_least` is what list scheduling guarantees: `work / workers + (1 - 1 / workers) critical path` at most
  (Graham 1966).
* `schedule_over_bound_worst`: the longest schedule over that guarantee of list scheduling, of all plans and workers.
* `schedule_over_ideal_worst`: the longest over what no schedule beats, and `schedule_over_ideal_at`: where.
  `stages_lost_worst`: the most that a schedule is longer than that, in stages of the greatest depth. Stages cannot be
  cut, so at the end workers stop one after the other; that costs a part of a stage, which counts where few are left
  for each worker.
* `scheduling_seconds_worst`: CPU seconds to schedule the largest plan.

```bash
python benchmarks/scaling.py --json scaling.json
python benchmarks/scaling.py --stage-seconds seconds.json
python benchmarks/scaling.py --quick
```
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainingArguments, default_data_collator

from hf_s3t import S3TConfig, S3TTrainer
from hf_s3t.plan.schedule import bound, makespan, remaining_seconds
from hf_s3t.plan.sequences import select_sequences
from hf_s3t.plan.tree import Plan, Stage
from serving import record

KEY = "benchmarks/scaling.py"
Seconds = Mapping[int, Sequence[float]]
"""Of the stages of plans with so many slices, by depth."""


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    plans: tuple[tuple[int, int, int], ...] = ((5, 4, 4), (20, 8, 16), (100, 8, 8))
    """Shards, slices and sequences."""
    workers: tuple[int, ...] = tuple(2**power for power in range(10))
    layers: int = 8
    hidden: int = 192
    intermediate: int = 512
    heads: int = 4
    vocabulary: int = 2048
    length: int = 96
    rows_per_slice: int = 32
    batch: int = 8
    repeats: int = 3
    threads: int = 1


QUICK = Settings(hidden=32, intermediate=64, length=16, rows_per_slice=8, repeats=1)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model: checks the machinery, not the figures")
    parser.add_argument("--stage-seconds", type=Path, metavar="FILE", help="JSON with stage times, to measure none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--seed", type=int, default=0, help="draws the rows, the model and the orders")
    return parser


# ---- stage times ----


def measured_seconds(settings: Settings, seed: int) -> dict[int, list[float]]:
    """Seconds of real stages at each depth, the mean over the repeats; a first training does not count."""
    found: dict[int, list[float]] = {}
    for slices in sorted({plan[1] for plan in settings.plans}):
        runs = [stage_seconds(settings, slices, seed) for _ in range(settings.repeats + 1)][1:]
        found[slices] = [statistics.fmean(times) for times in zip(*runs, strict=True)]
    return found


def stage_seconds(settings: Settings, slices: int, seed: int) -> list[float]:
    """Trains one sequence; the seconds of its stages, as the store has them."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary, hidden_size=settings.hidden, intermediate_size=settings.intermediate,
            num_hidden_layers=settings.layers, num_attention_heads=settings.heads, use_cache=False,
        )
    )  # fmt: skip
    config = S3TConfig(
        num_slices=slices, budget=1, r=8, task_type="CAUSAL_LM", target_modules="all-linear",
        slice_columns=("shard", "slice"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=settings.batch, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        rows = drawn_rows(settings, slices, seed)
        trainer = S3TTrainer(model, arguments, default_data_collator, rows, peft_config=config, partition_key=KEY)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        with trainer.store.reading() as state:
            records = {Stage.from_name(name): record for name, record in state.records().items()}
        return [records[stage]["seconds"] for stage in sorted(records, key=lambda stage: stage.depth)]


def drawn_rows(settings: Settings, slices: int, seed: int) -> Dataset:
    """Random tokens, as many rows in each slice."""
    tokens = np.random.default_rng(seed).integers(
        3, settings.vocabulary, (slices * settings.rows_per_slice, settings.length)
    )
    return Dataset.from_list([
        {"id": str(row), "shard": 0, "slice": row % slices, "input_ids": line, "labels": line,
         "attention_mask": [1] * settings.length}
        for row, line in enumerate(tokens.tolist())
    ])  # fmt: skip


def read_seconds(file: Path, settings: Settings) -> dict[int, list[float]]:
    """What `--stage-seconds` names."""
    found = {int(slices): times for slices, times in json.loads(file.read_text()).items()}
    for slices in {plan[1] for plan in settings.plans}:
        if len(found.get(slices, ())) != slices or not min(found[slices]) > 0:
            raise ValueError(f'{file} must have {slices} numbers above 0 under "{slices}", the seconds by depth.')
    return found


# ---- the simulation ----


def simulated(settings: Settings, seconds: Seconds, seed: int) -> dict[str, Any]:
    """Schedules of every plan on every number of workers."""
    figures: dict[str, Any] = {"stage_seconds": {str(slices): times for slices, times in seconds.items()}}
    figures["by_plan"] = plans = {}
    scheduling = []
    for shards, slices, budget in settings.plans:
        way = "spaced" if budget <= slices else "random"
        plan = Plan.make(shards, slices, select_sequences(way, slices, budget, seed=seed))
        started = time.process_time()
        rows = [schedule(plan, seconds[slices], workers) for workers in settings.workers]
        scheduling.append((time.process_time() - started) / len(rows))
        critical = max(remaining_seconds(plan.stages, lambda s, t=seconds[slices]: t[s.depth - 1]).values())
        name = f"m={shards}, L={slices}, B={budget}"
        plans[name] = {"stages": len(plan.stages), "critical_path_seconds": critical, "by_workers": rows}
    every = [(name, row) for name, plan in plans.items() for row in plan["by_workers"]]
    name, worst = max(every, key=lambda one: one[1]["over_ideal"])
    figures["schedule_over_bound_worst"] = max(row["over_bound"] for _, row in every)
    figures["schedule_over_ideal_worst"] = worst["over_ideal"]
    figures["schedule_over_ideal_at"] = f"{name}, {worst['workers']} workers"
    figures["stages_lost_worst"] = max(row["stages_lost"] for _, row in every)
    figures["scheduling_seconds_worst"] = max(scheduling)
    return figures


def schedule(plan: Plan, times: Sequence[float], workers: int) -> dict[str, float]:
    """One plan on some workers."""

    def seconds(stage: Stage) -> float:
        return times[stage.depth - 1]

    work = sum(map(seconds, plan.stages))
    critical = max(remaining_seconds(plan.stages, seconds).values())
    ideal, found = bound(plan.stages, seconds, workers), makespan(plan.stages, seconds, workers)
    guaranteed = work / workers + (1 - 1 / workers) * critical
    return {
        "workers": workers,
        "seconds": found,
        "speed_up": work / found,
        "speed_up_most": work / ideal,
        "speed_up_least": work / guaranteed,
        "over_ideal": found / ideal,
        "over_bound": found / guaranteed,
        "stages_lost": (found - ideal) / times[-1],
    }


def print_table(figures: dict[str, Any]) -> None:
    """Speed-ups by workers, and the rest."""
    print(f"stage seconds {figures['stage_seconds_from']}, by depth")
    for slices, times in figures["stage_seconds"].items():
        print(f"  {slices} slices: " + " ".join(f"{seconds:.3g}" for seconds in times))
    for name, plan in figures["by_plan"].items():
        print(f"\n{name}: {plan['stages']} stages, critical path {plan['critical_path_seconds']:.4g} s")
        print("workers  speed-up  no schedule has more  list scheduling has at least  over what none beats")
        for row in plan["by_workers"]:
            print(
                f"{row['workers']:>7} {row['speed_up']:>9.1f} {row['speed_up_most']:>21.1f} "
                f"{row['speed_up_least']:>28.1f} {row['over_ideal']:>21.3f}"
            )
    print()
    for name, value in figures.items():
        if isinstance(value, float | str):
            print(f"{name:<28} {value if isinstance(value, str) else f'{value:.3g}'}")


def main() -> None:
    """Runs the benchmark."""
    options = make_parser().parse_args()
    settings = QUICK if options.quick else Settings()
    torch.set_num_threads(settings.threads)
    logging.getLogger("hf_s3t").setLevel(logging.ERROR)
    if options.stage_seconds:
        seconds, source = read_seconds(options.stage_seconds, settings), f"from {options.stage_seconds.name}"
    else:
        seconds, source = measured_seconds(settings, options.seed), "measured here"
    figures = {"stage_seconds_from": source} | simulated(settings, seconds, options.seed)
    print_table(figures)
    if options.json:
        whole = record(settings, options.seed, figures) | {"name": "scaling"}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
