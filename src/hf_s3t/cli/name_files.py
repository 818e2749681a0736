"""Files that name ids or groups: one a line, or a column of a table. What a file looks like is told, not guessed."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from ..store.ids import id_text

MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
BINARY = {b"PAR1": "a parquet file", b"PK\x03\x04": "an Excel or another zipped file", b"\x1f\x8b": "a gzipped file"}
DELIMITERS = ",;\t"
HEADERS = ("id", "ids", "group", "groups")
LOOKED_AT = 100
"""So many lines say what a file looks like."""


def names_in(file: Path | None, column: str | None = None) -> tuple[list[str], str]:
    """The names in a file, or on standard input (`-`): lines that are not empty, or one column of a table.

    UTF-8, or UTF-16 with its mark. A name is taken as it stands, blanks included. A table is CSV (its delimiter is a
    comma, a semicolon or a tab), JSON lines, or one JSON list.

    Returns:
        `tuple[list[str], str]`: The names, and what a file of lines looks like if that is something else, to be told
        where a name is not known.
    """
    if file is None:
        return [], ""
    text = _text(file)
    if column is None:
        lines = [line for line in _lines(text) if line.strip()]
        return lines, _hint(file, lines[:LOOKED_AT])
    try:
        return [id_text(value) for value in _cells(text, file, column)], ""
    except (csv.Error, RecursionError) as error:
        raise typer.BadParameter(f"{file} cannot be read as a table: {error}.") from None


def _hint(file: Path, lines: list[str]) -> str:
    if lines and lines[0].lstrip().startswith(("{", "[")):
        return f"{file} looks like JSON. Give --column with the name of the field that holds the ids."
    delimiter = _delimiter(lines)
    quoted = bool(lines) and all(line[0] == line[-1] == '"' and len(line) > 1 for line in lines)
    headed = len(lines) > 1 and lines[0].strip().lower() in HEADERS
    if delimiter is None and not quoted and not headed:
        return ""
    header = next(csv.reader(lines[:1], delimiter=delimiter or ","))
    shown = " or ".join(f"--column {ascii(name)}" for name in header[:3])
    if delimiter is None and header[0].strip().lower() not in HEADERS:
        return f"{file} has quotes around its lines. Take them off, or write a header above them and give --column."
    return f"{file} looks like CSV with a header; if it is, give {shown}. If not, write one above: it names nobody."


def _text(file: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error}") from None
    for mark, kind in BINARY.items():
        if data.startswith(mark):
            raise typer.BadParameter(f"{file} is {kind}. Save the ids as a text file or as CSV, and name that.")
    try:
        text = data.decode(MARKS.get(data[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        message = f"{file} is not UTF-8 text ({error}). Save it as UTF-8; else names with accents are not found."
        raise typer.BadParameter(message) from None
    if "\0" in text:
        raise typer.BadParameter(f"{file} looks like UTF-16 without a byte order mark. Save it as UTF-8.")
    return text


def _lines(text: str) -> list[str]:
    return re.split("\r\n|\r|\n", text)


def _delimiter(lines: list[str]) -> str | None:
    """What separates the cells of a table: it occurs equally often, and at least once, in every line."""
    for delimiter in DELIMITERS:
        widths = {len(row) for row in csv.reader(lines, delimiter=delimiter)}
        if len(lines) > 1 and len(widths) == 1 and widths.pop() > 1:
            return delimiter
    return None


def _cells(text: str, file: Path, column: str) -> Iterator[Any]:
    for number, row in enumerate(_rows(text, file, column)):
        value = row.get(column) if isinstance(row, Mapping) else None
        if value is None or value == "":
            names = ", ".join(ascii(name) for name in row if name is not None) if isinstance(row, Mapping) else "none"
            raise typer.BadParameter(
                f"Row {number + 1} of {file} has nothing in column {column!r}; it has the columns {names:.200}."
            )
        yield value


def _rows(text: str, file: Path, column: str) -> Iterator[Any]:
    begin = text.lstrip()[:1]
    try:
        if begin == "[":
            yield from json.loads(text)
        elif begin == "{":
            yield from (json.loads(line) for line in _lines(text) if line.strip())
        else:
            csv.field_size_limit(2**31 - 1)
            lines = text.splitlines(keepends=True)
            wide = {d: next(csv.reader(lines[:1], delimiter=d), []) for d in DELIMITERS}
            delimiter = next((d for d, header in wide.items() if column in header), None)
            if delimiter is None:
                header = max(wide.values(), key=len)
                names = ", ".join(map(ascii, header)) or "nothing"
                raise typer.BadParameter(f"{file} has no column {column!r}. Its first line has {names:.200}.")
            yield from csv.DictReader(lines, delimiter=delimiter)
    except ValueError as error:
        raise typer.BadParameter(f"{file} cannot be read as JSON: {error}.") from None
