"""What happens to a store in its life, operation by operation, and what has to hold after each fault.

The stores are real and hold what a training leaves, but no model was trained. Everything lies below one folder:

```
root/  out/       the store: two shards of two slices, somebody deleted, a copy on record
       earlier    a backup of its state from before that deletion;  latest  one from after it
       copy/      an export of the root adapter;  prefix/  one of a prefix
```
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_s3t import Plan, S3TStore, StoreError
from hf_s3t.serving.loading import read_members
from hf_s3t.store import deletion, lost_state, obeyed, receipts, tombstones
from hf_s3t.store.audit import verify
from hf_s3t.store.schema import DATABASE
from seam import Outcome
from stores import KEY, PASSING, Known, make_store, people

ROWS = people(24)
PLAN = Plan.make(2, 2, [(0, 1), (1, 0)], prune=False)
VARYING = ("requested_at", "inactive_since", "still_served_at", "salts", "copies")
"""Fields of receipts: times, names of commits, which have times, and what is drawn when a deletion ends."""
TYPED = ("OSError", "UnfinishedDeletionError", "StateError", "StoreError")
"""What a disk that fails may end in; the class of an `OSError` may be one of its own."""
VICTIM = "row-23"
"""Deleted before anything is struck."""


LONG_AGO = "2020-01-01T00:00:00.000+00:00"
FIXED = {
    **{(module, "receipt_name"): lambda name, number: name for module in (deletion, lost_state, tombstones)},
    (obeyed, "receipt_name"): lambda name, number: f"{name}-obeyed-{number}",
    **{(module, "utc_now"): lambda name, number: LONG_AGO for module in (deletion, lost_state, obeyed)},
    (receipts, "new_salt"): lambda name, number: "5a" * 16,
}
"""What differs from run to run in a deletion's records, and what it is made instead."""
FREE = {(module, attribute): getattr(module, attribute) for module, attribute in FIXED}


def named(name: str) -> None:
    """Deletions get this name from now on, one time and one salt, so that they have the same records in every run."""
    for (module, attribute), make in FIXED.items():
        count = itertools.count()
        setattr(module, attribute, lambda make=make, count=count: make(name, next(count)))


def unnamed() -> None:
    """Takes back what `named` set."""
    for (module, attribute), value in FREE.items():
        setattr(module, attribute, value)


def open_store(root: Path, key: bytes | None = None) -> S3TStore:
    return S3TStore(root / "out", key)


def make_root(root: Path) -> Known:
    """The store that every operation begins with, and what is known of it."""
    store = make_store(root / "out", ROWS, plan=PLAN, group_column="person")
    known = Known.of(store, ROWS)
    store.export_state(root / "earlier")
    store.delete(ids=[VICTIM], reference="DSR-1")
    store.export_state(root / "latest")
    store.export(root / "copy")
    ends = [f"{stage.name}" for stage in store.manifest().served_ends]
    store.export(root / "prefix", ends[0])
    return known


@dataclass(frozen=True)
class Operation:
    """An operation of a store's life.

    Args:
        act (`Callable`): does it, to what lies in `root`.
        ready (`Callable`, *optional*): what comes before it.
        again (`bool`): whether it may be run again once it is done, and changes nothing then.
        loose (`str`): a pattern of what may be left, or be in between, after a fault until it is run again.
        sound (`bool`): whether the store is whole before it.
        untold (`str`): a pattern of what need not be the same once it was run again.
    """

    act: Callable[[Path, Known], Any]
    ready: Callable[[Path, Known], Any] = lambda root, known: None
    again: bool = True
    loose: str = "$^"
    sound: bool = True
    untold: str = "$^"


def _delete(root: Path, known: Known, **how: Any) -> None:
    names = known.at(0, 1)[:2]
    store = open_store(root)
    if store.locate(ids=names)[0].found == "live":
        store.delete(ids=names, reference="DSR-2", **how)


def _readmit(root: Path, known: Known) -> None:
    store = open_store(root)
    if store.locate(ids=[VICTIM])[0].found == "deleted":
        store.readmit(ids=[VICTIM], reference="consent")


def _renew(root: Path, known: Known) -> None:
    digests = sorted(known.index)[:3]
    store = open_store(root)
    with store.reading() as state:
        there = [digest for digest in digests if state.has("id", digest)]
    if there:
        store._delete({"digests": there}, renewed=there[:2])


