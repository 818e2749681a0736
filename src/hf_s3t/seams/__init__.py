"""The seams: every place that reaches into the private inside of another library, or rests on names it may change.

No other file does so (`tests/test_seams.py`). A seam is not as expected after an upgrade, sooner or later. Then a
promise of the library must not break in silence: [`broken`] makes the error for a seam that a promise depends on, and
[`lost`] gives one warning for a seam that only speed or comfort depends on.

[`TABLE`] lists them. Its columns: what is touched, why, what depends on it, and when it can go.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from ..errors import CompatibilityError

logger = logging.getLogger(__name__)


class Seam(NamedTuple):
    """One place where the library is sewn to another one.

    Args:
        library (`str`): the other library, as `pip` names it.
        touches (`str`): what of it that is private, or may be renamed.
        why (`str`): what it is needed for.
        depends (`str`): `"promise 1"` and the like: it is an error when the seam is not as expected. Else what is
            lost, which is a warning: `"speed: ..."`, `"comfort: ..."`.
        seen (`str`): versions that it was tested with.
        until (`str`): when it can go.
    """

    library: str
    touches: str
    why: str
    depends: str
    seen: str
    until: str


TABLE: dict[str, Seam] = {
    # ---- training: the Trainer and its callbacks, PEFT's tuner, what a recipe is made of ----



    # ---- answering: layers, caches, pipelines ----
    "rows of arguments": Seam(
        "transformers", "the names `cache_position` and `logits_to_keep`, and of arguments with one value per row",
        "an argument of one dimension may have a value per row or not", "answers: a ValueError for a name that is new",
        "5.23, 5.24", "models say which dimension of an argument is the batch",
    ),
    "LoRA by views": Seam(
        "peft", "`lora_A`, `lora_B`, `lora_dropout` and `scaling` of its Linear layer, and how it multiplies them",
        "rows of a member lie together, and PEFT gathers them by index", "speed: up to a third of a forward pass",
        "0.21", "PEFT adds the adapters of adjacent rows by views",
    ),
    "adapter names": Seam(
        "peft", "the argument `adapter_names` of its layers, and the name `__base__`",
        "every row of a batch has an adapter of its own", "speed: members answer in turn", "0.21", "never",
    ),
    "the model's loss": Seam(
        "transformers", "`loss_function` of a model, and the class name of models for multiple choice",
        "the loss of an ensemble follows from its averaged logits", "promise 3, in what `evaluate()` reports",
        "5.23, 5.24", "never",
    ),
    "logits": Seam(
        "transformers", "the names of outputs, `logits` and `..._logits`",
        "members are averaged by them", "answers", "5.23, 5.24", "never",
    ),
    "fused head": Seam(
        "trl", "the argument `fused_lm_head` and the values that it gives per token",
        "SFTTrainer's metrics", "comfort: `evaluate()` of an SFTTrainer", "1.16", "TRL computes them from logits",
    ),
    "pipelines": Seam(
        "transformers", "`pipelines.base.SUPPORTED_PEFT_TASKS`",
        "a pipeline logs an error about classes that it does not know", "comfort: a clean log",
        "5.23, 5.24", "pipelines take any model that generates",
    ),
    "activation checkpointing": Seam(
        "transformers", "`is_activation_checkpointing`, and which layers are `GradientCheckpointingLayer`s",
        "a layer that is run again from outside would be fed its cached states twice", "promise 4",
        "5.23, 5.24", "never",
    ),



    # ---- the Hub ----



}
"""Every seam by its name."""

_told: set[str] = set()


def _installed(library: str) -> str:
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return library


def broken(name: str, found: str) -> CompatibilityError:
    """The error for a seam that is not as expected, where a promise depends on it.

    Args:
        name (`str`): the seam's, in [`TABLE`].
        found (`str`): what was found instead, as the beginning of a sentence.
    """
    seam = TABLE[name]
    return CompatibilityError(
        f"{found}. hf_s3t needs {seam.touches} of {_installed(seam.library)} for this: {seam.why} ({seam.depends}). "
        f"Install a version that it was tested with ({seam.library} {seam.seen}), or a newer hf_s3t."
    )


def lost(name: str, found: str) -> None:
    """Warns, once in a process, that a seam is not as expected, and what is lost with it.

    Args:
        name (`str`): the seam's, in [`TABLE`].
        found (`str`): what was found instead, as the beginning of a sentence.
    """
    seam = TABLE[name]
    if name not in _told:
        _told.add(name)
        logger.warning(
            "%s (%s). Lost is %s; answers and stages stay right. Tested with %s %s.",
            found, _installed(seam.library), seam.depends, seam.library, seam.seen,
        )  # fmt: skip
