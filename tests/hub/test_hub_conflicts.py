"""Several machines and one repository: whoever comes second, whatever is lost on the way, what was deleted is gone."""

import errno
import itertools
import json
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hf_s3t import Plan, S3TStore, Stage
from hf_s3t.cli import hub as cli_hub
from hf_s3t.store.audit import verify
from hf_s3t.store.partition import examples_digest, keyed_digest
from hf_s3t.store.receipts import read_receipts
from machines import Died, Failed
from models import llama_rows
from stores import Known, examples_of, index_of, make_store, stage_adapter, state_of, tombstones_of
from trainers import ROWS, artefacts, make_trainer

pytest_plugins = ["hub_fixtures"]


@pytest.fixture
def pair(new_machine):
    return new_machine(), new_machine()


# What machines are told


def make(path):
    """A store of one shard and two slices: stages 0, 0-1, 1, 1-0."""
    make_store(Path(path), plan=Plan.make(1, 2, [(0, 1), (1, 0)], prune=False))


def push(path, repo="owner/m", **how):
    return S3TStore(path).push(repo, **how).oid


def pull(path):
    S3TStore(path).pull("owner/m")


def delete(path, **request):
    return S3TStore(path).delete(**request).to_json()


def delete_there(state, **request):
    request["slices"] = [tuple(place) for place in request.get("slices", ())]
    return S3TStore("owner/m", state=state).delete(**request).to_json()


def delete_impatiently(state, **request):
    """Tries as often as ever, with shorter pauses in between."""
    from hf_s3t.store import sources

    assert sources.LONGEST_WAIT > 0
    sources.LONGEST_WAIT = 0.01
    return delete_there(state, **request)


def locate(path, ids):
    return [found.found for found in S3TStore(path).locate(ids=ids)]


def readmit(path, **request):
    return S3TStore(path).readmit(**request).to_json()


def begun(path, deletion):
    """Reads the head, waits until another has committed, and goes on."""
    from hf_s3t.hub.repo import HubRepo

    commit = HubRepo.commit

    def late(self, *args, **kwargs):
        HubRepo.commit = commit
        Path(path, "..", "reached").touch()
        while not Path(path, "..", "go").exists():
            time.sleep(0.01)
        return commit(self, *args, **kwargs)

    HubRepo.commit = late
    return delete_there(f"{path}/.s3t", ids=[deletion]) if deletion else push(path)


def repair(path):
    """Trains what is missing, on the examples that are left: what a stage holds says which."""
    store = S3TStore(path)
    with store.writing():
        manifest = store.manifest()
        stages = dict(manifest.stages)
        for stage in manifest.plan.missing(manifest.stages):
            seen = sorted(digest for digest, entry in index_of(store).items() if entry[:2] in stage.slices)
            adapter = stage_adapter(stage)
            for tensor in adapter.tensors.values():
                tensor += random.Random("".join(seen)).random()
            stages[stage] = store.write_stage(stage, adapter)
        store.write_manifest(store.write_root(replace(manifest, stages=stages)))
        with store.changing() as state:
            for stage in stages:
                if state.record(stage.name) is None:
                    seen = examples_of(stage, index_of(store))
                    known = {"examples": len(seen), "data": examples_digest(seen)}
                    state.write_record(stage.name, {"generation": state.generation, **known, "steps": 1})


def dies(path, when, name):
    """A deletion whose process ends before the commit, right after it, or before the receipt is written."""
    from huggingface_hub import HfApi

    from hf_s3t.store import deletion

    commit = HfApi.create_commit

    def struck(*args, **kwargs):
        if when == "after the commit":
            commit(*args, **kwargs)
        os._exit(9)

    if when == "before the receipt":
        deletion.append_receipt = struck
    else:
        HfApi.create_commit = struck
    return delete_there(f"{path}/.s3t", ids=[name])


def train(path):
    make_trainer(path).train()
    return artefacts(path)


def train_first(path, **how):
    make_trainer(path).train()
    return push(path, **how)


def broken(path):
    """What an audit finds wrong with what the store knows of deletions."""
    report = verify(Path(path))
    return [f for check in report.checks for f in check.broken if "examples" not in check.name]


# What is looked at


def manifest_of(server):
    repository = server.repository("owner/m")
    return json.loads(repository.read(repository.entries("main")["s3t.json"]))


