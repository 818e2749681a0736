"""What one server holds: its repositories, who may do what with them, its switches, its second origin."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from .errors import HubError
from .faults import Faults
from .repository import Repository
from .xet import Cas


@dataclass(frozen=True)
class Account:
    """Who a token stands for. A token whose role is `"read"` changes nothing, also not what its user owns."""

    name: str
    role: str = "write"


class Hub:
    """The state of a server whose repositories lie in `folder`, as `folder/models/owner/name`."""

    def __init__(self, folder: Path, faults: Faults):
        self.folder, self.faults = folder, faults
        self.endpoint = self.cdn = ""
        self.odd: Callable[[Request, Response], Response] | None = None  # what somebody hostile answers instead
        self.lock = threading.RLock()
        self.accounts = {
            "hf_owner": Account("owner"),
            "hf_reader": Account("owner", role="read"),
            "hf_stranger": Account("stranger"),
        }
        self.cas = Cas(folder / "cas", self._xet_hashes)
        self._secret = secrets.token_bytes()
        self.repositories: dict[str, Repository] = {}
        for meta in sorted(folder.glob("models/*/*/meta.json")):
            repository = Repository(meta.parent, faults, self.cas)
            self.repositories[repository.name] = repository
        self.cas.committed |= self._xet_hashes()

    def create(self, owner: str, name: str, private: bool) -> None:
        path = self.folder / "models" / owner / name
        self.repositories[f"{owner}/{name}"] = Repository.create(path, owner, private, self.faults, self.cas)

    def delete(self, name: str) -> None:
        shutil.rmtree(self.repositories.pop(name).path)
        self.cas.collect()

    def _xet_hashes(self) -> set[str]:
        large = [file for repository in self.repositories.values() for file in repository.meta["lfs"].values()]
        return {file["xetHash"] for file in large if "xetHash" in file}

    def account(self, token: str | None) -> Account | None:
        """Who sent a request, `None` for nobody in particular."""
        if token is None:
            return None
        if token not in self.accounts:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.accounts[token]

    def open(self, name: str, account: Account | None, need: str) -> Repository:
        """The repository, for somebody who may read or write it. What one may not read does not exist for one."""
        repository = self.repositories.get(name)
        owns = repository is not None and account is not None and account.name == repository.meta["owner"]
        if repository is None or (repository.meta["private"] and not owns):
            ask = {} if account else {"WWW_Authenticate": "Basic"}
            raise HubError(404 if account else 401, "Repository not found", "RepoNotFound", **ask)
        if need == "write" and account is None:
            raise HubError(401, "Invalid username or password.", WWW_Authenticate="Basic")
        if need == "write" and not (owns and account.role == "write"):
            raise HubError(403, "Forbidden: you do not have the rights to write to this repository")
        return repository

    def signed(self, verb: str, name: str, sha256: str) -> str:
        """The address on the second origin at which `verb` needs no token."""
        return f"{self.cdn}/{name}/{sha256}?signature={self.signature(verb, name, sha256)}"

    def signature(self, verb: str, name: str, sha256: str) -> str:
        return hmac.new(self._secret, f"{verb} {name} {sha256}".encode(), hashlib.sha256).hexdigest()[:32]
