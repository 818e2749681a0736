"""Receipts: what a deletion found and did, and what it does not say. Kept in the state."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data_derived import limits_of_data
from ..errors import StateError, StoreError
from ..files import json_bytes, read_json, remove
from ..plain_data import read_as
from .database import StateDatabase
from .deletion_records import RECEIPT_FORMAT, check_fields, check_format
from .evidence import SEALED, copies_of, evidence_digest, new_salt, sealed
from .folder import StoreFolder
from .manifest import DAMAGED, Manifest, read_count
from .receipt_signature import signed
from .recipe_differences import NOT_BIT_EQUAL

logger = logging.getLogger(__name__)

LIMITS = (
    "What the base model saw in pretraining is not covered.",
    "Copies that others made, dataset caches, experiment trackers and backups outside the store are not reached.",
    "A request that was chosen by looking at the model is not covered.",
    "Numbers that user code computed from the whole train set (class weights, statistics) keep what they saw.",
    "Until repair the model misses whole slices; after repair it is what training without the examples gives.",
)

NO_COMMITMENT = "It has no commitment to who was in its slices: the key or the state was not at hand."


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
    """What a deletion found and did. It is kept in the private state. Only its digest is published, in the manifest.

    Args:
        receipt (`str`): its own name.
        kind (`str`): `"delete"`, `"readmit"`, `"loss"` (of deletions that no state knows any more), or `"obeyed"`
            (what this state took over from elsewhere).
        status (`str`): `"dry run"`, `"unchanged"` (all was deleted before), `"accepted"` (a loss), or `"inactive"`: no
            longer served by this store since `inactive_since`. For a repository: `"inactive_at_head"` until a purge,
            and `"no_longer_served"` after a purge whose probes all say so.
        requested_at, inactive_since (`str`): UTC times in ISO 8601. If the status is `"unchanged"`, the time of the
            earlier deletion; `None` if another machine made that deletion.
        asked, found, already_deleted (`int`): numbers of ids, groups, rows or slices in the request.
        examples (`int`): examples of the request that were in the index. `None`: the state is not here.
        dark_examples (`int`): other examples, which nobody asked to delete and which do not answer until the repair.
            `None`: the state is not here.
        repair_stages (`int`, *optional*), repair_slice_passes (`float`, *optional*): what the repair costs: stages,
            and slice passes per epoch.
        requests_left (`float`, *optional*): how many more requests are expected until a shard is dead, if nothing is
            repaired. 0: one is dead. `None`: any number, because a prior says that some slices are never hit.
        deleted_by (`list[str]`): names of earlier deletions, for what was deleted already.
        stages_removed (`dict[str, dict[str, str]]`): sha256 per file of each removed stage.
        served_before, served_after (`dict[str, list[int]]`): served prefix per live shard.
        exports (`list[str]`): exported copies that still carry the influence.
        exports_refreshed (`list[str]`): exported copies that were rewritten from live stages.
        exports_removed (`list[str]`): exported copies whose files were removed, because none of their stages is live.
        repository (`str`, *optional*): the repository that was changed. `None`: a folder.
        still_served_at (`list[str]`): revisions of that repository that serve what was deleted, until a purge.
        caches (`list[str]`): files of the datasets cache, outside the store, that may hold the text.
        stages_after (`dict[str, str]`): sha256 of the weights of each stage that stayed.
        places (`list[list[int]]`): every `[shard, slice]` that the request hits.
        commitments (`dict[str, dict[str, str]]`): for each place an HMAC of its examples `before` and `after`. An
            opening ([`~store.opening.open_receipt`]) explains them. Empty without key or state.
        obeys (`dict[str, list[str]]`): for `"obeyed"`: deletions and readmissions elsewhere, with their digests there.
        joins (`list[str]`): for `"obeyed"`: digests of the ends of the chains that it joins.
        number (`int`), previous (`str`): its place in the chain, from 1, and the digest of the receipt before it.
        salt (`str`), salts (`dict[str, str]`), sealed (`dict[str, str]`): random salts, so that nobody can guess a
            digest, and hashes of the fields that [`S3TStore.expire`] may empty.
        digest (`str`): sha256 of the evidence, see `evidence.py`. Empty in a dry run and in receipts of format 1.
        copies (`str`): hash of the exports that the receipt names.
        signature (`dict[str, str]`, *optional*): `public_key` and `signature` (Ed25519), in hexadecimal.
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
    repair_stages: int | None = None
    repair_slice_passes: float | None = None
    requests_left: float | None = None
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
    stages_after: dict[str, str] = field(default_factory=dict)
    places: list[list[int]] = field(default_factory=list)
    commitments: dict[str, dict[str, str]] = field(default_factory=dict)
    obeys: dict[str, list[str]] = field(default_factory=dict)
    joins: list[str] = field(default_factory=list)
    number: int = 0
    previous: str = ""
    salt: str = ""
    salts: dict[str, str] = field(default_factory=dict)
    sealed: dict[str, str] = field(default_factory=dict)
    digest: str = ""
    copies: str = ""
    signature: dict[str, str] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    limits: tuple[str, ...] = LIMITS
    format: int = RECEIPT_FORMAT

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "limits": list(self.limits)}

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
            return read_as(cls, {"format": 1, **data})
        except DAMAGED as error:
            raise StateError(f"A receipt cannot be read ({error}). Restore the state from a backup.") from None


