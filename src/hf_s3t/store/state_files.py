"""The private part of a store as files: who was trained on, what was deleted, what a deletion has begun.

```
.s3t/  partition.key  state.sqlite  names.json  intents/  purge-*.json  receipt-*.json   kept
       .gitignore                                                                    holds `*`
       running/  scratch/  activations/  write.lock  train.lock                          scratch
```

Files that their owner alone may read, in folders that the owner alone may enter. Whoever may not look into them is
told so: not to see the deletions that were begun is not that there are none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import StateError, StoreError
from ..files import (
    MAX_JSON_BYTES,
    NO_FILE,
    PRIVATE,
    denied,
    loose,
    private_folder,
    read_limited,
    tighten,
    write_atomic,
)
from . import schema
from .database import StateDatabase
from .deletion_records import read_intent
from .schema import DATABASE

logger = logging.getLogger(__name__)

INTENTS = "intents"
IGNORED = ".gitignore"
KEY_FILE = "partition.key"
PRIVATE_NAMES = (
    "*.json", "*.sqlite*", "*.key", "*.lock", "*.holder", "*.tmp", INTENTS, f"{INTENTS}/*", "activations",
    "activations/*", "running", "scratch",
)  # fmt: skip
"""What its owner alone may use. Below `running` another library writes; what is in `scratch` is to be published."""
STATE_VARIABLE = "HF_S3T_STATE"


class StateFiles:
    """Files of one state."""

    private: Path  # its folder
    path: Path  # the store that it belongs to, for messages
    knows_state: bool  # whether somebody said where the state is

    def private_folder(self, name: str = "") -> Path:
        """A folder of the state, made if it is not there; its owner alone may enter it, and git commits none of it."""
        for folder in (self.private, self.private / name):
            private_folder(folder)
        ignored = self.private / IGNORED
        if not os.path.lexists(ignored):
            with suppress(OSError):  # a full disk: the file is a help, and a deletion makes room
                write_atomic(ignored, b"*\n", PRIVATE)
        return self.private / name

    def write_private(self, name: str, data: bytes) -> None:
        """Replaces a file of the state, durably; its owner alone may read it."""
        self.private_folder(os.path.dirname(name))
        write_atomic(self.private / name, data, PRIVATE)

    def loose(self) -> list[Path]:
        """What of the state others than its owner may use."""
        return loose(self.private, PRIVATE_NAMES)

    def tighten(self) -> None:
        """Makes the state its owner's alone, which earlier versions did not."""
        for path in self.loose():
            tighten(path)

    def _private_file(self, name: str) -> Path | None:
        """A file of the state, if it is there. A [`StateError`] if the state is another user's."""
        try:
            os.stat(self.private / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError:
            raise denied(self.private) from None
        except OSError as error:  # what is there is no file: whoever reads it says so
            if error.errno not in NO_FILE:
                raise
        return self.private / name

    @property
    def key_file(self) -> Path | None:
        """The file of the partition key, if it lies beside the state."""
        return self._private_file(KEY_FILE)

    @property
    def database(self) -> Path:
        """The state's database."""
        return self.private / DATABASE

    @contextmanager
    def reading(self, lost: bool = False) -> Iterator[StateDatabase]:
        """The state, to look something up.

        With `lost`, also one that was lost and has records alone.

        Raises:
            StateError: there is none, or it cannot be read.
        """
        if self._private_file(DATABASE) is None:
            raise self._no_state()
        with schema.opened(self.database) as connection:
            state = StateDatabase(connection)
            if state.store is None and not lost:
                raise self._no_state()
            yield state

    @contextmanager
    def changing(self, create: bool = False) -> Iterator[StateDatabase]:
        """The state in one transaction, which counts once the block has ended, and not at all if it fails.

        With `create` it is made where there is none, and may be one that was lost. It cannot be nested.
        """
        if create and self._private_file(DATABASE) is None:
            self.private_folder()
            schema.create(self.database)
        with self.reading(lost=create) as state:
            with state.transaction():
                yield state
            disturbed = state.disturbed
        if disturbed:
            schema.write_in_order(self.database)

    @contextmanager
    def changing_if_there(self) -> Iterator[StateDatabase | None]:
        """As [`changing`]; `None` where the state is lost."""
        if not self.has_state:
            yield None
            return
        with self.changing() as state:
            yield state

    @property
    def has_state(self) -> bool:
        """Whether the state is there and can be read: `delete(slices=...)` removes stages all the same."""
        if self._private_file(DATABASE) is None:
            return False
        try:
            with self.reading():
                return True
        except StateError as error:
            logger.warning("going on without the state: %s", error)
            return False

    def _no_state(self) -> StateError:
        older = "" if self._private_file("state.json") is None else " (state.json is of a version before: not read)"
        return StateError(f"{self.path} has no state ({DATABASE}){older}. To find anybody, {self._way_out}")

    @property
    def _way_out(self) -> str:
        lost = "With the state lost, `delete(slices=...)` still works."
        if self.knows_state:
            return f"restore {self.private} from its backup (`hf-s3t state import`). {lost}"
        return f"name the folder of the state: `state=` or {STATE_VARIABLE}. {lost}"

    def loose_receipt(self, name: str) -> Path:
        """The file of a receipt that could not be written into the database; its name begins with `receipt-`."""
        return self.private / f"{name}.json"

    def loose_receipts(self) -> list[Path]:
        """All such files."""
        return sorted(self.private.glob("receipt-*.json"))

    def intents(self) -> list[dict[str, Any]]:
        """Deletions that were begun and not finished, oldest first; their places as a set of `(shard, slice)`.

        Raises:
            StateError: one cannot be read, so that it is not known what is deleted.
        """
        found = (self._intent(name) for name in self._names_of_intents() if name.endswith(".json"))
        return [intent for intent in found if intent is not None]

    def readable_intents(self) -> list[dict[str, Any]]:
        """Those of them that can be read: another one's deletion does not wait for the others."""
        found = []
        for name in self._names_of_intents():
            try:
                found.append(self._intent(name) if name.endswith(".json") else None)
            except StoreError as error:
                logger.error("%s", error)
        return [intent for intent in found if intent is not None]

    def _intent(self, name: str) -> dict[str, Any] | None:
        path = self.private / INTENTS / name
        try:
            return read_intent(read_limited(path, MAX_JSON_BYTES), path)
        except FileNotFoundError:  # it was finished between the listing and the reading
            return None

    def _names_of_intents(self) -> list[str]:
        try:
            return sorted(os.listdir(self.private / INTENTS))
        except FileNotFoundError:
            return []
        except PermissionError:  # not to see them is not that there are none
            raise denied(self.private) from None
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            raise StateError(
                f"{self.private / INTENTS} is no folder ({os.strerror(error.errno)}), so it is not known what is "
                "deleted. Remove it by hand, or restore it from a backup."
            ) from None
