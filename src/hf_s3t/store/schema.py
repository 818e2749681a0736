"""The state's database as a file: its tables, how it is opened, written anew in order, and what is said when it fails.

```
about       whose state it is, and whether it is to be written anew
slices      (shard, slice) -> number of examples                  kept by triggers
people      number, keyed digest of a group                       goes with its last example
examples    number, keyed digests of id and content -> slice, person                           the index
events      number, name of each deletion and readmission that the state knows   it only grows
  event_places   (shard, slice)s that it hit
tombstones  kind, keyed digest, deletion, (shard, slice), generation
records     stage -> what it was trained on and with, as JSON
receipts    number, name, the receipt as JSON, chained
exports     path -> what is known of a copy that left the store, as JSON
caches      files of the datasets cache outside the store that may hold the examples' text
```

A page that is split while rows are inserted out of order keeps copies of rows in its unused part, and SQLite's
`secure_delete` does not overwrite them when the rows go (measured: up to 17 of 30,000 values were found after 10,000
deletions). So examples are filled in by the order of their keyed digests, which splits no page. What disturbs it, rows
that come later or a tombstone that is lifted, has the file written anew.

There is a rollback journal and no write-ahead log: that would have to be emptied at every deletion, when nobody may be
reading, and needs shared memory, which network file systems lack. Keys and intents are files of their own: the key may
be kept elsewhere, and a deletion begins although the database cannot be written.
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import CompatibilityError, StateError, StoreError, StoreLockedError
from ..files import PRIVATE, check_plain, sync_folder

DATABASE = "state.sqlite"
FORMAT = 1
"""Version of the tables; kept in the file's `user_version`."""
APPLICATION = 0x53335421
"""By which a file is known as a state of hf_s3t (SQLite's `application_id`)."""
SECONDS = 60.0
"""How long one process waits while another one writes: as long as a commit takes."""
CACHE_KIB = 131072
OLDEST = (3, 37)
"""Version of SQLite that knows strict tables. Python is built with one, or takes the system's."""

TABLES = """
CREATE TABLE about (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  store TEXT CHECK (length(store) = 32),                        -- key check; NULL: the state is lost, records are kept
  disturbed INTEGER NOT NULL DEFAULT 0 CHECK (disturbed IN (0, 1))
) STRICT;
CREATE TABLE slices (
  shard INTEGER NOT NULL CHECK (shard >= 0),
  slice INTEGER NOT NULL CHECK (slice >= 0),
  examples INTEGER NOT NULL DEFAULT 0 CHECK (examples >= 0),
  PRIMARY KEY (shard, slice)
) STRICT, WITHOUT ROWID;
CREATE TABLE people (
  number INTEGER PRIMARY KEY,
  digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 16)
) STRICT;
CREATE TABLE examples (
  number INTEGER PRIMARY KEY,
  digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 16),
  shard INTEGER NOT NULL,
  slice INTEGER NOT NULL,
  person INTEGER REFERENCES people,
  content BLOB NOT NULL CHECK (length(content) = 16),
  FOREIGN KEY (shard, slice) REFERENCES slices
) STRICT;
CREATE TABLE events (
  number INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  named INTEGER NOT NULL CHECK (named IN (0, 1))
) STRICT;
CREATE TABLE event_places (
  event INTEGER NOT NULL REFERENCES events,
  shard INTEGER NOT NULL CHECK (shard >= 0),
  slice INTEGER NOT NULL CHECK (slice >= 0),
  PRIMARY KEY (event, shard, slice)
) STRICT, WITHOUT ROWID;
CREATE TABLE tombstones (
  kind TEXT NOT NULL CHECK (kind IN ('id', 'group')),
  digest BLOB NOT NULL CHECK (length(digest) = 16),
  deletion TEXT NOT NULL REFERENCES events (name),
  shard INTEGER NOT NULL CHECK (shard >= 0),
  slice INTEGER NOT NULL CHECK (slice >= 0),
  generation INTEGER NOT NULL CHECK (generation >= 0),
  PRIMARY KEY (kind, digest, deletion, shard, slice)
) STRICT, WITHOUT ROWID;
CREATE TABLE records (stage TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE receipts (
  number INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  format INTEGER NOT NULL CHECK (format > 0),
  receipt TEXT NOT NULL,
  chain TEXT NOT NULL CHECK (length(chain) = 64)
) STRICT;
CREATE INDEX receipts_by_format ON receipts (format);
CREATE TABLE exports (path TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE caches (path TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
"""
ORDERED = """
CREATE INDEX examples_by_slice ON examples (shard, slice);
CREATE INDEX examples_by_person ON examples (person) WHERE person IS NOT NULL;
CREATE TRIGGER example_came AFTER INSERT ON examples BEGIN
  UPDATE slices SET examples = examples + 1 WHERE shard = new.shard AND slice = new.slice;
END;
CREATE TRIGGER example_went AFTER DELETE ON examples BEGIN
  UPDATE slices SET examples = examples - 1 WHERE shard = old.shard AND slice = old.slice;
  DELETE FROM people WHERE number = old.person AND NOT EXISTS (SELECT 1 FROM examples WHERE person = old.person);
END;
"""
"""What a table of examples gets once it is filled."""
COPIED = (
    "INSERT INTO about SELECT * FROM old.about",
    "INSERT INTO slices SELECT * FROM old.slices",
    "INSERT INTO people (digest) SELECT digest FROM old.people ORDER BY digest",
    """INSERT INTO examples (digest, shard, slice, person, content)
       SELECT e.digest, e.shard, e.slice, new.number, e.content FROM old.examples AS e
       LEFT JOIN old.people AS was ON was.number = e.person
       LEFT JOIN people AS new ON new.digest = was.digest ORDER BY e.digest""",
    *(
        f"INSERT INTO {table} SELECT * FROM old.{table}"
        for table in ("events", "event_places", "tombstones", "records", "receipts", "exports", "caches")
    ),
    "UPDATE about SET disturbed = 0",
)


