"""What a state holds is its owner's alone: whatever the umask, from the first byte on, and after an upgrade."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import models
import trained_stores
from hf_s3t import S3TEnsemble, S3TStore, StateError, StoreError
from hf_s3t.store.activation_blocks import BlockName, FileBlocks
from hf_s3t.store.audit import VerifyReport, verify
from stores import index_of, make_store, state_of, tree

ALONE = "the state is its owner's alone"


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """What is made without a word about its mode, everybody may write."""
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(private: Path) -> dict[str, str]:
    """Modes of what others may use, by path; below `running` the folder above keeps them out."""
    inside = [path for path in private.rglob("*") if "running" not in [above.name for above in path.parents]]
    modes = {str(path.relative_to(private)): path.lstat().st_mode for path in [private, *inside]}
    return {path: stat.filemode(mode) for path, mode in modes.items() if mode & 0o077}


def loosen(private: Path) -> None:
    """As versions before this one left a state."""
    (private / ".gitignore").unlink()
    for path in private.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    private.chmod(0o755)


def findings(report: VerifyReport) -> tuple[str, ...]:
    (check,) = [check for check in report.checks if check.name == ALONE]
    return check.broken + check.not_checked


@pytest.mark.parametrize("apart", [False, True])
def test_everything_that_is_written_is_its_owners_alone(tmp_path, apart):
    make_store(tmp_path / "out")
    private = tmp_path / "out" / ".s3t"
    if apart:
        private = Path(shutil.move(private, tmp_path / "state"))
    store, looked = S3TStore(tmp_path / "out", state=private), []

    def look() -> None:
        looked.extend(path.name for path in private.rglob("*"))
        assert open_to_others(private) == {}

    store._delete({"ids": ["row-1"]}, reference="DSR-1", when_durable=look)
    assert {"intents", "write.lock", "write.holder", "state.sqlite", "partition.key"} <= {*looked}
    assert open_to_others(private) == {}, "the receipt, before anything else is written"
    store.readmit(ids=["row-1"])
    store.export(tmp_path / "adapter", "shard-00/1")
    writer = FileBlocks(private, "tie").writer(BlockName(0, 1, 2), [("example", "content")])
    writer.add("inputs", torch.zeros(2, 3))
    store.export_state(tmp_path / "backup.json")
    store.import_state(tmp_path / "backup.json")
    assert {"state.sqlite", "activations"} <= {path.name for path in private.iterdir()}
    assert open_to_others(private) == {} and findings(verify(store)) == ()
    assert (tmp_path / "backup.json").stat().st_mode & 0o077 == 0
    published = [path for path in (tmp_path / "out").rglob("*.safetensors")]
    assert published and all(path.stat().st_mode & 0o777 == 0o666 for path in published), "others load the adapter"


def test_a_backup_over_a_file_that_others_may_read_is_private(tmp_path):
    store = make_store(tmp_path / "out")
    (tmp_path / "backup.json").touch(0o644)
    store.export_state(tmp_path / "backup.json")
    assert (tmp_path / "backup.json").stat().st_mode & 0o777 == 0o600


class Looks(TrainerCallback):
    """Looks at modes before a stage's first step, and when a checkpoint has just been written."""

    def __init__(self, private: Path):
        self.private, self.checkpoints = private, 0

    def on_step_begin(self, *args, **kwargs):
        assert open_to_others(self.private) == {}

    def on_save(self, *args, **kwargs):
        self.checkpoints += len(list(self.private.glob("running/*/checkpoint-*")))
        assert open_to_others(self.private) == {}


def test_a_running_checkpoint_lies_in_a_folder_that_nobody_else_enters(tmp_path):
    trainer = trained_stores.make_trainer(str(tmp_path / "out"), models.llama_rows(16), num_shards=1, num_slices=2)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    looks = Looks(trainer.store.private)
    trainer.add_callback(looks)
    trainer.train()
    assert looks.checkpoints and open_to_others(trainer.store.private) == {}


def test_an_older_state_is_named_and_the_command_mends_it(tmp_path):
    store = make_store(tmp_path / "o'ut")
    store.delete(ids=["row-1"])
    loosen(store.private)
    report = verify(store)
    named = "\n".join(findings(report))
    assert not report.ok and f"{store.private} may be used by others than its owner (mode 755)" in named
    for name in ("partition.key", "state.sqlite", "write.lock", "intents"):
        assert f"{store.private / name} may be used by others" in named
    for finding in findings(report):
        subprocess.run(finding.split(": ", 1)[1], shell=True, check=True)
    assert open_to_others(store.private) == {} and verify(store).ok