def linked(folder: StoreFolder, receipt: Receipt, state: StateDatabase | None = None) -> Receipt:
    """A receipt whose evidence is complete: it names the newest one by its digest, also of a deletion that was begun.

    Runs under the write lock; a `state` that is being changed is handed in.
    """
    number, previous = max(_links(folder, state), default=(0, ""))
    salts = {name: new_salt() for name in SEALED}
    receipt = replace(
        receipt, number=number + 1, previous=previous, salt=new_salt(), salts=salts,
        sealed={name: sealed(salts[name], getattr(receipt, name)) for name in SEALED},
    )  # fmt: skip
    return replace(receipt, digest=evidence_digest(receipt.to_json()))


def _links(folder: StoreFolder, state: StateDatabase | None) -> list[tuple[int, str]]:
    """Number and digest of the newest receipts, wherever they are."""
    found = [(receipt.number, receipt.digest) for _, receipt in _readable(folder) if receipt.digest]
    for intent in folder.readable_intents():
        number, digest = intent["receipt"].get("number"), intent["receipt"].get("digest")
        if isinstance(number, int) and isinstance(digest, str) and digest:
            found.append((number, digest))
    try:
        if state is not None:
            found += state.newest_links()
        elif folder.database.exists():
            with folder.reading(lost=True) as state:
                found += state.newest_links()
    except StateError as error:  # it begins a chain of its own, which an import joins
        logger.error("which receipt comes before this one is not known: %s", error)
    return found


def finished(folder: StoreFolder, receipt: Receipt) -> Receipt:
    """A receipt whose outcome is complete: what it says of copies is sealed, and it is signed if a key is named."""
    if not receipt.digest:
        return receipt
    salts = {**receipt.salts, "copies": new_salt()}
    receipt = replace(receipt, salts=salts, copies=sealed(salts["copies"], copies_of(receipt.to_json())))
    return replace(receipt, signature=signed(folder, receipt.to_json()))


def append_receipt(folder: StoreFolder, receipt: Receipt) -> Receipt:
    """Keeps a receipt unless it is there already, which it may be after an interruption.

    Where the state's database cannot be written it is a file of its own beside it: no deletion waits for a record.
    """
    if receipt.format > 1:
        receipt = finished(folder, receipt if receipt.digest else linked(folder, receipt))
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
    for path, receipt in _readable(folder):
        with folder.changing(create=True) as state:
            state.add_receipt(receipt.receipt, receipt.to_json())
        remove(path)


def _readable(folder: StoreFolder) -> Iterator[tuple[Path, Receipt]]:
    """Receipts that are files of their own; one that cannot be read stays, and keeps nobody from deleting."""
    for path in folder.loose_receipts():
        try:
            yield path, Receipt.from_json(read_json(path))
        except StoreError as error:
            logger.error("%s: %s", path, error)


def read_receipts(folder: StoreFolder) -> list[dict[str, Any]]:
    """Every receipt, oldest first."""
    found: list[Any] = []
    if folder.database.exists():
        with folder.reading(lost=True) as state:
            found = state.receipts()
    names = {receipt.get("receipt") for receipt in found}
    loose = [Receipt.from_json(read_json(path)) for path in folder.loose_receipts()]
    found += [receipt.to_json() for receipt in loose if receipt.receipt not in names]
    return [Receipt.from_json(receipt).to_json() for receipt in found]


def one_receipt(receipts: Sequence[Receipt], name: str, where: Any) -> Receipt:
    """The receipt that has a name, or alone begins with it. A `ValueError` if there is none."""
    found = [receipt for receipt in receipts if receipt.receipt == name]
    found = found or [receipt for receipt in receipts if name and receipt.receipt.startswith(name)]
    if len(found) != 1:
        known = ", ".join(receipt.receipt for receipt in (found or receipts)[-5:]) or "none"
        what = "is the beginning of several receipts" if found else "is no receipt"
        raise ValueError(f"{name!r:.80} {what} of {where}. The newest: {known}.")
    return found[0]


def check_receipts(folder: StoreFolder) -> None:
    """Raises [`StateError`] if a newer version of hf_s3t wrote a receipt here. Receipts that are lost pass."""
    newest = [format_of(path) for path in folder.loose_receipts()]
    try:
        if folder.database.exists():
            with folder.reading(lost=True) as state:
                newest.append(state.receipt_format)
    except StateError as error:
        logger.warning("earlier receipts cannot be read: %s", error)
    check_format({"format": max(newest, default=1)}, RECEIPT_FORMAT, f"A receipt in {folder.private}")


def format_of(path: Path) -> int:
    """The format of a receipt that is a file of its own; of one that cannot be read, the first."""
    try:
        return read_count(read_json(path).get("format", 1))
    except (StoreError, *DAMAGED) as error:
        logger.warning("%s cannot be read: %s", path, error)
        return 1


@cache
def versions() -> dict[str, str]:
    """Versions of what computed. Do not change it: it is looked up once."""
    return {name: version(name) for name in ("hf_s3t", "torch", "transformers", "peft", "accelerate")}


def receipt_name() -> str:
    """A name that no other deletion has."""
    return f"receipt-{secrets.token_hex(6)}"
