"""A folder that pulls somebody else's deletion says what less answers from then on."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from hf_s3t import S3TStore
from stores import make_store

pytest_plugins = ["hub_fixtures"]


def push(path: str) -> None:
    S3TStore(path).push("owner/m")


def pulled(path: str) -> list[str]:
    """What two pulls say."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    seen: list[str] = []
    logger, lines = logging.getLogger("hf_s3t.store.outlook"), Lines()
    logger.addHandler(lines)
    for _ in range(2):
        S3TStore(path).pull("owner/m")
    logger.removeHandler(lines)
    return seen


def test_a_pull_says_once_what_less_answers(machine: Any, tmp_path: Path) -> None:
    store, other = make_store(tmp_path / "out"), str(tmp_path / "other")
    shutil.copytree(store.path, other)
    store.delete(slices=[(0, 1)])
    machine(push, path=str(store.path))
    (line,) = machine(pulled, path=other)
    assert line.startswith(f"{other} answers with less") and "shard 0: 0-1-2 -> 2-0." in line
    assert "slice passes per epoch" in line and "more requests until a shard is dead" in line
    assert S3TStore(other).served() == store.served()
