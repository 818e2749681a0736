"""Rows in batches of one fixed shape, so that what enters a layer for a row is the same whatever its mates are.

```
  a row of 21 tokens   ■■■■■■■■■■■■■■■■■■■■■□□□   as wide as the row alone says: 24 positions
  a row of 18 tokens   ■■■■■■■■■■■■■■■■■■□□□□□□
  the first row again  ■■■■■■■■■■■■■■■■■■■■■□□□   until the batch has as many rows as its width says
```

A kernel adds in an order that goes with the shape of its operands. So a row's states may differ in their last bits
from those of the row alone, and do on most machines. Here the batch of fixed shape is what *defines* them: the recipe
says so, and who fills, checks, repairs or feeds computes them in that batch. That they equal those of the row alone is
not needed; it could only be found out row by row.

What is needed is that the batch tells nothing of its other rows. A probe looks at that for every shape, on the model
and the machine in use, through every layer below the highest entrance. It takes rows that it makes from one row, so
that no other row of the train set has a say in it. What fails is computed row by row. So the way of a row is a
function of the row, the base model and the machine, like its states.

The probe is evidence, no proof. If it were wrong, bits of a repair would differ from those of a training from scratch.
No influence would stay: rows of one slice share a batch, and its block goes with the first of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch.overrides import TorchFunctionMode

from ..store.recipe import quantization
from .row_numbers import ROW_NUMBER
from .row_states import AloneRows, closeness
from .trunk import is_close

logger = logging.getLogger(__name__)

Row = dict[str, torch.Tensor]
"""What the trunk takes of one row, each `(1, ...)`."""

NARROWEST = 16
"""Positions of the narrowest batch."""


Way = bool | dict[str, int]
"""How states are computed, as the recipe has it: in batches of so many `positions`; with `True` row by row."""


def way_to_compute(before: Any, device: str) -> Way:
    """The way of a store's recipe, if it has one; stores from before there were batches go on row by row.

    >>> way_to_compute(None, "cpu"), way_to_compute({"positions": 2048}, "cpu"), way_to_compute(True, "cuda")
    ({'positions': 512}, {'positions': 2048}, True)
    """
    if before is True or _positions(before) is not None:
        return before
    return {"positions": 512 if device == "cpu" else 2048}  # on a CPU more at once is no faster: docs/speed.md


def _positions(way: Any) -> int | None:
    found = way.get("positions") if isinstance(way, Mapping) and len(way) == 1 else None
    return found if type(found) is int and found > 0 else None


def padded_width(length: int, most: int | None = None) -> int:
    """Positions that a row is padded to: `2**k` or `3 * 2**k`; its own where that is beyond `most`.

    Recipes do not name these numbers: with others, stores that have them could not be repaired to the same bits.

    >>> [padded_width(length) for length in (3, 16, 17, 25, 33, 300)]
    [16, 16, 24, 32, 48, 384]
    >>> padded_width(300, most=320)
    300
    """
    power = 1 << max(length - 1, 0).bit_length()
    width = max(3 * power // 4 if length <= 3 * power // 4 else power, NARROWEST)
    return width if most is None or width <= most else length


def longest_of_each_width(lengths: Sequence[int]) -> list[int]:
    """Places of the longest of some rows among those that are padded to as many positions, and that are not padded.

    >>> longest_of_each_width([5, 9, 16, 20])
    [1, 2, 3]
    """
    places = sorted(range(len(lengths)), key=lambda place: lengths[place])
    widths = [padded_width(length) for length in lengths]
    return list({(widths[place], lengths[place] == widths[place]): place for place in places}.values())


class BatchShape(NamedTuple):
    """The batch that a row is computed in: all that a kernel may be chosen by."""

    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]  # name, type and sizes of each, of one row
    masked: bool  # whether each row has a position that is masked: models leave out a mask that masks nothing


@dataclass(frozen=True)
class PaddedRow:
    """A row as it stands in its batch."""

    tensors: Row
    length: int | None  # its own positions; `None`: all
    digest: str

    @property
    def shape(self) -> BatchShape:
        """The shape of its batch."""
        found = tuple((name, str(value.dtype), tuple(value.shape[1:])) for name, value in sorted(self.tensors.items()))
        mask = self.tensors.get("attention_mask")
        return BatchShape(found, mask is not None and not bool(mask.all()))


class RowBatches:
    """What enters layers for the rows of one stage after the other; a shape is probed once.

    Args:
        way (`Way`): how the recipe has states computed.
        top (`int`): the highest layer that any stage enters.
    """

    def __init__(self, way: Way, top: int):
        self.positions, self.top = _positions(way), top
        self.sizes: dict[BatchShape, int] = {}  # rows of a batch
        self._told = False

    def begin(self, alone: AloneRows) -> None:
        """Rows are those of another stage from now on."""
        self.alone, self.trunk = alone, alone.trunk
        self._known: dict[int, tuple[BatchShape, str]] = {}

    def digest(self, number: int) -> str:
        """By what a row is known, once it is certain how it is computed."""
        return self._about(number)[1]

    def ordered(self, rows: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Rows with their numbers, in the order in which they fill batches."""
        return sorted(rows, key=lambda row: self._about(row[1])[0])

    def batches(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Positions of those rows that are computed together; of rows in order they come in order."""
        by_shape: dict[BatchShape, list[int]] = {}
        for position, number in enumerate(numbers):
            by_shape.setdefault(self._about(number)[0], []).append(position)
        for shape, found in by_shape.items():
            size = self.sizes[shape]
            yield from (found[first : first + size] for first in range(0, len(found), size))

    def states(
        self, numbers: Sequence[int], layers: Sequence[int], start: int = 0, given: Sequence[Any] | None = None
    ) -> list[dict[int, torch.Tensor]]:
        """What enters some layers for each of some rows, `(positions, hidden)`; the model has to be in eval mode.

        The model starts at layer `start`, with what is `given` of each row to enter there.
        """
        found: dict[int, dict[int, torch.Tensor]] = {}
        for batch in self.batches(numbers):
            own = None if given is None else [given[position] for position in batch]
            rows = [numbers[position] for position in batch]
            found |= zip(batch, self._together(rows, layers, start, own), strict=True)
        return [found[position] for position in range(len(numbers))]

    def from_below(self, numbers: Sequence[int], layer: int, sources: Sequence[tuple[int, Any]]) -> list[torch.Tensor]:
        """What enters one layer for some rows, of each of which it is known what enters a layer at or below it."""
        states = [found for _, found in sources]
        for start in {below for below, _ in sources if below < layer}:
            places = [place for place, (below, _) in enumerate(sources) if below == start]
            given = [states[place] for place in places] if start else None
            found = self.states([numbers[place] for place in places], [layer], start, given)
            for place, seen in zip(places, found, strict=True):
                states[place] = seen[layer]
        return states

    # ---- one batch ----

    def _together(
        self, numbers: Sequence[int], layers: Sequence[int], start: int, given: list[Any] | None
    ) -> list[dict[int, torch.Tensor]]:
        size = self.sizes[self._about(numbers[0])[0]]
        if size == 1:
            return [self.alone.states(self.alone.batch(*numbers), layers, start, given and given[0])]
        rows = [self._row(number) for number in numbers]
        more = size - len(rows)
        seen = self._run([*rows, *rows[:1] * more], layers, start, given and [*given, *given[:1] * more])
        return [
            {layer: states[place][: row.length] for layer, states in seen.items()} for place, row in enumerate(rows)
        ]

    def _run(
        self, rows: Sequence[PaddedRow], layers: Sequence[int], start: int = 0, given: list[Any] | None = None
    ) -> dict[int, torch.Tensor]:
        batch = {name: torch.cat([row.tensors[name] for row in rows]) for name in rows[0].tensors}
        with self.alone.trainer.accelerator.autocast():
            inputs = send_to_device(batch, self.alone.trainer.args.device)
            return self.trunk.states(inputs, layers, start, given)

    def _about(self, number: int) -> tuple[BatchShape, str]:
        """A row's shape, of which it is known how many rows make a batch, and its digest."""
        if number not in self._known:
            row = self._row(number)
            if row.shape not in self.sizes:
                self.sizes[row.shape] = self._size(row, number)
            self._known[number] = row.shape, row.digest
        return self._known[number]

    def _row(self, number: int) -> PaddedRow:
        batch = self.alone.batch(number)
        row, digest = dict(self._taken(batch)), self.alone.digest(batch)
        if self.positions is None or not is_paddable(row, self.trunk.main_input):
            return PaddedRow(row, None, digest)
        return self._padded(row, digest)

    def _taken(self, batch: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in self.trunk.taken(batch).items():
            if isinstance(value, torch.Tensor) and name != ROW_NUMBER:
                yield name, value

    def _padded(self, row: Row, digest: str = "", least: int = 0) -> PaddedRow:
        """A row with masked positions on its right."""
        length, (most, pad) = row[self.trunk.main_input].shape[1], self._limits
        width = padded_width(max(length, least), most)
        filling = {self.trunk.main_input: pad}
        padded = {
            name: torch.cat([value, value.new_full((1, width - length, *value.shape[2:]), filling.get(name, 0))], 1)
            if value.ndim > 1 else value
            for name, value in row.items()
        }  # fmt: skip
        return PaddedRow(padded, length, digest)

    @property
    def _limits(self) -> tuple[int | None, int]:
        """The positions of the model, if it has so many, and its token for padding."""
        config = self.trunk.base.config.get_text_config()
        pad = getattr(config, "pad_token_id", None)
        return getattr(config, "max_position_embeddings", None), pad if isinstance(pad, int) and pad > 0 else 0

    # ---- the probe ----

    def _size(self, row: PaddedRow, number: int) -> int:
        """Rows of a batch of a row's shape; 1 where a row is computed alone."""
        if self.positions is None:
            return 1
        with self.trunk.evaluating():
            width = self._run([row], [0])[0].shape[1]
            size = max(self.positions // width, 1)
            if size == 1 or self._is_independent(row, number, size):
                return size
        if not self._told:
            logger.warning(
                "the activation cache computes rows of this model one by one where what enters a layer may depend on "
                "the rest of a batch, even if only in last bits (the first: %d rows of %d positions). Only speed is "
                "lost.", size, width,
            )  # fmt: skip
            self._told = True
        return 1

    def _is_independent(self, row: PaddedRow, number: int, size: int) -> bool:
        """Whether rows of a shape have the same states at every place, beside whatever mates, bit for bit."""
        if quantization(self.trunk.base) is not None:  # 8-bit layers look for outliers in all of a batch
            return False
        rows, middle = self._made(row), self.top // 2
        turns = [[(place + turn) % len(rows) for place in range(size)] for turn in range(len(rows))]
        turns += [[0] * size, [1] * size]
        with self.trunk.reaching(self.top), self.trunk.model.disable_adapter():
            seen = [self._run([rows[of] for of in turn], [middle, self.top]) for turn in turns]
            first = [states[: rows[of].length] for of, states in zip(turns[0], seen[0][middle], strict=True)]
            again = self._run([rows[of] for of in turns[0]], [self.top], middle, first)
            alone = self.alone.states(self.alone.batch(number), [self.top])[self.top]
            calls = [self._calls([rows[of] for of in turn]) for turn in (turns[0], *turns[-2:])]
        known: dict[int, torch.Tensor] = {}
        for turn, states in zip([*turns, turns[0]], [*seen, again], strict=True):
            for of, value in zip(turn, states[self.top], strict=True):
                own = value[: rows[of].length]
                if not torch.equal(known.setdefault(of, own), own):
                    return False
        if any(name in ROUTING for name, *_ in calls[0]):
            return False
        return calls[0] == calls[1] == calls[2] and is_close(known[0], alone, closeness(self.alone, alone))

    def _made(self, row: PaddedRow) -> list[PaddedRow]:
        """A row, and rows of its shape that are made of its tokens: short ones, long ones, in another order."""
        main, width = self.trunk.main_input, row.tensors[self.trunk.main_input].shape[1]
        if row.length is None:
            turned = (row.tensors | {main: row.tensors[main].roll(turn, 1)} for turn in (1, 2))
            return [row, *(PaddedRow(tensors, None, "") for tensors in turned)]
        most, pad = self._limits
        # RoBERTa counts positions from the number of its padding token.
        beyond = most is not None and width + pad > most > pad
        longest = min(row.length, width - 1) if beyond else width - 1
        lengths = (1, width // 2, longest) if row.shape.masked else (width, width)
        made = []
        for turn, length in enumerate(lengths, 1):
            places = torch.arange(length) % row.length
            tensors = {name: value[:, places] for name, value in row.tensors.items() if value.ndim > 1}
            tensors[main] = tensors[main].roll(turn, 1)
            tensors["attention_mask"] = torch.ones_like(tensors["attention_mask"])
            made.append(self._padded(row.tensors | tensors, least=width))
        return [row, *made]

    def _calls(self, rows: Sequence[PaddedRow]) -> list[Any]:
        with Calls() as calls:
            self._run(rows, [self.top])
        return calls.seen


ROUTING = frozenset({"_grouped_mm", "argsort", "bincount", "grouped_mm", "histc", "nonzero", "sort", "topk"})
"""Functions by which experts get their tokens. How many come to one depends on the batch, and no shape tells."""


class Calls(TorchFunctionMode):
    """Notes every function of torch that is called, with the shapes of its tensors and all other arguments.

    What a kernel is chosen by is in there. Rows that see each other by way of shapes (experts that take as many
    tokens as are sent to them, masks that are left out) show even where the numbers happen to agree.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((getattr(func, "__name__", ""), _outline(args), _outline(kwargs or {})))
        return func(*args, **kwargs or {})


def _outline(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.stride()
    if isinstance(value, Mapping):
        return [(name, _outline(below)) for name, below in value.items()]
    if isinstance(value, list | tuple):
        return [_outline(below) for below in value]
    return value if isinstance(value, bool | int | float | str | slice | None) else type(value).__name__


def is_paddable(row: Row, main: str) -> bool:
    """Whether a row can be padded without its collator: tokens, with a mask and whatever else goes with each token."""
    tokens, mask = row[main], row.get("attention_mask")
    if tokens.ndim != 2 or tokens.is_floating_point() or mask is None or mask.shape != tokens.shape:
        return False
    return all(value.ndim == 1 or value.shape[1] == tokens.shape[1] for value in row.values())
