"""What the Hub answers, read strictly: whoever runs it, or stands between, may answer anything.

The client takes lists as they come. What it makes of them is looked at here before anybody rests on it, and what it
does not understand becomes a [`HubError`].
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..errors import HubError, S3TError
from ..seams import hub as seam

Method = TypeVar("Method", bound=Callable[..., Any])


@contextmanager
def reading(repo_id: str, what: str) -> Iterator[None]:
    """Raises a [`HubError`] in it where an answer about a repository is none; failed requests stay what they are."""
    try:
        yield
    except (S3TError, HFValidationError, OSError, seam.http_error()):
        raise
    except Exception as error:  # what the client does with an answer that it does not expect is not ours to foresee
        found = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode()
        raise HubError(
            f"The Hub's answer about {what} of {repo_id} cannot be read ({found:.200}). Nothing rests on it. Check "
            "`HF_ENDPOINT` and what stands between, and run it again."
        ) from error


def surfacing(method: Method) -> Method:
    """A method of a repository, out of which a request that failed comes as a [`HubError`]."""

    @functools.wraps(method)
    def asked(repo: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(repo, *args, **kwargs)
        except (HfHubHTTPError, seam.transport_error()) as error:
            raise HubError(
                f"The Hub did not do what was asked of {repo.repo_id} ({error}). Run it again later: it goes on from "
                "there."
            ) from error

    return asked  # type: ignore[return-value]


def commit_name(value: Any) -> str:
    """The full sha of a commit; a `ValueError` for anything else, as it becomes the name of a folder in the cache."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{40}", value):
        raise ValueError(f"{value!r:.80} is no commit")
    return value


def text(value: Any) -> str:
    """A name or title that can be written into a file."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.80} is no text")
    value.encode()
    return value


def entry(found: Any) -> Any:
    """An entry of a tree, or of some paths: a file or a folder."""
    text(found.path)
    if not hasattr(found, "size"):
        return found
    for size in (found.size, *(() if found.lfs is None else (found.lfs.size,))):
        if type(size) is not int or size < 0:
            raise ValueError(f"{size!r:.80} is no number of bytes")
    if found.lfs is not None and not re.fullmatch("[0-9a-f]{64}", text(found.lfs.sha256)):
        raise ValueError(f"{found.lfs.sha256!r:.80} is no sha256")
    commit_name(found.blob_id)  # git names files as it names commits
    return found
