"""The states that enter layers of the frozen trunk, kept as files for the stages to come.

```
out/.s3t/activations/shard-00_slice-2_layer-12.states     what enters layer 12, of every example of slice 2
```

Nothing below a stage's layer group has an adapter, so what enters the group is the base model's alone. A *block* holds
it for one slice and one layer, and goes with the first deletion that hits its slice. Its file begins with the length
of a JSON text, and that text, which says whose states it holds: a deletion finds them in a half-written file, too. The
states of row after row follow, then JSON on how long each is, the length of that JSON, and the sha256 of all before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import StoreError
from ..files import PRIVATE, check_plain, private_folder, remove, sync_folder
from ..plain_data import plain_json
from .database import Place
from .manifest import DAMAGED as MALFORMED

if TYPE_CHECKING:  # a deletion removes blocks without it
    import torch

logger = logging.getLogger(__name__)

FOLDER = "activations"
HEAD = struct.Struct("<Q")
TAIL = struct.Struct("<Q32s")
ALIGNMENT = 8
"""States begin at a multiple of so many bytes, as wide numbers have to."""
PART = ".part"
"""What a file that is being written is called at its end."""

Examples = Sequence[tuple[str, str]]
"""Of each row the keyed digest of its example, and the keyed digest of what stands in the example."""

DAMAGED = (OSError, StoreError, RuntimeError, struct.error, *MALFORMED)


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


@dataclass(frozen=True)
class Block:
    """States of one slice at one layer, row by row."""

    examples: Examples
    inputs: list[str]  # keyed digest of what the collator makes of each row alone
    states: list[torch.Tensor]  # of each row (length, hidden)

    def part(self, examples: Examples) -> Block | None:
        """What it has of some rows, in their order, or `None` unless it has all of them."""
        if examples == self.examples:
            return self
        places: dict[tuple[str, str], list[int]] = {}
        for position in reversed(range(len(self.examples))):
            places.setdefault(self.examples[position], []).append(position)
        try:
            found = [places[example].pop() for example in examples]
        except LookupError:
            return None
        return Block(examples, [self.inputs[place] for place in found], [self.states[place] for place in found])


class MemoryWriter:
    """Collects a block in memory."""

    def __init__(self, name: BlockName, examples: Examples):
        self.name, self.bytes = name, 0
        self.block = Block(examples, [], [])

    def add(self, inputs: str, states: torch.Tensor) -> None:
        """Appends the next row's states."""
        self.block.inputs.append(inputs)
        self.block.states.append(states.to("cpu", copy=True))
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

    def writer(self, name: BlockName, examples: Examples) -> MemoryWriter:
        """Begins a block of the rows of some examples."""
        return MemoryWriter(name, examples)

    def install(self, writer: MemoryWriter) -> None:
        """Makes a block count."""
        self.blocks[writer.name] = writer.block

    def sizes(self) -> dict[BlockName, int]:
        """Bytes per block."""
        return {name: sum(states.nbytes for states in block.states) for name, block in self.blocks.items()}

    def drop(self, name: BlockName) -> None:
        """Forgets a block."""
        self.blocks.pop(name, None)