def _lose_state(root: Path, known: Known) -> None:
    shutil.rmtree(root / "out/.s3t")


def _damage(root: Path, known: Known) -> None:
    (root / "out/.s3t" / DATABASE).write_bytes(b"SQLite format 3\0" + b"x" * 5000)


def _older_state(root: Path, known: Known) -> None:
    _lose_state(root, known)
    S3TStore(root / "out", KEY).private_folder()
    open_store(root).import_state(root / "earlier")


def _lost_deletion(root: Path, known: Known) -> None:
    shutil.copytree(root / "out/.s3t", root / "kept")
    open_store(root).delete(ids=known.at(1, 0)[:1])
    shutil.rmtree(root / "out/.s3t")
    (root / "kept").rename(root / "out/.s3t")


def _older_files(root: Path, known: Known) -> None:
    """The published files of before a deletion beside the state of after it."""
    shutil.copytree(root / "out", root / "kept")
    open_store(root).delete(ids=known.at(1, 0)[:1])
    shutil.rmtree(root / "kept/.s3t")
    (root / "out/.s3t").rename(root / "kept/.s3t")
    shutil.rmtree(root / "out")
    (root / "kept").rename(root / "out")


def _begin(root: Path, known: Known) -> None:
    """A deletion is on record, and nothing else is done."""
    carry_out = deletion.carry_out
    deletion.carry_out = _not_now
    try:
        _delete(root, known)
    except KeyboardInterrupt:
        pass
    finally:
        deletion.carry_out = carry_out


def _not_now(*_: object) -> None:
    raise KeyboardInterrupt


def _write(root: Path, known: Known) -> None:
    with open_store(root).writing():
        pass


def _move_key(root: Path, known: Known) -> None:
    open_store(root).move_key(root / "key")


RECEIPTS = r"out/\.s3t/state\.sqlite: receipts"
STATE = r"out/\.s3t/"
ON_RECORD = r"|out/\.s3t/state\.sqlite: exports"
NEW, OVER = rf"\.new\.hf_s3t/{ON_RECORD}", rf"(copy|prefix)/{ON_RECORD}"
OPERATIONS = {
    "delete": Operation(_delete),
    "delete and refresh exports": Operation(
        lambda root, known: open_store(root).delete(ids=known.at(0, 1)[:2], refresh_exports=True, missing_ok=True),
        loose=f"{OVER}|{RECEIPTS}", untold=RECEIPTS,
    ),
    "delete slices without a state": Operation(
        lambda root, known: S3TStore(root / "out").delete(slices=[(0, 1)]), _lose_state, again=False,
        loose=r"out/\.s3t/\.gitignore",
    ),
    "readmit": Operation(_readmit),
    "renew": Operation(_renew),
    "finish a deletion": Operation(_write, _begin),
    "obey the state": Operation(_write, _older_files),
    "export": Operation(lambda root, known: open_store(root).export(root / "new"), loose=NEW),
    "export over another": Operation(
        lambda root, known: open_store(root).export(root / "copy"),
        lambda root, known: open_store(root).delete(ids=known.at(0, 1)[:1]), loose=OVER,
    ),
    "export state": Operation(
        lambda root, known: open_store(root).export_state(root / "backup"), loose=r"\.backup\.tmp"
    ),
    "export state over another": Operation(
        lambda root, known: open_store(root).export_state(root / "earlier"), loose=r"\.earlier\.tmp"
    ),
    "import state": Operation(
        lambda root, known: open_store(root).import_state(root / "latest"), _older_state, sound=False
    ),
    "import an older state": Operation(lambda root, known: open_store(root).import_state(root / "earlier")),
    "import a lost state": Operation(
        lambda root, known: open_store(root).import_state(root / "latest"), _lose_state, loose=STATE, sound=False
    ),
    "import over a damaged state": Operation(
        lambda root, known: open_store(root).import_state(root / "latest"), _damage, loose=STATE, sound=False
    ),
    "move the key": Operation(_move_key, loose=r"key$|\.key\.tmp$"),
    "expire": Operation(lambda root, known: open_store(root).expire("2y")),
    "accept a loss": Operation(lambda root, known: open_store(root).accept_loss("DSR-3"), _lost_deletion, sound=False),
}  # fmt: skip


