"""Pictures: the tree of stages, slices in use over requests, and retention against cost.

Responsible for curves and for files; the tree is drawn by `tree_picture.py`, the numbers come from `comparison.py`.
matplotlib is an extra, and nothing imports this module before a picture is asked for. Figures are made without pyplot,
so drawing needs no display, leaves no global state, and works in threads. Colours are those of Okabe and Ito, which
the colour-blind tell apart; each comes with a line style or marker of its own.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomic
from ..plan.life import place_chances
from ..plan.tree import Plan, Stage
from .arrivals import DeletionRequests, RepairPolicy
from .comparison import Course, Kept, Retention, courses, from_now_on
from .estimates import Curve
from .tree_picture import BLACK, BLUE, MARGIN, VERMILLION, Forest

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
except ImportError as error:
    raise ImportError('Pictures need matplotlib, which is an extra. Run: pip install "hf-s3t[plots]"') from error

Look = dict[str, Any]

ORANGE, GREEN, PURPLE, SKY, GREY = "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#666666"
DOTS_PER_INCH = 150
BELOW = 3.4  # inches for the curve below a tree

# How the ways to answer requests look, and the methods to select sequences, in the order of `comparison.py`
S3T: Look = {"color": BLUE, "linestyle": "-", "marker": "o", "linewidth": 2}
REPAIRED: Look = {"color": GREEN, "linestyle": "-.", "marker": "D", "linewidth": 2}
SISA: Look = {"color": VERMILLION, "linestyle": (0, (4, 4)), "marker": "s", "linewidth": 2}
FULL: Look = {"color": BLACK, "linestyle": (4, (4, 4)), "marker": "^", "linewidth": 2}  # where SISA's line is not
METHODS: tuple[Look, ...] = (
    {"color": GREY, "linestyle": ":", "marker": "v"},
    {"color": VERMILLION, "linestyle": "--", "marker": "s"},
    {"color": ORANGE, "linestyle": "-.", "marker": "^"},
    {"color": PURPLE, "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "X"},
    {"color": BLACK, "linestyle": (0, (1, 2)), "marker": "P"},
    {"color": SKY, "linestyle": "--", "marker": "D"},
    {"color": BLUE, "linestyle": "-", "marker": "o", "linewidth": 2},
)


# Files


def draw_tree(plan: Plan, trained: Iterable[Stage] | None, file: Path | str, title: str | None = None) -> Figure:
    """Draw the tree of stages of each shard, with what is served, live and missing.

    Of more than 12 shards only those that look different are drawn, at most 12. A plan of very many leaves is drawn
    without the slices' numbers, and its title says so.

    Args:
        plan (`Plan`): The plan.
        trained (`Iterable[Stage]`, *optional*): What the store holds; live stages of an older plan are drawn too.
            `None` stands for the whole plan.
        file (`Path` or `str`): Where to write; the suffix says how, for example `.png`, `.svg` or `.pdf`.
        title (`str`, *optional*): By default the number of live stages and the cost of the plan.

    Returns:
        `Figure`: What was written.

    Raises:
        ValueError: If matplotlib does not know the suffix.
        FileNotFoundError: If the folder of the file does not exist.
    """
    file = _checked(file)
    forest = Forest(plan, trained, title)
    figure = Figure(figsize=forest.size)
    forest.draw(figure)
    return _saved(figure, file)


def draw_store(
    plan: Plan,
    trained: Iterable[Stage],
    file: Path | str,
    *,
    title: str | None = None,
    replay: float = 1.0,
    requests: DeletionRequests | None = None,
    streams: int = 500,
    seed: int = 0,
) -> Figure:
    """Draw what a store holds: [`draw_tree`], and below it the slices in use from now on if nothing is repaired.

    Args:
        plan, trained, file, title: See [`draw_tree`], also for errors.
        replay (`float`, *optional*, defaults to `1.0`): How much of earlier slices stages see; see [`Stage.passes`].
        requests, streams, seed: See [`simulate`].

    Returns:
        `Figure`: What was written. Where nothing is live, the tree alone.
    """
    file, trained = _checked(file), list(trained)
    forest = Forest(plan, trained, title, replay)
    curve = from_now_on(plan, trained, requests, streams=streams, seed=seed)
    width, height = forest.size
    below = 0.0 if curve is None else BELOW
    figure = Figure(figsize=(width, height + below))
    forest.draw(figure)
    if curve is not None:
        box = (MARGIN, 0.55, min(width - MARGIN - 0.3, 8.0), BELOW - 1.0)  # in inches
        axes = figure.add_axes(tuple(box / np.array([width, height + below] * 2)))
        _draw_curve(axes, np.arange(len(curve.mean)), curve, "mean, and the middle 90 % of streams", S3T)
        axes.set_title("From now on, without repair", fontsize=9, loc="left")
        _label_in_use(axes, plan, "further requests")
        axes.legend(fontsize=8, frameon=False)
    return _saved(figure, file)


def draw_slices_in_use(
    plan: Plan,
    requests: DeletionRequests | None,
    file: Path | str,
    *,
    policy: RepairPolicy | None = None,
    streams: int = 500,
    seed: int = 0,
    max_requests: int | None = None,
    horizon_days: float | None = None,
    title: str | None = None,
) -> Figure:
    """Draw slices in use over requests or days, and the training that it takes: S3T, SISA and full retraining.

    Args:
        plan, requests, policy, streams, seed, max_requests, horizon_days: See [`simulate`], also for errors. Without a
            horizon the picture ends when nothing is left on average.
        file, title: See [`draw_tree`], also for errors.

    Returns:
        `Figure`: What was written.
    """
    file = _checked(file)
    ways = courses(
        plan, requests, policy, streams=streams, seed=seed, max_requests=max_requests, horizon_days=horizon_days
    )
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    _draw_courses(figure, plan, ways, "requests" if horizon_days is None else "days", title)
    return _saved(figure, file)


def draw_retention(
    num_slices: int,
    file: Path | str,
    *,
    prior: Sequence[float] | None = None,
    performance: Sequence[float] | None = None,
    seed: int = 0,
    points: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw what each method to select sequences keeps against what it costs.

    Args:
        num_slices, prior, performance, seed: See [`Retention`].
        points (`int`, *optional*): See [`Retention.by_method`].
        file, title: See [`draw_tree`], also for errors.

    Returns:
        `Figure`: What was written.
    """
    file = _checked(file)
    methods = Retention(num_slices, prior, performance, seed).by_method(points)
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    _draw_methods(figure, num_slices, methods, None, title)
    return _saved(figure, file)