def stages_of(server):
    manifest, folders = manifest_of(server), server.repository("owner/m").entries("main")
    found = {path for path, entry in folders.items() if entry.folder and path.count("/") == 1}
    assert found == set(manifest["stages"])
    return found


def with_slice(number, stages):
    return {name for name in stages if number in Stage.from_name(name).prefix}


@pytest.fixture
def stores(server, pair, tmp_path):
    """Two machines with a copy of one store each, which is also pushed; and an example of each slice."""
    a, b = pair
    a(make, path=tmp_path / "a/out")
    b(make, path=tmp_path / "b/out")
    known = Known.of(S3TStore(tmp_path / "a/out"))
    return a, b, tmp_path / "a/out", tmp_path / "b/out", known


# Two at once


def test_two_that_delete_at_once_both_delete(server, stores):
    a, b, at_a, at_b, known = stores
    a(push, path=at_a)
    a.begin(begun, path=at_a, deletion=known.at(0, 0)[0])
    while not (at_a.parent / "reached").exists():
        time.sleep(0.01)
    b(delete_there, state=at_b / ".s3t", ids=[known.at(0, 1)[0]])
    (at_a.parent / "go").touch()
    assert a.end()["status"] == "inactive_at_head"
    assert manifest_of(server)["generation"] == 2 and stages_of(server) == set()
    titles = [row["title"].split()[0] for row in server.repository("owner/m").log()]
    assert titles == ["Deletion", "Deletion", "Generation", "initial"]
    assert len(tombstones_of(S3TStore(at_a))["id"]) == 2


@pytest.mark.brief("True")
@pytest.mark.parametrize("private", [True, False])
def test_a_push_that_a_deletion_overtakes_does_not_bring_a_stage_back(server, stores, private):
    a, b, at_a, at_b, known = stores
    b(push, path=at_b, private=private)
    a(forget_one, path=at_a)
    a(repair, path=at_a)  # now it has a stage to push, made from all examples
    a.begin(begun, path=at_a, deletion=None)
    while not (at_a.parent / "reached").exists():
        time.sleep(0.01)
    b(delete_there, state=at_b / ".s3t", ids=[known.at(0, 0)[0]])
    (at_a.parent / "go").touch()
    if private:
        a.end()
        pull_and_check(a, at_a, 0)
    else:
        with pytest.raises(Failed, match="StateError: owner/m obeys deletions"):
            a.end()
    assert stages_of(server) == {"shard-00/1"} and manifest_of(server)["generation"] == 1


def pull_and_check(machine, path, number):
    machine(pull, path=path)
    assert not with_slice(number, json.loads((path / "s3t.json").read_text())["stages"])
    assert machine(broken, path=path) == []


def forget_one(path):
    """As if one stage had never been trained; it is trained with another seed then."""
    store = S3TStore(path)
    with store.writing():
        manifest = store.manifest()
        manifest = manifest.without([stage for stage in manifest.stages if stage.name == "shard-00/0-1"])
        store.write_manifest(store.write_root(manifest))


@pytest.mark.slow
def test_a_machine_that_deleted_more_often_still_obeys_the_others(server, stores):
    """What counts is which deletions were seen, not how many."""
    a, b, at_a, at_b, known = stores
    a(push, path=at_a)
    a(delete, path=at_a, ids=[known.at(0, 0)[0]])
    a(push, path=at_a)
    for name in known.at(0, 1)[:3]:
        b(delete, path=at_b, ids=[name])
    b(repair, path=at_b)
    b(push, path=at_b)
    assert stages_of(server) == {"shard-00/1"}
    pull_and_check(a, at_a, 0)
    for path in (at_a, at_b):
        assert json.loads((path / "s3t.json").read_text())["generation"] == manifest_of(server)["generation"]
        assert len(tombstones_of(S3TStore(path))["id"]) == 4


def test_what_was_repaired_is_not_lost_when_deletions_meet(server, stores):
    a, b, at_a, at_b, known = stores
    a(push, path=at_a)
    a(delete, path=at_a, ids=[known.at(0, 0)[0]])
    a(repair, path=at_a)
    a(push, path=at_a)
    b(delete, path=at_b, ids=[known.at(0, 0)[1]])
    b(delete, path=at_b, ids=[known.at(0, 1)[1]])
    b(repair, path=at_b)
    b(push, path=at_b)
    assert stages_of(server) == {"shard-00/1"}  # B made it without the examples of B, and A deleted none of slice 1
    a(pull, path=at_a)
    a(repair, path=at_a)
    a(push, path=at_a)
    assert len(stages_of(server)) == 4
    b(pull, path=at_b)
    assert b(push, path=at_b) == server.repository("owner/m").resolve("main")
    assert len(stages_of(server)) == 4 and a(broken, path=at_a) == b(broken, path=at_b) == []


