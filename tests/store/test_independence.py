"""Deletions are independent: what keeps one from its end is told, and never stands in another's way."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hf_s3t import S3TStore
from hf_s3t.errors import UnfinishedDeletionError
from hf_s3t.store import deletion
from hf_s3t.store.audit import verify
from hf_s3t.store.database import StateDatabase
from hf_s3t.store.receipts import read_receipts
from stores import KEY, PASSING, Known, make_store, stage_folders, tree

NOBODY = 65534


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Known]:
    store = make_store(tmp_path_factory.mktemp("made") / "out")
    return store.path, Known.of(store)


@pytest.fixture
def store(made: tuple[Path, Known], tmp_path: Path) -> S3TStore:
    return S3TStore(shutil.copytree(made[0], tmp_path / "out"), KEY)


@pytest.fixture
def known(made: tuple[Path, Known]) -> Known:
    return made[1]


# ---- what cannot be removed ----


@contextmanager
def as_nobody() -> Iterator[None]:
    """As a user whom file modes bind, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def stuck(made: tuple[Path, Known]) -> Iterator[S3TStore]:
    """A store of which the files of one stage may not be removed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(made[0], Path(folder) / "out"))
        Path(folder).chmod(0o755)
        if os.geteuid() == 0:
            for file in (path, *path.rglob("*")):
                os.chown(file, NOBODY, NOBODY)
        (path / "shard-00/1").chmod(0o500)
        with as_nobody():
            yield S3TStore(path, KEY)
        (path / "shard-00").chmod(0o755)


def test_a_stage_that_cannot_be_removed_keeps_nobody_else_from_being_deleted(stuck, known, caplog):
    store, path = stuck, stuck.path
    with pytest.raises(UnfinishedDeletionError, match="not served any more, but is still on the disk") as error:
        store.delete(ids=[known.at(0, 1)[0]], reference="first")
    assert "Permission denied" in str(error.value) and (path / "shard-00/1").exists()
    assert store.status().interrupted_deletions == 1
    assert not any((0, 1) in stage.slices for stage in store.live().stages)
    receipt = store.delete(ids=[known.at(1, 0)[0]], reference="second")
    assert receipt.status == "inactive" and "cannot be finished" in caplog.text
    assert not any("shard-01" in name and "0" in name.split("/")[1] for name in stage_folders(path))
    assert [found.found for found in store.locate(ids=[known.at(0, 1)[0], known.at(1, 0)[0]])] == ["live", "deleted"]
    with pytest.raises(OSError, match="Permission denied"), store.writing():  # whoever trains or exports waits for it
        pass
    (path / "shard-00/1").chmod(0o700)
    with store.writing():
        pass
    assert not store.intents() and not (path / "shard-00/1").exists() and verify(store).ok
    assert [receipt["reference"] for receipt in read_receipts(store)] == ["second", "first"]


# ---- a full disk ----


def test_a_disk_that_stays_full_keeps_nobody_else_from_being_out_of_service(store, known, monkeypatch):
    """There is room for what begins a deletion, and none for the files that are published."""
    replace = os.replace

    def full(source: object, target: object) -> None:
        if ".s3t" not in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        for place in ((0, 1), (1, 0)):
            with pytest.raises(UnfinishedDeletionError, match="No space left"):
                store.delete(ids=[known.at(*place)[0]])
            assert not any(place in stage.slices for stage in store.live().stages)
    assert store.status().interrupted_deletions == 2
    with store.writing():
        pass
    assert not store.intents() and len(read_receipts(store)) == 2 and verify(store).ok

WRITES = ("replace", "fsync", "mkdir", "open")


class FullDisk:
    """The disk is full from some write on: what makes room still works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None):
        self.count, self.at = 0, at
        for owner, name in (*((os, name) for name in WRITES[:-1]), (StateDatabase, "commit")):
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, change):
        def watched(*args, **kwargs):
            if str(args[0]).endswith(PASSING):
                return change(*args, **kwargs)
            self.count += 1
            if self.at is not None and self.count > self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return change(*args, **kwargs)

        return watched


