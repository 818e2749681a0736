"""What a person types, and what a client sends: answered, or refused by name."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import strategies as st
from starlette.testclient import TestClient

import served
from command_line import run
from endpoints import NAME, TOKEN, settings, tokenizer
from hf_s3t import Plan, S3TStore
from hf_s3t.cli.options import parse_count, parse_prior, parse_share, parse_slice
from hf_s3t.endpoint.app import make_app
from hf_s3t.store.folder import KEY_VARIABLE
from hf_s3t.store.retention import begin_of_term
from hostile import (
    DEEP,
    KINDS,
    Original,
    Outside,
    as_json,
    fuzz,
    json_texts,
    odd_values,
    only_typed,
    put_kind,
    quick_folder,
    run_cases,
)
from stores import make_store, people

PLAN = Plan.make(2, 2, [(0, 1), (1, 0)], prune=False)
ENDS = (0, 2, 3, 4, 5, 6)
"""Exit codes; 1 is a fault of the program."""


@pytest.fixture(scope="module")
def hostile():
    with quick_folder() as root:
        make_store(root / "out", people(8), plan=PLAN)
        yield Original(root / "out"), Outside(root / "canary")


def ends_well(hostile, *arguments, stdin=None):
    """A verb that ends by itself; of two seconds at most is another test's to tell."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code in ENDS, result.stderr
    hostile[1].check()


# ---- files of ids ----

LINES = ["row-1", '"row-1"', "row-1  ", "\trow-1", "'row-1'", "row-1,person-0", "id", "", " ", "\0", "é",
         "e\u0301", "#", "-"]  # fmt: skip
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "utf-32", "cp037"]


@st.composite
def ids_files(draw):
    """Files as an editor, a spreadsheet or a shell writes them."""
    if draw(st.integers(0, 4)) == 0:
        marks = st.sampled_from([b"\xff\xfe", b"\xff\xfea", b"\xfe\xff\0", b"\xef\xbb\xbf"])
        return draw(st.binary(max_size=40) | marks)
    lines = draw(st.lists(st.sampled_from(LINES) | st.text(max_size=6), max_size=4))
    text = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\u2028", ","])).join(lines)
    data = text.encode(draw(st.sampled_from(ENCODINGS)), "replace")
    return data[: len(data) - draw(st.integers(0, 1))]


@fuzz(50)
def test_a_file_of_ids(amount, hostile):
    original, _ = hostile
    original.put_back()
    file = original.path.parent / "ids.txt"

    def case(data, option, by_stdin):
        file.write_bytes(data)
        where, stdin = ("-", data) if by_stdin and option == "--ids-file" else (file, None)
        ends_well(hostile, "delete", original.path, option, where, "--dry-run", "--missing-ok", stdin=stdin)
        ends_well(hostile, "locate", original.path, option, where, stdin=stdin)

    run_cases(amount, case, ids_files(), st.sampled_from(["--ids-file", "--groups-file"]), st.booleans())


@fuzz(20)
def test_a_dataset_that_lacks_some(amount, hostile):
    original, _ = hostile
    original.put_back()
    rows = people(8)
    lines = b"\n".join(as_json(row) for row in rows)

    def case(text, ending, share):
        file = original.path.parent / f"left.{ending}"
        file.write_bytes(text)
        ends_well(hostile, "delete", original.path, "--not-in", file, "--at-most", share, "--dry-run")

    texts = json_texts(rows) | st.just(lines) | st.just(b"id,text\nrow-1,a\n\"row-2") | st.just(b"id\0\n\xff")
    run_cases(amount, case, texts, st.sampled_from(["json", "jsonl", "csv"]), st.sampled_from(["10%", "100%", "0%"]),
              first=[(b"null", "json", "10%"), (b"[1]", "json", "10%")])  # fmt: skip


# ---- arguments ----

ODD_TEXTS = [
    "", " ", "nan", "inf", "-inf", "1e400", "-1", "0", "1", "9" * 400, "\u0663", "\u00b2", "0:0", "0:1", "9:9",
    "1:1:1", "0x1",
    "1_000", "1e5", ",", "0.5,0.5", "nan,nan", "0.5;0.5", "1,1e-400", "inf,-inf", "10%", "100%", "101%", "1e3%", "0.%",
    "99999d", "2y", "99999y", "0d", "-1d", "\u0661d", "5k", "1.5B", "0.1", "999999999999999B", "\udcff", "\0", "{0}",
    "%s",    "..", "../../canary", "-", "--", "1e-320,1", "\u202e",
]  # fmt: skip
odd_texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=6) | st.from_regex(r"\A[0-9.,:%ymde+-]{1,8}\Z")


@fuzz(200)
def test_a_text_that_stands_for_a_number(amount):
    """What can be read is a number; nothing else is."""

    def case(text):
        for read in (parse_count, parse_prior, parse_share, parse_slice, begin_of_term):
            only_typed(lambda read=read: read(text))

    run_cases(amount, case, odd_texts)


PLAN_WORDS = ("plan", "--examples=1000", "--requests-per-day=1", "--horizon-days=9", "--shards=1", "--slices=2")
COMMANDS = [
    ("status", "{store}", "--prior"), ("status", "{store}", "--fail-below"), ("locate", "{store}", "--ids"),
    ("delete", "{store}", "--dry-run", "--slices"), ("delete", "{store}", "--dry-run", "--ids"),
    ("delete", "{store}", "--missing-ok", "--ids", "nobody", "--reference"), ("locate", "{store}", "--groups"),
    ("delete", "{store}", "--not-in", "{store}/s3t.json", "--dry-run", "--at-most"),
    ("state", "expire", "{store}", "--dry-run", "--older-than"), ("state", "import", "{store}"),
    ("readmit", "{store}", "--ids"), ("verify", "{store}", "--key-file"),
    ("locate", "{store}", "--ids", "a", "--state"),
    *((*PLAN_WORDS, name)
      for name in ("--prior", "--replay", "--min-in-use", "--adapter-mb", "--examples", "--horizon-days", "--budget")),
]  # fmt: skip


