"""`hf-s3t plan`: what `S3TPlanner` found, as a table for a person or as one JSON document.

The verb needs no store. Exit codes: 0 done; 2 bad input.
"""

from __future__ import annotations

import json
import math
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from .options import parse_prior
from .outcomes import BAD_INPUT, DONE, console

if TYPE_CHECKING:  # the other verbs need no planner
    from ..planner.candidates import Candidate
    from ..planner.planner import S3TPlanner


def plan(
    examples: Annotated[int, typer.Option(help="Rows of the train set.")],
    requests_per_day: Annotated[float, typer.Option(help="Deletion requests per day, each for one example.")],
    horizon_days: Annotated[float, typer.Option(help="Until when costs and deletions count.")],
    shards: Annotated[int | None, typer.Option(help="m. Without it 1, 2, 5 and 10 are compared.")] = None,
    slices: Annotated[int | None, typer.Option(help="L, at most 16. Without it 2, 4 and 8 are compared.")] = None,
    budget: Annotated[int | None, typer.Option(help="B, sequences per shard, of --slices.")] = None,
    cost_budget: Annotated[int | None, typer.Option(help="Instead of --budget: slice passes per shard.")] = None,
    prior: Annotated[
        str | None, typer.Option(help="Chance that a request hits each slice: 0.4,0.3,0.2,0.1. Default: all alike.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers of the model: at most as many slices; not for rank groups.")
    ] = None,
    gpu_hours_per_epoch: Annotated[float | None, typer.Option(help="Of one epoch over all examples.")] = None,
    adapter_mb: Annotated[float | None, typer.Option(help="Size of the adapter of a whole sequence.")] = None,
    min_in_use: Annotated[
        float, typer.Option(help="The rule: at least this share of the slices in use on average.")
    ] = 0.5,
    max_dead: Annotated[float, typer.Option(help="The rule: at most this chance of a dead shard.")] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document with every candidate.")] = False,
) -> None:
    """Which plan to train and when to repair it: a table of candidates, and a line for S3TConfig.

    --shards, --slices and --budget say what you have in mind. Those rows come first;
    other budgets, orders, rules of repair and sizes are compared with them. What you
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
            gpu_hours_per_epoch=gpu_hours_per_epoch, adapter_mb=adapter_mb, min_in_use=min_in_use, max_dead=max_dead,
        )  # fmt: skip
        found = asked.to_json()
    except ValueError as error:
        typer.echo(str(error), err=True)
        _end(as_json, BAD_INPUT, None, {"type": type(error).__name__, "message": str(error)})
    if not as_json:
        console().print(show_plan(asked))
    _end(as_json, DONE, found, None)


def _end(as_json: bool, code: int, result: Any, error: Any) -> None:
    if as_json:
        document = {"exit_code": code, "result": result, "error": error}
        typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
    raise typer.Exit(code)


# ---- the table ----


def show_plan(planner: S3TPlanner) -> RenderableType:
    """The shortlist as a table of at most 80 characters, what its columns say, and the recommendation."""
    hours, chosen = planner.gpu_hours_per_epoch, planner.recommended
    unit = "hours" if hours else "epochs"
    heads = ("", "m", "L", "orders", "repair", f"train\n{unit}", f"repair\n{unit}", "times",
             "MB" if planner.adapter_mb else "stages", "life\nreq.", "in\nuse", "dead")  # fmt: skip
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, justify="left" if head in ("orders", "repair") else "right", no_wrap=True)
    for name, group in groupby(shortlist(planner), key=lambda candidate: _section(planner, candidate)):
        table.add_row(*[""] * 3, ("\n" if table.row_count else "") + name, style="bold")
        for candidate in group:
            table.add_row(">" if candidate is chosen else "", *_cells(candidate, hours or 1))
    config = Padding(chosen.setting.config or "", (1, 2))
    return Group(table, "", *_legend(planner), "", "Recommended:", config, *planner.advice)


def shortlist(planner: S3TPlanner) -> list[Candidate]:
    """Candidates in groups: what was given, others of the recommended size, other sizes, baselines.

    Others are the recommended one and, for each rule of repair, the cheapest; for each other size the cheapest that
    obeys the rule; baselines are those of the recommended number of shards.
    """
    best = planner.recommended
    size, rows = best.setting.size, sorted(planner.candidates, key=lambda c: c.epochs)
    own = [c for c in rows if c.setting.method == "S3T" and c.setting.size == size]
    others = [c for c in rows if c.setting.method == "S3T" and c.setting.size != size and planner.obeys(c)]
    sizes = (size, (size[0], 1), (1, 1))
    given = [c for c in rows if c.setting.given]
    cheapest = {c.rule: c for c in reversed(own)} | {c.setting.size: c for c in reversed(others)}
    baselines = [c for c in rows if c.setting.method != "S3T" and c.setting.size in sizes]
    shown = set(map(id, [best, *given, *cheapest.values(), *baselines]))
    found = [c for c in planner.candidates if id(c) in shown]
    return sorted(found, key=lambda c: (c.setting.method != "S3T", not c.setting.given, c.setting.size != size))


def _section(planner: S3TPlanner, candidate: Candidate) -> str:
    setting = candidate.setting
    if setting.method != "S3T":
        return "baselines:"
    if setting.given:
        return "yours:"
    return "this m, L:" if setting.size == planner.recommended.setting.size else "other m, L:"


def _cells(candidate: Candidate, hours: float) -> list[str]:
    """A row; costs are in epochs over all examples, times the hours of one."""
    setting, found = candidate.setting, candidate.outlook
    orders = f"{setting.selection} " + (f"B={setting.budget}" if setting.budget else f"c={setting.cost_budget}")
    return [
        str(setting.num_shards),
        str(setting.num_slices),
        orders if setting.method == "S3T" else setting.method,
        candidate.when,
        _short(candidate.training_cost / setting.places * hours),
        _short(found.repair_cost / setting.places * hours),
        _short(found.repairs),
        _short(candidate.stages if candidate.storage_mb is None else candidate.storage_mb),
        f"{_short(candidate.first_dead)}/{_short(candidate.all_dead)}",
        f"{found.in_use:.0%}",
        f"{found.dead:.0%}",
    ]


def _short(number: float) -> str:
    """At most five characters.

    >>> [_short(number) for number in (0.25, 7, 19.29, 1096.9, 76516, 31e6, math.inf)]
    ['0.25', '7', '19', '1,097', '77k', '31M', 'never']
    """
    if math.isinf(number):
        return "never"
    if number >= 1e4:
        return f"{number / 1e6:.0f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _legend(planner: S3TPlanner) -> list[str]:
    day = f"day {planner.horizon_days:g}"
    hours = planner.gpu_hours_per_epoch
    unit = f"GPU hours, {hours:g} an epoch" if hours else "epochs"
    return [
        "orders: B sequences per shard, or a cost budget c in slice passes per shard",
        f"repair: at a served prefix below a length, after each hit, every so many days;\n  times: until {day}; "
        "repairs are taken to need no time",
        f"costs: in {unit} over all examples, at num_train_epochs=1;\n  a slice pass costs the same whatever a stage "
        "trains",
        "life: requests until the first shard / all shards are dead, without repair",
        f"in use: of the slices, mean over time until {day}",
        "dead: the chance that nothing of some shard could be served, be it for a moment",
    ]
