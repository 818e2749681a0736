"""An endpoint follows its store: no answer of an old state, none of a state that is too old, none that mixes two."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import models
import served
from endpoints import LETTERS, NAME, TOKEN, Endpoint, running, settings, tokenizer, wait_until, write_base
from hf_s3t import S3TEnsemble, S3TStore
from hf_s3t.endpoint.batcher import Batcher, Ended, Job, NotReadyError
from hf_s3t.endpoint.classification import Classification
from hf_s3t.endpoint.generation import Generation, Prompt
from hf_s3t.store.receipts import read_receipts
from trainers import logits

LONG = 120


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with room for long answers, which no token ends."""
    return write_base(tmp_path_factory.mktemp("base") / "base", room=4096, ends=False)


@pytest.fixture
def store(tmp_path: Path) -> S3TStore:
    return served.copy("llama", tmp_path)


@pytest.fixture
def model(store: S3TStore, base: Path) -> S3TEnsemble:
    return S3TEnsemble.from_pretrained(store.path, str(base))


@pytest.fixture
def start(base: Path, model: S3TEnsemble) -> Iterator[Any]:
    """Starts an endpoint with some settings, which ends with the test."""
    with ExitStack() as until_its_end:
        tokens = AutoTokenizer.from_pretrained(base)
        yield lambda **changes: until_its_end.enter_context(running(model, tokens, **changes))


def ask(endpoint: Endpoint, count: int = 8, **given: Any) -> Any:
    asked: dict[str, Any] = {"model": NAME, "prompt": "abc", "max_tokens": count, "temperature": 0}
    return endpoint.openai.completions.create(**asked | given)


def long_stream(endpoint: Endpoint, count: int = 3000) -> Any:
    """A stream that has begun, and goes on for longer than a test; closing it ends the answer."""
    stream = ask(endpoint, count, stream=True)
    next(stream)
    return stream


def test_a_deletion_is_followed_and_an_answer_is_of_one_state(start: Any, store: S3TStore) -> None:
    endpoint = start()
    old = ask(endpoint, LONG).choices[0].text
    stream = ask(endpoint, LONG, stream=True)
    chunks = [next(stream)]
    with ThreadPoolExecutor(1) as pool:
        store.delete(slices=[(0, 1), (1, 2)])
        endpoint.wait_for(1)
        after = pool.submit(ask, endpoint, LONG)  # waits for its turn, and begins after the deletion
        chunks += list(stream)
        new = after.result()
    assert "".join(chunk.choices[0].text for chunk in chunks) == old
    assert {chunk.system_fingerprint for chunk in chunks} == {"s3t-generation-0"}
    assert new.system_fingerprint == "s3t-generation-1" and new.choices[0].text != old
    assert ask(endpoint, LONG).choices[0].text == new.choices[0].text
    found = endpoint.metrics()
    assert found["s3t_generation"] == found["s3t_deletions_seen_total"] == 1 and found["s3t_members"] == 3


def test_all_that_a_thread_asks_in_a_block_is_one_answer(model: S3TEnsemble, store: S3TStore) -> None:
    batch = served.inputs_of("llama", 2)
    with model.answering() as generation:
        before = logits(model, batch)
        thread = threading.Thread(target=lambda: (store.delete(slices=[(0, 1)]), model.refresh()))
        thread.start()
        thread.join()
        assert (generation, model.generation) == (0, 1)
        assert torch.equal(logits(model, batch), before)
    with model.answering() as generation:
        assert generation == 1 and not torch.equal(logits(model, batch), before)


