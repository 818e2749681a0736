"""The seams: every place that reaches into the private inside of another library, or rests on names that it may change.

No other file does so (`tests/test_seams.py`). A seam is not as expected after an upgrade, sooner or later. Then a
promise of the library must not break in silence: [`broken`] makes the error for a seam that a promise depends on, and
[`lost`] gives one warning for a seam that only speed or comfort depends on.

[`TABLE`] lists them. Its columns: what is touched, why, what depends on it, and when it can go.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from ..errors import CompatibilityError

logger = logging.getLogger(__name__)


class Seam(NamedTuple):
    """One place where the library is sewn to another one.

    Args:
        library (`str`): the other library, as `pip` names it.
        touches (`str`): what of it that is private, or may be renamed.
        why (`str`): what it is needed for.
        depends (`str`): `"promise 1"` and the like: it is an error when the seam is not as expected. Else what is
            lost, which is a warning: `"speed: ..."`, `"comfort: ..."`.
        seen (`str`): versions that it was tested with.
        until (`str`): when it can go.
    """

    library: str
    touches: str
    why: str
    depends: str
    seen: str
    until: str


TABLE: dict[str, Seam] = {
    # ---- training: the Trainer and its callbacks, PEFT's tuner, what a recipe is made of ----



    # ---- answering: layers, caches, pipelines ----



    # ---- the Hub ----
    "HTTP library": Seam(
        "huggingface_hub",
        "the library with `HTTPError` and `TransportError` that `HfHubHTTPError` inherits from",
        "a request that failed is told from one whose answer was lost, and what may have arrived is looked for",
        "promise 7",
        "1.33 (httpx) to 2.4 (httpx2)",
        "huggingface_hub exports an error of its own for a Hub that can not be reached",
    ),
    "upload mode": Seam(
        "huggingface_hub",
        "`CommitOperationAdd._upload_mode` after `preupload_lfs_files`",
        "weights that git itself would keep are refused before the commit, as no purge removes them",
        "promise 7",
        "1.33 to 2.4",
        "the operation says in public how it was uploaded; the tree after the commit says it too late",
    ),
    "large-file listing": Seam(
        "huggingface_hub",
        "the route `api/models/{repo}/lfs-files` and its fields `fileOid` and `size`",
        "every stored large file is seen, also one that no revision names; `list_lfs_files` fails at one without name",
        "promise 7",
        "1.33 to 2.4",
        "`HfApi.list_lfs_files` accepts files without a name",
    ),
    "deletion of large files": Seam(
        "huggingface_hub",
        "`permanently_delete_lfs_files(repo_id, lfs_files, rewrite_history)`, which reads `file_oid` alone",
        "contents are deleted of which only the sha256 is known",
        "promise 7",
        "1.33 to 2.4",
        "the client deletes large files by their sha256",
    ),
    "requests of our own": Seam(
        "huggingface_hub",
        "`utils.get_session` (an httpx client), `utils.build_hf_headers`, the routes `discussions/{n}/ref` and "
        "`info/lfs/objects/batch`, and the headers `x-linked-etag` and `x-error-code`",
        "refs of pull requests are removed, and probes see what the Hub answers, not what a client makes of it",
        "promise 7",
        "1.33 to 2.4",
        "the client has methods for them that tell a file that is gone from a repository that is hidden",
    ),
    "cache layout": Seam(
        "huggingface_hub",
        "the layout of its cache: `models--me--model/{refs,snapshots,trees,blobs}`, `chunk-cache`, `shard-cache`",
        "old revisions are removed from the disk of whoever deletes, and what else lies there is named",
        "promise 7",
        "1.33 to 2.4",
        "`scan_cache_dir` knows of lists of revisions, broken downloads and the Xet cache",
    ),
}
"""Every seam by its name."""

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