ACTS = {
    "delete": lambda store, known: store.delete(ids=[known.at(0, 1)[0]]),
    "readmit": lambda store, known: store.readmit(ids=["row-1"]),
    "export": lambda store, known: store.export(store.path.parent / "copy"),
    "export state": lambda store, known: store.export_state(store.path.parent / "backup"),
    "import state": lambda store, known: store.import_state(store.path.parent / "earlier"),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_full_disk_at_any_write_is_told_and_run_again_it_is_done(made, known, tmp_path, act):
    def fresh() -> S3TStore:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        store = S3TStore(shutil.copytree(made[0], tmp_path / "out"), KEY)
        store.delete(ids=["row-1"])
        return store

    fresh().export_state(tmp_path / "earlier")
    with pytest.MonkeyPatch.context() as patch:
        store = fresh()
        disk = FullDisk(patch, None)
        ACTS[act](store, known)
    tried, unfinished = 0, 0
    for at in range(0, disk.count, 1 if act in ("delete", "readmit") else 2):
        store, tried = fresh(), tried + 1
        with pytest.MonkeyPatch.context() as patch:
            FullDisk(patch, at)
            try:
                ACTS[act](store, known)
            except UnfinishedDeletionError as error:
                unfinished += 1
                assert "No space left" in str(error) and store._names_of_intents()
            except OSError:
                assert not store._names_of_intents()
            else:
                assert at == disk.count - 1  # only the folder of an intent that is gone could not be synced
                continue
            begun = bool(store._names_of_intents())
            if begun and act == "delete":
                assert not any((0, 1) in stage.slices for stage in store.live().stages)
        ACTS[act](store, known)
        assert not store.intents() and not list(store.path.rglob("*.tmp")) and verify(store).ok
    assert tried >= 3 and (unfinished > 3) == (act in ("delete", "readmit"))


def test_a_readmission_that_is_run_again_tells_that_it_is_done(store, monkeypatch):
    store.delete(ids=["row-1"])

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(deletion, "carry_out", full)
        with pytest.raises(UnfinishedDeletionError):
            store.readmit(ids=["row-1"], reference="consent")
    receipt = store.readmit(ids=["row-1"])
    assert (receipt.kind, receipt.reference) == ("readmit", "consent")
    assert store.locate(ids=["row-1"])[0].found == "unknown" and not store.intents()


def test_changed_rows_are_deleted_and_readmitted_in_one_step(store, known, monkeypatch):
    """Killed between two steps they would stay buried, and their new content would never be trained on."""
    changed, gone = sorted(known.index)[:2], sorted(known.index)[2:4]

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(deletion, "carry_out", killed)
        with pytest.raises(KeyboardInterrupt):
            store._delete({"digests": [*changed, *gone]}, renewed=changed)
    with store.writing():
        pass
    with store.reading() as state:
        assert state.buried()["id"] == set(gone)
        assert not any(state.has("id", digest) for digest in (*changed, *gone))
    assert len(read_receipts(store)) == 1


def test_a_database_that_may_only_be_read_is_told_and_can_be_asked(stuck):
    stuck.database.chmod(0o400)
    before = tree(stuck.path)
    assert stuck.locate(ids=["row-1"])[0].found == "live"
    with pytest.raises(UnfinishedDeletionError, match="cannot be opened or written .*readonly database.* Make it and"):
        stuck.delete(ids=["row-1"])
    after = tree(stuck.path)
    assert {n: d for n, d in after.items() if "intents" not in n} == before
    stuck.database.chmod(0o600)
    (stuck.path / "shard-00/1").chmod(0o700)
    with stuck.writing():
        pass
    assert stuck.locate(ids=["row-1"])[0].found in ("live", "deleted") and not stuck.intents()
