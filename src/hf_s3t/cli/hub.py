"""`hf-s3t push | pull | purge | recheck`, and what a repository's history still serves of deletions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import HubError
from ..files import PRIVATE, json_bytes, read_json, write_atomic
from ..hub.purge_report import SECONDS, PurgeReport, covered, file_name, uncovered
from . import tables as display
from .options import AsJson, DropRefs, KeepRefs, OneStore, StateFolder
from .outcomes import DONE, PENDING, Outcome, outcome_of, run, show

if TYPE_CHECKING:  # each verb imports what it needs
    from ..store.store import S3TStore

logger = logging.getLogger(__name__)


def unpurged_of(store: S3TStore) -> dict[str, list[str]]:
    """Repositories whose history still has deleted stages -> the names of those deletions.

    Of a folder what its receipts say, without asking the Hub. A repository is asked for what was deleted elsewhere,
    or in a folder and pushed since; what was deleted from it here stays open until a purge from here.
    """
    from ..store.manifest import merged
    from ..store.receipts import read_receipts
    from ..store.sources import RepoSource

    receipts = read_receipts(store)
    if not isinstance(store.source, RepoSource):
        found: dict[str, list[str]] = {}
        for repo in {str(receipt["repository"]) for receipt in receipts if receipt.get("repository")}:
            here = [receipt for receipt in receipts if receipt.get("repository") == repo]
            found[repo] = [receipt["receipt"] for receipt in uncovered(repo, here, store.private)]
        return {repo: names for repo, names in sorted(found.items()) if names}
    repo_id, manifest = store.source.repo.repo_id, store.manifest()
    names = [r["receipt"] for r in uncovered(repo_id, receipts, store.private) if r.get("repository") == repo_id]
    settled = covered(repo_id, store.private) | {r["receipt"] for r in receipts if r.get("repository") == repo_id}
    log = manifest.log
    if store.has_state:
        with store.reading() as state:
            log = merged(log, state.log())
    others = {name: {*event.places} for name, event in log.items() if event.places and name not in settled}
    if others:
        head = {place for stage in manifest.stages for place in stage.slices}
        try:
            history = store.source.places_served(manifest.weights)
        except HubError as error:
            logger.warning("%s What it still serves of deletions elsewhere is not known.", error)
            history = set()
        names += [n for n, at in others.items() if at & (history if n in manifest.log else history | head)]
    return {repo_id: names} if names else {}


def push(
    store: OneStore,
    repo: Annotated[str, typer.Argument(help="Repository, e.g. me/model. If there is none, a private one is made.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new one public; allow a public one.")] = False,
    tombstones: Annotated[
        bool | None, typer.Option(help="Upload tombstones, too. Default: only if it is private.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload the store to a repository on the Hub, in one commit. The private state stays here."""

    from ..store.store import S3TStore

    def verb(opened: S3TStore) -> Outcome:
        info = opened.push(repo, private=not public, tombstones=tombstones)
        unpurged = unpurged_of(S3TStore(repo, state=opened.private))
        result = {"repo": repo, "commit": info.oid, "unpurged": sum(unpurged.values(), [])}
        shown = f"{repo} now holds what {opened.path} holds, at commit {info.oid}."
        if unpurged:
            shown += f" {display.still_serves(unpurged)}"
        return Outcome(str(opened.path), PENDING if unpurged else DONE, result, shown)

    run([store], None, as_json, verb)


def pull(
    store: OneStore, repo: Annotated[str, typer.Argument(help="Repository, e.g. me/model.")], as_json: AsJson = False
) -> None:
    """Download what a repository on the Hub holds into a store, and obey the tombstones in it."""

    def verb(opened: S3TStore) -> Outcome:
        opened.pull(repo)
        return Outcome(str(opened.path), DONE, {"repo": repo}, f"{opened.path} now holds what {repo} holds.")

    run([store], None, as_json, verb)


def purge(
    repo: Annotated[str, typer.Argument(help="Repository, e.g. me/model.")],
    keep_refs: KeepRefs = None,
    drop_refs: DropRefs = False,
    report: Annotated[Path | None, typer.Option(help="File to write the report to, for `recheck`.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to wait for the Hub to settle.")] = SECONDS,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Remove weights that the head does not serve from a repository's history, probe for them, and report."""

    def verb(store: S3TStore) -> Outcome:
        found = store.purge(keep_refs or ([] if drop_refs else None), seconds)
        return _purge_outcome(repo, found, report, store.private / file_name(found))

    run([repo], None, as_json, verb, state)


def recheck(
    report: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="File that `purge` wrote. It is updated.")
    ],
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Probe again what is pending in a purge report."""

    from ..hub.probes import recheck as ask_again
    from ..hub.repo import HubRepo
    from ..store.folder import StoreFolder

    def verb() -> Outcome:
        known = PurgeReport.from_json(read_json(report))
        found = ask_again(HubRepo(known.repo), known)
        kept = StoreFolder(known.repo, state=state).private / file_name(found)
        if found is known and found.status != "begun":
            shown = f"Nothing was pending, so nothing was asked. The last probe was at {known.ended_at}."
            return Outcome(known.repo, DONE, known.to_json(), f"{known.to_text()}\n{shown}")
        if kept.exists():  # the one beside the receipts, which says whether the history is purged
            write_atomic(kept, json_bytes(found.to_json()), PRIVATE)
        return _purge_outcome(known.repo, found, report, report)

    show([outcome_of(str(report), verb)], as_json)


def _purge_outcome(repo: str, found: PurgeReport, file: Path | None, kept: Path) -> Outcome:
    if file is not None:
        write_atomic(file, json_bytes(found.to_json()), PRIVATE)  # addresses in it may still answer
    kept = file or kept
    shown = f"{found.to_text()}\nThis report is in {kept}."
    if found.status == "begun":
        shown += f" To finish it, run hf-s3t purge {repo} again with the same --keep-ref or --drop-refs."
    elif found.pending:
        shown += f" To probe again what is pending, run: hf-s3t recheck {kept}"
    return Outcome(repo, DONE if found.status == "no_longer_served" else PENDING, found.to_json(), shown)
