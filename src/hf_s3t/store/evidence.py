"""The evidence of a receipt: what it says that was known when it was asked for, and what its digest covers.

The rest of a receipt, its outcome, is known only after everything was carried out. Evidence never changes: an
interrupted deletion is carried out with the same one, and what is personal or ends with a term is in it as a hash with
a salt ([`sealed`]), so that the value and the salt can go while every digest stays valid.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..lora.adapter import WEIGHTS_FILE
from ..plan.tree import Stage
from .manifest import DAMAGED, Manifest
from .partition import canonical

EVIDENCE = (
    "format", "receipt", "kind", "requested_at", "asked", "found", "already_deleted", "examples", "dark_examples",
    "deleted_by", "stages_removed", "stages_after", "served_before", "served_after", "repository", "places",
    "commitments", "versions", "limits", "obeys", "joins", "number", "previous", "salt", "sealed",
)  # fmt: skip
"""Fields of a receipt that its digest covers."""
SEALED = ("reference", "caches")
"""Fields of which the evidence has a hash alone."""
SINCE_2 = ("digest", "previous", "number", "salt", "sealed", "commitments", "signature")
"""Fields that receipts of format 1 lack."""
COPIES = ("exports", "exports_refreshed", "exports_removed")
"""Fields that name copies of a model; of these the outcome has a hash."""


def evidence_digest(receipt: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of a receipt's evidence. It has a random salt, so nobody guesses what is in it."""
    return hashlib.sha256(canonical({name: receipt[name] for name in EVIDENCE})).hexdigest()


def sealed(salt: str, value: Any) -> str:
    """sha256 of a salt and a value: tells who has both that they belong together, and others nothing."""
    return hashlib.sha256(f"{salt}\n".encode() + canonical(value)).hexdigest()


def new_salt() -> str:
    """256 random bits, in hexadecimal."""
    return secrets.token_hex(32)


def weights_of(manifest: Manifest) -> dict[str, str]:
    """sha256 of the weights of every stage, by its name."""
    return {stage.name: files[WEIGHTS_FILE] for stage, files in sorted(manifest.stages.items())}


def served_json(served: Mapping[int, Sequence[int]]) -> dict[str, list[int]]:
    """Served prefixes as a receipt has them."""
    return {str(shard): list(prefix) for shard, prefix in sorted(served.items())}


def copies_of(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a receipt that name copies."""
    return {name: receipt[name] for name in COPIES}


def receipt_findings(receipt: Mapping[str, Any]) -> Iterator[str]:
    """What a receipt alone tells that is not right with it: whether it was changed, or shows no deletion."""
    if receipt["format"] < 2:
        if any(receipt[name] for name in SINCE_2):
            yield "it says that it is of an earlier version, which had no digests, and has one: it was changed"
        return
    if evidence_digest(receipt) != receipt["digest"]:
        yield "its digest is not that of what it says: it was changed"
    salts = receipt["salts"]
    for name in SEALED:
        if name in salts and sealed(salts[name], receipt[name]) != receipt["sealed"].get(name):
            yield f"`{name}` is not what the digest was made of: it was changed"
        elif name not in salts and receipt[name]:
            yield f"`{name}` has no salt, so nothing vouches for it: it was put in"
    if "copies" in salts and sealed(salts["copies"], copies_of(receipt)) != receipt["copies"]:
        yield "the exports that it names were changed"
    try:
        yield from _about_stages(receipt)
    except DAMAGED as error:
        yield f"what it says of stages cannot be read ({type(error).__name__} {error})"


def _about_stages(receipt: Mapping[str, Any]) -> Iterator[str]:
    places = {(shard, slice_id) for shard, slice_id in receipt["places"]}
    if receipt["kind"] not in ("delete", "loss"):
        return
    if receipt["status"] == "unchanged":
        if places or receipt["stages_removed"]:
            yield "it says that it changed nothing, and names what it removed"
        return
    if not places:
        yield "it names no slice: nothing was removed"
    if receipt["kind"] == "delete" and not receipt["examples"] and not receipt["stages_removed"]:
        yield "neither an example nor a stage went: nothing was removed"
    missed = [name for name in receipt["stages_removed"] if not Stage.from_name(name).slices & places]
    if missed:
        yield f"it says that it removed {missed[0]}, which saw none of its slices"
    kept = [name for name in receipt["stages_after"] if Stage.from_name(name).slices & places]
    if kept:
        yield f"{kept[0]} saw one of its slices, and was not removed"
    yield from served_findings(receipt["served_after"], places)


def served_findings(served: Mapping[str, Iterable[int]], places: set[tuple[int, int]]) -> Iterator[str]:
    """Served prefixes that have one of some `(shard, slice)`s."""
    for shard, prefix in served.items():
        if {(int(shard), slice_id) for slice_id in prefix} & places:
            yield f"shard {shard} is served with a slice that it is about"
