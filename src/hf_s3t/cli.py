"""`hf-s3t`: the verbs of an eraser on the command line, thin over `S3TStore` and `verify`.

Exit codes: 0 done; 2 bad input, or something to be put right first; 3 done here, but pending elsewhere: in exports
that were made before, or in the history of a repository; 4 something asked for is not known, nothing was changed; 5 a
promise is broken or a file is damaged; 6 fewer requests are left than `status --fail-below` asks for. Of several
stores the gravest code counts (5, 2, 4, 3, 6), and one store's fault does not stop the others. What a person sees is
laid out in `display.py`, what a person names is read in `reading.py`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx2
import typer
from rich.console import Console, Group, RenderableType

from . import cli_plan, display
from .deletion import read_receipts, state_or_none
from .errors import DatasetError, HubError, RecipeError, S3TError, StateError, StoreLockedError, UnknownExampleError
from .files import PRIVATE, json_bytes, read_json, write_atomic
from .folder import StoreFolder
from .hub import HubRepo, hides_repo
from .manifest import merged
from .probing import recheck as ask_again
from .purge import SECONDS
from .reading import digests_not_in, load_factory, parse_prior, parse_slice, read_dataset, wanted_names
from .report import PurgeReport, covered, file_name, uncovered
from .sources import RepoSource
from .store import S3TStore, as_stage
from .verify import Check, VerifyReport, verify

logger = logging.getLogger(__name__)

DONE, BAD_INPUT, PENDING, UNKNOWN, BROKEN, LOW = 0, 2, 3, 4, 5, 6
GRAVITY = (DONE, LOW, PENDING, UNKNOWN, BAD_INPUT, BROKEN, 1)
"""Exit codes, the gravest last; 1 is a fault of this program."""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
state_app = typer.Typer(no_args_is_help=True, help="Back up the private state of a store, or put it back.")
app.add_typer(state_app, name="state")
app.command()(cli_plan.plan)

Stores = Annotated[list[str], typer.Argument(help="Stores: the output_dir of a training, or a repository.")]
OneStore = Annotated[str, typer.Argument(help="A store: the output_dir of a training.")]
Ids = Annotated[list[str] | None, typer.Option("--ids", help="An id; give the option again for another one.")]
IdsFile = Annotated[Path | None, typer.Option("--ids-file", help="File with one id per line; - is standard input.")]
Groups = Annotated[list[str] | None, typer.Option("--groups", help="A group; give the option again for another one.")]
GroupsFile = Annotated[Path | None, typer.Option("--groups-file", help="File with one group per line.")]
Reference = Annotated[str | None, typer.Option(help="Your name for the request, kept in the private receipt.")]
KeyFile = Annotated[Path | None, typer.Option(help="File with the partition key, where .s3t/ does not hold it.")]
StateFolder = Annotated[
    Path | None, typer.Option("--state", help="Folder of the state of a repository's store; also HF_S3T_STATE.")
]
KeepRefs = Annotated[
    list[str] | None,
    typer.Option("--keep-ref", help="A branch, tag or pull request to keep; all others are removed. Repeatable."),
]
DropRefs = Annotated[bool, typer.Option("--drop-refs", help="Remove every ref but the main branch.")]
Prior = Annotated[
    str | None, typer.Option(help="Chance that a request hits each slice, 0.4,0.3,0.3. Default: the plan's own.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document: a list with an outcome per store.")]


@dataclass(frozen=True)
class Outcome:
    """How a verb ended for one store: its exit code, its result as plain data and for a person, or its error."""

    store: str
    exit_code: int
    result: Any = None
    shown: RenderableType = ""
    error: dict[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"store": self.store, "exit_code": self.exit_code, "result": self.result, "error": self.error}


Verb = Callable[[S3TStore], Outcome]


@app.callback()
def main() -> None:
    """Look after stores of stages that S3T trained: find examples, delete them, check what is there.

    Exit codes: 0 done; 2 bad input; 3 done here, but pending elsewhere (exports, a repository's history); 4 not known,
    nothing changed; 5 a promise is broken or a file is damaged; 6 fewer requests are left than --fail-below asks for.
    Of several stores the gravest counts: 5, 2, 4, 3, 6.
    """


@app.command()
def status(
    stores: Stores,
    prior: Prior = None,
    fail_below: Annotated[
        float | None,
        typer.Option(min=0, help="End with 6 if fewer requests are expected until a shard is dead (either prior)."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the tree of stages of one store (.png, .svg, .pdf).")] = None,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """What is trained, served, missing and deleted, and how many requests are left. 3 while a deletion is pending."""
    if plot is not None and len(stores) > 1:
        raise typer.BadParameter("--plot draws one store. Give one store, or leave it out.")

    def verb(store: S3TStore) -> Outcome:
        found, unpurged = store.status(parse_prior(prior)), _unpurged(store)
        if plot is not None:
            _draw(store, plot)
        shown = display.show_status(found, unpurged)
        code = PENDING if unpurged or found.interrupted_deletions else DONE
        if fail_below is not None and found.requests_left < fail_below:
            code = code or LOW
            shown = Group(shown, f"{found.requests_left:.1f} requests are left, fewer than {fail_below:g}.")
        return Outcome(found.path, code, {**found.to_json(), "unpurged": _names(unpurged)}, shown)

    _run(stores, None, as_json, verb, state)


def _draw(store: S3TStore, file: Path) -> None:
    from .pictures import draw_store

    manifest = store.live()
    draw_store(manifest.plan, manifest.stages, file)


@app.command()
def locate(
    stores: Stores,
    ids: Ids = None,
    ids_file: IdsFile = None,
    groups: Groups = None,
    groups_file: GroupsFile = None,
    key_file: KeyFile = None,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Whether and where ids and groups are, and which live stages saw them."""
    wanted = wanted_names(ids, ids_file, groups, groups_file)

    def verb(store: S3TStore) -> Outcome:
        found = store.locate(**wanted)
        code = UNKNOWN if any(location.found == "unknown" for location in found) else DONE
        shown = display.show_locations(str(store.path), found)
        return Outcome(str(store.path), code, [asdict(location) for location in found], shown)

    _run(stores, key_file, as_json, _asking(wanted, verb), state)


@app.command()
def delete(
    stores: Stores,
    ids: Ids = None,
    ids_file: IdsFile = None,
    groups: Groups = None,
    groups_file: GroupsFile = None,
    not_in: Annotated[
        Path | None, typer.Option(help="Dataset file or folder; every example that is not in it is deleted.")
    ] = None,
    slices: Annotated[list[str] | None, typer.Option(help="SHARD:SLICE; works with the state lost, too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    reference: Reference = None,
    missing_ok: Annotated[
        bool, typer.Option("--missing-ok", help="Delete what is known, ignore what is not.")
    ] = False,
    refresh_exports: Annotated[
        bool, typer.Option("--refresh-exports", help="Make exports that carry the influence anew, or remove them.")
    ] = False,
    purge: Annotated[
        bool, typer.Option("--purge", help="Of a repository: remove it from the history, too, and probe.")
    ] = False,
    keep_refs: KeepRefs = None,
    drop_refs: DropRefs = False,
    key_file: KeyFile = None,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Remove everything that depends on some examples. Needs no model, no dataset and no GPU."""
    wanted = wanted_names(ids, ids_file, groups, groups_file)
    places = [parse_slice(text) for text in slices or ()]

    def verb(store: S3TStore) -> Outcome:
        path = str(store.path)
        digests = digests_not_in(store, not_in) if not_in else []
        if not_in and not any((digests, *wanted.values(), places)):
            return Outcome(path, DONE, None, f"Every example of {path} is in {not_in}. Nothing was changed.")
        receipt = store.delete(
            wanted["ids"], wanted["groups"], slices=places, digests=digests,
            dry_run=dry_run, reference=reference, missing_ok=missing_ok, refresh_exports=refresh_exports,
            purge=purge, keep_refs=_kept(keep_refs, drop_refs),
        )  # fmt: skip
        unpurged = {} if dry_run or not isinstance(store.source, RepoSource) else _unpurged(store)
        pending = receipt.exports or receipt.still_served_at or receipt.status == "pending" or unpurged
        code = PENDING if pending and not dry_run else DONE
        return Outcome(path, code, receipt.to_json(), display.show_receipt(path, receipt, unpurged))

    _run(stores, key_file, as_json, verb, state)


def _unpurged(store: S3TStore) -> dict[str, list[str]]:
    """Repositories whose history still has deleted stages -> the names of those deletions.

    Of a folder what its receipts say, without asking the Hub. A repository is asked for what was deleted elsewhere,
    or in a folder and pushed since; what was deleted from it here stays open until a purge from here.
    """
    receipts = read_receipts(store)
    if not isinstance(store.source, RepoSource):
        found: dict[str, list[str]] = {}
        for repo in {str(receipt["repository"]) for receipt in receipts if receipt.get("repository")}:
            here = [receipt for receipt in receipts if receipt.get("repository") == repo]
            found[repo] = [receipt["receipt"] for receipt in uncovered(repo, here, store.private)]
        return {repo: names for repo, names in sorted(found.items()) if names}
    repo_id, manifest, state = store.source.repo.repo_id, store.manifest(), state_or_none(store)
    names = [r["receipt"] for r in uncovered(repo_id, receipts, store.private) if r.get("repository") == repo_id]
    settled = covered(repo_id, store.private) | {r["receipt"] for r in receipts if r.get("repository") == repo_id}
    log = merged(manifest.log, state.log) if state is not None else manifest.log
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


def _names(unpurged: Mapping[str, list[str]]) -> list[str]:
    return [name for names in unpurged.values() for name in names]


def _kept(keep_refs: list[str] | None, drop_refs: bool) -> list[str] | None:
    return keep_refs or ([] if drop_refs else None)


@app.command()
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

    def verb(opened: S3TStore) -> Outcome:
        info = opened.push(repo, private=not public, tombstones=tombstones)
        unpurged = _unpurged(S3TStore(repo, state=opened.private))
        result = {"repo": repo, "commit": info.oid, "unpurged": _names(unpurged)}
        shown = f"{repo} is what {opened.path} holds, at {info.oid}."
        if unpurged:
            shown += f" {display.still_serves(unpurged)}"
        return Outcome(str(opened.path), PENDING if unpurged else DONE, result, shown)

    _run([store], None, as_json, verb)


@app.command()
def pull(
    store: OneStore, repo: Annotated[str, typer.Argument(help="Repository, e.g. me/model.")], as_json: AsJson = False
) -> None:
    """Bring a store to what a repository on the Hub holds, and obey the tombstones that travel in it."""

    def verb(opened: S3TStore) -> Outcome:
        opened.pull(repo)
        return Outcome(str(opened.path), DONE, {"repo": repo}, f"{opened.path} is what {repo} holds.")

    _run([store], None, as_json, verb)


@app.command()
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
        found = store.purge(_kept(keep_refs, drop_refs), seconds)
        return _purge_outcome(repo, found, report, store.private / file_name(found))

    _run([repo], None, as_json, verb, state)


@app.command()
def recheck(
    report: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="File that `purge` wrote; it is brought up to date.")
    ],
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Ask again for what a purge report has as pending."""

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

    _show([_outcome(str(report), verb)], as_json)


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


@app.command()
def readmit(
    stores: Stores,
    ids: Ids = None,
    ids_file: IdsFile = None,
    groups: Groups = None,
    groups_file: GroupsFile = None,
    reference: Reference = None,
    key_file: KeyFile = None,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Lift tombstones, for rectified data or renewed consent. Then train again with the rows."""
    wanted = wanted_names(ids, ids_file, groups, groups_file)

    def verb(store: S3TStore) -> Outcome:
        receipt = store.readmit(**wanted, reference=reference)
        shown = display.show_readmission(str(store.path), receipt)
        return Outcome(str(store.path), DONE, receipt.to_json(), shown)

    _run(stores, key_file, as_json, _asking(wanted, verb), state)


@app.command("verify")
def verify_command(
    stores: Stores,
    retrain: Annotated[
        list[str] | None, typer.Option(help="A stage to train again and compare, e.g. shard-00/2-0. Repeatable.")
    ] = None,
    trainer: Annotated[
        str | None,
        typer.Option(
            help="module:function or file.py:function. It is called with (output_dir, train_dataset) and returns a "
            "trainer with the settings that trained the store. It is run: give only what you trust."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Dataset file or folder with the train set, for --retrain.")
    ] = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Check hashes, contents, tombstones and the root adapter; with --retrain train stages again, too."""

    def verb(store: S3TStore) -> Outcome:
        if bool(retrain) != bool(trainer and data):
            raise ValueError("Give --retrain, --trainer and --data together, or none of them.")
        report = verify(store)
        if retrain:
            report = replace(report, checks=report.checks + _retrain(store, retrain, str(trainer), Path(str(data))))
        return _report_outcome(report)

    _run(stores, key_file, as_json, verb)


def _report_outcome(report: VerifyReport) -> Outcome:
    return Outcome(report.path, DONE if report.ok else BROKEN, report.to_json(), display.show_report(report))


@app.command()
def export(
    store: OneStore,
    target: Annotated[Path, typer.Argument(help="Folder to write to, outside the store.")],
    prefix: Annotated[str | None, typer.Option(help="A live stage, e.g. shard-00/2-0. Default: the root.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a whole model: the adapter merged into its unquantised base.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Folder or repository of the base, for --merge. Default: the one in the store.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the served model, or any live prefix, as one plain LoRA adapter that stock PEFT loads, or merged."""

    def verb(store: S3TStore) -> Outcome:
        _check_export(store, target, prefix)
        done = store.export(target, prefix, merge, base)
        result = asdict(done) | {"prefix": prefix, "merge": merge}
        return Outcome(str(store.path), DONE, result, display.show_export(str(store.path), done))

    _run([store], None, as_json, verb)


def _check_export(store: S3TStore, target: Path, prefix: str | None) -> None:
    live = store.live()
    if prefix is not None and as_stage(prefix) not in live.stages:
        known = ", ".join(stage.name for stage in sorted(live.stages)) or "none"
        raise ValueError(f"{prefix} is not a live stage of {store.path}. Live stages: {known}.")
    if prefix is None and live.root is None:
        raise ValueError(f"{store.path} has no root adapter; its README.md says why. Name a stage with --prefix.")
    if target.resolve().is_relative_to(store.path.resolve()):
        raise ValueError(f"{target} lies inside the store, which holds its own files only. Export to another folder.")


@state_app.command("export")
def export_state(
    store: OneStore, file: Annotated[Path, typer.Argument(help="File to write.")], as_json: AsJson = False
) -> None:
    """Write key, index, tombstones and receipts into one private file. Keep it where nobody else reads."""

    def verb(store: S3TStore) -> Outcome:
        store.export_state(file)
        shown = f"The state of {store.path} is in {file}. It names who was deleted to whoever has it: keep it private."
        return Outcome(str(store.path), DONE, {"file": str(file)}, shown)

    _run([store], None, as_json, verb)


@state_app.command("import")
def import_state(
    store: OneStore, file: Annotated[Path, typer.Argument(help="File that export wrote.")], as_json: AsJson = False
) -> None:
    """Put a backup of the state in place, and finish what its tombstones ask for."""

    def verb(store: S3TStore) -> Outcome:
        store.import_state(file)
        return Outcome(str(store.path), DONE, {"file": str(file)}, f"The state of {store.path} is that of {file} now.")

    _run([store], None, as_json, verb)


# ---- running a verb ----


def _run(stores: Iterable[str], key_file: Path | None, as_json: bool, verb: Verb, state: Path | None = None) -> None:
    """Applies a verb to each store, and ends the program with what came of it."""

    def opened(path: str) -> Outcome:
        store = S3TStore(path, key_file.read_text().strip() if key_file else None, state)
        if not store.exists:
            raise ValueError(_absent(path, store))
        return verb(store)

    _show([_outcome(path, partial(opened, path)) for path in stores], as_json)


def _absent(path: str, store: S3TStore) -> str:
    if isinstance(store.source, RepoSource):
        return f"there is no folder {path}, and the repository {path} on the Hub has no s3t.json."
    if hides_repo(path):
        return f"the folder {path}, which holds no store, hides a repository of that name. Work elsewhere to reach it."
    return (
        "there is no store here (no s3t.json). Give the output_dir of a training, or the id of a repository, such as "
        "me/model."
    )


def _show(outcomes: list[Outcome], as_json: bool) -> None:
    """Shows outcomes, and ends the program with the gravest exit code."""
    person = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else display.WIDTH)
    for outcome in outcomes:
        if outcome.error:
            print(f"{outcome.store}: {outcome.error['message']}", file=sys.stderr)
        elif not as_json:
            person.print(outcome.shown)
    if as_json:
        print(json.dumps([outcome.to_json() for outcome in outcomes], indent=1, ensure_ascii=False))
    raise typer.Exit(max((outcome.exit_code for outcome in outcomes), key=GRAVITY.index))


def _outcome(name: str, verb: Callable[[], Outcome]) -> Outcome:
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the outcomes alone
        try:
            return verb()
        except (S3TError, ValueError, OSError) as error:
            code, message = _exit_code(error), str(error)
            described = {"type": type(error).__name__, "message": message}
        except httpx2.HTTPError as error:
            code, message = BAD_INPUT, f"the Hub did not answer ({error}). Run it again later: it goes on from there."
            described = {"type": type(error).__name__, "message": message}
        except Exception as error:
            traceback.print_exc()
            code, described = 1, {"type": type(error).__name__, "message": f"{error} (a fault of this program)"}
    return Outcome(name, code, error=described)


def _exit_code(error: Exception) -> int:
    if isinstance(error, UnknownExampleError):
        return UNKNOWN
    fixable = (HubError, StateError, StoreLockedError, RecipeError, DatasetError)
    return BROKEN if isinstance(error, S3TError) and not isinstance(error, fixable) else BAD_INPUT


def _asking(wanted: dict[str, list[str]], verb: Verb) -> Verb:
    if not any(wanted.values()):
        raise typer.BadParameter("Nothing is asked for. Give --ids, --ids-file, --groups or --groups-file.")
    return verb


def _retrain(store: S3TStore, stages: list[str], factory: str, data: Path) -> tuple[Check, ...]:
    from .retrain import retrain_and_compare

    make_trainer, rows = load_factory(factory), read_dataset(data)
    return tuple(retrain_and_compare(store, name, lambda folder: make_trainer(folder, rows)) for name in stages)
