"""Parts of a store that are of different times, or say what is not so: nobody is told that a deletion is done then."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import models
import trained_stores
from hf_s3t import S3TStore, StateError, StoreError
from hf_s3t.lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from hf_s3t.store.audit import verify
from hf_s3t.store.manifest import Event
from hf_s3t.store.partition import keyed_digest
from hf_s3t.store.receipts import read_receipts
from stores import KEY, Known, edit_database, make_store, people, stage_folders, tree


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Known]:
    store = make_store(tmp_path_factory.mktemp("made") / "out")
    return store.path, Known.of(store)


@pytest.fixture
def store(made: tuple[Path, Known], tmp_path: Path) -> S3TStore:
    return S3TStore(shutil.copytree(made[0], tmp_path / "out"))


@pytest.fixture
def known(made: tuple[Path, Known]) -> Known:
    return made[1]


# ---- an index that is wrong ----


@pytest.mark.parametrize("shard, slice_id", [(0, 2), (1, 1), (0, 99), (7, 0)])
def test_an_example_that_does_not_lie_where_it_belongs_is_told_and_nothing_is_deleted(store, known, shard, slice_id):
    name = known.at(0, 1)[0]
    edit_database(store, "UPDATE examples SET shard = ?, slice = ?", shard, slice_id)
    before = tree(store.path)
    with pytest.raises(StateError, match="where it does not belong: .*state.sqlite is damaged. Nothing was changed"):
        store.delete(ids=[name])
    assert tree(store.path) == before and "lie in other slices than they belong in" in findings(store)
    assert store.delete(slices=[(0, 1)]).status == "inactive", "the way out that the message names"


def findings(store: S3TStore) -> str:
    return "\n".join(finding for check in verify(store).checks for finding in check.broken)


@pytest.mark.parametrize("place", ["slice = 99", "slice = -127", "shard = 7", "shard = -128", "a bit"])
def test_an_example_that_cannot_lie_there_is_told_where_columns_say_its_slice(tmp_path, place):
    rows = [row | {"m": number % 2, "l": number % 3} for number, row in enumerate(people(12))]
    store = make_store(tmp_path / "out", rows, slice_columns=("m", "l"))
    if place == "a bit":
        in_the_row_alone(store, "UPDATE examples SET slice = (slice + 1) % 3 WHERE number = 1")
    else:
        edit_database(store, f"UPDATE examples SET {place} WHERE number = 1")
    assert "1 examples lie in other slices than they belong in" in findings(store)
    outcomes = []
    for row in rows:
        try:
            outcomes.append(store.delete(ids=[row["id"]], dry_run=True).status)
        except StateError:
            outcomes.append("damaged")
    assert outcomes.count("damaged") == 1 and outcomes.count("dry run") == 11


def in_the_row_alone(store: S3TStore, change: str) -> None:
    """Changes an example's row and not the index by places, as a bit does that flips on the disk."""
    with closing(sqlite3.connect(store.database)) as connection:
        kept = connection.execute("SELECT * FROM sqlite_schema WHERE name = 'examples_by_slice'").fetchone()
    for statement, values in (
        ("DELETE FROM sqlite_schema WHERE name = 'examples_by_slice'", ()),
        (change, ()),
        ("INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", kept),
    ):  # each on a connection of its own, which reads the schema anew
        with closing(sqlite3.connect(store.database)) as connection:
            connection.execute("PRAGMA writable_schema = ON")
            connection.execute(statement, values)
            connection.commit()


@pytest.mark.parametrize("places", [((0, 1.0),), ((0, True),), ((0, -1),), ((0, "1"),)])
def test_a_manifest_that_nobody_could_read_again_is_never_written(store, places):
    before = (store.path / "s3t.json").read_bytes()
    manifest = replace(store.manifest(), generation=1, log={"receipt-1": Event(places)})
    with pytest.raises(StoreError, match="manifest is damaged"):
        store.write_manifest(manifest)
    assert (store.path / "s3t.json").read_bytes() == before


# ---- copies of different times ----


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE])
def test_a_root_adapter_that_was_put_back_is_made_anew(store, known, made, name):
    store.delete(ids=[known.at(0, 1)[0], known.at(1, 1)[0]])
    mended = tree(store.path)
    shutil.copy(made[0] / name, store.path / name)
    assert tree(store.path) != mended
    assert S3TStore(store.path).delete(ids=[known.at(0, 1)[0]]).status == "unchanged"
    after = tree(store.path)
    assert {file for file in after if after[file] != mended[file]} == {".s3t/state.sqlite: receipts"}
    assert verify(store).ok


