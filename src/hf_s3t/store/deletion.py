"""What a deletion does: write the intent, remove what depends on the examples, leave tombstones and a receipt.

No model, no dataset and no gradient step: everything follows from the index and the tree of stages. The intent is
durable before anything changes, and `carry_out` may be run again from any point, so an interrupted deletion ends the
same. The files themselves are `folder.py`'s.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import StateError, StoreError, UnknownExampleError
from ..files import PRIVATE, json_bytes, read_json, remove, sync_folder
from ..lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from ..plan.tree import Stage
from .activation_blocks import sweep_activations
from .deletion_records import INTENT_FORMAT, RECEIPT_FORMAT, check_fields, check_format
from .export_records import carrying
from .exports import settle
from .folder import MAX_MANIFEST_BYTES, StoreFolder
from .manifest import DAMAGED, NOT_KNOWN, Event, Log, Manifest, merged, places_beyond
from .partition import Index, count_by_place
from .recipe_differences import NOT_BIT_EQUAL
from .requests import Place, Request
from .sources import TOMBSTONES, FolderSource, RepoSource, on_top
from .state import State, Tombstone, united
from .state_files import INTENTS

logger = logging.getLogger(__name__)

LIMITS = (
    "Nothing is said of what the base model saw in pretraining.",
    "Copies that others made, dataset caches, experiment trackers and backups outside the store are not reached.",
    "A request that was chosen by looking at the model is not covered.",
    "Numbers that user code computed from the whole train set (class weights, statistics) keep what they saw.",
    "Until repair the model misses whole slices; only after repair is it what training without the examples gives.",
)


def limits_of(manifest: Manifest) -> tuple[str, ...]:
    """What a receipt of a store does not say; where settings were changed, a repair is of the lower grade of claim."""
    if not manifest.accepted:
        return LIMITS
    names = ", ".join(dict.fromkeys(accepted.setting for accepted in manifest.accepted))
    changed = f"Until repair the model misses whole slices. Settings were changed ({names}). {NOT_BIT_EQUAL}."
    return (*LIMITS[:-1], changed)


@dataclass(frozen=True)
class Receipt:
    """What a deletion found and did. Kept in `.s3t/receipts.jsonl`, never published.

    Args:
        receipt (`str`): its own name.
        kind (`str`): `"delete"` or `"readmit"`.
        status (`str`): `"dry run"`, `"unchanged"` (all was deleted before), or `"inactive"`: no longer served by this
            store since `inactive_since`. Of a repository `"inactive_at_head"` until a purge, and `"no_longer_served"`
            once every probe after it says so.
        requested_at, inactive_since (`str`): UTC times in ISO 8601. What is `"unchanged"` has been inactive since the
            earlier deletion; `None` where that was made elsewhere.
        asked, found, already_deleted (`int`): numbers of ids, groups, rows or slices in the request.
        examples (`int`): examples that the request covers and that were in the index; `None`: the state is not here.
        dark_examples (`int`): other examples whose slices this took out of service until repair; `None` likewise.
        deleted_by (`list[str]`): names of the deletions that were there before, of what was deleted already.
        stages_removed (`dict[str, dict[str, str]]`): sha256 per file of each removed stage.
        served_before, served_after (`dict[str, list[int]]`): served prefix per live shard.
        exports (`list[str]`): exported copies that still carry the influence.
        exports_refreshed (`list[str]`): exported copies that were made anew from what is live.
        exports_removed (`list[str]`): exported copies of which nothing was live, and whose files were removed.
        repository (`str`, *optional*): the repository that it was asked of; `None`: a folder.
        still_served_at (`list[str]`): revisions of that repository that still serve what it is about, until a purge.
        caches (`list[str]`): files of the datasets cache, outside the store, that may hold the text.
    """

    receipt: str
    kind: str
    status: str
    requested_at: str
    generation: int
    asked: int = 0
    found: int = 0
    already_deleted: int = 0
    examples: int | None = 0
    dark_examples: int | None = 0
    deleted_by: list[str] = field(default_factory=list)
    inactive_since: str | None = None
    reference: str | None = None
    stages_removed: dict[str, dict[str, str]] = field(default_factory=dict)
    served_before: dict[str, list[int]] = field(default_factory=dict)
    served_after: dict[str, list[int]] = field(default_factory=dict)
    exports: list[str] = field(default_factory=list)
    exports_refreshed: list[str] = field(default_factory=list)
    exports_removed: list[str] = field(default_factory=list)
    repository: str | None = None
    still_served_at: list[str] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    limits: tuple[str, ...] = LIMITS
    format: int = RECEIPT_FORMAT

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Receipt:
        """Reads a receipt of any version up to this one.

        Raises:
            StateError: it is of a newer one, or damaged.
        """
        try:
            check_format(data, RECEIPT_FORMAT, f"Receipt {data.get('receipt')}")
            required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
            check_fields(data, required, [f.name for f in fields(cls)])
        except DAMAGED as error:
            raise StateError(f"A receipt can not be read ({error}). Restore the state from a backup.") from None
        return cls(**data)


def _alike(request: Request) -> str:
    """A sentence on what looks like something that was asked for, and is something else."""
    alike = [(asked, found) for asked, others in request.look_alikes.items() for found in others]
    pairs = [f"{ascii(found)} (like {ascii(asked)})" for asked, found in alike]
    return f" The store knows {', '.join(pairs[:5])}." if pairs else ""


def delete(
    folder: StoreFolder,
    request: Request,
    *,
    reference: str | None,
    missing_ok: bool,
    dry_run: bool,
    refresh_exports: bool = False,
    when_durable: Callable[[], None] | None = None,
) -> Receipt:
    """Deletes what a request covers. Runs under the store's write lock; see [`S3TStore.delete`] for the arguments."""
    if request.unknown and not missing_ok:
        shown = ", ".join(map(repr, request.unknown[:5]))
        raise UnknownExampleError(
            f"{len(request.unknown)} of {request.asked} are not known to {folder.path}: {shown}. Nothing was changed."
            f"{_alike(request)} Check them (`locate`), or pass `missing_ok=True` to delete the others."
        )
    if request.look_alikes:
        logger.warning("Not deleted, as nobody asked for it:%s", _alike(request))
    receipt = _preview(folder, request, reference)
    if dry_run:
        return replace(receipt, status="dry run")
    if not request.places:
        copies = settle(folder, receipt.exports, receipt.generation, refresh_exports)
        places = {place for stone in request.stones for place in stone.places}
        reached = folder.source.reached(places, folder.manifest().weights)  # of one that somebody else made, too
        earlier = {known["receipt"]: known["inactive_since"] for known in read_receipts(folder)}
        since = [earlier[name] for name in receipt.deleted_by if name in earlier]
        last = max(since) if len(since) == len(receipt.deleted_by) > 0 else None  # made elsewhere: not known here
        receipt = replace(receipt, status="unchanged", inactive_since=last, still_served_at=reached, **copies)
        return _append_receipt(folder, receipt)
    intent = {
        "kind": "delete",
        "receipt": receipt.to_json(),
        "ids": {digest: list(places) for digest, places in request.ids.items()},
        "groups": {digest: list(places) for digest, places in request.groups.items()},
        "places": sorted(request.places),
        "generation": receipt.generation,
        "refresh_exports": refresh_exports,
    }
    folder.source.check_writable()
    intent = _write_intent(folder, intent)
    try:
        if when_durable is not None:
            when_durable()
    finally:  # from here on it can not be undone, whatever the caller's part ends in
        receipt = carry_out(folder, intent)
    _obey_beside(folder)
    return receipt


