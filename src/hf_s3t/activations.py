"""The states that enter layers of the frozen trunk, kept for the stages to come: which, where, and how large.

```
out/.s3t/activations/shard-00_slice-2_layer-12.states     what enters layer 12, of every example of slice 2
```

Nothing below a stage's layer group has an adapter, so what enters the group is the base model's alone, whatever the
sequence, the epoch and the stage. A *block* holds it for one slice and one layer. It is computed from the examples, so
it goes with the first deletion that hits its slice. In a file the states of row after row stand as they are in memory;
then comes JSON that says whose they are, then the length of that JSON and the sha256 of all before. How states are
computed is for `trunk.py`, when for `feeding.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .files import DTYPES, remove, sync_folder

logger = logging.getLogger(__name__)

FOLDER = "activations"
TAIL = struct.Struct("<Q32s")
PART = ".part"
"""What a file that is being written is called at its end."""

Place = tuple[int, int]


class BlockName(NamedTuple):
    """Names the states that enter `layer`, of the examples of one slice."""

    shard: int
    slice: int
    layer: int

    @property
    def place(self) -> Place:
        """The `(shard, slice)` whose deletions take the block with them."""
        return self.shard, self.slice

    @property
    def file(self) -> str:
        """Name of its file.

        >>> BlockName(0, 2, 12).file
        'shard-00_slice-2_layer-12.states'
        """
        return f"shard-{self.shard:02d}_slice-{self.slice}_layer-{self.layer}.states"

    @classmethod
    def from_file(cls, file: str) -> BlockName | None:
        """Reads the name of a file, whole or being written; `None` for any other name."""
        match = re.fullmatch(r"shard-(\d{2,})_slice-(\d+)_layer-(\d+)\.states", file.removesuffix(PART))
        name = cls(*map(int, match.groups())) if match else None
        return name if name and name.file == file.removesuffix(PART) else None


class Row(NamedTuple):
    """One prepared row of a block.

    Args:
        example (`str`): keyed digest of its example.
        content (`str`): keyed digest of what stands in the example.
        inputs (`str`): keyed digest of what the collator makes of the row alone.
        length (`int`): positions that it takes in the model.
    """

    example: str
    content: str
    inputs: str
    length: int


@dataclass(frozen=True)
class Block:
    """States of one slice at one layer: of each row a tensor of shape `(length, hidden)`."""

    rows: tuple[Row, ...]
    states: list[torch.Tensor]

    def find(self, examples: Iterable[tuple[str, str]]) -> list[int] | None:
        """Where the rows of these examples with these contents are, or `None` unless it has all of them.

        Args:
            examples (`Iterable[tuple[str, str]]`): keyed digests of an example and of its content, once for each of
                its rows.
        """
        places: dict[tuple[str, str], list[int]] = {}
        for position in reversed(range(len(self.rows))):
            places.setdefault((self.rows[position].example, self.rows[position].content), []).append(position)
        try:
            return [places[example].pop() for example in examples]
        except (KeyError, IndexError):
            return None


class MemoryWriter:
    """Collects a block in memory."""

    def __init__(self, name: BlockName):
        self.name, self.bytes = name, 0
        self.rows: list[Row] = []
        self.states: list[torch.Tensor] = []

    def add(self, row: Row, states: torch.Tensor) -> None:
        """Appends a row's states."""
        self.rows.append(row)
        self.states.append(states.to("cpu", copy=True))
        self.bytes += states.nbytes

    def end(self) -> None:
        """Nothing: what is in memory is whole."""

    def abandon(self) -> None:
        """Nothing: nobody else has seen it."""


class MemoryBlocks:
    """Blocks that live as long as one `train()`."""

    def __init__(self) -> None:
        self.blocks: dict[BlockName, Block] = {}

    def read(self, name: BlockName) -> Block | None:
        """A block, if it was written."""
        return self.blocks.get(name)

    def writer(self, name: BlockName) -> MemoryWriter:
        """Begins a block."""
        return MemoryWriter(name)

    def install(self, writer: MemoryWriter) -> None:
        """Makes a block count."""
        self.blocks[writer.name] = Block(tuple(writer.rows), writer.states)

    def sizes(self) -> dict[BlockName, int]:
        """Bytes per block."""
        return {name: sum(states.nbytes for states in block.states) for name, block in self.blocks.items()}

    def drop(self, name: BlockName) -> None:
        """Forgets a block."""
        self.blocks.pop(name, None)


