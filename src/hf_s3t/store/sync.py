"""Between a folder and a repository: what is pushed, what is pulled, and who obeys whose deletions.

Two machines meet in a repository. The deletions that its manifest names decide: whoever has not seen all of them
pushes nothing. Tombstones, keyed digests without their key, may travel in a private repository; then both sides obey
both. Otherwise a machine that is behind has to be told (`hf-s3t state import`).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..data_derived import with_named
from ..errors import RecipeError, StateError, StoreError
from ..plan.tree import Stage
from .deletion import take_over
from .folder import StoreFolder, digests, stage_files
from .manifest import NOT_KNOWN, Log, Manifest, merged, places_beyond
from .obeyed import with_receipts
from .recipe_differences import check_same
from .sources import TOMBSTONES, RepoSource, on_top
from .sweep import sweep
from .tombstones import put_tombstones, tombstones_hmac

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)


# ---- pushing ----


def push(
    store: StoreFolder, target: StoreFolder, private: bool, tombstones: bool | None, message: str | None = None
) -> CommitInfo:
    """Brings a repository to what a folder holds, in one commit; see [`S3TStore.push`]. Runs under the write lock."""
    source = repository(target)
    source.repo.create(private)
    source.look()
    if (tombstones or (private and not target.exists)) and not source.repo.is_private():
        what = "no tombstones may travel in it" if tombstones else "a store is private unless it is told otherwise"
        raise ValueError(
            f"{source.repo.repo_id} is public, and {what}. Nothing was pushed. Make it private on the Hub, or push "
            "with `private=False`, without tombstones."
        )
    return on_top(partial(_push_once, store, target, source, tombstones, message), source.look)


def _push_once(
    store: StoreFolder, target: StoreFolder, source: RepoSource, tombstones: bool | None, message: str | None
) -> CommitInfo:
    theirs = target.manifest() if target.exists else None
    if theirs is not None:
        check_same_store(store.manifest(), theirs)
        take_over(store, target)
    ours = store.manifest()
    merged = ours if theirs is None else _merged(store, target, ours, theirs)
    known = theirs.stages if theirs is not None else {}
    for stage, files in merged.stages.items():
        if known.get(stage) != files:
            for name in files:
                source.put(f"{stage.name}/{name}", store.source.file(f"{stage.name}/{name}"))
    merged = target.write_root(merged)
    if theirs is None or merged != theirs:
        target.write_manifest(merged)
    carry = source.repo.is_private() if tombstones is None else tombstones
    if not carry:
        source.drop(TOMBSTONES)
    elif store.has_key:
        with store.reading() as state:
            put_tombstones(target, state, store.key)
    source.forget_unchanged()
    if not source.waiting and known.keys() <= merged.stages.keys():
        return source.repo.last_commit(source.revision)
    title = message or f"Generation {merged.generation}"
    return source.publish(f"{title} ({secrets.token_hex(6)})", merged.names)


def _merged(store: StoreFolder, target: StoreFolder, ours: Manifest, theirs: Manifest) -> Manifest:
    """Ours, and what others added to the repository since and no deletion of ours hits."""
    with store.reading() as state:
        up_to_date = state.knows(theirs)
    if not up_to_date:
        raise StateError(
            f"{target.path} obeys deletions (generation {theirs.generation}) that {store.path} has not seen "
            f"(generation {ours.generation}). Nothing was pushed. Bring the state up to date (`hf-s3t state import` "
            "of a backup from the machine that deleted), then pull; or push to a new repository."
        )
    return replace(_newest_recipe(ours, theirs), stages=_joined(ours, theirs), log=merged(theirs.log, ours.log))


def _joined(first: Manifest, second: Manifest) -> dict[Stage, dict[str, str]]:
    """Stages of both that no deletion of the other hits; of two of the same name the first one's."""
    hit = places_beyond(second.log, first.log)
    stages = {stage: files for stage, files in first.stages.items() if not stage.slices & hit}
    hit = places_beyond(first.log, second.log)
    for stage, files in sorted(second.stages.items()):
        kept = stage.parent is None or stages.get(stage.parent) == second.stages.get(stage.parent)
        if stage not in stages and kept and not stage.slices & hit:
            stages[stage] = files
    return stages


