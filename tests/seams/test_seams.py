"""No file but those of `seams/` reaches into the private inside of another library; every seam has a row and a use."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trl import DPOTrainer, SFTTrainer

import hf_s3t
from hf_s3t import CompatibilityError, S3TMixin, S3TTrainer
from hf_s3t.seams import SEEN, TABLE, broken, seam

PACKAGE = Path(hf_s3t.__file__).parent
ROOM = PACKAGE / "seams"
OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py")) if not path.is_relative_to(ROOM)]
NAMES = (
    "past_key_values", "fused_lm_head", "SUPPORTED_PEFT_TASKS", "neftune_hook_handle", "httpx", "lfs-files",
    "x-linked-etag", "chunk-cache", "base_layer", "original_module", "PEFT_TYPE_TO_TUNER_MAPPING",
)  # fmt: skip
"""Names that belong to other libraries and have changed, or may: only the room knows them."""


@functools.cache
def own_names() -> set[str]:
    """What this package defines or assigns itself, under names that begin with an underscore."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if getattr(node.value, "id", "") in ("self", "cls") else set()
    return found


PUBLIC_UNDERSCORES = {"_asdict", "_replace", "_fields"}
"""Methods of named tuples, whose names begin so that they cannot be fields."""


def private_names(path: Path, own: set[str]) -> Iterator[str]:
    """Where a file names something private that the package does not define."""

    def is_foreign(name: Any) -> bool:
        private = isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name)
        return bool(private) and name not in own | PUBLIC_UNDERSCORES

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[Any] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        elif isinstance(node, ast.FunctionDef):
            names = [node.name] if node.name in PRIVATE_OF_OTHERS else []
            yield from (f"{path.name}:{node.lineno} {name}" for name in names)
            continue
        yield from (f"{path.name}:{node.lineno} {name}" for name in names if is_foreign(name))


def _methods(cls: type) -> set[str]:
    ours = "hf_s3t."
    return {
        name
        for base in cls.__mro__
        if not base.__module__.startswith(ours)
        for name in vars(base)
        if name.startswith("_") and not name.startswith("__")
    }


PRIVATE_OF_OTHERS = _methods(S3TTrainer) | _methods(hf_s3t.S3TModel) | _methods(hf_s3t.S3TConfig)
"""Private methods that a class of ours would override."""


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path.stem)
def test_nothing_private_of_others_is_named_outside_the_room(path: Path) -> None:
    assert list(private_names(path, own_names() - PRIVATE_OF_OTHERS)) == []


@pytest.mark.parametrize("name", NAMES)
def test_names_that_others_may_change_are_in_the_room_alone(name: str) -> None:
    found = [path.name for path in OUTSIDE if re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))]
    assert found == []


def test_a_private_name_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text("from peft.utils import _hidden\nmodel._init_weights(1)\ngetattr(model, '_mark')\nself._own\n")
    assert {found.split()[1] for found in private_names(file, {"_own"})} == {"_hidden", "_init_weights", "_mark"}
    file.write_text("class Trainer:\n    def _save_checkpoint(self): ...\n")
    assert [found.split()[1] for found in private_names(file, set())] == ["_save_checkpoint"]


def test_every_seam_has_a_use_and_every_use_a_row() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*ROOM.glob("*.py"), *OUTSIDE])
    used = set(re.findall(r"\b(?:seam|broken|lost|check_overrides)\(\s*\"(\w+)\"", text))
    assert used == set(TABLE) and {row.library for row in TABLE.values()} == set(SEEN)


@pytest.mark.parametrize("name", TABLE)
def test_an_error_says_what_is_touched_and_what_depends_on_it(name: str) -> None:
    row, message = TABLE[name], str(broken(name, "It is another one"))
    assert all(row) and all(text in message for text in (*row, SEEN[row.library]))


@pytest.mark.parametrize("error", [AttributeError, ImportError, KeyError, TypeError])
def test_what_python_says_of_a_name_that_is_gone_is_a_broken_seam(error: type[Exception]) -> None:
    with pytest.raises(CompatibilityError, match=rf"{error.__name__}: .*gone.*\. hf_s3t needs .* \(promise 4\)"):
        with seam("attention"):
            raise error("gone")
    with pytest.raises(ValueError, match="a user's"), seam("attention"):
        raise ValueError("a user's")


@pytest.mark.parametrize("trainer", [SFTTrainer, DPOTrainer])
def test_trainers_of_trl_can_be_made_staged(trainer: type) -> None:
    assert issubclass(type("Staged", (S3TMixin, trainer), {}), trainer)


def test_every_file_of_the_room_can_be_imported_alone() -> None:
    for path in ROOM.glob("*.py"):
        assert importlib.import_module(f"hf_s3t.seams.{path.stem}" if path.stem != "__init__" else "hf_s3t.seams")
