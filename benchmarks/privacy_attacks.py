"""The attacks of `privacy.py`, as numbers: scores of rows, how well they tell two kinds of rows apart, and how sure.

Every score is higher for rows that the attacker takes for members. Nothing here knows a model or a store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import norm, rankdata

Pair = tuple[np.ndarray, np.ndarray]  # scores of rows of the kind that is looked for, and of the other kind
REPLICATES = 1000
FALSE_POSITIVES = 0.01


def lira(observed: np.ndarray, shadows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The likelihood ratio attack, online (Carlini et al. 2022, "Membership Inference Attacks From First Principles").

    Gaussians of the signals of shadow models that saw a row, and of those that did not. Each row has a mean of its own;
    a deviation is shared by all rows, as the paper has it where shadow models are few.

    Args:
        observed (`np.ndarray`): signals of the attacked model, `(rows,)`.
        shadows (`np.ndarray`): signals of the shadow models, `(models, rows)`.
        seen (`np.ndarray`): which model saw which row, `(models, rows)`.

    Returns:
        `np.ndarray`: log-likelihood ratios, `(rows,)`.
    """
    logs = []
    for side in (seen, ~seen):
        count = side.sum(0)
        if count.min() < 1 or count.sum() <= len(observed):
            raise ValueError("Each row needs a shadow model that saw it and one that did not, and some need two.")
        mean = np.where(side, shadows, 0).sum(0) / count
        squares = np.where(side, (shadows - mean) ** 2, 0).sum()
        logs.append(norm.logpdf(observed, mean, np.sqrt(squares / (count - 1).sum()) + 1e-12))
    return logs[0] - logs[1]


# ---- how well two kinds are told apart ----


def auc(pair: Pair) -> float:
    """The chance that a row of the first kind has the higher score; half of it for equal ones."""
    first, other = pair
    ranks = rankdata(np.concatenate(pair))[: len(first)]
    return float((ranks.sum() - len(first) * (len(first) + 1) / 2) / (len(first) * len(other)))


def rate_at_few(pair: Pair) -> float:
    """The share of the first kind above a threshold that at most 1 % of the other kind pass."""
    first, other = pair
    threshold = np.sort(other)[-1 - int(FALSE_POSITIVES * len(other))]
    return float((first > threshold).mean())


def resampled(pairs: Sequence[Pair], measure: Callable[[Pair], float], random: np.random.Generator) -> np.ndarray:
    """Bootstrap replicates of the mean over seeds, `(REPLICATES,)`: seeds are drawn anew, and the rows of each."""
    found = np.zeros(REPLICATES)
    for number in range(REPLICATES):
        drawn = [pairs[seed] for seed in random.integers(len(pairs), size=len(pairs))]
        found[number] = np.mean([measure((_again(a, random), _again(b, random))) for a, b in drawn])
    return found


def resampled_means(samples: Sequence[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """The same for the mean of one kind."""
    found = np.zeros(REPLICATES)
    for number in range(REPLICATES):
        drawn = [samples[seed] for seed in random.integers(len(samples), size=len(samples))]
        found[number] = np.mean([_again(values, random).mean() for values in drawn])
    return found


def _again(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return values[random.integers(len(values), size=len(values))]


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(replicates, (0.025, 0.975))
    return float(low), float(high)


# ---- canaries ----


def exposure(logs: np.ndarray, code: int) -> float:
    """Exposure in bits: log2 of the number of candidates, less log2 of the code's rank among them (Carlini et al. 2019,
    "The Secret Sharer").

    Args:
        logs (`np.ndarray`): log-likelihoods of all candidates.
        code (`int`): which of them is the secret.
    """
    return float(np.log2(len(logs)) - np.log2((logs >= logs[code]).sum()))


def blind_exposure(candidates: int) -> float:
    """The mean exposure of a secret that the model knows nothing of: every rank is as likely. Near 1.44 bits, not 0."""
    return float(np.log2(candidates) - np.log2(np.arange(1, candidates + 1)).mean())
