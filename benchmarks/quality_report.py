"""The report of `quality.py`: figures over seeds, tables, curves, and the marked sections of pages.

Reads the files of finished parts; what is not finished is left out, and the tables say over how many seeds they are.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from quality_tasks import Settings
from scipy.stats import t as student

REPOSITORY = Path(__file__).resolve().parent.parent
Found = dict[str, dict[int, dict[str, Any]]]  # figures by part and seed
Row = Sequence[str]

TASKS = {  # title, part, split, measure
    "SST-2, L=3, 10,000 rows cut from train": ("a_sst2", "test", "accuracy"),
    "SST-2, L=3, official validation": ("a_sst2", "official", "accuracy"),
    "RTE, rows cut from train": ("a_rte", "test", "loss"),
    "CIFAR-10, five classes": ("a_vision", "test", "accuracy"),
    "Alpaca, held-out responses": ("a_alpaca", "test", "loss"),
}
SETTINGS = {  # of Alpaca: title, part, and where in its figures
    "layer groups, r=16 (the default)": ("a_alpaca", "layer_group"),
    "rank groups, r=6 (recommended)": ("a_alpaca", "rank_group"),
    "rank groups, r=3": ("d_alpaca_rank_3", None),
    "rank groups, r=16": ("d_alpaca_rank_16", None),
    "all, r=16": ("d_alpaca_all", None),
    "layer groups, r=32": ("d_alpaca_layer_32", None),
    "layer groups, r=16, rsLoRA": ("d_alpaca_layer_rslora", None),
    "rank groups, r=6, replay 0.5": ("d_alpaca_replay_50", None),
    "rank groups, r=6, replay 0": ("d_alpaca_replay_0", None),
    "wedge, r=10 (experiment)": ("d_alpaca_wedge", None),
    "rank groups, r=6, learning rate / sqrt(depth)": ("d_alpaca_depth_rate", None),
}
SST2_SETTINGS = {
    "layer groups, r=16, 2 layers per slice (the default)": ("a_sst2", "layer_group"),
    "rank groups, r=5": ("d_sst2_rank_5", None),
    "all, r=16": ("d_sst2_all", None),
    "layer groups, r=16, 1 layer per slice": ("d_sst2_layers_1", None),
    "layer groups by hand, top-down (experiment)": ("d_sst2_by_hand", "top_down"),
    "layer groups by hand, bottom-up (experiment)": ("d_sst2_by_hand", "bottom_up"),
    "layer groups by hand, head trained in stage 1 only (experiment)": ("d_sst2_by_hand", "head_once"),
}
VISION_SETTINGS = {
    "layer groups, r=16, 2 layers per slice (the default)": ("a_vision", "layer_group"),
    "rank groups, r=5": ("d_vision_rank_5", None),
    "all, r=16": ("d_vision_all", None),
    "layer groups by hand, top-down (experiment)": ("d_vision_by_hand", "top_down"),
    "layer groups by hand, bottom-up (experiment)": ("d_vision_by_hand", "bottom_up"),
    "layer groups by hand, head trained in stage 1 only (experiment)": ("d_vision_by_hand", "head_once"),
}
WAYS = {
    "s3t_cyclic": "S3T, rotation",
    "s3t_optimal": "S3T, optimal tree of 10 slice passes",
    "sisa": "SISA",
    "full": "full retraining",
}


def commit_of() -> str | None:
    """The commit that runs."""
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None


def load(results: Path, settings: Settings) -> Found:
    """Finished parts of these settings."""
    wanted = json.loads(json.dumps(asdict(settings)))
    found: Found = {}
    for file in sorted(results.glob("*-*.json")):
        one = json.loads(file.read_text())
        if one.get("settings") == wanted:
            found.setdefault(one["part"], {})[one["seed"]] = one
    return found


# ---- figures ----


def over_seeds(found: Found, part: str, value: Callable[[dict[str, Any]], float]) -> dict[int, float]:
    """One number for each seed that is finished."""
    return {seed: value(one["figures"]) for seed, one in sorted(found.get(part, {}).items())}


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation; of one value the deviation is not known."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else float("nan")


def shown(values: Iterable[float], digits: int = 2) -> str:
    """As a cell of a table."""
    values = list(values)
    if not values:
        return "-"
    mean, deviation = spread(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def bound_of(differences: Sequence[float]) -> float:
    """Upper end of the one-sided 95 % confidence interval of a mean, by Student's t."""
    mean, deviation = spread(differences)
    return mean + float(student.ppf(0.95, len(differences) - 1)) * deviation / len(differences) ** 0.5


