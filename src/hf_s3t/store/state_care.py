"""What an owner does with the private state of a store: back it up, keep its key elsewhere.

[`S3TStore`] adds what an eraser does.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import resolved
from . import deletion
from .folder import LOCK_SECONDS, StoreFolder
from .key_place import move_key
from .lost_state import Loss, accept_loss
from .names import set_names
from .opening import open_receipt
from .receipt_signature import check_key
from .receipts import Receipt, one_receipt, read_receipts
from .requests import check_lists, check_reference
from .retention import Expired, expire
from .state_backup import back_up, restore


class StateCare(StoreFolder):
    """A store whose state is looked after."""

    @contextmanager
    def writing(
        self, timeout: float = LOCK_SECONDS, others: bool = True
    ) -> Iterator[list[tuple[dict[str, Any], Receipt]]]:
        """Holds the store's write lock, after finishing what an interrupted writer left; see [`recover`]."""
        with self.write_lock.hold(timeout), self.source.drafting():
            yield deletion.recover(self, others)

    def receipts(self) -> list[Receipt]:
        """Every receipt that the state has, oldest first."""
        return [Receipt.from_json(receipt) for receipt in read_receipts(self)]

    def receipt(self, name: str) -> Receipt:
        """One receipt, by its name or the beginning of it.

        Raises:
            ValueError: there is none, or several begin so.
        """
        return one_receipt(self.receipts(), name, self.path)

    def open_receipt(self, name: str, ids: Iterable[Any] = ()) -> dict[str, Any]:
        """What an auditor needs to see which examples a deletion removed; see [`~store.opening.open_receipt`]."""
        check_lists(ids=ids)
        return open_receipt(self, self.receipt(name), ids)

    def set_names(self, **names: str) -> dict[str, str]:
        """Sets `organisation`, `model`, `dataset` and `signing_key` of the store's receipts; an empty text unsets one.

        Raises:
            ValueError: there is no such name, a value is too long, or the key cannot sign; nothing was changed.
        """
        if names.get("signing_key"):
            check_key(names["signing_key"])
        with self.writing():
            return set_names(self, names)

    def export_state(self, file: str | os.PathLike[str]) -> None:
        """Writes key and database into one private file (mode 600), itself a database: the backup of `.s3t/`."""
        path = Path(file)
        if resolved(path).is_relative_to(self.path.resolve()):
            raise StoreError(f"{path} lies inside the store: the key would be published, or lost with it.")
        with self.writing():
            back_up(self, path)

    def import_state(self, file: str | os.PathLike[str]) -> None:
        """Merges a backup into the state that is here, and deletes what its tombstones name. Forgets no deletion.

        Raises:
            StateError: the backup is of another store.
        """
        restore(self, Path(file))

    def move_key(self, file: str | os.PathLike[str]) -> None:
        """Moves the partition key out of the state into a new private file. Neither alone can find a person.

        From then on give the key by `HF_S3T_KEY`, `key=` or `--key-file`. Older backups hold both. The same call
        finishes a move that was interrupted.

        Raises:
            ValueError: the file exists and is not this store's key, or lies in the store; nothing was changed.
            StoreLockedError: a training is running, which needs the key.
        """
        with self.writing(), self.train_lock.hold(0):
            move_key(self, Path(file))

    def expire(self, older_than: str | datetime.timedelta, *, dry_run: bool = False) -> Expired:
        """Removes references, caches and paths of vanished copies from old receipts. No check depends on these.

        Receipts themselves, tombstones, the log and the stages stay. Older backups still hold what is removed.

        Args:
            older_than (`str` or `timedelta`): the term: `"2y"`, `"18m"` or `"90d"`.
            dry_run (`bool`): tell which receipts would change, and change nothing.

        Returns:
            [`~store.retention.Expired`]: how many receipts, by name, and which purge reports are as old.
        """
        with nullcontext() if dry_run else self.writing():
            return expire(self, older_than, dry_run)

    def accept_loss(self, reference: str | None = None, *, dry_run: bool = False) -> Loss:
        """Accepts that deletions are lost, because the state that knew them is lost. Import the last backup first.

        The slices of these deletions start anew: their stages are removed, and their examples leave the index. The
        store cannot tell any more who was deleted, so do not hand in the rows of these people again. In a repository
        the head loses these stages, in one commit. The history keeps them until a purge.

        Args:
            reference (`str`, *optional*): your name for it; it stays in the private receipt.
            dry_run (`bool`): name what is lost, and change nothing.

        Returns:
            [`~store.lost_state.Loss`]: what is lost. If nothing is lost, nothing was changed.

        Raises:
            StateError: there is no state, or no key: import a backup first.
        """
        check_reference(reference)
        self.source.look()
        with nullcontext() if dry_run else self.writing():
            return accept_loss(self, reference, dry_run)
