"""What is known of exports: which copies left the store, of which stages, and which of them carry what was deleted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import StateError
from ..files import json_bytes, read_json
from ..plan.tree import Stage
from .folder import StoreFolder
from .state import Tombstone

EXPORTS = "exports.json"


@dataclass(frozen=True)
class Record:
    """What is known of one export."""

    stages: tuple[str, ...]  # all whose tensors are in it, or may be after an interruption
    prefix: str | None  # the stage that was asked for; `None`: the root adapter
    merge: bool  # whether it is a whole model
    base: str | None  # where a merged one's base model came from; `None`: it was handed in as a module
    generation: int  # the store's when it was made; what was deleted later, it may carry

    def carries(self, deleted: Iterable[Tombstone]) -> bool:
        """Whether it was made of what something deleted depends on, before that was deleted."""
        places = {place for name in self.stages for place in Stage.from_name(name).slices}
        return any(stone.generation > self.generation and places & stone.places for stone in deleted)


def read_exports(folder: StoreFolder) -> dict[str, Record]:
    """Every export on record, by its path."""
    path = folder.private / EXPORTS
    return records_from_json(read_json(path)) if path.exists() else {}


def records_from_json(data: Any) -> dict[str, Record]:
    """Reads the record of exports. A [`StateError`] if it is none."""
    try:
        return {path: Record(**{**fields, "stages": tuple(fields["stages"])}) for path, fields in data.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise StateError(
            f"The record of exports is damaged ({error}). Restore it from a backup of the state."
        ) from None


def records_to_json(records: Mapping[str, Record]) -> dict[str, Any]:
    """The record of exports as plain data."""
    return {path: asdict(record) for path, record in records.items()}


def write_exports(folder: StoreFolder, records: Mapping[str, Record]) -> None:
    """Replaces the record of exports, durably."""
    folder.write_private(EXPORTS, json_bytes(records_to_json(records)))


def carrying(folder: StoreFolder, deleted: Iterable[Tombstone]) -> list[str]:
    """Paths of the exports that are still there and carry the influence of something deleted."""
    deleted = list(deleted)
    return [path for path, record in read_exports(folder).items() if record.carries(deleted) and present(Path(path))]


def present(path: Path) -> bool:
    """Whether something of an export is there, or of one that was interrupted."""
    return os.path.lexists(path) or scratch_of(path).exists()


def scratch_of(path: Path) -> Path:
    """Where a merged model is written before it is put in place: beside its folder, as it may need its disk."""
    return path.with_name(f".{path.name}.hf_s3t")
