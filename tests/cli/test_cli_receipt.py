"""`hf-s3t receipt` and `hf-s3t state set`: what a person reads, hands over, and checks."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from command_line import outcomes, plain, run
from hf_s3t import S3TStore
from hf_s3t.cli.receipt_page import TITLES, receipt_page
from hf_s3t.store.receipt_since import since_of
from stores import make_store

HOSTILE = "<script>alert('x')</script>\"&\u202e"


@pytest.fixture
def store(tmp_path: Path) -> S3TStore:
    return make_store(tmp_path / "out")


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_receipt_is_listed_and_shown_again(store, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    receipt = store.delete(ids=["row-1"], reference="DSR-1").receipt
    store.delete(ids=["row-1"])
    listed = plain(run("receipt", "list", store.path).stdout)
    assert receipt in listed and "done here; not yet" in listed and "nothing to do: deleted" in listed
    shown = plain(run("receipt", "show", store.path, receipt).stdout)
    for part in ("done here; not yet repaired", "DSR-1", "0 of ", "digest", "Not covered:"):
        assert part in shown
    assert "inactive" not in shown and "no longer served since" in shown
    (outcome,) = outcomes("receipt", "show", store.path, receipt[:14])
    assert outcome["result"]["receipt"]["receipt"] == receipt and outcome["result"]["since"]["repaired"] == {}
    assert outcome["result"]["words"] == "done here; not yet repaired"
    assert run("receipt", "show", store.path, "receipt-x").exit_code == 2
    deleted = plain(run("delete", store.path, "--ids", "row-2").stdout)
    assert "status" in deleted and "done here; not yet repaired" in deleted


def test_what_is_handed_over_is_checked_without_the_store(store, tmp_path):
    receipt, file = store.delete(ids=["row-1"]).receipt, tmp_path / "receipt.json"
    assert run("receipt", "show", store.path, receipt, "--file", file).exit_code == 0
    done = run("receipt", "verify", file)
    assert done.exit_code == 0 and "Nothing is broken, but not everything could be checked" in plain(done.stdout)
    assert run("receipt", "verify", file, "--store", store.path).exit_code == 0
    assert file.stat().st_mode & 0o077 == 0
    (outcome,) = outcomes("receipt", "verify", file, "--store", store.path)
    assert outcome["result"]["ok"] and len(outcome["result"]["checks"]) == 4
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"examples": 2}))
    done = run("receipt", "verify", file)
    assert done.exit_code == 5 and "broken: its digest is not that of what it says" in plain(done.stdout)
    file.write_text("{}")
    done = run("receipt", "verify", file)
    assert done.exit_code == 5 and "holds no receipt" in done.stderr
    run("receipt", "show", store.path, receipt, "--html", file)
    done = run("receipt", "verify", file)
    assert done.exit_code == 5 and "Give a file that `hf-s3t receipt show --file` wrote" in done.stderr
    assert "backup" not in done.stderr
    assert run("receipt", "verify", tmp_path / "none").exit_code == 2
    run("receipt", "show", store.path, receipt, "--file", file)
    assert run("receipt", "verify", file, "--store", tmp_path).exit_code == 2


def test_it_is_opened_for_an_auditor(store, tmp_path):
    receipt, file, opening = store.delete(ids=["row-1"]).receipt, tmp_path / "receipt.json", tmp_path / "opening.json"
    run("receipt", "show", store.path, receipt, "--file", file)
    done = run("receipt", "open", store.path, receipt, opening, "--ids", "row-1")
    assert done.exit_code == 0 and "Give it to the auditor only" in plain(done.stdout)
    assert opening.stat().st_mode & 0o077 == 0
    assert run("receipt", "verify", file, "--opening", opening).exit_code == 0
    opening.write_text(opening.read_text().replace('"row-1"', '"row-2"').replace('"key": "', '"key": "00'))
    assert run("receipt", "verify", file, "--opening", opening).exit_code == 5
    assert run("receipt", "open", store.path, receipt, opening, "--ids", "row-9").exit_code == 2
    opening.write_text("null")
    assert run("receipt", "verify", file, "--opening", opening).exit_code == 5


def test_it_is_signed_when_it_is_handed_over(store, tmp_path):
    from cryptography.hazmat.primitives import serialization as to
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, private, public = Ed25519PrivateKey.generate(), tmp_path / "key.pem", tmp_path / "public.pem"
    private.write_bytes(key.private_bytes(to.Encoding.PEM, to.PrivateFormat.PKCS8, to.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(to.Encoding.PEM, to.PublicFormat.SubjectPublicKeyInfo))
    receipt, file = store.delete(ids=["row-1"]).receipt, tmp_path / "receipt.json"
    run("receipt", "show", store.path, receipt, "--file", file)
    assert run("receipt", "verify", file, "--public-key", public).exit_code == 5
    assert run("receipt", "show", store.path, receipt, "--file", file, "--sign-key", private).exit_code == 0
    assert run("receipt", "verify", file, "--public-key", public).exit_code == 0
    assert run("receipt", "verify", file, "--public-key", private).exit_code == 2


def test_names_are_set_and_shown(store):
    done = run("state", "set", store.path, "organisation=Röda AB", "model=bot", "dataset=x=y")
    assert done.exit_code == 0 and "organisation: Röda AB" in done.stdout
    (outcome,) = outcomes("state", "set", store.path, "dataset=")
    assert outcome["result"] == {"organisation": "Röda AB", "model": "bot"}
    for wrong in ("organisation", "owner=me", "signing_key=nowhere"):
        assert run("state", "set", store.path, wrong).exit_code == 2


def test_the_page_loads_nothing_and_lets_nothing_in(store, tmp_path):
    store.set_names(organisation=HOSTILE, model=HOSTILE, dataset=HOSTILE)
    receipt = store.delete(ids=["row-1"], reference=HOSTILE)
    page = tmp_path / "receipt.html"
    assert run("receipt", "show", store.path, receipt.receipt, "--html", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    since = since_of(store, receipt)
    from dataclasses import replace

    worse = replace(
        receipt, caches=[HOSTILE], limits=(HOSTILE,), deleted_by=[HOSTILE], repository=HOSTILE, receipt=HOSTILE,
        stages_removed={HOSTILE: {"adapter_model.safetensors": HOSTILE}}, stages_after={HOSTILE: HOSTILE},
        signature={"public_key": HOSTILE}, digest=HOSTILE, previous=HOSTILE, requested_at=HOSTILE,
        inactive_since=HOSTILE, still_served_at=[HOSTILE],
    )  # fmt: skip
    worse_since = replace(since, exports=(HOSTILE,), history=(HOSTILE,), repaired={HOSTILE: HOSTILE})
    for found, times in ((text, 4), (receipt_page(worse, worse_since, {"model": HOSTILE}, HOSTILE), 15)):
        parsed = Page(found)
        tags = {tag for tag, _ in parsed.tags}
        assert "script" not in tags and not tags & {"img", "link", "iframe", "object", "a"}
        assert ("html", {"lang": "en"}) in parsed.tags and not re.search(r"https?:|url\(|@import", found)
        assert parsed.text.count(HOSTILE) >= times
        attributes = {name for _, given in parsed.tags for name in given}
        assert attributes <= {"lang", "charset", "http-equiv", "content", "name", "class"}
        assert "@media print" in found and "default-src 'none'" in found


def test_the_page_says_what_a_reader_has_to_know(store):
    store.set_names(organisation="Röda AB", model="bot", dataset="letters")
    receipt = store.delete(ids=["row-1"], reference="DSR-1")
    page = Page(receipt_page(receipt, since_of(store, receipt), {"organisation": "Röda AB"}, "out"))
    for part in (
        "Röda AB", "DSR-1", "done here; not yet repaired", receipt.inactive_since, receipt.digest,
        f"{receipt.dark_examples} other examples", f"0 of {len(receipt.stages_removed)} removed stages",
        "slices 0, 1, 2; since then", "Influence-free by construction", "Bit-equal on this stack",
        "hf-s3t receipt verify FILE --store out", *receipt.limits, *receipt.stages_removed, *receipt.stages_after,
    ):  # fmt: skip
        assert part in page.text, part
    assert "inactive" not in page.text.lower()
    odd = Page(receipt_page(receipt, since_of(store, receipt), {}, "my store; rm -r x"))
    assert "--store 'my store; rm -r x'" in odd.text, "whoever copies the command runs that alone"


def test_every_kind_has_a_page(store):
    store.delete(ids=["row-1"])
    store.readmit(ids=["row-1"])
    store.delete(ids=["nobody"], missing_ok=True)
    store.private.joinpath("partition.key").unlink()
    store.delete(slices=[(0, 1)])
    for receipt in store.receipts():
        page = Page(receipt_page(receipt, since_of(store, receipt), {}, "out"))
        assert TITLES[receipt.kind] in page.text and receipt.receipt in page.text
    assert set(TITLES) == {"delete", "readmit", "loss", "obeyed"}
