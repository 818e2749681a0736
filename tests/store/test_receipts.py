"""Receipts as evidence: a chain that shows what was changed, and what each of them commits to."""

from __future__ import annotations

import datetime
import json
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_s3t import S3TStore, StateError, UnfinishedDeletionError
from hf_s3t.store import deletion
from hf_s3t.store.audit import verify
from hf_s3t.store.commitments import commitment
from hf_s3t.store.evidence import EVIDENCE, evidence_digest
from hf_s3t.store.manifest import Event, Manifest, merged
from hf_s3t.store.receipt_audit import chain_findings
from hf_s3t.store.receipt_check import check_receipt, read_receipt_file
from hf_s3t.store.receipt_since import since_of, status_words
from hf_s3t.store.receipts import Receipt
from hf_s3t.store.record_tables import chained
from stores import KEY, edit_database, index_of, make_store, people, statements
from trained_stores import edit_json

CHECK = "receipts are a chain, and what they say holds"


@pytest.fixture
def store(tmp_path: Path) -> S3TStore:
    return make_store(tmp_path / "out")


def broken(store: S3TStore) -> str:
    """What the audit of receipts finds broken."""
    (check,) = [check for check in verify(store).checks if check.name == CHECK]
    return "; ".join(check.broken)


def wrong(receipt: Receipt, **how: Any) -> str:
    """What is found broken in a receipt that was handed over."""
    return "; ".join(finding for check in check_receipt(receipt, **how) for finding in check.broken)


def write_back(store: S3TStore, receipts: list[dict[str, Any]]) -> None:
    """Puts receipts in place of those that are there, chained in the database as if it had written them."""
    edit_database(store, "DELETE FROM receipts")
    last = ""
    for number, receipt in enumerate(receipts):
        text = json.dumps(receipt, sort_keys=True)
        last = chained(last, text)
        edit_database(
            store, "INSERT INTO receipts VALUES (?, ?, ?, ?, ?)", number + 1, receipt["receipt"], 2, text, last
        )


# ---- the chain ----


def test_each_receipt_names_the_one_before_it_and_the_manifest_names_its_digest(store):
    made = [store.delete(ids=["row-1"]), store.delete(ids=["row-1"]), store.readmit(ids=["row-1"])]
    assert store.receipts() == made and store.receipt(made[1].receipt[:12]) == made[1]
    assert [receipt.number for receipt in made] == [1, 2, 3]
    assert [receipt.previous for receipt in made] == ["", made[0].digest, made[1].digest]
    assert all(evidence_digest(receipt.to_json()) == receipt.digest for receipt in made)
    log = store.manifest().log
    assert {name: event.receipts for name, event in log.items()} == {
        receipt.receipt: (receipt.digest,) for receipt in (made[0], made[2])
    }
    assert not broken(store) and verify(store).ok
    with pytest.raises(ValueError, match="is the beginning of several receipts"):
        store.receipt("receipt-")
    with pytest.raises(ValueError, match="'receipt-x' is no receipt of .* The newest: receipt-"):
        store.receipt("receipt-x")


