"""Where nothing fits: what is said would do, does, when the planner is asked again."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from hf_s3t import S3TPlanner
from hf_s3t.cli.plan import shortlist
from hf_s3t.planner.candidates import Candidate

ASKED = {"examples": 100_000, "requests_per_day": 3, "horizon_days": 90, "shards": 4, "slices": 4}
BUSY = ASKED | {"gpu_hours_per_epoch": 100, "gpus": 3}


@pytest.fixture(scope="module")
def planner() -> S3TPlanner:
    return S3TPlanner(**BUSY)


def line(planner: S3TPlanner, start: str) -> str:
    (found,) = [text.strip() for text in planner.advice if text.strip().startswith(start)]
    return found


def number(planner: S3TPlanner, start: str) -> float:
    match = re.match(rf"{start}: ([\d.,]*\d)", line(planner, start))
    assert match, line(planner, start)
    return float(match[1].replace(",", ""))


def row(planner: S3TPlanner, wanted: Candidate) -> Candidate:
    """The wanted plan and rule, as another question has them."""
    setting = dataclasses.replace(wanted.setting, num_shards=planner.shards, replay=planner.replay)
    return Candidate.of(setting, setting.plan(), wanted.rule, planner.terms)


@pytest.mark.slow
def test_the_command_that_recommended_what_cannot_be():
    planner = S3TPlanner(10_000_000, 3, 365, shards=8, slices=8, gpu_hours_per_epoch=400, gpus=8)
    assert planner.recommended is None and planner.wanted.hours.share > 2
    assert planner.advice[0].startswith("Nothing that obeys the rule fits on 8 GPUs.")
    gpus, shards = int(number(planner, "GPUs")), int(number(planner, "More shards"))
    assert 8 < gpus < 30 and shards in (16, 32)
    assert row(dataclasses.replace(planner, gpus=gpus), planner.wanted).fits
    text = " ".join(planner.advice)
    assert "shards alone, each hit" in text and "days of reduced service" in text


def test_nothing_that_does_not_fit_is_recommended(planner):
    assert planner.recommended is None and planner.obeys(planner.wanted) and not planner.wanted.fits
    free = dataclasses.replace(planner, gpus=None)
    assert free.recommended == dataclasses.replace(planner.wanted, hours=None) and free.wanted == free.recommended
    assert planner.wanted in shortlist(planner)
    told = json.loads(json.dumps(planner.to_json(), allow_nan=False))
    assert told["recommended"]["config"] is None and told["recommended"]["advice"] == planner.advice
    assert not all(one["fits"] for one in told["candidates"]) and told["candidates"][1]["hours"]["share"] > 0


def test_what_does_not_fit_leaves_its_place_to_the_next_that_does(planner):
    for gpus in (5, 12):
        other = dataclasses.replace(planner, gpus=gpus)
        pool = [c for c in other.candidates if c.setting.size == (4, 4) and c.setting.method == "S3T"]
        fine = [c for c in pool if c.hours.fits and other.obeys(c)]
        assert other.recommended is (min(fine, key=lambda c: c.epochs) if fine else None)


def test_more_gpus(planner):
    gpus = int(number(planner, "GPUs"))
    assert row(dataclasses.replace(planner, gpus=gpus), planner.wanted).fits
    assert dataclasses.replace(planner, gpus=gpus).recommended is not None
    assert not row(dataclasses.replace(planner, gpus=gpus - 1), planner.wanted).fits


def test_fewer_requests(planner):
    rate = number(planner, "Fewer requests")
    assert row(dataclasses.replace(planner, requests_per_day=0.98 * rate), planner.wanted).fits
    assert not row(dataclasses.replace(planner, requests_per_day=1.1 * rate), planner.wanted).fits


def test_more_shards(planner):
    shards = int(number(planner, "More shards"))
    assert row(dataclasses.replace(planner, shards=shards), planner.wanted).fits
    assert shards == 8 or not row(dataclasses.replace(planner, shards=shards // 2), planner.wanted).fits


def test_replay(planner):
    replay = number(planner, "Replay")
    fine = row(dataclasses.replace(planner, replay=replay), planner.wanted)
    assert fine.fits and fine.setting.config.endswith(f"replay={replay})")
    assert not row(dataclasses.replace(planner, replay=replay + 0.03), planner.wanted).fits


def test_what_fits_already_is_named(planner):
    text = next(one for one in planner.advice if "size:" in one or "Rarer repairs:" in one)
    fitting = [c for c in planner.candidates if c.fits and c.setting.method == "S3T"]
    assert any(f"L={c.setting.num_slices}" in text and text.count(c.when) for c in fitting)


def test_where_a_thing_would_not_do_it_says_so():
    slow = S3TPlanner(**ASKED | {"examples": 2_000, "requests_per_day": 20, "min_in_use": 0.99}, gpus=1,
                      gpu_hours_per_epoch=5_000)  # fmt: skip
    text = "\n".join(slow.advice)
    assert "GPUs: no number of them, as stages of one sequence wait for each other." in text
    assert "More shards: not with 4, and more would be too small." in text
    assert "Replay: not even 0; repairs then take" in text


def test_where_no_row_obeys_the_rule_it_is_about_the_nearest():
    """Without shards that are given, `never` is no row, and of one slice each repair is of a dead shard."""
    planner = S3TPlanner(**ASKED | {"shards": None, "slices": 1, "requests_per_day": 40}, max_dead=0.0, gpus=1,
                         gpu_hours_per_epoch=50)  # fmt: skip
    assert planner.recommended is None and not planner.obeys(planner.wanted)
    assert "Nor does m=" in planner.advice[0] and number(planner, "GPUs") > 1


def test_a_cheaper_size_of_sisa_is_named():
    planner = S3TPlanner(**ASKED | {"requests_per_day": 2, "shards": None, "slices": None})
    text = line(planner, "Cheaper: SISA, each hit")
    sisa = [c for c in planner.candidates if c.setting.method == "SISA"]
    cheap = [c.setting for c in sisa if c.epochs < planner.recommended.epochs]
    assert any(f"each hit at m={one.num_shards}, L={one.num_slices}, " in text for one in cheap)


def test_baselines_are_told_with_what_a_request_waits_for():
    planner = S3TPlanner(**ASKED | {"requests_per_day": 1}, gpu_hours_per_epoch=6, gpus=8)
    alone = next(c for c in planner.candidates if c.setting.method == "shards alone")
    text = line(planner, "Cheaper: shards alone, each hit")
    assert alone.hours.repair == 1.5 and f"{alone.epochs * 6:,.0f} GPU hours in all" in text
    assert "a shard, 1/4 of the data, waits for a training of 1.5 GPU hours, 1.5 hours" in text
    assert f"{90 * 1.5 / 24:.0f} days of reduced service" in text
    assert planner.advice[-1].startswith("What S3T buys over these")
    assert [c for c in shortlist(planner) if planner.is_cheaper_baseline(c)] == [
        c for c in planner.candidates if c.setting.method != "S3T" and c.epochs < planner.recommended.epochs
    ]
