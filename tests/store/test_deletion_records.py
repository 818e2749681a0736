"""Intents and receipts outlive the version that wrote them: older ones are read, newer ones are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import models
import trained_stores
from hf_s3t import S3TEnsemble, S3TStore, StateError
from hf_s3t.store.audit import verify
from hf_s3t.store.partition import keyed_digest
from hf_s3t.store.receipts import LIMITS, Receipt, read_receipts
from stores import edit_database, make_store, tree
from trained_stores import edit_json

# Files of the version before there was a format number, as it wrote them: row-1 of `make_store` is `eb455f61...`.

DELETE = """{
 "file": "00000001-receipt-ae71d73493e5.json",
 "generation": 1,
 "groups": {},
 "ids": {"eb455f618bb4585586b35779bc7d7f74": [[0, 0]]},
 "kind": "delete",
 "places": [[0, 0]],
 "receipt": {
  "already_deleted": 0, "asked": 1, "caches": [], "dark_examples": 9, "deleted_by": [], "examples": 1, "exports": [],
  "exports_refreshed": [], "exports_removed": [], "found": 1, "generation": 1, "inactive_since": null,
  "kind": "delete", "limits": ["A request that was chosen by looking at the model is not covered."],
  "receipt": "receipt-ae71d73493e5", "reference": "DSR-1", "repository": null,
  "requested_at": "2026-11-28T19:36:37.527+00:00",
  "served_after": {"0": [1, 2], "1": [0, 1, 2]}, "served_before": {"0": [0, 1, 2], "1": [0, 1, 2]},
  "stages_removed": {"shard-00/0": {
    "adapter_config.json": "7d7a974a1899ffe2fc001c19fb9c0643c24e0648a11d6f6ac836d694987885bd",
    "adapter_model.safetensors": "515f8c0850853516a13aaf349146b86181b7b85022dac67fc58cfa1152182c7b"
  }},
  "status": "inactive", "still_served_at": [],
  "versions": {"accelerate": "1.15.0", "hf_s3t": "0.1.0.dev0", "peft": "0.21.2", "torch": "2.13.0+cpu"}
 },
 "refresh_exports": false,
 "repo": null
}
"""

READMIT = """{
 "file": "00000002-receipt-01cc328f21f5.json",
 "generation": 2,
 "groups": {},
 "ids": {"eb455f618bb4585586b35779bc7d7f74": []},
 "kind": "readmit",
 "places": [],
 "receipt": {
  "already_deleted": 0, "asked": 1, "caches": [], "dark_examples": 0, "deleted_by": [], "examples": 0, "exports": [],
  "exports_refreshed": [], "exports_removed": [], "found": 1, "generation": 2, "inactive_since": null,
  "kind": "readmit", "limits": [], "receipt": "receipt-01cc328f21f5", "reference": null, "repository": null,
  "requested_at": "2026-11-28T19:36:37.568+00:00", "served_after": {}, "served_before": {}, "stages_removed": {},
  "status": "readmitted", "still_served_at": [],
  "versions": {"accelerate": "1.15.0", "hf_s3t": "0.1.0.dev0", "peft": "0.21.2", "torch": "2.13.0+cpu"}
 },
 "repo": null
}
"""

OLDER_RECEIPT = """{"asked": 1, "found": 1, "generation": 1, "inactive_since": "2026-10-01T08:00:00.000+00:00",
 "kind": "delete", "receipt": "receipt-000000000001", "requested_at": "2026-10-01T07:59:59.000+00:00",
 "stages_removed": {}, "status": "inactive"}"""
"""Of a version that knew fewer fields."""


def begin(store: S3TStore, text: str, **changes: Any) -> Path:
    """Puts an intent into a state, as an interrupted deletion leaves it."""
    intent = {**json.loads(text), **changes}
    file = store.private_folder("intents") / json.loads(text)["file"]
    file.write_text(json.dumps(intent))
    return file


def test_a_deletion_that_an_older_version_began_is_obeyed_and_ended(tmp_path):
    store = make_store(tmp_path / "out")
    begin(store, DELETE)
    assert not any((0, 0) in stage.slices for stage in store.live().stages) and store.status().interrupted_deletions
    with store.writing():
        pass
    assert store.locate(ids=["row-1"])[0].found == "deleted" and not store.intents()
    (receipt,) = read_receipts(store)
    assert (receipt["receipt"], receipt["reference"], receipt["format"]) == ("receipt-ae71d73493e5", "DSR-1", 1)
    begin(store, READMIT)
    with store.writing():
        pass
    assert store.locate(ids=["row-1"])[0].found == "unknown" and store.status().generation == 2


def test_what_an_older_version_left_out_of_an_intent_has_its_default(tmp_path):
    store = make_store(tmp_path / "out")
    intent = json.loads(READMIT)
    for name in ("groups", "repo"):
        del intent[name]
    intent["receipt"] = {name: intent["receipt"][name] for name in
                         ("receipt", "kind", "status", "requested_at", "generation")}  # fmt: skip
    (store.private_folder("intents") / "00000001-receipt-other.json").write_text(json.dumps(intent))
    with store.writing():
        pass
    assert not store.intents() and not list((store.private / "intents").iterdir()), "under the name that it has"


def test_the_receipts_of_an_older_version_have_defaults(tmp_path):
    store = make_store(tmp_path / "out")
    with store.changing() as state:
        state.add_receipt("receipt-000000000001", json.loads(OLDER_RECEIPT))
    store.delete(ids=["row-1"])
    older, newer = read_receipts(store)
    assert older["still_served_at"] == [] and older["inactive_since"] == "2026-10-01T08:00:00.000+00:00"
    assert (older["format"], newer["format"]) == (1, 2) and list(older["limits"]) == list(LIMITS)


def test_an_intent_on_disk_names_its_format_and_its_receipts(tmp_path):
    store, seen = make_store(tmp_path / "out"), []

    def read() -> None:
        (file,) = (store.private / "intents").iterdir()
        seen.append(json.loads(file.read_text()))

    store._delete({"ids": ["row-1"]}, when_durable=read)
    (intent,) = seen
    (receipt,) = read_receipts(store)
    assert (intent["format"], intent["receipt"]["format"], receipt["format"]) == (1, 2, 2)
    assert receipt["digest"] == intent["receipt"]["digest"] == store.manifest().log[receipt["receipt"]].receipts[0]


# ---- newer versions ----

NEWER = "format 2, and this version of hf_s3t reads up to 1: a newer version wrote it. Upgrade hf_s3t"
NEWER_RECEIPT = NEWER.replace("up to 1", "up to 2").replace("format 2", "format 3")
CHANGES = {
    "a newer intent": ({"format": 2, "places": "everywhere", "until": "2027"}, NEWER),
    "a newer receipt in it": ({"receipt": {"format": 3, "name": "another form"}}, NEWER_RECEIPT),
    "an unknown field": ({"until": "2027"}, r"unknown fields \['until'\]"),
    "an unknown kind": ({"kind": "forget"}, "its kind is 'forget'"),
    "no places": ({"places": None}, "cannot be read"),
    "no place": ({"places": [[0, -1]]}, "cannot be read"),
    "no number": ({"format": "1"}, "cannot be read"),
}
SERVES_OR_CHANGES = {
    "live": lambda store: store.live(),
    "assemble": lambda store: store.assemble(0, (1,)),
    "status": lambda store: store.status(),
    "export": lambda store: store.export(store.path.parent / "adapter"),
    "readmit": lambda store: store.readmit(ids=["row-2"]),
}


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_nothing_is_served_past_a_deletion_that_can_not_be_read(tmp_path, changes, message):
    store = make_store(tmp_path / "out")
    begin(store, DELETE, **changes)
    before = tree(store.path)
    for use in SERVES_OR_CHANGES.values():
        with pytest.raises(StateError, match=message):
            use(store)
    assert tree(store.path) == before and not (tmp_path / "adapter").exists()
    receipt = store.delete(ids=["row-2"])  # another person's deletion does not wait for it
    assert receipt.status == "inactive" and [path.name for path in (store.private / "intents").iterdir()]
    assert not any(stage.slices & {*receipt_places(store, "row-2")} for stage in store.manifest().stages)
    with pytest.raises(StateError, match=message):
        store.live()
    next((store.private / "intents").iterdir()).unlink()  # the way out that the message names
    with store.writing():
        pass
    assert store.live().stages and verify(store).ok


@pytest.mark.parametrize("text", ["", '{"places": [[0', "\0" * 4096, "\udc80", "[1]", "[" * 100_000])
def test_a_begun_deletion_whose_file_is_damaged_names_its_way_out(tmp_path, text):
    store = make_store(tmp_path / "out")
    file = store.private_folder("intents") / "00000001-receipt-1.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StateError, match="cannot be read .*Run the request that .* again, .* Then remove this"):
        store.status()
    assert store.delete(ids=["row-2"]).status == "inactive"
    file.unlink()
    with store.writing():
        pass
    assert store.locate(ids=["row-2"])[0].found == "deleted" and verify(store).ok


def receipt_places(store: S3TStore, name: str) -> list[tuple[int, int]]:
    with store.reading() as state:
        stone = state.tombstone("id", keyed_digest(store.key, "id", name))
    return sorted(stone.places)


def test_nothing_is_trained_or_answered_past_a_deletion_of_a_newer_version(tmp_path):
    path, rows = tmp_path / "out", models.llama_rows(16)
    trained_stores.train_store(path, rows, num_shards=1, num_slices=2)
    model = S3TEnsemble.from_pretrained(path, models.tiny_llama())
    store = S3TStore(path)
    edit_json(path / "s3t.json", lambda manifest: manifest["stages"].pop("shard-00/0-1"))
    file = begin(store, DELETE, format=2)
    before = store.manifest()
    with pytest.raises(StateError, match=NEWER):
        trained_stores.make_trainer(str(path), rows, num_shards=1, num_slices=2).train()
    assert store.manifest() == before
    with pytest.raises(StateError, match=NEWER):
        model.refresh()
    with pytest.raises(StateError, match=NEWER):
        S3TEnsemble.from_pretrained(path, models.tiny_llama())
    file.unlink()
    assert model.refresh()


def make_newer(database: Path) -> None:
    edit_database(database, "UPDATE receipts SET format = 3, receipt = json_set(receipt, '$.format', 3, '$.own', 'x')")


def test_a_receipt_of_a_newer_version_is_refused_before_anything_is_deleted(tmp_path):
    store, backup = make_store(tmp_path / "out"), tmp_path / "backup.json"
    store.delete(ids=["row-1"])
    store.export_state(backup)
    make_newer(backup)
    other = S3TStore(shutil.copytree(store.path, tmp_path / "other"))
    with pytest.raises(StateError, match=NEWER_RECEIPT):
        other.import_state(backup)
    assert tree(other.path) == tree(store.path)
    make_newer(store.database)
    before = tree(store.path)
    for change in (lambda: store.delete(ids=["row-2"]), lambda: store.readmit(ids=["row-1"])):
        with pytest.raises(StateError, match=NEWER_RECEIPT):
            change()
    assert tree(store.path) == before and not store.intents()


def test_a_receipt_that_lacks_what_every_one_has_is_damaged():
    with pytest.raises(StateError, match=r"it lacks \['generation', 'requested_at', 'status'\]"):
        Receipt.from_json({"receipt": "receipt-1", "kind": "delete"})
