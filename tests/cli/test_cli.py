"""The command line: every verb, every exit code, what is printed where, and that one fault does not stop the rest."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

import models
import trained_stores
from command_line import outcomes, plain, run
from hf_s3t import IsolationError, S3TStore, StoreLockedError
from hf_s3t.plan.life import life_until_first_dead
from hf_s3t.store import schema
from hf_s3t.store.folder import StoreFolder
from hf_s3t.store.manifest import Manifest
from hf_s3t.store.partition import Entry, assign, keyed_digest
from killing import fill_disk
from trained_stores import WEIGHTS, edit_json, tree

FACTORY = f"{trained_stores.__file__}:make_trainer"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_stores.train_store(tmp_path_factory.mktemp("cli") / "trained")


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "store"))


def row_ids(count: int = 3) -> list[str]:
    return models.llama_rows(count)["id"][:]


# ---- looking ----


def test_status(store: Path) -> None:
    (outcome,) = outcomes("status", store)
    assert outcome["result"]["trained"] == 14 and outcome["result"]["examples"] == trained_stores.ROWS
    text = run("status", store).stdout
    assert "14 of 14 trained" in text and "shard-00/0-1-2, shard-01/0-1-2" in text


def test_status_says_how_many_requests_are_left(store: Path) -> None:
    (outcome,) = outcomes("status", store)
    life = outcome["result"]["life"]
    assert list(life) == ["uniform"]
    assert life["uniform"]["until_all_dead"]["mean"] == pytest.approx(6 * sum(1 / k for k in range(1, 7)))
    run("delete", store, "--slices", "0:0", "--slices", "0:1")  # what is left of shard 0 is one stage, on slice 2
    (outcome,) = outcomes("status", store, "--prior", "0.5,0.3,0.2")
    assert outcome["result"]["requests"] == 1 and outcome["result"]["repair_slice_passes"] == 11
    left = {under: life["until_first_dead"]["mean"] for under, life in outcome["result"]["life"].items()}
    alone = {"uniform": 6, "given": 10}  # requests until slice 2 of shard 0 is hit; the whole shard 1 may die before
    whole = life_until_first_dead([[1 / 6], [1 / 6] * 3]).mean, life_until_first_dead([[0.1], [0.25, 0.15, 0.1]]).mean
    assert (left["uniform"], left["given"]) == pytest.approx(whole)
    assert all(0.5 * alone[under] < left[under] < alone[under] for under in left)
    text = run("status", store, "--prior", "0.5,0.3,0.2").stdout
    assert f"about {left['given']:.1f} until a shard is dead" in text and "requests received" in text


def test_status_fails_below_a_number_of_requests(store: Path, tmp_path: Path) -> None:
    assert run("status", store, "--fail-below", 5).exit_code == 0
    (outcome,) = outcomes("status", store, "--fail-below", 500, code=6)
    assert "requests are left, fewer than 500" in run("status", store, "--fail-below", 500).stdout
    assert outcome["exit_code"] == 6 and outcome["error"] is None
    assert run("status", store, "--fail-below", 5, "--prior", "1,0,0").exit_code == 0  # slices 1 and 2 live for ever
    run("delete", store, "--slices", "0:0", "--slices", "0:1", "--slices", "0:2")
    assert run("status", store, "--fail-below", 0.1).exit_code == 6
    assert run("status", store, tmp_path / "absent", "--fail-below", 0.1).exit_code == 2
    (outcome,) = outcomes("status", store)
    assert outcome["result"]["life"]["uniform"]["until_first_dead"]["mean"] == 0


def test_a_life_without_end_is_told_without_a_number(store: Path) -> None:
    (outcome,) = outcomes("status", store, "--prior", "1,0,0")
    assert outcome["result"]["life"]["given"]["until_all_dead"] == {"mean": None, "standard_deviation": None}
    assert "about any number until a shard is dead" in run("status", store, "--prior", "1,0,0").stdout


def test_a_chance_too_small_to_compute_with_is_none(store: Path) -> None:
    (outcome,) = outcomes("status", store, "--prior", "1e-300,0.5,0.5")
    assert outcome["result"]["life"]["given"]["until_all_dead"] == {"mean": None, "standard_deviation": None}


@pytest.mark.parametrize("limit", ["-1", "nan"])
def test_a_limit_that_never_fails_is_refused(store: Path, limit: str) -> None:
    assert run("status", store, f"--fail-below={limit}").exit_code == 2


@pytest.mark.parametrize("prior", ["0.5,0.5", "0.5,0.5,0.5", "-1,1,1", "a,b,c", "nan,0.5,0.5"])
def test_a_prior_that_does_not_fit_is_refused(store: Path, prior: str) -> None:
    result = run("status", store, f"--prior={prior}")
    assert result.exit_code == 2 and "prior" in result.stderr


def test_status_without_the_state_says_so(store: Path) -> None:
    shutil.rmtree(store / ".s3t")
    assert "unknown: the state is not here" in run("status", store).stdout


def test_status_tells_dead_shards_exports_and_interrupted_deletions(store: Path, tmp_path: Path) -> None:
    run("export", store, tmp_path / "out")
    run("delete", store, "--slices", "0:0", "--slices", "0:1", "--slices", "0:2")
    (store / ".s3t/intents").mkdir(exist_ok=True)
    text = run("status", store).stdout
    assert "shard 0: serves nothing until" in plain(text) and "slices in use" in text
    assert str(tmp_path / "out") in plain(text).replace(" ", "")


def test_locate(store: Path) -> None:
    known = row_ids()[0]
    (outcome,) = outcomes("locate", store, "--ids", known, "--groups", "person-0")
    assert [found["found"] for found in outcome["result"]] == ["live", "live"]
    assert set(outcome["result"][0]) == {"asked", "found", "places", "stages", "looks_like"}
    result = run("locate", store, "--ids", known, "--ids", "nobody [red]")
    assert result.exit_code == 4
    assert "nobody [red]" in result.stdout and "unknown" in result.stdout


def test_tables_fit_100_columns(store: Path, tmp_path: Path) -> None:
    run("export", store, tmp_path / ("long" * 30))
    for arguments in (("locate", "--ids", "x" * 200), ("verify",), ("delete", "--slices", "0:0")):
        result = run(arguments[0], store, *arguments[1:])
        assert result.stdout and max(map(len, result.stdout.splitlines())) <= 100


# ---- deleting ----


def test_delete(store: Path) -> None:
    result = run("delete", store, "--ids", row_ids()[0], "--reference", "DSR-1")
    assert result.exit_code == 0
    assert f"no longer served by {store} since 2" in plain(result.stdout)
    for part in ("1 of 1 found", "served prefixes", "->", "other examples", "DSR-1", "receipt-", "Not covered:"):
        assert part in result.stdout
    assert "erased" not in result.stdout
    assert S3TStore(store).locate(ids=row_ids()[:1])[0].found == "deleted"


def test_delete_again_changes_nothing(store: Path) -> None:
    run("delete", store, "--ids", row_ids()[0])
    (outcome,) = outcomes("delete", store, "--ids", row_ids()[0])
    assert outcome["result"]["status"] == "unchanged" and outcome["result"]["already_deleted"] == 1
    assert "was deleted from" in run("delete", store, "--ids", row_ids()[0]).stdout


def test_delete_receipt_as_json(store: Path) -> None:
    (outcome,) = outcomes("delete", store, "--groups", "person-0")
    receipt = outcome["result"]
    assert receipt["kind"] == "delete" and receipt["status"] == "inactive" and receipt["examples"] == 3
    assert {"receipt", "stages_removed", "served_before", "served_after", "dark_examples", "exports"} <= set(receipt)


@pytest.mark.parametrize("leave", ["everything", "the locks out", "an intent"])
def test_dry_run_changes_no_byte(store: Path, leave: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if leave == "the locks out":
        (store / ".s3t/write.lock").unlink()
    if leave == "an intent":

        def killed(*args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("hf_s3t.store.deletion.carry_out", killed)
            result = run("delete", store, "--ids", row_ids()[1])
            assert result.exit_code == 3 and "begun and is not finished: [Errno 28]" in result.stderr
            assert "not served any more, but is still on the disk" in result.stderr
    before = tree(store)
    result = run("delete", store, "--ids", row_ids()[0], "--dry-run")
    assert result.exit_code == 0 and "Dry run:" in result.stdout and "would no longer be served" in result.stdout
    assert "since" not in result.stdout.split("\n")[0]
    assert tree(store) == before
    (outcome,) = outcomes("delete", store, "--ids", row_ids()[0], "--dry-run")
    assert outcome["result"]["status"] == "dry run" and outcome["result"]["examples"] == 1
    assert tree(store) == before


@pytest.mark.parametrize("verb", ["delete", "readmit"])
def test_a_full_disk_leaves_a_deletion_begun_and_the_next_one_ends_it(
    store: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if verb == "readmit":
        run("delete", store, "--ids", row_ids()[0])
    before, replace, (place,) = tree(store), os.replace, S3TStore(store).locate(ids=row_ids()[:1])

    def full(source: object, target: object) -> None:
        if str(target).endswith("s3t.json"):
            fill_disk()
        replace(source, target)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        (outcome,) = outcomes(verb, store, "--ids", row_ids()[0], code=3)
    message = outcome["error"]["message"]
    assert outcome["error"]["type"] == "UnfinishedDeletionError" and outcome["result"] is None
    assert "was begun and is not finished" in message and "No space left on device" in message
    assert ("is not served any more, but is still on the disk" in message) is (verb == "delete")
    assert tree(store)["s3t.json"] == before["s3t.json"]
    if verb == "delete":
        live = {stage.name for stage in S3TStore(store).live().stages}
        assert place.stages and live and live.isdisjoint(place.stages)
    assert run("status", store).exit_code == 3
    assert run("delete", store, "--ids", row_ids()[1]).exit_code == 0
    found = "deleted" if verb == "delete" else "unknown"
    assert S3TStore(store).locate(ids=row_ids()[:1])[0].found == found
    assert run("status", store).exit_code == 0


def test_unknown_id_is_named_and_nothing_changes(store: Path) -> None:
    before = tree(store)
    result = run("delete", store, "--ids", row_ids()[0], "--ids", "nobody")
    assert result.exit_code == 4 and "'nobody'" in result.stderr and "Nothing was changed" in result.stderr
    assert result.stdout == ""
    assert tree(store) == before
    (outcome,) = outcomes("delete", store, "--ids", row_ids()[0], "--ids", "nobody", "--missing-ok")
    assert outcome["result"]["found"] == 1


def test_ids_from_a_file_and_from_standard_input(store: Path, tmp_path: Path) -> None:
    first, second, third = row_ids()
    (tmp_path / "ids.txt").write_bytes(f"\ufeff{first}\r\n\r\n{second}".encode())
    (outcome,) = outcomes("locate", store, "--ids-file", tmp_path / "ids.txt", "--ids", third)
    assert [found["asked"] for found in outcome["result"]] == [third, first, second]
    (tmp_path / "groups.txt").write_text("person-1\n")
    assert outcomes("delete", store, "--groups-file", tmp_path / "groups.txt")[0]["result"]["examples"] == 3
    assert run("locate", store, "--ids-file", "-", stdin=f"{first}\n").exit_code == 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts statements of SQL by their first word, and how often a manifest is read."""
    counts: Counter[str] = Counter()
    connect, read = schema._connect, StoreFolder.manifest

    def traced(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.set_trace_callback(lambda statement: counts.update([statement.split(maxsplit=1)[0]]))
        return connection

    def told(folder: StoreFolder) -> Manifest:
        counts["manifest"] += 1
        return read(folder)

    monkeypatch.setattr(schema, "_connect", traced)
    monkeypatch.setattr(StoreFolder, "manifest", told)
    return counts


def test_thousands_of_ids_cost_a_few_statements_each(store: Path, tmp_path: Path, counted: Counter[str]) -> None:
    names = [f"row-{number}" for number in range(5_000)]
    with S3TStore(store).changing() as state:
        key = S3TStore(store).key
        digests = [keyed_digest(key, "id", name) for name in names]
        state.add_examples({digest: Entry(*assign(key, digest, 2, 3), None, "0" * 32) for digest in digests})
    (tmp_path / "ids.txt").write_text("\n".join(names))
    counted.clear()
    (outcome,) = outcomes("locate", store, "--ids-file", tmp_path / "ids.txt")
    assert len(outcome["result"]) == 5_000 and {found["found"] for found in outcome["result"]} == {"live"}
    assert counted["SELECT"] < 2 * 5_000 + 100 and counted.total() < counted["SELECT"] + 100
    assert counted["manifest"] < 20
    counted.clear()
    (outcome,) = outcomes("delete", store, "--ids-file", tmp_path / "ids.txt")
    assert outcome["result"]["examples"] == 5_000
    assert counted["SELECT"] < 2 * 5_000 + 1_000 and counted["INSERT"] < 5_000 + 1_000
    assert counted["DELETE"] < 4 * 5_000 + 1_000  # the trigger and the two statements in it are counted as one each
    assert counted["BEGIN"] < 10 and counted["manifest"] < 40
    (outcome,) = outcomes("delete", store, "--ids-file", tmp_path / "ids.txt")
    assert outcome["result"]["already_deleted"] == 5_000
    text = plain(run("locate", store, "--ids-file", tmp_path / "ids.txt", "--ids", row_ids()[0]).stdout)
    assert "5,000 deleted, 1 live" in text and text.count("row-") == 1_000


@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl", "csv", "folder"])
def test_delete_what_a_dataset_no_longer_holds(store: Path, tmp_path: Path, kind: str) -> None:
    rows = models.llama_rows(trained_stores.ROWS).select(range(2, trained_stores.ROWS))
    file = tmp_path / f"rows.{kind}"
    write = {"parquet": rows.to_parquet, "csv": rows.to_csv, "folder": rows.save_to_disk}.get(kind, rows.to_json)
    write(str(file))
    (outcome,) = outcomes("delete", store, "--not-in", file)
    assert outcome["result"]["examples"] == 2
    assert {found.found for found in S3TStore(store).locate(ids=row_ids(2))} == {"deleted"}
    result = run("delete", store, "--not-in", file)
    assert result.exit_code == 0 and "Nothing was changed" in plain(result.stdout)


def test_not_in_another_dataset_is_refused(store: Path, tmp_path: Path) -> None:
    before = tree(store)
    models.llama_rows(5, seed=1).to_parquet(str(tmp_path / "other.parquet"))
    Dataset.from_list([{"name": "x"}]).to_parquet(str(tmp_path / "columns.parquet"))
    for name, text in (
        ("other.parquet", "holds none"),
        ("columns.parquet", "no column 'id'"),
        ("absent.parquet", "does not exist"),
        ("rows.txt", "does not exist"),
    ):
        result = run("delete", store, "--not-in", tmp_path / name)
        assert result.exit_code == 2 and text in result.stderr
    assert tree(store) == before


def test_slices_work_with_the_state_lost(store: Path) -> None:
    shutil.rmtree(store / ".s3t")
    assert run("delete", store, "--ids", row_ids()[0]).exit_code == 2
    (outcome,) = outcomes("delete", store, "--slices", "0:1")
    assert "shard-00/1" in outcome["result"]["stages_removed"]
    assert not (store / "shard-00/1").exists()


def test_exports_that_carry_the_influence_are_pending(store: Path, tmp_path: Path) -> None:
    assert run("export", store, tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / WEIGHTS).exists()
    assert outcomes("delete", store, "--ids", row_ids()[0], "--dry-run")[0]["exit_code"] == 0
    result = run("delete", store, "--ids", row_ids()[0])
    assert result.exit_code == 3 and "exports that still carry it" in result.stdout
    assert str(tmp_path / "out") in "".join(part.strip() for part in result.stdout.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [
        ("delete",),
        ("locate",),
        ("readmit",),
        ("delete", "--slices", "0-1"),
        ("delete", "--slices", "9:9"),
        ("delete", "--ids-file", "absent.txt"),
        ("delete", "--ids", "x", "--key-file", "absent.key"),
        ("verify", "--retrain", "--all"),
        ("verify", "--retrain", "--trainer", "a:b", "--data", "rows.csv"),
        ("verify", "--retrain", "--all", "--sample", "2", "--trainer", "a:b", "--data", "rows.csv"),
        ("verify", "--all"),
        ("verify", "--retrain", "--all", "--seed", "2", "--trainer", "a:b", "--data", "rows.csv"),
        ("verify", "--scan-for", "absent.txt"),
    ],
)
def test_bad_input(store: Path, arguments: tuple[str, ...]) -> None:
    before = tree(store)
    result = run(arguments[0], store, *arguments[1:])
    assert result.exit_code == 2 and result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""
    assert tree(store) == before


def test_folder_that_is_no_store_stays_empty(tmp_path: Path) -> None:
    for verb in (
        ("status",),
        ("locate", "--ids", "a"),
        ("delete", "--slices", "0:0"),
        ("readmit", "--ids", "a"),
        ("verify",),
    ):
        result = run(verb[0], tmp_path, *verb[1:])
        assert result.exit_code == 2 and "no store here" in result.stderr
    assert not list(tmp_path.iterdir())


def test_key_from_a_file(store: Path, tmp_path: Path) -> None:
    (store / ".s3t/partition.key").unlink()
    result = run("delete", store, "--ids", row_ids()[0])
    assert result.exit_code == 2 and "no partition key" in result.stderr
    (tmp_path / "foreign.key").write_text("another key of more than 16 bytes\n")
    result = run("locate", store, "--ids", row_ids()[0], "--key-file", tmp_path / "foreign.key")
    assert result.exit_code == 2 and "not the one" in result.stderr
    (tmp_path / "right.key").write_text(f"{trained_stores.KEY}\n")
    assert run("delete", store, "--ids", row_ids()[0], "--key-file", tmp_path / "right.key").exit_code == 0


# ---- several stores, faults ----


def test_one_fault_does_not_stop_the_rest(store: Path, trained: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(trained, tmp_path / "damaged"))
    (damaged / "s3t.json").write_text("{")
    found = outcomes("delete", damaged, tmp_path / "absent", store, "--ids", row_ids()[0], code=5)
    assert [outcome["exit_code"] for outcome in found] == [5, 2, 0]
    assert found[0]["result"] is None and found[0]["error"]["type"] == "StoreError"
    assert found[2]["error"] is None and found[2]["result"]["status"] == "inactive"
    result = run("status", damaged, store)
    assert result.exit_code == 5 and "damaged" in result.stderr and "14 trained" in result.stdout


def test_gravest_exit_code_of_several_stores(store: Path, trained: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    run("delete", other, "--ids", row_ids()[0])
    run("export", store, tmp_path / "out")
    assert run("delete", store, other, "--ids", row_ids()[0]).exit_code == 3
    assert run("delete", store, other, "--ids", "nobody").exit_code == 4
    assert run("delete", store, tmp_path / "absent", "--ids", "nobody").exit_code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [(IsolationError("x"), 5), (StoreLockedError("x"), 2), (OSError("disk full"), 2), (KeyError("fault"), 1)],
)
def test_exit_codes_of_errors(store: Path, error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: S3TStore, prior: object) -> None:
        raise error

    monkeypatch.setattr(S3TStore, "status", fail)
    result = run("status", store)
    assert result.exit_code == code
    assert ("Traceback" in result.stderr) is (code == 1)


# ---- the other verbs ----


def test_readmit(store: Path) -> None:
    run("delete", store, "--ids", row_ids()[0])
    assert run("readmit", store, "--ids", row_ids()[1]).exit_code == 4
    (outcome,) = outcomes("readmit", store, "--ids", row_ids()[0], "--reference", "consent renewed")
    assert outcome["result"]["kind"] == "readmit" and outcome["result"]["reference"] == "consent renewed"
    run("delete", store, "--groups", "person-1")
    assert "1 tombstones" in run("readmit", store, "--groups", "person-1").stdout


def test_verify(store: Path) -> None:
    (outcome,) = outcomes("verify", store)
    assert outcome["result"]["ok"] and outcome["result"]["complete"] and len(outcome["result"]["checks"]) == 14
    log = {"receipt-1": {"places": [], "named": True}}
    edit_json(store / "s3t.json", lambda manifest: manifest.update(generation=1, log=log))
    result = run("verify", store)
    assert result.exit_code == 5 and "broken: the state is of generation 0" in plain(result.stdout)
    shutil.rmtree(store / ".s3t")
    result = run("verify", store)
    assert result.exit_code == 0 and "not everything could be checked" in result.stdout


def test_verify_trains_stages_again(store: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.parquet"
    models.llama_rows(trained_stores.ROWS).to_parquet(str(rows))
    arguments = ("verify", store, "--retrain", "--data", rows)
    (outcome,) = outcomes(*arguments, "--stage", "shard-01/2", "--trainer", FACTORY)
    assert outcome["result"]["retrained"] == [
        {"stage": "shard-01/2", "outcome": "equal", "reasons": [], "tensors": []}
    ]
    assert outcome["result"]["bit_equal_on_this_stack"] == "equal"
    trained_stores.edit_tensors(store, "shard-01/2", lambda tensors: next(iter(tensors.values())).mul_(2))
    result = run(*arguments, "--all", "--trainer", "trained_stores:make_trainer")
    assert result.exit_code == 5 and "shard-01/2: expected the same bytes" in plain(result.stdout)
    drawn = run(*arguments, "--sample", "2", "--seed", "7", "--trainer", FACTORY)
    assert "2 of 14 stages trained again, drawn with --seed 7" in plain(drawn.stdout)
    for factory in ("nothing", "trained_stores:nothing", "shard"):
        assert run(*arguments, "--all", "--trainer", factory).exit_code == 2


def test_verify_looks_for_texts_and_never_shows_them(store: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("nobody here\nFetamir Medresson\n")
    assert run("verify", store, "--scan-for", texts).exit_code == 0
    (store / "notes.txt").write_text("about Fetamir Medresson.")
    result = run("verify", store, "--scan-for", texts)
    assert result.exit_code == 5 and "line 2 of texts.txt: in notes.txt at byte 6" in plain(result.stdout)
    assert "Fetamir" not in result.stdout and "Medresson" not in result.stdout
    texts.write_text("abc\n")
    result = run("verify", store, "--scan-for", texts)
    assert result.exit_code == 2 and "Line 1 of" in result.stderr and "3 characters" in plain(result.stderr)


@pytest.mark.parametrize("columns", ["80", "60"])
def test_report_keeps_its_outcomes_in_a_narrow_terminal(
    store: Path, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    log = {"receipt-1": {"places": [], "named": True}}
    edit_json(store / "s3t.json", lambda manifest: manifest.update(generation=1, log=log))
    shutil.rmtree(store / ".s3t")
    text = run("verify", store).stdout
    assert max(map(len, text.splitlines())) <= int(columns)
    rows = [line for line in text.splitlines() if re.search(r"│ (holds|broken|not checked) +│$", line)]
    assert len(rows) >= 13 and "…" not in text


def test_export_of_a_prefix(store: Path, tmp_path: Path) -> None:
    (outcome,) = outcomes("export", store, tmp_path / "out", "--prefix", "shard-00/2-0")
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert outcome["result"] == {
        "path": str(tmp_path / "out"), "prefix": "shard-00/2-0", "merge": False, "stages": ["shard-00/2-0"],
        "rank": 2, "parameters": 896, "bytes": size,
    }  # fmt: skip
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["layers_to_transform"] == [4, 5, 6, 7]


def test_export_tells_rank_and_size(store: Path, tmp_path: Path) -> None:
    models.tiny_llama().save_pretrained(tmp_path / "base")
    text = run("export", store, tmp_path / "out").stdout
    assert "rank        4" in text and "2,688 parameters" in text and "shard-00/0-1-2, shard-01/0-1-2" in text
    result = run("export", store, tmp_path / "whole", "--merge", "--base", tmp_path / "base")
    size = sum(file.stat().st_size for file in (tmp_path / "whole").iterdir())
    assert result.exit_code == 0 and f"parameters, {size:,} bytes" in result.stdout
    assert (tmp_path / "whole/model.safetensors").exists() and not (tmp_path / "whole" / WEIGHTS).exists()


@pytest.mark.parametrize("options", [("--merge",), ("--base", "somewhere"), ("--merge", "--base", "absent/base")])
def test_export_without_the_right_base(store: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    result = run("export", store, tmp_path / "out", *options)
    assert result.exit_code == 2 and "base" in result.stderr and not (tmp_path / "out").exists()
    assert S3TStore(store).status().exports == ()


def test_refreshed_exports_are_not_pending(store: Path, tmp_path: Path) -> None:
    run("export", store, tmp_path / "out")
    result = run("delete", store, "--ids", row_ids()[0], "--refresh-exports")
    assert result.exit_code == 0 and "exports rewritten" in result.stdout
    slices = [part for place in range(6) for part in ("--slices", f"{place // 3}:{place % 3}")]
    result = run("delete", store, *slices, "--refresh-exports")
    assert result.exit_code == 0 and "exports removed" in result.stdout and not (tmp_path / "out").exists()


def test_an_export_left_behind_stays_pending_until_it_is_made_anew(store: Path, tmp_path: Path) -> None:
    run("export", store, tmp_path / "out")
    for _ in range(2):
        assert run("delete", store, "--ids", row_ids()[0]).exit_code == 3
    assert "stale exports" in run("status", store).stdout
    result = run("delete", store, "--ids", row_ids()[0], "--refresh-exports")
    assert result.exit_code == 0 and "Only exports were changed" in plain(result.stdout)
    assert run("delete", store, "--ids", row_ids()[0]).exit_code == 0
    assert "stale exports" not in run("status", store).stdout


def test_export_that_can_not_be(store: Path, tmp_path: Path) -> None:
    assert run("export", store, store / "inside").exit_code == 2
    result = run("export", store, tmp_path / "out", "--prefix", "shard-00/2-1")
    assert result.exit_code == 2 and "Live stages: shard-00/0," in result.stderr
    assert run("export", store, tmp_path / "out", "--prefix", "2-0").exit_code == 2
    run("delete", store, *(part for place in range(6) for part in ("--slices", f"{place // 3}:{place % 3}")))
    result = run("export", store, tmp_path / "out")
    assert result.exit_code == 2 and "no root adapter" in result.stderr
    assert not (tmp_path / "out").exists()


def test_state_goes_out_and_in(store: Path, tmp_path: Path) -> None:
    backup = tmp_path / "state.json"
    assert run("state", "export", store, backup).exit_code == 0
    assert backup.stat().st_mode & 0o777 == 0o600
    shutil.rmtree(store / ".s3t")
    assert outcomes("state", "import", store, backup)[0]["result"] == {"file": str(backup)}
    assert outcomes("verify", store)[0]["result"]["complete"]
    (tmp_path / "other.json").write_text("{}")
    assert run("state", "import", store, tmp_path / "other.json").exit_code == 2
    run("delete", store, "--ids", row_ids()[0])
    assert run("state", "import", store, backup).exit_code == 0
    assert outcomes("locate", store, "--ids", row_ids()[0])[0]["result"][0]["found"] == "deleted"


def test_a_backup_does_not_bury_again_what_was_readmitted(store: Path, tmp_path: Path) -> None:
    """Also where it was deleted with its whole slice, while the state was elsewhere."""
    name = row_ids()[0]
    (place,) = S3TStore(store).locate(ids=[name])[0].places
    (store / ".s3t").rename(tmp_path / "state")
    run("delete", store, "--slices", f"{place[0]}:{place[1]}")
    shutil.rmtree(store / ".s3t")
    (tmp_path / "state").rename(store / ".s3t")
    with S3TStore(store).reading() as state:
        digest = keyed_digest(S3TStore(store).key, "id", name)
        entry = state.entry(digest)
    assert run("readmit", store, "--ids", name).exit_code == 0
    with S3TStore(store).changing() as state:  # as a training does that has the row again
        state.add_examples({digest: entry})
    run("state", "export", store, tmp_path / "backup")
    shutil.rmtree(store / ".s3t")
    assert run("state", "import", store, tmp_path / "backup").exit_code == 0
    assert S3TStore(store).locate(ids=[name])[0].found == "live"


# ---- as a program ----


def test_as_a_program(store: Path) -> None:
    """Several seconds go into importing torch and transformers, so it is one call."""
    command = [sys.executable, "-c", "from hf_s3t.cli.main import app; app()", "delete", store.name, "absent"]
    command += ["--json", "--ids", row_ids()[0]]
    done = subprocess.run(command, cwd=store.parent, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert [outcome["exit_code"] for outcome in json.loads(done.stdout)] == [0, 2]
    assert "no store here" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", [(), ("plan",), ("serve",), ("receipt",)])
def test_help_breaks_lines_where_the_terminal_does(verb: tuple[str, ...]) -> None:
    prose = run(*verb, "--help").stdout.split("╭")[0]
    for paragraph in prose.split("Usage:")[1].split("\n" + " " * 80 + "\n")[1:]:
        lines = [line.strip() for line in paragraph.strip().splitlines()]
        for line, after in itertools.pairwise(lines):
            assert len(line) + 1 + len(after.split()[0]) > 70, (line, after)


def test_help_names_the_verbs() -> None:
    text = run("--help").stdout
    for verb in ("status", "locate", "delete", "readmit", "verify", "export", "state"):
        assert verb in text
    assert "Exit codes" in text
