"""Dictionary folders out of the Hugging Face Hub, through its own client and cache.

The client puts a file into the cache before anyone could verify it. So a folder is downloaded into
a staging cache inside the real one and moved over only when the caller, who verifies and loads it,
is content: a damaged or hostile download leaves the cache as it was.
"""

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
"""As the Hub client takes it.

A token, True for the stored one, False for none, None for the stored one if there is one.
"""

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubFolder(NamedTuple):
    """Where a dictionary lies on the Hub."""

    repo_id: str
    folder: str
    revision: str = "main"
    token: Token = None
    cache_dir: Path = Path()

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    @property
    def cached_repo(self) -> Path:
        return self.cache_dir / f"models--{self.repo_id.replace('/', '--')}"


def check_folder_name(folder: str) -> str:
    """A folder inside a repository, as `name` or `path/to/name`.

    Raises:
        ValueError: an absolute path, `..`, a backslash, or an empty part.
    """
    # "" is between two slashes, or before the first one of an absolute path
    bad_parts = {"", ".", ".."} & set(folder.split("/"))
    if bad_parts or "\\" in folder or "\0" in folder:
        raise ValueError(
            "The folder must be a plain path inside the repository, such as 'gpt2-small-L10', "
            f"got {folder!r}."
        )
    return folder


def hub_cache(cache_dir: str | Path | None) -> Path:
    """The Hub client's cache, unless another is given."""
    return Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()


@contextmanager
def fetched(
    place: HubFolder,
    force_download: bool = False,
) -> Iterator[Path]:
    """The folder's files as a local folder: from the cache, else from the Hub.

    A download enters the cache when the body of the `with` ends without an error.

    Raises:
        FileNotFoundError: no such repository (or a private one: the Hub does not tell), revision or
            folder.
        PermissionError: a gated repository, or a bad token.
        ConnectionError: the Hub cannot be reached or fails, and nothing is cached.
        OSError: an incomplete download, or a cache that cannot be written.
    """
    if force_download:
        copy = None
        commit = _newest_commit(place) or place.revision
    else:
        copy, commit = _look_up(place)
    if copy is not None:
        yield copy
        return
    with _staging_cache(place.cache_dir) as staging:
        staged = place._replace(revision=commit, cache_dir=staging)
        # not where the caller distrusts the cache
        if not force_download:
            _link_weights(place.cached_repo / "blobs", staged.cached_repo / "blobs")
        with explained(place.repo_id, place.revision, place.path(CONFIG)):
            folder = _download(staged)
        yield folder
        with _writing(place.cache_dir):
            _adopt(staged.cached_repo, place.cached_repo)
            # a branch or tag: what it names now is what the client looks up offline
            if place.revision != commit:
                ref = place.cached_repo / "refs" / place.revision
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(commit)


def _look_up(place: HubFolder) -> tuple[Path | None, str]:
    """The copy in the cache that can be used, or None and the commit to download."""
    if _COMMIT.fullmatch(place.revision) and (copy := _cached(place)):
        return copy, place.revision
    # what the cache holds of the branch, in case the Hub cannot be reached
    fallback = _cached(place, needs_sums=False)
    commit = _newest_commit(place, has_copy=fallback is not None)
    if commit is None:
        return fallback, place.revision
    return _cached(place._replace(revision=commit)), commit


def _newest_commit(
    place: HubFolder,
    has_copy: bool = False,
) -> str | None:
    """The commit that the revision names now.

    None: the Hub cannot be reached, and the copy in the cache has to do.
    """
    config = place.path(CONFIG)
    url = hf_hub_url(place.repo_id, config, revision=place.revision)
    with explained(place.repo_id, place.revision, config):
        try:
            # with a copy at hand one attempt is enough
            metadata = get_hf_file_metadata(url, token=place.token, retry_on_errors=not has_copy)
        except (HTTPError, OfflineModeIsEnabled) as error:
            is_unreachable = is_transient(error) or isinstance(error, OfflineModeIsEnabled)
            if not (has_copy and is_unreachable):
                raise
            logger.warning(
                "the Hub cannot be reached (%s): using the cached copy of %s",
                type(error).__name__,
                place.repo_id,
            )
            return None
        if metadata.commit_hash is None:
            raise ConnectionError(f"{url} is not served by a Hub: its answer names no commit.")
    return metadata.commit_hash


def _cached(
    place: HubFolder,
    needs_sums: bool = True,
) -> Path | None:
    """The folder in the cache, if every file of it is there.

    Another loader may have cached weights without their sums: `needs_sums` asks for the sums, or
    for the cache's note that the Hub has none.
    """

    def look_up(name: str) -> Any:
        return try_to_load_from_cache(
            place.repo_id, place.path(name), place.cache_dir, revision=place.revision
        )

    # a path; None: not cached; another object: the Hub is known not to have it
    config = look_up(CONFIG)
    sums = look_up(SUMS)
    if not isinstance(config, str) or (needs_sums and sums is None):
        return None
    try:
        # without sums, as a loader that asks for none leaves a folder
        names = read_sums(Path(sums)) if isinstance(sums, str) else [WEIGHTS]
    except ValueError:
        return None  # damaged: download again
    is_complete = all(isinstance(look_up(name), str) for name in names)
    return Path(config).parent if is_complete else None


def _download(place: HubFolder) -> Path:
    """Every file that SHA256SUMS lists; without sums, config and weights."""
    folder = Path(_download_file(place, CONFIG)).parent
    try:
        sums = _download_file(place, SUMS)
        names = list(read_sums(Path(sums)))
    except RemoteEntryNotFoundError:
        names = [WEIGHTS]
    for name in names:
        with explained(place.repo_id, place.revision, place.path(name)):
            _download_file(place, name)
    return folder


def _download_file(
    place: HubFolder,
    name: str,
) -> str:
    return retrying(is_transient)(
        hf_hub_download,
        place.repo_id,
        place.path(name),
        revision=place.revision,
        token=place.token,
        cache_dir=place.cache_dir,
    )


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"The cache {cache} cannot be written ({error.strerror}): pass cache_dir= or set "
            "HF_HOME."
        ) from error


@contextmanager
def _staging_cache(cache: Path) -> Iterator[Path]:
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        # on the same disk, so that files can be moved
        staging = tempfile.mkdtemp(prefix=".sae_lens_qk-", dir=cache)
    try:
        yield Path(staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _link_weights(
    cached: Path,
    staged: Path,
) -> None:
    """Intact weights of another commit need no second download.

    The cache names them by their SHA-256 sum.
    """
    staged.mkdir(parents=True)
    for blob in cached.glob("[0-9a-f]" * 64):
        if sha256_of(blob) == blob.name:
            with suppress(OSError):  # a disk without hard links
                (staged / blob.name).hardlink_to(blob)


def _adopt(
    staged: Path,
    cached: Path,
) -> None:
    """Move a staged repository into the cache, file by file and atomically."""
    # blobs first, so that no link dangles
    for part in ("blobs", "snapshots", ".no_exist"):
        for path in sorted((staged / part).rglob("*")):
            if path.is_dir() and not path.is_symlink():
                continue
            target = cached / path.relative_to(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