@pytest.mark.slow
@pytest.mark.parametrize("private", [True, False])
def test_what_was_readmitted_can_be_pushed(server, stores, private):
    a, _, at_a, _, known = stores
    name = known.at(0, 0)[0]
    a(push, path=at_a, private=private)
    a(delete, path=at_a, ids=[name])
    a(push, path=at_a)
    a(readmit, path=at_a, ids=[name])
    a(push, path=at_a)
    a(repair, path=at_a)
    a(push, path=at_a)
    assert len(stages_of(server)) == 4
    a(delete, path=at_a, ids=[known.at(0, 1)[0]])
    a(push, path=at_a)
    assert stages_of(server) == {"shard-00/0"}


def test_deletions_from_whole_slices_without_a_state_are_not_undone_by_a_push(server, stores, tmp_path):
    a, b, at_a, at_b, known = stores
    a(push, path=at_a)
    b(delete_there, state=tmp_path / "no state", slices=[(0, 0)])
    a(delete, path=at_a, ids=[known.at(0, 1)[0]])
    a(push, path=at_a)
    assert stages_of(server) == set()
    assert a(locate, path=at_a, ids=[known.at(0, 0)[0]]) == ["deleted"]  # whoever has the index makes the tombstones
    a(repair, path=at_a)
    a(push, path=at_a)
    assert len(stages_of(server)) == 4 and a(broken, path=at_a) == []


def test_what_was_deleted_and_readmitted_before_a_push_is_gone_after_it(server, stores):
    a, b, at_a, at_b, known = stores
    name = known.at(0, 0)[0]
    a(push, path=at_a)
    a(delete, path=at_a, ids=[name])
    a(readmit, path=at_a, ids=[name])
    a(push, path=at_a)
    assert stages_of(server) == {"shard-00/1"}
    b(pull, path=at_b)
    assert not with_slice(0, (f"shard-00/{path.name}" for path in at_b.glob("shard-00/*")))


def test_an_older_head_that_somebody_puts_back_makes_nobody_forget(server, stores):
    a, b, at_a, at_b, known = stores
    name, repository = known.at(0, 0)[0], server.repository
    a(push, path=at_a)
    old = repository("owner/m").entries("main")
    a(delete_there, state=at_a / ".s3t", ids=[name])
    b(pull, path=at_b)
    assert b(locate, path=at_b, ids=[name]) == ["deleted"]
    files = {path: repository("owner/m").read(entry) for path, entry in old.items() if not entry.folder}
    head = repository("owner/m").resolve("main")
    repository("owner/m").commit("refs/heads/main", head, "mallory", "back", files)
    b(pull, path=at_b)
    assert b(locate, path=at_b, ids=[name]) == ["deleted"]
    assert not with_slice(0, (f"shard-00/{path.name}" for path in at_b.glob("shard-00/*")))
    b(push, path=at_b)
    assert stages_of(server) == {"shard-00/1"}


def test_a_pull_without_the_key_keeps_what_is_live(stores, monkeypatch):
    a, _, at_a, _, known = stores
    a(push, path=at_a)
    a(delete, path=at_a, ids=[known.at(0, 0)[0]])
    a(repair, path=at_a)
    (at_a / ".s3t/partition.key").rename(at_a.parent / "key")
    a(pull, path=at_a)
    assert len(list(at_a.glob("shard-00/*"))) == 4


def test_a_disk_that_is_full_in_a_pull_leaves_what_can_be_served(stores):
    """Also where another stage of the same name is pulled: trained apart, from the same state."""
    a, b, at_a, at_b, _ = stores
    b(forget_one, path=at_b)
    b(repair, path=at_b)
    b(push, path=at_b)
    for room in itertools.count():
        copy = at_a.parent / f"room for {room}"
        shutil.copytree(at_a, copy)
        try:
            a(pull_until_full, path=copy, room=room)
            break
        except Failed as error:
            assert "No space left" in error.message
        store = S3TStore(copy)
        for stage in store.manifest().stages:
            store.read_stage(stage)
        a(pull, path=copy)
        assert S3TStore(copy).manifest().stages == S3TStore(at_b).manifest().stages and a(broken, path=copy) == []
    assert room > 5


