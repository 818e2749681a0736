"""The seams to huggingface_hub: its HTTP library, what it says of an upload, its cache, requests of our own.

Nothing of huggingface_hub is imported before it is needed: a folder store does without. What an answer means is for
`hub/repo.py`, `hub/probes.py`, `hub/purge.py` and `hub/local_caches.py`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from . import broken, seam

TIMEOUT = 20.0
"""Seconds, for requests of our own; the client itself waits for ever."""

# ---- the HTTP library: httpx for huggingface_hub 1, httpx2 for 2 ----


@cache
def http_library() -> ModuleType:
    """The library that huggingface_hub sends its requests with, found by what its own HTTP error inherits from."""
    from huggingface_hub.errors import HfHubHTTPError

    bases = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    for base in bases:
        library = importlib.import_module(base.__module__.partition(".")[0])
        transport = getattr(library, "TransportError", None)
        if isinstance(transport, type) and issubclass(transport, base):
            return library
    named = ", ".join(f"{base.__module__}.{base.__name__}" for base in HfHubHTTPError.__mro__)
    raise broken("http_library", f"HfHubHTTPError is {named}, and none of these has a TransportError beside it")


def http_error() -> type[Exception]:
    """What every failed request raises, whatever failed."""
    return http_library().HTTPError


def transport_error() -> type[Exception]:
    """What a request raises that got no answer."""
    return http_library().TransportError


@seam("own_requests")
def session() -> Any:
    """huggingface_hub's client for requests that it has no method for."""
    from huggingface_hub.utils import get_session

    found = get_session()
    attrgetter("delete", "head", "post", "stream")(found)  # all that ours call
    return found


@seam("own_requests")
def headers(token: Any, library_name: str | None) -> dict[str, str]:
    """For requests that the client has no method for."""
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(token=token, library_name=library_name)


# ---- large files ----


def is_large_file(operation: Any) -> bool:
    """Whether the Hub keeps a file as a large one, as it answered when the file was uploaded before the commit."""
    mode = getattr(operation, "_upload_mode", None)
    if mode not in ("lfs", "regular"):
        raise broken("upload_mode", f"{operation.path_in_repo} was uploaded as {mode!r}, neither 'lfs' nor 'regular'")
    return bool(mode == "lfs")


def list_large_files(api: Any, repo_id: str) -> dict[str, int]:
    """sha256 of every large file that the Hub stores for a repository -> its size.

    `HfApi.list_lfs_files` fails where a file has no name, which the Hub's own description allows.
    """
    from huggingface_hub.utils import paginate

    url = f"{api.endpoint}/api/models/{repo_id}/lfs-files"
    item = None
    try:
        sizes = {}
        for item in paginate(url, {}, headers(api.token, api.library_name), timeout=TIMEOUT):
            size = item.get("size", 1)
            if not re.fullmatch("[0-9a-f]{64}", item["fileOid"]) or type(size) is not int or size < 0:
                raise ValueError("no sha256 with a size")  # taken for one, it would be purged, whatever it is
            sizes[item["fileOid"]] = size
        return sizes
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise broken("large_file_listing", f"{url} answered with {item!a:.200} ({error!a:.200})") from None


def check_large_file_deletion(api: Any) -> None:
    """To be called before the first step of a purge: whether [`delete_large_files`] can be its last."""
    method = getattr(api, "permanently_delete_lfs_files", None)
    known = inspect.signature(method).parameters if method is not None else {}
    if not {"repo_id", "lfs_files", "rewrite_history"} <= known.keys():
        found = f"HfApi.permanently_delete_lfs_files takes {', '.join(known) or 'nothing'}"
        raise broken("large_file_deletion", found)


@seam("large_file_deletion")
def delete_large_files(api: Any, repo_id: str, oids: Iterable[str]) -> None:
    """Deletes large files of a repository for good, by sha256, also those that no revision names."""
    doomed = [SimpleNamespace(file_oid=oid) for oid in sorted(oids)]  # all of LFSFileInfo that the method reads
    api.permanently_delete_lfs_files(repo_id=repo_id, lfs_files=doomed, rewrite_history=True)


# ---- requests that the client has no method for ----

LINKED_ETAG = "x-linked-etag"
"""Header of the answer for a large file at a revision: its sha256."""
ERROR_CODE = "x-error-code"
"""Header that tells a repository that is hidden from a file that is gone; both are answered with 404."""


def delete_pull_request_ref(api: Any, repo_id: str, number: int) -> None:
    """Removes the ref of a pull request."""
    from huggingface_hub.utils import hf_raise_for_status

    url = f"{api.endpoint}/api/models/{repo_id}/discussions/{number}/ref"
    hf_raise_for_status(session().delete(url, headers=headers(api.token, api.library_name), timeout=TIMEOUT))


# ---- the cache of this machine ----

NAMES_ALONE = ("refs", ".no_exist")
"""Folders in a repository's cache that hold names of commits and files, and no content."""
XET_CACHES = ("chunk-cache", "shard-cache")
XET_KEPT = ("staging", "logs")
"""In the Xet cache: uploads under way, and the log; neither holds what was downloaded."""


def cache_folder(repo_id: str) -> Path:
    """Where the cache keeps a model repository."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


def ref_file(repo_id: str, revision: str) -> Path:
    """Where the cache notes to which commit a name leads."""
    return cache_folder(repo_id) / "refs" / revision


def snapshot_folder(repo_id: str, sha: str) -> Path:
    """Where the cache keeps the files of a commit."""
    return cache_folder(repo_id) / "snapshots" / sha


def xet_folder() -> Path:
    """Where blocks of Xet storage are kept, of all repositories."""
    from huggingface_hub.constants import HF_XET_CACHE

    return Path(HF_XET_CACHE)


def cached_listings(repo_id: str) -> list[Path]:
    """What `scan_cache_dir` knows nothing of in a repository's cache: lists of old revisions, broken downloads."""
    folder = cache_folder(repo_id)
    return sorted([*folder.glob("trees/*.json"), *folder.glob("blobs/*.incomplete")])


def cached_blocks() -> list[Path]:
    """Folders of downloaded blocks of Xet storage, which do not tell which repository they are of."""
    return sorted(path for name in XET_CACHES for path in xet_folder().glob(f"**/{name}"))


def left_in_cache(repo_id: str, head: str) -> list[str]:
    """What is in this machine's caches and may have content that is not the head's, whatever their layout is."""
    folder = cache_folder(repo_id).resolve()
    found = set(_files(folder))
    kept = {path for path in found if path.relative_to(folder).parts[:2] == ("snapshots", head)}
    fine = kept | {path.resolve() for path in kept}
    fine |= {path for path in found if path.relative_to(folder).parts[0] in NAMES_ALONE}
    left = [f"{folder.name}/{path.relative_to(folder).as_posix()}" for path in sorted(found - fine)]
    xet = xet_folder()
    blocks = [path for path in _files(xet) if not {*XET_KEPT} & {*path.relative_to(xet).parts}]
    return left + [f"xet/{path.relative_to(xet).as_posix()}" for path in sorted(blocks)]


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)