class FileWriter:
    """Writes a block to a file that does not count yet; nothing of it but the row at hand is in memory."""

    def __init__(self, path: Path, name: BlockName, tie: str):
        self.path, self.name, self.tie, self.bytes = path, name, tie, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "wb")  # noqa: SIM115  # it stays open from row to row
        self._sha = hashlib.sha256()
        self._rows: list[Row] = []
        self._about: dict[str, Any] = {}

    def add(self, row: Row, states: torch.Tensor) -> None:
        """Appends a row's states."""
        self._rows.append(row)
        self._about = {"dtype": str(states.dtype), "hidden": states.shape[-1]}
        self._write(states.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def end(self) -> None:
        """Adds whose the states are and the checksum, and waits until the disk has everything."""
        text = json.dumps({"tie": self.tie, **self._about, "rows": self._rows}).encode()
        self._write(text)
        self._file.write(TAIL.pack(len(text), self._sha.digest()))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Leaves nothing of it."""
        self._file.close()
        remove(self.path)

    def _write(self, data: Any) -> None:
        self._sha.update(data)
        self._file.write(data)
        self.bytes += len(data)


class FileBlocks:
    """Blocks as files of a store's scratch; they outlast the training and serve its repairs.

    Args:
        private (`Path`): the store's `.s3t/`.
        tie (`str`): digest of all that the states depend on but the examples. Files of another one are removed.
    """

    def __init__(self, private: Path, tie: str):
        self.folder, self.tie = private / FOLDER, tie
        self._checked: dict[BlockName, tuple[int, int, int]] = {}

    def read(self, name: BlockName) -> Block | None:
        """A block, mapped into memory. A file that is torn, damaged or of other settings is removed."""
        path = self.folder / name.file
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        mark = (found.st_ino, found.st_mtime_ns, found.st_size)
        try:
            data, about = _map(path)
            if self._checked.get(name) != mark and not _is_whole(data):
                raise ValueError("its sha256 is not the one at its end")
            if about["tie"] != self.tie:
                raise ValueError("it was made with other settings, another base model or other versions")
            block = _block(data, about)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            logger.warning("%s is removed and made anew: %s", path, error)
            remove(path)
            return None
        self._checked[name] = mark
        return block

    def writer(self, name: BlockName) -> FileWriter:
        """Begins a block."""
        return FileWriter(self.folder / (name.file + PART), name, self.tie)

    def install(self, writer: FileWriter) -> None:
        """Makes a block count, durably."""
        os.replace(writer.path, self.folder / writer.name.file)
        sync_folder(self.folder)

    def sizes(self) -> dict[BlockName, int]:
        """Bytes per block."""
        paths = {BlockName.from_file(path.name): path for path in self.folder.glob("*.states")}
        return {name: path.stat().st_size for name, path in paths.items() if name is not None}

    def drop(self, name: BlockName) -> None:
        """Removes a block."""
        remove(self.folder / name.file)

    def drop_unfinished(self) -> None:
        """Removes what a training that was stopped was writing."""
        for path in self.folder.glob(f"*{PART}"):
            remove(path)


Blocks = MemoryBlocks | FileBlocks


def _map(path: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """A file's bytes, mapped, and what its JSON says."""
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    if len(data) < TAIL.size:
        raise ValueError("it is too short")
    length, _ = TAIL.unpack(data[-TAIL.size :].numpy().tobytes())
    if length > len(data) - TAIL.size:
        raise ValueError("its end is not that of a block")
    about = json.loads(data[len(data) - TAIL.size - length : -TAIL.size].numpy().tobytes())
    if not isinstance(about, dict):
        raise ValueError("its end is not that of a block")
    return data, about


def _is_whole(data: torch.Tensor) -> bool:
    _, digest = TAIL.unpack(data[-TAIL.size :].numpy().tobytes())
    return hashlib.sha256(data[: -TAIL.size].numpy().data).digest() == digest


def _block(data: torch.Tensor, about: Mapping[str, Any]) -> Block:
    rows = tuple(Row(*row) for row in about["rows"])
    dtype, hidden = {str(known): known for known in DTYPES}[about["dtype"]], about["hidden"]
    states, position = [], 0
    for row in rows:
        end = position + row.length * hidden * dtype.itemsize
        states.append(data[position:end].view(dtype).view(row.length, hidden))
        position = end
    return Block(rows, states)


def sweep_activations(private: Path, hit: Container[Place], read_index: Callable[[], Container[str]] | None) -> None:
    """Removes the blocks of slices that a deletion hits, and of examples that the index does not know (any more).

    Args:
        private (`Path`): the store's `.s3t/`.
        hit (`set[Place]`): slices that were deleted from.
        read_index (`Callable`, *optional*): gives the keyed digests of the live examples; `None`: the state is lost.
    """
    paths = list((private / FOLDER).glob("*"))
    index = read_index() if paths and read_index else None
    for path in paths:
        name = BlockName.from_file(path.name)
        if name is None or name.place in hit or not (path.name.endswith(PART) or _knows_only(path, index)):
            remove(path)


def _knows_only(path: Path, index: Container[str] | None) -> bool:
    try:
        _, about = _map(path)
        return index is None or all(row[0] in index for row in about["rows"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return False


def choose_blocks(
    passes: Mapping[Place, Mapping[int, float]],
    sizes: Mapping[Place, int],
    limit: float | None = None,
    there: Iterable[BlockName] = (),
) -> list[BlockName]:
    """The blocks worth keeping, those that save most layer forwards per byte first, while they fit.

    A block at layer `c` costs a pass through `c` layers to fill, and every later pass of its slice that enters at `c`
    or above saves as many. From a block below its own layer a stage computes the layers between.

    Args:
        passes (`dict[Place, dict[int, float]]`): per slice, how often its rows are to enter each layer.
        sizes (`dict[Place, int]`): bytes of one block of each slice.
        limit (`float`, *optional*): bytes of all blocks together.
        there (`list[BlockName]`, *optional*): blocks that need no filling; of them, those that are of use come first.

    >>> choose_blocks({(0, 0): {12: 4, 8: 2, 4: 1}}, {(0, 0): 100}, limit=250)
    [BlockName(shard=0, slice=0, layer=8), BlockName(shard=0, slice=0, layer=12)]
    >>> choose_blocks({(0, 0): {12: 1}}, {(0, 0): 100})
    []
    """
    kept: dict[Place, list[int]] = {place: [] for place in passes}
    chosen: list[BlockName] = []
    left = float("inf") if limit is None else limit
    for name in sorted(there):
        if name.layer in passes.get(name.place, ()) and sizes[name.place] <= left:
            kept[name.place].append(name.layer)
            chosen.append(name)
            left -= sizes[name.place]
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
