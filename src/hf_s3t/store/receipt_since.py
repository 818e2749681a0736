"""What became of a deletion since its receipt was written, as the store stands now, and what to call that."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from ..hub.purge_report import uncovered
from ..lora.adapter import WEIGHTS_FILE
from ..plan.tree import Stage
from .export_records import carrying, present
from .folder import StoreFolder
from .receipts import Receipt


@dataclass(frozen=True)
class Since:
    """What became of a deletion since.

    Args:
        repaired (`dict[str, str | None]`): removed stages that were trained again, and when (UTC; `None` where the
            store does not tell).
        missing (`tuple[str, ...]`): removed stages that were not.
        exports (`tuple[str, ...]`): copies that are there and still carry the influence.
        history (`tuple[str, ...]`): revisions of the repository that served it, unless a purge was finished.
    """

    repaired: dict[str, str | None]
    missing: tuple[str, ...]
    exports: tuple[str, ...]
    history: tuple[str, ...]


def since_of(folder: StoreFolder, receipt: Receipt) -> Since:
    """What became of a deletion, as the store stands now. It changes nothing."""
    stages = folder.live().stages
    repaired, missing = {}, []
    for name, files in receipt.stages_removed.items():
        now = stages.get(Stage.from_name(name))
        if now is not None and now[WEIGHTS_FILE] != files.get(WEIGHTS_FILE):
            repaired[name] = _written(folder, name)
        elif now is None:
            missing.append(name)
    exports = [path for path in receipt.exports if present(Path(path))]
    if folder.has_state:
        places = {(shard, slice_id): receipt.generation for shard, slice_id in receipt.places}
        exports = carrying(folder, places) if places else exports
    history = receipt.still_served_at
    if receipt.repository and not uncovered(receipt.repository, [receipt.to_json()], folder.private):
        history = []
    return Since(repaired, tuple(missing), tuple(exports), tuple(history))


def _written(folder: StoreFolder, stage: str) -> str | None:
    """When a stage's file was written; of a repository that is not known."""
    try:
        seconds = (folder.path / stage / WEIGHTS_FILE).stat().st_mtime
    except OSError:
        return None
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def status_words(receipt: Receipt, since: Since | None = None) -> str:
    """What is said to a reader of where a request stands: done or not, and what is left.

    >>> status_words(Receipt("receipt-1", "delete", "inactive", "2026-01-01", 1, stages_removed={"shard-00/0": {}}))
    'done here; not yet repaired'
    """
    if receipt.kind == "readmit":
        return "done here: what was deleted may be trained on again"
    if receipt.kind == "obeyed":
        return "taken over from elsewhere"
    if receipt.status == "dry run":
        return "nothing was changed: a dry run"
    if receipt.status == "unchanged":
        if not receipt.already_deleted:
            return "nothing to do: nothing that was asked for is known here"
        day = f"on {receipt.inactive_since[:10]}" if receipt.inactive_since else "elsewhere"
        return f"nothing to do: deleted before {day}"
    if receipt.status == "pending":
        return "done at the head; the purge of the history is pending"
    where, history = ("the head", True) if receipt.status == "inactive_at_head" else ("here", False)
    still = receipt.still_served_at if since is None else since.history
    if history and still:
        return "done at the head; the history still serves it"
    missing = receipt.stages_removed if since is None else since.missing
    exports = receipt.exports if since is None else since.exports
    done = f"done {'at ' if history else ''}{where}"
    copies = "; exported copies still carry it" if exports else ""
    return done + ("; not yet repaired" if missing else "") + copies
