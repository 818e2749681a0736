"""Durable files under failures that a disk and a kill can cause, and locks against real processes."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from hf_s3t import StoreError, StoreLockedError
from hf_s3t.files import (
    Lock,
    inside,
    install_folder,
    json_bytes,
    read_json,
    read_safetensors,
    remove,
    safetensors_bytes,
    write_atomic,
)

FORK = multiprocessing.get_context("fork")
METADATA = {"format": "pt", "hf_s3t": '{"stage": "shard-00/1"}', "a": "1", "z": "2", "m": "é"}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ["b.lora_B.weight", "a.lora_A.weight", "c", "head.bias"]
    return {name: torch.randn(3, 5, generator=generator) for name in names} | {"whole": torch.arange(4)}


def arrays(given: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in given.items()}


# Atomic writes


def test_write_atomic_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["b.json"]


@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize("function, code", [("fsync", errno.ENOSPC), ("replace", errno.EIO)])
def test_a_failed_write_leaves_the_old_bytes_and_no_scratch(tmp_path, monkeypatch, function, code, there_before):
    path = tmp_path / "s3t.json"
    if there_before:
        path.write_bytes(b"old")

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_atomic(path, b"new" * 1000)
    assert os.listdir(tmp_path) == (["s3t.json"] if there_before else [])
    assert not there_before or path.read_bytes() == b"old"


def test_bytes_and_folder_reach_the_disk_around_the_rename(tmp_path, monkeypatch):
    path, events = tmp_path / "s3t.json", []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def watched_replace(source, target):
        assert Path(source).read_bytes() == b"new"
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_atomic(path, b"new")
    assert events == [str(tmp_path / ".s3t.json.tmp"), "replace", str(tmp_path)]


def test_install_folder_replaces_an_older_one(tmp_path):
    for content in (b"1", b"2"):
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        (scratch / content.decode()).write_bytes(content)
        install_folder(scratch, tmp_path / "shard-00" / "0")
    assert os.listdir(tmp_path / "shard-00" / "0") == ["2"] and not scratch.exists()


def test_remove_takes_files_folders_and_links_but_never_follows_one(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "link", "dangling", "absent"):
        remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["kept"] and (kept / "file").exists()


# Paths and JSON


@pytest.mark.parametrize(
    "relative", ["..", "../other", "a/../../other", "/etc/passwd", "link/file", "link", "a/link-up/other/x"]
)
def test_a_path_that_leaves_the_store_is_refused(tmp_path, relative):
    root, outside = tmp_path / "store", tmp_path / "other"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    (root / "link").symlink_to(outside)
    (root / "a" / "link-up").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="leaves the store"):
        inside(root, relative)


def test_a_path_that_stays_is_allowed_also_below_a_linked_store(tmp_path):
    (tmp_path / "store" / "shard-00").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "within").symlink_to(tmp_path / "store" / "shard-00")
    for root in (tmp_path / "store", tmp_path / "alias"):
        for relative in ("shard-00/0", "shard-00/../s3t.json", "within/0", "absent"):
            assert inside(root, relative) == root / relative


def test_json_is_the_same_bytes_for_the_same_value(tmp_path):
    assert json_bytes({"b": 1, "a": ["é"]}) == json_bytes({"a": ["é"], "b": 1})
    (tmp_path / "x.json").write_bytes(json_bytes({"b": 1, "a": ["é"]}))
    assert read_json(tmp_path / "x.json") == {"a": ["é"], "b": 1}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        (b"", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[" + b"1," * 600 + b"1]", "more than the 1000"),
    ],
    ids=["absent", "empty", "torn", "not text", "deep", "large"],
)
def test_unreadable_json_is_a_store_error(tmp_path, content, message):
    path, limit = tmp_path / "x.json", 1000
    if content is not None:
        path.write_bytes(content)
        limit = max(limit, len(content)) if len(content) > 50_000 else limit
    with pytest.raises(StoreError, match=message):
        read_json(path, limit=limit)


# Safetensors


def test_the_bytes_are_the_librarys_with_one_entry_of_metadata():
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.int32]
    dtypes += [torch.float32, torch.float64, torch.int64]
    given = {f"{place % 4} é {place}": torch.ones(place % 3, 3).to(dtype) for place, dtype in enumerate(2 * dtypes)}
    learned = torch.randn(2, requires_grad=True)
    given |= {"scalar": torch.tensor(3), "turned": torch.randn(4, 5).t(), "learned": learned}
    plain = {name: value.detach().contiguous() for name, value in given.items()}
    assert safetensors_bytes(arrays(given), {"format": "pt"}) == save(plain, metadata={"format": "pt"})


def test_safetensors_are_the_same_bytes_every_time_and_load_anywhere(tmp_path):
    found = {safetensors_bytes(arrays(tensors()), METADATA) for _ in range(30)}
    assert len(found) == 1
    reordered = dict(reversed(list(METADATA.items())))
    assert found == {safetensors_bytes(dict(reversed(list(arrays(tensors()).items()))), reordered)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(found.pop())
    loaded = load_file(path)
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors().items())
    assert all(np.array_equal(value, loaded[name]) for name, value in read_safetensors(path).items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0, "the tensors must stay aligned"
    assert list(json.loads(data[8 : 8 + length])["__metadata__"]) == sorted(METADATA)


def test_tensors_are_read_in_the_order_of_their_names(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({f"{number}": np.ones(1, np.float32) for number in range(40)}, METADATA))
    assert list(read_safetensors(path)) == sorted(map(str, range(40)))


FRESH = """
import hashlib
import numpy as np
from hf_s3t.files import safetensors_bytes
tensors = {name: np.ones(2, np.float32) for name in "cab"}
print(hashlib.sha256(safetensors_bytes(tensors, {letter: letter for letter in "zamxk"})).hexdigest())
"""


def test_fresh_processes_write_the_same_safetensors():
    command = [sys.executable, "-c", FRESH]
    processes = [
        subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True)
        for seed in ("1", "2")
    ]
    printed = {process.communicate()[0].strip() for process in processes}
    here = safetensors_bytes({name: np.ones(2, np.float32) for name in "abc"}, {letter: letter for letter in "kmxza"})
    assert printed == {hashlib.sha256(here).hexdigest()}


def test_tensors_that_are_views_are_written_as_they_look(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    (tmp_path / "x").write_bytes(safetensors_bytes(arrays({"a": whole.t(), "b": whole[1:, 1:]}), {"format": "pt"}))
    loaded = load_file(tmp_path / "x")
    assert torch.equal(loaded["a"], whole.t()) and torch.equal(loaded["b"], whole[1:, 1:])


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_a_store_error(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(arrays(tensors()), METADATA)[:kept])
    with pytest.raises(StoreError, match="truncated or damaged"):
        read_safetensors(path)


def test_numbers_of_a_kind_that_no_stage_has_are_a_store_error(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"a": torch.ones(2, dtype=torch.bfloat16)}))
    with pytest.raises(StoreError, match="a is of type BF16; stages are stored in float32"):
        read_safetensors(path)


def test_an_absent_file_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match="does not exist, but the manifest lists it"):
        read_safetensors(tmp_path / "x.safetensors")


# Locks


def hold(path, pipe):
    with Lock(path, "writing").hold(timeout=5):
        pipe.send("held")
        pipe.poll(30)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock, until it is told that it is done or killed."""
    pipe, its_end = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path / ".s3t" / "write.lock", its_end), daemon=True)
    process.start()
    assert pipe.poll(30)
    yield process, pipe
    process.kill()
    process.join(30)


