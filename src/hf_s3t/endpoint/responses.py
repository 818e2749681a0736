"""Answers in the form of the OpenAI API: whole, or as a stream of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from .batcher import Ended, Job, Piece
from .protocol import Refusal, Sampling

GENERATION_HEADER = "x-s3t-generation"


def fingerprint(generation: int) -> str:
    """What the API calls the system's fingerprint: which deletions an answer obeys."""
    return f"s3t-generation-{generation}"


class Answer:
    """One completion on its way to a client.

    Args:
        chat (`bool`): whether it is a message.
        asked ([`Sampling`]): the request.
        job ([`Job`]): its events, after it began.
        generation (`int`): of the state that it began on.
        prompt_tokens (`int`): number of them.
    """

    def __init__(self, chat: bool, asked: Sampling, job: Job, generation: int, prompt_tokens: int):
        self.chat, self.asked, self.job = chat, asked, job
        self.prompt_tokens = prompt_tokens
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": fingerprint(generation),
        }

    async def whole(self) -> dict[str, Any]:
        """All of it."""
        text = ""
        async for event in self.job.events():
            if isinstance(event, Piece):
                text += event.text
            else:
                ended = event
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": ended.reason}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": self._usage(ended)}

    async def stream(self) -> AsyncIterator[str]:
        """Piece by piece. An error in the middle is the last event."""
        options = self.asked.stream_options
        usage = {"usage": None} if options and options.include_usage else {}
        try:
            if self.chat:
                yield self._event({"delta": {"role": "assistant", "content": ""}}, None, usage)
            async for event in self.job.events():
                if isinstance(event, Piece):
                    yield self._event(self._content(event.text), None, usage)
                else:
                    yield self._event({"delta": {}} if self.chat else {"text": ""}, event.reason, usage)
                    if usage:
                        yield _line({**self.head, "object": self._kind, "choices": [], "usage": self._usage(event)})
        except Exception as error:  # the status has been sent
            yield _line(as_refusal(error).body)
        yield "data: [DONE]\n\n"

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self.chat else {"text": text}

    def _event(self, content: dict[str, Any], reason: str | None, usage: dict[str, Any]) -> str:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return _line({**self.head, "object": self._kind, "choices": [choice], **usage})

    def _usage(self, ended: Ended) -> dict[str, int]:
        total = self.prompt_tokens + ended.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": ended.tokens, "total_tokens": total}


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def as_refusal(error: Exception) -> Refusal:
    """An error of the model's thread as an answer."""
    return error if isinstance(error, Refusal) else Refusal(500, f"The answer failed: {error}", code="failed")