def test_a_root_adapter_that_is_the_manifests_is_hashed_once(store, monkeypatch):
    with store.writing():
        pass
    read = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or whole(path))
    with store.writing():
        pass
    assert WEIGHTS_FILE not in read and CONFIG_FILE not in read


def test_published_files_that_were_put_back_lose_what_was_deleted_since(store, known, made):
    store.delete(ids=[known.at(0, 1)[0]])
    gone = {folder for folder in stage_folders(made[0]) if folder not in stage_folders(store.path)}
    shutil.copytree(made[0], store.path, ignore=shutil.ignore_patterns(".s3t"), dirs_exist_ok=True)
    assert gone & stage_folders(store.path)
    with store.writing():
        pass
    assert not gone & stage_folders(store.path) and verify(store).ok


@pytest.mark.parametrize("ask", ["delete", "delete what is known", "locate"])
def test_nobody_is_unknown_to_a_state_that_is_older_than_the_stages(store, made, ask):
    name, other = "row-3", "row-4"
    edit_database(store, "DELETE FROM examples WHERE digest = ?", bytes.fromhex(keyed_digest(KEY, "id", name)))
    before = tree(store.path)
    asked = {
        "delete": store.delete,
        "delete what is known": partial(store.delete, missing_ok=True),
        "locate": store.locate,
    }[ask]
    for unknown in (name, "nobody"):
        with pytest.raises(StateError, match=r"of different times: shard-0\d/.* saw \d+ examples, and the index has"):
            asked(ids=[other, unknown])
    assert tree(store.path) == before and store.locate(ids=[other])[0].found == "live"
    S3TStore(made[0]).export_state(store.path.parent / "newer")
    store.import_state(store.path.parent / "newer")  # the way out that the message names
    assert store.locate(ids=[name, "nobody"])[0].found == "live"


def test_nothing_is_trained_with_a_state_that_is_older_than_the_stages(tmp_path):
    rows, path = models.llama_rows(16), tmp_path / "out"
    name = rows["id"][3]
    store = S3TStore(trained_stores.train_store(path, rows, num_shards=1, num_slices=2))
    edit_database(store, "DELETE FROM examples WHERE digest = ?", bytes.fromhex(keyed_digest(store.key, "id", name)))
    before = tree(path)
    left = rows.filter(lambda row: row["id"] != name)  # so that index and rows agree
    with pytest.raises(StateError, match="of different times"):
        trained_stores.make_trainer(str(path), left, num_shards=1, num_slices=2).train()
    assert tree(path) == before


def test_nobody_is_unknown_where_a_stage_is_another_one_than_the_state_has_on_record(store):
    change = "UPDATE records SET record = json_set(record, '$.files', json('{}')) WHERE stage = 'shard-00/0'"
    edit_database(store, change)
    with pytest.raises(StateError, match="shard-00/0 is not the stage that the state has a record of"):
        store.delete(ids=["nobody"])
    assert store.delete(ids=["row-1"]).status == "inactive", "who is known can be deleted"


def test_a_receipt_of_a_deletion_that_the_state_does_not_know_is_told(store, known):
    store.delete(ids=[known.at(0, 1)[0]])
    receipt = read_receipts(store)[-1] | {"receipt": "receipt-0", "stages_removed": {"shard-00/0": {}}}
    with store.changing() as state:
        state.add_receipt("receipt-0", receipt)
    assert "receipts tell of deletions that the state does not know: receipt-0" in findings(store)


def test_a_receipt_beside_the_database_tells_of_a_deletion_that_was_undone(store, made):
    whole = store.database.read_bytes()
    store.database.write_bytes(whole[: len(whole) // 2])
    receipt = store.delete(slices=[(0, 1)]).receipt
    assert store.loose_receipts()
    shutil.copytree(made[0], store.path, dirs_exist_ok=True)  # everything of before
    assert f"receipts tell of deletions that the state does not know: {receipt}" in findings(store)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE receipts SET receipt = json_set(receipt, '$.reference', 'another') WHERE number = 2",
        "DELETE FROM receipts WHERE number = 2",
        "UPDATE receipts SET number = 9 WHERE number = 2",
    ],
)
def test_a_receipt_that_was_changed_removed_or_moved_is_told(store, change):
    for name in ("row-1", "row-2", "row-3"):
        store.delete(ids=[name])
    assert verify(store).ok
    edit_database(store, change)
    assert "does not follow the receipt before it" in findings(store)
