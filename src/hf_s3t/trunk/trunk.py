"""Running a model's frozen trunk up to a layer, and running the model from that layer up.

```
  layer 7  ●  ↑                  ● LoRA of the stage and of its parent
  layer 6  ●  ↑                  ○ the trunk: frozen, without adapters
  layer 5  ○  ← states           a stage that trains layers 6 and 7 may enter at layer 6 or, from a lower block, at 5
  layer 4  ○  handed through
  ...
```

The model's own forward does everything but the layers: embeddings, masks, positions, heads. Layers below the entrance
hand their input through, the entrance gets the given states in place of it, and a run that only wants states ends
where the last of them is seen. So it works for every model whose layers follow one another.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..seams.answering import first_argument, runs_again

States = list[torch.Tensor]


class _Seen(Exception):
    """Every state that a run was for has been seen: the rest of the model need not run."""


@dataclass
class _Pass:
    """One run of the model, or several of the same batch."""

    entrance: int = 0  # layers below hand their input through
    given: States | None = None  # what enters there, of each row `(length, hidden)`
    wanted: tuple[int, ...] = ()  # layers whose input is noted; the run ends at the last. Empty: it runs to its end
    times: int = 0  # how often the model began
    seen: dict[int, torch.Tensor] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)


class Trunk:
    """The numbered layers of a PEFT model, any of which may be entered with given states.

    `container` is the path of the list of layers in the base model.
    """

    def __init__(self, model: Any, container: str):
        self.model, self.base = model, model.get_base_model()
        self.layers: list[nn.Module] = list(self.base.get_submodule(container).children())
        self.main_input: str = self.base.main_input_name
        self._extra: int | None = None
        parameters = inspect.signature(self.base.forward).parameters
        self._takes = {name for name in parameters if name not in ("labels", "num_items_in_batch", "kwargs")}
        self._pass: _Pass | None = None
        self._awaited: tuple[_Pass, dict[str, torch.Tensor]] | None = None
        self._forwards: dict[int, Any] = {}
        self._hooks: list[Any] = []

    # ---- the layers' forward, replaced ----

    def attach(self, layer: int) -> None:
        """Makes the layers up to `layer` listen."""
        for number in range(layer + 1):
            module = self.layers[number]
            self._forwards[number] = vars(module).get("forward")
            module.forward = partial(self._run_layer, number, module.forward)  # type: ignore[method-assign]
        self._hooks = [
            self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.model.register_forward_hook(self._leave, always_call=True),
        ]

    def detach(self) -> None:
        """Gives the layers their own forward back."""
        for number, forward in self._forwards.items():
            if forward is None:
                del self.layers[number].forward
            else:
                self.layers[number].forward = forward
        for hook in self._hooks:
            hook.remove()
        self._forwards, self._hooks = {}, []

    @contextmanager
    def reaching(self, layer: int) -> Iterator[None]:
        """Inside the block the layers up to another `layer` listen."""
        before = max(self._forwards)
        self.detach()
        self.attach(layer)
        try:
            yield
        finally:
            self.detach()
            self.attach(before)

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._awaited is not None:
            run, batch = self._awaited
            found = _tensors(self.taken(kwargs))
            if found.keys() == batch.keys() and all(_same(found[name], batch[name]) for name in batch):
                self._pass = run
                run.times += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._pass = None

    def _run_layer(self, number: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        run = self._pass
        if run is None:
            return forward(*args, **kwargs)
        run.calls.append(number)
        hidden = args[0] if args else kwargs.pop(first_argument(forward))
        if number < run.entrance:
            return hidden if self._extra is None else (hidden, *[None] * self._extra)
        if number == run.entrance and run.given is not None:
            hidden = _padded(run.given, hidden)
        if number in run.wanted:
            run.seen[number] = hidden
            if len(run.seen) == len(run.wanted):
                raise _Seen
        output = forward(hidden, *args[1:], **kwargs)
        extra = output[1:] if isinstance(output, tuple) else ()
        self._extra = len(extra) if isinstance(output, tuple) else None
        if any(value is not None for value in extra):
            raise ValueError(
                f"{type(self.layers[number]).__name__} gives {len(output)} values, and only hidden states could be "
                "cached. Use activation_cache='off'."
            )
        return output

    # ---- runs ----

    def states(
        self, inputs: Mapping[str, Any], layers: Sequence[int], entrance: int = 0, given: States | None = None
    ) -> dict[int, torch.Tensor]:
        """What enters some layers, each `(batch, positions, hidden)`; the model has to be in eval mode.

        It starts at layer `entrance`, with what is `given` to enter there. No gradients are computed.
        """
        run = self._pass = _Pass(entrance, given, tuple(layers))
        try:
            with torch.no_grad():
                self.base(**self.taken(inputs))
        except _Seen:
            pass
        finally:
            self._pass = None
        if run.calls != list(range(max(layers) + 1)):
            raise ValueError(
                f"The model calls its layers in the order {run.calls[:20]}, where 0, 1, 2, ... was expected: what "
                "enters one of them is not all that it depends on. Use activation_cache='off'."
            )
        return run.seen

    def taken(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a batch that the base model takes by name, less its labels."""
        inputs = {name: value for name, value in inputs.items() if name in self._takes}
        return inputs | ({"use_cache": False} if "use_cache" in self._takes else {})

    @contextmanager
    def fed(self, entrance: int, given: States, batch: Mapping[str, Any]) -> Iterator[None]:
        """The model starts at a layer, with what is given of each row, whenever it is asked about this very batch.

        The batch is known by its tensors. If it did not reach the model, or went past the layer, the block ends with
        a `ValueError`.
        """
        run, tensors = _Pass(entrance, given), _tensors(self.taken(batch))
        self._awaited = (run, tensors)
        try:
            yield
        finally:
            self._awaited = None
        if not run.times:
            raise ValueError(
                f"The loss changes one of {sorted(tensors)} on its way to the model, or adds to them, so that "
                "cached states of the batch are not what enters it. Use activation_cache='off', or pass the batch on "
                "as it was collated."
            )
        if run.calls.count(entrance) < run.times:
            raise ValueError(
                f"The model left out layer {entrance}, which cached states enter. Load it without layer drop, or use "
                "activation_cache='off'."
            )

    def evaluating(self, random: bool = False) -> AbstractContextManager[None]:
        """The model is in eval mode; with `random` in training mode, but for running statistics, which stay."""
        return in_eval_mode(self.model, random)

    def check_checkpointing(self, layer: int) -> None:
        """Raises `ValueError` where backward passes run a layer again from outside, and with it what we replaced."""
        layer_again = runs_again(self.base, self.layers[: layer + 1])
        if layer_again is not None:
            raise ValueError(
                f"Activation checkpointing of {type(layer_again).__name__} runs whole layers again, hooks included: "
                "cached states cannot be fed to it. Use activation_cache='off', or no activation checkpointing: with "
                "the cache, layers below the stage keep nothing for the backward pass anyway."
            )


