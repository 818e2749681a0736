"""What a training carries along that may have been computed from the rows: it asks, once, where each came from.

Class weights in a loss, statistics in a collator, a transform or an image processor, words in a tokenizer: a deletion
reaches none of them. The library sees that they are there, and not what they were computed from. The config says that
(`data_derived`), and then nobody is asked.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data_derived import DATA_DERIVED, TRAIN_SET, named_in
from ..seams.models import base_image_settings, base_tokenizer, tokenizer_rules
from ..store.manifest import Manifest
from ..store.partition import in_arrow
from ..store.recipe import bare
from ..store.store import S3TStore
from .reconcile import unburied
from .rows import TrainRows

logger = logging.getLogger(__name__)

LIBRARIES = frozenset({
    "accelerate", "datasets", "hf_s3t", "peft", "sentence_transformers", "torch", "torchvision", "transformers", "trl",
})  # fmt: skip
"""Their own losses and collators hold nothing that was computed from anybody's rows."""
ANSWERS = {"loss": ("loss", "class_weights")}
"""Names that answer a question, where it is not its own name alone."""
STATISTICS = ("image_mean", "image_std", "mean", "std")
"""Settings of image processors that are computed from images."""
UNLEARNT = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Tokens that mark places in any text."""


def warn_of_what_stays(trainer: Any, manifest: Manifest) -> None:
    """Warns, before anything trains, of what a deletion will not reach and has not reached."""
    ask(trainer, manifest)
    warn_of_empty_classes(trainer.store, trainer.rows, trainer.model)


def ask(trainer: Any, manifest: Manifest) -> None:
    """One warning that names all that may have been computed from the rows and that nobody named."""
    named = named_in(manifest.recipe)
    found = {name: text for name, text in questions(trainer).items() if named.keys().isdisjoint(_answers(name))}
    if found:
        logger.warning(
            "What was this computed from: %s? If from the train set, it keeps what it saw of rows that are deleted "
            "later. Say so, and receipts will name it: S3TConfig(%s={%s}), with %r or another source.",
            "; ".join(f"{name} ({text})" for name, text in found.items()),
            DATA_DERIVED, ", ".join(f"{name!r}: ..." for name in found), TRAIN_SET,
        )  # fmt: skip


def _answers(name: str) -> tuple[str, ...]:
    return ANSWERS.get(name, (name,))


def questions(trainer: Any) -> dict[str, str]:
    """What there is to ask about, by the name that answers it, and where it was seen."""
    inside = getattr(trainer.data_collator, "__dict__", {}).values()
    processors = [part for given in (trainer.processing_class, *inside) for part in _parts(given)]
    found = {
        "loss": _loss(trainer),
        "collator": _collator(trainer.data_collator),
        "transform": _transform(trainer.rows.raw),
        "tokenizer": _first(_tokenizer(trainer.model, one) for one in processors),
        "image_processor": _first(_image_processor(trainer.model, one) for one in processors),
    }
    return {name: text for name, text in found.items() if text}


def _first(found: Iterable[str | None]) -> str | None:
    return next((text for text in found if text), None)


def _is_librarys(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).split(".")[0] in LIBRARIES


def _called(thing: Any) -> str:
    """A name by which its author knows it."""
    thing = thing.func if isinstance(thing, partial) else thing
    return f"`{getattr(thing, '__qualname__', type(thing).__qualname__)}`"


def _loss(trainer: Any) -> str | None:
    given = trainer.compute_loss_func
    if given is not None and not (_is_librarys(given) and not holds_numbers(given)):
        return f"`compute_loss_func` is {_called(given)}"
    own = next(cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))
    return None if _is_librarys(own) else f"{_called(own)} has a `compute_loss` of its own"


def _collator(collator: Any) -> str | None:
    kind = collator if inspect.isroutine(collator) else type(collator)
    if _is_librarys(kind) and not isinstance(collator, partial) or not holds_numbers(collator):
        return None
    return f"{_called(collator)} holds numbers"


def _transform(rows: Any) -> str | None:
    given = getattr(rows, "format", None)
    if isinstance(given, Mapping) and given.get("type") == "custom":
        return f"{_called(given['format_kwargs']['transform'])} prepares each row"
    transform = getattr(rows, "transform", None)
    return None if transform is None else f"{_called(transform)} prepares each row"


def _parts(processing_class: Any) -> list[Any]:
    """A tokenizer or an image processor; of something that joins both, its parts; of anything else nothing."""
    joined = [getattr(processing_class, name, None) for name in ("tokenizer", "image_processor")]
    return [part for part in (processing_class, *joined) if _is_tokenizer(part) or _is_image_processor(part)]


def _is_tokenizer(thing: Any) -> bool:
    return isinstance(thing, PreTrainedTokenizerBase)


def _is_image_processor(thing: Any) -> bool:
    return hasattr(thing, "get_image_processor_dict")


def _tokenizer(model: Any, tokenizer: Any) -> str | None:
    if not _is_tokenizer(tokenizer):
        return None
    base = base_tokenizer(bare(model))
    if base is None:
        logger.info("the base has no tokenizer here with which the one that is given could be compared")
        return None
    marks = {str(getattr(tokenizer, name)) for name in UNLEARNT}
    added = len(tokenizer.get_vocab().keys() - base.get_vocab().keys() - marks)
    if added:
        return f"it has {added} tokens that the base's has not"
    rules = [tokenizer_rules(one).get("model") if one.is_fast else None for one in (tokenizer, base)]
    return "it cuts words otherwise than the base's" if None not in rules and rules[0] != rules[1] else None


def _image_processor(model: Any, processor: Any) -> str | None:
    if not _is_image_processor(processor):
        return None
    base, own = base_image_settings(bare(model), processor), processor.to_dict()
    other = [name for name in STATISTICS if name in base and list(own.get(name) or ()) != list(base[name] or ())]
    return f"its {' and '.join(other)} are not the base's" if other else None


def holds_numbers(thing: Any) -> bool:
    """Whether a function or an object carries numbers that may have been computed: tensors, arrays, fractions, tables.

    Of a function that is what it was given, its defaults and what it closes over; of an object its attributes, less
    those that a library's class has. A whole number alone (a length, an id) is none.
    """
    if isinstance(thing, partial):
        return _is_computed([*thing.args, *thing.keywords.values()]) or holds_numbers(thing.func)
    function = getattr(thing, "__func__", thing)
    if inspect.isfunction(function):
        values = [*_closed_over(function), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        inner = [one for one in values if isinstance(one, partial) or inspect.isfunction(one)]
        owner = [thing.__self__] if inspect.ismethod(thing) else []
        return any(map(_is_computed, values)) or any(map(holds_numbers, [*inner, *owner]))
    librarys = [cls for cls in type(thing).__mro__ if _is_librarys(cls) and is_dataclass(cls)]
    known = {field.name for cls in librarys for field in fields(cls)}
    return any(_is_computed(value) for name, value in getattr(thing, "__dict__", {}).items() if name not in known)


def _closed_over(function: Any) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled
            continue


def _is_computed(value: Any, inside: bool = False) -> bool:
    if isinstance(value, Mapping):
        return any(_is_computed(one, True) for one in value.values())
    if isinstance(value, list | tuple):
        return any(_is_computed(one, True) for one in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return inside
    return isinstance(value, float) or (hasattr(value, "dtype") and hasattr(value, "shape"))


def warn_of_empty_classes(store: S3TStore, rows: TrainRows, model: Any) -> None:
    """One warning where a class has no example any more, after a deletion: head and label map have it still."""
    columns = rows.dataset.column_names if in_arrow(rows.dataset) else ()
    base, column = bare(model), next((name for name in ("label", "labels") if name in columns), None)
    with store.reading() as state:
        if column is None or not state.generation or "Classification" not in type(base).__name__:
            return
        numbers = [number for _, number in rows.numbered([*unburied(rows.entries, state)])]
    labels = rows.dataset.with_format(None).select(numbers)[column]
    if not all(isinstance(label, int) for label in labels):
        return
    empty = sorted(set(range(base.config.num_labels)) - set(labels))
    if empty:
        logger.warning(
            "classes %s of %d have no example in the train set. The head and the label map (`id2label` of the base's "
            "config) still have them: a deletion does not remove classes. If a class tells of a deleted person, train "
            "a new store on a base without it.",
            ", ".join(map(str, empty[:10])) + ", ..." * (len(empty) > 10), base.config.num_labels,
        )  # fmt: skip
