"""`hf-s3t plan`: what `S3TPlanner` found, as a table for a person or as one JSON document.

The verb needs no store. Exit codes: 0 done; 2 bad input.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from .options import parse_prior
from .outcomes import BAD_INPUT, DONE, console

if TYPE_CHECKING:  # the other verbs need no planner
    from ..planner.arrivals import RepairPolicy
    from ..planner.candidates import Candidate
    from ..planner.planner import S3TPlanner

ROWS = 26
ORDERS = 3  # the column that also names the groups of rows


class Column(NamedTuple):
    """A column of the table. Where a line is too short, those that can be spared are left out, the highest first."""

    head: str
    cell: Callable[[Candidate], str]
    spare: int = 0


def plan(
    examples: Annotated[int, typer.Option(help="Rows of the train set.")],
    requests_per_day: Annotated[float, typer.Option(help="Deletion requests per day.")],
    horizon_days: Annotated[float, typer.Option(help="Until when costs and deletions count.")],
    shards: Annotated[int | None, typer.Option(help="m. Without it 1, 2, 5 and 10 are compared.")] = None,
    slices: Annotated[
        int | None, typer.Option(help="L, at most 16 (about a minute). Without it 2, 4 and 8 are compared.")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="B, sequences per shard, of --slices.")] = None,
    cost_budget: Annotated[int | None, typer.Option(help="Instead of --budget: slice passes per shard.")] = None,
    prior: Annotated[
        str | None, typer.Option(help="Chance that a request hits each slice: 0.4,0.3,0.2,0.1. Default: all alike.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers of the model: at most as many slices; not for rank groups.")
    ] = None,
    examples_per_person: Annotated[
        int, typer.Option(help="Examples of whoever asks; with a group column leave it at 1.")
    ] = 1,
    burst: Annotated[int, typer.Option(help="Requests that come together, answered by one repair.")] = 1,
    gpu_hours_per_epoch: Annotated[float | None, typer.Option(help="Of one epoch over all examples.")] = None,
    adapter_mb: Annotated[float | None, typer.Option(help="Size of the adapter of a whole sequence.")] = None,
    min_in_use: Annotated[
        float, typer.Option(help="The rule: at least this share of the slices in use on average.")
    ] = 0.5,
    max_dead: Annotated[float, typer.Option(help="The rule: at most this chance of a dead shard.")] = 0.05,
    streams: Annotated[int, typer.Option(help="Streams of requests that are simulated.")] = 300,
    seed: Annotated[int, typer.Option(help="The same seed gives the same table.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the recommended plan among its alternatives (.png, .svg, .pdf).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document with every candidate.")] = False,
) -> None:
    """Which plan to train and when to repair it: a table of candidates, and a line for S3TConfig.

    --shards, --slices and --budget say what you have in mind. Those rows come first;
    other budgets, orders, repair policies and sizes are compared with them. What you
    give as --shards and --slices stays in the recommendation. Without --shards, mind
    that more shards are always cheaper here: what they cost in quality is not known.

    Recommended is what costs least until the horizon where at least --min-in-use of
    the slices are in use on average and the chance that a shard is dead, with nothing
    of it to serve until it is trained again, is at most --max-dead.
    """
    from ..planner.planner import S3TPlanner

    try:
        asked = S3TPlanner(
            examples=examples, requests_per_day=requests_per_day, horizon_days=horizon_days, shards=shards,
            slices=slices, budget=budget, cost_budget=cost_budget, prior=parse_prior(prior), layers=layers,
            examples_per_person=examples_per_person, burst=burst, gpu_hours_per_epoch=gpu_hours_per_epoch,
            adapter_mb=adapter_mb, min_in_use=min_in_use, max_dead=max_dead, streams=streams,
            seed=seed,
        )  # fmt: skip
        found = asked.to_json()
        if plot is not None:
            _draw(asked, plot)
    except (ValueError, OSError, ImportError) as error:
        _end(as_json, None, error)
    else:
        _end(as_json, found, None, asked)


def _draw(planner: S3TPlanner, file: Path) -> None:
    from ..planner.pictures import draw_plan

    chosen = planner.recommended
    draw_plan(
        planner.recommended_plan, planner.requests, file, policy=chosen.policy,
        streams=planner.streams, seed=planner.seed, horizon_days=planner.horizon_days,
        title=f"recommended: {chosen.setting.config}",
    )  # fmt: skip


def _end(as_json: bool, result: Any, fault: Exception | None, planner: S3TPlanner | None = None) -> None:
    """Shows what came of it, and ends the program."""
    code = BAD_INPUT if fault else DONE
    if fault:
        typer.echo(str(fault), err=True)
    if as_json:
        error = {"type": type(fault).__name__, "message": str(fault)} if fault else None
        typer.echo(json.dumps({"exit_code": code, "result": result, "error": error}, indent=1, ensure_ascii=False))
    elif planner:
        person = console()
        person.print(show_plan(planner, person.width))
    raise typer.Exit(code)


# ---- the table ----


def show_plan(planner: S3TPlanner, width: int) -> RenderableType:
    """The shortlist as a table, what its columns say, and the recommendation."""
    rows = shortlist(planner)
    columns = _fitting(_columns(planner), rows, width)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column.head, justify="left" if number in (0, ORDERS, ORDERS + 1) else "right", no_wrap=True)
    for name, group in groupby(rows, key=lambda candidate: _section(planner, candidate)):
        table.add_row(*[""] * ORDERS, ("\n" if table.row_count else "") + name, style="bold")
        for candidate in group:
            table.add_row(*(column.cell(candidate) for column in columns))
    chosen = planner.recommended.setting.config or ""
    lines = [planner.reason, planner.advice, *planner.notes]
    return Group(table, "", *_legend(planner), "", "Recommended:", Padding(chosen, (1, 2)), *lines)


def shortlist(planner: S3TPlanner) -> list[Candidate]:
    """At most 26 candidates in groups: what was given, others of the recommended size, other sizes, baselines.

    They are the recommended one; for each other size the cheapest that obeys the rule; the baselines of the
    recommended number of shards; what was given; and the marked ones of the recommended size.
    """
    rows, best = planner.candidates(), planner.recommended
    shards, size = best.setting.num_shards, best.setting.size
    chosen, cheapest = [best], sorted(rows, key=lambda c: c.epochs)
    others = [c for c in cheapest if c.setting.method == "s3t" and c.setting.size != size and planner.obeys(c)]
    chosen += {c.setting.size: c for c in reversed(others)}.values()
    chosen += [c for c in rows if c.setting.method == "full retraining"]
    chosen += [
        c for c in rows if c.setting.method in ("sisa", "shards alone") and c.setting.size in (size, (shards, 1))
    ]
    chosen += [c for c in rows if c.setting.given]
    marked = [c for c in cheapest if c.pareto and c.setting.method == "s3t" and c.setting.size == size]
    chosen += sorted(marked, key=lambda c: not planner.obeys(c))
    shown = list(dict.fromkeys(map(id, chosen)))[:ROWS]
    found = [c for c in rows if id(c) in shown]
    return sorted(found, key=lambda c: (c.setting.method != "s3t", not c.setting.given, c.setting.size != size))


def _fitting(columns: list[Column], rows: Sequence[Candidate], width: int) -> list[Column]:
    """Without as many of the columns that can be spared as do not fit."""
    texts = {column.head: [column.head, *map(column.cell, rows)] for column in columns}
    widths = {head: max(len(line) for text in cells for line in text.split("\n")) for head, cells in texts.items()}
    for spare in sorted((column.spare for column in columns if column.spare), reverse=True):
        if sum(widths[column.head] + 1 for column in columns) > width:
            columns = [column for column in columns if column.spare != spare]
    return columns


def _section(planner: S3TPlanner, candidate: Candidate) -> str:
    setting = candidate.setting
    if setting.method != "s3t":
        return "baselines:"
    if setting.given:
        return "yours:"
    return "this m, L:" if setting.size == planner.recommended.setting.size else "other m, L:"


def _columns(planner: S3TPlanner) -> list[Column]:
    """The columns; costs are in epochs, or in GPU hours where an epoch has some."""
    chosen, hours = planner.recommended, planner.gpu_hours_per_epoch

    def cost(candidate: Candidate, passes: float) -> str:
        return _short(passes / candidate.setting.places * (hours or 1))

    unit = "hours" if hours else "epochs"
    return [
        Column("", lambda c: (">" if c is chosen else " ") + ("*" if c.pareto else "")),
        Column("m", lambda c: str(c.setting.num_shards)),
        Column("L", lambda c: str(c.setting.num_slices)),
        Column("orders", _orders),
        Column("repair", lambda c: _when(c.policy, c.setting.num_slices)),
        Column("slice\npasses", lambda c: f"{c.training_cost:,}", 5),
        Column(f"train\n{unit}", lambda c: cost(c, c.training_cost)),
        Column(f"repair\n{unit}", lambda c: cost(c, c.repair_cost.mean)),
        Column("times", lambda c: _short(c.repairs.mean), 3),
        Column("stages", lambda c: str(c.stages), 6 if planner.adapter_mb else 0),
        *([Column("MB", lambda c: _short(c.storage_mb or 0))] if planner.adapter_mb else []),
        Column("life\nreq.", lambda c: _life(c, 1), 1),
        Column("life\ndays", lambda c: _life(c, planner.requests_per_day), 4),
        Column("in\nuse", lambda c: f"{c.mean_in_use:.0%}"),
        Column("at\nend", _at_the_end, 2),
        Column("dead", lambda c: f"{c.dead.mean:.0%}"),
    ]


def _orders(candidate: Candidate) -> str:
    from ..planner.candidates import BASELINES

    setting = candidate.setting
    if setting.method != "s3t":
        return BASELINES[setting.method]
    return f"{setting.selection} " + (f"B={setting.budget}" if setting.budget else f"c={setting.cost_budget}")


def _when(policy: RepairPolicy, num_slices: int) -> str:
    if policy.every_days:
        return "1 day" if policy.every_days == 1 else f"{policy.every_days:g} days"
    if policy.below == num_slices:
        return "each hit"
    return f"below {policy.below}" if policy.below else "never"


def _life(candidate: Candidate, rate: float) -> str:
    first, last, *estimates = candidate.lives
    numbers = [
        exact if exact is not None else (estimate.mean if estimate else None)
        for exact, estimate in zip((first, last), estimates, strict=True)
    ]
    return "/".join("?" if number is None else _short(number / rate) for number in numbers)


def _at_the_end(candidate: Candidate) -> str:
    if candidate.in_use_at_horizon_exact is not None:
        return f"{candidate.in_use_at_horizon_exact:.0%}"
    share = candidate.in_use_at_horizon
    return f"{share.mean:.0%}±{100 * (share.high - share.low) / 2:.0f}"


def _short(number: float) -> str:
    """At most two digits after the point, and none from 10 on.

    >>> [_short(number) for number in (0.25, 7, 19.29, 1096.9, math.inf)]
    ['0.25', '7', '19', '1,097', 'never']
    """
    return "never" if math.isinf(number) else f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _legend(planner: S3TPlanner) -> Sequence[str]:
    day = f"day {planner.horizon_days:g}"
    hours = planner.gpu_hours_per_epoch
    unit = f"GPU hours, {hours:g} an epoch" if hours else "epochs"
    return [
        "> recommended; * no other row is as good in cost, in use, dead and m, and better in one of these",
        "orders: B sequences per shard, or a cost budget c in slice passes per shard",
        f"repair: at a served prefix below a length, after each hit, every so many days; times: until {day}",
        "repairs are taken to need no time",
        f"costs: in {unit} over all examples (m L slice passes each), at num_train_epochs=1;",
        "a pass over a slice is taken to cost the same whatever the stage trains",
        "life: until the first shard / all shards are dead, if nothing is repaired",
        f"in use: of the slices, mean over time until {day}; at end: on that day; ±: 95 % interval",
        "dead: the chance that nothing of some shard could be served until it was trained again,",
        f"be it for a moment, before {day}; shards alone: each is trained again from scratch",
    ]
