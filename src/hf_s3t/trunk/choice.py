"""Which states of the trunk are worth keeping: those that save most layer forwards per byte, within a limit."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from ..store.activation_blocks import BlockName, Blocks
from ..store.requests import Place


@dataclass(frozen=True)
class Demand:
    """What the stages to come ask of the trunk.

    Args:
        counts (`dict[Place, int]`): rows of each slice.
        passes (`dict[Place, dict[int, float]]`): per slice, how often its rows are to enter each layer.
    """

    counts: Mapping[Place, int]
    passes: Mapping[Place, Mapping[int, float]]

    @property
    def rows(self) -> int:
        """Rows of the slices that are asked for."""
        return sum(self.counts[place] for place in self.passes)

    def saved(self, kept: Iterable[BlockName]) -> float:
        """Share of the layer forwards in the trunk that blocks save, what it takes to fill them counted."""
        layers: dict[Place, list[int]] = {place: [] for place in self.passes}
        whole = sum(self.counts[place] * layer_passes(self.passes[place], []) for place in layers)
        for name in kept:
            layers[name.place].append(name.layer)
        left = sum(self.counts[place] * layer_passes(self.passes[place], layers[place]) for place in layers)
        return 1 - left / whole if whole else 0.0


def drop_beyond(blocks: Blocks, room: float, kept: Container[BlockName] = ()) -> None:
    """Drops blocks that no stage has use for, where there is no room for them.

    Args:
        blocks ([`FileBlocks`]): the blocks.
        room (`float`): bytes that they may take beside what is kept.
        kept (`set[BlockName]`, *optional*): what stays.
    """
    for name, size in sorted(blocks.sizes().items()):
        if name not in kept:
            room -= size
            if room < 0:
                blocks.drop(name)


def choose_blocks(
    passes: Mapping[Place, Mapping[int, float]],
    sizes: Mapping[Place, int],
    limit: float | None = None,
    there: Mapping[BlockName, int] | None = None,
) -> list[BlockName]:
    """The blocks worth keeping, those that save most layer forwards per byte first, while they fit.

    A block at layer `c` costs a pass through `c` layers to fill, and every later pass of its slice that enters at `c`
    or above saves as many. From a block below its own layer a stage computes the layers between.

    Args:
        passes (`dict[Place, dict[int, float]]`): per slice, how often its rows are to enter each layer.
        sizes (`dict[Place, int]`): bytes of one block of each slice.
        limit (`float`, *optional*): bytes of all blocks together.
        there (`dict[BlockName, int]`, *optional*): bytes of blocks that need no filling; of them, those that are of
            use come first.

    >>> choose_blocks({(0, 0): {12: 4, 8: 2, 4: 1}}, {(0, 0): 100}, limit=250)
    [BlockName(shard=0, slice=0, layer=8), BlockName(shard=0, slice=0, layer=12)]
    >>> choose_blocks({(0, 0): {12: 1}}, {(0, 0): 100})
    []
    """
    kept: dict[Place, list[int]] = {place: [] for place in passes}
    chosen: list[BlockName] = []
    left = float("inf") if limit is None else limit
    for name, size in sorted((there or {}).items()):
        if name.layer in passes.get(name.place, ()) and size <= left:
            kept[name.place].append(name.layer)
            chosen.append(name)
            left -= size
    while True:
        gains = [
            (layer_passes(wanted, kept[place]) - layer_passes(wanted, [*kept[place], layer]), BlockName(*place, layer))
            for place, wanted in passes.items()
            for layer in wanted
            if layer not in kept[place] and sizes[place] <= left
        ]
        gain, best = max(gains, key=lambda found: (found[0], [-part for part in found[1]]), default=(0, None))
        if best is None or gain <= 0:
            return chosen
        kept[best.place].append(best.layer)
        chosen.append(best)
        left -= sizes[best.place]


def layer_passes(wanted: Mapping[int, float], kept: Iterable[int]) -> float:
    """Layers that the rows of a slice pass in the trunk, over all stages, with blocks at the layers `kept`."""
    blocks = sorted(kept)
    fill = blocks[-1] if blocks else 0
    return fill + sum(
        times * (layer - max((block for block in blocks if block <= layer), default=0))
        for layer, times in wanted.items()
    )
