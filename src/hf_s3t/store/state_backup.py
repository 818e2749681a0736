"""The backup of a state: one file with key, index, tombstones, receipts and exports, and how two states are joined.

It is the state's database, written in order, with one table more: `backup (key)`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import fields
from pathlib import Path

from ..errors import StateError, StoreError
from ..files import utc_now
from . import schema
from .database import StateDatabase
from .deletion import recover
from .deletion_records import check_format
from .export_records import Record
from .folder import LOCK_SECONDS, StoreFolder, as_key
from .manifest import merged
from .names import checked_names, read_names, set_names
from .obeyed import account_for, join_chains
from .receipts import RECEIPT_FORMAT, check_receipts, take_in_loose_receipts
from .schema import DATABASE
from .state import key_check_value
from .state_files import KEY_FILE
from .tombstones import bury_unnamed, join

logger = logging.getLogger(__name__)


def back_up(store: StoreFolder, file: Path) -> None:
    """Writes a backup; see [`S3TStore.export_state`]. Runs under the write lock."""
    with store.reading():  # refused before anything is written
        pass
    key = None if store.key_file is None else store.key_text(store.key_file)
    schema.write_in_order(store.database, file, key=(key,), names=read_names(store))


def restore(store: StoreFolder, file: Path) -> None:
    """Joins a backup with the state that is here; see [`S3TStore.import_state`]."""
    if not file.is_file():
        raise StoreError(f"{file} does not exist. Give a file that `export_state` wrote.")
    with schema.opened(file) as connection:
        theirs = StateDatabase(connection)
        found = theirs.backed_up_key()
        if found is None or theirs.store is None:
            raise StateError(f"{file} is no state that `export_state` wrote.")
        (key,) = found
        check_format({"format": theirs.receipt_format}, RECEIPT_FORMAT, f"A receipt in {file}")
        if store.exists and theirs.store != store.manifest().key_check:
            raise StateError(f"{file} belongs to another store than {store.path}. Nothing was changed.")
        if key and key_check_value(as_key(key)) != theirs.store:
            raise StateError(f"{file} is damaged: its key is not that of its store. Nothing was changed.")
        with store.write_lock.hold(LOCK_SECONDS), store.source.drafting():
            _put_aside(store)
            check_receipts(store)
            with store.changing(create=True) as state:
                if state.store not in (None, theirs.store):
                    raise StateError(f"{file} belongs to another store than the state in {store.private}.")
                state.mend_records(theirs, [field.name for field in fields(Record)])
                known = state.log()
                _join(state, theirs)
                if store.exists:  # in the same step: a backup has records of stages that are gone
                    state.keep_records(store.manifest().names)
                account_for(store, state, known, theirs.log())
                join_chains(store, state)
            take_in_loose_receipts(store)
            if names := theirs.backed_up_names():
                set_names(store, {**checked_names(names), **read_names(store)})
            if key and as_key(key) != store.given_key:  # one that is kept elsewhere stays there
                store.write_private(KEY_FILE, key.encode() + b"\n")
            recover(store)


def _join(state: StateDatabase, theirs: StateDatabase) -> None:
    """Puts a backup in place; what was recorded here since then stays known, unless it was deleted there."""
    known = state.log() if state.store is not None else theirs.log()
    join(state, theirs)
    state.take_in(theirs)
    bury_unnamed(state, merged(theirs.log(), state.log()), known)
    state.remove_buried()


def _put_aside(store: StoreFolder) -> None:
    """Renames a database that cannot be read: a backup takes its place."""
    if not store.database.exists():
        return
    try:
        with store.reading(lost=True) as state:
            state.check_whole()
    except schema.NewerStateError:
        raise
    except StateError as error:
        aside = store.database.with_name(f"damaged-{utc_now().replace(':', '-')}.sqlite")
        for beside in schema.beside_of(store.database):  # it must not be taken for the new one's
            if beside.exists():
                os.replace(beside, beside.with_name(beside.name.replace(DATABASE, aside.name)))
        os.replace(store.database, aside)
        logger.warning("the state here cannot be read and was renamed to %s; remove it by hand: %s", aside, error)
