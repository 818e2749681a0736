"""Past one machine, on Ray: stages are trained side by side, and the endpoint is served by replicas."""

from .deployment import application, serve

__all__ = ["application", "serve"]
