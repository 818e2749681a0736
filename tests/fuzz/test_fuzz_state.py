"""The private state, as a disk or somebody else left it: refused by its name, or read; and a deletion goes on."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from hf_s3t import Plan, Receipt, S3TStore
from hf_s3t.hub.purge_report import Probe, PurgeReport, keep
from hf_s3t.store import base_identity
from hf_s3t.store.activation_blocks import BlockName, FileBlocks
from hf_s3t.store.audit import verify
from hf_s3t.store.state_files import INTENTS
from hf_s3t.training.checkpoints import MARK, latest_checkpoint, mark_complete
from hostile import (
    KINDS,
    Original,
    Outside,
    as_json,
    changed,
    damaged,
    fuzz,
    json_texts,
    only_typed,
    put_kind,
    quick_folder,
    run_cases,
)
from stores import make_store, people

PLAN = Plan.make(2, 2, [(0, 1), (1, 0)], prune=False)
STATE = ".s3t/state.sqlite"


@pytest.fixture(scope="module")
def hostile():
    """A store with a deletion and an export behind it, a folder that nothing may touch, and an unfinished deletion."""
    with quick_folder() as root:
        outside = Outside(root / "canary")
        store = make_store(root / "out", people(12), plan=PLAN)
        store.export(root / "export", prefix="shard-01/1")
        begun = _begun(store, root)
        store.delete(ids=["row-9"], reference="a request")
        yield Original(root / "out"), outside, begun


def _begun(store, root):
    """What an interrupted deletion leaves: its intent, as its writer wrote it."""
    found = []

    class Stop(Exception):
        pass

    def stop():
        (path,) = (store.private / INTENTS).glob("*.json")
        found.append((path.name, json.loads(path.read_bytes())))

    before = Original(store.path)
    store._delete({"ids": ["row-1"]}, when_durable=stop)
    before.put_back()
    return found[0]


WAYS = {
    "status": lambda store: store.status().to_json(),
    "locate": lambda store: store.locate(ids=["row-2", "row-9", "nobody"]),
    "verify": lambda store: verify(store).to_json(),
    "delete": lambda store: store.delete(ids=["row-2"]),
    "delete again": lambda store: store.delete(ids=["row-9"]),
    "delete a slice": lambda store: store.delete(slices=[(0, 0)], refresh_exports=True),
    "readmit": lambda store: store.readmit(ids=["row-9"]),
    "expire": lambda store: store.expire("1d"),
    "back up": lambda store: store.export_state(store.path.parent / "backup"),
    "export": lambda store: store.export(store.path.parent / "export", prefix="shard-01/1"),
    "loss": lambda store: store.accept_loss(dry_run=True),
    "move the key": lambda store: _moved(store),
}
ways = st.sampled_from(sorted(WAYS))


def _moved(store):
    target = store.path.parent / "moved.key"
    target.unlink(missing_ok=True)
    store.move_key(target)


def looked_at(hostile, way):
    original, outside, _ = hostile
    only_typed(lambda: WAYS[way](S3TStore(original.path)))
    outside.check()


def deletes(hostile, **asked):
    """A deletion that is asked for is carried out, whatever the rest of the state holds."""
    original, outside, _ = hostile
    receipt = S3TStore(original.path).delete(**(asked or {"slices": [(0, 0)]}))
    assert receipt.status in ("inactive", "unchanged")
    assert not {"0", "0-1", "1-0"} & {path.name for path in original.path.glob("shard-00/*")}
    outside.check()


# ---- the database ----


def columns(path):
    with closing(sqlite3.connect(path)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return [
            (table, row[1]) for table in sorted(tables) for row in connection.execute(f"PRAGMA table_info({table})")
        ]


HOW = ("checked", "unchecked", "restored")
SQL_VALUES = [
    None, 0, 1, -1, 2**62, -(2**62), 1.5, float("inf"), "", "x", "\0", "a" * 32, "0" * 64, "null", "{}", "[]", "[[0]]",
    '{"stages": null}', '{"receipt": 1}', '{"steps": "x"}', '{"versions": 3}', '{"a": "\\ud800"}', "[" * 100_000, b"",
    b"\0" * 16, b"\xff" * 16, b"\xff\xfe", b"x" * 3, "1e400",
]  # fmt: skip


def edit(path, table, column, value, how):
    """A change that the tables' own checks would not let pass: as that of somebody who has the file."""
    with closing(sqlite3.connect(path)) as connection:
        connection.text_factory = bytes
        connection.execute("PRAGMA ignore_check_constraints = ON")
        tables = connection.execute("SELECT sql, rowid FROM sqlite_schema").fetchall()
        if how != "checked":
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute(
                "UPDATE sqlite_schema SET sql = replace(replace(sql, ' STRICT, WITHOUT', ' WITHOUT'), ' STRICT', '')"
            )
            connection.commit()
            connection.execute("PRAGMA writable_schema = RESET")
        try:
            if column == "*":
                connection.execute(f"DELETE FROM {table}")
            else:
                connection.execute(f"UPDATE OR IGNORE {table} SET {column} = ?", (value,))
        except sqlite3.Error:
            return
        connection.commit()
        if how == "restored":  # the tables say again that there can be no such value
            connection.execute("PRAGMA writable_schema = ON")
            connection.executemany(
                "UPDATE sqlite_schema SET sql = ? WHERE rowid = ?",
                [(text and text.decode(), number) for text, number in tables],
            )
            connection.commit()


