"""What the command line shows a person: stores, locations, receipts and audits as tables that fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from ..store.ids import shortened

if TYPE_CHECKING:
    from ..store.audit import Check, VerifyReport
    from ..store.exports import Export
    from ..store.lost_state import Loss
    from ..store.receipt_since import Since
    from ..store.receipts import Receipt
    from ..store.status import Location, Status

UNKNOWN = "unknown: the state is not here"
MOST_ROWS = 1_000
"""Of a table; more take minutes to draw."""
NONE: Mapping[str, Sequence[str]] = {}


def show_status(status: Status, unpurged: Mapping[str, Sequence[str]] = NONE) -> RenderableType:
    """A store at a glance; `unpurged` are deletions that the history of a repository still has."""
    lengths = [*map(len, status.served.values()), *(0 for _ in status.dead_shards)]
    places = status.num_shards * status.num_slices
    repair = f"{status.repair_slice_passes} slice passes for {len(status.missing)} missing stages"
    if status.repair_budget is not None:
        repair += f", by cost ({status.repair_budget}); train() returns to the config's plan"
    rows: list[tuple[str, Any]] = [
        ("generation", status.generation),
        ("stages", f"{status.trained} of {status.planned} trained"),
        ("served", ", ".join(status.served) or "nothing: only the base model can answer"),
        ("slices in use", f"{sum(lengths)} of {places}; in each shard at least {min(lengths)}"),
        ("repair", repair),
        ("examples", UNKNOWN if status.examples is None else status.examples),
        ("deleted examples", UNKNOWN if status.deleted_examples is None else status.deleted_examples),
        ("dark until repair", UNKNOWN if status.dark_examples is None else status.dark_examples),
        ("requests received", status.requests),
        ("partition key", status.key),
    ]
    for under, left in status.life.items():
        first, last = (f"{life.mean:.1f}" if math.isfinite(life.mean) else "any number" for life in left)
        rows.append((f"requests left, {under}", f"about {first} until a shard is dead, {last} until all are"))
    if status.dead_shards:
        names = ", ".join(f"shard {shard}" for shard in status.dead_shards)
        rows.insert(4, ("dead", f"{names}: serves nothing until it is trained again"))
    if status.stacks:
        lines = [f"{count} stage{'' if count == 1 else 's'} with {stack}" for stack, count in status.stacks.items()]
        lines += ["bit-equality is claimed within one such stack only"] if len(lines) > 1 else []
        rows.append(("trained with", "\n".join(lines)))
    if status.accepted:
        from ..store.recipe_differences import NOT_BIT_EQUAL

        rows.append(("changed settings", "\n".join([*map(str, status.accepted), NOT_BIT_EQUAL])))
    if status.interrupted_deletions:
        told = f"{status.interrupted_deletions}: the next delete or train() finishes them"
        rows.append(("interrupted deletions", told))
    if status.exports:
        rows.append(("exports", "\n".join(status.exports)))
    if status.stale_exports:
        rows.append(("stale exports", "\n".join(status.stale_exports)))
    if unpurged:
        rows.append(("history", still_serves(unpurged)))
    return Group(status.path, _pairs(rows))


def still_serves(unpurged: Mapping[str, Sequence[str]]) -> str:
    """What is to be said of the histories of repositories."""
    return "\n".join(
        f"of {repo} still serves what was deleted by {', '.join(names)}: hf-s3t purge {repo}"
        for repo, names in unpurged.items()
    )


def show_locations(path: str, locations: Sequence[Location]) -> RenderableType:
    """Where ids and groups are; of thousands the table has those that are not live, and how many are."""
    many = len(locations) > MOST_ROWS
    counts = Counter(location.found for location in locations if not location.looks_like)
    if many:
        locations = [location for location in locations if location.found != "live" or location.looks_like][:MOST_ROWS]
    table = Table("asked for", "found", "shard: slice", "live stages that saw it")
    for column in table.columns:
        column.overflow = "fold"
    for location in locations:
        places = ", ".join(f"{shard}: {slice_id}" for shard, slice_id in location.places)
        like = f" (looks like {shortened(ascii(location.looks_like))})" if location.looks_like else ""
        asked = shortened(ascii(location.asked)) + like if like else shortened(location.asked)
        table.add_row(asked, location.found, places, ", ".join(location.stages))
    if not many:
        return Group(path, table)
    told = ", ".join(f"{number:,} {found}" for found, number in sorted(counts.items()))
    return Group(path, table, f"{told}. The table has what is not live, at most {MOST_ROWS:,} rows; --json has all.")


def show_receipt(path: str, receipt: Receipt, unpurged: Mapping[str, Sequence[str]] = NONE) -> RenderableType:
    """What a deletion did, or would do; `unpurged` are deletions that the history of a repository still has."""
    before = f", {receipt.already_deleted} deleted before" if receipt.already_deleted else ""
    rows: list[tuple[str, Any]] = [("request", f"{receipt.found} of {receipt.asked} found{before}")]
    if receipt.status != "unchanged":
        dark = f"{receipt.dark_examples} other examples, which nobody asked to delete, do not answer until the repair"
        rows += [
            ("examples", UNKNOWN if receipt.examples is None else f"{receipt.examples} of this request"),
            ("served prefixes", _served_lines(receipt)),
            ("stages removed", ", ".join(receipt.stages_removed) or "none"),
            ("dark until repair", UNKNOWN if receipt.dark_examples is None else dark),
            *_outlook_rows(receipt),
        ]
    elif receipt.deleted_by:
        rows += [("deleted by", ", ".join(receipt.deleted_by)), ("since", receipt.inactive_since or "not known here")]
    if receipt.still_served_at:
        rows.append(("still served at", "\n".join(receipt.still_served_at) + "\nuntil the history is purged"))
    if receipt.exports_removed:
        rows.append(("exports removed", "\n".join(receipt.exports_removed)))
    if receipt.exports_refreshed:
        rows.append(("exports rewritten", "\n".join(receipt.exports_refreshed)))
    rows += [
        ("exports that still carry it", "\n".join(receipt.exports) or "none known"),
        ("caches with the text", "\n".join(receipt.caches) or "none known"),
    ]
    if unpurged:
        rows.append(("history", still_serves(unpurged)))
    if receipt.reference:
        rows.append(("reference", receipt.reference))
    from ..store.receipt_since import status_words

    rows.append(("status", status_words(receipt)))
    rows.append(("receipt", "none, as nothing was changed" if receipt.status == "dry run" else receipt.receipt))
    limits = Group(*(f"- {limit}" for limit in receipt.limits))
    return Group(_sentence(path, receipt), _pairs(rows), "Not covered:", limits)


def _outlook_rows(receipt: Receipt) -> list[tuple[str, str]]:
    """What a repair costs afterwards, and how near the end of a shard is. An older version's receipt knows neither."""
    if receipt.repair_stages is None:
        return []
    left = "any number" if receipt.requests_left is None else f"about {receipt.requests_left:.1f}"
    cliff = "0: a shard is dead" if receipt.requests_left == 0 else f"{left} until a shard is dead, without a repair"
    stages = f"{receipt.repair_stages} stage{'' if receipt.repair_stages == 1 else 's'}"
    repair = f"{receipt.repair_slice_passes:g} slice passes per epoch, {stages}"
    return [("repair", repair), ("requests left", cliff)]


