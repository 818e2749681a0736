"""The pictures: what stands in them equals what the plan and the simulator say, and no label hides another."""

import subprocess
import sys
import textwrap
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from hf_s3t.plan.life import cyclic_slices_in_use, sisa_cost_per_request
from hf_s3t.plan.optimal import optimal
from hf_s3t.plan.sequences import cyclic, prune_orders, random_orders, spaced, training_cost
from hf_s3t.plan.survival import Lattice, weights_after
from hf_s3t.plan.tree import Plan, Stage
from hf_s3t.planner import pictures
from hf_s3t.planner.arrivals import DeletionRequests, RepairPolicy
from hf_s3t.planner.comparison import Retention, courses, default_horizon, from_now_on
from hf_s3t.planner.pictures import draw_plan, draw_retention, draw_slices_in_use, draw_store, draw_tree
from hf_s3t.planner.simulate import simulate, simulate_full_retraining, simulate_sisa

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
    "40 slices": (Plan.make(1, 40, spaced(40, 3)), None),
    "three digits": (Plan.make(1, 130, spaced(130, 2)), None),
    "80 leaves": (Plan.make(1, 8, random_orders(8, 80, seed=0)), None),
    "168 leaves": (Plan.make(1, 16, PREFIXES[::20], prune=False), None),
}
LARGE = {"16 slices", "40 slices", "168 leaves"}


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
    assert "30 of 30 shards" in figure.texts[0].get_text()
    assert overlapping(figure) == []


@pytest.mark.slow
def test_more_than_twelve_kinds_of_shards(tmp_path):
    plan = Plan.make_per_shard(4, [[order] for order in random_orders(4, 14, seed=0)])
    figure = draw_tree(plan, None, tmp_path / "tree.png", title="A title that costs $5 or $6, " * 8)
    assert len(figure.axes) == 12
    assert "12 of 14 shards" in figure.texts[0].get_text()
    assert "2 look different again" in figure.texts[0].get_text().replace("\n", " ")
    assert overlapping(figure) == []


@pytest.mark.slow
def test_a_very_large_plan_has_no_numbers_and_says_so(tmp_path):
    plan = Plan.make(1, 16, PREFIXES[::10], prune=False)
    figure = draw_tree(plan, None, tmp_path / "tree.pdf")
    assert len(figure.axes[0].texts) == 1
    assert "too many stages" in figure.texts[0].get_text()


def line(axes, name):
    return next(line for line in axes.lines if line.get_label() == name)


def test_slices_in_use_are_the_simulators(tmp_path):
    policy, settings = RepairPolicy(below=2), {"streams": 50, "seed": 3, "max_requests": 30}
    figure = draw_slices_in_use(FIVE, None, tmp_path / "use.svg", policy=policy, **settings)
    above, below = figure.axes
    runs = {
        "S3T without repair": simulate(FIVE, **settings),
        "S3T, repaired below 2 slices": simulate(FIVE, None, policy, **settings),
        "SISA, retrained at once": simulate_sisa(5, 4, **settings),
        "full retraining at once": simulate_full_retraining(5, 4, **settings),
    }
    assert [drawn.get_label() for drawn in above.lines] == list(runs)
    for (name, run), cost, band in zip(runs.items(), below.lines, above.collections, strict=True):
        assert line(above, name).get_ydata() == pytest.approx(run.slices_in_use.mean)
        assert cost.get_xdata()[-1] == 30
        assert cost.get_ydata()[0] == run.training_cost
        assert cost.get_ydata()[-1] == pytest.approx(run.training_cost + run.repair_cost.mean())
        low, high = run.slices_in_use.band
        corners = band.get_paths()[0].vertices
        assert (corners[:, 1].min(), corners[:, 1].max()) == (low.min(), high.max())
    assert overlapping(figure) == []


def test_costs_grow_as_the_closed_forms_say():
    s3t, sisa, full = courses(FIVE, max_requests=64, streams=2000)
    assert set(s3t.cost) == {FIVE.cost}
    assert sisa.cost == pytest.approx(50 + sisa.moments * sisa_cost_per_request(4), rel=0.01)
    assert full.cost == pytest.approx(20 + 20 * full.moments)


def test_days(tmp_path):
    requests, policy = DeletionRequests(per_day=0.5), RepairPolicy(every_days=30)
    figure = draw_slices_in_use(
        FIVE, requests, tmp_path / "use.png", policy=policy, streams=50, horizon_days=90
    )
    run = simulate(FIVE, requests, policy, streams=50, horizon_days=90)
    drawn = line(figure.axes[0], "S3T, repaired every 30 days")
    assert drawn.get_ydata() == pytest.approx(run.slices_in_use_by_day.mean)
    assert figure.axes[1].get_xlabel() == "days"
    assert figure.axes[1].lines[1].get_xdata()[-1] == 90
    assert overlapping(figure) == []


def test_the_horizon_ends_with_the_life_of_the_plan():
    assert default_horizon(FIVE, DeletionRequests()) == 72
    assert default_horizon(FIVE, DeletionRequests(examples=2)) == 36
    assert default_horizon(SMALL, DeletionRequests(prior=[1 - 3e-9, 1e-9, 1e-9, 1e-9])) == 80
    assert default_horizon(SMALL, DeletionRequests(), trained=[]) == 1


def test_from_now_on_counts_requests_to_dead_shards():
    trained = left(FIVE, FIVE_HIT)
    curve = from_now_on(FIVE, trained, streams=4000)
    assert curve.mean[0] == sum(map(len, FIVE.served(trained).values()))
    whole = from_now_on(FIVE, FIVE.stages, streams=4000)
    assert whole.mean[10] == pytest.approx(cyclic_slices_in_use(5, 4, 10), rel=0.02)
    # One shard of five is left: after r requests, a slice of it is untouched with the chance (1 - 1/20)^r.
    one = from_now_on(FIVE, [Stage(0, (2,))], streams=4000)
    assert one.mean[10] == pytest.approx(0.95**10, rel=0.05)
    assert from_now_on(FIVE, []) is None