@fuzz(150)
def test_a_database_with_odd_values(amount, hostile):
    original, _, _ = hostile
    original.put_back()
    places = columns(original.path / STATE)
    places += [(table, "*") for table in {table for table, _ in places}]

    def case(place, value, how, way):
        original.put_back()
        edit(original.path / STATE, *place, value, how)
        looked_at(hostile, way)

    first = [(("slices", "examples"), "x", how, way) for how in HOW for way in ("delete", "locate", "status")]
    drawn = (st.sampled_from(sorted(places)), st.sampled_from(SQL_VALUES), st.sampled_from(HOW), ways)
    run_cases(amount, case, *drawn, first=first)


def test_a_statement_that_somebody_hid_in_the_tables_is_told(hostile):
    original, _, _ = hostile
    original.put_back()
    with closing(sqlite3.connect(original.path / STATE)) as connection:
        connection.execute("CREATE TRIGGER kept BEFORE DELETE ON examples BEGIN SELECT RAISE(IGNORE); END")
    assert "other tables" in str(only_typed(lambda: S3TStore(original.path).locate(ids=["row-2"])))
    deletes(hostile)


@fuzz(40)
def test_a_database_with_damaged_bytes(amount, hostile):
    original, _, _ = hostile
    data = original.files[Path(STATE)]

    def case(text, way):
        original.put_back()
        (original.path / STATE).write_bytes(text)
        looked_at(hostile, way)
        deletes(hostile)

    run_cases(amount, case, damaged(data) | st.sampled_from([b"", b"SQLite format 3\0", b"\0" * 4096]), ways)


RECORDS = {"receipts": "receipt", "exports": "record", "records": "record"}


def texts_of(original, table):
    original.put_back()
    with closing(sqlite3.connect(original.path / STATE)) as connection:
        (text,) = connection.execute(f"SELECT {RECORDS[table]} FROM {table}").fetchone()
    return json.loads(text)


@fuzz(80)
def test_records_with_odd_values_stop_no_deletion(amount, hostile):
    """Receipts, exports, and what stages were trained on: no promise of a deletion depends on them."""
    original, _, _ = hostile
    found = {table: texts_of(original, table) for table in RECORDS}

    def case(drawn, way):
        table, text = drawn
        original.put_back()
        edit(original.path / STATE, table, RECORDS[table], text.decode(errors="replace"), "checked")
        looked_at(hostile, way)
        deletes(hostile)

    first = [
        (("exports", as_json(found["exports"] | {name: value})), way)
        for name in found["exports"]
        for value in (None, {}, "x")
        for way in ("status", "delete a slice")
    ]
    first += [(("records", as_json(found["records"] | {"examples": {}})), "locate")]
    texts = [json_texts(value).map(lambda text, table=table: (table, text)) for table, value in found.items()]
    run_cases(amount, case, st.one_of(texts), ways, first=first)