OF_BACKUPS = {
    "backup": "CREATE TABLE backup (key TEXT) STRICT",
    "names": "CREATE TABLE names (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
}
"""Tables that a backup has beside."""


class NewerStateError(StateError):
    """A state of another format: it is whole, and this version of hf_s3t cannot read it."""


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a state's database, outside of any transaction.

    Raises:
        StateError: it is no state of this version, damaged, or may not be written.
        StoreLockedError: another process kept writing it.
        OSError: the disk is full, or fails.
    """
    with told(path), closing(_connect(path)) as connection:
        _check_kind(connection, path)
        _check_tables(connection, path)
        connection.row_factory = _checked
        yield connection


def create(path: Path) -> None:
    """Makes an empty database, in one step."""
    with told(path), _written_anew(path) as connection:
        connection.executescript(ORDERED)
        connection.execute("INSERT INTO about (one) VALUES (1)")


def write_in_order(
    path: Path,
    target: Path | None = None,
    key: tuple[str | None] | None = None,
    names: Mapping[str, str] | None = None,
) -> None:
    """Writes a database anew, in one step and without a trace of what was deleted: in its own place, or a copy.

    A copy that is a backup has two tables more: for the partition key, which may be kept elsewhere (`(None,)`), and
    for the `names` that its owner set.
    """
    with told(path), _written_anew(target or path) as connection:
        connection.execute("ATTACH ? AS old", (str(path),))
        connection.execute("BEGIN")
        for statement in COPIED:
            connection.execute(statement)
        connection.execute("COMMIT")
        connection.execute("DETACH old")
        connection.executescript(ORDERED)
        if key is not None:
            for table in OF_BACKUPS.values():
                connection.execute(table)
            connection.execute("INSERT INTO backup VALUES (?)", key)
            connection.executemany("INSERT INTO names VALUES (?, ?)", (names or {}).items())


def in_memory() -> sqlite3.Connection:
    """An empty database that no file holds."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(TABLES + ORDERED)
    connection.execute("INSERT INTO about (one) VALUES (1)")
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    try:
        check_plain(path)
    except StoreError as error:
        raise StateError(str(error)) from None
    except FileNotFoundError:  # SQLite says it better
        pass
    mode = "rw" if os.access(path, os.W_OK) else "ro"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=SECONDS
    )
    for setting in (
        "secure_delete = ON", "synchronous = EXTRA", "temp_store = MEMORY", "foreign_keys = ON",
        "trusted_schema = OFF", "cell_size_check = ON", f"cache_size = -{CACHE_KIB}",
    ):  # fmt: skip
        connection.execute(f"PRAGMA {setting}")
    if mode == "rw":
        connection.execute("PRAGMA journal_mode = DELETE")
    return connection