# ---- what is looked at ----


def picture(root: Path) -> dict[str, str]:
    """A sha256 of every file below a folder, but the locks'; of a database of what each table holds, without times."""
    found = {}
    for file in sorted(root.rglob("*")):
        name = re.sub(r"damaged-.*\.sqlite", "damaged.sqlite", file.relative_to(root).as_posix())
        if file.is_dir() or file.name in PASSING:
            continue
        data = file.read_bytes()
        tables = None if name.endswith(".tmp") or data[:15] != b"SQLite format 3" else tables_of(file)
        if tables is None:
            found[name] = _digest(data)
        else:
            found |= {f"{name}: {table}": _digest(repr(rows).encode()) for table, rows in tables.items()}
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def tables_of(file: Path) -> dict[str, list[Any]] | None:
    """The rows of every table that has any; `None` if it is damaged."""
    found: dict[str, list[Any]] = {}
    with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(file)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        for table in names:
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            kept = [name for name in columns if name not in ("number", "chain", "disturbed")]
            values = ", ".join(kept).replace("person", "(SELECT digest FROM people AS p WHERE p.number = person)")
            if table == "event_places":
                values = values.replace("event", "(SELECT name FROM events AS e WHERE e.number = event)")
            rows = connection.execute(f"SELECT {values} FROM {table}").fetchall()
            if table == "receipts":
                rows = [json.dumps({k: v for k, v in json.loads(row[-1]).items() if k not in VARYING}) for row in rows]
            if rows:
                found[table] = rows if table == "receipts" else sorted(map(repr, rows))
        return found
    return None


# ---- what has to hold ----


def assert_nothing_deleted_is_served(store: S3TStore) -> None:
    """What every kind of reader is given is whole, and holds nothing of what is on record as deleted."""
    gone = {place for intent in store.intents() for place in intent["places"]}
    gone |= {place for event in store.manifest().log.values() for place in event.places}
    try:
        with store.reading() as state:  # what is not pushed yet the repository serves
            known = {} if store.source.repo_id else state.log()
            gone |= {place for event in known.values() for place in event.places}
    except StoreError:
        pass  # the state is lost or damaged
    live = store.live().stages
    assert not [stage.name for stage in live if stage.slices & gone]
    for stage in live:
        store.assemble(stage.shard, stage.prefix)  # compares every file with the manifest
    assert set(read_members(store)) == {f"shard-{shard:02d}" for shard in store.served()}
    status = store.status()
    assert {name for name in status.served if not name.startswith("shard")} == set()


def check(operation: Operation, root: Path, known: Known, before: dict, after: dict, outcome: Outcome) -> bool:
    """What holds after a fault; returns whether the operation was done once the next writer had run."""
    assert outcome.killed or outcome.kind in ("", *TYPED), outcome
    store = open_store(root)
    assert_nothing_deleted_is_served(store)
    with store.writing():
        pass
    assert_nothing_deleted_is_served(store)
    assert not store.intents() and store.status()
    strict, *expected = (without(f"{operation.loose}|.*-journal$", one) for one in (picture(root), before, after))
    assert strict in expected, difference(strict, *expected)
    done = strict == expected[1]
    if done or operation.sound:
        assert_whole(store)
    if operation.again or not done or expected[0] == expected[1]:
        operation.act(root, known)
        with store.writing():
            pass
        found, expected = (without(operation.untold, one) for one in (picture(root), after))
        assert found == expected, difference(found, expected)
        assert_whole(store)
    return done


def assert_whole(store: S3TStore) -> None:
    if store.has_state and store.has_key:
        with store.reading() as state:
            assert state.records().keys() <= store.manifest().names, "a record of a stage that is gone"
        report = verify(store)
        assert report.ok, [check.broken for check in report.checks if check.broken]


def without(pattern: str, found: dict[str, str]) -> dict[str, str]:
    """A picture less what a pattern matches."""
    return {name: digest for name, digest in found.items() if not re.match(pattern, name)}


def difference(found: dict, *expected: dict) -> list[Any]:
    """What is not as it should be, against each of what it may be."""
    return [sorted({k for k in found.keys() | one.keys() if found.get(k) != one.get(k)}) for one in expected]
