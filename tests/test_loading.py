"""`from_pretrained`: what it loads, and what it asks the Hub for."""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Timer
from typing import Any

import hub_cases
import pytest
import torch
import yaml
from hub_cases import (
    FILES,
    FOLDER,
    REPO,
    SUMS,
    WEIGHTS,
    Versions,
    files_of,
    publish,
    same,
    served,
    tree,
    two_versions,
    without,
)
from huggingface_hub import HfApi, constants
from loopback_hub import LoopbackHub
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import sae_lens_huggingface_loader
from tiny_dictionaries import tiny_dictionary

from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.pretrained.registry import REGISTRY_VARIABLE

load = BilinearQKDictionary.from_pretrained


@pytest.fixture(scope="module")
def versions(llama_bridge) -> Versions:
    """Shared and not to be changed."""
    return two_versions(llama_bridge)


@pytest.fixture
def repo(
    hub: LoopbackHub,
    versions: Versions,
) -> LoopbackHub:
    """The Hub with the old version in FOLDER."""
    hub.create_repo(REPO)
    publish(hub, versions.old_files)
    return hub


@pytest.fixture
def load_it(
    repo: LoopbackHub,
    hub_cache: Path,
) -> Callable[..., BilinearQKDictionary]:
    """`from_pretrained` of what `repo` holds."""
    return partial(load, REPO, FOLDER, cache_dir=hub_cache)


def head(repo: LoopbackHub) -> str:
    return repo.commits(REPO)[0].oid


# What is loaded, in processes of their own


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, Any]]:
    """What processes of their own published and loaded.

    The last of them with HF_HUB_OFFLINE, when the Hub was gone.
    """
    with LoopbackHub() as hub, tempfile.TemporaryDirectory() as scratch:
        hub.add_user("hf_owner", "owner", orgs=["org"])
        Path(scratch).chmod(0o755)
        cache = Path(scratch) / "cache"
        cache.mkdir()
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": f"{scratch}/home",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
        }
        command = [sys.executable, hub_cases.__file__, str(cache)]
        pipe = subprocess.PIPE
        with (
            open(f"{scratch}/log", "w+") as log,
            subprocess.Popen(
                command,
                env=os.environ | variables,
                text=True,
                stdin=pipe,
                stdout=pipe,
                stderr=log,
            ) as process,
        ):
            watchdog = Timer(240, process.kill)
            watchdog.start()
            assert process.stdout is not None
            online = process.stdout.readline()
            hub.stop()
            offline, _ = process.communicate("\n")
            watchdog.cancel()
            log.seek(0)
            log_text = log.read()
        assert process.returncode == 0, log_text[-3000:]
        yield {**json.loads(online), "offline": json.loads(offline), "log": log_text}


@pytest.mark.slow
def test_another_process_loads_the_same_dictionary(processes):
    """Bits, patterns and metrics; two processes that meet an empty cache at once included."""
    ours = processes["ours"]
    names = {"query.W_dec", "feature_map.indices", "transcoders", "feature_map"}
    assert set(ours["hashes"]) > names
    assert ours["new_metrics"] == ours["metrics"]
    assert processes["at_once"] == [ours, ours]


@pytest.mark.slow
def test_two_processes_at_once_leave_a_whole_cache(processes):
    repo = "models--org--repo"
    snapshot = f"{repo}/snapshots/{processes['commit']}/{FOLDER}"
    files = [f"{repo}/refs/main", *(f"{snapshot}/{name}" for name in FILES)]
    expected = {*files, f"{repo}/blobs"}
    for path in files:
        expected |= {parent.as_posix() for parent in Path(path).parents}
    blobs = {path for path in processes["cached"] if "/blobs/" in path}
    assert set(processes["cached"]) - blobs == expected - {"."}
    assert len(blobs) == len(FILES)


@pytest.mark.slow
def test_offline_the_cache_is_enough(processes):
    assert processes["offline"]["loaded"] == processes["ours"]
    warning = "the Hub cannot be reached (OfflineModeIsEnabled): using the cached copy of org/repo"
    assert warning in processes["log"]
    refusal = processes["offline"]["missing"]
    assert refusal.startswith("ConnectionError: The Hub cannot be reached for org/repo (Offline")


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(processes):
    """What it holds is loaded; the rest is refused, naming it."""
    assert processes["read_only"] == [processes["ours"], processes["ours"]]
    assert processes["unchanged"]
    refusal = f"OSError: The cache {processes['empty']} cannot be written (Permission denied)"
    assert processes["refused"] == f"{refusal}: pass cache_dir= or set HF_HOME."


