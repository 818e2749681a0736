"""`hf-s3t`: the verbs of an eraser on the command line, thin over `S3TStore`.

Verbs for a repository are in `hub.py`, those for a private state in `state.py`, the planner's in `plan.py`, the
endpoint's in `serve.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group

from ..errors import UnknownExampleError
from ..files import resolved
from . import hub as cli_hub
from . import plan as cli_plan
from . import receipt as cli_receipt
from . import serve as cli_serve
from . import state as cli_state
from . import tables as display
from .hub import unpurged_of
from .options import (
    AsJson,
    AtMost,
    Column,
    DropRefs,
    DryRun,
    Groups,
    GroupsFile,
    Ids,
    IdsFile,
    KeepRefs,
    KeyFile,
    MissingOk,
    NotIn,
    OneStore,
    Prior,
    Purge,
    Reference,
    RefreshExports,
    Slices,
    StateFolder,
    Stores,
    Wanted,
    digests_not_in,
    load_factory,
    parse_prior,
    parse_share,
    parse_slice,
    read_dataset,
    wanted_names,
)
from .outcomes import BROKEN, DONE, LOW, PENDING, UNKNOWN, Outcome, Verb, run
from .wording import let_flow

if TYPE_CHECKING:  # each verb imports what it needs
    from ..store.store import S3TStore

logger = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(cli_state.app, name="state")
app.add_typer(cli_receipt.app, name="receipt")
for command in (cli_plan.plan, cli_hub.push, cli_hub.pull, cli_hub.purge, cli_hub.recheck, cli_serve.serve):
    app.command()(command)


@app.callback()
def main() -> None:
    """Find and delete training examples in the stores that S3T trained, and check these stores.

    Exit codes:
    0 done
    2 bad input, or something must be put right first
    3 no longer served here, but pending: a disk that failed, exports, a repository's history
    4 an id or a group is not known; nothing changed
    5 a promise is broken, or a file is damaged
    6 fewer requests are left than --fail-below asks for
    With several stores the gravest code counts: 5, 2, 4, 3, 6.
    """


@app.command()
def status(
    stores: Stores,
    prior: Prior = None,
    fail_below: Annotated[
        float | None,
        typer.Option(min=0, help="Exit with 6 if a shard is expected to be dead after fewer requests (either prior)."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the tree of stages of one store (.png, .svg, .pdf).")] = None,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Show what is trained, served, missing and deleted, and how many requests are left. 3: a deletion is pending."""
    if plot is not None and len(stores) > 1:
        raise typer.BadParameter("--plot draws one store. Give one store, or leave it out.")
    if fail_below is not None and math.isnan(fail_below):  # not every version of typer does
        raise typer.BadParameter("--fail-below is a number of requests, and nothing is fewer than nan.")

    def verb(store: S3TStore) -> Outcome:
        found, unpurged = store.status(parse_prior(prior)), unpurged_of(store)
        if plot is not None:
            from ..planner.pictures import draw_tree

            manifest = store.live()
            draw_tree(manifest.plan, manifest.stages, plot, replay=manifest.replay)
        shown = display.show_status(found, unpurged)
        code = PENDING if unpurged or found.interrupted_deletions else DONE
        if fail_below is not None and found.requests_left < fail_below:
            code = code or LOW
            shown = Group(shown, f"{found.requests_left:.1f} requests are left, fewer than {fail_below:g}.")
        return Outcome(found.path, code, {**found.to_json(), "unpurged": sum(unpurged.values(), [])}, shown)

    run(stores, None, as_json, verb, state)


