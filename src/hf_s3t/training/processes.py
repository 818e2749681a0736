"""What the processes of one training do together: one of them acts, all of them know what came of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments

from ..errors import IsolationError
from ..lora.heads import tensor_digest
from ..lora.tuner import Tensors


def on_main_process(args: TrainingArguments, function: Callable[[], Any]) -> Any:
    """Runs a function on the main process and gives every process its result, or its error."""
    if args.world_size == 1:
        return function()
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # raised below, on every process: the others must not wait for a result
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_every_process(args: TrainingArguments, function: Callable[[], None]) -> None:
    """Runs a function on every process; an error on one of them is raised on all."""
    if args.world_size == 1:
        function()
        return
    error: Exception | None = None
    try:
        function()
    except Exception as raised:  # raised below, on every process: the others must not wait
        error = raised
    errors = [found for found in gather_object([error]) if found is not None]
    if errors:
        raise errors[0]


def check_processes(args: TrainingArguments) -> None:
    """Raises `ValueError` where a launcher started several processes that do not know of each other.

    They would all write the same store. It happens on machines without a GPU unless `use_cpu=True` is passed.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"The launcher started {launched} processes, but each of them would train alone (world size "
            f"{args.world_size}). On machines without a GPU pass `use_cpu=True` in the TrainingArguments."
        )


def check_ranks(args: TrainingArguments, tensors: Tensors) -> None:
    """Raises [`IsolationError`] unless every process holds the same stage, bit for bit."""
    if args.world_size == 1:
        return
    digest = hashlib.sha256("".join(tensor_digest(tensors[name]) for name in sorted(tensors)).encode()).hexdigest()
    if len(set(gather_object([digest]))) > 1:
        raise IsolationError(
            "The processes ended the stage with different weights: gradients were not averaged between them. "
            "Nothing was stored. Check whether a callback or a loss changes the model on one process only."
        )


def is_bar_shown(args: TrainingArguments) -> bool:
    """Whether this process shows progress bars."""
    return args.process_index == 0 and not args.disable_tqdm
