"""A worker's own folder on the disk of its node. It goes with the worker, or with the next one on that node.

What lies there, running checkpoints and cached states, is computed from examples. A worker that was killed cannot
remove it. A lock that dies with its process tells the next worker which folders are left over.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import remove

PREFIX = "hf_s3t-worker-"

NEW = "hf_s3t-new-worker-"
"""Of a lock that is not yet held. Nobody looks for folders that are left over by this name."""


class Scratch:
    """A new folder below `TMPDIR`, its owner's alone."""

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        for lock in root.glob(f"{PREFIX}*.lock"):
            with suppress(Timeout, OSError), FileLock(lock, timeout=0):
                _remove(lock)
        name = secrets.token_hex(8)
        self.path = root / f"{PREFIX}{name}"
        self._lock = FileLock(root / f"{NEW}{name}.lock", mode=0o600)
        self._lock.acquire()
        os.rename(self._lock.lock_file, self._lock_path)  # under a name that others look for it is held from the start
        self.path.mkdir(mode=0o700)

    @property
    def _lock_path(self) -> Path:
        return self.path.with_suffix(".lock")

    def remove(self) -> None:
        """Removes it with all that is in it."""
        _remove(self._lock_path)


def _remove(lock: Path) -> None:
    remove(lock.with_suffix(""))
    lock.unlink(missing_ok=True)
