"""The documents next to a dictionary's weights: metrics, run settings, model card, checksums."""

import json
from pathlib import Path
from typing import Any, Protocol

from sae_lens_qk.config import BilinearQKConfig
from sae_lens_qk.pretrained.card import dictionary_card
from sae_lens_qk.pretrained.checksums import CARD, METRICS, RUNNER_CONFIG, write_sums


class Described(Protocol):
    """What the documents say of a dictionary."""

    cfg: BilinearQKConfig
    runner_cfg: dict[str, Any] | None

    @property
    def metrics(self) -> dict[str, Any] | None: ...


def documents(
    dictionary: Described,
    name: str,
    source: str = "",
) -> dict[str, str | None]:
    """Texts by file name: metrics and run settings (None: not known), model card.

    Args:
        name: the card's heading.
        source: arguments of `from_pretrained` in the card's snippet. Default: the name as a path.
    Raises:
        ValueError: metrics or settings of another shape than the card expects.
    """
    card = dictionary_card(
        dictionary.cfg,
        dictionary.metrics,
        dictionary.runner_cfg,
        name,
        source or f'"path/to/{name}"',
    )
    return {
        CARD: card,
        METRICS: _json_text(dictionary.metrics),
        RUNNER_CONFIG: _json_text(dictionary.runner_cfg),
    }


def _json_text(content: dict[str, Any] | None) -> str | None:
    return None if content is None else json.dumps(content, indent=2) + "\n"


def write_documents(
    folder: str | Path,
    texts: dict[str, str | None],
) -> None:
    """Write `documents` into a saved dictionary's folder, and SHA256SUMS over all of it."""
    for name, text in texts.items():
        path = Path(folder) / name
        if text is None:
            path.unlink(missing_ok=True)  # of a dictionary saved here before
        else:
            path.write_text(text)
    # last: the sums are of the files as they are now
    write_sums(Path(folder))


def read_document(
    folder: str | Path,
    name: str,
) -> dict[str, Any] | None:
    """metrics.json or runner_cfg.json of a folder, None where there is none.

    Raises:
        ValueError: not a JSON object.
    """
    path = Path(folder) / name
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content
