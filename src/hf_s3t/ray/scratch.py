"""A worker's own folder on the disk of its node. It goes with the worker, or with the next one on that node.

What lies there, running checkpoints and cached states, is computed from examples. A worker that was killed cannot
remove it. A lock that dies with its process tells the next worker which folders are left over.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import remove

PREFIX = "hf_s3t-worker-"


class Scratch:
    """A new folder below `TMPDIR`, its owner's alone."""

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        for lock in root.glob(f"{PREFIX}*.lock"):
            with suppress(Timeout, OSError), FileLock(lock, timeout=0):
                _remove(lock)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        self._lock = FileLock(f"{self.path}.lock", mode=0o600)
        self._lock.acquire()

    def remove(self) -> None:
        """Removes it with all that is in it."""
        _remove(Path(self._lock.lock_file))


def _remove(lock: Path) -> None:
    remove(lock.with_suffix(""))
    lock.unlink(missing_ok=True)
