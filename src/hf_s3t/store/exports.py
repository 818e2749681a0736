"""Copies that leave the store for stock runtimes: a plain adapter folder, or a whole model with the adapter merged in.

An export is written beside the store and belongs to whoever asked for it, so it is on record (`.s3t/exports.json`)
before its first byte is written: a deletion names every copy that still carries the influence, or makes it anew from
what is live. What a copy holds while it is being replaced is the old and the new, and the record says both. When a
deletion calls for this is for `deletion.py`.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StateError, StoreError
from ..files import install_folder, json_bytes, read_json, remove, sync_folder, write_atomic
from ..lora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, average
from ..plan.tree import Stage
from .base_model import HAND_IN, check_base, check_unquantised, load_base
from .folder import StoreFolder
from .manifest import Manifest
from .state import Tombstone

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

EXPORTS = "exports.json"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, f".{CONFIG_FILE}.tmp", f".{WEIGHTS_FILE}.tmp")
MERGED_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
"""Names of the files of an export; whatever else lies in its folder, such as a tokenizer, is its owner's."""


@dataclass(frozen=True)
class Record:
    """What is known of one export.

    Args:
        stages (`tuple[str, ...]`): names of all stages whose tensors are in it, or may be after an interruption.
        prefix (`str`, *optional*): the stage that was asked for; `None`: the root adapter.
        merge (`bool`): whether it is a whole model.
        base (`str`, *optional*): where a merged one's base model came from; `None`: it was handed in as a module.
        generation (`int`): the store's when it was made. What was deleted later, it may carry.
    """

    stages: tuple[str, ...]
    prefix: str | None
    merge: bool
    base: str | None
    generation: int

    def carries(self, deleted: Iterable[Tombstone]) -> bool:
        """Whether it was made of what something deleted depends on, before that was deleted."""
        places = {place for name in self.stages for place in Stage.from_name(name).slices}
        return any(stone.generation > self.generation and places & stone.places for stone in deleted)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `.s3t/exports.json`."""
        return asdict(self) | {"stages": list(self.stages)}


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


# ---- the record ----


def read_exports(folder: StoreFolder) -> dict[str, Record]:
    """Every export on record, by its path."""
    path = folder.private / EXPORTS
    return records_from_json(read_json(path)) if path.exists() else {}


def records_from_json(data: Any) -> dict[str, Record]:
    """Reads the record of exports.

    Raises:
        StateError: it is none.
    """
    try:
        return {path: Record(**{**fields, "stages": tuple(fields["stages"])}) for path, fields in data.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise StateError(
            f"The record of exports is damaged ({error}). Restore it from a backup of the state."
        ) from None


def records_to_json(records: Mapping[str, Record]) -> dict[str, Any]:
    """The record of exports as plain data."""
    return {path: record.to_json() for path, record in records.items()}


def write_exports(folder: StoreFolder, records: Mapping[str, Record]) -> None:
    """Replaces the record of exports, durably."""
    folder.write_private(EXPORTS, json_bytes(records_to_json(records)))


def carrying(folder: StoreFolder, deleted: Iterable[Tombstone]) -> list[str]:
    """Paths of the exports that are still there and carry the influence of something deleted."""
    deleted = list(deleted)
    return [path for path, record in read_exports(folder).items() if record.carries(deleted) and _present(Path(path))]


def _present(path: Path) -> bool:
    return os.path.lexists(path) or _scratch(path).exists()


def _scratch(path: Path) -> Path:
    """Where a merged model is written before it is put in place: beside its folder, as it may need its disk."""
    return path.with_name(f".{path.name}.hf_s3t")


# ---- what an export is made of ----


def export_source(folder: StoreFolder, stage: Stage | None, manifest: Manifest) -> tuple[list[Stage], Adapter | None]:
    """The last stages of the prefixes that an export is made of, and their adapter.

    Args:
        stage ([`Stage`], *optional*): the end of a prefix; `None`: the root adapter.
        manifest ([`Manifest`]): of the stages that may be served.

    Returns:
        `tuple`: the adapter is `None` where there is no root adapter.
    """
    if stage is not None:
        return [stage], folder.assemble(stage.shard, stage.prefix, manifest)
    served = [Stage(shard, order) for shard, order in sorted(manifest.plan.served(manifest.stages).items())]
    return served, average([folder.assemble(end.shard, end.prefix, manifest) for end in served])


def merged_model(base: nn.Module, adapter: Adapter) -> nn.Module:
    """An adapter merged into its base model, which is changed: LoRA added to the weights, heads put in place.

    Raises:
        ValueError: the adapter does not fit the model.
    """
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
    """A copy of a base model that was handed in: merging changes weights, and the caller's stay as they are.

    Raises:
        ValueError: it is quantised, or has adapters.
        StoreError: it is another one than the store was trained on.
    """
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
    """Writes an export, on record before its first byte. Runs under the store's write lock.

    Args:
        target (`Path`): its folder, resolved.
        stage ([`Stage`], *optional*): the end of a prefix; `None`: the root adapter.
        base (`torch.nn.Module`, *optional*): to merge into, and change; `None`: only the adapter is written.
        base_name (`str`, *optional*): where the base came from, if it can be loaded again.

    Raises:
        StoreError: there is no such adapter.
        ValueError: `target` holds something else, or the base does not fit.
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
    if known is not None and _present(target) and known.merge != record.merge:
        kind = "a merged model" if known.merge else "an adapter"
        raise ValueError(f"{target} holds {kind} that was exported before. Remove it, or name another folder.")
    if record.merge and known is None and target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} holds files that are no export of this store. Name a folder that is new or empty.")


