"""Starting and stopping: the two origins, each on a free port, in threads of this process."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from .call import application
from .cdn import cdn_application
from .faults import Faults
from .hub import Hub
from .repository import Repository
from .routes import API
from .transfer import TRANSFER


class Server:
    """A running server. Its repositories may be looked into directly, by [`Server.repository`]."""

    token, reader_token, stranger_token = "hf_owner", "hf_reader", "hf_stranger"

    def __init__(self, folder: Path | str, port: int = 0, **faults: Any):
        self.folder, self.faults = Path(folder).resolve(), Faults()
        self.faults.set(**faults)
        self.hub = Hub(self.folder, self.faults)
        self._running = []
        # The client takes a redirect to the origin that it came from for the file itself: hence two names.
        api = application(self.hub, API + TRANSFER)
        self.endpoint = self.hub.endpoint = f"http://127.0.0.1:{self._run(api, port)}"
        self.hub.cdn = f"http://localhost:{self._run(cdn_application(self.hub), 0)}"

    def _run(self, app: Any, port: int) -> int:
        listening = socket.create_server(("127.0.0.1", port))
        # An answer is sent in two parts, and the second would wait 40 ms for the client to confirm the first. asyncio
        # sees to that itself, but not for a socket that is handed to it. Connections take it over from here.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        self._running.append((server, thread))
        return listening.getsockname()[1]

    def stop(self) -> None:
        for server, _ in self._running:
            server.should_exit = True
        for _, thread in self._running:
            thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def repository(self, name: str) -> Repository:
        """A repository as it is stored, for looking: `refs()`, `log()`, `entries()`, `large()`, `git()`."""
        return self.hub.repositories[name]

    def variables(self, home: Path | str, token: str | None = None, xet: bool = False) -> dict[str, str]:
        """What a process has to have in its environment to reach this server and nothing else.

        Args:
            home (`Path` or `str`): Where the process keeps its cache. A new one makes a client that knows nothing yet.
            token (`str`, *optional*, defaults to the owner's): Who it is; `""` for nobody.
            xet (`bool`, *optional*, defaults to `False`): Whether it uses Xet rather than LFS.
        """
        home = Path(home).resolve()
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token if token is None else token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def environment(self, home: Path | str, token: str | None = None, xet: bool = False) -> dict[str, str]:
        """The environment of this process with [`Server.variables`] in it, for `subprocess.run(..., env=...)`."""
        return dict(os.environ) | self.variables(home, token, xet)


def start(folder: Path | str, port: int = 0, **faults: Any) -> Server:
    """Starts a server whose repositories lie in `folder`, also those of a server that was there before.

    Args:
        folder (`Path` or `str`): An empty or new folder, or one that an earlier server left.
        port (`int`, *optional*, defaults to a free one): Of the first origin.
        faults: The switches of [`Faults`], which may be changed later as `server.faults.gc = "lazy"`.
    """
    return Server(folder, port, **faults)
