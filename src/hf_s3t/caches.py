"""What this machine's caches keep of a repository, and how it is removed from them."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.constants import HF_HUB_CACHE, HF_XET_CACHE


def cached_revisions(repo_id: str) -> set[str]:
    """Commits of a repository that the cache has files of."""
    if not Path(HF_HUB_CACHE).exists():
        return set()
    repos = [repo for repo in scan_cache_dir().repos if (repo.repo_id, repo.repo_type) == (repo_id, "model")]
    return {revision.commit_hash for repo in repos for revision in repo.revisions}


def clear_caches(repo_id: str, head: str) -> list[str]:
    """Removes from this machine's caches every revision of a repository but its head, and returns their names.

    The blocks in the Xet cache do not tell which repository they are of: all of them go, and are fetched again when
    they are needed. Uploads under way there stay.
    """
    cleared: list[str] = []
    folder = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    old = sorted(cached_revisions(repo_id) - {head})
    if old:
        scan_cache_dir().delete_revisions(*old).execute()
        cleared += [f"{folder.name}/snapshots/{revision}" for revision in old]
    for path in sorted([*folder.glob("trees/*.json"), *folder.glob("blobs/*.incomplete")]):
        path.unlink(missing_ok=True)
        cleared.append(f"{folder.name}/{path.parent.name}/{path.name}")
    for path in sorted([*Path(HF_XET_CACHE).glob("**/chunk-cache"), *Path(HF_XET_CACHE).glob("**/shard-cache")]):
        shutil.rmtree(path, ignore_errors=True)
        cleared.append(f"xet/{path.name}, of all repositories")
    return cleared
