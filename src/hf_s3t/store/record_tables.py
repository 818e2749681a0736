"""Records in the state's database that say what was done: to train a stage, at a deletion, with a copy that left.

[`StateDatabase`] has them beside the index and the tombstones.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..plain_data import plain_json
from .state import stack_line

LAST_RECEIPTS = 64
"""Among so many the newest link of the chain is looked for: a deletion that was interrupted is written later."""


class RecordTables:
    """The part of a state that tells what was done."""

    def __init__(self, connection: sqlite3.Connection):
        self._sql = connection

    def _one(self, statement: str, *values: Any) -> Any:
        row = self._sql.execute(statement, values).fetchone()
        return None if row is None else row[0]

    # ---- what stages were trained on ----

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a stage was trained on and with: generation, examples, data, steps, versions and the like."""
        found = self._one("SELECT record FROM records WHERE stage = ?", stage)
        return None if found is None else _of_stage(found)

    def records(self) -> dict[str, dict[str, Any]]:
        """The record of every stage."""
        rows = self._sql.execute("SELECT stage, record FROM records ORDER BY stage")
        return {stage: _of_stage(record) for stage, record in rows}

    def write_record(self, stage: str, record: Mapping[str, Any]) -> None:
        """Replaces a stage's record."""
        text = json.dumps(record, sort_keys=True)
        self._sql.execute("INSERT OR REPLACE INTO records VALUES (?, ?)", (stage, text))

    def keep_records(self, stages: Collection[str]) -> None:
        """Forgets the records of all other stages."""
        gone = [row for row in self._sql.execute("SELECT stage FROM records").fetchall() if row[0] not in stages]
        self._sql.executemany("DELETE FROM records WHERE stage = ?", gone)

    def steps(self) -> int:
        """Optimizer steps of all stages on record."""
        return int(self._one("SELECT coalesce(sum(json_extract(record, '$.steps')), 0) FROM records"))

    def stacks(self, stages: Collection[str]) -> dict[str, int]:
        """How many of some stages each set of versions trained, as far as it is on record."""
        counted: Counter[str] = Counter()
        for stage, versions in self._sql.execute("SELECT stage, json_extract(record, '$.versions') FROM records"):
            if versions is not None and stage in stages:
                counted[str(versions)] += 1
        return {stack_line(_read(versions)): number for versions, number in counted.items()}

    def caches(self) -> list[str]:
        """Files outside the store that may hold the examples' text."""
        return [path for (path,) in self._sql.execute("SELECT path FROM caches ORDER BY path")]

    def add_caches(self, paths: Iterable[str]) -> None:
        """Names such files."""
        self._sql.executemany("INSERT OR IGNORE INTO caches VALUES (?)", [(path,) for path in paths])

    def backed_up_names(self) -> dict[str, str]:
        """Names that the owner had set, in a backup; none in one of a version that knew none."""
        if self._one("SELECT 1 FROM sqlite_schema WHERE name = 'names'") is None:
            return {}
        return dict(self._sql.execute("SELECT name, value FROM names").fetchall())

    # ---- records that no promise depends on ----

    def mend_records(self, theirs: RecordTables, export_fields: Collection[str]) -> None:
        """Puts a backup's records in the place of those that cannot be read here.

        Where it has none they are forgotten; receipts stay, so that it is seen. An export has the `export_fields`.
        """
        for table, name, text in (("records", "stage", "record"), ("exports", "path", "record"),
                                  ("receipts", "name", "receipt")):  # fmt: skip
            rows = self._sql.execute(f"SELECT {name}, CAST({text} AS BLOB) FROM {table}")
            fields = export_fields if table == "exports" else None
            for key in [key for key, found in rows if not _readable(found, fields)]:
                whole = theirs._one(f"SELECT {text} FROM {table} WHERE {name} = ?", key)
                if whole is not None:
                    self._sql.execute(f"UPDATE {table} SET {text} = ? WHERE {name} = ?", (whole, key))
                elif table != "receipts":
                    self._sql.execute(f"DELETE FROM {table} WHERE {name} = ?", (key,))

    def receipts(self) -> list[dict[str, Any]]:
        """Every receipt, oldest first."""
        return [_read(text) for (text,) in self._sql.execute("SELECT receipt FROM receipts ORDER BY number")]

    def add_receipt(self, name: str, receipt: Mapping[str, Any]) -> None:
        """Keeps a receipt unless one of its name is there, as after an interruption; it names what came before it."""
        if self.receipt(name) is None:
            text = json.dumps(receipt, sort_keys=True)
            last = self._one("SELECT chain FROM receipts ORDER BY number DESC LIMIT 1") or ""
            self._sql.execute(
                "INSERT INTO receipts (name, format, receipt, chain) VALUES (?, ?, ?, ?)",
                (name, receipt.get("format", 1), text, chained(last, text)),
            )

    def rewrite_receipts(self, changed: Mapping[str, Mapping[str, Any]]) -> None:
        """Replaces receipts by what is left of them, and chains all of them anew; no trace of the rest stays."""
        self._sql.execute("UPDATE about SET disturbed = 1")
        last = ""
        for name, text in self._sql.execute("SELECT name, receipt FROM receipts ORDER BY number").fetchall():
            text = json.dumps(changed[name], sort_keys=True) if name in changed else text
            last = chained(last, text)
            self._sql.execute("UPDATE receipts SET receipt = ?, chain = ? WHERE name = ?", (text, last, name))

    def newest_links(self) -> list[tuple[int, str]]:
        """Place in the chain and digest of the receipts that were written last; those of older formats have none."""
        rows = self._sql.execute(
            "SELECT json_extract(receipt, '$.number'), json_extract(receipt, '$.digest') FROM "
            "(SELECT receipt FROM receipts WHERE format > 1 ORDER BY number DESC LIMIT ?) WHERE json_valid(receipt)",
            (LAST_RECEIPTS,),
        )
        return [(number, digest) for number, digest in rows if type(number) is int and isinstance(digest, str)]

    def links(self) -> list[tuple[int, str, list[str]]]:
        """Place in the chain, digest, and digests of those before it, of every receipt that can be read."""
        rows = self._sql.execute(
            "SELECT json_extract(receipt, '$.number'), json_extract(receipt, '$.digest'), "
            "json_extract(receipt, '$.previous'), json_extract(receipt, '$.joins') FROM receipts "
            "WHERE format > 1 AND json_valid(receipt) ORDER BY number"
        )
        return [(number, digest, [previous, *json.loads(joins)]) for number, digest, previous, joins in rows]

    def receipt_digest(self, name: str) -> str | None:
        """The digest of a receipt; empty where it has none or cannot be read, `None` where there is no receipt."""
        statement = "CASE WHEN json_valid(receipt) THEN json_extract(receipt, '$.digest') END"
        found = self._sql.execute(f"SELECT {statement} FROM receipts WHERE name = ?", (name,)).fetchone()
        return None if found is None else found[0] or ""

    def obeyed(self) -> list[dict[str, list[str]]]:
        """What receipts tell of events that were taken over from elsewhere: their digests by name."""
        rows = self._sql.execute(
            "SELECT json_extract(receipt, '$.obeys') FROM receipts WHERE format > 1 AND json_valid(receipt) "
            "AND json_extract(receipt, '$.kind') = 'obeyed'"
        )
        return [json.loads(obeys) for (obeys,) in rows]

    def receipt(self, name: str) -> dict[str, Any] | None:
        """One receipt."""
        text = self._one("SELECT receipt FROM receipts WHERE name = ?", name)
        return None if text is None else _read(text)

    @property
    def receipt_format(self) -> int:
        """The newest format of a receipt here."""
        return int(self._one("SELECT coalesce(max(format), 1) FROM receipts"))

    def broken_receipts(self) -> list[str]:
        """Names of the receipts that do not follow the one before them: changed, removed before, or put in."""
        broken, last = [], ""
        for name, text, chain in self._sql.execute("SELECT name, receipt, chain FROM receipts ORDER BY number"):
            if chain != chained(last, text):
                broken.append(name)
            last = chain
        return broken

    def exports(self) -> dict[str, dict[str, Any]]:
        """What is known of each copy that left the store, by its path."""
        rows = self._sql.execute("SELECT path, record FROM exports ORDER BY path")
        return {path: _json(record) for path, record in rows}

    def write_export(self, path: str, record: Mapping[str, Any]) -> None:
        """Replaces what is known of a copy."""
        self._sql.execute("INSERT OR REPLACE INTO exports VALUES (?, ?)", (path, json.dumps(record, sort_keys=True)))

    def forget_export(self, path: str) -> None:
        """Forgets a copy that is gone."""
        self._sql.execute("DELETE FROM exports WHERE path = ?", (path,))


