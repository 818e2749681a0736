"""The state is lost after its last backup: what it knew of deletions is named, and their slices start anew."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import models
import trained_stores
from command_line import outcomes, plain, run
from hf_s3t import S3TStore, StateError
from hf_s3t.lora.adapter import Adapter
from hf_s3t.store.audit import verify
from hf_s3t.store.lost_state import WARNING
from hf_s3t.store.manifest import Event
from hf_s3t.store.receipts import read_receipts
from hf_s3t.training.reconcile import check_generation
from stores import KEY, edit_database, index_of, make_store, stage_folders, tombstones_of, tree

pytest_plugins = ["hub_fixtures"]
LOST = ("row-3", "row-9")


@dataclass
class After:
    """A store that lost its state after two more deletions, and has the backup from before them."""

    store: S3TStore
    names: dict[str, tuple[tuple[int, int], ...]]  # the lost deletions, with their places
    known: str  # the deletion that the backup knows
    index: dict[str, Any]  # of the backup
    newest: Path  # a backup that knows all, for who finds one

    @property
    def places(self) -> set[tuple[int, int]]:
        return {place for places in self.names.values() for place in places}


@pytest.fixture
def lost(tmp_path: Path) -> After:
    store = make_store(tmp_path / "out")
    known = store.delete(ids=["row-1"])
    store.export_state(tmp_path / "old")
    index = index_of(store)
    places = {name: store.locate(ids=[name])[0].places for name in LOST}
    names = {store.delete(ids=[name], reference=f"DSR {name}").receipt: places[name] for name in LOST}
    put_back(store)
    store.export_state(tmp_path / "newest")
    store.database.unlink()
    store.import_state(tmp_path / "old")
    return After(S3TStore(store.path), names, known.receipt, index, tmp_path / "newest")


def put_back(store: S3TStore) -> None:
    """Trains what is missing, as far as this store's stages are trained at all: they come from another one."""
    other = make_store(store.path.parent / f"other-{len(list(store.path.parent.iterdir()))}")
    whole = other.manifest()
    with store.writing(), store.changing() as state:
        live = store.manifest().stages
        again = {stage: _trained_without(other.read_stage(stage)) for stage in whole.stages.keys() - live.keys()}
        files = live | {stage: store.write_stage(stage, adapter) for stage, adapter in again.items()}
        for stage in whole.stages:
            state.write_record(stage.name, {"generation": state.generation, "examples": 0, "data": "", "steps": 1})
        store.write_manifest(store.write_root(replace(store.manifest(), stages=files)))
    edit_database(store, "DELETE FROM records")


def _trained_without(adapter: Adapter) -> Adapter:
    """Other weights, as a stage has them that is trained again without somebody."""
    return adapter._replace(arrays={name: value + 1 for name, value in adapter.arrays.items()})


def checked(store: S3TStore) -> None:
    with store.reading() as state:
        check_generation(store, store.manifest(), state)


def test_a_training_is_refused_and_told_the_way_out(lost):
    with pytest.raises(StateError, match=rf"hf-s3t state accept-loss {lost.store.path}` names them"):
        checked(lost.store)


def test_it_is_named_first_and_nothing_is_changed(lost):
    before = tree(lost.store.path)
    loss = lost.store.accept_loss(dry_run=True)
    assert loss.deletions == lost.names and loss.readmissions == () and loss.receipt is None
    assert set(loss.places) == lost.places and loss.to_json()["warning"] == WARNING
    assert loss.examples == sum(entry[:2] in lost.places for entry in lost.index.values())
    assert tree(lost.store.path) == before


