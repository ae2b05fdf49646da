"""Dictionary folders out of the Hugging Face Hub, through its own client and cache.

The client puts a file into the cache before anyone could verify it. So a folder is downloaded into a staging cache beside
the real one and moved over only when the caller, who verifies and loads it, is content: a damaged or hostile download leaves
the cache as it was.
"""

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError

from sae_lens_qk.pretrained.checksums import CONFIG, SUMS, WEIGHTS, read_sums, sha256_of
from sae_lens_qk.pretrained.errors import explained, is_transient, retrying

logger = logging.getLogger("sae_lens_qk")

Token = str | bool | None
"""As the Hub client takes it: a token, True for the stored one, False for none, None for the stored one if there is one."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubFolder(NamedTuple):
    """Where a dictionary lies on the Hub."""

    repo_id: str
    folder: str
    revision: str = "main"
    token: Token = None
    cache_dir: Path = Path()

    def path_of(self, name: str) -> str:
        return f"{self.folder}/{name}"

    @property
    def cached_repo(self) -> str:
        return "models--" + self.repo_id.replace("/", "--")


def check_folder_name(folder: str) -> str:
    """A folder inside a repository, as `name` or `path/to/name`.

    Raises:
        ValueError: an absolute path, `..`, a backslash, or an empty part.
    """
    if (
        any(part in ("", ".", "..") for part in folder.split("/"))
        or "\\" in folder
        or "\0" in folder
    ):
        raise ValueError(
            f"The folder must be a plain path inside the repository, such as 'gpt2-small-L10', got {folder!r}."
        )
    return folder


def hub_cache(cache_dir: str | Path | None) -> Path:
    """The Hub client's cache, unless another is given."""
    return Path(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE).expanduser()


@contextmanager
def fetched(place: HubFolder, force_download: bool = False) -> Iterator[Path]:
    """The folder's files as a local folder: from the cache, else from the Hub.

    A download enters the cache when the body of the `with` ends without an error.

    Raises:
        FileNotFoundError: no such repository (or a private one: the Hub does not tell), revision or folder.
        PermissionError: a gated repository, or a bad token.
        ConnectionError: the Hub cannot be reached or fails, and nothing is cached.
        OSError: an incomplete download, or a cache that cannot be written.
    """
    is_commit = _COMMIT.fullmatch(place.revision) is not None
    if is_commit and not force_download and (cached := _cached(place)):
        yield cached
        return
    fallback = None if force_download else _cached(place, surely=False)
    with explained(place.repo_id, place.revision, place.path_of(CONFIG)):
        commit = _newest_commit(place, has_copy=fallback is not None)
    at_commit = place._replace(revision=commit or place.revision)
    cached = fallback if commit is None else None if force_download else _cached(at_commit)
    if cached:
        yield cached
        return
    with _staging_cache(place.cache_dir) as staging:
        if not force_download:
            _link_weights(
                place.cache_dir / place.cached_repo / "blobs", staging / place.cached_repo / "blobs"
            )
        staged = at_commit._replace(cache_dir=staging)
        with explained(place.repo_id, place.revision, place.path_of(CONFIG)):
            folder = _download(staged)
        yield folder
        with _writing(place.cache_dir):
            _adopt(staging / place.cached_repo, place.cache_dir / place.cached_repo)
            if not is_commit:
                ref = place.cache_dir / place.cached_repo / "refs" / place.revision
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(at_commit.revision)


def _newest_commit(place: HubFolder, has_copy: bool) -> str | None:
    """The commit that the revision names now; None: the Hub cannot be reached, and the copy in the cache has to do."""
    url = hf_hub_url(place.repo_id, place.path_of(CONFIG), revision=place.revision)
    try:
        found = get_hf_file_metadata(url, token=place.token, retry_on_errors=not has_copy)
    except (HTTPError, OfflineModeIsEnabled) as error:
        if not (has_copy and (is_transient(error) or isinstance(error, OfflineModeIsEnabled))):
            raise
        logger.warning(
            "the Hub cannot be reached (%s): using the cached copy of %s",
            type(error).__name__,
            place.repo_id,
        )
        return None
    if found.commit_hash is None:
        raise ConnectionError(f"{url} is not served by a Hub: its answer names no commit.")
    return found.commit_hash


def _cached(place: HubFolder, surely: bool = True) -> Path | None:
    """The folder in the cache, if every file of it is there.

    Another loader may have cached weights without their sums: `surely` asks for the sums, or for the cache's note that
    the Hub has none.
    """

    def look_up(name: str) -> Any:
        return try_to_load_from_cache(
            place.repo_id, place.path_of(name), place.cache_dir, revision=place.revision
        )

    config, sums = look_up(CONFIG), look_up(SUMS)
    if not isinstance(config, str) or (surely and sums is None):
        return None
    try:
        names = read_sums(Path(sums)) if isinstance(sums, str) else (WEIGHTS,)
    except ValueError:
        return None  # damaged: download again
    return Path(config).parent if all(isinstance(look_up(name), str) for name in names) else None


def _download(place: HubFolder) -> Path:
    """Every file that SHA256SUMS lists; without sums, config and weights."""
    folder = Path(_download_file(place, CONFIG)).parent
    try:
        names = read_sums(Path(_download_file(place, SUMS)))
    except RemoteEntryNotFoundError:
        names = {WEIGHTS: ""}
    for name in names:
        with explained(place.repo_id, place.revision, place.path_of(name)):
            _download_file(place, name)
    return folder


def _download_file(place: HubFolder, name: str) -> str:
    download = partial(hf_hub_download, token=place.token, cache_dir=place.cache_dir)
    return retrying(is_transient)(
        download, place.repo_id, place.path_of(name), revision=place.revision
    )


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"The cache {cache} cannot be written ({error.strerror}): pass cache_dir= or set HF_HOME."
        ) from error


@contextmanager
def _staging_cache(cache: Path) -> Iterator[Path]:
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        staging = tempfile.mkdtemp(
            prefix=".sae_lens_qk-", dir=cache
        )  # the same disk, so that files can be moved
    try:
        yield Path(staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _link_weights(cached: Path, staged: Path) -> None:
    """Intact weights of another commit need no second download; the cache names them by their SHA-256 sum."""
    staged.mkdir(parents=True)
    for blob in cached.glob("[0-9a-f]" * 64):
        if sha256_of(blob) == blob.name:
            with suppress(OSError):  # a disk without hard links
                (staged / blob.name).hardlink_to(blob)


def _adopt(staged: Path, cached: Path) -> None:
    """Move a staged repository into the cache, file by file and atomically; blobs first, so that no link dangles."""
    for part in ("blobs", "snapshots", ".no_exist"):
        for path in sorted((staged / part).rglob("*")):
            if path.is_dir() and not path.is_symlink():
                continue
            target = cached / path.relative_to(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
