"""How many cases there are: what README and changelog say of it is counted here."""

import importlib
import sys
from pathlib import Path

from hostile import SLOW

HERE = Path(__file__).parent


def test_there_are_as_many_cases_as_is_said():
    sys.path.insert(0, str(HERE))
    modules = [importlib.import_module(path.stem) for path in HERE.glob("test_fuzz_*.py")]
    tests = {(module.__name__, name): vars(module)[name] for module in modules for name in vars(module)}
    cases = sum(test.cases for (_, name), test in tests.items() if name.startswith("test_") and hasattr(test, "cases"))
    assert cases >= 2000 and SLOW * cases >= 20_000, cases
