"""A client in a process of its own, because `huggingface_hub` reads its address from the environment once."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .server import Server

_PROGRAM = """
import json, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_url
from huggingface_hub.utils import get_session, paginate
{source}
print("answer:" + json.dumps({name}(HfApi(), **json.loads(sys.argv[1]))))
"""


def ask(
    server: Server,
    home: Path | str,
    function: Callable[..., Any],
    *,
    token: str | None = None,
    xet: bool = False,
    variables: dict[str, str] | None = None,
    **arguments: Any,
) -> Any:
    """Calls `function(HfApi(), **arguments)` in a new process, and returns what it returned.

    Args:
        server (`Server`): Which the process talks to.
        home (`Path` or `str`): Of its cache. With a new one it is a client that knows nothing yet.
        function (`Callable`): Its source is sent, so it sees only its arguments, what it imports itself, and of
            `huggingface_hub` `HfApi`, the two `CommitOperation`s, `hf_hub_url`, `get_session` and `paginate`.
        token (`str`, *optional*, defaults to the owner's): Who asks; `""` for nobody.
        xet (`bool`, *optional*, defaults to `False`): Whether Xet is used rather than LFS.
        variables (`dict`, *optional*): More of the environment.
        arguments: What JSON can hold, as does the answer.
    """
    program = _PROGRAM.format(source=textwrap.dedent(inspect.getsource(function)), name=function.__name__)
    environment = server.environment(home, token, xet) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | (variables or {})
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    answers = [line for line in run.stdout.splitlines() if line.startswith("answer:")]
    if run.returncode or not answers:
        raise RuntimeError(f"{function.__name__} failed in its process:\n{run.stdout}{run.stderr}")
    return json.loads(answers[-1].removeprefix("answer:"))
