"""Rooms import from rooms above them in docs/architecture.md, no module from one that imports it."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/hf_s3t"
TEXT = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
ROOMS = re.findall(r"^\| `?(\w+)`? \| .+ \|$", TEXT, re.M)[1:]
FILES = {path: path.relative_to(PACKAGE).parts for path in PACKAGE.rglob("*.py")}
MODULES = {".".join(parts).removesuffix(".py").removesuffix(".__init__"): path for path, parts in FILES.items()}


def room(module: str) -> str:
    first = module.split(".")[0]
    return first if (PACKAGE / first).is_dir() else "root"


def imported(path: Path) -> Iterator[str]:
    """Modules of the library that a file imports, inside functions, too."""
    here = FILES[path][:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else ())]
            for alias in node.names:
                whole, part = ".".join(start), ".".join([*start, alias.name])
                yield part if part in MODULES else whole


IMPORTS = {module: set(imported(path)) - {module} for module, path in MODULES.items() if module != "__init__"}


def test_every_room_and_every_file_has_its_line():
    assert sorted(ROOMS) == sorted({"root", *(path.name for path in PACKAGE.glob("[a-z]*") if path.is_dir())})
    lists = dict(re.findall(r"^\*\*(\w+)\*\*\n\n((?:- .+\n)+)", TEXT, re.M))
    assert sorted(lists) == sorted(ROOMS)
    for name, lines in lists.items():
        there = {parts[-1] for parts in FILES.values() if parts[:-1] == (() if name == "root" else (name,))}
        assert sorted(re.findall(r"^- `(\w+\.py)`: .", lines, re.M)) == sorted(there - {"__init__.py"}), name


def test_rooms_import_from_above():
    below = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert below == []


def test_the_planner_is_for_the_command_line_alone():
    users = {room(module) for module, others in IMPORTS.items() if any(room(other) == "planner" for other in others)}
    assert users == {"planner", "cli"}


def test_no_imports_go_round_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()


def test_every_statement_of_sql_is_in_three_files():
    """What the state's database is asked and told is read in one place."""

    def speaks_sql(node: ast.AST) -> bool:
        if isinstance(node, ast.Import | ast.ImportFrom):
            return "sqlite3" in {getattr(node, "module", None), *(alias.name for alias in node.names)}
        called = node.func if isinstance(node, ast.Call) and node.args else None  # the Hub's client executes, too
        return isinstance(called, ast.Attribute) and called.attr in ("execute", "executemany", "executescript")

    trees = {"/".join(parts): ast.parse(path.read_text(encoding="utf-8")) for path, parts in FILES.items()}
    speakers = {name for name, tree in trees.items() if any(map(speaks_sql, ast.walk(tree)))}
    of_others = {"store/any_database.py"}
    assert speakers - of_others == {"store/schema.py", "store/database.py", "store/record_tables.py"}