def _replace(
    folder: StoreFolder, target: Path, record: Record, ends: list[Stage], adapter: Adapter, base: nn.Module | None
) -> Export:
    records = read_exports(folder)
    known, meanwhile = records.get(str(target)), record
    if known is not None and _present(target):
        both = tuple(sorted({*known.stages, *record.stages}))
        meanwhile = replace(record, stages=both, generation=min(known.generation, record.generation))
    write_exports(folder, {**records, str(target): meanwhile})
    if base is None:
        done = _write_adapter(target, ends, adapter)
    else:
        done = _write_merged(target, ends, adapter, base)
    if meanwhile != record:
        write_exports(folder, {**records, str(target): record})
    what = f"{'merged model' if base is not None else 'adapter'} of {', '.join(end.name for end in ends)}"
    logger.info("%s in %s: rank %d, %d parameters, %d bytes", what, target, done.rank, done.parameters, done.bytes)
    return done


def _write_adapter(target: Path, ends: list[Stage], adapter: Adapter) -> Export:
    files = adapter.files({"export": [end.name for end in ends]})
    for name in (WEIGHTS_FILE, CONFIG_FILE):  # as in the store: an older config beside new weights misses layers only
        write_atomic(target / name, files[name])
    parameters = sum(value.size for value in adapter.arrays.values())
    return _done(target, ends, adapter, parameters, sum(map(len, files.values())))


def _write_merged(target: Path, ends: list[Stage], adapter: Adapter, base: nn.Module) -> Export:
    scratch = _scratch(target)
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

    Args:
        paths (`Iterable[str]`): of these exports.
        generation (`int`): of the deletion: an export that was made since is clean.
        refresh (`bool`): whether each one is made anew from what is live, or removed where nothing of it is.

    Returns:
        `dict[str, list[str]]`: paths by what to call them in a receipt: `"exports"` (still carrying the influence),
        `"exports_refreshed"`, `"exports_removed"`.
    """
    found: dict[str, list[str]] = {"exports": [], "exports_refreshed": [], "exports_removed": []}
    for path in paths:
        outcome: str | None = "exports"
        try:
            if refresh:
                outcome = _refresh(folder, Path(path), generation)
            elif _scratch(Path(path)).exists():  # half a model that nobody will finish
                remove(_scratch(Path(path)))
                outcome = "exports" if _present(Path(path)) else None
        except Exception as error:  # whatever keeps a copy from being made anew, the deletion itself must end
            logger.error("the export in %s still carries the influence, it could not be made anew: %s", path, error)
        if outcome is not None:
            found[outcome].append(path)
    return found


def _refresh(folder: StoreFolder, path: Path, generation: int) -> str | None:
    records = read_exports(folder)
    record = records.get(str(path))
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
        write_exports(folder, {other: kept for other, kept in records.items() if other != str(path)})
        return "exports_removed"
    if not _present(path):
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
    remove(_scratch(path))
    _take_away_files(path, MERGED_FILES if record.merge else ADAPTER_FILES)
    if path.is_dir() and not any(path.iterdir()):
        remove(path)


def _take_away_files(path: Path, names: Iterable[str]) -> None:
    for file in path.iterdir() if path.is_dir() else ():
        if any(fnmatch(file.name, name) for name in names):
            remove(file)