def setting_of(one: dict[str, Any], where: str | None) -> dict[str, Any]:
    """A setting's figures in those of a part."""
    return one["figures"] if where is None else one["figures"][where]


def lost(found: Found, part: str, where: str | None, base: str, split: str, measure: str) -> dict[int, float]:
    """By seed, how much worse a setting is than full LoRA at equal slice passes."""
    sign = 1 if measure == "accuracy" else -1
    full = {seed: one["figures"]["full_equal"][split][measure] for seed, one in found.get(base, {}).items()}
    return {
        seed: sign * (full[seed] - setting_of(one, where)[split][measure])
        for seed, one in sorted(found.get(part, {}).items())
        if seed in full
    }


def gain_shares(found: Found, part: str, where: str | None) -> dict[int, float]:
    """By seed, the part of the way from the base model's loss to full LoRA's at equal slice passes, on Alpaca, in
    percent."""
    shares = {}
    for seed, one in sorted(found.get(part, {}).items()):
        if seed in found.get("a_alpaca", {}):
            against = found["a_alpaca"][seed]["figures"]
            start, end = against["layer_group"]["by_length"][0]["loss"], against["full_equal"]["test"]["loss"]
            gained, possible = start - setting_of(one, where)["test"]["loss"], start - end
            shares[seed] = 100 * gained / possible if possible else float("nan")  # of a few rows nothing may be gained
    return shares


def figures_of(found: Found) -> dict[str, Any]:
    """All figures by name, with `_std` over seeds."""
    values: dict[str, dict[int, float]] = {}
    for way, name in (("full_equal", "full"), ("full", "full_same_epochs"), ("layer_group", "s3t")):
        values[f"sst2_{name}"] = over_seeds(found, "a_sst2", lambda f, way=way: f[way]["test"]["accuracy"])
    values["sst2_lost"] = lost(found, "a_sst2", "layer_group", "a_sst2", "test", "accuracy")
    values["vision_lost"] = lost(found, "a_vision", "layer_group", "a_vision", "test", "accuracy")
    values["alpaca_gain_share"] = gain_shares(found, "a_alpaca", "rank_group")
    values["alpaca_gain_share_layer_group"] = gain_shares(found, "a_alpaca", "layer_group")
    values["alpaca_stored_share"] = over_seeds(
        found, "a_alpaca", lambda f: f["rank_group"]["lora_numbers"] / f["full_equal"]["lora_numbers"]
    )
    figures: dict[str, Any] = {}
    for name, by_seed in values.items():
        if by_seed:
            figures[name], deviation = spread(by_seed.values())
            if len(by_seed) > 1:
                figures[f"{name}_std"] = deviation
    if len(values["sst2_lost"]) > 1:
        figures["sst2_lost_bound"] = bound_of(list(values["sst2_lost"].values()))
    figures["prefixes_below_base"] = below_base(found)
    figures["parts"] = {part: sorted(seeds) for part, seeds in found.items()}
    figures["seconds"] = {f"{part}-{seed}": one["seconds"] for part, s in found.items() for seed, one in s.items()}
    figures["by_part"] = {part: {str(s): one["figures"] for s, one in seeds.items()} for part, seeds in found.items()}
    return figures


def below_base(found: Found) -> list[str]:
    """Prefixes whose mean loss over the seeds is above the bare base model's."""
    worse = []
    for part, where in (("a_sst2", "layer_group"), ("a_rte", "layer_group"), ("a_vision", "layer_group"),
                        ("a_alpaca", "layer_group"), ("a_alpaca", "rank_group"), ("a_sst2_l6", None)):  # fmt: skip
        runs = [setting_of(one, where) for one in found.get(part, {}).values()]
        lengths = zip(*(run["by_length"] for run in runs), strict=True)
        means = [statistics.fmean(score["loss"] for score in scores) for scores in lengths]
        worse += [f"{part} {where or ''} {length}" for length, mean in enumerate(means) if mean > means[0]]
    return worse


# ---- tables ----


