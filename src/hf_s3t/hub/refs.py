"""The refs of a repository that a purge keeps, squashes or removes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..seams import hub as seam
from .answers import reading
from .repo import HubRepo


def sort_refs(repo: HubRepo, keep_refs: Iterable[str] | None) -> tuple[list[str], list[str]]:
    """Refs to keep, the own branch first, and refs to remove. Raises `ValueError` unless it was said for all."""
    own, refs = f"refs/heads/{repo.branch}", [ref for ref, _ in repo.refs()]
    others = [ref for ref in refs if ref != own]
    if keep_refs is None and others:
        raise ValueError(
            f"{repo.repo_id} has other refs, whose history may serve what is to be purged: {', '.join(others)}. "
            "Nothing was changed. Say which ones to keep (`keep_refs=[...]`; none: `keep_refs=[]`); the "
            "others are removed."
        )
    wanted = {_full_name(repo, name, refs) for name in keep_refs or ()}
    dropped = [ref for ref in others if ref not in wanted]
    if wanted - set(refs):
        absent = ", ".join(sorted(wanted - set(refs)))
        raise ValueError(f"{repo.repo_id} has no {absent}; it has {', '.join(refs)}. Nothing was changed.")
    stuck = [ref for ref in dropped if not re.fullmatch(r"refs/((heads|tags)/.+|pr/\d{1,9})", ref)]
    if stuck:
        raise ValueError(
            f"{', '.join(stuck)} of {repo.repo_id} cannot be removed from here. Nothing was changed. Remove it on "
            "the Hub, or keep it."
        )
    return [own, *(ref for ref in others if ref in wanted)], dropped


def _full_name(repo: HubRepo, name: str, refs: Iterable[str]) -> str:
    if name.startswith("refs/"):
        return name
    found = [ref for ref in refs if ref.split("/", 2)[-1] == name]
    if len(found) > 1:
        raise ValueError(f"{name} of {repo.repo_id} is {' and '.join(found)}. Nothing was changed. Say which one.")
    return found[0] if found else f"refs/heads/{name}"


def is_branch(ref: str) -> bool:
    """Whether a ref is a branch, and may be squashed."""
    return ref.startswith("refs/heads/")


def drop_ref(repo: HubRepo, ref: str) -> None:
    """Removes a ref that may be gone already."""
    api, name = repo.api, repo.repo_id
    try:
        if is_branch(ref):
            api.delete_branch(name, branch=ref.removeprefix("refs/heads/"))
        elif ref.startswith("refs/tags/"):
            api.delete_tag(name, tag=ref.removeprefix("refs/tags/"))
        else:
            number = int(ref.removeprefix("refs/pr/"))
            with reading(name, f"pull request {number}"):
                if api.get_discussion_details(name, number).status in ("open", "draft"):
                    api.change_discussion_status(name, number, "closed")
            seam.delete_pull_request_ref(api, name, number)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status != 404 or isinstance(error, RepositoryNotFoundError) or ref in dict(repo.refs()):
            raise


def squash(repo: HubRepo, ref: str) -> None:
    """Makes one commit of a branch's history; other refs, and a branch that is one commit, stay."""
    if is_branch(ref) and len(repo.commits(ref)) > 1:
        branch = ref.removeprefix("refs/heads/")
        with reading(repo.repo_id, "a squash"):
            repo.api.super_squash_history(repo.repo_id, branch=branch, commit_message="Squash")
