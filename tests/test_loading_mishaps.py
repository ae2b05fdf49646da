"""`from_pretrained`: no mishap gets into the cache, and a damaged one heals."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hub_cases import (
    FILES,
    FOLDER,
    REPO,
    SUMS,
    WEIGHTS,
    Change,
    Files,
    Versions,
    memory_limit,
    publish,
    same,
    served,
    tree,
    two_versions,
    with_sums,
    without,
)
from loopback_hub import LoopbackHub

from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.pretrained import hub as hub_module
from sae_lens_qk.pretrained.hub import HubFolder

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


def header_only(header: dict[str, Any]) -> bytes:
    """A safetensors file without data."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


class Payload:
    """Leaves a file in the working folder when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("payload-has-run"),)


def file_change(
    name: str,
    data: bytes,
) -> Change:
    return lambda files: with_sums({**files, name: data})


def tensor_change(
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> Change:
    def changed(files: Files) -> Files:
        tensors = safetensors.torch.load(files[WEIGHTS])
        tensors[name] = change(tensors[name]).contiguous()
        return with_sums({**files, WEIGHTS: safetensors.torch.save(tensors)})

    return changed


def cfg_change(**values: Any) -> Change:
    def changed(files: Files) -> Files:
        cfg = json.loads(files["cfg.json"])
        return with_sums({**files, "cfg.json": json.dumps({**cfg, **values}).encode()})

    return changed


def listing(name: str) -> Change:
    """Sums that list this file too."""
    line = f"{sha256(b'').hexdigest()}  {name}\n".encode()
    return lambda files: {**files, SUMS: files[SUMS] + line}


@dataclass
class Mishap:
    """How a download goes wrong, and the error that says so."""

    error: type[Exception]
    message: str
    change: Change = dict
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


def refusal(
    error: type[Exception],
    message: str,
    **options: Any,
) -> Mishap:
    """`from_pretrained` with these options."""
    return Mishap(error, message, options=options)


def fault(
    error: type[Exception],
    message: str,
    method: str,
    pattern: str,
    newest: bool = False,
    **how: Any,
) -> Mishap:
    """Every such request is spoilt."""
    spoilt_requests = {"method": method, "pattern": pattern, **how}
    return Mishap(error, message, fault=spoilt_requests, newest=newest)


def damage(
    message: str,
    change: Change,
) -> Mishap:
    """The published files are changed."""
    return Mishap(ValueError, message, change)


UNREACHED = "The Hub cannot be reached for org/repo"
FAILING = r"The Hub fails on org/repo \(50\d\)"
CUT = r"cut short|should be of size \d+ but has size"
PRIVATE = r"There is no repository org/repo, or it is private"
GATED = "org/repo is gated: accept its terms"
CORRUPTED = f"{WEIGHTS} is truncated or corrupted"
NO_SUM = "is not a SHA-256 sum and the name of a file"

REFUSALS = {
    "no repository": refusal(
        FileNotFoundError, "There is no repository org/nowhere", release="org/nowhere"
    ),
    # the Hub does not tell a private repository from none, so this cannot be a PermissionError
    "private": Mishap(FileNotFoundError, PRIVATE, repo={"private": True}),
    "private to others": Mishap(
        FileNotFoundError, PRIVATE, repo={"private": True}, options={"token": "hf_stranger"}
    ),
    "gated": Mishap(PermissionError, GATED, repo={"gated": True}),
    "gated for others": Mishap(
        PermissionError, GATED, repo={"gated": True}, options={"token": "hf_stranger"}
    ),
    "bad token": refusal(PermissionError, r"refuses this token .*\(401\): Invalid", token="hf_x"),
    "no revision": refusal(FileNotFoundError, "has no revision 'nowhere'", revision="nowhere"),
    "no commit": refusal(FileNotFoundError, "has no revision '0000", revision="0" * 40),
    "no folder": refusal(
        FileNotFoundError, "no file nowhere/cfg.json at revision 'main'", sae_id="nowhere"
    ),
    "no weights": Mishap(FileNotFoundError, f"no file {FOLDER}/{WEIGHTS}", without(WEIGHTS)),
    "no metrics": Mishap(
        FileNotFoundError, f"no file {FOLDER}/metrics.json", without("metrics.json")
    ),
    "no sums": Mishap(ValueError, f"has no {SUMS}", without(SUMS), options={"verify": "strict"}),
    "unknown verify": refusal(ValueError, "verify must be .*, got 'no'", verify="no"),
}
TRANSFERS = {
    "short file": fault(OSError, CUT, "GET", WEIGHTS, truncate=500),
    "short sums": fault(OSError, CUT, "GET", SUMS, truncate=70),
    "file cut off": fault(ConnectionError, UNREACHED, "GET", WEIGHTS, truncate=500, drop=True),
    "dropped": fault(ConnectionError, UNREACHED, "GET", "metrics.json", drop=True),
    "failing": fault(ConnectionError, FAILING, "HEAD|GET", "", newest=True, status=503),
    "failing later": fault(ConnectionError, FAILING, "GET", WEIGHTS, status=500),
    "failing at a HEAD": fault(ConnectionError, UNREACHED, "HEAD", WEIGHTS, status=500),
    "not a Hub": fault(ConnectionError, "is not served by a Hub", "HEAD", "", status=200),
    "stopped": Mishap(ConnectionError, UNREACHED, stopped=True, newest=True),
}
for name in FILES:
    TRANSFERS[f"{name} flipped"] = fault(
        ValueError, f"{name}.* damaged", "GET", f"/{name}", flip_byte=3
    )
TRANSFERS["last weight flipped"] = fault(
    ValueError, f"{WEIGHTS}.* damaged", "GET", WEIGHTS, flip_byte=-2
)

TERABYTES = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
BEYOND_64_BITS = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}
WEIGHT_FILES = {
    "terabytes of weights": header_only({"query.W_enc": TERABYTES}),
    "terabytes of header": (2**42).to_bytes(8, "little") + b"{}",
    "shape beyond 64 bits": header_only({"query.W_enc": BEYOND_64_BITS}),
    "pickle": pickle.dumps(Payload()),
}
CONTENTS = {
    "shapes": damage(
        r"query.W_enc .* \(20, 29\), .* \(29, 20\)", tensor_change("query.W_enc", torch.t)
    ),
    "pairs": damage(
        "Pair indices must lie in",
        tensor_change("feature_map.digits", lambda d: d.index_fill(0, torch.tensor(3), 9)),
    ),
    "NaN": damage(
        "not finite, first in key.b_dec", tensor_change("key.b_dec", lambda b: b * torch.nan)
    ),
    "billions of features": damage(r"shape \(10000000000, 24\)", cfg_change(d_query=10**10)),
    "billions of pairs": damage(r"shape \(10000000000, 3\)", cfg_change(n_pairs=10**10)),
    **{name: damage(CORRUPTED, file_change(WEIGHTS, data)) for name, data in WEIGHT_FILES.items()},
}
LISTINGS = {
    "file above": damage(NO_SUM, listing("../cfg.json")),
    "file elsewhere": damage(NO_SUM, listing("/etc/passwd")),
    "file below": damage(NO_SUM, listing("sub/cfg.json")),
    "file above in Windows": damage(NO_SUM, listing("..\\cfg.json")),
    "sums of themselves": damage(NO_SUM, listing(SUMS)),
    "sums of another version": damage(
        "cfg.json does not have the SHA-256 sum", lambda files: {**files, "cfg.json": b"{}"}
    ),
    "weights not listed": damage(
        f"{SUMS} does not list {WEIGHTS}",
        lambda files: {**files, **with_sums(without(WEIGHTS)(files))},
    ),
    "empty sums": damage(f"{SUMS} does not list cfg.json", lambda files: {**files, SUMS: b""}),
}
MALFORMED_CONFIGS = {
    "features beyond 64 bits": cfg_change(d_query=10**30),
    "pairs beyond 64 bits": cfg_change(n_pairs=10**30),
    "negative pairs": cfg_change(n_pairs=-1),
    "text for a number": cfg_change(d_query="29"),
    "attention a number": cfg_change(attention=5),
    "no object": file_change("cfg.json", b"[]"),
    "nested": file_change("cfg.json", b"[" * 100_000),
    "not text": file_change("cfg.json", b"\xff"),
}
MISHAPS = REFUSALS | TRANSFERS | CONTENTS | LISTINGS
for name, change in MALFORMED_CONFIGS.items():
    MISHAPS[name] = damage("cfg.json", change)


@pytest.mark.parametrize("cached", ["empty", "older"])
@pytest.mark.parametrize("name", MISHAPS)
def test_a_mishap_leaves_the_cache_as_it_was(
    name, cached, hub, hub_cache, versions, waits, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    # as users run it, outside pytest
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    mishap = MISHAPS[name]
    hub.create_repo(REPO, **mishap.repo)
    older = {file: versions.old_files[file] for file in ("cfg.json", WEIGHTS)}
    older_commit = publish(hub, with_sums(older))
    if cached == "older":
        load(REPO, FOLDER, token="hf_owner", cache_dir=hub_cache)
    replaced = [f"{FOLDER}/{file}" for file in FILES]
    newest = publish(hub, mishap.change(versions.new_files), delete=replaced)
    if mishap.fault:
        hub.fault(**mishap.fault, times=None)
    if mishap.stopped:
        hub.stop()
    before = tree(hub_cache)
    options = {"release": REPO, "sae_id": FOLDER, **mishap.options}
    if mishap.newest:
        options["revision"] = newest
    served(hub)
    with pytest.raises(mishap.error, match=mishap.message) as error, memory_limit(megabytes=4096):
        load(cache_dir=hub_cache, **options)
    assert type(error.value) is mishap.error
    assert "\n" not in str(error.value)
    assert tree(hub_cache) == before
    assert not any("passwd" in line for line in served(hub))
    assert not list(tmp_path.glob("payload*"))
    if cached == "older":
        d = load(
            REPO,
            FOLDER,
            revision=older_commit,
            token="hf_owner",
            cache_dir=hub_cache,
        )
        assert same(d, versions.old)
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
    with pytest.raises(OSError, match=f"The cache {tmp_path}/file/hub cannot be written") as error:
        load(REPO, FOLDER, cache_dir=tmp_path / "file" / "hub")
    assert "\n" not in str(error.value)


def test_attempts_at_a_hub_that_keeps_failing(repo, load_it, waits, hub_waits):
    repo.fault("GET", WEIGHTS, status=500, times=None)
    with pytest.raises(ConnectionError):
        load_it()
    failures = [line for line in served(repo) if line.endswith("500")]
    assert failures == [f"GET {WEIGHTS} 500"] * 4
    assert waits == [0.5, 1, 2]
    assert hub_waits == []


def test_a_folder_without_sums(hub, versions, hub_cache):
    hub.create_repo(REPO)
    commit = publish(hub, without(SUMS)(versions.old_files))
    load_it = partial(load, REPO, FOLDER, cache_dir=hub_cache, revision=commit)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"has no {SUMS}: its files cannot"):
            assert same(load_it(), versions.old)
    assert same(load_it(verify=False), versions.old)
    assert len(served(hub)) == 6  # the second and third time none
    with pytest.raises(ValueError, match="verification was asked for"):
        load_it(verify="strict")


def test_unverified_loading_takes_what_comes(repo, load_it):
    repo.fault("GET", "README.md", flip_byte=3)
    d = load_it(verify=False)
    assert d.metrics is not None
    with pytest.raises(ValueError, match=r"README.md does not have the SHA-256 sum"):
        load_it()


UNEQUAL = r"does not have the SHA-256 sum .*force_download=True"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        *((name, "flipped", f"{name} {UNEQUAL}") for name in FILES if name != SUMS),
        (WEIGHTS, "shortened", f"{WEIGHTS} {UNEQUAL}"),
        (WEIGHTS, "emptied", f"{WEIGHTS} {UNEQUAL}"),
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
    """By `force_download` where sums tell; at once where a file or readable sums are missing."""
    load_it()
    healthy = tree(hub_cache)
    (link,) = hub_cache.rglob(f"snapshots/*/{FOLDER}/{name}")
    blob = link.resolve()
    data = link.read_bytes()
    damaged = {
        "flipped": data[:9] + bytes([data[9] ^ 0xFF]) + data[10:],
        "shortened": data[:-20],
        "emptied": b"",
    }
    if damage == "gone":
        blob.unlink()
    else:
        blob.write_bytes(damaged[damage])
    for revision in ("main", head(repo)):
        if message is None:
            assert same(load_it(revision=revision), versions.old)
        else:
            with pytest.raises(ValueError, match=message):
                load_it(revision=revision)
    assert same(load_it(force_download=True), versions.old)
    assert tree(hub_cache) == healthy
