"""Purging a repository's history of what its head does not serve.

A purge removes refs that lead to older revisions, squashes the branches that stay, and deletes large files: all that
is stored, less what a kept ref serves. Then it asks for every removed content, by every way that led to it. The report
is written first, and every step may find its work done: purging again ends a purge that was interrupted.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import hf_raise_for_status

from ..errors import HubError, StoreError
from ..files import utc_now
from ..seams import hub as seam
from .local_caches import cached_revisions, clear_caches
from .probes import WORKERS, ask, head_of, recheck, stored
from .purge_report import SECONDS, Probe, PurgeReport, keep, uncovered, unfinished
from .refs import drop_ref, is_branch, sort_refs, squash
from .repo import HubRepo

logger = logging.getLogger(__name__)

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that hold weights, wherever git keeps them."""

Files = dict[str, Any]
"""The entries of a tree by path."""


@dataclass(frozen=True)
class Known:
    """What is known from before: receipts of deletions that no finished purge covers, and an interrupted purge."""

    receipts: Sequence[Mapping[str, Any]] = ()
    earlier: PurgeReport | None = None

    @property
    def revisions(self) -> set[str]:
        """Commits that were seen to serve something removed, whether or not a ref still leads to them."""
        named = [at for receipt in self.receipts for at in receipt.get("still_served_at", ())]  # old ones lack it
        return {at for at in named if re.fullmatch("[0-9a-f]{40}", at)}

    @property
    def deleted(self) -> set[str]:
        """sha256 of the weights of the stages that receipts say were removed."""
        stages = [files for receipt in self.receipts for files in receipt["stages_removed"].values()]
        return {digest for files in stages for name, digest in files.items() if name.endswith(".safetensors")}

    @property
    def removed(self) -> set[str]:
        """sha256 of everything that is to be gone."""
        return self.deleted | set(self.earlier.removed if self.earlier else ())

    @property
    def sizes(self) -> dict[str, int]:
        """sha256 -> size, as an interrupted purge found them."""
        probes = [probe for probe in self.earlier.probes if probe.way == "object"] if self.earlier else []
        sizes = {probe.oid: int(probe.at.split()[0]) for probe in probes}
        return {oid: size for oid, size in sizes.items() if size > 1}  # 1 stands for a size that was not known


def purge(
    repo: HubRepo,
    keep_refs: Iterable[str] | None = None,
    seconds: float = SECONDS,
    protected: Iterable[str] = (),
    receipts: Iterable[Mapping[str, Any]] = (),
    folder: Path | None = None,
) -> PurgeReport:
    """Removes from a repository's history what its own branch does not serve.

    Args:
        keep_refs (`Iterable[str]`, *optional*): other refs to keep: `"dev"`, `"refs/tags/v1"`, `"refs/pr/1"`. `None`:
            refuse if there are others. A kept branch is squashed and keeps all files of its head, also those that the
            own branch lost: they are reported as pending. A kept tag or pull request loses what the own branch lost.
        protected (`Iterable[str]`): sha256 of contents that must stay: those of live stages. What a receipt says was
            removed and is not among them is reported as pending where a kept branch has it, under whatever name.
        receipts (`Iterable[dict]`): of deletions; those that no finished purge in `folder` covers are covered by this.
        folder (`Path`, *optional*): where reports are kept. Without one an interrupted purge forgets what it knew.

    Raises:
        ValueError: there are other refs, and nobody said what to do with them, or a ref to keep is not there.
            Nothing was changed.
        StoreError: something that has to stay would go; nothing was changed.
        HubError: the Hub refused a step, or did not answer. Purge again to go on.
    """
    protected = set(protected)
    known = Known(uncovered(repo.repo_id, receipts, folder), unfinished(repo.repo_id, folder))
    with _stopping(repo):
        kept, dropped = sort_refs(repo, keep_refs)
        report, unwanted = _prepare(repo, kept, dropped, known, protected)
        refuse_if_live(repo, kept, unwanted, protected)
        seam.check_large_file_deletion(repo.api)
        keep(report, folder)
        for ref in dropped:
            drop_ref(repo, ref)
        for branch in kept:
            squash(repo, branch)
        refuse_if_live(repo, kept, unwanted, protected)  # somebody may have committed one of them meanwhile
        seam.delete_large_files(repo.api, repo.repo_id, unwanted)
        left = dict(repo.refs())
    logger.info("%s: %d refs and %d large files removed", repo.repo_id, len(dropped), len(unwanted))
    report = recheck(repo, _cleared(repo, report, left), seconds)
    keep(report, folder)
    return report


