"""`hf-s3t plan`: what is printed, as a table and as JSON, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from hf_s3t import S3TConfig, S3TPlanner
from hf_s3t.cli import main as cli
from hf_s3t.cli import plan as cli_plan
from hf_s3t.cli.options import parse_count
from hf_s3t.planner import planner as planner_module
from hf_s3t.planner.comparison_picture import draw_comparison, kinds
from hf_s3t.training.stage_plan import make_plan

ASKED = "--examples 52002 --shards 2 --slices 4 --budget 4 --requests-per-day 1 --horizon-days 40"


@pytest.fixture(autouse=True)
def _no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is."""
    monkeypatch.setattr(planner_module, "BAR_SECONDS", 600)


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
    small = dataclasses.replace(costly, shards=1, slices=2, budget=2)
    many = dataclasses.replace(small, quality=[0.5, 0.9], gpus=100_000, gpus_per_stage=8)
    few = dataclasses.replace(small, gpus=1)
    for one in (planner, costly, large, many, few):
        lines = printed(one)
        assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
        assert "dead" in lines[1].split() and len([line for line in lines if " each hit " in line]) > 3


def test_hours_and_megabytes_take_the_place_of_epochs_and_stages(planner: S3TPlanner) -> None:
    text = "\n".join(printed(planner))
    assert "hours" in text and "epochs" not in text.split("\n\n")[0] and " MB " in text
    own = next(line for line in text.splitlines() if " never " in line)
    assert " 42 " in own and " 265 " in own, "7 epochs of 6 hours, 26 stages of 10 MB and 4.6 MB of index"


def test_the_legend_and_the_help_say_what_is_taken_for_granted(planner: S3TPlanner) -> None:
    text = " ".join(" ".join(printed(planner)).split())
    assert "some shard serves nothing" in text and "repairs are taken to need no time" in text
    shown = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "at least --min-in-use of the slices" in shown and "is at most --max-dead" in shown


def test_json_is_one_document_with_every_candidate() -> None:
    told = json.loads(run(f"{ASKED} --json").stdout)
    assert (told["exit_code"], told["error"]) == (0, None)
    found = told["result"]
    assert found["asked"]["shards"] == 2 and found["recommended"]["config"].startswith("S3TConfig(num_shards=2,")
    assert sum(row["setting"]["given"] for row in found["candidates"]) == 7
    assert found["candidates"][0]["all_dead"] == pytest.approx(8 * sum(1 / i for i in range(1, 9)))


def test_every_option_reaches_the_planner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}

    def planner(**asked: object) -> None:
        seen.update(asked)
        raise ValueError("enough.")

    monkeypatch.setattr("hf_s3t.planner.planner.S3TPlanner", planner)
    options = (
        "--examples 9 --requests-per-day 2 --horizon-days 3 --shards 4 --slices 5 --budget 6 --cost-budget 7 "
        "--prior 0.4,0.6 --layers 8 --gpu-hours-per-epoch 11 --gpus 20 --gpus-per-stage 10 --replay 0.3 "
        f"--adapter-mb 12 --activation-cache-gb 14 --quality {curve(tmp_path)} --min-in-use 0.13 --max-dead 0.2"
    )
    assert run(options).exit_code == 2
    assert list(seen.values()) == [
        9, 2, 3, 4, 5, 6, 7, (0.4, 0.6), 8, 11, 20, 10, 0.3, 12, 14, [0.5, 0.75], 0.13, 0.2
    ]  # fmt: skip


def curve(folder: Path, text: str = '{"metric": "accuracy", "score_by_prefix_length": [0.5, 0.75]}') -> Path:
    file = folder / "curve.json"
    file.write_text(text)
    return file


def test_an_expected_score_has_a_column(tmp_path: Path) -> None:
    result = run(f"{ASKED} --quality {curve(tmp_path)}")
    head = result.stdout.splitlines()[1]
    row = next(line for line in result.stdout.splitlines() if line.startswith(">"))
    in_use, score = row.split()[-3], row.split()[-1]
    assert head.split()[-1] == "score" and "score: accuracy of a shard" in result.stdout
    assert float(score) == pytest.approx(0.5 + 0.25 * float(in_use[:-1]) / 100, abs=2e-3)


