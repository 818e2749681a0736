"""Attacks as audits: what somebody can find out about deleted rows before, after and from both.

A store is trained, half of the persons of one slice are deleted, and it is repaired: `S3TTrainer.train`, `delete`,
`train`. After each step an attacker asks the served model and tries to tell the deleted rows, which were members, from
rows of the same source that were never seen. Before the deletion he must succeed, or his failure afterwards shows
nothing: the benchmark then says so and ends with 1. It ends with 1, too, if he succeeds after the deletion.

Attacks:

* `loss`: the loss of the label, or of the response (Yeom et al. 2018);
* `min_k`: the mean log-likelihood of the fifth of the response's tokens that are least likely (after Shi et al. 2024,
  who take all tokens of a text);
* `lira`: the online likelihood ratio attack (Carlini et al. 2022) with stages of the attacker's own stores as shadows;
* canaries: a code is planted, and ranked among all codes by likelihood (exposure; Carlini et al. 2019).

Times: `before`, `after` and `repaired` have one model. `two_models` is somebody who kept the model from before and
compares it with the one after the deletion (Chen et al. 2021). More of him, per task: `hit_slice`, does he see which
slice a request hit; `mates`, does he tell the deleted from the others of their slice before the repair; and
`mates_repaired`, after it. `no_old` compares the models after deletion and after repair only.

Figures: `mia_auc_TIME`, the area under the curve, mean of both tasks, each by the attack that is best at it before the
deletion; `canary_exposure_TIME` in bits;
`TASK_mia_auc_TIME_ATTACK` and `TASK_mia_tpr_TIME_ATTACK`, the true positives at 1 % false ones, where enough rows were
never seen. All are means over seeds; `_low` and `_high` are the 95 % interval by bootstrap over seeds and rows.

Several processes may run the same command side by side: each takes what no other one has begun.

```bash
python benchmarks/privacy.py --results results & python benchmarks/privacy.py --results results & wait
python benchmarks/privacy.py --results results --report --json privacy.json --docs docs/privacy.md
python benchmarks/privacy.py --quick
```
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout
from privacy_attacks import lira
from privacy_report import report
from privacy_subjects import Attacked, Shadows, Subject, attacked_store, make_rows, make_task, shadow_models
from quality_report import commit_of

SEEDS = (0, 1, 2)
MODELS = {  # whose signals, less whose; and which shadows are like that
    "before": ("before", None, "whole"),
    "after": ("after", None, "part"),
    "repaired": ("repaired", None, "whole"),
    "two_models": ("before", "after", "difference"),
    "two_models_repaired": ("before", "repaired", None),
    "no_old": ("repaired", "after", "difference"),
}


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    alpaca: Subject = Subject(
        rows=300, epochs=8, rate=1e-2, r=16, shadows=3, max_length=96, canaries=16, repeats=8
    )
    sst2: Subject = Subject(rows=160, epochs=8, rate=2e-3, r=16, shadows=3, max_length=64)
    choose: str = (
        "few rows, many epochs, a high rate and repeated canaries, so that members are learned by heart; by the control "
        "before the deletion, on seed 7 (Alpaca: 6 epochs; SST-2: 6 epochs of 240 rows, then fewer rows and 8 epochs)"
    )


QUICK = Settings(
    alpaca=Subject(rows=24, epochs=8, rate=2e-2, r=16, shadows=2, max_length=96, canaries=4),
    sst2=Subject(rows=24, epochs=10, rate=3e-3, r=16, shadows=2, max_length=64),
)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="check the machinery on a few rows, in under a minute")
    parser.add_argument("--task", nargs="+", choices=("alpaca", "sst2"), default=["alpaca", "sst2"], help="only these")
    parser.add_argument("--seed", type=int, nargs="+", help="one run per seed (default: 0 1 2)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="keeps what is finished")
    parser.add_argument("--report", action="store_true", help="run nothing: join what is finished")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="a page whose marked tables are written anew")
    return parser


def scores(attacked: Attacked, shadows: dict[str, Shadows]) -> dict[str, dict[str, list[float]]]:
    """By time and attack, the score of each row of the pool."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, (minuend, subtrahend, like) in MODELS.items():
        observed = dict(attacked.signals[minuend])
        if subtrahend:
            observed = {signal: observed[signal] - attacked.signals[subtrahend][signal] for signal in observed}
        found[name] = {signal: values.tolist() for signal, values in observed.items()}
        if like:
            of_shadows = np.stack([one["loss"] for one in shadows[like].signals])
            found[name]["lira"] = lira(observed["loss"], of_shadows, np.stack(shadows[like].seen)).tolist()
    return found


def attack(name: str, subject: Subject, seed: int, scratch: Path) -> dict[str, Any]:
    """Trains, deletes, repairs and attacks one task with one seed."""
    task = make_task(name, subject, seed)
    rows = make_rows(task, subject, seed)
    attacked = attacked_store(task, subject, rows, scratch / "attacked", seed)
    shadows = shadow_models(task, subject, rows, scratch / "shadows", seed)
    exposures = {
        when: {kind: values.tolist() for kind, values in kinds.items()} for when, kinds in attacked.exposures.items()
    }
    return {"kinds": attacked.kinds, "scores": scores(attacked, shadows), "exposures": exposures}


def run_part(name: str, seed: int, settings: Settings, results: Path) -> None:
    """Attacks one task with one seed and writes a file, unless it is there or another process runs it."""
    file, subject = results / f"{name}-{seed}.json", getattr(settings, name)
    wanted = asdict(subject)
    try:
        with FileLock(file.with_suffix(".lock"), timeout=0):
            if file.exists() and json.loads(file.read_text())["settings"] == wanted:
                print(f"{name}, seed {seed}: done already", flush=True)
                return
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as scratch:
                found = attack(name, subject, seed, Path(scratch))
            seconds = time.monotonic() - started
            about = {"task": name, "seed": seed, "commit": commit_of(), "seconds": seconds, "settings": wanted}
            written = file.with_suffix(".part")
            written.write_text(json.dumps(about | found) + "\n")
            written.replace(file)
            print(f"{name}, seed {seed}: {seconds:.0f} s", flush=True)
    except Timeout:
        print(f"{name}, seed {seed}: runs in another process", flush=True)


def main() -> int:
    """Runs the benchmark; 1 if it shows nothing, or a leak."""
    options = make_parser().parse_args()
    settings = QUICK if options.quick else Settings()
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
            for seed in options.seed or (SEEDS[:1] if options.quick else SEEDS):
                for name in options.task:
                    run_part(name, seed, settings, results)
        if options.report or options.quick:
            return report(results, settings, json_file=options.json, docs=options.docs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
