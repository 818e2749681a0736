"""How long a text can be at most that has few enough tokens, known without its tokens.

A tokenizer that keeps every byte of a text has a token for each, and none stands for more bytes than it is written
with. Others make one token of a word that they do not know, or drop spaces: of those nothing is known beforehand.
"""

from __future__ import annotations

import json
from typing import Any

KEEPING = {"ByteLevel", "Digits", "Metaspace", "Split"}
"""Ways to take a text apart that drop none of it, unless they say so."""

NFC = 9
"""How many times as many bytes a text can have as its NFC form: a character has at most 3 times those of its canonical
decomposition (the sign of the kelvin, 3 and 1), and a decomposition 3 times those of what it is composed to (Hangul,
9 and 3)."""


def bytes_per_token(tokenizer: Any) -> int | None:
    """Bytes in UTF-8 that one token stands for at most; `None`: not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    told = json.loads(backend.to_str())
    shrinks = _shrinks(_steps(told["normalizer"], "normalizers"))
    strips = any(token["lstrip"] or token["rstrip"] for token in told["added_tokens"])
    if shrinks is None or strips or not _keeps(told["model"], _steps(told["pre_tokenizer"], "pretokenizers")):
        return None
    return shrinks * max(len(token.encode()) for token in tokenizer.get_vocab())


def _steps(told: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """A step, or those of a sequence."""
    if told is None:
        return []
    return told[name] if told["type"] == "Sequence" else [told]


def _shrinks(steps: list[dict[str, Any]]) -> int | None:
    """How many times as long a text can be as what normalizers make of it; `None`: not known."""
    found = 1
    for step in steps:
        if step["type"] == "NFC":
            found = NFC
        elif step["type"] == "Replace":
            if step["pattern"] != {"String": " "} or not step["content"]:
                return None
        elif step["type"] != "Prepend":
            return None
    return found


def _keeps(model: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether each byte that is left becomes a token, or a share of one."""
    if model["type"] not in ("BPE", "Unigram") or any(
        step["type"] not in KEEPING or str(step.get("behavior")).lower() == "removed" for step in steps
    ):
        return False
    from tokenizers.pre_tokenizers import ByteLevel

    known = {entry if isinstance(entry, str) else entry[0] for entry in model["vocab"]}  # Unigram: with scores
    if any(step["type"] == "ByteLevel" for step in steps):
        return set(ByteLevel.alphabet()) <= known
    return bool(model["byte_fallback"]) and {f"<0x{byte:02X}>" for byte in range(256)} <= known
