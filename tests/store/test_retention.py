"""Old receipts lose what nothing depends on, and no byte of it is left; everything else stays."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path

import pytest

from command_line import outcomes, plain, run
from hf_s3t import S3TStore
from hf_s3t.files import json_bytes
from hf_s3t.hub.purge_report import PurgeReport, keep
from hf_s3t.store.audit import verify
from hf_s3t.store.receipts import read_receipts
from hf_s3t.store.retention import begin_of_term
from stores import edit_database, make_store, tombstones_of, tree

OLD, NEW = "OLD-Fetamir", "NEW-Aleya"
CACHES = [f"/home/me/cache-Fetamir-{number:02}.arrow" for number in range(36)]


def age(since: float) -> datetime.timedelta:
    """How long ago that is."""
    return datetime.timedelta(seconds=time.time() - since)


def store_with_receipts(path: Path) -> tuple[S3TStore, float]:
    """A store after many deletions, and the time before the last one."""
    store = make_store(path)
    with store.changing() as state:
        state.add_caches(CACHES)
    store.export(path.parent / "there")
    store.export(path.parent / "gone-Fetamir")
    for number in range(12):
        store.delete(ids=[f"row-{number}"], reference=f"{OLD} {number} " * 20)
    store.readmit(ids=["row-1"], reference=OLD)
    for file in (path.parent / "gone-Fetamir").iterdir():
        file.unlink()
    (path.parent / "gone-Fetamir").rmdir()
    time.sleep(0.01)
    between = time.time()
    time.sleep(0.01)
    store.delete(ids=["row-20"], reference=NEW)
    return store, between


def holding(folder: Path, text: str) -> list[str]:
    """Files below a folder that hold a text."""
    return [path.name for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_old_receipts_lose_what_nothing_depends_on(tmp_path):
    store, between = store_with_receipts(tmp_path / "out")
    before, stones, manifest = read_receipts(store), tombstones_of(store), store.manifest()
    assert holding(store.private, "Fetamir") == ["state.sqlite"] and any(r["exports"] for r in before)
    done = store.expire(age(between))
    assert done.receipts == tuple(receipt["receipt"] for receipt in before[:-1]) and len(done.receipts) == 13
    after = read_receipts(store)
    assert after[-1] == before[-1] and after[-1]["reference"] == NEW and after[-1]["caches"] == CACHES
    private = {"reference": None, "exports": None, "caches": None, "salts": None}
    for old, left in zip(before[:-1], after[:-1], strict=True):
        assert {**left, **private} == {**old, **private}
        assert (left["reference"], left["caches"]) == (None, [])
        assert left["exports"] == [path for path in old["exports"] if Path(path).name == "there"]
        kept = {name for name in ("reference", "caches") if old[name] == left[name]}
        kept |= {"copies"} if left["exports"] == old["exports"] else set()
        assert left["salts"].keys() == kept, "a salt goes with its value: nobody can try names"
    assert tombstones_of(store) == stones and store.manifest() == manifest
    assert verify(store).ok and store.expire(age(between)).receipts == ()


def test_no_byte_of_it_is_left(tmp_path):
    store, _ = store_with_receipts(tmp_path / "out")
    edit_database(store, "DELETE FROM caches")
    edit_database(store, "DELETE FROM exports")
    file = store.database.stat().st_ino
    assert store.expire(datetime.timedelta(0)).receipts
    assert store.database.stat().st_ino != file, "it was written anew: no page of the old one is left"
    assert [holding(store.private, text) for text in (OLD, NEW, "Fetamir", "cache-")] == [[]] * 4
    assert not list(store.private.glob("*-journal"))


def test_a_receipt_beside_the_database_loses_it_too(tmp_path):
    store = make_store(tmp_path / "out")
    receipt = store.delete(ids=["row-1"], reference=OLD)
    edit_database(store, "DELETE FROM receipts")
    store.write_private(store.loose_receipt(receipt.receipt).name, json_bytes(receipt.to_json()))
    assert store.expire(datetime.timedelta(0)).receipts == (receipt.receipt,)
    assert holding(store.private, OLD) == [] and read_receipts(store)[0]["asked"] == 1


def test_with_the_state_lost_receipts_have_terms_too(tmp_path):
    store = make_store(tmp_path / "out")
    store.database.unlink()
    store.delete(slices=[(0, 0)], reference=OLD)
    assert len(store.expire(datetime.timedelta(0)).receipts) == 1
    assert holding(store.private, OLD) == [] and not store.has_state


def test_purge_reports_are_listed_and_lose_nothing(tmp_path):
    store = make_store(tmp_path / "out")
    for year in (2020, 2999):
        at = f"{year}-01-01T00:00:00.000+00:00"
        keep(PurgeReport("me/model", "no_longer_served", at, at, references={"receipt-1": OLD}), store.private)
    before = tree(store.private)
    found = store.expire("1y").purge_reports
    assert found == ("purge-2020-01-01T000000.000+0000.json",) and tree(store.private) == before


@pytest.mark.parametrize("term", ["2", "y", "2w", "-2y", "2 y", "٢y", "99999y", "", 2, None])
def test_what_is_no_term(tmp_path, term):
    store = make_store(tmp_path / "out")
    store.delete(ids=["row-1"], reference=OLD)
    with pytest.raises(ValueError, match="is no term. Write a number of years, months or days, such as 2y"):
        store.expire(term)
    assert read_receipts(store)[0]["reference"] == OLD


def test_terms_are_of_the_calendar():
    now = datetime.datetime.now(datetime.UTC)
    two, months = begin_of_term("2y"), begin_of_term("24m")
    assert (two.year, two.month, two.date()) == (now.year - 2, now.month, months.date())
    assert abs(now - begin_of_term("90d") - datetime.timedelta(days=90)) < datetime.timedelta(minutes=1)


def test_the_command_line(tmp_path):
    store = make_store(tmp_path / "out")
    receipt = store.delete(ids=["row-1"], reference=OLD)
    before = tree(store.path)
    (dry,) = outcomes("state", "expire", store.path, "--older-than", "0d", "--dry-run")
    assert dry["result"]["receipts"] == [receipt.receipt] and tree(store.path) == before
    assert run("state", "expire", store.path, "--older-than", "soon").exit_code == 2
    assert outcomes("state", "expire", store.path, "--older-than", "1d")[0]["result"]["receipts"] == []
    shown = plain(run("state", "expire", store.path, "--older-than", "0d").stdout)
    assert "1 receipts of" in shown and "Older backups still hold it" in shown
    assert json.dumps(OLD) not in json.dumps(read_receipts(store))
