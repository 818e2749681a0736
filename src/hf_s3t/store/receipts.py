"""Receipts: what a deletion found and did, and what it does not say. Kept in the state."""

from __future__ import annotations

import logging
import secrets
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import version
from typing import Any

from ..data_derived import limits_of_data
from ..errors import StateError
from ..files import json_bytes, read_json, remove
from .deletion_records import RECEIPT_FORMAT, check_fields, check_format
from .folder import StoreFolder
from .manifest import DAMAGED, Manifest
from .recipe_differences import NOT_BIT_EQUAL

logger = logging.getLogger(__name__)

LIMITS = (
    "Nothing is said of what the base model saw in pretraining.",
    "Copies that others made, dataset caches, experiment trackers and backups outside the store are not reached.",
    "A request that was chosen by looking at the model is not covered.",
    "Numbers that user code computed from the whole train set (class weights, statistics) keep what they saw.",
    "Until repair the model misses whole slices; only after repair is it what training without the examples gives.",
)


def limits_of(manifest: Manifest) -> tuple[str, ...]:
    """What a receipt of a store does not say, what was computed from data and stays among it.

    Where settings were changed, a repair is of the lower grade of claim.
    """
    *general, repair = LIMITS
    if manifest.accepted:
        names = ", ".join(dict.fromkeys(accepted.setting for accepted in manifest.accepted))
        repair = f"Until repair the model misses whole slices. Settings were changed ({names}). {NOT_BIT_EQUAL}."
    return (*general, *limits_of_data(manifest.recipe), repair)


@dataclass(frozen=True)
class Receipt:
    """What a deletion found and did. Kept in the state, never published.

    Args:
        receipt (`str`): its own name.
        kind (`str`): `"delete"`, `"readmit"`, or `"loss"` (of deletions that no state knows any more).
        status (`str`): `"dry run"`, `"unchanged"` (all was deleted before), `"accepted"` (a loss), or `"inactive"`: no
            longer served by this store since `inactive_since`. Of a repository `"inactive_at_head"` until a purge, and
            `"no_longer_served"` once every probe after it says so.
        requested_at, inactive_since (`str`): UTC times in ISO 8601. What is `"unchanged"` has been inactive since the
            earlier deletion; `None` where that was made elsewhere.
        asked, found, already_deleted (`int`): numbers of ids, groups, rows or slices in the request.
        examples (`int`): examples that the request covers and that were in the index; `None`: the state is not here.
        dark_examples (`int`): other examples whose slices this took out of service until repair; `None` likewise.
        deleted_by (`list[str]`): names of the deletions that were there before, of what was deleted already.
        stages_removed (`dict[str, dict[str, str]]`): sha256 per file of each removed stage.
        served_before, served_after (`dict[str, list[int]]`): served prefix per live shard.
        exports (`list[str]`): exported copies that still carry the influence.
        exports_refreshed (`list[str]`): exported copies that were made anew from what is live.
        exports_removed (`list[str]`): exported copies of which nothing was live, and whose files were removed.
        repository (`str`, *optional*): the repository that it was asked of; `None`: a folder.
        still_served_at (`list[str]`): revisions of that repository that still serve what it is about, until a purge.
        caches (`list[str]`): files of the datasets cache, outside the store, that may hold the text.
    """

    receipt: str
    kind: str
    status: str
    requested_at: str
    generation: int
    asked: int = 0
    found: int = 0
    already_deleted: int = 0
    examples: int | None = 0
    dark_examples: int | None = 0
    deleted_by: list[str] = field(default_factory=list)
    inactive_since: str | None = None
    reference: str | None = None
    stages_removed: dict[str, dict[str, str]] = field(default_factory=dict)
    served_before: dict[str, list[int]] = field(default_factory=dict)
    served_after: dict[str, list[int]] = field(default_factory=dict)
    exports: list[str] = field(default_factory=list)
    exports_refreshed: list[str] = field(default_factory=list)
    exports_removed: list[str] = field(default_factory=list)
    repository: str | None = None
    still_served_at: list[str] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    limits: tuple[str, ...] = LIMITS
    format: int = RECEIPT_FORMAT

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Receipt:
        """Reads a receipt of any version up to this one.

        Raises:
            StateError: it is of a newer one, or damaged.
        """
        try:
            check_format(data, RECEIPT_FORMAT, f"Receipt {data.get('receipt')}")
            required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
            check_fields(data, required, [f.name for f in fields(cls)])
        except DAMAGED as error:
            raise StateError(f"A receipt cannot be read ({error}). Restore the state from a backup.") from None
        return cls(**data)


def append_receipt(folder: StoreFolder, receipt: Receipt) -> Receipt:
    """Keeps a receipt unless it is there already, which it may be after an interruption.

    Where the state's database cannot be written it is a file of its own beside it: no deletion waits for a record.
    """
    try:
        with folder.changing(create=True) as state:
            state.add_receipt(receipt.receipt, receipt.to_json())
        take_in_loose_receipts(folder)
    except StateError as error:
        logger.error("receipt %s is kept as a file beside the state: %s", receipt.receipt, error)
        folder.write_private(folder.loose_receipt(receipt.receipt).name, json_bytes(receipt.to_json()))
    return receipt


def take_in_loose_receipts(folder: StoreFolder) -> None:
    """Puts receipts that are files of their own where the others are."""
    for path in folder.loose_receipts():
        receipt = read_json(path)
        with folder.changing(create=True) as state:
            state.add_receipt(receipt["receipt"], receipt)
        remove(path)


def read_receipts(folder: StoreFolder) -> list[dict[str, Any]]:
    """Every receipt, oldest first."""
    found: list[Any] = []
    if folder.database.exists():
        with folder.reading(lost=True) as state:
            found = state.receipts()
    names = {receipt["receipt"] for receipt in found}
    found += [r for path in folder.loose_receipts() if (r := read_json(path)).get("receipt") not in names]
    return [Receipt.from_json(receipt).to_json() for receipt in found]


def check_receipts(folder: StoreFolder) -> None:
    """Raises [`StateError`] if a newer version of hf_s3t wrote a receipt here. Receipts that are lost pass."""
    newest = [read_json(path).get("format", 1) for path in folder.loose_receipts()]
    try:
        if folder.database.exists():
            with folder.reading(lost=True) as state:
                newest.append(state.receipt_format)
    except StateError as error:
        logger.warning("earlier receipts cannot be read: %s", error)
    check_format({"format": max(newest, default=1)}, RECEIPT_FORMAT, f"A receipt in {folder.private}")


@cache
def versions() -> dict[str, str]:
    """Versions of what computed. Do not change it: it is looked up once."""
    return {name: version(name) for name in ("hf_s3t", "torch", "transformers", "peft", "accelerate")}


def receipt_name() -> str:
    """A name that no other deletion has."""
    return f"receipt-{secrets.token_hex(6)}"
