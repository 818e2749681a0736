"""A deletion that is killed at any instant: no reader serves what it covers, and the next writer completes it.

Every change of the disk (a rename, a removal, a flush, the creation of a folder) is an instant to be killed at, once
right before it and once right after it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest

from hf_s3t import Plan, S3TStore, Stage, StoreError
from hf_s3t.serving.loading import read_members
from hf_s3t.store import deletion
from hf_s3t.store.database import StateDatabase
from hf_s3t.store.receipts import read_receipts
from stores import PASSING, Known, make_store, stage_folders, without_receipts

CHANGES = ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir")


class Killed(BaseException):
    """Like a kill: nothing that catches errors catches it."""


class Disk:
    """Counts the changes of the disk, and kills at one of them.

    Args:
        instant: half a change: `2 * n` is right before change `n`, `2 * n + 1` right after it. `None`: never.
        watch: called at every instant.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, instant: int | None = None, watch: Callable = lambda: None):
        self.instants, self.instant, self.watch, self.on = 0, instant, watch, True
        for name in CHANGES:
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))
        monkeypatch.setattr(StateDatabase, "commit", self._watched(StateDatabase.commit))
        # Otherwise it removes whole trees in C, relative to a descriptor.
        monkeypatch.setattr(shutil, "rmtree", self._rmtree)

    def _watched(self, change: Callable) -> Callable:
        def watched(*args, **kwargs):
            if str(args[0]).endswith(PASSING):
                return change(*args, **kwargs)
            self._pass()
            result = change(*args, **kwargs)
            self._pass()
            return result

        return watched

    def _pass(self) -> None:
        if not self.on:
            return
        self.on = False
        try:
            self.watch()
        finally:
            self.on = True
        if self.instants == self.instant:
            self.on = False
            raise Killed
        self.instants += 1

    def _rmtree(self, path) -> None:
        for folder, _, files in os.walk(path, topdown=False):
            for name in files:
                os.unlink(os.path.join(folder, name))
            os.rmdir(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "out"
    plan = Plan.make(2, 2, [(0, 1), (1, 0)], prune=False)
    store = make_store(path, plan=plan, group_column="person")
    store.delete(ids=["row-47"])  # there are a state and receipts of an earlier one
    running = store.private / "running"
    for name in ("shard-00_0-1", "shard-01_0"):
        (running / name / "checkpoint-3").mkdir(parents=True)
        (running / name / "checkpoint-3" / "optimizer.pt").write_bytes(b"x")
    return path, Known.of(store)


@pytest.fixture(autouse=True)
def same_names(monkeypatch) -> None:
    """Receipts are named at random, and tombstones name their receipt."""
    monkeypatch.setattr(deletion, "receipt_name", lambda: "receipt-of-the-test")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch) -> None:
    """A flush stays an instant to be killed at. It changes nothing for a kill of the process, and takes most time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def fresh(made, tmp_path) -> S3TStore:
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    return S3TStore(shutil.copytree(made[0], tmp_path / "out"))


def instants(act: Callable[[S3TStore], object], made, tmp_path) -> int:
    store = fresh(made, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        act(store)
        disk.on = False
    return disk.instants


def killed_at(act: Callable[[S3TStore], object], made, tmp_path, step: int = 1) -> Iterator[S3TStore]:
    """The store as each kill leaves it."""
    for instant in range(0, instants(act, made, tmp_path), step):
        store = fresh(made, tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, instant)
            with pytest.raises(Killed):
                act(store)
        yield S3TStore(store.path)


def begun(store: S3TStore) -> bool:
    """Whether the deletion under test can no longer be undone."""
    return bool(store.intents()) or any(r["receipt"] == "receipt-of-the-test" for r in read_receipts(store))


def assert_not_served(store: S3TStore, place: tuple[int, int]) -> None:
    """What every kind of reader is given holds nothing of a slice."""
    hit = [stage for stage in store.manifest().plan.stages if place in stage.slices]
    assert not set(store.live().stages) & set(hit)
    assert not any(Stage(shard, prefix) in hit for shard, prefix in store.served().items())
    status = store.status()
    assert {stage.name for stage in hit} <= set(status.missing)
    assert all(place not in Stage.from_name(name).slices for name in status.served)
    for stage in hit:
        with pytest.raises(StoreError):
            store.assemble(stage.shard, stage.prefix)
        with pytest.raises(StoreError):
            store.read_stage(stage)
    members = read_members(store)
    expected = {f"shard-{shard:02d}": store.assemble(shard, prefix) for shard, prefix in store.served().items()}
    assert {name: adapter.config for name, adapter in members.items()} == {n: a.config for n, a in expected.items()}


def test_a_deletion_killed_at_any_instant_is_completed_by_the_next_writer(made, tmp_path):
    name = made[1].at(0, 1)[0]

    def act(store):
        store.delete(ids=[name], reference="the test")

    whole = fresh(made, tmp_path)
    before = without_receipts(whole.path)
    act(whole)
    after, receipts = without_receipts(whole.path), len(read_receipts(whole))
    kills, undone = 0, 0
    for store in killed_at(act, made, tmp_path):
        kills += 1
        was_begun = begun(store)
        if was_begun:
            assert_not_served(store, (0, 1))
            assert store.status().interrupted_deletions == len(store.intents())
        with store.writing():
            pass
        found = without_receipts(store.path)
        if not was_begun:
            undone += 1
            assert found == before
            act(store)
            found = without_receipts(store.path)
        assert found == after
        assert len(read_receipts(store)) == receipts and store.status().interrupted_deletions == 0
        last = read_receipts(store)[-1]
        assert last["reference"] == "the test"
        assert store.manifest().log[last["receipt"]].receipts == (last["digest"],)
    assert kills > 60 and 0 < undone < 12


def test_a_completion_that_is_killed_too_is_completed_by_the_one_after(made, tmp_path):
    name = made[1].at(0, 1)[0]
    store = fresh(made, tmp_path)
    store.delete(ids=[name])
    after = without_receipts(store.path)
    # The intent is written and nothing else is done.
    store = fresh(made, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deletion, "carry_out", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            store.delete(ids=[name])
    interrupted = shutil.copytree(store.path, tmp_path / "interrupted")

    def act(store):
        with store.writing():
            pass

    for store in killed_at(act, (interrupted,), tmp_path, step=3):
        assert_not_served(store, (0, 1))
        act(store)
        assert without_receipts(store.path) == after


def test_at_no_instant_of_a_deletion_does_a_reader_get_what_it_covers(made, tmp_path, monkeypatch):
    store, looks = fresh(made, tmp_path), []

    def watch():
        reader = S3TStore(store.path)
        if begun(reader):
            looks.append(1)
            assert_not_served(reader, (0, 1))

    disk = Disk(monkeypatch, watch=watch)
    store.delete(ids=[made[1].at(0, 1)[0]])
    disk.on = False
    assert len(looks) > 50


def test_whoever_comes_next_completes_it_whatever_they_want(made, tmp_path):
    def interrupted() -> S3TStore:
        store = fresh(made, tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deletion, "carry_out", lambda *args: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                store.delete(ids=[made[1].at(0, 1)[0]])
        return S3TStore(store.path)

    wanted = {
        "delete": lambda store: store.delete(ids=[made[1].at(1, 0)[0]]),
        "unknown": lambda store: store.delete(ids=["nobody"], missing_ok=True),
        "readmit": lambda store: store.readmit(ids=[made[1].at(0, 1)[0]]),
        "export": lambda store: store.export(tmp_path / "copy"),
        "export state": lambda store: store.export_state(tmp_path / "state.json"),
    }
    for want in wanted.values():
        store = interrupted()
        assert (0, 1) in {place for intent in store.intents() for place in intent["places"]}
        want(store)
        assert not store.intents()
        assert not any((0, 1) in Stage.from_name(folder).slices for folder in stage_folders(store.path))


def test_a_readmission_killed_at_any_instant_is_done_or_not(made, tmp_path):
    def act(store):
        store.readmit(ids=["row-47"])

    whole = fresh(made, tmp_path)
    before = without_receipts(whole.path)
    act(whole)
    after = without_receipts(whole.path)
    seen = set()
    for store in killed_at(act, made, tmp_path, step=3):
        with store.writing():
            pass
        found = without_receipts(store.path)
        assert found in (before, after)
        seen.add(found == after)
    assert seen == {True, False}


def test_running_checkpoints_of_a_hit_stage_go_and_others_stay(made, tmp_path):
    store = fresh(made, tmp_path)
    store.delete(slices=[(0, 1)])
    assert [folder.name for folder in (store.private / "running").iterdir()] == ["shard-01_0"]
