"""The one seam for faults: numbers every step by which a process changes something, and strikes at one of them.

A step is a call that makes something durable or changes it: a file that is opened to be written, a write, a flush, a
rename, a removal, a folder that is made, a mode; a statement of SQL that is no question; a request to a Hub that
changes something; an optimizer step. Files are written by Python's own pure `io`, whose calls go through `os`. Steps
come in the same order in every run, so that a number names one. What lies outside of one folder is not counted.

Kills: before a step, amid it (half a write; a flush that came too late for half a file; a commit of the database in
the middle of its pages; a request whose answer nobody hears), after it. Disks: `ENOSPC` and `EROFS` from a step on,
as a full disk stays full and one that fails is mounted to be read; `EIO` at that step alone. A request is not sent
(`EIO`), refused (`EROFS`), or carried out while its answer is lost (`ENOSPC`).
"""

from __future__ import annotations

import _pyio
import builtins
import errno
import io
import json
import os
import re
import resource
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import set_client_factory
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hf_s3t.seams.hub import http_library
from hf_s3t.store import base_identity

KILLS = ("before", "amid", "after")
DISKS = ("ENOSPC", "EIO", "EROFS")
TORN = ("write", "fsync", "COMMIT", "request")
"""Steps in the middle of which a kill leaves something else than before or after them."""
GROWS = ("create", "write", "mkdir", "INSERT", "UPDATE", "CREATE", "COMMIT")
"""Steps for which a full disk has no room."""
CHANGES = re.compile(r"\s*(INSERT|UPDATE|DELETE|CREATE|BEGIN|COMMIT|ATTACH|DETACH)\b")
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
SQLITE = {"ENOSPC": "SQLITE_FULL", "EIO": "SQLITE_IOERR_WRITE", "EROFS": "SQLITE_READONLY"}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def step_name(line: str) -> str:
    """The kind of step that a line of the log names."""
    return line.split(" ", 1)[0]


def strikes(steps: list[str]) -> list[tuple[int, str]]:
    """All that can befall a run of some steps: number of the step, and what. What would be the same is left out."""
    found = []
    for number, line in enumerate(steps):
        kind = step_name(line)
        found.append((number, "before"))
        found += [(number, "amid")] if kind in TORN else []
        if kind != "step":
            found += [(number, fault) for fault in DISKS if fault != "ENOSPC" or kind in (*GROWS, "request")]
    return [*found, (len(steps) - 1, "after")] if steps else []


