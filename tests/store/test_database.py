"""The state's database: what it knows, how two of them are joined, and what is said of one that cannot be used."""

from __future__ import annotations

import itertools
import json
import random
import sqlite3
from contextlib import closing, contextmanager

import pytest

from hf_s3t import StateError, StoreLockedError
from hf_s3t.errors import CompatibilityError
from hf_s3t.files import json_bytes
from hf_s3t.store import schema
from hf_s3t.store.audit import verify
from hf_s3t.store.database import StateDatabase
from hf_s3t.store.partition import Entry
from hf_s3t.store.tombstones import from_tombstones_json, obey
from stores import edit_database, index_of, make_store, people, state_of, tree

KEY = b"k" * 16
A, B, C = (letter * 32 for letter in "abc")


def in_memory() -> StateDatabase:
    state = StateDatabase(schema.in_memory())
    state.begin(A, itertools.product(range(2), range(3)))
    return state


def act(state: StateDatabase, kind: str, name: str, places=(), ids=None, groups=None) -> None:
    """A deletion or a readmission of some digests."""
    intent = {"kind": kind, "receipt": {"receipt": name}, "places": places, "ids": ids or {}, "groups": groups or {}}
    obey(state, {"renewed": [], **intent})


def buried() -> StateDatabase:
    state = in_memory()
    act(state, "delete", "receipt-1", [(0, 1)], {A: [(0, 1)]}, {B: [(0, 1)]})
    act(state, "delete", "receipt-2", [(1, 0)], {A: [(1, 0)]})
    return state


def test_tombstones_stand_for_ids_and_for_groups():
    state = buried()
    assert state.buried() == {"id": {A}, "group": {B}} and state.tombstone("group", A) is None
    stone = state.tombstone("id", A)
    assert stone.deletions == {"receipt-1": ((0, 1),), "receipt-2": ((1, 0),)} and stone.generation == 2
    assert state.newest_deletions() == {(0, 1): 1, (1, 0): 2} and state.deleted == 1


def test_the_hmac_tells_tombstones_apart_and_needs_the_key():
    ids, groups = in_memory(), in_memory()  # an id is no group, also when the digests are the same
    act(ids, "delete", "x", [(0, 0)], {A: [(0, 0)]})
    act(groups, "delete", "x", [(0, 0)], groups={A: [(0, 0)]})
    macs = [state.tombstones_hmac(KEY) for state in (buried(), in_memory(), ids, groups)]
    assert len({*macs, buried().tombstones_hmac(b"o" * 16)}) == 5 and buried().tombstones_hmac(KEY) == macs[0]


def test_a_deletion_that_is_known_is_not_carried_out_again():
    state = in_memory()
    act(state, "delete", "receipt-1", [(0, 1)], {A: [(0, 1)]})
    act(state, "readmit", "receipt-2", ids={A: []})
    state.add_examples({A: Entry(0, 1, None, C)})
    act(state, "delete", "receipt-1", [(0, 1)], {A: [(0, 1)]})  # as after an interruption
    assert state.tombstone("id", A) is None and state.has("id", A)


@pytest.mark.parametrize("seed", range(30))
def test_states_joined_in_any_order_forget_no_deletion(seed):
    """Three machines delete, readmit and exchange: an example is buried while a deletion stands that nobody lifted
    who knew of it."""
    draw, lifted, about = random.Random(seed), {}, {}
    states, seen = [in_memory() for _ in "abc"], [set() for _ in "abc"]
    for _ in range(40):
        here, there, digest = draw.randrange(3), draw.randrange(3), draw.choice([A, B, C])
        what = draw.choice(["delete", "readmit", "join", "join"])
        if what == "join":
            states[here].join(states[there])
            seen[here] |= seen[there]
        else:
            name = f"receipt-{draw.random()}"
            places = [(0, draw.randrange(2))] if what == "delete" else []
            act(states[here], what, name, places, {digest: places})
            if what == "delete":
                about[name] = digest
            else:
                lifted[name] = {known for known in seen[here] if about.get(known) == digest}
            seen[here].add(name)
        for state, known in zip(states, seen, strict=True):
            gone = set().union(*(lifted.get(name, ()) for name in known))
            standing = {name for name in known if name in about and name not in gone}
            assert {(row[1], row[2]) for row in state.tombstones()} == {(about[name], name) for name in standing}
            assert state.log().keys() == known
    for one, other in ((0, 1), (1, 2), (2, 0), (0, 1), (1, 2)):
        states[one].join(states[other])
        states[other].join(states[one])
    assert len({state.tombstones_hmac(KEY) for state in states}) == 1


