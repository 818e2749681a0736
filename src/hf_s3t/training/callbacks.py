"""How callbacks see a staged run: one training instead of one per stage, with `stage` in their keyword arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from ..errors import IsolationError
from ..lora.tuner import StageTuner
from ..plan.tree import Stage
from ..seams.trainer import (
    check_handler,
    check_told,
    kept_generators,
    note_text,
    send_tensorboard,
    tracker_classes,
)
from .cost import Meter

logger = get_logger(__name__)


LOOKING = ("on_log", "on_save", "on_evaluate", "on_predict", "on_prediction_step")
"""Events that come as often as arguments say which change no bit: what callbacks draw then is not missed."""


class StageCallbackHandler(CallbackHandler):
    """Passes `stage` to every callback, and shows trackers one run: they begin with the first stage and end once.

    What they are told of a stage has its shard and its depth (the length of its prefix) as numbers beside the metrics,
    and tensorboard has the stage's name as text.

    It takes over the callbacks of the trainer's own handler. `report_to` names the trackers, as in the
    TrainingArguments.
    """

    def __init__(self, handler: CallbackHandler, report_to: list[str]):
        check_handler(handler)
        self.callbacks: list[TrainerCallback]
        self.__dict__.update(vars(handler))  # whatever it is made with
        self.stage: Stage | None = None
        self.trackers: tuple[Any, ...] = tracker_classes(report_to)
        self._begun = False
        self._named: Stage | None = None  # by text, in trackers that take it

    def keep_outside(self, output_dir: str) -> None:
        """Sends tensorboard to `OUTPUT_DIR-runs` unless told otherwise: its default lies in the store."""
        for callback in self.callbacks:
            if isinstance(callback, TensorBoardCallback):
                send_tensorboard(callback, f"{os.path.normpath(output_dir)}-runs")

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        everyone = self.callbacks
        tracked = event == "on_train_end" or (event == "on_train_begin" and self._begun)
        if tracked and self.stage is not None and self.trackers:
            self.callbacks = [callback for callback in everyone if not isinstance(callback, self.trackers)]
        self._begun = self._begun or event == "on_train_begin"
        try:
            with kept_generators() if event in LOOKING else nullcontext():
                if event == "on_log" and self.stage is not None and self.trackers:
                    control = self._track(args, state, control, **kwargs)
                return super().call_event(event, args, state, control, stage=self.stage, **kwargs)
        finally:
            self.callbacks = everyone

    def _track(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        """Tells trackers of a log, with the stage as numbers; leaves everyone else to be told."""
        assert self.stage is not None
        everyone = self.callbacks
        self.callbacks = [callback for callback in everyone if isinstance(callback, self.trackers)]
        tags = {"shard": self.stage.shard, "depth": self.stage.depth}
        if self._named != self.stage:
            self._named = self.stage
            for callback in self.callbacks:
                note_text(callback, "stage", self.stage.name, state.global_step)
        control = super().call_event(
            "on_log", args, state, control, stage=self.stage, logs={**(logs or {}), **tags}, **kwargs
        )
        self.callbacks = [callback for callback in everyone if not isinstance(callback, self.trackers)]
        return control

    def end_run(self, args: Any, state: Any, control: Any) -> None:
        """Tells the trackers, once, that the run is over."""
        if self._begun:
            for callback in self.callbacks:
                if self.trackers and isinstance(callback, self.trackers):
                    callback.on_train_end(args, state, control, model=self.model)
        self._begun, self._named = False, None


class StageGuard(TrainerCallback):
    """Checks promise 1 while a stage trains, and drops the stage when a deletion hits it.

    `drop_if_hit` raises when an intent covers the running stage, `check_rows` when the rows of a step were not looked
    at.
    """

    def __init__(self, tuner: StageTuner, drop_if_hit: Callable[[], None], check_rows: Callable[[], None]):
        self.tuner, self.drop_if_hit, self.check_rows = tuner, drop_if_hit, check_rows
        self.waiting: dict[str, torch.nn.Parameter] = {}
        self.told: set[str] = set()
        self.steps = self.first_step = 0

    @contextmanager
    def stage(self, state: Callable[[], Any]) -> Iterator[None]:
        """While a stage trains; raises if the Trainer did not tell of it. `state()` is the Trainer's state."""
        self.told.clear()
        self.first_step = 0
        yield
        check_told(self.told, state().global_step - self.first_step)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.told.add("on_train_begin")
        self.first_step = state.global_step
        self.tuner.check_mask()
        self.tuner.check_optimizer(optimizer)
        self.waiting, self.steps = self.tuner.adapter_parameters("default"), 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.add("on_pre_optimizer_step")
        self.check_rows()
        self.drop_if_hit()
        self.steps += 1
        reached = [name for name, value in self.waiting.items() if value.grad is not None and bool(value.grad.any())]
        for name in reached:
            del self.waiting[name]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.add("on_train_end")
        if not self.steps or not self.waiting:
            return
        if len(self.waiting) == len(self.tuner.training_owned):
            raise IsolationError(
                f"No parameter of the stage received a gradient in {self.steps} steps: it would store untrained "
                "weights. With activation checkpointing use `use_reentrant=False`; otherwise check that the loss "
                "depends on the model's outputs."
            )
        logger.warning(
            "%d parameters of the stage never received a non-zero gradient (LoRA A needs a second step): %s",
            len(self.waiting), ", ".join(sorted(self.waiting)[:5]),
        )  # fmt: skip


BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}, {remaining} left{postfix}]"
"""How the bar looks; the last time is what is expected."""


class PlanProgressCallback(ProgressCallback):
    """One progress bar over the whole plan, in slice passes of all epochs; see [`Meter`]."""

    def __init__(self) -> None:
        super().__init__()
        self.training_bar: Any = None
        self.meter, self.total, self.done = Meter(), 0.0, 0.0

    def begin(self, meter: Meter, stages: Iterable[Stage]) -> None:
        """What there is to do in this run."""
        self.meter, self.total = meter, _plain(meter.total(stages))

    def on_train_begin(self, args: Any, state: Any, control: Any, stage: Stage | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.open()
        if self.training_bar is not None and stage is not None:
            self.training_bar.set_description(stage.name)

    def on_step_end(self, args: Any, state: Any, control: Any, stage: Stage | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and stage is not None:
            self.show(self.done + self.meter.cost(stage) * state.global_step / max(state.max_steps, 1))

    def on_train_end(self, args: Any, state: Any, control: Any, stage: Stage | None = None, **kwargs: Any) -> None:
        if stage is not None:
            self.done += self.meter.cost(stage)
            self.show(self.done)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, stage: Stage | None = None, **kwargs: Any
    ) -> None:
        super().on_log(args, state, control, logs=_with_stage(logs, stage), **kwargs)

    def open(self) -> None:
        """Begins the bar, if there is none yet."""
        if self.training_bar is None:
            unit = f" {self.meter.unit}"
            self.training_bar = tqdm(total=self.total, unit=unit, dynamic_ncols=True, bar_format=BAR)

    def close(self) -> None:
        """Ends the bar with the run."""
        self.done = 0.0
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def show(self, position: float) -> None:
        """Moves the bar, if there is one, to so many slice passes."""
        if self.training_bar is not None:
            self.training_bar.n = _plain(position)
            self.training_bar.refresh()


class StagePrinter(PrinterCallback):
    """Prints metrics with the stage that they are of, where no bar is shown."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, stage: Stage | None = None, **kwargs: Any
    ) -> None:
        super().on_log(args, state, control, logs=_with_stage(logs, stage), **kwargs)


def _with_stage(logs: Any, stage: Stage | None) -> dict[str, Any]:
    return {**({} if stage is None else {"stage": stage.name}), **(logs or {})}


def _plain(number: float) -> float:
    """A number as a person writes it: 3 and not 3.0."""
    rounded = round(number, 2)
    return int(rounded) if rounded == int(rounded) else rounded
