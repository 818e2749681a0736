"""A process that talks to the Hub of the tests with this library, which takes seconds to import: once, then it forks.

`huggingface_hub` reads its address and its cache's place from the environment when it is imported. So the process is
started with that environment, and every function that is sent to it runs in a fork of its own.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hub_server import Server


class Client:
    """Functions are called as `client(function, name=value)`; arguments and answers are what JSON can hold.

    Args:
        server (`Server`): which it talks to.
        home (`Path`): of its cache.
        xet (`bool`): whether it uses Xet.
    """

    def __init__(self, server: Server, home: Path, xet: bool = False):
        environment = server.environment(home, xet=xet) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        tests = Path(__file__).parent
        environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent / "src"), str(tests), *sys.path])
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(
        self, function: Callable[..., Any], *, token: str | None = None, ends: int = 0, **arguments: Any
    ) -> Any:
        """What a function returns. It sees its arguments, and what it imports itself.

        Args:
            token (`str`, *optional*): who calls; `None`: the owner.
            ends (`int`): how its process has to end: 0, or minus a signal, and then nothing is returned.
        """
        source = textwrap.dedent(inspect.getsource(function))
        call = {"source": source, "name": function.__name__, "arguments": arguments, "token": token}
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        code, answer, trace = json.loads(self.process.stdout.readline())
        assert code == ends, f"{function.__name__} ended with {code}:\n{trace}"
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _answer(call: dict[str, Any]) -> Any:
    if call["token"] is not None:
        os.environ["HF_TOKEN"] = call["token"]
    names: dict[str, Any] = {}
    exec(call["source"], names)
    return names[call["name"]](**call["arguments"])


def _serve() -> None:
    import tempfile
    import traceback

    import hf_s3t.cli  # noqa: F401
    import stores  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a function prints is not an answer
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as file:
            child = os.fork()
            if child == 0:
                code = 0
                try:
                    result = [_answer(json.loads(line)), ""]
                except BaseException:
                    code, result = 1, [None, traceback.format_exc()]
                json.dump(result, file)
                file.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            file.seek(0)
            text = file.read()
            answers.write(json.dumps([code, *(json.loads(text) if text else [None, ""])]) + "\n")
            answers.flush()


if __name__ == "__main__":
    _serve()
