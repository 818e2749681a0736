"""`S3TStore`: what an eraser does with a store, from a laptop without a GPU, months later.

Every method reads the folder afresh, so several processes may look at one store; what changes it holds the write lock
and first finishes what an interrupted writer left (`deletion.py`). Files and formats are `folder.py`'s.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import S3TError, StateError, StoreError, UnknownExampleError
from ..files import PRIVATE, json_bytes, read_json, write_atomic
from ..hub.purge_report import SECONDS, PurgeReport
from ..plan.life import LifeLeft, life_left
from ..plan.tree import Order, Stage
from . import deletion
from . import sync as publishing
from .base_model import load_base
from .deletion import Receipt
from .export_records import carrying, read_exports, records_from_json, records_to_json, write_exports
from .exports import Export, given_base, write_export
from .folder import LOCK_SECONDS, StoreFolder, as_key
from .ids import id_text
from .partition import Entry, keyed_digest
from .recipe_differences import Accepted
from .requests import Kind, LookAlikes, Place, check_lists, resolve
from .sources import RepoSource
from .state import State, key_check_value, united

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Location:
    """Where one asked-for id or group is.

    Args:
        asked (`str`): as it was asked.
        found (`str`): `"live"`, `"deleted"` (a tombstone) or `"unknown"`.
        places (`tuple[tuple[int, int], ...]`): its `(shard, slice)`s.
        stages (`tuple[str, ...]`): live stages that were computed with it, or would be.
        looks_like (`str`): nobody asked for this one: it is another spelling of what was asked for.
    """

    asked: str
    found: str
    places: tuple[Place, ...]
    stages: tuple[str, ...]
    looks_like: str = ""


@dataclass(frozen=True)
class Status:
    """A store at a glance; see [`S3TStore.status`].

    `requests` are the deletions received. `life` says how many more requests, each for one example, the store is
    expected to take without a repair: `"uniform"` if they hit all places alike, `"given"` under the prior.
    `repair_budget` is there where the plan is that of a repair by cost: the config's may lack more. `stacks` says how
    many live stages each set of versions trained: what is bit-equal is so within one. `accepted` are settings that
    were changed while stages lived: what is trained since is not bit-equal to training from scratch.
    """

    path: str
    generation: int
    num_shards: int
    num_slices: int
    repair_budget: int | None
    planned: int
    trained: int
    missing: tuple[str, ...]
    repair_slice_passes: float
    served: dict[str, tuple[int, ...]]
    dead_shards: tuple[int, ...]
    examples: int | None
    deleted_examples: int | None
    requests: int
    interrupted_deletions: int
    exports: tuple[str, ...]
    stale_exports: tuple[str, ...]
    life: dict[str, LifeLeft]
    stacks: dict[str, int]
    accepted: tuple[Accepted, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data. A life that does not end, because the prior rules its end out, is `None`."""
        life = {
            under: {
                until: {"mean": _finite(life.mean), "standard_deviation": _finite(life.standard_deviation)}
                for until, life in left._asdict().items()
            }
            for under, left in self.life.items()
        }
        return {**asdict(self), "life": life}

    @property
    def requests_left(self) -> float:
        """Expected requests until the first shard is dead, under the prior that leaves fewer."""
        return min(left.until_first_dead.mean for left in self.life.values())


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


