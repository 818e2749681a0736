"""Audits of a store: what of its promises holds as the files stand, what is broken, and what cannot be checked.

Whatever an audit lacks, the state or the key, it names; nothing passes in silence. Hashes tell damage and mix-ups. A
manifest that was rewritten together with its files is found only by training a stage again (`retraining.py`).
"""

from __future__ import annotations

import os
import shlex
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from ..errors import S3TError, StoreLockedError
from ..files import POSIX, read_json
from .agreement import disagreements
from .database import StateDatabase
from .folder import StoreFolder
from .manifest import Manifest
from .partition import entries_digest, examples_digest, stage_examples
from .public_audit import MALFORMED, PUBLISHED_CHECKS, Findings, FindingsOf, NotChecked
from .receipt_audit import check_receipts_of
from .recipe_differences import recipe_digest
from .requests import Place, places_check
from .schema import DATABASE
from .stage_comparison import Outcome, Retrained


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str  # what should hold
    broken: tuple[str, ...] = ()  # where it does not
    not_checked: tuple[str, ...] = ()  # where it could not be told, with the reason

    @property
    def outcome(self) -> Literal["holds", "broken", "not checked"]:
        """`"broken"` if anything is, else `"not checked"` if anything was not."""
        return "broken" if self.broken else "not checked" if self.not_checked else "holds"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "outcome": self.outcome,
            "broken": list(self.broken),
            "not_checked": list(self.not_checked),
        }


