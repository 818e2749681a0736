"""A worker: a process of Ray's that trains one stage after the other, and keeps its model and its rows between them.

It builds the trainer as a script does, but apart from the store (`training/apart.py`). Of the driver it gets

* how to build the trainer, and the manifest of the store, which anybody may read;
* a number and a place, shard and slice, for each row of the train set (`training/rows_apart.py`);
* for each stage the numbers of its examples in their order, and the adapter of its parent prefix.

That is all that a stage is computed from. It gets neither the key nor the state: no digest of an id, nothing about who
was deleted. What it gives back is the stage's adapter; the driver alone writes it into the store.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from ..files import remove
from ..store.folder import KEY_VARIABLE
from ..store.manifest import Manifest
from ..store.receipts import versions
from ..training.apart import Apart, training_apart
from ..training.processes import on_main_process
from ..training.rows_apart import Numbers, rows_identity
from ..training.stage_orders import StageDropped, StageOrder
from ..training.trained_stage import TrainedStage
from ..training.trainer import S3TMixin
from .scratch import Scratch

MakeTrainer = Callable[[], S3TMixin] | str


def build(make_trainer: MakeTrainer) -> S3TMixin:
    """The trainer that a function without arguments builds; `"module:function"` names one."""
    if isinstance(make_trainer, str):
        module, _, name = make_trainer.partition(":")
        make_trainer = getattr(importlib.import_module(module), name)
    trainer = make_trainer()  # type: ignore[operator]
    if not isinstance(trainer, S3TMixin):
        raise ValueError(f"`make_trainer` must return an S3TTrainer or another S3TMixin, got {trainer!r:.80}.")
    if trainer._rows is None:
        raise ValueError("`make_trainer` must give its trainer a `train_dataset`.")
    return trainer


@dataclass(frozen=True)
class Identity:
    """What a worker says of itself once it can train, and what of it has to be as on the driver."""

    node: str
    pid: int
    device: str
    versions: dict[str, str]
    recipe: dict[str, Any]
    rows: dict[str, Any]

    @classmethod
    def of(cls, trainer: S3TMixin) -> Identity:
        """Of the process that asks."""
        rows = rows_identity(trainer.rows.raw, trainer.rows.dataset)
        device = trainer.args.device.type
        return cls(socket.gethostname(), os.getpid(), device, versions(), trainer.recipe(), rows)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.node}"


class Worker:
    """One of them, as an actor. Its methods run in two threads: one trains, the other listens.

    Args:
        threads (`int`): how many threads torch computes with.
        rank, processes (`int`): which of the processes this is that train a stage together, on one node.
        first (`Worker`, *optional*): the actor of rank 0, of the others.
    """

    def __init__(self, threads: int, rank: int = 0, processes: int = 1, first: Any = None):
        os.environ.pop(KEY_VARIABLE, None)
        self.threads, self.rank, self.processes, self.first = threads, rank, processes, first
        self.scratch = Scratch() if rank == 0 else None
        self.trainer: Any = None
        self._running: int | None = None
        self._called_off: set[int] = set()
        self._generation: int | None = None
        self._port: int | None = None

    @ray.method(concurrency_group="training")
    def begin(self, make_trainer: MakeTrainer, manifest: Manifest) -> Identity:
        """Builds the trainer."""
        torch.set_num_threads(self.threads)
        scratch, port = self.meeting() if self.first is None else ray.get(self.first.meeting.remote())
        if self.processes > 1:
            self._join(port)
        apart = Apart(scratch, lambda: self._running in self._called_off)
        with training_apart(apart):
            trainer = build(make_trainer)
        if trainer.watch is not apart:
            raise ValueError("`make_trainer` returned a trainer that had been built before. Build it in the function.")
        if self.rank == 0:
            trainer.store.write_manifest(manifest)  # how a store's states are computed: see `TrunkCache.way`
        on_main_process(trainer.args, lambda: None)  # the others wait for it
        self.trainer = trainer
        trainer.try_evaluation()
        return Identity.of(trainer)

    def _join(self, port: int) -> None:
        """Says to accelerate what a launcher would say. Of GPUs this process sees its own alone."""
        local = 0 if torch.cuda.is_available() else self.rank
        told = {"RANK": self.rank, "LOCAL_RANK": local, "WORLD_SIZE": self.processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")

    @ray.method(concurrency_group="listening")
    def meeting(self) -> tuple[Path, int]:
        """Of rank 0: the folder that its processes share, and a free port at which they find each other."""
        assert self.scratch is not None
        if self._port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port = probe.getsockname()[1]
        return self.scratch.path, self._port

    @ray.method(concurrency_group="training")
    def train(self, serial: int, order: StageOrder, examples: np.ndarray, numbers: Numbers) -> TrainedStage | None:
        """Trains one stage. `None`: it was called off, or this is not the first process.

        Args:
            serial (`int`): number of this attempt.
            order ([`StageOrder`]): without its examples.
            examples (`np.ndarray`): their numbers, in their order.
            numbers ([`Numbers`]): of all rows.
        """
        torch.set_num_threads(self.threads)
        trainer, self._running = self.trainer, serial
        if self._generation is None:
            trainer.rows.know(numbers)
        elif self._generation != order.generation:  # states of an example that was deleted may be among them
            trainer.trunk_cache.close()
            on_main_process(trainer.args, lambda: remove(trainer.store.private / "activations"))
        self._generation, trainer.guard.steps = order.generation, 0
        parent = order.parent and order.parent._replace(arrays=_writable(order.parent.arrays))
        order = replace(order, examples=tuple(trainer.rows.names(examples)), parent=parent)
        try:
            trained = trainer._train_stage(order, False, None)
            return trained if self.rank == 0 else None
        except StageDropped:
            return None
        finally:
            self._running = None
            if self.rank == 0:
                remove(trainer.store.private / "running")

    @ray.method(concurrency_group="training")
    def end(self) -> None:
        """Leaves nothing behind, whatever a tracker raises."""
        try:
            if self.trainer is not None:
                self.trainer.trunk_cache.close()
                self.trainer.end_workers()
                self.trainer.callback_handler.end_run(self.trainer.args, self.trainer.state, self.trainer.control)
        finally:
            if self.scratch is not None:
                self.scratch.remove()

    @ray.method(concurrency_group="listening")
    def call_off(self, serial: int) -> None:
        """Lets an attempt be dropped before its next optimizer step."""
        self._called_off.add(serial)

    @ray.method(concurrency_group="listening")
    def share_done(self, serial: int) -> float:
        """How much of the running stage is done, from 0 to 1."""
        if self._running != serial:
            return 0.0
        return min(self.trainer.guard.steps / max(self.trainer.state.max_steps, 1), 1.0)


def _writable(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies: what lies in the object store belongs to all processes of the node."""
    return {name: array.copy() for name, array in arrays.items()}
