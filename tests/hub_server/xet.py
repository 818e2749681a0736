"""The content-addressed store that hf_xet writes to, a folder, and what has to be known of it."""

from __future__ import annotations

from pathlib import Path


class Cas:
    def __init__(self, path: Path):
        self.path = path

    def find(self, sha256: str) -> str | None:
        return None

    def collect(self) -> None:
        pass
