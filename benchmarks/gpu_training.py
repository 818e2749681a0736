"""What training costs on this device: `--part training` of `gpu.py`.

One sequence of four stages, in the four ways of `training.py`, on a base in bf16 and on one in 8 bits (bitsandbytes):

* `stage1_tokens_per_s` and so on: tokens of a stage's steps over their time, the device waited for, without the first;
* `stage1_peak_gb`: the most memory that PyTorch had allocated, in 10^9 bytes;
* `train_seconds`: all of `train()`, of stock training the sum of its four; `steps_seconds`: all steps of it;
* `besides_steps`: the share of the rest, which is made of
  * `proof_seconds`: fingerprints of what is frozen, at both ends of a stage,
  * `cache_seconds`: filling the cache, with all that is tried and looked up of it before a stage,
  * `writing_seconds`: stages, and the root in the end,
  * `identity_seconds`: sha256 of the base, which the machine remembers after the first of our ways,
  * `other_seconds`: loading rows, setting a stage up, what `train()` leaves to serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_runs import Case, Note, device, drawn_in, free_memory, now, on_gpu
from peft import prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from hf_s3t import S3TTrainer
from hf_s3t.lora.tuner import StageTuner
from hf_s3t.store import recipe
from hf_s3t.training.trunk_cache import TrunkCache
from training import Bench, Shape

PRECISIONS = ("bf16", "8bit")
SPENT = {
    "proof": ((StageTuner, "frozen_fingerprints"), (StageTuner, "check_frozen")),
    "cache": ((TrunkCache, "_prepare"),),
    "writing": ((S3TTrainer, "_store_stage"), (S3TTrainer, "_close_store")),
    "identity": ((recipe, "base_digest"),),
}
"""Where the time of our `train()` goes, beside its steps: functions of which none calls another one."""


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    llama: Shape = Shape(32, 4096, 11008, 32, 512, 8, vocabulary=32000, batch=8, epochs=4, r=32)


QUICK = Settings(Shape(4, 64, 160, 4, 16, 1, vocabulary=256, batch=2, epochs=2, r=4))


class DeviceBench(Bench):
    """One base model on the device, used by one way after the other."""

    eval_trunk = True  # 8-bit layers may compute otherwise in training than in eval mode

    def __init__(self, shape: Shape, seed: int, precision: str, folder: Path):
        self.precision, self.folder = precision, folder
        super().__init__(shape, seed)

    def make(self) -> Any:
        """The base in bf16, or what users load in 8 bits from a folder of it."""
        if self.precision == "bf16":
            with drawn_in(torch.bfloat16):
                return super().make()
        if not self.folder.exists():
            with drawn_in(torch.bfloat16):
                super().make().save_pretrained(self.folder)
            free_memory()
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.bfloat16, device_map={"": device()},
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        )  # fmt: skip
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

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
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=not on_gpu(), bf16=True, **more,
        )  # fmt: skip


class StageMeter(TrainerCallback):
    """Notes tokens per second and peak memory of each stage when it ends."""

    def __init__(self, tokens: int, note: Note):
        self.tokens, self.note, self.stages, self.seconds = tokens, note, 0, 0.0
        self._steps: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._steps = []
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._steps.append(now() - self._began)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu() else None
        self.stages += 1
        self.seconds += sum(self._steps)
        later = self._steps[1:]  # the first one also sets kernels and buffers up
        speed = len(later) * self.tokens / sum(later)
        self.note(**{f"stage{self.stages}_tokens_per_s": speed, f"stage{self.stages}_peak_gb": peak})


@contextmanager
def timed(owner: Any, name: str, seconds: list[float]) -> Iterator[None]:
    """Notes how long each call of a function takes, with what it gives the device to do."""
    plain = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = now()
        try:
            return plain(*args, **kwargs)
        finally:
            seconds.append(now() - began)

    with patch.object(owner, name, wrapper):
        yield


def measure(way: Callable[[StageMeter], None], tokens: int, trainer: type[Trainer], note: Note) -> None:
    """One way's sequence; `trainer` is the class whose `train()` is its whole time."""
    meter, whole = StageMeter(tokens, note), list[float]()
    spent: dict[str, list[float]] = {name: [] for name in SPENT}
    with ExitStack() as stack:
        stack.enter_context(timed(trainer, "train", whole))
        for name, functions in SPENT.items():
            for owner, function in functions:
                stack.enter_context(timed(owner, function, spent[name]))
        way(meter)
    note(**shares(sum(whole), meter.seconds, {name: sum(seconds) for name, seconds in spent.items()}))


def shares(whole: float, steps: float, spent: Mapping[str, float]) -> dict[str, float]:
    """Where the time of `train()` went."""
    figures = {"train_seconds": whole, "steps_seconds": steps, "besides_steps": 1 - steps / whole}
    figures |= {f"{name}_seconds": seconds for name, seconds in spent.items()}
    return figures | {"other_seconds": whole - steps - sum(spent.values())}


class Bases:
    """The base of one precision at a time."""

    def __init__(self, settings: Settings, seed: int, scratch: Path):
        self.settings, self.seed, self.scratch = settings, seed, scratch
        self.bench: DeviceBench | None = None

    def close(self) -> None:
        """Gives its memory back."""
        self.bench = None
        free_memory()

    def take(self, precision: str) -> None:
        """Makes it, unless it is there; the other one goes first."""
        if self.bench is None or self.bench.precision != precision:
            self.close()
            self.bench = DeviceBench(self.settings.llama, self.seed, precision, self.scratch / "base")

    def measure(self, name: str, note: Note) -> None:
        """One way."""
        bench = self.bench
        assert bench is not None
        ways: dict[str, tuple[Callable[[StageMeter], None], type[Trainer]]] = {
            "paper": (partial(bench.stock, True), Trainer),
            "stock": (partial(bench.stock, False), Trainer),
            "uncached": (partial(bench.ours, "off"), S3TTrainer),
            "cached": (partial(bench.ours, "disk"), S3TTrainer),
        }
        way, trainer = ways[name]
        measure(way, bench.shape.batch * bench.shape.length, trainer, note)


def cases(settings: Settings, seed: int, scratch: Path) -> Iterator[Case]:
    """Every way on every base."""
    bases = Bases(settings, seed, scratch)
    for precision in PRECISIONS:
        for way in ("paper", "stock", "uncached", "cached"):
            yield Case(
                f"training {precision} {way}", f"training {precision}", partial(bases.measure, way),
                partial(bases.take, precision),
            )  # fmt: skip
    bases.close()
