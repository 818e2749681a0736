"""What S3T does on a GPU, in parts that can be run in slices of a few minutes.

* `--part promises`: whether files are equal bit by bit, of small models, in every precision (`gpu_promises.py`);
* `--part training`: what a stage costs, of a base in Llama-2-7B's shape (`gpu_training.py`);
* `--part serving`: answers and deletions under load, of such a base (`gpu_serving.py`).

Weights are random. Each part is a list of named cases. A line is printed, and the JSON file written, as soon as a case
has measured something: a run that is cut off keeps what it has. The file has the figures `by_case`, the reasons of
those that this stack cannot run (`not_run`), errors (`failed`), and what did not start because it might not have ended
within `--seconds` (`left_out`): `--only` runs that another time. No training is repeated, so the figures are of one
machine. With a GPU it needs 60 GB of its memory, and 40 GB of disk. Without one it runs on the CPU, and has no figures
of memory; then give it `--quick`.

```bash
python benchmarks/gpu.py --part promises --seconds 240 --json promises.json
python benchmarks/gpu.py --part training --only "bf16" --seconds 240 --json training.json
python benchmarks/gpu.py --quick
```
"""

from __future__ import annotations

import gc
import logging
import shlex
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import gpu_promises
import gpu_serving
import gpu_training
import torch
import transformers
from datasets import disable_progress_bars
from gpu_runs import Runs, hardware, on_gpu, totals, versions
from huggingface_hub import constants

from training import make_parser, record

PARTS: dict[str, ModuleType] = {"promises": gpu_promises, "training": gpu_training, "serving": gpu_serving}


def parse() -> Any:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="give it again for more; default: all")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name holds it")
    parser.add_argument("--seconds", type=float, help="no case starts that might not end by then (default: no limit)")
    return parser.parse_args()


def report(parts: list[str], quick: bool, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the file holds before anything is measured, and the settings of each part."""
    settings = {part: PARTS[part].QUICK if quick else PARTS[part].Settings() for part in parts}
    found = record("gpu", {part: asdict(one) for part, one in settings.items()}, seed, {})
    found["versions"] |= versions(["bitsandbytes", "safetensors", "datasets", "triton"])
    found["hardware"] |= hardware()
    return found, settings


def be_quiet() -> None:
    """Leaves the lines of cases, and errors: of a lent machine one may see the last few thousand characters alone."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    for name in ("hf_s3t", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.PrinterCallback.on_log = lambda *args, **kwargs: None


def main() -> int:
    """Runs the benchmark; returns what the process ends with."""
    options = parse()
    be_quiet()
    if not on_gpu():
        torch.set_num_threads(1)
    parts = [part for part in PARTS if part in (options.part or PARTS)]
    found, settings = report(parts, options.quick, options.seed)
    print(found["hardware"], found["versions"], found["commit"], flush=True)
    runs = Runs(found, options.json, options.only, options.seconds)
    with tempfile.TemporaryDirectory() as home:
        constants.HF_HOME = home  # nothing is remembered of earlier runs
        for part in parts:
            if part == "promises" or options.quick:
                gc.freeze()  # after each stage accelerate looks at all objects, those of the imports, too
            with tempfile.TemporaryDirectory() as scratch:
                for case in PARTS[part].cases(settings[part], options.seed, Path(scratch)):
                    runs.run(case)
            gc.unfreeze()
    return conclude(runs, found["figures"])


def conclude(runs: Runs, figures: dict[str, Any]) -> int:
    """What is known in the end; returns 1 if a case failed, or if there was none."""
    figures |= {f"stage_files_{ending}": totals(runs.by_case, f"_{ending}") for ending in ("equal", "unequal")}
    runs.write()
    print(f"\nstage files: {figures['stage_files_equal']} equal, {figures['stage_files_unequal']} unequal")
    print(f"cases: {len(runs.by_case)} measured, {len(runs.not_run)} not run, {len(runs.failed)} failed")
    if runs.left_out:
        print("left out, for another time: " + " ".join(f"--only {shlex.quote(name)}" for name in runs.left_out))
    looked_at = (*runs.by_case, *runs.not_run, *runs.failed, *runs.left_out)
    if not looked_at:
        print(f"no case has {' or '.join(runs.only)} in its name")
    return int(bool(runs.failed) or not looked_at)


if __name__ == "__main__":
    sys.exit(main())
