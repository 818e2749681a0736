"""A store on the Hub: what is pushed, what is downloaded, what stock PEFT makes of it, a deletion from far away."""

import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, scan_cache_dir

from conftest import REPOSITORY
from hf_s3t import S3TEnsemble, S3TStore, Stage
from hf_s3t.hub import repo as hub
from hf_s3t.seams.hub import http_library
from hf_s3t.serving import loading
from machines import OFF, Failed
from served import SHAPES, copy, inputs_of
from stores import KEY, index_of, make_store, people
from trainers import BASES, batch, logits, make_trainer

pytest_plugins = ["hub_fixtures"]

HTTP = http_library()


@pytest.fixture
def newcomer(new_machine):
    """A machine that has nothing of it yet."""
    return new_machine()


# What machines are told


def make_and_push(path, repo="owner/m", store=None, **how):
    return make_store(Path(path), **(store or {})).push(repo, **how).oid


def push(path, repo="owner/m", **how):
    return S3TStore(path).push(repo, **how).oid


def delete(repo="owner/m", state=None, key=None, **request):
    request["slices"] = [tuple(place) for place in request.get("slices", ())]
    return S3TStore(repo, key, state=state).delete(**request).to_json()


def status(repo="owner/m", state=None):
    return S3TStore(repo, state=state).status().to_json()


def cached():
    """Names of the files in the cache, without their revision."""
    found = (path for path in Path(constants.HF_HUB_CACHE).glob("*/snapshots/*/**/*") if not path.is_dir())
    return sorted({"/".join(path.parts[path.parts.index("snapshots") + 2 :]) for path in found})


def assemble(repo="owner/m", revision=None):
    store = S3TStore(repo, revision=revision)
    served = store.served()
    return {str(shard): list(store.assemble(shard, prefix).tensors) for shard, prefix in served.items()}


def train_and_push(path, base="llama", repo="owner/m", **changes):
    trainer = make_trainer(path, base=base, args={"push_to_hub": True, "hub_model_id": repo, **changes})
    trainer.train()
    info = trainer.push_to_hub()
    return {"oid": info.oid, "url": info.commit_url, "kind": type(info).__name__}


def answers(path, base="llama", repo="owner/m"):
    """Largest differences between the served model here and what others load from the repository."""
    from peft import PeftModel

    build, rows, _ = BASES[base]
    inputs = batch(rows(24))
    expected = logits(S3TEnsemble.from_pretrained(Path(path), build()), inputs)
    store = S3TStore(path)
    first = Stage(0, store.served()[0]).path[0]
    store.export(Path(path).parent / "first", prefix=first)
    alone = logits(PeftModel.from_pretrained(build(), str(Path(path).parent / "first")), inputs)
    return {
        "ensemble": (logits(S3TEnsemble.from_pretrained(repo, build()), inputs) - expected).abs().max().item(),
        "root": (logits(PeftModel.from_pretrained(build(), repo), inputs) - expected).abs().max().item(),
        "stage": (logits(PeftModel.from_pretrained(build(), repo, subfolder=first.name), inputs) - alone)
        .abs()
        .max()
        .item(),
        "base": (logits(build(), inputs) - expected).abs().max().item(),
    }


def rank_groups(path, repo="owner/m"):
    """Pushes a store, deletes from the repository and pulls; ranks and largest differences, here and there."""
    from peft import PeftModel

    build, inputs = SHAPES["llama-rank"].build, inputs_of("llama-rank")
    S3TStore(path).push(repo)
    S3TStore(repo, state=Path(path) / ".s3t").delete(slices=[(0, 1), (1, 0), (1, 2)])
    S3TStore(path).pull(repo)
    store = S3TStore(repo)
    expected = logits(S3TEnsemble.from_pretrained(Path(path), build()), inputs)
    root = logits(PeftModel.from_pretrained(build(), path), inputs)
    return {
        "ranks": [store.assemble(shard, order).config["r"] for shard, order in sorted(store.served().items())],
        "ensemble": (logits(S3TEnsemble.from_pretrained(repo, build()), inputs) - expected).abs().max().item(),
        "root": (logits(PeftModel.from_pretrained(build(), repo), inputs) - root).abs().max().item(),
        "base": (logits(build(), inputs) - expected).abs().max().item(),
    }


