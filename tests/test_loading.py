"""`from_pretrained`: what it loads, what it asks the Hub for, and that no mishap gets into the cache."""

import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
    Files,
    files_of,
    measured_dictionary,
    memory_limit,
    publish,
    same,
    served,
    tree,
    with_sums,
)
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import sae_lens_huggingface_loader
from safetensors.torch import load, save
from tiny_dictionaries import tiny_dictionary

from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.pretrained import hub as hub_module
from sae_lens_qk.pretrained.hub import HubFolder
from sae_lens_qk.pretrained.registry import REGISTRY_VARIABLE

from_pretrained = BilinearQKDictionary.from_pretrained


@dataclass
class Versions:
    """Two versions of one dictionary, as they are and as files."""

    old: BilinearQKDictionary
    new: BilinearQKDictionary
    old_files: Files
    new_files: Files


@pytest.fixture(scope="module")
def versions(llama_bridge) -> Versions:
    """Shared and not to be changed."""
    old, new = (measured_dictionary(llama_bridge, seed) for seed in (0, 1))
    return Versions(old, new, files_of(old), files_of(new))


@pytest.fixture
def repo(hub: LoopbackHub, versions: Versions) -> LoopbackHub:
    """The Hub with the old version in FOLDER."""
    hub.create_repo(REPO)
    publish(hub, versions.old_files)
    return hub


@pytest.fixture
def load_it(repo: LoopbackHub, hub_cache: Path) -> Callable[..., BilinearQKDictionary]:
    """`from_pretrained` of what `repo` holds."""
    return lambda **options: from_pretrained(REPO, FOLDER, cache_dir=hub_cache, **options)


def head(repo: LoopbackHub) -> str:
    return repo.commits(REPO)[0].oid


def transfers(name: str) -> list[str]:
    return [f"HEAD {name} 200", f"GET {name} 200"]


# What is loaded, in processes of their own


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, Any]]:
    """What processes of their own published and loaded; the last of them with HF_HUB_OFFLINE, when the Hub was gone."""
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
        command, pipe = [sys.executable, hub_cases.__file__, str(cache)], subprocess.PIPE
        with (
            open(f"{scratch}/log", "w+") as log,
            subprocess.Popen(
                command, env=os.environ | variables, text=True, stdin=pipe, stdout=pipe, stderr=log
            ) as process,
        ):
            watchdog = Timer(240, process.kill)
            watchdog.start()
            assert process.stdout is not None
            found = process.stdout.readline()
            hub.stop()
            rest, _ = process.communicate("\n")
            watchdog.cancel()
            log.seek(0)
            said = log.read()
        assert process.returncode == 0, said[-3000:]
        yield {**json.loads(found), "offline": json.loads(rest), "log": said}


def test_another_process_loads_the_same_dictionary(processes):
    """Bits, patterns and figures; two processes that meet an empty cache at once included."""
    ours = processes["ours"]
    assert set(ours["hashes"]) > {
        "query.W_dec",
        "feature_map.indices",
        "transcoders",
        "feature_map",
    }
    assert ours["figures"] == ours["metrics"]
    assert processes["at_once"] == [ours, ours]


def test_two_processes_at_once_leave_a_whole_cache(processes):
    commit = processes["commit"]
    expected = {f"models--org--repo/snapshots/{commit}/{FOLDER}/{name}" for name in FILES} | {
        "models--org--repo/refs/main"
    }
    cached = {path for path in processes["cached"] if "/blobs/" not in path}
    folders = {str(parent) for path in expected for parent in Path(path).parents} - {"."} | {
        "models--org--repo/blobs"
    }
    assert cached == expected | folders
    assert sum("/blobs/" in path for path in processes["cached"]) == len(FILES)


def test_offline_the_cache_is_enough(processes):
    assert processes["offline"]["loaded"] == processes["ours"]
    assert (
        "the Hub cannot be reached (OfflineModeIsEnabled): using the cached copy of org/repo"
        in processes["log"]
    )
    assert processes["offline"]["missing"].startswith(
        "ConnectionError: The Hub cannot be reached for org/repo (Offline"
    )


