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
from sae_lens_qk.pretrained.card import SUMMARY_FIELDS, FolderSummary, repository_card
from sae_lens_qk.pretrained.checksums import CARD, CONFIG, METRICS, SUMS, sha256_of
from sae_lens_qk.pretrained.errors import explained, is_transient, retrying
from sae_lens_qk.pretrained.folder import read_document
from sae_lens_qk.pretrained.hub import Token

_BRANCH_MOVED_ON = 412
"""The Hub's answer when somebody has committed since `parent_commit`."""


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
        # an attempt after somebody else's commit starts over from their commit
        for attempt in retrying(lambda error: is_transient(error) or _has_moved_on(error)):
            with attempt:
                repository.create(private)
                return repository.commit(staged, folder, commit_message, create_pr)
    raise AssertionError("Retrying returns or raises")


def registry_entry(
    repo_id: str,
    folder: str,
    commit: str,
    token: Token = None,
) -> str:
    """Lines of a registry that name a published dictionary.

    They pin it to its commit and to the sum of its SHA256SUMS.
    """
    path = f"{folder}/{SUMS}"
    with tempfile.TemporaryDirectory() as cache, explained(repo_id, commit, path):
        sums = hf_hub_download(
            repo_id,
            path,
            revision=commit,
            token=token,
            cache_dir=cache,
        )
        sums_sha256 = sha256_of(Path(sums))
    entry = {
        "status": "published",
        "repo": repo_id,
        "folder": folder,
        "revision": commit,
        "sha256": sums_sha256,
    }
    return yaml.safe_dump({PurePosixPath(folder).name: entry}, sort_keys=False)


@contextmanager
def _writable(repo_id: str) -> Iterator[None]:
    """The repository exists now: what the Hub calls missing is what this token may not write."""
    try:
        yield
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        raise PermissionError(
            f"{repo_id} can be written with a token of its owner alone: pass token= or log in with "
            "`hf auth login`."
        ) from error


class _Repository(NamedTuple):
    api: HfApi
    repo_id: str
    revision: str
    cache: Path

    def create(self, private: bool) -> None:
        self.api.create_repo(self.repo_id, private=private, exist_ok=True)
        # an existing repository is not made private: that would be somebody's surprise
        if private and not self.api.model_info(self.repo_id).private:
            raise ValueError(
                f"{self.repo_id} exists and is public: private=True is for a repository that is "
                "created here."
            )
        if self.revision != "main":
            try:
                self.api.model_info(self.repo_id, revision=self.revision)
            except RevisionNotFoundError:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def commit(
        self,
        staged: Path,
        folder: str,
        message: str,
        create_pr: bool,
    ) -> CommitInfo:
        """Put the staged files into the folder and renew the repository's card.

        Fails if somebody else commits meanwhile.
        """
        # everything is read at one commit, and the new one must be its child
        repository = self.api.model_info(self.repo_id, revision=self.revision)
        head = str(repository.sha)
        present = self.api.list_repo_files(self.repo_id, revision=head)
        files = {f"{folder}/{path.name}": path for path in staged.iterdir()}
        additions = [CommitOperationAdd(path, file) for path, file in sorted(files.items())]
        card = self._card(head, present, folder, staged)
        additions.append(CommitOperationAdd(CARD, card.encode()))
        # files of an older version; folders below are other dictionaries
        deletions = [
            CommitOperationDelete(path)
            for path in sorted(set(present) - set(files))
            if str(PurePosixPath(path).parent) == folder
        ]
        return self.api.create_commit(
            self.repo_id,
            [*additions, *deletions],
            commit_message=message,
            revision=self.revision,
            parent_commit=head,
            create_pr=create_pr,
        )

    def _card(
        self,
        head: str,
        present: list[str],
        folder: str,
        staged: Path,
    ) -> str:
        """The repository's card with what is in it and what comes."""
        summaries = self._summaries(head, present)
        summaries[folder] = FolderSummary(
            (staged / CARD).read_text(),
            json.loads((staged / CONFIG).read_text()),
            read_document(staged, METRICS),
        )
        existing = self._read(CARD, head) if CARD in present else None
        return repository_card(existing, self.repo_id, summaries)

    def _summaries(
        self,
        head: str,
        present: list[str],
    ) -> dict[str, FolderSummary]:
        """Every QK dictionary of the repository, by folder."""
        summaries = {}
        for path in map(PurePosixPath, present):
            # a cfg.json at the top is not a folder's
            if path.name != CONFIG or not path.parent.name:
                continue
            # SAEs of other kinds may lie in the same repository
            cfg = _json_object(self._read(str(path), head)) or {}
            if cfg.get("architecture") != ARCHITECTURE or not cfg.keys() >= SUMMARY_FIELDS:
                continue
            texts = []
            for name in (CARD, METRICS):
                document = str(path.parent / name)
                texts.append(self._read(document, head) if document in present else "")
            card, metrics = texts
            summaries[str(path.parent)] = FolderSummary(card, cfg, _json_object(metrics))
        return summaries

    def _read(
        self,
        path: str,
        head: str,
    ) -> str:
        file = self.api.hf_hub_download(self.repo_id, path, revision=head, cache_dir=self.cache)
        # other people's folders are none of ours: only the repository's card has to be text
        return Path(file).read_text(errors="strict" if path == CARD else "replace")


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None


def _has_moved_on(error: BaseException) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response.status_code == _BRANCH_MOVED_ON
