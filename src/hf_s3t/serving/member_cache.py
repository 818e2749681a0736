"""A key-value cache that has rows for several members."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer


class MemberCache(Cache):
    """A key-value cache of several members, whose rows beam search reorders within each member.

    `copies` says per layer how many members have rows in it: one in the shared trunk. `turns` is the number of members
    that answer in turn, each with layers of its own. Between two answers the cache is all of them, one member's layers
    after the other's: what is done to it is done to every member's.

    It grows with the sequence or, with a `length`, has room for as many positions and stays where it is.
    """

    layers: list[Any]

    def __init__(self, config: Any, copies: Sequence[int], turns: int = 1, length: int | None = None):
        def layers() -> list[Any]:
            return (StaticCache(config, length) if length else DynamicCache(config=config)).layers

        self.copies, self.turns, self.length = tuple(copies), turns, length
        self.steps: dict[Any, Any] = {}  # recorded ones, see `decoding.py`
        self._turns = [layers() for _ in range(turns)]
        super().__init__(layers=self._turns[0])
        self._join()

    def _join(self) -> None:
        self.layers = self._turns[0] if len(self._turns) == 1 else [layer for own in self._turns for layer in own]

    @property
    def can_be_recorded(self) -> bool:
        """Whether what is done to it depends on tensors alone, and it lies where it will stay."""
        return all(type(layer) is StaticLayer and layer.is_initialized for layer in self.layers)

    def copied(self) -> list[torch.Tensor]:
        """A copy of all that a static cache holds."""
        return [value.clone() for value in self._held()]

    def put_back(self, held: Sequence[torch.Tensor]) -> None:
        """Makes a static cache hold what [`copied`] gave."""
        for own, value in zip(self._held(), held, strict=True):
            own.copy_(value)

    def _held(self) -> list[torch.Tensor]:
        return [value for layer in self.layers for value in (layer.keys, layer.values, layer.cumulative_length)]

    @contextmanager
    def turn(self, turn: int) -> Iterator[None]:
        """Makes the cache that of one member, while it answers."""
        self.layers = self._turns[turn]
        try:
            yield
        finally:
            self._join()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders each member's rows alike; `beam_idx` has one number per row of the batch."""
        for layer, copies in zip(self.layers, cycle(self.copies), strict=False):
            shifts = len(beam_idx) * torch.arange(copies, device=beam_idx.device)
            rows = (shifts[:, None] + beam_idx).flatten()
            if self.length is None:
                layer.reorder_cache(rows)
            else:  # where it lies: recorded steps read it there
                layer.keys.copy_(layer.keys.index_select(0, rows))
                layer.values.copy_(layer.values.index_select(0, rows))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Not supported: which rows stay differs from layer to layer."""
        raise ValueError(
            "Rows cannot be selected from the cache of several members. Use another generation strategy."
        )


def of_other_members(name: str) -> ValueError:
    """The error for a cache that members filled who do not answer now."""
    return ValueError(
        f"`{name}` is a cache of other members than those that answer now: the store has changed since. Begin anew "
        "without it."
    )
