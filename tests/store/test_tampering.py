"""A store that was tampered with is found by `verify`: each way by its name, with the check that tells.

What only training again can tell is in `training/test_retrain.py`; receipts have tests of their own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import models
import trained_stores
from hf_s3t import S3TStore
from hf_s3t.store.audit import verify
from hf_s3t.store.partition import keyed_digest
from stores import edit_database, index_of, make_store, people
from trained_stores import CONTENTS, KEY, WEIGHTS, broken, edit_json, edit_tensors

FILES = "stage files are the manifest's"
TREE = "parents, plan and served prefixes agree"
SURPLUS = "nothing else lies in the store"
ROOT = "the root adapter is the served model"
DATABASE = "the state's database is whole"
AGREEMENT = "stages are those that the state knows"
GENERATION = "state and manifest are of one generation"
TOMBSTONES = "tombstones are the manifest's"
BURIED = "no stage is older than a deletion from it"
EXAMPLES = "stages saw the examples of the index"
MODES = "the state is its owner's alone"


def victim() -> str:
    return models.llama_rows(1)["id"][0]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained store."""
    return trained_stores.train_store(tmp_path_factory.mktemp("tampering") / "before")


@pytest.fixture(scope="module")
def after(before: Path) -> Path:
    """The same after a deletion."""
    store = Path(shutil.copytree(before, before.parent / "after"))
    S3TStore(store).delete(ids=[victim()])
    report = verify(store)
    assert report.ok and report.complete and report.generation == 1
    return store


@pytest.fixture
def store(after: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(after, tmp_path / "store"))


def stage_of(store: Path, position: int = 0) -> str:
    """A live stage."""
    return sorted(json.loads((store / "s3t.json").read_text())["stages"])[position]


