"""What a deletion does: write the intent, remove what depends on the examples, leave tombstones and a receipt.

Everything follows from the index and the tree of stages. The intent is durable before anything changes, and
`carry_out` may be run again from any point, so an interrupted deletion ends the same.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import StateError, StoreError, UnfinishedDeletionError
from ..files import json_bytes, remove, utc_now
from ..lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from .agreement import check_agreement
from .commitments import commitments
from .database import Kind, Place, StateDatabase
from .deletion_records import INTENT_FORMAT, OPTIONAL
from .evidence import served_json, weights_of
from .export_records import carrying
from .exports import settle
from .folder import StoreFolder
from .manifest import NOT_KNOWN, Manifest, merged, places_beyond
from .obeyed import with_receipts
from .outlook import outlook_of
from .receipt_signature import check_signer
from .receipts import NO_COMMITMENT, Receipt, append_receipt, check_receipts, limits_of, linked, receipt_name, versions
from .requests import Request, alike_sentence, unknown_error
from .sources import TOMBSTONES, FolderSource, on_top
from .state_files import INTENTS
from .sweep import sweep
from .tombstones import absorb, event_of, obey, put_tombstones, tombstones_hmac

logger = logging.getLogger(__name__)


def delete(
    folder: StoreFolder,
    request: Request,
    *,
    reference: str | None = None,
    missing_ok: bool = False,
    dry_run: bool = False,
    refresh_exports: bool = False,
    when_durable: Callable[[], None] | None = None,
    renewed: Collection[str] = (),
) -> Receipt:
    """Deletes what a request covers. Runs under the store's write lock; see [`S3TStore.delete`] for the arguments.

    Of examples that are `renewed` (keyed digests) the content is another one now, which may be trained on: they leave
    no tombstone.
    """
    if request.unknown:
        check_agreement(folder, folder.manifest())
        if not missing_ok:
            raise unknown_error(folder, request)
    if request.look_alikes:
        logger.warning("Similar names were not deleted, because nobody asked for them:%s", alike_sentence(request))
    receipt = _preview(folder, request, reference, dry_run)
    if dry_run:
        return replace(receipt, status="dry run")
    check_signer(folder)
    if not request.places:
        return _unchanged(folder, request, receipt, refresh_exports)
    committed = commitments(folder, receipt.receipt, request)
    limits = receipt.limits if committed else (*receipt.limits, NO_COMMITMENT)
    receipt = linked(folder, replace(receipt, commitments=committed, limits=limits))
    intent = {
        "kind": "delete",
        "receipt": receipt.to_json(),
        "ids": {digest: list(places) for digest, places in request.ids.items()},
        "groups": {digest: list(places) for digest, places in request.groups.items()},
        "places": sorted(request.places),
        "generation": receipt.generation,
        "refresh_exports": refresh_exports,
        "renewed": sorted(renewed),
    }
    folder.source.check_writable()
    intent = _write_intent(folder, intent)
    try:
        if when_durable is not None:
            when_durable()
    finally:  # from here on it cannot be undone, whatever the caller's part ends in
        receipt = _to_its_end(folder, intent)
    _obey_beside(folder)
    return receipt


def _to_its_end(folder: StoreFolder, intent: Mapping[str, Any]) -> Receipt:
    try:
        return carry_out(folder, intent)
    except (OSError, StateError) as error:
        raise _unfinished(intent, error) from error


def _unfinished(intent: Mapping[str, Any], error: Exception) -> UnfinishedDeletionError:
    served = " What it is about is not served any more, but is still on the disk, in whole or in part."
    return UnfinishedDeletionError(
        f"{intent['receipt']['receipt']} was begun and is not finished: {error}."
        f"{'' if intent['kind'] == 'readmit' else served} Put that right and run it again, or any other change of the "
        "store, which finishes it first."
    )


def _unchanged(folder: StoreFolder, request: Request, receipt: Receipt, refresh_exports: bool) -> Receipt:
    """The receipt of a request all of which had been deleted before."""
    copies = settle(folder, receipt.exports, receipt.generation, refresh_exports)
    places = {place for stone in request.stones for place in stone.places}
    reached = folder.source.reached(places, folder.manifest().weights)  # of one that somebody else made, too
    since = [known["inactive_since"] for known in _earlier(folder, receipt.deleted_by)]
    last = max(since) if len(since) == len(receipt.deleted_by) > 0 else None  # made elsewhere: not known here
    receipt = replace(receipt, status="unchanged", inactive_since=last, still_served_at=reached, **copies)
    return append_receipt(folder, receipt)


def _earlier(folder: StoreFolder, names: Sequence[str]) -> list[dict[str, Any]]:
    if not folder.has_state:
        return []
    try:
        with folder.reading() as state:
            found = [receipt for name in names if (receipt := state.receipt(name)) is not None]
        return [Receipt.from_json(receipt).to_json() for receipt in found]
    except StateError as error:  # it was deleted, whatever became of the record
        logger.error("since when it is not served any more is not known: %s", error)
        return []


def readmit(folder: StoreFolder, request_digests: Mapping[str, Kind], reference: str | None) -> Receipt:
    """Lifts tombstones (`digest -> "id" | "group"`). Examples come back when they are handed to a training again."""
    manifest = folder.manifest()
    receipt = Receipt(
        receipt_name(), "readmit", "readmitted", utc_now(), manifest.generation + 1, reference=reference,
        asked=len(request_digests), found=len(request_digests), versions=versions(), limits=(),
    )  # fmt: skip
    check_signer(folder)
    receipt = linked(folder, receipt)
    intent = {
        "kind": "readmit",
        "receipt": receipt.to_json(),
        "ids": {digest: [] for digest, kind in request_digests.items() if kind == "id"},
        "groups": {digest: [] for digest, kind in request_digests.items() if kind == "group"},
        "places": [],
        "generation": receipt.generation,
    }
    folder.source.check_writable()
    return _to_its_end(folder, _write_intent(folder, intent))


def _preview(folder: StoreFolder, request: Request, reference: str | None, dry_run: bool) -> Receipt:
    manifest = folder.live(intents=folder.readable_intents())
    gone = [stage for stage in sorted(manifest.stages) if stage.slices & request.places]
    before = manifest.plan.served(manifest.stages)
    left = manifest.without(gone)
    after = manifest.plan.served(left.stages)
    counts: Counter[Place] | None = None
    caches: list[str] = []
    if folder.has_state:
        with folder.reading() as state:
            counts, caches = state.counts(), state.caches()
    else:
        logger.warning("the state of %s is not here: how many examples this concerns is not known", folder.path)
    lost = [(shard, slice_id) for shard, prefix in before.items() for slice_id in prefix]
    lost = [place for place in lost if place[1] not in after.get(place[0], ())]
    deleted, generation = len(request.ids), manifest.generation + bool(request.places)
    hit = {place for places in request.ids.values() for place in places}
    dark = None if counts is None else max(sum(counts[place] for place in {*lost, *hit}) - deleted, 0)
    return Receipt(
        receipt=receipt_name(), kind="delete", status="inactive", requested_at=utc_now(),
        generation=generation, asked=request.asked,
        found=request.asked - request.already - len(request.unknown), already_deleted=request.already,
        examples=None if counts is None else deleted, dark_examples=dark, reference=reference,
        deleted_by=sorted({name for stone in request.stones for name in stone.deletions}),
        stages_removed={stage.name: manifest.stages[stage] for stage in gone},
        stages_after=weights_of(manifest.without(gone)), places=sorted(map(list, request.places)),
        served_before=served_json(before), served_after=served_json(after),
        exports=carrying(folder, _newest(request, generation)), caches=caches, versions=versions(),
        repository=folder.source.repo_id, limits=limits_of(manifest),
        **(outlook_of(left)._asdict() if dry_run else {}),  # else it follows when nothing waits for it any more
    )  # fmt: skip


def _newest(request: Request, generation: int) -> dict[Place, int]:
    """The generation of the newest deletion of what is asked for, by the places that it hit."""
    newest = dict.fromkeys(request.places, generation)
    for stone in request.stones:
        for place in stone.places:
            newest[place] = max(newest.get(place, 0), stone.generation)
    return newest


def carry_out(folder: StoreFolder, intent: Mapping[str, Any]) -> Receipt:
    """Brings an intent to its end, from wherever it was interrupted. Runs under the store's write lock."""
    check_receipts(folder)  # of a newer version: before anything goes, not when it is to be told
    receipt = on_top(partial(_carry_out_once, folder, intent), partial(_look_again, folder))
    logger.info("%s %s: %d stages removed", receipt.kind, receipt.receipt, len(receipt.stages_removed))
    return receipt