def readmit(folder: StoreFolder, request_digests: Mapping[str, str], reference: str | None) -> Receipt:
    """Lifts tombstones (`digest -> "id" | "group"`). Examples come back when they are handed to a training again."""
    manifest = folder.manifest()
    receipt = Receipt(
        _receipt_name(), "readmit", "readmitted", _now(), manifest.generation + 1, reference=reference,
        asked=len(request_digests), found=len(request_digests), versions=versions(), limits=(),
    )  # fmt: skip
    intent = {
        "kind": "readmit",
        "receipt": receipt.to_json(),
        "ids": {digest: [] for digest, kind in request_digests.items() if kind == "id"},
        "groups": {digest: [] for digest, kind in request_digests.items() if kind == "group"},
        "places": [],
        "generation": receipt.generation,
    }
    folder.source.check_writable()
    return carry_out(folder, _write_intent(folder, intent))


def _preview(folder: StoreFolder, request: Request, reference: str | None) -> Receipt:
    manifest = folder.live()
    gone = [stage for stage in sorted(manifest.stages) if stage.slices & request.places]
    before = manifest.plan.served(manifest.stages)
    after = manifest.plan.served(manifest.without(gone).stages)
    counts: Counter[Place] | None = None
    state = State()
    try:
        counts, state = count_by_place(folder.index()), folder.state()
    except StoreError:
        logger.warning("the state of %s is not here: how many examples this concerns is not known", folder.path)
    lost = [(shard, slice_id) for shard, prefix in before.items() for slice_id in prefix]
    lost = [place for place in lost if place[1] not in after.get(place[0], ())]
    deleted, generation = len(request.ids), manifest.generation + bool(request.places)
    hit = {place for places in request.ids.values() for place in places}
    dark = None if counts is None else max(sum(counts[place] for place in {*lost, *hit}) - deleted, 0)
    return Receipt(
        receipt=_receipt_name(), kind="delete", status="inactive", requested_at=_now(),
        generation=generation, asked=request.asked,
        found=request.asked - request.already - len(request.unknown), already_deleted=request.already,
        examples=None if counts is None else deleted, dark_examples=dark, reference=reference,
        deleted_by=sorted({name for stone in request.stones for name in stone.deletions}),
        stages_removed={stage.name: manifest.stages[stage] for stage in gone},
        served_before=_served_json(before), served_after=_served_json(after),
        exports=carrying(folder, [Tombstone({"": tuple(request.places)}, generation), *request.stones]),
        caches=list(state.caches), versions=versions(), repository=folder.source.repo_id, limits=limits_of(manifest),
    )  # fmt: skip


