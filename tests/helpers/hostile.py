"""Values and bytes that nobody expects, in the place of those of a real file; and what must be so, whatever is read.

A case starts from a file that the library wrote. A place in its JSON gets another value, or its bytes are damaged.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hf_s3t.errors import S3TError

DEEP = 100_000
"""So deep is nested what no reader follows to its end."""
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.0, 0.5, -0.5, 1e308, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, float("nan"),
    float("inf"), float("-inf"), "", "0", "x", "None", "1e400", "\ud800", "é\u202e\0\x1b[31m", "../../canary",
    "/etc/passwd", "shard-00/0", "shard-00/1-0", "shard-999999/0", "a" * 5000, "{}", "{0.__class__}", "LORA", [], [[]],
    [None], [0], [0, 0], ["a"], [1, 2, 3], [[0, 0]], [[0, 2**63]], [[0, 1, 2]], [{}], {}, {"": None}, {"a": {}},
    {"a": []}, {"shard-00/0": {}}, {"__class__": 1}, {"format": 1},
]  # fmt: skip
"""Everything that JSON, as Python reads it, can hold and somebody may forget."""


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


odd_values = st.one_of(
    st.sampled_from(ODD),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
    st.just(nested(60)),
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in plain data, itself first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places_in(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """A copy in which one place has what `change` makes of it."""
    if not path:
        return change(value)
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], change)
    return value


@st.composite
def changed(draw: st.DrawFn, value: Any, most: int = 2) -> Any:
    """Plain data in which some places hold something else, or are gone, or where something is that was not."""
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(places_in(value))))
        odd = draw(odd_values)
        how = draw(st.sampled_from(("put", "put", "put", "wrap", "text", "drop", "add", "rename")))

        def change(found: Any, how: str = how, odd: Any = odd) -> Any:
            if how == "wrap":
                return [found]
            if how == "text":
                return str(found)
            if isinstance(found, dict) and how == "drop" and found:
                return dict(list(found.items())[1:])
            if isinstance(found, dict) and how in ("add", "rename"):
                first, *others = found.items() or [("", None)]
                kept = dict(found) if how == "add" else dict(others)
                return kept | {odd if isinstance(odd, str) else "odd": first[1] if how == "rename" else odd}
            if isinstance(found, list) and how == "drop":
                return found[1:]
            if isinstance(found, list) and how == "add":
                return [*found, odd]
            return odd

        value = replaced(value, path, change)
    return value


def as_json(value: Any) -> bytes:
    """JSON as Python writes it: with NaN, and half characters as escapes."""
    return json.dumps(value).encode()


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of which some are others, or missing, or there twice."""
    how = draw(st.sampled_from(("flip", "flip", "cut", "put", "empty", "twice")))
    place = draw(st.integers(0, max(len(data) - 1, 0)))
    if how == "flip":
        return data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
    if how == "cut":
        return data[:place]
    if how == "put":
        return data[:place] + draw(st.binary(min_size=1, max_size=12)) + data[place + draw(st.integers(0, 12)) :]
    return b"" if how == "empty" else data + data


TEXTS = (
    b"", b"\0", b"null", b"[]", b"{}", b"1", b'"x"', b"NaN", b"[" * DEEP, b'{"a":' * DEEP, b"9" * 5000,
    b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}', b'{"a": "\xff"}',
    b"1e400", b"SQLite format 3\0",
)  # fmt: skip


def json_texts(value: Any) -> st.SearchStrategy[bytes]:
    """Files in the place of one that holds plain data."""
    text = as_json(value)
    return st.one_of(changed(value).map(as_json), changed(value).map(as_json), st.sampled_from(TEXTS), damaged(text))


KINDS = ("folder", "fifo", "link out", "dangling link", "link to itself", "full folder", "socket")


def put_kind(path: Path, kind: str, outside: Path) -> None:
    """Something in the place of a file that is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "full folder":
        (path / "inner").mkdir(parents=True)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    else:
        leads = {"link out": outside / "file", "dangling link": outside / "no", "link to itself": path}
        path.symlink_to(leads[kind])


# ---- what must be so ----

RAISED = (S3TError, ValueError, typer.BadParameter)
"""What is documented."""
NEVER = (UnicodeError, json.JSONDecodeError)
"""Errors that Python counts among them, and which say nothing to whoever reads them."""


def only_typed(action: Callable[[], Any], *also: type[Exception]) -> Exception | None:
    """Runs something; returns the error of ours that it ended in, if it did. Any other is a fault."""
    try:
        action()
    except (*RAISED, *also) as error:
        if type(error) in (UnicodeDecodeError, UnicodeEncodeError, json.JSONDecodeError):
            raise AssertionError(f"{type(error).__name__}: {error}") from error
        assert str(error).strip(), "an error without a word"
        return error
    return None


class Waits(BaseException):
    """Something takes longer than it may; no reader takes it for an error of its own."""


@contextlib.contextmanager
def bounded(seconds: float = 20) -> Iterator[None]:
    """Fails where something waits for ever, as for a pipe that nobody writes."""

    def late(*_: Any) -> None:
        raise Waits(f"it took longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)  # of the whole test
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is such a place: a database waits for the disk at every change."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hf_s3t-", dir=memory) as path:
        yield Path(path)


class Outside:
    """A folder beside a store: nobody has business there."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True)
        (path / "file").write_bytes(b"canary")
        (path / "folder").mkdir()
        self._before = self._state()

    def _state(self) -> list[tuple[str, bytes]]:
        return sorted((str(f), f.read_bytes() if f.is_file() else b"") for f in self.path.rglob("*"))

    def check(self) -> None:
        """Nothing was written, and nothing removed."""
        assert self._state() == self._before


class Original:
    """A folder that is put back before every case."""

    def __init__(self, path: Path):
        self.path = path
        self.files = {
            file.relative_to(path): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
        }
        self.folders = sorted(folder.relative_to(path) for folder in path.rglob("*") if folder.is_dir())

    def put_back(self) -> None:
        """As it was; modes and all."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        for folder in self.folders:
            (self.path / folder).mkdir()
        for name, data in self.files.items():
            (self.path / name).write_bytes(data)

    def read(self, name: str) -> Any:
        """A file of JSON, as it was."""
        return json.loads(self.files[Path(name)])


# ---- many cases ----

SLOW = 10
"""So many times more cases are run by `-m slow`."""
RANDOM = "HF_S3T_FUZZ_RANDOM" in os.environ
"""Other cases at every run; without it the same ones, so that a run that was green stays so."""


def fuzz(number: int) -> Callable[[Any], Any]:
    """Marks a test that runs so many cases, and more by `-m slow`; it hands its `amount` to [`run_cases`]."""

    def mark(test: Any) -> Any:
        test.cases = number
        few, many = pytest.param(number, id="few"), pytest.param(SLOW * number, id="many", marks=pytest.mark.slow)
        return pytest.mark.parametrize("amount", [few, many])(test)

    return mark


def run_cases(
    amount: int, case: Callable[..., None], *drawn: st.SearchStrategy[Any], first: Iterable[Any] = ()
) -> None:
    """Runs `case` with each tuple of `first`, then with what is drawn, `amount` times."""
    ran = 0
    for known in first:
        with bounded():
            case(*known)

    @settings(
        max_examples=amount, derandomize=not RANDOM, database=None, deadline=None, print_blob=RANDOM,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.tuples(*drawn))
    def one(values: tuple[Any, ...]) -> None:
        nonlocal ran
        ran += 1
        with bounded():
            case(*values)

    one()
    assert ran >= amount, f"only {ran} of {amount} cases are there to be drawn"
