"""Endpoints that tests ask: one in this process, over real HTTP, or `hf-s3t serve` as a process of its own.

The models are those of `served.py`. Their tokenizer knows one letter per token, and a base may have more room than it
was trained with, so that an answer lasts as long as a test needs.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import served
from hf_s3t import S3TEnsemble
from hf_s3t.endpoint.app import make_app
from hf_s3t.endpoint.settings import Settings
from models import VOCABULARY

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?:|'-"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
NAME = "tiny"
TOKEN = "a token of the tests that is long enough"


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A letter is a token; what ends an answer is token 2."""
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {text: place for place, text in enumerate([*special, *LETTERS])}
    assert len(vocabulary) == VOCABULARY
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **names)


def write_base(path: Path, shape: str = "llama", room: int = 64, ends: bool = True) -> Path:
    """The base of a shape as a folder, with its tokenizer. Unless it `ends`, no token ends an answer."""
    model, tokens = served.SHAPES[shape].build(), tokenizer()
    model.config.max_position_embeddings = room if shape == "llama" else model.config.max_position_embeddings
    if not ends:
        tokens.eos_token = None
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(path)
    tokens.save_pretrained(path)
    return path


def settings(**changes: Any) -> Settings:
    """Of an endpoint that looks often and is old soon."""
    return Settings(**{"name": NAME, "refresh_seconds": 0.05, "max_staleness": 30.0} | changes)


class Endpoint:
    """Where an endpoint is, and clients for it; its application, where that is of this process."""

    def __init__(self, url: str, app: Any = None):
        self.url, self.app = url, app
        self.http = httpx.Client(base_url=url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def metrics(self) -> dict[str, float]:
        """What it counts, by name and labels."""
        lines = (line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def wait_for(self, generation: int, seconds: float = 20) -> None:
        """Waits until it answers with a generation."""
        wait_until(lambda: self.http.get("/health").json()["generation"] >= generation, seconds)

    def close(self) -> None:
        """Ends its clients."""
        self.http.close()
        self.openai.close()


def wait_until(holds: Any, seconds: float = 20) -> None:
    """Waits until something holds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def running(model: S3TEnsemble, tokens: Any = None, **changes: Any) -> Iterator[Endpoint]:
    """An endpoint in this process: a real server in a thread."""
    app = make_app(model, tokens or tokenizer(), settings(**changes))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    endpoint = Endpoint(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app)
    try:
        yield endpoint
    finally:
        endpoint.close()
        server.should_exit = True
        thread.join()


class Process(Endpoint):
    """`hf-s3t serve` on a free port; what it logs is kept."""

    def __init__(self, *arguments: object, prelude: str = "", **environment: str):
        code = f"{prelude}\nfrom hf_s3t.cli.main import app\napp()"
        words = [sys.executable, "-c", code, "serve", *map(str, arguments), "--port", "0"]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: self._address() or self.process.poll() is not None, 60)
        if self.process.poll() is None:
            super().__init__(self._address() or "")
            wait_until(self._answers)

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(line.rstrip() for line in iter(self.process.stderr.readline, ""))

    def _address(self) -> str | None:
        found = re.search(r"answers on (http://[\d.]+:\d+)", self.log)
        return found[1].replace("0.0.0.0", "127.0.0.1") if found else None

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.ConnectError):
            return self.http.get("/health").status_code == 200
        return False

    @property
    def log(self) -> str:
        """What it said so far."""
        return "\n".join(self.lines)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal, and returns how it ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join()
        return code


