"""Calls of the real Hub client that the tests of the loopback Hub share."""

from hashlib import sha1
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from loopback_hub import LoopbackHub

REPO = "org/repo"
WEIGHTS = bytes(range(256)) * 40
FILES = {
    "cfg.json": b'{"d_in": 7}',
    "half/sae_weights.safetensors": WEIGHTS,
    "half/deep/notes.txt": b"notes",
}
STEPS = [1, 2, 4, 8, 8]
"""The client's waits between its six attempts."""

owner = HfApi(token="hf_owner")
stranger = HfApi(token="hf_stranger")
nobody = HfApi(token=False)
unknown = HfApi(token="hf_unknown")


def served(hub: LoopbackHub) -> list[str]:
    """The log since the last look, without the repository's name."""
    lines = [
        f"{request.method} {request.path} {request.status}".replace(REPO, "R")
        for request in hub.requests
    ]
    hub.requests.clear()
    return lines


def git_oid(data: bytes) -> str:
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


def statuses(hub: LoopbackHub) -> list[int]:
    return [request.status for request in hub.requests]


def tokens_sent(
    hub: LoopbackHub,
    method: str,
) -> set[str | None]:
    return {request.token for request in hub.requests if request.method == method}


def upload(
    api: HfApi,
    path: str,
    data: bytes,
    **options: Any,
) -> CommitInfo:
    """One file to REPO."""
    options = {"repo_id": REPO, **options}
    return api.upload_file(path_or_fileobj=data, path_in_repo=path, **options)


def commit(
    path: str,
    data: bytes = b"x",
    api: HfApi = owner,
    repo_id: str = REPO,
    **options: Any,
) -> CommitInfo:
    """One file, by the call that `push_to_hub` makes."""
    operation = CommitOperationAdd(path, data)
    return api.create_commit(repo_id, [operation], commit_message="m", **options)


def download(
    cache: Path,
    path: str = "cfg.json",
    **options: Any,
) -> bytes:
    """What the client reads of a file of REPO."""
    return Path(hf_hub_download(REPO, path, cache_dir=cache, **options)).read_bytes()


def serve_files(hub: LoopbackHub) -> LoopbackHub:
    """The Hub with FILES in REPO."""
    hub.create_repo(REPO)
    hub.commit(REPO, FILES)
    return hub


def write_files(folder: Path) -> Path:
    """FILES on disk."""
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder
