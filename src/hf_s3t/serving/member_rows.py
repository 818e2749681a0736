"""Rows of several members in one batch: what a layer below the end of the trunk sees of them.

Holds the hooks of the base model's numbered layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..lora.adapter import split_layer_path
from ..seams.answering import first_argument
from .stack import OtherRows, Pass, Stack, StackedLinear

Hook = tuple[tuple[Any, ...], dict[str, Any]] | None
Path = tuple[int | str, ...]
"""Where a value is among the arguments of a layer: its position or name, and what it is inside of that."""


@dataclass
class Notes:
    """What is noted while rows are answered together for the first time."""

    rows: int  # of the batch, before they are repeated for every member
    members: int
    trunk: int
    reached: bool = False  # whether the first layer has been reached
    head_first: bool = False  # whether a head came before it

    def check(self, kind: str, rows: int, layer: int | None = None) -> None:
        """Raises [`OtherRows`] unless a layer with LoRA, or a head (without a number), sees the rows of the batch."""
        expected = self.rows * (1 if layer is not None and layer < self.trunk else self.members)
        if layer == -1 or rows % expected:
            raise OtherRows(f"{kind} sees {rows} rows where {expected} were expected")
        self.head_first |= layer is None and not self.reached


class MemberRows:
    """The layers of a base model with stacked LoRA in it, which see the rows of several members."""

    def __init__(self, stack: Stack):
        self.stack, self.base, self.route = stack, stack.base, stack.route
        self.whole: set[Path] = set()
        linear = [path for path, module in stack.modules.items() if isinstance(module, StackedLinear)]
        containers = [place[0] for place in map(split_layer_path, linear) if place is not None]
        self._layers = list(self.base.get_submodule(containers[0]).children()) if containers else []
        hook = partial(nn.Module.register_forward_pre_hook, with_kwargs=True)
        names = [first_argument(layer.forward) for layer in self._layers]
        self._hooks = [
            hook(layer, partial(self._enter, index, name))
            for index, (layer, name) in enumerate(zip(self._layers, names, strict=True))
        ]

    def detach(self) -> None:
        """Gives the layers back as they were."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, index: int, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        """Before a layer: takes one member's rows in the trunk, and repeats them for all members where it ends.

        `name` is that of the hidden states, where they are no positional argument.
        """
        now = self.route.now
        if now is None or len(now.slots) < 2 or index > now.trunk:
            return None
        count = len(now.slots)
        if now.trunk == 0:
            self._note(now, args, kwargs)
            return None
        hidden = args[0] if args else kwargs[name]
        if index == now.trunk:
            hidden = hidden.repeat(count, *[1] * (hidden.ndim - 1))
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, name: hidden})
        rows = len(hidden) // count if index == 0 else len(hidden)
        cut = partial(self._first_member, rows, rows * count)
        return (
            tuple(cut((place,), value) for place, value in enumerate(args)),
            {name: cut((name,), value) for name, value in kwargs.items()},
        )

    def _note(self, now: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In a trial: notes which arguments of a layer have something else than rows in their first dimension."""
        if now.notes is None:
            return
        now.notes.reached, total = True, now.notes.rows * len(now.slots)

        def note(path: Path, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                if value.ndim and len(value) not in (1, total):
                    self.whole.add(path)
                return value
            return _mapped(note, path, value)

        _mapped(note, (), args)
        _mapped(note, (), kwargs)

    def _first_member(self, rows: int, total: int, path: Path, value: Any) -> Any:
        """The first member's rows of what has rows for all. What has none, as was seen in the trial, stays."""
        if isinstance(value, torch.Tensor):
            return value[:rows] if value.ndim and len(value) == total and path not in self.whole else value
        return _mapped(partial(self._first_member, rows, total), path, value)


def _mapped(function: Callable[[Path, Any], Any], path: Path, value: Any) -> Any:
    """A tuple, list or dictionary with a function applied to its parts, which know where they are."""
    if isinstance(value, dict):
        return type(value)((name, function((*path, name), part)) for name, part in value.items())
    if type(value) in (list, tuple):
        return type(value)(function((*path, place), part) for place, part in enumerate(value))
    return value