def test_a_cache_that_cannot_be_written(processes):
    """What it holds is loaded; the rest is refused, naming it."""
    assert processes["read_only"] == [processes["ours"], processes["ours"]]
    assert processes["unchanged"]
    assert processes["refused"] == (
        f"OSError: The cache {processes['empty']} cannot be written (Permission denied): pass cache_dir= or set HF_HOME."
    )


def test_a_shared_cache_whose_folders_are_somebody_elses(processes):
    """Today a PermissionError, documented for the Hub's refusals, that names the file moved (`_adopt`)."""
    assert re.match(
        r"OSError: The cache \S+/cache cannot be written \(Permission denied\): ",
        processes["refused_below"],
    )


# What is loaded, here


def test_the_stock_loaders_give_the_same_dictionary(repo, versions, tmp_path, monkeypatch, load_it):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "stock"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in versions.old_files.items():
        (folder / name).write_bytes(data)
    loaded = [
        load_it(),
        SAE.from_pretrained(REPO, FOLDER),
        SAE.load_from_disk(folder),
        from_pretrained(str(folder)),
    ]
    for d in loaded:
        assert type(d) is BilinearQKDictionary
        assert same(d, versions.old)
    assert [d.metrics == versions.old.metrics for d in loaded] == [True, False, False, True]
    assert [d.runner_cfg == versions.old.runner_cfg for d in loaded] == [True, False, False, True]