def table(title: str, head: Row, rows: Iterable[Row]) -> str:
    """As Markdown."""
    lines = [f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def against_full(found: Found) -> str:
    rows = []
    for title, (part, split, measure) in TASKS.items():
        ways = {
            way: over_seeds(found, part, lambda f, way=way, s=split, m=measure: f[way][s][m])
            for way in ("full", "full_equal", "layer_group")
        }
        base = over_seeds(found, part, lambda f, m=measure: f["layer_group"]["by_length"][0][m])
        if base:
            worse = lost(found, part, "layer_group", part, split, measure)
            digits = 2 if measure == "accuracy" else 3
            values = (base, ways["full"], ways["full_equal"], ways["layer_group"])
            cells = [shown(value.values(), digits) for value in values]
            rows.append([title, measure, *cells, shown(worse.values(), digits), str(len(base))])
    head = ["task", "measure", "base, untrained head", "full LoRA, same epochs", "full LoRA, equal slice passes",
            "slice-wise, layer groups", "lost, paired", "seeds"]  # fmt: skip
    return table("Slice-wise against full training, one shard", head, rows)


def by_length(found: Found) -> str:
    rows = []
    cases = (
        ("SST-2, L=3", "a_sst2", "layer_group", "accuracy"), ("SST-2, L=6", "a_sst2_l6", None, "accuracy"),
        ("RTE, L=3", "a_rte", "layer_group", "loss"), ("CIFAR-10, L=3", "a_vision", "layer_group", "accuracy"),
        ("Alpaca, layer groups, L=5", "a_alpaca", "layer_group", "loss"),
        ("Alpaca, rank groups r=6, L=5", "a_alpaca", "rank_group", "loss"),
    )  # fmt: skip
    for title, part, where, measure in cases:
        runs = [setting_of(one, where) for one in found.get(part, {}).values()]
        for name in ("by_length", "head_alone"):
            kept = [run[name] for run in runs if name in run]
            if kept:
                digits = 2 if measure == "accuracy" else 3
                cells = [shown((s[measure] for s in scores), digits) for scores in zip(*kept, strict=True)]
                cells = (["-"] if name == "head_alone" else []) + cells
                what = title if name == "by_length" else "its heads, LoRA off"
                rows.append([what, measure, *cells, *["-"] * (7 - len(cells))])
    return table("By length of the prefix", ["task", "measure", *map(str, range(7))], rows)


def streams_table(found: Found) -> str:
    runs = [one["figures"] for one in found.get("c_sst2", {}).values()]
    if not runs:
        return ""
    steps = len(runs[0]["curves"]["s3t_cyclic"]["mean"])
    after = [number for number in (0, 1, 2, 5, 10, 20, 30, 40) if number < steps]
    rows = []
    for way in ("s3t_cyclic", "s3t_optimal"):
        rows.append([WAYS[way], *(shown(run["curves"][way]["mean"][number] for run in runs) for number in after)])
    retrained = [one["accuracy"] for run in runs for one in run["sisa_retrained"]]
    rows.append([WAYS["sisa"], shown(run["sisa_accuracy"] for run in runs)] + ["-"] * (len(after) - 1))
    rows.append([f"SISA, after each of {len(retrained)} real retrainings", "-", shown(retrained)])
    rows[-1] += ["-"] * (len(after) - 2)
    rows.append(["full retraining", *["-"] * (len(after) - 1), shown(run["full_accuracy"] for run in runs)])
    title = f"Accuracy over requests, mean over streams; ± over {len(runs)} seeds"
    parts = [table(title, ["served by", *(f"after {number}" for number in after)], rows)]
    first = runs[0]["storage"]
    rows = [
        [str(one["budget"]), str(one["slice_passes"]), f"{one['bytes'] / 1e6:.1f}", f"{one['first_shard_dead']:.1f}",
         f"{one['life']:.1f}"]
        for one in first
    ]  # fmt: skip
    rows.append(["SISA", "-", f"{runs[0]['sisa_bytes'] / 1e6:.1f}", "-", "retrains at each request"])
    head = ["B", "slice passes per epoch", "stored MB", "requests until a shard is dead", "until nothing is left"]
    parts.append(table("Storage and life against the budget, without repair", head, rows))
    rows = []
    for way in ("s3t_cyclic", "s3t_optimal", "sisa", "full"):
        spent = [run["over_requests"][way] for run in runs]
        rows.append(
            [WAYS[way], shown((one["slice_passes"] for one in spent), 0),
             shown((one["seconds"] / 60 for one in spent), 1), shown((one["trainings"] for one in spent), 1)]
        )  # fmt: skip
    head = ["way", "slice passes", "minutes, at the measured seconds per slice pass", "retrainings"]
    parts.append(table("Training over many requests, the first training included", head, rows))
    return "\n\n".join(parts)


def helps(found: Found) -> str:
    parts = []
    for title, settings, base, measure in (
        ("Alpaca, L=5, equal slice passes", SETTINGS, "a_alpaca", "loss"),
        ("SST-2, L=3, equal slice passes", SST2_SETTINGS, "a_sst2", "accuracy"),
        ("CIFAR-10, five classes, L=3, equal slice passes", VISION_SETTINGS, "a_vision", "accuracy"),
    ):
        rows = []
        full = [one["figures"]["full_equal"]["lora_numbers"] for one in found.get(base, {}).values()]
        for name, (part, where) in settings.items():
            runs = [setting_of(one, where) for one in found.get(part, {}).values()]
            if not runs or not full:
                continue
            digits = 3 if measure == "loss" else 2
            row = [name, f"{runs[0]['lora_numbers'] / full[0]:.2f}", f"{runs[0]['slice_passes']:g}",
                   shown((run["seconds"] for run in runs), 0),
                   shown((run["test"][measure] for run in runs), digits),
                   shown(lost(found, part, where, base, "test", measure).values(), digits)]  # fmt: skip
            if base == "a_alpaca":
                row.append(shown(gain_shares(found, part, where).values(), 1))
            rows.append([*row, str(len(runs))])
        head = ["setting", "stored, x full LoRA", "slice passes", "seconds", measure, "lost to full LoRA, paired"]
        head += ["share of the gain, %"] * (base == "a_alpaca")
        parts.append(table(title, [*head, "seeds"], rows))
    return "\n\n".join(parts)


def short(found: Found, figures: dict[str, Any], settings: Settings) -> str:
    """The README's table: figures beside the paper's claims."""

    def cell(name: str, digits: int = 2) -> str:
        if name not in figures:
            return "-"
        return f"{figures[name]:.{digits}f}" + (
            f" ± {figures[name + '_std']:.{digits}f}" if f"{name}_std" in figures else ""
        )

    seeds = ", ".join(map(str, sorted({seed for part in found.values() for seed in part})))
    streams = ", ".join(map(str, sorted(found.get("c_sst2", {}))))
    rows = [
        ["SST-2, points lost by slice-wise training",
         f"{cell('sst2_lost')}, below {cell('sst2_lost_bound')} at 95 % (full LoRA {cell('sst2_full')} %)",
         "comparable to full training; CoLA loses 7.6",
         f"MiniLM of 6 layers, L=3, {settings.sst2.train_rows:,} rows; the paper: RoBERTa-large"],
        ["CIFAR-10, five classes, points lost", cell("vision_lost"), "comparable to full training",
         f"ViT of 6 layers, L=3, {settings.vision.train_rows:,} rows; the paper: ViT-base"],
        ["Alpaca, part of full LoRA's gain at equal slice passes, %", cell("alpaca_gain_share", 1),
         "comparable to full training; on MMLU below the untuned base after two deletions",
         f"Llama of 260 k parameters, rank groups r=6, {cell('alpaca_stored_share')} x the stored parameters"],
    ]  # fmt: skip
    rows += _brief_of_streams([one["figures"] for one in found.get("c_sst2", {}).values()], settings)
    commits = ", ".join(sorted({one["commit"] for part in found.values() for one in part.values()}))
    about = (
        f"Seeds {seeds} (streams: {streams}); {os.cpu_count()} CPU cores, {platform.machine()}; commit {commits}. "
        "Sizes and all tables are below."
    )
    return table("Quality", ["figure", "here", "the paper", "what differs"], rows) + "\n\n" + about


def _brief_of_streams(runs: list[dict[str, Any]], settings: Settings) -> list[Row]:
    if not runs:
        return []
    size = f"m={settings.shards}, L={settings.sst2.num_slices}, {settings.sst2.train_rows:,} rows"
    curves = [run["curves"]["s3t_cyclic"]["mean"] for run in runs]
    after = [f"{shown((curve[t] for curve in curves), 1)} after {t}" for t in (0, 5, 10, 20) if t < len(curves[0])]
    lives = [run["storage"][-1]["life"] / run["storage"][0]["life"] for run in runs]
    spent = [
        f"{name} {shown((run['over_requests'][way]['slice_passes'] for run in runs), 0)}"
        for way, name in (("s3t_cyclic", "S3T"), ("sisa", "SISA"), ("full", "full retraining"))
    ]
    return [
        ["SST-2, accuracy in % after deletion requests, none repaired", ", ".join(after),
         "the larger B, the later it falls (Fig. 6)", f"{size}, rotation, B=L; mean over {settings.streams} streams"],
        ["requests until nothing is left, B = L over one sequence", f"{shown(lives)} times as many",
         "of order log(m min(B, L)) over log(m)", f"expected lives, {size}"],
        [f"slice passes over {settings.many_requests:,} requests", ", ".join(spent),
         "S3T takes less time than SISA (Fig. 9)", f"expected, {size}; a dead shard of S3T is trained again"],
    ]  # fmt: skip


def rewrite(file: Path, mark: str, text: str) -> None:
    """Puts a text between `<!-- mark -->` and `<!-- /mark -->`."""
    page = file.read_text()
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{file} has no section between <!-- {mark} --> and <!-- /{mark} -->. Add the two comments.")
    file.write_text(pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page))