def test_gpus_give_hours_and_marks() -> None:
    result = run(f"{ASKED} --gpu-hours-per-epoch 300 --gpus 4")
    lines = result.stdout.splitlines()
    marked = [line for line in lines if line[:2] == "x "]
    shares = {line: float(line.split("%")[0].split()[-1].replace(",", "").replace("k", "000")) for line in marked}
    assert marked and max(shares.values()) > 100 and any("GPUs" in line for line in lines[:2])
    assert "nothing" in result.stdout.split("Recommended:")[1].splitlines()[2] and "  GPUs: " in result.stdout
    fine = run(f"{ASKED} --gpu-hours-per-epoch 6 --gpus 4").stdout.splitlines()
    assert [line for line in fine if line.startswith("> ")] and [line for line in fine if line.startswith("< ")]
    assert not [line for line in fine if line.startswith("x ")] and "Cheaper: shards alone" in "".join(fine)


def test_a_picture_shows_every_row_of_the_table(tmp_path: Path, planner: S3TPlanner) -> None:
    few = dataclasses.replace(planner, gpus=1, gpu_hours_per_epoch=60)
    rows = cli_plan.shortlist(few)
    figure = draw_comparison(few, rows, tmp_path / "rows.png")
    (axes,) = figure.axes
    points = {collection.get_gid(): collection.get_offsets().tolist() for collection in axes.collections}
    for kind, places in points.items():
        wanted = [[c.epochs * 60, 100 * c.outlook.in_use] for c in rows if kind in kinds(few, c)]
        assert places == wanted, kind
    assert sum(len(places) for kind, places in points.items() if not kind.startswith("does not")) == len(rows)
    assert len(points["does not fit on the GPUs"]) == sum(not c.fits for c in rows) > 0
    texts = [text.get_text() for text in axes.texts]
    assert sum("shards alone" in text for text in texts) == 1 and (tmp_path / "rows.png").stat().st_size > 10_000
    wrong = run(f"{ASKED} --plot {tmp_path / 'rows.docx'}")
    assert wrong.exit_code == 2 and "matplotlib cannot write" in wrong.stderr


def test_a_long_comparison_shows_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "comparing" not in run(ASKED).stderr
    monkeypatch.setattr(planner_module, "BAR_SECONDS", 0.01)
    result = run(ASKED)
    assert "comparing" in result.stderr and "plans" in result.stderr and "comparing" not in result.stdout


@pytest.mark.parametrize(
    ("text", "count"), [("52002", 52_002), ("52k", 52_000), ("10M", 10**7), ("1.5M", 1_500_000), ("2b", 2 * 10**9)]
)
def test_counts_are_read(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "52,002", "1.5", "0.0001k", "10MB", "-5", "1e6", "ten"])
def test_other_counts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number of rows. Write a whole number, or 52k, 1.5M, 2B.$"):
        parse_count(text)


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", '{"metric": 1, "score_by_prefix_length": [1, 2]}',
             '{"metric": "loss", "score_by_prefix_length": [1, "2"]}', '{"score_by_prefix_length": [1, 2]}']
)  # fmt: skip
def test_a_curve_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    result = run(f"{ASKED} --quality {curve(tmp_path, text)}")
    assert result.exit_code == 2 and 'Write {"metric": "accuracy", "score_by_prefix_length"' in result.stderr
    assert "cannot be read" in run(f"{ASKED} --quality {tmp_path / 'none.json'}").stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--examples 10MB", "'10MB' is not a number of rows. Write a whole number, or 52k, 1.5M, 2B."),
        ("--gpus 8", "--gpus 8 needs the time that they train. Give --gpu-hours-per-epoch, too."),
        ("--horizon-days 0", "--horizon-days must be a number above 0, not 0.0. Correct it."),
        ("--prior 0.5,half", "The prior must be numbers with commas between them, such as 0.4,0.3,0.2,0.1,"),
    ],
)
def test_bad_input_ends_with_2(wrong: str, message: str) -> None:
    result = run(f"{ASKED} {wrong}")
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    told = json.loads(run(f"{ASKED} {wrong} --json").stdout)
    assert told["exit_code"] == 2 and told["result"] is None and message in told["error"]["message"]
    assert "--requests-per-day" in run("--examples 100").stderr