@pytest.mark.slow
def test_a_shared_cache_whose_folders_are_somebody_elses(processes):
    """A download is moved into them, file by file."""
    refusal = r"OSError: The cache \S+/cache cannot be written \(Permission denied\): "
    assert re.match(refusal, processes["refused_below"])


# What is loaded, here


def test_the_stock_loaders_give_the_same_dictionary(repo, versions, tmp_path, monkeypatch, load_it):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "stock"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in versions.old_files.items():
        (folder / name).write_bytes(data)
    ours = [load_it(), load(str(folder))]
    stock = [SAE.from_pretrained(REPO, FOLDER), SAE.load_from_disk(folder)]
    for d in ours + stock:
        assert type(d) is BilinearQKDictionary
        assert same(d, versions.old)
    for d in ours:
        assert d.metrics == versions.old.metrics
        assert d.runner_cfg == versions.old.runner_cfg
    for d in stock:
        assert d.metrics is d.runner_cfg is None


def test_what_the_stock_loader_has_cached_is_verified_too(repo, versions, tmp_path, monkeypatch):
    """It caches config and weights alone."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "stock"))
    SAE.from_pretrained(REPO, FOLDER)
    d = load(REPO, FOLDER, verify="strict")
    assert same(d, versions.old)
    assert d.metrics == versions.old.metrics


def test_parameters_are_saelenss_in_its_order_then_ours():
    stock = inspect.signature(SAE.from_pretrained).parameters
    ours = inspect.signature(load).parameters
    names = list(ours)
    shared = names[: len(stock)]
    added = names[len(stock) :]
    assert shared == list(stock)
    for name in shared[2:]:
        assert ours[name].default == stock[name].default
    assert added == ["revision", "token", "cache_dir", "verify"]
    for name in added:
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_with_cfg_and_sparsity(repo, hub_cache, versions):
    load_all = BilinearQKDictionary.from_pretrained_with_cfg_and_sparsity
    for positional in ((), ("cpu", "float32", False, None, False)):
        d, cfg, sparsity = load_all(REPO, FOLDER, *positional, cache_dir=hub_cache)
        assert same(d, versions.old)
        assert cfg == d.cfg.to_dict() == versions.old.cfg.to_dict()
        assert sparsity is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype(hub, hub_cache, llama_bridge, dtype):
    hub.create_repo(REPO)
    d = tiny_dictionary(llama_bridge).to(dtype)
    publish(hub, files_of(d))
    load_it = partial(load, REPO, FOLDER, cache_dir=hub_cache)
    assert same(load_it(dtype=None), d)
    assert same(load_it(), d.to(torch.float32))
    for name in ("float16", "bfloat16", "float64"):
        cast = load_it(dtype=name)
        assert {str(weight.dtype) for weight in cast.parameters()} == {f"torch.{name}"}
        assert torch.equal(cast.feature_map.indices, d.feature_map.indices)


def test_folding(load_it, versions):
    folded = load_it(fold_W_dec_norm=True)
    torch.testing.assert_close(folded.get_W_dec_norm(), torch.ones(folded.cfg.d_sae))
    x = torch.randn(2, 7, folded.cfg.d_in, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(folded.scores(x), versions.old.scores(x), rtol=1e-4, atol=1e-4)


def test_a_converter_loads_through_saelens(repo, versions, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "stock"))
    calls = []

    def converter(repo_id, folder_name, device, force_download, cfg_overrides):
        calls.append((repo_id, folder_name, device, force_download, cfg_overrides["dtype"]))
        return sae_lens_huggingface_loader(
            repo_id, folder_name, device, force_download, cfg_overrides
        )

    assert same(load(REPO, FOLDER, converter=converter), versions.old)
    assert calls == [(REPO, FOLDER, "cpu", False, "float32")]
    with pytest.raises(ValueError, match="SAELens's own loader takes no revision"):
        load(REPO, FOLDER, converter=converter, revision="main")


def test_revisions(repo, versions, load_it):
    first = head(repo)
    newest = publish(repo, versions.new_files)
    assert same(load_it(), versions.new)
    assert same(load_it(revision=newest), versions.new)
    assert same(load_it(revision=first), versions.old)


def test_branches(hub, hub_cache, versions):
    first = hub.create_repo(REPO)
    api = HfApi(token="hf_owner")
    for branch, files in (("v1.0", versions.old_files), ("feature/one", versions.new_files)):
        api.create_branch(REPO, branch=branch, revision=first)
        publish(hub, files, revision=branch)
    load_it = partial(load, REPO, FOLDER, cache_dir=hub_cache)
    assert same(load_it(revision="v1.0"), versions.old)
    assert same(load_it(revision="feature/one"), versions.new)
    hub.stop()
    assert same(load_it(revision="feature/one"), versions.new)


@pytest.mark.parametrize("kind", ["private", "gated"])
def test_tokens(hub, hub_cache, versions, kind, monkeypatch):
    hub.create_repo(REPO, **{kind: True})
    publish(hub, versions.old_files)
    assert same(load(REPO, FOLDER, token="hf_owner", cache_dir=hub_cache), versions.old)
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    load(REPO, FOLDER, cache_dir=hub_cache / "other")
    assert {request.token for request in hub.requests} == {"hf_owner"}


# Names


@pytest.fixture
def name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versions: Versions
) -> Callable[..., None]:
    """Put `tiny` into a registry of one's own, as published in REPO; values override."""
    file = tmp_path / "registry.yaml"

    def write(revision: str, **values: str) -> None:
        entry = {
            "status": "published",
            "repo": REPO,
            "folder": FOLDER,
            "revision": revision,
            "sha256": sha256(versions.old_files[SUMS]).hexdigest(),
        }
        file.write_text(yaml.safe_dump({"tiny": {**entry, **values}}))
        monkeypatch.setenv(REGISTRY_VARIABLE, str(file))

    return write