def changed(receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    receipts[1]["found"] = 7
    return receipts


def changed_with_its_digest(receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    receipts[1]["found"] = 7
    receipts[1]["digest"] = evidence_digest(receipts[1])
    return receipts


def rewritten(receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With every digest after it: only the manifest, which others saw, tells."""
    receipts[0]["dark_examples"] = 0
    for before, receipt in zip([None, *receipts], receipts, strict=False):
        receipt["previous"] = before["digest"] if before else ""
        receipt["digest"] = evidence_digest(receipt)
    return receipts


def put_in(receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    forged = {**receipts[1], "receipt": "receipt-forged", "status": "unchanged"}
    forged["digest"] = evidence_digest(forged)
    return [*receipts[:2], forged, receipts[2]]


def another_reference(receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    receipts[0]["reference"] = "DSR-2"
    return receipts


def reference_put_in(receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    receipts[0] |= {"reference": "DSR-2", "salts": {}}
    return receipts


def of_an_earlier_version(receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As receipts were before there were digests: nothing in it vouches for anything."""
    receipts[2] |= {"format": 1, "examples": 7, "salts": {}, "copies": ""}
    receipts[2] |= {"digest": "", "previous": "", "number": 0, "salt": "", "sealed": {}, "commitments": {}}
    return receipts


def taken_over(receipts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With a last one that tells of a deletion elsewhere which nobody knows."""
    last = {**receipts[2], "kind": "obeyed", "receipt": "receipt-new", "obeys": {"receipt-elsewhere": []}, "number": 4}
    last |= {"previous": receipts[2]["digest"]}
    return [*receipts, last | {"digest": evidence_digest(last)}]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (of_an_earlier_version, "the one here is of an earlier version, without a digest"),
        (taken_over, "receipt-elsewhere was taken over from elsewhere, and the state does not know it"),
        (changed, "its digest is not that of what it says"),
        (changed_with_its_digest, "follows a receipt that is not here"),
        (rewritten, "the manifest names the receipt"),
        (lambda receipts: receipts[1:], "follows a receipt that is not here"),
        (lambda receipts: [receipts[0], receipts[2]], "follows a receipt that is not here"),
        (lambda receipts: receipts[:2], "has no receipt: it was removed"),
        (put_in, "the chain of receipts has 2 ends"),
        (another_reference, "`reference` is not what the digest was made of"),
        (reference_put_in, "`reference` has no salt"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else None,
)
def test_what_was_changed_removed_or_put_in_is_found(store, change, told):
    for name in ("row-1", "row-2", "row-3"):
        store.delete(ids=[name], reference="DSR-1")
    assert not broken(store)
    write_back(store, change([receipt.to_json() for receipt in store.receipts()]))
    assert told in broken(store)


def test_a_receipt_that_stands_elsewhere_in_the_chain_than_it_says_is_found(store):
    receipts = [store.delete(ids=[name]).to_json() for name in ("row-1", "row-2")]
    receipts[1]["number"] = 7
    assert any("is number 7 of the chain" in finding for finding in chain_findings(receipts))
    receipts[1]["number"] = 2
    assert not list(chain_findings(receipts))


def test_a_receipt_follows_a_deletion_that_was_begun_and_is_not_done(store, monkeypatch):
    first = store.delete(ids=["row-1"])
    with monkeypatch.context() as patch, pytest.raises(UnfinishedDeletionError):
        patch.setattr(deletion, "carry_out", lambda *args: (_ for _ in ()).throw(OSError("the disk failed")))
        store.delete(ids=["row-2"])
    (begun,) = store.intents()
    assert begun["receipt"]["previous"] == first.digest
    monkeypatch.setattr(deletion, "recover", lambda folder, others=True: [])  # it stays begun
    after = store.delete(ids=["row-5"])
    assert after.previous == begun["receipt"]["digest"] and not broken(store)
    monkeypatch.undo()
    with store.writing():
        pass
    assert [receipt.number for receipt in store.receipts()] == [1, 3, 2] and not broken(store)
    assert store.receipts()[2].digest == begun["receipt"]["digest"], "carried out again it has the same evidence"
    assert store.delete(ids=["row-9"]).previous == after.digest and not broken(store)


def test_terms_end_and_the_digests_stay(store, tmp_path):
    receipt = store.delete(ids=["row-1"], reference="Fetamir Medresson")
    other = store.delete(ids=["row-2"], reference="DSR-2")
    assert "Fetamir" not in json.dumps({name: receipt.to_json()[name] for name in EVIDENCE})
    store.expire(datetime.timedelta(0))
    left = store.receipts()
    assert [(r.digest, r.reference, "reference" in r.salts) for r in left] == [
        (receipt.digest, None, False), (other.digest, None, False),
    ]  # fmt: skip
    assert not broken(store) and not wrong(left[0])


# ---- several states ----


def test_two_states_that_are_joined_have_one_chain(store, tmp_path):
    store.delete(ids=["row-1"])
    store.export_state(tmp_path / "begin")
    there = S3TStore(store.path, KEY, tmp_path / "there")
    there.import_state(tmp_path / "begin")
    here = store.delete(ids=["row-2"])
    elsewhere = S3TStore(shutil.copytree(make_store(tmp_path / "copy").path, tmp_path / "b"), KEY, there.private)
    other = elsewhere.delete(ids=["row-3"])
    assert here.previous == other.previous and here.number == other.number == 2
    elsewhere.export_state(tmp_path / "theirs")
    store.import_state(tmp_path / "theirs")
    joined = store.receipts()[-1]
    assert joined.kind == "obeyed" and {*joined.joins} == {here.digest, other.digest} and not broken(store)
    store.import_state(tmp_path / "theirs")
    assert store.receipts()[-1] == joined, "once is enough"
    assert store.delete(ids=["row-5"]).previous == joined.digest and not broken(store)


def deleted_without_a_state(store: S3TStore, tmp_path: Path) -> Receipt:
    """A deletion of a whole slice on a machine that has the published files alone, which then come back here."""
    other = tmp_path / "published"
    shutil.copytree(store.path, other, ignore=shutil.ignore_patterns(".s3t"))
    receipt = S3TStore(other).delete(slices=[(0, 1)])
    for path in list(store.path.iterdir()):
        if path.name != ".s3t":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(other, store.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".s3t"))
    return receipt


def test_what_is_taken_over_from_elsewhere_gets_a_receipt_here(store, tmp_path):
    store.delete(ids=["row-1"])
    elsewhere = deleted_without_a_state(store, tmp_path)
    with store.writing():
        pass
    obeyed = store.receipts()[-1]
    assert obeyed.kind == "obeyed" and obeyed.obeys[elsewhere.receipt] == [elsewhere.digest]
    assert obeyed.obeys.keys() == store.manifest().log.keys() - {store.receipts()[0].receipt} and not broken(store)
    assert status_words(obeyed) == "taken over from elsewhere"
    right = store.manifest()
    edit_json(store.path / "s3t.json", lambda data: data["log"][elsewhere.receipt].update(receipts=["a" * 64]))
    assert f"{elsewhere.receipt}: the manifest names the receipt aaaa" in broken(store)
    store.write_manifest(right)
    write_back(store, [store.receipts()[0].to_json()])
    assert f"{elsewhere.receipt} has no receipt: it was removed" in broken(store)


def test_a_store_of_before_receipts_were_chained_is_read_as_what_it_is(store):
    store.delete(ids=["row-1"])
    (old,) = store.receipts()
    new = {"stages_after", "places", "commitments", "obeys", "joins", "number", "previous", "salt", "salts", "sealed"}
    new |= {"digest", "copies", "signature"}
    text = {name: value for name, value in old.to_json().items() if name not in new} | {"format": 1}
    edit_database(store, "UPDATE receipts SET receipt = ?, format = 1", json.dumps(text))
    edit_json(store.path / "s3t.json", lambda manifest: manifest["log"][old.receipt].pop("receipts"))
    edit_database(store, "UPDATE receipts SET chain = ?", chained("", json.dumps(text)))
    (check,) = [check for check in verify(store).checks if check.name == CHECK]
    assert not check.broken and "of an earlier version: not chained by digest" in check.not_checked[0]
    (one, *_) = check_receipt(store.receipts()[0])
    assert not one.broken and "earlier version" in one.not_checked[0]
    new = store.delete(ids=["row-2"])
    assert (new.number, new.previous) == (1, "") and not broken(store)


# ---- the manifest ----


def test_two_receipts_of_one_name_are_both_kept_and_found(store):
    a, b = "a" * 64, "b" * 64
    one, other = {"x": Event(((0, 1),), receipts=(a,))}, {"x": Event((), receipts=(b,))}
    assert merged(one, other) == merged(other, one) == {"x": Event(((0, 1),), receipts=(a, b))}
    assert merged(one, {"x": Event(())})["x"].receipts == (a,), "what is known of an older one is not lost"
    receipt = store.delete(ids=["row-1"])
    edit_json(store.path / "s3t.json", lambda manifest: manifest["log"][receipt.receipt]["receipts"].append(a))
    assert f"{receipt.receipt} has 2 receipts in the manifest: one of them is forged" in broken(store)


@pytest.mark.parametrize("receipts", ["a" * 64, ["a"], [1], None, {}])
def test_a_log_with_what_are_no_digests_is_refused(store, receipts):
    data = store.manifest().to_json()
    data |= {"log": {"receipt-1": {"places": [], "named": True, "receipts": receipts}}, "generation": 1}
    with pytest.raises(Exception, match="The manifest is damaged"):
        Manifest.from_json(data)


def test_a_log_of_before_names_no_receipts_and_is_written_as_it_was(store):
    log = {"receipt-1": {"places": [[0, 1]], "named": True}}
    data = store.manifest().to_json() | {"log": log, "generation": 1}
    assert Manifest.from_json(data).to_json()["log"] == log


def test_an_older_manifest_that_is_put_back_names_the_receipts_again(store):
    older = (store.path / "s3t.json").read_bytes()
    receipt = store.delete(ids=["row-1"])
    (store.path / "s3t.json").write_bytes(older)
    with store.writing():
        pass
    assert store.manifest().log[receipt.receipt].receipts == (receipt.digest,) and not broken(store)


# ---- what a receipt says is so ----


def test_a_removed_stage_that_is_put_back_is_found(store, tmp_path):
    kept = shutil.copytree(store.path, tmp_path / "kept")
    receipt = store.delete(ids=["row-1"])
    name = sorted(receipt.stages_removed)[0]
    shutil.copytree(kept / name, store.path / name)
    entry = json.loads((kept / "s3t.json").read_bytes())["stages"][name]
    edit_json(store.path / "s3t.json", lambda manifest: manifest["stages"].update({name: entry}))
    assert f"says that {name} was removed, and it is there, with the same weights" in broken(store)
    found = wrong(receipt, folder=store)
    assert f"{name} is in the manifest" in found and f"{name}/adapter_model.safetensors holds weights" in found
    shutil.rmtree(store.path / name)
    edit_json(store.path / "s3t.json", lambda manifest: manifest["stages"].pop(name))
    (store.path / "copy.bin").write_bytes((kept / name / "adapter_model.safetensors").read_bytes())
    assert "copy.bin holds weights that were removed" in wrong(receipt, folder=store)


def test_a_stage_that_was_trained_again_to_the_same_bytes_is_told_by_its_record(store, tmp_path):
    kept = shutil.copytree(store.path, tmp_path / "kept")
    name = sorted(store.delete(ids=["row-1"]).stages_removed)[0]
    shutil.copytree(kept / name, store.path / name)
    entry = json.loads((kept / "s3t.json").read_bytes())["stages"][name]
    edit_json(store.path / "s3t.json", lambda manifest: manifest["stages"].update({name: entry}))
    for generation, found in ((0, True), (1, False)):
        with store.changing() as state:
            state.write_record(name, {"generation": generation, "examples": 0, "data": "", "steps": 1})
        assert bool(broken(store)) == found


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stages_removed": {}, "examples": 0}, "nothing was removed"),
        ({"places": []}, "nothing was removed"),
        ({"stages_after": {"shard-00/0": "a" * 64}}, "shard-00/0 saw one of its slices, and was not removed"),
        ({"kind": "loss", "stages_after": {"shard-00/0": "a" * 64}}, "shard-00/0 saw one of its slices"),
        ({"served_after": {"0": [2, 0]}}, "shard 0 is served with a slice that it is about"),
        ({"stages_removed": {"shard-01/0": {}}}, "it removed shard-01/0, which saw none of its slices"),
        ({"stages_after": {"../x": "a"}}, "what it says of stages cannot be read"),
        ({"status": "unchanged"}, "it says that it changed nothing, and names what it removed"),
        ({"status": "dry run"}, "it is of a dry run: nothing was carried out"),
    ],
)
def test_a_deletion_that_removed_nothing_has_no_valid_receipt(store, changes, told):
    receipt = store.delete(slices=[(0, 0)])
    assert not wrong(receipt)
    forged = replace(receipt, **changes)
    assert told in wrong(replace(forged, digest=evidence_digest(forged.to_json())))


def test_a_receipt_of_another_store_or_time_is_told(store, tmp_path):
    receipt = store.delete(ids=["row-1"])
    assert not wrong(receipt, folder=store)
    assert "the manifest knows no receipt-" in wrong(receipt, folder=make_store(tmp_path / "other"))
    edit_json(store.path / "s3t.json", lambda manifest: manifest["log"][receipt.receipt].update(receipts=["a" * 64]))
    assert "the manifest names aaaa" in wrong(receipt, folder=store)


def test_a_receipt_that_passes_itself_off_as_of_an_earlier_version_is_told(store, keys):
    """Signature and manifest vouch for its digest, and nothing would for what it says."""
    store.set_names(signing_key=keys["mine private"])
    receipt = store.delete(ids=["row-1"])
    assert not wrong(receipt, folder=store, public_key=keys["mine public"])
    forged = replace(receipt, format=1, asked=7, examples=7)
    assert "of an earlier version, which had no digests" in wrong(forged, folder=store, public_key=keys["mine public"])
    bare = replace(forged, digest="", previous="", number=0, salt="", sealed={}, commitments={}, signature=None)
    assert "the manifest names" in wrong(bare, folder=store) and not wrong(bare)
    assert "the manifest knows no receipt-x" in wrong(replace(bare, receipt="receipt-x"), folder=store)


def test_a_deletion_before_it_that_the_manifest_does_not_know_is_told(store):
    store.delete(ids=["row-1"])
    receipt = store.delete(ids=["row-1"])
    assert receipt.status == "unchanged" and not wrong(receipt, folder=store)
    forged = replace(receipt, deleted_by=["receipt-nobody"])
    forged = replace(forged, digest=evidence_digest(forged.to_json()))
    assert "it says that receipt-nobody had deleted it before" in wrong(forged, folder=store)


def test_exports_that_nothing_vouches_for_are_not_passed_in_silence(store):
    receipt = store.delete(ids=["row-1"])
    forged = replace(receipt, exports=["/elsewhere"], salts={})
    assert "the exports that it names were changed" in wrong(replace(receipt, exports=["/elsewhere"]))
    (check, *_) = check_receipt(forged)
    assert "Nothing vouches for the exports" in check.not_checked[0] and not check_receipt(receipt)[0].not_checked


def test_a_receipt_names_no_example_and_none_can_be_guessed(store):
    receipt = store.delete(ids=["row-1"], slices=[(1, 1)])
    text, known = json.dumps(receipt.to_json()), make_store(store.path.parent / "again")
    assert not [digest for digest in index_of(known) if digest in text]
    assert not [row for row in people() if row["id"] in text.replace(str(store.path), "") or row["text"] in text]
    assert len(receipt.salt) == 64 and receipt.salt not in (store.path / "s3t.json").read_text()
    named = [store.delete(ids=[name], reference="DSR-1").sealed["reference"] for name in ("row-2", "row-3")]
    assert named[0] != named[1], "who expects a reference cannot tell whether it is the one, once its salt is gone"


# ---- commitments ----


def test_an_opening_shows_which_examples_went_and_to_nobody_else(store):
    with store.reading() as state:
        before = state.examples_of(tuple(store.locate(ids=["row-1"])[0].places[0]))
    receipt = store.delete(ids=["row-1"])
    (name,), place = receipt.commitments, tuple(receipt.places[0])
    found = store.locate(ids=[row["id"] for row in people()])
    later = [location.asked for location in found if location.found == "live" and location.places == (place,)]
    store.delete(ids=later[:2])  # deleted since: it can still be opened
    opening = json.loads(json.dumps(store.open_receipt(receipt.receipt, ["row-1"])))
    assert opening["places"][name]["before"] == before
    gone = {*before} - {*opening["places"][name]["after"]}
    assert gone == {opening["ids"]["row-1"]} and not wrong(receipt, opening=opening)
    with pytest.raises(ValueError, match="'row-2' was not deleted by"):
        store.open_receipt(receipt.receipt, ["row-2"])
    stays = opening["places"][name]["after"][0]

    def another_who_stays(other: dict[str, Any]) -> None:
        for digests in other["places"][name].values():
            digests[digests.index(stays)] = "0" * 32

    for change in (
        another_who_stays,
        lambda o: o["places"][name]["before"].pop(),
        lambda o: o["places"][name]["after"].append("0" * 32),
        lambda o: o["ids"].update({"row-9": "0" * 32}),
        lambda o: o.update(key="00" * 32),
        lambda o: o.update(receipt="receipt-x"),
        lambda o: o.update(digest="0" * 64),
        lambda o: o["places"].clear(),
        lambda o: o.pop("key"),
        lambda o: o["places"][name].update({when: ["\n".join(at)] for when, at in o["places"][name].items()}),
    ):
        other = json.loads(json.dumps(opening))
        change(other)
        assert wrong(receipt, opening=other)


def test_commitments_of_two_slices_differ_and_the_order_of_the_examples_counts_for_nothing():
    assert commitment(KEY, (0, 1), ["a", "b"]) == commitment(KEY, (0, 1), ["b", "a"])
    assert len({commitment(KEY, place, ["a", "b"]) for place in ((0, 1), (1, 0), (0, 0))}) == 3


def test_an_opening_of_nothing_opens_nothing(store):
    receipt = store.delete(ids=["row-1"])
    empty = {**store.open_receipt(receipt.receipt), "places": {}, "ids": {}}
    bare = replace(receipt, commitments={})
    assert "its receipt has no commitments" in wrong(bare, opening=empty)
    opening, more = store.open_receipt(receipt.receipt), replace(receipt, examples=2)
    assert "it shows that 1 examples went, and the receipt says 2" in wrong(more, opening=opening)
    two = {name: [f"{at[0]}\n{at[1]}", *at[2:]] for (name, at) in next(iter(opening["places"].values())).items()}
    joined = {**opening, "places": {next(iter(opening["places"])): two}}
    assert "no keyed digests" in wrong(receipt, opening=joined)


def test_each_receipt_has_a_key_of_its_own(store):
    first, second = store.delete(ids=["row-1"]), store.delete(ids=["row-2"])
    openings = [store.open_receipt(receipt.receipt) for receipt in (first, second)]
    assert openings[0]["key"] != openings[1]["key"] and KEY.hex() not in json.dumps(openings)


def test_what_can_no_longer_be_opened_is_said_plainly(store, tmp_path):
    receipt = store.delete(ids=["row-1"])
    store.export_state(tmp_path / "backup")
    store.readmit(ids=["row-1"])
    with pytest.raises(StateError, match="can no longer be opened: in slice .* A backup of the state"):
        store.open_receipt(receipt.receipt)
    again = S3TStore(store.path, KEY, tmp_path / "state")
    again.import_state(tmp_path / "backup")
    assert again.open_receipt(receipt.receipt)["places"]


def test_without_the_key_there_are_no_commitments_and_the_receipt_says_so(store):
    (store.private / "partition.key").unlink()
    receipt = store.delete(slices=[(0, 1)])
    assert receipt.commitments == {} and any("no commitment" in limit for limit in receipt.limits)
    with pytest.raises(StateError, match="has no commitments"):
        store.open_receipt(receipt.receipt)


# ---- signatures ----


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """PEM files of two keys of Ed25519, and of one of another kind."""
    from cryptography.hazmat.primitives import serialization as to
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made = {"mine": Ed25519PrivateKey.generate(), "other": Ed25519PrivateKey.generate()}
    files = {}
    for name, key in {**made, "curve": ec.generate_private_key(ec.SECP256R1())}.items():
        private = key.private_bytes(to.Encoding.PEM, to.PrivateFormat.PKCS8, to.NoEncryption())
        public = key.public_key().public_bytes(to.Encoding.PEM, to.PublicFormat.SubjectPublicKeyInfo)
        for kind, data in (("private", private), ("public", public)):
            files[f"{name} {kind}"] = str(tmp_path / f"{name}-{kind}.pem")
            Path(files[f"{name} {kind}"]).write_bytes(data)
    return files


def test_receipts_are_signed_by_a_key_that_is_named_once(store, keys, monkeypatch):
    unsigned = store.delete(ids=["row-1"])
    store.set_names(signing_key=keys["mine private"])
    signed = store.delete(ids=["row-2"], reference="DSR-2")
    assert unsigned.signature is None and store.receipts()[-1] == signed and not broken(store)
    assert not wrong(signed, public_key=keys["mine public"])
    assert "signed by another key" in wrong(signed, public_key=keys["other public"])
    assert "is not signed" in wrong(unsigned, public_key=keys["mine public"])
    for changes in ({"inactive_since": "2000-01-01"}, {"status": "unchanged"}, {"still_served_at": ["x"]},
                    {"signature": {**signed.signature, "public_key": "00" * 32}}):  # fmt: skip
        assert "changed after it was signed" in wrong(replace(signed, **changes))
    write_back(store, [unsigned.to_json(), signed.to_json() | {"inactive_since": "2000-01-01"}])
    assert "changed after it was signed" in broken(store)
    write_back(store, [unsigned.to_json(), signed.to_json()])
    monkeypatch.setenv("HF_S3T_SIGNING_KEY", keys["other private"])
    assert not wrong(store.readmit(ids=["row-2"]), public_key=keys["other public"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cryptography", None)
        assert not wrong(signed) and not broken(store)
        (_, unchecked) = check_receipt(signed)
        assert "hf-s3t[signing]" in unchecked.not_checked[0]
    store.expire(datetime.timedelta(0))
    assert not wrong(store.receipt(signed.receipt), public_key=keys["mine public"]), "also when its terms have ended"


def test_a_key_that_can_not_sign_is_told_before_anything_is_changed(store, keys, monkeypatch):
    useless = {"curve private": "of another kind", "mine public": "holds no private key", "x": "cannot be read"}
    for file, told in useless.items():
        with pytest.raises(ValueError, match=told):
            store.set_names(signing_key=keys.get(file, file))
    with pytest.raises(ValueError, match="'owner' cannot be set. These can: organisation, model"):
        store.set_names(owner="me")
    store.set_names(signing_key=keys["mine private"])
    Path(keys["mine private"]).unlink()
    with pytest.raises(ValueError, match="cannot be read .* openssl genpkey"):
        store.delete(ids=["row-1"])
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ValueError, match="hf-s3t\\[signing\\]"):
        store.delete(ids=["row-1"])
    assert store.locate(ids=["row-1"])[0].found == "live" and not store.receipts() and not store.intents()


def test_a_deletion_on_its_way_does_not_wait_for_a_signature(store, keys, caplog):
    store.set_names(signing_key=keys["mine private"])
    receipt = store._delete({"ids": ["row-1"]}, when_durable=Path(keys["mine private"]).unlink)
    assert receipt.signature is None and store.receipts() == [receipt] and "is not signed" in caplog.text


# ---- names, words ----


def test_names_are_set_once_stay_private_and_travel_with_a_backup(store, tmp_path):
    store.set_names(organisation="Röda AB", model="bot", dataset="x")
    assert store.set_names(dataset="") == {"organisation": "Röda AB", "model": "bot"}
    store.export_state(tmp_path / "backup")
    other = S3TStore(store.path, KEY, tmp_path / "state")
    other.import_state(tmp_path / "backup")
    assert other.set_names(model="mine") == {"organisation": "Röda AB", "model": "mine"}
    other.import_state(tmp_path / "backup")
    assert other.set_names()["model"] == "mine", "what is set here stays"
    assert (other.private / "names.json").stat().st_mode & 0o077 == 0


def test_what_became_of_it_is_told_in_a_readers_words(store, tmp_path):
    dry = store.delete(ids=["row-1"], dry_run=True)
    first = store.delete(ids=["row-1"])
    again, unknown = store.delete(ids=["row-1"]), store.delete(ids=["nobody"], missing_ok=True)
    assert status_words(dry) == "nothing was changed: a dry run" and dry.digest == ""
    assert status_words(first, since_of(store, first)) == "done here; not yet repaired"
    assert status_words(again) == f"nothing to do: deleted before on {first.inactive_since[:10]}"
    assert status_words(unknown) == "nothing to do: nothing that was asked for is known here"
    other = make_store(tmp_path / "other").read_stage
    with store.writing():
        manifest = store.manifest()
        again = {stage: other(stage) for stage in manifest.plan.stages if stage.name in first.stages_removed}
        again = {s: a._replace(arrays={n: v + 1 for n, v in a.arrays.items()}) for s, a in again.items()}
        files = {stage: store.write_stage(stage, adapter) for stage, adapter in again.items()}
        store.write_manifest(store.write_root(replace(manifest, stages={**manifest.stages, **files})))
    since = since_of(store, first)
    assert status_words(first, since) == "done here" and since.repaired.keys() == first.stages_removed.keys()
    assert since.missing == () and all(when.endswith("+00:00") for when in since.repaired.values())
    head = replace(first, status="inactive_at_head", still_served_at=["abc"], repository="me/m")
    assert status_words(head) == "done at the head; the history still serves it"


# ---- files that were handed over ----


def test_a_receipt_is_read_from_what_a_verb_printed(store, tmp_path):
    receipt = store.delete(ids=["row-1"]).to_json()
    file = tmp_path / "receipt.json"
    for data in (receipt, [{"store": "out", "result": receipt}], [{"result": {"receipt": receipt}}]):
        file.write_text(json.dumps(data))
        assert read_receipt_file(file).to_json() == receipt
    for data in ("[]", "3", "{", '{"receipt": 3}', '{"receipt": "x"}', '[{"result": null}]', '{"receipt": {}}'):
        file.write_text(data)
        with pytest.raises(Exception, match="receipt"), suppress(KeyError):
            read_receipt_file(file)


# ---- what it costs ----


def test_a_deletion_asks_the_state_no_more_with_more_examples_or_receipts(tmp_path):
    asked = []
    for number in (24, 96):
        store = make_store(tmp_path / str(number), people(number))
        for name in range(number // 24):
            store.delete(ids=[f"row-{name + 2}"])
        with statements() as run:
            store.delete(ids=["row-1"])
        asked.append(len([line for line in run if line.startswith("SELECT")]))
        reads = [line for line in run if "SELECT digest FROM examples WHERE shard" in line]
        assert len(reads) == 1, "each slice that is hit is read once, for its commitments"
    assert asked[0] == asked[1]