def chained(last: str, receipt: str) -> str:
    """What a receipt is chained by: sha256 of what the one before it has, and of itself."""
    return hashlib.sha256(f"{last}\n{receipt}".encode()).hexdigest()


def _readable(text: bytes, fields: Collection[str] | None) -> bool:
    try:
        found = plain_json(text)
    except ValueError:
        return False
    return isinstance(found, dict) and (fields is None or found.keys() == {*fields})


def _json(text: str) -> Any:
    try:
        return plain_json(text)
    except ValueError as error:
        raise sqlite3.DatabaseError(f"a record is no JSON: {error}") from None


def _read(text: str) -> dict[str, Any]:
    found = _json(text)
    if not isinstance(found, dict):
        raise sqlite3.DatabaseError(f"a record is {found!r:.80}")
    return found


OF_STAGE = {"generation": int, "examples": int, "data": str, "steps": int, "versions": dict, "files": dict}
"""What is used of a stage's record."""


def _of_stage(text: str) -> dict[str, Any]:
    found = _read(text)
    odd = [name for name, kind in OF_STAGE.items() if name in found and type(found[name]) is not kind]
    absent = [name for name in ("generation", "examples", "data") if name not in found]
    if odd or absent:
        raise sqlite3.DatabaseError(f"what a stage was trained on cannot be read: {', '.join(odd + absent)}")
    return found
