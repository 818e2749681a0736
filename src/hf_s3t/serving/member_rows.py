"""Rows of several members in one batch: which of them a layer sees, and which adapter each of them is for.

Holds the hooks of the base model's layers, of the layers with LoRA and of the heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..lora.adapter import split_layer_path
from ..seams.answering import BASE, first_argument, lora_by_views

Hook = tuple[tuple[Any, ...], dict[str, Any]] | None
Path = tuple[int | str, ...]
"""Where a value is among the arguments of a layer: its position or name, and what it is inside of that."""


class OtherRows(Exception):
    """A module sees something else than rows of the batch."""


@dataclass
class Notes:
    """What is noted while rows are answered together for the first time."""

    rows: int  # of the batch, before they are repeated for every member
    reached: bool = False  # whether the first layer has been reached
    head_first: bool = False  # whether a head came before it


class MemberRows:
    """The layers of a base model with adapters in it, which see the rows of several members."""

    def __init__(self, base: Any):
        self.base = base
        self.names: tuple[str, ...] = ()
        self.trunk = 0
        self.batched = True
        self.views = True
        self.whole: set[Path] = set()
        self.notes: Notes | None = None
        self._lora = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
        self._heads = [module for module in base.modules() if isinstance(module, ModulesToSaveWrapper)]
        places = [place for place in map(split_layer_path, self._lora) if place is not None]
        self._layers = list(base.get_submodule(places[0][0]).children()) if places else []
        hook = partial(nn.Module.register_forward_pre_hook, with_kwargs=True)
        self._hooks = [hook(layer, partial(self._enter, index)) for index, layer in enumerate(self._layers)]
        for name, module in self._lora.items():
            place = split_layer_path(name)
            self._hooks.append(hook(module, partial(self._name_rows, -1 if place is None else place[1])))
            if type(module) is Linear:
                module.forward = partial(self._by_views, module, module.forward)
        self._hooks += [hook(module, partial(self._name_rows, len(self._layers))) for module in self._heads]

    def detach(self) -> None:
        """Gives the layers back as they were."""
        for hook in self._hooks:
            hook.remove()
        for module in self._lora.values():
            vars(module).pop("forward", None)

    def activate(self, name: str) -> None:
        """Makes one adapter the active one."""
        for module in self._lora.values():
            module.set_adapter([name], inference_mode=True)
        for module in self._heads:
            module.set_adapter(name, inference_mode=True)

    def switch(self, on: bool) -> None:
        """Switches adapters on or off."""
        for module in [*self._lora.values(), *self._heads]:
            module.enable_adapters(on)
            if on:
                module.requires_grad_(False)

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        """Before a layer: takes one member's rows in the trunk, and repeats them for all members where it ends."""
        count = len(self.names)
        if not self.batched or count < 2 or index > self.trunk:
            return None
        if self.trunk == 0:
            self._note(args, kwargs)
            return None
        name = "" if args else first_argument(module.forward)
        hidden = args[0] if args else kwargs[name]
        if index == self.trunk:
            hidden = hidden.repeat(count, *[1] * (hidden.ndim - 1))
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, name: hidden})
        rows = len(hidden) // count if index == 0 else len(hidden)
        cut = partial(self._first_member, rows, rows * count)
        return (
            tuple(cut((place,), value) for place, value in enumerate(args)),
            {name: cut((name,), value) for name, value in kwargs.items()},
        )

    def _note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In a trial: notes which arguments of a layer have something else than rows in their first dimension."""
        if self.notes is None:
            return
        self.notes.reached, total = True, self.notes.rows * len(self.names)

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

    def _name_rows(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        """Before a layer with LoRA or a head: says which adapter each row is for."""
        count = len(self.names)
        if not self.batched or count < 2:
            return None
        rows = len(args[0])
        if self.notes is not None:
            self._check_rows(index, type(module).__name__, rows)
        if index < self.trunk:
            names = [BASE] * rows
        else:
            names = [name for name in self.names for _ in range(rows // count)]
        return args, {**kwargs, "adapter_names": names}

    def _check_rows(self, index: int, kind: str, rows: int) -> None:
        """In a trial: raises [`OtherRows`] unless a layer with LoRA, or a head, sees the rows of the batch."""
        assert self.notes is not None
        expected = self.notes.rows * (len(self.names) if index >= self.trunk else 1)
        if index < 0 or rows % expected:
            raise OtherRows(f"{kind} sees {rows} rows where {expected} were expected")
        self.notes.head_first |= index == len(self._layers) and not self.notes.reached

    def _by_views(self, module: Any, forward: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward of a linear layer, with views of rows that lie together in the place of copies."""
        names = kwargs.get("adapter_names")
        if names is None or not self.views or module.merged or module.disable_adapters or args or len(kwargs) > 1:
            return forward(x, *args, **kwargs)
        return lora_by_views(module, x, () if names[0] == BASE else self.names)


def _mapped(function: Callable[[Path, Any], Any], path: Path, value: Any) -> Any:
    """A tuple, list or dictionary with a function applied to its parts, which know where they are."""
    if isinstance(value, dict):
        return type(value)((name, function((*path, name), part)) for name, part in value.items())
    if type(value) in (list, tuple):
        return type(value)(function((*path, place), part) for place, part in enumerate(value))
    return value