def test_from_now_on_is_the_sum_over_all_hit_sets():
    trained, prior = left(FIVE, FIVE_HIT), np.arange(1, 21).reshape(5, 4) / 210
    curve = from_now_on(FIVE, trained, DeletionRequests(prior), streams=20_000)
    for requests in (3, 10, 25):
        expected = 0.0
        for shard, orders in FIVE.surviving(trained).items():
            chances = [*prior[shard], 1 - prior[shard].sum()]  # the last one: the request goes to another shard
            measure = Lattice(chances)
            lengths = np.max([measure.profile(order) for order in orders], axis=0)  # by untouched set
            expected += float(weights_after(chances, requests)[::-1] @ lengths)
        assert abs(curve.mean[requests] - expected) <= 3 * curve.standard_error[requests]


def test_from_now_on_takes_as_many_slices_as_a_simulation():
    for num_slices in (64, 65):
        plan = Plan.make(2, num_slices, [tuple(range(num_slices))])
        curve = from_now_on(plan, [Stage(1, (1,)), Stage(1, (1, 63))], streams=20)
        assert curve is None if num_slices == 65 else curve.mean[0] == 2


def test_store(tmp_path):
    trained = left(FIVE, FIVE_HIT)
    figure = draw_store(FIVE, iter(trained), tmp_path / "store.png", streams=50)
    assert nodes(figure)[0] == nodes(draw_tree(FIVE, trained, tmp_path / "tree.png"))[0]
    assert figure.axes[-1].lines[0].get_ydata() == pytest.approx(from_now_on(FIVE, trained, streams=50).mean)
    assert overlapping(figure) == []


@pytest.mark.parametrize("trained", [[], SMALL.stages])
def test_store_of_one_shard(trained, tmp_path):
    figure = draw_store(SMALL, trained, tmp_path / "store.png", streams=50)
    assert len(figure.axes) == (2 if trained else 1)
    assert overlapping(figure) == []


def test_retention_equals_the_lattice(tmp_path):
    prior = [0.4, 0.3, 0.2, 0.1]
    figure = draw_retention(4, tmp_path / "retention.png", prior=prior, points=2)
    axes, lattice = figure.axes[0], Lattice(prior)
    for name, orders in {"cyclic, pruned": cyclic(4, 4), "spaced, pruned": spaced(4, 4)}.items():
        share = 100 * lattice.value(orders) / lattice.every_order
        assert line(axes, name).get_xydata()[-1] == pytest.approx([training_cost(prune_orders(orders)), share])
    assert line(axes, "cyclic, as the paper trains it").get_xdata() == pytest.approx([10, 40])
    best = line(axes, "optimal for a cost").get_xydata()
    chosen = optimal(4, cost_budget=40, prior=prior)
    assert best[-1] == pytest.approx([chosen.cost, 100 * lattice.value(chosen.orders) / lattice.every_order])
    shares = [100 * lattice.value(random_orders(4, 4, seed)) / lattice.every_order for seed in range(5)]
    assert line(axes, "random, pruned: 5 seeds").get_ydata()[-1] == pytest.approx(np.mean(shares))
    assert max(shares) in axes.collections[0].get_paths()[0].vertices[:, 1]
    assert overlapping(figure) == []


def test_retention_of_many_slices_is_sampled():
    kept = Retention(20).of([tuple(range(20))])
    harmonic = sum(1 / k for k in range(1, 21))
    assert kept.cost == 210
    assert kept.share == pytest.approx(20 * harmonic / 400, rel=0.05)


def test_plan(tmp_path):
    plan = Plan.make_per_shard(3, [spaced(3, 2), cyclic(3, 3)])
    requests = DeletionRequests(prior=[[0.2, 0.2, 0.1]] * 2)
    figure = draw_plan(plan, requests, tmp_path / "plan.png", points=2, streams=50, title="Two shards of $5")
    lattice = Lattice([0.4, 0.4, 0.2])
    shares = [lattice.value(orders) / lattice.every_order for orders in plan.sequences]
    assert line(figure.axes[0], "this plan").get_xydata()[0] == pytest.approx([plan.cost / 2, 50 * sum(shares)])
    expected = simulate(plan, requests, streams=50, max_requests=default_horizon(plan, requests)).slices_in_use.mean
    assert line(figure.axes[1], "S3T without repair").get_ydata() == pytest.approx(expected)
    assert overlapping(figure) == []


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "PNG"])
def test_suffix_says_the_format(suffix, tmp_path):
    file = tmp_path / f"tree.{suffix}"
    draw_tree(SMALL, None, str(file))
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix.lower()]
    assert file.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["tree.docx", "tree", "tree."])
def test_unknown_suffix(name, tmp_path):
    with pytest.raises(ValueError, match=r"matplotlib can not write. Use one of: .*\.pdf, .*\.png, .*\.svg"):
        draw_tree(SMALL, None, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist. Make it"):
        draw_retention(4, tmp_path / "no" / "retention.png")
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
        import hf_s3t.planner.comparison, hf_s3t.planner.tree_picture
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


def test_looks_of_lines_differ_without_colour():
    for looks in (pictures.METHODS, (pictures.S3T, pictures.REPAIRED, pictures.SISA, pictures.FULL)):
        assert all(one["marker"] != other["marker"] for one, other in combinations(looks, 2))
        assert all(one["color"] != other["color"] for one, other in combinations(looks, 2))
