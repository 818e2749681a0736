"""The metrics of GLUE and SuperGLUE: through `evaluate`, or as defined here where its scripts cannot be fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from scipy.stats import pearsonr, spearmanr

logger = get_logger(__name__)

Figures = dict[str, float]
Metric = Callable[[np.ndarray, np.ndarray], Figures]
"""From predictions and labels, both of shape `(examples,)`, to named figures."""


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> Figures:
    """Share of predictions that are right."""
    return {"accuracy": float(np.mean(predictions == labels))}


def f1_of(predictions: np.ndarray, labels: np.ndarray, positive: int = 1) -> float:
    """F1 of one class; 0 where it neither occurs nor is predicted."""
    right = np.sum((predictions == positive) & (labels == positive))
    return float(2 * right / max(np.sum(predictions == positive) + np.sum(labels == positive), 1))


def macro_f1_of(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 over the classes that occur or are predicted."""
    return float(np.mean([f1_of(predictions, labels, kind) for kind in np.union1d(predictions, labels)]))


def accuracy_and_f1(predictions: np.ndarray, labels: np.ndarray) -> Figures:
    """MRPC, QQP."""
    return accuracy(predictions, labels) | {"f1": f1_of(predictions, labels)}


def accuracy_and_macro_f1(predictions: np.ndarray, labels: np.ndarray) -> Figures:
    """CB."""
    return accuracy(predictions, labels) | {"f1": macro_f1_of(predictions, labels)}


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> Figures:
    """CoLA: the correlation of two binary variables; 0 where one of them never changes."""
    constant = len(set(predictions)) == 1 or len(set(labels)) == 1
    return {"matthews_correlation": 0.0 if constant else float(np.corrcoef(predictions, labels)[0, 1])}


def correlations(predictions: np.ndarray, labels: np.ndarray) -> Figures:
    """STS-B."""
    return {
        "pearson": float(pearsonr(predictions, labels)[0]),
        "spearmanr": float(spearmanr(predictions, labels)[0]),
    }


def by_question(predictions: np.ndarray, labels: np.ndarray, questions: Sequence[str]) -> Figures:
    """MultiRC: share of questions with all answers right, mean macro F1 of a question, F1 over all answers."""
    members: dict[str, list[int]] = {}
    for position, question in enumerate(questions):
        members.setdefault(question, []).append(position)
    own = [(predictions[rows], labels[rows]) for rows in members.values()]
    return {
        "exact_match": float(np.mean([np.array_equal(*pair) for pair in own])),
        "f1_m": float(np.mean([macro_f1_of(*pair) for pair in own])),
        "f1_a": f1_of(predictions, labels),
    }


OWN: dict[str, Metric] = {
    "cola": matthews_correlation,
    "stsb": correlations,
    "mrpc": accuracy_and_f1,
    "qqp": accuracy_and_f1,
    "cb": accuracy_and_macro_f1,
}
"""What differs from plain accuracy, MultiRC aside."""


def own_metric(task: str, rows: Sequence[Mapping[str, Any]]) -> Metric:
    """The task's metric as defined here; MultiRC's needs the rows, which say what belongs to one question."""
    if task == "multirc":
        return partial(by_question, questions=[f"{at['paragraph']}-{at['question']}" for at in places(rows)])
    return OWN.get(task, accuracy)


def task_metric(suite: str, task: str, rows: Sequence[Mapping[str, Any]]) -> Metric:
    """The metric of a task on some rows.

    Args:
        suite (`"glue"` or `"super_glue"`): which script of `evaluate` it is in.
        task (`str`): its name there.
        rows (`list` of rows or [`~datasets.Dataset`]): the evaluation set, in the order of the predictions.
    """
    try:
        import evaluate

        metric = evaluate.load(suite, task)
    except (ImportError, OSError) as error:  # `evaluate` reports a missing network as several kinds of OSError
        logger.warning(
            "metrics of %s by the recipe's own definitions: evaluate.load(%r) failed with %s",
            task, suite, type(error).__name__,
        )  # fmt: skip
        return own_metric(task, rows)

    def compute(predictions: np.ndarray, labels: np.ndarray) -> Figures:
        given: Any = predictions
        if task == "multirc":
            given = [
                {"idx": at, "prediction": int(value)} for at, value in zip(places(rows), predictions, strict=True)
            ]
        return metric.compute(predictions=given, references=labels)

    return compute


def places(rows: Any) -> list[dict[str, int]]:
    """MultiRC's column `idx`: paragraph, question and answer of each row."""
    return [row["idx"] for row in rows]