@dataclass(frozen=True)
class VerifyReport:
    """What an audit of a store found, with one entry in `checks` for each promise."""

    path: str
    generation: int
    stages: tuple[str, ...]
    checks: tuple[Check, ...]
    retrained: tuple[Retrained, ...] | None = None  # `None`: no stage was trained again
    seed: int | None = None  # by which these stages were drawn, if they were

    @property
    def ok(self) -> bool:
        """Whether nothing is broken. Something may be unchecked: see [`complete`]."""
        return self.influence_free != "broken" and self.bit_equal != "different"

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for could be checked."""
        retrained = self.retrained or ()
        return not any(check.not_checked for check in self.checks) and all(
            stage.outcome != "not comparable" for stage in retrained
        )

    @property
    def influence_free(self) -> Literal["holds", "broken", "not checked"]:
        """The claim that holds by construction, on any hardware: the worst outcome of all checks."""
        outcomes = {check.outcome for check in self.checks}
        return "broken" if "broken" in outcomes else "not checked" if "not checked" in outcomes else "holds"

    @property
    def bit_equal(self) -> Outcome | Literal["not checked"]:
        """The claim that holds on one stack: the worst outcome of the stages that were trained again."""
        outcomes = {stage.outcome for stage in self.retrained or ()}
        order: tuple[Outcome, ...] = ("different", "not comparable", "equal")
        return next((outcome for outcome in order if outcome in outcomes), "not checked")

    @property
    def findings(self) -> tuple[str, ...]:
        """Everything that is broken, and every stage that differs."""
        different = [stage for stage in self.retrained or () if stage.outcome == "different"]
        checks = [finding for check in self.checks for finding in check.broken]
        return (*checks, *(finding for stage in different for finding in stage.findings))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "path": self.path,
            "generation": self.generation,
            "stages": list(self.stages),
            "ok": self.ok,
            "complete": self.complete,
            "influence_free_by_construction": self.influence_free,
            "bit_equal_on_this_stack": self.bit_equal,
            "checks": [check.to_json() for check in self.checks],
            "retrained": None if self.retrained is None else [stage.to_json() for stage in self.retrained],
            "seed": self.seed,
        }


def verify(store: StoreFolder | str | os.PathLike[str]) -> VerifyReport:
    """Audits a store, with its key and its state where they are at hand; changes nothing.

    Raises:
        StoreError: there is no store, or its manifest cannot be read.
        StoreLockedError: somebody kept changing it meanwhile.

    Example:

        ```py
        report = verify("out")
        assert report.ok, report.findings
        ```
    """
    folder = store if isinstance(store, StoreFolder) else StoreFolder(store)
    for _ in range(3):
        manifest, marks = folder.manifest(), folder.marks()
        checks = tuple(run_check(name, check(folder, manifest)) for name, check in CHECKS.items())
        if folder.marks() == marks:  # readers take no lock, so a writer may have been at work
            stages = tuple(stage.name for stage in sorted(manifest.stages))
            return VerifyReport(str(folder.path), manifest.generation, stages, checks)
    raise StoreLockedError(f"{folder.path} was changed each time while it was audited. Wait for its training to end.")


def run_check(name: str, findings: Findings) -> Check:
    """Collects what a check finds, up to where it can go no further."""
    broken: list[str] = []
    not_checked: list[str] = []
    try:
        for finding in findings:
            (not_checked if isinstance(finding, NotChecked) else broken).append(str(finding))
    except NotChecked as reason:
        not_checked.append(str(reason))
    except MALFORMED as error:
        text = str(error) if isinstance(error, S3TError) else f"{type(error).__name__}: {error}"
        broken.append(f"The check could not go on. {text}")
    return Check(name, tuple(broken), tuple(not_checked))


def _check_intents(folder: StoreFolder, manifest: Manifest) -> Findings:
    for intent in folder.intents():
        name, where = intent["receipt"]["receipt"], f" on {intent['repo']}" if intent.get("repo") else ""
        obeyed = name in manifest.log
        left = sum(1 for stage in manifest.stages if stage.slices & intent["places"] and not obeyed)
        yield (
            f"{name} ({intent['kind']}) was begun{where} and not finished; {left} of the stages that it removes are "
            f"still in the manifest. The next `hf-s3t delete`{where} or `train()` finishes it"
        )


@contextmanager
def _state(folder: StoreFolder) -> Iterator[StateDatabase]:
    if not folder.database.exists():
        raise NotChecked(f"The state (.s3t/{DATABASE}) is not here.")
    with folder.reading() as state:
        yield state


def _check_database(folder: StoreFolder, manifest: Manifest) -> Findings:
    with _state(folder) as state:
        state.check_whole()
        for name in state.broken_receipts():
            yield f"{name} does not follow the receipt before it: that or this one was changed, removed or put in"
        told = [*state.receipts(), *map(read_json, folder.loose_receipts())]
        unknown = sorted({receipt["receipt"] for receipt in told if receipt["stages_removed"]} - state.log().keys())
        if unknown:
            yield f"receipts tell of deletions that the state does not know: {', '.join(unknown[:3])}"
        fits = places_check(folder, manifest, state)
        misplaced, counted = 0, Counter[Place]()
        for digest, entry in state.examples():
            counted[entry[:2]] += 1
            misplaced += not fits(digest, entry)
        if misplaced:
            yield f"{misplaced} examples lie in other slices than they belong in: a deletion would not find them"
        if +counted != +state.counts():
            yield "the numbers of examples that it keeps for each slice are not those of its index"


def _check_agreement(folder: StoreFolder, manifest: Manifest) -> Findings:
    recipe = recipe_digest(manifest.recipe)
    with _state(folder) as state:
        yield from disagreements(manifest, state)
        records = state.records()
    for stage in sorted(manifest.stages):
        record = records.get(stage.name, {})
        latest = record.get("accepted", 0) == len(manifest.accepted)  # since then no setting was changed
        if latest and record.get("recipe", recipe) != recipe:
            yield f"{stage.name} was trained by another recipe than the manifest has now, and no change was accepted"


def _check_generation(folder: StoreFolder, manifest: Manifest) -> Findings:
    with _state(folder) as state:
        log = state.log()
        if log.keys() != manifest.log.keys():
            yield (
                f"the state is of generation {len(log)}, the manifest of {manifest.generation}: one of them is an "
                "older copy, and lacks deletions"
            )
        for name in sorted(log.keys() & manifest.log.keys()):
            if {*log[name].places} != {*manifest.log[name].places}:
                yield f"state and manifest have other slices for {name}: one of them was changed"


def _check_tombstones(folder: StoreFolder, manifest: Manifest) -> Findings:
    with _state(folder) as state:
        if not folder.has_key:
            raise NotChecked("The partition key is not here: give it, or set HF_S3T_KEY.")
        if state.tombstones_hmac(folder.key) != manifest.tombstones:
            yield "the tombstones are not those that the manifest was written with: some came or went elsewhere"


def _check_buried(folder: StoreFolder, manifest: Manifest) -> Findings:
    with _state(folder) as state:
        newest, records = state.newest_deletions(), state.records()
        kept = state.buried_in_index()
    for stage in sorted(manifest.stages):
        needed = max((newest.get(place, 0) for place in stage.slices), default=0)
        record = records.get(stage.name)
        if needed and record is None:
            yield NotChecked(f"{stage.name}: the state has no record of when it was trained")
        elif record is not None and record["generation"] < needed:
            yield (
                f"{stage.name} was trained at generation {record['generation']}, and examples of its slices were "
                f"deleted at generation {needed}: it may hold their influence"
            )
    if kept:
        yield f"{kept} deleted examples are still in the index"


def _check_examples(folder: StoreFolder, manifest: Manifest) -> Findings:
    with _state(folder) as state:
        records = state.records()
        for shard, of_shard in groupby(sorted(manifest.stages), key=lambda stage: stage.shard):
            stages = list(of_shard)
            slices = {slice_id for stage in stages for slice_id in stage.prefix}
            entries = {slice_id: dict(state.entries_of((shard, slice_id))) for slice_id in slices}
            known = {digest: entry for of_slice in entries.values() for digest, entry in of_slice.items()}
            for stage in stages:
                record = records.get(stage.name)
                if record is None:
                    yield NotChecked(f"{stage.name}: the state has no record of its examples")
                    continue
                examples = stage_examples(stage, entries, manifest.replay)
                if record["data"] != examples_digest(examples):
                    yield differing_examples(stage.name, record["examples"], len(examples))
                elif record.get("index", "") not in ("", entries_digest(examples, known)):  # old records lack it
                    yield f"{stage.name} saw its examples with other groups or contents than the index has now"


def differing_examples(stage: str, seen: int, known: int) -> str | NotChecked:
    """What it means that a `stage` was trained on other examples than those of its slices now.

    Rows that are added later, or dropped in the dataset's preparation, make it fewer. Equal numbers or more can only
    come from an example that left the index while the stage stayed.
    """
    if seen < known:
        return NotChecked(
            f"{stage} saw {seen} examples and its slices have {known}: rows were added later, or left out in the "
            "dataset's preparation, so it cannot be told whether the others are the same"
        )
    return f"{stage} saw {seen} examples, which are not the {known} that its slices have: one that it saw is gone"


def _check_modes(folder: StoreFolder, manifest: Manifest) -> Findings:
    if not POSIX:
        raise NotChecked("This system has no modes of files.")
    for path in folder.loose():
        mode = stat.S_IMODE(path.stat().st_mode)
        yield f"{path} may be used by others than its owner (mode {mode:o}): chmod go= {shlex.quote(str(path))}"


CHECKS: dict[str, FindingsOf] = {
    **PUBLISHED_CHECKS,
    "no deletion is unfinished": _check_intents,
    "the state's database is whole": _check_database,
    "stages are those that the state knows": _check_agreement,
    "state and manifest are of one generation": _check_generation,
    "tombstones are the manifest's": _check_tombstones,
    "no stage is older than a deletion from it": _check_buried,
    "stages saw the examples of the index": _check_examples,
    "the state is its owner's alone": _check_modes,
    "receipts are a chain, and what they say holds": check_receipts_of,
}
"""By what should hold."""
