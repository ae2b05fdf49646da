"""`from_pretrained`: a name, a folder or a place on the Hub becomes a verified dictionary."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lens.saes.sae import SAE
from torch import Tensor

from sae_lens_qk.host.models import shipped_folder
from sae_lens_qk.pretrained.checksums import CONFIG, Verify, check_verify, verify_folder
from sae_lens_qk.pretrained.hub import HubFolder, Token, cache_folder_of, check_folder_name, fetched
from sae_lens_qk.pretrained.registry import Entry, registry


def from_pretrained_with_cfg_and_sparsity(
    dictionary_class: Any,
    release: str,
    sae_id: str | None = None,
    device: str = "cpu",
    dtype: str | None = "float32",
    force_download: bool = False,
    converter: Any = None,
    fold_W_dec_norm: bool = False,
    *,
    revision: str | None = None,
    token: Token = None,
    cache_dir: str | Path | None = None,
    verify: Verify = True,
) -> tuple[Any, dict[str, Any], Tensor | None]:
    """Load a dictionary; the parameters of `SAE.from_pretrained` in its order, then ours.

    Args:
        release: a name of `pretrained_dictionaries()`, a folder written by `save_model`, or a Hub repository "org/repo".
        sae_id: folder in the repository (or in the local folder); None for names and folders.
        device, dtype: where, and in what precision; dtype None: as stored (float32 with a converter).
        force_download: download even what is cached.
        converter: loads through SAELens with this converter, which cannot verify.
        fold_W_dec_norm: fold decoder norms into the encoders.
        revision: branch, tag or commit of the repository. Default: the registry's commit for a name, else main.
        token, cache_dir: as in huggingface_hub.
        verify: True checks every file against SHA256SUMS and warns where there is none; "strict" refuses that; False
            checks nothing.
    Returns:
        The dictionary, its config as a dict, and None (no sparsity file is published).
    Raises:
        ValueError: an unknown or unpublished name, a file that is damaged, or weights that do not fit their config.
        FileNotFoundError, PermissionError, ConnectionError, OSError: see `sae_lens_qk.pretrained.hub.fetched`.
    """
    check_verify(verify)
    through_host = converter is not None or (
        sae_id is not None and "/" not in release and not Path(release).is_dir()
    )
    if through_host:
        if verify == "strict" or revision or token or cache_dir:
            raise ValueError(
                "SAELens's own loader takes no revision, token, cache_dir or verify='strict': give a Hub repository as "
                "release and its folder as sae_id, without a converter."
            )
        stock = SAE.from_pretrained_with_cfg_and_sparsity.__func__  # type: ignore[attr-defined]
        return stock(
            dictionary_class,
            release,
            sae_id,
            device,
            dtype or "float32",
            force_download,
            converter,
            fold_W_dec_norm,
        )
    with _located(release, sae_id, revision, token, cache_folder_of(cache_dir), force_download) as (
        folder,
        sums_sha256,
    ):
        verify_folder(folder, verify, sums_sha256 if verify else None)
        dictionary = dictionary_class.load_from_disk(folder, device=device, dtype=dtype)
    if fold_W_dec_norm:
        dictionary.fold_W_dec_norm()
    return dictionary, dictionary.cfg.to_dict(), None


@contextmanager
def _located(
    release: str,
    sae_id: str | None,
    revision: str | None,
    token: Token,
    cache_dir: Path,
    force_download: bool,
) -> Iterator[tuple[Path, str | None]]:
    """The dictionary's files as a local folder, and the sum of its SHA256SUMS if the registry knows it."""
    entry = registry().get(release) if sae_id is None else None
    if sae_id is not None:
        check_folder_name(sae_id)
    local = Path(release, sae_id or "")
    if entry is None and (local / CONFIG).is_file():
        if revision is not None:
            raise ValueError(f"{local} is a local folder: it has no revision {revision!r}.")
        yield local, None
    elif entry is not None and entry.status == "shipped" and revision is None:
        yield shipped_folder() / entry.name, None
    elif entry is None and sae_id is not None and "/" in release and not Path(release).is_dir():
        place = HubFolder(release, sae_id, revision or "main", token, cache_dir)
        with fetched(place, force_download) as folder:
            yield folder, None
    elif entry is not None and entry.status == "published":
        pinned = revision in (None, entry.revision)
        place = HubFolder(
            str(entry.repo),
            check_folder_name(str(entry.folder)),
            revision or str(entry.revision),
            token,
            cache_dir,
        )
        with fetched(place, force_download) as folder:
            yield folder, entry.sha256 if pinned else None
    else:
        raise ValueError(_nothing_there(release, sae_id, revision, entry))


def _nothing_there(
    release: str, sae_id: str | None, revision: str | None, entry: Entry | None
) -> str:
    if entry is not None and entry.status == "unpublished":
        return f"{release} is not published yet: its weights exist nowhere. This trains it: {entry.command}"
    if entry is not None:
        return f"{release} comes with the package and has no revision {revision!r}."
    loadable = [name for name, other in registry().items() if other.status != "unpublished"]
    if sae_id is None:
        return (
            f"There is no dictionary {release!r}: known names are {', '.join(loadable[:5]) or 'none'} "
            "(`python -m sae_lens_qk list` shows all); or give a folder written by save_model, or a Hub repository and "
            "a folder in it."
        )
    return f"There is no dictionary in {Path(release, sae_id)}: {CONFIG} is missing."