class Seam:
    """Counts the steps of this process from now on, and strikes at one of them.

    Args:
        log (`Path`): gets a line per step, outside of `root`.
        root (`Path`): steps on files are counted below it.
        at (`int`, *optional*): number of the step to strike at; `None`: only count.
        fault (`str`): one of `KILLS` or `DISKS`.
    """

    def __init__(self, log: Path, root: Path, at: int | None = None, fault: str = ""):
        self.log, self.root, self.at, self.fault = open(log, "w"), str(root.resolve()), at, fault
        self.count, self.struck, self._open, self._quiet = 0, False, io.open, False
        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "chmod", "fsync", "write", "open"):
            setattr(os, name, self._watched(name, getattr(os, name)))
        self._access, os.access = os.access, self._accessible
        builtins.open = io.open = self._opened
        self._connect, sqlite3.connect = sqlite3.connect, self._connected
        safetensors.torch.serialize_file = self._whole(safetensors.torch.serialize_file, 1)
        torch.save = self._whole(torch.save, 1)
        base_identity._remember = self._elsewhere(base_identity._remember)
        set_client_factory(self._client)
        steps: list[int] = []
        register_optimizer_step_pre_hook(lambda *_: steps.append(self._begin("step", "")))
        register_optimizer_step_post_hook(lambda *_: self._end(steps.pop()))

    # ---- one step ----

    def step(self, kind: str, detail: str, call: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Makes a call that is a step, or strikes; `half` leaves it half done."""
        number = self._begin(kind, detail, half or call)
        now, grows = number == self.at, kind in GROWS
        failing = now or (self.struck and self.fault != "EIO" and kind != "request")
        if failing and self.fault in DISKS and (self.fault != "ENOSPC" or grows or kind == "request"):
            if now and kind == "write" and half is not None and self.fault != "EROFS":
                half()
            raise OSError(getattr(errno, self.fault), os.strerror(getattr(errno, self.fault)), detail)
        try:
            return call()
        finally:  # also of a call that fails, such as the removal of what is not there
            self._end(number)

    def _begin(self, kind: str, detail: str, half: Callable[[], Any] | None = None) -> int:
        number, self.count = self.count, self.count + 1
        self.log.write(f"{kind} {detail}\n")
        self.log.flush()
        if number == self.at:
            self.struck = True
            if self.fault == "amid" and half is not None:
                with suppress(Exception):
                    half()
            if self.fault in ("before", "amid"):
                kill()
        return number

    def _end(self, number: int) -> None:
        if number == self.at and self.fault == "after":
            kill()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        quiet, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = quiet

    # ---- files ----

    def _place(self, file: Any, folder: int | None = None) -> str | None:
        """A path below the root, relative to it; `None` for any other."""
        if self._quiet:
            return None
        if isinstance(file, int):
            path = os.readlink(f"/proc/self/fd/{file}")
        elif folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(file))
        else:
            path = os.path.abspath(os.fsdecode(file))
        return os.path.relpath(path, self.root) if path == self.root or path.startswith(self.root + "/") else None

    def _watched(self, name: str, call: Callable) -> Callable:
        @wraps(call)
        def watched(first: Any, *args: Any, **kwargs: Any) -> Any:
            place = self._place(first, kwargs.get("dir_fd"))
            kind, half = name, None
            if name == "open":
                flags = args[0] if args else kwargs["flags"]
                if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    place = None
                kind = "create" if flags & os.O_CREAT and not os.path.lexists(first) else "open"
            elif name == "write":
                half = lambda: call(first, bytes(args[0])[: len(args[0]) // 2])  # noqa: E731
            elif name == "fsync" and place and os.path.isfile(f"/proc/self/fd/{first}"):
                half = lambda: os.truncate(f"/proc/self/fd/{first}", os.fstat(first).st_size // 2)  # noqa: E731
            if place is None:
                return call(first, *args, **kwargs)
            return self.step(kind, place, lambda: call(first, *args, **kwargs), half)

        return watched

    def _opened(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writes = bool({*mode} & {*"wax+"}) and self._place(file) is not None
        return (_pyio.open if writes else self._open)(file, mode, *args, **kwargs)

    def _accessible(self, path: Any, mode: int, **how: Any) -> bool:
        readable = self.struck and self.fault == "EROFS" and mode & os.W_OK and self._place(path) is not None
        return False if readable else self._access(path, mode, **how)

    def _whole(self, call: Callable, which: int) -> Callable:
        """A file that another library writes in one call."""

        @wraps(call)
        def written(*args: Any, **kwargs: Any) -> Any:
            file = args[which] if len(args) > which else None
            place = self._place(file) if isinstance(file, str | os.PathLike) else None
            if place is None:
                return call(*args, **kwargs)

            def whole() -> Any:
                with self._alone():
                    return call(*args, **kwargs)

            def half() -> None:
                whole()
                os.truncate(file, os.path.getsize(file) // 2)

            return self.step("write", place, whole, half)

        return written

    def _elsewhere(self, call: Callable) -> Callable:
        """What a machine remembers of bases is no part of a run: the first one writes it, others do not."""

        @wraps(call)
        def quietly(*args: Any, **kwargs: Any) -> Any:
            with self._alone():
                return call(*args, **kwargs)

        return quietly

    # ---- the database ----

    def _connected(self, path: Any, **how: Any) -> sqlite3.Connection:
        found = re.sub(r"\?.*", "", str(path).removeprefix("file://"))
        place = None if found == ":memory:" else self._place(found)
        return self._connect(path, **how) if place is None else self._connect(path, factory=_connection(self), **how)

    def statement(self, sql: str, database: str, call: Callable[[], Any]) -> Any:
        """Runs a statement, as a step unless it is a question."""
        found = CHANGES.match(sql)
        if found is None or self._quiet:
            return call()
        kind = found[1]

        def halfway() -> None:
            """Dies where SQLite writes the second half of its pages."""
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            _limit_files(os.path.getsize(database) // 2)
            call()

        if kind == "COMMIT" and self.at == self.count and self.fault == "EIO":
            self._begin(kind, sql)
            _limit_files(0)  # the kernel refuses what SQLite writes
            try:
                return call()
            finally:
                _limit_files(resource.RLIM_INFINITY)
        try:
            return self.step(kind, re.sub(r"\s+", " ", sql)[:40], call, halfway if kind == "COMMIT" else None)
        except OSError as error:
            told = sqlite3.OperationalError(error.strerror)
            told.sqlite_errorname = SQLITE[self.fault]
            raise told from None

    # ---- a Hub ----

    def _client(self) -> Any:
        HTTP: Any = http_library()
        seam = self

        class Transport(HTTP.HTTPTransport):
            def handle_request(self, request: Any) -> Any:
                def send() -> Any:
                    return super(Transport, self).handle_request(request)

                def unheard() -> Any:
                    response = send()
                    response.read()
                    return HTTP.Response(503, request=request)

                if request.method in ("GET", "HEAD") or re.search("/paths-info/|/validate-yaml$", request.url.path):
                    return send()
                try:
                    detail = re.sub("[0-9a-f]{40,}", "*", f"{request.method} {request.url.path}")
                    return seam.step("request", detail, send, unheard)
                except OSError as error:
                    if seam.fault == "EIO":
                        raise HTTP.ConnectError(str(error), request=request) from None
                    return unheard() if seam.fault == "ENOSPC" else HTTP.Response(503, request=request)

        return HTTP.Client(transport=Transport(), follow_redirects=True)


def _connection(seam: Seam) -> type[sqlite3.Connection]:
    class Connection(sqlite3.Connection):
        def _run(self, name: str, sql: str, *values: Any) -> Any:
            (_, _, file), *_ = sqlite3.Connection.execute(self, "PRAGMA database_list").fetchall()
            return seam.statement(sql, file, lambda: getattr(sqlite3.Connection, name)(self, sql, *values))

        def execute(self, sql: str, *values: Any) -> Any:
            return self._run("execute", sql, *values)

        def executemany(self, sql: str, *values: Any) -> Any:
            return self._run("executemany", sql, *values)

        def executescript(self, sql: str) -> Any:
            return self._run("executescript", sql)

    return Connection


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# ---- a run that is struck ----


@dataclass(frozen=True)
class Outcome:
    """What became of a run: it was killed, it ended with an error of a kind, or neither."""

    killed: bool
    kind: str = ""
    message: str = ""
    trace: str = ""


def struck(act: Callable[[], Any], log: Path, root: Path, at: int | None = None, fault: str = "") -> Outcome:
    """Runs something in a forked process that is struck at one step; see [`Seam`]."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        answer: list[str] = []
        tell = os.write
        try:
            Seam(log, root, at, fault)
            act()
        except BaseException as error:
            answer = [type(error).__name__, str(error), traceback.format_exc()]
        finally:
            tell(write, json.dumps(answer)[:60_000].encode())
            os._exit(0)
    os.close(write)
    with open(read) as told:
        answer = told.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        assert code in KILLED and fault in KILLS, code
        return Outcome(True)
    return Outcome(False, *json.loads(answer))
