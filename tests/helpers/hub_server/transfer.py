"""Bytes in and out: the resolve route, git-lfs, the tokens of Xet, and git clone and fetch."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

from starlette.responses import JSONResponse, Response

from .call import Call, Row
from .errors import HubError
from .repository import GIT_ENVIRONMENT

REPOSITORY = "/{owner}/{name}"


def resolve(call: Call) -> Response:
    """A file of a revision, or for a large one where to fetch it."""
    repository, path = call.repository, call.part("path")
    sha = repository.resolve(call.part("rev"))
    entry = repository.entries(sha).get(path)
    if entry is None or entry.folder:
        raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
    headers = {"X-Repo-Commit": sha}
    if entry.sha256 is None:
        # To a HEAD request the web server sends the length, and not the body.
        return Response(repository.read(entry), headers=headers | {"ETag": f'"{entry.oid}"'})
    if entry.sha256 not in repository.large():
        raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    headers["Location"] = call.hub.signed("GET", repository.name, entry.sha256)
    xet_hash = repository.meta["lfs"][entry.sha256].get("xetHash")
    if xet_hash:
        route = f"{call.hub.endpoint}/api/models/{repository.name}/xet-read-token/{sha}"
        headers |= {"X-Xet-Hash": xet_hash, "Link": f'<{route}>; rel="xet-auth"'}
    return Response(status_code=302, headers=headers)


def lfs_batch(call: Call) -> Response:
    sent, repository = call.json(), call.repository
    upload = sent["operation"] == "upload"
    if upload:
        call.hub.open(repository.name, call.account, "write")
    verify = {"href": f"{call.hub.endpoint}/{repository.name}.git/info/lfs/verify"}
    objects = []
    for wanted in sent["objects"]:
        oid, stored = wanted["oid"], wanted["oid"] in repository.large()
        objects.append({"oid": oid, "size": wanted["size"]})
        if upload and not stored:
            put = {"href": call.hub.signed("PUT", repository.name, oid)}
            objects[-1]["actions"] = {"upload": put, "verify": verify}
        elif not upload and stored:
            objects[-1]["actions"] = {"download": {"href": call.hub.signed("GET", repository.name, oid)}}
        elif not upload:
            objects[-1]["error"] = {"code": 404, "message": "Object does not exist"}
    content = {"transfer": "basic", "objects": objects, "hash_algo": "sha256"}
    return JSONResponse(content, media_type="application/vnd.git-lfs+json")


def lfs_verify(call: Call) -> Any:
    sent = call.json()
    if call.repository.meta["lfs"].get(sent["oid"], {}).get("size") != sent["size"]:
        raise HubError(404, "the object has not arrived")
    return {}


def xet_token(call: Call) -> Response:
    """Where hf_xet reads or writes. Uploads read the body, downloads the headers."""
    revision = call.part("rev")
    call.repository.resolve("main" if revision == "None" else revision)
    address, token, until = f"local://{call.hub.cas.path}", "xet", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until)}
    return JSONResponse({"casUrl": address, "accessToken": token, "exp": until}, headers=headers)


def git(call: Call) -> Response:
    """`git clone` and `git fetch`, by git's own program for web servers."""
    request = call.request
    below = request.scope["path"].split("/", 3)[3]
    environment = GIT_ENVIRONMENT | {
        "GIT_PROJECT_ROOT": str(call.repository.path),
        "GIT_HTTP_EXPORT_ALL": "1",
        "PATH_INFO": f"/git/{below}",
        "REQUEST_METHOD": request.method,
        "QUERY_STRING": request.url.query,
        "CONTENT_TYPE": request.headers.get("content-type", ""),
        "CONTENT_LENGTH": str(len(call.body)),
        "HTTP_CONTENT_ENCODING": request.headers.get("content-encoding", ""),
        "GIT_PROTOCOL": request.headers.get("git-protocol", ""),
        "HOME": os.devnull,
    }
    run = subprocess.run(["git", "http-backend"], input=call.body, capture_output=True, env=environment)
    head, _, body = run.stdout.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if line)
    status = int(headers.pop("Status", "200").split()[0])
    return Response(body, status, headers)


TRANSFER: list[Row] = [
    ("GET", "/api/models/{owner}/{name}/xet-read-token/{rev}", "read", xet_token),
    ("GET", "/api/models/{owner}/{name}/xet-write-token/{rev}", "write", xet_token),
    ("GET", REPOSITORY + "/resolve/{rev}/{path:path}", "read", resolve),
    ("POST", REPOSITORY + "/info/lfs/objects/batch", "read", lfs_batch),
    ("POST", REPOSITORY + "/info/lfs/verify", "write", lfs_verify),
    ("GET", REPOSITORY + "/info/refs", "read", git),
    ("POST", REPOSITORY + "/git-upload-pack", "read", git),
]