def pull_until_full(path, room):
    """A pull that can write so many files."""
    written = os.fsync

    def full(descriptor):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(descriptor)

    os.fsync = full
    pull(path)


def test_an_open_deletion_of_a_repository_is_obeyed_in_the_folder_of_its_state(server, pair, tmp_path):
    """The repository may never be there again: the folder trains and is pushed all the same, without the example."""
    a, _ = pair
    at_a = tmp_path / "a/out"
    a(train_first, path=at_a)
    name = Known.of(S3TStore(at_a), list(llama_rows(ROWS))).at(0, 0)[0]
    with pytest.raises(Died):
        a(dies, path=at_a, when="before the commit", name=name)
    assert a(train, path=at_a) == a(train_without, path=tmp_path / "scratch", name=name)
    assert len(S3TStore(at_a).live().stages) == 2
    a(push, path=at_a, repo="owner/other")
    assert len(list((at_a / ".s3t/intents").iterdir())) == 1
    assert a(delete_there, state=at_a / ".s3t", ids=[name])["status"] == "unchanged"
    assert not list((at_a / ".s3t/intents").iterdir()) and not with_slice(0, stages_of(server))
    assert len(S3TStore(at_a).live().stages) == 2 and a(broken, path=at_a) == []


def test_an_imported_state_is_obeyed_by_a_pull_into_a_new_folder(server, stores, tmp_path):
    """Also where the head has not the deletion yet."""
    a, b, at_a, at_b, known = stores
    a(push, path=at_a)
    name = known.at(0, 0)[0]
    a(delete, path=at_a, ids=[name])
    new = tmp_path / "new/out"
    new.parent.mkdir()
    b(bring, path=new, source=at_a)
    b(pull, path=new)
    store = S3TStore(new)
    assert not with_slice(0, (stage.name for stage in store.manifest().stages))
    assert store.locate(ids=[name])[0].found == "deleted" and b(broken, path=new) == []


def test_tombstones_travel_on_when_somebody_deletes_without_a_state(server, pair, tmp_path):
    a, b = pair
    at_a, at_b = tmp_path / "a/out", tmp_path / "b/out"
    for machine, path in ((a, at_a), (b, at_b)):
        machine(make_three, path=path)
    known = Known.of(S3TStore(at_a))
    first, second = known.at(0, 0)[0], known.at(0, 1)[0]
    a(push, path=at_a)
    a(delete, path=at_a, ids=[first])
    a(push, path=at_a)
    a(delete_there, state=tmp_path / "no state", slices=[(0, 2)])
    b(delete_there, state=at_b / ".s3t", ids=[second])
    for machine, path in ((a, at_a), (b, at_b), (a, at_a)):
        machine(pull, path=path)
        machine(push, path=path)
    for machine, path in ((a, at_a), (b, at_b)):
        assert machine(locate, path=path, ids=[first, second, known.at(0, 2)[0]]) == ["deleted"] * 3
        assert machine(broken, path=path) == []
    assert state_of(S3TStore(at_a))[1] == state_of(S3TStore(at_b))[1]


def make_three(path):
    make_store(Path(path), plan=Plan.make(1, 3, [(0, 1, 2), (1, 2, 0), (2, 0, 1)], prune=False))


def test_examples_of_a_deleted_slice_that_others_never_had_stay_buried(stores, tmp_path):
    a, b, at_a, at_b, known = stores
    name = known.at(0, 0)[0]
    b(never_had, path=at_b, name=name)
    a(push, path=at_a)
    a(delete_there, state=tmp_path / "no state", slices=[(0, 0)])
    a(pull, path=at_a)
    for machine, path in ((b, at_b), (a, at_a), (b, at_b), (a, at_a)):
        machine(pull, path=path)
        machine(push, path=path)
        assert machine(broken, path=path) == []
    assert a(locate, path=at_a, ids=[name]) == b(locate, path=at_b, ids=[name]) == ["deleted"]


def never_had(path, name):
    store = S3TStore(path)
    with store.writing():
        digest = keyed_digest(store.key, "id", name)
        with store.changing() as state:
            state.remove_examples([digest])


