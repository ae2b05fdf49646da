"""Dictionaries by name: those shipped with the package, and local folders."""

from pathlib import Path
from typing import Any

from sae_lens.saes.sae import SAE

from sae_lens_qk.dictionary import BilinearQKDictionary


def shipped_folder() -> Path:
    """Where the shipped dictionaries lie: `_shipped` in an installed wheel, `pretrained/` in a checkout."""
    package = Path(__file__).parent
    installed = package / "_shipped"
    return installed if installed.is_dir() else package.parent / "pretrained"


def shipped_names() -> list[str]:
    """Names that `from_pretrained` knows."""
    folder = shipped_folder()
    return sorted(path.parent.name for path in folder.glob("*/cfg.json")) if folder.is_dir() else []


def from_pretrained(
    dictionary_class: type[BilinearQKDictionary],
    release: str,
    sae_id: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    **stock: Any,
) -> BilinearQKDictionary:
    """Load a shipped dictionary by name, a local folder, or (release + sae_id) what the stock SAELens loader finds.

    Args:
        release: a shipped name, a folder written by `save_model`, or with `sae_id` a Hub repository.
        sae_id: folder in the repository.
        device, dtype: where and in what precision to load.
        **stock: further arguments of `SAE.from_pretrained`, with `sae_id` only.
    Raises:
        ValueError: the name is neither shipped nor a folder; the message lists what is.
    """
    if sae_id is not None:
        return SAE.from_pretrained.__func__(dictionary_class, release, sae_id, device, dtype, **stock)  # type: ignore[attr-defined]
    for folder in (shipped_folder() / release, Path(release)):
        if (folder / "cfg.json").is_file():
            return dictionary_class.load_from_disk(folder, device=device, dtype=dtype)
    raise ValueError(
        f"There is no dictionary {release!r}: shipped are {', '.join(shipped_names()[:5]) or 'none'}; or give the path of "
        "a folder written by save_model, or a Hub repository and a folder in it."
    )
