"""Model cards: of one dictionary (`card.md.j2`), and of a repository that holds several."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import UndefinedError

from sae_lens_qk.config import BilinearQKConfig
from sae_lens_qk.host.models import hub_name
from sae_lens_qk.pretrained.registry import headline_metrics
from sae_lens_qk.tables import fixed, interval, markdown_table, percent

SUMMARY_FIELDS = {"model_name", "layer", "d_query", "d_key", "n_pairs"}
"""What a repository's card says of a dictionary's cfg.json."""

_TEMPLATE = Path(__file__).parent / "card.md.j2"
_TAGS = ["saelens", "sae", "bilinear-qk", "attention", "interpretability"]
_BEGIN = "<!-- dictionaries: written by push_to_hub -->"
_END = "<!-- end of dictionaries -->"
_SECTION = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_SNIPPET = """QK dictionaries, loaded by folder:

```python
import sae_lens_qk as qk

d = qk.BilinearQKDictionary.from_pretrained("{repo_id}", "{folder}")
```
"""
_COLUMNS = [
    "folder",
    "model",
    "layer",
    "features (query / key)",
    "pairs",
    "pattern KL",
    "loss recovered",
    "logit KL recovered",
]


class FolderSummary(NamedTuple):
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
    """The card of one dictionary: what it is, how to load it, its metrics, how it was trained.

    Args:
        metrics: as `Evaluation.to_dict()`, or None.
        runner_cfg: as `BilinearQKRunnerConfig.to_dict()`, or None.
        name: the heading.
        source: arguments of `from_pretrained` in the snippet.
    Raises:
        ValueError: metrics or runner_cfg of another shape.
    """
    try:
        about = (runner_cfg or {}).get("card", {})
        card = ModelCard.from_template(
            _header(cfg, runner_cfg or {}),
            template_path=str(_TEMPLATE),
            name=name,
            source=source,
            cfg=cfg,
            spec=cfg.spec,
            compacted=bool(cfg.query_numbers),
            description=about.get("description", ""),
            metrics=metrics,
            run=runner_cfg,
            interval=interval,
            percent=percent,
        )
    except (UndefinedError, TypeError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(
            "metrics must be as evaluate(...).to_dict() gives them, runner_cfg as a runner "
            f"config's to_dict() ({error})."
        ) from error
    return f"{card}\n"


def repository_card(
    existing: str | None, repo_id: str, folders: Mapping[str, FolderSummary]
) -> str:
    """The card of a repository: every dictionary in it, in a section of its own.

    Other text of the card is kept.

    Args:
        existing: the README so far.
        folders: all dictionaries, by folder.
    """
    summaries = dict(sorted(folders.items()))
    section = f"{_BEGIN}\n{_listing(repo_id, summaries)}\n{_END}"
    # a header has to be there, or the client takes the first rule of the text for one
    card = _parsed(existing or f"---\n{{}}\n---\n\n# {repo_id.split('/')[-1]}\n")
    if _SECTION.search(card.text):
        # a function, so that backslashes in names are not escapes
        card.text = _SECTION.sub(lambda _: section, card.text, count=1)
    else:
        # half a mark would swallow the text between it and the next section
        text = card.text.replace(_BEGIN, "").replace(_END, "").rstrip()
        card.text = f"{text}\n\n{section}\n"
    # the repository's own first: its single values stay
    headers: list[Any] = [card.data]
    headers += [_parsed_header(summary.card) for summary in summaries.values()]
    card.data = _merged(headers)
    return str(card)


def _parsed(text: str) -> ModelCard:
    try:
        card = ModelCard(text)
        _merged([card.data])  # type: ignore[list-item]
        return card
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The README.md has a header that is no model card's: {reason}") from error


def _parsed_header(text: str) -> Any:
    """Of another dictionary's card, whose faults must not stop a push."""
    try:
        return _parsed(text).data
    except ValueError:
        return ModelCardData()


def _header(
    cfg: BilinearQKConfig,
    runner_cfg: dict[str, Any],
) -> ModelCardData:
    about = runner_cfg.get("card", {})
    datasets = about.get("datasets") or _hub_dataset(runner_cfg.get("dataset_path") or "")
    return ModelCardData(
        library_name="saelens",
        tags=_TAGS,
        base_model=hub_name(cfg.model_name),
        license=about.get("license") or None,
        datasets=datasets or None,
    )


def _hub_dataset(path: str) -> list[str]:
    # "org/name"; a path of a file or with more parts is local
    is_on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(?<!\.parquet)", path)
    return [path] if is_on_hub else []


def _merged(headers: Sequence[ModelCardData]) -> ModelCardData:
    """Lists are concatenated, single values are the first one's."""
    fields: dict[str, Any] = {}
    for header in reversed(headers):
        fields |= header.to_dict()
    for name in ("tags", "base_model", "datasets"):
        fields[name] = _union(getattr(header, name) for header in headers)
    return ModelCardData(**fields)


def _union(values: Iterable[str | list[str] | None]) -> list[str] | None:
    """Every item once, in order; None for no items."""
    # a header may hold a single item without a list around it
    items: list[str] = []
    for value in values:
        items += [value] if isinstance(value, str) else value or []
    return list(dict.fromkeys(items)) or None


def _listing(
    repo_id: str,
    folders: Mapping[str, FolderSummary],
) -> str:
    rows = []
    for folder, summary in folders.items():
        cfg = summary.cfg
        metrics = headline_metrics(summary.metrics or {})
        row = [
            f"[{folder}]({folder}/README.md)",
            cfg["model_name"],
            str(cfg["layer"]),
            f"{cfg['d_query']:,} / {cfg['d_key']:,}",
            f"{cfg['n_pairs']:,}",
            fixed(metrics.get("pattern_kl")),
            percent(metrics.get("ce_recovered")),
            percent(metrics.get("logit_kl_recovered")),
        ]
        rows.append(row)
    snippet = _SNIPPET.format(repo_id=repo_id, folder=min(folders))
    return "\n".join([snippet, *markdown_table(_COLUMNS, rows)])