def test_an_older_copy_of_the_store_is_refused(start: Any, store: S3TStore, tmp_path: Path) -> None:
    old = shutil.copytree(store.path, tmp_path / "old")
    endpoint = start(max_staleness=0.6)
    store.delete(slices=[(0, 1)])
    endpoint.wait_for(1)
    new = ask(endpoint).choices[0].text
    newest = store.path.rename(tmp_path / "newest")
    old.rename(store.path)
    fingerprints = set()

    def is_not_ready() -> bool:
        answer = endpoint.http.post("/v1/completions", json={"model": NAME, "prompt": "abc", "max_tokens": 8})
        fingerprints.add(answer.json().get("system_fingerprint"))
        return answer.status_code == 503

    wait_until(is_not_ready)
    assert fingerprints <= {"s3t-generation-1", None}
    answer = endpoint.http.get("/health")
    assert answer.status_code == 503 and "is of generation 0 now, the model answers with 1" in answer.json()["reason"]
    assert endpoint.metrics()["s3t_generation"] == 1
    store.path.rename(old)
    newest.rename(store.path)
    wait_until(lambda: endpoint.http.get("/health").status_code == 200)
    assert ask(endpoint).choices[0].text == new


def test_a_store_that_cannot_be_reached_makes_it_not_ready(start: Any, store: S3TStore, tmp_path: Path) -> None:
    endpoint = start(max_staleness=0.6, max_batch=1)
    stream = long_stream(endpoint)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(endpoint.http.post, "/v1/completions", json={"model": NAME, "prompt": "a"})
        wait_until(lambda: endpoint.metrics()["s3t_queue_length"] == 1)
        away = store.path.rename(tmp_path / "away")
        wait_until(lambda: endpoint.http.get("/health").status_code == 503)
        stream.close()
        late = waiting.result()  # it was taken while the store was there, and its turn came later
    now = endpoint.http.post("/v1/completions", json={"model": NAME, "prompt": "a"})
    for answer in (late, now):
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "not_ready"
        assert "--max-staleness allows 0.6: deletions may be unknown here" in answer.json()["error"]["message"]
    assert endpoint.metrics()["s3t_ready"] == 0
    away.rename(store.path)
    wait_until(lambda: endpoint.http.get("/health").status_code == 200)
    assert ask(endpoint).choices[0].text


def test_the_bare_base_does_not_answer(start: Any, store: S3TStore) -> None:
    endpoint = start()
    store.delete(slices=[(shard, piece) for shard in range(3) for piece in range(3)])
    wait_until(lambda: endpoint.http.get("/health").status_code == 503)
    assert "No stage of the store is live" in endpoint.http.get("/health").json()["reason"]
    assert endpoint.http.post("/v1/completions", json={"model": NAME, "prompt": "a"}).status_code == 503


@pytest.mark.parametrize("shape, kind", [("llama", Generation), ("bert", Classification)])
def test_the_last_stage_goes_between_the_check_and_the_answer(shape: str, kind: Any, tmp_path: Path) -> None:
    store = served.copy(shape, tmp_path)
    model = served.load(store, shape)

    def check() -> None:
        """Nothing is wrong, and then all of it is deleted."""
        store.delete(slices=[(shard, piece) for shard in range(3) for piece in range(3)])
        model.refresh()

    async def ask() -> int:
        batcher = Batcher(kind(model, tokenizer()), check, 9, 1, 999, 0.0, lambda waits, rows: None)
        batcher.submit(job := Job(Prompt((3, 4), 4, 0.0) if kind is Generation else [[3, 4]]))
        batcher.start()
        await asyncio.to_thread(batcher.stop)
        return await job.begun()

    with pytest.raises(NotReadyError, match="only the bare base model could answer"):
        asyncio.run(asyncio.wait_for(ask(), 20))


def test_more_than_may_wait_are_told_to_come_again(start: Any, model: S3TEnsemble) -> None:
    passes: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: passes.append(1))
    endpoint = start(max_queue=2, max_batch=1)
    stream = long_stream(endpoint)
    asked = {"model": NAME, "prompt": "a", "max_tokens": 2}
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(endpoint.http.post, "/v1/completions", json=asked) for _ in range(2)]
        wait_until(lambda: endpoint.metrics()["s3t_queue_length"] == 2)
        answer = endpoint.http.post("/v1/completions", json=asked)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        stream.close()  # whoever hangs up does not keep others waiting
        assert [one.result().status_code for one in waiting] == [200, 200]
    assert len(passes) < 3000
    assert endpoint.metrics()['s3t_answers_total{route="/v1/completions",status="429"}'] == 1


