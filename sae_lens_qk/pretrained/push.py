"""`push_to_hub`: a dictionary into a folder of a Hub repository, in one atomic commit."""

import json
import logging
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
from sae_lens_qk.pretrained.folder import documents, read_document, write_documents
from sae_lens_qk.pretrained.hub import Token, check_folder_name

logger = logging.getLogger("sae_lens_qk")

_MOVED = 412
"""The Hub's answer when the branch has moved on since `parent_commit`."""


def push_to_hub(
    dictionary: Any,
    repo_id: str,
    folder: str,
    *,
    private: bool = False,
    revision: str = "main",
    token: Token = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Publish a dictionary as `<repo_id>/<folder>`: weights, config, figures, sums, its card, and the repository's card.

    Everything goes into one commit, so a reader sees either the old folder or the new one; what has not changed makes no
    commit. The repository's README lists all its dictionaries and keeps whatever else it says. Stored in the dictionary's
    present dtype (`d.to(torch.float16)` halves it).

    Args:
        repo_id: "org/repo", created if need be.
        folder: where in it; other folders stay as they are.
        private: of a repository that is created here.
        revision: branch, created from main if need be.
        token: as in huggingface_hub.
        commit_message: default "Publish <folder>".
        create_pr: open a pull request against `revision` instead of committing to it.
    Returns:
        The Hub client's CommitInfo; `oid` is the commit to pin with `from_pretrained(..., revision=oid)`.
    Raises:
        ValueError: a bad folder name, or a dictionary that does not survive saving and loading; nothing is sent.
        FileNotFoundError, PermissionError, ConnectionError, OSError: see `sae_lens_qk.pretrained.errors`; the
            repository is as it was, though a new one or a new branch may have been created, empty.
    """
    check_folder_name(folder)
    if dictionary.metrics is None:
        logger.warning(
            "the card will say 'not measured': set d.metrics = qk.evaluate(d, model, tokens) before pushing"
        )
    with tempfile.TemporaryDirectory() as scratch:
        name = PurePosixPath(folder).name
        staged = Path(scratch) / "staged" / name
        dictionary.save_model(staged)
        write_documents(staged, documents(dictionary, name, source=f'"{repo_id}", "{folder}"'))
        Any.load_from_disk(staged)
        repository = _Repository(HfApi(token=token), repo_id, revision, Path(scratch) / "cache")
        with explained(repo_id, revision), _writable(repo_id):
            for attempt in retrying(lambda error: is_transient(error) or _has_moved(error)):
                with attempt:
                    repository.create(private)
                    return repository.commit(
                        staged, folder, commit_message or f"Publish {folder}", create_pr
                    )
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
