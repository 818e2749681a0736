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
    repo: Annotated[str, typer.Argument(help="Repository, e.g. me/model; made, private, if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new one public; allow one that is.")] = False,
    tombstones: Annotated[
        bool | None, typer.Option(help="Let tombstones travel in it. Default: if it is private.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring a repository on the Hub to what the store holds, in one commit. The state stays here."""

    from ..store.store import S3TStore

    def verb(opened: S3TStore) -> Outcome:
        info = opened.push(repo, private=not public, tombstones=tombstones)
        unpurged = unpurged_of(S3TStore(repo, state=opened.private))
        result = {"repo": repo, "commit": info.oid, "unpurged": sum(unpurged.values(), [])}
        shown = f"{repo} is what {opened.path} holds, at {info.oid}."
        if unpurged:
            shown += f" {display.still_serves(unpurged)}"
        return Outcome(str(opened.path), PENDING if unpurged else DONE, result, shown)

    run([store], None, as_json, verb)


def pull(
    store: OneStore, repo: Annotated[str, typer.Argument(help="Repository, e.g. me/model.")], as_json: AsJson = False
) -> None:
    """Bring a store to what a repository on the Hub holds, and obey the tombstones that travel in it."""

    def verb(opened: S3TStore) -> Outcome:
        opened.pull(repo)
        return Outcome(str(opened.path), DONE, {"repo": repo}, f"{opened.path} is what {repo} holds.")

    run([store], None, as_json, verb)


def purge(
    repo: Annotated[str, typer.Argument(help="Repository, e.g. me/model.")],
    keep_refs: KeepRefs = None,
    drop_refs: DropRefs = False,
    report: Annotated[Path | None, typer.Option(help="File for the report, for `recheck`.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to wait for the Hub to settle.")] = SECONDS,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Remove from a repository's history what its head does not serve, probe it, and report what was seen."""

    def verb(store: S3TStore) -> Outcome:
        found = store.purge(keep_refs or ([] if drop_refs else None), seconds)
        return _purge_outcome(repo, found, report, store.private / file_name(found))

    run([repo], None, as_json, verb, state)


def recheck(
    report: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="File that `purge` wrote; it is brought up to date.")
    ],
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Ask again for what a purge report has as pending."""

    from ..hub.probes import recheck as ask_again
    from ..hub.repo import HubRepo
    from ..store.folder import StoreFolder

    def verb() -> Outcome:
        known = PurgeReport.from_json(read_json(report))
        found = ask_again(HubRepo(known.repo), known)
        kept = StoreFolder(known.repo, state=state).private / file_name(found)
        if found is known and found.status != "begun":
            shown = f"Nothing was pending, so nothing was asked; it was last seen at {known.ended_at}."
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
        shown += f" End it: hf-s3t purge {repo}, with what you said of its refs."
    elif found.pending:
        shown += f" Ask again for what is pending: hf-s3t recheck {kept}"
    return Outcome(repo, DONE if found.status == "no_longer_served" else PENDING, found.to_json(), shown)
