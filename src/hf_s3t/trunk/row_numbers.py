"""Rows that keep their numbers on the way into a batch, so that it is known which rows a training step sees.

Every row carries a mark: which stage it was handed to, and which prepared row it is. Around the user's collator marks
are taken out of the rows and put into the batch, and every step looks at them before the model does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ..errors import IsolationError

ROW_NUMBER = "hf_s3t_row"
"""Column of a batch with the marks of its rows."""
NUMBER_BITS = 40
"""Of a mark, for the row's number; those above are for the stage."""


class NumberedRows(Dataset):
    """Prepared rows of one stage that know their numbers in the whole train set; all else is asked of the rows.

    `serial` is the stage's, another one for every stage that a process trains.
    """

    def __init__(self, rows: Any, numbers: Sequence[int], serial: int):
        self.rows, self.numbers, self.serial = rows, numbers, serial

    def of(self, rows: Any) -> NumberedRows:
        """The same rows in another form, such as with fewer columns."""
        return NumberedRows(rows, self.numbers, self.serial)

    def mark(self, number: int) -> int:
        """The mark of the row of a number."""
        return self.serial << NUMBER_BITS | number

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, str):  # a column, of a `datasets.Dataset`
            return self.rows[position]
        return {**self.rows[position], ROW_NUMBER: self.mark(self.numbers[position])}

    def __getitems__(self, positions: Sequence[int]) -> list[Any]:
        several = getattr(self.rows, "__getitems__", None)
        rows = several(positions) if several is not None else [self.rows[position] for position in positions]
        marks = (self.mark(self.numbers[position]) for position in positions)
        return [{**row, ROW_NUMBER: mark} for row, mark in zip(rows, marks, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "rows" not in vars(self):
            raise AttributeError(name)
        return getattr(self.rows, name)


class MarkingCollator:
    """Makes the batch that the user's collator makes, and adds the marks of its rows."""

    def __init__(self, collate: Callable[[Any], Any]):
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        if not (isinstance(rows[0], Mapping) and ROW_NUMBER in rows[0]):  # rows of the evaluation
            return self.collate(rows)
        marks = [row[ROW_NUMBER] for row in rows]
        batch = self.collate([{name: row[name] for name in row if name != ROW_NUMBER} for row in rows])
        if not isinstance(batch, MutableMapping):
            raise IsolationError(
                f"The collator gives a {type(batch).__name__}, which cannot say whose rows are in it. Return a "
                "mapping from the names of the model's arguments to tensors."
            )
        self.look(batch, [number_of(mark) for mark in marks])
        batch[ROW_NUMBER] = marks
        return batch

    def look(self, batch: Mapping[str, Any], numbers: Sequence[int]) -> None:
        """Hook: sees a batch of rows with these numbers."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "collate" not in vars(self):
            raise AttributeError(name)
        return getattr(self.collate, name)


class RowGuard:
    """Lets the rows of one stage into its training steps, and no others."""

    def __init__(self, rows: NumberedRows):
        self.serial, self.numbers = rows.serial, frozenset(rows.numbers)
        self.batches = self._seen = 0

    def take(self, batch: MutableMapping[str, Any]) -> list[int]:
        """Takes the marks out of a batch, and gives the numbers of its rows, all of which have to be the stage's."""
        marks: Any = batch.pop(ROW_NUMBER, None)
        if marks is None:
            raise IsolationError(
                "A training batch does not say which rows are in it, so it is not known whether the stage may see "
                "them. Make it from `self.train_dataset`, anew for every stage, and with `self.data_collator`: a "
                "loader of another dataset, a generated batch and a collator of its own lose the rows' marks."
            )
        marks = marks.tolist() if isinstance(marks, torch.Tensor) else marks
        foreign = [mark for mark in marks if mark >> NUMBER_BITS != self.serial or number_of(mark) not in self.numbers]
        if foreign:
            raise IsolationError(
                f"{len(foreign)} of {len(marks)} rows of a training batch are not rows of the running stage but of "
                "another one: a loader or its rows were kept from an earlier stage. Make `get_train_dataloader` "
                "return a new loader over `self.train_dataset` each time."
            )
        self.batches += 1
        return [number_of(mark) for mark in marks]

    def check_step(self) -> None:
        """Raises [`IsolationError`] if an optimizer step is about to be taken and no batch was looked at before it."""
        if self.batches == self._seen:
            raise IsolationError(
                "An optimizer step was taken on a batch that was not looked at: `training_step` was replaced. Call "
                "`super().training_step(model, inputs, ...)` in yours, which looks at the rows' marks."
            )
        self._seen = self.batches


def number_of(mark: int) -> int:
    """The row's number in a mark."""
    return mark & ((1 << NUMBER_BITS) - 1)


def without_marks(batch: Any) -> Any:
    """A batch as the model takes it."""
    if isinstance(batch, Mapping) and ROW_NUMBER in batch:
        return type(batch)({name: batch[name] for name in batch if name != ROW_NUMBER})  # type: ignore[call-arg]
    return batch


class NumberingCollator(MarkingCollator):
    """A [`MarkingCollator`] that compares each row with what its states were computed from: with the row alone.

    That is how padding on the left, packing and random batches are told, whatever they come from. `main_input` names
    the tensor whose second dimension is padded.
    """

    def __init__(self, collate: Callable[[Any], Any], main_input: str, key: bytes):
        super().__init__(collate)
        self.main_input = main_input
        self.key = hashlib.sha256(key).digest()
        self.expected: dict[int, str] = {}

    def look(self, batch: Mapping[str, Any], numbers: Sequence[int]) -> None:
        """Compares the rows of a batch."""
        for position, number in enumerate(numbers):
            expected = self.expected.get(number)
            if expected is not None and self.digest(batch, position, len(numbers), expected) != expected:
                raise ValueError(
                    f"The collator makes something else of row {number} in a batch than of the row alone, padded on "
                    "the right: padding on the left, packing and random batches cannot be cached. Use "
                    "padding_side='right' and a collator that always gives the same, or activation_cache='off'."
                )

    def digest(self, batch: Mapping[str, Any], position: int, rows: int, alone: str | None = None) -> str:
        """Keyed digest of one row of a batch, after the row's length and which of the columns, by name, are as long.

        `alone`, the digest of the row by itself, says how much of it is padding here.
        """
        main = batch.get(self.main_input)
        if not isinstance(main, torch.Tensor) or main.ndim < 2:
            raise ValueError(
                f"The collator gives no tensor {self.main_input!r} of at least two dimensions, which the model's "
                f"trunk starts from (it gives {sorted(batch)}). Use activation_cache='off'."
            )
        tensors = {name: batch[name] for name in sorted(batch) if isinstance(batch[name], torch.Tensor)}
        long = "".join("01"[value.ndim > 1 and value.shape[1] == main.shape[1]] for value in tensors.values())
        length = main.shape[1] if alone is None else row_length(alone)
        long = long if alone is None else alone.split(":")[1].ljust(len(tensors), "0")
        digest = hashlib.blake2b(digest_size=16, key=self.key)
        for (name, value), is_long in zip(tensors.items(), long, strict=False):
            if not value.ndim or len(value) != rows:
                raise ValueError(
                    f"The collator gives {name!r} of shape {tuple(value.shape)} for {rows} rows: without a row per "
                    "example it is not known whose states depend on it. Use activation_cache='off'."
                )
            own = value[position][:length] if is_long == "1" and value.ndim > 1 else value[position]
            digest.update(f"{name} {own.dtype} {tuple(own.shape)} ".encode())
            digest.update(own.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return f"{length}:{long}:{digest.hexdigest()}"


def row_length(digest: str) -> int:
    """Length of the row that a digest is of."""
    return int(digest.split(":")[0])
