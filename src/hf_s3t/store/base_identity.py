"""Which base model this is: one sha256 over its tensors, which this machine remembers.

sha256 of a base of 13 GB takes a core 20 seconds. So tensors are hashed in threads, and what was hashed once is looked
up the next time, in a small file in Hugging Face's home.

The file knows a base by the fingerprints of the tensors in memory (see [`fingerprints`]), not by its path, size and
time: those say nothing of a model that was changed after it had been loaded, or that was handed in. The fingerprints
are of a seed that was drawn when the file was made and that stays on this machine: somebody who would publish another
base with the fingerprints of a known one does not know it. Nothing in the file is private: it holds digests of base
models alone, without adapters and heads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants
from torch import nn

from ..errors import StoreError
from ..files import PRIVATE, read_limited, write_atomic
from ..lora.fingerprints import fingerprints
from ..lora.heads import tensor_digest
from ..plain_data import plain_json
from ..seams.tuners import base_name
from .manifest import DAMAGED
from .partition import canonical

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the file. A change of [`fingerprints`] is another version, too."""
ENTRIES = 100
"""Base models that are remembered; the oldest go first."""
_told: set[Path] = set()


def base_digest(model: nn.Module, heads: Iterable[str] = ()) -> str:
    """sha256 over every tensor of a model but its `heads`, the same with and without adapters around its modules."""
    tensors, path = base_tensors(model, heads), memory_path()
    memory = _read(path) or Memory()
    found = fingerprints(tensors, seed=memory.seed)
    key = hashlib.sha256(canonical(found)).hexdigest()
    if key not in memory.digests:
        memory.digests[key] = tensors_digest(tensors)
        _remember(path, memory, key)
    return memory.digests[key]


def base_tensors(model: nn.Module, heads: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors of a model's state by their names in the base: none of adapters and of `heads`."""
    outside = tuple(f"{head}." for head in heads)
    named = {base_name(name): value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return {name: value for name, value in named.items() if name is not None and not name.startswith(outside)}


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over the names and the sha256 of tensors. A thread brings one tensor to the host at a time."""
    with ThreadPoolExecutor(_cores()) as threads:
        digests = dict(zip(tensors, threads.map(tensor_digest, tensors.values()), strict=True))
    return hashlib.sha256(canonical(digests)).hexdigest()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- what this machine remembers ----


@dataclass
class Memory:
    """What the file holds: sha256 of base models by digests of their fingerprints, the newest last."""

    seed: int = field(default_factory=lambda: secrets.randbits(64))
    digests: dict[str, str] = field(default_factory=dict)


def memory_path() -> Path:
    """Where the file is."""
    return Path(constants.HF_HOME) / "hf_s3t" / "base_digests.json"


def _read(path: Path) -> Memory | None:
    try:
        stored = plain_json(read_limited(path))
        version, seed, digests = stored["version"], stored["seed"], dict(stored["digests"])
        if version != VERSION or not isinstance(seed, int) or not all(map(_is_sha256, digests.values())):
            raise ValueError(f"it is of version {version!r}, not {VERSION}, or damaged")
        return Memory(seed, digests)
    except FileNotFoundError:
        return None
    except (OSError, StoreError, *DAMAGED) as error:
        _tell(path, error)
        return None


def _is_sha256(digest: object) -> bool:
    return isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None


def _remember(path: Path, memory: Memory, key: str) -> None:
    """Adds what another process has written meanwhile, unless that is of another seed."""
    try:
        if str(path).startswith("~"):
            raise OSError("this user has no home folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=10):
            now = _read(path) or memory
            if now.seed == memory.seed:
                entries = {**now.digests, key: memory.digests[key]}
                kept = dict(list(entries.items())[-ENTRIES:])
                write_atomic(
                    path, json.dumps({"version": VERSION, "seed": now.seed, "digests": kept}).encode(), PRIVATE
                )
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        _tell(path, error)


def _tell(path: Path, error: Exception) -> None:
    """Once in a process."""
    if path not in _told:
        _told.add(path)
        logger.warning(
            "%s cannot be used (%s: %s). Only speed is lost: base models are hashed at every start. Set HF_HOME to a "
            "folder that can be written.", path, type(error).__name__, error,
        )  # fmt: skip
