"""Where the partition key is: beside the state, or elsewhere.

Who has both can confirm a deleted person's name from a list of candidates. Who has the state alone cannot.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ..errors import StateError
from ..files import PRIVATE, remove, sync_folder
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
    if any(file.resolve().is_relative_to(folder.resolve()) for folder in (store.path, store.private)):
        raise ValueError(f"{file} lies inside the store or its state: the key would stay there. Name another file.")
    if os.path.lexists(file):
        raise ValueError(
            f"{file} exists already. Nothing was changed. Name a new file; if an interrupted move left this one, "
            "remove it and run this again."
        )
    if store.key_file is None:
        raise StateError(
            f"There is no {KEY_FILE} in {store.private}: the key is kept elsewhere already ({KEY_VARIABLE}, `key=`), "
            "or it is lost. Nothing was changed."
        )
    text = store.key_file.read_text().strip()
    if key_check_value(as_key(text)) != store.manifest().key_check:
        raise StateError(
            f"{store.key_file} is not the key that {store.path} was trained with. Nothing was changed. Restore the "
            "right key from the backup of the state."
        )
    _write_new(file, text.encode() + b"\n")
    remove(store.private / KEY_FILE)


def _write_new(file: Path, data: bytes) -> None:
    """Writes a file that is not there yet, and waits until the disk has it. If that fails, there is none."""
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE)
    try:
        with open(descriptor, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(descriptor)
        sync_folder(file.parent)
    except OSError:
        file.unlink(missing_ok=True)
        raise
