"""A real Ray on this machine: its workers train what one process trains, whatever is lost or deleted meanwhile.

One cluster of two CPUs serves all tests of this file. The notes that callbacks write on the workers tell which stage
was begun how often, and where.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

import ray_trainings
from conftest import REPOSITORY
from hf_s3t import DatasetError, RecipeError, S3TError, S3TStore, StoreLockedError
from hf_s3t.ray import train
from hf_s3t.store.partition import assign, keyed_digest
from ray_trainings import CPU, ON_A_WORKER, SHARDS, SLICES, THREE_STAGES, build, rows, wait_for, worker_environment
from trainings import assert_same_stores

KEY = "0fada7e11a5c0de5ca1ab1e0ddba1175"
FIRST, SECOND = "shard-00/0-1", "shard-01/0-1"
STAGES = 26
SECONDS = 300
CHOOSING = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "loss"}
"""The best checkpoint of a stage is taken: it lies in the folder of the worker."""
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def key() -> Iterator[None]:
    """The driver finds the key in its environment, and so does everything that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_S3T_KEY", KEY)
        yield


@pytest.fixture(scope="module")
def address(key: None) -> Iterator[str]:
    """A Ray of two CPUs, which is not told that workers must not have the key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1",
            runtime_env={"env_vars": worker_environment()},
        )  # fmt: skip
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="module")
def one(key: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one process trains."""
    folder = tmp_path_factory.mktemp("one")
    build(folder / "store", folder, {}).train()
    return folder / "store"


class Notes:
    """What workers noted."""

    def __init__(self, folder: Path):
        lines = [line.split() for line in (folder / "notes").read_text().splitlines()]
        self.begun: dict[str, list[int]] = {}  # the processes that began a stage, in turn
        self.steps: dict[str, list[int]] = {}
        for event, stage, step, pid in lines:
            if event == "begin":
                self.begun.setdefault(stage, []).append(int(pid))
            else:
                self.steps.setdefault(stage, []).append(int(step))

    def often(self) -> dict[str, int]:
        """Stages that were begun more than once."""
        return {stage: len(pids) for stage, pids in self.begun.items() if len(pids) > 1}


def run(folder: Path, actions: dict[str, str], **options: Any) -> Any:
    """Trains `folder / "store"` on two workers."""
    return train(partial(build, folder / "store", folder, actions, **options), 2, CPU)


def meanwhile(folder: Path, action: Callable[[dict[str, Any]], None]) -> threading.Thread:
    """Does something while a stage waits; it goes on afterwards."""

    def do() -> None:
        wait_for(folder / "reached")
        try:
            action(json.loads((folder / "reached").read_text()))
        except BaseException as error:
            (folder / "failed").write_text(repr(error))
        finally:
            (folder / "go").touch()

    thread = threading.Thread(target=do)
    thread.start()
    return thread


def ended(thread: threading.Thread, folder: Path) -> None:
    thread.join()
    assert not (folder / "failed").exists(), (folder / "failed").read_text()


def store_of(path: Path) -> S3TStore:
    return S3TStore(path, KEY)


def place(example_id: str) -> tuple[int, int]:
    """Where an example lies."""
    key = bytes.fromhex(KEY)
    return assign(key, keyed_digest(key, "id", example_id), SHARDS, SLICES)


def records(store: Path) -> dict[str, Any]:
    """What the state says of each stage, but how long it took."""
    with store_of(store).reading() as state:
        found = {stage.name: state.record(stage.name) for stage in store_of(store).manifest().stages}
    return {name: {key: value for key, value in record.items() if key != "seconds"} for name, record in found.items()}


