"""How a verb of the command line ends: one outcome per store, exit codes, what is printed where.

One store's fault does not stop the others; of several stores the gravest code counts. Standard output is for outcomes
alone. The verbs are in `main.py` and beside it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType

from ..errors import (
    DatasetError,
    HubError,
    RecipeError,
    S3TError,
    StateError,
    StoreLockedError,
    UnfinishedDeletionError,
    UnknownExampleError,
)
from .options import width
from .wording import in_options

if TYPE_CHECKING:  # `--help` needs no store
    from ..store.store import S3TStore

DONE, BAD_INPUT, PENDING, UNKNOWN, BROKEN, LOW = 0, 2, 3, 4, 5, 6
GRAVITY = (DONE, LOW, PENDING, UNKNOWN, BAD_INPUT, BROKEN, 1)
"""Exit codes, the gravest last; 1 is a fault of this program."""


@dataclass(frozen=True)
class Outcome:
    """How a verb ended for one store: its exit code, its result as plain data and for a person, or its error."""

    store: str
    exit_code: int
    result: Any = None
    shown: RenderableType = ""
    error: dict[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"store": self.store, "exit_code": self.exit_code, "result": self.result, "error": self.error}


Verb = Callable[["S3TStore"], Outcome]


def run(stores: Iterable[str], key_file: Path | None, as_json: bool, verb: Verb, state: Path | None = None) -> None:
    """Applies a verb to each store, and ends the program with what came of it."""

    from ..store.store import S3TStore

    def opened(path: str) -> Outcome:
        store = S3TStore(path, key_file.read_text().strip() if key_file else None, state)
        if not store.exists:
            raise ValueError(_absent(path, store))
        return verb(store)

    show([outcome_of(path, partial(opened, path)) for path in stores], as_json)


def _absent(path: str, store: S3TStore) -> str:
    from ..store.sources import hides_repo

    if store.source.repo_id is not None:
        return f"there is no folder {path}, and the repository {path} on the Hub has no s3t.json."
    if hides_repo(path):
        return f"the folder {path} holds no store, and hides the repository of that name. Run this in another folder."
    return (
        "there is no store here (no s3t.json). Give the output_dir of a training, or the id of a repository, such as "
        "me/model."
    )


def show(outcomes: list[Outcome], as_json: bool) -> None:
    """Shows outcomes, and ends the program with the gravest exit code."""
    person = console()
    for outcome in outcomes:
        if outcome.error:
            typer.echo(f"{outcome.store}: {outcome.error['message']}", err=True)
        elif not as_json:
            person.print(outcome.shown)
    if as_json:
        typer.echo(json.dumps([outcome.to_json() for outcome in outcomes], indent=1, ensure_ascii=False))
    raise typer.Exit(max((outcome.exit_code for outcome in outcomes), key=GRAVITY.index))


def console() -> Console:
    """Standard output for a person."""
    return Console(markup=False, highlight=False, emoji=False, width=width())


def outcome_of(name: str, verb: Callable[[], Outcome]) -> Outcome:
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the outcomes alone
        try:
            return verb()
        except Exception as error:
            if isinstance(error, S3TError | ValueError | OSError):
                code, message = _exit_code(error), in_options(str(error))
            elif _is_of_the_hub(error):
                code = BAD_INPUT
                message = f"the Hub did not answer ({error}). Run the command again later: it goes on from there."
            else:
                traceback.print_exc()
                code, message = 1, f"{error} (a fault of this program)"
            return Outcome(name, code, error={"type": type(error).__name__, "message": message})


def _is_of_the_hub(error: Exception) -> bool:
    """Whether a request to the Hub failed; without its client there was none."""
    if "huggingface_hub.errors" not in sys.modules:
        return False
    from ..seams.hub import http_error

    return isinstance(error, http_error())


def _exit_code(error: Exception) -> int:
    if isinstance(error, UnknownExampleError):
        return UNKNOWN
    if isinstance(error, UnfinishedDeletionError):
        return PENDING
    fixable = (HubError, StateError, StoreLockedError, RecipeError, DatasetError)
    return BROKEN if isinstance(error, S3TError) and not isinstance(error, fixable) else BAD_INPUT
