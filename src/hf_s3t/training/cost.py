"""What a training is about to cost, in the unit of its progress bar, and what it says of that before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from ..plan.tree import Plan, Stage


class Meter(NamedTuple):
    """Counts what stages cost: slice passes of all epochs or, where `max_steps` ends a stage, optimizer steps."""

    replay: float = 1.0
    epochs: float = 1.0
    max_steps: int = 0  # of each stage; 0: its epochs end it

    @classmethod
    def of(cls, args: Any, replay: float) -> Meter:
        """By the TrainingArguments."""
        return cls(replay, args.num_train_epochs, max(args.max_steps, 0))

    @property
    def unit(self) -> str:
        """What is counted."""
        return "steps" if self.max_steps else "slice passes"

    def cost(self, stage: Stage) -> float:
        """What a stage costs."""
        return self.max_steps or stage.passes(self.replay) * self.epochs

    def total(self, stages: Iterable[Stage]) -> float:
        """What some stages cost together."""
        return round(sum(map(self.cost, stages)), 2)

    def plain(self, plan: Plan) -> float:
        """What a plain fine-tuning on the same rows costs, with the same arguments."""
        return self.max_steps or plan.num_shards * plan.num_slices * self.epochs

    @property
    def meaning(self) -> str:
        """What a person has to know of the unit."""
        if self.max_steps:
            return f"Each stage has `max_steps` = {self.max_steps} steps; the bar counts those of all stages."
        epochs = f"{self.epochs:g} epoch{'' if self.epochs == 1 else 's'}"
        return (
            "A slice pass is one epoch over the rows of one slice. A stage has "
            f"{epochs} over the slices of its prefix. The bar counts the passes of all stages."
        )


def cost_line(missing: Iterable[Stage], plan: Plan, meter: Meter, megabytes: float) -> str:
    """What is about to be trained, beside one plain fine-tuning, in one line."""
    stages = [*missing]
    cost = meter.total(stages)
    line = (
        f"{len(stages)} of {len(plan.stages)} stages to train, {cost:g} {meter.unit} = "
        f"{cost / meter.plain(plan):.1f} x one plain fine-tuning, {megabytes:.1f} MB of stages."
    )
    return f"{line} {meter.meaning}" if stages else line


def tell(lines: str) -> None:
    """Shows lines as the Trainer shows its metrics: on standard output, above whatever bar there is."""
    tqdm.write(lines)
