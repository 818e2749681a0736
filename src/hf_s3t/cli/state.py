"""`hf-s3t state`: the verbs on the private state of a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import tables as display
from .options import AsJson, DryRun, KeyFile, OneStore, Reference, StateFolder
from .outcomes import DONE, PENDING, Outcome, run

if TYPE_CHECKING:
    from ..store.store import S3TStore

app = typer.Typer(no_args_is_help=True, help="Look after the private state of a store: backup, key, terms, loss.")


@app.command("export")
def export_state(
    store: OneStore, file: Annotated[Path, typer.Argument(help="File to write.")], as_json: AsJson = False
) -> None:
    """Write key, index, tombstones and receipts into one private file. Keep it where nobody else reads."""

    def verb(store: S3TStore) -> Outcome:
        store.export_state(file)
        shown = f"The state of {store.path} is in {file}. It names who was deleted to whoever has it: keep it private."
        return Outcome(str(store.path), DONE, {"file": str(file)}, shown)

    run([store], None, as_json, verb)


@app.command("import")
def import_state(
    store: OneStore,
    file: Annotated[Path, typer.Argument(help="File that export wrote.")],
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Put a backup of the state in place, and finish what its tombstones ask for."""

    def verb(store: S3TStore) -> Outcome:
        store.import_state(file)
        return Outcome(str(store.path), DONE, {"file": str(file)}, f"The state of {store.path} is that of {file} now.")

    run([store], key_file, as_json, verb)


@app.command("move-key")
def move_key(
    store: OneStore,
    file: Annotated[Path, typer.Argument(help="New file for the key, outside the store.")],
    as_json: AsJson = False,
) -> None:
    """Move the partition key out of the state into a file of its own: who has one of them finds nobody."""

    def verb(store: S3TStore) -> Outcome:
        store.move_key(file)
        shown = (
            f"The key of {store.path} is in {file} now, and no longer beside the state. Bring it with --key-file, or "
            "as HF_S3T_KEY; without it nobody is found. Keep it, and keep it apart: backups from before hold both."
        )
        return Outcome(str(store.path), DONE, {"file": str(file)}, shown)

    run([store], None, as_json, verb)


@app.command()
def expire(
    store: OneStore,
    older_than: Annotated[str, typer.Option(help="Years, months or days: 2y, 18m, 90d.")],
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Take references, caches and paths of copies that are gone out of old receipts. The receipts stay."""

    def verb(store: S3TStore) -> Outcome:
        done = store.expire(older_than, dry_run=dry_run)
        would = "would lose" if dry_run else "lost"
        shown = f"{len(done.receipts)} receipts of {store.path} from before {done.before} {would} what nothing needs."
        if done.purge_reports:
            shown += f"\nAs old, and left as they are: {', '.join(done.purge_reports)}"
        if not dry_run:
            shown += "\nBackups from before still hold it."
        return Outcome(str(store.path), DONE, asdict(done), shown)

    run([store], None, as_json, verb)


@app.command("set")
def set_names(
    store: OneStore,
    names: Annotated[
        list[str], typer.Argument(help="NAME=VALUE: organisation, model, dataset, signing_key (a file). Empty: unset.")
    ],
    as_json: AsJson = False,
) -> None:
    """Name once whose store it is, for the pages of receipts, and which key signs receipts. It stays private."""

    def verb(store: S3TStore) -> Outcome:
        wrong = [text for text in names if "=" not in text]
        if wrong:
            raise ValueError(f"{wrong[0]!r:.80} sets nothing. Write NAME=VALUE, such as model=support-bot.")
        kept = store.set_names(**dict(text.split("=", 1) for text in names))
        shown = "\n".join(f"{name}: {value}" for name, value in kept.items()) or "No name is set."
        return Outcome(str(store.path), DONE, kept, shown)

    run([store], None, as_json, verb)


@app.command("accept-loss")
def accept_loss(
    store: OneStore,
    dry_run: DryRun = False,
    reference: Reference = None,
    key_file: KeyFile = None,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Go on where the state that knew of deletions is lost, after importing its last backup. Try --dry-run first."""

    def verb(store: S3TStore) -> Outcome:
        loss = store.accept_loss(reference, dry_run=dry_run)
        left = loss.receipt is not None and (loss.receipt.exports or loss.receipt.still_served_at)
        shown = display.show_loss(str(store.path), loss)
        return Outcome(str(store.path), PENDING if left else DONE, loss.to_json(), shown)

    run([store], key_file, as_json, verb, state)
