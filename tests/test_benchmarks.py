"""The benchmarks run in their quick form and write what DESIGN.md promises; no time is asserted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_utils import enable_full_determinism
from transformers.utils.import_utils import enable_tf32

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


@pytest.mark.slow
def test_waiting_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/waiting.py"), "--quick", "--json", str(file), "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    assert record["name"] == "waiting" and record["settings"]["seed"] == 3 and record["settings"]["deletions"] == 3
    figures = record["figures"]
    assert figures["generation"] == figures["deletions"] == 3 and figures["answers"] > 3
    assert figures["wait_ms_p999"] > 0 and figures["delete_ms_longest"] > 0 and figures["drained_seconds_longest"] > 0


@pytest.mark.slow
def test_no_request_to_an_endpoint_fails_while_another_process_deletes(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/endpoint.py"), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    figures = record["figures"]
    assert figures["failed"] == figures["failed_without"] == figures["old_answers"] == figures["exit_code"] == 0
    assert figures["deletions"] >= 1 and figures["answers"] > 10 and figures["seen_ms_longest"] > 0


@pytest.mark.slow
def test_planning_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/planning.py"), "--quick", "--json", str(file), "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "expected surviving prefix" in done.stdout and "known numbers" in done.stdout
    assert "MISSED" not in done.stdout
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    assert record["name"] == "planning" and record["settings"]["seed"] == 3
    figures = record["figures"]
    # Costs are whole numbers: 28 of 40 and of 28 slice passes, and at most 69 of 126 and of 96.
    assert figures["cost_at_cyclic_retention_L4"] == 0.70 and figures["cost_at_pruned_cyclic_retention_L4"] == 1
    assert figures["cost_at_cyclic_retention_L6"] <= 0.55 and figures["cost_at_pruned_cyclic_retention_L6"] <= 0.72
    gains = {"uniform": (0.063, 0.117), "zipf": (0.055, 0.147), "two_level": (0.069, 0.203)}
    for prior, (four, six) in gains.items():
        assert figures[f"retention_gain_at_equal_cost_{prior}_L4"] > four
        assert figures[f"retention_gain_at_equal_cost_{prior}_L6"] > six
        assert figures[f"retention_gain_over_bms_{prior}_L4"] > 0
    for name in ("plan_seconds_L4", "plan_seconds_L6", "plan_seconds_L12_B24"):
        assert figures[name] > 0
    assert figures["known_missed"] == 0 and len(figures["known"]) == 16
    for one in figures["by_case"]:
        assert one["pruned_cost"] < one["cost"] and one["best_cost"] <= one["cost"]
        assert one["cyclic"] < one["best"] <= one["every_order"] * (1 + 1e-12)


@pytest.mark.slow
def test_startup_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/startup.py"), "--quick", "--json", str(file), "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of `import transformers, peft`" in done.stdout
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    assert record["name"] == "startup" and record["settings"]["seed"] == 3
    for name in ("help", "status", "locate", "delete", "plan", "import"):
        assert record["figures"][f"{name}_cpu_seconds"] > 0 and record["figures"][f"{name}_over_transformers_peft"] > 0


@pytest.mark.slow
def test_training_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/training.py"), "--quick", "--json", str(file), "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "paper_over_cached" in done.stdout
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    assert record["name"] == "training" and record["settings"]["seed"] == 3
    figures = record["figures"]
    ratios = (
        "paper_over_cached", "paper_over_uncached", "stock_over_uncached", "cached_over_predicted", "fill16_over_rows",
        "fill16_over_pass", "fill96_over_rows", "fill96_over_pass", "probe16_over_fill", "probe96_over_fill",
        "bert_stock_over_cached", "full_budget_paper_over_ours", "full_budget_per_pass",
    )  # fmt: skip
    for name in ratios:
        assert figures[f"{name}_p10"] <= figures[name] <= figures[f"{name}_p90"] and figures[name] > 0
    assert figures["full_budget_passes"] == 2 * 10 / 32


@pytest.mark.slow
def test_proof_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/proof.py"), "--quick", "--json", str(file), "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "proof_over_sha256" in done.stdout
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    assert record["name"] == "proof" and record["settings"]["seed"] == 3
    for name in ("proof_over_sha256", "identity_over_sha256", "remembered_over_sha256", "sha256_gb_per_s"):
        assert record["figures"][f"{name}_p10"] <= record["figures"][name] <= record["figures"][f"{name}_p90"]
    assert record["figures"]["megabytes"] > 1


def gpu_benchmark(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--quick", *options]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)


@pytest.mark.slow
def test_gpu_writes_its_figures_without_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = gpu_benchmark("--json", str(file), "--seed", "3")
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    assert record["name"] == "gpu" and record["hardware"]["gpu"] is None and record["settings"]["seed"] == 3
    figures = record["figures"]
    assert figures["failed"] == {} and figures["left_out"] == [] and figures["stage_files_unequal"] == 0
    names = [*figures["by_case"], *figures["not_run"]]
    assert len(names) == len(set(names)) and not any(one != name and one in name for one in names for name in names)
    assert all(f"{name} " in done.stdout for name in names)
    quick = {name for name, reason in figures["not_run"].items() if reason == "too much for --quick"}
    assert quick == {f"promises llama {way} cached" for way in ("fp32", "adamw_8bit", "full_determinism")}
    unable = {"fp16": 2, "tf32": 2, "torch_compile": 2, "4bit cached": 1, "rank_group cached": 1, "graphs on": 4}
    assert {text: sum(text in name for name in figures["not_run"]) for text in unable} == unable
    assert len(figures["not_run"]) == sum(unable.values()) + len(quick)
    promises = {name: case for name, case in figures["by_case"].items() if name.startswith("promises")}
    assert len(promises) == 13
    for case in promises.values():
        assert (case["row_order_equal"], case["surviving_equal"], case["repaired_equal"]) == (4, 2, 4)
    check_gpu_training(figures["by_case"])
    check_gpu_serving(figures["by_case"])


def check_gpu_training(cases: dict[str, dict[str, float]]) -> None:
    for precision in ("8bit", "bf16"):
        for way in ("paper", "stock", "uncached", "cached"):
            case = cases[f"training {precision} {way}"]
            assert all(case[f"stage{stage}_tokens_per_s"] > 0 for stage in (1, 2, 3, 4))
            parts = {name: case[f"{name}_seconds"] for name in ("proof", "cache", "writing", "identity")}
            ours = {"uncached": {"proof", "writing", "identity"}, "cached": set(parts)}.get(way, set())
            assert {name for name, seconds in parts.items() if seconds > 0} == ours
            assert case["train_seconds"] > case["steps_seconds"] + sum(parts.values()) and case["other_seconds"] > 0


def check_gpu_serving(cases: dict[str, dict[str, float]]) -> None:
    for who in ("1 member", "5 members"):
        assert min(cases[f"serving {who} load"].values()) > 0
        for rows in (1, 16):
            case = cases[f"serving {who} {rows} rows graphs off"]
            assert case["prefill_over_stock"] > 0 and case["stock_decode_tokens_per_s"] > 0
    case = cases["serving 5 members deletions under load"]
    assert case["deletions"] == 5 and case["busy_answers"] > 0 and case["quiet_longest_wait_ms"] > 0


@pytest.mark.slow
def test_gpu_names_what_it_leaves_out_and_what_it_does_not_find(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = gpu_benchmark("--part", "promises", "--only", "vit fp32", "--seconds", "0", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    names = ["promises vit fp32 uncached", "promises vit fp32 cached"]
    assert json.loads(file.read_text())["figures"]["left_out"] == names
    assert f"--only '{names[0]}' --only '{names[1]}'" in done.stdout
    lost = gpu_benchmark("--part", "serving", "--only", "7 members")
    assert lost.returncode == 1 and "no case has 7 members in its name" in lost.stdout


@pytest.fixture
def gpu_runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the module sets it
    spec = importlib.util.spec_from_file_location("gpu_runs", ROOT / "benchmarks" / "gpu_runs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_runs", module)
    spec.loader.exec_module(module)
    return module


def test_a_gpu_run_keeps_what_it_has_and_starts_nothing_that_ends_late(gpu_runs: Any, tmp_path: Path) -> None:
    file, seconds, report = tmp_path / "figures.json", [0.0], {"figures": {}}
    runs = gpu_runs.Runs(report, file, seconds=22, clock=lambda: seconds[0])

    def run(name: str, kind: str, takes: float, error: Exception | None = None, prepares: float = 0.0) -> None:
        def measure(note: Any) -> None:
            note(first=1)
            assert json.loads(file.read_text())["figures"]["by_case"][name] == {"first": 1}
            seconds[0] += takes
            if error:
                raise error

        def prepare() -> None:
            seconds[0] += prepares

        runs.run(gpu_runs.Case(name, kind, measure, prepare))

    run("first", "long", 8, prepares=4)
    run("unable", "short", 0, gpu_runs.NotRun("no GPU"))
    run("second", "long", 8)  # till 20: what was prepared for the first one is not its time
    run("third", "long", 8)
    run("broken", "short", 1, RuntimeError("oh"))
    figures = json.loads(file.read_text())["figures"]
    assert figures["left_out"] == ["third"] and figures["not_run"] == {"unable": "no GPU"}
    assert figures["failed"] == {"broken": "RuntimeError: oh"} and figures["by_case"]["broken"] == {"first": 1}
    assert figures["by_case"]["first"] == {"first": 1, "preparing_seconds": 4, "seconds": 8}


def test_a_gpu_case_leaves_the_process_as_it_was(gpu_runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    before = torch.backends.cudnn.deterministic, dict(os.environ)
    for _ in range(2):  # transformers switches TF32 on once in a process
        with gpu_runs.settings_kept():
            enable_full_determinism(0)
            enable_tf32(True)
            assert gpu_runs.tf32_is_on()
        assert not torch.are_deterministic_algorithms_enabled() and not gpu_runs.tf32_is_on()
        assert (torch.backends.cudnn.deterministic, dict(os.environ)) == before


@pytest.mark.slow
def test_quality_writes_its_figures_and_goes_on_with_what_is_missing(tmp_path: Path, shared_data: Path) -> None:
    file, page = tmp_path / "figures.json", tmp_path / "page.md"
    page.write_text("before\n<!-- quality -->\nold\n<!-- /quality -->\nafter\n")
    command = [sys.executable, str(ROOT / "benchmarks/quality.py"), "--quick", "--results", str(tmp_path / "results")]
    command += ["--json", str(file), "--plot", str(tmp_path / "curves.png"), "--readme", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    figures = record["figures"]
    assert record["name"] == "quality" and figures["sst2_full"] - figures["sst2_s3t"] == figures["sst2_lost"]
    assert 1.8 < figures["alpaca_stored_share"] < 2
    sst2, alpaca = (figures["by_part"][part]["0"] for part in ("a_sst2", "a_alpaca"))
    assert len(sst2["layer_group"]["by_length"]) == 4 and len(sst2["layer_group"]["head_alone"]) == 3
    assert sst2["layer_group"]["lora_numbers"] == sst2["full"]["lora_numbers"]
    assert alpaca["full_equal"]["slice_passes"] == alpaca["rank_group"]["slice_passes"] == 15
    streams = figures["by_part"]["c_sst2"]["0"]
    assert streams["ensemble_difference"] < 1e-4 and streams["sisa_retrained"][0]["slice_passes"] in (3, 5, 6)
    assert [one["slice_passes"] for one in streams["storage"]] == [12, 18, 24]
    assert streams["over_requests"]["s3t_cyclic"]["slice_passes"] < streams["over_requests"]["sisa"]["slice_passes"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "rank groups" in text

    again = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and again.stdout.count("done already") == 7


@pytest.mark.slow
def test_scaling_writes_its_figures(tmp_path: Path) -> None:
    file, seconds = tmp_path / "figures.json", tmp_path / "seconds.json"
    command = [sys.executable, str(ROOT / "benchmarks/scaling.py"), "--quick", "--json", str(file), "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stage seconds measured here" in done.stdout and "no schedule has more" in done.stdout
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    assert record["name"] == "scaling" and record["settings"]["seed"] == 3
    figures = record["figures"]
    assert {slices: len(times) for slices, times in figures["stage_seconds"].items()} == {"4": 4, "8": 8}
    assert figures["schedule_over_bound_worst"] <= 1.0001 and figures["schedule_over_ideal_worst"] >= 1
    for plan in figures["by_plan"].values():
        rows = plan["by_workers"]
        assert [row["workers"] for row in rows] == [2**power for power in range(10)]
        assert rows[0]["speed_up"] == pytest.approx(1)
        assert all(row["speed_up_least"] - 1e-9 <= row["speed_up"] <= row["speed_up_most"] + 1e-9 for row in rows)
    # All work is 140 slice passes and the longest path 10; there are 20 paths, which 64 workers take side by side.
    seconds.write_text(json.dumps({"4": [1, 2, 3, 4], "8": [1] * 8}))
    given = subprocess.run([*command, "--stage-seconds", str(seconds)], capture_output=True, text=True, timeout=100)
    assert given.returncode == 0 and "stage seconds from seconds.json" in given.stdout, given.stderr[-2000:]
    rows = json.loads(file.read_text())["figures"]["by_plan"]["m=5, L=4, B=4"]["by_workers"]
    assert rows[0]["seconds"] == 140 and rows[6]["seconds"] == 10 and rows[6]["speed_up"] == 14


@pytest.mark.slow
def test_scaling_on_ray_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/scaling_ray.py"), "--quick", "--json", str(file), "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    assert record["name"] == "scaling_ray" and record["settings"]["seed"] == 3
    figures = record["figures"]
    assert figures["stages"] == 26 and figures["stage_seconds_longest"] >= figures["stage_seconds_shortest"] > 0
    assert figures["ray_over_one_process"] == pytest.approx(figures["ray_seconds"] / figures["one_process_seconds"])
    assert figures["ray_over_two_threads"] > 0


@pytest.mark.slow
def test_bookkeeping_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/bookkeeping.py"), "--quick", "--json", str(file), "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MB of memory" in done.stdout and "partition_rows_per_second" in done.stdout
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    assert record["name"] == "bookkeeping" and record["settings"]["seed"] == 3
    figures = record["figures"]
    for name in ("delete_growth", "partition_rows_per_second", "status_seconds_5000_stages"):
        assert figures[name] > 0
    assert list(figures["by_size"]) == ["1k", "10k"]
    for size, operations in figures["by_size"].items():
        assert set(operations) == {
            "partition", "second_start", "locate", "delete", "delete_10k", "status", "verify", "export_state",
            "import_state",
        }  # fmt: skip
        assert all(one["seconds"] > 0 and one["cpu_seconds"] > 0 for one in operations.values())
        assert figures[f"locate_ms_{size}"] > 0 and figures[f"peak_mb_{size}"] >= 0
    if sys.platform == "linux":
        small, large = figures["by_size"].values()
        assert large["partition"]["written_mb"] > 2 * small["partition"]["written_mb"] > 0
        assert 0 < large["delete"]["written_mb"] < 2 * small["delete"]["written_mb"]
