"""How long a state keeps what nothing depends on: references, and where copies and caches lay.

A receipt older than a term loses them and stays, as do tombstones, the log and the stages. What goes leaves no trace
in the bytes of the state: its database is written anew.
"""

from __future__ import annotations

import calendar
import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import json_bytes, read_json
from ..hub.purge_report import PurgeReport
from .evidence import COPIES, SEALED
from .export_records import present
from .folder import StoreFolder
from .receipts import read_receipts


@dataclass(frozen=True)
class Expired:
    """What a term ended for.

    Args:
        before (`str`): UTC time; what is older had its term.
        receipts (`tuple[str, ...]`): receipts that lost something; a dry run: that would.
        purge_reports (`tuple[str, ...]`): files of older purge reports. They lose nothing: remove them by hand if
            nobody needs their proof any more. One may name references.
    """

    before: str
    receipts: tuple[str, ...]
    purge_reports: tuple[str, ...]


def expire(store: StoreFolder, older_than: str | datetime.timedelta, dry_run: bool) -> Expired:
    """Ends terms; see [`S3TStore.expire`]. Runs under the write lock, unless it is a dry run."""
    before = begin_of_term(older_than).isoformat(timespec="milliseconds")
    reports = {path: PurgeReport.from_json(read_json(path)) for path in sorted(store.private.glob("purge-*.json"))}
    old = [receipt for receipt in read_receipts(store) if receipt["requested_at"] < before]
    lessened = {receipt["receipt"]: fields for receipt in old if (fields := _lessened(receipt)) != receipt}
    if lessened and not dry_run:
        _write(store, lessened)
    listed = tuple(path.name for path, report in reports.items() if report.ended_at < before)
    return Expired(before, tuple(lessened), listed)


def begin_of_term(older_than: str | datetime.timedelta) -> datetime.datetime:
    """The time before which a term is over. A `ValueError` for what is no term.

    >>> begin_of_term("90d") < begin_of_term("2m") < begin_of_term("1d")
    True
    """
    now = datetime.datetime.now(datetime.UTC)
    try:
        if isinstance(older_than, datetime.timedelta):
            return now - older_than
        number, unit = re.fullmatch(r"(\d{1,5})([ymd])", older_than, re.ASCII).groups()  # type: ignore[union-attr]
        if unit == "d":
            return now - datetime.timedelta(days=int(number))
        year, month = divmod(12 * now.year + now.month - 1 - int(number) * (12 if unit == "y" else 1), 12)
        day = min(now.day, calendar.monthrange(year, month + 1)[1])  # a month ago on the 31st: on its last day
        return now.replace(year=year, month=month + 1, day=day)
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{older_than!r:.80} is no term. Write a number of years, months or days, such as 2y, 18m or 90d."
        ) from None


def _lessened(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of a receipt: with a value its salt goes, and its digest stays what it was."""
    copies = {name: [path for path in receipt[name] if present(Path(path))] for name in COPIES}
    left = {**receipt, **copies, "reference": None, "caches": []}
    same = {"copies"} if all(receipt[name] == left[name] for name in COPIES) else set()
    same |= {name for name in SEALED if left[name] == receipt[name]}
    return {**left, "salts": {name: salt for name, salt in receipt["salts"].items() if name in same}}


def _write(store: StoreFolder, lessened: Mapping[str, Mapping[str, Any]]) -> None:
    loose = {path.stem for path in store.loose_receipts()}
    for name in loose & lessened.keys():
        store.write_private(store.loose_receipt(name).name, json_bytes(lessened[name]))
    if store.database.exists():
        with store.changing(create=True) as state:
            state.rewrite_receipts(lessened)