def _whole(endpoint: Endpoint, count: int) -> socket.socket:
    """Asks for a whole answer; closing the connection hangs up."""
    host, port = endpoint.url.removeprefix("http://").split(":")
    body = json.dumps({"model": NAME, "prompt": "abc", "max_tokens": count, "temperature": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def test_who_hangs_up_a_whole_answer_is_not_computed(start: Any, model: S3TEnsemble) -> None:
    passes: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: passes.append(1))
    endpoint = start(max_batch=1)
    connection = _whole(endpoint, 1500)
    wait_until(lambda: len(passes) > 5)
    connection.close()
    assert ask(endpoint, 1).choices[0].text and len(passes) < 1500


def test_who_hangs_up_while_waiting_has_no_place(start: Any) -> None:
    endpoint = start(max_queue=1, max_batch=1)
    stream = long_stream(endpoint)
    connection = _whole(endpoint, 5)
    wait_until(lambda: endpoint.metrics()["s3t_queue_length"] == 1)
    connection.close()
    wait_until(lambda: endpoint.metrics()["s3t_queue_length"] == 0, 5)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(ask, endpoint, 1)
        wait_until(lambda: late.done() or endpoint.metrics()["s3t_queue_length"] == 1)
        stream.close()
        assert late.result().choices[0].text


def test_a_batch_that_fails_fails_alone(start: Any, model: S3TEnsemble, caplog: pytest.LogCaptureFixture) -> None:
    endpoint = start()
    forward = model._members.base.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no memory is left")

    model._members.base.forward = broken
    answer = endpoint.http.post("/v1/completions", json={"model": NAME, "prompt": "a"})
    assert answer.status_code == 500 and "no memory is left" in answer.json()["error"]["message"]
    assert "a batch of 1 requests failed" in caplog.text
    events = endpoint.http.post("/v1/completions", json={"model": NAME, "prompt": "a", "stream": True}).text
    assert '"error"' in events and "no memory is left" in events
    model._members.base.forward = forward
    assert ask(endpoint).choices[0].text


def test_what_waits_is_answered_before_the_thread_ends(model: S3TEnsemble) -> None:
    """As after SIGTERM: stopping takes nobody's turn away."""
    async def ask_and_stop() -> list[Any]:
        answer = Generation(model, tokenizer())
        batcher = Batcher(answer, lambda: None, 9, 1, 999, 0.0, lambda waits, rows: None)
        jobs = [Job(Prompt((3, 4), 4, 0.0)) for _ in range(5)]
        for job in jobs:
            batcher.submit(job)
        batcher.start()
        await asyncio.to_thread(batcher.stop)
        assert [await job.begun() for job in jobs] == [0] * 5
        return [[event async for event in job.events()][-1] for job in jobs]

    ended = asyncio.run(asyncio.wait_for(ask_and_stop(), 20))
    assert all(isinstance(event, Ended) and event.tokens for event in ended)


def test_what_the_base_was_saved_with_ends_no_answer(start: Any, model: S3TEnsemble) -> None:
    model.generation_config.max_time, model.generation_config.stop_strings = 1e-9, list(LETTERS)
    found = ask(start())
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 8)


def test_nobody_waits_for_an_answer_that_was_cut(model: S3TEnsemble, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(stop: tuple[str, ...] = ()) -> tuple[str, Any]:
        batcher = Batcher(Generation(model, tokenizer()), lambda: None, 9, 1, 999, 0.0, lambda waits, rows: None)
        batcher.submit(job := Job(Prompt((3, 4), 8, 0.0, stop=stop)))
        batcher.start()
        await asyncio.to_thread(batcher.stop)
        await job.begun()
        *pieces, ended = [event async for event in job.events()]
        return "".join(piece.text for piece in pieces), ended

    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *given, **named: generate(*given, **named | {"max_new_tokens": 3}))
    text, _ = asyncio.run(asyncio.wait_for(ask(), 10))
    assert len(text) == 3
    # The last letter is held back, as a stop text begins with it.
    assert asyncio.run(asyncio.wait_for(ask((f"{text[2]}and more",)), 10)) == (text, Ended("length", 3))