def show_export(path: str, done: Export) -> RenderableType:
    """What was written for other runtimes."""
    rows = [
        ("written to", done.path),
        ("made of", ", ".join(done.stages)),
        ("rank", done.rank),
        ("size", f"{done.parameters:,} parameters, {done.bytes:,} bytes"),
    ]
    return Group(_pairs(rows), f"If it carries the influence of a later deletion from {path}, the receipt names it.")


def show_readmission(path: str, receipt: Receipt) -> RenderableType:
    """What a readmission did."""
    sentence = f"{receipt.found} tombstones of {path} are lifted. The rows come back when they are trained on again."
    return Group(sentence, _pairs([("receipt", receipt.receipt)]))


def show_loss(path: str, loss: Loss) -> RenderableType:
    """Deletions that no state knows any more, and what became of it."""
    from ..store.lost_state import WARNING

    if not loss.found:
        return f"The state of {path} knows every deletion in the manifest. Nothing is lost, and nothing was changed."
    places = ", ".join(f"{shard}: {slice_id}" for shard, slice_id in loss.places)
    rows = [(name, "from " + ", ".join(f"{s}: {i}" for s, i in at)) for name, at in loss.deletions.items()]
    rows += [(name, "a readmission") for name in loss.readmissions]
    rows += [
        ("start anew (shard: slice)", places or "none"),
        ("stages removed", ", ".join(loss.stages) or "none"),
        ("examples to hand in again", str(loss.examples)),
    ]
    if loss.receipt is not None:
        rows += [
            ("exports that may carry it", "\n".join(loss.receipt.exports) or "none known"),
            ("still served at", "\n".join(loss.receipt.still_served_at) or "nothing known"),
            ("receipt", loss.receipt.receipt),
        ]
    verdict = "Nothing was changed yet." if loss.receipt is None else "These slices start anew at the next train()."
    return Group(f"Lost deletions of {path}:", _pairs(rows), verdict, WARNING)


def show_receipts(path: str, told: Sequence[tuple[Receipt, str]]) -> RenderableType:
    """Receipts with where each stands."""
    table = Table("receipt", "requested at", "reference", "status")
    for column in table.columns:
        column.overflow = "fold"
    for receipt, words in told:
        reference = shortened(ascii(receipt.reference)[1:-1]) if receipt.reference else ""
        table.add_row(receipt.receipt, receipt.requested_at[:19], reference, words)
    return Group(path, table)


