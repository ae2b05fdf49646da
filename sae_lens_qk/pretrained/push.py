"""A dictionary's folder into a Hub repository, in one atomic commit."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sae_lens_qk.config import ARCHITECTURE
from sae_lens_qk.pretrained.card import LISTED_FIELDS, Listed, repository_card
from sae_lens_qk.pretrained.checksums import CARD, CONFIG, METRICS, SUMS, sha256_of
from sae_lens_qk.pretrained.errors import explained, is_transient, retrying
from sae_lens_qk.pretrained.folder import read_document
from sae_lens_qk.pretrained.hub import Token

_MOVED = 412
"""The Hub's answer when the branch has moved on since `parent_commit`."""


def publish(
    staged: Path,
    repo_id: str,
    folder: str,
    *,
    private: bool,
    revision: str,
    token: Token,
    commit_message: str,
    create_pr: bool,
) -> CommitInfo:
    """Put a dictionary's folder onto the Hub, replacing `<repo_id>/<folder>`.

    Args:
        staged: the local folder, documents included; the rest as in `Pretrained.push_to_hub`.
    Raises:
        ValueError, FileNotFoundError, PermissionError, ConnectionError, OSError: as there.
    """
    with tempfile.TemporaryDirectory() as cache, explained(repo_id, revision), _writable(repo_id):
        repository = _Repository(HfApi(token=token), repo_id, revision, Path(cache))
        for attempt in retrying(lambda error: is_transient(error) or _has_moved(error)):
            with attempt:
                repository.create(private)
                return repository.commit(staged, folder, commit_message, create_pr)
    raise AssertionError("Retrying returns or raises")


def registry_entry(repo_id: str, folder: str, commit: str, token: Token = None) -> str:
    """Lines of a registry that give what was pushed a name, pinned to its commit and to the sum of its SHA256SUMS."""
    with tempfile.TemporaryDirectory() as scratch, explained(repo_id, commit, f"{folder}/{SUMS}"):
        sums = hf_hub_download(
            repo_id, f"{folder}/{SUMS}", revision=commit, token=token, cache_dir=scratch
        )
        entry = dict(
            status="published",
            repo=repo_id,
            folder=folder,
            revision=commit,
            sha256=sha256_of(Path(sums)),
        )
    return yaml.safe_dump({PurePosixPath(folder).name: entry}, sort_keys=False)


@contextmanager
def _writable(repo_id: str) -> Iterator[None]:
    """The repository has just been made or found: what the Hub calls missing now is what this token may not write."""
    try:
        yield
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        raise PermissionError(
            f"{repo_id} can be written with a token of its owner alone: pass token= or log in with `hf auth login`."
        ) from error


class _Repository(NamedTuple):
    api: HfApi
    repo_id: str
    revision: str
    cache: Path

    def create(self, private: bool) -> None:
        self.api.create_repo(self.repo_id, private=private, exist_ok=True)
        if private and not self.api.model_info(self.repo_id).private:
            raise ValueError(
                f"{self.repo_id} exists and is public: private=True is for a repository that is created here."
            )
        if self.revision != "main":
            try:
                self.api.model_info(self.repo_id, revision=self.revision)
            except RevisionNotFoundError:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def commit(self, staged: Path, folder: str, message: str, create_pr: bool) -> CommitInfo:
        """Put the staged files into the folder and renew the repository's card, if nobody else commits meanwhile."""
        head = str(self.api.model_info(self.repo_id, revision=self.revision).sha)
        present = self.api.list_repo_files(self.repo_id, revision=head)
        files = {f"{folder}/{path.name}": path for path in staged.iterdir()}
        stale = [
            path
            for path in present
            if str(PurePosixPath(path).parent) == folder and path not in files
        ]
        listed = {**self._dictionaries(head, present), folder: _listed(staged)}
        card = repository_card(
            self._read(CARD, head) if CARD in present else None, self.repo_id, listed
        )
        operations = [
            *(CommitOperationAdd(path, file) for path, file in sorted(files.items())),
            CommitOperationAdd(CARD, card.encode()),
            *(CommitOperationDelete(path) for path in sorted(stale)),
        ]
        return self.api.create_commit(
            self.repo_id,
            operations,
            commit_message=message,
            revision=self.revision,
            parent_commit=head,
            create_pr=create_pr,
        )

    def _dictionaries(self, head: str, present: list[str]) -> dict[str, Listed]:
        """Every QK dictionary of the repository, by folder."""
        found = {}
        for path in present:
            parent = PurePosixPath(path).parent
            if (
                PurePosixPath(path).name == CONFIG
                and parent.name
                and (cfg := _json(self._read(path, head)))
            ):
                beside = {name: str(parent / name) for name in (CARD, METRICS)}
                card, metrics = (
                    self._read(at, head) if at in present else "" for at in beside.values()
                )
                if cfg.get("architecture") == ARCHITECTURE and cfg.keys() >= LISTED_FIELDS:
                    found[str(parent)] = Listed(card, cfg, _json(metrics))
        return found

    def _read(self, path: str, head: str) -> str:
        file = Path(
            self.api.hf_hub_download(self.repo_id, path, revision=head, cache_dir=self.cache)
        )
        return file.read_text(
            errors="strict" if path == CARD else "replace"
        )  # other people's folders are none of ours


def _listed(folder: Path) -> Listed:
    return Listed(
        (folder / CARD).read_text(),
        json.loads((folder / CONFIG).read_text()),
        read_document(folder, METRICS),
    )


def _json(text: str) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None


def _has_moved(error: BaseException) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response.status_code == _MOVED