def test_the_lost_slices_start_anew_and_the_others_stay(lost):
    store, before = lost.store, lost.store.manifest()
    hit = {stage.name for stage in before.stages if stage.slices & lost.places}
    assert hit and hit < before.names, "stages that were trained since are there"
    loss = store.accept_loss("INCIDENT-7")
    after = store.manifest()
    assert set(loss.stages) == hit == before.names - after.names
    assert stage_folders(store.path) == after.names
    assert not any(stage.slices & lost.places for stage in after.stages)
    assert index_of(store) == {d: entry for d, entry in lost.index.items() if entry[:2] not in lost.places}
    assert len(tombstones_of(store)["id"]) == 1 and store.locate(ids=["row-1"])[0].found == "deleted"
    checked(store)
    report = verify(store)
    assert report.ok, report
    receipt = read_receipts(store)[-1]
    assert (receipt["kind"], receipt["status"], receipt["reference"]) == ("loss", "accepted", "INCIDENT-7")
    assert set(receipt["deleted_by"]) == lost.names.keys() and receipt["limits"][0] == WARNING
    assert set(receipt["stages_removed"]) == hit and receipt["receipt"] in after.log


def test_nothing_is_lost_where_the_state_knows_all(tmp_path):
    store = make_store(tmp_path / "out")
    store.delete(ids=["row-1"])
    before = tree(store.path)
    assert not store.accept_loss().found and tree(store.path) == before
    assert "Nothing is lost, and nothing was changed" in plain(run("state", "accept-loss", store.path).stdout)


def test_without_any_state_or_key_it_says_what_is_missing(lost, monkeypatch):
    (lost.store.private / "partition.key").unlink()
    with pytest.raises(StateError, match="has no partition key"):
        lost.store.accept_loss()
    monkeypatch.setenv("HF_S3T_KEY", KEY.hex())
    lost.store.database.unlink()
    with pytest.raises(StateError, match="hf-s3t state import"):
        lost.store.accept_loss()


def is_known(store: S3TStore, name: str) -> bool:
    """Whether the index knows a row. Of others it cannot tell while a state is older than the stages."""
    try:
        return bool(store.locate(ids=[name])[0].places)
    except StateError:
        return False


def test_interrupted_it_is_ended_by_the_next_writer(lost, monkeypatch):
    store, before = lost.store, lost.store.manifest()

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            store.accept_loss()
    assert store.manifest() == before
    again = S3TStore(store.path)
    again.delete(ids=[next(name for name in ("row-2", "row-4", "row-5") if is_known(again, name))])
    assert not any(stage.slices & lost.places for stage in again.manifest().stages)
    checked(again)
    assert verify(again).ok and len(tombstones_of(again)["id"]) == 2, "and nobody else was buried"


def test_a_readmission_that_is_lost_starts_anew_whatever_was_deleted(tmp_path):
    store = make_store(tmp_path / "out")
    store.delete(ids=["row-1"])
    (place,) = store.locate(ids=["row-1"])[0].places
    store.export_state(tmp_path / "old")
    name = store.readmit(ids=["row-1"]).receipt
    put_back(store)  # trained on it again
    store.database.unlink()
    store.import_state(tmp_path / "old")
    loss = store.accept_loss()
    assert loss.readmissions == (name,) and loss.deletions == {} and loss.places == (place,)
    assert not any(place in stage.slices for stage in store.manifest().stages)
    assert store.locate(ids=["row-1"])[0].found == "deleted" and verify(store).ok


# ---- a state with the lost tombstones is found again ----


def test_tombstones_that_are_found_again_are_believed(lost):
    store = lost.store
    store.accept_loss()
    put_back(store)  # perhaps with the deleted rows
    store.import_state(lost.newest)
    assert len(tombstones_of(store)["id"]) == 3
    assert [location.found for location in store.locate(ids=LOST)] == ["deleted"] * 2
    assert not any(stage.slices & lost.places for stage in store.manifest().stages)
    checked(store)
    assert verify(store).ok


def test_another_machine_keeps_the_tombstones_that_are_lost_here(lost, tmp_path):
    lost.store.accept_loss()
    lost.store.export_state(tmp_path / "without")
    there = S3TStore(lost.store.path, KEY, tmp_path / "there")
    there.import_state(lost.newest)
    there.import_state(tmp_path / "without")
    assert len(tombstones_of(there)["id"]) == 3
    there.export_state(tmp_path / "whole")
    here = S3TStore(lost.store.path)
    here.import_state(tmp_path / "whole")
    here.export_state(tmp_path / "here")
    there.import_state(tmp_path / "here")
    assert tombstones_of(here) == tombstones_of(there)
    for store in (here, there):
        with store.writing():
            checked(store)
    again = index_of(here), here.manifest()
    here.import_state(lost.newest)
    assert (index_of(here), here.manifest()) == again, "once is enough"