class FileWriter:
    """Writes a block to a file that does not count yet; nothing of it but the row at hand is in memory."""

    def __init__(self, path: Path, name: BlockName, tie: str, examples: Examples):
        self.path, self.name, self.bytes = path, name, 0
        for folder in (path.parent.parent, path.parent):
            private_folder(folder)
        opener = partial(os.open, mode=PRIVATE)
        self._file = open(path, "wb", opener=opener)  # noqa: SIM115  # it stays open from row to row
        self._sha = hashlib.sha256()
        self._about: dict[str, Any] = {"rows": []}
        text = json.dumps({"tie": tie, "examples": examples}).encode()
        text += b" " * (-(HEAD.size + len(text)) % ALIGNMENT)
        self._write(HEAD.pack(len(text)) + text)
        self._file.flush()  # before the first state: from now on a deletion finds its examples

    def add(self, inputs: str, states: torch.Tensor) -> None:
        """Appends the next row's states."""
        import torch

        self._about["rows"].append((inputs, len(states)))
        self._about |= {"dtype": str(states.dtype), "hidden": states.shape[-1]}
        self._write(states.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def end(self) -> None:
        """Adds how long each row is and the checksum, and waits until the disk has everything."""
        text = json.dumps(self._about).encode()
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

    `tie` is a digest of all that the states depend on but the examples: files of another one are removed.
    """

    def __init__(self, private: Path, tie: str):
        self.folder, self.tie = private / FOLDER, tie
        self._checked: dict[BlockName, tuple[int, int, int]] = {}

    def read(self, name: BlockName) -> Block | None:
        """A block, mapped into memory. A file that is torn, damaged or of other settings is removed."""
        import torch

        path = self.folder / name.file
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        mark = (found.st_ino, found.st_mtime_ns, found.st_size)
        try:
            check_plain(path)
            data = torch.from_file(str(path), shared=False, size=found.st_size, dtype=torch.uint8)
            if self._checked.get(name) != mark:
                _check_whole(data)
            if _head(path)["tie"] != self.tie:
                raise ValueError("it was made with other settings, another base model or other versions")
            block = _block(data, _head(path)["examples"])
        except DAMAGED as error:
            logger.warning("%s is removed and made anew: %s", path, error)
            remove(path)
            return None
        self._checked[name] = mark
        return block

    def writer(self, name: BlockName, examples: Examples) -> FileWriter:
        """Begins a block of the rows of some examples."""
        return FileWriter(self.folder / (name.file + PART), name, self.tie, examples)

    def install(self, writer: FileWriter) -> None:
        """Makes a block count, durably."""
        os.replace(writer.path, self.folder / writer.name.file)
        sync_folder(self.folder)

    def sizes(self) -> dict[BlockName, int]:
        """Bytes per block, of one that is being written as far as it is."""
        sizes: dict[BlockName, int] = {}
        for path in self.folder.glob("*"):
            name = BlockName.from_file(path.name)
            with suppress(FileNotFoundError):  # another process is done with it
                if name is not None:
                    sizes[name] = sizes.get(name, 0) + path.stat().st_size
        return sizes

    def drop(self, name: BlockName) -> None:
        """Removes a block."""
        remove(self.folder / name.file)

    def drop_unfinished(self) -> None:
        """Removes what a training that was stopped was writing."""
        for path in self.folder.glob(f"*{PART}"):
            remove(path)


Blocks = MemoryBlocks | FileBlocks


def _head(path: Path) -> dict[str, Any]:
    """What the beginning of a file says: whose states follow, and what they depend on."""
    check_plain(path)
    with open(path, "rb") as file:
        (length,) = HEAD.unpack(file.read(HEAD.size))
        if length > path.stat().st_size:
            raise ValueError("its beginning is not that of a block")
        return dict(plain_json(file.read(length)))


def _check_whole(data: torch.Tensor) -> None:
    if len(data) < TAIL.size:
        raise ValueError("it is too short")
    _, digest = TAIL.unpack(data[-TAIL.size :].numpy().tobytes())
    if hashlib.sha256(data[: -TAIL.size].numpy().data).digest() != digest:
        raise ValueError("its sha256 is not the one at its end")


def _block(data: torch.Tensor, examples: list[Any]) -> Block:
    (position,) = HEAD.unpack(data[: HEAD.size].numpy().tobytes())
    length, _ = TAIL.unpack(data[-TAIL.size :].numpy().tobytes())
    about = plain_json(data[len(data) - TAIL.size - length : -TAIL.size].numpy().tobytes())
    dtype, hidden = _dtype(about["dtype"]), about["hidden"]
    inputs, states, position = [], [], position + HEAD.size
    for digest, rows in about["rows"]:
        end = position + rows * hidden * dtype.itemsize
        inputs.append(digest)
        states.append(data[position:end].view(dtype).view(rows, hidden))
        position = end
    return Block([(example, content) for example, content in examples], inputs, states)


def _dtype(text: str) -> torch.dtype:
    import torch

    found = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"its states are of an unknown type {text!r:.80}")
    return found


def sweep_activations(private: Path, hit: Container[Place], has_all: Callable[[Iterable[str]], bool]) -> None:
    """Removes the blocks of slices that a deletion hits, and of examples that the index does not know (any more).

    `has_all` tells whether the index has all of some examples; with the state lost it says yes.
    """
    for path in (private / FOLDER).glob("*"):
        name = BlockName.from_file(path.name)
        if name is None or name.place in hit or not _knows_all(path, has_all):
            remove(path)


def _knows_all(path: Path, has_all: Callable[[Iterable[str]], bool]) -> bool:
    try:
        return has_all(example for example, _ in _head(path)["examples"])
    except DAMAGED:
        return False
