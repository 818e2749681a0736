"""The report of `privacy.py`: figures with intervals over seeds, verdicts, and the marked tables of a page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from privacy_attacks import Pair, auc, blind_exposure, interval, lira, rate_at_few, resampled
from privacy_subjects import DIGITS
from quality_report import record, rewrite, table

Found = dict[str, list[dict[str, Any]]]  # finished parts by task
TITLES = {"alpaca": "Alpaca", "sst2": "SST-2", "loss": "loss", "min_k": "min-k%", "lira": "LiRA"}
# Whose signals, less whose; and the shadows that are like that.
SCORES: dict[str, tuple[str, str | None, str | None]] = {
    "before": ("before", None, "whole"),
    "after": ("after", None, "part"),
    "repaired": ("repaired", None, "whole"),
    "two_models": ("before", "after", "difference"),
    "two_models_repaired": ("before", "repaired", None),
    "no_old": ("repaired", "after", "difference"),
}
HEADLINES = ("before", "after", "repaired", "two_models")
# Whose scores; the kinds that are looked for, and from which they are told; and what the table says.
COMPARISONS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], str]] = {
    "before": ("before", ("deleted",), ("never",), "before the deletion: deleted or never seen (control)"),
    "after": ("after", ("deleted",), ("never",), "after the deletion: deleted or never seen"),
    "after_control": ("after", ("kept",), ("never",), "after the deletion: still served or never seen (control)"),
    "repaired": ("repaired", ("deleted",), ("never",), "after the repair: deleted or never seen"),
    "repaired_control": (
        "repaired", ("mate", "kept"), ("never",), "after the repair: trained on or never seen (control)",
    ),
    "no_old": ("no_old", ("deleted",), ("never",), "both models since the deletion: deleted or never seen"),
    "two_models": ("two_models", ("deleted",), ("never",), "models before and after: deleted or never seen"),
    "hit_slice": (
        "two_models", ("deleted", "mate"), ("kept",), "models before and after: slice that was hit or the other",
    ),
    "mates": ("two_models", ("deleted",), ("mate",), "models before and after: deleted or of the same slice"),
    "mates_repaired": (
        "two_models_repaired", ("deleted",), ("mate",), "models before and repaired: deleted or of the same slice",
    ),
}  # fmt: skip
CONTROLS = ("before", "after_control", "repaired_control")
UNSEEN = ("after", "repaired", "no_old")  # the deleted rows are to be as those never seen
ENOUGH_NEVER = 200  # of all seeds, for the rate at 1 % false positives
CONTROL_AUC = 0.6
CONTROL_BITS = 2.0  # above what blind guessing has


def load(results: Path, settings: Any) -> Found:
    """What is finished of these settings, with the scores of all attacks that it allows, by task."""
    found: Found = {}
    for name in ("alpaca", "sst2"):
        wanted = asdict(getattr(settings, name))
        files = {kind: sorted(results.glob(f"{name}-{kind}-*.json")) for kind in ("seed", "shadow")}
        read = {kind: [json.loads(file.read_text()) for file in files[kind]] for kind in files}
        seeds, shadows = ([one for one in read[kind] if one["settings"] == wanted] for kind in files)
        if seeds:
            found[name] = [part | part["found"] | {"scores": scores(part["found"], shadows)} for part in seeds]
    return found


def scores(found: dict[str, Any], shadows: list[dict[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """The scores of all rows of a pool, by what is asked and attack; without shadow stores there is no `lira`."""
    by_model: dict[str, dict[str, np.ndarray]] = {}
    for name, (minuend, subtrahend, like) in SCORES.items():
        observed = {signal: np.array(values) for signal, values in found["signals"][minuend].items()}
        if subtrahend:
            observed = {signal: observed[signal] - found["signals"][subtrahend][signal] for signal in observed}
        by_model[name] = dict(observed)
        if like and shadows:
            seen, values = (
                np.concatenate([np.array(one["found"][like][part]) for one in shadows]) for part in ("seen", "signals")
            )
            by_model[name]["lira"] = lira(observed["loss"], values, seen)
    return by_model


# ---- figures ----


def pairs_of(parts: list[dict[str, Any]], comparison: str, attack: str) -> list[Pair]:
    """Of each seed the scores of the two kinds of rows."""
    when, first, other, _ = COMPARISONS[comparison]
    pairs = []
    for part in parts:
        kinds, values = np.array(part["kinds"]), np.array(part["scores"][when][attack])
        pairs.append((values[np.isin(kinds, first)], values[np.isin(kinds, other)]))
    return pairs


def with_interval(name: str, value: float, replicates: np.ndarray) -> dict[str, float]:
    """A figure with its 95 % interval."""
    low, high = interval(replicates)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def membership(found: Found, random: np.random.Generator) -> dict[str, float]:
    """Areas under the curve and true positives at 1 % false ones; then the means over tasks of the best attack."""
    figures: dict[str, float] = {}
    replicates: dict[str, np.ndarray] = {}
    for task, parts in found.items():
        for comparison, (when, *_) in COMPARISONS.items():
            for attack in parts[0]["scores"][when]:
                pairs = pairs_of(parts, comparison, attack)
                name = f"{task}_mia_auc_{comparison}_{attack}"
                replicates[name] = resampled(pairs, auc, random)
                figures |= with_interval(name, float(np.mean([auc(*pair) for pair in pairs])), replicates[name])
                first, other = (np.concatenate(scores) for scores in zip(*pairs, strict=True))
                if comparison in HEADLINES and len(other) >= ENOUGH_NEVER:
                    drawn = resampled([(first, other)], rate_at_few, random)
                    name = f"{task}_mia_tpr_{comparison}_{attack}"
                    figures |= with_interval(name, float(rate_at_few(first, other)), drawn)
    best = best_attacks(figures)
    for comparison in HEADLINES:
        names = [f"{task}_mia_auc_{comparison}_{best[task]}" for task in found]
        mean = float(np.mean([figures[name] for name in names]))
        figures |= with_interval(f"mia_auc_{comparison}", mean, np.mean([replicates[name] for name in names], axis=0))
    return figures


def best_attacks(figures: dict[str, float]) -> dict[str, str]:
    """By task the attack that finds members best before the deletion; what it does afterwards plays no part."""
    found: dict[str, tuple[float, str]] = {}
    for name, value in figures.items():
        task, _, attack = name.partition("_mia_auc_before_")
        if attack in ("loss", "min_k", "lira"):
            found[task] = max(found.get(task, (0.0, "")), (value, attack))
    return {task: attack for task, (_, attack) in found.items()}


def canaries(found: Found, random: np.random.Generator) -> dict[str, float]:
    """Exposures in bits of canaries that were planted and deleted, and before it of others that never were planted."""
    figures: dict[str, float] = {}
    if "alpaca" in found:
        cases = {when: (when, "deleted") for when in ("before", "after", "repaired")} | {"never": ("before", "never")}
        for name, (when, kind) in cases.items():
            samples = [[np.array(part["exposures"][when][kind])] for part in found["alpaca"]]
            mean = float(np.mean([values.mean() for (values,) in samples]))
            drawn = resampled(samples, partial(np.mean, axis=-1), random)
            figures |= with_interval(f"canary_exposure_{name}", mean, drawn)
        figures["canary_exposure_blind"] = blind_exposure(10**DIGITS)
    return figures


# ---- verdicts ----


def verdicts(figures: dict[str, float]) -> list[tuple[bool, str]]:
    """What the figures show: whether the attacks find members at all, and whether they find deleted ones.

    Returns:
        `list`: for each line, whether it is as it should be, and the line.
    """
    found = []
    for task, attack in best_attacks(figures).items():
        for comparison in [*CONTROLS, *UNSEEN]:
            low, high = (figures[f"{task}_mia_auc_{comparison}_{attack}_{end}"] for end in ("low", "high"))
            if comparison in CONTROLS:
                right = low > CONTROL_AUC
                text = "the attack works" if right else "CONTROL FAILED: it finds no member, so it shows nothing"
            else:
                right = low <= 0.5
                text = "LEAK" if not right else "as rows never seen" if high >= 0.5 else "below chance: look at it"
            about = f"{TITLES[task]}, {TITLES[attack]}, {COMPARISONS[comparison][3]}"
            found.append((right, f"{about}: {low:.3f} to {high:.3f}: {text}"))
    blind = figures.get("canary_exposure_blind")
    for when in ("before", "after", "repaired") if blind else ():
        low, high = figures[f"canary_exposure_{when}_low"], figures[f"canary_exposure_{when}_high"]
        right = low > blind + CONTROL_BITS if when == "before" else low <= blind
        texts = {
            ("before", True): "the attack works", ("before", False): "CONTROL FAILED: no canary is found",
        }.get((when, right), "as codes never planted" if right else "LEAK")  # fmt: skip
        found.append((right, f"canaries, {when}: {low:.2f} to {high:.2f} bits, blind {blind:.2f}: {texts}"))
    return found


# ---- tables ----


def cell(figures: dict[str, float], name: str, digits: int = 3) -> str:
    """A figure with its interval."""
    if name not in figures:
        return "-"
    value, low, high = (figures[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def membership_table(found: Found, figures: dict[str, float]) -> str:
    """A line per comparison, a column per task and attack."""
    columns = [(task, attack) for task, parts in found.items() for attack in parts[0]["scores"]["before"]]
    head = ["asked, and what is told apart", *(f"{TITLES[task]}, {TITLES[attack]}" for task, attack in columns)]
    rows = [
        [text, *(cell(figures, f"{task}_mia_auc_{name}_{attack}") for task, attack in columns)]
        for name, (*_, text) in COMPARISONS.items()
    ]
    return table("Area under the curve, 0.5 is chance", head, rows)


def rates_table(found: Found, figures: dict[str, float]) -> str:
    """The same for true positives at 1 % false ones, in percent."""
    columns = [(task, attack) for task, parts in found.items() for attack in parts[0]["scores"]["before"]]
    head = ["deleted or never seen", *(f"{TITLES[task]}, {TITLES[attack]}" for task, attack in columns)]
    percent = {name: 100 * value for name, value in figures.items() if "_mia_tpr_" in name}
    rows = [
        [when.replace("_", " "), *(cell(percent, f"{task}_mia_tpr_{when}_{attack}", 1) for task, attack in columns)]
        for when in HEADLINES
    ]
    return table("True positives in percent, at no more than 1 % false ones, all seeds together", head, rows)


def canary_table(figures: dict[str, float]) -> str:
    """Exposures in bits."""
    titles = {
        "before": "planted, before the deletion", "after": "after the deletion", "repaired": "after the repair",
        "never": "other codes, never planted, before the deletion",
    }  # fmt: skip
    rows = [[title, cell(figures, f"canary_exposure_{name}", 2)] for name, title in titles.items()]
    rows.append(["a model that knows nothing, by calculation", f"{figures['canary_exposure_blind']:.2f}"])
    return table(f"Exposure in bits; {np.log2(10**DIGITS):.2f} is the most", ["canaries", "exposure"], rows)


def summary_table(figures: dict[str, float]) -> str:
    """The figures that sum it up."""
    rows = [[f"`mia_auc_{name}`", cell(figures, f"mia_auc_{name}")] for name in HEADLINES]
    rows += [
        [f"`canary_exposure_{name}`", cell(figures, f"canary_exposure_{name}", 2)]
        for name in ("before", "after", "repaired") if f"canary_exposure_{name}" in figures
    ]  # fmt: skip
    title = "In short: the best attack, mean of the tasks; and canaries, in bits"
    return table(title, ["figure", "value (95 % interval)"], rows)


def sizes(found: Found) -> str:
    """How many rows and canaries of each kind, which seeds and which commit."""
    lines = []
    for task, parts in found.items():
        kinds = [part["kinds"] for part in parts]
        counted = ", ".join(
            f"{sum(one.count(kind) for one in kinds)} {title}"
            for kind, title in {"deleted": "deleted", "mate": "others of their slice", "kept": "of the other slice",
                                "never": "never seen"}.items()
        )  # fmt: skip
        planted = sum(len(part["exposures"]["before"].get("deleted", ())) for part in parts)
        more = f", {planted} canaries deleted" if planted else ""
        lines.append(f"{TITLES[task]}: {counted}{more}; seeds {_listed(part['number'] for part in parts)}; "
                     f"commit {_listed({part['commit'] for part in parts})}.")  # fmt: skip
    return "Rows of all seeds. " + " ".join(lines)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


def report(results: Path, settings: Any, *, json_file: Path | None = None, docs: Path | None = None) -> int:
    """Joins what is finished: prints tables and verdicts, and writes the files that are asked for.

    Returns:
        `int`: 0, or 1 if a control failed or something leaks.
    """
    found = load(results, settings)
    if not found:
        raise SystemExit(f"Nothing of these settings is finished in {results}.")
    random = np.random.default_rng(0)
    figures = membership(found, random) | canaries(found, random)
    lines = verdicts(figures)
    tables = [summary_table(figures), membership_table(found, figures), rates_table(found, figures)]
    tables += [canary_table(figures)] if "canary_exposure_blind" in figures else []
    text = "\n\n".join([*tables, sizes(found)])
    print("\n" + text + "\n\n" + "\n".join(line for _, line in lines), flush=True)
    if json_file:
        more = {"verdicts": [line for _, line in lines]}
        more |= {"seconds": {task: [part["seconds"] for part in parts] for task, parts in found.items()}}
        written = record(settings, figures | more) | {"name": "privacy"}
        json_file.write_text(json.dumps(written, indent=1) + "\n")
    if docs:
        rewrite(docs, "privacy", text)
    return 0 if all(right for right, _ in lines) else 1
