"""Kills a training at a chosen instant: in a forked process, at one of the calls by which anything becomes durable.

Every optimizer step, every `fsync`, rename, removal and `torch.save`, and every commit of the state's database that
changes something is an instant. They come in the same order in every run, so that a number names one. A kill before a
call, after it, or in the middle of it leaves the disk in another state: in the middle, an unsynced file has lost its
second half.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hf_s3t.errors import UnfinishedDeletionError
from hf_s3t.store import base_identity, deletion
from hf_s3t.store.database import StateDatabase
from hf_s3t.training import trainer

CATEGORIES = ("step", "checkpoint", "rename", "manifest", "deletion", "state", "other")
MODES = ("before", "amid", "after")
ELSEWHERE = "elsewhere"
"""What a machine remembers of bases is no part of a run: the first one writes it, others do not."""


class Instants:
    """Counts instants in this process, writes each one's category to a log, and strikes at one of them.

    Args:
        log (`Path`): gets a line per instant.
        strike_at (`int`, *optional*): number of the instant to strike at; `None`: only count.
        mode (`str`): one of `MODES`.
        strike (`Callable`): `kill` or `fill_disk`.
    """

    def __init__(self, log: Path, strike_at: int | None = None, mode: str = "before", strike: Callable = None):
        self.log, self.strike_at, self.mode, self.strike = open(log, "w"), strike_at, mode, strike or kill
        self.count, self.inside = 0, []
        self._watch_rooms()
        for owner, names in ((os, ("replace", "rename", "unlink", "fsync", "rmdir")), (torch, ("save",)),
                             (shutil, ("rmtree",)), (Path, ("unlink",))):  # fmt: skip
            for name in names:
                setattr(owner, name, self._wrap(getattr(owner, name), name))
        StateDatabase.commit = self._watched_commit(StateDatabase.commit)
        steps: list[int] = []
        register_optimizer_step_pre_hook(lambda *_: steps.append(self._begin("step", ())))
        register_optimizer_step_post_hook(lambda *_: self._end(steps.pop()))

    def _watch_rooms(self) -> None:
        """Knows whether a deletion or a checkpoint is under way, and what is written elsewhere."""
        for owner, name, room in (
            (deletion, "delete", "deletion"),
            (trainer.S3TMixin, "_save_checkpoint", "checkpoint"),
            (base_identity, "_remember", ELSEWHERE),
        ):
            setattr(owner, name, self._within(getattr(owner, name), room))

    def _within(self, function: Callable, room: str) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.inside.append(room)
            try:
                return function(*args, **kwargs)
            finally:
                self.inside.pop()

        return wrapped

    def _wrap(self, function: Callable, name: str) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if ELSEWHERE in self.inside:
                return function(*args, **kwargs)
            number = self._begin(name, args)
            try:
                return function(*args, **kwargs)
            finally:  # also of a call that fails, such as the removal of what is not there
                self._end(number)

        return wrapped

    def _watched_commit(self, commit: Callable) -> Callable:
        watched = self._wrap(commit, "state")
        return lambda state: (watched if state._sql.total_changes else commit)(state)

    def _category(self, name: str, args: tuple) -> str:
        if name == "state":
            return name
        if self.inside:
            return self.inside[-1]
        if name == "replace" and str(args[1]).endswith("s3t.json"):
            return "manifest"
        return name if name in CATEGORIES else "other"

    def _begin(self, name: str, args: tuple) -> int:
        number, self.count = self.count, self.count + 1
        self.log.write(self._category(name, args) + "\n")
        self.log.flush()
        if number == self.strike_at and self.mode != "after":
            if self.mode == "amid":
                _tear(name, args)
            self.strike()
        return number

    def _end(self, number: int) -> None:
        if number == self.strike_at and self.mode == "after":
            self.strike()


def _tear(name: str, args: tuple) -> None:
    """Leaves a call half done: half a file, or half a folder removed."""
    if name == "fsync" and os.fstat(args[0]).st_size and not os.path.isdir(f"/proc/self/fd/{args[0]}"):
        os.truncate(f"/proc/self/fd/{args[0]}", os.fstat(args[0]).st_size // 2)
    elif name == "save" and isinstance(args[1], str | os.PathLike):
        Path(args[1]).write_bytes(b"PK half a file")
    elif name == "rmtree":
        files = sorted(path for path in Path(args[0]).rglob("*") if path.is_file())
        for path in files[: (len(files) + 1) // 2]:
            os.remove(path)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(function: Callable[[], Any]) -> int:
    """Runs a function in a forked process; returns minus the signal that ended it, an `OSError`'s number, or 1."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 0
    try:
        function()
    except (OSError, UnfinishedDeletionError) as error:
        traceback.print_exc()
        cause = error if isinstance(error, OSError) else error.__cause__
        code = cause.errno or 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def train_struck(
    log: Path, scenario: Callable[[], Any], strike_at: int | None, mode: str, strike: Callable = kill
) -> int:
    """Runs a scenario in a child that is struck at one instant; see `in_child` for what is returned."""

    def child() -> None:
        instants = Instants(log, strike_at, mode, strike)
        scenario()
        if strike_at is not None:
            raise AssertionError(f"the run ended after {instants.count} instants, before number {strike_at}")

    return in_child(child)
