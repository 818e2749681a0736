"""`hf-s3t receipt`: receipts that were kept, shown again, handed over, opened for an auditor, and checked."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import tables as display
from .options import AsJson, Ids, IdsFile, KeyFile, OneStore, StateFolder, wanted_names
from .outcomes import BROKEN, DONE, Outcome, outcome_of, run, show

if TYPE_CHECKING:
    from ..store.store import S3TStore

app = typer.Typer(no_args_is_help=True, help="Receipts of deletions: show them, hand them over, check them.")

Name = Annotated[str, typer.Argument(help="A receipt, such as receipt-0123456789ab, or how it begins.")]


@app.command("list")
def list_receipts(store: OneStore, state: StateFolder = None, as_json: AsJson = False) -> None:
    """List every receipt of a store, oldest first, with its status."""

    def verb(store: S3TStore) -> Outcome:
        from ..store.receipt_since import since_of, status_words

        told = [(receipt, status_words(receipt, since_of(store, receipt))) for receipt in store.receipts()]
        result = [{"receipt": receipt.receipt, "words": words, "digest": receipt.digest} for receipt, words in told]
        return Outcome(str(store.path), DONE, result, display.show_receipts(str(store.path), told))

    run([store], None, as_json, verb, state)


@app.command("show")
def show_one(
    store: OneStore,
    receipt: Name,
    html: Annotated[Path | None, typer.Option(help="Write it as one HTML page, which prints to PDF.")] = None,
    file: Annotated[Path | None, typer.Option(help="Write it as JSON, for `receipt verify`.")] = None,
    sign_key: Annotated[
        Path | None, typer.Option(help="Private key (Ed25519, PEM) to sign it with, if it has no signature yet.")
    ] = None,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Show a receipt, and what has happened since. Or write it to a file that only you can read."""

    def verb(store: S3TStore) -> Outcome:
        from dataclasses import replace

        from ..files import PRIVATE, json_bytes, write_atomic
        from ..store.ids import encoded
        from ..store.names import read_names
        from ..store.receipt_signature import signature_by
        from ..store.receipt_since import since_of, status_words
        from .receipt_page import receipt_page

        found = store.receipt(receipt)
        if sign_key is not None and found.signature is None:
            if not found.digest:
                raise ValueError(f"An earlier version wrote {found.receipt}, without a digest. It cannot be signed.")
            found = replace(found, signature=signature_by(str(sign_key), found.to_json()))
        since = since_of(store, found)
        names = {name: value for name, value in read_names(store).items() if name != "signing_key"}
        if html is not None:
            write_atomic(html, encoded(receipt_page(found, since, names, str(store.path)), "The page"), PRIVATE)
        if file is not None:
            write_atomic(file, json_bytes(found.to_json()), PRIVATE)
        result = {
            "receipt": found.to_json(), "words": status_words(found, since), "since": asdict(since), "names": names,
        }  # fmt: skip
        written = [str(path) for path in (html, file) if path is not None]
        shown = f"Written: {', '.join(written)}" if written else display.show_kept(str(store.path), found, since)
        return Outcome(str(store.path), DONE, result, shown)

    run([store], None, as_json, verb, state)


@app.command("open")
def open_one(
    store: OneStore,
    receipt: Name,
    file: Annotated[Path, typer.Argument(help="File to write. Give it to the auditor only.")],
    ids: Ids = None,
    ids_file: IdsFile = None,
    key_file: KeyFile = None,
    state: StateFolder = None,
    as_json: AsJson = False,
) -> None:
    """Write a file that lets an auditor check which examples a receipt deleted. It holds keyed digests."""
    wanted = wanted_names(ids, ids_file, None, None).ids

    def verb(store: S3TStore) -> Outcome:
        from ..files import PRIVATE, json_bytes, write_atomic

        opening = store.open_receipt(receipt, wanted)
        write_atomic(file, json_bytes(opening), PRIVATE)
        shown = (
            f"{file} opens {opening['receipt']}: it names the examples by keyed digests. Give it to the auditor only. "
            "The auditor runs `hf-s3t receipt verify RECEIPT --opening FILE`."
        )
        return Outcome(str(store.path), DONE, {"file": str(file), "receipt": opening["receipt"]}, shown)

    run([store], key_file, as_json, verb, state)


@app.command("verify")
def verify_one(
    file: Annotated[Path, typer.Argument(help="A receipt that `receipt show --file` wrote.")],
    store: Annotated[
        str | None, typer.Option(help="Store to check it against: its folder, its published files, or a repository.")
    ] = None,
    public_key: Annotated[Path | None, typer.Option(help="Public key (PEM) that must have signed it.")] = None,
    opening: Annotated[Path | None, typer.Option(help="An opening that `receipt open` wrote.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a receipt file. Needs no store, no state and no key. Exit code 5: it was changed."""

    def verb() -> Outcome:
        from ..files import read_json
        from ..store.folder import StoreFolder
        from ..store.receipt_check import check_receipt, read_receipt_file

        receipt = read_receipt_file(file)
        folder = StoreFolder(store) if store is not None else None
        key = str(public_key) if public_key else None
        opened = None if opening is None else read_json(opening) or {}  # an empty one is looked at, too
        checks = check_receipt(receipt, folder, key, opened)
        code = BROKEN if any(check.broken for check in checks) else DONE
        result = {"receipt": receipt.receipt, "ok": code == DONE, "checks": [check.to_json() for check in checks]}
        return Outcome(str(file), code, result, display.show_checks(f"{file}: {receipt.receipt}", checks))

    show([outcome_of(str(file), verb)], as_json)
