"""One repository on the Hub: its head, its files at a revision, and one atomic commit. Knows nothing of stages.

A commit names the head that it was made for, so that of two writers one is told to look again. What is committed is
decided in `store/sync.py`; what a purge does to the history in `purge.py`.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HeadMovedError, HubError, StoreError
from ..files import write_atomic
from ..seams import hub as seam
from .answers import commit_name, entry, reading, surfacing, text

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often a commit is sent again whose answer was lost and that did not arrive."""
SETTLING_SECONDS = 1.0

_NOTING = threading.Lock()


class HubRepo:
    """A model repository, of which one branch is read and committed to."""

    branch = "main"
    """What is read and committed to."""

    def __init__(self, repo_id: str, token: str | None = None):
        self.repo_id = repo_id
        self.api = HfApi(token=token, library_name="hf_s3t")

    @surfacing
    def create(self, private: bool = True) -> None:
        """Makes the repository where there is none."""
        with reading(self.repo_id, "the making"):
            self.api.create_repo(self.repo_id, private=private, exist_ok=True)

    def info(self, revision: str | None = None) -> Any:
        """What the Hub tells of a revision; `None` where there is no such repository or revision."""
        try:
            with reading(self.repo_id, "a revision"):
                found = self.api.repo_info(self.repo_id, revision=revision or self.branch)
                commit_name(found.sha)
                return found
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None

    @surfacing
    def head(self, revision: str | None = None) -> str:
        """The full sha of a revision, by default of the branch's newest commit.

        While the Hub cannot be reached, it is what this machine saw last. A [`HubError`] if there is no such revision.
        """
        try:
            sha = self._sha(revision)
        except (OfflineModeIsEnabled, seam.transport_error()) as error:
            seen = self._cached_sha(revision or self.branch)
            if seen is None:
                raise HubError(
                    f"There is no folder {self.repo_id} here. As a repository it cannot be looked up, and nothing of "
                    f"it is cached: {error}"
                ) from None
            logger.warning("%s cannot be looked up: reading the cached commit %s", self.repo_id, seen)
            return seen
        if sha is None:
            raise HubError(
                f"There is no folder {self.repo_id} here, and no repository {self.repo_id} on the Hub with a revision "
                f"{revision or self.branch}, or no access to it. Check the name, and log in (`hf auth login`) if it "
                "is private."
            )
        self._seen(revision or self.branch, sha)
        return sha

    def _sha(self, revision: str | None) -> str | None:
        if revision is not None:
            info = self.info(revision)
            return info and info.sha
        try:
            return self.branch_head()
        except RepositoryNotFoundError:
            return None

    def branch_head(self) -> str | None:
        """The branch's newest commit. After a rewrite of the history the info may name an older one for a while."""
        with reading(self.repo_id, "the branches"):
            branches = self.api.list_repo_refs(self.repo_id).branches
            return next((commit_name(ref.target_commit) for ref in branches if ref.name == self.branch), None)

    @surfacing
    def has(self, path: str, revision: str) -> bool:
        """Whether a revision has a file. A [`HubError`] if it is not in the cache, and the Hub cannot be reached."""
        if self.is_cached(path, revision):
            return True
        try:
            return any(found.path == path for found in self._entries_of(path, revision))
        except (OfflineModeIsEnabled, seam.transport_error()) as error:
            raise HubError(
                f"{path} of {self.repo_id} at {revision} is not in the cache, and the Hub cannot be reached: {error}"
            ) from None

    def _entries_of(self, path: str, revision: str) -> list[Any]:
        with reading(self.repo_id, path):
            return [entry(found) for found in self.api.get_paths_info(self.repo_id, [path], revision=revision)]

    @surfacing
    def file(self, path: str, revision: str, limit: int | None = None) -> Path:
        """A file of a revision, from the cache where it is there.

        A [`StoreError`] if there is none, or if it has more than `limit` bytes, which is asked before the download.
        """
        try:
            if limit is not None and not self.is_cached(path, revision):
                for found in self._entries_of(path, revision):
                    size = getattr(found, "size", 0)
                    if size > limit:
                        raise StoreError(f"{path} of {self.repo_id} has {size} bytes, more than the {limit} allowed.")
            with reading(self.repo_id, path):
                return Path(self.api.hf_hub_download(self.repo_id, path, revision=revision))
        except LocalEntryNotFoundError as error:
            raise StoreError(
                f"{path} of {self.repo_id} is not in the cache, and the Hub cannot be reached."
            ) from error
        except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
            raise StoreError(f"{self.repo_id} has no file {path} at {revision}.") from None

    def is_cached(self, path: str, revision: str) -> bool:
        """Whether a file of a revision is in the cache of this machine."""
        return isinstance(try_to_load_from_cache(self.repo_id, path, revision=revision), str)

    def _seen(self, revision: str, sha: str) -> None:
        """Notes what a name leads to, as what this machine saw last: while offline it goes back to nothing older."""
        ref = seam.ref_file(self.repo_id, revision)
        try:
            with _NOTING:
                if not ref.exists() or ref.read_text() != sha:
                    # A name that leads to nothing would make the cache count as damaged.
                    seam.snapshot_folder(self.repo_id, sha).mkdir(parents=True, exist_ok=True)
                    write_atomic(ref, sha.encode())
        except OSError as error:
            logger.warning("%s of %s cannot be noted in the cache: %s", revision, self.repo_id, error)

    def _cached_sha(self, revision: str) -> str | None:
        ref = seam.ref_file(self.repo_id, revision)
        if ref.exists():
            return ref.read_text().strip()
        return revision if re.fullmatch("[0-9a-f]{40}", revision) else None

    def tree(self, revision: str) -> dict[str, Any]:
        """Every file of a revision, by its path."""
        with reading(self.repo_id, "the files"):
            found = map(entry, self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision))
            return {one.path: one for one in found if hasattr(one, "size")}

    @surfacing
    def paths(self, revision: str) -> set[str]:
        """The paths of every file of a revision."""
        return set(self.tree(revision))

    # ---- writing ----

    @surfacing
    def commit(
        self, message: str, parent: str, files: Mapping[str, bytes | Path], removed: Iterable[str] = ()
    ) -> CommitInfo:
        """One commit on top of `parent`. The files of a folder are uploaded together, and apart from other folders'.

        On the Hub's storage files that are uploaded in one session may share a block, which then outlives one of them.
        The message has to be unique: by it a commit is recognised whose answer was lost. Of `removed`, folders end
        with a slash.

        Raises:
            HeadMovedError: the head is not `parent` any more; look again.
            HubError: no right to write, or the Hub cannot be reached: whether the commit arrived is not known.
            StoreError: a weight file would not be in large-file storage.
        """
        removed = list(removed)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                info = self._sent(message, parent, files, removed, last=attempt == ATTEMPTS)
            except seam.transport_error() as error:
                if attempt == ATTEMPTS:
                    raise HubError(
                        f"{self.repo_id} could not be reached while a commit was sent ({error}). Whether it arrived "
                        "is not known. Run the command again: what arrived is recognised."
                    ) from error
                info = None
            if info is not None:
                self._seen(self.branch, info.oid)
                return info
            logger.warning("commit %r to %s did not arrive: sending it again", message, self.repo_id)
            time.sleep(SETTLING_SECONDS)
        raise AssertionError("unreachable")

    def _sent(
        self, message: str, parent: str, files: Mapping[str, bytes | Path], removed: Iterable[str], last: bool
    ) -> CommitInfo | None:
        """A commit that was sent, and arrived whatever was answered; `None` where it did not and may be sent again."""
        try:
            return self._commit_once(message, parent, files, removed)
        except RepositoryNotFoundError:
            raise
        except (HfHubHTTPError, HubError, OSError, seam.transport_error()) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403):
                raise self._no_right(error) from None
            landed = self.landed(message)
            if landed is not None:
                return landed
            if status in (409, 412) or self._sha(None) != parent:  # not `head`, which may be that of the cache
                raise HeadMovedError(f"{self.repo_id} has changed since {parent}.") from error
            if last or (status is not None and status < 500):
                raise
            return None

    def _commit_once(
        self, message: str, parent: str, files: Mapping[str, bytes | Path], removed: Iterable[str]
    ) -> CommitInfo:
        # Fresh operations for every attempt: they remember what the Hub said when they were sent the first time.
        additions: dict[str, list[Any]] = defaultdict(list)
        for path, content in sorted(files.items()):
            source = content if isinstance(content, bytes) else str(content)
            additions[os.path.dirname(path)].append(CommitOperationAdd(path, source))
        for operations in additions.values():
            with reading(self.repo_id, "an upload"):
                self.api.preupload_lfs_files(self.repo_id, operations, revision=self.branch)
        operations = [operation for group in additions.values() for operation in group]
        plain = [
            operation.path_in_repo
            for operation in operations
            if operation.path_in_repo.endswith(".safetensors") and not seam.is_large_file(operation)
        ]
        if plain:
            raise StoreError(
                f"{self.repo_id} would keep {plain[0]} as a plain git file, which no purge removes from its history. "
                "Its .gitattributes has to track *.safetensors as large files."
            )
        operations += [CommitOperationDelete(path, is_folder=path.endswith("/")) for path in removed]
        with reading(self.repo_id, "a commit"):
            made = self.api.create_commit(
                self.repo_id, operations, commit_message=message, revision=self.branch, parent_commit=parent
            )
            commit_name(made.oid)
            return made

    @surfacing
    def check_writable(self) -> None:
        """Asks what every upload asks first; uploads nothing. A [`HubError`] if there is no right to write."""
        try:
            asked = [CommitOperationAdd("README.md", b"#")]
            with reading(self.repo_id, "an upload"):
                self.api.preupload_lfs_files(self.repo_id, asked, revision=self.branch)
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise self._no_right(error) from None

    def _no_right(self, error: Exception) -> HubError:
        return HubError(
            f"No right to write to {self.repo_id}: {error}. Nothing was changed there. Use a token with write access."
        )

    def landed(self, message: str) -> CommitInfo | None:
        """The commit with this message, if it is among the newest ones after all."""
        for commit in self._commits(self.branch)[:20]:
            if commit.title == message:
                url = f"{self.api.endpoint}/{self.repo_id}/commit/{commit.commit_id}"
                return CommitInfo(commit_url=url, commit_message=message, commit_description="", oid=commit.commit_id)
        return None

    @surfacing
    def last_commit(self, revision: str) -> CommitInfo:
        """A commit that is there already, as one that was just made."""
        commit = self._commits(revision)[0]
        url = f"{self.api.endpoint}/{self.repo_id}/commit/{revision}"
        return CommitInfo(commit_url=url, commit_message=commit.title, commit_description="", oid=revision)

    @surfacing
    def is_private(self) -> bool:
        """Whether only those with access can read the repository. A [`HubError`] where that is not said."""
        private = getattr(self.info(), "private", None)
        if not isinstance(private, bool):
            raise HubError(f"The Hub does not say whether {self.repo_id} is private. Nothing was sent.")
        return private

    # ---- the history ----

    def headers(self) -> dict[str, str]:
        """For requests that the client has no method for."""
        return seam.headers(self.api.token, self.api.library_name)

    def refs(self) -> list[tuple[str, str]]:
        """Full names of branches, tags, pull requests and converted files, with the commit that each leads to."""
        with reading(self.repo_id, "the refs"):
            refs = self.api.list_repo_refs(self.repo_id, include_pull_requests=True)
            found = (*refs.branches, *refs.tags, *(refs.pull_requests or ()), *refs.converts)
            return [(text(ref.ref), commit_name(ref.target_commit)) for ref in found]

    def commits(self, revision: str) -> list[str]:
        """The commits that a revision leads to, newest first."""
        return [commit.commit_id for commit in self._commits(revision)]

    def _commits(self, revision: str) -> list[Any]:
        """At least one: a revision that is there leads to a commit."""
        with reading(self.repo_id, "the commits"):
            found = list(self.api.list_repo_commits(self.repo_id, revision=revision))
            for commit in found:
                commit_name(commit.commit_id), text(commit.title)
            if not found:
                raise ValueError("there are none")
            return found

    def revisions_with(self, wanted: Callable[[str, Any], bool]) -> list[str]:
        """Refs and commits that have a file for which `wanted` says so, given its path and its entry in the tree."""
        serves: dict[str, bool] = {}
        names = []
        try:
            for name, _ in self.refs():
                commits = self.commits(name)
                for revision in commits:
                    if revision not in serves:
                        serves[revision] = any(wanted(path, entry) for path, entry in self.tree(revision).items())
                if serves[commits[0]]:
                    names.append(name)
        except (HfHubHTTPError, OfflineModeIsEnabled, seam.transport_error()) as error:
            raise HubError(f"The history of {self.repo_id} cannot be looked at: {error}") from None
        return [*names, *(revision for revision, found in serves.items() if found)]
