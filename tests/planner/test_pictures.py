"""The picture of a plan: what stands in it equals what the plan says, and no label hides another."""

import subprocess
import sys
import textwrap
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from hf_s3t.plan.optimal import optimal
from hf_s3t.plan.sequences import cyclic, random_orders, spaced
from hf_s3t.plan.tree import Plan, Stage
from hf_s3t.planner import pictures
from hf_s3t.planner.pictures import draw_tree

SMALL = Plan.make(1, 4, cyclic(4, 4))
FIVE = Plan.make(5, 4, cyclic(4, 4))
PREFIXES = list(permutations(range(16), 3))
FIVE_HIT = {(0, 1), (2, 0), (2, 2), (3, 0), (3, 1), (3, 2), (3, 3)}


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    """Files of few pixels: labels are measured in the figure, at its own resolution."""
    monkeypatch.setattr(pictures, "DOTS_PER_INCH", 20)


def left(plan, hit):
    return [stage for stage in plan.stages if stage.slices.isdisjoint(hit)]


def nodes(figure):
    """How many markers there are of each state, and the panels' markers as `(panel, x, y)`."""
    counts, places = Counter(), []
    for number, axes in enumerate(figure.axes):
        for collection in axes.collections:
            if collection.get_gid() is not None:
                offsets = collection.get_offsets()
                counts[collection.get_gid()] += len(offsets)
                places += [(number, *map(float, offset)) for offset in offsets]
    return counts, places