@pytest.fixture
def load_tiny(hub_cache: Path) -> Callable[..., BilinearQKDictionary]:
    """`from_pretrained` of that name."""
    return partial(load, "tiny", cache_dir=hub_cache)


def test_a_name_stays_at_its_commit(repo, versions, name_it, load_tiny):
    first = head(repo)
    name_it(first)
    assert same(load_tiny(), versions.old)
    newest = publish(repo, versions.new_files)
    served(repo)
    assert same(load_tiny(), versions.old)
    assert same(load_tiny(revision=first), versions.old)
    assert served(repo) == []
    for revision in ("main", newest):
        assert same(load_tiny(revision=revision), versions.new)


def test_a_name_fixes_the_sum_of_the_sums(repo, versions, hub_cache, name_it, load_tiny):
    """Whoever changes the folder with its sums, at the same commit, still does not pass."""
    name_it(head(repo), sha256=sha256(versions.new_files[SUMS]).hexdigest())
    for verify in (True, "strict"):
        with pytest.raises(ValueError, match=f"{SUMS} is not the file the registry names"):
            load_tiny(verify=verify)
        assert tree(hub_cache) == {}
    assert same(load_tiny(verify=False), versions.old)
    with pytest.raises(ValueError, match=f"{SUMS} is not the file the registry names"):
        load_tiny()


def test_a_name_that_has_a_sum_needs_sums(hub, versions, hub_cache, name_it, load_tiny):
    hub.create_repo(REPO)
    name_it(publish(hub, without(SUMS)(versions.old_files)))
    with pytest.raises(ValueError, match="and verification was asked for"):
        load_tiny()
    assert tree(hub_cache) == {}


def test_shipped_then_cached_then_from_the_hub(
    repo, versions, name_it, load_tiny, tmp_path, monkeypatch
):
    shipped = tmp_path / "shipped"
    (shipped / "tiny").mkdir(parents=True)
    for name, data in versions.new_files.items():
        (shipped / "tiny" / name).write_bytes(data)
    (shipped / "registry.yaml").write_text("tiny: {status: shipped}")
    for module in ("loading", "registry"):
        monkeypatch.setattr(f"sae_lens_qk.pretrained.{module}.shipped_folder", lambda: shipped)
    d = load_tiny()
    assert same(d, versions.new)
    assert d.metrics == versions.new.metrics
    assert served(repo) == []
    with pytest.raises(ValueError, match="has no revision 'main'"):
        load("tiny", revision="main")

    name_it(head(repo))
    assert same(load_tiny(), versions.old)
    assert len(served(repo)) == 1 + 2 * len(FILES)
    assert same(load_tiny(), versions.old)
    assert served(repo) == []


ESCAPES = ["..", "../x", "a/../b", "/tmp", "", ".", "a//b", "a/", "a\\b", "..\\x", "a\0b"]


