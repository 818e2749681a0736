"""Checks of one receipt that was handed over: by itself, with an opening, and against what a store publishes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import MAX_JSON_BYTES, parse_json, read_limited
from ..lora.adapter import WEIGHTS_FILE
from .audit import Check, run_check
from .evidence import receipt_findings
from .folder import StoreFolder
from .manifest import Manifest
from .opening import opening_findings
from .public_audit import Findings, NotChecked
from .receipt_audit import still_there
from .receipt_signature import check_installed, read_public_key, signature_finding
from .receipts import Receipt
from .sources import FolderSource


def read_receipt_file(path: Path) -> Receipt:
    """A receipt from a file: as `hf-s3t receipt show --file` wrote it, or as a verb printed it with `--json`.

    Raises:
        StoreError: it holds no receipt, or several.
        ValueError: there is no such file.
    """
    try:
        data = parse_json(read_limited(path, MAX_JSON_BYTES), path)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist. Give a file that `hf-s3t receipt show --file` wrote.") from None
    except StoreError as error:
        what = str(error).removesuffix(" Restore it from a backup.")
        raise StoreError(f"{what} Give a file that `hf-s3t receipt show --file` wrote, not its page.") from None
    if isinstance(data, list) and len(data) == 1:
        data = data[0]
    for name in ("result", "receipt"):
        if isinstance(data, dict) and isinstance(data.get(name), dict):
            data = data[name]
    if not isinstance(data, dict) or not isinstance(data.get("receipt"), str):
        raise StoreError(f"{path} holds no receipt. Give a file that `hf-s3t receipt show --file` wrote.")
    return Receipt.from_json(data)


def check_receipt(
    receipt: Receipt, folder: StoreFolder | None = None, public_key: str | None = None, opening: Any = None
) -> tuple[Check, ...]:
    """Checks a receipt, without its store unless one is given.

    Args:
        receipt ([`Receipt`]): the one to check.
        folder (`StoreFolder`, *optional*): the store, or its published files alone.
        public_key (`str`, *optional*): PEM file of the key that has to have signed it.
        opening (*optional*): what [`open_receipt`] gave.

    Raises:
        ValueError: the public key cannot be used, or there is no store.
    """
    told, key = receipt.to_json(), None if public_key is None else read_public_key(public_key)
    if folder is not None and not folder.exists:
        raise ValueError(f"{folder.path} holds no store. Give the folder of its published files, or a repository.")
    checks = [
        run_check("it has not changed since it was made", _unchanged(told)),
        run_check("its signature is valid", _signature(told, key)),
    ]
    if opening is not None:
        checks.append(run_check("the opening matches its commitments", opening_findings(opening, told)))
    if folder is not None:
        manifest = folder.manifest()
        checks.append(run_check("the manifest names it", _named(told, manifest)))
        checks.append(run_check("the weights that it removed are gone", _gone(told, folder, manifest)))
    return tuple(checks)


def _unchanged(receipt: Mapping[str, Any]) -> Findings:
    if receipt["status"] == "dry run":
        yield "it is of a dry run: nothing was carried out"
        return
    yield from receipt_findings(receipt)
    if receipt["format"] < 2:
        yield NotChecked("It is of an earlier version: not chained by digest, so a change of it is not seen.")
    elif "copies" not in receipt["salts"]:
        yield NotChecked("Nothing vouches for the exports that it names: a term ended for some, or they were changed.")


def _signature(receipt: Mapping[str, Any], public_key: bytes | None) -> Findings:
    if receipt["signature"] is None and public_key is None:
        raise NotChecked("It is not signed.")
    try:
        check_installed()
    except ValueError as error:
        raise NotChecked(str(error)) from None
    finding = signature_finding(receipt, public_key)
    if finding:
        yield finding
    elif public_key is None:
        yield NotChecked("Only the receipt itself says whose key signed it. Give `public_key=` to check that.")


def _named(receipt: Mapping[str, Any], manifest: Manifest) -> Findings:
    name, digest = receipt["receipt"], receipt["digest"]
    event = manifest.log.get(name)
    unknown = sorted({*receipt["deleted_by"]} - manifest.log.keys())
    if unknown:
        yield f"it says that {unknown[0]:.80} had deleted it before, and the manifest knows no such deletion"
    nameless = receipt["status"] == "unchanged" or receipt["kind"] == "obeyed"
    if event is None and nameless:
        yield NotChecked("It is one that no manifest names: it changed no stage here.")
    elif event is not None and receipt["format"] < 2 and not event.receipts:
        yield NotChecked("It is of an earlier version: the manifest knows the deletion, not what its receipt says.")
    elif event is None:
        yield f"the manifest knows no {name}: it is another store's, an older one, or was never carried out"
    elif event.receipts != (digest,):
        yield f"the manifest names {', '.join(event.receipts) or 'no receipt'} for {name}, and this one is {digest}"


def _gone(receipt: Mapping[str, Any], folder: StoreFolder, manifest: Manifest) -> Findings:
    for name in still_there(receipt, manifest):
        yield f"{name} is in the manifest, with weights that were removed"
    if not isinstance(folder.source, FolderSource):
        yield NotChecked(f"Only the head of {folder.path} was looked at. For its history see the report of a purge.")
        return
    removed = {files[WEIGHTS_FILE] for files in receipt["stages_removed"].values()}
    for path in sorted(folder.path.rglob("*")):
        if path.is_file() and not path.is_relative_to(folder.private) and removed:
            if hashlib.sha256(path.read_bytes()).hexdigest() in removed:
                yield f"{path.relative_to(folder.path)} holds weights that were removed"