def test_what_the_head_had_lost_already_is_still_to_be_purged(server, stores):
    """Two examples of one slice, deleted by two machines: the history still serves what saw the second one."""
    a, b, at_a, at_b, known = stores
    first, second = known.at(0, 0)[:2]
    a(push, path=at_a)
    a(delete_there, state=at_a / ".s3t", ids=[first])
    receipt = b(delete_there, state=at_b / ".s3t", ids=[second])
    assert receipt["still_served_at"] and receipt["stages_removed"] == {}
    (names,) = b(unpurged, state=at_b / ".s3t").values()
    assert len(names) == 2 and receipt["receipt"] in names  # and what the other machine deleted
    assert b(purge_there, state=at_b / ".s3t") == [receipt["receipt"]]
    assert b(unpurged, state=at_b / ".s3t") == {}


def unpurged(state):
    return cli_hub.unpurged_of(S3TStore("owner/m", state=state))


# What is lost on the way

# What is lost on the way


def test_a_commit_whose_answer_is_lost_is_not_made_twice(server, stores):
    a, _, at_a, _, known = stores
    server.faults.commit_503_after_apply = 1
    a(push, path=at_a)
    server.faults.commit_503_after_apply = 1
    receipt = a(delete_there, state=at_a / ".s3t", ids=[known.at(0, 0)[0]])
    assert receipt["status"] == "inactive_at_head" and receipt["generation"] == 1
    assert len(server.repository("owner/m").log()) == 3 and stages_of(server) == {"shard-00/1"}


def test_conflicts_are_tried_again_and_not_for_ever(server, stores):
    a, _, at_a, _, known = stores
    server.faults.fail_commits_412 = 2
    a(push, path=at_a)
    server.faults.fail_commits_412 = 2
    a(delete_there, state=at_a / ".s3t", ids=[known.at(0, 0)[0]])
    assert stages_of(server) == {"shard-00/1"}
    server.faults.fail_commits_412 = 1000
    with pytest.raises(Failed, match="StoreError: .*somebody else committed first"):
        a(delete_impatiently, state=at_a / ".s3t", ids=[known.at(0, 1)[0]])
    server.faults.fail_commits_412 = 0
    assert a(delete_there, state=at_a / ".s3t", ids=[known.at(0, 1)[0]])["status"] == "unchanged"
    assert stages_of(server) == set()


def test_a_head_that_is_shown_late_is_asked_for_again(server, stores):
    a, b, at_a, at_b, known = stores
    a(push, path=at_a)
    server.faults.stale_main = 6
    server.repository("owner/m").squash("main", "squashed")
    b(delete_there, state=at_b / ".s3t", ids=[known.at(0, 0)[0]])
    assert stages_of(server) == {"shard-00/1"}


@pytest.mark.brief("before the commit", "after the commit")
@pytest.mark.parametrize("when", ["before the commit", "after the commit", "before the receipt"])
def test_a_deletion_that_was_killed_ends_with_the_next_command(server, stores, when):
    a, b, at_a, _, known = stores
    name = known.at(0, 0)[0]
    a(push, path=at_a)
    with pytest.raises(Died):
        a(dies, path=at_a, when=when, name=name)
    assert len(server.repository("owner/m").log()) == (2 if when == "before the commit" else 3)
    again = b(delete_there, state=at_a / ".s3t", ids=[name])
    assert again["status"] == "unchanged" and again["already_deleted"] == 1
    assert len(server.repository("owner/m").log()) == 3 and stages_of(server) == {"shard-00/1"}
    receipts = read_receipts(S3TStore(at_a))
    assert [receipt["status"] for receipt in receipts] == ["inactive_at_head", "unchanged"]
    assert receipts[0]["generation"] == manifest_of(server)["generation"] == 1
    assert not list((at_a / ".s3t/intents").iterdir())
    assert a(push, path=at_a) == server.repository("owner/m").resolve("main")


def test_what_somebody_else_deleted_is_pending_until_their_purge(server, stores):
    a, b, at_a, at_b, known = stores
    name = known.at(0, 0)[0]
    a(push, path=at_a)
    old = server.repository("owner/m").resolve("main")
    a(delete_there, state=at_a / ".s3t", ids=[name])
    for _ in range(2):
        again = b(delete_there, state=at_b / ".s3t", ids=[name])
        assert (again["status"], again["still_served_at"]) == ("unchanged", [old])
        a(pull, path=at_a)
        a(repair, path=at_a)  # what is live again is none of it
        a(push, path=at_a)
    a(purge_there, state=at_a / ".s3t")
    assert b(delete_there, state=at_b / ".s3t", ids=[name])["still_served_at"] == []


