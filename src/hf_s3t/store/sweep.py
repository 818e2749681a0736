"""Removes what the manifest does not account for: removed stages, half-written files, scratch of deleted examples."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..errors import StateError
from ..files import remove
from ..plan.tree import Stage
from .activation_blocks import sweep_activations
from .database import Place, StateDatabase
from .folder import StoreFolder
from .manifest import Manifest
from .sources import FolderSource

logger = logging.getLogger(__name__)


def sweep(
    folder: StoreFolder, manifest: Manifest, places: Iterable[Place] = (), state: StateDatabase | None = None
) -> None:
    """Removes every file that the manifest does not account for, and all scratch that was computed from `places`.

    A state that is being changed is handed in.
    """
    hit, failed = set(places), _Failed()
    privates = {folder.private}
    if isinstance(folder.source, FolderSource):  # its trainings left their scratch there, wherever the state is now
        privates.add(folder.path / ".s3t")
    for private in privates:
        _sweep_running(private, hit)
        sweep_activations(private, hit, state.has_all if state is not None else partial(_has_all, folder))
    if not isinstance(folder.source, FolderSource):  # a commit has what its manifest says
        return
    for shard in folder.path.glob("shard-*"):
        if shard.is_symlink():  # never ours, and what it leads to is not the store's to remove
            remove(shard)
    for path in [*folder.path.glob("shard-*/*"), *folder.path.glob("shard-*/.*")]:
        stage = _stage(path.relative_to(folder.path).as_posix())
        if stage is None or stage not in manifest.stages or stage.slices & hit:
            with failed.told(path, stage is None or bool(stage.slices & hit)):
                remove(path)
    for shard in folder.path.glob("shard-*"):
        if shard.is_dir() and not any(shard.iterdir()):
            shard.rmdir()
    scratch = (private / "scratch" for private in privates)
    for scrap in [*folder.path.glob(".*.tmp"), *folder.path.glob(".s3t/**/.*.tmp"), *scratch]:
        remove(scrap)
    if failed.ours is not None:
        raise failed.ours


class _Failed:
    """What could not be removed: what another deletion hit keeps nobody else's from its end."""

    ours: OSError | None = None

    @contextmanager
    def told(self, path: Path, ours: bool) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if ours:
                self.ours = self.ours or error
            else:
                logger.error("%s is not served and could not be removed: %s", path, error)


def _has_all(folder: StoreFolder, digests: Iterable[str]) -> bool:
    """Whether the index has all of some examples: yes where the state is lost, no where it cannot be read."""
    if not folder.database.exists():
        return True
    try:
        with folder.reading(lost=True) as state:
            return state.store is None or state.has_all(digests)
    except StateError as error:
        logger.warning("a cached activation is removed, because it is not known whose states it holds: %s", error)
        return False


def _sweep_running(private: Path, hit: set[Place]) -> None:
    for running in (private / "running").glob("*"):
        stage = _stage(running.name.replace("_", "/"))
        if stage is None or stage.slices & hit:
            remove(running)


def _stage(name: str) -> Stage | None:
    try:
        return Stage.from_name(name)
    except ValueError:
        return None
