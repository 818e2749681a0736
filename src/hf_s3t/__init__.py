"""hf_s3t: fine-tuning with the Hugging Face Trainer that can forget an example exactly, without a gradient step."""

from .config import S3TConfig
from .deletion import Receipt
from .ensemble import S3TEnsemble
from .errors import (
    CompatibilityError,
    DatasetError,
    IsolationError,
    RecipeError,
    S3TError,
    StateError,
    StoreError,
    StoreLockedError,
    UnknownExampleError,
)
from .plan import Plan, Stage
from .planner import S3TPlanner
from .store import S3TStore
from .trainer import S3TMixin, S3TTrainer
from .tuner import S3TModel

__version__ = "0.1.0.dev0"

__all__ = [
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
    "UnknownExampleError",
]
