"""The store that hf_xet writes its chunks to, a folder in place of a server, and what has to be known of its files.

Nobody is asked for a token here, and only whole xorbs are ever dropped: chunks that a removed file shares with another
stay. What a test may conclude from it is that a 404 of the Hub is no proof that the bytes are gone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

_RECORD = 48
_VERIFIED, _WITH_SHA256, _END = 0x80000000, 0x40000000, b"\xff" * 32


def _text(digest: bytes) -> str:
    """A hash as Xet prints it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


class Cas:
    """The chunks in `path`. `live` says which Xet hashes the repositories still name."""

    def __init__(self, path: Path, live: Callable[[], set[str]]):
        self.path, self._live = path, live
        self.committed: set[str] = set()

    def _files(self) -> Iterator[tuple[str, str, set[str], Path]]:
        """Of every file: its sha256, its Xet hash, the xorbs that hold its chunks, the shard that says so."""
        for shard in (self.path / "xet/xorbs/shards").glob("*.mdb"):
            content, at = shard.read_bytes(), _RECORD
            while content[at : at + 32] != _END:
                flags, count = struct.unpack("<II", content[at + 32 : at + 40])
                records = [content[at + _RECORD * k :][:32] for k in range(1, count + 1)]
                last = count * (2 if flags & _VERIFIED else 1) + (1 if flags & _WITH_SHA256 else 0)
                sha256 = content[at + _RECORD * last :][:32] if flags & _WITH_SHA256 else b"\0" * 32
                yield _text(sha256), _text(content[at : at + 32]), {_text(record) for record in records}, shard
                at += _RECORD * (last + 1)

    def find(self, sha256: str) -> str | None:
        """The Xet hash of a file that was uploaded."""
        found = next((xet_hash for digest, xet_hash, _, _ in self._files() if digest == sha256), None)
        self.committed |= {found} if found else set()
        return found

    def read(self, xet_hash: str, size: int) -> bytes:
        """A file put together from its chunks, for a client that does not speak Xet."""
        from hf_xet import XetFileInfo, XetSession

        group = XetSession().new_download_stream_group(endpoint=f"local://{self.path}")
        return b"".join(group.download_stream(XetFileInfo(xet_hash, size)))

    def xorbs(self) -> set[str]:
        """The pools of chunks that are stored."""
        files = (self.path / "xet/xorbs/xorbs").glob("default.*")
        return {path.name.removeprefix("default.") for path in files if path.suffix != ".tagset"}

    def collect(self) -> None:
        """Drops the xorbs that only files need which no repository names any more. Uploads not yet committed stay."""
        files, live = list(self._files()), self._live()
        dead = {xet_hash for _, xet_hash, _, _ in files if xet_hash in self.committed - live}
        needed = {xorb for _, xet_hash, xorbs, _ in files if xet_hash not in dead for xorb in xorbs}
        doomed = {xorb for _, xet_hash, xorbs, _ in files if xet_hash in dead for xorb in xorbs} - needed
        kept = {shard for _, xet_hash, _, shard in files if xet_hash not in dead}
        for shard in {shard for _, _, _, shard in files} - kept:
            shard.unlink()
        for xorb in doomed:
            (self.path / "xet/xorbs/xorbs" / f"default.{xorb}").unlink(missing_ok=True)
        if doomed:
            # What tells an uploader that a chunk is stored already.
            for path in (self.path / "xet/shard-cache").glob("*.mdb"):
                path.unlink()
