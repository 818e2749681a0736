"""`hf-s3t plan`: what is printed, as a table and as JSON, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from hf_s3t import S3TConfig, S3TPlanner
from hf_s3t.cli import main as cli
from hf_s3t.cli import plan as cli_plan
from hf_s3t.planner.arrivals import RepairPolicy
from hf_s3t.training.staging import make_plan

ASKED = "--examples 52002 --shards 2 --slices 4 --budget 4 --requests-per-day 1 --horizon-days 40 --streams 50"


def run(arguments: str) -> Result:
    result = CliRunner().invoke(cli.app, ["plan", *arguments.split()])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def planner() -> S3TPlanner:
    return S3TPlanner(
        52_002, 1, 40, shards=2, slices=4, budget=4, streams=50, gpu_hours_per_epoch=6, adapter_mb=40
    )


def printed(planner: S3TPlanner, width: int) -> list[str]:
    console = Console(width=width, markup=False, highlight=False, record=True, file=io.StringIO())
    console.print(cli_plan.show_plan(planner, width))
    return console.export_text().splitlines()


def test_the_table_and_a_line_to_paste() -> None:
    result = run(ASKED)
    assert result.exit_code == 0 and result.stderr == ""
    for text in ("yours:", "this m, L:", "other m, L:", "baselines:", "SISA", "from scratch", "cyclic B=4", ">*"):
        assert text in result.stdout
    (line,) = [line.strip() for line in result.stdout.splitlines() if "S3TConfig(" in line]
    plan = make_plan(eval(line, {"S3TConfig": S3TConfig}), seed=0)
    row = next(line for line in result.stdout.splitlines() if line.startswith(">"))
    assert f" {plan.cost} " in row and "Repair, by train() again," in result.stdout


@pytest.mark.parametrize("width", [80, 100, 120])
def test_nothing_in_the_table_is_cut(planner: S3TPlanner, width: int) -> None:
    lines = printed(planner, width)
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    rows = [line for line in lines if line[:2] in ("> ", ">*", " *", "  ") and ("below" in line or "each" in line)]
    assert len(rows) > 5


@pytest.mark.parametrize("width", [80, 100])
def test_a_head_is_not_cut_where_other_columns_are_wide(planner: S3TPlanner, width: int) -> None:
    costly = dataclasses.replace(planner, gpu_hours_per_epoch=6e6, adapter_mb=4e6, streams=5)
    assert any("dead" in line.split() for line in printed(costly, width)[:3])


def test_the_legend_says_what_is_taken_for_granted(planner: S3TPlanner) -> None:
    text = " ".join(" ".join(printed(planner, 120)).split())
    assert "nothing of some shard could be served until it was trained again" in text
    assert "repairs are taken to need no time" in text and "the same whatever the stage trains" in text
    assert "per request." in text


def test_the_help_says_what_the_rule_is() -> None:
    text = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "at least --min-in-use of the slices" in text and "is at most --max-dead" in text


def test_hours_and_megabytes_take_the_place_of_epochs_and_stages(planner: S3TPlanner) -> None:
    text = "\n".join(printed(planner, 100))
    assert "hours" in text and "epochs" not in text.split("\n\n")[0] and " MB " in text
    own = next(line for line in text.splitlines() if " never " in line)
    assert " 42 " in own and " 260 " in own, "7 epochs of 6 hours, 26 stages of 10 MB"


def test_json_is_one_document_with_every_candidate() -> None:
    result = run(f"{ASKED} --json")
    told = json.loads(result.stdout)
    assert (told["exit_code"], told["error"]) == (0, None)
    found = told["result"]
    assert found["asked"]["shards"] == 2 and found["recommended"]["config"].startswith("S3TConfig(num_shards=2,")
    assert found["recommended"]["advice"] and found["recommended"]["reason"]
    assert sum(row["setting"]["given"] for row in found["candidates"]) == 7
    assert found["candidates"][0]["lives"]["all_dead"] == pytest.approx(8 * sum(1 / i for i in range(1, 9)))


def test_every_option_reaches_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def planner(**asked: object) -> None:
        seen.update(asked)
        raise ValueError("enough.")

    monkeypatch.setattr("hf_s3t.planner.planner.S3TPlanner", planner)
    options = (
        "--examples 9 --requests-per-day 2 --horizon-days 3 --shards 4 --slices 5 --budget 6 --cost-budget 7 "
        "--prior 0.4,0.6 --layers 8 --examples-per-person 9 --burst 10 --gpu-hours-per-epoch 11 --adapter-mb 12 "
        "--min-in-use 0.13 --max-dead 0.2 --streams 14 --seed 15"
    )
    assert run(options).exit_code == 2
    assert list(seen.values()) == [9, 2, 3, 4, 5, 6, 7, (0.4, 0.6), 8, 9, 10, 11, 12, 0.13, 0.2, 14, 15]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--horizon-days 0", "horizon_days must be a number above 0, not 0.0. Correct it."),
        ("--prior 0.5,half", "The prior must be numbers with commas between them, such as 0.4,0.3,0.2,0.1,"),
        ("--layers 3", "slices=4 for a model of 3 layers"),
    ],
)
def test_bad_input_ends_with_2(wrong: str, message: str) -> None:
    result = run(f"{ASKED} {wrong}")
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    told = json.loads(run(f"{ASKED} {wrong} --json").stdout)
    assert told["exit_code"] == 2 and told["result"] is None and message in told["error"]["message"]


def test_what_is_missing_ends_with_2() -> None:
    result = run("--examples 100")
    assert result.exit_code == 2 and "--requests-per-day" in result.stderr


@pytest.mark.parametrize(
    ("policy", "shown"),
    [
        (RepairPolicy(), "never"),
        (RepairPolicy(below=1), "below 1"),
        (RepairPolicy(below=4), "each hit"),
        (RepairPolicy(every_days=1), "1 day"),
        (RepairPolicy(every_days=30), "30 days"),
    ],
)
def test_policies_in_few_characters(policy: RepairPolicy, shown: str) -> None:
    assert cli_plan._when(policy, 4) == shown


def test_a_life_without_an_end_is_shown() -> None:
    planner = S3TPlanner(52_002, 2, 20, shards=2, prior=[0.5, 0.5, 0.0], streams=20)
    assert cli_plan._life(planner.candidates()[0], 2).endswith("never")
    assert math.isinf(planner.candidates()[0].lives.all_dead or 0)
