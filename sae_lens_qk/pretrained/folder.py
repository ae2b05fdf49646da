"""A dictionary as a folder: weights and config as SAELens writes them, and the documents beside them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens_qk.pretrained.card import dictionary_card
from sae_lens_qk.pretrained.checksums import CARD, METRICS, RUNNER_CONFIG, write_sums


def documents(
    dictionary: Any, name: str, source: str = ""
) -> dict[str, str | None]:
    """What lies beside the weights, by file name: figures, run settings (None: not known), model card.

    Args:
        name: the card's heading.
        source: arguments of `from_pretrained` in the card's snippet. Default: the name as a path.
    Raises:
        ValueError: figures or settings of another shape than the card expects.
    """
    card = dictionary_card(
        dictionary.cfg,
        dictionary.metrics,
        dictionary.runner_cfg,
        name,
        source or f'"path/to/{name}"',
    )
    known = {METRICS: dictionary.metrics, RUNNER_CONFIG: dictionary.runner_cfg}
    return {CARD: card} | {
        file: None if content is None else json.dumps(content, indent=2) + "\n"
        for file, content in known.items()
    }


def write_documents(folder: str | Path, beside: dict[str, str | None]) -> None:
    """Write `documents` into a saved dictionary's folder, and SHA256SUMS over all of it."""
    for file, text in beside.items():
        if text is None:
            (Path(folder) / file).unlink(missing_ok=True)  # of a dictionary saved here before
        else:
            (Path(folder) / file).write_text(text)
    write_sums(Path(folder))


def read_document(folder: str | Path, file: str) -> dict[str, Any] | None:
    """metrics.json or runner_cfg.json of a folder, None where there is none.

    Raises:
        ValueError: not a JSON object.
    """
    path = Path(folder) / file
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


class Halves(NamedTuple):
    """Folders of the two stock transcoders."""

    query: Path
    key: Path


def export_transcoders(dictionary: Any, path: str | Path) -> Halves:
    """Write both halves as stock SAELens folders, `<path>/query` and `<path>/key`, for people without this package.

    `SAE.load_from_disk` reads them. On a `SAETransformerBridge`, `add_sae` attaches query and key together: they name
    different hooks (`attn.q.hook_in` -> `attn.q.hook_out`, and `k`). Their metadata has the `model_mode`: halves of a
    processed model need `model.enable_compatibility_mode()` first. Stored in half precision they have to be loaded with
    `dtype="float32"` for a float32 model.
    """
    halves = Halves(Path(path) / "query", Path(path) / "key")
    dictionary.query.save_model(halves.query)
    dictionary.key.save_model(halves.key)
    return halves
