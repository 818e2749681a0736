"""What this machine's caches keep of a repository, and how it is removed from them."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HFCacheInfo, scan_cache_dir
from huggingface_hub.constants import HF_HUB_CACHE

from ..seams import hub as seam

logger = logging.getLogger(__name__)


def cached_revisions(repo_id: str) -> set[str]:
    """Commits of a repository that the cache has files of."""
    if not Path(HF_HUB_CACHE).exists():
        return set()
    return {revision.commit_hash for repo in _cache_of(repo_id).repos for revision in repo.revisions}


def _cache_of(repo_id: str) -> HFCacheInfo:
    """What the cache has of one repository: a fork has commits of the same names."""
    info = scan_cache_dir()
    ours = frozenset(repo for repo in info.repos if (repo.repo_id, repo.repo_type) == (repo_id, "model"))
    return replace(info, repos=ours)


def clear_caches(repo_id: str, head: str) -> tuple[list[str], list[str]]:
    """Removes from this machine's caches every revision of a repository but its head.

    The blocks in the Xet cache do not tell which repository they are of: all of them go, and are fetched again when
    they are needed. Uploads under way there stay. Returns the names of what was removed, and of what is left and may
    be of an old revision; a warning names that, too.
    """
    cleared: list[str] = []
    folder = seam.cache_folder(repo_id)
    old = sorted(cached_revisions(repo_id) - {head})
    if old:
        _cache_of(repo_id).delete_revisions(*old).execute()
        cleared += [f"{folder.name}/snapshots/{revision}" for revision in old]
    for path in seam.cached_listings(repo_id):
        path.unlink(missing_ok=True)
        cleared.append(f"{folder.name}/{path.parent.name}/{path.name}")
    for path in seam.cached_blocks():
        shutil.rmtree(path, ignore_errors=True)  # what could not be removed is found below
        cleared.append(f"xet/{path.name}, of all repositories")
    left = seam.left_in_cache(repo_id, head)
    if left:
        logger.warning(
            "%d files in this machine's caches may hold old revisions of %s, but are not of a known form: "
            "%s. Remove them by hand (%s).", len(left), repo_id, ", ".join(left[:5]), folder.parent,
        )  # fmt: skip
    return cleared, left
