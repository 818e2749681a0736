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
    """Write key, index, tombstones and receipts into one file. Keep it private."""

    def verb(store: S3TStore) -> Outcome:
        store.export_state(file)
        shown = f"The state of {store.path} is in {file}. It tells its reader who was deleted: keep it private."
        return Outcome(str(store.path), DONE, {"file": str(file)}, shown)

    run([store], None, as_json, verb)


@app.command("import")
def import_state(
    store: OneStore,
    file: Annotated[Path, typer.Argument(help="File that export wrote.")],
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Restore a backup of the state, and delete what its tombstones name."""

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
    """Move the partition key out of the state into its own file. Neither of them alone can find a person."""

    def verb(store: S3TStore) -> Outcome:
        store.move_key(file)
        shown = (
            f"The key of {store.path} is in {file} now, and no longer beside the state. Give it with --key-file or "
            "HF_S3T_KEY; nobody can be found without it. Keep it apart from the state. Older backups hold both."
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
    """Remove references, caches and paths of vanished copies from old receipts. The receipts stay."""

    def verb(store: S3TStore) -> Outcome:
        done = store.expire(older_than, dry_run=dry_run)
        would = "would lose" if dry_run else "lost"
        shown = f"{len(done.receipts)} receipts of {store.path} from before {done.before} {would} what no check needs."
        if done.purge_reports:
            shown += f"\nThese purge reports are as old, and were left: {', '.join(done.purge_reports)}"
        if not dry_run:
            shown += "\nOlder backups still hold it."
        return Outcome(str(store.path), DONE, asdict(done), shown)

    run([store], None, as_json, verb)


@app.command("set")
def set_names(
    store: OneStore,
    names: Annotated[
        list[str], typer.Argument(help="NAME=VALUE: organisation, model, dataset, signing_key (a file). NAME=: unset.")
    ],
    as_json: AsJson = False,
) -> None:
    """Set the names that receipt pages show, and the key that signs receipts. They stay private."""

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
    """Restart the slices of deletions that no state knows any more. Import the last backup first; try --dry-run."""

    def verb(store: S3TStore) -> Outcome:
        loss = store.accept_loss(reference, dry_run=dry_run)
        left = loss.receipt is not None and (loss.receipt.exports or loss.receipt.still_served_at)
        shown = display.show_loss(str(store.path), loss)
        return Outcome(str(store.path), PENDING if left else DONE, loss.to_json(), shown)

    run([store], key_file, as_json, verb, state)
