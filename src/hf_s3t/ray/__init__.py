"""Many machines, by Ray (the extra `ray`): workers train the stages that a store lacks."""

from .driver import train

__all__ = ["train"]
