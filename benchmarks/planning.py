"""How much more of a model survives deletions when its plan is optimised, and how long planning takes.

No model is trained here. A plan's *retention* is the expected surviving prefix of a shard, in slices: the mean over
its first R requests, R being the expected number of requests until every slice was hit, rounded up. It is exact.

Three deletion priors: `uniform`; `zipf`, p_j ~ 1 / j; `two_level`, a quarter of the slices is 10 times likelier than
the others. Trees are searched for the mean of their values under the prior and under a uniform one, as
`hf_s3t.plan.optimal.optimal` does; judged is under the prior itself.

Compared with the paper (S3T, arXiv 2406.16257), re-implemented from its description: the cyclic rotation with B = L,
as the paper trains it (unpruned) and without the tails that survival does not need (pruned), and BMS with B = L. The
numbers in `KNOWN` were computed independently of the library, and are computed again here.

* `retention_gain_at_equal_cost_<prior>_L<L>`: what the best tree of stages at the cost of the unpruned cyclic rotation
  retains more than it, as a share. `retention_gain_over_bms_...` is over the paper's BMS instead, which costs as much.
* `cost_at_cyclic_retention_L<L>`: the least cost found whose tree retains as much as the cyclic rotation, over the
  cost of the unpruned rotation; `cost_at_pruned_cyclic_retention_L<L>`: over that of the pruned one. Uniform prior;
  the others carry their name.
* `plan_seconds_L<L>`: choosing such a tree, the median over the priors. `plan_seconds_L12_B24`: 24 sequences of 12.
* `wrong_prior_loss_B<B>`, `wrong_prior_loss_cost`: what a plan for the reversed Zipf prior retains less over its whole
  life than the rotation does, for as many sequences and for its cost; `..._alone`: had it trusted that prior alone.
* `known_missed`: how many of the known numbers did not come out.

Seconds are of CPU time, of one thread: on an idle machine that is the time that passes, and other programs do not
count.

```bash
python benchmarks/planning.py --json planning.json
python benchmarks/planning.py --slices 4 6 8
python benchmarks/planning.py --quick
```
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from hf_s3t.plan.bms import bms
from hf_s3t.plan.life import life_until_all_dead
from hf_s3t.plan.optimal import UNIFORM_SHARE, optimal
from hf_s3t.plan.search import best_orders, best_tree
from hf_s3t.plan.sequences import Order, prune_orders, rotation, training_cost
from hf_s3t.plan.survival import Lattice, set_of, subset_sums
from serving import REPOSITORY, shown, spread

ROUNDING = 1e-12  # as much of a retention counts as none
PAPER_REQUESTS = 100  # the paper's t


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    slices: tuple[int, ...] = (4, 6, 8, 12)
    priors: tuple[str, ...] = ("uniform", "zipf", "two_level")
    least_cost_priors: tuple[str, ...] = ("uniform", "zipf", "two_level")
    more: bool = True
    """Whether to search for trees for a prior alone, for 8 sequences of 8 slices, and for plans for a wrong prior."""
    repeats: int = 3


QUICK = Settings(slices=(4, 6), least_cost_priors=("uniform",), more=False, repeats=1)

KNOWN = {
    "cyclic, L=4": "1.160",
    "cyclic, L=6": "1.566",
    "every order, L=4": "1.233",
    "every order, L=6": "1.870",
    "best tree at the cost of cyclic, L=4": "1.233",
    "best tree at the cost of cyclic, L=6": "1.750",
    "life area of cyclic, uniform, L=8, B=8": "50.95",
    "life area of cyclic, zipf, L=8, B=8": "80.33",
    "life area of cyclic, two_level, L=8, B=8": "130.36",
    "life area of the paper's BMS, zipf, L=8": "78.42",
    "life area of the paper's BMS, two_level, L=8": "133.06",
    "life area of 8 sequences, uniform, L=8": "52.31",
    "life area of 8 sequences, zipf, L=8": "90.17",
    "life area of 8 sequences, two_level, L=8": "145.94",
    "no 8 sequences have more, uniform, L=8": "52.65",
    "8 slices survive, L=32, 6 requests, cyclic B=8": "0.46",
    "8 slices survive, L=32, 6 requests, 8 random orders": "0.78",
    "Lemma 2, L=4, k=1, r=3, B=4": "0.888",
    "what it overstates": "0.846",
}
"""Numbers that are known from elsewhere, to as many digits."""
FOUND = ("best tree", "life area of 8")
"""Begins what a search has found: there it is enough to come within 0.5 %, or to find something better."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="check the machinery on few slices, in under a minute")
    parser.add_argument("--slices", type=int, nargs="+", help="numbers of slices (default: 4 6 8 12; at most 16)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seed", type=int, default=0, help="of BMS beyond L sequences (default: 0)")
    return parser


