"""A step of generation as one graph: recorded once for a shape, then replayed without launches from Python.

```
token 1   the prompt: computed                        into a static cache of this shape, which stays where it is
token 2   computed, which sets up kernels and buffers
token 3   recorded, replayed
token 4   replayed and computed: both have to agree, or the graph is given up
token 5   replayed, and so on                         also by the next answer of this shape
```

What changes from step to step is written into the tensors that the graph reads: tokens, positions, mask and the slots
of the members. A deletion changes slots, and no graph.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ..trunk.trunk import is_close
from .member_cache import MemberCache

logger = logging.getLogger(__name__)

BLOCK = 128
"""Positions that a static cache has are a multiple of it, so that answers of about one length share a graph."""

IDLE = 2
"""Caches that are kept with their graphs while no answer uses them."""

Compute = Callable[[Any, dict[str, Any]], Any]
"""The answer to the arguments of a forward pass, for the slots of the members."""


class Recording(Protocol):
    """Operations that can be done again."""

    def record(self, function: Callable[[], Any]) -> Any:
        """Takes note of what a function does on the device, and of where its result will lie; does none of it."""

    def replay(self) -> None:
        """Does it."""


class CudaRecording:
    """A [`Recording`] as a CUDA graph."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, function: Callable[[], Any]) -> Any:
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # other threads may allocate meanwhile
            return function()

    def replay(self) -> None:
        self._graph.replay()


class Step:
    """A step of one shape, into one cache."""

    def __init__(self, slots: torch.Tensor, kwargs: dict[str, Any]):
        self.slots, self.kwargs = slots.clone(), _copied(kwargs)
        self.recording: Recording | None = None
        self.output: Any = None
        self.replays = 0
        self.given_up = False

    def take(self, slots: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Writes what this step is about to where the recording reads it."""
        for own, given in zip(_tensors([self.slots, self.kwargs]), _tensors([slots, kwargs]), strict=True):
            own.copy_(given)

    def clear(self) -> None:
        """Zeroes what is left of an answer."""
        for tensor in _tensors(dict(self.output or {})):
            tensor.zero_()

    def replay(self) -> Any:
        """The output, in memory of its own."""
        assert self.recording is not None
        self.recording.replay()
        self.replays += 1
        return type(self.output)(**_copied(dict(self.output)))


class Decoding:
    """Keeps static caches and the steps that were recorded into them.

    Args:
        recorder: makes a recording; `None`: on CUDA a graph, elsewhere nothing is recorded.
    """

    def __init__(self, recorder: Callable[[], Recording] | None = None):
        self.on = True
        self.recorder = recorder
        self._lock = threading.Lock()
        self._idle: list[tuple[Any, MemberCache]] = []

    def records(self, device: torch.device) -> bool:
        """Whether steps on a device are recorded."""
        return self.on and (self.recorder is not None or device.type == "cuda")

    @contextmanager
    def cache(self, shape: Any, make: Callable[[], MemberCache]) -> Iterator[MemberCache]:
        """A static cache for one answer, of some shape. Afterwards it is zero, and kept for the next one."""
        with self._lock:
            places = [place for place, (known, _) in enumerate(self._idle) if known == shape]
            cache = self._idle.pop(places[-1])[1] if places else make()
        try:
            yield cache
        finally:
            cache.reset()
            for step in cache.steps.values():
                step.clear()
            with self._lock:
                self._idle.append((shape, cache))
                dropped = [gone for _, gone in self._idle[:-IDLE]]
                self._idle = self._idle[-IDLE:]
            for gone in dropped:  # a step refers to its cache: their memory would wait for the garbage collector
                gone.steps.clear()

    def step(self, cache: MemberCache, kind: Any, slots: Any, kwargs: dict[str, Any], compute: Compute) -> Any:
        """The answer of some slots to the arguments of a step, which `compute` gives; steps of a `kind` are alike."""
        kind = kind, _shapes(kwargs)
        step = cache.steps.get(kind)
        if step is None:
            cache.steps[kind] = Step(slots, kwargs)
        if step is None or step.given_up:
            return compute(slots, kwargs)
        step.take(slots, kwargs)
        if step.recording is None:
            self._record(step, compute)
            return compute(slots, kwargs) if step.given_up else step.replay()
        return self._compared(step, cache, slots, kwargs, compute) if step.replays == 1 else step.replay()

    def _record(self, step: Step, compute: Compute) -> None:
        recording = CudaRecording() if self.recorder is None else self.recorder()
        try:
            step.output = recording.record(lambda: compute(step.slots, dict(step.kwargs)))
            step.recording = recording
        except Exception as error:  # whatever a model does that a graph cannot hold
            self._give_up(step, f"it cannot be recorded ({type(error).__name__}: {error})")

    def _compared(self, step: Step, cache: MemberCache, slots: Any, kwargs: dict[str, Any], compute: Compute) -> Any:
        """Computes what was replayed: where it depends on more than the tensors that a graph reads, it differs."""
        before = cache.copied()
        found = step.replay()
        cache.put_back(before)
        expected = compute(slots, kwargs)
        exact = before[0].dtype in (torch.float32, torch.float64)
        if not is_close(found["logits"], expected["logits"], 1e-4 if exact else 0.05):
            self._give_up(step, "replayed, it gives other logits")
        return expected

    def _give_up(self, step: Step, reason: str) -> None:
        step.given_up, step.recording, step.output = True, None, None
        logger.warning("a step of generation is not replayed as one graph, which is slower: %s", reason)


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among arguments, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _copied(value: Any) -> Any:
    """Arguments with tensors of their own; what else is in them stays the same object."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def _shapes(value: Any) -> Any:
    """What arguments have to have in common to be those of one recording."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, dict):
        return tuple((name, _shapes(part)) for name, part in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_shapes, value))
    return value if isinstance(value, bool | int | float | str | None) else id(value)
