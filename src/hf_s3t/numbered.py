"""Rows that keep their numbers on the way into a batch, so that it is known whose states a model needs.

The collator is the user's own; around it each row is compared with what the collator had made of it alone. That is how
padding on the left, packing and random batches are told, by whatever they come about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

ROW_NUMBER = "hf_s3t_row"
"""Column of a batch that says which prepared rows are in it."""


class NumberedRows(Dataset):
    """Prepared rows that know their numbers; all else is asked of the rows themselves."""

    def __init__(self, rows: Any, numbers: Sequence[int]):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, str):  # a column, of a `datasets.Dataset`
            return self.rows[position]
        return {**self.rows[position], ROW_NUMBER: self.numbers[position]}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "rows" not in vars(self):  # `__getitems__` would give rows without their numbers
            raise AttributeError(name)
        return getattr(self.rows, name)


class NumberingCollator:
    """Makes the user's batch, adds the rows' numbers, and compares each row with what its states were computed from.

    Args:
        collate (`Callable`): the user's collator.
        main_input (`str`): name of the tensor whose second dimension is padded.
        key (`bytes`): for the digests.
    """

    def __init__(self, collate: Callable[[Any], Any], main_input: str, key: bytes):
        self.collate, self.main_input = collate, main_input
        self.key = hashlib.sha256(key).digest()
        self.expected: dict[int, str] = {}

    def __call__(self, rows: list[Any]) -> Any:
        if not (isinstance(rows[0], Mapping) and ROW_NUMBER in rows[0]):  # rows of the evaluation
            return self.collate(rows)
        numbers = [row[ROW_NUMBER] for row in rows]
        batch = self.collate([{name: row[name] for name in row if name != ROW_NUMBER} for row in rows])
        for position, number in enumerate(numbers):
            expected = self.expected.get(number)
            if expected is not None and self.digest(batch, position, len(rows), expected) != expected:
                raise ValueError(
                    f"The collator makes something else of row {number} in a batch than of the row alone, padded on "
                    "the right: padding on the left, packing and random batches can not be cached. Use "
                    "padding_side='right' and a collator that always gives the same, or activation_cache='off'."
                )
        batch[ROW_NUMBER] = torch.tensor(numbers)
        return batch

    def digest(self, batch: Mapping[str, Any], position: int, rows: int, alone: str | None = None) -> str:
        """Keyed digest of one row of a batch, after the row's length and which of the columns, by name, are as long.

        Args:
            batch (`dict[str, torch.Tensor]`): what the collator gave.
            position (`int`): which row.
            rows (`int`): how many there are.
            alone (`str`, *optional*): digest of the row alone, which says how much of it is padding here.
        """
        main = batch.get(self.main_input)
        if not isinstance(main, torch.Tensor) or main.ndim < 2:
            raise ValueError(
                f"The collator gives no tensor {self.main_input!r} of at least two dimensions, which the model's "
                f"trunk starts from (it gives {sorted(batch)}). Use activation_cache='off'."
            )
        tensors = {name: batch[name] for name in sorted(batch) if isinstance(batch[name], torch.Tensor)}
        tensors.pop(ROW_NUMBER, None)
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
