"""The folder of the state: git commits nothing of it, and the key may be kept elsewhere."""

from __future__ import annotations

import os
import subprocess

from hf_s3t.store.audit import verify
from stores import make_store


def committed(folder: os.PathLike[str]) -> list[str]:
    """What `git add --all` takes of a folder."""
    for command in (["init", "-q"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return subprocess.run(
        ["git", "ls-files"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.splitlines()


def test_git_commits_nothing_of_a_state(tmp_path):
    make_store(tmp_path / "out").delete(ids=["row-1"], reference="DSR-1")
    found = committed(tmp_path)
    assert "out/s3t.json" in found and not [name for name in found if ".s3t/" in name]


def test_a_state_from_before_gets_it_at_the_next_deletion(tmp_path):
    store = make_store(tmp_path / "out")
    ignored = store.private / ".gitignore"
    ignored.unlink()
    store.delete(ids=["row-1"])
    assert ignored.read_text() == "*\n" and verify(store).ok
    ignored.write_text("mine\n")
    store.delete(ids=["row-2"])
    assert ignored.read_text() == "mine\n"


def test_a_full_disk_keeps_no_deletion_waiting_for_it(tmp_path):
    store = make_store(tmp_path / "out")
    (store.private / ".gitignore").unlink()
    (store.private / "..gitignore.tmp").mkdir()  # so that it cannot be written
    assert store.delete(ids=["row-1"]).status == "inactive"
