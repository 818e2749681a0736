"""Looks for texts and ids in every byte below a store and its state, with bounded memory: `verify --scan-for`.

Each file is read as a stream of bytes, as it is; where it is packed in a way that Python's standard library opens,
what is inside, too; of a database also its long values, which pages cut; of a text also what JSON has escaped in it.
What could not be looked into is named. Which texts were found is told by the line of the list, never by themselves.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import stat
import zipfile
import zlib
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import S3TError
from .any_database import SQLITE_HEAD, long_values
from .audit import Check
from .folder import StoreFolder
from .needles import Hit, Needles, read_texts

CHUNK = 4 << 20
"""Bytes that are read at a time; three or four times as many are in memory."""
DEEPEST = 5
"""So many times may something be packed."""
PACKED_RATIO, PACKED_AT_LEAST = 200, 1 << 30
"""What is inside of something packed is read up to so many times its size, or so many bytes."""
MOST_SHOWN = 1000
PACKED: tuple[tuple[bytes, Any], ...] = (
    (b"\x1f\x8b", lambda stream: gzip.GzipFile(fileobj=stream, mode="rb")),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\0", lzma.LZMAFile),
    (b"]\0\0", lzma.LZMAFile),
)
FOREIGN = (
    (b"\x28\xb5\x2f\xfd", "packed by zstd"), (b"PAR1", "a Parquet file"), (b"7z\xbc\xaf\x27\x1c", "packed by 7z"),
    (b"Rar!", "packed by rar"), (b"\x04\x22\x4d\x18", "packed by lz4"), (b"ARROW1", "an Arrow file, maybe packed"),
    (b"\x89HDF", "an HDF5 file, maybe packed"), (b"%PDF", "a PDF file"), (b"PACK", "a pack of git"),
    (b"\xff\x06\x00\x00sNaPpY", "packed by snappy"), (b"\x1f\x9d", "packed by compress"),
    (b"x\x01", "maybe packed by zlib"), (b"x\x9c", "maybe packed by zlib"), (b"x\xda", "maybe packed by zlib"),
)  # fmt: skip
"""How files begin that hold packed parts which nothing here opens. Their bytes are looked at all the same."""
DAMAGED = (OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, S3TError)
ESCAPE = re.compile(
    rb'\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\["\\/bfnrt]'
)
ESCAPED = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def scan_check(store: StoreFolder, texts: str | os.PathLike[str]) -> Check:
    """Looks for texts and ids, and for digests of them that need no key, in every byte below a store and its state.

    A text is looked for as UTF-8 and UTF-16, escaped as in JSON, and by its sha256, sha1 and md5, raw and in
    hexadecimal. Names of files are looked at, too. A short id may be found by chance, or as a part of a longer one.

    Args:
        texts (`str` or `Path`): a file outside the store with a text or an id of at least 4 characters on each line;
            of a `.jsonl` file each line is a JSON text, or a row, of which every value that is long enough counts.

    Raises:
        ValueError: the list cannot be used, or the store is in a repository: its files are not here.
    """
    path = Path(texts)
    if store.source.repo_id is not None:
        raise ValueError(f"{store.path} is in a repository. `pull` it into a folder, and look there.")
    roots = [store.path.resolve()]
    if store.private.exists() and not store.private.resolve().is_relative_to(roots[0]):
        roots.append(store.private.resolve())
    if any(path.resolve().is_relative_to(root) for root in roots):
        raise ValueError(f"{path} lies inside the store, so the search would find the file itself. Put it elsewhere.")
    needles = Needles(read_texts(path))
    scan = Scan(needles)
    for root in roots:
        scan.folder(root, "" if root == roots[0] else f"{root.name}/")
    return scan.check(path.name)


@dataclass
class Scan:
    """A search that goes on, and what it has found."""

    needles: Needles
    found: list[str] = field(default_factory=list)
    places: int = 0
    unread: list[str] = field(default_factory=list)
    files: int = 0
    size: int = 0

    def check(self, file: str) -> Check:
        """What came of it, as a check of the store."""
        broken = [text.format(file=file) for text in self.found]
        if self.places > len(broken):
            broken.append(f"and in {self.places - len(broken)} more places")
        name = f"none of the texts on {self.needles.lines} lines is in its {self.files} files ({self.size:,} bytes)"
        return Check(name, tuple(broken), tuple(self.unread))

    def folder(self, root: Path, prefix: str) -> None:
        """Looks at everything below a folder; links are looked at and not followed."""
        for above, folders, files in os.walk(root, onerror=lambda error: self._skip(error.filename, error)):
            folders.sort()
            for name in sorted([*folders, *files]):
                path = Path(above, name)
                shown = prefix + path.relative_to(root).as_posix()
                self._names(shown, name)
                if path.is_symlink():
                    self._names(shown, os.readlink(path))
                    self.unread.append(f"{self.masked(shown)}: a link, which is not followed")
                elif name in files:
                    self._file(path, shown)

    def _file(self, path: Path, shown: str) -> None:
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                self.unread.append(f"{self.masked(shown)}: no regular file")
                return
            with open(path, "rb") as stream:
                self.files += 1
                head = self._stream(stream, shown)
                if head.startswith(SQLITE_HEAD):
                    self._database(path, shown)
                self._inside(stream, shown, head, max(PACKED_AT_LEAST, PACKED_RATIO * path.stat().st_size), 1)
        except FileNotFoundError:
            pass  # it went while others were looked at
        except DAMAGED as error:
            self._skip(shown, error)

    def _skip(self, shown: str, error: Exception) -> None:
        text = f"{self.masked(shown)}: it cannot be read to its end ({type(error).__name__})"
        if text not in self.unread[-1:]:
            self.unread.append(text)

    # ---- bytes ----

    def _stream(self, stream: IO[bytes], shown: str, limit: int | None = None) -> bytes:
        """Looks at every byte of a stream; returns the first ones."""
        head, tail, before = b"", b"", 0
        while chunk := stream.read(CHUNK):
            head = head or chunk[:16]
            data = tail + chunk
            self._look(data, shown, before - len(tail), len(tail))
            before += len(chunk)
            if limit is not None and before > limit:
                self.unread.append(f"{self.masked(shown)}: only the first {before:,} bytes of it were looked at")
                break
            tail = data[-self.needles.longest :]
        self.size += before
        return head

    def _look(self, data: bytes, shown: str, offset: int | None, seen: int = 0) -> None:
        """Looks at some bytes, of which the first `seen` were looked at before."""
        for hit in self.needles.find(data):
            if hit.end > seen:
                self._note(shown, None if offset is None else offset + hit.start, hit)
        if b"\\" in data and b"\0" not in data and ESCAPE.search(data):
            plain, starts, shifts = _unescaped(data)
            for hit in self.needles.find(plain):
                start, end = (at + shifts[bisect_right(starts, at) - 1] for at in (hit.start, hit.end))
                if end > seen and plain[hit.start : hit.end] != data[start : start + hit.end - hit.start]:
                    self._note(shown, None if offset is None else offset + start, hit)

    def _note(self, shown: str, offset: int | None, hit: Hit) -> None:
        self.places += 1
        if len(self.found) < MOST_SHOWN:
            where = "" if offset is None else f" at byte {offset}"
            name = self.masked(shown).replace("{", "{{").replace("}", "}}")
            self.found.append(f"line {hit.line} of {{file}}: in {name}{where}, {hit.form}")

    # ---- names ----

    def _names(self, shown: str, name: str) -> None:
        for hit in self.needles.find(os.fsencode(name)):
            self._note(f"the name of {shown}", None, hit)

    def masked(self, name: str) -> str:
        """A name to be shown, without what is looked for."""
        data = os.fsencode(name)
        for hit in sorted(self.needles.find(data), key=lambda hit: hit.start - hit.end):
            data = data.replace(os.fsencode(name)[hit.start : hit.end], "…".encode())
        return data.decode("utf-8", "backslashreplace")

    # ---- what is inside ----

    def _database(self, path: Path, shown: str) -> None:
        try:
            for where, value in long_values(path):
                self._look(value, f"{shown}, {where}", None)
        except DAMAGED as error:
            self._skip(f"{shown}, as a database", error)

    def _inside(self, stream: IO[bytes], shown: str, head: bytes, limit: int, depth: int) -> None:
        foreign = next((kind for magic, kind in FOREIGN if head.startswith(magic)), None)
        opener = next((opener for magic, opener in PACKED if head.startswith(magic)), None)
        if foreign:
            self.unread.append(f"{self.masked(shown)}: {foreign}, of which only the bytes were looked at")
        elif depth > DEEPEST and (opener or head.startswith(b"PK\3\4")):
            self.unread.append(f"{self.masked(shown)}: packed more than {DEEPEST} times")
        elif opener:
            stream.seek(0)
            with opener(stream) as inner:
                self._packed(inner, f"{shown}, unpacked", limit, depth)
        elif head.startswith(b"PK\3\4") or (depth == 1 and zipfile.is_zipfile(stream)):  # it may begin further on
            stream.seek(0)
            with zipfile.ZipFile(stream) as archive:
                for entry in archive.infolist():
                    self._names(f"{shown}: {entry.filename}", entry.filename)
                    try:
                        with archive.open(entry) as inner:
                            self._packed(inner, f"{shown}: {entry.filename}", limit, depth)
                    except DAMAGED as error:
                        self._skip(f"{shown}: {entry.filename}", error)

    def _packed(self, inner: IO[bytes], shown: str, limit: int, depth: int) -> None:
        head = self._stream(inner, shown, limit)
        if head.startswith(SQLITE_HEAD):
            self.unread.append(f"{self.masked(shown)}: a database, of which only the bytes were looked at")
        self._inside(inner, shown, head, limit, depth + 1)


def _unescaped(data: bytes) -> tuple[bytes, list[int], list[int]]:
    """A text without JSON's escapes, and by how much its parts were further on: beginnings of the parts, shifts."""
    pieces, starts, shifts, length, last = [], [0], [0], 0, 0
    for found in ESCAPE.finditer(data):
        pieces.append(data[last : found.start()])
        meant = _meant(found[0])
        pieces.append(meant)
        length += found.start() - last + len(meant)
        last = found.end()
        starts.append(length)
        shifts.append(last - length)
    pieces.append(data[last:])
    return b"".join(pieces), starts, shifts


def _meant(escape: bytes) -> bytes:
    if escape[1:2] == b"u":
        units = bytes.fromhex("".join(part.decode() for part in escape.split(b"\\u")))
        return units.decode("utf-16-be", "surrogatepass").encode("utf-8", "surrogatepass")
    return ESCAPED.get(escape[1:2], escape[1:2])