def test_a_lock_is_taken_and_given_back_although_nothing_can_be_written(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    lock = Lock(tmp_path / ".s3t" / "write.lock", "writing")
    for _ in range(2):
        with lock.hold(timeout=5):
            assert lock._lock.is_locked
        assert not lock._lock.is_locked


def test_a_held_lock_names_the_process_that_holds_it(tmp_path, holder):
    process, pipe = holder
    lock = Lock(tmp_path / ".s3t" / "write.lock", "writing")
    with pytest.raises(StoreLockedError, match=rf"held by process {process.pid} on .* \(writing\)"):
        lock.acquire(timeout=0.1)
    pipe.send("done")
    with lock.hold(timeout=30):
        assert f"process {os.getpid()} " in (tmp_path / ".s3t" / "write.holder").read_text()
    assert not (tmp_path / ".s3t" / "write.holder").exists()


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, holder):
    process, _ = holder
    process.kill()
    process.join(30)
    started = time.monotonic()
    with Lock(tmp_path / ".s3t" / "write.lock", "writing").hold(timeout=30):
        assert time.monotonic() - started < 5


def test_a_lock_may_be_nested_and_is_free_after_the_outermost(tmp_path):
    path = tmp_path / ".s3t" / "write.lock"
    lock, other = Lock(path, "writing"), Lock(path, "writing")
    with lock.hold(timeout=0):
        with lock.hold(timeout=0):
            pass
        with pytest.raises(StoreLockedError):
            other.acquire(timeout=0)
    with other.hold(timeout=0), pytest.raises(StoreLockedError):
        lock.acquire(timeout=0)


def test_threads_that_share_a_lock_hold_it_one_at_a_time(tmp_path):
    lock, inside_now, most = Lock(tmp_path / ".s3t" / "write.lock", "writing"), [], []

    def work():
        with lock.hold(timeout=30):
            inside_now.append(1)
            most.append(len(inside_now))
            time.sleep(0.05)
            inside_now.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
