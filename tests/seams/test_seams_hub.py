"""Each seam to huggingface_hub that is not as expected is an error, or named in a warning and in the report."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, scan_cache_dir, utils

from hf_s3t import CompatibilityError
from hf_s3t.hub import local_caches as caches
from hf_s3t.hub.purge_report import PurgeReport
from hf_s3t.seams import TABLE, hub

HEAD, OLD = "a" * 40, "b" * 40


def test_the_http_library_is_the_one_that_huggingface_hub_raises_from() -> None:
    assert issubclass(errors.HfHubHTTPError, hub.http_error()) and issubclass(hub.transport_error(), hub.http_error())
    assert hub.http_library().__name__ in ("httpx", "httpx2")


def test_an_unknown_http_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "HfHubHTTPError", type("HfHubHTTPError", (OSError,), {}))
    hub.http_library.cache_clear()
    with pytest.raises(CompatibilityError, match="HfHubHTTPError is .*builtins.OSError.*Install a version"):
        hub.transport_error()
    hub.http_library.cache_clear()


def test_an_upload_says_whether_the_file_is_large() -> None:
    operation = CommitOperationAdd("x.safetensors", b"x")
    with pytest.raises(CompatibilityError, match="x.safetensors was uploaded as None"):
        hub.is_large_file(operation)  # nobody asked the Hub yet
    operation._upload_mode = "lfs"
    assert hub.is_large_file(operation)
    operation._upload_mode = "regular"
    assert not hub.is_large_file(operation)


@pytest.mark.parametrize("mode", ["xet", True], ids=["renamed", "another type"])
def test_an_upload_that_says_something_else_is_an_error(mode: Any) -> None:
    with pytest.raises(CompatibilityError, match="_upload_mode"):
        hub.is_large_file(SimpleNamespace(path_in_repo="x.safetensors", _upload_mode=mode))
    with pytest.raises(CompatibilityError, match="_upload_mode"):
        hub.is_large_file(SimpleNamespace(path_in_repo="x.safetensors"))


@pytest.mark.parametrize("answer", [[{"oid": "1"}], ["fileOid"], [{"fileOid": "1", "size": "large"}]])
def test_a_listing_of_another_form_is_an_error(monkeypatch: pytest.MonkeyPatch, answer: list[Any]) -> None:
    monkeypatch.setattr(utils, "paginate", lambda *args, **kwargs: iter(answer))
    with pytest.raises(CompatibilityError, match="lfs-files answered with"):
        hub.list_large_files(HfApi(token="x"), "me/model")


def test_a_listing_may_have_files_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "paginate", lambda *args, **kwargs: iter([{"fileOid": "1" * 64}]))
    assert hub.list_large_files(HfApi(token="x"), "me/model") == {"1" * 64: 1}


def test_a_deletion_of_large_files_with_other_parameters_is_an_error() -> None:
    with pytest.raises(CompatibilityError, match="takes nothing"):
        hub.check_large_file_deletion(SimpleNamespace())
    renamed = SimpleNamespace(permanently_delete_lfs_files=lambda repo_id, files: None)
    with pytest.raises(CompatibilityError, match="takes repo_id, files"):
        hub.check_large_file_deletion(renamed)


def test_a_deletion_of_large_files_that_reads_more_is_an_error() -> None:
    def delete(repo_id: str, lfs_files: Any, rewrite_history: bool) -> None:
        assert rewrite_history
        [file.xet_hash for file in lfs_files]

    with pytest.raises(CompatibilityError, match="no attribute 'xet_hash'.*only the sha256 is known"):
        hub.delete_large_files(SimpleNamespace(permanently_delete_lfs_files=delete), "me/model", ["1"])


def test_a_session_or_headers_of_another_kind_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "get_session", lambda: object())
    with pytest.raises(CompatibilityError, match="'object' object has no attribute 'delete'"):
        hub.session()
    monkeypatch.setattr(utils, "build_hf_headers", lambda token: {})
    with pytest.raises(CompatibilityError, match="unexpected keyword argument .*`build_hf_headers`"):
        hub.headers("x", "hf_s3t")


# ---- the cache ----


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a repository, with its head as huggingface_hub lays it out."""
    for name, path in (("HF_HUB_CACHE", tmp_path / "hub"), ("HF_XET_CACHE", tmp_path / "xet")):
        monkeypatch.setattr(constants, name, str(path))
    monkeypatch.setattr(caches, "HF_HUB_CACHE", str(tmp_path / "hub"))
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setattr(caches, "scan_cache_dir", lambda: scan_cache_dir(empty))
    folder = tmp_path / "hub/models--me--model"
    (folder / "snapshots" / HEAD).mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "blobs/live").write_text("x")
    (folder / "snapshots" / HEAD / "file").symlink_to("../../blobs/live")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(HEAD)
    return folder


def test_nothing_is_left_of_a_cache_that_is_laid_out_as_expected(cache: Path) -> None:
    (cache / "trees").mkdir()
    (cache / f"trees/{OLD}.json").write_text("{}")
    (cache / "blobs/old.incomplete").write_text("x")
    (cache.parent.parent / "xet/https/chunk-cache").mkdir(parents=True)
    (cache.parent.parent / "xet/https/chunk-cache/block").write_text("x")
    (cache.parent.parent / "xet/logs").mkdir()
    (cache.parent.parent / "xet/logs/log").write_text("x")
    cleared, left = caches.clear_caches("me/model", HEAD)
    assert len(cleared) == 3 and left == []


@pytest.mark.parametrize(
    "file", [f"models--me--model/snapshots/{OLD}/file", "models--me--model/blobs/old", "models--me--model/chunks/old"]
)
def test_what_is_left_in_the_cache_is_named(cache: Path, caplog: pytest.LogCaptureFixture, file: str) -> None:
    path = cache.parent / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("old weights")
    with caplog.at_level(logging.WARNING, logger="hf_s3t"):
        _, left = caches.clear_caches("me/model", HEAD)
    assert left == [file] and file in caplog.text
    report = PurgeReport("me/model", "pending", "2026-01-01", "2026-01-01", caches_left=left)
    assert f"left on this machine, remove it by hand: {file}" in report.to_text()


def test_blocks_under_an_unknown_name_are_named(cache: Path) -> None:
    block = cache.parent.parent / "xet/https/blocks/one"
    block.parent.mkdir(parents=True)
    block.write_text("x")
    assert caches.clear_caches("me/model", HEAD)[1] == ["xet/https/blocks/one"]


def test_every_seam_that_is_raised_is_in_the_table() -> None:
    mine = {name for name, seam in TABLE.items() if seam.library == "huggingface_hub"}
    assert mine == {
        "http_library", "upload_mode", "large_file_listing", "large_file_deletion", "own_requests",
    }  # fmt: skip
