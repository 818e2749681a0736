"""Loads what a store serves, and runs an endpoint in this process until a signal ends it."""

from __future__ import annotations

import logging
import math
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import uvicorn
from transformers import AutoTokenizer

from ..errors import StoreError
from ..serving.ensemble import S3TEnsemble
from ..store.store import S3TStore
from .app import make_app
from .settings import Settings, is_loopback

logger = logging.getLogger(__name__)


def load(
    store: str, base: str | None = None, tokenizer: str | None = None, state: Path | None = None, **kwargs: Any
) -> tuple[S3TEnsemble, Any]:
    """The model that a store serves, and its tokenizer.

    Args:
        store (`str`): a folder or the id of a repository.
        base, tokenizer (`str`, *optional*): folders or ids; `None`: the base that the store names, the base's own one.
        state (`Path`, *optional*): of a store that examples are deleted from; `None`: answering needs none.
        kwargs: for the base's `from_pretrained`.

    Raises:
        ValueError: the store does not name its base.
        StoreError: there is no store, or it does not fit the base.
        OSError: the base or the tokenizer cannot be loaded.
    """
    opened = S3TStore(store, state=state)
    opened.reads_state = state is not None
    if state is not None:
        opened.key  # noqa: B018  a deletion would need it: said now, and not when somebody asks for one
    stored = opened.manifest().recipe["base"]
    name = tokenizer or base or stored.get("id")
    if name is None:
        raise ValueError(f"{store} does not name its base: it was a folder, or built from a config. Give --base.")
    revision = None if tokenizer or base else stored.get("revision")
    if torch.cuda.is_available():
        kwargs.setdefault("device_map", "auto")
    try:
        loaded = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise OSError(f"The tokenizer of {name} cannot be loaded: {error}. Give one with --tokenizer.") from error
    return S3TEnsemble.from_pretrained(opened, base, **kwargs), loaded


def bound(host: str, port: int) -> socket.socket:
    """A socket that holds an address, on which nobody listens yet: whoever asks is refused until answers are ready.

    Raises:
        OSError: the address is in use, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise OSError(f"{host}:{port} cannot be listened on: {error}. Give another --host or --port.") from error
    return found


def serve(model: S3TEnsemble, tokenizer: Any, settings: Settings, listener: socket.socket) -> NoReturn:
    """Answers until SIGTERM or SIGINT: then nothing new is taken, what was taken is answered within
    `settings.drain_seconds`, and the process ends with 0.
    """
    host, port = listener.getsockname()[:2]
    if not is_loopback(host):
        logger.warning(
            "other machines reach %s:%d, and whoever does may ask: there is no password, no encryption, and no limit "
            "per client here. Put a proxy that has them in front, or bind to 127.0.0.1.", host, port,
        )  # fmt: skip
    config = uvicorn.Config(
        make_app(model, tokenizer, settings), log_config=None, access_log=False, lifespan="on",
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again when all is answered
        signal.signal(number, lambda *_: sys.exit(0))
    logger.info("%s answers on http://%s:%d, generation %d", settings.name, host, port, model.generation)
    uvicorn.Server(config).run(sockets=[listener])
    raise StoreError("The endpoint ended by itself; the log says why.")