def test_what_the_stock_loader_has_cached_is_verified_too(repo, versions, tmp_path, monkeypatch):
    """It caches config and weights alone."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "stock"))
    SAE.from_pretrained(REPO, FOLDER)
    assert same(d := from_pretrained(REPO, FOLDER, verify="strict"), versions.old)
    assert d.metrics == versions.old.metrics


def test_parameters_are_saelenss_in_its_order_then_ours():
    stock = inspect.signature(SAE.from_pretrained).parameters
    ours = inspect.signature(from_pretrained).parameters
    assert list(ours)[: len(stock)] == list(stock)
    assert {name: ours[name].default for name in list(stock)[2:]} == {
        n: p.default for n, p in list(stock.items())[2:]
    }
    assert list(ours)[len(stock) :] == ["revision", "token", "cache_dir", "verify"]
    assert all(
        ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(stock) :]
    )


def test_with_cfg_and_sparsity(repo, hub_cache, versions):
    load_all = BilinearQKDictionary.from_pretrained_with_cfg_and_sparsity
    for positional in ((), ("cpu", "float32", False, None, False)):
        d, cfg, sparsity = load_all(REPO, FOLDER, *positional, cache_dir=hub_cache)
        assert same(d, versions.old)
        assert cfg == d.cfg.to_dict() == versions.old.cfg.to_dict()
        assert sparsity is None


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype(hub, hub_cache, llama_bridge, stored):
    hub.create_repo(REPO)
    d = tiny_dictionary(llama_bridge).to(stored)
    publish(hub, files_of(d))
    assert same(from_pretrained(REPO, FOLDER, dtype=None, cache_dir=hub_cache), d)
    assert same(from_pretrained(REPO, FOLDER, cache_dir=hub_cache), d.to(torch.float32))
    for name in ("float16", "bfloat16", "float64"):
        loaded = from_pretrained(REPO, FOLDER, dtype=name, cache_dir=hub_cache)
        assert {str(p.dtype) for p in loaded.parameters()} == {f"torch.{name}"}
        assert torch.equal(loaded.feature_map.indices, d.feature_map.indices)


def test_folding(load_it, versions):
    folded = load_it(fold_W_dec_norm=True)
    torch.testing.assert_close(folded.get_W_dec_norm(), torch.ones(folded.cfg.d_sae))
    x = torch.randn(2, 7, folded.cfg.d_in, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(folded.scores(x), versions.old.scores(x), rtol=1e-4, atol=1e-4)


def test_a_converter_loads_through_saelens(repo, versions, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "stock"))
    seen = []

    def converter(repo_id, folder_name, device, force_download, cfg_overrides):
        seen.append((repo_id, folder_name, device, force_download, cfg_overrides["dtype"]))
        return sae_lens_huggingface_loader(
            repo_id, folder_name, device, force_download, cfg_overrides
        )

    assert same(from_pretrained(REPO, FOLDER, converter=converter), versions.old)
    assert seen == [(REPO, FOLDER, "cpu", False, "float32")]
    with pytest.raises(
        ValueError,
        match="SAELens's own loader takes no revision, token, cache_dir or verify='strict'",
    ):
        from_pretrained(REPO, FOLDER, converter=converter, revision="main")


def test_revisions(repo, versions, load_it):
    first = head(repo)
    newest = publish(repo, versions.new_files)
    assert same(load_it(), versions.new)
    assert same(load_it(revision=newest), versions.new)
    assert same(load_it(revision=first), versions.old)


def test_branches(hub, hub_cache, versions):
    hub.create_repo(REPO)
    for branch, files in (("v1.0", versions.old_files), ("feature/one", versions.new_files)):
        hub._repos[REPO].refs[branch] = hub.commits(REPO)[-1].oid
        publish(hub, files, revision=branch)
    assert same(from_pretrained(REPO, FOLDER, revision="v1.0", cache_dir=hub_cache), versions.old)
    assert same(
        from_pretrained(REPO, FOLDER, revision="feature/one", cache_dir=hub_cache), versions.new
    )
    hub.stop()
    assert same(
        from_pretrained(REPO, FOLDER, revision="feature/one", cache_dir=hub_cache), versions.new
    )


@pytest.mark.parametrize("kind", ["private", "gated"])
def test_tokens(hub, hub_cache, versions, kind, monkeypatch):
    hub.create_repo(REPO, **{kind: True})
    publish(hub, versions.old_files)
    assert same(from_pretrained(REPO, FOLDER, token="hf_owner", cache_dir=hub_cache), versions.old)
    assert {request.token for request in hub.requests} == {"hf_owner"}
    hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    from_pretrained(REPO, FOLDER, cache_dir=hub_cache / "other")
    assert {request.token for request in hub.requests} == {"hf_owner"}


# Names


@pytest.fixture
def name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versions: Versions
) -> Callable[..., None]:
    """Put `tiny` into a registry of one's own, as published in REPO; values override."""

    def write(revision: str, **values: str) -> None:
        entry = {"status": "published", "repo": REPO, "folder": FOLDER, "revision": revision}
        sums = {"sha256": sha256(versions.old_files[SUMS]).hexdigest()}
        (tmp_path / "registry.yaml").write_text(
            yaml.safe_dump({"tiny": {**entry, **sums, **values}})
        )
        monkeypatch.setenv(REGISTRY_VARIABLE, str(tmp_path / "registry.yaml"))

    return write


def test_a_name_stays_at_its_commit(repo, versions, hub_cache, name_it):
    name_it(first := head(repo))
    assert same(from_pretrained("tiny", cache_dir=hub_cache), versions.old)
    newest = publish(repo, versions.new_files)
    served(repo)
    assert same(from_pretrained("tiny", cache_dir=hub_cache), versions.old)
    assert same(from_pretrained("tiny", cache_dir=hub_cache, revision=first), versions.old)
    assert served(repo) == []
    for revision in ("main", newest):
        assert same(from_pretrained("tiny", cache_dir=hub_cache, revision=revision), versions.new)


def test_a_name_fixes_the_sum_of_the_sums(repo, versions, hub_cache, name_it):
    """Whoever changes the folder with its sums, at the same commit, still does not pass."""
    name_it(head(repo), sha256=sha256(versions.new_files[SUMS]).hexdigest())
    for verify in (True, "strict"):
        with pytest.raises(ValueError, match=f"{SUMS} is not the file the registry names"):
            from_pretrained("tiny", cache_dir=hub_cache, verify=verify)
        assert tree(hub_cache) == {}
    assert same(from_pretrained("tiny", cache_dir=hub_cache, verify=False), versions.old)
    with pytest.raises(ValueError, match=f"{SUMS} is not the file the registry names"):
        from_pretrained("tiny", cache_dir=hub_cache)