# ---- curves ----

BLACK, BLUE, GREEN, ORANGE = "#000000", "#0072B2", "#009E73", "#E69F00"  # of Okabe and Ito, for the colour-blind, too
PURPLE, VERMILLION = "#CC79A7", "#D55E00"


def draw(found: Found, file: Path) -> None:
    """Left accuracy over requests, right the loss by prefix length of each task, over the base model's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    runs = [one["figures"] for one in found.get("c_sst2", {}).values()]
    looks = {"s3t_cyclic": (BLUE, "-"), "s3t_optimal": (GREEN, "-.")}
    for way, (color, line) in looks.items():
        if runs:
            curves = [run["curves"][way]["mean"] for run in runs]
            mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            left.plot(mean[:80], color=color, linestyle=line, label=WAYS[way])
    for name, key, color in (("sisa", "sisa_accuracy", VERMILLION), ("full", "full_accuracy", BLACK)):
        if runs:
            level = statistics.fmean(run[key] for run in runs)
            left.axhline(level, color=color, linestyle=":", label=f"{WAYS[name]} (retrains at each request)")
    left.set(xlabel="deletion requests, no repair", ylabel="SST-2 accuracy, %")
    if runs:
        left.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.9))
    cases = (
        ("SST-2, L=3", "a_sst2", "layer_group", BLUE, "o"), ("SST-2, L=6", "a_sst2_l6", None, PURPLE, "v"),
        ("CIFAR-10", "a_vision", "layer_group", GREEN, "D"),
        ("Alpaca, layer groups", "a_alpaca", "layer_group", ORANGE, "s"),
        ("Alpaca, rank groups r=6", "a_alpaca", "rank_group", VERMILLION, "^"),
    )  # fmt: skip
    for title, part, where, color, marker in cases:
        parts = [setting_of(one, where) for one in found.get(part, {}).values()]
        if parts:
            lengths = zip(*(run["by_length"] for run in parts), strict=True)
            losses = [statistics.fmean(score["loss"] for score in scores) for scores in lengths]
            right.plot([loss / losses[0] for loss in losses], color=color, marker=marker, label=title)
    right.set(xlabel="length of the served prefix", ylabel="held-out loss, over the base model's")
    if right.lines:
        right.legend(fontsize=8)
    figure.savefig(file, dpi=150)


# ---- everything ----


def record(settings: Settings, figures: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file holds."""
    libraries = ("hf_s3t", "torch", "transformers", "peft", "accelerate", "datasets")
    return {
        "name": "quality",
        "commit": commit_of(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "settings": asdict(settings),
        "figures": figures,
    }


def report(
    results: Path, settings: Settings, *, json_file: Path | None = None, plot: Path | None = None,
    docs: Path | None = None, readme: Path | None = None,
) -> None:  # fmt: skip
    """Joins what is finished: prints the tables, writes the files that are asked for."""
    found = load(results, settings)
    figures = figures_of(found)
    sections = {
        "against-full": against_full(found), "by-length": by_length(found), "streams": streams_table(found),
        "helps": helps(found),
    }  # fmt: skip
    brief = short(found, figures, settings)
    print("\n\n".join([brief, *filter(None, sections.values())]))
    if figures["prefixes_below_base"]:
        print(f"\nworse than the bare base model: {', '.join(figures['prefixes_below_base'])}")
    if json_file:
        json_file.write_text(json.dumps(record(settings, figures), indent=1) + "\n")
    if plot:
        draw(found, plot)
    if docs:
        for mark, text in sections.items():
            rewrite(docs, mark, text)
    if readme:
        rewrite(readme, "quality", brief)
