"""Many machines, by Ray (an extra): workers train the stages that a store lacks, replicas serve the endpoint."""

try:
    import ray as _ray  # noqa: F401
except ImportError as error:
    raise ImportError('Training on Ray needs it, which is an extra. Run: pip install "hf-s3t[ray]"') from error

from .deployment import application, serve
from .driver import train

__all__ = ["application", "serve", "train"]
