"""The page of a receipt: one HTML file for whoever answers for data protection. It loads nothing, and prints well.

Every text that comes from a receipt or a person is escaped; the page runs no script.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..store.receipt_since import Since, status_words

if TYPE_CHECKING:
    from ..store.receipts import Receipt

STYLE = """
body { font: 11pt/1.45 Georgia, serif; color: #111; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 1.6rem 0 .3rem }
.status { font-size: 1.15rem; border: 2px solid #111; padding: .5rem .8rem; margin: 1rem 0 }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0 }
th { font-weight: normal; color: #555; width: 13rem } td { overflow-wrap: anywhere }
td, li { unicode-bidi: isolate }
code, .digest { font: 9pt/1.4 monospace; overflow-wrap: anywhere } li { margin: .15rem 0; overflow-wrap: anywhere }
@page { size: A4; margin: 18mm }
@media print {
  body { max-width: none; margin: 0; padding: 0 } h2 { break-after: avoid } section, tr { break-inside: avoid }
  .appendix { break-before: page; break-inside: auto }
}
""".strip()

TITLES = {
    "delete": "Receipt of a deletion",
    "readmit": "Receipt of a readmission",
    "loss": "Receipt of accepted losses",
    "obeyed": "Receipt of what was taken over from elsewhere",
}


def receipt_page(receipt: Receipt, since: Since, names: Mapping[str, str], store: str) -> str:
    """The page, as a whole document.

    Args:
        receipt ([`Receipt`]): what it is about.
        since ([`Since`]): what became of it.
        names (`Mapping[str, str]`): names that the operator set.
        store (`str`): what the store is called in the commands that check the receipt.
    """
    title = TITLES.get(receipt.kind, "Receipt")
    body = [
        f"<h1>{title}</h1>",
        _table([(name.capitalize(), names.get(name)) for name in ("organisation", "model", "dataset")]),
        f'<p class="status"><strong>{escape(status_words(receipt, since))}</strong></p>',
        _section("What was asked", _asked(receipt)),
        _section("Since when it is no longer used, and where", _done(receipt)),
        _section("What has answered since then", _answers(receipt)),
        _section("Who else is affected until the repair", _dark(receipt, since)),
        _section("What has been repaired since then", _repaired(receipt, since)),
        _section("Where it may still be", _elsewhere(receipt, since)),
        _section("What this receipt does not cover", _list(receipt.limits, "No exceptions.")),
        _section("What is claimed", _claims()),
        _section("How to check this receipt", _check(receipt, store)),
        _appendix(receipt),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f'<meta name="viewport" content="width=device-width">\n<title>{title} {escape(receipt.receipt)}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n" + "\n".join(filter(None, body)) + "\n</body>\n</html>\n"
    )


def _asked(receipt: Receipt) -> str:
    examples = "not known: the private state was not at hand" if receipt.examples is None else receipt.examples
    return _table([
        ("Who asked (reference)", receipt.reference or "no reference is kept"),
        ("Requested at (UTC)", receipt.requested_at),
        ("Asked for", receipt.asked),
        ("Found", receipt.found),
        ("Deleted before", receipt.already_deleted or None),
        ("Examples of the training data", examples),
        ("Deleted before by", ", ".join(receipt.deleted_by) or None),
    ])  # fmt: skip


def _done(receipt: Receipt) -> str:
    if receipt.kind != "delete" or receipt.status == "dry run":
        return _table([("At (UTC)", receipt.inactive_since), ("Generation of the store", receipt.generation)])
    where = f"the head of the repository {receipt.repository}" if receipt.repository else "the store in its folder"
    count = len(receipt.stages_removed)
    return _table([
        ("No longer served since (UTC)", receipt.inactive_since or "not known here: it was deleted elsewhere"),
        ("No longer served by", where),
        ("Parts of the model removed", f"{count} trained stages, listed at the end" if count else "none was left"),
        ("Generation of the store", receipt.generation),
    ])  # fmt: skip


def _answers(receipt: Receipt) -> str:
    shards = sorted({*receipt.served_before, *receipt.served_after}, key=int)
    if not shards:
        return "<p>What answers did not change.</p>"
    rows = [
        (f"Shard {shard}", f"slices {_slices(receipt.served_before.get(shard))}; since then "
                           f"{_slices(receipt.served_after.get(shard))}")
        for shard in shards
    ]  # fmt: skip
    return (
        "<p>The model is an ensemble of shards. Each shard answers with parts that were trained on some slices of its "
        "data. No part that this deletion left in place was trained on a slice that it is about.</p>" + _table(rows)
    )


def _slices(prefix: Sequence[int] | None) -> str:
    return ", ".join(map(str, prefix)) if prefix else "none"


def _dark(receipt: Receipt, since: Since) -> str:
    if receipt.dark_examples is None:
        return "<p>It is not known how many: the private state was not at hand.</p>"
    if not receipt.dark_examples:
        return "<p>Nobody.</p>"
    now = "This lasts until the removed parts are trained again." if since.missing else "The repair ended this."
    return (
        f"<p>{receipt.dark_examples} other examples, which nobody asked to delete. They share a slice with what was "
        "deleted, or are in a slice that cannot be used without that one. So the model answers without them, too. "
        f"{now} Their data was not deleted.</p>"
    )


def _repaired(receipt: Receipt, since: Since) -> str:
    if not receipt.stages_removed:
        return "<p>There is nothing to repair.</p>"
    done = [f"{name}, written {when or 'at an unknown time'}" for name, when in since.repaired.items()]
    told = f"{len(done)} of {len(receipt.stages_removed)} removed stages were trained again, without what was deleted."
    return f"<p>{told}</p>" + (_list(done) if done else "")


def _elsewhere(receipt: Receipt, since: Since) -> str:
    parts = [
        ("Revisions of the repository that still serve it, until its history is purged", since.history),
        ("Exported copies that still carry it", since.exports),
        ("Files outside the store that may hold the text", receipt.caches),
    ]
    return "".join(f"<p>{name}:</p>{_list(values, 'none that is known')}" for name, values in parts)


def _claims() -> str:
    return (
        "<p><strong>Influence-free by construction</strong>: no number in the parts that answer was computed from "
        "the deleted data. This holds on any hardware, from the time above.</p><p><strong>Bit-equal on this stack"
        "</strong>: after the repair every file equals, byte for byte, that of a training without the deleted "
        "data. This is claimed for the same versions and hardware only, and only after the repair.</p>"
    )


def _check(receipt: Receipt, store: str) -> str:
    signature = f"signed by the key {receipt.signature['public_key']}" if receipt.signature else "not signed"
    shown = _table([
        ("Receipt", receipt.receipt),
        ("Digest", receipt.digest or "none: an earlier version wrote it, without a digest"),
        ("Receipt before it", receipt.previous or "none"),
        ("Signature", signature),
    ])  # fmt: skip
    return shown + (
        "<p>The digest is in the public file <code>s3t.json</code> of the store, beside the receipt's name. Check "
        "the file that belongs to this page with the library, or without it by the script in "
        f"docs/guarantees.md:</p><p><code>hf-s3t receipt verify FILE --store {escape(shlex.quote(store))}</code></p>"
    )


def _appendix(receipt: Receipt) -> str:
    if not receipt.stages_removed and not receipt.stages_after:
        return ""
    gone = [f"{name}: {files.get('adapter_model.safetensors', '')}" for name, files in receipt.stages_removed.items()]
    kept = [f"{name}: {digest}" for name, digest in receipt.stages_after.items()]
    return (
        '<section class="appendix digest"><h2>Appendix: sha256 of the weights of each stage</h2>'
        f"<p>Removed:</p>{_list(gone, 'none')}<p>Kept:</p>{_list(kept, 'none, or not recorded')}</section>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _table(rows: Iterable[tuple[str, object]]) -> str:
    told = [(name, value) for name, value in rows if value is not None]
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in told)
    return f"<table>{lines}</table>" if told else ""


def _list(values: Iterable[str], none: str = "none") -> str:
    lines = "".join(f"<li>{escape(str(value))}</li>" for value in values)
    return f"<ul>{lines}</ul>" if lines else f"<p>{none}</p>"
