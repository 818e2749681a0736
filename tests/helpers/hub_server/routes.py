"""The Hub's API: accounts, repositories, commits, lists, refs, and what removes things."""

from __future__ import annotations

import base64
import fnmatch
import json
import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import JSONResponse, Response

from .call import Call, Row
from .discussions import DISCUSSIONS, open_discussion
from .errors import HubError

CONFLICT = "A commit has happened since. Please refresh and try again."
MODEL = "/api/models/{owner}/{name}"


def whoami(call: Call) -> Any:
    account = call.person()
    token = {"displayName": account.role, "role": account.role}
    return {"type": "user", "name": account.name, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}


def faults(call: Call) -> Any:
    if call.request.method == "POST":
        try:
            call.hub.faults.set(**call.json())
        except ValueError as error:
            raise HubError(400, str(error)) from None
    return vars(call.hub.faults)


# Repositories


def create(call: Call) -> Any:
    sent, account = call.json(), call.person()
    owner = sent.get("organization") or account.name
    if account.name != owner or account.role != "write":
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    name, url = f"{owner}/{sent['name']}", f"{call.hub.endpoint}/{owner}/{sent['name']}"
    if name in call.hub.repositories:
        return JSONResponse({"error": "You already created this model repo", "url": url}, 409)
    call.hub.create(owner, sent["name"], sent.get("visibility") == "private" or sent.get("private") is True)
    return {"url": url, "name": name}


def delete(call: Call) -> Any:
    sent, account = call.json(), call.person()
    name = f"{sent.get('organization') or account.name}/{sent['name']}"
    call.hub.open(name, account, "write")
    call.hub.delete(name)
    return {}


def settings(call: Call) -> Any:
    sent = call.json()
    if "visibility" in sent or "private" in sent:
        call.repository.meta["private"] = sent.get("visibility") == "private" or sent.get("private") is True
        call.repository.save()
    return {"private": call.repository.meta["private"]}


def info(call: Call) -> Any:
    repository = call.repository
    sha, entries = repository.info(call.part("rev") if "rev" in call.request.path_params else "main")
    siblings = []
    for entry in entries.values():
        if not entry.folder:
            siblings.append({"rfilename": entry.path})
            if call.query.get("blobs", "").lower() in ("true", "1"):
                siblings[-1] |= {"size": entry.size, "blobId": entry.oid}
                lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
                siblings[-1] |= {"lfs": lfs} if entry.sha256 else {}
    answer = {"_id": repository.name, "id": repository.name, "modelId": repository.name, "sha": sha}
    answer |= {"author": repository.meta["owner"], "private": repository.meta["private"], "gated": False}
    answer |= {"disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
    return answer | {"createdAt": repository.meta["created"], "lastModified": repository.meta["created"]}


# Commits


def preupload(call: Call) -> Any:
    repository, revision = call.repository, call.part("rev")
    # "None" is what the client asks for when the commit is to open a pull request.
    sha = repository.resolve("main" if revision == "None" else revision)
    entries = repository.entries(sha)
    rules = repository.read(entries[".gitattributes"]).decode().splitlines() if ".gitattributes" in entries else []
    tracked = [rule.split()[0] for rule in rules if "filter=lfs" in rule]
    files = []
    for file in call.json()["files"]:
        path, sample = file["path"], base64.b64decode(file.get("sample", ""))
        named = any(fnmatch.fnmatch(path.rpartition("/")[2], glob) or fnmatch.fnmatch(path, glob) for glob in tracked)
        large = named or file["size"] > 10 * 2**20 or b"\0" in sample
        files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        if path in entries and not entries[path].folder:
            files[-1]["oid"] = entries[path].sha256 or entries[path].oid
    return {"files": files, "commitOid": sha}


def _changes(call: Call, base: str, lines: list[dict[str, Any]]) -> dict[str, bytes | None]:
    entries, removed, written = call.repository.entries(base), {}, {}
    for line in lines:
        value = line["value"]
        path = value["path"].rstrip("/")
        if line["key"] == "file":
            written[path] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            written[path] = call.repository.pointer(value["oid"], value["size"], path)
        elif line["key"] in ("deletedFile", "deletedFolder", "deletedEntry"):
            folder = path in entries and entries[path].folder
            if path not in entries or line["key"] == ("deletedFile" if folder else "deletedFolder"):
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            removed[path] = None
        else:
            raise HubError(400, f"a commit with {line['key']!r} is not something that this server does")
    return removed | written


def commit(call: Call) -> Any:
    lines = [json.loads(line) for line in call.body.split(b"\n") if line.strip()]
    header, repository, revision = lines[0]["value"], call.repository, call.part("rev")
    if call.hub.faults.take("fail_commits_412"):
        raise HubError(412, CONFLICT)
    base, parent = repository.resolve(revision), header.get("parentCommit")
    pull_request = call.query.get("create_pr", "").lower() in ("1", "true")
    if pull_request:
        base = repository.resolve(parent) if parent else base
    elif parent and not base.startswith(parent):
        raise HubError(412, CONFLICT)
    changes = _changes(call, base, lines[1:])
    number = open_discussion(call, header["summary"], pull_request=True)["num"] if pull_request else None
    ref = f"refs/pr/{number}" if number else f"refs/heads/{revision}"
    if not number and ref not in repository.refs():
        ref = revision
    if not re.match("refs/(heads|pr)/", ref):
        raise HubError(400, f"{revision} is not a branch")
    message = "\n\n".join(filter(None, (header["summary"], header.get("description"))))
    sha = repository.commit(ref, base, call.person().name, message, changes)
    if call.hub.faults.take("commit_503_after_apply"):
        raise HubError(503, "Service Unavailable")
    url = f"{call.hub.endpoint}/{repository.name}"
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
    return answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if number else {})


