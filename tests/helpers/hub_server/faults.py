"""What the server does wrong on request. Every switch is something that the real Hub does or is documented to do."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass
class Faults:
    """The switches, which may change between any two requests.

    Args:
        gc: `"eager"` forgets commits as soon as no ref reaches them; `"lazy"` keeps them readable by their sha.
        cdn_ttl: Seconds for which the edge goes on serving bytes that it has served once, purged or not.
        purge_delay: Seconds between the answer to a purge and its effect.
        lfs_filename_missing: The list of large files comes without `filename`.
        commit_503_after_apply: The next so many commits are made, and answered with 503.
        stale_main: After a squash or a rewrite, the first so many reads of a branch's info answer from before it.
        page_size: Entries on a page of a list.
        fail_commits_412: The next so many commits are refused as if another had come first.
        latency: Seconds by which every answer is late.
    """

    gc: str = "eager"
    cdn_ttl: float = 0.0
    purge_delay: float = 0.0
    lfs_filename_missing: bool = False
    commit_503_after_apply: int = 0
    stale_main: int = 0
    page_size: int = 1000
    fail_commits_412: int = 0
    latency: float = 0.0

    def set(self, **changes: Any) -> None:
        """Sets switches by name; a value may be text, as it comes from a command line.

        >>> faults = Faults()
        >>> faults.set(gc="lazy", cdn_ttl="2.5", lfs_filename_missing="true")
        >>> faults.gc, faults.cdn_ttl, faults.lfs_filename_missing
        ('lazy', 2.5, True)
        """
        types = {field.name: type(field.default) for field in fields(self)}
        for name, value in changes.items():
            if name not in types:
                raise ValueError(f"there is no switch {name!r}; there are {', '.join(types)}")
            if types[name] is bool:
                value = value in (True, 1, "1", "true", "True")
            setattr(self, name, types[name](value))
        if self.gc not in ("eager", "lazy"):
            raise ValueError(f"gc is 'eager' or 'lazy', not {self.gc!r}")

    def take(self, name: str) -> bool:
        """Counts one off a switch that holds for so many requests."""
        left = getattr(self, name)
        setattr(self, name, max(left - 1, 0))
        return left > 0
