"""Openings: what an auditor is handed to see who was in a slice before a deletion and after it, as keyed digests.

An opening has the key of one receipt's commitments and the keyed digests that they are of, nothing else. That a digest
is a certain id's shows the partition key alone, which stays where it is: ids that are asked for are named with theirs
by whoever makes the opening.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import StateError
from .commitments import commitment, commitment_key, name_of
from .database import Place, StateDatabase
from .deletion_records import DIGEST
from .folder import StoreFolder
from .ids import id_text
from .manifest import DAMAGED
from .partition import keyed_digest
from .public_audit import Findings
from .receipts import Receipt

OPENING_FORMAT = 1


def open_receipt(folder: StoreFolder, receipt: Receipt, ids: Iterable[Any] = ()) -> dict[str, Any]:
    """An opening of a receipt's commitments: private, for an auditor alone.

    Args:
        folder (`StoreFolder`): a store with its state and its key.
        receipt ([`Receipt`]): one that it made.
        ids (`Iterable`): ids to name with their keyed digests, of what the receipt is about.

    Raises:
        StateError: the receipt has no commitments, or later changes make them impossible to reconstruct.
        ValueError: an id was not deleted by it.
    """
    if not receipt.commitments:
        raise StateError(
            f"{receipt.receipt} has no commitments: it removed nothing, is of an earlier version, or was made without "
            "the key or the state. Nothing can be opened."
        )
    key = folder.key
    own, places = commitment_key(key, receipt.receipt), {}
    with folder.reading() as state:
        for shard, slice_id in receipt.places:
            places[name_of((shard, slice_id))] = _reconstructed(state, receipt, (shard, slice_id), own)
    removed = {d for place in places.values() for d in set(place["before"]) - set(place["after"])}
    named = {id_text(value): keyed_digest(key, "id", value) for value in ids}
    foreign = [text for text, digest in named.items() if digest not in removed]
    if foreign:
        raise ValueError(f"{foreign[0]!r:.80} was not deleted by {receipt.receipt}. Name ids that were.")
    return {
        "opening": OPENING_FORMAT, "receipt": receipt.receipt, "digest": receipt.digest, "key": own.hex(),
        "places": places, "ids": named,
    }  # fmt: skip


def _reconstructed(state: StateDatabase, receipt: Receipt, place: Place, key: bytes) -> dict[str, list[str]]:
    """The examples of a place before and after a deletion, from what is there now and what was deleted since."""
    order = {name: number for number, name in enumerate(state.log())}
    mine = order.get(receipt.receipt, -1)
    after, gone = {*state.examples_of(place)}, set()
    for kind, digest, deletion, *at, _ in state.tombstones():
        if kind != "id" or (at[0], at[1]) != place:
            continue
        if deletion == receipt.receipt:
            gone.add(digest)
        elif order[deletion] > mine:
            after.add(digest)
    found = {"before": sorted(after | gone), "after": sorted(after - gone)}
    told = receipt.commitments[name_of(place)]
    if any(commitment(key, place, digests) != told[when] for when, digests in found.items()):
        raise StateError(
            f"{receipt.receipt} can no longer be opened: in slice {name_of(place)} rows were added, renewed or "
            "readmitted since, or deletions were lost, so what was there then is not known any more. A backup of the "
            "state from soon after the deletion opens it."
        )
    return found


def opening_findings(opening: Any, receipt: Mapping[str, Any]) -> Findings:
    """What is not right with an opening of a receipt. It needs neither store nor key."""
    try:
        if opening["opening"] != OPENING_FORMAT or opening["receipt"] != receipt["receipt"]:
            yield f"it is an opening of {opening['receipt']!r:.80}, or of a newer version"
            return
        if opening["digest"] != receipt["digest"]:
            yield "it was made for a receipt of another digest"
        if opening["places"].keys() != receipt["commitments"].keys():
            yield "it opens other slices than the receipt has commitments of"
            return
        if not receipt["commitments"]:
            yield "its receipt has no commitments, so it shows nothing"
        key, removed = bytes.fromhex(opening["key"]), set()
        for name, told in receipt["commitments"].items():
            shard, slice_id = name.split(":")
            for when in ("before", "after"):
                listed = opening["places"][name][when]
                if len({*listed}) != len(listed) or not all(map(DIGEST.fullmatch, listed)):
                    yield f"slice {name}: what it names {when} it are no keyed digests, or it names one twice"
                if commitment(key, (int(shard), int(slice_id)), opening["places"][name][when]) != told[when]:
                    yield f"slice {name}: the examples {when} it are not those that the receipt commits to"
            before, after = ({*opening["places"][name][when]} for when in ("before", "after"))
            removed |= before - after
            if after - before:
                yield f"slice {name}: examples came by the deletion"
        if len(removed) != receipt["examples"]:
            yield f"it shows that {len(removed)} examples went, and the receipt says {receipt['examples']}"
        for text, digest in opening["ids"].items():
            if digest not in removed:
                yield f"{text!r:.80} is not among the examples that went"
    except DAMAGED as error:
        yield f"the opening cannot be read ({type(error).__name__} {error})"
