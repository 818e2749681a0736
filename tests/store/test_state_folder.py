"""The folder of the state: git commits nothing of it, and the key may be kept elsewhere."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from command_line import outcomes, run
from hf_s3t import S3TStore, StateError, StoreLockedError
from hf_s3t.store.audit import verify
from stores import KEY, make_store, tree


def committed(folder: os.PathLike[str]) -> list[str]:
    """What `git add --all` takes of a folder."""
    for command in (["init", "-q"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return subprocess.run(
        ["git", "ls-files"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.splitlines()


def test_git_commits_nothing_of_a_state(tmp_path):
    make_store(tmp_path / "out").delete(ids=["row-1"], reference="DSR-1")
    found = committed(tmp_path)
    assert "out/s3t.json" in found and not [name for name in found if ".s3t/" in name]


def test_a_state_from_before_gets_it_at_the_next_deletion(tmp_path):
    store = make_store(tmp_path / "out")
    ignored = store.private / ".gitignore"
    ignored.unlink()
    store.delete(ids=["row-1"])
    assert ignored.read_text() == "*\n" and verify(store).ok
    ignored.write_text("mine\n")
    store.delete(ids=["row-2"])
    assert ignored.read_text() == "mine\n"


def test_a_full_disk_keeps_no_deletion_waiting_for_it(tmp_path):
    store = make_store(tmp_path / "out")
    (store.private / ".gitignore").unlink()
    (store.private / "..gitignore.tmp").mkdir()  # so that it cannot be written
    assert store.delete(ids=["row-1"]).status == "inactive"


# ---- the key elsewhere ----


def names_of_key(folder: Path) -> list[str]:
    """Files below a folder that hold the key."""
    found = [path for path in folder.rglob("*") if path.is_file() and KEY.hex().encode() in path.read_bytes()]
    return [str(path.relative_to(folder)) for path in found]


def test_a_key_that_is_given_from_the_start_is_never_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_S3T_KEY", KEY.hex())
    store = make_store(tmp_path / "out", key=None)
    store.delete(ids=["row-1"])
    store.export_state(tmp_path / "backup")
    assert store.status().key == "given" and names_of_key(tmp_path) == []
    monkeypatch.delenv("HF_S3T_KEY")
    assert store.status().key == "not here"


def test_the_key_moves_out_of_the_state(tmp_path, monkeypatch):
    store = make_store(tmp_path / "out")
    store.delete(ids=["row-1"])
    assert store.status().key == "beside the state"
    os.umask(0)
    store.move_key(tmp_path / "key")
    assert names_of_key(tmp_path) == ["key"] and (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert store.status().key == "not here" and store.status().to_json()["key"] == "not here"
    with pytest.raises(StateError, match="has no partition key"):
        store.locate(ids=["row-1"])
    for given in (S3TStore(store.path, (tmp_path / "key").read_text().strip()), store):
        monkeypatch.setenv("HF_S3T_KEY", "" if given is not store else (tmp_path / "key").read_text().strip())
        assert given.status().key == "given" and given.locate(ids=["row-1"])[0].found == "deleted"
        assert verify(given).ok
    store.delete(ids=["row-2"])
    store.export_state(tmp_path / "backup")
    assert names_of_key(tmp_path) == ["key"]


def test_a_backup_that_has_the_key_does_not_put_it_back_where_it_is_given(tmp_path, monkeypatch):
    store = make_store(tmp_path / "out")
    store.export_state(tmp_path / "backup")
    store.move_key(tmp_path / "key")
    monkeypatch.setenv("HF_S3T_KEY", KEY.hex())
    store.import_state(tmp_path / "backup")
    assert store.status().key == "given"
    monkeypatch.delenv("HF_S3T_KEY")
    store.import_state(tmp_path / "backup")
    assert store.status().key == "beside the state" and store.locate(ids=["row-1"])[0].found == "live"


def test_where_the_key_does_not_go(tmp_path):
    store = make_store(tmp_path / "out")
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "into").symlink_to(store.private)
    before = tree(tmp_path)
    for file in ("there", "link", "out/key", "out/.s3t/key", "into/key", "nowhere/key"):
        with pytest.raises((ValueError, OSError), match="exists already|lies inside|No such file"):
            store.move_key(tmp_path / file)
    with store.train_lock.hold(0), pytest.raises(StoreLockedError):
        in_a_thread(partial(S3TStore(store.path).move_key, tmp_path / "key"))
    assert tree(tmp_path) == before
    store.move_key(tmp_path / "key")
    with pytest.raises(StateError, match="kept elsewhere already"):
        store.move_key(tmp_path / "another")
    (store.private / "partition.key").write_text("ff" * 32)
    with pytest.raises(StateError, match="not the key that"):
        S3TStore(store.path, KEY).move_key(tmp_path / "another")
    assert not (tmp_path / "another").exists()


def in_a_thread(call: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call).result()


def test_whatever_fails_the_key_is_somewhere(tmp_path, monkeypatch):
    """Each flush of the disk fails once."""
    fsync, ends = os.fsync, []
    while not ends or ends[-1] != "moved":
        place = tmp_path / str(len(ends))
        store = make_store(place / "out")
        left = iter([True] * len(ends) + [False])

        def failing(descriptor: int, left=left) -> None:
            if not next(left, True):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", failing)
        try:
            store.move_key(place / "key")
            ends.append("moved")
        except OSError:
            ends.append("failed")
        monkeypatch.setattr(os, "fsync", fsync)
        assert len(names_of_key(place)) == 1 and names_of_key(place)[0] in ("key", "out/.s3t/partition.key")
    assert len(ends) > 3


def test_the_command_line_moves_the_key(tmp_path):
    store = make_store(tmp_path / "out")
    assert outcomes("status", store.path)[0]["result"]["key"] == "beside the state"
    assert "beside the state" in run("status", store.path).stdout
    assert outcomes("state", "move-key", store.path, tmp_path / "key")[0]["result"] == {"file": str(tmp_path / "key")}
    assert run("locate", store.path, "--ids", "row-1").exit_code == 2
    assert outcomes("locate", store.path, "--ids", "row-1", "--key-file", tmp_path / "key")
    assert run("state", "move-key", store.path, tmp_path / "key").exit_code == 0  # it is done
    (tmp_path / "mine").write_text("mine")
    assert run("state", "move-key", store.path, tmp_path / "mine").exit_code == 2
