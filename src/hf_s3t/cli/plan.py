"""`hf-s3t plan`: what `S3TPlanner` found, as a table for a person or as one JSON document.

The verb needs no store. Exit codes: 0 done; 2 bad input.
"""

from __future__ import annotations

import json
import math
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .options import parse_count, parse_prior, read_curve
from .outcomes import BAD_INPUT, DONE, console
from .wording import in_options

if TYPE_CHECKING:  # the other verbs need no planner
    from ..planner.candidates import Candidate
    from ..planner.planner import S3TPlanner


def plan(
    examples: Annotated[str, typer.Option(help="Rows of the train set: 52002, 52k, 10M, 1.5B.")],
    requests_per_day: Annotated[float, typer.Option(help="Deletion requests per day, each for one example.")],
    horizon_days: Annotated[float, typer.Option(help="Days over which costs and deletions are counted.")],
    shards: Annotated[int | None, typer.Option(help="m. Without it 1, 2, 5 and 10 are compared.")] = None,
    slices: Annotated[int | None, typer.Option(help="L, at most 16. Without it 2, 4 and 8 are compared.")] = None,
    budget: Annotated[int | None, typer.Option(help="B, sequences per shard. Needs --slices.")] = None,
    cost_budget: Annotated[int | None, typer.Option(help="Slice passes per shard, instead of --budget.")] = None,
    prior: Annotated[
        str | None, typer.Option(help="Chance that a request hits each slice: 0.4,0.3,0.2,0.1. Default: all equal.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers of the model: the most slices it can have. Not for rank groups.")
    ] = None,
    gpu_hours_per_epoch: Annotated[float | None, typer.Option(help="GPU hours of an epoch over all examples.")] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs that train. Shows hours, and what fits. Needs --gpu-hours-per-epoch.")
    ] = None,
    gpus_per_stage: Annotated[int, typer.Option(help="GPUs that train one stage together.")] = 1,
    replay: Annotated[float, typer.Option(help="Share of the earlier slices that a stage trains on again.")] = 1.0,
    adapter_mb: Annotated[float | None, typer.Option(help="Size in MB of the adapter of a whole sequence.")] = None,
    activation_cache_gb: Annotated[
        float | None, typer.Option(help="Size limit of the activation cache in GB; counts as storage.")
    ] = None,
    quality: Annotated[
        Path | None, typer.Option(help="JSON file with the score by prefix length. Adds an expected score.")
    ] = None,
    min_in_use: Annotated[
        float, typer.Option(help="Rule: at least this share of the slices is in use on average.")
    ] = 0.5,
    max_dead: Annotated[float, typer.Option(help="Rule: at most this chance that a shard is dead.")] = 0.05,
    plot: Annotated[Path | None, typer.Option(help="Draw cost against slices in use: file.png, .svg, .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document with every candidate.")] = False,
) -> None:
    """Choose a plan and a time to repair: a table of candidates, and a line for S3TConfig.

    Give --shards, --slices and --budget if you have a plan in mind. Its rows come first,
    and other budgets, orders, repair rules and sizes are compared with it. The
    recommendation keeps your --shards and --slices. Without --shards, note that more
    shards are always cheaper here: the planner does not know what they cost in quality.

    The recommendation is the cheapest candidate until the horizon that obeys two rules:
    at least --min-in-use of the slices are in use on average, and the chance of a dead
    shard is at most --max-dead. A dead shard serves nothing until it is trained again.
    With --gpus, candidates that do not fit are marked and never recommended.
    """
    from ..planner.planner import S3TPlanner

    try:
        metric, curve = read_curve(quality) if quality else ("", None)
        asked = S3TPlanner(
            examples=parse_count(examples), requests_per_day=requests_per_day, horizon_days=horizon_days,
            shards=shards, slices=slices, budget=budget, cost_budget=cost_budget, prior=parse_prior(prior),
            layers=layers, gpu_hours_per_epoch=gpu_hours_per_epoch, gpus=gpus, gpus_per_stage=gpus_per_stage,
            replay=replay, adapter_mb=adapter_mb, activation_cache_gb=activation_cache_gb, quality=curve,
            min_in_use=min_in_use, max_dead=max_dead,
        )  # fmt: skip
        asked.compare()
        found = asked.to_json()
        if plot:
            _draw(asked, plot)
    except (ValueError, FileNotFoundError, ImportError) as error:
        message = in_options(str(error))
        typer.echo(message, err=True)
        _end(as_json, BAD_INPUT, None, {"type": type(error).__name__, "message": message})
    if not as_json:
        console().print(show_plan(asked, metric), crop=False)
    _end(as_json, DONE, found, None)


def _end(as_json: bool, code: int, result: Any, error: Any) -> None:
    if as_json:
        document = {"exit_code": code, "result": result, "error": error}
        typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
    raise typer.Exit(code)


# ---- the table ----


def show_plan(planner: S3TPlanner, metric: str = "score") -> RenderableType:
    """The shortlist as a table of at most 80 characters, what its columns say, and the recommendation."""
    chosen = planner.recommended
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for head in ("", "m", "L", "orders", "repair", *_heads(planner)):
        table.add_column(head, justify="left" if head in ("orders", "repair") else "right", no_wrap=True)
    for name, group in groupby(shortlist(planner), key=lambda candidate: _section(planner, candidate)):
        table.add_row(*[""] * 3, ("\n" if table.row_count else "") + name, style="bold")
        for candidate in group:
            table.add_row(_mark(planner, candidate), *_cells(planner, candidate))
    line = (chosen.setting.config if chosen else None) or "nothing"
    config = Text(f"\n  {line}\n", no_wrap=True, overflow="ignore")  # to be pasted, however long
    return Group(table, "", *_legend(planner, metric), "", "Recommended:", config, *planner.advice)