def _check_kind(connection: sqlite3.Connection, path: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        raise StateError(f"{path} is a database, and no state of hf_s3t. Restore the state from a backup.")
    if version != FORMAT:
        raise NewerStateError(
            f"{path} is of format {version}, and this version of hf_s3t reads format {FORMAT}. Use the version that "
            "wrote it, or a newer one."
        )


def _check_tables(connection: sqlite3.Connection, path: Path) -> None:
    """What a file says of its own tables decides what its values may be, and which statements run by themselves."""
    known = _told_tables()
    found = {name: text for name, text in _tables_of(connection).items() if OF_BACKUPS.get(name) != text}
    if found != known:
        odd = sorted(name for name in known.keys() | found.keys() if known.get(name) != found.get(name))
        raise StateError(
            f"{path} has other tables than a state of format {FORMAT}: {', '.join(odd[:3])!r:.100}. It is damaged, or "
            "somebody changed it. Restore the state from a backup. `delete(slices=...)` works without it."
        )


@cache
def _told_tables() -> dict[str, str]:
    with closing(in_memory()) as connection:
        return _tables_of(connection)


def _tables_of(connection: sqlite3.Connection) -> dict[str, str]:
    """How each table, index and trigger was made, without remarks and line breaks."""
    rows = connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
    return {str(name): " ".join(re.sub("--.*", "", str(text)).split()) for name, text in rows}


KINDS: dict[str, type] = {
    **dict.fromkeys("disturbed shard slice examples number named event generation format".split(), int),
    **dict.fromkeys("store name kind deletion stage record receipt chain path key".split(), str),
    **dict.fromkeys(("digest", "content", "owner"), bytes),
}
"""What a column holds. SQLite looks at it when a value is written, and not when it is read."""
MAY_BE_NULL = ("store", "key", "owner")


def _checked(cursor: sqlite3.Cursor, row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A row as it is, once each of its values is of its column's kind."""
    if tuple(map(type, row)) == _kinds(cursor.description):  # nearly every row, and there may be millions
        return row
    for (name, *_), value in zip(cursor.description, row, strict=True):
        kind = KINDS.get(name)
        if kind is not None and type(value) is not kind and not (value is None and name in MAY_BE_NULL):
            raise sqlite3.DatabaseError(f"{name} is {type(value).__name__}, and has to be {kind.__name__}")
    return row


@cache
def _kinds(description: tuple[tuple[Any, ...], ...]) -> tuple[type | None, ...]:
    return tuple(KINDS.get(name) for name, *_ in description)


@contextmanager
def _written_anew(path: Path) -> Iterator[sqlite3.Connection]:
    """A new database that takes the place of `path` in one step, durably."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.unlink(missing_ok=True)
    try:
        os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE))
        with closing(sqlite3.connect(scratch, isolation_level=None, timeout=SECONDS)) as connection:
            for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = MEMORY"):
                connection.execute(f"PRAGMA {setting}")
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            connection.executescript(TABLES)
            yield connection
        descriptor = os.open(scratch, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        for beside in beside_of(path):  # of the one that is replaced: it must not be taken for the new one's
            beside.unlink(missing_ok=True)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def beside_of(path: Path) -> list[Path]:
    """Files that SQLite may keep beside a database."""
    return [path.with_name(path.name + ending) for ending in ("-journal", "-wal", "-shm")]


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Says of each error of SQLite what is to be done; where it is the disk's, it is an `OSError`."""
    if sqlite3.sqlite_version_info < OLDEST:
        raise CompatibilityError(
            f"This Python has SQLite {sqlite3.sqlite_version}; the state of a store needs {OLDEST[0]}.{OLDEST[1]} or "
            "later. Use a Python that is built with a newer one."
        )
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise StoreLockedError(f"{path} was in use for {SECONDS:g} seconds ({error}). Try again.") from error
        if name == "SQLITE_FULL":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if name.startswith("SQLITE_IOERR"):
            raise OSError(errno.EIO, f"{error} ({name})", str(path)) from error
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")):
            raise StateError(
                f"{path} cannot be opened or written ({error}). Make it and its folder writable for this user; a copy "
                "that shall only be read needs no state (docs/serving.md)."
            ) from error
        raise StateError(
            f"{path} is damaged ({error}). Restore the state from a backup (`hf-s3t state import FILE`). "
            "`delete(slices=...)` works without it."
        ) from error
