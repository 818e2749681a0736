"""Durable and private files: atomic writes, deterministic safetensors, locks that name their holder.

It knows nothing of stages. What only POSIX systems have (modes, locks in the kernel, folders that can be synced) is
used here and nowhere else: elsewhere a store can be read, and the first change is refused.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import shutil
import socket
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from .errors import StateError, StoreError, StoreLockedError
from .plain_data import plain_json

if TYPE_CHECKING:
    import numpy as np

MAX_JSON_BYTES = 1 << 30
MAX_TENSOR_BYTES = 1 << 40
POSIX = find_spec("fcntl") is not None
"""Whether this system has modes, locks in the kernel and folders that can be synced."""


def json_bytes(value: Any) -> bytes:
    """JSON that is the same bytes for the same value, and readable."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def utc_now() -> str:
    """UTC in ISO 8601, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Reads a JSON file. A [`StoreError`] if it is absent, larger than `limit` bytes, or no JSON."""
    try:
        return parse_json(read_limited(path, limit), path)
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist.") from None


def read_limited(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Reads a file. A [`StoreError`] if it is no plain file, larger than `limit` bytes, or another user's."""
    try:
        check_plain(path)
        size = path.stat().st_size
        if size > limit:
            raise StoreError(f"{path} has {size} bytes, more than the {limit} that it may have.")
        return path.read_bytes()
    except PermissionError:
        raise StoreError(f"{path} may not be read by this user. Run this as its owner.") from None


NO_FILE = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
"""Errors of a path that leads to no file, as others than those of a disk."""


def check_plain(path: Path) -> None:
    """Raises [`StoreError`] if something is in a file's place that is none: a pipe keeps its reader waiting for ever.

    One that is absent is a `FileNotFoundError`.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        raise StoreError(f"{path} leads to no file ({os.strerror(error.errno)}). Restore it from a backup.") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a device or the like"
        raise StoreError(f"{path} is {kind}, and a file is expected. Remove it and restore the file from a backup.")


def parse_json(data: bytes, path: Path) -> Any:
    """What was read from `path`. A [`StoreError`] if it is no JSON."""
    try:
        return plain_json(data)
    except ValueError as error:
        raise StoreError(f"{path} is not valid JSON ({error}). Restore it from a backup.") from None


# ---- what its owner alone may read ----

PRIVATE = 0o600
"""Mode of a file that its owner alone may read."""
PRIVATE_FOLDER = 0o700
"""Mode of a folder that its owner alone may enter."""
OTHERS = 0o077
"""What a mode grants to others than the owner."""


def private_folder(path: Path) -> None:
    """Makes a folder that its owner alone may enter, also of one that is there. A [`StoreError`] without POSIX."""
    if not POSIX:
        raise StoreError(
            "hf_s3t needs a POSIX file system to change a store: modes that keep the state private, and locks in the "
            "kernel. Nothing was changed. Here a store can only be read; use Linux or macOS (or WSL) to change it."
        )
    try:
        path.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in (errno.EEXIST, *NO_FILE):
            raise
        raise StoreError(f"{path} is needed as a folder, and something else is there. Remove it by hand.") from None
    tighten(path)


def tighten(path: Path) -> None:
    """Takes from others what they may do with a file or folder; what is another user's stays as it is."""
    with suppress(OSError):  # an audit names it
        mode = path.stat().st_mode
        if mode & OTHERS:
            os.chmod(path, stat.S_IMODE(mode) & ~OTHERS)


def loose(folder: Path, names: Iterable[str]) -> list[Path]:
    """What others may use of a private folder: the folder itself, and of what is in it that which has one of `names`.

    Links are left out.
    """
    found = [folder.resolve(), *(path for name in names for path in sorted(folder.glob(name)))]
    return [path for path in found if _mode(path) & OTHERS]


def _mode(path: Path) -> int:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:  # another process is done with it
        return 0
    return 0 if stat.S_ISLNK(mode) else mode


def denied(folder: Path) -> StateError:
    """What somebody is told who may not look into the private folder of another user."""
    try:
        owner = f"user {folder.stat().st_uid}"
    except OSError:
        owner = "another user"
    return StateError(
        f"{folder} may be read by its owner alone, {owner}. Deletions that were begun are on record there: whoever "
        "cannot see them might serve what was deleted, so nothing goes on. Run this process as that user, or serve "
        "a copy without that folder, as docs/serving.md says."
    )


def _unwritable(folder: Path, error: OSError) -> StateError:
    """What somebody is told who may look into the private folder, or its store, and not write there."""
    try:
        os.listdir(folder if folder.exists() else folder.parent)
    except PermissionError:
        return denied(folder)
    return StateError(
        f"{folder} may not be written ({error.strerror}). Nothing was changed. Make it writable for this user, or "
        "copy the store and change the copy. To look (`status`, `locate`, `verify`) it can stay as it is."
    )


# ---- durable writes ----


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Replaces a file's content in one step: after a crash it holds the old bytes or the new ones, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        write_durable(scratch, data, mode)
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_durable(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Writes a new file and waits until the disk has it."""
    path.unlink(missing_ok=True)  # a file that is there already would keep its mode
    with open(path, "wb", opener=partial(os.open, mode=mode)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes creations, renames and removals in a folder durable; where folders cannot be synced, nothing."""
    if not POSIX:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def install_folder(scratch: Path, final: Path) -> None:
    """Moves a complete folder to its name in one step."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        shutil.rmtree(final)
    os.rename(scratch, final)
    sync_folder(final.parent)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there, durably. A link is removed, never followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
    else:
        return
    sync_folder(path.parent)


def resolved(path: Path) -> Path:
    """Where a path that a user gave leads. A `ValueError` if it leads round in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise ValueError(f"{path} leads to itself, by links. Name another path.") from None


def inside(root: Path, relative: str) -> Path:
    """`root / relative`. A [`StoreError`] if the path leaves `root`, by itself or through a link."""
    path = root / relative
    try:
        leaves = os.path.isabs(relative) or not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links that lead to one another
        leaves = True
    if leaves:
        raise StoreError(f"Path {relative!r} leaves the store {root}. The manifest is damaged or hostile.")
    return path


DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "float16": "F16", "int32": "I32", "float32": "F32",
    "float64": "F64", "int64": "I64",
}  # fmt: skip
"""The format's names of what an array may hold, in the order that the format gives them: wide ones go first."""


def safetensors_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same arrays: the metadata's order is fixed too.

    The library's serialiser keeps metadata in a hash map, so that two entries come out in either order, and copies
    the tensors twice. The format: 8 bytes of length, a header of that length (JSON, spaces up to a multiple of 8),
    the tensors.
    """
    rank = {dtype: -place for place, dtype in enumerate(DTYPES)}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end, data = 0, []
    for name, value in sorted(arrays.items(), key=lambda item: (rank[item[1].dtype.name], item[0])):
        data.append(value.ravel().view("uint8").data)
        begin, end = end, end + data[-1].nbytes
        header[name] = {"dtype": DTYPES[value.dtype.name], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *data])


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file, as arrays. A [`StoreError`] if it is absent, damaged, or not of numpy's types."""
    try:
        return parse_safetensors(read_limited(path, MAX_TENSOR_BYTES), path)
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist, but the manifest lists it. Restore it from a backup.") from None


def parse_safetensors(data: bytes, path: Path) -> dict[str, np.ndarray]:
    """The same of what was read from `path`, so that what was hashed is what is used."""
    import numpy as np
    from safetensors import SafetensorError, deserialize

    types = {name: np.dtype(dtype) for dtype, name in DTYPES.items()}
    try:
        found = sorted(deserialize(data), key=lambda named: named[0])  # it hands them out in no order
    except SafetensorError as error:
        raise StoreError(f"{path} cannot be read ({error}): it is truncated or damaged.") from None
    foreign = sorted((name, view["dtype"]) for name, view in found if view["dtype"] not in types)
    if foreign:
        raise StoreError(f"{path}: {foreign[0][0]} is of type {foreign[0][1]}; stages are stored in float32.")
    return {name: np.frombuffer(view["data"], types[view["dtype"]]).reshape(view["shape"]) for name, view in found}


class Lock:
    """A lock between processes, held in the kernel: the lock of a process that died is free at once.

    A `.holder` file beside it names the process that has it. Who waits in vain is told that name and the `purpose`.
    """

    def __init__(self, path: Path, purpose: str):
        self.path, self.purpose = path, purpose
        # It counts per thread: threads that share a store wait for one another, too.
        self._lock = FileLock(path, mode=PRIVATE)

    def acquire(self, timeout: float) -> None:
        """Takes the lock; may be nested, each time with a [`release`].

        Raises:
            StoreLockedError: another process still has it after `timeout` seconds; the message names it.
            StateError: its folder is another user's, or nothing may be written there.
        """
        try:
            private_folder(self.path.parent)
            self._lock.acquire(timeout=timeout)
        except Timeout:
            raise StoreLockedError(
                f"{self.path.parent.parent} is held by {self._holder()} ({self.purpose}). Wait for it to finish, or "
                "stop that process: a stopped process gives the lock back at once."
            ) from None
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise _unwritable(self.path.parent, error) from None
        with suppress(OSError):  # a disk that is full: the name is for a message, and a deletion makes room
            self.path.with_suffix(".holder").touch(PRIVATE)
            self.path.with_suffix(".holder").write_text(f"process {os.getpid()} on {socket.gethostname()}")

    def release(self) -> None:
        """Gives the lock back."""
        if self._lock.lock_counter == 1:
            with suppress(OSError):  # a disk that fails: what was done, and what failed before, is what counts
                self.path.with_suffix(".holder").unlink(missing_ok=True)
        self._lock.release()

    @contextmanager
    def hold(self, timeout: float) -> Iterator[None]:
        """Holds the lock for a block; see [`acquire`]."""
        self.acquire(timeout)
        try:
            yield
        finally:
            self.release()

    def _holder(self) -> str:
        try:
            return read_limited(self.path.with_suffix(".holder"), 1 << 10).decode(errors="replace")
        except (OSError, StoreError):
            return "another process"
