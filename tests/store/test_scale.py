"""What must not grow with the number of examples, shards or stages: it is counted here, never timed."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from helpers import stores
from hf_s3t import Plan, Stage
from hf_s3t.plan.sequences import cyclic
from hf_s3t.store.audit import verify
from hf_s3t.store.folder import StoreFolder
from hf_s3t.store.manifest import Manifest
from hf_s3t.store.partition import Entry


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """How often manifests are read, keys are checked and intents are looked for."""
    counted: Counter[str] = Counter()

    def count(owner: type, name: str, real) -> None:
        def counting(*args, **kwargs):
            counted[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, classmethod(counting) if owner is Manifest else counting)

    count(Manifest, "from_json", Manifest.from_json.__func__)
    count(StoreFolder, "intents", StoreFolder.intents)
    return counted


def test_many_ids_take_no_more_reading_than_one(tmp_path: Path, calls: Counter[str]):
    store = stores.make_store(tmp_path / "store")
    found = []
    for ids in (["row-1"], [f"row-{number}" for number in range(30)]):
        calls.clear()
        store.delete(ids=ids, dry_run=True)
        store.locate(ids=ids)
        found.append(dict(calls))
    assert found[0] == found[1] and found[0]["from_json"] > 0


def test_an_audit_of_many_examples_takes_no_more_reading_than_one_of_few(tmp_path: Path, calls: Counter[str]):
    found = []
    for number in (12, 60):
        store = stores.make_store(tmp_path / str(number), stores.people(number))
        calls.clear()
        assert verify(store).ok
        found.append(dict(calls))
    assert found[0] == found[1] and found[0]["from_json"] > 0


def test_open_deletions_are_looked_for_once_for_the_root_adapter(tmp_path: Path, calls: Counter[str]):
    for shards in (1, 4):
        store = stores.make_store(tmp_path / str(shards), plan=Plan.make(shards, 2, cyclic(2, 2), prune=False))
        manifest = store.manifest()
        calls.clear()
        assert store.assemble_root(manifest) is not None
        assert calls["intents"] == 1


def test_a_manifest_that_nothing_hits_is_not_gone_through(tmp_path: Path):
    manifest = stores.make_store(tmp_path / "store").manifest()
    assert manifest.untouched_by(set()) is manifest
    assert manifest.untouched_by({(0, 1)}).stages.keys() < manifest.stages.keys()


def test_nothing_but_an_audit_reads_the_files_of_all_stages(tmp_path: Path, caplog):
    store = stores.make_store(tmp_path / "store")
    manifest = store.manifest()
    asked = store.locate(ids=["row-1"])[0]
    after = manifest.untouched_by(set(asked.places))
    read = {above for end in (*manifest.served_ends, *after.served_ends) for above in end.path}
    unread = manifest.stages.keys() - read
    assert len(unread) > 3
    for stage in unread:
        shutil.rmtree(store.path / stage.name)
    assert store.status().trained == len(manifest.stages) == len(store.live().stages)
    assert store.marks() and len(asked.stages) > 0
    store.delete(ids=["row-1"], dry_run=True)
    receipt = store.delete(ids=["row-1"])
    assert set(receipt.stages_removed) == {stage.name for stage in manifest.stages.keys() - after.stages.keys()}
    assert store.has_root_of(store.manifest()) and store.manifest().root is not None
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    assert sum("is missing" in finding for check in verify(store).checks for finding in check.broken) >= 2


def test_examples_that_come_in_batches_find_their_person(tmp_path: Path):
    store = stores.make_store(tmp_path / "store", group_column="person")
    person = next(entry for entry in stores.index_of(store).values() if entry.group is not None)
    new, other = "f" * 32, "0" * 32
    with store.changing() as state:
        before = state.members(person.group)
        state.add_examples({new: person, other: Entry(*person[:2], "e" * 32, "1" * 32)})
        state.add_examples({"e" * 32: person._replace(group=None)})
    with store.reading() as state:
        assert state.members(person.group) == {**before, new: person}
        assert state.members("e" * 32) == {other: Entry(*person[:2], "e" * 32, "1" * 32)}
        assert state.entry("e" * 32) == person._replace(group=None)


def test_surviving_prefixes_of_a_shard_are_all_there():
    plan = Plan.make(1, 6, cyclic(6, 6), prune=False)
    ends = plan.surviving(stage for stage in plan.stages if stage.depth < 4)
    assert ends == {0: tuple(order[:3] for order in cyclic(6, 6))} and Stage(0, ends[0][0]).depth == 3
