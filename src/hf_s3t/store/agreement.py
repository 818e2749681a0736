"""Whether a state and published files are of one time.

A deletion asks the state who is where, and whoever restores one of them from a backup and not the other has stages
that the state knows nothing of: before anybody is told that they are unknown here, and before anything trains, the two
are held against each other.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import StateError
from .database import StateDatabase
from .folder import StoreFolder
from .manifest import Manifest


def disagreements(manifest: Manifest, state: StateDatabase) -> Iterator[str]:
    """What tells that a state is of another time than the stages of a manifest; of others' stages it has no record."""
    counts, records = state.counts(), state.records()
    for stage in sorted(manifest.stages):
        record = records.get(stage.name)
        if record is None:
            continue
        if record.get("files", manifest.stages[stage]) != manifest.stages[stage]:
            yield f"{stage.name} is not the stage that the state has a record of"
        elif record["examples"] > sum(counts[place] for place in stage.slices):
            yield f"{stage.name} saw {record['examples']} examples, and the index has fewer in its slices"


def check_agreement(folder: StoreFolder, manifest: Manifest) -> None:
    """Raises [`StateError`] where the state cannot tell who was trained on."""
    with folder.reading() as state:
        found = list(disagreements(manifest, state))
    if found:
        raise StateError(
            f"The state in {folder.private} and the stages of {folder.path} are of different times: {found[0]} "
            f"({len(found)} such stages). The model may hold examples that the state does not know. Nothing was "
            "changed. Import the newer state (`hf-s3t state import`), or delete whole slices (`slices=[...]`)."
        )
