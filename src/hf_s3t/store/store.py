"""`S3TStore`: what an eraser does with a store, from a laptop without a GPU, months later.

Every method reads the folder afresh, so several processes may look at one store; what changes it holds the write lock
and first finishes what an interrupted writer left (`deletion.py`). Files and formats are `folder.py`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import S3TError, StoreError, UnknownExampleError
from ..files import resolved
from ..hub.purge_report import SECONDS, PurgeReport
from ..plan.tree import Order, Stage
from . import deletion
from . import sync as publishing
from .agreement import check_agreement
from .base_model import load_base
from .database import Kind, Place
from .exports import Export, given_base, write_export
from .folder import StoreFolder
from .ids import encoded, id_text, shortened
from .outlook import tell_of_change, tell_of_deletion
from .partition import keyed_digest
from .receipts import Receipt, read_receipts
from .requests import LookAlikes, check_lists, check_reference, resolve
from .sources import RepoSource
from .state_care import StateCare
from .status import Location, Status, location_of, seen_by, status_of
from .verification import Verifiable

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel


class S3TStore(Verifiable, StateCare):
    """A store of stages, in a folder or in a repository on the Hub.

    Args:
        path (`str` or `Path`): the `output_dir` of a training, or the id of a repository (`"me/model"`, where there is
            no such folder). Reading from a repository downloads; changing it commits.
        key (`str` or `bytes`, *optional*): the partition key; `None`: `HF_S3T_KEY`, else `partition.key` of the state.
        state (`str` or `Path`, *optional*): the folder of the private state. `None`: `.s3t/` in the folder; for a
            repository `HF_S3T_STATE`. Without a state, a repository can be read and whole slices can be deleted.
        revision (`str`, *optional*): for a repository: the commit, branch or tag to read from. `None`: the head.
        token (`str`, *optional*): for the Hub; `None`: the one that is logged in.

    Example:

        ```py
        store = S3TStore("out")
        store.locate(ids=["row-17"])
        receipt = store.delete(ids=["row-17"], reference="DSR-2026-118")
        ```
    """

    # ---- looking ----

    def status(self, prior: Sequence[float] | None = None) -> Status:
        """Tells what is trained, served, missing and deleted, and how many more requests the store can take.

        Needs no key; without the state, counts are `None`.

        Args:
            prior (`Sequence[float]`, *optional*): chance that a request hits each slice. `None`: the plan's own prior,
                if it has one.

        Raises:
            ValueError: the prior does not fit the store.
        """
        self.source.look()
        return status_of(self, prior)

    def locate(self, ids: Iterable[Any] = (), groups: Iterable[Any] = ()) -> list[Location]:
        """Finds ids and groups: whether each is known, in which slices, and which live stages saw it.

        After an id or group come known ids and groups that look like it but are spelled differently.

        Raises:
            StateError: something is not known, and state and stages are of different times. It may be in the model.
        """
        check_lists(ids=ids, groups=groups)
        self.source.look()
        key, manifest = self.key, self.live()
        wanted: list[tuple[Kind, Any]] = [*(("id", value) for value in ids), *(("group", value) for value in groups)]
        found, stages = [], seen_by(manifest.stages)
        with self.reading() as state:
            alike = LookAlikes(state.has, key)
            for kind, value in wanted:
                digest = keyed_digest(key, kind, value)
                found.append(location_of(value, digest, kind, state, stages))
                for text, other in alike.of(kind, value):
                    location = location_of(text, other, kind, state, stages)
                    found.append(replace(location, looks_like=id_text(value)))
        if any(location.found == "unknown" for location in found):
            check_agreement(self, manifest)
        return found

    # ---- deleting ----

    def delete(
        self,
        ids: Iterable[Any] = (),
        groups: Iterable[Any] = (),
        rows: Iterable[Mapping[str, Any]] = (),
        slices: Iterable[Place] = (),
        *,
        dry_run: bool = False,
        reference: str | None = None,
        missing_ok: bool = False,
        refresh_exports: bool = False,
        purge: bool = False,
        keep_refs: Iterable[str] | None = None,
    ) -> Receipt:
        """Removes everything that depends on some examples. No model, no dataset, no gradient step.

        If fewer slices answer until a repair, one warning says so. The receipt has the numbers, in a dry run too.

        Args:
            ids (`Iterable`): ids, as they stood in the id column.
            groups (`Iterable`): groups, all of whose examples go.
            rows (`Iterable[dict]`): raw rows; named by their id column, else by their content.
            slices (`Iterable[tuple[int, int]]`): whole slices as `(shard, slice)`; works without the state, too.
            dry_run (`bool`): tell what would be removed, and change nothing.
            reference (`str`, *optional*): your name for the request; it stays in the private receipt.
            missing_ok (`bool`): delete what is known, and ignore what is not.
            refresh_exports (`bool`): rewrite exports that carry the influence from live stages. A prefix becomes its
                longest live beginning; if nothing of it is live, its files are removed. A merged export loads its
                base. If a rewrite fails, the receipt names the export as still carrying the influence.
            purge (`bool`), keep_refs (`Iterable[str]`, *optional*): for a store that was opened from a repository:
                purge its history, too, see [`purge`].

        Returns:
            [`Receipt`]

        Raises:
            UnknownExampleError: something is not known; nothing was changed.
            StoreLockedError: another writer did not finish in time.
        """
        receipt = self._delete(
            {"ids": ids, "groups": groups, "rows": rows, "slices": slices},
            dry_run=dry_run, reference=reference, missing_ok=missing_ok, refresh_exports=refresh_exports,
            purge=purge, keep_refs=keep_refs,
        )  # fmt: skip
        if not dry_run:
            tell_of_deletion(self, receipt)
        return receipt

    def _delete(
        self,
        asked: Mapping[str, Iterable[Any]],
        *,
        when_durable: Callable[[], None] | None = None,
        dry_run: bool = False,
        purge: bool = False,
        keep_refs: Iterable[str] | None = None,
        **how: Any,
    ) -> Receipt:
        """As [`delete`], for the library's own callers.

        They may ask for `"digests"`, too: keyed ones, as the index holds them. `when_durable` is called once, when the
        deletion can no longer be undone and before anything is removed: a model in memory stops serving here. Where
        nothing changes it is not called. What it raises is raised after the deletion has been carried out.
        """
        check_reference(how.get("reference"))
        if (purge or keep_refs is not None) and not isinstance(self.source, RepoSource):
            raise ValueError("`purge` and `keep_refs` are for a store that was opened from a repository.")
        self.source.look()
        self.manifest()  # a folder that is no store is refused before a lock file is made in it
        if purge and isinstance(self.source, RepoSource):
            from ..hub.refs import sort_refs

            sort_refs(self.source.repo, keep_refs)  # refused before anything is deleted
        with nullcontext() if dry_run else self.writing(others=False):  # a dry run only reads
            request = resolve(self, **asked)
            receipt = deletion.delete(self, request, dry_run=dry_run, when_durable=when_durable, **how)
        if purge and not dry_run:
            try:
                report = self.purge(keep_refs)
            except S3TError as error:
                raise type(error)(f"The deletion is done ({receipt.receipt}), its purge is not. {error}") from error
            receipt = replace(receipt, status=report.status, still_served_at=report.still_served_at)
            receipt = replace(receipt, signature=None)  # what is kept, and signed, is from before the purge
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
        """Uploads this store to a repository on the Hub, in one commit. Only changed files are sent.

        The private state is never sent. Stages that others have pushed since are kept. A stage that a deletion hit,
        here or there, never comes back.

        Args:
            repo_id (`str`): `"me/model"`. It is made if there is none.
            private (`bool`): make a new repository private, and refuse a public one that holds no store yet.
            tombstones (`bool`, *optional*): upload tombstones (keyed digests without the key), so that other
                machines obey them. `None`: only to private repositories.
            token (`str`, *optional*): `None`: the one that is logged in.
            commit_message (`str`, *optional*): first line of the commit's message; a random name is added to it.

        Raises:
            StateError: the repository obeys deletions that this store has not seen; nothing was pushed.
            ValueError: the repository is public, and `private` or `tombstones` forbid that; nothing was pushed.
        """
        with self.writing():
            target = StoreFolder(repo_id, self._given_key, self.private, token=token)
            return publishing.push(self, target, private, tombstones, commit_message)

    def pull(self, repo_id: str, token: str | None = None) -> None:
        """Downloads what a repository on the Hub holds into this folder, and obeys the tombstones in it.

        Raises:
            StoreError: the repository holds another store, or its files are damaged.
        """
        with self.writing():
            before = self.served() if self.exists else {}
            manifest = publishing.pull(self, StoreFolder(repo_id, self._given_key, self.private, token=token))
            tell_of_change(self, manifest, before, self.served(manifest))

    def purge(self, keep_refs: Iterable[str] | None = None, seconds: float = SECONDS) -> PurgeReport:
        """Removes weights that the head does not serve from a repository's history; see [`hf_s3t.hub.purge.purge`].

        The report is kept beside the receipts, as `purge-*.json`.
        """
        from ..hub.purge import purge

        if not isinstance(self.source, RepoSource):
            raise ValueError(
                f"{self.path} is a folder, which has no history. Open a repository: `S3TStore('me/model')`."
            )
        with self.writing():
            protected = {digest for files in self.manifest().stages.values() for digest in files.values()}
            receipts = read_receipts(self)
            report = purge(self.source.repo, keep_refs, seconds, protected, receipts, self.private)
            self.source.look()
        return report

    def readmit(self, ids: Iterable[Any] = (), groups: Iterable[Any] = (), reference: str | None = None) -> Receipt:
        """Lifts tombstones, after a correction of data or a renewed consent. Then give the rows to `train()` again.

        Raises:
            UnknownExampleError: something has no tombstone; nothing was changed.
        """
        check_lists(ids=ids, groups=groups)
        check_reference(reference)
        wanted: dict[str, tuple[Any, Kind]] = {}
        self.manifest()
        with self.writing() as recovered:
            key = self.key
            wanted.update({keyed_digest(key, "id", value): (value, "id") for value in ids})
            wanted.update({keyed_digest(key, "group", value): (value, "group") for value in groups})
            with self.reading() as state:
                unknown = [v for digest, (v, kind) in wanted.items() if state.tombstone(kind, digest) is None]
            for intent, receipt in recovered:  # it was interrupted, and is run again
                if receipt.kind == "readmit" and wanted and wanted.keys() <= {*intent["ids"], *intent["groups"]}:
                    return receipt
            if unknown or not wanted:
                shown = ", ".join(shortened(repr(value)) for value in unknown[:5]) or "an empty request"
                raise UnknownExampleError(f"No tombstone stands for {shown}, so nothing was changed.")
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
                `None`: the one that the store names. A model is copied, which needs its memory twice, and is left as
                it was. A later deletion cannot rewrite an export that was made from a model.

        Raises:
            StoreError: there is no such adapter, or `path` lies in the store.
            ValueError: `path` holds something else, or the base is not named, is quantised or is another one.
        """
        target, stage = resolved(Path(path)), None if prefix is None else as_stage(prefix)
        encoded(str(target), "The path of an export")
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


def as_stage(prefix: str | Order | Stage) -> Stage:
    """A stage from its name, or from a bare prefix of shard 0."""
    if isinstance(prefix, Stage):
        return prefix
    return Stage.from_name(prefix) if isinstance(prefix, str) else Stage(0, tuple(prefix))