def test_a_batch_is_as_large_as_may_be() -> None:
    sizes = [(1, 10), (1, 10), (2, 10), (1, 30), (1, 10), (1, 10), (1, 999), (9, 1), (1, 1)]
    batches: list[list[tuple[int, int]]] = []

    def answer(jobs: list[Job]) -> None:
        batches.append([(job.rows, job.prompt_tokens) for job in jobs])

    async def ask() -> None:
        batcher = Batcher(answer, lambda: None, 99, 4, 60, 0.0, lambda waits, rows: None)
        for rows, length in sizes:
            batcher.submit(Job(None, rows, length))
        batcher.start()
        await asyncio.to_thread(batcher.stop)

    asyncio.run(ask())
    assert batches == [sizes[:3], sizes[3:5], sizes[5:6], sizes[6:7], sizes[7:8], sizes[8:]]


@pytest.mark.parametrize("room, tokens, sizes", [(64, 9999, [1, 3]), (200, 150, [1, 2, 1])])
def test_a_long_prompt_and_a_long_answer_fit_together_or_wait(room: int, tokens: int, sizes: list[int]) -> None:
    """Positions are learned: a row that went on beyond them would be an error, its mates' as well."""
    model = served.load(served.trained("gpt2"), "gpt2")
    jobs: list[Job] = []
    batches: list[int] = []

    async def ask() -> list[Any]:
        answer = Generation(model, tokenizer())
        answer.ends = frozenset()
        batcher = Batcher(answer, lambda: None, 9, 16, tokens, 0.0, lambda _, rows: batches.append(rows), room)
        for prompt, count in [(50, 14), (3, 40), (24, 2), (2, 20)]:
            jobs.append(Job(Prompt((5,) * prompt, count, 0.0), 1, prompt, count))
            batcher.submit(jobs[-1])
        batcher.start()
        await asyncio.to_thread(batcher.stop)
        assert [await job.begun() for job in jobs] == [0] * 4
        return [[event async for event in job.events()][-1].tokens for job in jobs]

    assert asyncio.run(asyncio.wait_for(ask(), 20)) == [14, 40, 2, 20]
    assert batches == sizes


# ---- deletions over HTTP ----


def test_there_is_no_deletion_unless_it_was_allowed(start: Any) -> None:
    endpoint = start()
    answer = endpoint.http.request("DELETE", "/v1/examples", json={"ids": ["x"]},
                                   headers={"authorization": f"Bearer {TOKEN}"})  # fmt: skip
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert endpoint.metrics()["s3t_generation"] == 0


def test_who_has_the_token_deletes(start: Any, store: S3TStore) -> None:
    endpoint = start(delete_token=TOKEN)
    row = models.llama_rows(1)["id"][0]
    old = ask(endpoint, LONG).choices[0].text

    def delete(token: str | None, **body: Any) -> Any:
        headers = {"authorization": token} if token is not None else {}
        return endpoint.http.request("DELETE", "/v1/examples", json=body, headers=headers)

    for wrong in (None, "", TOKEN, "Bearer", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer ü"):
        answer = delete(wrong.encode() if wrong else wrong, ids=[row])
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "bad_token"
    assert store.status().generation == 0 and not read_receipts(store)
    good = f"Bearer {TOKEN}"
    assert delete(good, ids=["nobody"]).json()["error"]["code"] == "unknown_example"
    assert delete(good).status_code == delete(good, ids=[row], rows=[{}]).status_code == 400
    assert store.status().generation == 0
    answer = delete(good, ids=[row], reference="DSR-1")
    receipt = answer.json()
    assert answer.status_code == 200 and receipt["status"] == "inactive" and receipt["reference"] == "DSR-1"
    assert ask(endpoint).system_fingerprint == "s3t-generation-1" and ask(endpoint, LONG).choices[0].text != old
    assert [kept["receipt"] for kept in read_receipts(store)] == [receipt["receipt"]]
    assert settings().delete_token is None
