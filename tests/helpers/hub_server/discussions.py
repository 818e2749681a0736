"""Discussions and pull requests, as far as opening, looking, closing and removing a pull request's ref."""

from __future__ import annotations

from typing import Any

from .call import Call, Row
from .errors import HubError
from .repository import now

PATH = "/api/models/{owner}/{name}/discussions"


def open_discussion(call: Call, title: str, pull_request: bool) -> dict[str, Any]:
    kept = call.repository.meta["discussions"]
    number = len(kept) + 1
    kept[str(number)] = {
        "num": number,
        "title": title,
        "status": "open",
        "isPullRequest": pull_request,
        "createdAt": now(),
        "author": {"name": call.person().name},
        "repo": {"name": call.repository.name, "type": "model"},
    }
    call.repository.save()
    return kept[str(number)]


def _kept(call: Call) -> dict[str, Any]:
    kept = call.repository.meta["discussions"].get(call.part("number"))
    if kept is None:
        raise HubError(404, f"there is no discussion {call.part('number')}")
    return kept


def new(call: Call) -> Any:
    sent = call.json()
    opened = open_discussion(call, sent["title"], sent.get("pullRequest", False))
    if opened["isPullRequest"]:
        call.repository.set_ref(f"refs/pr/{opened['num']}", call.repository.resolve("main"))
    return opened


def listed(call: Call) -> Any:
    rows = list(call.repository.meta["discussions"].values())
    if "type" in call.query:
        rows = [row for row in rows if row["isPullRequest"] == (call.query["type"] == "pull_request")]
    if "status" in call.query:
        rows = [row for row in rows if (row["status"] == "open") == (call.query["status"] == "open")]
    size = call.hub.faults.page_size
    start = int(call.query.get("p", 0)) * size
    return {"discussions": rows[start : start + size], "count": len(rows), "start": start}


def details(call: Call) -> Any:
    changes = {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "events": [], "diff": ""}
    return _kept(call) | changes


def status(call: Call) -> Any:
    kept = _kept(call)
    kept["status"] = call.json()["status"]
    call.repository.save()
    event = {"id": f"{kept['num']:024x}", "type": "status-change", "createdAt": now(), "author": kept["author"]}
    return {"newStatus": event | {"data": {"status": kept["status"]}}}


def remove_ref(call: Call) -> Any:
    if _kept(call)["status"] not in ("closed", "merged"):
        raise HubError(400, "the ref of an open pull request cannot be deleted: close or merge it first")
    call.repository.set_ref(f"refs/pr/{call.part('number')}", None)
    return {}


DISCUSSIONS: list[Row] = [
    ("GET", PATH, "read", listed),
    ("POST", PATH, "write", new),
    ("GET", PATH + "/{number}", "read", details),
    ("POST", PATH + "/{number}/status", "write", status),
    ("DELETE", PATH + "/{number}/ref", "write", remove_ref),
]
