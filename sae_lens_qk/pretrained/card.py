"""Model cards: of one dictionary (`card.md.j2`), and of a repository that holds several."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import UndefinedError

from sae_lens_qk.config import BilinearQKConfig
from sae_lens_qk.host.models import hub_name
from sae_lens_qk.pretrained.registry import headline_figures

_TEMPLATE = Path(__file__).parent / "card.md.j2"
_TAGS = ["saelens", "sae", "bilinear-qk", "attention", "interpretability"]
_BEGIN, _END = "<!-- dictionaries: written by push_to_hub -->", "<!-- end of dictionaries -->"
_SECTION = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
LISTED_FIELDS = {"model_name", "layer", "d_query", "d_key", "n_pairs"}
"""What a repository's card says of a dictionary's cfg.json."""


class Listed(NamedTuple):
    """One dictionary of a repository: its README.md, cfg.json and metrics.json."""

    card: str
    cfg: dict[str, Any]
    metrics: dict[str, Any] | None


def dictionary_card(
    cfg: BilinearQKConfig,
    metrics: dict[str, Any] | None,
    runner_cfg: dict[str, Any] | None,
    name: str,
    source: str,
) -> str:
    """The card of one dictionary: what it is, how to load it, its figures, how it was trained.

    Args:
        metrics: as `Evaluation.to_dict()`, or None.
        runner_cfg: as `BilinearQKRunnerConfig.to_dict()`, or None.
        name: the heading.
        source: arguments of `from_pretrained` in the snippet.
    Raises:
        ValueError: metrics or runner_cfg of another shape.
    """
    try:
        card = ModelCard.from_template(
            _header(cfg, runner_cfg or {}),
            template_path=str(_TEMPLATE),
            name=name,
            source=source,
            cfg=cfg,
            spec=cfg.spec,
            compacted=bool(cfg.query_numbers),
            description=(runner_cfg or {}).get("card", {}).get("description", ""),
            metrics=metrics,
            run=runner_cfg,
            interval=_interval,
            percent=_percent,
            share=_share,
        )
    except (UndefinedError, TypeError, AttributeError) as error:
        raise ValueError(
            f"metrics must be as evaluate(...).to_dict() gives them, runner_cfg as a runner config's to_dict() ({error})."
        ) from error
    return f"{card}\n"


def repository_card(existing: str | None, repo_id: str, folders: Mapping[str, Listed]) -> str:
    """The card of a repository: every dictionary in it, in a section of its own; other text of the card is kept.

    Args:
        existing: the README so far.
        folders: all dictionaries, by folder.
    """
    section = _listing(repo_id, folders)
    card = _parsed(existing or f"---\n{{}}\n---\n\n# {repo_id.split('/')[-1]}\n")
    marked = f"{_BEGIN}\n{section}\n{_END}"
    if _SECTION.search(card.text):
        card.text = _SECTION.sub(lambda _: marked, card.text, count=1)
    else:
        card.text = f"{card.text.replace(_BEGIN, '').replace(_END, '').rstrip()}\n\n{marked}\n"
    card.data = _merged([card.data, *(_data(listed.card) for _, listed in sorted(folders.items()))])  # type: ignore[list-item]
    return str(card)


def _parsed(text: str) -> ModelCard:
    try:
        card = ModelCard(text)
        _merged([card.data])  # type: ignore[list-item]
        return card
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(
            f"The README.md has a header that is no model card's: {' '.join(str(error).split())}"
        ) from error


def _data(text: str) -> ModelCardData:
    try:
        return _parsed(text).data  # type: ignore[return-value]
    except ValueError:
        return ModelCardData()


def _header(cfg: BilinearQKConfig, runner_cfg: dict[str, Any]) -> ModelCardData:
    about = runner_cfg.get("card", {})
    return ModelCardData(
        library_name="saelens",
        tags=_TAGS,
        base_model=hub_name(cfg.model_name),
        license=about.get("license") or None,
        datasets=about.get("datasets")
        or _hub_dataset(runner_cfg.get("dataset_path") or "")
        or None,
    )


def _hub_dataset(path: str) -> list[str]:
    return [path] if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(?<!\.parquet)", path) else []


def _merged(headers: list[ModelCardData]) -> ModelCardData:
    """Lists are joined, single values are the first one's."""

    def joined(name: str) -> list[str] | None:
        values = [getattr(header, name) for header in headers]
        flat = [
            item
            for value in values
            if value
            for item in ([value] if isinstance(value, str) else value)
        ]
        return list(dict.fromkeys(flat)) or None

    merged = {key: value for header in reversed(headers) for key, value in header.to_dict().items()}
    return ModelCardData(
        **{**merged, **{name: joined(name) for name in ("tags", "base_model", "datasets")}}
    )


def _listing(repo_id: str, folders: Mapping[str, Listed]) -> str:
    lines = [
        "QK dictionaries, loaded by folder:",
        "",
        "```python",
        "import sae_lens_qk as qk",
        "",
        f'd = qk.BilinearQKDictionary.from_pretrained("{repo_id}", "{min(folders)}")',
        "```",
        "",
        "| folder | model | layer | features (query / key) | pairs | pattern KL | loss recovered | logit KL recovered |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for folder, (_, cfg, metrics) in sorted(folders.items()):
        figures = headline_figures(metrics) if metrics else {}
        forms = {"pattern_kl": ".4f", "ce_recovered": ".1%", "logit_kl_recovered": ".1%"}
        shown = [
            format(figures[name], form) if name in figures else "-" for name, form in forms.items()
        ]
        cells = [
            f"[{folder}]({folder}/README.md)",
            cfg["model_name"],
            cfg["layer"],
            f"{cfg['d_query']:,} / {cfg['d_key']:,}",
            f"{cfg['n_pairs']:,}",
            *shown,
        ]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def _interval(figure: dict[str, float] | None) -> str:
    return (
        "-"
        if figure is None
        else f"{figure['value']:.4f} ({figure['low']:.4f}, {figure['high']:.4f})"
    )


def _percent(figure: dict[str, float] | None) -> str:
    return (
        "-"
        if figure is None
        else f"{figure['value']:.1%} ({figure['low']:.1%}, {figure['high']:.1%})"
    )


def _share(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.1%}"
