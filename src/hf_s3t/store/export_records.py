"""What is known of exports: which copies left the store, of which stages, and which of them carry what was deleted."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import StateError
from ..plain_data import read_as
from ..plan.tree import Stage
from .database import Place
from .folder import StoreFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What is known of one export."""

    stages: tuple[str, ...]  # all whose tensors are in it, or may be after an interruption
    prefix: str | None  # the stage that was asked for; `None`: the root adapter
    merge: bool  # whether it is a whole model
    base: str | None  # where a merged one's base model came from; `None`: it was handed in as a module
    generation: int  # the store's when it was made; what was deleted later, it may carry

    @classmethod
    def from_json(cls, data: Any) -> Record:
        """Reads what is on record. A `ValueError` for anything else."""
        record = read_as(cls, data)
        for name in (*record.stages, *([record.prefix] if record.prefix is not None else [])):
            Stage.from_name(name)
        return record

    def carries(self, newest: Mapping[Place, int]) -> bool:
        """Whether it was made of what something deleted depends on, before that was deleted."""
        places = {place for name in self.stages for place in Stage.from_name(name).slices}
        return any(newest.get(place, 0) > self.generation for place in places)


def read_exports(folder: StoreFolder) -> dict[str, Record]:
    """Every export on record, by its path. A [`StateError`] if the record is damaged."""
    if not folder.database.exists():
        return {}
    with folder.reading(lost=True) as state:
        found = state.exports()
    try:
        return {path: Record.from_json(fields) for path, fields in found.items()}
    except ValueError as error:
        raise StateError(
            f"The record of exports is damaged ({error}). Restore it from a backup of the state."
        ) from None


def write_export_record(folder: StoreFolder, path: str, record: Record) -> None:
    """Replaces what is known of an export, durably."""
    with folder.changing(create=True) as state:
        state.write_export(path, asdict(record))


def carrying(folder: StoreFolder, newest: Mapping[Place, int]) -> list[str]:
    """Paths of the exports that are still there and carry the influence of something deleted.

    `newest` has the generation of the newest deletion that hit each place.
    """
    try:
        records = read_exports(folder)
    except StateError as error:  # a record that is only a record stops no deletion
        logger.error("which exports carry the influence is not known: %s", error)
        return []
    return [path for path, record in records.items() if record.carries(newest) and present(Path(path))]


def present(path: Path) -> bool:
    """Whether something of an export is there, or of one that was interrupted."""
    return os.path.lexists(path) or scratch_of(path).exists()


def scratch_of(path: Path) -> Path:
    """Where a merged model is written before it is put in place: beside its folder, as it may need its disk."""
    return path.with_name(f".{path.name}.hf_s3t")
