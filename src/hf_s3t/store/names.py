"""Names that an owner sets once: whose store it is, for the page of a receipt, and which key signs receipts.

They are kept in the private state, in a file of their own, and travel with its backups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import StateError
from ..files import json_bytes, parse_json, read_limited
from .folder import StoreFolder
from .ids import encoded, shortened

FILE = "names.json"
NAMES = ("organisation", "model", "dataset", "signing_key")
"""What can be set. `signing_key` is the path of a file outside the store."""
LONGEST = 1000
MAX_BYTES = 1 << 16


def read_names(folder: StoreFolder) -> dict[str, str]:
    """The names that are set."""
    try:
        data = parse_json(read_limited(folder.private / FILE, MAX_BYTES), folder.private / FILE)
    except FileNotFoundError:
        return {}
    return checked_names(data)


def set_names(folder: StoreFolder, names: Mapping[str, str]) -> dict[str, str]:
    """Sets names, or unsets those that are empty, and returns all. Runs under the write lock.

    Raises:
        ValueError: there is no such name, or a value is too long; nothing was changed.
    """
    for name, value in names.items():
        if name not in NAMES:
            raise ValueError(f"{shortened(repr(name))} cannot be set. These can: {', '.join(NAMES)}.")
        if len(encoded(value, f"`{name}`")) > LONGEST:
            raise ValueError(f"`{name}` may have at most {LONGEST:,} bytes, and has {len(value):,} characters.")
    left = {name: value for name, value in {**read_names(folder), **names}.items() if value}
    folder.write_private(FILE, json_bytes(left))
    return left


def checked_names(data: Any) -> dict[str, str]:
    """What a file of names or a backup holds. A [`StateError`] if it is damaged."""
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise StateError(f"{FILE} of the state is damaged. Remove it, and set the names again (`hf-s3t state set`).")
    return {name: value for name, value in data.items() if name in NAMES}