def memory_of(pid: int) -> Iterator[bytes]:
    """What a process can write to, piece by piece."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            area, mode, *_ = line.split()
            start, end = (int(number, 16) for number in area.split("-"))
            if mode.startswith("rw") and "[v" not in line and "/dev/shm" not in line:
                try:
                    memory.seek(start)
                    yield memory.read(end - start)
                except OSError:
                    continue


def victim() -> str:
    """Id of an example that stage `SECOND` sees, and no stage of the other shard."""
    return next(name for name in rows()["id"] if place(name) == (1, 1))


def without_victim(folder: Path) -> Path:
    """The store that one process trains on all other rows."""
    folder.mkdir()
    build(folder / "store", folder, {}, gone=(victim(),)).train()
    return folder / "store"


def test_one_worker_is_killed_an_example_is_deleted_and_the_store_is_that_of_one_process(address, tmp_path):
    keys = [KEY.encode(), bytes.fromhex(KEY)]
    known = rows()["id"][0].encode()
    saw, store = {}, tmp_path / "store"
    code = f"from hf_s3t import S3TStore; S3TStore({str(store)!r}).delete(ids=[{victim()!r}])"

    def look_and_delete(worker: dict[str, Any]) -> None:
        pieces = list(memory_of(worker["pid"]))
        saw["memory"] = [any(text in piece for piece in pieces) for text in (known, *keys)]
        environment = Path(f"/proc/{worker['pid']}/environ").read_bytes()
        saw["environment"] = [text in environment for text in (ON_A_WORKER.encode(), *keys)]
        saw["folder"] = Path(worker["folder"])
        saw["files"] = {path.name for path in saw["folder"].rglob("*") if path.is_file()}
        with pytest.raises(StoreLockedError):
            S3TStore(store).train_lock.acquire(0)
        subprocess.run([sys.executable, "-c", code], check=True)
        time.sleep(3)  # the driver looks every second

    looking = meanwhile(tmp_path, look_and_delete)
    run(tmp_path, {FIRST: "kill", SECOND: "wait"}, args={"save_strategy": "steps", "save_steps": 1})
    ended(looking, tmp_path)
    assert_same_stores(store, without_victim(tmp_path / "never_had"))
    assert store_of(store).manifest().generation == 1

    notes = Notes(tmp_path)
    hit = {stage.name for stage in store_of(store).manifest().stages if (1, 1) in stage.slices}
    assert set(notes.often()) <= {FIRST, *hit} and notes.often()[FIRST] == 2
    assert notes.steps[SECOND][:2] == [1, 1], "the stage was dropped before its next step, and begun again"
    assert len(set(notes.begun[FIRST])) == 2 and len(set(sum(notes.begun.values(), []))) == 3

    assert saw["memory"] == saw["environment"] == [True, False, False]
    assert not saw["files"] & {"partition.key", "state.sqlite"} and "s3t.json" in saw["files"]
    assert not saw["folder"].is_relative_to(tmp_path) and not saw["folder"].exists(), "it went with the worker"
    assert not list((store / ".s3t").glob("running/*"))


@pytest.mark.slow
def test_two_workers_train_what_one_process_trains(address, one, tmp_path):
    output = run(tmp_path, {FIRST: "kill"})
    assert_same_stores(tmp_path / "store", one)
    assert records(tmp_path / "store") == records(one)
    notes = Notes(tmp_path)
    assert notes.often() == {FIRST: 2} and len(notes.begun) == STAGES
    assert output.global_step == sum(record["steps"] for record in records(one).values())


@pytest.mark.slow
def test_a_driver_that_was_killed_is_run_again_and_goes_on(address, one, tmp_path):
    environment = {**os.environ, "ACTIONS": json.dumps({"shard-00/0-1-2": "wait"})}
    environment["PYTHONPATH"] = worker_environment()["PYTHONPATH"]
    command = [sys.executable, ray_trainings.__file__, address, str(tmp_path / "store"), str(tmp_path)]
    with open(tmp_path / "output", "w") as output:
        driver = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        wait_for(tmp_path / "reached")
    finally:
        driver.kill()
        driver.wait()
    committed = S3TStore(tmp_path / "store").manifest().names
    worker = json.loads((tmp_path / "reached").read_text())["pid"]
    assert committed and len(committed) < STAGES
    run(tmp_path, {})
    assert_same_stores(tmp_path / "store", one)
    notes = Notes(tmp_path)
    assert not committed & set(notes.often()), "what was in the store was not trained again"
    assert notes.begun["shard-00/0-1-2"][0] == worker
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)  # it died with its driver


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        ("fewer rows", DatasetError, r"rows: the driver has 72, the worker 71"),
        ("other rows", DatasetError, r"content: the driver has '\w{64}', the worker '\w{64}'"),
        ("prepared", DatasetError, r"some prepared rows: the driver has"),
        ("learning rate", RecipeError, r"arguments\.learning_rate: the driver has 0\.01, the worker 0\.02"),
    ],
)
def test_a_worker_with_other_rows_or_settings_trains_nothing(address, tmp_path, other, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, {}, on_workers=other)
    assert not S3TStore(tmp_path / "store").manifest().stages and not (tmp_path / "notes").exists()


@pytest.mark.slow
def test_what_user_code_raises_is_raised_with_the_stage_and_what_ended_is_kept(address, one, tmp_path):
    with pytest.raises(LookupError, match="this callback fails") as raised:
        run(tmp_path, {FIRST: "raise"})
    assert re.search(rf"In stage {FIRST}, process \d+ on ", "\n".join(raised.value.__notes__))
    assert Notes(tmp_path).begun[FIRST] and not Notes(tmp_path).often(), "it is not tried again"
    assert "shard-00/0" in S3TStore(tmp_path / "store").manifest().names
    run(tmp_path, {})
    assert_same_stores(tmp_path / "store", one)


@pytest.mark.slow
def test_a_stage_whose_workers_die_three_times_is_an_error(address, tmp_path):
    with pytest.raises(S3TError, match=rf"3 workers died of stage {FIRST}\. The last one, process \d+ on"):
        run(tmp_path, {FIRST: "always kill"})
    assert len(set(Notes(tmp_path).begun[FIRST])) == 3
    assert "shard-00/0" in S3TStore(tmp_path / "store").manifest().names


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_cached_states_change_nothing_of_that(key, address, tmp_path, cache):
    """Each worker has a cache of its own."""
    for name in ("one", "ray"):
        (tmp_path / name).mkdir()
    build(tmp_path / "one/store", tmp_path / "one", {}, activation_cache=cache).train()
    run(tmp_path / "ray", {}, activation_cache=cache)
    assert_same_stores(tmp_path / "ray/store", tmp_path / "one/store")


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["off", "memory", "disk"])
def test_a_stage_of_two_processes_is_that_of_accelerate_launch_though_one_of_them_is_killed(address, tmp_path, cache):
    options = {"activation_cache": cache, "args": {"num_train_epochs": 2, "load_best_model_at_end": True} | CHOOSING}
    for name in ("one", "ray"):
        (tmp_path / name).mkdir()
    config = REPOSITORY / "accelerate_configs/cpu_2_processes.yaml"
    launched = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    arguments = [ray_trainings.__file__, "launch", str(tmp_path / "one/store"), str(tmp_path / "one")]
    environment = {**os.environ, "PYTHONPATH": worker_environment()["PYTHONPATH"], "OPTIONS": json.dumps(options)}
    subprocess.run([sys.executable, *launched, *arguments], env=environment, check=True, timeout=SECONDS)
    options["config"] = THREE_STAGES
    make = partial(build, tmp_path / "ray/store", tmp_path / "ray", {"shard-00/0-1": "kill"}, **options)
    train(make, 1, CPU, gpus_per_stage=2)
    assert_same_stores(tmp_path / "ray/store", tmp_path / "one/store")
    assert S3TStore(tmp_path / "ray/store").manifest().recipe["processes"] == 2
    begun = Notes(tmp_path / "ray").begun
    assert {stage: len(pids) for stage, pids in begun.items()} == {"shard-00/0": 2, "shard-00/0-1": 4, "shard-00/1": 2}
    assert len(set(begun["shard-00/0-1"])) == 4, "both processes were replaced"


def test_what_cannot_be_is_refused_before_a_worker_is_started(key, tmp_path):
    with pytest.raises(ValueError, match="`gpus_per_stage` must be an integer from 1 on, got 1.5"):
        train(partial(build, tmp_path / "store", tmp_path, {}), gpus_per_stage=1.5)
    with pytest.raises(ValueError, match="`workers` must be an integer from 1 on, got 0"):
        train(partial(build, tmp_path / "store", tmp_path, {}), workers=0)
    with pytest.raises(ValueError, match="every worker would hold it"):
        train(partial(build, tmp_path / "store", tmp_path, {}, partition_key=KEY))
    with pytest.raises(ValueError, match="must return an S3TTrainer"):
        train("ray_trainings:rows")
    assert not (tmp_path / "store/s3t.json").exists()
