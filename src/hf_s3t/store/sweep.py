"""Removes what the manifest does not account for: removed stages, half-written files, scratch of deleted examples."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..files import remove
from ..plan.tree import Stage
from .activation_blocks import sweep_activations
from .folder import StoreFolder
from .manifest import Manifest
from .requests import Place
from .sources import FolderSource


def sweep(folder: StoreFolder, manifest: Manifest, places: Iterable[Place] = ()) -> None:
    """Removes every file that the manifest does not account for, and all scratch that was computed from `places`."""
    hit = set(places)
    privates = {folder.private}
    if isinstance(folder.source, FolderSource):  # its trainings left their scratch there, wherever the state is now
        privates.add(folder.path / ".s3t")
    for private in privates:
        _sweep_running(private, hit)
        sweep_activations(private, hit, folder.index if folder.has_index else None)
    if not isinstance(folder.source, FolderSource):  # a commit has what its manifest says
        return
    for shard in folder.path.glob("shard-*"):
        if shard.is_symlink():  # never ours, and what it leads to is not the store's to remove
            remove(shard)
    for path in [*folder.path.glob("shard-*/*"), *folder.path.glob("shard-*/.*")]:
        try:
            stage = Stage.from_name(path.relative_to(folder.path).as_posix())
        except ValueError:
            stage = None
        if stage is None or stage not in manifest.stages or stage.slices & hit:
            remove(path)
    for shard in folder.path.glob("shard-*"):
        if shard.is_dir() and not any(shard.iterdir()):
            shard.rmdir()
    scratch = (private / "scratch" for private in privates)
    for scrap in [*folder.path.glob(".*.tmp"), *folder.path.glob(".s3t/**/.*.tmp"), *scratch]:
        remove(scrap)


def _sweep_running(private: Path, hit: set[Place]) -> None:
    for running in (private / "running").glob("*"):
        try:
            stage = Stage.from_name(running.name.replace("_", "/"))
        except ValueError:
            remove(running)
            continue
        if stage.slices & hit:
            remove(running)
