"""The state's database as questions and changes: every statement of SQL that is about its content.

What comes in and goes out are keyed digests in hexadecimal, places and plain data. The tables are `schema.py`'s; when
something is written, and what else is written with it, is for `deletion.py` and `training/`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

from ..errors import StateError
from . import schema
from .manifest import DAMAGED, Event, Log, Manifest, log_json, merged, read_log
from .partition import Entry, canonical
from .state import Tombstone, stack_line

Kind = Literal["id", "group"]
Place = tuple[int, int]
"""`(shard, slice)`: where an example lies."""

PAGE = 10_000
"""So many rows are read at a time: no reader keeps a writer waiting for longer."""
VALUES = 500
"""So many values are asked for in one statement; old builds of SQLite take 999."""
ENTRY = "e.shard, e.slice, p.digest, e.content FROM examples AS e LEFT JOIN people AS p ON p.number = e.person"


class StateDatabase:
    """One connection to a state. What changes it belongs into a transaction, see [`StateFiles.changing`]."""

    def __init__(self, connection: sqlite3.Connection):
        self._sql = connection

    def _one(self, statement: str, *values: Any) -> Any:
        row = self._sql.execute(statement, values).fetchone()
        return None if row is None else row[0]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written in the block counts at its end, durably, or nothing of it does."""
        self._sql.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.commit()
        finally:
            if self._sql.in_transaction:
                self._sql.execute("ROLLBACK")

    def commit(self) -> None:
        """Makes a transaction count."""
        self._sql.execute("COMMIT")

    # ---- whose it is ----

    @property
    def store(self) -> str | None:
        """The key check of the store that it belongs to; `None`: the state is lost, and only records are kept."""
        found: str | None = self._one("SELECT store FROM about")
        return found

    def begin(self, key_check: str, places: Iterable[Place] = ()) -> None:
        """Makes it the state of a store that has some `(shard, slice)`s."""
        self._sql.execute("UPDATE about SET store = ?", (key_check,))
        self._sql.executemany("INSERT OR IGNORE INTO slices (shard, slice) VALUES (?, ?)", list(places))

    @property
    def disturbed(self) -> bool:
        """Whether the file has to be written anew, before traces of what is deleted can be left in it."""
        row = self._sql.execute("SELECT disturbed, in_order FROM about").fetchone()
        return bool(row[0]) or 3 * self.count < 2 * row[1]

    def backed_up_key(self) -> tuple[str | None] | None:
        """The partition key in a backup, where it is not kept elsewhere; `None` if this is no backup."""
        if self._one("SELECT 1 FROM sqlite_schema WHERE name = 'backup'") is None:
            return None
        return (self._one("SELECT key FROM backup"),)

    def check_whole(self) -> None:
        """Raises `sqlite3.DatabaseError` if a page is damaged, or a row refers to nothing."""
        found = self._one("PRAGMA quick_check(1)")
        if found != "ok":
            raise sqlite3.DatabaseError(found)

    # ---- the index ----

    @property
    def count(self) -> int:
        """Number of examples."""
        return int(self._one("SELECT coalesce(sum(examples), 0) FROM slices"))

    def counts(self) -> Counter[Place]:
        """Number of examples of each `(shard, slice)` of the partition."""
        return Counter({(m, n): k for m, n, k in self._sql.execute("SELECT shard, slice, examples FROM slices")})

    def entry(self, digest: str) -> Entry | None:
        """What is known of an example."""
        row = self._sql.execute(f"SELECT {ENTRY} WHERE e.digest = ?", (bytes.fromhex(digest),)).fetchone()
        return None if row is None else _entry(*row)

    def has(self, kind: Kind, digest: str) -> bool:
        """Whether an example, or one of a group, is in the index."""
        table = "examples" if kind == "id" else "people"
        return self._one(f"SELECT 1 FROM {table} WHERE digest = ?", bytes.fromhex(digest)) is not None

    def has_all(self, digests: Iterable[str]) -> bool:
        """Whether all of some examples are in the index."""
        wanted = iter({bytes.fromhex(digest) for digest in digests})
        while some := tuple(islice(wanted, VALUES)):
            marks = ", ".join("?" * len(some))
            if self._one(f"SELECT count(*) FROM examples WHERE digest IN ({marks})", *some) != len(some):
                return False
        return True

    def members(self, group: str) -> dict[str, Entry]:
        """The examples of a group."""
        rows = self._sql.execute(f"SELECT e.digest, {ENTRY} WHERE p.digest = ?", (bytes.fromhex(group),))
        return {digest.hex(): _entry(*entry) for digest, *entry in rows.fetchall()}

    def examples(self) -> Iterator[tuple[str, Entry]]:
        """Every example, in the order of the digests."""
        last = b""
        while True:
            statement = f"SELECT e.digest, {ENTRY} WHERE e.digest > ? ORDER BY e.digest LIMIT ?"
            rows = self._sql.execute(statement, (last, PAGE)).fetchall()
            for digest, *entry in rows:
                yield digest.hex(), _entry(*entry)
            if len(rows) < PAGE:
                return
            last = rows[-1][0]

    def examples_of(self, place: Place) -> list[str]:
        """The examples of a `(shard, slice)`, in the order of their digests."""
        rows = self._sql.execute("SELECT digest FROM examples WHERE shard = ? AND slice = ? ORDER BY digest", place)
        return [digest.hex() for (digest,) in rows.fetchall()]

    def add_examples(self, entries: Mapping[str, Entry]) -> None:
        """Puts examples into the index. What is there already stays as it is."""
        if not entries:
            return
        if self.count:  # else they come in order
            self._sql.execute("UPDATE about SET disturbed = 1")
        groups = sorted({entry.group for entry in entries.values() if entry.group is not None})
        people = [(bytes.fromhex(group),) for group in groups]
        self._sql.executemany("INSERT OR IGNORE INTO people (digest) VALUES (?)", people)
        numbers = {digest.hex(): number for number, digest in self._sql.execute("SELECT number, digest FROM people")}
        self._sql.executemany(
            "INSERT INTO examples (digest, shard, slice, person, content) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (digest) DO NOTHING",
            (
                (bytes.fromhex(digest), shard, slice_id, numbers.get(group), bytes.fromhex(content))
                for digest, (shard, slice_id, group, content) in sorted(entries.items())
            ),
        )
        self._sql.execute("UPDATE about SET in_order = max(in_order, ?)", (self.count,))

    def remove_examples(self, digests: Iterable[str]) -> None:
        """Takes examples out of the index."""
        self._sql.executemany("DELETE FROM examples WHERE digest = ?", ((bytes.fromhex(d),) for d in digests))

    def clear_examples(self) -> None:
        """Empties the index."""
        self._sql.execute("UPDATE about SET disturbed = 1")
        self._sql.execute("DELETE FROM examples")

    def remove_buried(self) -> None:
        """Takes out of the index what a tombstone stands for."""
        self._sql.execute("DELETE FROM examples WHERE digest IN (SELECT digest FROM tombstones WHERE kind = 'id')")
        self._sql.execute(
            "DELETE FROM examples WHERE person IN (SELECT number FROM people JOIN tombstones USING (digest) "
            "WHERE kind = 'group')"
        )

    def buried_in_index(self) -> int:
        """Number of deleted examples that are still in the index."""
        return int(
            self._one(
                "SELECT count(*) FROM examples AS e LEFT JOIN people AS p ON p.number = e.person "
                "WHERE e.digest IN (SELECT digest FROM tombstones WHERE kind = 'id') "
                "OR p.digest IN (SELECT digest FROM tombstones WHERE kind = 'group')"
            )
        )

    # ---- what was deleted ----

    def log(self) -> Log:
        """Every deletion and readmission that the state knows."""
        places: dict[int, list[Place]] = {}
        for event, *place in self._sql.execute("SELECT event, shard, slice FROM event_places"):
            places.setdefault(event, []).append((place[0], place[1]))
        events = self._sql.execute("SELECT number, name, named FROM events ORDER BY number")
        return {name: Event(tuple(places.get(number, ())), bool(named)) for number, name, named in events}

    @property
    def generation(self) -> int:
        """How many events the state knows."""
        return int(self._one("SELECT count(*) FROM events"))

    def knows(self, manifest: Manifest) -> bool:
        """Whether the state has every event that a manifest has obeyed."""
        return manifest.log.keys() <= self.log().keys()

    def add_log(self, log: Log) -> None:
        """Takes over events, as [`merged`] joins them."""
        joined = merged(self.log(), log)
        for name in log:
            event = joined[name]
            self._sql.execute(
                "INSERT INTO events (name, named) VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET named = excluded.named",
                (name, event.named),
            )
            number = self._one("SELECT number FROM events WHERE name = ?", name)
            places = [(number, *place) for place in event.places]
            self._sql.executemany("INSERT OR IGNORE INTO event_places VALUES (?, ?, ?)", places)

    def tombstone(self, kind: Kind, digest: str) -> Tombstone | None:
        """What is known of something that was deleted."""
        deletions: dict[str, list[Place]] = {}
        generation = 0
        for name, shard, slice_id, learned in self._sql.execute(
            "SELECT deletion, shard, slice, generation FROM tombstones WHERE kind = ? AND digest = ?",
            (kind, bytes.fromhex(digest)),
        ):
            deletions.setdefault(name, []).append((shard, slice_id))
            generation = max(generation, learned)
        return Tombstone({n: tuple(at) for n, at in deletions.items()}, generation) if deletions else None

    def buries(self, digest: str, group: str | None) -> bool:
        """Whether a tombstone stands for an example, or for its group."""
        return self._buried("id", digest) or (group is not None and self._buried("group", group))

    def _buried(self, kind: Kind, digest: str) -> bool:
        found = self._one("SELECT 1 FROM tombstones WHERE kind = ? AND digest = ?", kind, bytes.fromhex(digest))
        return found is not None

    def buried(self) -> dict[Kind, set[str]]:
        """Keyed digests of everything that a tombstone stands for."""
        found: dict[Kind, set[str]] = {"id": set(), "group": set()}
        for kind, digest in self._sql.execute("SELECT DISTINCT kind, digest FROM tombstones"):
            found[kind].add(digest.hex())
        return found

    @property
    def deleted(self) -> int:
        """Number of examples that a tombstone of their own stands for."""
        return int(self._one("SELECT count(DISTINCT digest) FROM tombstones WHERE kind = 'id'"))

    def tombstones(self) -> Iterator[tuple[Kind, str, str, int, int, int]]:
        """Every tombstone's kind, digest, deletion, shard, slice and generation, in an order of their own."""
        for kind, digest, *rest in self._sql.execute(
            "SELECT kind, digest, deletion, shard, slice, generation FROM tombstones ORDER BY 1, 2, 3, 4, 5"
        ):
            yield kind, digest.hex(), rest[0], rest[1], rest[2], rest[3]

    def newest_deletions(self) -> dict[Place, int]:
        """The generation of the newest deletion that hit each place."""
        rows = self._sql.execute("SELECT shard, slice, max(generation) FROM tombstones GROUP BY shard, slice")
        return {(shard, slice_id): generation for shard, slice_id, generation in rows}

    def stones_at(self, places: Collection[Place]) -> list[Tombstone]:
        """What was deleted from some places."""
        found = []
        for shard, slice_id in sorted(places):
            rows = self._sql.execute(
                "SELECT DISTINCT kind, digest FROM tombstones WHERE shard = ? AND slice = ?", (shard, slice_id)
            ).fetchall()
            found += [stone for kind, digest in rows if (stone := self.tombstone(kind, digest.hex())) is not None]
        return found

    def add_tombstone(self, kind: Kind, digest: str, deletion: str, places: Iterable[Place], generation: int) -> None:
        """Lets a tombstone stand for what was found at some places."""
        self._sql.executemany(
            "INSERT INTO tombstones VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET generation = excluded.generation",
            [(kind, bytes.fromhex(digest), deletion, shard, slice_id, generation) for shard, slice_id in places],
        )

    def lift(self, kind: Kind, digest: str) -> None:
        """Removes what stands for something."""
        self._sql.execute("UPDATE about SET disturbed = 1")
        self._sql.execute("DELETE FROM tombstones WHERE kind = ? AND digest = ?", (kind, bytes.fromhex(digest)))

    def take_in(self, theirs: StateDatabase) -> None:
        """Takes over the index, the records and the receipts of another state; what is here stays as it is."""
        if theirs.store is not None:
            self.begin(theirs.store, theirs.counts())
        examples = theirs.examples()
        while batch := dict(islice(examples, PAGE)):
            self.add_examples(batch)
        for stage, record in theirs.records().items():
            if self.record(stage) is None:
                self.write_record(stage, record)
        here = self.exports()
        for path, record in theirs.exports().items():
            if path not in here:
                self.write_export(path, record)
        self.add_caches(theirs.caches())
        for receipt in theirs.receipts():
            self.add_receipt(receipt["receipt"], receipt)

    def join(self, theirs: StateDatabase) -> None:
        """Takes over events and tombstones of another state of the same store; in any order, the same comes out.

        A deletion that one side has in no tombstone was lifted there if that side knows it, and is new to it if not.
        """
        our_log, their_log = self.log(), theirs.log()
        generation = len(merged(our_log, their_log))
        self.add_log(their_log)
        ours = {row[:3] for row in self.tombstones()}
        standing = {row[:3] for row in theirs.tombstones()}
        lifted = [row for row in ours - standing if row[2] in their_log]
        self._sql.executemany(
            "DELETE FROM tombstones WHERE kind = ? AND digest = ? AND deletion = ?",
            [(kind, bytes.fromhex(digest), name) for kind, digest, name in lifted],
        )
        if lifted:
            self._sql.execute("UPDATE about SET disturbed = 1")
        kept = {(kind, digest): generation for kind, digest, _, _, _, generation in self.tombstones()}
        for kind, digest, name, shard, slice_id, _ in theirs.tombstones():
            if name not in our_log and (kind, digest, name) not in ours:
                learned = kept.get((kind, digest), generation)
                self.add_tombstone(kind, digest, name, [(shard, slice_id)], learned)

    def tombstones_hmac(self, key: bytes) -> str:
        """HMAC over the events and the tombstones, which the manifest carries."""
        mac = hmac.new(key, b"tombstones\0" + canonical(log_json(self.log())), "sha256")
        for row in self.tombstones():
            mac.update(b"\n" + canonical(row[:5]))
        return mac.hexdigest()

    def tombstones_json(self, key: bytes) -> dict[str, Any]:
        """What may travel in a private repository: events and tombstones, nothing of what is live, and their HMAC."""
        return {
            "format": 2,
            "store": self.store,
            "log": log_json(self.log()),
            "tombstones": [list(row) for row in self.tombstones()],
            "hmac": self.tombstones_hmac(key),
        }

    # ---- what stages were trained on ----

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a stage was trained on and with: generation, examples, data, steps, versions and the like."""
        found = self._one("SELECT record FROM records WHERE stage = ?", stage)
        return None if found is None else dict(_read(found))

    def records(self) -> dict[str, dict[str, Any]]:
        """The record of every stage."""
        rows = self._sql.execute("SELECT stage, record FROM records ORDER BY stage")
        return {stage: _read(record) for stage, record in rows}

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
                counted[versions] += 1
        return {stack_line(_read(versions)): number for versions, number in counted.items()}

    def caches(self) -> list[str]:
        """Files outside the store that may hold the examples' text."""
        return [path for (path,) in self._sql.execute("SELECT path FROM caches ORDER BY path")]

    def add_caches(self, paths: Iterable[str]) -> None:
        """Names such files."""
        self._sql.executemany("INSERT OR IGNORE INTO caches VALUES (?)", [(path,) for path in paths])

    # ---- records that no promise depends on ----

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

    def receipt(self, name: str) -> dict[str, Any] | None:
        """One receipt."""
        text = self._one("SELECT receipt FROM receipts WHERE name = ?", name)
        return None if text is None else dict(_read(text))

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
        return {path: _read(record) for path, record in rows}

    def write_export(self, path: str, record: Mapping[str, Any]) -> None:
        """Replaces what is known of a copy."""
        self._sql.execute("INSERT OR REPLACE INTO exports VALUES (?, ?)", (path, json.dumps(record, sort_keys=True)))

    def forget_export(self, path: str) -> None:
        """Forgets a copy that is gone."""
        self._sql.execute("DELETE FROM exports WHERE path = ?", (path,))


