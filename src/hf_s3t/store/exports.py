"""Copies that leave the store for stock runtimes: a plain adapter folder, or a whole model with the adapter merged in.

An export belongs to whoever asked for it, so it is on record before its first byte is written: a
deletion names every copy that still carries the influence, or makes it anew from what is live. While a copy is being
replaced it holds the old and the new, and the record says both.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StoreError
from ..files import install_folder, remove, sync_folder, write_atomic, write_durable
from ..lora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from ..plan.tree import Stage
from .base_model import HAND_IN, check_base, check_unquantised, load_base
from .export_records import Record, present, read_exports, scratch_of, write_export_record
from .folder import StoreFolder
from .manifest import Manifest

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, f".{CONFIG_FILE}.tmp", f".{WEIGHTS_FILE}.tmp")
MERGED_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
"""Names of the files of an export; whatever else lies in its folder, such as a tokenizer, is its owner's."""


@dataclass(frozen=True)
class Export:
    """An export that was written.

    Args:
        path (`str`): its folder.
        stages (`tuple[str, ...]`): names of the stages that it was made of.
        rank (`int`): `r` of the adapter; for the root adapter of several shards the sum of theirs.
        parameters (`int`): numbers in its files: of the adapter, or of the whole model.
        bytes (`int`): size of its files.
    """

    path: str
    stages: tuple[str, ...]
    rank: int
    parameters: int
    bytes: int


# ---- what an export is made of ----


def export_source(folder: StoreFolder, stage: Stage | None, manifest: Manifest) -> tuple[list[Stage], Adapter | None]:
    """The last stages of the prefixes that an export is made of, and their adapter.

    The stage is the end of a prefix; `None`: the root adapter, which there may not be.
    """
    if stage is not None:
        return [stage], folder.assemble(stage.shard, stage.prefix, manifest)
    return manifest.served_ends, folder.assemble_root(manifest)


def merged_model(base: nn.Module, adapter: Adapter) -> nn.Module:
    """An adapter merged into its base model, which is changed: LoRA added to the weights, heads put in place."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    try:
        model: Any = get_peft_model(base, LoraConfig(**adapter.config))  # type: ignore[arg-type]
        unexpected = set_peft_model_state_dict(model, adapter.tensors).unexpected_keys
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"The adapter does not fit this base model ({error}). {HAND_IN}") from error
    if unexpected:
        raise ValueError(f"The adapter has tensors that this base model has no place for: {unexpected[:3]}. {HAND_IN}")
    return model.merge_and_unload(safe_merge=True)  # unties a head that was trained from its embedding


def given_base(folder: StoreFolder, model: nn.Module) -> nn.Module:
    """A copy of a base model that was handed in: merging changes weights, and the caller's stay as they are."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_unquantised(getattr(model, "config", None), "The base model")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("`base_model` has adapters already. Load the plain base model once more and pass that.")
    check_base(model, folder.manifest().recipe)
    return copy.deepcopy(model)


# ---- writing ----


def write_export(
    folder: StoreFolder, target: Path, stage: Stage | None, base: nn.Module | None, base_name: str | None
) -> Export:
    """Writes an export; see [`S3TStore.export`]. Runs under the store's write lock.

    The stage is the end of a prefix; `None`: the root adapter. A base is merged into, and changed; it has a name if it
    can be loaded again.
    """
    manifest = folder.live()
    ends, adapter = export_source(folder, stage, manifest)
    if adapter is None:
        reason = "several live shards with heads have no single adapter" if ends else "no stage is live"
        raise StoreError(f"There is no root adapter: {reason}. Name a prefix, e.g. `prefix='shard-00/0'`.")
    names = tuple(sorted({above.name for end in ends for above in end.path}))
    asked = stage.name if stage else None
    record = Record(names, asked, base is not None, base_name, manifest.generation)
    _check_target(target, record, read_exports(folder).get(str(target)))
    return _replace(folder, target, record, ends, adapter, base)


def _check_target(target: Path, record: Record, known: Record | None) -> None:
    if known is not None and present(target) and known.merge != record.merge:
        kind = "a merged model" if known.merge else "an adapter"
        raise ValueError(f"{target} holds {kind} that was exported before. Remove it, or name another folder.")
    if record.merge and known is None and target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} holds files that are no export of this store. Name a folder that is new or empty.")


def _replace(
    folder: StoreFolder, target: Path, record: Record, ends: list[Stage], adapter: Adapter, base: nn.Module | None
) -> Export:
    known, meanwhile = read_exports(folder).get(str(target)), record
    if known is not None and present(target):
        both = tuple(sorted({*known.stages, *record.stages}))
        meanwhile = replace(record, stages=both, generation=min(known.generation, record.generation))
    write_export_record(folder, str(target), meanwhile)
    if base is None:
        done = _write_adapter(target, ends, adapter)
    else:
        done = _write_merged(target, ends, adapter, base)
    if meanwhile != record:
        write_export_record(folder, str(target), record)
    what = f"{'merged model' if base is not None else 'adapter'} of {', '.join(end.name for end in ends)}"
    logger.info("%s in %s: rank %d, %d parameters, %d bytes", what, target, done.rank, done.parameters, done.bytes)
    return done


