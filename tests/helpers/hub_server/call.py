"""From a request to a function of one repository, and from what that returns or raises to an answer."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .errors import HubError
from .hub import Account, Hub
from .repository import Repository

Handler = Callable[["Call"], Any]
# Method, path, what the caller has to be allowed ("read" or "write", `None` where no repository is named), function
Row = tuple[str, str, str | None, Handler]


@dataclass
class Call:
    """One request, with the account that sent it and, where the path names one, the repository."""

    hub: Hub
    request: Request
    body: bytes
    account: Account | None
    opened: Repository | None = None

    @property
    def repository(self) -> Repository:
        assert self.opened is not None
        return self.opened

    @property
    def query(self) -> dict[str, str]:
        return dict(self.request.query_params)

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def part(self, name: str) -> str:
        """A part of the path. The router sees it quoted, because a branch may have a slash in its name."""
        return unquote(self.request.path_params[name])

    def person(self) -> Account:
        if self.account is None:
            raise HubError(401, "Invalid username or password.")
        return self.account

    def page(self, rows: list[Any]) -> Response:
        """One page of a list, with the address of the next."""
        start, most = int(self.query.get("cursor", 0)), self.hub.faults.page_size
        stop, headers = start + min(int(self.query.get("limit", most)), most), {}
        if stop < len(rows):
            following = urlencode(self.query | {"cursor": stop})
            headers["Link"] = f'<{self.hub.endpoint}{self.request.scope["path"]}?{following}>; rel="next"'
        return JSONResponse(rows[start:stop], headers=headers)


def _token(request: Request) -> str | None:
    """The token of a client, or the password that git was given."""
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        value = base64.b64decode(value).decode().partition(":")[2]
    return value or None


def _answer(hub: Hub, need: str | None, handler: Handler, request: Request, body: bytes) -> Response:
    try:
        call = Call(hub, request, body, hub.account(_token(request)))
        if need is None:
            with hub.lock:
                answer = handler(call)
        else:
            name = f"{call.part('owner')}/{call.part('name').removesuffix('.git')}"
            call.opened = hub.open(name, call.account, need)
            with call.opened.lock:
                call.opened.settle()
                answer = handler(call)
    except HubError as error:
        answer = JSONResponse({"error": str(error)}, error.status, error.headers)
    response = answer if isinstance(answer, Response) else JSONResponse(answer)
    return response if hub.odd is None else hub.odd(request, response)


def application(hub: Hub, rows: list[Row]) -> Callable[[Any, Any, Any], Any]:
    """The rows as an ASGI application, which routes by the path as it was sent."""

    def endpoint(need: str | None, handler: Handler) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            body = await request.body()
            await asyncio.sleep(hub.faults.latency)
            return await run_in_threadpool(_answer, hub, need, handler, request, body)

        return answer

    routes = [Route(path, endpoint(need, handler), methods=[verb]) for verb, path, need, handler in rows]
    inner = Starlette(routes=routes)

    async def raw(scope: Any, receive: Any, send: Any) -> None:
        await inner(dict(scope, path=scope["raw_path"].decode()), receive, send)

    return raw
