"""Cases that run one after the other on a device that is lent for minutes: what each part of `gpu.py` is made of.

Every line is printed, and the file written anew, as soon as something is measured: a run that is cut off keeps what it
has. A case that would not end in time does not start, and is named.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; full_determinism needs it

import psutil
import torch
from transformers.utils.import_utils import enable_tf32

BEGAN = time.perf_counter() - (time.time() - psutil.Process().create_time())
"""When the process began: imports take of its time, too."""
Note = Callable[..., None]
"""Takes figures of the running case, by name."""


class NotRun(Exception):
    """This stack cannot run a case; the message is the reason."""


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Args:
        name (`str`): what `--only` looks for; no name is a part of another one.
        kind (`str`): cases of one kind take about as long as each other.
        measure (`Callable`): notes figures while it measures.
        prepare (`Callable`, *optional*): makes what several cases share, if it is not there yet.
    """

    name: str
    kind: str
    measure: Callable[[Note], None]
    prepare: Callable[[], Any] | None = None


class Runs:
    """Runs cases, and keeps what they measure.

    Args:
        report (`dict`): what the file holds, with empty `figures`.
        file (`Path`, *optional*): where it is written.
        only (`Sequence[str]`): cases whose name holds none of these are not looked at. Empty: all are.
        seconds (`float`, *optional*): no case starts that would end later than that after the beginning, if it takes
            as long as the last one of its kind.
        clock (`Callable`): seconds since the beginning.
    """

    def __init__(
        self,
        report: dict[str, Any],
        file: Path | None = None,
        only: Sequence[str] = (),
        seconds: float | None = None,
        clock: Callable[[], float] | None = None,
    ):
        self.report, self.file, self.only, self.seconds = report, file, only, seconds
        self.clock = clock or (lambda: now() - BEGAN)
        self.by_case: dict[str, dict[str, Any]] = {}
        self.not_run: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.left_out: list[str] = []
        report["figures"] |= {
            "by_case": self.by_case, "not_run": self.not_run, "failed": self.failed, "left_out": self.left_out
        }  # fmt: skip
        self._took: dict[str, float] = {}

    def run(self, case: Case) -> None:
        """Measures a case, or says why not."""
        if self.only and not any(text in case.name for text in self.only):
            return
        if self.seconds is not None and self.clock() + self._took.get(case.kind, 0.0) > self.seconds:
            self.left_out.append(case.name)
            return self._say(case.name, "left out: no time")
        try:
            with settings_kept():
                self._measure(case)
        except NotRun as reason:
            self.not_run[case.name] = str(reason)
            self._say(case.name, f"not run: {reason}")
        except Exception as error:
            self.failed[case.name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            self._say(case.name, f"failed: {self.failed[case.name]}")
        free_memory()

    def _measure(self, case: Case) -> None:
        began = self.clock()
        if case.prepare is not None:
            case.prepare()
        prepared = self.clock()
        case.measure(partial(self._note, case.name))
        ended = self.clock()
        self._took[case.kind] = ended - prepared
        figures = {"seconds": ended - prepared}
        self._note(case.name, **figures if case.prepare is None else {"preparing_seconds": prepared - began} | figures)

    def _note(self, name: str, **figures: Any) -> None:
        self.by_case.setdefault(name, {}).update(figures)
        self._say(name, "  ".join(f"{figure} {shown(value)}" for figure, value in figures.items()))

    def _say(self, name: str, text: str) -> None:
        print(f"{name:<46} {text}", flush=True)
        self.write()

    def write(self) -> None:
        """The file as it is now; it is whole at every moment."""
        if self.file is not None:
            written = self.file.with_name(f"{self.file.name}.new")
            written.write_text(json.dumps(self.report, indent=1) + "\n")
            os.replace(written, self.file)


def shown(value: Any) -> str:
    """A figure as it is printed."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- the device ----


def on_gpu() -> bool:
    """Whether there is a GPU."""
    return torch.cuda.is_available()


def device() -> str:
    """Where models lie."""
    return "cuda:0" if on_gpu() else "cpu"


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def free_memory() -> None:
    """Gives back what no tensor holds any more."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


@contextmanager
def drawn_in(dtype: torch.dtype) -> Iterator[None]:
    """Models that are made within are drawn on the device, in a dtype: nothing of them is on the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device()):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def settings_kept() -> Iterator[None]:
    """What training arguments switch for the whole process (TF32, determinism) is as before in the end."""
    environment = dict(os.environ)
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    precision = getattr(torch.backends, "fp32_precision", None)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark = flags
        if precision is not None:  # torch 2.9 and later
            torch.backends.fp32_precision = precision
        else:
            torch.backends.cuda.matmul.allow_tf32 = False
        getattr(enable_tf32, "cache_clear", bool)()  # or it would not be switched on again
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def tf32_is_on() -> bool:
    """Whether products of fp32 matrices are computed in TF32."""
    matmul: Any = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # torch 2.9 and later
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def hardware() -> dict[str, Any]:
    """The GPU and its driver; nothing without one."""
    if not on_gpu():
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gb": properties.total_memory / 1e9,
        "compute_capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or None


def versions(names: Sequence[str]) -> dict[str, str | None]:
    """Versions of libraries; `None` of those that are not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def totals(by_case: Mapping[str, Mapping[str, Any]], ending: str) -> int:
    """Sum of all figures whose name ends in some way."""
    return sum(value for case in by_case.values() for name, value in case.items() if name.endswith(ending))
