"""What must agree before anything trains: store and recipe, state and manifest, rows and index.

Runs once per `train()`, under the write lock, on the main process. What it returns is the manifest to train from.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..data_derived import with_named
from ..errors import DatasetError, StateError
from ..files import remove
from ..lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from ..lora.config import S3TConfig
from ..plan.repair import best_repair
from ..plan.tree import Plan, Stage
from ..store.agreement import check_agreement
from ..store.database import StateDatabase
from ..store.manifest import Manifest, RepairBudget
from ..store.obeyed import with_receipts
from ..store.partition import Comparison, Entry, compare, examples_digest, warn_of_empty_slices
from ..store.receipts import versions
from ..store.recipe_differences import NOT_BIT_EQUAL, Difference, check_same
from ..store.state import key_check_value, stack_line
from ..store.store import S3TStore
from ..store.sweep import sweep
from .rows import TrainRows

logger = logging.getLogger(__name__)

Missing = Literal["error", "delete", "ignore"]


@dataclass(frozen=True)
class Wanted:
    """What a run brings along: its recipe, its plan, its rows, and what to do where they differ from the store's.

    Where a repair by cost is to come (see [`plan_repair`]) there is no plan, and the store's stays until then.
    """

    recipe: dict[str, Any]  # every setting that changes bits
    plan: Plan | None  # may differ from the store's; live stages are kept
    prior: list[float] | None  # chance that a request hits each slice
    rows: TrainRows
    missing: Missing  # what to do about rows that are gone or changed
    extend: bool  # train stages again that saw other rows than the train set has for them now
    accept: Collection[str] = ()  # settings that may differ from the store's


def reconcile(store: S3TStore, config: S3TConfig, wanted: Wanted) -> Manifest:
    """Creates the store, or brings it and the train set into agreement; under the write lock."""
    if not store.exists:
        if wanted.plan is None:
            raise ValueError(
                f"There is no store in {store.path} to repair. Train one first; for a plan of a given cost use "
                "S3TConfig(sequence_selection='optimal', cost_budget=...)."
            )
        return _create(store, config, wanted, wanted.plan)
    manifest = store.manifest()
    differences = check_same(manifest.recipe, wanted.recipe, wanted.accept)
    with store.reading() as state:
        check_generation(store, manifest, state)
    check_agreement(store, manifest)
    with store.reading() as state:
        rows = unburied(wanted.rows.entries, state)
        comparison = compare(state.examples(), rows)
    vanished = bool(manifest.stages and (comparison.missing or comparison.changed))
    if vanished and wanted.missing == "error":
        raise DatasetError(
            f"{len(comparison.missing)} examples that were trained on are gone from the train set and "
            f"{len(comparison.changed)} have changed. Stages still hold their influence. Pass missing='delete' to "
            "delete them now, missing='ignore' to keep their influence, or restore the rows."
        )
    if differences:  # nothing is refused any more
        manifest = _with_new_settings(store, manifest, wanted.recipe, differences)
    recipe = with_named(manifest.recipe, wanted.recipe)
    if recipe != manifest.recipe:  # what the config names now and did not before: receipts are to tell of it
        manifest = replace(manifest, recipe=recipe)
        store.write_manifest(manifest)
    if vanished and wanted.missing == "delete":
        manifest = _delete_vanished(store, comparison)
        with store.reading() as state:
            comparison = compare(state.examples(), rows)
    if wanted.plan is not None:
        manifest = replace(manifest, plan=wanted.plan, deletion_prior=_chances(wanted.prior), repair=None)
    return _write(store, manifest, rows, comparison, wanted)


def _with_new_settings(
    store: S3TStore, manifest: Manifest, recipe: dict[str, Any], differences: tuple[Difference, ...]
) -> Manifest:
    """Puts settings on record that were accepted, before anything trains with them."""
    remove(store.private / "running")  # begun with other settings
    accepted = tuple(difference.accepted(manifest.generation) for difference in differences)
    recipe = with_named(recipe, manifest.recipe)
    manifest = replace(manifest, recipe=recipe, accepted=(*manifest.accepted, *accepted))
    store.write_manifest(manifest)
    logger.warning("settings change from now on (%s). %s.", "; ".join(map(str, accepted)), NOT_BIT_EQUAL)
    return manifest


def plan_repair(store: S3TStore, cost_budget: int, prior: list[float] | None) -> Manifest:
    """Makes the stages that add most to what lives the store's plan, after [`reconcile`].

    The search may take minutes, and a deletion must not wait for it: the write lock is taken afterwards, and if
    something was deleted meanwhile the search begins again. The budget is in slice passes, over all shards.
    """
    while True:
        before = store.manifest()
        repair = RepairBudget(cost_budget, before.deletions)
        if (before.repair, before.deletion_prior) == (repair, _chances(prior)):
            return before  # a repair that was stopped goes on: its own stages must not count as alive
        plan = _best_plan(before, cost_budget, prior)
        with store.writing():
            if store.manifest() == before:
                manifest = replace(before, plan=plan, deletion_prior=_chances(prior), repair=repair)
                store.write_manifest(manifest)
                return manifest


def warn_of_other_stacks(store: S3TStore, manifest: Manifest) -> None:
    """One warning where live stages were trained with other versions than what is about to be trained."""
    running = stack_line(versions())
    with store.reading() as state:
        others = {stack: count for stack, count in state.stacks(manifest.names).items() if stack != running}
    if others:
        logger.warning(
            "%d live stages were trained with %s; new ones are trained with %s. What was deleted is in none, but "
            "bit-equality with training from scratch is claimed within one stack only.",
            sum(others.values()), "; and ".join(others), running,
        )  # fmt: skip


def _best_plan(manifest: Manifest, cost_budget: int, prior: list[float] | None) -> Plan:
    num_shards, num_slices = manifest.plan.num_shards, manifest.plan.num_slices
    surviving = manifest.plan.surviving(manifest.stages)
    alive = [surviving.get(shard, ()) for shard in range(num_shards)]
    return Plan(num_shards, num_slices, tuple(best_repair(num_slices, alive, cost_budget, prior)))


def _chances(prior: list[float] | None) -> tuple[float, ...] | None:
    return None if prior is None else tuple(prior)


def _create(store: S3TStore, config: S3TConfig, wanted: Wanted, plan: Plan) -> Manifest:
    key, key_check = store.key, key_check_value(store.key)
    _refuse_foreign_files(store)
    places = [(shard, slice_id) for shard in range(plan.num_shards) for slice_id in range(plan.num_slices)]
    with store.changing(create=True) as state:
        # A state that was imported, or is left from a store that is gone: what it buries stays buried.
        if state.store not in (None, key_check):
            raise StateError(
                f"The state in {store.private} is of another store. Name another folder, or give that store's key."
            )
        state.begin(key_check, places)
        state.keep_records(())
        rows = unburied(wanted.rows.entries, state)
        log, digest = with_receipts(state.log(), state), state.tombstones_hmac(key)
        comparison = compare(state.examples(), rows)
    warn_of_empty_slices(rows, key, config)
    logger.warning(
        "The private state of this store is in %s. Back it up (`hf-s3t state export`): without it, the store cannot "
        "find anybody again.", store.private,
    )  # fmt: skip
    manifest = Manifest(
        len(log), digest, key_check, wanted.recipe, plan, log=log, deletion_prior=_chances(wanted.prior)
    )
    return _write(store, manifest, rows, comparison, wanted)


def _refuse_foreign_files(store: S3TStore) -> None:
    """Raises `ValueError` if a folder without a store holds files that a store would replace."""
    ours = (CONFIG_FILE, WEIGHTS_FILE, "README.md", "shard-*")
    found = sorted(path.name for name in ours for path in store.path.glob(name))
    if found:
        raise ValueError(
            f"{store.path} holds {', '.join(found[:5])} but no store. It may be another training, which would be "
            "replaced. Name an empty folder as `output_dir`, or move these files away."
        )


def _outdated(manifest: Manifest, state: StateDatabase, rows: TrainRows) -> list[Stage]:
    """Stages that saw other examples than those that the train set has for them now, themselves or by a parent."""
    seen = {stage: (state.record(stage.name) or {}).get("data") for stage in manifest.stages}
    other = {stage for stage, data in seen.items() if data != examples_digest(rows.examples(stage, state))}
    return [stage for stage in manifest.stages if not other.isdisjoint(stage.path)]


def _write(
    store: S3TStore, manifest: Manifest, rows: Mapping[str, Entry], comparison: Comparison, wanted: Wanted
) -> Manifest:
    """The index first, the manifest last: whatever trains is found by a deletion."""
    with store.changing() as state:
        state.add_examples({digest: rows[digest] for digest in comparison.new})
        if manifest.stages and wanted.extend:
            manifest = store.write_root(manifest.without(_outdated(manifest, state, wanted.rows)))
        if not manifest.stages and (comparison.missing or comparison.changed):  # no stage has seen what is gone
            state.clear_examples()
            state.add_examples(rows)
        state.add_caches(wanted.rows.cache_files)
    wanted.rows.changed = comparison.changed if manifest.stages else frozenset()
    store.write_manifest(manifest)
    sweep(store, manifest)
    return manifest


def check_generation(store: S3TStore, manifest: Manifest, state: StateDatabase) -> None:
    """Raises [`StateError`] unless the state knows every deletion that the manifest names, and its tombstones."""
    if state.knows(manifest) and state.tombstones_hmac(store.key) == manifest.tombstones:
        return
    raise StateError(
        f"The state is of generation {state.generation}, the manifest of {manifest.generation}, or their tombstones "
        "differ: something was deleted elsewhere, and training here would bring it back. Nothing was trained. Bring "
        "the state up to date: `hf-s3t state export` there, `hf-s3t state import` here. If no state knows these "
        f"deletions any more, `hf-s3t state accept-loss {store.path}` names them and starts their slices anew."
    )


def unburied(rows: Mapping[str, Entry], state: StateDatabase) -> Mapping[str, Entry]:
    """The rows of a train set that no tombstone stands for."""
    buried = state.buried()
    if not any(buried.values()):
        return rows
    ids, groups = buried["id"], buried["group"]
    return {digest: entry for digest, entry in rows.items() if digest not in ids and entry.group not in groups}


def _delete_vanished(store: S3TStore, comparison: Comparison) -> Manifest:
    gone = comparison.missing | comparison.changed  # the new content of what changed may be trained on
    receipt = store._delete(
        {"digests": sorted(gone)}, reference="vanished or changed rows", renewed=comparison.changed
    )
    logger.warning("deleted %d vanished or changed examples: %s", len(gone), receipt.receipt)
    return store.manifest()
