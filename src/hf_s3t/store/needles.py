"""What a search looks for: texts and ids, in every form in which a file may hold them, and where bytes hold one.

Thousands of texts are looked for at once. Each form of 11 bytes or more holds, at one of its first four offsets, eight
bytes that begin at a multiple of four. So only every fourth position is looked at, in a table of hashes; what passes
is compared exactly. Shorter forms are looked for at every position by four of their bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .partition import row_digest

if TYPE_CHECKING:
    import numpy as np

SHORTEST, LONGEST = 4, 100_000
"""Characters of a text that is looked for: shorter ones are everywhere, longer ones would need more memory."""
MOST = 200_000
"""Texts that are looked for at once."""
WIDE = 11
SPARSE = 64
"""One of so many places in a table of hashes is filled, up to a table of 16 MB."""
PIECE = 1 << 16
"""Windows that are looked at together: what is computed of them stays in the processor's cache."""
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Hit:
    """Where bytes hold what is looked for."""

    start: int
    end: int
    line: int  # of the file of texts, from 1
    form: str


def read_texts(path: Path) -> list[tuple[int, str]]:
    """The texts of a file with their line numbers: a line each; of a `.jsonl` file the texts in each line's JSON.

    Raises:
        ValueError: a text is too short or too long, the file is no text, or it holds nothing.
    """
    try:
        data = path.read_bytes()
        lines = data.decode("utf-16" if data[:2] in UTF16_MARKS else "utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}). Save it as UTF-8.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    found: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        texts = list(_texts_of(path, number, line)) if path.suffix == ".jsonl" else [line.strip()]
        for text in texts:
            if not SHORTEST <= len(text) <= LONGEST:
                raise ValueError(
                    f"Line {number} of {path} has a text of {len(text)} characters. Texts of {SHORTEST} to {LONGEST} "
                    "are looked for: a shorter one would be found by chance everywhere. Take it out, or look for more "
                    "of its surroundings."
                )
        found += [(number, text) for text in texts]
    if not found or len(found) > MOST:
        raise ValueError(f"{path} holds {len(found)} texts; between 1 and {MOST} are looked for at once.")
    return found


def _texts_of(path: Path, number: int, line: str) -> Iterator[str]:
    """Of a JSON text itself; of a row every text and number that is long enough, and the digest of the whole row."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Line {number} of {path} is no JSON ({error}). Write a text or a row.") from None
    if isinstance(value, dict):
        texts = [text for text in _leaves(value) if len(text) >= SHORTEST]
        if not texts:
            raise ValueError(f"Line {number} of {path} has no text of {SHORTEST} characters or more to look for.")
        yield from texts
        yield row_digest(value)
    else:
        yield from _leaves(value)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            yield from _leaves(below)
    elif value is not None:
        yield value if isinstance(value, str) else json.dumps(value)


def forms(text: str) -> dict[bytes, str]:
    """Every run of bytes by which a text is told, with the name of the form.

    Of digests the first 16 bytes are looked for, so that shortened ones are found, too.
    """
    plain = text.encode("utf-8", "surrogatepass")
    escaped = json.dumps(text)[1:-1]
    capital = re.sub(r"\\u[0-9a-f]{4}", lambda found: "\\u" + found[0][2:].upper(), escaped)
    found: dict[bytes, str] = {}
    for kind in ("sha256", "sha1", "md5"):
        digest = hashlib.new(kind, plain, usedforsecurity=False).digest()[:16]
        found[digest] = f"its {kind}"
        found[digest.hex().encode()] = found[digest.hex().upper().encode()] = f"its {kind} in hexadecimal"
    for writing in (json.dumps(text, ensure_ascii=False)[1:-1], escaped, capital):
        found[writing.encode("utf-8", "surrogatepass")] = "escaped as in JSON"
    found[text.encode("utf-16-le", "surrogatepass")] = found[text.encode("utf-16-be", "surrogatepass")] = "as UTF-16"
    found[plain] = "as it is written"
    return found


@dataclass
class _Table:
    """Windows of the forms, and which pieces of data to compare where one of them is met."""

    shapes: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))
    keys: Any = None  # the windows, sorted
    passes: Any = None  # by hash, whether there is such a window

    def add(self, window: bytes, offset: int, length: int) -> None:
        self.shapes[int.from_bytes(window, "little")].add((offset, length))

    def close(self) -> None:
        import numpy as np

        self.keys = np.array(sorted(self.shapes), dtype="<u8")
        self.passes = np.zeros(1 << min(24, max(10, (SPARSE * len(self.keys)).bit_length())), dtype=bool)
        self.passes[self._hashed(self.keys.astype("<u4"), (self.keys >> np.uint64(32)).astype("<u4"))] = True

    def met(self, low: np.ndarray, high: np.ndarray | None) -> Iterator[tuple[int, int]]:
        """Where in an array of windows one of these stands, and which; `high` has the upper halves."""
        import numpy as np

        for first in range(0, len(low), PIECE):
            here, above = low[first : first + PIECE], None if high is None else high[first : first + PIECE]
            some = np.flatnonzero(np.take(self.passes, self._hashed(here, above)))
            if not len(some):
                continue
            found = here[some].astype("<u8")
            if above is not None:
                found |= above[some].astype("<u8") << np.uint64(32)
            there = np.searchsorted(self.keys, found)
            exact = self.keys[np.minimum(there, len(self.keys) - 1)] == found
            yield from zip((some[exact] + first).tolist(), found[exact].tolist(), strict=True)

    def _hashed(self, low: np.ndarray, high: np.ndarray | None) -> np.ndarray:
        import numpy as np

        mixed = low * np.uint32(2654435761)
        if high is not None:
            mixed += high * np.uint32(2246822519)
        mixed >>= np.uint32(32 - (len(self.passes) - 1).bit_length())
        return mixed


class Needles:
    """Some texts, ready to be looked for.

    Args:
        texts: with the line of the file that each stands in.

    >>> [(hit.start, hit.line) for hit in Needles([(1, "Zoë Ångström"), (2, "row-17")]).find(b"about row-17.")]
    [(6, 2)]
    """

    def __init__(self, texts: Sequence[tuple[int, str]]):
        self._patterns: dict[bytes, list[tuple[int, str]]] = {}
        for line, text in texts:
            for pattern, form in forms(text).items():
                self._patterns.setdefault(pattern, []).append((line, form))
        self.lines = len({line for line, _ in texts})
        self.longest = max(6 * len(text.encode("utf-16-le", "surrogatepass")) // 2 for _, text in texts)
        self.longest = max(self.longest, *map(len, self._patterns))
        self._wide, self._narrow = _Table(), _Table()
        short = [pattern for pattern in self._patterns if len(pattern) < WIDE]
        ends = Counter(pattern[at : at + 4] for pattern in short for at in {0, len(pattern) - 4})
        for pattern in self._patterns:
            if len(pattern) >= WIDE:
                for offset in range(4):
                    self._wide.add(pattern[offset : offset + 8], offset, len(pattern))
            else:
                at = min({0, len(pattern) - 4}, key=lambda at: ends[pattern[at : at + 4]])  # the rarer end
                self._narrow.add(pattern[at : at + 4], at, len(pattern))
        self._wide.close()
        self._narrow.close()

    def find(self, data: bytes) -> list[Hit]:
        """Every place in some bytes that holds a form of a text, in order."""
        found = {
            (start, start + length)
            for position, shapes in self._candidates(data)
            for offset, length in shapes
            if (start := position - offset) >= 0 and data[start : start + length] in self._patterns
        }
        return [
            Hit(start, end, line, form)
            for start, end in sorted(found)
            for line, form in self._patterns[data[start:end]]
        ]

    def _candidates(self, data: bytes) -> Iterator[tuple[int, Iterable[tuple[int, int]]]]:
        import numpy as np

        if len(data) >= 8:
            grams = np.frombuffer(data, "<u4", count=len(data) // 4)
            for index, key in self._wide.met(grams[:-1], grams[1:]):
                yield 4 * index, self._wide.shapes[key]
        for phase in range(min(4, len(data) - 3)) if self._narrow.shapes else ():
            grams = np.frombuffer(data, "<u4", count=(len(data) - phase) // 4, offset=phase)
            for index, key in self._narrow.met(grams, None):
                yield 4 * index + phase, self._narrow.shapes[key]
