"""The stage that trains: its scratch folder, its checkpoints, its log, and the deletion that may hit it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import EarlyStoppingCallback

from ..files import remove
from ..seams.trainer import TrainerSeam, kept_generators, written_checkpoint
from ..store.folder import LOCK_SECONDS
from ..store.store import S3TStore
from .apart import Apart
from .checkpoints import collates_the_same, latest_checkpoint, mark_complete
from .processes import on_main_process
from .stage_orders import StageDropped, StageOrder, StoreWatch, running_folder

logger = get_logger(__name__)


class RunningStageMixin(TrainerSeam):
    """The part of [`S3TMixin`] that knows which stage is running, or that none is."""

    args: Any
    accelerator: Any
    callback_handler: Any
    store: S3TStore
    _order: StageOrder | None
    _counted: StageOrder | None = None
    _steps = _before = 0
    """Optimizer steps of the whole plan: up to what was logged last, and before the stage that is counted."""
    charts_per_stage: bool
    watch: StoreWatch | Apart

    # ---- deletions while a stage trains ----

    def _drop_if_hit(self) -> None:
        """Raises [`StageDropped`] on every process at the same step once an intent covers the running stage."""
        hit = False
        if self._order is not None and self.is_world_process_zero():
            hit = self.watch.changed() and self.watch.is_hit(self.order)
        if self.args.world_size > 1:
            flag: Any = torch.tensor([hit], device=self.args.device, dtype=torch.int32)
            torch.distributed.broadcast(flag, 0)
            hit = bool(flag)
        if hit:
            raise StageDropped

    # ---- running checkpoints ----

    @property
    def order(self) -> StageOrder:
        """The running stage's order."""
        assert self._order is not None
        return self._order

    @property
    def _running(self) -> Path:
        return running_folder(self.store, self.order.stage)

    def checkpoint_folder(self) -> Path | None:
        """A running stage's own: the store receives our files only, the Trainer's checkpoints are scratch."""
        if self._order is None:
            return None
        self.store.private_folder("running")  # on every machine that writes one
        return self._running

    def _resumable_checkpoint(self, resume: bool) -> str | None:
        """The newest complete checkpoint of the running stage; whatever else lies there is removed."""
        for other in self.store.private.glob("running/*"):
            if other != self._running or not resume or self.args.save_only_model or self._stops_early:
                remove(other)
        checkpoint = latest_checkpoint(self._running, self.order.mark)
        if checkpoint is not None:
            loader = self.get_train_dataloader()
            if not collates_the_same(loader.dataset, loader.collate_fn, self.args.per_device_train_batch_size):
                logger.warning("stage %s starts again: its batches are random", self.order.stage.name)
                remove(self._running)
                return None
        return checkpoint

    @property
    def _stops_early(self) -> bool:
        """Whether a callback counts evaluations, which a checkpoint does not restore: such a stage starts again."""
        return any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks)

    @contextmanager
    def writing_checkpoint(self) -> Iterator[None]:
        """Under the write lock: a deletion either waits for the checkpoint and then removes it, or comes first."""
        self._on_main(self._enter_checkpoint)
        try:
            yield
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                mark_complete(written_checkpoint(self._running, self.state.global_step), self.order.mark)
        finally:
            if self.is_world_process_zero():
                self.store.write_lock.release()

    def _enter_checkpoint(self) -> None:
        self.store.write_lock.acquire(LOCK_SECONDS)
        try:
            if self.watch.is_hit(self.order):
                raise StageDropped
        except BaseException:  # nobody but the caller of a checkpoint that begins gives the lock back
            self.store.write_lock.release()
            raise

    @contextmanager
    def _training_lock(self) -> Iterator[None]:
        """One training per store; a deletion needs another lock and never waits for this one."""
        self._on_main(partial(self.store.train_lock.acquire, 0))
        try:
            yield
        finally:
            if self.is_world_process_zero():
                self.store.train_lock.release()

    # ---- what is logged ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; steps count over the whole plan, and an entry of the history says of which stage it is."""
        own, name = self.state.global_step, None if self._order is None else self._order.stage.name
        if self._order is not None:
            if self._counted is not self._order:  # a repair goes on counting where the run before it ended
                self._counted, self._before = self._order, max(self._order.steps_before, self._steps)
            self._steps = self._before + own
        if name is not None and self.charts_per_stage:
            logs = _named(logs, name)
        self.state.global_step = max(self._steps, own)
        try:
            with nullcontext() if name is None else kept_generators():
                super().log(logs, *args, **kwargs)
            if name is not None and self.state.log_history:
                self.state.log_history[-1]["stage"] = name
        finally:
            self.state.global_step = own

    # ---- processes ----

    def _on_main(self, function: Callable[[], Any]) -> Any:
        return on_main_process(self.args, function)


def _named(logs: dict[str, float], name: str) -> dict[str, float]:
    """Metrics by names that begin with a stage's."""
    return {
        f"eval_{name}/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"{name}/{key}": value
        for key, value in logs.items()
    }
