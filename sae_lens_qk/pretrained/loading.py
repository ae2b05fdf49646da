"""Where a dictionary is: a name, a folder or a place on the Hub becomes a local folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sae_lens_qk.host.models import shipped_folder
from sae_lens_qk.pretrained.checksums import CONFIG
from sae_lens_qk.pretrained.hub import HubFolder, Token, check_folder_name, fetched
from sae_lens_qk.pretrained.registry import Entry, registry


class Location(NamedTuple):
    """A dictionary's folder, and the sum of its SHA256SUMS if the registry knows it."""

    folder: Path
    sums_sha256: str | None = None


@contextmanager
def located(
    release: str,
    sae_id: str | None,
    revision: str | None,
    token: Token,
    cache_dir: Path,
    force_download: bool,
) -> Iterator[Location]:
    """The dictionary's files as a local folder; parameters as in `Pretrained.from_pretrained`.

    A download enters the cache when the body of the `with` ends without an error.

    Raises:
        ValueError: no dictionary there, or a revision of what has none.
        FileNotFoundError, PermissionError, ConnectionError, OSError: see `hub.fetched`.
    """
    if sae_id is not None:
        check_folder_name(sae_id)
    entry = registry().get(release) if sae_id is None else None
    sums_sha256 = None
    if entry is None:
        place = _named_place(release, sae_id, revision)
    else:
        place = _registered_place(entry, revision)
        # the registry's sum is that of its own commit
        if revision in (None, entry.revision):
            sums_sha256 = entry.sha256
    if isinstance(place, Path):
        yield Location(place)
        return
    place = place._replace(token=token, cache_dir=cache_dir)
    with fetched(place, force_download) as folder:
        yield Location(folder, sums_sha256)


def _named_place(
    release: str,
    sae_id: str | None,
    revision: str | None,
) -> Path | HubFolder:
    """A local folder, else a folder of a Hub repository."""
    local = Path(release, sae_id or "")
    if (local / CONFIG).is_file():
        if revision is not None:
            raise ValueError(f"{local} is a local folder: it has no revision {revision!r}.")
        return local
    if sae_id is None:
        entries = registry().values()
        # only what can be loaded is of use here
        names = [entry.name for entry in entries if entry.status != "unpublished"]
        raise ValueError(
            f"There is no dictionary {release!r}: known names are {', '.join(names[:5]) or 'none'} "
            "(`python -m sae_lens_qk list` shows all); or give a folder written by save_model, or "
            "a Hub repository and a folder in it."
        )
    # a folder here is meant before a repository of the same name
    if Path(release).is_dir():
        raise ValueError(f"There is no dictionary in {local}: {CONFIG} is missing.")
    return HubFolder(release, sae_id, revision or "main")


def _registered_place(
    entry: Entry,
    revision: str | None,
) -> Path | HubFolder:
    if entry.status == "unpublished":
        raise ValueError(
            f"{entry.name} is not published yet: its weights exist nowhere. "
            f"This trains it: {entry.command}"
        )
    if entry.status == "published":
        folder = check_folder_name(str(entry.folder))
        return HubFolder(str(entry.repo), folder, revision or str(entry.revision))
    if revision is not None:
        raise ValueError(f"{entry.name} comes with the package and has no revision {revision!r}.")
    return shipped_folder() / entry.name