@fuzz(200)
def test_a_receipt(amount, hostile):
    receipt = texts_of(hostile[0], "receipts")
    assert json.loads(json.dumps(Receipt.from_json(receipt).to_json())) == receipt

    kinds = {name: {type(value), type(None)} for name, value in receipt.items()} | {"limits": {tuple, list}}
    kinds |= {name: {int, float} for name in ("repair_slice_passes", "requests_left")}

    def read(value):
        found = Receipt.from_json(value).to_json()
        json.dumps(found).encode()
        assert not [name for name, value in found.items() if value is not None and type(value) not in kinds[name]]

    odd = [(receipt | {name: value},) for name in receipt for value in ([1], {"a": 1}, 1.5) if name != "limits"]
    run_cases(amount, lambda value: only_typed(lambda: read(value)), changed(receipt), first=odd)


@fuzz(40)
def test_a_receipt_beside_the_state(amount, hostile):
    original, _, _ = hostile
    receipt = texts_of(original, "receipts") | {"receipt": "receipt-0123"}

    def case(text, way):
        original.put_back()
        (original.path / ".s3t/receipt-0123.json").write_bytes(text)
        looked_at(hostile, way)
        original.put_back()
        (original.path / ".s3t/receipt-0123.json").write_bytes(text)
        error = only_typed(lambda: WAYS["delete a slice"](S3TStore(original.path)))
        assert error is None or "a newer version wrote it" in str(error), error

    known = [(text, "delete again") for text in (b"1", b'"x"', b"{}", b'{"receipt": null}')]
    run_cases(amount, case, json_texts(receipt), ways, first=known)


# ---- deletions that were begun ----


@fuzz(80)
def test_a_begun_deletion(amount, hostile):
    """One that cannot be read keeps nobody else's from being carried out."""
    original, _, (name, intent) = hostile

    def case(text, way):
        original.put_back()
        (original.path / f".s3t/intents/{name}").write_bytes(text)
        looked_at(hostile, way)
        deletes(hostile)

    first = [({**intent, "places": [[0, 2**63]]},), ({**intent, "renewed": None},), ({**intent, "ids": {"x": []}},)]
    run_cases(amount, case, json_texts(intent), ways, first=[(as_json(value), "delete") for (value,) in first])


# ---- backups, keys, reports ----


@fuzz(60)
def test_a_backup(amount, hostile):
    original, outside, _ = hostile
    original.put_back()
    file = original.path.parent / "backup"
    S3TStore(original.path).export_state(file)
    data, places = file.read_bytes(), columns(file)

    def case(kind, text, place, value, lost):
        original.put_back()
        file.write_bytes(text if kind == "bytes" else data)
        if kind != "bytes":
            edit(file, *place, value, kind)
        if lost:
            (original.path / STATE).unlink()
        only_typed(lambda: S3TStore(original.path).import_state(file))
        outside.check()

    kinds = st.sampled_from(("bytes", *HOW))
    drawn = (kinds, damaged(data), st.sampled_from(places), st.sampled_from(SQL_VALUES), st.booleans())
    run_cases(amount, case, *drawn)


def purge_report():
    probes = [Probe("0" * 64, "revision", "refs/heads/main:shard-00/0/a", "HTTP 302", "HTTP 404", False, "2026-01-01")]
    return PurgeReport(
        "owner/m", "pending", "2026-01-01T00:00:00.000+00:00", "2026-01-02T00:00:00.000+00:00", "0" * 40,
        ["receipt-1"], {"0" * 64: ["shard-00/0/a"]}, probes=probes, references={"receipt-1": "a request"},
    )  # fmt: skip


@fuzz(150)
def test_a_purge_report(amount):
    report = purge_report().to_json()
    assert PurgeReport.from_json(report).to_json() == report

    def case(value):
        def read():
            found = PurgeReport.from_json(value)
            json.dumps(found.to_json()).encode()
            return found.to_text().encode(), found.still_served_at, found.proving_nothing

        only_typed(read)

    run_cases(amount, case, changed(report))


