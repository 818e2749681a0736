"""What S3T does on a GPU, in parts that can be run in slices of a few minutes.

* `--part promises`: whether files are equal bit by bit, of small models, in every precision (`gpu_promises.py`);
* `--part training`: what a stage costs, of a base in Llama-2-7B's shape (`gpu_training.py`);
* `--part serving`: answers and deletions under load, of such a base (`gpu_serving.py`).

Weights are random. Each part is a list of named cases. A line is printed, and the JSON file written, as soon as a case
has measured something, so that a run that is cut off keeps what it has. `by_case` has the figures of each case,
`not_run` the reasons of those that this stack cannot run, `failed` the errors, and `left_out` those that did not start
because they might not have ended within `--seconds`: `--only` runs them another time. One run, no repeats of trainings:
the figures are of one machine. Without a GPU it runs too, on the CPU and without figures of memory; then give it
`--quick`. With a GPU it needs 60 GB of its memory, and 40 GB of disk.

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
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from gpu_runs import Runs, hardware, on_gpu, totals, versions  # first: it sets what CUDA reads when it starts

import gpu_promises
import gpu_serving
import gpu_training
import torch
from huggingface_hub import constants
from transformers import PrinterCallback
from training import make_parser, record

PARTS: dict[str, ModuleType] = {"promises": gpu_promises, "training": gpu_training, "serving": gpu_serving}
QUIETED = ("hf_s3t", "accelerate", "bitsandbytes", "torch.utils")


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


def main() -> int:
    """Runs the benchmark; 1 if a case failed."""
    options = parse()
    for name in QUIETED:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not on_gpu():
        torch.set_num_threads(1)
    PrinterCallback.on_log = lambda *args, **kwargs: None  # lines are those of cases
    parts = options.part or list(PARTS)
    found, settings = report(parts, options.quick, options.seed)
    print(found["hardware"], found["versions"], found["commit"], flush=True)
    runs = Runs(found, options.json, options.only, options.seconds)
    with tempfile.TemporaryDirectory() as home:
        constants.HF_HOME = home  # nothing is remembered of earlier runs
        for part in dict.fromkeys(parts):
            gc.freeze()
            with tempfile.TemporaryDirectory() as scratch:
                for case in PARTS[part].cases(settings[part], options.seed, Path(scratch)):
                    runs.run(case)
    figures = found["figures"]
    figures |= {f"stage_files_{ending}": totals(runs.by_case, f"_{ending}") for ending in ("equal", "unequal")}
    runs.write()
    print(f"\nstage files: {figures['stage_files_equal']} equal, {figures['stage_files_unequal']} unequal")
    print(f"cases: {len(runs.by_case)} measured, {len(runs.not_run)} not run, {len(runs.failed)} failed")
    if runs.left_out:
        print("left out, for another time: " + " ".join(f"--only {shlex.quote(name)}" for name in runs.left_out))
    return int(bool(runs.failed))


if __name__ == "__main__":
    sys.exit(main())
