"""Checks of what a store publishes: its manifest, its stages and the root adapter, without key or state.

Each check is a generator of findings: a text says what is broken, a [`NotChecked`] what could not be told. `audit.py`
runs them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import S3TError
from ..files import inside, read_json
from ..lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from ..plan.tree import Stage
from .folder import MANIFEST, StoreFolder
from .manifest import DAMAGED, Manifest
from .stage_contents import read_header, stage_findings

TENSOR_FILES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npy", ".npz", ".h5", ".gguf", ".onnx", ".pkl", ".arrow",
)  # fmt: skip
"""Endings of files that may hold tensors or rows; in a store only the manifest's own may."""

MALFORMED = (S3TError, OSError, *DAMAGED)
"""What reading a damaged or hostile file raises."""


class NotChecked(Exception):
    """A finding that says what could not be checked, and why."""


Findings = Iterator[str | NotChecked]

FindingsOf = Callable[[StoreFolder, Manifest], Findings]


def _check_files(folder: StoreFolder, manifest: Manifest) -> Findings:
    for stage, files in sorted(manifest.stages.items()):
        for name, digest in sorted(files.items()):
            path = inside(folder.path, f"{stage.name}/{name}")
            if not path.is_file():
                yield f"{stage.name}/{name} is missing"
            elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                yield f"{stage.name}/{name} is not the file that was trained: its sha256 differs from the manifest's"


def _check_tree(folder: StoreFolder, manifest: Manifest) -> Findings:
    data, plan, recipe = read_json(folder.path / MANIFEST), manifest.plan, manifest.recipe
    for stage in sorted(manifest.stages):
        named = data["stages"][stage.name].get("parent")
        if named != (stage.parent.name if stage.parent else None):
            yield f"{stage.name}: the manifest names {named!r} as its parent"
        if stage.parent and stage.parent not in manifest.stages:
            yield f"{stage.name}: its parent {stage.parent.name} is not in the store, so it cannot be served"
    if data["served"] != manifest.to_json()["served"]:
        yield "the served prefixes that the manifest names are not those that follow from its stages"
    if (recipe["partition"]["num_shards"], recipe["partition"]["num_slices"]) != (plan.num_shards, plan.num_slices):
        yield "plan and partition differ in their numbers of shards or slices"


def _check_contents(folder: StoreFolder, manifest: Manifest) -> Findings:
    recipe = manifest.recipe["config"]
    whole = recipe["stage_parameters"] != "layer_group"
    alike: dict[int, dict[Stage, frozenset[tuple[str, tuple[int, ...]]]]] = {}
    for stage in sorted(manifest.stages):
        path = inside(folder.path, stage.name)
        try:
            header = read_header(path / WEIGHTS_FILE)
            yield from stage_findings(stage, recipe, read_json(path / CONFIG_FILE), header)
        except MALFORMED as error:
            yield f"{stage.name} cannot be read: {type(error).__name__}: {error}"
            continue
        depth = 0 if whole else stage.depth
        shapes = frozenset((name, tuple(entry["shape"])) for name, entry in header.items())
        alike.setdefault(depth, {})[stage] = shapes
    for tensors in alike.values():
        usual = Counter(tensors.values()).most_common(1)[0][0]
        for stage, shapes in tensors.items():
            odd = sorted({name for name, _ in shapes ^ usual})
            if odd:
                yield f"{stage.name}: it has other tensors than most stages of its depth: {', '.join(odd[:3])}"


def _check_surplus(folder: StoreFolder, manifest: Manifest) -> Findings:
    expected = {f"{stage.name}/{name}" for stage, files in manifest.stages.items() for name in files}
    expected |= set(manifest.root or ())
    folders = manifest.names | {f"shard-{stage.shard:02d}" for stage in manifest.stages}
    resumable = (folder.private / "running", folder.private / "scratch")
    for path in _walk(folder.path):
        relative = path.relative_to(folder.path).as_posix()
        in_shard = relative.startswith("shard-")
        if relative == ".git":
            yield NotChecked(".git: its history may hold stages that were removed since")
        elif path.is_dir() and not path.is_symlink():
            if in_shard and relative not in folders:
                yield f"{relative}/ is no stage of the manifest"
        elif relative not in expected and (in_shard or path.suffix in TENSOR_FILES):
            if not any(path.is_relative_to(scratch) for scratch in resumable):
                yield f"{relative} is not in the manifest"


def _walk(root: Path) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink() and path.name != ".git":
            yield from _walk(path)


def _check_root(folder: StoreFolder, manifest: Manifest) -> Findings:
    live = folder.live(manifest)
    files, names = folder.root_files(live), [end.name for end in live.served_ends]
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path, recorded = folder.path / name, (manifest.root or {}).get(name)
        found = path.read_bytes() if path.is_file() else None
        if found != files.get(name):
            what = "is missing" if found is None else "is not what the served prefixes give"
            yield f"{name} {what}: {', '.join(names) or 'none'}. After a training that did not finish, run it again"
        if recorded != (hashlib.sha256(files[name]).hexdigest() if name in files else None):
            yield f"{name}: the manifest's sha256 is not that of the served prefixes' adapter"


PUBLISHED_CHECKS: dict[str, FindingsOf] = {
    "stage files are the manifest's": _check_files,
    "parents, plan and served prefixes agree": _check_tree,
    "stages own their layers and nothing else": _check_contents,
    "nothing else lies in the store": _check_surplus,
    "the root adapter is the served model": _check_root,
}
"""By what should hold."""
