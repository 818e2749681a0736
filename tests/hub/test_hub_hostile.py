"""A repository that somebody else filled: refused with the reason, and nothing is written outside the cache."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch

from hf_s3t import Plan, S3TEnsemble, S3TStore, Stage
from hf_s3t.files import json_bytes, safetensors_bytes
from hf_s3t.lora.adapter import Adapter
from hf_s3t.store import folder
from machines import Failed
from stores import make_store, stage_adapter, tombstones_of

FIRST, LATER = "shard-00/0", "shard-00/1"


pytest_plugins = ["hub_fixtures"]


# What machines are told


def make_and_push(path):
    make_store(Path(path), plan=Plan.make(1, 2, [(0, 1), (1, 0)], prune=False)).push("owner/m")


def read(path):
    """Every way of reading, with what each ends in."""
    found = {}
    ways = {
        "status": lambda: S3TStore("owner/m").status().generation,
        "assemble": lambda: len(S3TStore("owner/m").assemble(0, (0,)).tensors),
        "pull": lambda: S3TStore(Path(path).parent / "new").pull("owner/m"),
        "load": lambda: S3TEnsemble.from_pretrained("owner/m"),
    }
    for name, way in ways.items():
        try:
            found[name] = ["", str(way())]
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
    return found


def delete(state):
    return S3TStore("owner/m", state=state).delete(ids=["row-3"]).to_json()


def pull(path):
    S3TStore(Path(path)).pull("owner/m")


# What somebody puts there


def files_of(server):
    repository = server.repository("owner/m")
    entries = [entry for entry in repository.entries("main").values() if not entry.folder]
    return {e.path: repository.content(e.sha256) if e.sha256 else repository.read(e) for e in entries}


def put(server, files):
    """A commit by somebody who knows git, not this library."""
    repository, changes = server.repository("owner/m"), {}
    for path, data in files.items():
        changes[path] = data
        if data is not None and path.endswith((".safetensors", ".bin")):
            digest = hashlib.sha256(data).hexdigest()
            repository.store(digest, data)
            changes[path] = repository.pointer(digest, len(data), path)
    repository.commit("refs/heads/main", repository.resolve("main"), "mallory", "a gift", changes)


def put_stage(server, weights=None, config=None, name=FIRST):
    """Other files for a stage, in a manifest that agrees with them."""
    files = files_of(server)
    manifest = json.loads(files["s3t.json"])
    for file, data in (("adapter_model.safetensors", weights), ("adapter_config.json", config)):
        if data is not None:
            put(server, {f"{name}/{file}": data})
            manifest["stages"][name]["sha256"][file] = hashlib.sha256(data).hexdigest()
    put(server, {"s3t.json": json_bytes(manifest)})


def weights_of(tensors, stage=FIRST, parents=()):
    about = json.dumps({"stage": stage, "parents": list(parents)})
    return safetensors_bytes(Adapter.from_tensors({}, tensors).arrays, {"format": "pt", "hf_s3t": about})


def with_manifest(change):
    def act(server):
        manifest = json.loads(files_of(server)["s3t.json"])
        change(manifest)
        put(server, {"s3t.json": json_bytes(manifest)})

    return act


def with_tensors(change, **about):
    def act(server):
        tensors = dict(stage_adapter(Stage.from_name(FIRST)).tensors)
        change(tensors)
        put_stage(server, weights_of(tensors, **about))

    return act


def with_config(**changes):
    return lambda server: put_stage(
        server, config=json_bytes({**stage_adapter(Stage.from_name(FIRST)).config, **changes})
    )


def rename(stages, old, new):
    stages[new] = stages.pop(old)


def foreign(tensors):
    tensors["base_model.model.layers.3.q_proj.lora_A.weight"] = torch.ones(2, 4)
    tensors["base_model.model.layers.3.q_proj.lora_B.weight"] = torch.ones(4, 2)


A = "base_model.model.layers.18.q_proj.lora_A.weight"
MANIFESTS = {
    "a path that leaves the folder": with_manifest(lambda m: rename(m["stages"], FIRST, "shard-00/../../../evil")),
    "an absolute path": with_manifest(lambda m: rename(m["stages"], FIRST, "/tmp/evil")),
    "a file beyond the two": with_manifest(lambda m: m["stages"][FIRST]["sha256"].update({"../../evil": "0" * 64})),
    "a pickle": with_manifest(lambda m: m["stages"][FIRST].update(sha256={"adapter_model.bin": "0" * 64})),
    "another format": with_manifest(lambda m: m.update(format=99)),
    "no JSON": lambda server: put(server, {"s3t.json": b"{" * 100_000}),
    "nested beyond bounds": lambda server: put(server, {"s3t.json": b"[" * 200_000}),
    "a huge manifest": lambda server: put(server, {"s3t.json": b" " * ((64 << 20) + 1)}),
    "a huge plan": with_manifest(lambda m: m["plan"].update(num_slices=10**12)),
}
STAGES = {
    "wrong hashes": lambda server: put(server, {f"{FIRST}/adapter_model.safetensors": b"other"}),
    "wrong hashes further on": lambda server: put(server, {f"{LATER}/adapter_model.safetensors": b"other"}),
    "a missing file": lambda server: put(server, {f"{FIRST}/adapter_config.json": None}),
    "tensors of another group": with_tensors(foreign),
    "no tensors": with_tensors(lambda tensors: tensors.clear()),
    "half a pair": with_tensors(lambda tensors: tensors.pop(A)),
    "another rank": with_tensors(lambda tensors: tensors.update({A: torch.ones(3, 4)})),
    "another type": with_tensors(lambda tensors: tensors.update({A: torch.ones(2, 4).half()})),
    "a part of the base": with_tensors(lambda tensors: tensors.update({"base_model.model.embed": torch.ones(2)})),
    "another stage's name": with_tensors(lambda tensors: None, stage="shard-00/1"),
    "no name": lambda server: put_stage(server, safetensors_bytes(stage_adapter(Stage.from_name(FIRST)).arrays, {})),
    "a name nested beyond bounds": lambda server: put_stage(
        server,
        safetensors_bytes(stage_adapter(Stage.from_name(FIRST)).arrays, {"format": "pt", "hf_s3t": "[" * 200_000}),
    ),
    "a pickle in its place": lambda server: put_stage(server, pickle.dumps(print)),
    "another scale": with_config(lora_alpha=4000),
    "other layers": with_config(layers_to_transform=[1]),
    "another kind": with_config(peft_type="IA3"),
    "other targets": with_config(target_modules=["embed"]),
    "a huge config": with_config(filler="x" * (1 << 20)),
}


def everything(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and "write." not in path.name}


@pytest.mark.brief(
    "a path that leaves the folder", "a file beyond the two", "a pickle", "nested beyond bounds", "a huge plan",
    "wrong hashes", "tensors of another group", "another rank", "another stage's name", "a name nested beyond bounds",
    "a pickle in its place", "another scale", "a huge config",
)  # fmt: skip
@pytest.mark.parametrize("name", [*MANIFESTS, *STAGES])
def test_what_a_training_did_not_write_is_refused(server, machine, tmp_path, name):
    machine(make_and_push, path=tmp_path / "out")
    (MANIFESTS | STAGES)[name](server)
    before = everything(tmp_path)
    found = machine(read, path=tmp_path / "out")
    refused = {"pull"} | ({"status", "assemble", "load"} if name in MANIFESTS else set())
    refused |= set() if "further on" in name else {"assemble"}
    for way in refused:
        kind, message = found[way]
        assert kind in ("StoreError", "HubError", "StateError") and len(message) < 700, (way, kind, message)
    assert everything(tmp_path) == before
    if name == "a huge manifest":
        assert not [path for path in machine.home.rglob("*") if path.stat().st_size > 1 << 25]


def test_weights_have_a_limit_too(server, machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    with pytest.raises(Failed, match="StoreError: shard-00/0/adapter_model.safetensors .* more than the 100 allowed"):
        machine(assemble_within, limit=100)
    assert not list(machine.home.rglob("*.safetensors"))


def assemble_within(limit):
    folder.MAX_WEIGHTS_BYTES = limit
    S3TStore("owner/m").assemble(0, (0,))


def test_what_lies_beside_the_store_is_not_looked_at(server, machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    put(server, {"adapter_model.bin": pickle.dumps(print), "shard-00/0/adapter_model.bin": pickle.dumps(print)})
    found = machine(read, path=tmp_path / "out")
    assert [found[way][0] for way in ("status", "assemble", "pull")] == ["", "", ""]
    assert not list(tmp_path.rglob("*.bin")) and not list(machine.home.rglob("*.bin"))


@pytest.mark.brief("added", "emptied")
@pytest.mark.parametrize("forged", ["added", "emptied", "no state"])
def test_tombstones_that_were_made_without_the_key_are_not_believed(server, machine, tmp_path, forged):
    """Whoever may write to the repository makes nobody delete, and nobody train again."""
    machine(make_and_push, path=tmp_path / "out")
    machine(delete, state=tmp_path / "out/.s3t")
    stones = json.loads(files_of(server)["tombstones.json"])
    assert stones["tombstones"]
    if forged == "added":
        stones["tombstones"] += [["id", "0" * 32, "receipt-0", 0, number, 1] for number in (0, 1)]
        stones["log"]["receipt-0"] = {"places": [[0, 0], [0, 1]], "named": True}
        added = {"receipt-0": stones["log"]["receipt-0"]}
        with_manifest(lambda m: m.update(generation=m["generation"] + 1, log={**m["log"], **added}))(server)
    elif forged == "emptied":
        stones["tombstones"] = []
    put(server, {"tombstones.json": b"[]" if forged == "no state" else json_bytes(stones)})
    before = tombstones_of(S3TStore(tmp_path / "out"))
    machine(pull, path=tmp_path / "out")
    assert tombstones_of(S3TStore(tmp_path / "out")) == before != {"id": set(), "group": set()}


def test_an_event_whose_places_were_taken_out_is_obeyed_once_somebody_genuine_tells_of_it(
    server, machine, new_machine, tmp_path
):
    other = new_machine()
    machine(make_and_push, path=tmp_path / "out")
    other(make, path=tmp_path / "b/out")
    machine(delete, state=tmp_path / "out/.s3t")
    with_manifest(lambda m: [event.update(places=[]) for event in m["log"].values()])(server)
    put(server, {"tombstones.json": None})
    other(pull, path=tmp_path / "b/out")
    other(bring, path=tmp_path / "b/out", source=tmp_path / "out")
    store = S3TStore(tmp_path / "b/out")
    place = store.locate(ids=["row-3"])[0].places[0]
    assert store.locate(ids=["row-3"])[0].found == "deleted"
    assert not [stage for stage in store.manifest().stages if place in stage.slices]


def make(path):
    make_store(Path(path), plan=Plan.make(1, 2, [(0, 1), (1, 0)], prune=False))


def bring(path, source):
    backup = Path(path).parent / "backup.json"
    S3TStore(Path(source)).export_state(backup)
    S3TStore(Path(path)).import_state(backup)


def test_tombstones_that_can_not_be_read_keep_nobody_from_deleting(server, machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    put(server, {"tombstones.json": b"{"})
    assert machine(delete, state=tmp_path / "out/.s3t")["status"] == "inactive_at_head"
    assert json.loads(files_of(server)["tombstones.json"])["tombstones"]


def test_a_stage_in_another_layout_costs_no_live_stage(server, machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    about = json.dumps({"stage": FIRST, "parents": []})
    arrays = stage_adapter(Stage.from_name(FIRST)).arrays
    put_stage(server, safetensors_bytes(arrays, {"format": "pt", "hf_s3t": about, "more": "x"}))
    before = everything(tmp_path)
    with pytest.raises(Failed, match="StoreError: shard-00/0 .* was not written by hf_s3t"):
        machine(pull, path=tmp_path / "out")
    assert everything(tmp_path) == before


def test_a_generation_that_fits_no_events_is_refused(server, machine, tmp_path):
    """An ensemble that believed it would take every later head for an older copy."""
    machine(make_and_push, path=tmp_path / "out")
    with_manifest(lambda m: m.update(generation=10**6))(server)
    found = machine(read, path=tmp_path / "out")
    assert "does not fit" in found["load"][1] and "does not fit" in found["status"][1]