def test_a_name_that_has_a_sum_needs_sums(hub, versions, hub_cache, name_it):
    hub.create_repo(REPO)
    name_it(publish(hub, {name: data for name, data in versions.old_files.items() if name != SUMS}))
    with pytest.raises(
        ValueError,
        match=f"has no {SUMS}: its files cannot be verified, and verification was asked for",
    ):
        from_pretrained("tiny", cache_dir=hub_cache)
    assert tree(hub_cache) == {}


def test_shipped_then_cached_then_from_the_hub(
    repo, versions, hub_cache, name_it, tmp_path, monkeypatch
):
    shipped = tmp_path / "shipped"
    (shipped / "tiny").mkdir(parents=True)
    for name, data in versions.new_files.items():
        (shipped / "tiny" / name).write_bytes(data)
    (shipped / "registry.yaml").write_text("tiny: {status: shipped}")
    for module in ("loading", "registry"):
        monkeypatch.setattr(f"sae_lens_qk.pretrained.{module}.shipped_folder", lambda: shipped)
    assert same(from_pretrained("tiny", cache_dir=hub_cache), versions.new)
    assert from_pretrained("tiny", cache_dir=hub_cache).metrics == versions.new.metrics
    assert served(repo) == []
    with pytest.raises(ValueError, match="tiny comes with the package and has no revision 'main'"):
        from_pretrained("tiny", revision="main")

    name_it(head(repo))
    assert same(from_pretrained("tiny", cache_dir=hub_cache), versions.old)
    assert len(served(repo)) == 1 + 2 * len(FILES)
    assert same(from_pretrained("tiny", cache_dir=hub_cache), versions.old)
    assert served(repo) == []


ESCAPES = ["..", "../x", "a/../b", "/tmp", "", ".", "a//b", "a/", "a\\b", "..\\x", "a\0b"]


@pytest.mark.parametrize("folder", ESCAPES)
def test_folders_outside_the_repository_are_refused(repo, hub_cache, name_it, folder):
    plain = r"The folder must be a plain path inside the repository, such as 'gpt2-small-L10', got"
    with pytest.raises(ValueError, match=plain):
        from_pretrained(REPO, folder, cache_dir=hub_cache)
    name_it(head(repo), folder=folder)
    with pytest.raises(ValueError, match=plain if folder else "folder must match"):
        from_pretrained("tiny", cache_dir=hub_cache)
    assert served(repo) == []
    assert tree(hub_cache) == {}


def test_an_absolute_folder_is_not_read_in_place_of_the_repositorys(
    repo, versions, hub_cache, tmp_path
):
    versions.old.save_model(tmp_path / "here")
    with pytest.raises(ValueError, match="must be a plain path inside the repository"):
        from_pretrained(REPO, str(tmp_path / "here"), cache_dir=hub_cache)


@pytest.mark.parametrize(
    "repo_id", ["../repo", "/org/repo", "org/repo/x", "org/..", "org/re\\po", "org/"]
)
def test_bad_repositories_are_refused(repo, hub_cache, repo_id, name_it):
    with pytest.raises(ValueError, match="Repo id") as error:
        from_pretrained(repo_id, FOLDER, cache_dir=hub_cache)
    assert "\n" not in str(error.value)
    name_it(head(repo), repo=repo_id)
    with pytest.raises(ValueError, match=r"Repo id|repo must match"):
        from_pretrained("tiny", cache_dir=hub_cache)
    assert served(repo) == []
    assert tree(hub_cache) == {}


# What is asked of the Hub


