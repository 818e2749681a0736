"""What slice-wise training costs in quality, what deletions cost, and what helps.

Parts, each with a JSON file of its own for each seed; a finished one is not run again:

* `a_sst2`, `a_sst2_l6`, `a_rte`, `a_alpaca`, `a_vision`: one shard. Slice-wise training against plain LoRA over all
  layers on the same rows, with the epochs of one stage (`full`) and with as many slice passes as the stages had in all
  (`full_equal`). `by_length` scores the prefixes of length 0 to L, `head_alone` their heads on the bare base model.
* `c_sst2`: several shards under streams of deletion requests, see `quality_streams.py`.
* `d_alpaca_*`, `d_sst2_*`, `d_vision_*`: other ways for a stage to own parameters, at the slice passes of `a_*`.
* `tune_TASK_KIND`: learning rates by the score on validation rows; run by name, with `--seed 0`.

Figures: `sst2_full` and `sst2_s3t`, accuracy in percent on rows cut from the train split; `sst2_lost`, their
difference, paired by seed, and `sst2_lost_bound`, the one-sided 95 % bound of its mean by Student's t;
`alpaca_gain_share`, the recommended setting's part of the way from the base model's held-out loss to that of full LoRA
at equal slice passes. `_std` is the deviation over seeds.

Several processes may run the same command side by side: each takes what no other one has begun.

```bash
python benchmarks/quality.py --results results & python benchmarks/quality.py --results results & wait
python benchmarks/quality.py --results results --report --json quality.json --plot docs/quality.png
python benchmarks/quality.py --part a_sst2 c_sst2 --seed 1 --results results
python benchmarks/quality.py --quick
```
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from filelock import FileLock, Timeout
from quality_report import commit_of, report
from quality_streams import stream_figures
from quality_tasks import QUICK, REDUCED, Settings, Task, TaskSettings, make_task
from quality_training import (
    DepthRate,
    full_numbers,
    s3t_figures,
    train_by_hand,
    train_full,
    train_s3t,
    whole_scores,
)

SEEDS = (0, 1, 2)
TUNED_BY = (0.5, 1.0, 2.0)
DEPTH_POWER = -0.5

Figures = dict[str, Any]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="check the machinery on a few rows, in under a minute")
    parser.add_argument("--reduced", action="store_true", help="parts a to c, with fewer rows")
    parser.add_argument("--part", nargs="+", metavar="NAME", help="only these parts")
    parser.add_argument("--seed", type=int, nargs="+", help="one run per seed (default: 0 1 2, dear parts 0)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="keeps what is finished")
    parser.add_argument("--report", action="store_true", help="run nothing: join what is finished")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw the curves")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="a page whose marked tables are written anew")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="a page whose short marked table is written anew")
    return parser


# ---- parts ----


def against_full(name: str, settings: Settings, seed: int, results: Path, scratch: Path) -> Figures:
    """One task: slice-wise, and full LoRA twice."""
    task = make_task(name, settings, seed, results)
    figures: Figures = {"layer_group": _trained(task, scratch / "layer_group")}
    if name == "alpaca":
        rank = {"stage_parameters": "rank_group", "r": settings.ranks["rank_group"]}
        figures["rank_group"] = _trained(task, scratch / "rank_group", **rank)
    equal = figures["layer_group"]["slice_passes"] / task.settings.num_slices
    for way, epochs in (("full", task.settings.epochs), ("full_equal", equal)):
        model, seconds = train_full(task, scratch / way, epochs)
        passes = epochs * task.settings.num_slices
        about = {"slice_passes": passes, "seconds": seconds, "lora_numbers": full_numbers(model)}
        figures[way] = whole_scores(model, task) | about
    return figures


def _trained(task: Task, folder: Path, **config: Any) -> Figures:
    return s3t_figures(*train_s3t(task, folder, **config), task)


def with_config(
    name: str, config: dict[str, Any], settings: Settings, seed: int, results: Path, scratch: Path
) -> Figures:  # fmt: skip
    """One task, one config."""
    return _trained(make_task(name, settings, seed, results), scratch / "store", **config)


def with_replay(replay: float, settings: Settings, seed: int, results: Path, scratch: Path) -> Figures:
    """Rank groups that see a share of earlier slices again, for as many slice passes as with all of them."""
    task = make_task("alpaca", settings, seed, results)
    number = task.settings.num_slices
    passes, all_passes = number + replay * number * (number - 1) / 2, number * (number + 1) / 2
    epochs = task.settings.epochs * all_passes / passes
    config = {"stage_parameters": "rank_group", "r": settings.ranks["rank_group"], "replay": replay}
    figures = _trained(task, scratch / "store", epochs=epochs, **config)
    return figures | {"slice_passes": epochs * passes}


def with_wedge(settings: Settings, seed: int, results: Path, scratch: Path) -> Figures:
    """The wedge, as an experiment outside the library."""
    task = make_task("alpaca", settings, seed, results)
    return train_by_hand(task, scratch, "wedge", r=settings.ranks["wedge"], kind="wedge")[1]


def by_hand(name: str, settings: Settings, seed: int, results: Path, scratch: Path) -> Figures:
    """Layer groups from the top down, from the bottom up, and with a head that only the first stage trains."""
    task = make_task(name, settings, seed, results)
    ways = {"top_down": ("top_down", None), "bottom_up": ("bottom_up", None), "head_once": ("top_down", 1)}
    return {
        way: train_by_hand(task, scratch / way, shape, r=task.settings.r, head_stages=head_stages)[1]
        for way, (shape, head_stages) in ways.items()
    }


def with_depth_rate(settings: Settings, seed: int, results: Path, scratch: Path) -> Figures:
    """Rank groups whose learning rate falls with a stage's depth."""
    rank = {"stage_parameters": "rank_group", "r": settings.ranks["rank_group"]}
    task = make_task("alpaca", settings, seed, results)
    return _trained(task, scratch / "store", callbacks=[DepthRate(DEPTH_POWER)], **rank)