# ---- priors, and the paper's choice of sequences ----


def deletion_prior(name: str, num_slices: int) -> list[float]:
    """The chance that a request hits each slice."""
    hot = num_slices // 4
    weights = {
        "uniform": [1.0] * num_slices,
        "zipf": [1 / j for j in range(1, num_slices + 1)],
        "two_level": [10.0] * hot + [1.0] * (num_slices - hot),
    }[name]
    return [weight / sum(weights) for weight in weights]


def paper_cyclic(num_slices: int) -> list[Order]:
    """The cyclic rotation with B = L."""
    return [rotation(num_slices, start) for start in range(num_slices)]


def paper_bms(prior: Sequence[float]) -> list[Order]:
    """BMS with B = L, in floating-point numbers as the paper states it.

    Step `i` gives every sequence another slice, by the matching with the highest sum of scores: `i (1 - p)^100`, where
    `p` is the chance of the longer prefix, beside what the sequence has scored so far. Later scores are so small that
    they get lost beside the first ones, and ties decide; `hf_s3t.plan.bms.bms` avoids that.
    """
    orders: list[Order] = [(slice_id,) for slice_id in range(len(prior))]
    scored = [(1 - chance) ** PAPER_REQUESTS for chance in prior]
    for step in range(2, len(prior) + 1):
        scores = np.full((len(prior), len(prior)), -np.inf)
        for row, order in enumerate(orders):
            left = 1 - sum(prior[j] for j in order)
            for j in set(range(len(prior))).difference(order):
                scores[row, j] = scored[row] + step * max(left - prior[j], 0.0) ** PAPER_REQUESTS
        rows, slices = linear_sum_assignment(scores, maximize=True)
        scored = scores[rows, slices].tolist()
        orders = [(*order, int(j)) for order, j in zip(orders, slices, strict=True)]
    return orders


# ---- retention and cost ----


def weights_over(prior: Sequence[float], requests: int) -> np.ndarray:
    """The chance of every hit set, the mean over 1 to `requests` requests, `(2^L,)`.

    `P_{r+1}(D) = P_r(D) p(D) + sum_{j in D} P_r(D - j) p_j`: sums of what is not negative, so nothing cancels.
    """
    inside = subset_sums(prior)
    current, total = np.zeros(len(inside)), np.zeros(len(inside))
    current[0] = 1.0
    for _ in range(requests):
        following = current * inside
        for j, chance in enumerate(prior):  # the middle axis of the reshaped arrays is bit j
            following.reshape(-1, 2, 1 << j)[:, 1] += chance * current.reshape(-1, 2, 1 << j)[:, 0]
        current = following
        total += current
    return total / requests


def judge(prior: list[float], requests: int) -> Lattice:
    """Retention over the first requests, under the prior itself."""
    return Lattice(prior, weights_over(prior, requests))


def searched(prior: list[float], requests: int) -> Lattice:
    """What a tree is searched for: the mean with a uniform prior."""
    uniform = [1 / len(prior)] * len(prior)
    weights = (1 - UNIFORM_SHARE) * weights_over(prior, requests) + UNIFORM_SHARE * weights_over(uniform, requests)
    return Lattice(prior, weights)