def flip(file: Path, position: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda store: edit_json(store / "s3t.json", change)


def sql(statement: str) -> Callable[[Path], None]:
    return lambda store: edit_database(store, statement)


def record(change: str) -> Callable[[Path], None]:
    return sql(f"UPDATE records SET record = {change} WHERE stage = (SELECT min(stage) FROM records)")


def rename_stage(store: Path) -> None:
    (store / stage_of(store)).rename((store / stage_of(store)).with_name("2-1-0"))


def swap_stages(store: Path) -> None:
    one, other = store / stage_of(store), store / stage_of(store, -1)
    one.rename(store / "aside")
    other.rename(one)
    (store / "aside").rename(other)


def rewrite_stage(store: Path) -> None:
    """With the manifest, as somebody who covers the traces would."""
    edit_tensors(store, stage_of(store), lambda tensors: next(iter(tensors.values())).mul_(2))


def forget_deletion(store: Path) -> None:
    for table in ("tombstones", "event_places", "events"):
        edit_database(store, f"DELETE FROM {table}")


def first_event(data: dict) -> dict:
    return next(iter(data["log"].values()))


FIRST = "(SELECT min(number) FROM examples)"
TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit of a stage's weights": (lambda store: flip(store / stage_of(store) / WEIGHTS), FILES),
    "one bit of a stage's config": (lambda store: flip(store / stage_of(store) / "adapter_config.json", 40), FILES),
    "a stage without its weights": (lambda store: (store / stage_of(store) / WEIGHTS).unlink(), FILES),
    "a stage removed": (lambda store: shutil.rmtree(store / stage_of(store)), FILES),
    "a stage renamed": (rename_stage, SURPLUS),
    "two stages swapped": (swap_stages, FILES),
    "a stage rewritten, and its digest": (rewrite_stage, AGREEMENT),
    "a file put in": (lambda store: (store / "old.safetensors").write_bytes(b"x"), SURPLUS),
    "one bit of the root adapter": (lambda store: flip(store / WEIGHTS), ROOT),
    "the root adapter removed": (lambda store: (store / WEIGHTS).unlink(), ROOT),
    "a parent renamed in the manifest": (manifest(lambda m: m["stages"][max(m["stages"])].update(parent="x")), TREE),
    "a served prefix shortened": (manifest(lambda m: m.update(served={})), TREE),
    "a stage taken out of the manifest": (manifest(lambda m: m["stages"].pop(max(m["stages"]))), SURPLUS),
    "the sizes of the partition": (manifest(lambda m: m["recipe"]["partition"].update(num_slices=4)), TREE),
    "a rank in the recipe": (manifest(lambda m: m["recipe"]["config"].update(r=3)), CONTENTS),
    "a setting in the recipe": (manifest(lambda m: m["recipe"]["arguments"].update(learning_rate=2.0)), AGREEMENT),
    "the root's digest": (manifest(lambda m: m["root"].update({WEIGHTS: "0" * 64})), ROOT),
    "the seal of the tombstones": (manifest(lambda m: m.update(tombstones="0" * 64)), TOMBSTONES),
    "the key check": (manifest(lambda m: m.update(key_check="0" * 32)), TOMBSTONES),
    "a deletion taken out of the manifest": (manifest(lambda m: m.update(log={}, generation=0)), GENERATION),
    "the places of a deletion in the manifest": (manifest(lambda m: first_event(m).update(places=[])), GENERATION),
    "a tombstone removed": (sql("DELETE FROM tombstones"), TOMBSTONES),
    "a tombstone moved": (sql("UPDATE tombstones SET slice = (slice + 1) % 3"), TOMBSTONES),
    "a tombstone of somebody else": (sql("UPDATE tombstones SET digest = zeroblob(16)"), TOMBSTONES),
    "a deletion moved": (sql("UPDATE event_places SET slice = (slice + 1) % 3"), GENERATION),
    "a deletion forgotten": (forget_deletion, GENERATION),
    "an example removed": (sql(f"DELETE FROM examples WHERE number = {FIRST}"), EXAMPLES),
    "an example moved": (sql(f"UPDATE examples SET slice = (slice + 1) % 3 WHERE number = {FIRST}"), DATABASE),
    "an example renamed": (sql(f"UPDATE examples SET digest = zeroblob(16) WHERE number = {FIRST}"), EXAMPLES),
    "an example's content": (sql(f"UPDATE examples SET content = zeroblob(16) WHERE number = {FIRST}"), EXAMPLES),
    "an example's person": (
        sql(f"UPDATE examples SET person = (SELECT max(number) FROM people) WHERE number = {FIRST}"), EXAMPLES
    ),
    "a person renamed": (sql("UPDATE people SET digest = zeroblob(16) WHERE number = 1"), EXAMPLES),
    "a number of examples": (sql("UPDATE slices SET examples = examples + 1 WHERE shard = 0 AND slice = 0"), DATABASE),
    "the data in a record": (record("json_set(record, '$.data', 'x')"), EXAMPLES),
    "the index in a record": (record("json_set(record, '$.index', 'x')"), EXAMPLES),
    "the recipe in a record": (record("json_set(record, '$.recipe', 'x')"), AGREEMENT),
    "the files in a record": (record("json_set(record, '$.files', json('{}'))"), AGREEMENT),
    "more examples in a record": (record("json_set(record, '$.examples', 9999)"), AGREEMENT),
    "another key": (lambda store: (store / ".s3t/partition.key").write_text("11" * 16), TOMBSTONES),
    "a state that others can read": (lambda store: (store / ".s3t/state.sqlite").chmod(0o644), MODES),
    "one bit of the database's header": (lambda store: flip(store / ".s3t/state.sqlite", 100), DATABASE),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_found(store: Path, name: str) -> None:
    tamper, check = TAMPERINGS[name]
    tamper(store)
    report = verify(store)
    assert check in broken(report) and not report.ok


def test_stage_put_back_with_its_record_is_found(store: Path, before: Path) -> None:
    gone = sorted({*verify(before).stages} - {*verify(store).stages})[0]
    entry = json.loads((before / "s3t.json").read_text())["stages"][gone]
    with S3TStore(before).reading() as state:
        kept = json.dumps(state.record(gone))
    shutil.copytree(before / gone, store / gone)
    edit_json(store / "s3t.json", lambda data: data["stages"].update({gone: entry}))
    edit_database(store, "INSERT INTO records VALUES (?, ?)", gone, kept)
    assert {BURIED, EXAMPLES} <= broken(verify(store)).keys()


def test_deleted_example_put_back_into_the_index_is_found(store: Path, before: Path) -> None:
    digest = keyed_digest(bytes.fromhex(KEY), "id", victim())
    with S3TStore(store).changing() as state:
        state.add_examples({digest: index_of(S3TStore(before))[digest]})
    assert BURIED in broken(verify(store))


@pytest.mark.parametrize("place", ["", ".s3t"])
def test_part_of_an_older_backup_is_found(store: Path, before: Path, place: str) -> None:
    """The published files of before the deletion beside the state of after it, or the other way round."""
    files = shutil.copytree(before if place == "" else store, store.parent / "restored")
    shutil.rmtree(files / ".s3t")
    shutil.copytree((store if place == "" else before) / ".s3t", files / ".s3t")
    assert GENERATION in broken(verify(files))


def test_example_moved_throughout_is_found_where_columns_say_where_it_lies(tmp_path: Path) -> None:
    """No key tells then: row, index and numbers agree, but stages were trained on it where it was."""
    rows = [row | {"m": i % 2, "n": i % 3} for i, row in enumerate(people(24))]
    store = make_store(tmp_path / "store", rows, slice_columns=("m", "n"))
    assert verify(store).ok
    edit_database(store, f"UPDATE examples SET slice = (slice + 1) % 3 WHERE number = {FIRST}")
    counted = "SELECT count(*) FROM examples AS e WHERE e.shard = slices.shard AND e.slice = slices.slice"
    edit_database(store, f"UPDATE slices SET examples = ({counted})")
    found = broken(verify(store))
    assert EXAMPLES in found and "one that it saw is gone" in found[EXAMPLES]
