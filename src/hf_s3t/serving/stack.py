"""The LoRA of all members in one stroke: per layer one stack of matrices, per pass one tensor of slots.

```
x (members x rows, ..., in) ── base layer ────────────────────────────────── + ── out
        └── as (members, rows x ..., in) ── A[slots] ── B[slots] ── scaling ──┘
```

`A` is `(slots, rank, in)`, `B` `(slots, out, rank)`. A [`Pass`] names the slot of each member: two batched matrix
products per layer, whatever their number; below the trunk's end none. The base layer below stays what it is, 8-bit and
4-bit ones, too. Heads are stacked in the same way, layer by layer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..lora.adapter import split_layer_path
from ..seams.tuners import LoraOf, mounted_adapters


class OtherRows(Exception):
    """A module sees something else than rows of the batch."""


class Pass(NamedTuple):
    """What one forward pass is for."""

    slots: torch.Tensor  # of the members, in their order: `(members,)`
    trunk: int = 0  # layers below it have no LoRA, and see the rows of the batch once
    notes: Any = None  # in a trial: what is noted of it


class Route:
    """Tells the layers of a model which pass they are in; each thread has its own.

    A compiled pass has no threads: what is set and read in one graph is a value in it.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._traced: Pass | None = None

    @property
    def now(self) -> Pass | None:
        """The pass that is under way; `None`: the bare base model answers."""
        return self._traced if torch.compiler.is_compiling() else getattr(self._of_thread, "now", None)

    def set(self, now: Pass | None) -> None:
        """Begins a pass, or goes back to another one."""
        if torch.compiler.is_compiling():
            self._traced = now
        else:
            self._of_thread.now = now

    @contextmanager
    def taking(self, now: Pass | None) -> Iterator[None]:
        """A pass lasts as long as the block."""
        before = self.now
        self.set(now)
        try:
            yield
        finally:
            self.set(before)


def grouped(x: torch.Tensor, members: int) -> torch.Tensor:
    """Rows of several members, `(members x rows, ..., size)`, as `(members, rows x ..., size)`."""
    return x.reshape(members, -1, x.shape[-1])


class Place(NamedTuple):
    """What is put beside a module of the base model, or in its place."""

    module: nn.Module
    rank: int | None  # of the LoRA; `None`: a head; 0: nothing is, and the base's own module is put back
    scaling: float = 1.0


class Around(nn.Module):
    """A module in the place of `inner`, whose attributes it has."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
        return getattr(super().__getattr__("inner"), name)


class StackedLinear(Around):
    """A linear layer with a LoRA of every slot beside it."""

    def __init__(self, place: Place, route: Route, layer: int, slots: int):
        super().__init__()
        assert place.rank is not None
        size_in, size_out = sizes_of(place.module)
        weight: torch.Tensor = place.module.weight  # type: ignore[assignment]
        dtype = torch.promote_types(weight.dtype if weight.is_floating_point() else torch.float32, torch.float32)
        made: dict[str, Any] = {"device": weight.device, "dtype": dtype}
        self.inner, self.route, self.layer, self.scaling = place.module, route, layer, place.scaling
        self.lora_A = nn.Parameter(torch.zeros(slots, place.rank, size_in, **made), requires_grad=False)
        self.lora_B = nn.Parameter(torch.zeros(slots, size_out, place.rank, **made), requires_grad=False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result, now = self.inner(x, *args, **kwargs), self.route.now
        if now is None:
            return result
        if now.notes is not None:
            now.notes.check(type(self.inner).__name__, len(x), self.layer)
        if self.layer < now.trunk:
            return result
        slots = now.slots.to(self.lora_A.device)
        lora_a, lora_b = self.lora_A.index_select(0, slots), self.lora_B.index_select(0, slots)
        narrow = torch.bmm(grouped(x, len(slots)).to(lora_a.dtype), lora_a.mT)
        wide = grouped(result, len(slots))
        if wide.dtype == lora_b.dtype:
            wide = torch.baddbmm(wide, narrow, lora_b.mT, alpha=self.scaling)
        else:
            wide = wide + (torch.bmm(narrow, lora_b.mT) * self.scaling).to(wide.dtype)
        return wide.view(result.shape)

    @torch.no_grad()
    def hold(self, slot: int, lora: LoraOf) -> None:
        """Copies an adapter of the same rank or a lower one into a slot."""
        rank = len(lora.a)
        self.lora_A[slot, :rank].copy_(lora.a)
        self.lora_B[slot, :, :rank].copy_(lora.b * (lora.scaling / self.scaling))

    def places(self) -> dict[str, tuple[nn.Module, str]]:
        """The stacks, by the names that their parts have in an adapter file: whose they are, and their names there."""
        return {"lora_A.weight": (self, "lora_A"), "lora_B.weight": (self, "lora_B")}


class StackedPart(nn.Module):
    """A module of a head that has parameters of its own, for every slot: `(slots, *shape)` each."""

    def __init__(self, module: nn.Module, route: Route, slots: int):
        super().__init__()
        self.route, self.training = route, False
        self.is_linear = type(module) is nn.Linear
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.names = {name: name.replace(".", "__") for name in own}
        for name, value in own.items():
            stack = value.detach().expand(slots, *value.shape).clone()
            if value.is_floating_point():
                self.register_parameter(self.names[name], nn.Parameter(stack, requires_grad=False))
            else:
                self.register_buffer(self.names[name], stack)
        self.template = (deepcopy(module).to("meta").eval(),)  # in a tuple: no part of this module

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        now = self.route.now
        assert now is not None
        if now.notes is not None:
            now.notes.check(type(self.template[0]).__name__, len(x))
        slots = now.slots.to(x.device)
        values = {name: getattr(self, own).index_select(0, slots) for name, own in self.names.items()}
        if self.is_linear and not args and not kwargs:
            rows, bias = grouped(x, len(slots)), values.get("bias")
            weight = values["weight"].mT
            wide = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias[:, None], rows, weight)
            return wide.view(*x.shape[:-1], wide.shape[-1])

        def alone(values: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
            return functional_call(self.template[0], values, (x, *args), kwargs)

        if len(slots) == 1:
            return alone({name: value[0] for name, value in values.items()}, x)
        return torch.vmap(alone)(values, x.unflatten(0, (len(slots), -1))).flatten(0, 1)


class StackedHead(Around):
    """A head of every slot in the place of the base model's."""

    def __init__(self, place: Place, route: Route, slots: int):
        super().__init__()
        self.inner, self.route = place.module, route
        self.stacked = _stacked(place.module, route, slots).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.inner if self.route.now is None else self.stacked)(*args, **kwargs)

    @torch.no_grad()
    def hold(self, slot: int, head: nn.Module) -> None:
        """Copies a head into a slot."""
        own = {**dict(head.named_parameters()), **dict(head.named_buffers())}
        for name, (owner, key) in self.places().items():
            getattr(owner, key)[slot].copy_(own[name])

    def places(self) -> dict[str, tuple[nn.Module, str]]:
        """The stacks, by the names that their parts have in the head: whose they are, and their names there."""
        parts = [(path, part) for path, part in self.stacked.named_modules() if isinstance(part, StackedPart)]
        return {
            f"{path}.{name}".lstrip("."): (part, key) for path, part in parts for name, key in part.names.items()
        }