def carry_out(folder: StoreFolder, intent: Mapping[str, Any]) -> Receipt:
    """Brings an intent to its end, from wherever it was interrupted. Runs under the store's write lock."""
    read_receipts(folder)  # of a newer version: before anything goes, not when it is to be told
    receipt = on_top(partial(_carry_out_once, folder, intent), partial(_look_again, folder))
    logger.info("%s %s: %d stages removed", receipt.kind, receipt.receipt, len(receipt.stages_removed))
    return receipt


def _look_again(folder: StoreFolder) -> None:
    folder.source.look()
    absorb(folder, folder)


def _carry_out_once(folder: StoreFolder, intent: Mapping[str, Any]) -> Receipt:
    manifest, state = folder.manifest(), state_or_none(folder)
    receipt = Receipt.from_json(intent["receipt"])
    log = merged(manifest.log, {receipt.receipt: _event(intent, state)})
    if state is not None:
        state = _with_tombstones(state, intent)
        log = merged(log, state.log)
    hit = places_beyond(log, manifest.log)
    if log != manifest.log:  # else it had been carried out, and was interrupted afterwards
        gone = [stage for stage in manifest.stages if stage.slices & hit]
        manifest = _rewrite(folder, replace(manifest.without(gone), log=log), state)
        title = "Deletion" if receipt.kind == "delete" else "Readmission"
        folder.source.publish(f"{title} {receipt.receipt}", {stage.name for stage in manifest.stages})
    sweep(folder, manifest, hit | {tuple(place) for place in intent["places"]})
    if state is not None:
        folder.write_state(state.only(manifest.stages))
        _clear_index(folder, intent)
    copies = settle(folder, receipt.exports, receipt.generation, intent.get("refresh_exports", False))
    reached = folder.source.reached({tuple(place) for place in intent["places"]}, manifest.weights)
    at_head = folder.source.repo_id is not None and receipt.kind == "delete"
    status = "inactive_at_head" if at_head else receipt.status
    receipt = replace(
        receipt,
        status=status,
        generation=manifest.generation,
        inactive_since=_now(),
        still_served_at=reached,
        **copies,
    )
    receipt = _append_receipt(folder, receipt)
    remove(folder.private / INTENTS / intent["file"])
    return receipt