def test_what_is_lost_is_an_event_without_names(lost):
    lost.store.accept_loss()
    with lost.store.reading() as state:
        log = state.log()
    published = {name: replace(event, receipts=()) for name, event in lost.store.manifest().log.items()}
    assert log == published and all(event.receipts for event in lost.store.manifest().log.values())
    assert {name: log[name] for name in lost.names} == {n: Event(at, named=False) for n, at in lost.names.items()}
    assert log[lost.known].named


# ---- a training goes on ----


def test_train_goes_on(tmp_path):
    rows = models.llama_rows(24)
    path = tmp_path / "out"
    trainer = trained_stores.make_trainer(str(path), rows, num_shards=2, num_slices=2)
    trainer.train()
    store = S3TStore(path)
    store.export_state(tmp_path / "old")
    name = rows["id"][3]
    gone = store.locate(ids=[name])[0].places
    store.delete(ids=[name])
    os.remove(store.database)
    store.import_state(tmp_path / "old")
    left = rows.filter(lambda row: row["id"] != name)
    with pytest.raises(StateError, match="accept-loss"):
        trained_stores.make_trainer(str(path), left, num_shards=2, num_slices=2).train()
    assert store.accept_loss().places == gone
    trained_stores.make_trainer(str(path), left, num_shards=2, num_slices=2).train()
    scratch = trained_stores.train_store(tmp_path / "scratch", left, num_shards=2, num_slices=2)
    assert store.manifest().stages == S3TStore(scratch).manifest().stages, "as if it had never been there"
    assert verify(store).ok and store.locate(ids=[name])[0].found == "unknown"


# ---- the command line ----


def test_the_command_line(lost):
    dry = plain(run("state", "accept-loss", lost.store.path, "--dry-run").stdout)
    assert all(name in dry for name in lost.names) and "Nothing was changed yet" in dry and plain(WARNING) in dry
    (outcome,) = outcomes("state", "accept-loss", lost.store.path, "--reference", "INCIDENT-7")
    assert outcome["result"]["receipt"]["reference"] == "INCIDENT-7"
    assert set(outcome["result"]["deletions"]) == lost.names.keys()
    assert outcomes("state", "accept-loss", lost.store.path)[0]["result"]["deletions"] == {}


# ---- a repository ----


def lose_and_accept(path: str, backup: str) -> dict[str, Any]:
    """A public repository, in which no tombstones travel: its state misses a deletion that was made there."""
    store = make_store(Path(path))
    store.push("owner/m", private=False)
    private = store.private
    store.export_state(backup)
    store = S3TStore("owner/m", state=private)
    store.delete(ids=["row-3"])
    store.database.unlink()
    S3TStore("owner/m", state=private).import_state(backup)
    store = S3TStore("owner/m", state=private)
    before, loss = len(store.manifest().stages), store.accept_loss()
    with store.writing():
        checked(store)
    assert verify(path).ok and len(store.manifest().stages) == before
    assert loss.receipt is not None
    return {"lost": len(loss.deletions), "history": loss.receipt.still_served_at, "log": sorted(store.manifest().log)}


def test_of_a_repository_the_head_is_right_and_the_history_is_named(server, machine, tmp_path):
    found = machine(lose_and_accept, path=tmp_path / "out", backup=tmp_path / "old")
    assert found["lost"] == 1 and found["history"], "what the deletion removed is in the history until a purge"
    repository = server.repository("owner/m")
    titles = [commit["title"] for commit in repository.log()]
    assert len(found["log"]) == 2 and len(titles) == 4 and titles[0].startswith("Deletions up to 2"), titles