def _stacked(module: nn.Module, route: Route, slots: int) -> nn.Module:
    """A copy of a module in which all that has parameters is stacked."""
    if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return StackedPart(module, route, slots)
    children = dict(module.named_children())
    copy = deepcopy(module, {id(child): None for child in children.values()}) if children else deepcopy(module)
    for name, child in children.items():
        setattr(copy, name, _stacked(child, route, slots))
    return copy


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Numbers that go into a linear layer and come out of it.

    Raises:
        ValueError: it is of another kind.
    """
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    if isinstance(layer, nn.Linear):  # the quantised ones of bitsandbytes are, too
        return layer.in_features, layer.out_features
    raise ValueError(
        f"An ensemble answers with LoRA in linear layers, and {type(layer).__name__} is none. Serve one prefix of the "
        "store at a time (`store.export(path, prefix=...)`)."
    )


class Stack:
    """The stacked LoRA and heads of a model, in the place of its own modules.

    Args:
        base (`PreTrainedModel`): the base model.
        places (`dict[str, Place]`): what each module becomes, by its path.
        slots (`int`): how many prefixes there is room for. All are zero at first, heads as they are in the base.
    """

    def __init__(self, base: Any, places: Mapping[str, Place], slots: int):
        self.base, self.slots, self.route = base, slots, Route()
        self.modules: dict[str, Any] = {}
        for path, place in places.items():
            number = split_layer_path(path)
            if place.rank is None:
                self.modules[path] = StackedHead(place, self.route, slots)
            elif place.rank:
                self.modules[path] = StackedLinear(place, self.route, -1 if number is None else number[1], slots)
        self._before = {path: base.get_submodule(path) for path in places}
        for path, place in places.items():
            base.set_submodule(path, self.modules.get(path, place.module).train(base.training))

    @classmethod
    def of_adapters(cls, base: Any, names: Sequence[str]) -> Stack:
        """A copy of adapters that PEFT has loaded, one slot for each, in the place of PEFT's modules."""
        mounted, places = mounted_adapters(base, names), {}
        for path, (module, lora, _) in mounted.items():
            if lora is None:
                places[path] = Place(module, None)
            else:  # without any of these adapters the module is the base's own
                ranks = [len(own.a) for own in lora.values()] or [0]
                places[path] = Place(module, max(ranks), next((own.scaling for own in lora.values()), 1.0))
        stack = cls(base, places, len(names))
        for path, (_, lora, heads) in mounted.items():
            for name, own in (lora or heads).items():
                stack.modules[path].hold(names.index(name), own)
        return stack

    def take_out(self) -> None:
        """Gives the model its own modules back."""
        for path, module in self._before.items():
            self.base.set_submodule(path, module)

    def tensors(self, slot: int) -> dict[str, torch.Tensor]:
        """Views of what one slot holds, by the names in an adapter file. A model that is moved has other ones."""
        return {name: getattr(owner, key)[slot] for name, owner, key in self._kept}

    @cached_property
    def _kept(self) -> list[tuple[str, nn.Module, str]]:
        """Where each stack is kept, by the name that its parts have in an adapter file."""
        return [
            (f"base_model.model.{path}.{name}", owner, key)
            for path, module in self.modules.items()
            for name, (owner, key) in module.places().items()
        ]

    @property
    def place(self) -> int:
        """Where the first stack lies: elsewhere once the model was moved or cast."""
        _, owner, key = self._kept[0]
        return getattr(owner, key).data_ptr()

    def wait(self) -> None:
        """Waits for what devices were given to do: whatever answers read or wrote is read and written then."""
        if not torch.cuda.is_initialized():
            return
        for device in {getattr(owner, key).device for _, owner, key in self._kept}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
