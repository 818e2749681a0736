"""Tombstones of a state: what a deletion adds to them, what others added, and what the index loses by them."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StateError, StoreError
from ..files import json_bytes, read_json
from . import schema
from .database import Place, StateDatabase
from .folder import MAX_MANIFEST_BYTES, StoreFolder
from .manifest import DAMAGED, NOT_KNOWN, Event, Log, Manifest, merged, read_log
from .obeyed import account_for
from .receipts import receipt_name
from .sources import TOMBSTONES, RepoSource

logger = logging.getLogger(__name__)


def absorb(folder: StoreFolder, there: StoreFolder) -> None:
    """Takes over events and tombstones that the state has not, from a manifest and from what travels beside it.

    Runs under the store's write lock. A [`StateError`] if the state is of another store.
    """
    if not there.exists or not folder.has_state:
        return
    manifest = there.manifest()
    theirs = travelling(there, folder.key) if folder.has_key else None
    with folder.reading() as state:
        if state.store != manifest.key_check:
            raise StateError(
                f"The state in {folder.private} is of another store than {there.path}. Name its own state."
            )
        known = state.log()
    if theirs is None and all(event.named or name in known for name, event in manifest.log.items()):
        return
    with folder.changing() as state:
        if theirs is not None:
            join(state, theirs)
        if bury_unnamed(state, merged(manifest.log, state.log()), known) or theirs is not None:
            state.remove_buried()
        account_for(folder, state, known, manifest.log)


def join(state: StateDatabase, theirs: StateDatabase) -> None:
    """Joins two states. What was lost and is found again is an event: stages trained meanwhile may have seen it."""
    again = state.join(theirs)
    if again:
        state.add_log({receipt_name(): Event(tuple(sorted(again)))})


def travelling(there: StoreFolder, key: bytes) -> StateDatabase | None:
    """The tombstones that travel in a repository; `None` where none do, or where somebody without the key wrote them.

    They may be of another time than its manifest: old ones say nothing that is not so.
    """
    if not isinstance(there.source, RepoSource) or not there.source.has(TOMBSTONES):
        return None
    path = there.source.file(TOMBSTONES, MAX_MANIFEST_BYTES)  # where it cannot be fetched nothing goes on
    try:
        return from_tombstones_json(read_json(path, MAX_MANIFEST_BYTES), key)
    except StoreError as error:  # a deletion must not wait for somebody who repairs that file
        logger.warning("the tombstones in %s are not looked at: %s", there.path, error)
        return None


def from_tombstones_json(data: Any, key: bytes) -> StateDatabase:
    """Reads what travelled, into memory. A [`StateError`] if somebody without the key wrote it."""
    found = StateDatabase(schema.in_memory())
    try:
        if data["format"] != 2:
            raise ValueError(f"format {data['format']!r:.80}")
        with schema.told(Path(TOMBSTONES)):
            found.add_log(read_log(data["log"]))
            for kind, digest, name, shard, slice_id, generation in data["tombstones"]:
                found.add_tombstone(kind, digest, name, [(shard, slice_id)], generation)
        fits = hmac.compare_digest(str(data["hmac"]).encode(), found.tombstones_hmac(key).encode())
    except (*DAMAGED, StateError) as error:
        raise StateError(f"The tombstones are damaged: {type(error).__name__} {error}") from None
    if not fits:
        raise StateError("The tombstones were not written by somebody who has the partition key.")
    return found


def bury_unnamed(state: StateDatabase, log: Log, known: Log) -> bool:
    """Lets tombstones stand for the examples of slices that somebody deleted without a state; returns whether any do.

    `log` has the events to look at, `known` those of them that this index has been held against.
    """
    any_found = False
    for name, event in log.items():
        if event.named or name in known:
            continue
        state.add_log({name: event})
        found = {
            digest: place
            for place in event.places
            for digest in state.examples_of(place)
            if state.tombstone("id", digest) is None
        }
        if found:  # under a name of its own: other indexes have other examples there, and must not lift these
            own = receipt_name()
            state.add_log({own: Event(tuple(sorted({*found.values()})))})
            for digest, place in found.items():
                state.add_tombstone("id", digest, own, [place], state.generation)
            any_found = True
    return any_found


def tombstones_hmac(folder: StoreFolder, state: StateDatabase | None, manifest: Manifest) -> str:
    """What a manifest says of its tombstones: their HMAC, or `NOT_KNOWN` without the key or all of its events."""
    if state is not None and state.knows(manifest) and folder.has_key:
        return state.tombstones_hmac(folder.key)
    return NOT_KNOWN


def put_tombstones(folder: StoreFolder, state: StateDatabase, key: bytes) -> None:
    """Lets tombstones travel with the next commit of a repository."""
    folder.source.put(TOMBSTONES, json_bytes(state.tombstones_json(key)))


def event_of(intent: Mapping[str, Any], named: bool) -> Event:
    """What a manifest tells of a deletion; it is `named` where the state is there."""
    named, digest = named and bool(intent["ids"] or intent["groups"]), intent["receipt"].get("digest")
    places = tuple(sorted((shard, slice_id) for shard, slice_id in intent["places"]))
    return Event(places, named, (digest,) if digest else ())


def obey(state: StateDatabase, intent: Mapping[str, Any]) -> None:
    """Does what an intent asks of a state: tombstones come, and the index loses what they stand for, or they go."""
    name = intent["receipt"]["receipt"]
    if name in state.log():  # it was interrupted, and others may have lifted some of it since
        return
    state.add_log({name: event_of(intent, True)})
    generation = state.generation
    if intent["kind"] == "readmit":
        for digest in intent["ids"]:
            state.lift("id", digest)
        for digest in intent["groups"]:
            state.lift("group", digest)
        return
    for digest, places in sorted(intent["ids"].items()):
        if digest not in intent["renewed"]:
            state.add_tombstone("id", digest, name, _pairs(places), generation)
    for digest, places in sorted(intent["groups"].items()):
        state.add_tombstone("group", digest, name, _pairs(places), generation)
    state.remove_examples(intent["ids"])


def _pairs(places: Any) -> list[Place]:
    return [(shard, slice_id) for shard, slice_id in places]
