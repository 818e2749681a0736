"""The one error of the server, in the form that the client maps to its own exceptions."""

from __future__ import annotations


class HubError(Exception):
    """An answer other than success. The client goes by `code`: RepoNotFound, RevisionNotFound, EntryNotFound."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.status, self.headers = status, named | {name.replace("_", "-"): value for name, value in headers.items()}
