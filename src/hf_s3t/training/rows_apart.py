"""The rows of a train set on a worker, which knows examples by number only.

The driver numbers the examples of its train set in the order of their keyed digests. A worker loads the same train
set, and is told the number and the place, shard and slice, of each raw row's example. An order then names examples by
their numbers. That is all that a stage needs: which rows, in which order, and which of them lie in one slice. Who has
it can tell rows of one slice from rows of another, and nothing about rows that are not in the train set: without the
key nobody can be looked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..lora.config import S3TConfig
from ..store.partition import DIGEST_CHARS, Entry, raw_rows, row_digest
from .rows import TrainRows

SAMPLE = 64
"""Prepared rows that are compared."""


@dataclass(frozen=True)
class Numbers:
    """What a worker is told of the train set."""

    examples: np.ndarray  # number of each raw row's example, (raw rows,)
    places: np.ndarray  # shard and slice of each example, (examples, 2)


class Numbering:
    """The driver's side: from keyed digests to numbers."""

    def __init__(self, rows: TrainRows):
        self._digests = np.array(sorted(rows.entries), dtype=f"S{DIGEST_CHARS}")
        places = [rows.entries[digest][:2] for digest in sorted(rows.entries)]
        self.numbers = Numbers(self.of(rows.raw_names), np.array(places, dtype=np.int32).reshape(-1, 2))

    def of(self, examples: Sequence[str]) -> np.ndarray:
        """Numbers of examples, in their order."""
        return np.searchsorted(self._digests, np.array(examples, dtype=self._digests.dtype))


class RowsApart(TrainRows):
    """The worker's side. Until [`know`] it knows of a raw row its position alone."""

    def __init__(self, dataset: Any, key: bytes, config: S3TConfig):
        """`key` is a random one, not the store's: with it digests of cached rows are made."""
        names = [str(position) for position in range(len(dataset))]
        super()._begin(names, {}, dataset, key, config)

    def _assign(self, marks: Iterable[str]) -> None:
        self._marks = [int(mark) for mark in marks]

    def know(self, numbers: Numbers) -> None:
        """Takes what the driver tells of the rows."""
        names = self.names(range(len(numbers.places)))
        self.entries = {
            name: Entry(shard, slice_id, None, "")
            for name, (shard, slice_id) in zip(names, numbers.places.tolist(), strict=True)
        }
        examples = numbers.examples.tolist()
        super()._assign(names[examples[mark]] for mark in self._marks)

    def names(self, numbers: Iterable[int]) -> list[str]:
        """Examples by their numbers."""
        return [str(int(number)) for number in numbers]


def rows_identity(raw: Any, prepared: Any) -> dict[str, Any]:
    """By what two train sets are told apart, computed without a key: every raw row, and some prepared ones.

    Prepared rows are looked at in a `datasets.Dataset` alone: others may draw them anew each time.
    """
    digest, count = hashlib.sha256(), 0
    for row in raw_rows(raw):
        digest.update(bytes.fromhex(row_digest(row)))
        count += 1
    found = {"rows": count, "content": digest.hexdigest(), "prepared rows": len(prepared)}
    if hasattr(prepared, "select"):
        some = prepared.select(range(0, len(prepared), max(len(prepared) // SAMPLE, 1)))
        digest = hashlib.sha256("".join(map(row_digest, raw_rows(some))).encode())
        found["some prepared rows"] = digest.hexdigest()
    return found
