"""A batch of texts is told apart: labels with scores."""

from __future__ import annotations

from typing import Any

import torch

from ..serving.ensemble import S3TEnsemble
from .batcher import BARE, Begun, Ended, Job, NotReadyError


class Classification:
    """Answers batches of texts as tokens.

    Args:
        model ([`S3TEnsemble`]): of a model that classifies sequences.
        tokenizer: its own.
    """

    def __init__(self, model: S3TEnsemble, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, jobs: list[Job]) -> None:
        """Answers the texts of some jobs, whose tokens each job has, in one forward pass on one state.

        Raises:
            NotReadyError: that state has no member.
        """
        rows = [{"input_ids": list(tokens)} for job in jobs for tokens in job.asked]
        with self.model.answering() as generation, torch.no_grad():
            if not self.model.members:
                raise NotReadyError(BARE)
            for job in jobs:
                job.tell(Begun(generation))
            batch = self.tokenizer.pad(rows, padding=True, return_tensors="pt").to(self.model.device)
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            scores = self.scores(self.model(**given).logits.float()).tolist()
        for job in jobs:
            own, scores = scores[: job.rows], scores[job.rows :]
            job.tell(Ended(tokens=sum(map(len, job.asked)), result=[self._named(row) for row in own]))

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of the labels, `(rows, labels)`: each by itself where there are several per text. The one
        output of a regression is its value."""
        if logits.shape[-1] == 1:
            return logits
        several = self.model.config.problem_type == "multi_label_classification"
        return logits.sigmoid() if several else logits.softmax(-1)

    def _named(self, row: list[float]) -> dict[str, Any]:
        names = self.model.config.id2label
        scores = {names[place]: score for place, score in enumerate(row)}
        best = max(scores, key=lambda name: scores[name])
        return {"label": best, "score": scores[best], "scores": scores}
