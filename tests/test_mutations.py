"""The list of mutations fits the sources: what `python tests/mutations.py` needs minutes to run is still runnable."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import mutations


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.about)
def test_every_old_text_occurs_once(mutation):
    assert mutations.check_anchors(mutation) == []
    assert all(old != new for old, new in mutation.edits)


def test_every_promise_is_broken_at_least_twice():
    counts = Counter(mutation.promise for mutation in mutations.MUTATIONS)
    assert set(counts) == set(range(1, 12)) and min(counts.values()) >= 2
    assert len({mutation.about for mutation in mutations.MUTATIONS}) == len(mutations.MUTATIONS)


def test_the_tests_that_should_catch_them_exist():
    for mutation in mutations.MUTATIONS:
        for test in mutation.tests:
            file, name = re.fullmatch(r"(\w+\.py)::(\w+)(?:\[.*\])?", test).groups()
            assert f"def {name}(" in (Path(__file__).parent / file).read_text(), test


def test_the_recorded_table_has_a_row_for_every_mutation():
    table = mutations.TABLE.read_text()
    for mutation in mutations.MUTATIONS:
        assert f"| {mutation.promise} | {mutation.about} | `{mutation.file}` | `test_" in table, mutation.about