def _look_again(folder: StoreFolder) -> None:
    folder.source.look()
    absorb(folder, folder)


def _carry_out_once(folder: StoreFolder, intent: Mapping[str, Any]) -> Receipt:
    receipt = Receipt.from_json(intent["receipt"])
    places = {(shard, slice_id) for shard, slice_id in intent["places"]}
    with folder.changing_if_there() as state:  # it counts after everything that it tells of is done
        manifest = folder.manifest()
        log = merged(manifest.log, {receipt.receipt: event_of(intent, state is not None)})
        if state is not None:
            obey(state, intent)
            log = merged(log, state.log())
        hit = places_beyond(log, manifest.log)
        if log != manifest.log:  # else it had been carried out, and was interrupted afterwards
            manifest = _rewrite(folder, replace(manifest.untouched_by(hit), log=log), state)
            title = "Deletion" if receipt.kind == "delete" else "Readmission"
            folder.source.publish(f"{title} {receipt.receipt}", manifest.names)
        sweep(folder, manifest, hit | places, state)
        if state is not None:
            state.keep_records(manifest.names)
    copies = settle(folder, receipt.exports, receipt.generation, intent.get("refresh_exports", False))
    reached = folder.source.reached(places, manifest.weights)
    at_head = folder.source.repo_id is not None and receipt.kind == "delete"
    outlook = outlook_of(manifest)._asdict() if receipt.kind == "delete" else {}
    receipt = replace(
        receipt, status="inactive_at_head" if at_head else receipt.status, generation=manifest.generation,
        inactive_since=utc_now(), still_served_at=reached, **copies, **outlook,
    )  # fmt: skip
    receipt = append_receipt(folder, receipt)
    _end(folder.private / INTENTS / intent["file"])
    return receipt


