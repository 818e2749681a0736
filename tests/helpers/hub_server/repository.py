"""One repository: a bare git repository, its large files by sha256, and the few facts that git does not hold.

Nothing here knows about HTTP. Whoever calls holds `lock`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import HubError
from .faults import Faults
from .xet import Cas

TRACKED = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.npz", "*.onnx", "*.parquet", "*.zip")
ATTRIBUTES = "".join(f"{glob} filter=lfs diff=lfs merge=lfs -text\n" for glob in TRACKED)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
# Nothing of the person's own git settings, and no credentials to ask for.
GIT_ENVIRONMENT = {"PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
GIT_ROLES = ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL")


@dataclass(frozen=True)
class Entry:
    """A file or folder of a commit. `size` is that of the content, for a large file not of its pointer."""

    path: str
    oid: str
    size: int
    folder: bool = False
    sha256: str | None = None
    pointer_size: int = 0


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


class Repository:
    """The repository in folder `path`, which [`Repository.create`] made."""

    def __init__(self, path: Path, faults: Faults, cas: Cas):
        self.path, self.faults, self.cas = path, faults, cas
        self.name = f"{path.parent.name}/{path.name}"
        self.lock = threading.RLock()
        self.meta: dict[str, Any] = json.loads((path / "meta.json").read_text())
        self._refs: dict[str, str] | None = None
        self._entries: dict[str, dict[str, Entry]] = {}
        self._purges: list[tuple[float, set[str], bool]] = []
        self._stale: dict[str, tuple[str, dict[str, Entry]]] = {}
        self._stale_reads = 0

    @classmethod
    def create(cls, path: Path, owner: str, private: bool, faults: Faults, cas: Cas) -> Repository:
        (path / "lfs").mkdir(parents=True)
        meta = {"owner": owner, "private": private, "created": now(), "discussions": {}, "lfs": {}}
        (path / "meta.json").write_text(json.dumps(meta))
        repository = cls(path, faults, cas)
        subprocess.run(["git", "init", "-q", "--bare", "-b", "main", path / "git"], check=True, env=GIT_ENVIRONMENT)
        repository.git("config", "uploadpack.allowAnySHA1InWant", "true")
        repository.commit("refs/heads/main", None, owner, "initial commit", {".gitattributes": ATTRIBUTES.encode()})
        return repository

    def save(self) -> None:
        (self.path / "meta.json").write_text(json.dumps(self.meta))

    def git(self, *arguments: str, data: bytes | None = None) -> bytes:
        """What a git command prints; the next look at the refs reads them anew."""
        who = {f"GIT_{role}": self.meta["owner"] for role in GIT_ROLES}
        command = ["git", "--git-dir", str(self.path / "git"), *arguments]
        run = subprocess.run(command, input=data, capture_output=True, env=GIT_ENVIRONMENT | who)
        if run.returncode:
            raise HubError(400, f"git {arguments[0]}: {' '.join(run.stderr.decode(errors='replace').split())}")
        self._refs = None
        return run.stdout

    # Looking

    def refs(self) -> dict[str, str]:
        """Every ref and the commit it leads to."""
        if self._refs is None:
            lines = self.git("for-each-ref", "--format=%(refname) %(objectname) %(*objectname)").decode().splitlines()
            self._refs = {line.split()[0]: line.split()[-1] for line in lines}
        return self._refs

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag, a whole ref or a sha names. A sha that no ref reaches counts until it is
        collected."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs():
                return self.refs()[name]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            if revision in self._entries:
                return revision
            refs = self._refs
            try:
                return self.git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
            except HubError:
                pass
            finally:
                self._refs = refs
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def entries(self, revision: str) -> dict[str, Entry]:
        """Files and folders of a revision by path."""
        sha = self.resolve(revision)
        if sha not in self._entries:
            listed = self.git("ls-tree", "-r", "-t", "-l", "-z", sha).decode().split("\0")[:-1]
            rows = [(*line.split("\t", 1)[0].split(), line.split("\t", 1)[1]) for line in listed]
            pointers = self._pointers([row[2] for row in rows if row[1] == "blob" and 100 < int(row[3]) < 200])
            self._entries[sha] = {row[4]: self._entry(row, pointers) for row in rows}
        return self._entries[sha]

    @staticmethod
    def _entry(row: tuple[str, ...], pointers: dict[str, tuple[str, int]]) -> Entry:
        _, kind, oid, size, path = row
        if kind == "tree":
            return Entry(path, oid, 0, folder=True)
        if oid in pointers:
            return Entry(path, oid, pointers[oid][1], sha256=pointers[oid][0], pointer_size=int(size))
        return Entry(path, oid, int(size))

    def _pointers(self, blobs: list[str]) -> dict[str, tuple[str, int]]:
        found, text = {}, self.git("cat-file", "--batch", data="".join(f"{blob}\n" for blob in blobs).encode())
        for blob in blobs:
            head, text = text.split(b"\n", 1)
            size = int(head.split()[2])
            match = _POINTER.fullmatch(text[:size])
            if match:
                found[blob] = (match[1].decode(), int(match[2]))
            text = text[size + 1 :]
        return found

    def read(self, entry: Entry) -> bytes:
        """The bytes of a file that git holds."""
        return self.git("cat-file", "blob", entry.oid)

    def content(self, sha256: str) -> bytes:
        """The bytes of a large file."""
        file = self.meta["lfs"][sha256]
        if "xetHash" in file:
            return self.cas.read(file["xetHash"], file["size"])
        return (self.path / "lfs" / sha256).read_bytes()

    def log(self, revision: str = "main") -> list[dict[str, str]]:
        """The commits that a revision reaches, newest first."""
        text = self.git("log", "--format=%H%x1f%an%x1f%at%x1f%s%x1f%b%x1e", self.resolve(revision)).decode()
        keys = ("id", "author", "time", "title", "message")
        return [dict(zip(keys, row.strip("\n").split("\x1f"), strict=True)) for row in text.split("\x1e")[:-1]]

    def info(self, revision: str) -> tuple[str, dict[str, Entry]]:
        """The commit and the files that a read of the repository's info answers with: see `stale_main`."""
        if self._stale_reads and revision in self._stale:
            self._stale_reads -= 1
            return self._stale[revision]
        return self.resolve(revision), self.entries(revision)

    def large(self) -> set[str]:
        """The sha256 of every large file that is stored, whether a commit names it or not."""
        return set(self.meta["lfs"])

    # Changing

    def store(self, sha256: str, content: bytes) -> None:
        """Keeps a large file, which a commit may then name."""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HubError(400, "the content does not have the sha256 that it was announced with")
        (self.path / "lfs" / sha256).write_bytes(content)
        if sha256 not in self.meta["lfs"]:
            self._note(sha256, len(content))

    def _note(self, sha256: str, size: int, **more: str) -> None:
        self.meta["lfs"][sha256] = {"size": size, "pushedAt": now(), "ref": "main", "filename": ""} | more

    def pointer(self, sha256: str, size: int, path: str) -> bytes:
        """What a commit holds in place of a large file, which has to have been uploaded."""
        xet_hash = None if sha256 in self.meta["lfs"] else self.cas.find(sha256)
        if xet_hash:
            self._note(sha256, size, xetHash=xet_hash)
        if sha256 not in self.meta["lfs"]:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path} ({sha256})")
        self.meta["lfs"][sha256]["filename"] = self.meta["lfs"][sha256]["filename"] or path
        return POINTER.format(sha256, size).encode()

    def commit(self, ref: str, parent: str | None, who: str, message: str, changes: dict[str, bytes | None]) -> str:
        """One commit onto `ref`. `changes` maps a path to its content, or a file or folder that goes to `None`."""
        stream = [f"commit {ref}\ncommitter {who} <{who}@hub.test> {int(time.time())} +0000\n".encode()]
        stream.append(b"data %d\n%b\n" % (len(message.encode()), message.encode()))
        stream.append(f"from {parent}\n".encode() if parent else b"")
        for path, content in sorted(changes.items(), key=lambda item: item[1] is not None):
            quoted = '"' + path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
            if content is None:
                stream.append(f"D {quoted}\n".encode())
            else:
                stream.append(f"M 100644 inline {quoted}\ndata {len(content)}\n".encode() + content + b"\n")
        self.git("fast-import", "--quiet", data=b"".join(stream))
        self.save()
        return self.refs()[ref]

    def set_ref(self, ref: str, sha: str | None) -> None:
        """Makes a ref, or with `None` removes it."""
        if sha is None and ref not in self.refs():
            raise HubError(404, f"{ref} does not exist", "RevisionNotFound")
        if sha is not None and ref in self.refs():
            raise HubError(409, f"Reference already exists: {ref}")
        self.git("update-ref", *(("-d", ref) if sha is None else (ref, sha)))
        if sha is None:
            self.collect()

    def squash(self, branch: str, message: str) -> str:
        """The branch becomes one commit without a parent; other refs keep what they reach."""
        ref = f"refs/heads/{branch}"
        if ref not in self.refs():
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        self._remember()
        new = self.git("commit-tree", f"{ref}^{{tree}}", "-m", message).decode().strip()
        self.git("update-ref", ref, new)
        self.collect()
        return new

    def purge(self, oids: set[str], rewrite: bool) -> None:
        """Removes large files, and with `rewrite` every mention of them in every ref's history: see `purge_delay`."""
        self._purges.append((time.monotonic() + self.faults.purge_delay, oids, rewrite))
        self.settle()

    def settle(self, at_once: bool = False) -> None:
        """Does the purges that are due, or all."""
        due = [purge for purge in self._purges if at_once or purge[0] <= time.monotonic()]
        self._purges = [purge for purge in self._purges if purge not in due]
        for _, oids, rewrite in due:
            if rewrite:
                self._rewrite(oids)
            for oid in oids & self.large():
                del self.meta["lfs"][oid]
                (self.path / "lfs" / oid).unlink(missing_ok=True)
            self.save()
            self.collect()

    def _rewrite(self, oids: set[str]) -> None:
        commits = self.git("rev-list", "--all").decode().split()
        blobs = {entry.oid for sha in commits for entry in self.entries(sha).values() if entry.sha256 in oids}
        self._remember()
        flags = ("--signed-tags=strip", "--tag-of-filtered-object=rewrite", "--no-data")
        stream = self.git("fast-export", *flags, "--all")
        self.git("fast-import", "--quiet", "--force", data=without(stream, blobs))

    def collect(self, at_once: bool = False) -> None:
        """Forgets the commits that no ref reaches, and the chunks that no file needs: see `gc`."""
        if at_once or self.faults.gc == "eager":
            self._entries.clear()
            self.git("gc", "--quiet", "--prune=now")
            self.cas.collect()

    def _remember(self) -> None:
        names = [ref.removeprefix("refs/heads/") for ref in self.refs() if ref.startswith("refs/heads/")]
        self._stale = {name: (self.resolve(name), self.entries(name)) for name in names}
        self._stale_reads = self.faults.stale_main

    def describe(self, entry: Entry) -> dict[str, Any]:
        """An entry as the Hub lists it in a tree."""
        described: dict[str, Any] = {"type": "directory" if entry.folder else "file", "oid": entry.oid}
        described |= {"size": entry.size, "path": entry.path}
        if entry.sha256:
            described["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
            xet_hash = self.meta["lfs"].get(entry.sha256, {}).get("xetHash")
            described |= {"xetHash": xet_hash} if xet_hash else {}
        return described


def without(stream: bytes, blobs: set[str]) -> bytes:
    """What git fast-export wrote, with every change to one of `blobs` turned into the removal of its path.

    >>> without(b"commit x\\ndata 8\\nM 1 aa b\\nM 100644 aa a b\\nM 100644 cc c\\n", {"aa"})
    b'commit x\\ndata 8\\nM 1 aa b\\nD a b\\nM 100644 cc c\\n'
    """
    kept, position = [], 0
    while position < len(stream):
        end = stream.index(b"\n", position) + 1
        line = stream[position:end]
        if line.startswith(b"data "):
            end += int(line[5:])
            line = stream[position:end]
        elif line.startswith(b"M ") and line.split(b" ", 3)[2].decode() in blobs:
            line = b"D " + line.split(b" ", 3)[3]
        kept.append(line)
        position = end
    return b"".join(kept)
