"""What the package shows: exactly its public names, typed, of one version."""

from __future__ import annotations

import inspect
import tomllib
import types
from importlib.metadata import version
from importlib.resources import files

import pytest

import hf_s3t
from conftest import REPOSITORY
from hf_s3t import S3TError


def test_all_is_exactly_the_public_names_in_order():
    public = {
        name
        for name in dir(hf_s3t)
        if not name.startswith("_") and not isinstance(getattr(hf_s3t, name), types.ModuleType)
    }
    assert hf_s3t.__all__ == sorted(public)


@pytest.mark.parametrize("name", ["S3TConfig", "S3TTrainer", "S3TMixin", "S3TStore", "S3TEnsemble"])
def test_the_names_of_the_design_are_there(name):
    assert name in hf_s3t.__all__


@pytest.mark.parametrize("name", hf_s3t.__all__)
def test_everything_public_is_ours_and_documented(name):
    thing = getattr(hf_s3t, name)
    assert thing.__module__.startswith("hf_s3t.") and inspect.getdoc(thing)


@pytest.mark.parametrize("name", hf_s3t.__all__)
def test_what_is_public_has_documented_and_annotated_methods(name):
    thing = getattr(hf_s3t, name)
    for method, value in vars(thing).items():
        if method.startswith("_") or not inspect.isfunction(inspect.unwrap(value) if callable(value) else value):
            continue
        assert inspect.getdoc(value), f"{name}.{method} has no docstring"
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty, f"{name}.{method}"
        bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        assert not bare, f"{name}.{method}: {bare}"


def test_one_exception_is_above_all_others():
    public = [getattr(hf_s3t, name) for name in dir(hf_s3t)]
    errors = [value for value in public if isinstance(value, type) and issubclass(value, Exception)]
    assert len(errors) == 11 and all(issubclass(error, S3TError) for error in errors)
    assert all(error.__name__ in hf_s3t.errors.__doc__ for error in errors), "the drawing shows them all"


def test_type_checkers_are_told_that_it_is_typed():
    assert files("hf_s3t").joinpath("py.typed").is_file()


def test_there_is_one_version():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert hf_s3t.__version__ == project["version"] == version("hf_s3t")
