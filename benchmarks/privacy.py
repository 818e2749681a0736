"""Attacks as audits: what somebody can find out about deleted rows before, after and from both.

A store is trained, three quarters of the persons of one slice are deleted, and it is repaired: `S3TTrainer.train`,
`delete`, `train`. After each step an attacker asks the served model and tries to tell the deleted rows, which were
members, from rows of the same source that were never seen. Before the deletion he must succeed, or his failure
afterwards shows nothing: the benchmark then says so and ends with 1. It ends with 1, too, if he succeeds after it.

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

Figures: `mia_auc_TIME`, the area under the curve, mean of both tasks, each by the attack that is best before the
deletion; `canary_exposure_TIME` in bits; `TASK_mia_auc_TIME_ATTACK`; `TASK_mia_tpr_TIME_ATTACK`, the true positives at
1 % false ones, of all seeds together, if there are enough rows never seen. The others are means over seeds; `_low` and
`_high` are the 95 % interval by bootstrap over seeds and rows.

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
import torch
import transformers
from filelock import FileLock, Timeout
from privacy_report import report
from privacy_subjects import Subject, attacked_store, make_rows, make_task, shadow_models
from quality_report import commit_of

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    alpaca: Subject = Subject(rows=160, epochs=5, rate=2e-2, r=32, max_length=96, batch_size=8, canaries=12, repeats=8)
    sst2: Subject = Subject(rows=120, epochs=15, rate=1e-3, r=16, layers_per_slice=2, max_length=16)
    shadows: int = 6
    choose: str = (
        "few short rows, many epochs and repeated canaries, so that members are learned by heart; by the control "
        "before the deletion, on seed 7: Alpaca of two settings; SST-2 of rates from 5e-4 to 5e-3 and 1 to 3 layers a "
        "slice. Runs of SST-2 on seeds 0 to 2 with 160 rows, rate 2e-3, 1 layer and 10 or 20 epochs had controls near "
        "the bound and were dropped"
    )


QUICK = Settings(
    alpaca=Subject(rows=24, epochs=5, rate=2e-2, r=32, max_length=96, batch_size=8, canaries=4),
    sst2=Subject(rows=24, epochs=8, rate=2e-3, r=16, max_length=16),
    shadows=2,
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


def attack(name: str, subject: Subject, seed: int, scratch: Path) -> dict[str, Any]:
    """Trains, deletes, repairs and asks: one task with one seed."""
    task = make_task(name, subject)
    found = attacked_store(task, subject, make_rows(task, subject, seed), scratch / "store", seed)
    return plain(asdict(found))


def shadow(name: str, subject: Subject, number: int, scratch: Path) -> dict[str, Any]:
    """One of the attacker's stores."""
    task = make_task(name, subject)
    pool = make_rows(task, subject, 0).pool
    return plain({kind: asdict(one) for kind, one in shadow_models(task, subject, pool, scratch, number).items()})


def plain(value: Any) -> Any:
    """Arrays as lists, for JSON."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else getattr(value, "tolist", lambda: value)()


def run_part(kind: str, name: str, number: int, settings: Settings, results: Path) -> None:
    """Attacks one task with one seed, or trains a shadow store; writes a file, unless it is there or being made."""
    file, subject = results / f"{name}-{kind}-{number}.json", getattr(settings, name)
    wanted = asdict(subject)
    try:
        with FileLock(file.with_suffix(".lock"), timeout=0):
            if file.exists() and json.loads(file.read_text())["settings"] == wanted:
                print(f"{name}, {kind} {number}: done already", flush=True)
                return
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as scratch:
                found = (attack if kind == "seed" else shadow)(name, subject, number, Path(scratch))
            seconds = time.monotonic() - started
            about = {"number": number, "commit": commit_of(), "seconds": seconds, "settings": wanted}
            written = file.with_suffix(".part")
            written.write_text(json.dumps(about | {"found": found}) + "\n")
            written.replace(file)
            print(f"{name}, {kind} {number}: {seconds:.0f} s", flush=True)
    except Timeout:
        print(f"{name}, {kind} {number}: runs in another process", flush=True)


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
            parts = [("seed", seed) for seed in options.seed or (SEEDS[:1] if options.quick else SEEDS)]
            for kind, number in parts + [("shadow", number) for number in range(settings.shadows)]:
                for name in options.task:
                    run_part(kind, name, number, settings, results)
        if options.report or options.quick:
            return report(results, settings, json_file=options.json, docs=options.docs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
