"""Where the published files of a store are: in a folder, or in one commit of a repository on the Hub.

Both are read and written by the same four verbs. A folder changes with every one of them; for a repository what is put
and dropped waits until `publish` commits all of it at once. What the files mean is for `folder.py`.
"""

from __future__ import annotations

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub.constants import HF_HOME

from ..errors import HeadMovedError, StoreError
from ..files import inside, remove, write_atomic
from ..lora.adapter import WEIGHTS_FILE
from ..plan.tree import Stage

if TYPE_CHECKING:
    from ..hub.repo import HubRepo

logger = logging.getLogger(__name__)

MANIFEST = "s3t.json"
TOMBSTONES = "tombstones.json"
"""In private repositories: keyed digests of what was deleted, without their key."""


TRIALS = 12
"""How often something is made anew because others committed first."""
LONGEST_WAIT = 3.0
"""Seconds between two trials, at most."""


_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repo_id(name: str | os.PathLike[str]) -> bool:
    """Whether a store's name is that of a repository: `"me/model"`, where no such folder exists. A `Path` is a folder.

    >>> is_repo_id("me/model"), is_repo_id(Path("me/model")), is_repo_id("out")
    (True, False, False)
    """
    return isinstance(name, str) and bool(_REPO_ID.fullmatch(name)) and not os.path.exists(name)


def hides_repo(name: str) -> bool:
    """Whether a folder has the name of a repository, which then is not looked for."""
    return bool(_REPO_ID.fullmatch(name)) and os.path.exists(name)


class FolderSource:
    """Published files in a folder."""

    repo_id: str | None = None

    def __init__(self, path: Path):
        self.path = path

    def has(self, relative: str) -> bool:
        """Whether there is such a file."""
        return (self.path / relative).exists()

    def file(self, relative: str, limit: int | None = None) -> Path:
        """Where a file can be read; it may not exist. `limit` is for what has to be downloaded."""
        return inside(self.path, relative)

    def put(self, relative: str, data: bytes) -> None:
        """Replaces a file, durably."""
        write_atomic(self.path / relative, data)

    def drop(self, relative: str) -> None:
        """Removes a file, durably."""
        remove(self.path / relative)

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """A folder changes with every file: there is nothing to keep from other threads."""
        yield

    def look(self) -> None:
        """A folder is always read as it is now."""

    def publish(self, message: str, stages: set[str]) -> Any:
        """A folder has changed already."""

    def check_writable(self) -> None:
        """Writing to a folder tells by itself."""

    def reached(self, places: AbstractSet[tuple[int, int]], live: AbstractSet[str]) -> list[str]:
        """Where removed stages are still served: a folder keeps no history."""
        return []

    def marks(self) -> tuple[Any, ...]:
        """Changes whenever the manifest does."""
        status = os.stat(self.path / MANIFEST if self.has(MANIFEST) else self.path)
        return (status.st_mtime_ns, status.st_size, status.st_ino)


@dataclass
class View:
    """A commit of a repository, and what waits to be committed on top of it."""

    revision: str | None = None
    waiting: dict[str, bytes | Path | None] = field(default_factory=dict)


