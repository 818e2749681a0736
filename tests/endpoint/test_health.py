"""A model that does not answer any more is known to whoever asks for the endpoint's health."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import served
from endpoints import NAME, running, wait_until
from hf_s3t.endpoint.batcher import Batcher, Begun, Ended, Job, NotReadyError

ASKED = {"model": NAME, "prompt": "a", "max_tokens": 1}


def test_batches_that_fail_one_after_the_other_are_known() -> None:
    model, error = served.load(served.trained("llama"), "llama"), RuntimeError("an illegal memory access")

    def break_down(*args: Any) -> None:
        raise error

    with running(model) as endpoint:
        for times in (2, 3):
            broken = model.get_input_embeddings().register_forward_pre_hook(break_down)
            for _ in range(times):
                assert endpoint.http.post("/v1/completions", json=ASKED).status_code == 500
            broken.remove()
            health = endpoint.http.get("/health")
            assert health.status_code == (200 if times < 3 else 503)
            assert endpoint.metrics()["s3t_ready"] == (times < 3)
            assert endpoint.http.post("/v1/completions", json=ASKED).status_code == 200  # still tried
        reason = health.json()["reason"]
        assert "The last 3 batches failed, the last one with: RuntimeError: an illegal memory access" in reason
        wait_until(lambda: endpoint.http.get("/health").status_code == 200, 5)


def test_a_thread_that_has_ended_is_known() -> None:
    model = served.load(served.trained("llama"), "llama")

    def leave(*args: Any) -> None:
        raise SystemExit

    with running(model) as endpoint:
        model.get_input_embeddings().register_forward_pre_hook(leave)
        streamed = endpoint.http.post("/v1/completions", json={**ASKED, "stream": True})
        assert "The thread that answers has ended" in streamed.text
        for answer in (endpoint.http.get("/health"), endpoint.http.post("/v1/completions", json=ASKED)):
            assert answer.status_code == 503 and "The thread that answers has ended" in answer.text


def batcher(answer: Any, note: Any = lambda waits, rows: None) -> Batcher:
    return Batcher(answer, lambda: None, 9, 1, 999, 0.0, note)


def test_whoever_waits_is_told_that_the_thread_has_ended() -> None:
    def leave(jobs: list[Job]) -> None:
        raise SystemExit

    async def ask() -> None:
        made, jobs = batcher(leave), [Job(None) for _ in range(3)]
        for job in jobs:
            made.submit(job)
        made.start()
        for job in jobs:
            with pytest.raises(NotReadyError, match="has ended"):
                await asyncio.wait_for(job.begun(), 10)
        with pytest.raises(NotReadyError, match="has ended"):
            made.submit(Job(None))

    asyncio.run(ask())


def test_the_thread_outlives_what_is_not_the_models_fault() -> None:
    def answer(jobs: list[Job]) -> None:
        for job in jobs:
            job.tell(Begun(7))
            job.tell(Ended())

    def note(waits: list[float], rows: int) -> None:
        raise OSError("no counter")

    async def a_job() -> Job:
        return Job(None)

    async def ask() -> None:
        made, job = batcher(answer, note), Job(None)
        made.submit(gone)
        made.submit(job)
        made.start()
        assert await asyncio.wait_for(job.begun(), 10) == 7
        assert made.reason is None and gone.cancelled
        await asyncio.to_thread(made.stop)
        assert made.reason is None

    gone = asyncio.run(a_job())  # its loop is closed
    asyncio.run(ask())
