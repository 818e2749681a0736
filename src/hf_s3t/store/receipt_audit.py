"""`verify`: of the receipts. Whether each is what it was, all are there, and what they removed stays removed.

Of a receipt alone (`evidence.py`), of all of them as a chain, and against what the store publishes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..lora.adapter import WEIGHTS_FILE
from .database import StateDatabase
from .evidence import receipt_findings
from .folder import StoreFolder
from .manifest import Manifest
from .obeyed import obeyed_events
from .public_audit import Findings, NotChecked
from .receipt_signature import signature_finding
from .receipts import read_receipts


def check_receipts_of(folder: StoreFolder, manifest: Manifest) -> Findings:
    """Whether receipts, state and manifest tell the same; see [`CHECKS`] of the audit."""
    if not folder.has_state:
        raise NotChecked("The state is not here, and with it the receipts.")
    receipts = read_receipts(folder)
    older = sum(1 for receipt in receipts if receipt["format"] < 2)
    if older:
        yield NotChecked(f"{older} receipts are of an earlier version: not chained by digest")
    for receipt in receipts:
        for finding in receipt_findings(receipt):
            yield f"{receipt['receipt']}: {finding}"
        if receipt["signature"] is not None:
            yield from _signature(receipt)
        yield from _removed(receipt, manifest, folder)
    begun = [intent["receipt"] for intent in folder.intents()]
    yield from chain_findings([*receipts, *begun])
    with folder.reading() as state:
        yield from _events(folder, manifest, state, receipts)


def _signature(receipt: Mapping[str, Any]) -> Findings:
    try:
        wrong = signature_finding(receipt)
    except ValueError as error:  # `cryptography` is not installed
        yield NotChecked(f"{receipt['receipt']}: {error}")
    else:
        if wrong:
            yield f"{receipt['receipt']}: {wrong}"


def chain_findings(receipts: list[dict[str, Any]]) -> Iterator[str]:
    """What is not right with receipts as a chain; those of deletions that were begun are links of it, too."""
    linked = {receipt["digest"]: receipt for receipt in receipts if receipt.get("digest")}
    followed: set[str] = set()
    for receipt in linked.values():
        before = [name for name in (receipt["previous"], *receipt["joins"]) if name]
        followed |= {*before}
        gone = [name for name in before if name not in linked]
        if gone:
            yield f"{receipt['receipt']} follows a receipt that is not here ({gone[0][:12]}...): it was removed"
        elif receipt["number"] != 1 + max((linked[name]["number"] for name in before), default=0):
            yield f"{receipt['receipt']} is number {receipt['number']} of the chain, and does not stand there"
    ends = sorted(receipt["receipt"] for digest, receipt in linked.items() if digest not in followed)
    if len(ends) > 1:
        yield f"the chain of receipts has {len(ends)} ends ({', '.join(ends[:3])}): one was put in or changed"


def _removed(receipt: Mapping[str, Any], manifest: Manifest, folder: StoreFolder) -> Iterator[str]:
    """Removed stages that are there again, as they were."""
    again = still_there(receipt, manifest)
    if not again:
        return
    with folder.reading() as state:
        for name in again:
            record = state.record(name)
            if record is None or record["generation"] < receipt["generation"]:
                yield f"{receipt['receipt']} says that {name} was removed, and it is there, with the same weights"


def still_there(receipt: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """Stages that a receipt says were removed, and that a manifest has with the same weights."""
    live = {stage.name: files[WEIGHTS_FILE] for stage, files in manifest.stages.items()}
    removed = {files.get(WEIGHTS_FILE) for files in receipt["stages_removed"].values()}
    return sorted(name for name, weights in live.items() if weights in removed)


def _events(
    folder: StoreFolder, manifest: Manifest, state: StateDatabase, receipts: list[dict[str, Any]]
) -> Findings:
    own, obeyed = {receipt["receipt"]: receipt for receipt in receipts}, obeyed_events(folder)
    begun = {intent["receipt"]["receipt"] for intent in folder.readable_intents()}
    chained = any(receipt["digest"] for receipt in receipts)
    told = {name for receipt in receipts for name in receipt["obeys"]}
    for name in sorted(told - state.log().keys()):
        yield f"{name} was taken over from elsewhere, and the state does not know it: it was removed, or put in"
    for name in sorted(state.log().keys() - begun):
        published = manifest.log[name].receipts if name in manifest.log else ()
        if name in own:
            digest = own[name]["digest"]
            if published != ((digest,) if digest else ()):
                here = f"{digest[:12]}..." if digest else "of an earlier version, without a digest"
                yield f"{name}: the manifest names {_told(published)}, and the one here is {here}"
        elif name in obeyed:
            if obeyed[name] and published != tuple(obeyed[name]):
                yield f"{name}: the manifest names {_told(published)}, and it was taken over with another one"
        elif chained or published:
            yield f"{name} has no receipt: it was removed"
        else:
            yield NotChecked(f"{name} has no receipt; it was made by an earlier version, or elsewhere")
    for name, event in sorted(manifest.log.items()):
        if len(event.receipts) > 1:
            yield f"{name} has {len(event.receipts)} receipts in the manifest: one of them is forged"


def _told(digests: tuple[str, ...]) -> str:
    return f"the receipt {', '.join(f'{digest[:12]}...' for digest in digests)}" if digests else "no receipt"
