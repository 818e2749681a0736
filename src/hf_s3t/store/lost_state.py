"""The way out where deletions are lost: the manifest names them, and no state knows any more whom they were about.

Their slices start anew. No stage that saw them stays, and their examples leave the index, so that the rows handed in
next are new. In the state's log they are events without tombstones, not `named`: should a state with their tombstones
be found again, it is believed, and not taken for one that somebody readmitted from.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import StateError
from ..files import utc_now
from .database import Place, StateDatabase
from .deletion import recover
from .evidence import served_json, weights_of
from .export_records import carrying
from .folder import StoreFolder
from .manifest import Event, Log, Manifest
from .receipt_signature import check_signer
from .receipts import Receipt, check_receipts, finished, limits_of, linked, receipt_name, versions

logger = logging.getLogger(__name__)

WARNING = (
    "This store can no longer tell who was deleted by the lost deletions. Do not hand in rows of these people any "
    "more: such rows would be trained on again."
)


@dataclass(frozen=True)
class Loss:
    """Deletions that the manifest of a store names and its state does not know.

    Args:
        deletions (`dict[str, tuple[tuple[int, int], ...]]`): the `(shard, slice)`s of each, by its name.
        readmissions (`tuple[str, ...]`): lost readmissions. What they lifted stays deleted until it is readmitted
            again; as it may have been trained on, every slice that something was deleted from starts anew.
        places (`tuple[tuple[int, int], ...]`): the `(shard, slice)`s that start anew.
        stages (`tuple[str, ...]`): live stages that saw them, which go.
        examples (`int`): examples that leave the index, until they are handed in again.
        receipt ([`Receipt`], *optional*): `None` if nothing was changed.
    """

    deletions: dict[str, tuple[Place, ...]]
    readmissions: tuple[str, ...]
    places: tuple[Place, ...]
    stages: tuple[str, ...]
    examples: int
    receipt: Receipt | None = None

    @property
    def found(self) -> bool:
        """Whether anything is lost."""
        return bool(self.deletions or self.readmissions)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "warning": WARNING if self.found else None}


def accept_loss(folder: StoreFolder, reference: str | None, dry_run: bool) -> Loss:
    """Goes on without the tombstones that are lost; see [`S3TStore.accept_loss`]. Runs under the write lock.

    The state is written first: in its log the loss is an event, which every later writer obeys if this is interrupted.
    """
    manifest = folder.manifest()
    _ = folder.key  # refused now: without it nothing that is written afterwards is vouched for
    with folder.reading() as state:
        if state.store != manifest.key_check:
            raise StateError(f"The state in {folder.private} is of another store than {folder.path}.")
        lost = {name: event for name, event in manifest.log.items() if name not in state.log()}
        loss = _loss(manifest, lost, state)
    if dry_run or not loss.found:
        return loss
    check_receipts(folder)
    folder.source.check_writable()
    check_signer(folder)
    receipt = linked(folder, _receipt(folder, manifest, loss, reference))
    loss = replace(loss, receipt=finished(folder, receipt))
    _write(folder, lost, loss)
    recover(folder)
    logger.warning("%d lost deletions of %s were accepted. %s", len(lost), folder.path, WARNING)
    return loss


def _loss(manifest: Manifest, lost: Log, state: StateDatabase) -> Loss:
    places = {place for event in lost.values() for place in event.places}
    readmissions = tuple(name for name, event in lost.items() if not event.places)
    if readmissions:
        places |= state.newest_deletions().keys()
    counts = state.counts()
    return Loss(
        deletions={name: event.places for name, event in lost.items() if event.places},
        readmissions=readmissions,
        places=tuple(sorted(places)),
        stages=tuple(stage.name for stage in sorted(manifest.stages) if stage.slices & places),
        examples=sum(counts[place] for place in places),
    )


def _receipt(folder: StoreFolder, manifest: Manifest, loss: Loss, reference: str | None) -> Receipt:
    places = set(loss.places)
    after = manifest.untouched_by(places)
    generation = manifest.generation + 1
    return Receipt(
        receipt=receipt_name(), kind="loss", status="accepted", requested_at=utc_now(), generation=generation,
        asked=len(loss.deletions) + len(loss.readmissions), examples=loss.examples, dark_examples=None,
        deleted_by=sorted([*loss.deletions, *loss.readmissions]), reference=reference,
        stages_removed={stage.name: manifest.stages[stage] for stage in sorted(manifest.stages.keys() - after.stages)},
        stages_after=weights_of(after), places=sorted(map(list, places)),
        served_before=served_json(manifest.plan.served(manifest.stages)),
        served_after=served_json(after.plan.served(after.stages)),
        exports=carrying(folder, dict.fromkeys(places, generation)), repository=folder.source.repo_id,
        still_served_at=folder.source.reached(places, after.weights), versions=versions(),
        limits=(WARNING, *limits_of(manifest)),
    )  # fmt: skip


def _write(folder: StoreFolder, lost: Log, loss: Loss) -> None:
    assert loss.receipt is not None
    unnamed = {name: Event(event.places, named=False) for name, event in lost.items()}
    with folder.changing() as state:
        state.add_log({**unnamed, loss.receipt.receipt: Event(loss.places)})
        for place in loss.places:
            state.remove_examples(state.examples_of(place))
        state.add_receipt(loss.receipt.receipt, loss.receipt.to_json())
