"""The command line against the Hub of the tests: push, pull, delete, purge, recheck, and what each ends with."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_s3t import S3TStore
from hf_s3t.cli import main as cli
from hub_server import Server
from machines import OFF, Machine
from purging import pushed, refs
from stores import stage_adapter

pytest_plugins = ["hub_fixtures"]


def command(line: list[str], variables: dict[str, str]) -> list[Any]:
    """Exit code, standard output and standard error of `hf-s3t`."""
    os.environ.update(variables)
    result = CliRunner().invoke(cli.app, line)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return [result.exit_code, result.stdout, result.stderr]


class Terminal:
    """Runs `hf-s3t` on a machine."""

    def __init__(self, machine: Machine, **variables: str):
        self.machine, self.variables = machine, variables

    def __call__(self, *line: object, code: int = 0, token: str | None = None) -> str:
        words = [str(word) for word in line]
        found, out, err = self.machine(command, line=words, variables=self.variables, token=token)
        assert found == code, (found, out, err)
        return " ".join((out + err).split())

    def json(self, *line: object, code: int = 0) -> Any:
        found, out, err = self.machine(command, line=[*map(str, line), "--json"], variables=self.variables)
        assert found == code, (found, out, err)
        (outcome,) = json.loads(out)
        assert outcome["exit_code"] == code
        return outcome["result"]


@pytest.mark.slow
def test_the_life_cycle(server: Server, machine: Machine, tmp_path: Path) -> None:
    run = Terminal(machine, HF_S3T_STATE=str(tmp_path / "out/.s3t"))
    machine(pushed, folder=str(tmp_path / "out"), name="owner/first")
    assert "owner/model is what" in run("push", tmp_path / "out", "owner/model")
    assert run.json("push", tmp_path / "out", "owner/model")["commit"] == server.repository("owner/model").resolve(
        "main"
    )
    assert "4 of 4 trained" in run("status", "owner/model") and "history" not in run("status", "owner/model")
    assert "shard-00/1" in run("locate", "owner/model", "--ids", "row-1") + run(
        "locate", "owner/model", "--ids", "row-2"
    )
    assert "Dry run" in run("delete", "owner/model", "--slices", "0:1", "--dry-run")

    text = run("delete", "owner/model", "--slices", "0:1", code=3)
    assert "no longer served by the head of owner/model since" in text and "hf-s3t purge owner/model" in text
    assert "still served at" in text and "refs/heads/main" not in text
    assert "Nothing was changed" in run("delete", "owner/model", "--slices", "0:1", code=3)
    assert "still serves what was deleted by receipt-" in run("status", "owner/model", code=3)
    (receipt,) = run.json("status", "owner/model", code=3)["unpurged"]

    server.faults.purge_delay = 1000
    report = tmp_path / "report.json"
    text = run("purge", "owner/model", "--report", report, "--seconds", "0.1", code=3)
    assert "Purge of owner/model: pending" in text and f"hf-s3t recheck {report}" in text and receipt in text
    assert run("delete", "owner/model", "--slices", "0:1", code=3) and report.stat().st_mode & 0o77 == 0
    assert "pending" in run("recheck", report, code=3)
    server.repository("owner/model").settle(at_once=True)
    assert "Purge of owner/model: no longer served" in run("recheck", report)
    assert run.json("recheck", report)["status"] == "no_longer_served"
    assert "history" not in run("status", "owner/model")
    assert "Nothing was changed" in run("delete", "owner/model", "--slices", "0:1")

    assert "is what owner/model holds" in run("pull", tmp_path / "out", "owner/model")
    assert "1 of 4 trained" in run("status", tmp_path / "out")
    run("verify", tmp_path / "out")


@pytest.mark.slow
def test_a_deletion_from_a_folder_that_was_pushed_is_still_in_the_history(
    server: Server, machine: Machine, tmp_path: Path
) -> None:
    run, folder = Terminal(machine, HF_S3T_STATE=str(tmp_path / "out/.s3t")), tmp_path / "out"
    machine(pushed, folder=str(folder), name="owner/model")
    receipt = run.json("delete", folder, "--slices", "0:1")["receipt"]
    assert run.json("status", folder)["unpurged"] == []
    assert run.json("status", "owner/model", code=3)["unpurged"] == [receipt]  # nobody has pushed it
    assert run.json("push", folder, "owner/fresh")["unpurged"] == []  # it has seen nothing of it
    text = run("push", folder, "owner/model", code=3)
    assert f"still serves what was deleted by {receipt}: hf-s3t purge owner/model" in text
    assert run.json("push", folder, "owner/model", code=3)["unpurged"] == [receipt]
    assert run.json("status", "owner/model", code=3)["unpurged"] == [receipt]
    again = run("delete", "owner/model", "--slices", "0:1", code=3)
    assert "Nothing was changed" in again and receipt in again and run.json("status", "owner/fresh")["unpurged"] == []
    run("purge", "owner/model", "--drop-refs")
    assert run.json("push", folder, "owner/model")["unpurged"] == []
    assert run.json("status", "owner/model")["unpurged"] == []


def test_what_was_trained_again_to_the_same_bits_is_served_rightly(
    server: Server, machine: Machine, tmp_path: Path
) -> None:
    run, folder = Terminal(machine, HF_S3T_STATE=str(tmp_path / "out/.s3t")), tmp_path / "out"
    machine(pushed, folder=str(folder), name="owner/model")
    run("delete", folder, "--slices", "0:1")
    machine(train_again, folder=str(folder))
    assert run.json("push", folder, "owner/model")["unpurged"] == []


def train_again(folder: str) -> None:
    store = S3TStore(Path(folder))
    with store.writing():
        manifest = store.manifest()
        stages = dict(manifest.stages)
        for stage in manifest.plan.missing(manifest.stages):
            stages[stage] = store.write_stage(stage, stage_adapter(stage))
        store.write_manifest(store.write_root(replace(manifest, stages=stages)))


def test_delete_and_purge_at_once(server: Server, machine: Machine, tmp_path: Path) -> None:
    machine(pushed, folder=str(tmp_path / "out"), name="owner/model")
    machine(refs, name="owner/model")
    run, state = Terminal(machine), ("--state", tmp_path / "out/.s3t")
    head = server.repository("owner/model").resolve("main")
    text = run("delete", "owner/model", "--slices", "0:1", "--purge", *state, code=2)
    assert "refs/tags/v1" in text and "--keep-ref" in text and "--drop-refs" in text and "Nothing was changed" in text
    assert server.repository("owner/model").resolve("main") == head
    assert "refs/tags/v9" in run("purge", "owner/model", "--keep-ref", "refs/tags/v9", *state, code=2)
    kept = run("delete", "owner/model", "--slices", "0:1", "--purge", "--keep-ref", "dev", *state, code=3)
    assert "pending" in kept and "refs/heads/dev" in kept
    receipt = run.json("delete", "owner/model", "--slices", "0:1", "--purge", "--drop-refs", *state)
    assert receipt["status"] == "no_longer_served" and receipt["still_served_at"] == []
    assert set(server.repository("owner/model").refs()) == {"refs/heads/main"}


def test_what_a_person_does_wrong_is_said(server: Server, machine: Machine, tmp_path: Path) -> None:
    machine(pushed, folder=str(tmp_path / "out"), name="owner/model")
    run, state = Terminal(machine), ("--state", tmp_path / "out/.s3t")
    text = run("status", "owner/nothing", code=2)
    assert "no folder owner/nothing" in text and "no repository owner/nothing" in text and "Traceback" not in text
    machine(empty, name="owner/empty")
    text = run("status", "owner/empty", code=2)
    assert "no folder owner/empty" in text and "no s3t.json" in text
    assert "no store here" in run("status", tmp_path / "nothing", code=2)
    reader, stranger = server.reader_token, server.stranger_token
    assert "write access" in run("purge", "owner/model", *state, code=2, token=reader)
    text = run("delete", "owner/model", "--slices", "0:1", *state, code=2, token=reader)
    assert "No right to write" in text and "Traceback" not in text
    assert "no access to it" in run("purge", "owner/model", *state, code=2, token=stranger)
    assert "id" in run("push", tmp_path / "out", tmp_path / "elsewhere", code=2)
    for content in ("", "[]", '{"repo": "owner/model"}'):
        (tmp_path / "no report.json").write_text(content)
        assert "Traceback" not in run("recheck", tmp_path / "no report.json", code=5)
    assert "does not exist" in run("recheck", tmp_path / "absent.json", code=2)


def empty(name: str) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo(name)


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_a_message(machine: Machine, new_machine: Any, tmp_path: Path) -> None:
    machine(pushed, folder=str(tmp_path / "out"), name="owner/model")
    machine(command, line=["delete", "owner/model", "--slices", "0:1"], variables={})
    state, report = str(tmp_path / "out/.s3t"), tmp_path / "report.json"
    Terminal(machine, HF_S3T_STATE=state)("purge", "owner/model", "--report", report)
    data = json.loads(report.read_text())
    data["probes"][0]["served"] = None
    report.write_text(json.dumps(data))
    run = Terminal(new_machine(home=machine.home, **OFF), HF_S3T_STATE=state)
    for line in (["purge", "owner/model"], ["push", tmp_path / "out", "owner/model"]):
        text = run(*line, code=2)
        assert "Traceback" not in text and ("did not answer" in text or "cannot be" in text or "cached" in text)
        assert "Nothing more was done" not in text  # a commit may have arrived
    assert "no answer: ConnectError" in run("recheck", report, code=3)


def test_status_tells_of_the_history_whoever_asks(server: Server, machine: Machine, tmp_path: Path) -> None:
    machine(pushed, folder=str(tmp_path / "out"), name="owner/model")
    run, here, nobody = Terminal(machine), ("--state", tmp_path / "out/.s3t"), ("--state", tmp_path / "none")
    receipt = run.json("delete", "owner/model", "--slices", "0:1", "--reference", "DSR-7", *here, code=3)["receipt"]
    for of, words in (("owner/model", here), ("owner/model", nobody), (tmp_path / "out", ())):
        assert run.json("status", of, *words, code=3)["unpurged"] == [receipt]
        assert f"of owner/model still serves what was deleted by {receipt}" in run("status", of, *words, code=3)
    text = run("purge", "owner/model", "--drop-refs", "--report", tmp_path / "report.json", *here)
    assert f"for {receipt} (DSR-7)" in text
    before = (tmp_path / "report.json").read_bytes()
    assert "Nothing was pending, so nothing was asked" in run("recheck", tmp_path / "report.json")
    assert (tmp_path / "report.json").read_bytes() == before
    for of, words in (("owner/model", here), ("owner/model", nobody), (tmp_path / "out", ())):
        assert run.json("status", of, *words)["unpurged"] == []


def test_a_folder_that_hides_a_repository_is_named(machine: Machine, tmp_path: Path) -> None:
    (machine.home / "owner/model").mkdir(parents=True)
    text = Terminal(machine)("status", "owner/model", code=2)
    assert "the folder owner/model holds no store, and hides the repository of that name" in text


def test_a_stopped_purge_stays_pending_even_if_nothing_is_served(machine: Machine, tmp_path: Path) -> None:
    machine(pushed, folder=str(tmp_path / "out"), name="owner/model")
    run, here, report = Terminal(machine), ("--state", tmp_path / "out/.s3t"), tmp_path / "report.json"
    run("delete", "owner/model", "--slices", "0:1", *here, code=3)
    run("purge", "owner/model", "--report", report, *here)
    report.write_text(json.dumps({**json.loads(report.read_text()), "status": "begun"}))
    assert "To finish it, run hf-s3t purge owner/model" in run("recheck", report, *here, code=3)