def test_travelling_tombstones_need_the_key():
    data = json.loads(json_bytes(buried().tombstones_json(KEY)))
    read = from_tombstones_json(data, KEY)
    assert list(read.tombstones()) == list(buried().tombstones()) and read.log() == buried().log()
    forged = [{"tombstones": []}, {"log": {"x": {"places": [], "named": True}}}, {"hmac": None}, {"hmac": "é"}]
    for change in forged:
        with pytest.raises(StateError, match="partition key"):
            from_tombstones_json({**data, **change}, KEY)
    with pytest.raises(StateError, match="partition key"):
        from_tombstones_json(data, b"o" * 16)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3}, {"tombstones": [[]]}, {"tombstones": [["id", A, "receipt-1", 0, -1, 1]]}, {"tombstones": 3},
        {"tombstones": [["person", A, "receipt-1", 0, 1, 1]]}, {"tombstones": [["id", "ab", "receipt-1", 0, 1, 1]]},
        {"tombstones": [["id", A, "receipt-1", 0, 1.5, 1]]}, {"log": None},
    ],
)  # fmt: skip
def test_damaged_travelling_tombstones_are_refused(change):
    data = {**json.loads(json_bytes(buried().tombstones_json(KEY))), **change}
    with pytest.raises(StateError, match="tombstones are damaged"):
        from_tombstones_json(data, KEY)


# ---- the index ----


def test_examples_come_in_the_order_of_their_digests_however_many(monkeypatch):
    monkeypatch.setattr("hf_s3t.store.database.PAGE", 7)
    state, draw = in_memory(), random.Random(0)
    entries = {
        draw.randbytes(16).hex(): Entry(draw.randrange(2), draw.randrange(3), draw.choice([None, A, B]), C)
        for _ in range(50)
    }
    state.add_examples(entries)
    assert list(state.examples()) == sorted(entries.items()) and state.count == 50
    for place, count in state.counts().items():
        found = state.examples_of(place)
        assert found == sorted(d for d, entry in entries.items() if entry[:2] == place) and len(found) == count
    assert state.members(A) == {d: entry for d, entry in entries.items() if entry.group == A}
    gone = list(entries)[:20]
    state.remove_examples(gone)
    assert state.count == 30 and dict(state.examples()) == {d: e for d, e in entries.items() if d not in gone}
    state.remove_examples([d for d, entry in entries.items() if entry.group == A])
    assert not state.has("group", A) and state.has("group", B)


@pytest.mark.parametrize(
    "entry", [(0, 3), (2, 0), (-1, 0), (0, "x"), (0, 1.5), (0, None)], ids=lambda entry: str(entry[:2])
)
def test_an_example_outside_of_the_partition_is_refused(entry):
    with pytest.raises(sqlite3.IntegrityError), closing(schema.in_memory()) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        state = StateDatabase(connection)
        state.begin(A, itertools.product(range(2), range(3)))
        state.add_examples({A: Entry(*entry, None, C)})


# ---- a file that cannot be used ----


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "out", people(20))


