"""The script of docs/guarantees.md checks a receipt with published files alone, and finds what is not so."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import run
from hf_s3t.store.evidence import EVIDENCE, evidence_digest
from stores import make_store
from trained_stores import edit_json

PAGE = (Path(__file__).parent.parent / "docs" / "guarantees.md").read_text(encoding="utf-8")
(SCRIPT,) = re.findall(r"```python\n(\"\"\"Check the public part.*?)```", PAGE, re.S)


class Published:
    """A receipt, the published files after its deletion, and those from before."""

    def __init__(self, path: Path):
        store = make_store(path / "out")
        self.before = shutil.copytree(store.path, path / "before")
        receipt = store.delete(ids=["row-1"], reference="DSR-1 é")
        self.removed = sorted(receipt.stages_removed)
        self.folder = shutil.copytree(store.path, path / "published", ignore=shutil.ignore_patterns(".s3t"))
        self.receipt, self.script = path / "receipt.json", path / "check.py"
        self.receipt.write_text(json.dumps(receipt.to_json()), encoding="utf-8")
        self.script.write_text(SCRIPT, encoding="utf-8")

    def checked(self) -> tuple[int, str]:
        """Exit code and output of the script, which finds nothing of ours."""
        done = subprocess.run(
            [sys.executable, "-I", str(self.script), str(self.receipt), str(self.folder)],
            capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def put_back(self, name: str) -> None:
        """Serves a removed stage again."""
        shutil.copytree(self.before / name, self.folder / name)
        entry = json.loads((self.before / "s3t.json").read_bytes())["stages"][name]
        edit_json(self.folder / "s3t.json", lambda manifest: manifest["stages"].update({name: entry}))

    def change(self, with_digest: bool = False, **changes: object) -> None:
        """Changes the receipt."""
        receipt = json.loads(self.receipt.read_bytes()) | changes
        self.receipt.write_text(json.dumps(receipt | ({"digest": evidence_digest(receipt)} if with_digest else {})))




@pytest.fixture
def published(tmp_path: Path) -> Published:
    return Published(tmp_path)


def test_the_script_is_short_and_uses_nothing_of_ours():
    assert len(SCRIPT.splitlines()) < 60
    assert set(re.findall(r"^(?:import|from) (\w+)", SCRIPT, re.M)) == {
        "hashlib", "json", "sys", "pathlib", "safetensors",
    }  # fmt: skip
    (fields,) = re.findall(r'EVIDENCE = """(.*?)"""', SCRIPT, re.S)
    assert tuple(fields.split()) == EVIDENCE


def test_it_finds_nothing_wrong_after_a_deletion(published):
    code, told = published.checked()
    assert code == 0 and "nothing is wrong with it" in told and "0 of them trained again" in told


def test_the_commands_of_the_page(tmp_path, monkeypatch):
    name = make_store(tmp_path / "out").delete(ids=["row-1"]).receipt
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```bash\n(hf-s3t receipt.*?)```", PAGE, re.S)
    lines = [shlex.split(line.replace("receipt-0123456789ab", name), comments=True) for line in block.splitlines()]
    done = {" ".join(words): run(*words[1:]).exit_code for words in lines}
    assert len(done) == 8 and set(done.values()) == {0}, done
    assert (tmp_path / "receipt.html").exists()


WRONG: dict[str, tuple[Callable[[Published], object], str]] = {
    "a stage is put back": (lambda p: p.put_back(p.removed[0]), "was removed, and is there"),
    "a file is put back": (
        lambda p: shutil.copy(p.before / p.removed[0] / "adapter_model.safetensors", p.folder / "notes.bin"),
        "notes.bin was removed, and is there",
    ),
    "the receipt is changed": (lambda p: p.change(found=7), "the receipt was changed"),
    "the receipt and its digest are changed": (lambda p: p.change(True, found=7), "does not name this receipt"),
    "it removed nothing": (lambda p: p.change(True, stages_removed={}, examples=0), "it removed nothing"),
    "a stage stayed": (lambda p: p.change(True, stages_after={p.removed[0]: "0" * 64}), "a stage that had seen"),
    "it was served": (lambda p: p.change(True, served_after=json.loads(p.receipt.read_bytes())["served_before"]),
                      "what answered after the deletion"),
    "another stage under a name": (
        lambda p: shutil.copy(p.folder / "shard-01/1/adapter_model.safetensors",
                              p.folder / "shard-01/2/adapter_model.safetensors"),
        "shard-01/2 holds another stage",
    ),
    "a second receipt": (
        lambda p: edit_json(p.folder / "s3t.json",
                            lambda m: next(iter(m["log"].values()))["receipts"].append("0" * 64)),
        "and it alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "told"), WRONG.values(), ids=WRONG.keys())
def test_it_finds_what_is_not_so(published, change, told):
    change(published)
    code, found = published.checked()
    assert code == 1 and told in found