def test_requests(repo, versions, load_it):
    others = sorted(set(FILES) - {"cfg.json", SUMS})
    first_time = [
        "HEAD cfg.json 200",
        *transfers("cfg.json"),
        *transfers(SUMS),
        *[line for n in others for line in transfers(n)],
    ]
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
    assert caplog.messages == [
        f"the Hub cannot be reached ({error}): using the cached copy of {REPO}"
    ]
    assert [*waits, *hub_waits] == []
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


# What went wrong leaves the cache as it was


def header_only(header: dict[str, Any]) -> bytes:
    """A safetensors file without data."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


class Payload:
    """Leaves a file in the working folder when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("payload-has-run"),)


def with_tensor(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[Files], Files]:
    def changed(files: Files) -> Files:
        tensors = load(files[WEIGHTS])
        return with_sums(
            {**files, WEIGHTS: save({**tensors, name: change(tensors[name]).contiguous()})}
        )

    return changed


def with_file(name: str, data: bytes) -> Callable[[Files], Files]:
    return lambda files: with_sums({**files, name: data})


def with_cfg(**changes: Any) -> Callable[[Files], Files]:
    return lambda files: with_sums(
        {**files, "cfg.json": json.dumps({**json.loads(files["cfg.json"]), **changes}).encode()}
    )


def listing(name: str) -> Callable[[Files], Files]:
    """Sums that list this file too."""
    return lambda files: {
        **files,
        SUMS: files[SUMS] + f"{sha256(b'').hexdigest()}  {name}\n".encode(),
    }


def without(name: str) -> Callable[[Files], Files]:
    return lambda files: {other: data for other, data in files.items() if other != name}


def spoilt(method: str, pattern: str, **how: Any) -> dict[str, Any]:
    return {"method": method, "pattern": pattern, **how}


@dataclass
class Mishap:
    """How a download goes wrong, and the error that says so."""

    error: type[Exception]
    message: str
    change: Callable[[Files], Files] = dict
    """Of the files before they are published."""
    fault: dict[str, Any] = field(default_factory=dict)
    """Of the Hub, for good."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `from_pretrained`."""
    repo: dict[str, bool] = field(default_factory=dict)
    """Of the repository."""
    stopped: bool = False
    newest: bool = False
    """Ask for the newest commit by its name: a branch would be served from the cache."""