# Lists


def tree(call: Call) -> Any:
    folder = call.part("path").strip("/") if "path" in call.request.path_params else ""
    entries = call.repository.entries(call.part("rev"))
    if folder and (folder not in entries or not entries[folder].folder):
        raise HubError(404, f"{folder} does not exist on {call.part('rev')}", "EntryNotFound")
    below = f"{folder}/" if folder else ""
    found = [entry for path, entry in entries.items() if path.startswith(below)]
    if call.query.get("recursive", "").lower() not in ("true", "1"):
        found = [entry for entry in found if "/" not in entry.path[len(below) :]]
    return call.page([call.repository.describe(entry) for entry in found])


def paths_info(call: Call) -> Any:
    entries = call.repository.entries(call.part("rev"))
    form = call.request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded")
    paths = parse_qs(call.body.decode()).get("paths", []) if form else call.json()["paths"]
    asked = [path.rstrip("/") for path in paths]
    return [call.repository.describe(entries[path]) for path in asked if path in entries]


def commits(call: Call) -> Any:
    rows = call.repository.log(call.part("rev"))
    for row in rows:
        row["date"] = datetime.fromtimestamp(int(row.pop("time")), UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        row["authors"] = [{"user": row.pop("author")}]
    return call.page(rows)


def refs(call: Call) -> Any:
    kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/", "pullRequests": "refs/pr/"}
    if call.query.get("include_prs", "").lower() not in ("true", "1"):
        del kinds["pullRequests"]
    rows = call.repository.refs().items()
    return {
        kind: [
            {"name": ref.removeprefix(start), "ref": ref, "targetCommit": sha}
            for ref, sha in rows
            if ref.startswith(start)
        ]
        for kind, start in kinds.items()
    }


def lfs_files(call: Call) -> Any:
    rows = []
    for sha256, meta in call.repository.meta["lfs"].items():
        rows.append({"fileOid": sha256, "oid": sha256, **meta})
        if call.hub.faults.lfs_filename_missing:
            del rows[-1]["filename"]
    return call.page(rows)


# Refs, and what removes things


def branch(call: Call) -> Any:
    ref = f"refs/heads/{call.part('branch')}"
    if call.request.method == "POST":
        call.repository.set_ref(ref, call.repository.resolve(call.json().get("startingPoint") or "main"))
    elif ref == "refs/heads/main":
        raise HubError(403, "the branch main cannot be deleted")
    else:
        call.repository.set_ref(ref, None)
    return {}


def tag(call: Call) -> Any:
    if call.request.method == "DELETE":
        call.repository.set_ref(f"refs/tags/{call.part('rev')}", None)
    else:
        sent = call.json()
        sha, name = call.repository.resolve(call.part("rev")), sent["tag"]
        if f"refs/tags/{name}" in call.repository.refs():
            raise HubError(409, f"Tag reference exists already: {name}")
        call.repository.git("tag", *(("-m", sent["message"]) if sent.get("message") else ()), name, sha)
    return {}


def super_squash(call: Call) -> Any:
    message = call.json().get("message") or f"Super-squash branch '{call.part('branch')}' using huggingface_hub"
    if len(message) > 500:
        raise HubError(400, "the message of a squash has at most 500 characters")
    return {"commitId": call.repository.squash(call.part("branch"), message)}


def purge(call: Call) -> Any:
    deletions = call.json()["deletions"]
    if len(deletions["sha"]) > 1000:
        raise HubError(400, "at most 1000 files can be deleted at once")
    call.repository.purge(set(deletions["sha"]), deletions.get("rewriteHistory", False))
    return {}


API: list[Row] = [
    ("GET", "/_faults", None, faults),
    ("POST", "/_faults", None, faults),
    ("GET", "/api/whoami-v2", None, whoami),
    ("GET", "/api/agent-harnesses", None, lambda call: {"harnesses": []}),
    ("POST", "/api/validate-yaml", None, lambda call: {"errors": [], "warnings": []}),
    ("POST", "/api/repos/create", None, create),
    ("DELETE", "/api/repos/delete", None, delete),
    ("GET", MODEL, "read", info),
    ("GET", MODEL + "/revision/{rev}", "read", info),
    ("GET", MODEL + "/auth-check", "read", lambda call: Response()),
    ("PUT", MODEL + "/settings", "write", settings),
    ("POST", MODEL + "/preupload/{rev}", "write", preupload),
    ("POST", MODEL + "/commit/{rev}", "write", commit),
    ("GET", MODEL + "/tree/{rev}", "read", tree),
    ("GET", MODEL + "/tree/{rev}/{path:path}", "read", tree),
    ("POST", MODEL + "/paths-info/{rev}", "read", paths_info),
    ("GET", MODEL + "/commits/{rev}", "read", commits),
    ("GET", MODEL + "/refs", "read", refs),
    ("POST", MODEL + "/branch/{branch}", "write", branch),
    ("DELETE", MODEL + "/branch/{branch}", "write", branch),
    ("POST", MODEL + "/tag/{rev}", "write", tag),
    ("DELETE", MODEL + "/tag/{rev}", "write", tag),
    ("POST", MODEL + "/super-squash/{branch}", "write", super_squash),
    ("GET", MODEL + "/lfs-files", "write", lfs_files),
    ("POST", MODEL + "/lfs-files/batch", "write", purge),
    *DISCUSSIONS,
]
