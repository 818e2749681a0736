"""A batch of prompts is continued: rows have settings of their own, and each ends by itself.

The loop, the cache and the members are the ensemble's: `generate`. A logits processor chooses the token of every row
and leaves no other one possible; a stopping criterion tells which rows have ended.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from ..serving.ensemble import S3TEnsemble
from .batcher import BARE, Begun, Ended, Job, NotReadyError, Piece

CONTEXT = 6
"""Tokens of the prompt that the first tokens of an answer are decoded with: a space may depend on them."""

MAX_PIECE = 32
"""Tokens that may make no character yet; more are text as they are."""


@dataclass(frozen=True)
class Prompt:
    """What is to be continued, and how."""

    tokens: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Text:
    """The text of tokens that come one by one, up to a stop string.

    Args:
        decode: text of some tokens.
        before: tokens that stand before them.
        stop: where one of these texts begins, the text has ended.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int], stop: Sequence[str]):
        self._decode, self._stop = decode, stop
        self._tokens = list(before)
        self._start, self._known = 0, len(self._tokens)  # tokens from `_start` to `_known` have been given away
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now. Half a character waits, and so does what a stop string may begin with."""
        self._tokens.append(token)
        known, text = self._decode(self._tokens[self._start : self._known]), self._decode(self._tokens[self._start :])
        if text.endswith("\ufffd") and len(self._tokens) - self._known < MAX_PIECE:
            return ""
        self._start, self._known = self._known, len(self._tokens)
        return self._up_to_stop(text[len(known) :])

    def rest(self) -> str:
        """What waited, at the end of all tokens."""
        known, text = self._decode(self._tokens[self._start : self._known]), self._decode(self._tokens[self._start :])
        certain = self._up_to_stop(text[len(known) :])
        held, self._held = self._held, ""
        return certain + held

    def _up_to_stop(self, more: str) -> str:
        text = self._held + more
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_beginning(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _beginning(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


class Row:
    """One prompt's answer while it is made."""

    def __init__(self, job: Job, decode: Callable[[Sequence[int]], str]):
        prompt: Prompt = job.asked
        self.job, self.prompt = job, prompt
        self.text = Text(decode, prompt.tokens[-CONTEXT:], prompt.stop)
        self.count, self.ended = 0, False
        seed = secrets.randbits(63) if prompt.seed is None else prompt.seed
        self._random = torch.Generator().manual_seed(seed)

    def draw(self) -> float:
        """A number from 0 to 1 of this row's own, whoever is in the batch."""
        return float(torch.rand((), generator=self._random, dtype=torch.float64))

    def take(self, token: int, ends: frozenset[int]) -> None:
        """Adds a token; tells what is certain of the text, and the end."""
        if self.ended:
            return
        self.count += 1
        piece = "" if token in ends else self.text.add(token)
        reason = "stop" if token in ends or self.text.stopped else None
        if reason is None and self.count == self.prompt.max_tokens:
            reason = "length"
        if reason:
            self._end(piece, reason)
            return
        if piece:
            self.job.tell(Piece(piece))
        if self.job.cancelled:
            self.ended = True

    def cut(self) -> None:
        """Ends an answer that nothing will be added to."""
        if not self.ended:
            self._end("", "length")

    def _end(self, piece: str, reason: str) -> None:
        if not self.text.stopped:
            piece += self.text.rest()
        self.ended = True
        if piece:
            self.job.tell(Piece(piece))
        self.job.tell(Ended("stop" if self.text.stopped else reason, self.count))


def choose(
    scores: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, drawn: torch.Tensor
) -> torch.Tensor:
    """The next token of each row: the likeliest at temperature 0, else the one that a drawn number falls on.

    Numbers fall on the tokens in the order of the vocabulary: two that are equally likely do not change places.

    Args:
        scores (`torch.Tensor`): `(rows, vocabulary)`.
        temperature, top_p, drawn (`torch.Tensor`): `(rows,)`, in double precision; a number from 0 to 1 is drawn.

    >>> scores = torch.tensor([[0.0, 2.0, 1.0]] * 3)
    >>> row = lambda *values: torch.tensor(values, dtype=torch.float64)
    >>> choose(scores, row(0, 1, 1), row(1, 1, 0.5), row(0, 0, 0.99)).tolist()
    [1, 0, 1]
    """
    best = scores.argmax(-1)
    if not temperature.any():
        return best
    chances = (scores.double() / torch.where(temperature > 0, temperature, 1.0)[:, None]).softmax(-1)
    if bool((top_p < 1).any()):
        ordered = chances.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        last = ((before < top_p[:, None]).sum(-1) - 1).clamp(min=0)
        chances = torch.where(chances >= ordered.gather(-1, last[:, None]), chances, 0.0)
    reached = chances.cumsum(-1)
    found = (reached <= drawn[:, None] * reached[:, -1:]).sum(-1).clamp(max=scores.shape[-1] - 1)
    return torch.where(temperature > 0, found, best)


class Choice(LogitsProcessor):
    """Chooses each row's token by the row's own settings, and hands it on."""

    def __init__(self, rows: Sequence[Row], ends: frozenset[int], padding: int, device: torch.device):
        self.rows, self.ends, self.padding = rows, ends, padding
        settings = [(row.prompt.temperature, row.prompt.top_p) for row in rows]
        self.temperature, self.top_p = torch.tensor(settings, dtype=torch.float64, device=device).T

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores in which the chosen tokens alone are possible, `(rows, vocabulary)`."""
        drawn = torch.tensor([row.draw() for row in self.rows], dtype=torch.float64).to(scores.device)
        tokens = choose(scores, self.temperature, self.top_p, drawn)
        running = torch.tensor([not row.ended for row in self.rows]).to(scores.device)
        tokens = torch.where(running, tokens, self.padding)
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.take(token, self.ends)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


class Over(StoppingCriteria):
    """Tells which rows have ended."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each row has, `(rows,)`."""
        return torch.tensor([row.ended for row in self.rows], device=input_ids.device)


class Generation:
    """Answers batches of [`Prompt`]s.

    Args:
        model ([`S3TEnsemble`]): of a causal language model.
        tokenizer: its own.
    """

    def __init__(self, model: S3TEnsemble, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
        known = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
        flat = [token for found in known for token in (found if isinstance(found, list) else [found])]
        self.ends = frozenset(token for token in flat if token is not None)

    def __call__(self, jobs: list[Job]) -> None:
        """Continues the prompts of some jobs, on one state from the first token to the last.

        Raises:
            NotReadyError: that state has no member.
        """
        with self.model.answering() as generation:
            if not self.model.members:
                raise NotReadyError(BARE)
            for job in jobs:
                job.tell(Begun(generation))
            self._continue([Row(job, self._decode) for job in jobs])

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def _continue(self, rows: list[Row]) -> None:
        device = self.model.device
        longest = max(len(row.prompt.tokens) for row in rows)
        missing = [longest - len(row.prompt.tokens) for row in rows]
        tokens = [[self.padding] * gap + list(row.prompt.tokens) for gap, row in zip(missing, rows, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in missing]
        with torch.no_grad():
            self.model.generate(
                torch.tensor(tokens, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=max(row.prompt.max_tokens for row in rows),
                do_sample=False,
                num_beams=1,
                pad_token_id=self.padding,
                eos_token_id=sorted(self.ends) or None,
                max_time=None,  # what ends all rows at once: the base may have been saved with it
                stop_strings=None,
                logits_processor=[Choice(rows, self.ends, self.padding, device)],
                stopping_criteria=[Over(rows)],
            )
        for row in rows:  # whatever ended `generate`, everybody is told
            row.cut()