def test_the_next_write_tightens_an_older_state_and_what_is_linked_stays(tmp_path):
    store = make_store(tmp_path / "out")
    store.private_folder("running")
    loosen(store.private)
    (tmp_path / "elsewhere").touch(0o644)
    (store.private / "linked.json").symlink_to(tmp_path / "elsewhere")
    (store.private / "mine.txt").touch(0o644)
    store.delete(ids=["row-1"])
    assert open_to_others(store.private).keys() == {"linked.json", "mine.txt"} and findings(verify(store)) == ()
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o644


# ---- other users ----


@contextmanager
def another_user(private: Path) -> Iterator[None]:
    """A user who may not enter a private folder: really another one where the tests run as root."""
    if os.geteuid():
        private.chmod(0)
    else:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.geteuid() == 65534:
            os.seteuid(0)
        private.chmod(0o700)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that every user reaches: the tests' own is closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize(
    "look",
    [
        lambda store: store.live(), lambda store: store.marks(), lambda store: store.intents(),
        lambda store: store.status(), lambda store: store.locate(ids=["row-1"]), lambda store: state_of(store),
        lambda store: index_of(store), lambda store: store.key, lambda store: store.has_key, verify,
        lambda store: store.delete(slices=[(0, 0)]),
    ],
)  # fmt: skip
def test_who_may_not_look_into_the_state_is_told_and_served_nothing(reachable, look):
    store = make_store(reachable / "out")
    owner = store.private.stat().st_uid
    with another_user(store.private):
        with pytest.raises(StateError, match=rf"read by its owner alone, user {owner}\. .*a copy without"):
            look(store)
        assert store.manifest().stages, "what is published may be read"


def test_a_file_of_the_state_that_only_another_user_reads_is_named(reachable):
    store = make_store(reachable / "out")
    with pytest.raises(RuntimeError):
        store._delete({"ids": ["row-1"]}, when_durable=lambda: interrupted(store))
    (intent,) = (reachable / "intents").iterdir()
    (store.private / "intents" / intent.name).write_bytes(intent.read_bytes())
    for folder in (store.private, store.private / "intents"):
        folder.chmod(0o755)
    (store.private / "intents" / intent.name).chmod(0 if os.geteuid() else 0o600)
    with another_user_beside(), pytest.raises(StoreError, match=rf"{intent.name} may not be read by this user"):
        store.live()


def interrupted(store: S3TStore) -> None:
    shutil.copytree(store.private / "intents", store.path.parent / "intents")
    raise RuntimeError


@contextmanager
def another_user_beside() -> Iterator[None]:
    root = not os.geteuid()
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_an_ensemble_of_another_user_hears_that_it_sees_no_deletions(reachable):
    path = trained_stores.train_store(reachable / "out", models.llama_rows(16), num_shards=1, num_slices=2)
    model = S3TEnsemble.from_pretrained(path, models.tiny_llama())
    assert not model.refresh()
    with another_user(path / ".s3t"), pytest.raises(StateError, match="nothing goes on"):
        model.refresh()
    assert not model.refresh()


# ---- systems without modes ----

WITHOUT = """
import os, sys
sys.modules["fcntl"] = None
from pathlib import Path
plain, chmod = os.open, os.chmod
def opened(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return plain(path, *args, **kwargs)
os.open = opened
for name in ("chmod", "fchmod", "getuid", "geteuid"):
    delattr(os, name)
from hf_s3t import StoreError, S3TStore
from hf_s3t.files import POSIX, write_atomic
from hf_s3t.store.audit import verify
store = S3TStore(sys.argv[1])
assert not POSIX and store.status().trained == len(store.live().stages) > 0
assert store.locate(ids=["row-1"])[0].found == "live"
report = verify(store)
assert report.ok and not report.complete, report
write_atomic(Path(sys.argv[2]), b"bytes")
for change in (lambda: store.delete(ids=["row-1"]), lambda: store.readmit(ids=["row-1"]),
               lambda: store.export_state(sys.argv[2] + ".json"), S3TStore(sys.argv[2] + "-new").ensure_key):
    try:
        change()
    except StoreError as error:
        print(error)
"""


def test_where_there_are_no_modes_and_locks_a_store_is_read_and_not_changed(tmp_path):
    store = make_store(tmp_path / "out")
    before = tree(store.path)
    command = [sys.executable, "-c", WITHOUT, str(store.path), str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all(line.startswith("hf_s3t needs a POSIX file system to change") for line in lines)
    assert tree(store.path) == before and (tmp_path / "file").read_bytes() == b"bytes"
