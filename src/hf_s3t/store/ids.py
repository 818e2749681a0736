"""How an id or a group is written: one text per value, and other texts that a person may mean by it.

What no file can hold is refused here, before anything is written.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import unicodedata
import uuid
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

MIDNIGHT = " 00:00:00"
SHOWN = 100
"""So many characters of an id are shown to a person."""


def encoded(text: str, what: str) -> bytes:
    """A text in UTF-8. A `ValueError` that says `what` it is if it holds half a character, which no file can hold."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        around = text[max(error.start - 20, 0) : error.start + 20]
        raise ValueError(
            f"{what} holds half a character (a lone surrogate), here: {around!r}. No file can hold it. The text was "
            "read in another encoding than its own. Read it again, as UTF-8 for example, or replace that character."
        ) from None


def shortened(text: str) -> str:
    """What a person is shown of a text.

    >>> shortened("row-17")
    'row-17'
    """
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def id_text(value: Any) -> str:
    """The one text of an id or a group, which a command line can spell.

    A whole number is the same id as an integer, a float, a decimal and a text; dates and times are as Python prints
    them, bytes are hexadecimal, a list of tokens is as JSON writes it. `None`, NaN and texts that no
    file can hold name nobody: a `ValueError`.

    >>> [id_text(value) for value in (4, 4.0, Decimal("4.00"), "4", 1.5, datetime.date(2026, 1, 2), b"id")]
    ['4', '4', '4', '4', '1.5', '2026-01-02', '6964']
    """
    if hasattr(value, "tolist"):  # numpy and torch
        value = value.tolist()
    if isinstance(value, str):
        encoded(value, "An id or a group")
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float | Decimal) and math.isfinite(value):
        if value == int(value):
            return str(int(value))
        return format(value.normalize(), "f") if isinstance(value, Decimal) else repr(value)
    if isinstance(value, int | datetime.date | datetime.time | datetime.timedelta | uuid.UUID):
        return str(value)
    if isinstance(value, list | tuple):
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        encoded(text, "An id or a group")
        return text
    raise ValueError(
        f"{value!r:.80} ({type(value).__name__}) is no id. An id is a text, a number, a date, bytes or a list, not "
        "None or NaN. Make a text of it."
    )


def look_alikes(value: Any) -> list[str]:
    """Other texts that may be meant by an id: other Unicode, spaces, leading zeros, a decimal point, case, midnight.

    Quotes, spaces and case may differ together.

    >>> look_alikes("04")
    ['4']
    >>> "Ada Lovelace" in look_alikes("ada  lovelace ")
    True
    """
    text = id_text(value)
    found = [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC")]
    found += [text.strip(), text.strip("\"'"), text.removesuffix(MIDNIGHT)]
    bare = " ".join(text.strip().strip("\"'").split())
    found += [case(form) for form in (text, bare) for case in (str, str.lower, str.upper, str.title)]
    if re.fullmatch(r"-?\d+(\.\d+)?", text, re.ASCII):
        found.append(id_text(Decimal(text)))
    if re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
        found.append(text + MIDNIGHT)
    return [other for other in dict.fromkeys(found) if other not in ("", text)]


def same_to_the_eye(texts: Iterable[str]) -> list[tuple[str, ...]]:
    """Texts that are one text in another Unicode form, in groups of two and more."""
    forms: dict[str, set[str]] = {}
    for text in texts:
        if not text.isascii():
            forms.setdefault(unicodedata.normalize("NFC", text), set()).add(text)
    return [tuple(sorted(group)) for group in forms.values() if len(group) > 1]
