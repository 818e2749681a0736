"""Requests and refusals in the form of the OpenAI API: what is understood, and what is refused by its name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ZERO = (0, 0.0)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": ZERO,
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (),
    "prediction": (),
    "presence_penalty": ZERO,
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (),
    "verbosity": (),
    "web_search_options": (),
}
"""What the API knows and this endpoint does not do, with the values that ask for nothing; `null` is one always."""


class Refusal(Exception):
    """An answer that is none.

    Args:
        status (`int`): of HTTP.
        message (`str`): what was found, what was expected, what to do.
        param, code (`str`, *optional*): the parameter that it is about, and the kind of fault.
        retry_after (`int`, *optional*): seconds after which to ask again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of HTTP."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


class Strict(BaseModel):
    """Takes what it knows, in the type that it knows."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def check_whole(cls, given: Any) -> Any:
        """Refuses half a character, which JSON can hold, and no tokenizer and no file."""
        try:
            json.dumps(given, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = "The body holds half a character (a lone surrogate). Send whole ones."
            raise Refusal(400, message, None, "invalid_value") from None
        return given


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = False


class Sampling(Strict):
    """What both kinds of completions share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse(cls, given: Any) -> Any:
        """Refuses what the API knows and this endpoint does not do, unless its value asks for nothing."""
        if not isinstance(given, dict):
            return given
        for name, neutral in NEUTRAL.items():
            value = given.get(name)
            if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
                raise Refusal(400, f"`{name}` is not supported here. Leave it out.", name, "unsupported_parameter")
        return {name: value for name, value in given.items() if name not in NEUTRAL}

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in given:
            raise Refusal(400, "A stop text is empty, and would end every answer at once.", "stop", "invalid_value")
        return tuple(given)


class CompletionRequest(Sampling):
    """`POST /v1/completions`: a text, or its tokens."""

    prompt: str | list[int]


class Part(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a chat."""

    role: str
    content: str | list[Part]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class ClassifyRequest(Strict):
    """`POST /classify`: texts, each of which gets labels with scores."""

    texts: Annotated[list[str], Field(min_length=1)]
    model: str | None = None


class DeleteRequest(Strict):
    """`DELETE /v1/examples`: what is deleted, and the request's name in the private receipt."""

    ids: list[str | int] = []
    groups: list[str | int] = []
    reference: str | None = None


def refusal_of(errors: Any) -> Refusal:
    """The first of pydantic's errors of a request, as a refusal that names the parameter."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return Refusal(400, f"The body is not JSON: {first['ctx']['error']}.", None, "invalid_json")
    place = [str(part) for part in first["loc"] if part not in ("body", "str")]
    param = ".".join(part for part in place if not part.startswith(("list[", "constrained-"))) or None
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"`{param}` is not known here. Leave it out.", param, "unknown_parameter")
    if first["type"] == "missing" and param:
        return Refusal(400, f"`{param}` is missing.", param, "missing_parameter")
    about = f"`{param}`" if param else "The body"
    causes = [error["msg"] for error in errors if error["loc"][:2] == first["loc"][:2]]  # one for each type
    message = f"{about} is not as expected: {'; or: '.join(dict.fromkeys(causes))}."
    return Refusal(400, message, param, "invalid_value")
