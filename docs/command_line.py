"""Writes what `hf-s3t --help` says into `reference/command-line.md`. mkdocs calls it for each page."""

from __future__ import annotations

from typing import Any

PAGE = "reference/command-line.md"
MARK = "<!-- verbs -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts the verbs where the page says."""
    return markdown.replace(MARK, "\n".join(verbs())) if page.file.src_uri == PAGE else markdown


def verbs() -> list[str]:
    """All verbs with their options, as Markdown."""
    from typer.main import get_command

    from hf_s3t.cli.main import app

    root: Any = get_command(app)
    lines: list[str] = []
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        for verb, one in [(name, command)] if inner is None else [(f"{name} {n}", c) for n, c in inner.items()]:
            lines += [f"## hf-s3t {verb}", "", _plain(one.help), "", "| | |", "|---|---|", *map(_row, one.params), ""]
    return lines


def _row(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in parameter.opts)
    return f"| {names} | {_plain(getattr(parameter, 'help', None))} |"


def _plain(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("[", "\\[").replace("<", "&lt;")