PRIVATE, GATED, STRANGER = {"private": True}, {"gated": True}, {"token": "hf_stranger"}
REFUSED = {
    "no repository": Mishap(
        FileNotFoundError, "There is no repository org/nowhere", options={"release": "org/nowhere"}
    ),
    # The Hub does not tell the two apart, so this cannot be the PermissionError of docs/publishing.md and `fetched`.
    "private": Mishap(
        FileNotFoundError, "There is no repository org/repo, or it is private", repo=PRIVATE
    ),
    "private to others": Mishap(
        FileNotFoundError, "or it is private and the token", repo=PRIVATE, options=STRANGER
    ),
    "gated": Mishap(PermissionError, "org/repo is gated: accept its terms", repo=GATED),
    "gated for others": Mishap(
        PermissionError, "org/repo is gated: accept its terms", repo=GATED, options=STRANGER
    ),
    "bad token": Mishap(
        PermissionError,
        r"refuses this token for org/repo \(401\): Invalid",
        options={"token": "hf_x"},
    ),
    "no revision": Mishap(
        FileNotFoundError, "org/repo has no revision 'nowhere'", options={"revision": "nowhere"}
    ),
    "no commit": Mishap(
        FileNotFoundError, f"has no revision '{'0' * 40}'", options={"revision": "0" * 40}
    ),
    "no folder": Mishap(
        FileNotFoundError,
        "no file nowhere/cfg.json at revision 'main'",
        options={"sae_id": "nowhere"},
    ),
    # Today the message of these two names cfg.json (`explained` in `fetched`).
    "no weights": Mishap(
        FileNotFoundError, f"no file {FOLDER}/{WEIGHTS} at revision", without(WEIGHTS)
    ),
    "no metrics": Mishap(
        FileNotFoundError, f"no file {FOLDER}/metrics.json at revision", without("metrics.json")
    ),
    "no sums": Mishap(
        ValueError, f"has no {SUMS}: its files cannot", without(SUMS), options={"verify": "strict"}
    ),
    "unknown verify": Mishap(
        ValueError, "verify must be True, False or 'strict', got 'no'", options={"verify": "no"}
    ),
}
UNREACHED, FAILING = (
    "The Hub cannot be reached for org/repo",
    r"The Hub fails on org/repo \(50\d\), after several attempts",
)
CUT = r"cut short|should be of size \d+ but has size"
TRANSFERS = {
    # Today these two are the client's own message, of two lines.
    "short file": Mishap(OSError, CUT, fault=spoilt("GET", WEIGHTS, truncate=500)),
    "short sums": Mishap(OSError, CUT, fault=spoilt("GET", SUMS, truncate=70)),
    "file cut off": Mishap(
        ConnectionError, UNREACHED, fault=spoilt("GET", WEIGHTS, truncate=500, drop=True)
    ),
    "dropped": Mishap(ConnectionError, UNREACHED, fault=spoilt("GET", "metrics.json", drop=True)),
    "failing": Mishap(
        ConnectionError, FAILING, fault=spoilt("HEAD|GET", "", status=503), newest=True
    ),
    "failing later": Mishap(ConnectionError, FAILING, fault=spoilt("GET", WEIGHTS, status=500)),
    "failing at a HEAD": Mishap(
        ConnectionError, UNREACHED, fault=spoilt("HEAD", WEIGHTS, status=500)
    ),
    "not a Hub": Mishap(
        ConnectionError, "is not served by a Hub", fault=spoilt("HEAD", "", status=200)
    ),
    "stopped": Mishap(ConnectionError, UNREACHED, stopped=True, newest=True),
}
TERABYTES = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
BEYOND_64_BITS = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}
CORRUPTED, PLAIN = (
    f"{WEIGHTS} is truncated or corrupted",
    "is not a SHA-256 sum and the name of a file in its folder",
)
CONTENTS = {
    "shapes": Mishap(
        ValueError, r"query.W_enc .* \(20, 29\), .* \(29, 20\)", with_tensor("query.W_enc", torch.t)
    ),
    "pairs": Mishap(
        ValueError,
        "Pair indices must lie in",
        with_tensor("feature_map.digits", lambda d: d.index_fill(0, torch.tensor(3), 9)),
    ),
    "NaN": Mishap(
        ValueError,
        "not finite, first in key.b_dec",
        with_tensor("key.b_dec", lambda b: b * torch.nan),
    ),
    "terabytes of weights": Mishap(
        ValueError, CORRUPTED, with_file(WEIGHTS, header_only({"query.W_enc": TERABYTES}))
    ),
    "terabytes of header": Mishap(
        ValueError, CORRUPTED, with_file(WEIGHTS, (2**42).to_bytes(8, "little") + b"{}")
    ),
    "shape beyond 64 bits": Mishap(
        ValueError, CORRUPTED, with_file(WEIGHTS, header_only({"query.W_enc": BEYOND_64_BITS}))
    ),
    "billions of features": Mishap(
        ValueError, r"should have shape \(10000000000, 24\)", with_cfg(d_query=10**10)
    ),
    "billions of pairs": Mishap(
        ValueError, r"should have shape \(10000000000, 3\)", with_cfg(n_pairs=10**10)
    ),
    "pickle": Mishap(ValueError, CORRUPTED, with_file(WEIGHTS, pickle.dumps(Payload()))),
    "listed above": Mishap(ValueError, PLAIN, listing("../cfg.json")),
    "listed elsewhere": Mishap(ValueError, PLAIN, listing("/etc/passwd")),
    "listed below": Mishap(ValueError, PLAIN, listing("sub/cfg.json")),
    "listed in Windows": Mishap(ValueError, PLAIN, listing("..\\cfg.json")),
    "listed itself": Mishap(ValueError, PLAIN, listing(SUMS)),
    "sums of another version": Mishap(
        ValueError, "cfg.json does not have the SHA-256 sum", lambda f: {**f, "cfg.json": b"{}"}
    ),
    "weights not listed": Mishap(
        ValueError,
        f"{SUMS} does not list {WEIGHTS}",
        lambda f: {**f, **with_sums(without(WEIGHTS)(f))},
    ),
    "empty sums": Mishap(ValueError, f"{SUMS} does not list cfg.json", lambda f: {**f, SUMS: b""}),
    **{
        f"{name} flipped at {at}": Mishap(
            ValueError, f"{name}.* damaged", fault=spoilt("GET", f"/{name}", flip_byte=at)
        )
        for name, at in [*((name, 3) for name in FILES), (WEIGHTS, -2)]
    },
}
# Malformed configs: today TypeErrors and the like, some of many lines (`load_from_disk` expects a KeyError alone).
MALFORMED = {
    "features beyond 64 bits": Mishap(ValueError, "cfg.json", with_cfg(d_query=10**30)),
    "pairs beyond 64 bits": Mishap(ValueError, "cfg.json", with_cfg(n_pairs=10**30)),
    "negative pairs": Mishap(ValueError, "cfg.json", with_cfg(n_pairs=-1)),
    "text for a number": Mishap(ValueError, "cfg.json", with_cfg(d_query="29")),
    "attention a number": Mishap(ValueError, "cfg.json", with_cfg(attention=5)),
    "no object": Mishap(ValueError, "cfg.json", with_file("cfg.json", b"[]")),
    "nested": Mishap(ValueError, "cfg.json", with_file("cfg.json", b"[" * 100_000)),
    "not text": Mishap(ValueError, "cfg.json", with_file("cfg.json", b"\xff")),
}
MISHAPS = REFUSED | TRANSFERS | CONTENTS | MALFORMED