@contextmanager
def _stopping(repo: HubRepo) -> Iterator[None]:
    """Tells how to go on with a purge that is stopped in this block."""
    try:
        yield
    except (HfHubHTTPError, HubError, seam.transport_error()) as error:
        raise HubError(
            f"The purge of {repo.repo_id} stopped: {error}. What was done stays done, and nothing that is kept was "
            "removed. It needs a token with write access; purge again to go on."
        ) from error
    except KeyboardInterrupt:
        logger.error("The purge of %s was stopped. What was removed is removed: purge again to end it.", repo.repo_id)
        raise


def _cleared(repo: HubRepo, report: PurgeReport, left: Mapping[str, str]) -> PurgeReport:
    """Clears this machine's caches; the report says so, and which refs are not among those that are left."""
    cleared, uncleared = clear_caches(repo.repo_id, left[report.refs_kept[0]])
    return replace(
        report, status="pending", refs_removed=[ref for ref in report.refs_removed if ref not in left],
        caches_cleared=sorted({*report.caches_cleared, *cleared}), caches_left=uncleared,
    )  # fmt: skip


def _prepare(
    repo: HubRepo, kept: list[str], dropped: list[str], known: Known, protected: set[str]
) -> tuple[PurgeReport, set[str]]:
    """The report as it stands before anything is removed, and the contents to remove."""
    there = stored(repo)  # first: what somebody uploads from now on is not among it
    history, trees = _history(repo, [*kept, *dropped], known)
    own, deleted = contents(trees[kept[0]]), known.deleted - protected
    fine = own.keys() - deleted  # a repair may have brought a content back, but then a live stage has it
    lost = {oid for revision in history[kept[0]] for oid in contents(trees[revision])} | known.removed
    lost -= fine
    live = {oid for ref in kept for oid in contents(trees[ref]) if is_branch(ref) or oid not in lost}
    unwanted = {*there, *(oid for tree in trees.values() for oid in contents(tree))} - live
    gone = lost | unwanted
    sizes = known.sizes | {oid: size for tree in trees.values() for oid, size in contents(tree).items()} | there
    weights = _plain_weights(repo, history, trees, kept, {oid: sizes.get(oid) for oid in gone}, deleted)
    left = [at for ref in kept for at in (history[ref][:1] if is_branch(ref) else history[ref])]  # after the squash
    stuck = weights & {blob for at in left for blob in plain_files(trees[at])}
    probes = [*_ways(trees, gone, weights, kept), Probe("", "head", kept[0])]
    for oid in sorted(gone):
        probes += [Probe(oid, "object", f"{sizes.get(oid, 1)} bytes"), Probe(oid, "listing", "large-file storage")]
    names: dict[str, list[str]] = {oid: [] for oid in sorted(gone)}
    for tree in trees.values():
        for path, entry in tree.items():
            if entry.lfs is not None and entry.lfs.sha256 in gone and path not in names[entry.lfs.sha256]:
                names[entry.lfs.sha256].append(path)
    began = utc_now()
    report = PurgeReport(
        repo.repo_id, "begun", began, began, "", [receipt["receipt"] for receipt in known.receipts],
        names, sorted(gone & live | stuck), dropped, kept, _asked_before(repo, probes),
        references={r["receipt"]: str(r["reference"]) for r in known.receipts if r.get("reference")},
    )  # fmt: skip
    return (_joined(known.earlier, report, fine) if known.earlier else report), unwanted


def _history(repo: HubRepo, refs: Sequence[str], known: Known) -> tuple[dict[str, list[str]], dict[str, Files]]:
    """The commits of every ref, and the files of every ref and commit, also of commits known from before."""
    history = {ref: repo.commits(ref) for ref in refs}
    trees: dict[str, Files] = {}
    for ref in refs:
        for revision in history[ref]:
            if revision not in trees:
                trees[revision] = repo.tree(revision)
        trees[ref] = trees[history[ref][0]]
    for revision in sorted((known.revisions | cached_revisions(repo.repo_id)) - trees.keys()):
        try:
            trees[revision] = repo.tree(revision)
        except RevisionNotFoundError:
            continue
    return history, trees


def contents(tree: Mapping[str, Any]) -> dict[str, int]:
    """sha256 of the large files of a tree -> size."""
    return {entry.lfs.sha256: entry.lfs.size for entry in tree.values() if entry.lfs is not None}


def plain_files(tree: Mapping[str, Any]) -> set[str]:
    """git's names of the files of a tree that git itself keeps."""
    return {entry.blob_id for entry in tree.values() if entry.lfs is None}


