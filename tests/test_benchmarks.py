"""The benchmarks run in their quick form and write what DESIGN.md promises; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_serving_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/serving.py"), "--quick", "--json", str(file), "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "answers, by depth" in done.stdout and "deletions from a model in memory" in done.stdout
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    assert record["name"] == "serving" and record["settings"]["seed"] == 3
    figures = record["figures"]
    for name in ("batched_over_switching", "ensemble_over_predicted", "live_deletion_over_copy"):
        assert figures[name] > 0 and f"{name}_std" in figures
    assert figures["store_deletion_seconds"] > 0 and figures["member_memory_mb"] > figures["member_weights_mb"] > 0
    assert figures["gradient_steps"] == 0
    assert [one["depth"] for one in figures["by_depth"]] == [4, 8]
    assert figures["by_depth"][-1]["predicted"] == 5
    assert set(figures["live_deletion_by_kind"]) == {"other", "busy", "shorter", "dead"}
