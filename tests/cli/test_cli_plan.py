"""`hf-s3t plan`: what is printed, as a table and as JSON, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from hf_s3t import S3TConfig, S3TPlanner
from hf_s3t.cli import main as cli
from hf_s3t.cli import plan as cli_plan
from hf_s3t.training.stage_plan import make_plan

ASKED = "--examples 52002 --shards 2 --slices 4 --budget 4 --requests-per-day 1 --horizon-days 40"


def run(arguments: str) -> Result:
    result = CliRunner().invoke(cli.app, ["plan", *arguments.split()])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def planner() -> S3TPlanner:
    return S3TPlanner(52_002, 1, 40, shards=2, slices=4, budget=4, gpu_hours_per_epoch=6, adapter_mb=40)


def printed(planner: S3TPlanner) -> list[str]:
    console = Console(width=80, markup=False, highlight=False, record=True, file=io.StringIO())
    console.print(cli_plan.show_plan(planner))
    return console.export_text().splitlines()


def test_the_table_and_a_line_to_paste() -> None:
    result = run(ASKED)
    assert result.exit_code == 0 and result.stderr == ""
    for text in ("yours:", "this m, L:", "other m, L:", "baselines:", "SISA", "from scratch", "cyclic B=4", "> "):
        assert text in result.stdout
    (line,) = [line.strip() for line in result.stdout.splitlines() if "S3TConfig(" in line]
    plan = make_plan(eval(line, {"S3TConfig": S3TConfig}), seed=0)
    row = next(line for line in result.stdout.splitlines() if line.startswith(">"))
    assert f" {len(plan.stages)} " in row and f"{plan.cost / 8:.2g}" in row and "Repair: " in result.stdout


def test_nothing_in_the_table_is_cut(planner: S3TPlanner) -> None:
    costly = dataclasses.replace(planner, gpu_hours_per_epoch=6e6, adapter_mb=4e6)
    large = S3TPlanner(10**9, 1e4, 3650, shards=1000, slices=4, adapter_mb=4000)
    for one in (planner, costly, large):
        lines = printed(one)
        assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
        assert "dead" in lines[1].split() and len([line for line in lines if " each hit " in line]) > 3


def test_hours_and_megabytes_take_the_place_of_epochs_and_stages(planner: S3TPlanner) -> None:
    text = "\n".join(printed(planner))
    assert "hours" in text and "epochs" not in text.split("\n\n")[0] and " MB " in text
    own = next(line for line in text.splitlines() if " never " in line)
    assert " 42 " in own and " 260 " in own, "7 epochs of 6 hours, 26 stages of 10 MB"


def test_the_legend_and_the_help_say_what_is_taken_for_granted(planner: S3TPlanner) -> None:
    text = " ".join(" ".join(printed(planner)).split())
    assert "nothing of some shard could be served" in text and "repairs are taken to need no time" in text
    shown = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "at least --min-in-use of the slices" in shown and "is at most --max-dead" in shown


def test_json_is_one_document_with_every_candidate() -> None:
    told = json.loads(run(f"{ASKED} --json").stdout)
    assert (told["exit_code"], told["error"]) == (0, None)
    found = told["result"]
    assert found["asked"]["shards"] == 2 and found["recommended"]["config"].startswith("S3TConfig(num_shards=2,")
    assert sum(row["setting"]["given"] for row in found["candidates"]) == 7
    assert found["candidates"][0]["all_dead"] == pytest.approx(8 * sum(1 / i for i in range(1, 9)))


def test_every_option_reaches_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def planner(**asked: object) -> None:
        seen.update(asked)
        raise ValueError("enough.")

    monkeypatch.setattr("hf_s3t.planner.planner.S3TPlanner", planner)
    options = (
        "--examples 9 --requests-per-day 2 --horizon-days 3 --shards 4 --slices 5 --budget 6 --cost-budget 7 "
        "--prior 0.4,0.6 --layers 8 --gpu-hours-per-epoch 11 --adapter-mb 12 --min-in-use 0.13 --max-dead 0.2"
    )
    assert run(options).exit_code == 2
    assert list(seen.values()) == [9, 2, 3, 4, 5, 6, 7, (0.4, 0.6), 8, 11, 12, 0.13, 0.2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--horizon-days 0", "horizon_days must be a number above 0, not 0.0. Correct it."),
        ("--prior 0.5,half", "The prior must be numbers with commas between them, such as 0.4,0.3,0.2,0.1,"),
    ],
)
def test_bad_input_ends_with_2(wrong: str, message: str) -> None:
    result = run(f"{ASKED} {wrong}")
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    told = json.loads(run(f"{ASKED} {wrong} --json").stdout)
    assert told["exit_code"] == 2 and told["result"] is None and message in told["error"]["message"]
    assert "--requests-per-day" in run("--examples 100").stderr