def _plain_weights(
    repo: HubRepo, history: Mapping[str, list[str]], trees: Mapping[str, Files], kept: Sequence[str],
    gone: Mapping[str, int | None], deleted: set[str],
) -> set[str]:  # fmt: skip
    """git's names of the plain files that hold weights which should be gone: by their ending, or by their content.

    The ending is not enough at the head of a kept branch, unless the own branch lost the file. `gone` has sizes by
    sha256, which choose the files to read; `deleted` those of them that should not be at the own branch's head.
    """
    own = plain_files(trees[kept[0]])
    lost = {blob for revision in history[kept[0]] for blob in plain_files(trees[revision])} - own
    brought = {blob for ref in kept if is_branch(ref) for blob in plain_files(trees[ref])} - lost
    found, unread, sizes = set(), {}, set(gone.values())
    for revision, tree in trees.items():
        for path, entry in tree.items():
            if entry.lfs is None and entry.blob_id not in brought and path.lower().endswith(WEIGHT_FILES):
                found.add(entry.blob_id)
            elif entry.lfs is None and (entry.size in sizes or None in sizes):
                unread[entry.blob_id] = (revision, path)
    with ThreadPoolExecutor(WORKERS) as pool:
        digests = pool.map(lambda at: _sha256_of(repo, *at), unread.values())
        by_content = {
            blob for blob, sha in zip(unread, digests, strict=True) if sha in (deleted if blob in own else gone)
        }
    return found | by_content


def _sha256_of(repo: HubRepo, revision: str, path: str) -> str:
    """Of a file at a revision, without the cache; of one that is not there nothing."""
    url, digest = hf_hub_url(repo.repo_id, path, revision=revision, endpoint=repo.api.endpoint), hashlib.sha256()
    with seam.session().stream("GET", url, headers=repo.headers(), timeout=seam.TIMEOUT) as response:
        if response.status_code == 404:
            return ""
        hf_raise_for_status(response)
        for block in response.iter_bytes():
            digest.update(block)
    return digest.hexdigest()


def _ways(trees: Mapping[str, Files], gone: set[str], weights: set[str], kept: Sequence[str]) -> list[Probe]:
    """Every revision and path by which a removed large file, plain weights, or a plain file
    that no kept branch has is served."""
    plain = {blob for ref in kept if is_branch(ref) for blob in plain_files(trees[ref])}
    ways = []
    for revision, tree in trees.items():
        for path, entry in tree.items():
            if entry.lfs is not None and entry.lfs.sha256 in gone:
                ways.append(Probe(entry.lfs.sha256, "revision", f"{revision}:{path}"))
            elif entry.lfs is None and entry.blob_id in weights:
                ways.append(Probe(entry.blob_id, "plain weights", f"{revision}:{path}"))
            elif entry.lfs is None and entry.blob_id not in plain:
                ways.append(Probe(entry.blob_id, "plain file", f"{revision}:{path}"))
    return ways


def _asked_before(repo: HubRepo, probes: Iterable[Probe]) -> list[Probe]:
    """The probes with what they answer now, as one that sees nothing now proves nothing later; and an address each."""
    asked = [replace(p, before=p.answer, answer="", served=None, seen_at="") for p in ask(repo, probes)]
    addresses: dict[str, Probe] = {}
    for probe in asked:
        if probe.way == "revision" and probe.before.startswith("HTTP 3") and probe.oid not in addresses:
            location = head_of(repo, *probe.at.split(":", 1)).headers.get("location", "")
            if location.startswith("http"):
                addresses[probe.oid] = Probe(probe.oid, "address", location, "handed out")
    return [*asked, *addresses.values()]


def _joined(earlier: PurgeReport, report: PurgeReport, fine: set[str]) -> PurgeReport:
    """A report that goes on with an interrupted one. What may be served again since then is no longer its matter."""
    probes = {(probe.oid, probe.way, probe.at): probe for probe in report.probes}
    for probe in earlier.probes:
        if probe.oid not in fine:
            found = probes.get((probe.oid, probe.way, probe.at), probe)
            probes[probe.oid, probe.way, probe.at] = replace(found, before=probe.before or found.before)
    names = {oid: paths for oid, paths in earlier.removed.items() if oid not in fine} | report.removed
    return replace(
        report,
        began_at=earlier.began_at,
        receipts=list(dict.fromkeys([*earlier.receipts, *report.receipts])),
        references={**earlier.references, **report.references},
        removed={oid: paths or earlier.removed.get(oid, []) for oid, paths in names.items()},
        refs_removed=list(dict.fromkeys([*earlier.refs_removed, *report.refs_removed])),
        probes=list(probes.values()),
        caches_cleared=earlier.caches_cleared,
    )


def refuse_if_live(repo: HubRepo, kept: Iterable[str], unwanted: set[str], protected: Iterable[str]) -> None:
    """Raises [`StoreError`] if what is to be removed is in the head of a kept branch, or has to stay."""
    served = set().union(*(contents(repo.tree(ref)) for ref in kept if is_branch(ref)))
    wrong = unwanted & (served | set(protected))
    if wrong:
        raise StoreError(
            f"A purge of {repo.repo_id} would remove {len(wrong)} large files that are live, {min(wrong)[:16]} among "
            "them. No large file was removed. If somebody has pushed meanwhile, purge again."
        )