@contextmanager
def in_eval_mode(model: nn.Module, random: bool = False) -> Iterator[None]:
    """The model is in eval mode; with `random` in training mode, but for running statistics, which stay."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = random and "running_mean" not in dict(module.named_buffers(recurse=False))
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def is_close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    """Whether two tensors differ by no more than a share of their size."""
    found, expected = found.float(), expected.float()
    return found.shape == expected.shape and bool((found - expected).norm() <= bound * expected.norm())


def _tensors(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found is expected or torch.equal(found, expected)


def _padded(states: States, hidden: torch.Tensor) -> torch.Tensor:
    """States of rows as one batch like `hidden`, zeros where a row has none: one copy, and one to another device."""
    if hidden.ndim != 3 or len(states) != len(hidden):
        raise ValueError(
            f"Hidden states of shape {tuple(hidden.shape)} came for {len(states)} rows; (rows, positions, hidden) was "
            "expected. Several sequences per row, and models split over devices by DataParallel, cannot be cached: "
            "use activation_cache='off'."
        )
    device, positions = hidden.device, hidden.shape[1]
    if len({value.device for value in states}) > 1:
        states = [value.to(device, non_blocking=True) for value in states]
    zeros = states[0].new_zeros(positions - min(map(len, states)), hidden.shape[2])
    parts = [part for value in states for part in (value, zeros[: positions - len(value)])]
    pinned = device.type == "cuda" and not states[0].is_cuda  # then the step does not wait for its states
    whole = torch.empty(hidden.shape, dtype=states[0].dtype, device=states[0].device, pin_memory=pinned)
    torch.cat(parts, out=whole.flatten(0, 1))
    return whole.to(device, non_blocking=True)
