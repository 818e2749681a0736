"""The second origin: large files by signed addresses, and the edge that remembers what it has served."""

from __future__ import annotations

import math
import time

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .errors import HubError
from .hub import Hub


def cdn_application(hub: Hub) -> Starlette:
    edge: dict[str, tuple[float, bytes]] = {}

    def put(name: str, sha256: str, content: bytes) -> Response:
        repository = hub.repositories[name]
        with repository.lock:
            repository.store(sha256, content)
        return Response()

    def get(name: str, sha256: str, requested: str | None) -> Response:
        fetched, content = edge.get(f"{name}/{sha256}", (-math.inf, b""))
        if time.monotonic() - fetched >= hub.faults.cdn_ttl:
            repository = hub.repositories.get(name)
            if repository is None:
                return Response("NoSuchKey", 404)
            with repository.lock:
                repository.settle()
                if sha256 not in repository.large():
                    return Response("NoSuchKey", 404)
                content = repository.content(sha256)
            edge[f"{name}/{sha256}"] = (time.monotonic(), content)
        headers = {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}
        if requested:
            start, _, stop = requested.removeprefix("bytes=").partition("-")
            part = content[int(start) : int(stop) + 1 if stop else None]
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
            return Response(part, 206, headers)
        return Response(content, headers=headers)

    async def answer(request: Request) -> Response:
        name = f"{request.path_params['owner']}/{request.path_params['name']}"
        sha256, verb = request.path_params["sha256"], request.method.replace("HEAD", "GET")
        if request.query_params.get("signature") != hub.signature(verb, name, sha256):
            return Response("AccessDenied", 403)
        try:
            if verb == "PUT":
                return await run_in_threadpool(put, name, sha256, await request.body())
            return await run_in_threadpool(get, name, sha256, request.headers.get("range"))
        except HubError as error:
            return Response(str(error), error.status)

    return Starlette(routes=[Route("/{owner}/{name}/{sha256}", answer, methods=["GET", "HEAD", "PUT"])])
