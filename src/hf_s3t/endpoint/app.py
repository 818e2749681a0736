"""The routes of an endpoint, as a FastAPI application: whoever runs it (`server.py`, an engine) starts and ends it.

```
client ──► route ──► Batcher ──► Generation or Classification ──► S3TEnsemble
                                                                     ▲
store ────────────────────────────── Watch (refresh, may it answer?) ┘
```
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ..serving.ensemble import S3TEnsemble
from .batcher import Batcher, Ended, Job, NotReadyError, QueueFullError
from .classification import Classification
from .erasure import add_deletion
from .generation import Generation, Prompt
from .metrics import Counting, Metrics
from .prompts import Prompts
from .protocol import ChatRequest, ClassifyRequest, CompletionRequest, Refusal, Sampling, refusal_of
from .responses import GENERATION_HEADER, Answer, as_refusal, fingerprint
from .settings import Settings
from .watch import Watch

Asked = TypeVar("Asked")
Found = TypeVar("Found")

READERS = 2
"""Threads that make tokens of requests."""
T = TypeVar("T")
GONE = 499
"""Status of an answer that nobody waits for any more: no one reads it, and `/metrics` counts it."""


def make_app(model: S3TEnsemble, tokenizer: Any, settings: Settings) -> FastAPI:
    """The application that answers with a model. Its lifespan starts and ends the model's thread and the watch;
    its `state.endpoint` is the [`Endpoint`].

    Args:
        model ([`S3TEnsemble`]): loaded from a store; a causal language model, or one that classifies sequences.
        tokenizer: the base model's.
        settings ([`Settings`]): how it answers.

    Raises:
        ValueError: the model does something else.
    """
    endpoint = Endpoint(model, tokenizer, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        endpoint.watch.start()
        endpoint.batcher.start()
        yield
        await run_in_threadpool(endpoint.batcher.stop)
        await run_in_threadpool(endpoint.watch.stop)

    app = FastAPI(title="hf_s3t", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.endpoint = endpoint
    app.add_middleware(Counting, metrics=endpoint.metrics)
    _add_refusals(app, settings)
    _add_looks(app, endpoint)
    if endpoint.classifies:
        _add_classification(app, endpoint)
    else:
        _add_completions(app, endpoint)
    if settings.delete_token is not None:
        add_deletion(app, model, settings.delete_token)
    return app


class Endpoint:
    """What the routes share."""

    def __init__(self, model: S3TEnsemble, tokenizer: Any, settings: Settings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.classifies = _classifies(model)
        self.prompts = Prompts(tokenizer, model.config, settings.max_tokens)
        self._readers = ThreadPoolExecutor(READERS, "hf_s3t reads")
        self.created = int(time.time())
        self.metrics = metrics = Metrics()
        self.watch = Watch(model, settings.refresh_seconds, settings.max_staleness, metrics.deletions.inc)
        self.batcher = Batcher(
            (Classification if self.classifies else Generation)(model, tokenizer), self.watch.check_before_answers,
            settings.max_queue, settings.max_batch, settings.max_batch_tokens, settings.mates_seconds,
            metrics.note_batch, self.prompts.room,
        )  # fmt: skip
        metrics.gauge("s3t_generation", "Deletions of the store that new answers obey", lambda: model.generation)
        metrics.gauge("s3t_members", "Served prefixes that answer", lambda: len(model.members))
        metrics.gauge("s3t_state_age_seconds", "Since the state was known to be the newest", lambda: self.watch.age)
        metrics.gauge("s3t_queue_length", "Requests that wait", lambda: len(self.batcher))
        metrics.gauge("s3t_ready", "1 where answers are given", lambda: self.reason is None)

    @property
    def reason(self) -> str | None:
        """Why nothing is answered now, or every answer fails; `None`: all is well."""
        return self.batcher.reason or self.watch.reason

    def check_name(self, name: str | None) -> None:
        """Raises [`Refusal`] for another model than this one."""
        if name not in (None, self.settings.name):
            message = f"There is no model {name!r} here. The model is {self.settings.name!r}."
            raise Refusal(404, message, "model", "model_not_found")

    async def read(self, make: Callable[[Asked], Found], asked: Asked) -> Found:
        """Makes tokens of a request where nobody waits for it: a long text takes seconds."""
        self.batcher.check_room()
        return await asyncio.get_running_loop().run_in_executor(self._readers, make, asked)

    async def begin(self, job: Job, request: Request) -> int:
        """Waits until a job's answer begins; returns the generation that it begins on."""
        self.watch.check()
        self.batcher.submit(job)
        try:
            return await unless_gone(request, job, job.begun())
        except NotReadyError:
            raise
        except Exception as error:
            raise as_refusal(error) from error


