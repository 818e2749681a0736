"""Promise 7 for a database: no byte of what was deleted is left in a free page of it, or in a journal beside it."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from hf_s3t import Plan, S3TStore
from hf_s3t.plan.sequences import cyclic
from hf_s3t.store.partition import Entry, assign
from scanner import find
from stores import KEY, edit_database, index_of, make_store, people, write_state

EXAMPLES, PERSONS = 100_000, 30_000
PLAN = Plan.make(2, 3, cyclic(3, 3), prune=False)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> S3TStore:
    """A store whose index has many examples, of more persons than pages."""
    store = make_store(tmp_path_factory.mktemp("large") / "out", people(4), plan=PLAN, group_column="person")
    draw = random.Random(0)
    persons = [draw.randbytes(16).hex() for _ in range(PERSONS)]
    index = {}
    for number in range(EXAMPLES):
        person = persons[number % PERSONS] if number % 3 else None
        digest = draw.randbytes(16).hex()
        index[digest] = Entry(*assign(KEY, person or digest, 2, 3), person, draw.randbytes(16).hex())
    store.database.unlink()
    write_state(store, PLAN, index, {})
    return store


@pytest.fixture
def store(large: S3TStore, tmp_path: Path) -> S3TStore:
    path = tmp_path / "out"
    for file in ("s3t.json", ".s3t/state.sqlite", ".s3t/partition.key"):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes((large.path / file).read_bytes())
    return S3TStore(path)


def traces(store: S3TStore, digests: set[str]) -> dict[str, int]:
    """How often some digests occur below a store, in any file, at any offset, as bytes."""
    needles = np.array(sorted(bytes.fromhex(digest) for digest in digests), dtype="V16")
    starts = np.unique(needles.view("<u8").reshape(-1, 2)[:, 0])
    found: dict[str, int] = {}
    for file in (path for path in store.path.rglob("*") if path.is_file()):
        data = file.read_bytes() + bytes(8)
        for offset in range(8):
            words = np.frombuffer(data, "<u8", (len(data) - offset) // 8, offset)
            for position in np.flatnonzero(np.isin(words, starts)) * 8 + offset:
                digest = data[position : position + 16].hex()
                if digest in digests:
                    found[digest] = found.get(digest, 0) + 1
    return found


def gone_with(before: dict[str, Entry], store: S3TStore) -> tuple[set[str], set[str]]:
    """Keyed digests of deleted examples, and what nothing keeps of them: contents, and persons that have none left."""
    after = index_of(store)
    gone = before.keys() - after.keys()
    persons = {entry.group for entry in before.values()} - {entry.group for entry in after.values()}
    return gone, {before[digest].content for digest in gone} | (persons - {None})


@pytest.mark.parametrize("number", [1, 10_000])
def test_of_what_was_deleted_no_byte_is_left_but_its_tombstone(store: S3TStore, number: int) -> None:
    before = index_of(store)
    wanted = random.Random(number).sample(sorted(before), number)
    store._delete({"digests": wanted})
    gone, secrets = gone_with(before, store)
    assert gone == set(wanted) and len(secrets) >= number
    assert traces(store, secrets) == {}
    assert traces(store, gone) == dict.fromkeys(gone, 1), "each in its tombstone, and nowhere else"
    kept = next(iter(index_of(store)))
    assert traces(store, {kept}).keys() == {kept}, "what is live is found by this search"


def test_nor_after_one_deletion_after_another_until_little_is_left(store: S3TStore) -> None:
    before, draw = index_of(store), random.Random(5)
    for share in (0.02, 0.3, 0.5, 0.9):
        known = sorted(index_of(store))
        store._delete({"digests": draw.sample(known, int(share * len(known)))})
    store._delete({"slices": [(0, 1)]})
    gone, secrets = gone_with(before, store)
    assert len(gone) > 0.96 * EXAMPLES and traces(store, secrets) == {}


def test_what_came_later_leaves_nothing_either(store: S3TStore) -> None:
    """Rows that are handed in later come between the others, and all of them may go again."""
    draw = random.Random(6)
    later = {d: Entry(*assign(KEY, d, 2, 3), None, draw.randbytes(16).hex()) for d in
             (draw.randbytes(16).hex() for _ in range(20_000))}  # fmt: skip
    with store.changing() as state:
        state.add_examples(later)
    store._delete({"digests": sorted(later)})
    assert traces(store, {entry.content for entry in later.values()}) == {}
    assert traces(store, set(later)) == dict.fromkeys(later, 1), "each in its tombstone, and nowhere else"


def test_a_lifted_tombstone_leaves_nothing(store: S3TStore) -> None:
    wanted = random.Random(7).sample(sorted(index_of(store)), 2_000)
    store._delete({"digests": wanted})
    with store.changing() as state:
        for digest in wanted:
            state.lift("id", digest)
    assert traces(store, set(wanted)) == {}


def test_an_export_of_the_state_holds_what_is_live_and_its_tombstones(store: S3TStore, tmp_path: Path) -> None:
    before = index_of(store)
    store._delete({"digests": sorted(before)[:100]})
    _, secrets = gone_with(before, store)
    (tmp_path / "backup").mkdir()
    store.export_state(tmp_path / "backup/state")
    copy = S3TStore(tmp_path / "backup")
    assert traces(copy, secrets) == {} and len(traces(copy, set(index_of(store)))) == len(before) - 100


# ---- the search itself ----


@pytest.mark.parametrize("where", ["free page", "write-ahead log", "journal"])
def test_a_planted_digest_is_found(tmp_path: Path, where: str) -> None:
    store = make_store(tmp_path / "out", people(30))
    digest = "c0ffee" * 5 + "ab"
    with closing(sqlite3.connect(store.database, isolation_level=None)) as connection:
        connection.execute("PRAGMA secure_delete = OFF")
        if where == "write-ahead log":
            connection.execute("PRAGMA journal_mode = WAL")
        if where == "journal":
            connection.execute("PRAGMA journal_mode = PERSIST")
            connection.execute("INSERT INTO caches VALUES (?)", (digest,))
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("DELETE FROM caches")
        else:
            connection.execute("CREATE TABLE planted (digest BLOB)")
            connection.execute("INSERT INTO planted VALUES (?)", (bytes.fromhex(digest),))
            connection.execute("DROP TABLE planted")
        files = {path for _, path in find(store.path, {"raw": bytes.fromhex(digest), "text": digest.encode()})}
    suffix = {"free page": "", "write-ahead log": "-wal", "journal": "-journal"}[where]
    assert f".s3t/state.sqlite{suffix}" in files


def test_a_write_ahead_log_is_switched_off(tmp_path: Path) -> None:
    store = make_store(tmp_path / "out", people(30))
    edit_database(store, "PRAGMA journal_mode = WAL")
    store.delete(ids=["row-1"])
    with closing(sqlite3.connect(store.database)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert {path.name for path in store.private.iterdir() if "state" in path.name} == {"state.sqlite"}
