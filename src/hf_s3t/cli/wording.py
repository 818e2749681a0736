"""Messages of the library in the words of the command line: options in the place of arguments."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

OPTIONS = {
    "activation_cache_gb": "--activation-cache-gb",
    "adapter_mb": "--adapter-mb",
    "base_model": "--base",
    "budget": "--budget",
    "cost_budget": "--cost-budget",
    "dry_run": "--dry-run",
    "gpu_hours_per_epoch": "--gpu-hours-per-epoch",
    "gpus": "--gpus",
    "gpus_per_stage": "--gpus-per-stage",
    "horizon_days": "--horizon-days",
    "keep_refs": "--keep-ref",
    "key": "--key-file",
    "max_dead": "--max-dead",
    "merge": "--merge",
    "min_in_use": "--min-in-use",
    "missing_ok": "--missing-ok",
    "older_than": "--older-than",
    "prefix": "--prefix",
    "public_key": "--public-key",
    "purge": "--purge",
    "reference": "--reference",
    "refresh_exports": "--refresh-exports",
    "requests_per_day": "--requests-per-day",
    "slices": "--slices",
    "state": "--state",
    "tombstones": "--tombstones",
}
"""Arguments of the library that a verb of the command line has as an option."""
SENTENCES = (
    (r"`delete\(slices=\.\.\.\)`|delete whole slices \(`slices=\[\.\.\.\]`\)", "`hf-s3t delete --slices SHARD:SLICE`"),
    (r"\(`locate`\)", "(`hf-s3t locate`)"),
    (r"`slices=\[\((\d+), (\d+)\)\]`", r"`--slices \1:\2`"),
    (r"`S3TStore\('([^'`]+)'\)`", r"`\1`"),
    (r"give ids, groups, rows or slices\.", "give --ids, --ids-file, --groups, --groups-file, --not-in or --slices."),
    (r"`private=False`", "`--public`"),
    (r"`keep_refs=\[\]`", "`--drop-refs`"),
    (r"pass (?=`)", "give "),
)
QUOTED = re.compile(r"`(?P<name>[a-z_]+)(?:=(?P<value>[^`]*))?`")
BARE = re.compile(r"(?<![`\w.-])(?P<name>[a-z]+(?:_[a-z]+)+|[a-z]+(?==))(?:=(?P<value>[^\s,;`]+))?(?![`\w])")


def in_options(message: str) -> str:
    """A message as somebody reads it who typed a command: arguments that are options of one are named so."""
    for pattern, words in SENTENCES:
        message = re.sub(pattern, words, message)
    return BARE.sub(_named, QUOTED.sub(_named, message))


def _named(match: re.Match[str]) -> str:
    option, value = OPTIONS.get(match["name"]), match["value"]
    if option is None:
        return match[0]
    shown = "" if value in (None, "", "True", "[...]") else f" {value.strip(chr(39))}"
    quote = "`" if match[0].startswith("`") else ""
    return f"{quote}{option}{shown}{quote}"


def let_flow(app: typer.Typer) -> None:
    """Takes the line ends of the source out of the help of all verbs, so that the terminal's width breaks lines."""
    registered: list[Any] = [*app.registered_commands, app.registered_callback]
    for command in filter(None, registered):
        paragraphs = inspect.cleandoc(command.callback.__doc__ or "").split("\n\n")
        if any(paragraphs):
            command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
