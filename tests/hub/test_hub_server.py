"""The Hub of the tests, asked by the real client: what it keeps, what it forgets, what it does wrong on request."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, hf_hub_url
from huggingface_hub.utils import get_session, paginate

from hub_server import Faults, HubError, ask, start

FILES = {
    "s00/adapter_model.safetensors": "weights of s00",
    "s01/adapter_model.safetensors": "weights of s01",
    "s00/adapter_config.json": "config of s00",
    "README.md": "# A model",
}
WEIGHTS = "s00/adapter_model.safetensors"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with start(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def server(running):
    """The one server, with every switch off, and nothing in it."""
    yield running
    vars(running.faults).update(vars(Faults()))
    for name in list(running.hub.repositories):
        running.hub.delete(name)


def seed(server, files=FILES, name="owner/model", private=True):
    """A repository with one commit, without a client."""
    server.hub.create("owner", name.removeprefix("owner/"), private)
    repository, changes = server.repository(name), {}
    for path, text in files.items():
        changes[path] = text.encode()
        if path.endswith(".safetensors"):
            repository.store(sha256(text), text.encode())
            changes[path] = repository.pointer(sha256(text), len(text), path)
    repository.commit("refs/heads/main", repository.resolve("main"), "owner", "push", changes)
    return repository


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


# What the client runs in its own process


def push(api, files):
    api.create_repo("owner/model", private=True)
    api.create_repo("owner/model", private=True, exist_ok=True)
    operations = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
    return api.create_commit("owner/model", operations, commit_message="push", commit_description="more").oid


def download(api, **arguments):
    from pathlib import Path

    folder = Path(api.snapshot_download("owner/model", **arguments))
    one = Path(api.hf_hub_download("owner/model", "README.md", **arguments))
    assert one.parent == folder
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    return {path: text for path, text in found.items() if path != ".gitattributes"}


def served(api, revisions, paths):
    """The status of every path at every revision, with redirects followed."""
    answers = {}
    for revision in revisions:
        for path in paths:
            url = hf_hub_url("owner/model", path, revision=revision)
            answer = get_session().get(url, headers=api._build_hf_headers(), follow_redirects=True)
            answers.setdefault(revision, []).append(answer.status_code)
    return answers


def purge(api, start):
    api.permanently_delete_lfs_files(
        "owner/model", [file for file in api.list_lfs_files("owner/model") if file.filename.startswith(start)]
    )


# Commits


def test_one_commit_holds_many_files_and_they_come_back_equal(server, tmp_path):
    head = ask(server, tmp_path / "writer", push, files=FILES)
    repository = server.repository("owner/model")
    assert [(row["title"], row["message"]) for row in repository.log()] == [("push", "more"), ("initial commit", "")]
    assert repository.refs() == {"refs/heads/main": head}
    assert repository.large() == {sha256(FILES[path]) for path in FILES if path.endswith(".safetensors")}
    assert ask(server, tmp_path / "reader", download) == FILES
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert ask(server, tmp_path / "reader", download, variables=offline) == FILES


def test_a_commit_on_a_stale_parent_or_of_what_is_not_there_is_refused(server, tmp_path):
    repository = seed(server)
    head = repository.resolve("main")

    def refused(api, head):
        from huggingface_hub.errors import HfHubHTTPError

        stale = api.list_repo_commits("owner/model")[-1].commit_id
        found = []
        for operation, revision, parent in (
            (CommitOperationDelete("s00/", is_folder=True), "main", stale),
            (CommitOperationDelete("s07/", is_folder=True), "main", head),
            (CommitOperationDelete("s00/", is_folder=True), "nowhere", None),
            (CommitOperationDelete("s00/", is_folder=True), "main", head),
        ):
            try:
                api.create_commit(
                    "owner/model", [operation], commit_message="delete", revision=revision, parent_commit=parent
                )
                found.append("done")
            except HfHubHTTPError as error:
                found.append([type(error).__name__, error.response.status_code])
        return found

    assert ask(server, tmp_path, refused, head=head) == [
        ["HfHubHTTPError", 412],
        ["RemoteEntryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        "done",
    ]
    assert [row["title"] for row in repository.log()] == ["delete", "push", "initial commit"]
    assert [path for path in repository.entries("main") if path.startswith("s00")] == []


def test_writers_at_the_same_time_lose_no_commit(server, tmp_path):
    repository = seed(server)

    def write(api):
        from concurrent.futures import ThreadPoolExecutor

        from huggingface_hub.errors import HfHubHTTPError

        def one(number):
            for attempt in range(50):
                head = api.repo_info("owner/model").sha
                addition = CommitOperationAdd(f"{number}.txt", str(number).encode())
                try:
                    api.create_commit("owner/model", [addition], commit_message="one", parent_commit=head)
                    return attempt
                except HfHubHTTPError as error:
                    assert error.response.status_code == 412
            raise AssertionError("50 attempts were not enough")

        with ThreadPoolExecutor(4) as pool:
            return sum(pool.map(one, range(4)))

    assert ask(server, tmp_path, write) >= 0
    assert len(repository.log()) == 6 and {"0.txt", "1.txt", "2.txt", "3.txt"} <= set(repository.entries("main"))


# Refs and lists


def test_tags_branches_and_pull_requests(server, tmp_path):
    repository = seed(server)
    head = repository.resolve("main")

    def refs(api):
        from huggingface_hub.errors import HfHubHTTPError

        api.create_tag("owner/model", tag="v1")
        api.create_tag("owner/model", tag="v/2", tag_message="annotated")
        api.create_branch("owner/model", branch="dev/x")
        addition = CommitOperationAdd("proposed.txt", b"new")
        opened = api.create_commit("owner/model", [addition], commit_message="propose", create_pr=True)
        assert opened.pr_revision == "refs/pr/1", opened
        url = f"{api.endpoint}/api/models/owner/model/discussions/1/ref"
        found = [get_session().delete(url, headers=api._build_hf_headers()).status_code]
        for again, arguments in ((api.create_tag, {"tag": "v1"}), (api.create_branch, {"branch": "dev/x"})):
            try:
                again("owner/model", **arguments)
            except HfHubHTTPError as error:
                found.append(error.response.status_code)
        listed = api.list_repo_refs("owner/model", include_pull_requests=True)
        kinds = (listed.branches, listed.tags, listed.pull_requests)
        names = [{ref.name: ref.target_commit for ref in kind} for kind in kinds]
        at_pull_request = api.list_repo_files("owner/model", revision="refs/pr/1")
        assert api.list_repo_files("owner/model", revision="dev/x") == api.list_repo_files("owner/model")
        assert [row.num for row in api.get_repo_discussions("owner/model", discussion_status="open")] == [1]
        api.change_discussion_status("owner/model", 1, "closed")
        assert api.get_discussion_details("owner/model", 1).status == "closed"
        found.append(get_session().delete(url, headers=api._build_hf_headers()).status_code)
        api.delete_tag("owner/model", tag="v1")
        api.delete_branch("owner/model", branch="dev/x")
        return found, names, at_pull_request

    statuses, names, at_pull_request = ask(server, tmp_path, refs)
    assert statuses == [400, 409, 409, 200]
    assert names[:2] == [{"dev/x": head, "main": head}, {"v/2": head, "v1": head}] and list(names[2]) == ["1"]
    assert set(at_pull_request) == {".gitattributes", "proposed.txt", *FILES}
    assert repository.refs() == {"refs/heads/main": head, "refs/tags/v/2": head}


def test_lists_come_in_pages(server, tmp_path):
    repository = seed(server)
    server.faults.page_size = 2

    def lists(api):
        tree = [entry.path for entry in api.list_repo_tree("owner/model", recursive=True)]
        below = [entry.path for entry in api.list_repo_tree("owner/model", "s00")]
        infos = [entry.path for entry in api.get_paths_info("owner/model", ["s00", "README.md", "nothing"])]
        large = [file.filename for file in api.list_lfs_files("owner/model")]
        return tree, below, infos, large, [row.title for row in api.list_repo_commits("owner/model")]

    tree, below, infos, large, commits = ask(server, tmp_path, lists)
    assert tree == list(repository.entries("main")) and len(tree) == 7
    assert below == ["s00/adapter_config.json", WEIGHTS] and infos == ["s00", "README.md"]
    assert large == [WEIGHTS, "s01/adapter_model.safetensors"] and commits == ["push", "initial commit"]


# What is still served after a deletion


def delete_and_squash(api):
    api.create_commit("owner/model", [CommitOperationDelete("s00/", is_folder=True)], commit_message="delete")
    api.super_squash_history("owner/model")


PATHS = [WEIGHTS, "s00/adapter_config.json", "s01/adapter_model.safetensors"]


def test_the_table_of_what_is_served_after_each_step(server, tmp_path):
    repository = seed(server)
    old = repository.resolve("main")

    def steps(api, old, paths):
        addition = CommitOperationAdd("proposed.txt", b"new")
        api.create_tag("owner/model", tag="v1")
        api.create_commit("owner/model", [addition], commit_message="propose", create_pr=True)
        api.create_commit("owner/model", [CommitOperationDelete("s00/", is_folder=True)], commit_message="d")

        def look():
            found = {}
            for revision in (old, "v1", "refs/pr/1", "main"):
                for path in paths:
                    url = hf_hub_url("owner/model", path, revision=revision)
                    answer = get_session().get(url, headers=api._build_hf_headers(), follow_redirects=True)
                    found.setdefault("old" if revision == old else revision, []).append(answer.status_code)
            return found

        seen = [look()]
        api.super_squash_history("owner/model")
        seen.append(look())
        victims = [file for file in api.list_lfs_files("owner/model") if file.filename.startswith("s00/")]
        api.permanently_delete_lfs_files("owner/model", victims)
        return [*seen, look(), [file.filename for file in api.list_lfs_files("owner/model")]]

    deleted, squashed, purged, left = ask(server, tmp_path, steps, old=old, paths=PATHS)
    everything, without, plain = [200, 200, 200], [404, 404, 200], [404, 200, 200]
    assert deleted == {"old": everything, "v1": everything, "refs/pr/1": everything, "main": without}
    assert squashed == deleted
    assert purged == {"old": [404, 404, 404], "v1": plain, "refs/pr/1": plain, "main": without}
    assert left == ["s01/adapter_model.safetensors"]
    assert repository.large() == {sha256(FILES["s01/adapter_model.safetensors"])}
    assert {path.name for path in (repository.path / "lfs").iterdir()} == repository.large()
    assert len(repository.log("main")) == 1 and len(repository.log("v1")) == 2
    assert repository.git("show", "main:s01/adapter_model.safetensors").startswith(b"version https://git-lfs")


@pytest.mark.parametrize("gc", ["eager", "lazy"])
def test_a_commit_that_no_ref_reaches_is_served_until_it_is_collected(server, tmp_path, gc):
    repository = seed(server)
    old = repository.resolve("main")
    server.faults.gc = gc
    ask(server, tmp_path, delete_and_squash)
    assert ask(server, tmp_path, served, revisions=[old], paths=PATHS[:2])[old] == [200 if gc == "lazy" else 404] * 2
    assert sha256(FILES[WEIGHTS]) in repository.large()
    repository.purge({sha256(FILES[WEIGHTS])}, rewrite=True)
    assert ask(server, tmp_path, served, revisions=[old], paths=PATHS[:2])[old] == [404, 200 if gc == "lazy" else 404]
    repository.collect(at_once=True)
    with pytest.raises(HubError, match="Invalid rev id"):
        repository.resolve(old)


def test_a_purge_takes_every_file_with_the_same_bytes(server, tmp_path):
    repository = seed(server, {"s00/a.safetensors": "same", "s01/a.safetensors": "same", "s02/a.safetensors": "other"})
    ask(server, tmp_path, purge, start="s00/")
    assert [path for path in repository.entries("main") if path.endswith(".safetensors")] == ["s02/a.safetensors"]


def test_a_purge_without_a_rewrite_leaves_the_pointer_and_no_bytes(server, tmp_path):
    repository = seed(server)
    head = repository.resolve("main")
    repository.purge({sha256(FILES[WEIGHTS])}, rewrite=False)
    assert repository.resolve("main") == head and repository.entries("main")[WEIGHTS].sha256 == sha256(FILES[WEIGHTS])
    assert ask(server, tmp_path, served, revisions=["main"], paths=PATHS)["main"] == [404, 200, 200]


def test_the_edge_goes_on_serving_what_it_has_served(server):
    repository = seed(server)
    address = server.hub.signed("GET", "owner/model", sha256(FILES[WEIGHTS]))
    server.faults.cdn_ttl = 1000
    assert status(address) == 200
    repository.purge({sha256(FILES[WEIGHTS])}, rewrite=True)
    assert status(address) == 200
    server.faults.cdn_ttl = 0
    assert status(address) == 404 and status(address[:-1]) == 403


def status(address):
    try:
        with urllib.request.urlopen(address) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_purge_may_settle_late(server, tmp_path):
    repository = seed(server)
    server.faults.purge_delay = 1000
    ask(server, tmp_path, purge, start="s00/")
    assert ask(server, tmp_path, served, revisions=["main"], paths=[WEIGHTS])["main"] == [200]
    repository.settle(at_once=True)
    assert ask(server, tmp_path, served, revisions=["main"], paths=[WEIGHTS])["main"] == [404]


# What else goes wrong


def test_the_head_may_be_read_as_it_was_before_a_squash(server, tmp_path):
    repository = seed(server)
    old = repository.resolve("main")
    server.faults.stale_main = 2

    def squash(api):
        api.super_squash_history("owner/model")
        refs = api.list_repo_refs("owner/model").branches[0].target_commit
        return refs, [api.repo_info("owner/model", revision="main").sha for _ in range(3)]

    refs, heads = ask(server, tmp_path, squash)
    assert refs == repository.resolve("main") != old and heads == [old, old, refs]


def test_a_commit_may_be_made_and_its_answer_lost(server, tmp_path):
    repository = seed(server)
    server.faults.set(commit_503_after_apply=1, fail_commits_412=1)

    def delete(api):
        from huggingface_hub.errors import HfHubHTTPError

        found = []
        for path in ("s00/", "s00/", "s01/"):
            operation = CommitOperationDelete(path, is_folder=True)
            try:
                api.create_commit("owner/model", [operation], commit_message=f"delete {path}")
                found.append(200)
            except HfHubHTTPError as error:
                found.append(error.response.status_code)
        return found

    assert ask(server, tmp_path, delete) == [412, 503, 200]
    assert [row["title"] for row in repository.log()][:3] == ["delete s01/", "delete s00/", "push"]


def test_large_files_may_be_listed_without_a_name(server, tmp_path):
    seed(server)
    server.faults.lfs_filename_missing = True

    def names(api):
        url = f"{api.endpoint}/api/models/owner/model/lfs-files"
        rows = list(paginate(url, params={}, headers=api._build_hf_headers()))
        try:
            return list(api.list_lfs_files("owner/model")) and []
        except KeyError as error:
            return [str(error), [sorted(row) for row in rows]]

    error, keys = ask(server, tmp_path, names)
    assert error == "'filename'" and keys == [["fileOid", "oid", "pushedAt", "ref", "size"]] * 2


def test_who_may_do_what(server, tmp_path):
    seed(server)

    def attempts(api):
        from huggingface_hub.errors import HfHubHTTPError

        found = [api.repo_exists("owner/model")]
        for attempt in (
            lambda: api.list_repo_files("owner/model"),
            lambda: api.create_tag("owner/model", tag="v1"),
            lambda: api.create_repo("owner/other"),
            lambda: api.delete_repo("owner/model"),
        ):
            try:
                attempt()
                found.append("done")
            except HfHubHTTPError as error:
                found.append([type(error).__name__, error.response.status_code])
        return found

    hidden, refused = ["RepositoryNotFoundError", 404], ["HfHubHTTPError", 403]
    nobody = [["RepositoryNotFoundError", 401]] * 2 + [["HfHubHTTPError", 401]] * 2
    for token, answers in {
        server.stranger_token: [False, hidden, hidden, refused, hidden],
        server.reader_token: [True, "done", refused, refused, refused],
        "": [False, *nobody],
        server.token: [True, "done", "done", "done", "done"],
    }.items():
        assert ask(server, tmp_path / token, attempts, token=token) == answers, token
    assert server.hub.repositories.keys() == {"owner/other"}


def test_anybody_reads_a_public_repository_and_only_its_owner_writes(server, tmp_path):
    repository = seed(server)

    def publish(api):
        api.update_repo_settings("owner/model", private=False)

    def tag(api):
        from huggingface_hub.errors import HfHubHTTPError

        try:
            api.create_tag("owner/model", tag="v1")
        except HfHubHTTPError as error:
            return error.response.status_code

    ask(server, tmp_path / "owner", publish)
    assert ask(server, tmp_path / "nobody", download, token="") == FILES
    assert ask(server, tmp_path / "stranger", tag, token=server.stranger_token) == 403
    assert list(repository.refs()) == ["refs/heads/main"]


def test_answers_may_be_late(server):
    server.faults.latency = 0.3
    began = time.monotonic()
    assert status(f"{server.endpoint}/_faults") == 200 and time.monotonic() - began >= 0.3


def test_git_clones_the_repository_and_git_lfs_its_large_files(server, tmp_path):
    repository = seed(server)
    old = repository.resolve("main")
    address = server.endpoint.replace("//", f"//owner:{server.token}@") + "/owner/model"
    with_lfs = shutil.which("git-lfs") is not None
    environment = dict(os.environ) | {
        "GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "NO_PROXY": "127.0.0.1,localhost",
    }

    def git(*arguments):
        return subprocess.run(["git", *arguments], env=environment, capture_output=True, text=True)

    if with_lfs:
        assert git("lfs", "install").returncode == 0
    clone = tmp_path / "clone"
    run = git("clone", address, str(clone))
    assert run.returncode == 0, run.stderr
    assert git("-C", str(clone), "rev-parse", "HEAD").stdout.strip() == old
    if with_lfs:
        assert (clone / WEIGHTS).read_text() == FILES[WEIGHTS]
    assert git("clone", server.endpoint + "/owner/model", str(tmp_path / "stranger")).returncode != 0
    repository.purge({sha256(FILES[WEIGHTS])}, rewrite=True)
    assert "not our ref" in git("-C", str(clone), "fetch", "origin", old, "--refetch").stderr
    assert git("-C", str(clone), "fetch", "origin").returncode == 0
    assert git("-C", str(clone), "ls-tree", "origin/main", "s00/").stdout.count("\n") == 1


@pytest.mark.slow
def test_more_large_files_than_one_purge_takes(server, tmp_path):
    repository = seed(server, {f"{k:04}/a.safetensors": f"weights {k}" for k in range(1100)})

    def all_but_one(api):
        api.permanently_delete_lfs_files("owner/model", list(api.list_lfs_files("owner/model"))[:-1])
        return [file.path for file in api.list_repo_tree("owner/model", recursive=True)]

    began = time.monotonic()
    assert ask(server, tmp_path, all_but_one) == [".gitattributes", "1099", "1099/a.safetensors"]
    assert repository.large() == {sha256("weights 1099")} and time.monotonic() - began < 60


@pytest.mark.slow
def test_a_client_uploads_and_downloads_1100_large_files(server, tmp_path):
    files = {f"{k:04}/a.safetensors": f"weights {k}" for k in range(1100)} | {"README.md": "# A model"}
    ask(server, tmp_path / "writer", push, files=files)
    assert len(server.repository("owner/model").log()) == 2
    assert ask(server, tmp_path / "reader", download) == files


# Xet


def push_apart(api, files, together):
    """One commit, whose large files are uploaded in one session or in one each."""
    api.create_repo("owner/model", private=True)
    additions = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
    if not together:
        for addition in additions:
            api.preupload_lfs_files("owner/model", [addition])
    return api.create_commit("owner/model", additions, commit_message="push").oid


def by_hash(api, xet_hash, size):
    """Whether the store gives out a file by its hash alone."""
    from hf_xet import XetFileInfo, XetSession

    address = f"{api.endpoint}/api/models/owner/model/xet-read-token/main"
    connection = get_session().get(address, headers=api._build_hf_headers()).json()
    group = XetSession().new_download_stream_group(endpoint=connection["casUrl"])
    try:
        return b"".join(group.download_stream(XetFileInfo(xet_hash, size))).decode()
    except Exception as error:
        return type(error).__name__


@pytest.mark.parametrize("together", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_xet_files_are_uploaded_downloaded_and_purged(server, tmp_path, together):
    old = ask(server, tmp_path / "writer", push_apart, xet=True, files=FILES, together=together)
    repository = server.repository("owner/model")
    assert len(repository.log()) == 2 and not list((repository.path / "lfs").iterdir())
    assert len(server.hub.cas.xorbs()) == (1 if together else 2)
    assert ask(server, tmp_path / "reader", download, xet=True) == FILES
    assert ask(server, tmp_path / "without xet", download) == FILES
    file = repository.meta["lfs"][sha256(FILES[WEIGHTS])]
    ask(server, tmp_path / "writer", purge, xet=True, start="s00/")
    left = {path: text for path, text in FILES.items() if path != WEIGHTS}
    assert ask(server, tmp_path / "new reader", download, xet=True) == left
    assert ask(server, tmp_path / "new reader", served, revisions=[old], paths=[WEIGHTS])[old] == [404]
    found = ask(server, tmp_path / "x", by_hash, xet=True, xet_hash=file["xetHash"], size=file["size"])
    assert (found == FILES[WEIGHTS]) == together
    assert len(server.hub.cas.xorbs()) == 1


# As a program


@pytest.mark.slow
def test_as_a_program_it_keeps_its_repositories_and_takes_switches(tmp_path):
    def run():
        command = [sys.executable, "-m", "hub_server", "--json", "--folder", str(tmp_path / "hub"), "gc=lazy"]
        environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    for status_of_create in (200, 409):
        with run() as program:
            variables = json.loads(program.stdout.readline())
            endpoint, authorization = variables["HF_ENDPOINT"], {"Authorization": f"Bearer {variables['HF_TOKEN']}"}

            def post(path, body, endpoint=endpoint, headers=authorization):
                request = urllib.request.Request(endpoint + path, json.dumps(body).encode(), headers)
                try:
                    with urllib.request.urlopen(request) as answer:
                        return answer.status, json.loads(answer.read())
                except urllib.error.HTTPError as error:
                    return error.code, json.loads(error.read())

            assert post("/api/repos/create", {"name": "model", "organization": None})[0] == status_of_create
            assert post("/_faults", {"cdn_ttl": 5})[1]["gc"] == "lazy"
            assert post("/_faults", {"gc": "never"})[0] == 400
            program.terminate()
