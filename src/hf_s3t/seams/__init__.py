"""The seams: every place that reaches into the private inside of another library, or rests on names it may change.

No other file does so (`tests/seams/test_seams.py`). Sooner or later an upgrade changes a seam, and no promise may
break in silence then. [`seam`] and [`broken`] make an error where a promise depends on it, [`lost`] gives one warning
where only speed or comfort does. [`TABLE`] (`table.py`) lists what is touched, what depends on it, and why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from ..errors import CompatibilityError
from .table import SEEN, TABLE, Seam

__all__ = ["SEEN", "TABLE", "Seam", "broken", "lost", "seam"]

logger = logging.getLogger(__name__)

_told: set[str] = set()


def _installed(library: str) -> str:
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return library


def broken(name: str, found: str) -> CompatibilityError:
    """The error for a seam that is not as expected; `found` is the beginning of a sentence."""
    row = TABLE[name]
    return CompatibilityError(
        f"{found}. hf_s3t needs {row.touches} of {_installed(row.library)} for this: {row.why} ({row.depends}). "
        f"Install a version that it was tested with ({row.library} {SEEN[row.library]}), or a newer hf_s3t."
    )


@contextmanager
def seam(name: str) -> Iterator[None]:
    """Inside, or in a function that it decorates, a name or argument that another library lacks now is a broken seam.

    Code of users has no place there: its errors would be taken for those of the seam.
    """
    try:
        yield
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        raise broken(name, f"{type(error).__name__}: {error}") from error


def lost(name: str, found: str) -> None:
    """Warns, once in a process, that a seam is not as expected; `found` is the beginning of a sentence."""
    row = TABLE[name]
    if name not in _told:
        _told.add(name)
        logger.warning(
            "%s (%s). What is lost is %s; answers and stages stay right. Tested with %s %s.",
            found, _installed(row.library), row.depends, row.library, SEEN[row.library],
        )  # fmt: skip
