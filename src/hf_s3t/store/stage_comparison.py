"""A stage that was trained again beside the one in the store: equal, different, or not comparable, and why.

Bytes decide. Only where they differ is it asked whether that can have an innocent reason: other versions, another
machine, settings that were accepted since, rows that came later. Then nothing follows from it, for or against.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import StoreError
from ..files import parse_safetensors
from ..lora.adapter import WEIGHTS_FILE
from .state import stack_line

if TYPE_CHECKING:
    import numpy as np

Outcome = Literal["equal", "different", "not comparable"]

MACHINE = "machine"
"""The entry of a stage's record that says on what it was trained; records from before there was one lack it."""


@dataclass(frozen=True)
class TensorDifference:
    """How far a tensor is from the one of a stage that was trained again."""

    name: str
    differing: int  # values that are not the same bits
    values: int  # of so many
    largest: float | None  # absolute difference; `None`: it is in one of the two only, or of another shape

    def __str__(self) -> str:
        if self.largest is None:
            return f"{self.name} (there in one of them, or of another shape)"
        return f"{self.name} ({self.differing} of {self.values} values, by up to {self.largest:.3g})"


@dataclass(frozen=True)
class Retrained:
    """What came of training one stage again, from the parent that the store has."""

    stage: str
    outcome: Outcome
    reasons: tuple[str, ...] = ()  # why it differs, or why nothing follows from it
    tensors: tuple[TensorDifference, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def below(self, parents: Iterable[Retrained]) -> Retrained:
        """The same, with a word of those stages that it begins on and that differ themselves."""
        wrong = [parent.stage for parent in parents if parent.outcome == "different"]
        if self.outcome != "different" or not wrong:
            return self
        told = f"it begins on {', '.join(wrong)}, as stored, which differs itself"
        return replace(self, reasons=(*self.reasons, told))

    @property
    def findings(self) -> tuple[str, ...]:
        """What a person is told of a stage that is not equal, a line each."""
        reasons = [f"{self.stage}: {reason}" for reason in self.reasons]
        shown = "; ".join(map(str, self.tensors[:3]))
        more = f"; and {len(self.tensors) - 3} more tensors" if len(self.tensors) > 3 else ""
        return (*reasons, f"{self.stage}: what differs: {shown}{more}") if shown else tuple(reasons)


def compare_stage(
    stage: str, stored: Mapping[str, bytes], again: Mapping[str, bytes], why: Iterator[str], innocent: Iterator[str]
) -> Retrained:
    """Compares the files of a stage with those of its retraining.

    Args:
        why: what is known to be wrong with the stage or its rows; any of it makes a difference count.
        innocent: reasons for which two trainings may differ though nothing is wrong.
    """
    if stored == again:
        return Retrained(stage, "equal")
    tensors, about = _differences(stored, again)
    if known := tuple(why):
        return Retrained(stage, "different", (*known, *about), tensors)
    if reasons := tuple(innocent):
        return Retrained(stage, "not comparable", (*reasons, *about), tensors)
    return Retrained(stage, "different", about or ("expected the same bytes",), tensors)


def innocent_reasons(old: Mapping[str, Any] | None, new: Mapping[str, Any], changed: str) -> Iterator[str]:
    """Why a stage may differ from its retraining though both are right.

    Args:
        old: the store's record of the stage, if there is one.
        new: `versions` and `machine` of the retraining.
        changed: settings that were accepted after the stage had been trained, if any were.
    """
    if old is not None and old["versions"] != new["versions"]:
        there, here = stack_line(old["versions"]), stack_line(new["versions"])
        yield f"it was trained with {there}, and is now with {here}"
    if old is None or MACHINE not in old:
        yield "it is not on record on what it was trained: processor, threads and processes may be other ones"
    else:
        there, here = old[MACHINE], new[MACHINE]
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                yield f"it was trained with {name} {there.get(name)}, and is now with {name} {here.get(name)}"
    if changed:
        yield f"settings were changed after it was trained, or may have been: {changed}"


def _differences(
    stored: Mapping[str, bytes], again: Mapping[str, bytes]
) -> tuple[tuple[TensorDifference, ...], tuple[str, ...]]:
    names = sorted(name for name in stored.keys() | again.keys() if stored.get(name) != again.get(name))
    tensors: tuple[TensorDifference, ...] = ()
    about = [f"{name} differs" for name in names if name != WEIGHTS_FILE]
    if WEIGHTS_FILE in names:
        try:
            old, new = (parse_safetensors(files[WEIGHTS_FILE], Path(WEIGHTS_FILE)) for files in (stored, again))
        except KeyError:
            about.append(f"{WEIGHTS_FILE} is missing")
        except StoreError as error:
            about.append(str(error))
        else:
            tensors = tuple(_tensor_differences(old, new))
            if not tensors:
                about.append(f"{WEIGHTS_FILE} has the same tensors, under another header")
    return tensors, tuple(about)


def _tensor_differences(
    old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]
) -> Iterator[TensorDifference]:
    for name in sorted(old.keys() | new.keys()):
        one, other = old.get(name), new.get(name)
        if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
            values = max(found.size for found in (one, other) if found is not None)
            yield TensorDifference(name, values, values, None)
        elif one.tobytes() != other.tobytes():
            bits = f"u{one.itemsize}"
            differing = int((one.view(bits) != other.view(bits)).sum())
            largest = float(abs(one.astype("f8") - other.astype("f8")).max())
            yield TensorDifference(name, differing, one.size, largest)