def _write_adapter(target: Path, ends: list[Stage], adapter: Adapter) -> Export:
    files = adapter.files({"export": [end.name for end in ends]})
    scratch = scratch_of(target)
    remove(scratch)
    if not target.exists():
        scratch.mkdir(parents=True)
        for name, data in files.items():
            write_durable(scratch / name, data)
        sync_folder(scratch)
        install_folder(scratch, target)
    else:
        for name in (WEIGHTS_FILE, CONFIG_FILE):  # an older config beside new weights misses layers only
            write_atomic(target / name, files[name])
    parameters = sum(value.size for value in adapter.arrays.values())
    return _done(target, ends, adapter, parameters, sum(map(len, files.values())))


def _write_merged(target: Path, ends: list[Stage], adapter: Adapter, base: nn.Module) -> Export:
    scratch = scratch_of(target)
    remove(scratch)
    model: Any = merged_model(base, adapter)
    model.save_pretrained(scratch)
    size = sum(file.stat().st_size for file in scratch.iterdir())
    _sync(scratch)
    _install(scratch, target)
    return _done(target, ends, adapter, sum(value.numel() for value in model.parameters()), size)


def _done(target: Path, ends: list[Stage], adapter: Adapter, parameters: int, size: int) -> Export:
    return Export(str(target), tuple(end.name for end in ends), adapter.config["r"], parameters, size)


def _install(scratch: Path, target: Path) -> None:
    """Puts a complete merged model in place; one that is there goes first, so that no reader mixes the two."""
    if not target.exists():
        install_folder(scratch, target)
        return
    _take_away_files(target, MERGED_FILES)
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == "config.json"):  # by which it is loaded: last
        os.replace(file, target / file.name)
    sync_folder(target)
    remove(scratch)


def _sync(scratch: Path) -> None:
    for path in scratch.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(scratch)


# ---- after a deletion ----


def settle(folder: StoreFolder, paths: Iterable[str], generation: int, refresh: bool) -> dict[str, Any]:
    """What becomes of exports that a deletion found to carry the influence; may be run again from any point.

    With `refresh` each one is made anew from what is live, or removed where nothing of it is; one that was made since
    the deletion's generation is clean. Returns their paths, by the fields of a receipt that name them.
    """
    found: dict[str, list[str]] = {"exports": [], "exports_refreshed": [], "exports_removed": []}
    for path in paths:
        outcome: str | None = "exports"
        try:
            if refresh:
                outcome = _refresh(folder, Path(path), generation)
            elif scratch_of(Path(path)).exists():  # half a model that nobody will finish
                remove(scratch_of(Path(path)))
                outcome = "exports" if present(Path(path)) else None
        except Exception as error:  # whatever keeps a copy from being made anew, the deletion itself must end
            logger.error("the export in %s still carries the influence, it could not be made anew: %s", path, error)
        if outcome is not None:
            found[outcome].append(path)
    return found


def _refresh(folder: StoreFolder, path: Path, generation: int) -> str | None:
    record = read_exports(folder).get(str(path))
    if record is None:
        return "exports_removed"
    if record.generation >= generation:
        return "exports_refreshed"
    manifest = folder.live()
    path_of_asked = Stage.from_name(record.prefix).path if record.prefix else ()
    begun = [stage for stage in path_of_asked if stage in manifest.stages]  # of a prefix only the end can be missing
    nothing = record.prefix is not None and not begun
    ends, adapter = ([], None) if nothing else export_source(folder, begun[-1] if begun else None, manifest)
    if adapter is None:
        _take_away(path, record)
        with folder.changing() as state:
            state.forget_export(str(path))
        return "exports_removed"
    if not present(path):
        return None  # its owner removed it
    base = None
    if record.merge and record.base is None:
        raise StoreError("its base model was handed in as a module. Export to the same folder again, with the base")
    if record.merge:
        base, _ = load_base(folder, record.base, unquantised=True)
    names = tuple(sorted({above.name for end in ends for above in end.path}))
    _replace(folder, path, replace(record, stages=names, generation=manifest.generation), ends, adapter, base)
    return "exports_refreshed"


def _take_away(path: Path, record: Record) -> None:
    """Removes what we wrote, and the folder if nothing else is in it."""
    remove(scratch_of(path))
    _take_away_files(path, MERGED_FILES if record.merge else ADAPTER_FILES)
    if path.is_dir() and not any(path.iterdir()):
        remove(path)


def _take_away_files(path: Path, names: Iterable[str]) -> None:
    for file in path.iterdir() if path.is_dir() else ():
        if any(fnmatch(file.name, name) for name in names):
            remove(file)