def damage(store, how: str) -> None:
    path = store.database
    if how == "torn":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "no database":
        path.write_bytes(b"{" * 5000)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        path.unlink()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE mine (x)")
    elif how == "newer":
        edit_database(store, f"PRAGMA user_version = {schema.FORMAT + 1}")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("torn", "damaged .*state import"),
        ("no database", "damaged .*state import"),
        ("empty", "no state of hf_s3t"),
        ("foreign", "no state of hf_s3t"),
        ("newer", "reads format 1. Use the version that wrote it"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_and_stops_no_deletion_of_slices(store, tmp_path, how, message):
    store.export_state(tmp_path / "backup")
    damage(store, how)
    with pytest.raises(StateError, match=message):
        store.locate(ids=["row-1"])
    with pytest.raises(StateError, match=message):
        store.delete(ids=["row-1"])
    receipt = store.delete(slices=[(0, 0)])
    assert receipt.status == "inactive" and not any((0, 0) in stage.slices for stage in store.live().stages)
    assert [path.name for path in store.loose_receipts()] == [f"{receipt.receipt}.json"]
    if how != "newer":  # the way out that the message names
        store.import_state(tmp_path / "backup")
        assert store.locate(ids=["row-1"])[0].found in ("live", "deleted")
        assert not store.loose_receipts() and receipt.receipt in {r["receipt"] for r in receipts(store)}


TORN = '{"torn'
RECORDS = {
    "exports": f"UPDATE exports SET record = '{TORN}'",
    "exports of another form": "UPDATE exports SET record = json_remove(record, '$.stages')",
    "exports that the backup does not have": f"UPDATE exports SET path = 'elsewhere', record = '{TORN}'",
    "records": f"UPDATE records SET record = '{TORN}' WHERE stage LIKE '%/0'",
    "receipts": f"UPDATE receipts SET receipt = '{TORN}' WHERE number = 1",
    "receipts in no encoding": "UPDATE receipts SET receipt = CAST(x'ff' AS TEXT) WHERE number = 1",
}


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS)
def test_a_damaged_record_stops_no_deletion_and_a_backup_mends_it(store, tmp_path, change):
    store.delete(ids=["row-1"])
    store.export(tmp_path / "copy")
    store.export_state(tmp_path / "backup")
    edit_database(store, change)
    assert store.delete(ids=["row-1"]).status == "unchanged"
    assert store.delete(ids=["row-2"]).status in ("inactive", "unchanged") and store.delete(slices=[(0, 2)])
    store.import_state(tmp_path / "backup")
    assert verify(store).ok and store.status().exports == (str(tmp_path / "copy"),)
    assert [location.found for location in store.locate(ids=["row-1", "row-2"])] == ["deleted"] * 2
    kept = [receipt for receipt in receipts(store) if receipt["kind"] != "obeyed"]  # that tells of the import
    assert len(kept) == 4 and store.export(tmp_path / "another")


def receipts(store):
    with store.reading() as state:
        return state.receipts()


def test_a_state_of_the_old_format_is_told(store):
    store.database.rename(store.private / "state.json")
    with pytest.raises(StateError, match=r"no state \(state.sqlite\) \(state.json is of a version before"):
        store.locate(ids=["row-1"])


@contextmanager
def held(store):
    """Another connection that writes."""
    with closing(sqlite3.connect(store.database, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield


def test_a_database_that_another_process_writes_is_waited_for(store, monkeypatch):
    monkeypatch.setattr(schema, "SECONDS", 0.1)
    with held(store), pytest.raises(StoreLockedError, match="was in use for 0.1 seconds"):
        store.locate(ids=["row-1"])
    assert store.locate(ids=["row-1"])[0].found == "live"


def test_a_library_that_is_too_old_is_told(store, monkeypatch):
    monkeypatch.setattr("sqlite3.sqlite_version_info", (3, 34, 1))
    monkeypatch.setattr("sqlite3.sqlite_version", "3.34.1")
    with pytest.raises(CompatibilityError, match=r"has SQLite 3.34.1; the state of a store needs 3.37 or later"):
        store.locate(ids=["row-1"])


def test_what_fails_in_a_transaction_changes_nothing(store):
    before, digest = tree(store.path), next(iter(index_of(store)))
    with pytest.raises(RuntimeError), store.changing() as state:
        act(state, "delete", "receipt-1", [(0, 1)], {digest: [(0, 1)]})
        raise RuntimeError
    assert tree(store.path) == before and state_of(store)[0] == 0
