"""What a deletion puts on record, as another version of hf_s3t may have to read it: intents and receipts.

Both carry a format number; those from before there was one are of format 1. What is optional has a default, so records
of older versions are read. Of a newer format nothing is guessed: an intent that cannot be read says that something is
deleted and not what, so nothing is served or trained until a version reads it that knows it. Other deletions go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import StateError
from ..plain_data import plain_json, read_as
from .manifest import DAMAGED, read_count

INTENT_FORMAT = 1
RECEIPT_FORMAT = 2
"""Since 2 a receipt has a digest and names the one before it."""
REQUIRED = ("kind", "receipt", "places", "generation")
OPTIONAL: dict[str, Any] = {
    "format": 1, "ids": {}, "groups": {}, "repo": None, "refresh_exports": False, "renewed": [], "file": "",
}  # fmt: skip
"""Fields of an intent that need not be there. Its file has the name that it has."""


DIGEST = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Intent:
    """What the file of an intent holds."""

    kind: str
    receipt: dict[str, Any]
    places: list[Any]
    generation: int
    format: int = 1
    ids: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    groups: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    repo: str | None = None
    refresh_exports: bool = False
    renewed: list[str] = field(default_factory=list)
    file: str = ""


def check_format(record: Mapping[str, Any], newest: int, what: str) -> None:
    """Raises [`StateError`] if a record is of a newer format than this version reads, `ValueError` if of none."""
    number = record.get("format", 1)
    if read_count(number) > newest:
        raise StateError(
            f"{what} is of format {number}, and this version of hf_s3t reads up to {newest}: a newer version wrote "
            "it. Upgrade hf_s3t; nothing goes on before."
        )


def check_fields(record: Mapping[str, Any], required: Iterable[str], known: Iterable[str]) -> None:
    """Raises `ValueError` if a record lacks a field, or has one that its format does not know."""
    absent, unknown = sorted({*required} - record.keys()), sorted(record.keys() - {*known})
    if absent or unknown:
        raise ValueError(f"it lacks {absent}" if absent else f"it has unknown fields {unknown}")


def _pairs(places: Any) -> set[tuple[int, int]]:
    return {(read_count(shard), read_count(slice_id)) for shard, slice_id in places}


def read_intent(text: bytes, path: Path) -> dict[str, Any]:
    """What the file of an intent says, with all its fields, its places as a set of `(shard, slice)`.

    Raises:
        StateError: it is of a newer format, or damaged.
    """
    try:
        data = plain_json(text)
        check_format(data, INTENT_FORMAT, f"The begun deletion {path}")
        check_format(data["receipt"], RECEIPT_FORMAT, f"The receipt in the begun deletion {path}")
        read_as(Intent, data)
        if not all(map(DIGEST.fullmatch, (*data.get("ids", ()), *data.get("groups", ()), *data.get("renewed", ())))):
            raise ValueError("it names an example by what is no keyed digest")
        if data["kind"] not in ("delete", "readmit"):
            raise ValueError(f"its kind is {data['kind']!r:.80}")
        return {
            **OPTIONAL, **data, "file": path.name, "generation": read_count(data["generation"]),
            "receipt": {**data["receipt"], "receipt": str(data["receipt"]["receipt"])},
            "places": _pairs(data["places"]),
            **{name: {d: sorted(_pairs(at)) for d, at in data.get(name, {}).items()} for name in ("ids", "groups")},
        }  # fmt: skip
    except DAMAGED as error:
        raise StateError(
            f"{path} is a deletion that was begun, and cannot be read ({type(error).__name__} {error}). It is not "
            "known what is deleted, so nothing is served or trained. Run the request that it was about again, which "
            "works. Then remove this file."
        ) from None
