"""Which states of the trunk are worth keeping, within a limit of bytes."""

from __future__ import annotations

from collections.abc import Container, Mapping

from ..store.activation_blocks import BlockName, Blocks
from ..store.requests import Place


def choose_blocks(
    passes: Mapping[Place, Mapping[int, float]],
    sizes: Mapping[Place, int],
    limit: float | None = None,
    there: Mapping[BlockName, int] | None = None,
) -> list[BlockName]:
    """The blocks to keep while they fit: those that are there already, then those that save most layers per byte.

    `passes` says per slice how often its rows are to enter each layer, `sizes` how many bytes one block of a slice
    takes, `there` how many the blocks take that need no filling, and `limit` how many all may take together.

    Every pass that enters at a block's layer or above saves as many layers; filling it costs that once. From a block
    below its own layer a stage computes the layers between.

    >>> choose_blocks({(0, 0): {12: 4, 8: 2, 4: 1}}, {(0, 0): 100}, limit=250)
    [BlockName(shard=0, slice=0, layer=8), BlockName(shard=0, slice=0, layer=12)]
    >>> choose_blocks({(0, 0): {12: 1}}, {(0, 0): 100})
    []
    """
    there, worth = there or {}, {}
    for place, wanted in passes.items():
        for layer in wanted:
            uses = sum(times for entrance, times in wanted.items() if entrance >= layer)
            if uses > 1 or BlockName(*place, layer) in there:
                worth[BlockName(*place, layer)] = uses * layer / sizes[place]
    chosen, left = [], float("inf") if limit is None else limit
    for name in sorted(worth, key=lambda name: (name not in there, -worth[name], name)):
        size = there.get(name, sizes[name.place])
        if size <= left:
            chosen.append(name)
            left -= size
    return sorted(chosen)


def drop_beyond(blocks: Blocks, room: float, kept: Container[BlockName] = ()) -> None:
    """Drops blocks that no stage has use for, where they take more than `room` bytes beside what is kept."""
    for name, size in sorted(blocks.sizes().items()):
        if name not in kept:
            room -= size
            if room < 0:
                blocks.drop(name)
