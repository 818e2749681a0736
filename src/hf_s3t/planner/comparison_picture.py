"""The picture of a comparison: what candidates cost until the horizon, against the slices that are in use.

Responsible for the shortlist as points; which they are is for whoever asks. matplotlib is an extra, and nothing
imports this module before a picture is asked for. Each kind has a colour of Okabe and Ito's and a shape of its own.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import write_atomic
from .advice import name
from .candidates import Candidate
from .pictures import BLACK, BLUE, DOTS_PER_INCH, VERMILLION, checked_file
from .planner import S3TPlanner

GREEN = "#009E73"
KINDS: dict[str, dict[str, Any]] = {
    "recommended": {"marker": "*", "s": 260, "color": BLUE, "zorder": 4},
    "S3T, as asked for": {"marker": "s", "s": 40, "color": BLUE, "zorder": 3},
    "S3T, others": {"marker": "o", "s": 30, "facecolors": "white", "edgecolors": BLUE, "zorder": 2},
    "baselines": {"marker": "D", "s": 40, "color": GREEN, "zorder": 3},
    "does not fit on the GPUs": {"marker": "x", "s": 110, "color": VERMILLION, "zorder": 5},
}


def draw_comparison(planner: S3TPlanner, shown: Sequence[Candidate], file: Path | str) -> Figure:
    """Draw candidates: to the right what costs more, above what keeps more in use; crossed out is what does not fit.

    Args:
        planner ([`S3TPlanner`]): What was asked.
        shown (`Sequence[Candidate]`): Its candidates that are to be drawn.
        file (`Path` or `str`): Where to write; the suffix says how, for example `.png`, `.svg` or `.pdf`.

    Returns:
        `Figure`: What was written.

    Raises:
        ValueError: If matplotlib does not know the suffix.
        FileNotFoundError: If the folder of the file does not exist.
    """
    file = checked_file(file)
    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    axes = figure.subplots()
    hours = planner.gpu_hours_per_epoch
    for kind, look in KINDS.items():
        points = [one for one in shown if kind in kinds(planner, one)]
        places = [one.epochs * (hours or 1) for one in points], [100 * one.outlook.in_use for one in points]
        if points:
            axes.scatter(*places, label=kind, gid=kind, **look)
    for one in shown:
        if one.setting.method != "S3T" or one is planner.recommended:
            place = one.epochs * (hours or 1), 100 * one.outlook.in_use
            text = name(one) + (" (cheaper)" if planner.is_cheaper_baseline(one) else "")
            above = -12 if one.outlook.in_use > 0.97 and one.setting.method == "SISA" else 7
            axes.annotate(text, place, (0, above), textcoords="offset points", fontsize=7, ha="center", color=BLACK)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_ylim(-5, 110)
    day = f"until day {planner.horizon_days:g}"
    axes.set_xlabel(f"training and repairs {day}, {'GPU hours' if hours else 'epochs over all examples'}")
    axes.set_ylabel(f"slices in use, mean {day}, %")
    gpus = f", {planner.gpus} GPUs" if planner.gpus else ""
    axes.set_title(f"{planner.examples:,} examples, {planner.requests_per_day:g} requests a day{gpus}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    picture = io.BytesIO()  # in memory first, so that no half of a picture ever stands there
    figure.savefig(picture, format=file.suffix[1:].lower(), dpi=DOTS_PER_INCH)
    write_atomic(file, picture.getvalue())
    return figure


def kinds(planner: S3TPlanner, candidate: Candidate) -> set[str]:
    """What a candidate is, in the words of [`KINDS`]."""
    if candidate.setting.method != "S3T":
        what = "baselines"
    elif candidate is planner.recommended:
        what = "recommended"
    else:
        what = "S3T, as asked for" if candidate.setting.given else "S3T, others"
    return {what} if candidate.fits else {what, "does not fit on the GPUs"}