class RepoSource:
    """Published files in a repository, read at one commit.

    Threads may share it. While one is in [`drafting`], what it reads and what it puts are its own: it commits on top
    of the very commit that it read, wherever others look meanwhile. A revision that is given is read for good. Without
    one it is the head when it is first asked, and at every [`look`].
    """

    def __init__(self, repo: HubRepo, revision: str | None = None):
        self.repo, self._pinned = repo, revision
        self.repo_id: str | None = repo.repo_id
        self._shared = View()
        self._thread = threading.local()
        self._changing = threading.Lock()
        self._changes = 0

    @property
    def _view(self) -> View:
        found: View = getattr(self._thread, "draft", self._shared)
        return found

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """What this thread reads and puts in this block, no other thread moves or sees; may be nested."""
        if hasattr(self._thread, "draft"):
            yield
            return
        self._thread.draft = View()
        try:
            yield
        finally:
            del self._thread.draft
            self._changed()

    def _changed(self) -> None:
        """Lets the others ask for the head before they read on; a head that they asked for earlier is not taken."""
        with self._changing:
            self._changes += 1
            self._shared.revision = None

    @property
    def waiting(self) -> dict[str, bytes | Path | None]:
        """What the next commit changes: contents by path, `None` for what is removed."""
        return self._view.waiting

    @property
    def revision(self) -> str:
        """The commit that is read."""
        return self._view.revision or self._look()

    def look(self) -> None:
        """Goes to the newest commit; what waited is given up."""
        self._look()

    def _look(self) -> str:
        view = self._view
        view.waiting.clear()
        while True:
            changes = self._changes
            head = self.repo.head(self._pinned)
            with self._changing:
                if changes == self._changes or view is not self._shared:
                    view.revision = head
                    return head

    def has(self, relative: str) -> bool:
        """Whether the commit has such a file."""
        return relative in self.waiting or self.repo.has(relative, self.revision)

    def file(self, relative: str, limit: int | None = None) -> Path:
        """Where a file of the commit can be read on this machine, downloaded if it is not there."""
        waiting = self.waiting.get(relative)
        return waiting if isinstance(waiting, Path) else self.repo.file(relative, self.revision, limit)

    def put(self, relative: str, data: bytes | Path) -> None:
        """Replaces a file with the next commit."""
        self.waiting[relative] = data

    def drop(self, relative: str) -> None:
        """Removes a file with the next commit."""
        self.waiting[relative] = None

    def marks(self) -> tuple[Any, ...]:
        """Changes with every commit; asks the Hub."""
        return (self._look(),)

    def publish(self, message: str, stages: set[str]) -> Any:
        """Commits everything that waits, and removes every stage that is not among `stages`.

        It is made on top of the commit that is read. A [`HeadMovedError`] if somebody committed meanwhile: nothing
        was changed.
        """
        self._check_head()
        there = self.repo.paths(self.revision)
        if (self.waiting.get(TOMBSTONES) or TOMBSTONES in there) and not self.repo.is_private():
            logger.warning(
                "%s is public now: its head loses the tombstones, and no more are uploaded. Its history holds them "
                "until a purge.", self.repo.repo_id,
            )  # fmt: skip
            self.drop(TOMBSTONES)
        folders = {"/".join(path.split("/")[:2]) for path in there if re.match(r"shard-[^/]*/[^/]+/", path)}
        gone = [f"{folder}/" for folder in sorted(folders - stages)]
        gone += [path for path, content in self.waiting.items() if content is None and path in there]
        files = {path: content for path, content in self.waiting.items() if content is not None}
        info = self.repo.commit(message, self.revision, files, gone)
        self._changed()
        self._view.revision = info.oid
        self.waiting.clear()
        return info

    def _check_head(self) -> None:
        if self._pinned is not None:
            raise StoreError(
                f"{self.repo.repo_id} was opened at {self._pinned}. Open it without a revision to change it."
            )

    def check_writable(self) -> None:
        """Raises [`StoreError`] unless a commit may be made, before anything is put on record for it."""
        self._check_head()
        self.repo.check_writable()

    def reached(self, places: AbstractSet[tuple[int, int]], live: AbstractSet[str]) -> list[str]:
        """Refs and commits that serve a stage which saw one of some slices: in the history, until a purge.

        Weights of a sha256 in `live` are those of a stage that was trained again since.
        """
        return self.repo.revisions_with(lambda path, entry: bool(_places_of(path, entry, live) & places))

    def places_served(self, live: AbstractSet[str]) -> set[tuple[int, int]]:
        """The slices that removed stages saw which any revision still serves."""
        found: set[tuple[int, int]] = set()

        def note(path: str, entry: Any) -> bool:
            found.update(_places_of(path, entry, live))
            return False  # so that all of them are looked at

        self.repo.revisions_with(note)
        return found

    def forget_unchanged(self) -> None:
        """Takes back what was put and is what the commit has already."""
        for path, content in list(self.waiting.items()):
            if content is None and not self.repo.has(path, self.revision):
                del self.waiting[path]
            elif isinstance(content, bytes) and self.repo.has(path, self.revision):
                if self.repo.file(path, self.revision).read_bytes() == content:
                    del self.waiting[path]


def _places_of(path: str, entry: Any, live: AbstractSet[str]) -> frozenset[tuple[int, int]]:
    """The slices that the stage saw whose weights lie at a path of a tree; none of those that are live."""
    folder, _, name = path.rpartition("/")
    if name != WEIGHTS_FILE or (entry.lfs is not None and entry.lfs.sha256 in live):
        return frozenset()
    try:
        return frozenset(Stage.from_name(folder).slices)
    except ValueError:
        return frozenset()


Done = TypeVar("Done")


def on_top(attempt: Callable[[], Done], look_again: Callable[[], None]) -> Done:
    """Tries to commit until nobody else does so in between."""
    for trial in range(TRIALS):
        try:
            return attempt()
        except HeadMovedError as error:
            logger.info("%s Looking again.", error)
            time.sleep(random.uniform(0, min(0.1 * 2**trial, LONGEST_WAIT)))  # so that two do not keep meeting
            look_again()
    raise StoreError(
        f"{TRIALS} times somebody else committed first. Run the command again later: a deletion is on record, and is "
        "carried out first."
    )


def default_state(repo_id: str) -> Path:
    """Where the state of a repository's store lies where nobody said so: deletions by slice need one, too."""
    return Path(HF_HOME) / "hf_s3t" / repo_id.replace("/", "--")
