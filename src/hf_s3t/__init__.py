"""hf_s3t: fine-tuning with the Hugging Face Trainer that can forget an example exactly, without a gradient step.

Names are imported when they are first asked for, so that `import hf_s3t` and a deletion need neither torch nor PEFT.
PEFT learns of the type `S3T` together with the config, or at once where PEFT was imported before. Where PEFT is to
load a running checkpoint that was written as `S3T`, and nothing else was asked for, ask for the config first:

```py
from hf_s3t import S3TConfig
```
"""

import importlib
import sys
import typing

from .errors import (
    AnswerCutOffError,
    CompatibilityError,
    DatasetError,
    IsolationError,
    RecipeError,
    S3TError,
    StateError,
    StoreError,
    StoreLockedError,
    UnfinishedDeletionError,
    UnknownExampleError,
)

if typing.TYPE_CHECKING:
    from .lora.config import S3TConfig
    from .lora.tuner import S3TModel
    from .plan.tree import Plan, Stage
    from .planner.planner import S3TPlanner
    from .serving.ensemble import S3TEnsemble
    from .store.receipts import Receipt
    from .store.store import S3TStore
    from .training.trainer import S3TMixin, S3TTrainer

__version__ = "0.1.0"

__all__ = [
    "AnswerCutOffError",
    "CompatibilityError",
    "DatasetError",
    "IsolationError",
    "Plan",
    "Receipt",
    "RecipeError",
    "S3TConfig",
    "S3TEnsemble",
    "S3TError",
    "S3TMixin",
    "S3TModel",
    "S3TPlanner",
    "S3TStore",
    "S3TTrainer",
    "Stage",
    "StateError",
    "StoreError",
    "StoreLockedError",
    "UnfinishedDeletionError",
    "UnknownExampleError",
]

_HOMES = {
    "Plan": "plan.tree",
    "Receipt": "store.receipts",
    "S3TConfig": "lora.config",
    "S3TEnsemble": "serving.ensemble",
    "S3TMixin": "training.trainer",
    "S3TModel": "lora.tuner",
    "S3TPlanner": "planner.planner",
    "S3TStore": "store.store",
    "S3TTrainer": "training.trainer",
    "Stage": "plan.tree",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "peft" in sys.modules:
    importlib.import_module(".lora.config", __name__)
