"""The picture of a plan's trees of stages: one panel per shard, layer groups downwards.

Responsible for where each stage stands, how it looks, and how large the picture has to be so that nothing overlaps.
The figure comes from `pictures.py`, which writes it.

Each state has a colour of Okabe and Ito's, which the colour-blind tell apart, and a shape and a line of its own.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..plan.tree import Plan, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

MOST_PANELS = 12
# In inches
WIDEST = 30.0  # of one panel
ROW = 16.0  # a row of panels ends here
NARROWEST = 1.9  # a panel's heading has to fit
SLOT, LEVEL, DEEPEST = 0.34, 0.5, 14.0  # of a leaf, of a layer group, of all of these
MARGIN, HEADING, LINE = 0.65, 0.7, 0.24  # left of the panels; the heading of each; a line of the title
NARROW_KEY, KEY = 1.2, 0.7  # the legend, one state below the other or side by side
# In points
LARGEST_NODE, SMALLEST_LABEL = 16.0, 4.5


@dataclass(frozen=True)
class Tree:
    """The tree of one shard, for all shards that look the same.

    Args:
        shards (`list[int]`): The shards.
        across (`dict[Stage, float]`): How far to the right each stage of the first of them stands, in leaves.
        leaves (`int`): How many leaves there are.

    >>> stages = [Stage(0, prefix) for prefix in [(0,), (0, 1), (2,), (0, 2)]]
    >>> [(stage.prefix, x) for stage, x in Tree.of([0], stages).across.items()]
    [((2,), 2.0), ((0, 2), 1.0), ((0, 1), 0.0), ((0,), 0.5)]
    """

    shards: list[int]
    across: dict[Stage, float]
    leaves: int

    @classmethod
    def of(cls, shards: list[int], stages: Iterable[Stage]) -> Tree:
        """Every leaf gets a column of its own, a parent stands above the middle of its children.

        Args:
            shards (`list[int]`): The shards that look like this.
            stages (`Iterable[Stage]`): The stages of the first of them, parents before their children.
        """
        walk: dict[Stage, tuple[int, ...]] = {}
        for number, stage in enumerate(stages):
            walk[stage] = (*(walk[stage.parent] if stage.parent else ()), number)
        leaves = len(walk) - len({stage.parent for stage in walk if stage.parent})
        across: dict[Stage, float] = {}
        children: dict[Stage | None, list[float]] = {}
        column = float(leaves)
        for stage in sorted(walk, key=walk.__getitem__, reverse=True):  # from the last leaf, children before parents
            if stage not in children:
                column -= 1
            across[stage] = (children[stage][0] + children[stage][-1]) / 2 if stage in children else column
            children.setdefault(stage.parent, []).append(across[stage])
        return cls(shards, across, leaves)

    @property
    def root(self) -> float:
        """Where the base model stands."""
        first = [x for stage, x in self.across.items() if stage.parent is None] or [0.0]
        return (min(first) + max(first)) / 2


class Forest:
    """The trees of all shards, and the size of their picture.

    Args:
        plan (`Plan`): The plan.
        trained (`Iterable[Stage]`, *optional*): What the store holds; `None` stands for the whole plan.
        title (`str`, *optional*): By default the number of live stages and the cost of the plan.
        replay (`float`, *optional*, defaults to `1.0`): For that cost; see [`Stage.passes`].

    >>> forest = Forest(Plan.make(1, 2, [(0, 1), (1, 0)]), [Stage(0, (1,))], None)
    >>> list(forest.states.values())
    ['missing', 'missing', 'served']
    """

    def __init__(self, plan: Plan, trained: Iterable[Stage] | None, title: str | None, replay: float = 1.0) -> None:
        self.plan = plan
        self.cost = round(sum(stage.passes(replay) for stage in plan.stages), 2)
        trained = plan.stages if trained is None else list(trained)
        live, self.served = plan.live(trained), plan.served(trained)
        on_path = {stage for shard, prefix in self.served.items() for stage in Stage(shard, prefix).path}
        held = set(live)
        self.states = {
            stage: "served" if stage in on_path else "live" if stage in held else "missing"
            for stage in dict.fromkeys((*plan.stages, *live))
            if stage.shard < plan.num_shards
        }
        self.trees = self._trees()
        leaves = max(tree.leaves for tree in self.trees)
        self.depth = depth = max(stage.depth for stage in self.states)
        self.slot, self.level = min(SLOT, WIDEST / leaves), min(LEVEL, DEEPEST / depth)
        self.node = min(LARGEST_NODE, 0.75 * 72 * min(self.slot, self.level))
        self.panel = max(NARROWEST, self.slot * (leaves + 1)), self.level * (depth + 0.5)
        self.columns = min(len(self.trees), max(1, int(ROW // self.panel[0])))
        rows = -(-len(self.trees) // self.columns)
        width = max(MARGIN + self.columns * self.panel[0], 4.4)
        self.key = KEY if width > 9 else NARROW_KEY
        self.title = self._title(title, int(11 * width))
        self.top = 0.15 + LINE * len(self.title)
        self.size = width, self.top + rows * (self.panel[1] + HEADING) + self.key

    @property
    def labelled(self) -> bool:
        """Whether the numbers of the slices can be read."""
        return self.node / 2 >= SMALLEST_LABEL

    def _trees(self) -> list[Tree]:
        """A tree for each shard; of many shards, for each kind of tree that there is."""
        stages: list[list[Stage]] = [[] for _ in range(self.plan.num_shards)]
        for stage in self.states:
            stages[stage.shard].append(stage)
        kinds: dict[object, list[int]] = {}
        for shard, own in enumerate(stages):
            look = tuple((stage.prefix, self.states[stage]) for stage in own)
            kinds.setdefault(look if self.plan.num_shards > MOST_PANELS else shard, []).append(shard)
        return [Tree.of(shards, stages[shards[0]]) for shards in list(kinds.values())[:MOST_PANELS]]

    def _title(self, title: str | None, characters: int) -> list[str]:
        live = sum(state != "missing" for state in self.states.values())
        default = f"{live} of {len(self.states)} stages live; the plan costs {self.cost} slice passes"
        notes = [title or default]
        shown, shards = sum(len(tree.shards) for tree in self.trees), self.plan.num_shards
        if shards > MOST_PANELS:
            rest = f"; the other {shards - shown} look different again" if shown < shards else ""
            notes.append(f"({shown} of {shards} shards, drawn once where they look the same{rest})")
        if not self.labelled:
            notes.append("(too many stages for the numbers of their slices)")
        return [line for note in notes for line in textwrap.wrap(note, characters)]

    def draw(self, figure: Figure) -> None:
        """Draw at the top of a figure that is at least as large as `size`."""
        width, height = figure.get_size_inches()
        start = max(MARGIN, (width - self.columns * self.panel[0]) / 2)
        for number, tree in enumerate(self.trees):
            row, column = divmod(number, self.columns)
            left = start + column * self.panel[0]
            bottom = height - self.top - (row + 1) * (self.panel[1] + HEADING)
            box = (left / width, bottom / height, self.panel[0] / width, self.panel[1] / height)
            self._draw_tree(figure.add_axes(box), tree, first=column == 0)
        figure.text(0.5, 1 - 0.1 / height, "\n".join(self.title), ha="center", va="top", fontsize=11, parse_math=False)
        counts = {state: list(self.states.values()).count(state) for state in NODES}
        figure.legend(
            figure.axes[0].collections,
            [f"{MEANINGS[state]} ({counts[state]})" for state in NODES],
            title="The number in a stage is the slice that it adds." if self.labelled else None,
            loc="upper center",
            bbox_to_anchor=(0.5, (height - self.size[1] + self.key) / height),
            ncols=3 if self.key == KEY else 1,
            fontsize=8,
            title_fontsize=8,
            labelspacing=0.9,
            markerscale=12 / self.node,
            frameon=False,
        )

    def _draw_tree(self, axes: Axes, tree: Tree, first: bool) -> None:
        half = self.panel[0] / self.slot / 2
        middle = (tree.leaves - 1) / 2
        axes.set_xlim(middle - half, middle + half)
        axes.set_ylim(self.depth + 0.5, 0)
        axes.set_title(self._heading(tree), fontsize=8.5, pad=16)  # points, above the base model
        axes.spines[:].set_visible(False)
        step = math.ceil(0.25 / self.level)  # labels of the axis need a quarter of an inch
        axes.set_xticks([])
        axes.set_yticks(range(1, self.depth + 1, step) if first else [])
        axes.tick_params(length=0, labelsize=8)
        axes.set_ylabel("layer group" if first else "", fontsize=8)
        for state, look in NODES.items():
            stages = [stage for stage in tree.across if self.states[stage] == state]
            self._draw_edges(axes, tree, stages, state)
            places = [tree.across[stage] for stage in stages], [stage.depth for stage in stages]
            axes.scatter(*places, s=self.node**2, linewidths=max(0.6, self.node / 13), zorder=2, gid=state, **look)
        if self.labelled:
            self._draw_numbers(axes, tree)
        axes.text(tree.root, 0, "base model", fontsize=8, ha="center", va="bottom")

    def _draw_numbers(self, axes: Axes, tree: Tree) -> None:
        """In each stage the slice that it adds."""
        for stage, x in tree.across.items():
            number, colour = str(stage.prefix[-1]), "white" if self.states[stage] == "served" else BLACK
            size = self.node / (2 if len(number) < 3 else 2.6)
            axes.text(x, stage.depth, number, color=colour, fontsize=size, ha="center", va="center_baseline")

    def _draw_edges(self, axes: Axes, tree: Tree, stages: Iterable[Stage], state: str) -> None:
        """One line with gaps: from each parent down half a layer group, across, and down to the stage."""
        x: list[float] = []
        y: list[float] = []
        for stage in stages:
            above, here = tree.across[stage.parent] if stage.parent else tree.root, tree.across[stage]
            x += [above, above, here, here, float("nan")]
            y += [stage.depth - 1, stage.depth - 0.5, stage.depth - 0.5, stage.depth, float("nan")]
        look = EDGES[state]
        axes.plot(x, y, **{**look, "linewidth": look["linewidth"] * max(0.4, self.node / LARGEST_NODE)})

    def _heading(self, tree: Tree) -> str:
        shard, others = tree.shards[0], len(tree.shards) - 1
        served = len(self.served.get(shard, ()))
        state = f"serves {served} of {self.plan.num_slices} slices" if served else "dead"
        return f"shard {shard}{f' and {others} more' if others else ''}\n{state}"