def travelling(there: StoreFolder, key: bytes) -> State | None:
    """The tombstones that travel in a repository; `None` where none do, or where somebody without the key wrote them.

    They may be of another time than its manifest: old ones say nothing that is not so.
    """
    if not isinstance(there.source, RepoSource) or not there.source.has(TOMBSTONES):
        return None
    path = there.source.file(TOMBSTONES, MAX_MANIFEST_BYTES)  # where it can not be fetched nothing goes on
    try:
        data = read_json(path, MAX_MANIFEST_BYTES)
        return State.from_tombstones_json(data, key)
    except (StateError, StoreError) as error:  # a deletion must not wait for somebody who repairs that file
        logger.warning("the tombstones in %s are not looked at: %s", there.path, error)
        return None


def absorb(folder: StoreFolder, there: StoreFolder) -> None:
    """Takes over events and tombstones that the state has not, from a manifest and from what travels beside it.

    Runs under the store's write lock.

    Raises:
        StateError: the state is of another store.
    """
    ours = state_or_none(folder)
    if ours is None or not there.exists:
        return
    manifest, state = there.manifest(), ours
    if ours.key_check not in ("", manifest.key_check):
        raise StateError(f"The state in {folder.private} is of another store than {there.path}. Name its own state.")
    theirs = travelling(there, folder.key) if folder.has_key else None
    if theirs is not None:
        state = united(state, theirs)
    index = folder.index() if folder.has_index else {}
    state = bury(state, merged(manifest.log, state.log), ours.log, index)
    if state != ours:
        folder.write_state(state)
    live = {digest: entry for digest, entry in index.items() if not state.buries(digest, entry.group)}
    if live != index:
        folder.write_index(live)
    if folder is not there:
        recover(folder)  # the state may now be ahead of the manifest


def bury(state: State, log: Log, known: Log, index: Index) -> State:
    """The state with tombstones for the examples of slices that somebody deleted without a state.

    Args:
        log (`dict[str, Event]`): the events to look at.
        known (`dict[str, Event]`): those of them that this index has been held against.
    """
    for name, event in log.items():
        if not event.named and name not in known:
            events = merged(state.log, {name: event})
            state = replace(state, log=events, generation=len(events))
            ids = {d: [entry[:2]] for d, entry in index.items() if entry[:2] in event.places and d not in state.ids}
            if ids:  # under a name of its own: other indexes have other examples there, and must not lift these
                places = {place for found in ids.values() for place in found}
                about = {"kind": "delete", "receipt": {"receipt": _receipt_name()}, "places": places}
                state = _with_tombstones(state, {**about, "ids": ids, "groups": {}})
    return state


def put_tombstones(folder: StoreFolder, state: State, key: bytes) -> None:
    """Lets tombstones travel with the next commit of a repository."""
    folder.source.put(TOMBSTONES, json_bytes(state.tombstones_json(key)))


def state_or_none(folder: StoreFolder) -> State | None:
    """The state, where it is not lost: `delete(slices=...)` removes stages all the same."""
    try:
        return folder.state()
    except StateError:
        return None


def _event(intent: Mapping[str, Any], state: State | None) -> Event:
    named = state is not None and bool(intent["ids"] or intent["groups"])
    return Event(tuple(sorted(map(tuple, intent["places"]))), named)


def _clear_index(folder: StoreFolder, intent: Mapping[str, Any]) -> None:
    if intent["kind"] == "delete" and folder.has_index:
        folder.write_index({d: entry for d, entry in folder.index().items() if d not in intent["ids"]})


def _with_tombstones(state: State, intent: Mapping[str, Any]) -> State:
    name, none = intent["receipt"]["receipt"], Tombstone({}, 0)
    if name in state.log:  # it was interrupted, and others may have lifted some of it since
        return state
    log, ids, groups = {**state.log, name: _event(intent, state)}, dict(state.ids), dict(state.groups)
    for kind, standing in (("ids", ids), ("groups", groups)):
        for digest, places in intent[kind].items():
            if intent["kind"] == "readmit":
                standing.pop(digest, None)
            else:
                found = tuple((shard, slice_id) for shard, slice_id in places)
                deletions = standing.get(digest, none).deletions
                standing[digest] = Tombstone({**deletions, name: found}, len(log))
    return replace(state, generation=len(log), ids=ids, groups=groups, log=log)


