"""The picture of a plan's trees of stages: one panel per shard, layer groups downwards.

Responsible for where each stage stands, how it looks, and the file. matplotlib is an extra, and nothing imports this
module before a picture is asked for. Figures are made without pyplot, so drawing needs no display and leaves no
global state. Each state has a colour of Okabe and Ito's, which the colour-blind tell apart, and a shape of its own.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files import write_atomic
from ..plan.tree import Plan, Stage

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError('Pictures need matplotlib, which is an extra. Run: pip install "hf-s3t[plots]"') from error

BLUE, VERMILLION, BLACK = "#0072B2", "#D55E00", "#000000"
NODES: dict[str, dict[str, Any]] = {
    "served": {"marker": "o", "facecolors": BLUE, "edgecolors": BLUE, "linestyles": "-"},
    "live": {"marker": "s", "facecolors": "#D6EAF5", "edgecolors": BLACK, "linestyles": "-"},
    "missing": {"marker": "o", "facecolors": "white", "edgecolors": VERMILLION, "linestyles": ":"},
}
EDGES: dict[str, dict[str, Any]] = {
    "served": {"color": BLUE, "linestyle": "-", "linewidth": 2.5, "zorder": 1.9},
    "live": {"color": BLACK, "linestyle": "-", "linewidth": 0.8, "zorder": 1.8},
    "missing": {"color": VERMILLION, "linestyle": ":", "linewidth": 1.2, "zorder": 1.7},
}
MEANINGS = {
    "served": "served: the longest live prefix of its shard",
    "live": "live, and not served",
    "missing": "missing: deleted, or not trained yet",
}

MOST_PANELS, COLUMNS = 12, 4
LEAF, LEVEL = 0.34, 0.5  # inches of a leaf and of a layer group
WIDEST, DEEPEST = 30.0, 14.0  # inches of one panel
NARROWEST = 2.0  # a panel's heading has to fit
HEADING, TITLE, KEY = 0.9, 0.8, 1.2  # inches above each panel, of the title, of the legend
LARGEST_NODE, SMALLEST_LABELLED = 16.0, 9.0  # points
DOTS_PER_INCH = 150


def draw_tree(plan: Plan, trained: Iterable[Stage] | None, file: Path | str, replay: float = 1.0) -> Figure:
    """Draw the tree of stages of each shard, with what is served, live and missing; the title says what it costs.

    Of more than 12 shards only those that look different are drawn, at most 12. A plan of very many leaves is drawn
    without the slices' numbers.

    Args:
        plan (`Plan`): The plan.
        trained (`Iterable[Stage]`, *optional*): What the store holds; live stages of an older plan are drawn too.
            `None` stands for the whole plan.
        file (`Path` or `str`): Where to write; the suffix says how, for example `.png`, `.svg` or `.pdf`.
        replay (`float`, *optional*, defaults to `1.0`): For that cost; see [`Stage.passes`].

    Returns:
        `Figure`: What was written.

    Raises:
        ValueError: If matplotlib does not know the suffix.
        FileNotFoundError: If the folder of the file does not exist.
    """
    file = checked_file(file)
    figure = _figure(plan, plan.stages if trained is None else tuple(trained), replay)
    picture = io.BytesIO()  # in memory first, so that no half of a picture ever stands there
    figure.savefig(picture, format=file.suffix[1:].lower(), dpi=DOTS_PER_INCH)
    write_atomic(file, picture.getvalue())
    return figure


def checked_file(file: Path | str) -> Path:
    """Where a picture is to be written, if that can be; otherwise see [`draw_tree`]."""
    file = Path(file)
    known = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in known:
        found = f"{file.name!r} ends with {file.suffix!r}" if file.suffix else f"{file.name!r} has no suffix"
        raise ValueError(f"{found}, which matplotlib cannot write. Use one of: .{', .'.join(sorted(known))}.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"The folder {str(file.parent)!r} does not exist. Make it, or write elsewhere.")
    return file


def states(plan: Plan, trained: Iterable[Stage]) -> dict[Stage, str]:
    """Of each stage, those of an older plan included, whether it is served, live or missing.

    >>> list(states(Plan.make(1, 2, [(0, 1), (1, 0)]), [Stage(0, (1,))]).values())
    ['missing', 'missing', 'served']
    """
    live = plan.live(trained)
    served = {stage for shard, prefix in plan.served(live).items() for stage in Stage(shard, prefix).path}
    held = set(live)
    return {
        stage: "served" if stage in served else "live" if stage in held else "missing"
        for stage in dict.fromkeys((*plan.stages, *live))
        if stage.shard < plan.num_shards
    }


def across(stages: Iterable[Stage]) -> dict[Stage, float]:
    """How far to the right each stage of a shard stands: each leaf in a column of its own, a parent above the middle
    of its children.

    >>> places = across([Stage(0, prefix) for prefix in [(0,), (0, 1), (2,), (0, 2)]])
    >>> {stage.prefix: x for stage, x in places.items()}
    {(2,): 2.0, (0, 2): 1.0, (0, 1): 0.0, (0,): 0.5}
    """
    ordered = sorted(stages, reverse=True)  # from the last leaf, children before parents
    parents = {stage.parent for stage in ordered}
    column = float(len(set(ordered) - parents))
    below: dict[Stage | None, list[float]] = {}
    places: dict[Stage, float] = {}
    for stage in ordered:
        column -= stage not in parents
        places[stage] = (below[stage][0] + below[stage][-1]) / 2 if stage in parents else column
        below.setdefault(stage.parent, []).append(places[stage])
    return places


def _figure(plan: Plan, trained: tuple[Stage, ...], replay: float) -> Figure:
    state = states(plan, trained)
    groups = _alike(plan, state)
    trees = [across(stages) for stages in groups.values()]
    leaves, depth = max(map(_leaves, trees)), max(stage.depth for stage in state)
    width = min(WIDEST, max(NARROWEST, LEAF * (leaves + 1)))
    height = min(DEEPEST, LEVEL * (depth + 0.5)) + HEADING
    columns = min(len(trees), max(1, min(COLUMNS, int(WIDEST // width))))
    rows = -(-len(trees) // columns)
    size = (max(4.6, columns * width + 0.6), TITLE + rows * height + KEY)
    figure = Figure(figsize=size, layout="constrained")
    node = min(LARGEST_NODE, 54 * width / (leaves + 1), 54 * (height - HEADING) / (depth + 0.5))
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(trees) :]:
        axes.remove()
    for number, (shards, tree) in enumerate(zip(groups, trees, strict=True)):
        _draw_tree(panels[number], tree, state, depth, node)
        panels[number].set_title(_heading(plan, shards, tree, state), fontsize=8.5, pad=16)
        panels[number].set_ylabel("" if number % columns else "layer group", fontsize=8)
    title = _title(plan, state, sum(map(len, groups)), replay)
    figure.suptitle(textwrap.fill(title, int(11 * size[0])), fontsize=11, parse_math=False)
    counts = list(state.values())
    names = [f"{MEANINGS[one]} ({counts.count(one)})" for one in NODES]
    look: dict[str, Any] = {"fontsize": 8, "labelspacing": 0.9, "markerscale": 10 / node, "frameon": False}
    figure.legend(panels[0].collections, names, loc="outside lower center", **look)
    return figure


def _leaves(tree: dict[Stage, float]) -> int:
    return 1 + int(max(tree.values(), default=0))


def _alike(plan: Plan, state: dict[Stage, str]) -> dict[tuple[int, ...], list[Stage]]:
    """The stages of the first of the shards that look the same; of few shards, of each."""
    stages: list[list[Stage]] = [[] for _ in range(plan.num_shards)]
    for stage in state:
        stages[stage.shard].append(stage)
    kinds: dict[object, list[int]] = {}
    for shard, own in enumerate(stages):
        look = tuple((stage.prefix, state[stage]) for stage in own)
        kinds.setdefault(look if plan.num_shards > MOST_PANELS else shard, []).append(shard)
    return {tuple(shards): stages[shards[0]] for shards in list(kinds.values())[:MOST_PANELS]}


def _title(plan: Plan, state: dict[Stage, str], shown: int, replay: float) -> str:
    live = sum(one != "missing" for one in state.values())
    cost = round(sum(stage.passes(replay) for stage in plan.stages), 2)
    title = f"{live} of {len(state)} stages live; the plan costs {cost} slice passes"
    if plan.num_shards > MOST_PANELS:
        title += f" ({shown} of {plan.num_shards} shards, drawn once where they look the same)"
    return title


def _heading(plan: Plan, shards: tuple[int, ...], tree: dict[Stage, float], state: dict[Stage, str]) -> str:
    served = sum(state[stage] == "served" for stage in tree)
    others = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    return f"shard {shards[0]}{others}\n" + (f"serves {served} of {plan.num_slices} slices" if served else "dead")


def _draw_tree(axes: Axes, tree: dict[Stage, float], state: dict[Stage, str], depth: int, node: float) -> None:
    """Stages with the slice that each adds; edges are lines with gaps: down half a layer group, across, and down."""
    first = [x for stage, x in tree.items() if stage.depth == 1] or [0.0]
    root = (first[0] + first[-1]) / 2
    axes.set_xlim(-1, _leaves(tree))
    axes.set_ylim(depth + 0.5, 0)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks(range(1, depth + 1, 1 + depth // 40))
    axes.tick_params(length=0, labelsize=8)
    for one, look in NODES.items():
        stages = [stage for stage in tree if state[stage] == one]
        places = [tree[stage] for stage in stages], [stage.depth for stage in stages]
        axes.scatter(*places, s=node**2, zorder=2, gid=one, **look)
        x: list[float] = []
        y: list[float] = []
        for stage in stages:
            above = tree[stage.parent] if stage.parent else root
            x += [above, above, tree[stage], tree[stage], float("nan")]
            y += [stage.depth - 1, stage.depth - 0.5, stage.depth - 0.5, stage.depth, float("nan")]
        axes.plot(x, y, **EDGES[one])
    for stage, place in tree.items() if node >= SMALLEST_LABELLED else ():
        colour = "white" if state[stage] == "served" else BLACK
        text = str(stage.prefix[-1])
        axes.text(place, stage.depth, text, color=colour, fontsize=node / 2, ha="center", va="center_baseline")
    axes.text(root, 0, "base model", fontsize=8, ha="center", va="bottom")
