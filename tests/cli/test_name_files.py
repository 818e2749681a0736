"""Files of ids as people have them: Excel's, PowerShell's, CSV; what is not read is named for what it looks like."""

from __future__ import annotations

import io
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from command_line import plain, run
from hf_s3t.cli.name_files import names_in
from stores import make_store, people

NAMES = ["row-1", "Zo\u00e9, the second", "3"]
LINES = "\r\n".join(NAMES) + "\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with mark"])
@pytest.mark.parametrize("piped", [False, True])
def test_lines_in_the_encodings_of_others(tmp_path: Path, monkeypatch, encoding: str, piped: bool) -> None:
    data = b"\xfe\xff" + LINES.encode("utf-16-be") if "mark" in encoding else LINES.encode(encoding)
    (tmp_path / "ids").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert names_in(Path("-") if piped else tmp_path / "ids")[0] == NAMES


@pytest.mark.parametrize(
    "table",
    [
        'id,why\nrow-1,asked\n"Zo\u00e9, the second",asked\n3,"asked, twice"\n',
        'why;id\nasked;row-1\nasked;"Zo\u00e9, the second"\nasked;3\n',
        "why\tid\nasked\trow-1\nasked\tZo\u00e9, the second\nasked\t3\n",
        '{"id": "row-1"}\n{"id": "Zo\\u00e9, the second"}\n{"id": 3}\n',
        '[{"id": "row-1"}, {"id": "Zo\\u00e9, the second"}, {"id": 3.0}]',
        'id\nrow-1\n"Zo\u00e9, the second"\n3\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_column_of_a_table(tmp_path: Path, table: str, encoding: str) -> None:
    (tmp_path / "ids.csv").write_bytes(table.encode(encoding))
    assert names_in(tmp_path / "ids.csv", "id") == (NAMES, "")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id,name\nrow-1,x\nrow-2,y\n", "looks like CSV with a header; if it is, give --column 'id' or --column 'name'"),  # noqa: E501
        ("id;name\nrow-1;x\n", "--column 'id' or --column 'name'"),
        ('"id"\n"row-1"\n', "--column 'id'"),
        ("id\nrow-1\n", "--column 'id'"),
        ("row-1;x\nrow-2;y\n", "If not, write one above"),
        ('"row-1"\n"row-2"\n', "has quotes around its lines. Take them off, or write a header above them"),
        ('{"id": "row-1"}\n', "looks like JSON"),
        ("row-1\nrow-2\n", ""),
        ("Doe, Jane\nRoe\n", ""),
        ("one, alone\n", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_what_a_file_of_lines_looks_like(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "ids").write_text(text)
    hint = names_in(tmp_path / "ids")[1]
    assert told in hint and bool(told) == bool(hint)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"PAR1rest", "is a parquet file"),
        (b"PK\x03\x04rest", "an Excel or another zipped file"),
        ("row-1\n".encode("utf-16-le"), "looks like UTF-16 without a byte order mark"),
        (b"Zo\xe9\n", "is not UTF-8 text"),
    ],
)
def test_what_is_no_text(tmp_path: Path, data: bytes, told: str) -> None:
    (tmp_path / "ids").write_bytes(data)
    with pytest.raises(typer.BadParameter, match=told):
        names_in(tmp_path / "ids")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id,why\nrow-1,x\n,y\n", "Row 2 of .* has nothing in column 'id'; it has the columns 'id', 'why'"),
        ("name,why\nrow-1,x\n", "has no column 'id'. Its first line has 'name', 'why'"),
        ("{]\n", "cannot be read as JSON"),
        ("[1, 2]", "Row 1 of .* has nothing in column 'id'"),
        ("", "has no column 'id'. Its first line has nothing"),
    ],
)
def test_a_table_without_that_column(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "ids").write_text(text)
    with pytest.raises(typer.BadParameter, match=told):
        names_in(tmp_path / "ids", "id")


def test_an_unknown_name_says_what_the_file_looks_like(tmp_path: Path) -> None:
    store = make_store(tmp_path / "out", people(30)).path
    (tmp_path / "ids.csv").write_text("id,why\nrow-3,asked\nrow-4,asked\n")
    told = "looks like CSV with a header; if it is, give --column 'id'"
    for verb in (("locate",), ("delete",), ("delete", "--missing-ok")):
        done = run(verb[0], store, "--ids-file", tmp_path / "ids.csv", *verb[1:])
        assert done.exit_code == 4 and told in plain(done.stderr), verb
    done = run("delete", store, "--ids-file", tmp_path / "ids.csv", "--column", "id")
    assert done.exit_code == 0 and "2 of 2 found" in plain(done.stdout)
    done = run("delete", store, "--ids", "row-5", "--column", "id")
    assert done.exit_code == 2 and "--column says which column" in plain(done.stderr)


@pytest.mark.parametrize("spelt", ["row-3 ", "ROW-3", "zo\u00e9".replace("zo", "row-3 zo")])
def test_blanks_case_and_unicode_are_named_and_never_guessed(tmp_path: Path, spelt: str) -> None:
    rows = people(30)
    rows[3]["id"] = unicodedata.normalize("NFD", spelt) if "zo" in spelt else "row-3"
    store = make_store(tmp_path / "out", rows)
    (tmp_path / "ids").write_text(f"{spelt}\n", encoding="utf-8")
    done = run("delete", store.path, "--ids-file", tmp_path / "ids")
    assert done.exit_code == 4 and f"(like {ascii(spelt)})" in plain(done.stderr)
    assert store.status().deleted_examples == 0
