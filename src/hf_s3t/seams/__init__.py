"""The seams: every place that reaches into the private inside of another library, or rests on names it may change.

No other file does so (`tests/seams/test_seams.py`). Sooner or later an upgrade changes a seam. No promise may break in
silence then: [`broken`] makes the error for a seam that a promise depends on, and [`lost`] gives one warning for one
that only speed or comfort depends on.

[`TABLE`] (`table.py`) lists them: what is touched, why, what depends on it, the versions seen, and when it can go.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from ..errors import CompatibilityError
from .table import TABLE, Seam

__all__ = ["TABLE", "Seam", "broken", "lost"]

logger = logging.getLogger(__name__)

_told: set[str] = set()


def _installed(library: str) -> str:
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return library


def broken(name: str, found: str) -> CompatibilityError:
    """The error for a seam that is not as expected, where a promise depends on it.

    Args:
        name (`str`): the seam's, in [`TABLE`].
        found (`str`): what was found instead, as the beginning of a sentence.
    """
    seam = TABLE[name]
    return CompatibilityError(
        f"{found}. hf_s3t needs {seam.touches} of {_installed(seam.library)} for this: {seam.why} ({seam.depends}). "
        f"Install a version that it was tested with ({seam.library} {seam.seen}), or a newer hf_s3t."
    )


def lost(name: str, found: str) -> None:
    """Warns, once in a process, that a seam is not as expected, and what is lost with it.

    Args:
        name (`str`): the seam's, in [`TABLE`].
        found (`str`): what was found instead, as the beginning of a sentence.
    """
    seam = TABLE[name]
    if name not in _told:
        _told.add(name)
        logger.warning(
            "%s (%s). Lost is %s; answers and stages stay right. Tested with %s %s.",
            found, _installed(seam.library), seam.depends, seam.library, seam.seen,
        )  # fmt: skip
