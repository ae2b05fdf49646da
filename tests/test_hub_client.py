"""What the real Hub client does when the Hub or the line fails; `pretrained` relies on it."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from hub_calls import (
    FILES,
    REPO,
    STEPS,
    WEIGHTS,
    commit,
    download,
    owner,
    serve_files,
    served,
    statuses,
    write_files,
)
from huggingface_hub import (
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from loopback_hub import LoopbackHub


@pytest.fixture(autouse=True)
def no_progress_bars() -> Iterator[None]:
    """A bar that an error interrupts would be drawn again when the process ends."""
    disable_progress_bars()
    yield
    enable_progress_bars()


@pytest.fixture
def repo(hub: LoopbackHub) -> LoopbackHub:
    return serve_files(hub)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "folder")


def test_corruption_that_keeps_the_length_passes_the_client(repo, hub_cache):
    """Of LFS files too, whose sum it knows: the reason why our manifests have sums of their own."""
    for name in ("cfg.json", "half/sae_weights.safetensors"):
        repo.fault("GET", name, flip_byte=3)
        expected = bytearray(FILES[name])
        expected[3] ^= 0xFF
        assert download(hub_cache, name) == expected
        assert download(hub_cache, name) == expected  # and it stays
        assert download(hub_cache, name, force_download=True) == FILES[name]


def test_a_wrong_length_is_refused(repo, hub_cache):
    repo.fault("GET", "sae_weights", truncate=100)
    with pytest.raises(OSError, match=r"^Consistency check failed.* 10240 .* 100"):
        download(hub_cache, "half/sae_weights.safetensors")
    assert not list(hub_cache.rglob("*safetensors"))
    assert download(hub_cache, "half/sae_weights.safetensors") == WEIGHTS


def test_a_download_cut_short_starts_anew(repo, hub_cache, hub_waits):
    """Files below the client's chunk of 10 MiB; larger ones are resumed."""
    repo.fault(
        "GET",
        "sae_weights",
        truncate=100,
        drop=True,
        times=2,
    )
    assert download(hub_cache, "half/sae_weights.safetensors") == WEIGHTS
    assert statuses(repo) == [200, 0, 0, 200]
    assert hub_waits == [1, 1]


def test_a_download_that_never_moves_ends(repo, hub_cache, hub_waits):
    repo.fault("GET", "cfg.json", drop=True, times=None)
    with pytest.raises(httpx2.RemoteProtocolError):
        download(hub_cache)
    assert hub_waits == [1] * 5
    assert not list(hub_cache.rglob("cfg.json"))


@pytest.mark.parametrize("status", [500, 503])
def test_a_failing_hub(repo, hub_cache, hub_waits, status):
    """A failing HEAD is tried once, then, with nothing in the cache, six times more.

    A failing GET is tried only once.
    """
    repo.fault("HEAD", "cfg.json", status=status, times=None)
    with pytest.raises(LocalEntryNotFoundError) as error:
        hf_hub_download(REPO, "cfg.json", cache_dir=hub_cache)
    assert isinstance(error.value.__cause__, HfHubHTTPError)
    assert served(repo) == [f"HEAD /R/resolve/main/cfg.json {status}"] * 7
    assert hub_waits == STEPS

    repo.fault("GET", "sae_weights", status=status)
    with pytest.raises(HfHubHTTPError):
        hf_hub_download(REPO, "half/sae_weights.safetensors", cache_dir=hub_cache)
    assert hub_waits == STEPS


def test_a_hub_that_fails_for_a_moment(repo, hub_cache, hub_waits):
    repo.fault("HEAD", "cfg.json", status=503, times=2)
    repo.fault("GET", "cfg.json", status=429, headers={"Retry-After": "3"})
    assert download(hub_cache) == FILES["cfg.json"]
    assert hub_waits == [1, 4.0]
    assert statuses(repo) == [503, 503, 200, 429, 200]


