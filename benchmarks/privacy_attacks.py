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

    Gaussians of the signals of shadow models that saw a row, and of those that did not. Each row has a mean of its
    own; a deviation is shared by all rows, as the paper has it where shadow models are few.

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


def auc(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The chance that a row of the first kind has the higher score, half of it for equal ones; over the last axis."""
    count = first.shape[-1]
    ranks = rankdata(np.concatenate((first, other), axis=-1), axis=-1)[..., :count].sum(-1)
    return (ranks - count * (count + 1) / 2) / (count * other.shape[-1])


def rate_at_few(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The share of the first kind above a threshold that at most 1 % of the other kind pass; over the last axis."""
    threshold = np.sort(other, axis=-1)[..., -1 - int(FALSE_POSITIVES * other.shape[-1]), None]
    return (first > threshold).mean(-1)


def resampled(
    samples: Sequence[Sequence[np.ndarray]], measure: Callable[..., np.ndarray], random: np.random.Generator
) -> np.ndarray:  # fmt: skip
    """Bootstrap replicates of the mean over seeds, `(REPLICATES,)`: seeds are drawn anew, and the rows of each.

    Args:
        samples (`Sequence`): of each seed what the measure takes: scores of rows, by kind.
        measure (`Callable`): of arrays, over their last axis.
        random (`np.random.Generator`): what draws.
    """
    found = np.zeros((len(samples), REPLICATES))
    for means in found:
        chosen = random.integers(len(samples), size=REPLICATES)
        for seed, kinds in enumerate(samples):
            count = (chosen == seed).sum()
            drawn = [kind[random.integers(len(kind), size=(count, len(kind)))] for kind in kinds]
            means[chosen == seed] = measure(*drawn) if count else 0
    return found.mean(0)


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(replicates, (0.025, 0.975))
    return float(low), float(high)


# ---- canaries ----


def exposure(logs: np.ndarray, code: int) -> float:
    """Exposure in bits: log2 of the number of candidates, less log2 of the code's rank among them.

    Carlini et al. 2019, "The Secret Sharer", section 4.

    Args:
        logs (`np.ndarray`): log-likelihoods of all candidates.
        code (`int`): which of them is the secret.
    """
    return float(np.log2(len(logs)) - np.log2((logs >= logs[code]).sum()))


def blind_exposure(candidates: int) -> float:
    """The mean exposure of a secret that a model knows nothing of, any rank is as likely: 1.44 bits, not 0."""
    return float(np.log2(candidates) - np.log2(np.arange(1, candidates + 1)).mean())