def measure_case(prior_name: str, num_slices: int, settings: Settings, seed: int) -> dict[str, Any]:
    """One prior and one number of slices: retention at equal cost, cost at equal retention, time to plan."""
    prior = deletion_prior(prior_name, num_slices)
    requests = math.ceil(life_until_all_dead([prior]).mean - 1e-9)
    measure, search, cyclic = judge(prior, requests), searched(prior, requests), paper_cyclic(num_slices)
    cost, retained = training_cost(cyclic), measure.value(cyclic)
    started = time.process_time()
    best = best_tree(search, cost)
    seconds = time.process_time() - started
    case = {
        "prior": prior_name,
        "num_slices": num_slices,
        "requests": requests,
        "cost": cost,
        "pruned_cost": training_cost(prune_orders(cyclic)),
        "cyclic": retained,
        "paper_bms": measure.value(paper_bms(prior)),
        "bms": measure.value(bms(num_slices, num_slices, prior, seed)),
        "best": measure.value(best),
        "best_cost": training_cost(best),
        "best_stages": len({order[:depth] for order in best for depth in range(1, len(order) + 1)}),
        "every_order": measure.every_order,
        "plan_seconds": seconds,
        "least_cost": None,
        "alone": None,
    }
    if settings.more and prior_name != "uniform":
        case["alone"] = measure.value(best_tree(measure, cost))
    enough = retained * (1 - ROUNDING)
    if prior_name in settings.least_cost_priors and case["best"] >= enough:

        def reaches(cost_budget: int) -> int | None:
            found = best_tree(search, cost_budget)
            return training_cost(found) if measure.value(found) >= enough else None

        case["least_cost"] = least_cost(reaches, num_slices * (num_slices + 1) // 2, case["best_cost"])
    return case


def least_cost(reaches: Callable[[int], int | None], low: int, found: int) -> int:
    """The least cost, by halving; `reaches` gives the cost of a tree within a budget that retains enough, if any."""
    while low < found:
        middle = (low + found - 1) // 2
        cheaper = reaches(middle)
        if cheaper is None:
            low = middle + 1
        else:
            found = cheaper
    return found


def case_figures(cases: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Figures by name."""
    figures = {}
    for one in cases:
        name = f"{one['prior']}_L{one['num_slices']}"
        figures[f"retention_gain_at_equal_cost_{name}"] = one["best"] / one["cyclic"] - 1
        figures[f"retention_gain_over_bms_{name}"] = one["best"] / one["paper_bms"] - 1
        if one["least_cost"] is not None:
            name = f"L{one['num_slices']}" if one["prior"] == "uniform" else name
            figures[f"cost_at_cyclic_retention_{name}"] = one["least_cost"] / one["cost"]
            figures[f"cost_at_pruned_cyclic_retention_{name}"] = one["least_cost"] / one["pruned_cost"]
    for num_slices in dict.fromkeys(one["num_slices"] for one in cases):
        seconds = [one["plan_seconds"] for one in cases if one["num_slices"] == num_slices]
        figures |= spread(f"plan_seconds_L{num_slices}", seconds)
    return figures


def planning_seconds(num_slices: int, budget: int, repeats: int) -> list[float]:
    """CPU seconds to choose a number of sequences, uniform prior."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        optimal(num_slices, budget=budget)
        seconds.append(time.process_time() - started)
    return seconds


# ---- known numbers, and a wrong prior ----


def known_numbers(cases: Sequence[dict[str, Any]], areas: dict[str, float]) -> dict[str, float]:
    """What [`KNOWN`] holds, computed here, as far as this run has it."""
    found = dict(areas)
    for one in cases:
        if one["prior"] == "uniform" and one["num_slices"] in (4, 6):
            for name in ("cyclic", "every order"):
                found[f"{name}, L={one['num_slices']}"] = one[name.replace(" ", "_")]
            found[f"best tree at the cost of cyclic, L={one['num_slices']}"] = one["best"]
    found["no 8 sequences have more, uniform, L=8"] = budget_bound(8, 8)
    # The first 8 rotations of 32: a prefix of 8 is a window of the first 15 slices. The other 17 count as one.
    chances = 6 * weights_over([1 / 32] * 15 + [17 / 32], 6) - 5 * weights_over([1 / 32] * 15 + [17 / 32], 5)
    windows = [set_of(range(start, start + 8)) for start in range(8)]
    alive = [any(not hit & window for window in windows) for hit in range(len(chances))]
    found["8 slices survive, L=32, 6 requests, cyclic B=8"] = float(chances @ alive)
    found["8 slices survive, L=32, 6 requests, 8 random orders"] = random_orders_survive(32, 8, 6, 8)
    found["Lemma 2, L=4, k=1, r=3, B=4"] = 1 - (1 - (1 - 1 / 4) ** 3) ** 4
    found["what it overstates"] = random_orders_survive(4, 1, 3, 4)
    return found


def random_orders_survive(num_slices: int, length: int, requests: int, budget: int) -> float:
    """The chance that one of some independent random orders keeps a prefix of a length, uniform: over the number of
    distinct hits `d`, the mean of `1 - (1 - q)^B`, `q = C(L - d, k) / C(L, k)`."""
    hits = [1.0] + [0.0] * num_slices
    for _ in range(requests):
        hits = [
            hits[d] * d / num_slices + (hits[d - 1] * (num_slices - d + 1) / num_slices if d else 0.0)
            for d in range(num_slices + 1)
        ]
    one = [math.comb(num_slices - d, length) / math.comb(num_slices, length) for d in range(num_slices + 1)]
    return sum(chance * (1 - (1 - q) ** budget) for chance, q in zip(hits, one, strict=True))


def budget_bound(num_slices: int, budget: int) -> float:
    """No plan of `budget` sequences is worth more over its whole life, if all slices are equally likely to be hit.

    At each length at most `min(1, B q)` of the hit sets of `d` slices leave a prefix; all of these last for
    `L / (L - d)` requests.
    """
    return sum(
        num_slices / (num_slices - d) * min(1.0, budget * math.comb(num_slices - d, k) / math.comb(num_slices, k))
        for k in range(1, num_slices + 1)
        for d in range(num_slices)
    )


def life_areas(settings: Settings) -> dict[str, float]:
    """The performance summed over the whole life of plans with 8 sequences of 8 slices."""
    areas = {}
    for name in settings.priors:
        prior = deletion_prior(name, 8)
        measure = Lattice(prior)
        areas[f"life area of cyclic, {name}, L=8, B=8"] = measure.value(paper_cyclic(8))
        if name != "uniform":
            areas[f"life area of the paper's BMS, {name}, L=8"] = measure.value(paper_bms(prior))
        if settings.more:
            areas[f"life area of 8 sequences, {name}, L=8"] = measure.value(best_orders(measure, 8))
    return areas


def missed(found: dict[str, float]) -> list[str]:
    """The known numbers that did not come out: not to all digits, or below what a search should find."""
    wrong = []
    for name, value in found.items():
        known = float(KNOWN[name])
        close = abs(value - known) <= 0.5001 * 10.0 ** -len(KNOWN[name].split(".")[1])
        if not close and not (name.startswith(FOUND) and value >= known * 0.995):
            wrong.append(name)
    return wrong


def wrong_prior() -> dict[str, float]:
    """What a plan for the reversed prior loses to the rotation, which trusts none: Zipf, 8 slices, whole life."""
    right = deletion_prior("zipf", 8)
    wrong, measure, cyclic = right[::-1], Lattice(right), paper_cyclic(8)
    cost = training_cost(cyclic)
    plans = {
        "B8": optimal(8, budget=8, prior=wrong).orders,
        "B8_alone": best_orders(Lattice(wrong), 8),
        "cost": optimal(8, cost_budget=cost, prior=wrong).orders,
        "cost_alone": best_tree(Lattice(wrong), cost),
    }
    retained = measure.value(cyclic)
    return {f"wrong_prior_loss_{name}": 1 - measure.value(orders) / retained for name, orders in plans.items()}


# ---- results ----


def run(settings: Settings, seed: int) -> dict[str, Any]:
    """Measures everything, and prints the cases as they come.

    Returns:
        `dict`: figures by name.
    """
    print(f"expected surviving prefix of a shard in slices, at the cost of the unpruned rotation with B = L\n{TITLES}")
    cases = []
    for num_slices in settings.slices:
        for name in settings.priors:
            cases.append(measure_case(name, num_slices, settings, seed))
            print(line_of(cases[-1]), flush=True)
    figures: dict[str, Any] = case_figures(cases)
    figures |= spread("plan_seconds_L12_B24", planning_seconds(12, 24, settings.repeats))
    if settings.more:
        figures |= wrong_prior()
    known = known_numbers(cases, life_areas(settings))
    return figures | {"known_missed": len(missed(known)), "known": known, "by_case": cases}


def record(settings: Settings, seed: int, commit: str | None, figures: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file holds."""
    libraries = ("hf_s3t", "numpy", "scipy")
    return {
        "name": "planning",
        "commit": commit,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "settings": {**asdict(settings), "seed": seed},
        "figures": figures,
    }


TITLES = (
    "prior      L    R  cost  cyclic  paper's BMS  best tree   gain  for this prior alone  every order  "
    "least cost for cyclic's (of its cost, pruned)  seconds"
)


def line_of(one: dict[str, Any]) -> str:
    """One case as a line of the table."""
    least = "-"
    if one["least_cost"] is not None:
        shares = one["least_cost"] / one["cost"], one["least_cost"] / one["pruned_cost"]
        least = f"{one['least_cost']} ({shares[0]:.2f}, {shares[1]:.2f})"
    alone = "-" if one["alone"] is None else f"{one['alone']:.3f}"
    return (
        f"{one['prior']:<9} {one['num_slices']:>2} {one['requests']:>4} {one['cost']:>5} {one['cyclic']:>7.3f} "
        f"{one['paper_bms']:>12.3f} {one['best']:>10.3f} {one['best'] / one['cyclic'] - 1:>6.1%} {alone:>21} "
        f"{one['every_order']:>12.3f} {least:>46} {one['plan_seconds']:>8.1f}"
    )


def print_rest(figures: dict[str, Any]) -> None:
    """What the table of cases does not show."""
    print("\nknown numbers, and what they are here")
    wrong = missed(figures["known"])
    for name, value in figures["known"].items():
        print(f"{name:<52} {KNOWN[name]:>7} {value:>9.4f}{'  MISSED' if name in wrong else ''}")
    print()
    for name, value in figures.items():
        if not isinstance(value, (list, dict)) and not name.endswith("_std"):
            print(f"{name:<52} {shown(figures, name)}")


def main() -> None:
    """Runs the benchmark."""
    options = make_parser().parse_args()
    settings = QUICK if options.quick else Settings()
    if options.slices:
        settings = replace(settings, slices=tuple(options.slices))
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    figures = run(settings, options.seed)
    print_rest(figures)
    if options.json:
        options.json.write_text(json.dumps(record(settings, options.seed, commit, figures), indent=1) + "\n")


if __name__ == "__main__":
    main()
