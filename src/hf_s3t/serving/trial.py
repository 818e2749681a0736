"""Whether members can answer one batch together, and share the trunk: found out by trying."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers.modeling_outputs import ModelOutput

from ..seams.answering import caches_in
from ..seams.models import is_encoder_decoder
from ..trunk.trunk import in_eval_mode, is_close
from .member_rows import Notes

logger = logging.getLogger(__name__)

TRIED_ROWS, TRIED_TOKENS, TRIED_MEMBERS = 3, 5, 2
"""Of the batch that a model is tried with: no two of rows, members, rows x members and tokens are the same number."""


class Trial:
    """A few rows are answered by two members in turn, by both together, and by both on a shared trunk.

    The logits have to be the same. Nothing depends on what arguments are called, so that a new name changes nothing.
    Nothing else may ask the [`Members`] meanwhile.
    """

    def __init__(self, members: Any, serving: Any):
        self.members = members
        self.base = members.base
        self.serving = serving._replace(slots=serving.slots[:TRIED_MEMBERS])

    def run(self, inputs: dict[str, Any] | None = None) -> None:
        """Finds out whether members answer together (`batched`) and share a trunk (`shares_trunk`).

        Rows of tokens are tried first; where these tell nothing, rows of `inputs`, the arguments of a forward pass.
        """
        alone = self.members.alone
        if alone is not None:
            try:
                self.name_cache()
            except Exception as error:  # tokens that stand for pictures, of which there are none here
                alone = f"{alone}, and what it calls its cache is not known ({error})"
            self._settle(alone)
            return
        rows = self._tokens()
        if rows is not None and self._is_conclusive(rows, given=False):
            return
        if inputs is not None:
            self._is_conclusive(self._some(inputs), given=True)

    def name_cache(self) -> None:
        """Finds out what a model that takes tokens calls its cache."""
        rows = None if is_encoder_decoder(self.base) else self._tokens()
        if rows is not None:
            with in_eval_mode(self.base), torch.no_grad():
                self.members.cache_name = next(iter(caches_in(self._in_turn(rows)[1])), None)

    def _is_conclusive(self, rows: dict[str, Any], given: bool) -> bool:
        """Tries with some rows. Those that were `given` the model has to take: they always tell."""
        with in_eval_mode(self.base), torch.no_grad():
            return self._compare(rows, given)

    def _compare(self, rows: dict[str, Any], given: bool) -> bool:
        members = self.members
        members.batched, members.shares_trunk, members.whole = False, None, set()
        try:
            rows, expected = self._in_turn(rows)
        except Exception as error:  # what a model says of rows that it does not take is not ours to foresee
            if given:
                self._settle(f"it does not take several rows ({error})")
            return given
        members.cache_name = next(iter(caches_in(expected)), None)
        members.batched = True
        reason, notes = self._difference(rows, expected)
        if reason is not None:
            self._settle(reason)
            return True
        if self.serving.lowest_layer > 0:
            members.shares_trunk = True
            reason = "a head comes before the layers" if notes.head_first else self._difference(rows, expected)[0]
            members.shares_trunk = reason is None
            if reason is not None:
                logger.warning("the members share no trunk, so it runs once for each of them: %s", reason)
        members.tried = True
        return True

    def _in_turn(self, rows: dict[str, Any]) -> tuple[dict[str, Any], ModelOutput]:
        """What the members answer in turn to some rows, with a cache where they take `use_cache`, and these arguments.

        Not every model that takes it says so by name.
        """
        asking = {**rows, "use_cache": True}
        try:
            return asking, self.members.in_turn(self.serving, dict(asking))
        except Exception:  # what a model says of an argument that it does not know is not ours to foresee
            if "use_cache" in self.members.parameters:
                raise
        return rows, self.members.in_turn(self.serving, dict(rows))

    def _settle(self, reason: str) -> None:
        """Members answer in turn from now on."""
        self.members.batched, self.members.tried, self.members.shares_trunk = False, True, False
        logger.warning("the members answer one after the other, not together, because %s", reason)

    def _difference(self, rows: dict[str, Any], expected: ModelOutput) -> tuple[str | None, Notes]:
        """Why members do not answer together as they answer in turn, `None` where they do; and what was noted."""
        trunk = self.serving.lowest_layer if self.members.shares_trunk else 0
        notes = Notes(len(self.members.main_input(rows)), self.serving.members, trunk)
        try:
            found = self.members.together(self.serving, dict(rows), notes)
        except torch.OutOfMemoryError:  # says nothing of the model, which would be slow from then on
            raise
        except Exception as error:  # whatever a model raises when it sees rows that it did not expect
            return f"together they fail ({type(error).__name__}: {error})", notes
        exact = {value.dtype for value in self.base.parameters()} <= {torch.float32, torch.float64}
        for name, value in expected.items():
            if isinstance(value, torch.Tensor) and not is_close(found[name], value, 1e-4 if exact else 0.05):
                return f"together they have other {name}", notes
        return None, notes

    # ---- rows to try with ----

    def _tokens(self) -> dict[str, Any] | None:
        """Rows of tokens of different lengths, of a model that takes tokens."""
        size = getattr(self.base.config.get_text_config(), "vocab_size", None)
        if self.base.main_input_name != "input_ids" or size is None:
            return None
        shape = TRIED_ROWS, TRIED_TOKENS
        tokens = torch.arange(TRIED_ROWS * TRIED_TOKENS).reshape(shape).mul(7).add(3) % max(size - 1, 1)
        mask = torch.arange(TRIED_TOKENS) < TRIED_TOKENS - torch.arange(TRIED_ROWS)[:, None]
        rows = {"input_ids": tokens.to(self.base.device)}
        if "attention_mask" in self.members.parameters:
            rows["attention_mask"] = mask.long().to(self.base.device)
        return rows

    def _some(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As many rows as it takes, of those that were given; a row that comes again is moved a little."""
        count = len(self.members.main_input(inputs))
        some = {name: value for name, value in inputs.items() if name not in caches_in(inputs)}
        for name, value in some.items():
            if isinstance(value, torch.Tensor) and self.members.is_per_row(name, value, count):
                rows = [
                    value[row % count].roll(row // count, -1) if value.is_floating_point() else value[row % count]
                    for row in range(TRIED_ROWS)
                ]
                some[name] = torch.stack(rows)
        return some