def streams(settings: Settings, seed: int, results: Path, scratch: Path) -> Figures:
    """Deletion streams."""
    return stream_figures(settings, make_task("sst2", settings, seed, results), scratch)


def tune(name: str, kind: str, settings: Settings, seed: int, results: Path, scratch: Path) -> Figures:
    """Validation scores of learning rates around that of the settings; test rows are not looked at."""
    task = make_task(name, settings, seed, results)
    chosen, figures = task.settings.rates[kind], {}
    for rate in [chosen * by for by in TUNED_BY]:
        task = make_task(name, replace(settings, **{name: with_rate(task.settings, kind, rate)}), seed, results)
        folder = scratch / f"{rate:g}"
        if kind == "full":
            model = train_full(task, folder, task.settings.epochs * (task.settings.num_slices + 1) / 2)[0]
        elif kind == "wedge":
            model = train_by_hand(task, folder, "wedge", r=settings.ranks["wedge"], kind="wedge")[0]
        else:
            rank = settings.ranks.get(kind, task.settings.r) if name == "alpaca" else task.settings.r
            model = train_s3t(task, folder, stage_parameters=kind, r=rank)[0].model
        figures[f"{rate:g}"] = task.score(model, "validation")
        print(f"  {name}, {kind}, {rate:g}: {figures[f'{rate:g}']}", flush=True)
    return figures


def with_rate(settings: TaskSettings, kind: str, rate: float) -> TaskSettings:
    """The same task with another learning rate."""
    return replace(settings, rates=settings.rates | {kind: rate})


Part = Callable[[Settings, int, Path, Path], Figures]