def purge_there(state):
    return S3TStore("owner/m", state=state).purge(seconds=30).receipts


def test_a_readmission_of_a_repository_says_what_it_is(stores):
    a, _, at_a, _, known = stores
    name = known.at(0, 0)[0]
    a(push, path=at_a)
    a(delete_there, state=at_a / ".s3t", ids=[name])
    assert a(readmit_there, state=at_a / ".s3t", ids=[name])["status"] == "readmitted"


def readmit_there(state, **request):
    return S3TStore("owner/m", state=state).readmit(**request).to_json()


def test_a_deletion_of_a_repository_is_obeyed_in_the_folder_of_its_state(server, stores):
    a, _, at_a, _, known = stores
    a(push, path=at_a)
    a(delete_there, state=at_a / ".s3t", ids=[known.at(0, 0)[0]])
    assert [path.name for path in at_a.glob("shard-00/*")] == ["1"]
    assert len(S3TStore(at_a).manifest().log) == state_of(S3TStore(at_a))[0]


def test_a_deletion_of_a_repository_that_was_killed_is_not_ended_in_a_folder(server, stores):
    a, _, at_a, _, known = stores
    a(push, path=at_a)
    with pytest.raises(Died):
        a(dies, path=at_a, when="before the commit", name=known.at(0, 0)[0])
    a(delete, path=at_a, ids=[known.at(0, 1)[0]])
    assert len(list((at_a / ".s3t/intents").iterdir())) == 1 and S3TStore(at_a).served() == {}
    a(delete_there, state=at_a / ".s3t", ids=[known.at(0, 1)[0]])
    assert stages_of(server) == set() and not list((at_a / ".s3t/intents").iterdir())


# Promise 6


def test_a_row_that_was_deleted_elsewhere_is_not_trained_on(server, pair, tmp_path):
    a, b = pair
    at_a, at_b = tmp_path / "a/out", tmp_path / "b/out"
    a(train_first, path=at_a)
    b(train_first, path=at_b)
    name = Known.of(S3TStore(at_a), list(llama_rows(ROWS))).at(0, 0)[0]
    a(delete_there, state=at_a / ".s3t", ids=[name])
    b(pull, path=at_b)
    assert not list(at_b.glob("shard-00/0*"))
    found = b(train, path=at_b)
    assert found == a(train_without, path=tmp_path / "scratch", name=name)
    assert b(broken, path=at_b) == []
    b(push, path=at_b)
    assert len(stages_of(server)) == 2


def train_without(path, name):
    rows = llama_rows(ROWS).filter(lambda row: row["id"] != name)
    make_trainer(path, train_dataset=rows).train()
    return artefacts(path)


@pytest.mark.brief("True")
@pytest.mark.parametrize("also", [False, True])
def test_where_tombstones_do_not_travel_training_is_refused(server, pair, tmp_path, also):
    """Also where both deleted one: then the generations are alike."""
    a, b = pair
    at_a, at_b = tmp_path / "a/out", tmp_path / "b/out"
    a(train_first, path=at_a, private=False)
    b(train_first, path=at_b)
    names = Known.of(S3TStore(at_a), list(llama_rows(ROWS))).at(0, 0)
    a(delete_there, state=at_a / ".s3t", ids=[names[0]])
    if also:
        b(delete, path=at_b, ids=[names[1]])
    b(pull, path=at_b)
    with pytest.raises(Failed, match="StateError: .*state import"):
        b(train, path=at_b)
    with pytest.raises(Failed, match="StateError: owner/m obeys deletions"):
        b(push, path=at_b)
    assert not list(at_b.glob("shard-00/0*"))
    b(bring, path=at_b, source=at_a)  # the way out that the message names
    b(train, path=at_b)
    b(push, path=at_b)
    assert len(stages_of(server)) == 2 and b(broken, path=at_b) == []


def bring(path, source):
    backup = Path(path).parent / "backup.json"
    S3TStore(Path(source)).export_state(backup)
    S3TStore(Path(path)).import_state(backup)
