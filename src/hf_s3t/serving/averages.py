"""From the logits of several members to those of their ensemble, to its loss, and to what a fused head would give."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch.nn.functional import logsigmoid
from transformers.modeling_outputs import ModelOutput

Combine = Literal["probabilities", "logits"]


def average_logits(members: torch.Tensor, combine: Combine, problem: str | None = None) -> torch.Tensor:
    """The logits of an ensemble, `(batch, ..., classes)`, from those of its members, `(members, batch, ..., classes)`.

    With `"probabilities"` they are `log(mean(softmax(logits)))`, with `"logits"` the mean of the logits. `problem` is
    the config's `problem_type`: with several labels each has a probability of its own, and a regression's values are
    averaged as they are.
    """
    if combine == "logits" or problem == "regression" or members.shape[-1] == 1:
        return members.mean(dim=0)
    members = members.float()
    if problem == "multi_label_classification":
        return logsigmoid(members).logsumexp(dim=0) - logsigmoid(-members).logsumexp(dim=0)
    return members.log_softmax(-1).logsumexp(dim=0) - math.log(len(members))


def by_token(logits: torch.Tensor, labels: Any) -> ModelOutput:
    """Instead of logits what TRL's fused head gives per predicted token; zero where there is no label."""
    log_probabilities, wanted = logits[:, :-1].float().log_softmax(-1), labels[:, 1:]
    mask = wanted != -100
    values = {
        "log_probs": log_probabilities.gather(-1, wanted.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_probabilities.exp() * log_probabilities).sum(-1),
        "is_top1": log_probabilities.argmax(-1) == wanted,
    }
    return ModelOutput(**{name: value.masked_fill(~mask, 0) for name, value in values.items()}, label_mask=mask)