def boxes(figure):
    """What each label that can be seen covers, in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    unseen = set()  # labels of ticks beyond the ends of their axis
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        unseen |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in unseen]
    found = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
    return [(name, box) for name, box in found if box.width]


def overlapping(figure):
    """Pairs of labels that cover common pixels, and labels that leave the picture."""
    found, (width, height) = boxes(figure), figure.canvas.get_width_height()
    outside = [name for name, box in found if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    found.sort(key=lambda one: one[1].x0)
    pairs = []
    for number, (name, box) in enumerate(found):
        for other, beside in found[number + 1 :]:
            if beside.x0 >= box.x1:
                break
            if beside.y0 < box.y1 and box.y0 < beside.y1:
                pairs.append((name, other))
    return pairs + outside


def narrowest_gap(figure):
    """How far neighbours in a row of a tree stand apart, in widths of a marker."""
    gaps = [np.inf]
    for axes in figure.axes:
        shown = [collection for collection in axes.collections if len(collection.get_offsets())]
        places = np.concatenate([axes.transData.transform(collection.get_offsets()) for collection in shown])
        size = max(collection.get_sizes()[0] for collection in shown) ** 0.5 * figure.dpi / 72
        order = np.lexsort((places[:, 0], places[:, 1].round(3)))
        gaps += list(np.abs(np.diff(places[order], axis=0)).max(axis=1) / size)
    return min(gaps)


TREES = {
    "one shard": (SMALL, None),
    "one sequence": (Plan.make(1, 1, [(0,)]), None),
    "after deletions, a dead shard": (FIVE, left(FIVE, FIVE_HIT)),
    "nothing trained": (SMALL, []),
    "by cost": (Plan.make(1, 8, optimal(5, cost_budget=50).orders), None),
    "16 slices": (Plan.make(2, 16, spaced(16, 16)), None),
    "three digits": (Plan.make(1, 130, spaced(130, 2)), None),
    "168 leaves": (Plan.make(1, 16, PREFIXES[::20], prune=False), None),
}
LARGE = {"16 slices", "168 leaves", "three digits"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in TREES])
def test_tree_has_every_stage_and_nothing_overlaps(name, tmp_path):
    plan, trained = TREES[name]
    figure = draw_tree(plan, trained, tmp_path / "tree.png")
    counts, places = nodes(figure)
    held = plan.stages if trained is None else trained
    served = sum(map(len, plan.served(held).values()))
    assert counts.total() == len(plan.stages)
    assert counts["missing"] == len(plan.missing(held))
    assert counts["served"] == served
    assert counts["live"] == len(plan.live(held)) - served
    assert len(set(places)) == len(places)
    assert overlapping(figure) == []
    assert narrowest_gap(figure) > 1.05


def test_node_says_the_slice_that_it_adds(tmp_path):
    axes = draw_tree(SMALL, None, tmp_path / "tree.png").axes[0]
    labels = {(text.get_position()[1], text.get_text()) for text in axes.texts if text.get_text() != "base model"}
    assert labels == {(stage.depth, str(stage.prefix[-1])) for stage in SMALL.stages}
    assert axes.yaxis_inverted()


def test_states_differ_in_shape_and_line_as_well(tmp_path):
    shown = draw_tree(SMALL, None, tmp_path / "tree.png").axes[0].collections
    looks = {(len(c.get_paths()[0].vertices), str(c.get_linestyle()), c.get_facecolor().tobytes()) for c in shown}
    assert len(looks) == 3
    assert len({look[:2] for look in looks}) == 3


def test_live_stages_of_an_older_plan_are_drawn(tmp_path):
    older = [Stage(0, (3,)), Stage(0, (3, 2)), Stage(0, (1, 3, 0))]  # the last one without its parents
    counts, _ = nodes(draw_tree(Plan.make(1, 4, [(0, 1)]), older, tmp_path / "tree.png"))
    assert counts == {"served": 2, "live": 0, "missing": 2}


def test_many_shards_are_drawn_once_where_they_look_the_same(tmp_path):
    plan = Plan.make(30, 4, cyclic(4, 4))
    figure = draw_tree(plan, left(plan, {(3, 0), (5, 1), (6, 1)}), tmp_path / "tree.png")
    headings = [axes.get_title().splitlines() for axes in figure.axes]
    assert headings == [
        ["shard 0 and 26 more", "serves 4 of 4 slices"],
        ["shard 3", "serves 3 of 4 slices"],
        ["shard 5 and 1 more", "serves 3 of 4 slices"],
    ]
    assert "(30 of 30 shards" in " ".join(figure.texts[0].get_text().split())
    assert overlapping(figure) == []


@pytest.mark.slow
def test_more_than_twelve_kinds_of_shards(tmp_path):
    plan = Plan.make_per_shard(4, [[order] for order in random_orders(4, 14, seed=0)])
    figure = draw_tree(plan, None, tmp_path / "tree.png")
    assert len(figure.axes) == 12
    assert "(12 of 14 shards" in " ".join(figure.texts[0].get_text().split())
    assert overlapping(figure) == []


@pytest.mark.slow
def test_a_very_large_plan_has_no_numbers(tmp_path):
    figure = draw_tree(Plan.make(1, 16, PREFIXES[::10], prune=False), None, tmp_path / "tree.pdf")
    assert [text.get_text() for text in figure.axes[0].texts] == ["base model"]


def test_suffix_says_the_format(tmp_path):
    for suffix in ("png", "svg", "pdf", "PNG"):
        file = tmp_path / f"tree.{suffix}"
        draw_tree(SMALL, None, str(file))
        start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix.lower()]
        assert file.read_bytes().startswith(start)
        assert list(tmp_path.iterdir()) == [file]
        file.unlink()


def test_unknown_suffix(tmp_path):
    for name in ("tree.docx", "tree", "tree."):
        with pytest.raises(ValueError, match=r"matplotlib cannot write. Use one of: .*\.pdf, .*\.png, .*\.svg"):
            draw_tree(SMALL, None, tmp_path / name)
        assert not list(tmp_path.iterdir())


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist. Make it"):
        draw_tree(SMALL, None, tmp_path / "no" / "tree.png")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_picture(tmp_path, monkeypatch):
    file = tmp_path / "tree.png"
    file.write_bytes(b"old")

    def torn(self, target, **_):
        target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pictures.Figure, "savefig", torn)
    with pytest.raises(OSError, match="disk full"):
        draw_tree(SMALL, None, file)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
def test_the_package_does_without_matplotlib_and_pictures_without_pyplot(tmp_path):
    script = f"""
        import sys
        import hf_s3t, hf_s3t.cli.main
        assert not {{"matplotlib", "hf_s3t.planner.pictures"}} & set(sys.modules)
        sys.modules["matplotlib"] = None  # an import of it now fails
        try:
            from hf_s3t.planner.pictures import draw_tree
        except ImportError as error:
            assert 'pip install "hf-s3t[plots]"' in str(error), error
        else:
            raise AssertionError("matplotlib was imported")
        del sys.modules["matplotlib"]
        from hf_s3t.planner.pictures import draw_tree
        draw_tree(hf_s3t.Plan.make(1, 2, [(0, 1)]), None, {str(tmp_path / "tree.png")!r})
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