def repository(target: StoreFolder) -> RepoSource:
    """The repository of a store that is one."""
    if not isinstance(target.source, RepoSource):
        raise ValueError(
            f"{target.path} is no repository id such as 'me/model'. Give one, and no folder of that name."
        )
    return target.source


def check_same_store(ours: Manifest, theirs: Manifest) -> None:
    """Raises [`StoreError`] or [`RecipeError`] unless both are of one store."""
    if ours.key_check != theirs.key_check:
        raise StoreError(
            "The repository holds another store: its partition key is another one. Use another repository."
        )
    older, newer = sorted((theirs, ours), key=lambda manifest: len(manifest.accepted))
    since = newer.accepted[len(older.accepted) :]
    if newer.accepted != older.accepted + since:
        raise RecipeError(
            "This store and the repository accepted different settings (`accept_recipe`), so their stages no longer "
            "belong to one store. Go on with one of them, and push the other one to a new repository."
        )
    check_same(older.recipe, newer.recipe, [accepted.setting for accepted in since])


def _newest_recipe(manifest: Manifest, other: Manifest) -> Manifest:
    """A manifest with the recipe of the one of two for which more settings were accepted, and what both name."""
    newest = max(manifest, other, key=lambda one: len(one.accepted))
    recipe = with_named(with_named(newest.recipe, manifest.recipe), other.recipe)
    return replace(manifest, recipe=recipe, accepted=newest.accepted)


# ---- pulling ----


def pull(store: StoreFolder, target: StoreFolder) -> Manifest:
    """Brings a folder to what a repository holds; see [`S3TStore.pull`]. Runs under the write lock."""
    repository(target).look()
    theirs = target.manifest()
    if store.exists:
        check_same_store(store.manifest(), theirs)
    take_over(store, target)
    known: Log = {}
    if store.has_state:
        with store.reading() as state:
            known = with_receipts(state.log(), state)
    ours = store.manifest() if store.exists else replace(theirs, stages={}, root=None, tombstones=NOT_KNOWN, log=known)
    stages, log = _joined(theirs, ours), merged(ours.log, theirs.log)
    new = {stage: files for stage, files in sorted(stages.items()) if ours.stages.get(stage) != files}
    for stage, files in new.items():  # refused before anything is written here
        if digests(stage_files(stage, target.read_stage(stage))) != files:
            raise StoreError(f"{stage.name} of {target.path} was not written by hf_s3t. Nothing was pulled.")
    if store.has_state:  # of what others trained there is no record; none is better than another stage's
        with store.changing() as state:
            state.keep_records({stage.name for stage, files in stages.items() if ours.stages.get(stage) == files})
    replaced = [stage for stage in new if stage in ours.stages]
    if replaced:  # whatever interrupts this, the manifest names no file that is another one
        store.write_manifest(ours.without(replaced))
    for stage in new:
        store.write_stage(stage, target.read_stage(stage))
    manifest = replace(_newest_recipe(theirs, ours), stages=stages, log=log, generation=len(log))
    manifest = replace(manifest, tombstones=_tombstones(store, manifest, [ours, theirs]))
    manifest = store.write_root(manifest)
    store.write_manifest(manifest)
    sweep(store, manifest)
    return manifest


def _tombstones(store: StoreFolder, manifest: Manifest, parts: Iterable[Manifest]) -> str:
    """The HMAC of a joined manifest. Where the state has not seen all events, nothing trains here until it has."""
    digest = NOT_KNOWN
    if store.has_state:
        with store.reading() as state:
            digest = tombstones_hmac(store, state, manifest)
    if digest != NOT_KNOWN:
        return digest
    return next((part.tombstones for part in parts if part.log == manifest.log), NOT_KNOWN)
