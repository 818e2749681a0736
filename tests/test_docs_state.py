"""The page on the state runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from command_line import run
from stores import make_store, people

PAGE = Path(__file__).parent.parent / "docs" / "state.md"


def test_the_page_on_the_state(tmp_path: Path, monkeypatch) -> None:
    make_store(tmp_path / "out", people())
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]
    done = [(" ".join(words[:3]), run(*words[1:]).exit_code) for words in lines]
    assert len(done) > 4 and {code for _, code in done} == {0}, done


def test_what_is_kept_of_a_deleted_person_is_called_what_it_is() -> None:
    for page in (PAGE, PAGE.parent.parent / "README.md"):
        assert "pseudonymous, not anonymous" in " ".join(page.read_text(encoding="utf-8").split()), page