def _end(intent: Path) -> None:
    """Removes an intent. One that is back after a power cut is carried out again, which changes nothing."""
    try:
        remove(intent)
    except OSError:
        if intent.exists():
            raise


def _rewrite(folder: StoreFolder, manifest: Manifest, state: StateDatabase | None) -> Manifest:
    """Writes the manifest, and the root adapter of what it lists."""
    manifest = replace(manifest, generation=len(manifest.log))
    try:
        manifest = folder.write_root(manifest)
    except StoreError as error:  # a damaged stage that stays must not keep another one from being deleted
        logger.error("the root adapter was removed, because a kept stage cannot be read: %s", error)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            folder.source.drop(name)
        manifest = replace(manifest, root=None)
    stones = tombstones_hmac(folder, state, manifest)
    manifest = replace(manifest, tombstones=stones)
    folder.write_manifest(manifest)
    if state is not None and folder.has_key and folder.source.has(TOMBSTONES):
        put_tombstones(folder, state, folder.key)
    return manifest


def take_over(folder: StoreFolder, there: StoreFolder) -> None:
    """Obeys the deletions that another copy of the store knows of. Runs under the write lock."""
    absorb(folder, there)
    recover(folder)  # the state may now be ahead of the manifest


def recover(folder: StoreFolder, others: bool = True) -> list[tuple[dict[str, Any], Receipt]]:
    """What every writer does first: finish interrupted deletions, drop half-written files, obey newer tombstones.

    Where `others` is false one that cannot be finished is told of, obeyed by whatever serves, and left: it must not
    keep another person's deletion from being carried out. Returns the intents that it finished, with their receipts.
    """
    folder.tighten()
    _look_again(folder)
    done = []
    for intent in folder.intents() if others else folder.readable_intents():
        try:
            if intent.get("repo") == folder.source.repo_id:
                done.append((intent, carry_out(folder, intent)))
            elif folder.has_state:  # whoever opens that repository ends it; what it is about is obeyed here, too
                with folder.changing() as state:
                    obey(state, intent)
        except (OSError, StoreError) as error:
            if others:
                raise
            logger.error("%s was begun and cannot be finished: %s", intent["receipt"]["receipt"], error)
    if folder.exists:
        on_top(partial(_obey, folder), partial(_look_again, folder))
        _obey_beside(folder)
    return done


def _obey_beside(folder: StoreFolder) -> None:
    """Where a repository's state is that of a folder (`out/.s3t`), that folder obeys the same deletions."""
    beside = folder.private.parent
    if folder.source.repo_id is not None and beside / ".s3t" == folder.private:
        store = StoreFolder(beside, folder._given_key)
        if store.exists:
            _obey(store)


def _obey(folder: StoreFolder) -> None:
    """Brings the published files up to the state, where an older copy of them was put back."""
    with folder.changing_if_there() as state:
        manifest = folder.manifest()
        hit: set[Place] = set()
        if state is not None:
            log = with_receipts(merged(manifest.log, state.log()), state)
            hit = places_beyond(log, manifest.log)
            untold = manifest.tombstones == NOT_KNOWN and state.knows(manifest) and folder.has_key
            if untold or log != manifest.log:
                manifest = _rewrite(folder, replace(manifest.untouched_by(hit), log=log), state)
                folder.source.publish(f"Deletions up to {manifest.generation}", manifest.names)
                state.keep_records(manifest.names)
        if isinstance(folder.source, FolderSource) and not folder.has_root_of(manifest):
            manifest = _rewrite(folder, manifest, state)  # an older one was put back, or a write was interrupted
        sweep(folder, manifest, hit, state)


def _write_intent(folder: StoreFolder, intent: dict[str, Any]) -> dict[str, Any]:
    check_receipts(folder)  # refused before anything is on record
    name = f"{intent['generation']:08d}-{intent['receipt']['receipt']}.json"
    intent = {**OPTIONAL, **intent, "format": INTENT_FORMAT, "file": name, "repo": folder.source.repo_id}
    try:
        folder.write_private(f"{INTENTS}/{name}", json_bytes(intent))
    except OSError as error:
        if (folder.private / INTENTS / name).exists():  # it is in its place, and readers obey it
            raise _unfinished(intent, error) from error
        raise
    return intent