@pytest.mark.parametrize("folder", ESCAPES)
def test_folders_outside_the_repository_are_refused(repo, hub_cache, name_it, load_tiny, folder):
    plain = "The folder must be a plain path"
    with pytest.raises(ValueError, match=plain):
        load(REPO, folder, cache_dir=hub_cache)
    name_it(head(repo), folder=folder)
    with pytest.raises(ValueError, match=plain if folder else "folder must match"):
        load_tiny()
    assert served(repo) == []
    assert tree(hub_cache) == {}


def test_an_absolute_folder_is_not_read_in_place_of_the_repositorys(
    repo, versions, hub_cache, tmp_path
):
    versions.old.save_model(tmp_path / "here")
    with pytest.raises(ValueError, match="must be a plain path"):
        load(REPO, str(tmp_path / "here"), cache_dir=hub_cache)


@pytest.mark.parametrize(
    "repo_id", ["../repo", "/org/repo", "org/repo/x", "org/..", "org/re\\po", "org/"]
)
def test_bad_repositories_are_refused(repo, hub_cache, repo_id, name_it, load_tiny):
    with pytest.raises(ValueError, match="Repo id") as error:
        load(repo_id, FOLDER, cache_dir=hub_cache)
    assert "\n" not in str(error.value)
    name_it(head(repo), repo=repo_id)
    with pytest.raises(ValueError, match=r"Repo id|repo must match"):
        load_tiny()
    assert served(repo) == []
    assert tree(hub_cache) == {}


# What is asked of the Hub


def test_requests(repo, versions, load_it):
    first_time = ["HEAD cfg.json 200"]
    for name in ("cfg.json", SUMS, *sorted(set(FILES) - {"cfg.json", SUMS})):
        first_time += [f"HEAD {name} 200", f"GET {name} 200"]
    first = head(repo)
    load_it()
    assert served(repo) == first_time
    load_it()
    assert served(repo) == ["HEAD cfg.json 200"]
    load_it(revision=first)
    assert served(repo) == []
    publish(repo, versions.new_files)
    load_it(revision=first)
    assert served(repo) == []
    load_it()
    assert served(repo) == first_time
    for revision in ("main", first):
        load_it(revision=revision, force_download=True)
        assert served(repo) == first_time


@pytest.mark.parametrize("intact", [True, False])
def test_weights_that_did_not_change_are_not_downloaded_again(
    repo, versions, load_it, hub_cache, intact
):
    """When somebody commits something else; a damaged copy in the cache is no help."""
    load_it()
    (link,) = hub_cache.rglob(f"snapshots/*/{FOLDER}/{WEIGHTS}")
    if not intact:
        link.resolve().write_bytes(bytes(link.stat().st_size))
    served(repo)
    repo.commit(REPO, {"notes.md": b"seen"})
    assert same(load_it(), versions.old)
    assert (f"GET {WEIGHTS} 200" in served(repo)) is not intact


@pytest.mark.parametrize("down", ["stopped", "failing"])
def test_without_the_hub_a_cached_branch_serves(
    repo, versions, load_it, hub_cache, waits, hub_waits, caplog, down
):
    load_it()
    publish(repo, versions.new_files)
    before = tree(hub_cache)
    served(repo)
    repo.fault("HEAD|GET", "", status=503, times=None)
    if down == "stopped":
        repo.stop()
    caplog.clear()
    assert same(load_it(), versions.old)
    error = "ConnectError" if down == "stopped" else "HfHubHTTPError"
    warning = f"the Hub cannot be reached ({error}): using the cached copy of {REPO}"
    assert caplog.messages == [warning]
    assert waits == hub_waits == []
    assert len(served(repo)) == (down == "failing")
    for revision in ("main", repo.commits(REPO)[1].oid):
        with pytest.raises(ConnectionError):
            load_it(force_download=True, revision=revision)
        assert tree(hub_cache) == before


def test_a_hub_that_fails_for_a_moment(repo, versions, load_it, waits, hub_waits):
    repo.fault("HEAD", "cfg.json", status=503)
    repo.fault("GET", WEIGHTS, status=500, times=2)
    repo.fault("GET", SUMS, status=429, headers={"Retry-After": "3"})
    repo.fault("GET", "metrics.json", drop=True)
    repo.fault("GET", "README.md", drop=True, truncate=100)
    assert same(load_it(), versions.old)
    assert waits == [0.5, 1]
    assert sorted(hub_waits) == [1, 1, 1, 4]  # those of the client