def test_a_failing_hub_is_not_noticed_where_the_cache_has_the_file(repo, hub_cache, hub_waits):
    path = hf_hub_download(REPO, "cfg.json", cache_dir=hub_cache)
    repo.commit(REPO, {"cfg.json": b"{}"})
    repo.fault("HEAD", "cfg.json", status=503)
    assert hf_hub_download(REPO, "cfg.json", cache_dir=hub_cache) == path  # the old one
    assert hub_waits == []


@pytest.mark.parametrize(
    "error_code", ["RepoNotFound", "GatedRepo", "RevisionNotFound", "EntryNotFound"]
)
def test_injected_errors_carry_their_code_and_message(repo, hub_cache, error_code):
    repo.fault(
        "HEAD",
        "cfg.json",
        status=404,
        error_code=error_code,
        message="A reason",
    )
    with pytest.raises(HfHubHTTPError, match="A reason") as error:
        hf_hub_download(REPO, "cfg.json", cache_dir=hub_cache)
    assert error.value.response.headers["X-Error-Code"] == error_code


def test_a_dropped_upload_leaves_the_repository_unchanged(repo, folder, hub_waits):
    (folder / "new.safetensors").write_bytes(bytes(10**6))
    before = repo.commits(REPO)
    repo.fault("PUT", "/lfs/", drop=True, times=None)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'new.safetensors' to the Hub"):
        owner.upload_folder(repo_id=REPO, folder_path=folder)
    methods = [request.method for request in repo.requests]
    assert methods == ["POST"] * 2 + ["PUT"] * 6
    assert hub_waits == STEPS
    assert repo.commits(REPO) == before


@pytest.mark.parametrize("call", ["preupload", "batch", "/lfs/", "verify"])
def test_a_transfer_that_fails_for_a_moment_is_repeated(repo, folder, hub_waits, call):
    data = bytes(10**6)
    (folder / "new.safetensors").write_bytes(data)
    repo.fault("POST|PUT", call, status=503)
    repo.fault("POST|PUT", call, drop=True)
    owner.upload_folder(repo_id=REPO, folder_path=folder)
    assert repo.files(REPO)["new.safetensors"] == data
    assert hub_waits == [1, 2]


@pytest.mark.parametrize("call", ["repos/create", "commit/main", "branch/dev"])
def test_what_changes_the_repository_is_tried_once(repo, hub_waits, call):
    calls = {
        "repos/create": lambda: owner.create_repo("org/new"),
        "commit/main": lambda: commit("x"),
        "branch/dev": lambda: owner.create_branch(REPO, branch="dev"),
    }
    repo.fault("POST", call, status=503)
    with pytest.raises(HfHubHTTPError, match="503"):
        calls[call]()
    repo.fault("POST", call, drop=True)
    with pytest.raises(httpx2.TransportError):
        calls[call]()
    assert hub_waits == []
    assert len(repo.commits(REPO)) == 2


def test_a_commit_whose_answer_is_lost_was_made(repo):
    repo.fault("POST", "/commit/", drop=True, truncate=0)
    with pytest.raises(httpx2.RemoteProtocolError):
        commit("x")
    assert len(repo.commits(REPO)) == 3
    commit("x")  # and is found by the next attempt
    assert len(repo.commits(REPO)) == 3


def test_offline(repo, hub_cache, hub_waits):
    path = hf_hub_download(REPO, "cfg.json", cache_dir=hub_cache)
    repo.stop()
    assert hf_hub_download(REPO, "cfg.json", cache_dir=hub_cache) == path
    assert hub_waits == []
    with pytest.raises(LocalEntryNotFoundError) as error:
        hf_hub_download(REPO, "half/sae_weights.safetensors", cache_dir=hub_cache)
    assert isinstance(error.value.__cause__, httpx2.ConnectError)
    assert hub_waits == STEPS
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download("org/other", cache_dir=hub_cache)
    with pytest.raises(httpx2.ConnectError):
        owner.model_info(REPO)
    repo.stop()
    repo.start()
    repo.start()
    assert owner.model_info(REPO).sha == repo.commits(REPO)[0].oid