def draw_plan(
    plan: Plan,
    requests: DeletionRequests | None,
    file: Path | str,
    *,
    policy: RepairPolicy | None = None,
    performance: Sequence[float] | None = None,
    streams: int = 500,
    seed: int = 0,
    max_requests: int | None = None,
    horizon_days: float | None = None,
    points: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw a plan's place among the alternatives: [`draw_retention`] and [`draw_slices_in_use`] side by side.

    Args:
        points (`int`, *optional*): See [`Retention.by_method`].
        performance (`Sequence[float]`, *optional*): See [`Retention`].
        plan, requests, policy, streams, seed, max_requests, horizon_days: See [`draw_slices_in_use`].
        file, title: See [`draw_tree`], also for errors.

    Returns:
        `Figure`: What was written.
    """
    file = _checked(file)
    ways = courses(
        plan, requests, policy, streams=streams, seed=seed, max_requests=max_requests, horizon_days=horizon_days
    )
    # Of all requests to a shard, whichever shard it is
    prior = place_chances(plan.num_shards, plan.num_slices, requests.prior if requests else None).sum(axis=0)
    retention = Retention(plan.num_slices, prior.tolist(), performance, seed)
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    if title is not None:
        figure.suptitle(title, parse_math=False)
    _draw_methods(left, plan.num_slices, retention.by_method(points), retention.of_plan(plan), None)
    _draw_courses(right, plan, ways, "requests" if horizon_days is None else "days", None)
    return _saved(figure, file)


def _checked(file: Path | str) -> Path:
    """Refuse what can not be written before anything is computed."""
    file = Path(file)
    known = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        found = f"{file.name!r} ends with {file.suffix!r}" if file.suffix else f"{file.name!r} has no suffix"
        raise ValueError(f"{found}, which matplotlib can not write. Use one of: .{', .'.join(sorted(known))}.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"The folder {str(file.parent)!r} does not exist. Make it, or write elsewhere.")
    return file


def _saved(figure: Figure, file: Path) -> Figure:
    """Write in memory first, so that no half of a picture ever stands there."""
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix[1:].lower(), dpi=DOTS_PER_INCH)
    write_atomic(file, picture.getvalue())
    return figure


# Curves


def _draw_courses(
    figure: Figure | SubFigure, plan: Plan, ways: Sequence[Course], unit: str, title: str | None
) -> None:
    """Slices in use above, what training has cost below."""
    above, below = figure.subplots(2, 1, sharex=True)
    looks = (S3T, SISA, FULL) if len(ways) == 3 else (S3T, REPAIRED, SISA, FULL)
    for way, look in zip(ways, looks, strict=True):
        _draw_curve(above, np.arange(len(way.in_use.mean)), way.in_use, way.name, look)
        below.plot(way.moments, way.cost, markersize=5, **look)
    above.set_title(title or "Slices in use: mean, and the middle 90 % of streams", fontsize=10, parse_math=False)
    _label_in_use(above, plan, "")
    below.set_ylim(0)
    below.set_ylabel("slice passes of training so far")
    below.set_xlabel(unit)
    below.grid(alpha=0.3)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, handlelength=4)


def _draw_curve(axes: Axes, steps: np.ndarray, curve: Curve, name: str, look: Look) -> None:
    """The mean as a line with some markers, the band around it."""
    first = 0.06 if look is FULL else 0.0  # where SISA's markers are not
    axes.plot(steps, curve.mean, label=name, markevery=(first, 0.125), markersize=5, **look)
    axes.fill_between(steps, *curve.band, color=look["color"], alpha=0.2, linewidth=0)


def _label_in_use(axes: Axes, plan: Plan, unit: str) -> None:
    slices = plan.num_shards * plan.num_slices
    axes.set_ylim(0, 1.05 * slices)
    axes.margins(x=0.01)
    axes.locator_params(axis="y", integer=True)
    axes.set_ylabel(f"slices in use, of {slices}")
    axes.set_xlabel(unit)
    axes.grid(alpha=0.3)


def _draw_methods(
    figure: Figure | SubFigure, num_slices: int, methods: dict[str, list[Kept]], plan: Kept | None, title: str | None
) -> None:
    """Retention against cost, a line for each method, a star for the plan."""
    axes = figure.subplots()
    for (name, points), look in zip(methods.items(), METHODS, strict=True):
        costs, shares, low, high = np.array(points).T
        axes.plot(costs, 100 * shares, label=name, markersize=6, **look)
        if (low < high).any():
            axes.fill_between(costs, 100 * low, 100 * high, color=look["color"], alpha=0.15, linewidth=0)
    if plan is not None:
        star: Look = {
            "marker": "*",
            "markersize": 18,
            "color": "#F0E442",
            "markeredgecolor": BLACK,
            "linestyle": "none",
        }
        axes.plot([plan.cost], [100 * plan.share], label="this plan", zorder=5, **star)
    axes.axhline(100, color=GREY, linewidth=0.8, label="every order, at any cost")
    axes.set_title(
        title or f"What one shard of {num_slices} slices keeps over its life", fontsize=10, parse_math=False
    )
    axes.set_ylabel("retention, % of what training every order keeps")
    axes.set_xlabel("cost, slice passes per shard (and as a multiple of one sequence)")
    _mark_costs(axes, num_slices * (num_slices + 1) // 2)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, handlelength=4)


def _mark_costs(axes: Axes, one: int) -> None:
    """A logarithmic axis that is marked at one sequence and its doublings."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    marks = [one << doublings for doublings in range(30) if low <= one << doublings <= high]
    axes.set_xticks(marks, [f"{mark}\n{mark // one}x" for mark in marks])
    axes.minorticks_off()
