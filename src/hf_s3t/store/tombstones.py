"""Tombstones of a state: what a deletion adds to them, what others added, and what an index loses by them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import StateError, StoreError
from ..files import json_bytes, read_json
from .folder import MAX_MANIFEST_BYTES, StoreFolder
from .manifest import NOT_KNOWN, Event, Log, Manifest, merged
from .partition import Index
from .receipts import receipt_name
from .sources import TOMBSTONES, RepoSource
from .state import State, Tombstone, united

logger = logging.getLogger(__name__)


def absorb(folder: StoreFolder, there: StoreFolder) -> None:
    """Takes over events and tombstones that the state has not, from a manifest and from what travels beside it.

    Runs under the store's write lock. A [`StateError`] if the state is of another store.
    """
    ours = state_or_none(folder)
    if ours is None or not there.exists:
        return
    manifest, state = there.manifest(), ours
    if ours.key_check not in ("", manifest.key_check):
        raise StateError(f"The state in {folder.private} is of another store than {there.path}. Name its own state.")
    theirs = travelling(there, folder.key) if folder.has_key else None
    if theirs is not None:
        state = united(state, theirs)
    index = folder.index() if folder.has_index else {}
    state = bury(state, merged(manifest.log, state.log), ours.log, index)
    if state != ours:
        folder.write_state(state)
    live = {digest: entry for digest, entry in index.items() if not state.buries(digest, entry.group)}
    if live != index:
        folder.write_index(live)


def travelling(there: StoreFolder, key: bytes) -> State | None:
    """The tombstones that travel in a repository; `None` where none do, or where somebody without the key wrote them.

    They may be of another time than its manifest: old ones say nothing that is not so.
    """
    if not isinstance(there.source, RepoSource) or not there.source.has(TOMBSTONES):
        return None
    path = there.source.file(TOMBSTONES, MAX_MANIFEST_BYTES)  # where it cannot be fetched nothing goes on
    try:
        data = read_json(path, MAX_MANIFEST_BYTES)
        return State.from_tombstones_json(data, key)
    except (StateError, StoreError) as error:  # a deletion must not wait for somebody who repairs that file
        logger.warning("the tombstones in %s are not looked at: %s", there.path, error)
        return None


def bury(state: State, log: Log, known: Log, index: Index) -> State:
    """The state with tombstones for the examples of slices that somebody deleted without a state.

    `log` has the events to look at, `known` those of them that this index has been held against.
    """
    for name, event in log.items():
        if not event.named and name not in known:
            events = merged(state.log, {name: event})
            state = replace(state, log=events, generation=len(events))
            ids = {d: [entry[:2]] for d, entry in index.items() if entry[:2] in event.places and d not in state.ids}
            if ids:  # under a name of its own: other indexes have other examples there, and must not lift these
                places = {place for found in ids.values() for place in found}
                about = {"kind": "delete", "receipt": {"receipt": receipt_name()}, "places": places}
                state = with_tombstones(state, {**about, "ids": ids, "groups": {}})
    return state


def tombstones_hmac(folder: StoreFolder, state: State | None, manifest: Manifest) -> str:
    """What a manifest says of its tombstones: their HMAC, or `NOT_KNOWN` without the key or all of its events."""
    if state is not None and state.knows(manifest) and folder.has_key:
        return state.digest(folder.key)
    return NOT_KNOWN


def put_tombstones(folder: StoreFolder, state: State, key: bytes) -> None:
    """Lets tombstones travel with the next commit of a repository."""
    folder.source.put(TOMBSTONES, json_bytes(state.tombstones_json(key)))


def state_or_none(folder: StoreFolder) -> State | None:
    """The state, where it is not lost: `delete(slices=...)` removes stages all the same."""
    try:
        return folder.state()
    except StateError:
        return None


def event_of(intent: Mapping[str, Any], state: State | None) -> Event:
    """What a manifest tells of a deletion."""
    named = state is not None and bool(intent["ids"] or intent["groups"])
    return Event(tuple(sorted(map(tuple, intent["places"]))), named)


def clear_index(folder: StoreFolder, intent: Mapping[str, Any]) -> None:
    """Takes what a deletion covers out of the index."""
    if intent["kind"] == "delete" and folder.has_index:
        folder.write_index({d: entry for d, entry in folder.index().items() if d not in intent["ids"]})


def with_tombstones(state: State, intent: Mapping[str, Any]) -> State:
    """The state after a deletion or a readmission."""
    name, none = intent["receipt"]["receipt"], Tombstone({}, 0)
    if name in state.log:  # it was interrupted, and others may have lifted some of it since
        return state
    log, ids, groups = {**state.log, name: event_of(intent, state)}, dict(state.ids), dict(state.groups)
    for kind, standing in (("ids", ids), ("groups", groups)):
        for digest, places in intent[kind].items():
            if intent["kind"] == "readmit":
                standing.pop(digest, None)
            else:
                found = tuple((shard, slice_id) for shard, slice_id in places)
                deletions = standing.get(digest, none).deletions
                standing[digest] = Tombstone({**deletions, name: found}, len(log))
    return replace(state, generation=len(log), ids=ids, groups=groups, log=log)