def chained(last: str, receipt: str) -> str:
    """What a receipt is chained by: sha256 of what the one before it has, and of itself."""
    return hashlib.sha256(f"{last}\n{receipt}".encode()).hexdigest()


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise sqlite3.DatabaseError(f"a record is no JSON: {error}") from None


def _entry(shard: int, slice_id: int, person: bytes | None, content: bytes) -> Entry:
    return Entry(shard, slice_id, None if person is None else person.hex(), content.hex())


def from_tombstones_json(data: Any, key: bytes) -> StateDatabase:
    """Reads what travelled, into memory. A [`StateError`] if somebody without the key wrote it."""
    found = StateDatabase(schema.in_memory())
    try:
        if data["format"] != 2:
            raise ValueError(f"format {data['format']!r:.80}")
        found.add_log(read_log(data["log"]))
        for kind, digest, name, shard, slice_id, generation in data["tombstones"]:
            found.add_tombstone(kind, digest, name, [(shard, slice_id)], generation)
        fits = hmac.compare_digest(str(data["hmac"]).encode(), found.tombstones_hmac(key).encode())
    except (*DAMAGED, sqlite3.Error) as error:
        raise StateError(f"The tombstones are damaged: {type(error).__name__} {error}.") from None
    if not fits:
        raise StateError("The tombstones were not written by somebody who has the partition key.")
    return found
