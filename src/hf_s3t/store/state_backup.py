"""The backup of a state: one file with key, index, tombstones, receipts and exports, and how two states are joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import StateError
from ..files import json_bytes, read_json
from .deletion import recover
from .export_records import read_exports, records_from_json, records_to_json, write_exports
from .folder import LOCK_SECONDS, StoreFolder, as_key
from .partition import Entry
from .receipts import Receipt, read_receipts
from .state import State, key_check_value, united
from .tombstones import bury


def backup_of(store: StoreFolder) -> dict[str, Any]:
    """What a backup holds."""
    key_file = store.private / "partition.key"
    return {
        "hf_s3t_state": 1,
        "key": key_file.read_text().strip() if key_file.exists() else None,
        "index": {digest: list(entry) for digest, entry in store.index().items()},
        "state": store.state().to_json(),
        "receipts": read_receipts(store),
        "exports": records_to_json(read_exports(store)),
    }


def restore(store: StoreFolder, file: Path) -> None:
    """Joins a backup with the state that is here; see [`S3TStore.import_state`]."""
    bundle = read_json(file)
    parts = {"hf_s3t_state", "key", "index", "state", "receipts", "exports"}
    if not isinstance(bundle, dict) or set(bundle) != parts or bundle["hf_s3t_state"] != 1:
        raise StateError(f"{file} is no state that `export_state` wrote.")
    state = State.from_json(bundle["state"])
    for receipt in bundle["receipts"]:  # of a newer version: refused before anything is changed
        Receipt.from_json(receipt)
    if store.exists and state.key_check not in ("", store.manifest().key_check):
        raise StateError(f"{file} belongs to another store than {store.path}. Nothing was changed.")
    with store.write_lock.hold(LOCK_SECONDS), store.source.drafting():
        if store.exists and bundle["key"] and key_check_value(as_key(bundle["key"])) != store.manifest().key_check:
            raise StateError(f"{file} belongs to another store: its key does not fit {store.path}.")
        here = store.state() if (store.private / "state.json").exists() else state
        if "" not in (here.key_check, state.key_check) and here.key_check != state.key_check:
            raise StateError(f"{file} belongs to another store than the state in {store.private}.")
        joined = united(here, state)
        if bundle["key"]:
            store.write_private("partition.key", bundle["key"].encode() + b"\n")
        _join(store, bundle, here, joined)
        recover(store)
        if store.exists:
            store.write_state(store.state().only(store.manifest().stages))


def _join(store: StoreFolder, bundle: Mapping[str, Any], here: State, state: State) -> None:
    """Puts a backup in place; what was recorded here since then stays known, unless it was deleted there."""
    exports = {**records_from_json(bundle["exports"]), **read_exports(store)}
    index = store.index() if store.has_index else {}
    both = {**{digest: Entry(*entry) for digest, entry in bundle["index"].items()}, **index}
    state = bury(state, state.log, here.log, both)
    store.write_index({d: entry for d, entry in both.items() if not state.buries(d, entry.group)})
    receipts = {receipt["receipt"]: receipt for receipt in [*bundle["receipts"], *read_receipts(store)]}
    lines = [json_bytes(receipt).replace(b"\n", b" ").strip() for receipt in receipts.values()]
    store.write_private("receipts.jsonl", b"\n".join(lines))
    write_exports(store, exports)
    caches = tuple(sorted({*state.caches, *here.caches}))
    store.write_state(replace(state, stages={**state.stages, **here.stages}, caches=caches))
