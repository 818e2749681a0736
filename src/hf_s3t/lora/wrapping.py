"""A bare base model becomes one that stages train: checked, its heads drawn, with the adapters of an S3TConfig."""

from __future__ import annotations

import copy

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..seams.models import keep_quantised
from ..seams.tuners import check_base_names, check_heads
from .config import S3TConfig
from .heads import draw_heads, find_heads

BASE_OF_ADAPTER = (
    "If it belongs to the base, merge it first (`base = PeftModel.from_pretrained(...).merge_and_unload()`, "
    "`base.save_pretrained(folder)`) and pass the model that is loaded from there; if not, pass the base model alone."
)


def wrap_model(model: nn.Module, config: S3TConfig | None, seed: int) -> tuple[PeftModel, S3TConfig, dict[str, str]]:
    """The base model with S3T adapters, the config with what it left open filled in, and digests of drawn heads."""
    if isinstance(model, PeftModel):
        config = config or next(iter(model.peft_config.values()))
        _refuse_trained(model)
        model = model.unload()
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "The model already holds an adapter (`add_adapter`, `load_adapter`). A stage cannot be stored beside it. "
            f"{BASE_OF_ADAPTER}"
        )
    if not isinstance(config, S3TConfig):
        raise ValueError(f"`peft_config` must be an S3TConfig, got {type(config).__name__}.")
    config = copy.deepcopy(config)
    heads = find_heads(model, config)
    drawn = draw_heads(model, heads, seed)
    config.modules_to_save = list(heads) or None
    keep_quantised(model)
    names = list(model.state_dict())
    wrapped = get_peft_model(model, copy.deepcopy(config))
    check_heads(heads, wrapped)
    check_base_names(names, wrapped)
    return wrapped, config, drawn


def _refuse_trained(model: PeftModel) -> None:
    """Raises `ValueError` if taking the adapters off a model would lose something."""
    other = [name for name, config in model.peft_config.items() if not isinstance(config, S3TConfig)]
    trained = [name for name, value in model.named_parameters() if ".lora_B." in name and bool(value.detach().any())]
    if other or trained:
        what = f"adapters of another type ({', '.join(other)})" if other else "an S3T adapter that was trained"
        raise ValueError(f"The model holds {what}, which S3T would remove silently. {BASE_OF_ADAPTER}")
