"""What a training makes of an order: the stage's adapter, and what is told of how and on what it was trained."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..lora.adapter import Adapter
from ..plan.tree import Stage
from ..store.receipts import versions
from ..store.stage_comparison import MACHINE


@dataclass(frozen=True)
class TrainedStage:
    """A stage that ended, wherever it was trained, and that is not in the store yet."""

    adapter: Adapter
    steps: int
    loss: float
    seconds: float
    machine: Mapping[str, str] = field(default_factory=dict)  # see [`machine`]

    @property
    def about(self) -> dict[str, Any]:
        """What the store's record of the stage says of how it was trained."""
        about = {"steps": self.steps, "seconds": self.seconds, "versions": versions()}
        return {**about, MACHINE: dict(self.machine)}

    @property
    def output(self) -> TrainOutput:
        """What the Trainer gave."""
        return TrainOutput(self.steps, self.loss, {})

    def line(self, stage: Stage, examples: int) -> str:
        """One line for the log."""
        layers, numel = self.adapter.config["layers_to_transform"], sum(map(np.size, self.adapter.arrays.values()))
        return (
            f"stage {stage.name}: layers {layers}, {examples} examples, {numel} trainable parameters, "
            f"loss {self.loss:.4f}, {self.seconds:.1f} s"
        )


def summary(outputs: Mapping[Stage, TrainOutput]) -> TrainOutput:
    """Steps and mean loss of several stages, and the loss of each."""
    steps = sum(output.global_step for output in outputs.values())
    loss = sum(output.training_loss * output.global_step for output in outputs.values()) / max(steps, 1)
    return TrainOutput(steps, loss, {f"{stage.name}/loss": out.training_loss for stage, out in outputs.items()})


def machine(args: TrainingArguments) -> dict[str, str]:
    """What beside versions and settings decides the bits of a stage, as plain data that names no machine."""
    found = {"device": args.device.type, "processes": str(args.world_size)}
    if args.device.type == "cuda":
        libraries = {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
        return found | {"device": torch.cuda.get_device_name()} | {name: str(at) for name, at in libraries.items()}
    kernels = torch.backends.cpu.get_cpu_capability()
    return found | {"threads": str(torch.get_num_threads()), "kernels": kernels, "processor": platform.machine()}
