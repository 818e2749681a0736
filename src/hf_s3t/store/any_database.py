"""Values of any SQLite database, whosever it is, as a search for texts needs them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from .schema import told

SQLITE_HEAD = b"SQLite format 3\0"
CUT = 90
"""Bytes; a value that is shorter stands in one page, whatever the size of the pages."""


def long_values(path: Path) -> Iterator[tuple[str, bytes]]:
    """Values of any database that may be cut in the bytes of its file, each with its table and column.

    The file is taken as it is, without what lies in a write-ahead log. Nothing is written, not even a lock.
    """
    with told(path), closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as connection:
        connection.text_factory = bytes
        named = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        for table in (name.decode() for (name,) in named):
            quoted = '"' + table.replace('"', '""') + '"'
            for about in connection.execute(f"PRAGMA table_info({quoted})").fetchall():
                column = about[1].decode()
                name = '"' + column.replace('"', '""') + '"'
                wanted = f"SELECT {name} FROM {quoted} WHERE length(CAST({name} AS BLOB)) > {CUT}"
                for (value,) in connection.execute(wanted):
                    yield f"{table}.{column}", value if isinstance(value, bytes) else str(value).encode()