@pytest.mark.parametrize("held", ["empty", "older"])
@pytest.mark.parametrize("name", MISHAPS)
def test_a_mishap_leaves_the_cache_as_it_was(
    name, held, hub, hub_cache, versions, waits, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "jaxtyping.config.jaxtyping_disable", True
    )  # what users meet outside pytest
    mishap = MISHAPS[name]
    hub.create_repo(REPO, **mishap.repo)
    publish(hub, with_sums({name: versions.old_files[name] for name in ("cfg.json", WEIGHTS)}))
    if held == "older":
        from_pretrained(REPO, FOLDER, token="hf_owner", cache_dir=hub_cache)
    newest = publish(
        hub, mishap.change(versions.new_files), delete=[f"{FOLDER}/{file}" for file in FILES]
    )
    if mishap.fault:
        hub.fault(**mishap.fault, times=None)
    if mishap.stopped:
        hub.stop()
    before = tree(hub_cache)
    options = {
        "release": REPO,
        "sae_id": FOLDER,
        "revision": newest if mishap.newest else None,
        **mishap.options,
    }
    served(hub)
    with pytest.raises(mishap.error, match=mishap.message) as caught, memory_limit(megabytes=4096):
        from_pretrained(cache_dir=hub_cache, **options)
    assert type(caught.value) is mishap.error
    assert "\n" not in str(caught.value)
    assert tree(hub_cache) == before
    assert not any("passwd" in line for line in served(hub))
    assert not list(tmp_path.glob("payload*"))
    if held == "older":
        served(hub)
        options = {"revision": hub.commits(REPO)[1].oid, "token": "hf_owner"}
        assert same(from_pretrained(REPO, FOLDER, cache_dir=hub_cache, **options), versions.old)
        assert served(hub) == []


@pytest.mark.parametrize("name", [WEIGHTS, SUMS])
def test_a_damaged_download_can_be_repeated(repo, versions, load_it, hub_cache, name):
    repo.fault("GET", name, flip_byte=5)
    with pytest.raises(ValueError, match="damaged"):
        load_it()
    assert same(load_it(verify="strict"), versions.old)


