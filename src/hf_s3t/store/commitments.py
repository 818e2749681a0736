"""What a receipt says of the examples of a slice without telling who they are: a keyed commitment, before and after.

The key belongs to one receipt and follows from the partition key. Whoever is given it, with the keyed digests of the
examples (`opening.py`), can compute the commitments again; nobody else can, and no other receipt is opened by it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Iterable

from ..errors import StateError
from .folder import StoreFolder
from .requests import Request

logger = logging.getLogger(__name__)


def commitment_key(key: bytes, receipt: str) -> bytes:
    """The key of the commitments of one receipt, from the partition key."""
    return hmac.new(key, f"commitment\0{receipt}".encode(), hashlib.sha256).digest()


def commitment(key: bytes, place: tuple[int, int], digests: Iterable[str]) -> str:
    """What commits to the examples of a `(shard, slice)`: an HMAC over their keyed digests, in order."""
    told = "\n".join([f"{place[0]}:{place[1]}", *sorted(digests)])
    return hmac.new(key, told.encode(), hashlib.sha256).hexdigest()


def commitments(folder: StoreFolder, receipt: str, request: Request) -> dict[str, dict[str, str]]:
    """The commitments of a deletion by `"shard:slice"`; none without key and state. It reads each slice hit once."""
    try:
        if not (folder.has_key and folder.has_state):
            return {}
        key = commitment_key(folder.key, receipt)
        found = {}
        with folder.reading() as state:
            for place in sorted(request.places):
                before = state.examples_of(place)
                after = (digest for digest in before if digest not in request.ids)
                found[name_of(place)] = {
                    "before": commitment(key, place, before), "after": commitment(key, place, after),
                }  # fmt: skip
        return found
    except StateError as error:
        logger.error("the receipt will have no commitments: %s", error)
        return {}


def name_of(place: tuple[int, int]) -> str:
    """A `(shard, slice)` as receipts name it."""
    return f"{place[0]}:{place[1]}"