class S3TStore(StoreFolder):
    """A store of stages, in a folder or in a repository on the Hub.

    Args:
        path (`str` or `Path`): the `output_dir` of a training, or the id of a repository (`"me/model"`, where there is
            no such folder). What is read from a repository is downloaded; what changes it is committed to it.
        key (`str` or `bytes`, *optional*): the partition key; `None`: `HF_S3T_KEY`, else `partition.key` of the state.
        state (`str` or `Path`, *optional*): the folder of the state. `None`: `.s3t/` in the folder; of a repository
            what `HF_S3T_STATE` says. Without it a repository can be read, and whole slices can be deleted.
        revision (`str`, *optional*): of a repository, a commit, branch or tag to read, for good. `None`: the head.
        token (`str`, *optional*): for the Hub; `None`: the one that is logged in.

    Example:

        ```py
        store = S3TStore("out")
        store.locate(ids=["row-17"])
        receipt = store.delete(ids=["row-17"], reference="DSR-2026-118")
        ```
    """

    @contextmanager
    def writing(self, timeout: float = LOCK_SECONDS) -> Iterator[None]:
        """Holds the store's write lock, after finishing what an interrupted writer left."""
        with self.write_lock.hold(timeout), self.source.drafting():
            deletion.recover(self)
            yield

    # ---- looking ----

    def status(self, prior: Sequence[float] | None = None) -> Status:
        """What is trained, served, missing and deleted, and how long what lives may last.

        Needs no key; without the state, counts are `None`.

        Args:
            prior (`Sequence[float]`, *optional*): chance that a request hits each slice; `None`: the one that the plan
                was made for, if it was made for one.

        Raises:
            ValueError: the prior does not fit the store.
        """
        self.source.look()
        manifest = self.live()
        priors = {"uniform": None, "given": manifest.deletion_prior if prior is None else prior}
        served = manifest.plan.served(manifest.stages)
        missing = manifest.plan.missing(manifest.stages)
        examples: int | None = None
        deleted: int | None = None
        stale: list[str] = []  # with the state lost the record of exports is lost, too
        stacks: dict[str, int] = {}
        try:
            state = self.state()
            stale = carrying(self, [*state.ids.values(), *state.groups.values()])
            stacks = state.stacks(manifest.stages)
            examples, deleted = len(self.index()), len(state.ids)
        except StoreError:
            pass
        return Status(
            path=str(self.path),
            generation=manifest.generation,
            num_shards=manifest.plan.num_shards,
            num_slices=manifest.plan.num_slices,
            repair_budget=manifest.repair.cost_budget if manifest.repair else None,
            planned=len(manifest.plan.stages),
            trained=len(manifest.stages),
            missing=tuple(stage.name for stage in missing),
            repair_slice_passes=round(sum(stage.passes(manifest.replay) for stage in missing), 2),
            served={Stage(shard, prefix).name: tuple(prefix) for shard, prefix in sorted(served.items())},
            dead_shards=tuple(shard for shard in range(manifest.plan.num_shards) if shard not in served),
            examples=examples,
            deleted_examples=deleted,
            requests=manifest.deletions,
            interrupted_deletions=len(self.intents()),
            exports=tuple(read_exports(self)),
            stale_exports=tuple(stale),
            life={
                under: life_left(manifest.plan, chances, manifest.stages)
                for under, chances in priors.items()
                if under == "uniform" or chances is not None
            },
            stacks=stacks,
            accepted=manifest.accepted,
        )

    def locate(self, ids: Iterable[Any] = (), groups: Iterable[Any] = ()) -> list[Location]:
        """Tells for each id and group whether and where it is, and which live stages saw it.

        Other spellings that are known follow what they look like.
        """
        check_lists(ids=ids, groups=groups)
        self.source.look()
        key, index, state, manifest = self.key, self.index(), self.state(), self.live()
        alike = LookAlikes(index, key)
        wanted: list[tuple[Kind, Any]] = [*(("id", value) for value in ids), *(("group", value) for value in groups)]
        found = []
        for kind, value in wanted:
            digest = keyed_digest(key, kind, value)
            found.append(_locate(value, digest, kind, index, state, manifest.stages))
            for text, other in alike.of(kind, value):
                location = _locate(text, other, kind, index, state, manifest.stages)
                found.append(replace(location, looks_like=id_text(value)))
        return found

    # ---- deleting ----

    def delete(
        self,
        ids: Iterable[Any] = (),
        groups: Iterable[Any] = (),
        rows: Iterable[Mapping[str, Any]] = (),
        slices: Iterable[Place] = (),
        *,
        digests: Iterable[str] = (),
        dry_run: bool = False,
        reference: str | None = None,
        missing_ok: bool = False,
        refresh_exports: bool = False,
        when_durable: Callable[[], None] | None = None,
        push: bool = True,
        purge: bool = False,
        keep_refs: Iterable[str] | None = None,
    ) -> Receipt:
        """Removes everything that depends on some examples. No model, no dataset, no gradient step.

        Args:
            ids (`Iterable`): ids, as they stood in the id column.
            groups (`Iterable`): groups, all of whose examples go.
            rows (`Iterable[dict]`): raw rows; named by their id column, else by their content.
            slices (`Iterable[tuple[int, int]]`): whole `(shard, slice)`s; works with the state lost, too.
            digests (`Iterable[str]`): keyed digests as the index holds them.
            dry_run (`bool`): only tell what would be removed.
            reference (`str`, *optional*): your name for the request; it stays in the private receipt.
            missing_ok (`bool`): delete what is known although something else is not.
            refresh_exports (`bool`): make exports that carry the influence anew from what is live (a prefix: its
                longest live beginning; nothing live: their files are removed). Loads the base of a merged one. The
                receipt names those for which it failed as still carrying the influence.
            when_durable (`Callable`, *optional*): called once, when the deletion can no longer be undone and before
                anything is removed: a model in memory stops serving here. Not called where nothing changes. What it
                raises is raised after the deletion has been carried out.
            push, purge (`bool`), keep_refs (`Iterable[str]`, *optional*): for a store that was opened from a
                repository: it is always pushed; `purge=True` removes it from the history, too, see [`purge`].

        Returns:
            [`Receipt`]

        Raises:
            UnknownExampleError: something is not known; nothing was changed.
            StoreLockedError: another writer did not finish in time.
        """
        if (not push or purge or keep_refs is not None) and not isinstance(self.source, RepoSource):
            raise ValueError("`push`, `purge` and `keep_refs` are for a store that was opened from a repository.")
        if not push:
            raise ValueError("A deletion from a repository is the commit that it pushes: `push=False` has no meaning.")
        self.source.look()
        self.manifest()  # a folder that is no store is refused before a lock file is made in it
        if purge and isinstance(self.source, RepoSource):
            from ..hub.refs import sort_refs

            sort_refs(self.source.repo, keep_refs)  # refused before anything is deleted
        with nullcontext() if dry_run else self.writing():  # a dry run only reads
            request = resolve(self, ids, groups, rows, slices, digests)
            receipt = deletion.delete(
                self, request,
                reference=reference, missing_ok=missing_ok, dry_run=dry_run,
                refresh_exports=refresh_exports, when_durable=when_durable,
            )  # fmt: skip
        if purge and not dry_run:
            try:
                report = self.purge(keep_refs)
            except S3TError as error:
                raise type(error)(f"The deletion is done ({receipt.receipt}), its purge is not. {error}") from error
            receipt = replace(receipt, status=report.status, still_served_at=report.still_served_at)
        return receipt

    # ---- the Hub ----

    def push(
        self,
        repo_id: str,
        private: bool = True,
        tombstones: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> CommitInfo:
        """Brings a repository on the Hub to what this folder holds, in one commit; only what changed is sent.

        Nothing of the state goes there. What others trained and pushed since is kept; a stage that a deletion hit,
        here or there, never comes back.

        Args:
            repo_id (`str`): `"me/model"`; made if there is none.
            private (`bool`): make a new repository private, and refuse one that is public and holds no store yet.
            tombstones (`bool`, *optional*): let tombstones (keyed digests without their key) travel, so that other
                machines obey them. `None`: in private repositories.
            token (`str`, *optional*): `None`: the one that is logged in.
            commit_message (`str`, *optional*): first line of the commit's message; a random name is added to it.

        Raises:
            StateError: the repository obeys deletions that this store has not seen; nothing was pushed.
            ValueError: the repository is public, and neither that nor tombstones were meant; nothing was pushed.
        """
        with self.writing():
            target = StoreFolder(repo_id, self._given_key, self.private, token=token)
            return publishing.push(self, target, private, tombstones, commit_message)

    def pull(self, repo_id: str, token: str | None = None) -> None:
        """Brings this folder to what a repository on the Hub holds, and obeys the tombstones that travel in it.

        Raises:
            StoreError: the repository holds another store, or its files are damaged.
        """
        with self.writing():
            publishing.pull(self, StoreFolder(repo_id, self._given_key, self.private, token=token))

    def purge(self, keep_refs: Iterable[str] | None = None, seconds: float = SECONDS) -> PurgeReport:
        """Removes from a repository's history what its head does not serve; see [`hf_s3t.hub.purge.purge`].

        The report is kept beside the receipts, as `purge-*.json`.
        """
        from ..hub.purge import purge

        if not isinstance(self.source, RepoSource):
            raise ValueError(
                f"{self.path} is a folder, which has no history. Open a repository: `S3TStore('me/model')`."
            )
        with self.writing():
            protected = {digest for files in self.manifest().stages.values() for digest in files.values()}
            receipts = deletion.read_receipts(self)
            report = purge(self.source.repo, keep_refs, seconds, protected, receipts, self.private)
            self.source.look()
        return report

    def readmit(self, ids: Iterable[Any] = (), groups: Iterable[Any] = (), reference: str | None = None) -> Receipt:
        """Lifts tombstones, for rectified data or renewed consent. Hand the rows to `train()` again afterwards.

        Raises:
            UnknownExampleError: something has no tombstone; nothing was changed.
        """
        check_lists(ids=ids, groups=groups)
        wanted: dict[str, tuple[Any, str]] = {}
        self.manifest()
        with self.writing():
            key, state = self.key, self.state()
            wanted.update({keyed_digest(key, "id", value): (value, "id") for value in ids})
            wanted.update({keyed_digest(key, "group", value): (value, "group") for value in groups})
            standing = {"id": state.ids, "group": state.groups}
            unknown = [value for digest, (value, kind) in wanted.items() if digest not in standing[kind]]
            if unknown or not wanted:
                raise UnknownExampleError(f"No tombstone stands for {unknown[:5]!r}, so nothing was changed.")
            return deletion.readmit(self, {digest: kind for digest, (_, kind) in wanted.items()}, reference)

    # ---- taking out ----

    def export(
        self,
        path: str | os.PathLike[str],
        prefix: str | Order | Stage | None = None,
        merge: bool = False,
        base_model: PreTrainedModel | str | None = None,
    ) -> Export:
        """Writes the served model, or any live prefix, for stock runtimes: as a plain LoRA adapter, or merged.

        Args:
            path (`str` or `Path`): a folder outside the store. It is remembered: a later deletion names it.
            prefix (`str`, `tuple[int, ...]` or [`Stage`], *optional*): for example `"shard-00/2-0"`; a bare prefix
                means shard 0. `None`: the root adapter.
            merge (`bool`): write a whole model, the adapter merged into the unquantised base, with the prefix's head.
                Weights keep the base's dtype.
            base_model (`PreTrainedModel` or `str`, *optional*): for `merge`, the base or where to load it from.
                `None`: the one that the store names. A model is copied, so twice its memory is needed, and comes out
                as it was; a later deletion can not make such an export anew.

        Raises:
            StoreError: there is no such adapter, or `path` lies in the store.
            ValueError: `path` holds something else, the base is not named, quantised, or not the adapter's.
        """
        target, stage = Path(path).resolve(), None if prefix is None else as_stage(prefix)
        if target.is_relative_to(self.path.resolve()):
            raise StoreError(f"{path} lies inside the store, which holds only its own files. Name another folder.")
        base, name = None, None
        if merge and not isinstance(base_model, str | None):
            base = given_base(self, base_model)
        elif merge:
            base, name = load_base(self, base_model, unquantised=True)
        elif base_model is not None:
            raise ValueError("`base_model` is for `merge=True`: an adapter is exported without its base.")
        with self.writing():  # a deletion comes before, or finds the copy on record
            return write_export(self, target, stage, base, name)

    # ---- the state's backup ----

    def export_state(self, file: str | os.PathLike[str]) -> None:
        """Writes key, index, tombstones and receipts into one private file (mode 600): the backup of `.s3t/`."""
        path, key_file = Path(file), self.private / "partition.key"
        if path.resolve().is_relative_to(self.path.resolve()):
            raise StoreError(f"{path} lies inside the store: the key would be published, or lost with it.")
        with self.writing():
            bundle = {
                "hf_s3t_state": 1,
                "key": key_file.read_text().strip() if key_file.exists() else None,
                "index": {digest: list(entry) for digest, entry in self.index().items()},
                "state": self.state().to_json(),
                "receipts": deletion.read_receipts(self),
                "exports": records_to_json(read_exports(self)),
            }
        write_atomic(path, json_bytes(bundle), PRIVATE)

    def import_state(self, file: str | os.PathLike[str]) -> None:
        """Joins a backup with the state that is here, and finishes what its tombstones ask for; forgets no deletion.

        Raises:
            StateError: the backup is of another store.
        """
        bundle = read_json(Path(file))
        parts = {"hf_s3t_state", "key", "index", "state", "receipts", "exports"}
        if not isinstance(bundle, dict) or set(bundle) != parts or bundle["hf_s3t_state"] != 1:
            raise StateError(f"{file} is no state that `export_state` wrote.")
        state = State.from_json(bundle["state"])
        for receipt in bundle["receipts"]:  # of a newer version: refused before anything is changed
            Receipt.from_json(receipt)
        if self.exists and state.key_check not in ("", self.manifest().key_check):
            raise StateError(f"{file} belongs to another store than {self.path}. Nothing was changed.")
        with self.write_lock.hold(LOCK_SECONDS), self.source.drafting():
            if self.exists and bundle["key"] and key_check_value(as_key(bundle["key"])) != self.manifest().key_check:
                raise StateError(f"{file} belongs to another store: its key does not fit {self.path}.")
            here = self.state() if (self.private / "state.json").exists() else state
            if "" not in (here.key_check, state.key_check) and here.key_check != state.key_check:
                raise StateError(f"{file} belongs to another store than the state in {self.private}.")
            joined = united(here, state)
            if bundle["key"]:
                self.write_private("partition.key", bundle["key"].encode() + b"\n")
            self._merge_state(bundle, here, joined)
            deletion.recover(self)
            trained = {stage.name for stage in self.manifest().stages} if self.exists else set()
            merged = self.state()
            records = {name: record for name, record in merged.stages.items() if name in trained or not self.exists}
            self.write_state(replace(merged, stages=records))

    def _merge_state(self, bundle: Mapping[str, Any], here: State, state: State) -> None:
        """Puts a backup in place; what was recorded here since then stays known, unless it was deleted there."""
        exports = {**records_from_json(bundle["exports"]), **read_exports(self)}
        index = self.index() if self.has_index else {}
        both = {**{digest: Entry(*entry) for digest, entry in bundle["index"].items()}, **index}
        state = deletion.bury(state, state.log, here.log, both)
        self.write_index({d: entry for d, entry in both.items() if not state.buries(d, entry.group)})
        receipts = {receipt["receipt"]: receipt for receipt in [*bundle["receipts"], *deletion.read_receipts(self)]}
        self.write_private("receipts.jsonl", _lines(receipts.values()))
        write_exports(self, exports)
        caches = tuple(sorted({*state.caches, *here.caches}))
        self.write_state(replace(state, stages={**state.stages, **here.stages}, caches=caches))


def as_stage(prefix: str | Order | Stage) -> Stage:
    """A stage from its name, or from a bare prefix of shard 0."""
    if isinstance(prefix, Stage):
        return prefix
    return Stage.from_name(prefix) if isinstance(prefix, str) else Stage(0, tuple(prefix))


def _lines(receipts: Iterable[Mapping[str, Any]]) -> bytes:
    return b"\n".join(json_bytes(receipt).replace(b"\n", b" ").strip() for receipt in receipts)


def _locate(value: Any, digest: str, kind: str, index: Any, state: State, trained: Iterable[Stage]) -> Location:
    if kind == "id":
        places = [index[digest][:2]] if digest in index else []
        stone = state.ids.get(digest)
    else:
        places = sorted({entry[:2] for entry in index.values() if entry.group == digest})
        stone = state.groups.get(digest)
    if places:
        stages = tuple(stage.name for stage in sorted(trained) if stage.slices & set(places))
        return Location(id_text(value), "live", tuple(places), stages)
    if stone:
        return Location(id_text(value), "deleted", tuple(sorted(stone.places)), ())
    return Location(id_text(value), "unknown", (), ())
