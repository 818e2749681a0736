"""The rows of a train set on their way through a Trainer: from raw row to the examples of a stage.

Subclasses of the Trainer tokenise and filter rows inside `__init__`. So the raw rows are partitioned first, each row
carries its keyed digest through the preparation in one extra column, and afterwards that column says which prepared
row is whose.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import Subset

from ..lora.config import S3TConfig
from ..plan.tree import Stage
from ..seams.preparation import DIGEST_COLUMN
from ..store.database import StateDatabase
from ..store.hashing import read_rows
from ..store.partition import Index, id_source, raw_rows, stage_examples
from ..trunk.row_numbers import NumberedRows

logger = logging.getLogger(__name__)


class TrainRows:
    """Which raw row of the train set is which example."""

    changed: frozenset[str] = frozenset()
    """Examples whose rows are not what the index knows, and are trained on all the same (`missing="ignore"`)."""

    def __init__(self, dataset: Any, key: bytes, config: S3TConfig, progress: bool = False, workers: int = 0):
        digests, index = read_rows(dataset, key, config, progress, workers)
        self._begin(digests, index, dataset, key, config)

    def _begin(self, names: list[str], entries: Index, dataset: Any, key: bytes, config: S3TConfig) -> None:
        if not names:
            raise ValueError("The train set has no rows.")
        self.raw, self.raw_names, self.entries = dataset, names, entries
        self.id_column = id_source(config, list(next(iter(raw_rows(dataset)))))
        self.key, self.replay = key, config.replay
        self._first: dict[str, int] = {}  # the prepared row of an example
        self._more: dict[str, list[int]] = {}  # and more of them, of the few that have any
        self.dataset: Any = None
        self._serial = 0
        logger.info("examples are named by %s", self.id_column or "a digest of their raw content")

    def marked(self, dataset: Any) -> Any:
        """The raw dataset with the digest column, where it can have one."""
        return dataset.add_column(DIGEST_COLUMN, self.raw_names) if hasattr(dataset, "add_column") else dataset

    def adopt(self, prepared: Any) -> Any:
        """Takes the prepared dataset; returns it without the digest column."""
        digests: Iterable[str] = self.raw_names
        if DIGEST_COLUMN in getattr(prepared, "column_names", ()):
            marks = prepared.select_columns(DIGEST_COLUMN)
            digests = (row[DIGEST_COLUMN] for row in raw_rows(marks))
            prepared = prepared.remove_columns(DIGEST_COLUMN)
        elif len(prepared) != len(self.raw_names):
            raise ValueError(
                f"{len(self.raw_names)} rows became {len(prepared)} without the column {DIGEST_COLUMN!r}, so it is "
                "unclear which is which. Keep extra columns in the dataset's preparation, and do not pack examples."
            )
        self._assign(digests)
        self.dataset = prepared
        return prepared

    def _assign(self, digests: Iterable[str]) -> None:
        """Notes whose the prepared rows are; one name for each of them."""
        self._first = dict.fromkeys(self.entries, -1)  # so that each digest is in memory once
        for position, digest in enumerate(digests):
            first = self._first.get(digest, position)  # a row that the preparation made up is nobody's
            if first < 0:
                self._first[digest] = position
            elif first < position:
                self._more.setdefault(digest, []).append(position)
        self._first = {digest: position for digest, position in self._first.items() if position >= 0}
        dropped = len(self.entries) - len(self._first)
        if dropped:
            logger.warning("%d rows were dropped in the preparation: no stage sees them", dropped)

    def examples(self, stage: Stage, state: StateDatabase) -> tuple[str, ...]:
        """Keyed digests of a stage's examples, as [`stage_examples`] orders them: those of the index, nothing deleted.

        The index decides: a row that it does not know (readmitted meanwhile) nobody could delete.
        """
        by_slice = {
            slice_id: [d for d in state.examples_of((stage.shard, slice_id)) if d in self._first]
            for slice_id in stage.prefix
        }
        return stage_examples(stage, by_slice, self.replay)

    def trained_on(self, state: StateDatabase) -> Index:
        """The rows that stages see if they are trained now: prepared, and not deleted."""
        buried = state.buried()
        ids, groups = buried["id"], buried["group"]
        known = ((digest, self.entries[digest]) for digest in self._first)
        return {digest: entry for digest, entry in known if digest not in ids and entry.group not in groups}

    def numbered(self, examples: Sequence[str]) -> list[tuple[str, int]]:
        """Some examples with the numbers of their prepared rows, which may be several, in their order."""
        return [
            (digest, position)
            for digest in examples
            if digest in self._first
            for position in (self._first[digest], *self._more.get(digest, ()))
        ]

    def select(self, examples: Sequence[str]) -> NumberedRows:
        """The prepared rows of some examples, in their order, with a mark of their own each time."""
        numbers = [number for _, number in self.numbered(examples)]
        whole = self.dataset
        rows = whole.select(numbers) if hasattr(whole, "select") else Subset(whole, numbers)
        self._serial += 1
        return NumberedRows(rows, numbers, self._serial)

    @property
    def cache_files(self) -> list[str]:
        """Files of the datasets cache that hold prepared rows."""
        return [record["filename"] for record in getattr(self.dataset, "cache_files", None) or ()]