@app.command()
def locate(
    stores: Stores,
    ids: Ids = None,
    ids_file: IdsFile = None,
    groups: Groups = None,
    groups_file: GroupsFile = None,
    column: Column = None,
    key_file: KeyFile = None,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Find ids and groups: in which slice they are, and which live stages saw them."""
    wanted = wanted_names(ids, ids_file, groups, groups_file, column)

    def verb(store: S3TStore) -> Outcome:
        found = store.locate(**wanted.names)
        code = UNKNOWN if any(location.found == "unknown" for location in found) else DONE
        if code == UNKNOWN:
            _tell(wanted.hints)
        shown = display.show_locations(str(store.path), found)
        return Outcome(str(store.path), code, [asdict(location) for location in found], shown)

    run(stores, key_file, as_json, _asking(wanted, verb), state)


@app.command()
def delete(
    stores: Stores,
    ids: Ids = None,
    ids_file: IdsFile = None,
    groups: Groups = None,
    groups_file: GroupsFile = None,
    column: Column = None,
    not_in: NotIn = None,
    at_most: AtMost = "10%",
    slices: Slices = None,
    dry_run: DryRun = False,
    reference: Reference = None,
    missing_ok: MissingOk = False,
    refresh_exports: RefreshExports = False,
    purge: Purge = False,
    keep_refs: KeepRefs = None,
    drop_refs: DropRefs = False,
    key_file: KeyFile = None,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Remove everything that depends on some examples. Needs no model, no dataset and no GPU."""
    wanted = wanted_names(ids, ids_file, groups, groups_file, column)
    places, share = [parse_slice(text) for text in slices or ()], parse_share(at_most)

    def verb(store: S3TStore) -> Outcome:
        path = str(store.path)
        digests = digests_not_in(store, not_in, share) if not_in else []
        if not_in and not any((digests, *wanted.names.values(), places)):
            return Outcome(path, DONE, None, f"Every example of {path} is in {not_in}. Nothing was changed.")
        receipt = store._delete(
            {**wanted.names, "slices": places, "digests": digests},
            dry_run=dry_run, reference=reference, missing_ok=missing_ok, refresh_exports=refresh_exports,
            purge=purge, keep_refs=keep_refs or ([] if drop_refs else None),
        )  # fmt: skip
        unpurged = {} if dry_run or store.source.repo_id is None else unpurged_of(store)
        pending = receipt.exports or receipt.still_served_at or receipt.status == "pending" or unpurged
        code = PENDING if pending and not dry_run else DONE
        if receipt.found + receipt.already_deleted < receipt.asked:
            _tell(wanted.hints)
        if receipt.asked and receipt.found == receipt.already_deleted == 0:  # --missing-ok, of which nothing was found
            code = UNKNOWN
        return Outcome(path, code, receipt.to_json(), display.show_receipt(path, receipt, unpurged))

    run(stores, key_file, as_json, _hinted(wanted, verb), state)


@app.command()
def readmit(
    stores: Stores,
    ids: Ids = None,
    ids_file: IdsFile = None,
    groups: Groups = None,
    groups_file: GroupsFile = None,
    column: Column = None,
    reference: Reference = None,
    key_file: KeyFile = None,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Lift tombstones, after a correction of data or a renewed consent. Then train again with the rows."""
    wanted = wanted_names(ids, ids_file, groups, groups_file, column)

    def verb(store: S3TStore) -> Outcome:
        receipt = store.readmit(**wanted.names, reference=reference)
        shown = display.show_readmission(str(store.path), receipt)
        return Outcome(str(store.path), DONE, receipt.to_json(), shown)

    run(stores, key_file, as_json, _asking(wanted, verb), state)


@app.command("verify")
def verify_command(
    stores: Stores,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train stages again, and compare bytes: --all, --sample or --stage.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="With --retrain: every live stage.")] = False,
    sample: Annotated[int | None, typer.Option(min=1, help="With --retrain: draw this many stages at random.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for --sample. Default: a new one, which is shown.")] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="With --retrain: this stage, e.g. shard-00/2-0. Repeatable.")
    ] = None,
    trainer: Annotated[
        str | None,
        typer.Option(
            help="module:function or file.py:function. It is called with (output_dir, train_dataset) and returns a "
            "trainer with the settings that trained the store. This code is run: give only what you trust."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Dataset file or folder of the train set, for --retrain.")
    ] = None,
    scan_for: Annotated[
        Path | None,
        typer.Option(help="File of texts and ids to look for in every byte, one per line (.jsonl: as JSON)."),
    ] = None,
    key_file: KeyFile = None,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Check hashes, contents, tombstones and the root adapter. On request, retrain stages or search all bytes."""
    if retrain != bool(trainer and data) or bool(trainer) != bool(data):
        raise typer.BadParameter("Give --retrain, --trainer and --data together, or none of them.")
    if retrain != (every + (sample is not None) + bool(stage) == 1) or (seed is not None and sample is None):
        raise typer.BadParameter("Give one of --all, --sample and --stage with --retrain, and --seed with --sample.")

    def verb(store: S3TStore) -> Outcome:
        make = _retrainer(str(trainer), Path(str(data))) if retrain else None
        wanted = "all" if every else stage
        report = store.verify(wanted, sample=sample, seed=seed, make_trainer=make, scan_for=scan_for)
        code = DONE if report.ok else BROKEN
        return Outcome(report.path, code, report.to_json(), display.show_report(report))

    run(stores, key_file, as_json, verb, state)


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
    """Write the served model, or any live prefix, as a plain LoRA adapter for stock PEFT, or merged into the base."""

    def verb(store: S3TStore) -> Outcome:
        _check_export(store, target, prefix)
        done = store.export(target, prefix, merge, base)
        result = asdict(done) | {"prefix": prefix, "merge": merge}
        return Outcome(str(store.path), DONE, result, display.show_export(str(store.path), done))

    run([store], None, as_json, verb)


def _check_export(store: S3TStore, target: Path, prefix: str | None) -> None:
    from ..store.store import as_stage

    live = store.live()
    if prefix is not None and as_stage(prefix) not in live.stages:
        known = ", ".join(stage.name for stage in sorted(live.stages)) or "none"
        raise ValueError(f"{prefix} is not a live stage of {store.path}. Live stages: {known}.")
    if prefix is None and live.root is None:
        raise ValueError(f"{store.path} has no root adapter; its README.md says why. Name a stage with --prefix.")
    if resolved(target).is_relative_to(store.path.resolve()):
        raise ValueError(f"{target} lies inside the store, which holds its own files only. Export to another folder.")


for group in (app, cli_state.app, cli_receipt.app):
    let_flow(group)


# ---- running a verb ----


def _asking(wanted: Wanted, verb: Verb) -> Verb:
    if not any(wanted.names.values()):
        raise typer.BadParameter("Nothing is asked for. Give --ids, --ids-file, --groups or --groups-file.")
    return _hinted(wanted, verb)


def _hinted(wanted: Wanted, verb: Verb) -> Verb:
    """Says what the files of names look like where something in them is not known."""

    def hinted(store: S3TStore) -> Outcome:
        try:
            return verb(store)
        except UnknownExampleError as error:
            raise UnknownExampleError(" ".join([str(error), *wanted.hints])) from None

    return hinted


def _tell(hints: tuple[str, ...]) -> None:
    for line in hints:
        typer.echo(line, err=True)


def _retrainer(factory: str, data: Path) -> Callable[[str], Any]:
    make_trainer, rows = load_factory(factory), read_dataset(data)
    return lambda folder: make_trainer(folder, rows)
