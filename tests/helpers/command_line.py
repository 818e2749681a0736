"""`hf-s3t` as a person runs it."""

from __future__ import annotations

import json
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from hf_s3t.cli import main as cli


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def outcomes(*arguments: object, code: int = 0) -> list[dict[str, Any]]:
    """The one JSON document on standard output."""
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.stderr
    found = json.loads(result.stdout)
    assert all(set(outcome) == {"store", "exit_code", "result", "error"} for outcome in found)
    return found


def plain(text: str) -> str:
    """Printed text without its line breaks."""
    return " ".join(text.split())
