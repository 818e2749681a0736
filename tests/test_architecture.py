"""The list in docs/architecture.md is complete, and imports go up in it, never down."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/hf_s3t"
ORDER = re.findall(r"^\| `(\w+)(?:\.py|/)`", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.M)
MODULES = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
MODULES |= {path.parent.name: sorted(path.parent.glob("*.py")) for path in PACKAGE.glob("*/__init__.py")}


def test_every_module_is_listed_once():
    assert sorted(ORDER) == sorted(MODULES)


def test_imports_go_up():
    down = []
    for position, name in enumerate(ORDER):
        text = "\n".join(path.read_text(encoding="utf-8") for path in MODULES[name])
        up = "." if len(MODULES[name]) == 1 else ".."  # from inside a package
        imported = set(re.findall(rf"^\s*from {re.escape(up)}(\w+)(?:\.\w+)? import", text, re.M))
        whole = re.findall(rf"^from {re.escape(up)} import (.+)$", text, re.M)
        imported |= {item.split()[0] for line in whole for item in line.split(",")}
        down += [f"{name} imports {other}" for other in imported if other not in ORDER[:position]]
    assert down == []