@fuzz(80)
def test_an_argument(amount, hostile):
    original, _ = hostile
    original.put_back()

    def case(words, text):
        ends_well(hostile, *(word.format(store=original.path) for word in words), text)

    run_cases(amount, case, st.sampled_from(COMMANDS), odd_texts)


@fuzz(40)
def test_a_curve_of_quality(amount, hostile):
    original, _ = hostile
    file = original.path.parent / "quality.json"
    curve = {"metric": "accuracy", "score_by_prefix_length": [0.5, 0.7, 0.8]}

    def case(text):
        file.write_bytes(text)
        ends_well(hostile, *PLAN_WORDS, "--quality", file)

    run_cases(amount, case, json_texts(curve), first=[(b"[" * DEEP,), (b'{"a": "\\ud800"}',)])


@fuzz(40)
def test_a_partition_key(amount, hostile, monkeypatch):
    """In the environment, in a file, and beside the state."""
    original, outside = hostile

    def case(text, where):
        original.put_back()
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
        data = re.sub("[\ud800-\udc7f\udd00-\udfff]", "", text).encode(errors="surrogateescape")
        if where == "environment":
            monkeypatch.setenv(KEY_VARIABLE, data.replace(b"\0", b"").decode(errors="surrogateescape"))
        elif where == "file":
            (original.path.parent / "key").write_bytes(data)
            ends_well(hostile, "locate", original.path, "--ids", "row-1", "--key-file", original.path.parent / "key")
        else:
            (original.path / ".s3t/partition.key").write_bytes(data)
        for way in (lambda s: s.status(), lambda s: s.locate(ids=["row-1"]), lambda s: s.delete(ids=["row-1"])):
            only_typed(lambda way=way: way(S3TStore(original.path)))
        outside.check()

    texts = odd_texts | st.sampled_from(["00" * 32, "00" * 15, "zz" * 16, "\udcff" * 20, "a" * 10**5])
    places = st.sampled_from(["environment", "file", "state"])
    run_cases(amount, case, texts, places, first=[("\udcff" * 20, "environment"), ("\udcff" * 20, "state")])
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@fuzz(40)
def test_what_is_asked_for_in_python(amount, hostile):
    """An id may be anything; what names nobody is refused before anything is changed."""
    original, outside = hostile
    original.put_back()

    def case(value, name):
        store = S3TStore(original.path)
        only_typed(lambda: store.delete(**{name: value}, missing_ok=True, dry_run=True))
        only_typed(lambda: store.delete(**{name: [value]}, missing_ok=True, dry_run=True))
        only_typed(lambda: store.locate(ids=[value]))
        outside.check()

    known = [(value, name) for value in (None, 1) for name in ("ids", "groups", "rows", "slices")]
    run_cases(amount, case, odd_values, st.sampled_from(["ids", "groups", "rows", "slices"]), first=known)


@fuzz(20)
def test_something_in_the_place_of_a_file_that_is_named(amount, hostile):
    original, outside = hostile
    original.put_back()
    place = original.path.parent / "named"
    words = [("state", "import", original.path), ("delete", original.path, "--dry-run", "--not-in"),
             ("recheck",), ("state", "export", original.path)]  # fmt: skip

    def case(kind, command):
        put_kind(place, kind, outside.path)
        ends_well(hostile, *command, place)

    run_cases(amount, case, st.sampled_from(KINDS), st.sampled_from(words))


# ---- requests over HTTP ----


@pytest.fixture(scope="module")
def client():
    model = served.load(served.trained("llama"), "llama")
    app = make_app(model, tokenizer(), settings(delete_token=TOKEN, mates_seconds=0.0))
    with TestClient(app) as found:
        yield found


MESSAGES = [{"role": "user", "content": "abc"}, {"role": "user", "content": [{"type": "text", "text": "abc"}]}]
SAMPLING = {"model": NAME, "max_tokens": 1, "temperature": 0, "top_p": 0.5, "seed": 3, "stop": ["z"], "stream": False}
BODIES = {
    "/v1/completions": {**SAMPLING, "prompt": "abc"},
    "/v1/chat/completions": {**SAMPLING, "messages": MESSAGES},
    "/v1/examples": {"ids": ["nobody"], "groups": [], "reference": "a request"},
}


@fuzz(200)
def test_a_request(amount, client):
    """What is not understood is refused in the API's own form, and nothing of it is a fault of the server."""

    def case(drawn):
        route, data = drawn
        method = "DELETE" if route == "/v1/examples" else "POST"
        headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
        answer = client.request(method, route, content=data, headers=headers)
        assert answer.status_code in (200, 400, 404, 413, 422, 429), (answer.status_code, answer.text[:300])
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    bodies = [json_texts(body).map(lambda text, route=route: (route, text)) for route, body in BODIES.items()]
    odd = as_json({**BODIES["/v1/completions"], "prompt": "\ud800"})
    known = [(("/v1/completions", data),) for data in (odd, b"[" * DEEP, b'{"model": "\xff"}')]
    run_cases(amount, case, st.one_of(bodies), first=known)


def test_an_odd_value_is_refused_by_its_name(client):
    body = json.dumps({**BODIES["/v1/completions"], "temperature": 1e400}).replace("Infinity", "1e400")
    answer = client.post("/v1/completions", content=body.encode(), headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "temperature"


