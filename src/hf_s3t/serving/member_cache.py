"""A key-value cache that has rows for several members."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache


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

        self.copies, self.turns = tuple(copies), turns
        self._turns = [layers() for _ in range(turns)]
        super().__init__(layers=self._turns[0])
        self._join()

    def _join(self) -> None:
        self.layers = self._turns[0] if len(self._turns) == 1 else [layer for own in self._turns for layer in own]

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
            layer.reorder_cache((shifts[:, None] + beam_idx).flatten())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Not supported: which rows stay differs from layer to layer."""
        raise ValueError(
            "Rows cannot be selected from the cache of several members. Use another generation strategy."
        )
