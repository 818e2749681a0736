"""What every test starts from: no network, no cache of the person who runs it, one thread.

The environment is set before anything imports torch, transformers, datasets or huggingface_hub, which read it once.
Processes that a test starts inherit it.
"""

from __future__ import annotations

import os
import tempfile

_home = tempfile.TemporaryDirectory(prefix="hf_s3t-tests-")

os.environ.update(
    HF_HOME=_home.name,
    HF_DATASETS_CACHE=os.path.join(_home.name, "datasets"),
    HF_HUB_CACHE=os.path.join(_home.name, "hub"),
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    # Runs are compared bit by bit, and the order in which threads add up is not ours to fix.
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)
# What is trained once for all processes of a run lies with the first, which ends last.
os.environ.setdefault("HF_S3T_TESTS_SHARED", _home.name)
# These would choose another device, number of processes, partition or place than the test asks for.
for _name in ("ACCELERATE_USE_CPU", "WORLD_SIZE", "RANK", "LOCAL_RANK", "HF_S3T_KEY", "HF_TOKEN"):
    os.environ.pop(_name, None)

import gc  # noqa: E402
import ipaddress  # noqa: E402
import logging  # noqa: E402
import socket  # noqa: E402
import ssl  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import jinja2  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.utils import memory  # noqa: E402

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_unconfigure() -> None:
    _home.cleanup()


def mark_slow(items: list[pytest.Item]) -> None:
    """Of a test with the mark `brief("one", "two")`, all parameters but those are slow."""
    for item in items:
        brief = item.get_closest_marker("brief")
        if brief and item.callspec.id not in brief.args:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow(items)


def pytest_collection_finish() -> None:
    """What was imported by now is not walked again for garbage."""
    gc.collect()
    gc.freeze()


def _is_local(host: str) -> bool:
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """A connection to anything but this machine fails the test, also where the caller would catch an `OSError`."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            pytest.fail(f"a test tried to reach {address[0]}:{address[1]}, and tests run without a network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waste() -> Iterator[None]:
    """Nothing waits for the disk, as no test takes the power away. A template is compiled once, though PEFT writes its
    card into every checkpoint; certificates, which no server here has, are read once, not for every client. Garbage is
    collected when Python does it by itself, and not by Accelerate at every stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(jinja2.Environment, "compile", cache(jinja2.Environment.compile))
        patch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
        patch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(autouse=True)
def quiet_library() -> Iterator[None]:
    """What a test lets the library log is not logged by the next one; what is told once is told in every test."""
    from hf_s3t import seams

    logger = logging.getLogger("hf_s3t")
    level = logger.level
    seams._told.clear()
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and the small pretrained Llama that stand beside the repository, not in it."""
    path = Path(os.environ.get("HF_S3T_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("the shared data folder is not there: name it in HF_S3T_SHARED_DATA")
    return path
