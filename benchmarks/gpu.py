"""What a stage costs on a GPU, and whether it repeats bit by bit: a base of random weights in Llama-2-7B's shape.

One sequence of four stages of eight layers each, in the four ways of `training.py` (its figures' names: `paper`,
`stock`, `uncached`, `cached`), on the base in 8 bits (bitsandbytes) and in bf16. Of each stage:

* `_tokens_per_s`: tokens of its steps over their time, the device waited for, without the first step;
* `_peak_gb`: the most memory that PyTorch had allocated, in 10^9 bytes.

`8bit_off_bit_equal` and so on say whether a sequence trained twice under `full_determinism` gave the same files,
with and without the activation cache, which is on the disk. `bf16_fp16_alone_equal` says whether the last stage is the
same where a new trainer trains it alone, on what the others left: under fp16 a scaler learns from overflows, and those
of other stages must not count. fp16 needs a GPU; without one `bf16_bf16_alone_equal` says the same of bf16. One run,
no repeats: the figures are of one machine.
Without a GPU it runs too, on the CPU and without figures of memory; then give it `--quick`.

```bash
python benchmarks/gpu.py --json gpu.json
python benchmarks/gpu.py --quick
```
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; full_determinism needs it

import torch
from peft import prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, TrainingArguments

from training import SLICES, Bench, Shape, make_parser, record

PRECISIONS = ("8bit", "bf16")


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    llama: Shape = field(
        default_factory=lambda: Shape(32, 4096, 11008, 32, 512, 8, vocabulary=32000, batch=8, epochs=4, r=32)
    )


QUICK = Settings(Shape(8, 64, 160, 4, 16, 2, vocabulary=256, batch=2, epochs=2, r=4))


class DeviceBench(Bench):
    """One base model on the device, used by one way after the other."""

    eval_trunk = True  # 8-bit layers may compute otherwise in training than in eval mode

    def __init__(self, shape: Shape, seed: int, precision: str, folder: Path):
        self.precision, self.folder, self.repeatable, self.autocast = precision, folder, False, "bf16"
        super().__init__(shape, seed)

    def make(self) -> Any:
        """The base as users load it, from a folder of random weights."""
        if not self.folder.exists():
            with torch.device(device()):
                drawn = super().make().to(torch.bfloat16)
            drawn.save_pretrained(self.folder)
            del drawn
        more: dict[str, Any] = {}
        if self.precision == "8bit":
            more["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.bfloat16, device_map={"": device()}, **more
        )
        if self.precision == "8bit":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return model

    def fresh(self) -> Any:
        """The same base again, without what the last way left on it."""
        for path, module in list(self.base.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, name = path.rpartition(".")
                setattr(self.base.get_submodule(parent), name, module.get_base_layer())
        if self.base.is_gradient_checkpointing:
            self.base.gradient_checkpointing_disable()
            self.base.disable_input_require_grads()
        return self.base

    def arguments(self, folder: str, **more: Any) -> TrainingArguments:
        return TrainingArguments(
            folder, num_train_epochs=self.shape.epochs, per_device_train_batch_size=self.shape.batch, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            full_determinism=self.repeatable, **{self.autocast: True}, **more,
        )  # fmt: skip


class StageMeter(TrainerCallback):
    """Tokens per second and peak memory of each stage."""

    def __init__(self, tokens: int):
        self.tokens, self.stages = tokens, list[dict[str, float | None]]()
        self._steps, self._seconds = 0, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._steps, self._seconds = -1, 0.0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._steps += 1
        if self._steps:  # the first one also sets kernels and buffers up
            self._seconds += now() - self._began

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
        self.stages.append({"tokens_per_s": self._steps * self.tokens / self._seconds, "peak_gb": peak})


def device() -> str:
    """Where the base lies."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_stages(bench: DeviceBench) -> dict[str, Any]:
    """Every way's stages."""
    figures: dict[str, Any] = {}
    ways = {
        "paper": partial(bench.stock, True),
        "stock": partial(bench.stock, False),
        "uncached": partial(bench.ours, "off"),
        "cached": partial(bench.ours, "disk"),
    }
    for name, way in ways.items():
        meter = StageMeter(bench.shape.batch * bench.shape.length)
        way(meter)
        for depth, measured in enumerate(meter.stages, 1):
            figures |= {f"{bench.precision}_{name}_stage{depth}_{what}": value for what, value in measured.items()}
            print(f"  {bench.precision}  {name:<9} stage {depth}  {measured}", flush=True)
    return figures


def measure_repeats(bench: DeviceBench) -> dict[str, bool]:
    """Whether a sequence trained twice gives the same files."""
    bench.repeatable, figures = True, {}
    try:
        for cache in ("off", "disk"):
            one, other = trained_digest(bench, cache), trained_digest(bench, cache)
            figures[f"{bench.precision}_{cache}_bit_equal"] = one == other
    finally:
        bench.repeatable = False
        torch.use_deterministic_algorithms(False)
    return figures


def measure_alone(bench: DeviceBench) -> dict[str, bool]:
    """Whether the last stage of a sequence is the same where its trainer has trained no other."""
    bench.repeatable, bench.autocast = True, "fp16" if torch.cuda.is_available() else "bf16"
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = bench.trainer(folder, "off", TrainerCallback())
            trainer.train()
            store = trainer.store
            manifest = store.manifest()
            last = max(manifest.stages, key=lambda stage: stage.depth)
            files = manifest.stages[last]
            store.write_manifest(manifest.without([last]))
            bench.trainer(folder, "off", TrainerCallback()).train()
            equal = store.manifest().stages[last] == files
        return {f"{bench.precision}_{bench.autocast}_alone_equal": equal}
    finally:
        bench.repeatable, bench.autocast = False, "bf16"
        torch.use_deterministic_algorithms(False)


def trained_digest(bench: DeviceBench, cache: str) -> str:
    """sha256 over the stages of one sequence."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = bench.trainer(folder, cache, TrainerCallback())
        trainer.train()
        files = sorted(Path(folder).glob("shard-*/*/*"))
        assert len(files) == 2 * SLICES
        return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def run(settings: Settings, seed: int) -> dict[str, Any]:
    """All figures by name."""
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            bench = DeviceBench(settings.llama, seed, precision, Path(folder) / "base")
            figures |= measure_stages(bench) | measure_repeats(bench)
            if precision == "bf16":
                figures |= measure_alone(bench)
            del bench
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return figures


def print_table(figures: dict[str, Any]) -> None:
    """A line for each way and stage."""
    for name, value in figures.items():
        print(f"{name:<40} {value if isinstance(value, str | bool | None) else format(value, '.4g')}")


def main() -> None:
    """Runs the benchmark."""
    options = make_parser(__doc__).parse_args()
    settings = QUICK if options.quick else Settings()
    logging.getLogger("hf_s3t").setLevel(logging.ERROR)
    figures = run(settings, options.seed)
    print_table(figures)
    if options.json:
        found = record("gpu", asdict(settings), options.seed, figures)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