def test_a_commit_during_the_download_does_not_mix_versions(
    repo, versions, load_it, hub_cache, monkeypatch
):
    first = head(repo)

    def download(place: HubFolder) -> Path:
        publish(repo, versions.new_files)
        return original(place)

    original = hub_module._download
    monkeypatch.setattr(hub_module, "_download", download)
    assert same(load_it(), versions.old)
    assert (hub_cache / "models--org--repo/refs/main").read_text() == first


def test_a_cache_where_none_can_be(repo, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError,
        match=f"The cache {tmp_path}/file/hub cannot be written .*: pass cache_dir= or set HF_HOME",
    ) as error:
        from_pretrained(REPO, FOLDER, cache_dir=tmp_path / "file" / "hub")
    assert "\n" not in str(error.value)


def test_attempts_at_a_hub_that_keeps_failing(repo, load_it, waits, hub_waits):
    repo.fault("GET", WEIGHTS, status=500, times=None)
    with pytest.raises(ConnectionError):
        load_it()
    assert [line for line in served(repo) if line.endswith("500")] == [f"GET {WEIGHTS} 500"] * 4
    assert (waits, hub_waits) == ([0.5, 1, 2], [])


def test_a_folder_without_sums(hub, versions, hub_cache):
    hub.create_repo(REPO)
    commit = publish(hub, without(SUMS)(versions.old_files))
    for _ in range(2):
        with pytest.warns(
            UserWarning,
            match=rf"has no {SUMS}: its files cannot be verified\. Load with verify='strict'",
        ):
            assert same(
                from_pretrained(REPO, FOLDER, cache_dir=hub_cache, revision=commit), versions.old
            )
    assert same(
        from_pretrained(REPO, FOLDER, cache_dir=hub_cache, verify=False, revision=commit),
        versions.old,
    )
    assert len(served(hub)) == 6  # the second and third time none
    with pytest.raises(ValueError, match="verification was asked for"):
        from_pretrained(REPO, FOLDER, cache_dir=hub_cache, verify="strict", revision=commit)


def test_unverified_loading_takes_what_comes(repo, load_it):
    repo.fault("GET", "README.md", flip_byte=3)
    d = load_it(verify=False)
    assert d.metrics is not None
    with pytest.raises(ValueError, match=r"README.md does not have the SHA-256 sum"):
        load_it()


STATED = rf"does not have the SHA-256 sum that {SUMS} states.*force_download=True"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        *((name, "flipped", f"{name} {STATED}") for name in FILES if name != SUMS),
        (WEIGHTS, "shortened", f"{WEIGHTS} {STATED}"),
        (WEIGHTS, "emptied", f"{WEIGHTS} {STATED}"),
        (WEIGHTS, "gone", None),
        (SUMS, "flipped", None),
        (SUMS, "shortened", None),
        (SUMS, "emptied", None),
        (SUMS, "gone", None),
    ],
)
def test_a_damaged_cache_is_noticed_and_healed(
    repo, versions, load_it, hub_cache, name, damage, message
):
    """By `force_download` where sums tell, at once where a file is lost or the sums cannot be read."""
    load_it()
    healthy = tree(hub_cache)
    (link,) = hub_cache.rglob(f"snapshots/*/{FOLDER}/{name}")
    blob, data = link.resolve(), link.read_bytes()
    changed = {
        "flipped": data[:9] + bytes([data[9] ^ 0xFF]) + data[10:],
        "shortened": data[:-20],
        "emptied": b"",
    }
    if damage == "gone":
        blob.unlink()
    else:
        blob.write_bytes(changed[damage])
    for revision in ("main", head(repo)):
        if message is None:
            assert same(load_it(revision=revision), versions.old)
        else:
            with pytest.raises(ValueError, match=message):
                load_it(revision=revision)
    assert same(load_it(force_download=True), versions.old)
    assert tree(hub_cache) == healthy
