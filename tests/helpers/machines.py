"""Machines that share a Hub: processes with a cache, a token and files of their own, which do what they are told.

What a process imports takes seconds, and some of it reads the Hub's address and the cache's place from the
environment only then. So one process imports everything, with the server's address and a cache in whatever folder it
stands in, and does nothing else: every machine is a fork of it that stands elsewhere, and every call a fork of its
machine. A call begins as a new process does, with nothing in its memory that an earlier one asked for or found, and a
machine with a new home knows nothing at all.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from hub_server import Server

LATE = ("HTTP_PROXY", "NO_PROXY", "no_proxy")
"""Variables that are read when a connection is made, so that they need no process that imports with them."""
OFF = {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
"""Of a machine that reaches no server."""


class Failed(Exception):
    """What a machine was told to do ended with an error: its class and its message."""

    def __init__(self, kind: str, message: str, trace: str = ""):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.trace = kind, message, trace
        self.add_note(trace)


class Died(Exception):
    """A process ended in the middle of what it was told to do; `code` is what it ended with, minus a signal."""

    def __init__(self, code: int | None = None):
        super().__init__(code)
        self.code = code


class Machine:
    """A machine.

    Args:
        server (`Server`): the Hub.
        home (`Path`): of its cache.
        token (`str`, *optional*): the owner's by default.
        xet (`bool`): whether it uses Xet rather than LFS.
        variables (`dict`): more of its environment.
    """

    def __init__(self, server: Server, home: Path, token: str | None = None, xet: bool = False, **variables: str):
        self.home = home.resolve()
        late = {name: value for name, value in variables.items() if name.startswith("HF_S3T_") or name in LATE}
        self.environment = late | {"HF_TOKEN": server.token if token is None else token}
        self.environment["HF_HUB_DISABLE_XET"] = "0" if xet else "1"
        given = server.variables(self.home) | {name: value for name, value in variables.items() if name not in late}
        given = {name: value.replace(str(self.home), ".") for name, value in given.items()}
        self._given = {name: value for name, value in given.items() if name in LATE or name not in self.environment}
        self._lines: Any = None
        self._pid = 0

    def __call__(self, function: Callable[..., Any], /, *, token: str | None = None, **arguments: Any) -> Any:
        """Calls a function of a test module there, and returns what it returned. All of it is what JSON can hold.

        Args:
            token (`str`, *optional*): of somebody else who sits down at the machine.
        """
        self.begin(function, token=token, **arguments)
        return self.end()

    def begin(self, function: Callable[..., Any], /, *, token: str | None = None, **arguments: Any) -> None:
        """Has a function called, without waiting for it."""
        if self._lines is None:
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(_origin(tuple(sorted(self._given.items())))[0], [b"a machine"], [theirs.fileno()])
            with ours:
                self._lines = ours.makefile("rw")
            self._pid = json.loads(self._lines.readline())
        environment = self.environment | ({} if token is None else {"HF_TOKEN": token})
        told = {"module": function.__module__, "name": function.__qualname__, "arguments": arguments}
        self._lines.write(json.dumps({"home": self.home, "environment": environment, **told}, default=str) + "\n")
        self._lines.flush()

    def end(self) -> Any:
        """What the function returned, once its process has ended.

        Raises:
            Failed: it raised an error.
            Died: its process ended without an answer.
        """
        answer = None
        for line in self._lines:
            told = json.loads(line)
            if "ended" not in told:
                answer = told
            elif answer is None or told["ended"]:
                raise Died(told["ended"])
            elif "error" in answer:
                raise Failed(*answer["error"])
            else:
                return answer["value"]
        self.stop()
        raise Died

    def stop(self) -> None:
        """Ends its processes, also one that is at work; its files stay."""
        if self._lines is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            self._lines.close()
            self._lines = None


# ---- the processes ----


@cache
def _origin(given: tuple[tuple[str, str], ...]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Where to ask for machines of an environment, and the process that makes them, which ends with this one."""
    ours, theirs = socket.socketpair()
    environment = dict(os.environ) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | dict(given)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # this tree's code, every test
    with theirs:
        return ours, subprocess.Popen([sys.executable, __file__], stdin=theirs, env=environment)


def _main() -> None:
    for name in ("hf_s3t.cli.main", "hf_s3t.hub.purge", "encodings.idna", "stores", "trainers"):
        importlib.import_module(name)
    os.fsync = lambda descriptor: None  # nothing takes the power away
    context = ssl.create_default_context()  # reads all certificates, which no server here has
    ssl.create_default_context = lambda *_, **__: context
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=os.dup(0)) as asked:
        while True:
            message, connections, _, _ = socket.recv_fds(asked, 1024, 1)
            if not message:
                return
            if os.fork() == 0:
                asked.close()
                _stand(connections[0])
                os._exit(0)
            os.close(connections[0])


def _stand(connection: int) -> None:
    """What a machine does: one call after the other, each in a fork."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    with open(connection) as calls, open(os.dup(connection), "w") as lines:

        def say(what: Any) -> None:
            lines.write(json.dumps(what, default=str) + "\n")
            lines.flush()

        say(os.getpid())
        for line in calls:
            told = json.loads(line)
            importlib.import_module(told["module"])
            child = os.fork()
            if child == 0:
                say(_call(told))
                os._exit(0)
            say({"ended": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])})


def _call(told: dict[str, Any]) -> dict[str, Any]:
    os.makedirs(told["home"], exist_ok=True)
    os.chdir(told["home"])
    os.environ.update(told["environment"])
    constants = importlib.import_module("huggingface_hub.constants")
    constants.HF_HUB_DISABLE_XET = os.environ["HF_HUB_DISABLE_XET"] == "1"  # type: ignore[attr-defined]
    try:
        function: Any = sys.modules[told["module"]]
        for part in told["name"].split("."):
            function = getattr(function, part)
        return {"value": function(**told["arguments"])}
    except BaseException as error:
        return {"error": [type(error).__name__, str(error), traceback.format_exc()]}


if __name__ == "__main__":
    _main()