async def unless_gone(request: Request, job: Job, awaited: Coroutine[Any, Any, T]) -> T:
    """Awaits something of a job; where the client hangs up meanwhile, the job is cancelled.

    Raises:
        Refusal: the client hung up.
    """
    asked, gone = asyncio.ensure_future(awaited), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((asked, gone), return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise Refusal(GONE, "The client hung up.", None, "client_gone")
        return asked.result()
    finally:
        gone.cancel()
        if not asked.done():
            asked.cancel()
            job.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _classifies(model: S3TEnsemble) -> bool:
    name = type(model.model).__name__
    if name.endswith("ForSequenceClassification"):
        return True
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"The store's model is a {name}. An endpoint serves causal language models and models that classify "
            "sequences. Answer with `S3TEnsemble` instead."
        )
    return False


def _add_refusals(app: FastAPI, settings: Settings) -> None:
    """Whatever is refused, in one form."""

    def respond(refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return respond(error)

    @app.exception_handler(NotReadyError)
    async def not_ready(request: Request, error: NotReadyError) -> JSONResponse:
        return respond(Refusal(503, str(error), None, "not_ready", max(1, round(settings.refresh_seconds))))

    @app.exception_handler(QueueFullError)
    async def queue_full(request: Request, error: QueueFullError) -> JSONResponse:
        return respond(Refusal(429, str(error), None, "queue_full", error.seconds))

    @app.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(refusal_of(error.errors()))

    @app.exception_handler(400)
    async def unreadable(request: Request, error: Exception) -> JSONResponse:
        message = "The body cannot be read: it is no JSON in UTF-8, or nested too deep."
        return respond(Refusal(400, message, None, "invalid_json"))

    @app.exception_handler(404)
    async def no_such_route(request: Request, error: Exception) -> JSONResponse:
        return respond(Refusal(404, f"There is no {request.url.path} here.", None, "unknown_url"))

    @app.exception_handler(405)
    async def no_such_method(request: Request, error: Exception) -> JSONResponse:
        message = f"{request.url.path} is not asked by {request.method}."
        return respond(Refusal(405, message, None, "method_not_allowed"))


def _add_looks(app: FastAPI, endpoint: Endpoint) -> None:
    """Routes that tell of the endpoint."""
    model, watch, name = endpoint.model, endpoint.watch, endpoint.settings.name
    card = {"id": name, "object": "model", "created": endpoint.created, "owned_by": "hf_s3t"}

    @app.get("/health")
    async def health() -> JSONResponse:
        reason = endpoint.reason
        found = {
            "status": "not ready" if reason else "ready", "reason": reason, "generation": model.generation,
            "members": model.members, "state_age_seconds": round(watch.age, 3), "waiting": len(endpoint.batcher),
        }  # fmt: skip
        return JSONResponse(found, 503 if reason else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(endpoint.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict[str, Any]:
        endpoint.check_name(model_id)
        return card


def _add_completions(app: FastAPI, endpoint: Endpoint) -> None:
    """Routes of a causal language model."""

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        endpoint.check_name(asked.model)
        prompt = await endpoint.read(endpoint.prompts.of_completion, asked)
        return await _completed(endpoint, request, False, asked, prompt)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        endpoint.check_name(asked.model)
        prompt = await endpoint.read(endpoint.prompts.of_chat, asked)
        return await _completed(endpoint, request, True, asked, prompt)


async def _completed(
    endpoint: Endpoint, request: Request, chat: bool, asked: Sampling, prompt: Prompt
) -> Response:
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(400, "`stream_options` are for a stream. Add `stream`: true.", "stream_options", "invalid_value")
    job = Job(prompt, 1, len(prompt.tokens), prompt.max_tokens)
    generation = await endpoint.begin(job, request)
    answer = Answer(chat, asked, job, generation, len(prompt.tokens))
    headers = {GENERATION_HEADER: str(generation)}
    if asked.stream:
        return StreamingResponse(answer.stream(), headers=headers, media_type="text/event-stream")
    try:
        return JSONResponse(await unless_gone(request, job, answer.whole()), headers=headers)
    except Exception as error:
        raise as_refusal(error) from error


def _add_classification(app: FastAPI, endpoint: Endpoint) -> None:
    """The route of a model that classifies sequences."""
    most = endpoint.settings.max_batch

    @app.post("/classify")
    async def classify(asked: ClassifyRequest, request: Request) -> Response:
        endpoint.check_name(asked.model)
        if len(asked.texts) > most:
            message = f"{len(asked.texts)} texts in one request; at most {most} are taken (--max-batch). Ask twice."
            raise Refusal(400, message, "texts", "too_many_texts")
        tokens = await endpoint.read(endpoint.prompts.of_texts, asked.texts)
        job = Job(tokens, len(tokens), max(map(len, tokens)))
        generation = await endpoint.begin(job, request)
        try:
            ended = [event async for event in job.events()][-1]
        except Exception as error:
            raise as_refusal(error) from error
        assert isinstance(ended, Ended)
        found = {"object": "classification", "model": endpoint.settings.name, "results": ended.result,
                 "system_fingerprint": fingerprint(generation),
                 "usage": {"prompt_tokens": ended.tokens, "total_tokens": ended.tokens}}  # fmt: skip
        return JSONResponse(found, headers={GENERATION_HEADER: str(generation)})
