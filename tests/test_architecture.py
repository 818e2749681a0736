"""The list in docs/architecture.md is complete, and imports go up in it, never down."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = re.findall(r"^\| `(\w+)\.py`", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.M)
MODULES = {path.stem: path for path in (ROOT / "src/hf_s3t").glob("*.py") if path.stem != "__init__"}


def test_every_module_is_listed_once():
    assert sorted(ORDER) == sorted(MODULES)


def test_imports_go_up():
    down = []
    for position, name in enumerate(ORDER):
        text = MODULES[name].read_text(encoding="utf-8")
        imported = set(re.findall(r"^\s*from \.(\w+) import", text, re.M))
        whole = re.findall(r"^from \. import (.+)$", text, re.M)
        imported |= {item.split()[0] for line in whole for item in line.split(",")}
        down += [f"{name} imports {other}" for other in imported if other not in ORDER[:position]]
    assert down == []