# Layer groups of rank 16 store 16 x layers; rank groups of rank r store r x layers x slices.
PARTS: dict[str, Part] = {
    "a_sst2": partial(against_full, "sst2"),
    "a_alpaca": partial(against_full, "alpaca"),
    "a_vision": partial(against_full, "vision"),
    "c_sst2": streams,
    "a_rte": partial(against_full, "rte"),
    "a_sst2_l6": partial(with_config, "sst2", {"num_slices": 6}),
    "d_vision_rank_5": partial(with_config, "vision", {"stage_parameters": "rank_group", "r": 5}),
    "d_vision_all": partial(with_config, "vision", {"stage_parameters": "all"}),
    "d_vision_by_hand": partial(by_hand, "vision"),
    "d_alpaca_wedge": with_wedge,
    "d_alpaca_depth_rate": with_depth_rate,
    "d_alpaca_all": partial(with_config, "alpaca", {"stage_parameters": "all"}),
    "d_alpaca_replay_50": partial(with_replay, 0.5),
    "d_alpaca_replay_0": partial(with_replay, 0.0),
    "d_alpaca_rank_3": partial(with_config, "alpaca", {"stage_parameters": "rank_group", "r": 3}),
    "d_alpaca_rank_16": partial(with_config, "alpaca", {"stage_parameters": "rank_group", "r": 16}),
    "d_alpaca_layer_32": partial(with_config, "alpaca", {"r": 32}),
    "d_alpaca_layer_rslora": partial(with_config, "alpaca", {"use_rslora": True}),
    "d_sst2_rank_5": partial(with_config, "sst2", {"stage_parameters": "rank_group", "r": 5}),
    "d_sst2_all": partial(with_config, "sst2", {"stage_parameters": "all"}),
    "d_sst2_layers_1": partial(with_config, "sst2", {"layers_per_slice": 1}),
    "d_sst2_by_hand": partial(by_hand, "sst2"),
}
REDUCED_PARTS = ["a_sst2", "a_alpaca", "a_vision", "c_sst2", "a_rte"]
ONCE = ("c_sst2", "a_sst2_l6", "d_sst2_rank_5", "d_sst2_all", "d_sst2_layers_1", "d_sst2_by_hand")  # dear: seed 0 only
QUICK_PARTS = ["a_sst2", "a_alpaca", "a_vision", "c_sst2", "d_alpaca_wedge", "d_alpaca_depth_rate", "d_vision_by_hand"]
BY_NAME: dict[str, Part] = {
    f"tune_{name}_{kind}": partial(tune, name, kind)
    for name in ("sst2", "rte", "alpaca", "vision")
    for kind in getattr(Settings(), name).rates
}


# ---- running ----


def jobs(options: argparse.Namespace) -> list[tuple[str, int]]:
    """What is to be run: parts a to c of all seeds first."""
    names = options.part or (QUICK_PARTS if options.quick else REDUCED_PARTS if options.reduced else list(PARTS))
    unknown = sorted(set(names) - set(PARTS | BY_NAME))
    if unknown:
        raise SystemExit(f"There are no parts {unknown}. Choose from {', '.join([*PARTS, *BY_NAME])}.")
    seeds = options.seed or (SEEDS[:1] if options.quick else SEEDS)
    once = () if options.seed else (*ONCE, "a_rte") if options.reduced else ONCE
    found = [(name, seed) for seed in seeds for name in names if name not in once or seed == seeds[0]]
    return sorted(found, key=lambda job: job[0].startswith("d_"))


def run_part(name: str, seed: int, settings: Settings, results: Path) -> None:
    """Runs one part and writes its file, unless it is there or another process runs it."""
    file = results / f"{name}-{seed}.json"
    wanted = json.loads(json.dumps(asdict(settings)))
    try:
        with FileLock(file.with_suffix(".lock"), timeout=0):
            if file.exists() and json.loads(file.read_text())["settings"] == wanted:
                print(f"{name}, seed {seed}: done already", flush=True)
                return
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as scratch:
                figures = (PARTS | BY_NAME)[name](settings, seed, results, Path(scratch))
            seconds = time.monotonic() - started
            about = {"part": name, "seed": seed, "commit": commit_of(), "seconds": seconds, "settings": wanted}
            written = file.with_suffix(".part")
            written.write_text(json.dumps(about | {"figures": figures}, indent=1) + "\n")
            written.replace(file)
            print(f"{name}, seed {seed}: {seconds:.0f} s", flush=True)
    except Timeout:
        print(f"{name}, seed {seed}: runs in another process", flush=True)


def main() -> None:
    """Runs the benchmark."""
    options = make_parser().parse_args()
    settings = QUICK if options.quick else REDUCED if options.reduced else Settings()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    if options.results is None and not options.quick:
        raise SystemExit("Give a folder for what is finished: --results FOLDER")
    with tempfile.TemporaryDirectory() as passing:
        results = options.results or Path(passing)
        results.mkdir(parents=True, exist_ok=True)
        if not options.report:
            for name, seed in jobs(options):
                run_part(name, seed, settings, results)
        if options.report or options.quick:
            pages = {"docs": options.docs, "readme": options.readme}
            report(results, settings, json_file=options.json, plot=options.plot, **pages)


if __name__ == "__main__":
    main()