@fuzz(20)
def test_a_kept_purge_report(amount, hostile):
    original, _, _ = hostile
    original.put_back()
    keep(purge_report(), original.path / ".s3t")
    (path,) = (original.path / ".s3t").glob("purge-*.json")

    def case(text, way):
        original.put_back()
        path.write_bytes(text)
        looked_at(hostile, way)
        deletes(hostile)

    run_cases(amount, case, json_texts(purge_report().to_json()), st.sampled_from(["expire", "status", "verify"]))


FILES = [STATE, ".s3t/partition.key", ".s3t/intents", ".s3t/intents/a.json", ".s3t/receipt-0.json",
         ".s3t/activations", ".s3t/purge-0.json", ".s3t/running", ".s3t/scratch",
         ".s3t/activations/shard-00_slice-0_layer-1.states"]  # fmt: skip


@fuzz(50)
def test_something_in_the_place_of_a_file_that_is_none(amount, hostile):
    original, outside, _ = hostile

    def case(name, kind, way):
        original.put_back()
        put_kind(original.path / name, kind, outside.path)
        looked_at(hostile, way)

    run_cases(amount, case, st.sampled_from(FILES), st.sampled_from(KINDS), ways)


# ---- what is remembered to be fast ----


@fuzz(40)
def test_a_block_of_activations(amount, hostile):
    original, outside, _ = hostile
    original.put_back()
    blocks, name = FileBlocks(original.path / ".s3t", "tie"), BlockName(1, 1, 3)
    writer = blocks.writer(name, [("a" * 32, "b" * 32)])
    writer.add("c", torch.zeros(2, 4))
    writer.end()
    blocks.install(writer)
    data = (blocks.folder / name.file).read_bytes()

    def case(text):
        original.put_back()
        blocks.folder.mkdir(exist_ok=True)
        (blocks.folder / name.file).write_bytes(text)
        only_typed(lambda: FileBlocks(original.path / ".s3t", "tie").read(name))
        blocks.folder.mkdir(exist_ok=True)
        (blocks.folder / name.file).write_bytes(text)
        deletes(hostile)

    head = {"tie": "tie", "examples": [["a" * 32, "b" * 32]]}
    tail = {"rows": [["c", 2]], "dtype": "torch.float32", "hidden": 4}
    known = [(block_of((head, tail | {"dtype": value})),) for value in (None, [], 1, "torch.load")]
    run_cases(amount, case, damaged(data) | st.tuples(changed(head), changed(tail)).map(block_of), first=known)


def block_of(parts):
    """A block whose checksum agrees."""
    head, tail = map(as_json, parts)
    head += b" " * (-(8 + len(head)) % 8)
    whole = struct.pack("<Q", len(head)) + head + b"\0" * 32 + tail
    length = struct.pack("<Q", len(tail))
    return whole + length + hashlib.sha256(whole).digest()


@fuzz(40)
def test_the_mark_of_a_checkpoint(amount):
    mark = {"stage": "shard-00/0", "data": "0" * 64, "seed": 1}
    with quick_folder() as root:

        def case(text):
            checkpoint = root / "running/checkpoint-3"
            checkpoint.mkdir(parents=True, exist_ok=True)
            mark_complete(checkpoint, mark)
            assert latest_checkpoint(root / "running", mark) == str(checkpoint)
            (checkpoint / MARK).write_bytes(text)
            only_typed(lambda: latest_checkpoint(root / "running", mark))

        run_cases(amount, case, json_texts(mark))


@fuzz(60)
def test_what_this_machine_remembers_of_base_models(amount, monkeypatch):
    """Only speed is lost: the digest is right."""
    model = nn.Linear(2, 2)
    with quick_folder() as root:
        monkeypatch.setattr(base_identity.constants, "HF_HOME", str(root))
        right, path = base_identity.base_digest(model), base_identity.memory_path()
        memory = json.loads(path.read_bytes())

        def case(text):
            path.write_bytes(text)
            try:
                digests = json.loads(text)["digests"].values()
            except Exception:
                digests = ()
            assert base_identity.base_digest(model) in {right, *map(str, digests)}

        run_cases(amount, case, json_texts(memory))
