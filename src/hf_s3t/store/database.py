"""The state's database as questions and changes: the index, and what was deleted.

What comes in and goes out are keyed digests in hexadecimal, places and plain data. The tables are `schema.py`'s,
other records `record_tables.py`'s: no other file has a statement of SQL. When something is written, and what else is
written with it, is for `deletion.py` and `training/`.
"""

from __future__ import annotations

import hmac
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

from .manifest import Event, Log, Manifest, log_json, merged
from .partition import Entry, canonical
from .record_tables import RecordTables
from .state import Tombstone

Kind = Literal["id", "group"]
Place = tuple[int, int]
"""`(shard, slice)`: where an example lies."""

PAGE = 10_000
"""So many rows are read at a time: no reader keeps a writer waiting for longer."""
VALUES = 500
"""So many values are asked for in one statement; old builds of SQLite take 999."""
ENTRY = "e.shard, e.slice, p.digest, e.content FROM examples AS e LEFT JOIN people AS p ON p.number = e.person"


class StateDatabase(RecordTables):
    """One connection to a state. What changes it belongs into a transaction, see [`StateFiles.changing`]."""

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
        return bool(self._one("SELECT disturbed FROM about"))

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

    def lies_at(self, digest: str, entry: Entry) -> bool:
        """Whether the index by places has an example where its row says that it lies: no one bit changes both."""
        statement = "SELECT 1 FROM examples INDEXED BY examples_by_slice WHERE shard = ? AND slice = ? AND number = "
        number = "(SELECT number FROM examples WHERE digest = ?)"
        return self._one(statement + number, *entry[:2], bytes.fromhex(digest)) is not None

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
        self._sql.executemany(
            "INSERT INTO examples (digest, shard, slice, person, content) "
            "VALUES (?, ?, ?, (SELECT number FROM people WHERE digest = ?), ?) ON CONFLICT (digest) DO NOTHING",
            (
                (bytes.fromhex(digest), shard, slice_id, group and bytes.fromhex(group), bytes.fromhex(content))
                for digest, (shard, slice_id, group, content) in sorted(entries.items())
            ),
        )

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

    def join(self, theirs: StateDatabase) -> set[Place]:
        """Takes over events and tombstones of another state of the same store; in any order, the same comes out.

        A deletion that one side has in no tombstone was lifted there if that side knows it, and is new to it if not;
        one that is not `named` there was lost there. Returns the places of tombstones that are found again, here or
        there: stages may have been trained without them meanwhile.
        """
        our_log, their_log = self.log(), theirs.log()
        ours = {row[:3] for row in self.tombstones()}
        standing = {row[:3] for row in theirs.tombstones()}
        lost_here, lost_there = _lost(standing - ours, our_log), _lost(ours - standing, their_log)
        again = lost_here | (lost_there - _lost(lost_there, our_log))
        generation = len(merged(our_log, their_log)) + bool(again)
        self.add_log(their_log)
        lifted = [row for row in ours - standing - lost_there if row[2] in their_log]
        self._sql.executemany(
            "DELETE FROM tombstones WHERE kind = ? AND digest = ? AND deletion = ?",
            [(kind, bytes.fromhex(digest), name) for kind, digest, name in lifted],
        )
        if lifted:
            self._sql.execute("UPDATE about SET disturbed = 1")
        kept = {(kind, digest): generation for kind, digest, _, _, _, generation in self.tombstones()}
        for kind, digest, name, shard, slice_id, _ in theirs.tombstones():
            row = (kind, digest, name)
            if row in lost_here or (name not in our_log and row not in ours):
                learned = kept.get((kind, digest), generation)
                self.add_tombstone(kind, digest, name, [(shard, slice_id)], learned)
        return {row[3:5] for row in self.tombstones() if row[:3] in again}

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


def _entry(shard: int, slice_id: int, person: bytes | None, content: bytes) -> Entry:
    return Entry(shard, slice_id, None if person is None else person.hex(), content.hex())


def _lost(tombstones: set[tuple[Kind, str, str]], log: Log) -> set[tuple[Kind, str, str]]:
    """Those tombstones that a log says are lost: it knows their deletions, which are not `named` there."""
    return {row for row in tombstones if row[2] in log and not log[row[2]].named}