def _mark(planner: S3TPlanner, candidate: Candidate) -> str:
    if candidate is planner.recommended:
        return ">"
    return "x" if not candidate.fits else "<" if planner.is_cheaper_baseline(candidate) else ""


def shortlist(planner: S3TPlanner) -> list[Candidate]:
    """Candidates in groups: what was given, others of the recommended size, other sizes, baselines.

    Others are the recommended one and, for each rule of repair, the cheapest; for each other size the cheapest that
    obeys the rule; baselines are those of the recommended number of shards.
    """
    best = planner.recommended or planner.wanted
    size, rows = best.setting.size, sorted(planner.candidates, key=lambda c: c.epochs)
    own = [c for c in rows if c.setting.method == "S3T" and c.setting.size == size]
    others = [c for c in rows if c.setting.method == "S3T" and c.setting.size != size and planner.obeys(c)]
    others = [c for c in others if c.fits] or others
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
    best = planner.recommended or planner.wanted
    return "this m, L:" if setting.size == best.setting.size else "other m, L:"


def _heads(planner: S3TPlanner) -> list[str]:
    """Columns after the plan and the rule: there is room for seven."""
    unit = "hours" if planner.gpu_hours_per_epoch else "epochs"
    size = "MB" if planner.adapter_mb else "stages"
    scored = ["score"] if planner.quality else []
    if planner.gpus:
        times = [] if scored else ["times"]
        return ["train\nhours", "repair\nhours", *times, "GPUs", size, "in\nuse", "dead", *scored]
    life = [] if scored else ["life\nreq."]
    return [f"train\n{unit}", f"repair\n{unit}", "times", size, *life, "in\nuse", "dead", *scored]


def _cells(planner: S3TPlanner, candidate: Candidate) -> list[str]:
    """A row, see `_heads`; without GPUs costs are in epochs over all examples, times the hours of one."""
    setting, found, hours = candidate.setting, candidate.outlook, planner.gpu_hours_per_epoch or 1
    orders = f"{setting.selection} " + (f"B={setting.budget}" if setting.budget else f"c={setting.cost_budget}")
    cells = {
        "train": _short(candidate.training_cost / setting.places * hours),
        "repair": _short(found.repair_cost / setting.places * hours),
        "times": _short(found.repairs),
        "MB": _short(candidate.storage_mb or 0),
        "stages": _short(candidate.stages),
        "life": f"{_short(candidate.first_dead)}/{_short(candidate.all_dead)}",
        "in": f"{found.in_use:.0%}",
        "dead": f"{found.dead:.0%}",
        "score": "" if candidate.score is None else f"{candidate.score:.3g}",
    }
    if candidate.hours:
        mean, longest = _short(candidate.hours.repair), _short(candidate.hours.longest)
        cells["train"] = _short(candidate.hours.training)
        cells["repair"] = mean if mean == longest else f"{mean}/{longest}"
        cells["GPUs"] = f"{_short(round(100 * candidate.hours.share))}%"
    plan = [str(setting.num_shards), str(setting.num_slices), orders if setting.method == "S3T" else setting.method]
    return [*plan, candidate.when, *(cells[head.split("\n")[0]] for head in _heads(planner))]


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


def _legend(planner: S3TPlanner, metric: str) -> list[str]:
    day, hours, gpus = f"day {planner.horizon_days:g}", planner.gpu_hours_per_epoch, planner.gpus
    unit = f"GPU hours, {hours:g} an epoch" if hours else "epochs"
    told = [
        "orders: B sequences per shard, or a cost budget c in slice passes per shard",
        f"repair: at a served prefix below a length, after each hit, every so many days;\n  times: until {day}; "
        + ("in use and dead: as if they took no time" if gpus else "repairs are taken to need no time"),
        f"costs: in {unit} over all examples, at num_train_epochs=1;\n  a slice pass costs the same whatever a stage "
        "trains",
    ]
    if gpus:
        told[2:] = [
            f"hours: on {gpus} GPUs, {planner.gpus_per_stage} a stage, at {hours:g} GPU hours an epoch over all "
            "examples, and\n  num_train_epochs=1; of a repair the mean/the longest, with all GPUs its own;\n  from "
            "scratch is one training on all GPUs",
            f"GPUs: the share of their time until {day} that repairs take",
            "x: does not fit: above 100%, or a shard's next repair is due before one ends",
        ]
    if planner.adapter_mb:
        cache = f", {planner.activation_cache_gb:g} GB of activation cache" if planner.activation_cache_gb else ""
        told.append(f"MB: of stages, index{cache}")
    if not (gpus or planner.quality):
        told.append("life: requests until the first shard / all shards are dead, without repair")
    told += [
        f"in use: share of the slices, mean over time until {day}",
        "dead: the chance that some shard serves nothing, even for a moment",
    ]
    if planner.quality:
        told.append(f"score: {metric} of a shard, mean over time; the ensemble may do better")
    return [*told, "<: a baseline that costs less than S3T"]


def _draw(planner: S3TPlanner, file: Path) -> None:
    from ..planner.comparison_picture import draw_comparison

    draw_comparison(planner, shortlist(planner), file)
