"""The seam to the Trainer: its private methods, as hooks with names of ours, and its callbacks."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer, TrainerControl
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import broken, lost, seam
from .overrides import check_overrides, classes_behind, uses

TrainerBase: Any = Trainer if TYPE_CHECKING else object

METHODS = (
    "_get_output_dir", "_save_checkpoint", "_load_from_checkpoint", "_load_best_model", "_push_from_checkpoint",
    "_get_train_sampler", "_set_signature_columns_if_needed", "_remove_unused_columns", "save_model",
)  # fmt: skip
"""Methods of the Trainer that ours override or call, and that it has to call itself."""

ATTRIBUTES = ("callback_handler", "model_wrapped", "optimizer", "lr_scheduler", "is_in_train", "_signature_columns")
"""Attributes of the Trainer that ours set, and that it has to use."""

PARAMETERS = ("model_init", "optimizers")
"""What the Trainer can be made with and is refused."""


class TrainerSeam(TrainerBase):
    """A part of a Trainer that overrides its private methods and asks hooks with public names instead."""

    in_checkpoint = False
    """Whether a running checkpoint is being written."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        theirs = classes_behind(cls, TrainerSeam)
        if theirs:  # else it is a part that no Trainer is mixed into yet
            check_overrides("trainer", theirs, METHODS, ATTRIBUTES)
            check_arguments(theirs)
            check_own_names(cls, theirs)
            cls.__signature__ = shown_signature(cls, theirs)

    # ---- hooks ----

    def checkpoint_folder(self) -> Path | None:
        """Hook: where running checkpoints go. `None`: into `args.output_dir`."""
        return None

    @contextmanager
    def writing_checkpoint(self) -> Iterator[None]:
        """Hook: is entered around the writing of a running checkpoint."""
        yield

    def weights_loaded(self) -> None:
        """Hook: weights of a checkpoint were put into the model."""

    def rows_to_draw(self, rows: Any) -> Any:
        """Hook: the train set as the sampler sees it."""
        return rows

    def more_columns(self) -> list[str]:
        """Hook: columns that reach the collator beside those that the model takes."""
        return []

    # ---- overrides ----

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        folder = self.checkpoint_folder()
        return super()._get_output_dir(*args, **kwargs) if folder is None else str(folder)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.writing_checkpoint(), kept_generators():
            self.in_checkpoint = True
            try:
                super()._save_checkpoint(*args, **kwargs)
            finally:
                self.in_checkpoint = False

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self.weights_loaded()

    def _load_best_model(self, *args: Any, **kwargs: Any) -> None:
        super()._load_best_model(*args, **kwargs)
        self.weights_loaded()

    def _push_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a checkpoint is scratch with optimizer states in it, and the store is whole between stages only."""

    def _get_train_sampler(self, train_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(self.rows_to_draw(rows), *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = [*dict.fromkeys([*self._signature_columns, *self.more_columns()])]

    # ---- what ours call ----

    def settle_columns(self) -> None:
        """Notes which columns the model takes, before something that takes anything stands in its place."""
        self._set_signature_columns_if_needed()

    def without_unused_columns(self, rows: Any) -> Any:
        """Rows as they are without a cache: only with the columns that the model takes."""
        return self._remove_unused_columns(rows)

    def remove_noise(self, ended: bool = True) -> None:
        """Takes NEFTune's hook back, as the Trainer does at a normal end only; after that one, it has to be known."""
        handle = getattr(self, "neftune_hook_handle", None)
        if handle is not None:
            handle.remove()
        elif ended and self.args.neftune_noise_alpha is not None:
            raise broken("neftune", "The Trainer keeps no `neftune_hook_handle`")

    def begin_afresh(self) -> None:
        """Nothing of an earlier training is left in the Trainer, in accelerate or in callbacks with a state."""
        # A second `Trainer.train()` would go on with the old optimizer, and with DDP's view of the old parameters.
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.control = TrainerControl()
        self._fresh = getattr(self, "_fresh", None) or Pristine()
        self._fresh.restore(self.accelerator, self.callback_handler.callbacks)

    def end_workers(self) -> None:
        """Ends the processes that load rows. Left to the garbage collector, each of them is waited for in vain."""
        handler = self.callback_handler
        loaders = [handler.train_dataloader, handler.eval_dataloader, *getattr(self, "_eval_dataloaders", {}).values()]
        for loader in loaders:
            iterator = getattr(loader, "_iterator", None)  # of a loader whose workers outlive an epoch
            if iterator is not None and hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()
                loader._iterator = None
            elif iterator is not None:
                lost("workers", f"{type(iterator).__name__} has no `_shutdown_workers`")


def with_state(callbacks: Sequence[Any]) -> list[Any]:
    """Callbacks that say of themselves what they were made with and how far they are: early stopping, for one."""
    return [callback for callback in callbacks if isinstance(callback, ExportableState)]


class Pristine:
    """What a Trainer carries from one training to the next, as it was before the first: the scaler of mixed precision,
    the count of accumulated batches, and what a callback says of itself, such as the patience of early stopping."""

    def __init__(self) -> None:
        self._scalers: dict[int, Any] = {}
        self._attributes: dict[int, tuple[Any, dict[str, Any]]] = {}

    def restore(self, accelerator: Any, callbacks: Sequence[Any]) -> None:
        """Puts it back; what is met for the first time is taken as it is."""
        with seam("accelerator"):
            scaler, state = accelerator.scaler, accelerator.gradient_state
            state.sync_gradients, state.dataloader_references = True, [None]
        if scaler is not None:
            pristine = self._scalers.pop(id(scaler), None) or copy.deepcopy(scaler)
            accelerator.scaler = copy.deepcopy(pristine)
            self._scalers[id(accelerator.scaler)] = pristine
        for callback in with_state(callbacks):
            now = callback.state().get("attributes", {})
            _, first = self._attributes.setdefault(id(callback), (callback, copy.deepcopy(now)))
            for name, value in first.items():
                setattr(callback, name, copy.deepcopy(value))