def contents(repository, revision="main"):
    entries = [entry for entry in repository.entries(revision).values() if not entry.folder]
    read = {e.path: repository.content(e.sha256) if e.sha256 else repository.read(e) for e in entries}
    return {path: data for path, data in read.items() if path != ".gitattributes"}


def changed(repository):
    """Paths that the newest commit changed."""
    return set(repository.git("diff", "--name-only", "main~1", "main").decode().split())


# Pushing


def test_a_push_is_one_private_commit_of_the_published_files_alone(server, machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    repository = server.repository("owner/m")
    assert [row["title"].split(" (")[0] for row in repository.log()] == ["Generation 0", "initial commit"]
    assert repository.meta["private"]
    local = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    local = {name: path.read_bytes() for name, path in local.items() if not name.startswith(".s3t/")}
    found = contents(repository)
    assert json.loads(found.pop("tombstones.json"))["tombstones"] == []
    assert found == local
    entries = repository.entries("main")
    large = [entries[path].sha256 for path in found if path.endswith(".safetensors")]
    assert None not in large and len(set(large)) == len(large) == 18 + 1


def test_nothing_of_examples_key_or_place_is_pushed(server, machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    store = S3TStore(tmp_path / "out")
    machine(delete, state=tmp_path / "out/.s3t", ids=["row-3"])
    secrets = [row[column] for row in people() for column in row] + [KEY.hex(), str(tmp_path), tmp_path.name]
    secrets += list(index_of(store))
    for row in server.repository("owner/m").log():
        for path, data in contents(server.repository("owner/m"), row["id"]).items():
            said = data.decode(errors="replace") + row["title"] + row["message"]
            assert not [secret for secret in secrets if secret in said], path


def test_pushing_again_sends_what_changed(server, machine, tmp_path):
    plan = {"trained": 16}
    first = machine(make_and_push, path=tmp_path / "out", store=plan)
    assert machine(push, path=tmp_path / "out") == first
    repository = server.repository("owner/m")
    before = repository.large()
    machine(make_and_push, path=tmp_path / "more", repo="owner/other")
    assert machine(push, path=tmp_path / "more", repo="owner/m") != first
    stages = {path.rpartition("/")[0] for path in changed(repository) if path.startswith("shard-")}
    assert len(stages) == 2 and len(repository.large() - before) in (2, 3)
    assert len(repository.log()) == 3


def test_a_repository_of_another_store_is_left_alone(server, machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    head = server.repository("owner/m").resolve("main")
    machine(make_and_push, path=tmp_path / "other", repo="owner/n", store={"key": "another key, of 16 bytes"})
    with pytest.raises(Failed, match="StoreError: The repository holds another store"):
        machine(push, path=tmp_path / "other")
    assert server.repository("owner/m").resolve("main") == head


@pytest.mark.slow
def test_rank_groups_go_through_a_repository(machine, tmp_path):
    """Pushed, deleted from there and pulled: two shards are left, of two ranks and of three."""
    found = machine(rank_groups, path=str(copy("llama-rank", tmp_path).path))
    assert found["ranks"] == [4, 6] and found["base"] > 1e-3
    assert found["ensemble"] == found["root"] == 0


def test_a_public_repository_has_no_tombstones(server, machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out", private=False)
    repository = server.repository("owner/m")
    assert not repository.meta["private"] and "tombstones.json" not in repository.entries("main")
    with pytest.raises(Failed, match="ValueError: .* is public, and no tombstones"):
        machine(push, path=tmp_path / "out", tombstones=True)
    machine(make_and_push, path=tmp_path / "more", repo="owner/n")
    repository = server.repository("owner/n")
    repository.meta["private"] = False  # since then
    machine(delete, repo="owner/n", state=tmp_path / "more/.s3t", ids=["row-3"])
    assert "tombstones.json" not in repository.entries("main")
    assert json.loads(contents(repository)["s3t.json"])["generation"] == 1


def test_a_public_repository_is_not_pushed_to_by_mistake(server, machine, tmp_path):
    machine(create, private=False)
    with pytest.raises(Failed, match="ValueError: owner/m is public.*Nothing was pushed.*`private=False`"):
        machine(make_and_push, path=tmp_path / "out")
    repository = server.repository("owner/m")
    assert set(repository.entries("main")) == {".gitattributes"}
    machine(push, path=tmp_path / "out", private=False)
    assert machine(push, path=tmp_path / "out") == repository.resolve("main")  # it was said once


def create(private, repo="owner/m"):
    HfApi().create_repo(repo, private=private)


def test_each_stage_is_uploaded_apart_from_the_others(server, new_machine, tmp_path):
    new_machine(xet=True)(make_and_push, path=tmp_path / "out")
    repository = server.repository("owner/m")
    entries = [e for e in repository.entries("main").values() if e.path.endswith(".safetensors")]
    held = {sha256: xorbs for sha256, _, xorbs, _ in repository.cas._files()}
    pools = [frozenset(held[entry.sha256]) for entry in entries]
    assert len(pools) == 19 and all(len(pool) == 1 for pool in pools) and len(set(pools)) == 19
    assert len(repository.log()) == 2


def test_a_token_that_may_not_write_changes_nothing_anywhere(server, machine, new_machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    head = server.repository("owner/m").resolve("main")
    state = tmp_path / "out/.s3t"
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file() and "write." not in path.name}
    for token, message in (("hf_reader", "No right to write"), ("hf_stranger", "no access"), ("", "no access")):
        with pytest.raises(Failed, match=message):
            new_machine(token=token)(delete, state=state, ids=["row-3"])
    after = {path: path.read_bytes() for path in state.rglob("*") if path.is_file() and "write." not in path.name}
    assert after == before and server.repository("owner/m").resolve("main") == head


# Downloading


def test_what_is_asked_decides_what_is_downloaded(server, machine, newcomer, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    assert newcomer(status)["served"] == {"shard-00/0-1-2": [0, 1, 2], "shard-01/0-1-2": [0, 1, 2]}
    assert newcomer(cached) == ["s3t.json"]
    newcomer(assemble)
    stages = [f"shard-0{shard}/{prefix}" for shard in (0, 1) for prefix in ("0", "0-1", "0-1-2")]
    names = [f"{stage}/{file}" for stage in stages for file in ("adapter_config.json", "adapter_model.safetensors")]
    assert newcomer(cached) == sorted(["s3t.json", *names])


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["offline", "no server"])
def test_what_is_cached_is_read_without_the_hub(server, machine, newcomer, new_machine, tmp_path, gone):
    machine(make_and_push, path=tmp_path / "out")
    before = newcomer(assemble)
    variables = {"HF_HUB_OFFLINE": "1"} if gone == "offline" else OFF
    again = new_machine(home=newcomer.home, **variables)
    assert again(assemble) == before
    with pytest.raises(Failed, match="StoreError|HubError"):
        again(status, repo="owner/never-seen")


@pytest.mark.parametrize("gone", [pytest.param("offline", marks=pytest.mark.slow), "no server"])
def test_without_the_hub_a_machine_does_not_go_back_to_before_its_own_deletion(
    server, machine, new_machine, tmp_path, gone
):
    machine(make_and_push, path=tmp_path / "out")
    machine(assemble)
    machine(delete, state=tmp_path / "out/.s3t", slices=[(0, 0)])
    variables = {"HF_HUB_OFFLINE": "1"} if gone == "offline" else OFF
    again = new_machine(home=machine.home, **variables)
    with pytest.raises(Failed, match="HubError: s3t.json .* is not in the cache, and the Hub cannot be reached"):
        again(assemble)
    assert machine(cache_warnings) == []
    after = machine(assemble)
    assert again(assemble) == after


def cache_warnings():
    return [str(warning) for warning in scan_cache_dir().warnings]


def test_a_revision_is_read_for_good_and_never_changed(server, machine, tmp_path):
    first = machine(make_and_push, path=tmp_path / "out")
    before = machine(assemble)
    machine(delete, state=tmp_path / "out/.s3t", slices=[(0, 0), (0, 1), (0, 2)])
    assert list(machine(assemble)) == ["1"]
    assert machine(assemble, revision=first) == before
    with pytest.raises(Failed, match="Open it without a revision"):
        machine(delete_at, revision=first, state=str(tmp_path / "out/.s3t"))


def delete_at(revision, state):
    S3TStore("owner/m", revision=revision, state=state).delete(slices=[(1, 0)])


# What others load


@pytest.mark.brief("bert")
@pytest.mark.parametrize("base", ["llama", "bert"])
def test_stock_peft_and_the_ensemble_answer_as_the_store_does(server, machine, newcomer, tmp_path, base):
    pushed = machine(train_and_push, path=tmp_path / "out", base=base)
    repository = server.repository("owner/m")
    assert pushed["kind"] == "CommitInfo" and pushed["oid"] == repository.resolve("main")
    assert pushed["url"].endswith(f"/owner/m/commit/{pushed['oid']}") and repository.meta["private"]
    assert not [
        path for path in repository.entries("main") if re.search("optim|scheduler|rng|training_args|s3t/", path)
    ]
    found = newcomer(answers, path=tmp_path / "out", base=base)
    assert found.pop("base") > 1e-3
    assert found == {"ensemble": 0.0, "root": 0.0, "stage": 0.0}


def test_the_hubs_own_snippet_and_the_cards_lines_work(server, machine, newcomer, tmp_path):
    machine(train_with_base, path=tmp_path / "out")
    assert newcomer(run_snippets) == {"hub": 0.0, "card": 0.0, "prefix": 0.0}
    card = contents(server.repository("owner/m"))["README.md"].decode()
    assert "base_model: owner/base" in card and "library_name: peft" in card


def train_with_base(path):
    model = BASES["llama"][0]()
    model.push_to_hub("owner/base", private=True)
    trainer = make_trainer(path, base_model_id="owner/base", args={"hub_model_id": "owner/m"})
    trainer.train()
    future = trainer.push_to_hub(blocking=False, commit_message="First")
    assert future.result().commit_message.startswith("First")


def run_snippets():
    import transformers
    from huggingface_hub import ModelCard, snapshot_download
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    inputs = batch(BASES["llama"][1](24))
    expected = logits(S3TEnsemble.from_pretrained("owner/m"), inputs)
    base_model = AutoModelForCausalLM.from_pretrained("owner/base")
    hub = logits(PeftModel.from_pretrained(base_model, "owner/m"), inputs)
    blocks = re.findall(r"```python\n(.*?)```", ModelCard.load("owner/m").text, re.S)
    assert len(blocks) == 3
    found = []
    for block in blocks[1:]:
        scope = {"transformers": transformers}
        exec(blocks[0], scope)
        scope["store"] = snapshot_download("owner/m")
        exec(block, scope)
        found.append(logits(scope["model"], inputs))
    differences = {"hub": hub, "card": found[0], "prefix": found[1]}
    return {name: (value - expected).abs().max().item() for name, value in differences.items()}


def test_saving_pushes_where_the_arguments_say_so(server, machine, newcomer, tmp_path):
    machine(save_at_the_end, path=tmp_path / "out")
    repository = server.repository("owner/m")
    assert [row["title"].split(" (")[0] for row in repository.log()] == ["Model save", "initial commit"]
    head = repository.resolve("main")
    machine(delete, state=tmp_path / "out/.s3t", slices=[(0, 0)])
    assert newcomer(members, revision=head) == ["shard-00"] and newcomer(members, revision=None) == []


def save_at_the_end(path):
    trainer = make_trainer(path, args={"push_to_hub": True, "hub_model_id": "owner/m", "hub_strategy": "end"})
    trainer.train()
    trainer.save_model(str(Path(path).parent / "copy"))


def members(revision):
    return S3TEnsemble.from_pretrained(S3TStore("owner/m", revision=revision), BASES["llama"][0]()).members


@pytest.mark.slow
def test_revision_token_and_state_are_the_stores_not_the_bases(server, machine, new_machine, tmp_path):
    first, state = machine(make_and_push, path=tmp_path / "out"), str(tmp_path / "out/.s3t")
    machine(delete, state=state, slices=[(0, 0), (0, 1), (0, 2)])
    stranger = new_machine(token="")
    found = stranger(opened, how={"revision": first, "token": server.token, "state": state, "dtype": "float32"})
    assert found == {"revision": first, "token": server.token, "private": state, "base": {"dtype": "float32"}}
    found = machine(opened, how={})
    assert found["revision"] == server.repository("owner/m").resolve("main") and found["base"] == {}


def opened(how):
    """What a store was opened with, and what was left for its base."""
    found = {}

    def load_base(store, base, **kwargs):
        source = store.source
        found.update(revision=source.revision, token=source.repo.api.token, private=str(store.private), base=kwargs)
        raise KeyboardInterrupt

    loading.load_base = load_base
    try:
        S3TEnsemble.from_pretrained("owner/m", **how)
    except KeyboardInterrupt:
        return found


def test_ways_of_pushing_that_would_leave_out_the_store_are_refused(machine, server, tmp_path):
    with pytest.raises(Failed, match="ValueError: .*main branch"):
        machine(push_to_branch, path=tmp_path / "out")
    with pytest.raises(Failed, match="ValueError: .*hub_strategy"):
        machine(train_and_push, path=tmp_path / "out2", hub_strategy="all_checkpoints", save_strategy="epoch")


def push_to_branch(path):
    make_trainer(path, args={"hub_model_id": "owner/m"}).push_to_hub(revision="dev")


# Deleting from far away


def test_a_deletion_is_one_commit_that_removes_the_stages(server, machine, newcomer, tmp_path):
    first = machine(make_and_push, path=tmp_path / "out")
    place = machine(locate, state=tmp_path / "out/.s3t", name="row-3")
    receipt = machine(delete, state=tmp_path / "out/.s3t", ids=["row-3"])
    repository = server.repository("owner/m")
    head = repository.resolve("main")
    assert [row["title"] for row in repository.log()][0] == f"Deletion {receipt['receipt']}"
    assert len(repository.log()) == 3
    manifest = json.loads(contents(repository)["s3t.json"])
    gone = {name for name in receipt["stages_removed"]}
    assert gone and all(tuple(place) in Stage.from_name(name).slices for name in gone)
    event = {"named": True, "places": [list(place)], "receipts": [receipt["digest"]]}  # all that is told of a receipt
    assert manifest["log"] == {receipt["receipt"]: event}
    assert not gone & set(manifest["stages"]) and manifest["generation"] == 1
    assert not [path for path in repository.entries("main") if path.startswith(tuple(f"{name}/" for name in gone))]
    assert changed(repository) - {"adapter_config.json"} == {
        *(f"{name}/{file}" for name in gone for file in ("adapter_config.json", "adapter_model.safetensors")),
        "README.md", "s3t.json", "tombstones.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert receipt["status"] == "inactive_at_head" and receipt["still_served_at"] == [first]
    assert not any(name in contents(repository)["README.md"].decode() for name in gone)
    assert newcomer(status)["trained"] == 18 - len(gone) and head != first
    again = machine(delete, state=tmp_path / "out/.s3t", ids=["row-3"])
    assert again["status"] == "unchanged" and repository.resolve("main") == head


def locate(state, name, repo="owner/m"):
    return S3TStore(repo, state=state).locate(ids=[name])[0].places[0]


def test_without_a_state_slices_can_be_deleted_and_ids_can_not(server, machine, newcomer, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    for key in (None, KEY.hex()):
        with pytest.raises(Failed, match=r"(?s)StateError: .*`state=`.*HF_S3T_STATE.*delete\(slices=\.\.\.\)"):
            newcomer(delete, ids=["row-3"], key=key)
    assert len(server.repository("owner/m").log()) == 2
    receipt = newcomer(delete, slices=[(0, 1)])
    manifest = json.loads(contents(server.repository("owner/m"))["s3t.json"])
    assert receipt["status"] == "inactive_at_head" and manifest["generation"] == 1
    assert not any((0, 1) in Stage.from_name(name).slices for name in manifest["stages"])


def test_the_environment_may_name_the_state(server, machine, new_machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    assert new_machine(HF_S3T_STATE=str(tmp_path / "out/.s3t"))(delete, ids=["row-3"])["found"] == 1


def test_a_listing_in_pages_is_read_whole(server, machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    server.faults.page_size = 2
    machine(delete, state=tmp_path / "out/.s3t", slices=[(0, 0), (0, 1), (0, 2)])
    assert not [path for path in server.repository("owner/m").entries("main") if path.startswith("shard-00")]


# The machines themselves


def test_machines_run_this_trees_code_and_share_no_cache_and_no_memory(server, machine, newcomer):
    found = [each(where, note=number) for number, each in enumerate((machine, newcomer, machine))]
    for each, (file, cache, seen, noted) in zip((machine, newcomer, machine), found, strict=True):
        assert Path(file).is_relative_to(REPOSITORY)
        assert seen and not noted and cache == str(each.home / "hub")
    assert machine.home != newcomer.home


def where(note):
    import hf_s3t

    noted, hf_s3t.note = hasattr(hf_s3t, "note"), note
    return hf_s3t.__file__, os.path.abspath(constants.HF_HUB_CACHE), os.environ["HF_TOKEN"] == "hf_owner", noted


# Several threads, and answers that are lost


def removed(server):
    """Generation of the head, and the places of which nothing is there."""
    repository = server.repository("owner/m")
    manifest = json.loads(contents(repository)["s3t.json"])
    folders = {path.rpartition("/")[0] for path in repository.entries("main") if path.endswith("model.safetensors")}
    assert folders - {""} == set(manifest["stages"])
    there = {place for name in manifest["stages"] for place in Stage.from_name(name).slices}
    return manifest["generation"], {(shard, slice_id) for shard in range(2) for slice_id in range(3)} - there


@pytest.mark.brief("somebody else deletes meanwhile-marks")
@pytest.mark.parametrize("look", ["status", "marks"])
@pytest.mark.parametrize("other", [False, True], ids=["", "somebody else deletes meanwhile"])
def test_a_thread_that_looks_does_not_change_what_another_commits(server, machine, tmp_path, look, other):
    machine(make_and_push, path=tmp_path / "out")
    found = machine(delete_while_others_look, state=tmp_path / "out/.s3t", look=look, other=other)
    assert found["status"] == "inactive_at_head" and found["waited"] == [False]
    # The other one's, which named nobody, is followed by one that names those whom it hit.
    assert removed(server) == ((3, {(0, 0), (1, 1)}) if other else (1, {(0, 0)}))
    assert not any((0, 0) in Stage.from_name(name).slices for name in found["live"])


def delete_while_others_look(state, look, other):
    store = S3TStore("owner/m", state=state)
    publish, waited = store.source.publish, []

    def look_first(*how):
        store.source.publish = publish
        if other:
            S3TStore("owner/m", state=Path(state).parent / "none").delete(slices=[(1, 1)])

        def act():
            getattr(store, look)()
            waited.append(bool(store.source.waiting))

        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
        return publish(*how)

    store.source.publish = look_first
    receipt = store.delete(slices=[(0, 0)])
    live = [stage.name for stage in store.live().stages]
    return {"status": receipt.status, "waited": waited, "live": live}


def test_two_threads_that_delete_come_one_after_the_other(server, machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    machine(delete_in_threads, state=tmp_path / "out/.s3t", places=[(0, 0), (0, 1), (1, 2)])
    assert removed(server) == (3, {(0, 0), (0, 1), (1, 2)})


def delete_in_threads(state, places):
    store = S3TStore("owner/m", state=state)
    with ThreadPoolExecutor(4) as pool:
        looks = [pool.submit(store.status) for _ in range(3)]
        done = [pool.submit(store.delete, slices=[tuple(place)]) for place in places]
        assert [change.result().status for change in done] == ["inactive_at_head"] * len(places)
        assert all(look.result() for look in looks)


def test_a_head_that_was_asked_for_before_a_commit_is_not_read_after_it(server, machine, tmp_path):
    machine(make_and_push, path=tmp_path / "out")
    assert not any((0, 0) in Stage.from_name(name).slices for name in machine(look_late, state=tmp_path / "out/.s3t"))


def look_late(state):
    """What a thread reads that asked for the head before another one's deletion, and was answered after it."""
    store, gate, asked = S3TStore("owner/m", state=state), threading.Event(), threading.Event()
    head = store.source.repo.head

    def late(revision=None):
        found = head(revision)
        if threading.current_thread() is reader and not gate.is_set():
            asked.set()
            gate.wait(30)
        return found

    reader = threading.Thread(target=store.status)
    store.source.repo.head = late
    reader.start()
    assert asked.wait(30)
    store.delete(slices=[(0, 0)])
    gate.set()
    reader.join()
    return [stage.name for stage in store.live().stages]


@pytest.mark.brief("ConnectError-False", "ReadTimeout-True")
@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("error", ["ReadTimeout", "ConnectError"])
def test_a_commit_whose_connection_broke_is_made_once(server, machine, tmp_path, error, arrives):
    machine(make_and_push, path=tmp_path / "out")
    receipt = machine(delete_over_a_bad_line, state=tmp_path / "out/.s3t", error=error, arrives=arrives)
    assert receipt["status"] == "inactive_at_head" and removed(server) == (1, {(0, 0)})
    assert len(server.repository("owner/m").log()) == 3


def delete_over_a_bad_line(state, error, arrives, for_good=False):
    hub.SETTLING_SECONDS = 0.01
    names = ["create_commit", *(["list_repo_commits", "list_repo_refs"] if for_good else [])]
    real = {name: getattr(HfApi, name) for name in names}

    def broken(self, *args, **kwargs):
        if arrives:
            real["create_commit"](self, *args, **kwargs)
        if not for_good:  # what arrived is asked for, not sent again
            HfApi.create_commit = None if arrives else real["create_commit"]
        for name in names[1:]:
            setattr(HfApi, name, unreachable)
        raise getattr(HTTP, error)("the line broke")

    def unreachable(*args, **kwargs):
        raise HTTP.ConnectError("no line")

    HfApi.create_commit = broken
    return S3TStore("owner/m", state=state).delete(slices=[(0, 0)]).to_json()


@pytest.mark.brief("True")
@pytest.mark.parametrize("arrives", [True, False])
def test_where_the_hub_stays_away_the_deletion_is_carried_out_by_the_next_command(server, machine, tmp_path, arrives):
    machine(make_and_push, path=tmp_path / "out")
    state = tmp_path / "out/.s3t"
    with pytest.raises(Failed, match=r"HubError: owner/m could not be reached .* Whether it arrived is not known"):
        machine(delete_over_a_bad_line, state=state, error="ReadTimeout", arrives=arrives, for_good=True)
    assert removed(server)[0] == int(arrives)
    machine(delete, state=state, slices=[(1, 1)])
    assert removed(server) == (2, {(0, 0), (1, 1)}) and not list((state / "intents").glob("*"))
