"""`hf-s3t serve` as a process: real clients, other processes that delete, signals, what it does not start with."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import models
import served
from endpoints import TOKEN, Endpoint, Process, wait_until, write_base
from hf_s3t import S3TStore
from hf_s3t.cli.main import app

WATCHED = """
import sys
def note(event, arguments):
    if event in ("open", "sqlite3.connect") and ".s3t" in str(arguments[0]):
        print("touched", arguments[0], file=sys.stderr)
sys.addaudithook(note)
"""
"""Tells of every file of the private state that a process opens."""

PAGE = (Path(__file__).parents[2] / "docs/endpoint.md").read_text(encoding="utf-8")

ASKED = {"model": "store", "prompt": "abc", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base", room=4096, ends=False)


@pytest.fixture
def started() -> Iterator[Any]:
    """Starts a process, which ends with the test whatever becomes of it."""
    processes: list[Process] = []

    def start(*arguments: object, **how: Any) -> Process:
        processes.append(Process(*arguments, **how))
        return processes[-1]

    yield start
    for process in processes:
        process.process.kill()
        process.process.wait()


def curl(*arguments: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on the PATH")
    return subprocess.run(["curl", "-sN", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


def test_clients_ask_while_another_process_deletes(started: Any, base: Path, tmp_path: Path) -> None:
    store = served.copy("llama", tmp_path)
    process = started(store.path, "--base", base, "--refresh-seconds", "0.2", prelude=WATCHED)
    assert process.openai.completions.create(**ASKED).system_fingerprint == "s3t-generation-0"
    _by_curl(process)
    _as_the_page_says(process)
    stop, found = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            began = time.monotonic()
            answer = process.openai.completions.create(**ASKED)
            found.append((began, answer.system_fingerprint))

    with ThreadPoolExecutor(4) as pool:
        askers = [pool.submit(ask) for _ in range(4)]
        deletion = "from hf_s3t import S3TStore; import sys; S3TStore(sys.argv[1]).delete(slices=[(0, 1)])"
        subprocess.run([sys.executable, "-c", deletion, str(store.path)], check=True)
        deleted = time.monotonic()
        process.wait_for(1)
        wait_until(lambda: time.monotonic() > deleted + 1.5)
        stop.set()
        assert [asker.result() for asker in askers] == [None] * 4  # no request failed
    late = {generation for began, generation in found if began > deleted + 1.2}
    assert late == {"s3t-generation-1"} and len(found) > 10
    touched = [line for line in process.lines if line.startswith("touched")]
    assert touched == [] or all("/intents/" in line for line in touched), touched
    _ended_by_sigterm(process)
    assert "other machines reach" not in process.log and "Traceback" not in process.log


def _by_curl(process: Endpoint) -> None:
    chat = {"model": "store", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    header = ("-H", "content-type: application/json")
    text = curl(f"{process.url}/v1/chat/completions", *header, "-d", json.dumps(chat))
    assert json.loads(text)["usage"]["completion_tokens"] == 5
    text = curl(f"{process.url}/v1/completions", *header, "-d", json.dumps({**ASKED, "stream": True}))
    assert text.count("data: ") == 8 and text.endswith("data: [DONE]\n\n")
    text = curl(f"{process.url}/v1/completions", *header, "-d", json.dumps({**ASKED, "n": 2}))
    assert json.loads(text)["error"]["param"] == "n"
    assert json.loads(curl(f"{process.url}/health"))["status"] == "ready"
    assert "s3t_members 3.0" in curl(f"{process.url}/metrics")


def _as_the_page_says(process: Endpoint) -> None:
    block = re.findall(r"```python\n(.*?)```", PAGE, re.S)[0]
    block = block.replace("http://127.0.0.1:8000", process.url).replace('model="out"', 'model="store"')
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, "docs/endpoint.md", "exec"), {})
    assert printed.getvalue().endswith(" s3t-generation-0\n")


def test_the_page_names_options_and_routes_that_there_are() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).stdout
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= set(re.findall(r"--[a-z][a-z-]+", shown))


def _ended_by_sigterm(process: Process) -> None:
    """What runs and what waits is answered; nothing new is taken; then the process ends with 0."""
    options = {"max_tokens": 500, "stream": True, "stream_options": {"include_usage": True}}
    stream = process.openai.completions.create(**{**ASKED, **options})
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.post, f"{process.url}/v1/completions", json=ASKED, timeout=60)
        wait_until(lambda: process.metrics()["s3t_queue_length"] == 1)
        process.http.close()
        process.process.terminate()
        wait_until(lambda: _is_refused(process.url))
        rest = list(stream)
        assert waiting.result().status_code == 200
    assert rest[-2].choices[0].finish_reason == "length" and rest[-1].usage.completion_tokens == 500
    assert process.end() == 0


def _is_refused(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=5)
    except httpx.TransportError as error:  # one that nobody had taken yet is reset
        return isinstance(error, httpx.ConnectError)
    return False


def test_a_client_that_dawdles_does_not_keep_it_from_ending(started: Any, base: Path, tmp_path: Path) -> None:
    process = started(served.copy("llama", tmp_path).path, "--base", base, "--drain-seconds", "1")
    stream = process.openai.completions.create(**{**ASKED, "max_tokens": 4000, "stream": True})
    next(stream)
    host, port = process.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 50\r\n\r\n{")
        assert process.end() == 0
    stream.close()


@pytest.mark.slow
def test_who_has_the_token_deletes_from_a_store_whose_state_is_elsewhere(
    started: Any, base: Path, tmp_path: Path
) -> None:
    store = served.copy("llama", tmp_path)
    state = (store.path / ".s3t").rename(tmp_path / "state")
    given = (store.path, "--base", base, "--allow-delete", "--state", state, "--host", "0.0.0.0", "--name", "it")
    process = started(*given, HF_S3T_DELETE_TOKEN=TOKEN)
    assert "other machines reach 0.0.0.0" in process.log and TOKEN not in process.log
    body = {"ids": [models.llama_rows(1)["id"][0]], "reference": "DSR-1"}

    def delete(token: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {token}"}
        return httpx.request("DELETE", f"{process.url}/v1/examples", json=body, headers=headers, timeout=60)

    assert delete("another token of the tests").status_code == 401
    assert delete(TOKEN).json()["status"] == "inactive"
    answer = httpx.post(f"{process.url}/v1/completions", json={**ASKED, "model": "it"}, timeout=60)
    assert answer.headers["x-s3t-generation"] == "1"
    assert S3TStore(store.path, state=state).status().generation == 1
    assert process.end() == 0


@pytest.mark.slow
def test_a_published_copy_is_enough(started: Any, tmp_path: Path) -> None:
    copy = served.copy("bert", tmp_path).path
    shutil.rmtree(copy / ".s3t")
    process = started(copy, "--base", write_base(tmp_path / "base", "bert"))
    answer = process.http.post("/classify", json={"texts": ["abc", "de"]})
    assert [one["label"][:6] for one in answer.json()["results"]] == ["LABEL_"] * 2
    assert process.end() == 0 and not (copy / ".s3t").exists()


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (["--allow-delete"], {}, "Give --allow-delete and --state together"),
        (["--allow-delete", "--state", "x"], {}, "needs a bearer token in HF_S3T_DELETE_TOKEN"),
        (["--allow-delete", "--state", "x"], {"HF_S3T_DELETE_TOKEN": "short"}, "has 5 characters"),
        ([], {"HF_S3T_KEY": "k" * 32}, "HF_S3T_KEY is set"),
        (["--max-staleness", "1"], {}, "too old between two looks"),
        (["--host", "203.0.113.1"], {}, "cannot be listened on"),
        ([], {}, "holds no store"),
    ],
)
def test_what_it_does_not_start_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "0", *arguments])
    assert done.exit_code in (2, 5) and message in done.stderr.replace("\n", " ")


def test_a_store_that_does_not_name_its_base_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(served.trained("llama")), "--port", "0"])
    assert done.exit_code == 2 and "Give --base" in done.stderr