@contextmanager
def kept_generators() -> Iterator[None]:
    """Puts back Python's, numpy's and torch's generators: what happens inside draws without a trace."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def check_arguments(theirs: Sequence[type]) -> None:
    """Raises [`CompatibilityError`] unless a Trainer can be made with what is refused."""
    taken = {name for cls in theirs for name in inspect.signature(cls).parameters}
    absent = [name for name in PARAMETERS if name not in taken]
    if absent:
        raise broken("trainer", f"`{theirs[0].__qualname__}` cannot be made with {' or '.join(absent)}")


def positional_names(theirs: Sequence[type]) -> list[str]:
    """What a Trainer calls its arguments by position, in their order; the first of its classes that names any says."""
    for cls in theirs:
        parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
        named = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD][1:]
        if named:
            return named
    return []


def by_name(theirs: Sequence[type], given: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a Trainer by name, those that were given by position too. A `TypeError` as Python's own."""
    names, shown = positional_names(theirs), theirs[0].__qualname__
    if len(given) > len(names):
        raise TypeError(f"{shown} takes {len(names)} arguments by position ({', '.join(names)}), got {len(given)}.")
    found = dict(zip(names, given, strict=False))
    if twice := sorted(found.keys() & kwargs.keys()):
        raise TypeError(f"{shown} got two values for {', '.join(twice)}: by position and by name.")
    return found | kwargs


def shown_signature(cls: Any, theirs: Sequence[type]) -> inspect.Signature:
    """How a class of ours can be called: as the Trainer behind it, and with our own arguments by name."""
    if "__init__" in vars(cls):
        own = inspect.signature(cls.__init__)
        return own.replace(parameters=[*own.parameters.values()][1:])
    ours = [each for each in inspect.signature(cls.__init__).parameters.values() if each.kind is each.KEYWORD_ONLY]
    taken = {each.name for each in ours}
    behind = {each.name: each for each in inspect.signature(theirs[0]).parameters.values()}
    first = [each for each in behind.values() if each.kind is each.POSITIONAL_OR_KEYWORD and each.name not in taken]
    rest = [each for each in behind.values() if each.kind in (each.KEYWORD_ONLY, each.VAR_KEYWORD)]
    parameters = [*first, *ours, *(each for each in rest if each.name not in taken)]
    return inspect.Signature(parameters, return_annotation=None)


def check_own_names(cls: type, theirs: Sequence[type]) -> None:
    """Raises [`CompatibilityError`] if a Trainer has a method of its own that ours would replace by chance."""
    package = __name__.split(".")[0]
    mixed_in = [ours for ours in cls.__mro__ if ours.__module__.split(".")[0] == package]
    own = {name for ours in mixed_in for name in vars(ours) if name.startswith("_") and not name.startswith("__")}
    own |= {name for name in vars(TrainerSeam) if not name.startswith("__")}
    for name in sorted(own - {*METHODS}):
        if any(name in vars(other) for other in theirs):
            raise broken("trainer", f"`{theirs[0].__qualname__}` has a `{name}` now, which ours would replace")


def written_checkpoint(running: Path, step: int) -> Path:
    """Where the Trainer has just written the checkpoint of a step."""
    folder = running / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if not folder.is_dir():
        found = sorted(path.name for path in running.glob("*"))
        raise broken("checkpoints", f"The Trainer wrote no checkpoint into {folder.name} but {found or 'nothing'}")
    return folder


# ---- callbacks ----


def check_handler(handler: Any) -> None:
    """Raises [`CompatibilityError`] if a Trainer's callbacks are not known, and warns if they are told otherwise."""
    if not isinstance(getattr(handler, "callbacks", None), list):
        raise broken("callbacks", f"{type(handler).__name__} has no list of `callbacks`")
    if not (hasattr(CallbackHandler, "call_event") and uses([CallbackHandler], "call_event")):
        lost("callback_events", "Callbacks are not told through `CallbackHandler.call_event`")


def check_told(events: Container[str], steps: int) -> None:
    """Raises [`CompatibilityError`] unless the guard of a stage of some `steps` was told of all that it checks."""
    expected = ("on_train_begin", *(("on_pre_optimizer_step",) if steps else ()), "on_train_end")
    absent = [event for event in expected if event not in events]
    if absent:
        raise broken("callbacks", f"A stage ended and told its callbacks nothing of {' and '.join(absent)}")


def tracker_classes(report_to: Any) -> tuple[Any, ...]:
    """The callbacks by which trackers are told."""
    try:
        from transformers.integrations import get_reporting_integration_callbacks
    except ImportError:
        lost("trackers", "transformers does not say which callbacks are trackers")
        return ()
    return tuple(get_reporting_integration_callbacks(report_to))


def send_tensorboard(callback: Any, folder: str) -> None:
    """Makes tensorboard write into a folder, unless it was told where to write."""
    if not hasattr(callback, "logging_dir"):
        lost("trackers", f"{type(callback).__name__} has no `logging_dir`")
    elif callback.logging_dir is None:
        callback.logging_dir = folder


def note_text(callback: Any, name: str, text: str, step: int) -> None:
    """Writes a text into tensorboard, once it has begun; other trackers are left alone."""
    writer = getattr(callback, "tb_writer", None)
    if writer is not None:
        writer.add_text(name, text, step)