def _rewrite(folder: StoreFolder, manifest: Manifest, state: State | None) -> Manifest:
    """Writes the manifest, and the root adapter of what it lists."""
    try:
        manifest = folder.write_root(manifest)
    except StoreError as error:  # a damaged stage that stays must not keep another one from being deleted
        logger.error("the root adapter was removed, because a kept stage can not be read: %s", error)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            folder.source.drop(name)
        manifest = replace(manifest, root=None)
    digest = NOT_KNOWN
    if state is not None and state.knows(manifest) and folder.has_key:
        digest = state.digest(folder.key)
    manifest = replace(manifest, generation=len(manifest.log), tombstones=digest)
    folder.write_manifest(manifest)
    if state is not None and folder.has_key and folder.source.has(TOMBSTONES):
        put_tombstones(folder, state, folder.key)
    return manifest


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


def recover(folder: StoreFolder) -> None:
    """What every writer does first: finish interrupted deletions, drop half-written files, obey newer tombstones."""
    folder.tighten()
    _look_again(folder)
    for intent in folder.intents():
        state = state_or_none(folder)
        if intent.get("repo") == folder.source.repo_id:
            carry_out(folder, intent)
        elif state is not None:  # whoever opens that repository ends it; what it is about is obeyed here, too
            folder.write_state(_with_tombstones(state, intent))
            _clear_index(folder, intent)
    if folder.exists:
        on_top(partial(_obey, folder), partial(_look_again, folder))
        _obey_beside(folder)


def _obey_beside(folder: StoreFolder) -> None:
    """Where a repository's state is that of a folder (`out/.s3t`), that folder obeys the same deletions."""
    beside = folder.private.parent
    if folder.source.repo_id is not None and beside / ".s3t" == folder.private:
        store = StoreFolder(beside, folder._given_key)
        if store.exists:
            _obey(store)


def _obey(folder: StoreFolder) -> None:
    """Brings the published files up to the state, where an older copy of them was put back."""
    manifest, state = folder.manifest(), state_or_none(folder)
    hit: set[Place] = set()
    if state is not None:
        log = merged(manifest.log, state.log)
        hit = places_beyond(log, manifest.log)
        untold = manifest.tombstones == NOT_KNOWN and state.knows(manifest) and folder.has_key
        if untold or log != manifest.log:
            gone = [stage for stage in manifest.stages if stage.slices & hit]
            manifest = _rewrite(folder, replace(manifest.without(gone), log=log), state)
            folder.source.publish(f"Deletions up to {manifest.generation}", {s.name for s in manifest.stages})
            folder.write_state(state.only(manifest.stages))
    sweep(folder, manifest, hit)


def _write_intent(folder: StoreFolder, intent: dict[str, Any]) -> dict[str, Any]:
    read_receipts(folder)  # refused before anything is on record
    name = f"{intent['generation']:08d}-{intent['receipt']['receipt']}.json"
    intent = {**intent, "format": INTENT_FORMAT, "file": name, "repo": folder.source.repo_id}
    folder.write_private(f"{INTENTS}/{name}", json_bytes(intent))
    return intent


def _append_receipt(folder: StoreFolder, receipt: Receipt) -> Receipt:
    """Appends a receipt unless it is there already, which it may be after an interruption."""
    if not any(known["receipt"] == receipt.receipt for known in read_receipts(folder)):
        path = folder.private_folder() / "receipts.jsonl"
        with open(path, "a", encoding="utf-8", opener=partial(os.open, mode=PRIVATE)) as file:
            # The newline comes first: a line that a crash cut short then spoils only itself.
            file.write(("\n" if file.tell() else "") + json.dumps(receipt.to_json(), sort_keys=True))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder.private)
    return receipt


def read_receipts(folder: StoreFolder) -> list[dict[str, Any]]:
    """Every receipt, oldest first; a line that a crash cut short is left out.

    Raises:
        StateError: a newer version of hf_s3t wrote one.
    """
    path = folder.private / "receipts.jsonl"
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
        found[-1] = Receipt.from_json(found[-1]).to_json()
    return found


@cache
def versions() -> dict[str, str]:
    """Versions of what computed. Do not change it: it is looked up once."""
    return {name: version(name) for name in ("hf_s3t", "torch", "transformers", "peft", "accelerate")}


def _served_json(served: Mapping[int, Sequence[int]]) -> dict[str, list[int]]:
    return {str(shard): list(prefix) for shard, prefix in sorted(served.items())}


def _receipt_name() -> str:
    return f"receipt-{secrets.token_hex(6)}"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
