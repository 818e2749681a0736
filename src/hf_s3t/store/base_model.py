"""The base model of a store: loading it, and telling it from another one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StoreError
from .card import AUTO_CLASSES
from .folder import StoreFolder

if TYPE_CHECKING:  # what needs no base model does without
    from torch import nn

logger = logging.getLogger(__name__)

HAND_IN = "Load the base as it was for the training and pass `base_model=`."


def load_base(
    store: StoreFolder, name: str | None = None, unquantised: bool = False, **kwargs: Any
) -> tuple[nn.Module, str]:
    """Loads a store's base model, of the class that was trained, and tells where it came from.

    `name` is a folder or a repository id; `None`: what the store names, at its revision. With `unquantised`, a base
    whose weights are quantised is refused before it is loaded.

    Raises:
        ValueError: the store does not say which it is.
        StoreError: it is another one than the store was trained on.
        OSError: it cannot be loaded.
    """
    from transformers import AutoConfig

    recipe = store.manifest().recipe
    stored = recipe["base"]
    if name is None:
        name, kwargs = stored.get("id"), {"revision": stored.get("revision"), **kwargs}
    base_class = _base_class(recipe)
    if name is None or base_class is None:
        raise ValueError(f"{store.path} does not say how to load its base model. {HAND_IN}")
    source = str(Path(name).resolve()) if Path(name).is_dir() else str(name)
    given = {"num_labels": stored.get("num_labels"), **kwargs}
    try:
        if unquantised:
            check_unquantised(AutoConfig.from_pretrained(source, revision=kwargs.get("revision")), source)
        model = base_class.from_pretrained(source, **{key: value for key, value in given.items() if value is not None})
    except OSError as error:
        raise OSError(f"The base model {source} cannot be loaded: {error}") from error
    check_base(model, recipe)
    return model, source


def _base_class(recipe: Mapping[str, Any]) -> Any:
    """The transformers class that was trained, or, of a class that is not theirs, what its task asks for."""
    import transformers

    found = getattr(transformers, str(recipe["base"].get("class")), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    auto_class, _ = AUTO_CLASSES.get(recipe["config"].get("task_type"), (None, None))
    return getattr(transformers, auto_class) if auto_class else None


def public_id(model: nn.Module) -> str | None:
    """A base model's id on the Hub; `None` where it is a local path or was built from a config."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = getattr(getattr(model, "config", None), "name_or_path", None)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(str(name)).exists() else name


def check_base(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Raises [`StoreError`] if a model is not the base that a store was trained on, its heads aside.

    Tensors of another dtype or quantisation cannot be compared; then a warning says so. Offloaded ones are refused,
    as adapters cannot be with them.
    """
    from ..seams.models import original
    from .base_identity import base_digest
    from .recipe import bare, base_config, quantization

    if original(model) is not model:
        raise StoreError("`torch.compile` has compiled this model. Give the model itself, and compile the ensemble.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise StoreError("Some layers of the base are offloaded. Load it with a `device_map` that holds all of them.")
    stored = recipe["base"]
    config = stored.get("config") or {}
    fields = [name for name, value in base_config(model).items() if name in config and value != config[name]]
    if fields:
        logger.warning(
            "the base model's config differs from that of the training (%s), so its answers may differ, too",
            ", ".join(sorted(fields)),
        )
    if stored.get("sha256") is None:
        return
    found = {"dtype": str(bare(model).dtype), "quantization": quantization(model)}
    different = [name for name, value in found.items() if value != stored.get(name)]
    if different:
        logger.warning(
            "the base model has another %s than the one that the store was trained on: answers differ from those of "
            "the training, and whether it is the same model was not checked",
            " and ".join(different),
        )
    elif base_digest(model, recipe["config"].get("modules_to_save") or ()) != stored["sha256"]:
        raise StoreError(
            f"This is not the base model that the store was trained on ({stored.get('id') or 'no id is on record'}): "
            "its tensors differ. Give that one; a model that carries adapters or was tuned since is another."
        )


def check_unquantised(config: Any, name: str) -> None:
    """Raises `ValueError` for a base model whose weights are quantised: nothing can be added to them exactly."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name} is quantised, and an adapter is merged into unquantised weights only. Name the unquantised base "
            "(`base_model=`), or export the adapter alone."
        )
