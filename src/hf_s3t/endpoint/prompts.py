"""From a request to tokens that fit the model."""

from __future__ import annotations

from typing import Any

from .generation import Prompt
from .lengths import bytes_per_token
from .protocol import ChatRequest, CompletionRequest, Message, Refusal, Sampling

FEW_TOKENS = 16
"""Tokens of a completion where the request does not say: as the API has it."""

MANY_TOKENS = 1024
"""Tokens of a chat's answer at most, where the request does not say."""


class Prompts:
    """Makes prompts of requests.

    Args:
        tokenizer: the model's.
        config: the model's.
        max_tokens (`int`): of one answer.
    """

    def __init__(self, tokenizer: Any, config: Any, max_tokens: int):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        text = config.get_text_config()
        room = getattr(text, "max_position_embeddings", None)
        self.room: int | None = room if isinstance(room, int) and room > 0 else None
        self.vocabulary: int = text.vocab_size
        tokenizer("")  # sets its truncation and padding, which no two threads may do at once
        most = bytes_per_token(tokenizer)
        self._most = None if self.room is None or most is None else self.room * most

    def check_size(self, text: str, param: str) -> None:
        """Refuses a text that cannot fit before its tokens are made, which would take long.

        Raises:
            Refusal: it has more bytes than as many tokens as there is room for can stand for.
        """
        if self._most is not None and (size := len(text.encode(errors="replace"))) > self._most:
            message = (
                f"The model has room for {self.room} tokens. `{param}` has {size} bytes, and so many tokens stand for "
                f"{self._most} bytes at most. Shorten it."
            )
            raise Refusal(400, message, param, "context_length_exceeded")

    def of_texts(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts, each with the special ones.

        Raises:
            Refusal: one is too long.
        """
        for place, text in enumerate(texts):
            self.check_size(text, f"texts.{place}")
        tokens = self.tokenizer(texts)["input_ids"]
        for place, own in enumerate(tokens):
            if self.room is not None and len(own) > self.room:
                message = f"Text {place} has {len(own)} tokens, and the model has room for {self.room}. Shorten it."
                raise Refusal(400, message, f"texts.{place}", "context_length_exceeded")
        return tokens

    def of_completion(self, asked: CompletionRequest) -> Prompt:
        """A text's tokens, or the given ones.

        Raises:
            Refusal: they are none, not the model's, or too many.
        """
        tokens = asked.prompt
        if isinstance(tokens, str):
            self.check_size(tokens, "prompt")
            tokens = self.tokenizer(tokens)["input_ids"]
        if strange := [token for token in tokens if not 0 <= token < self.vocabulary]:
            message = f"Token {strange[0]} is not one of the model's {self.vocabulary}."
            raise Refusal(400, message, "prompt", "invalid_value")
        return self._checked(asked, tokens, asked.max_tokens, "prompt", FEW_TOKENS)

    def of_chat(self, asked: ChatRequest) -> Prompt:
        """The messages by the tokenizer's chat template.

        Raises:
            Refusal: there is no template, it refuses the messages, or they are too long.
        """
        both = {asked.max_tokens, asked.max_completion_tokens} - {None}
        if len(both) > 1:
            message = "`max_tokens` and `max_completion_tokens` are the same thing, and differ. Give the latter alone."
            raise Refusal(400, message, "max_tokens", "invalid_value")
        return self._checked(asked, self._templated(asked.messages), next(iter(both), None), "messages", MANY_TOKENS)

    def _templated(self, messages: list[Message]) -> list[int]:
        import jinja2

        if not self.tokenizer.chat_template:
            raise Refusal(
                400,
                "The model's tokenizer has no chat template, so the format of a chat is not known. Ask "
                "/v1/completions, or start the endpoint with a --tokenizer that has one.",
                "messages",
                "no_chat_template",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [message.plain for message in messages], add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise Refusal(400, f"The chat template refuses this: {error}", "messages", "invalid_value") from None
        self.check_size(text, "messages")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _checked(self, asked: Sampling, tokens: list[int], most: int | None, param: str, default: int) -> Prompt:
        count = len(tokens)
        if not count:
            raise Refusal(400, f"`{param}` has no token: there is nothing to continue.", param, "invalid_value")
        if most is not None and most > self.max_tokens:
            message = f"{most} tokens are asked for, and an answer has at most {self.max_tokens} (--max-tokens)."
            name = "max_tokens" if asked.max_tokens is not None else "max_completion_tokens"
            raise Refusal(400, f"{message} Ask for fewer.", name, "invalid_value")
        default = min(default, self.max_tokens)
        if self.room is not None:
            left = self.room - count
            if left < (most or 1):
                raise Refusal(
                    400,
                    f"The model has room for {self.room} tokens. `{param}` has {count}, and {most or 1} more are "
                    "asked for. Shorten it, or ask for fewer.",
                    param if left < 1 else "max_tokens",
                    "context_length_exceeded",
                )
            default = min(default, left)
        return Prompt(
            tokens=tuple(tokens),
            max_tokens=most or default,
            temperature=1.0 if asked.temperature is None else float(asked.temperature),
            top_p=1.0 if asked.top_p is None else float(asked.top_p),
            seed=asked.seed,
            stop=asked.stops,
        )
