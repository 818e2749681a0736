"""The list of mutations fits the sources: what `python tests/mutations.py` needs minutes to run is still runnable."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import mutations
from conftest import mark_slow


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.about)
def test_every_old_text_occurs_once(mutation):
    assert mutations.check_anchors(mutation) == []
    assert all(old != new for old, new in mutation.edits)


def test_every_promise_is_broken_at_least_twice():
    counts = Counter(mutation.promise for mutation in mutations.MUTATIONS)
    assert set(counts) == set(range(1, 15)) and min(counts.values()) >= 2
    assert len({mutation.about for mutation in mutations.MUTATIONS}) == len(mutations.MUTATIONS)


def test_the_tests_that_should_catch_them_exist():
    for mutation in mutations.MUTATIONS:
        for test in mutation.tests:
            file, name = re.fullmatch(r"([\w/]+\.py)::(\w+)(?:\[.*\])?", test).groups()
            assert f"def {name}(" in (Path(__file__).parent / file).read_text(), test


def test_the_recorded_table_has_a_row_for_every_mutation():
    table = mutations.TABLE.read_text()
    for mutation in mutations.MUTATIONS:
        row = re.escape(f"| {mutation.promise} | {mutation.about} | `{mutation.file}` | `")
        assert re.search(rf"{row}([\w]+/)*test_", table), mutation.about


def items_of(request: pytest.FixtureRequest, file: str) -> list[pytest.Item]:
    """The tests of a file below tests/, also those that this run leaves out."""
    module = pytest.Module.from_parent(request.session, path=request.path.parent / file)
    items = [*request.session.genitems(module)]
    mark_slow(items)
    return items


def test_each_has_a_test_among_those_that_run_by_default(request):
    """A change has to pass what runs by default, so something of that has to turn red."""
    names = {test for mutation in mutations.MUTATIONS for test in mutation.tests}
    default = set()
    for file in sorted({name.split("::")[0] for name in names}):
        for item in items_of(request, file):
            if not item.get_closest_marker("slow"):
                default |= {f"{file}::{item.name}", f"{file}::{item.originalname}"}
    assert sorted(names - default) == []


def test_brief_tests_have_the_parameters_that_they_name(request):
    given, named = {}, {}
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        for item in items_of(request, str(path)):
            brief = item.get_closest_marker("brief")
            if brief:
                given.setdefault(item.function, set()).add(item.callspec.id)
                named[item.function] = set(brief.args)
    assert named and all(named[function] <= given[function] for function in named)
