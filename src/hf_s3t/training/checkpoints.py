"""Running checkpoints of a stage: which of them are complete and belong to the stage that is about to be resumed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import StoreError
from ..files import json_bytes, read_json, remove, sync_folder, write_atomic
from ..seams.trainer import kept_generators
from ..store.partition import canonical

MARK = "hf_s3t.json"


def mark_complete(folder: Path, mark: Mapping[str, Any]) -> None:
    """Makes a checkpoint count: its files are on the disk, then comes the mark."""
    for path in folder.rglob("*"):
        if path.name == "README.md":  # PEFT writes a card into every folder
            path.unlink()
        elif path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
    write_atomic(folder / MARK, json_bytes(dict(mark)))


def latest_checkpoint(running: Path, mark: Mapping[str, Any]) -> str | None:
    """The newest checkpoint with this mark. A torn one, and one of other data, is removed."""
    complete: list[tuple[int, Path]] = []
    for folder in running.glob("*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and _has_mark(folder, mark):
            complete.append((int(step), folder))
        else:
            remove(folder)
    return str(max(complete)[1]) if complete else None


def _has_mark(folder: Path, mark: Mapping[str, Any]) -> bool:
    try:
        return read_json(folder / MARK) == dict(mark)
    except StoreError:
        return False


def collates_the_same(dataset: Any, collator: Any, size: int) -> bool:
    """Whether dataset and collator give the first batch twice alike: otherwise a resumed stage sees other data."""
    with kept_generators():
        first, second = (_plain_batch(dataset, collator, size) for _ in range(2))
    return first == second


def _plain_batch(dataset: Any, collator: Any, size: int) -> bytes:
    rows = [dict(dataset[position]) for position in range(min(size, len(dataset)))]
    return canonical(dict(collator(rows)))
