"""A slot of a model in memory: room for one prefix, LoRA matrices at full depth and heads, overwritten where they are.

What a prefix has no stage for is zero, which gives the bits of not being there; of rank groups, which share matrices,
to rounding. So a deletion changes numbers and no module: nothing is allocated, a compiled model stays compiled, and no
old value remains in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from ..errors import StoreError
from ..lora.adapter import WEIGHTS_FILE, is_lora, split_layer_path
from ..plan.tree import Stage
from ..store.folder import StoreFolder
from ..store.manifest import Manifest
from .stack import Stack

Owner = tuple[Stage, str]
"""A stage as it was trained: its name and the sha256 of its tensors."""


class Change(NamedTuple):
    """What turns a slot's prefix into another one, of which `lowest_layer` has LoRA; see [`Slot.plan`]."""

    path: tuple[Owner, ...]
    owners: dict[str, Owner]
    tensors: dict[str, torch.Tensor]
    lowest_layer: int


@dataclass(eq=False)
class Slot:
    """One slot's tensors in a stack, by their names in an adapter file."""

    stack: Stack
    number: int
    rank: int | None = None  # of a rank group; `None`: stages have matrices of their own
    path: tuple[Owner, ...] = ()  # the stages along the prefix that is loaded; empty: nothing is
    owners: dict[str, Owner] = field(default_factory=dict)  # which stage each tensor that is in use came from
    lowest_layer: int = 0  # that the loaded prefix has LoRA in

    def beside(self, number: int) -> Slot:
        """Another slot of the same stack, empty."""
        slot = Slot(self.stack, number, self.rank)
        vars(slot).update(shapes=self.shapes, layers=self.layers)
        return slot

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each tensor."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @cached_property
    def layers(self) -> dict[str, int]:
        """The layer of each LoRA matrix, or of what one stage has of it."""
        places = {name: split_layer_path(name) for name in self.shapes if is_lora(name)}
        return {name: place[1] for name, place in places.items() if place is not None}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The model's tensors as stages hold them: of rank groups, views of what each depth has of a matrix.

        Made anew each time: a model that is moved or cast gets other storage, in which an old view does not lie.
        """
        whole = self.stack.tensors(self.number)
        if self.rank is None:
            return whole
        found: dict[str, torch.Tensor] = {}
        for name, tensor in whole.items():
            if is_lora(name):
                views = tensor.split(self.rank, dim=0 if ".lora_A." in name else 1)
                found |= {_part(name, number + 1): view for number, view in enumerate(views)}
            else:
                found[name] = tensor
        return found

    def plan(self, store: StoreFolder, manifest: Manifest, path: Sequence[Stage]) -> Change:
        """Reads what a prefix of a live manifest has and the slot has not; changes nothing. An empty path is none.

        Raises:
            StoreError: a file is missing or damaged, or its tensors do not fit the model.
        """
        owners: dict[str, Owner] = {}
        read: dict[Owner, Mapping[str, torch.Tensor]] = {}
        steps = tuple((stage, manifest.stages[stage][WEIGHTS_FILE]) for stage in path)
        if steps == self.path:
            return Change(steps, self.owners, {}, self.lowest_layer)
        here: dict[Owner, list[str]] = {}
        for name, owner in self.owners.items():
            here.setdefault(owner, []).append(name)
        heads = len(self.layers) < len(self.shapes)
        for owner in steps:
            if owner not in here or (heads and owner == steps[-1]):  # a deeper stage's heads took the place of its own
                read[owner] = self._named(store.read_live_stage(owner[0], manifest).tensors, owner[0])
            owners.update(dict.fromkeys(read.get(owner, here.get(owner, ())), owner))
        tensors = {name: read[owner][name] for name, owner in owners.items() if self.owners.get(name) != owner}
        self._check(tensors, owners, path)
        lowest = min((self.layers[name] for name in owners if name in self.layers), default=0)
        return Change(steps, owners, tensors, lowest)

    def _named(self, tensors: Mapping[str, torch.Tensor], stage: Stage) -> Mapping[str, torch.Tensor]:
        """A stage's tensors by the names that they have in the slot."""
        if self.rank is None:
            return tensors
        return {_part(name, stage.depth) if is_lora(name) else name: value for name, value in tensors.items()}

    def _check(self, tensors: Mapping[str, torch.Tensor], owners: Mapping[str, Owner], path: Sequence[Stage]) -> None:
        own = self.shapes
        surplus = sorted(set(tensors) - set(own))
        heads = {name for name in own if not is_lora(name)} if path else set()
        absent = sorted(heads - {name for name, (stage, _) in owners.items() if stage == path[-1]})
        if surplus or absent:
            raise StoreError(
                f"Stage {path[-1].name} does not fit the base model: the model lacks {surplus[:3] or 'nothing'}, the "
                f"stage {absent[:3] or 'nothing'}. Give the base model that the store was trained on."
            )
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise StoreError(f"{name} of {path[-1].name} is {tensor.dtype}; stages are stored in float32.")
            if tensor.shape != own[name]:
                raise StoreError(
                    f"{name} of {path[-1].name} has shape {tuple(tensor.shape)}, the model asks for "
                    f"{tuple(own[name])}. Give the base model that the store was trained on."
                )

    @torch.no_grad()
    def take(self, change: Change, source: Slot) -> None:
        """Holds a prefix from now on: what was read for it, and what `source`, which was asked for it, has already.

        What is in use no more becomes zero. Interrupted, the slot is empty.
        """
        own, common = self.tensors, change.owners.keys() - change.tensors.keys()
        theirs = source.tensors if common and source is not self else {}
        try:
            for name, tensor in change.tensors.items():
                own[name].copy_(tensor)
            for name in common & theirs.keys():
                own[name].copy_(theirs[name])
            for name in self.owners.keys() - change.owners.keys():
                own[name].zero_()
        except BaseException:
            self.clear()
            raise
        self.path, self.owners, self.lowest_layer = change.path, dict(change.owners), change.lowest_layer

    @torch.no_grad()
    def clear(self) -> None:
        """Zeroes everything, whatever is known of it."""
        for tensor in self.stack.tensors(self.number).values():
            tensor.zero_()
        self.path, self.owners = (), {}


def _part(name: str, depth: int) -> str:
    """The name in a slot of the ranks that the stage of some depth has in a matrix."""
    return f"{name}, depth {depth}"
