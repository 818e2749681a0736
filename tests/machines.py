"""Machines that share a Hub: processes with a cache, a token and files of their own, which do what they are told.

A process that talks to the server of the tests has to begin with its address in the environment, and takes seconds to
begin: so one is started once and told several things.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hub_server import Server

HERE = Path(__file__).parent


class Failed(Exception):
    """What a machine was told to do ended with an error: its class and its message."""

    def __init__(self, kind: str, message: str, trace: str = ""):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.trace = kind, message, trace


class Died(Exception):
    """A machine ended in the middle of what it was told to do."""


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
        self.home = home
        self.environment = server.environment(home, token, xet) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | variables
        paths = [str(HERE.parent / "src"), str(HERE), os.environ.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Calls a function of a test module there, and returns what it returned. All of it is what JSON can hold."""
        self.begin(function, **arguments)
        return self.end()

    def begin(self, function: Callable[..., Any], **arguments: Any) -> None:
        """Has a function called, without waiting for it."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=self.environment,
            )  # fmt: skip
        assert self._process.stdin is not None
        told = {"module": function.__module__, "name": function.__qualname__, "arguments": arguments}
        self._process.stdin.write(json.dumps(told, default=str) + "\n")
        self._process.stdin.flush()

    def end(self) -> Any:
        """What the function returned.

        Raises:
            Failed: it raised an error.
            Died: its process ended. The next call is one of a new process.
        """
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer:"):
                answer = json.loads(line.removeprefix("answer:"))
                if "error" in answer:
                    raise Failed(*answer["error"])
                return answer["value"]
        self.stop()
        raise Died

    def stop(self) -> None:
        """Ends its process; its files stay."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def main() -> None:
    for line in sys.stdin:
        told = json.loads(line)
        try:
            function: Any = importlib.import_module(told["module"])
            for part in told["name"].split("."):
                function = getattr(function, part)
            answer = {"value": function(**told["arguments"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": [type(error).__name__, str(error), traceback.format_exc()]}
        sys.stdout.write("\nanswer:" + json.dumps(answer, default=str) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