def show_kept(path: str, receipt: Receipt, since: Since) -> RenderableType:
    """A receipt that was kept, with what became of it since."""
    from ..store.receipt_since import status_words

    rows = [
        ("status", status_words(receipt, since)),
        ("requested at", receipt.requested_at),
        ("no longer served since", receipt.inactive_since or "not known here"),
        ("trained again since", f"{len(since.repaired)} of {len(receipt.stages_removed)} removed stages"),
        ("still carries it", "\n".join((*since.history, *since.exports)) or "nothing that is known"),
        ("digest", receipt.digest or "none: an earlier version wrote it, without a digest"),
        ("signed", "yes" if receipt.signature else "no"),
    ]
    if receipt.obeys:
        rows.append(("taken over", ", ".join(receipt.obeys)))
    return Group(show_receipt(path, receipt), "", _pairs(rows))


def show_report(report: VerifyReport) -> RenderableType:
    """What an audit found, the two grades of claim apart, as wide as the terminal is."""
    outcomes = {check.name: check.outcome for check in report.checks}
    parts: list[RenderableType] = [
        f"{report.path}, generation {report.generation}",
        "Influence-free by construction, on any hardware:",
        _outcomes("what should hold", outcomes),
    ]
    details = _details(report.checks)
    for stage in report.retrained or ():
        for finding in stage.findings:
            details.add_row(f"{stage.outcome}:", finding)
    if report.retrained is not None:
        of = f"{len(report.retrained)} of {len(report.stages)} stages trained again"
        drawn = "" if report.seed is None else f", drawn with --seed {report.seed}"
        parts.append(f"Bit-equal on this stack, {of}{drawn}:")
        equal = {stage.stage: stage.outcome for stage in report.retrained}
        parts.append(_outcomes("stage, as it is and trained again", equal))
    return Group(*parts, details, _verdict(report))


def _outcomes(header: str, outcomes: Mapping[str, str]) -> Table:
    """What was looked at and what came of it; a long name is folded, the outcome never cut."""
    table = Table()
    table.add_column(header, overflow="fold", ratio=1)
    table.add_column("outcome", no_wrap=True)
    for name, outcome in outcomes.items():
        table.add_row(name, outcome)
    return table


def _verdict(report: VerifyReport) -> str:
    verdict = "Nothing is broken" if report.ok else "Something is broken"
    if report.influence_free != "broken" and report.bit_equal == "different":
        verdict = "Some stages differ when they are trained again"
    return f"{verdict}{'' if report.complete else ', but not everything could be checked'}."


def show_checks(title: str, checks: Sequence[Check]) -> RenderableType:
    """What was looked at, and what was found, as wide as the terminal is."""
    details = _details(checks)
    verdict = "Something is broken" if any(check.broken for check in checks) else "Nothing is broken"
    rest = ", but not everything could be checked" if any(check.not_checked for check in checks) else ""
    outcomes = _outcomes("what should hold", {check.name: check.outcome for check in checks})
    return Group(title, outcomes, details, f"{verdict}{rest}.")


def _details(checks: Sequence[Check]) -> Table:
    """Each finding of checks on lines of its own."""
    details = Table.grid(padding=(0, 1))
    details.add_column(no_wrap=True)
    details.add_column(overflow="fold")
    for check in checks:
        for finding in check.broken:
            details.add_row("broken:", finding)
        for finding in check.not_checked:
            details.add_row("not checked:", finding)
    return details


def _sentence(path: str, receipt: Receipt) -> str:
    count = len(receipt.stages_removed)
    stages = f"{count} stage{'' if count == 1 else 's'}"
    if receipt.status == "dry run":
        return f"Dry run: {stages} would no longer be served by {path}. Nothing was changed."
    if receipt.status == "unchanged":
        changed = "Only exports were" if receipt.exports_refreshed or receipt.exports_removed else "Nothing was"
        return f"Everything asked for was deleted from {path} before. {changed} changed."
    at_head = receipt.status in ("inactive_at_head", "pending")
    where = f"the head of {path}" if at_head else path
    purge = " The purge of its history is pending: recheck its report." if receipt.status == "pending" else ""
    return (
        f"{stages} {'is' if count == 1 else 'are'} no longer served by {where} since {receipt.inactive_since}.{purge}"
    )


def _served_lines(receipt: Receipt) -> str:
    shards = sorted({*receipt.served_before, *receipt.served_after}, key=int)
    changes = [(shard, receipt.served_before.get(shard), receipt.served_after.get(shard)) for shard in shards]
    lines = [f"shard {shard}: {_prefix(old)} -> {_prefix(new)}" for shard, old, new in changes if old != new]
    unchanged = len(shards) - len(lines)
    lines += [f"{unchanged} shard{'' if unchanged == 1 else 's'} unchanged"] if unchanged else []
    return "\n".join(lines) or "none"


def _prefix(prefix: Sequence[int] | None) -> str:
    return "-".join(map(str, prefix)) if prefix else "nothing"


def _pairs(rows: Sequence[tuple[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(f"  {name}", str(value))
    return table
