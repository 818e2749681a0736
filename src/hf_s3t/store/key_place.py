"""Where the partition key is: beside the state, or elsewhere.

Who has both can confirm a deleted person's name from a list of candidates. Who has the state alone cannot.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from ..errors import StateError
from ..files import PRIVATE, remove, resolved, sync_folder, tighten
from .folder import KEY_VARIABLE, StoreFolder, as_key
from .state import key_check_value
from .state_files import KEY_FILE

KeyPlace = Literal["beside the state", "given", "not here"]


def key_place(store: StoreFolder) -> KeyPlace:
    """Where the key is. One that lies beside the state is named as such, even if it is given, too."""
    if store.key_file is not None:
        return "beside the state"
    return "given" if store.has_key else "not here"


def move_key(store: StoreFolder, file: Path) -> None:
    """Moves the key out of the state; see [`S3TStore.move_key`]. Runs under the locks of the store."""
    if any(resolved(file).is_relative_to(folder.resolve()) for folder in (store.path, store.private)):
        raise ValueError(f"{file} lies inside the store or its state: the key would not leave it. Name another file.")
    if _holds_key(store, file):  # an interrupted move left it, and it may be the only one
        _make_durable(file)
    else:
        _copy_key(store, file)
    remove(store.private / KEY_FILE)


def _copy_key(store: StoreFolder, file: Path) -> None:
    if os.path.lexists(file):
        raise ValueError(f"{file} exists already, and is not this store's key. Nothing was changed. Name a new file.")
    if store.key_file is None:
        raise StateError(
            f"There is no {KEY_FILE} in {store.private}: the key is kept elsewhere already ({KEY_VARIABLE}, `key=`), "
            "or it is lost. Nothing was changed."
        )
    text = store.key_text(store.key_file)
    if key_check_value(as_key(text)) != store.manifest().key_check:
        raise StateError(
            f"{store.key_file} is not the key that {store.path} was trained with. Nothing was changed. Restore the "
            "right key from the backup of the state."
        )
    _write_new(file, text.encode() + b"\n")


def _holds_key(store: StoreFolder, file: Path) -> bool:
    """Whether a file is the store's key, whole."""
    try:
        text = file.read_text() if stat.S_ISREG(file.lstat().st_mode) else ""
        return key_check_value(as_key(text.strip())) == store.manifest().key_check
    except (OSError, ValueError):
        return False


def _make_durable(file: Path) -> None:
    tighten(file)
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
    sync_folder(file.parent)


def _write_new(file: Path, data: bytes) -> None:
    """Writes a file that is not there yet, whole or not at all, and waits until the disk has it."""
    scratch = file.with_name(f".{file.name}.tmp")
    try:
        scratch.unlink(missing_ok=True)  # of a move that was interrupted
        with open(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE), "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(scratch, file)
        sync_folder(file.parent)
    except OSError:
        scratch.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        raise
