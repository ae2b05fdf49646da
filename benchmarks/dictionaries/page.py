"""The page of one dictionary: what it reproduces on a whole split of the corpus, features, pairs.

    QK_CORPUS=... python -m benchmarks.dictionaries.page smollm2-135m-instruct-L23 --split test \
        --beside output/authors --frontier output/l0-8 output/l0-32 \
        --output benchmarks/results/dictionaries

Writes NAME-SPLIT.md, NAME-SPLIT.json (every number), NAME-SPLIT.png (how often features fire) and,
where dictionaries are shown by L0, NAME-SPLIT-frontier.png. All dictionaries see the same rows, so
differences are paired.
"""

import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from simple_parsing import ArgumentParser
from simple_parsing.helpers import field, list_field

import sae_lens_qk as qk
from benchmarks.dictionaries.page_tables import ALWAYS_ON, frontier_figure, render
from sae_lens_qk.figures import density_histogram
from sae_lens_qk.metrics import Interval, bootstrap_interval
from sae_lens_qk.results import Evaluation, RowTables

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
COMPARED = ("pattern_kl", "ce_loss", "logit_kl")


@dataclass
class Arguments:
    """Evaluate the saved form of a dictionary on a split of the corpus, with all baselines."""

    dictionary: str = field(positional=True)
    """Name or folder."""
    split: str = "test"
    """File of the corpus: $QK_CORPUS/SPLIT.parquet."""
    beside: list[str] = list_field()
    """Dictionaries to compare it with, names or folders, of the same model and layer."""
    frontier: list[str] = list_field()
    """Dictionaries to show by L0, likewise; name the page's own too if it is to be among them."""
    n_tokens: int = 0
    """Tokens to evaluate on, whole rows; 0: all."""
    context_size: int = 256
    batch_size: int = 8
    output: str = "benchmarks/results/dictionaries"
    """Folder."""


def load(names: Iterable[str]) -> dict[str, qk.BilinearQKDictionary]:
    """Dictionaries by the last part of their name or path.

    Raises:
        ValueError: two of one name, or of different layers.
    """
    paths: dict[str, Path] = {}
    for path in map(Path, names):
        first = paths.setdefault(path.name, path)
        if first != path:
            raise ValueError(
                f"The page calls dictionaries by their folder's name: {first} and {path} are alike."
            )
    dictionaries = {}
    for name, path in paths.items():
        dictionaries[name] = qk.BilinearQKDictionary.from_pretrained(str(path))
    layers = {name: d.cfg.layer for name, d in dictionaries.items()}
    if len(set(layers.values())) > 1:
        raise ValueError(f"Dictionaries on one page must be of one layer, got {layers}.")
    return dictionaries


def make_report(
    evaluations: dict[str, Evaluation],
    beside: Iterable[str] = (),
    frontier: Iterable[str] = (),
    **facts: Any,
) -> dict[str, Any]:
    """Plain JSON values: the facts, then all metrics of the first dictionary, and the others'."""
    name, ours = next(iter(evaluations.items()))
    rows = ours.by_row
    comparisons = {}
    for other in beside:
        other_rows = evaluations[other].by_row
        comparisons[other] = {
            "evaluation": evaluations[other].to_dict(),
            "difference": differences(rows.sources, other_rows.sources),
        }
    return {
        "dictionary": name,
        **facts,
        "evaluation": ours.to_dict(),
        "features": {
            "query": firing(rows.fired_query, ours.n_tokens),
            "key": firing(rows.fired_key, ours.n_tokens),
        },
        "beside": comparisons,
        "frontier": {other: evaluations[other].to_dict() for other in frontier},
    }


def firing(
    fired: np.ndarray,
    n_tokens: int,
) -> dict[str, Any]:
    """How often the features of one side fire.

    Args:
        fired: tokens on which each feature fires [feature].
    """
    densities = fired / n_tokens
    live_densities = densities[fired > 0]
    quantiles = [None] * len(QUANTILES)
    if len(live_densities):
        quantiles = np.quantile(live_densities, QUANTILES).tolist()
    return {
        "n": len(fired),
        "live": len(live_densities),
        "l0": float(densities.sum()),
        "always_on": int((densities > ALWAYS_ON).sum()),
        "density_quantiles": dict(zip([f"{q:g}" for q in QUANTILES], quantiles, strict=True)),
        "tokens": fired.tolist(),
    }


def differences(
    ours: RowTables,
    other: RowTables,
) -> dict[str, Any]:
    """Metrics of the other dictionary minus ours, by source that both have, then metric."""
    metrics: dict[str, Any] = {}
    for source in ("transcoders", "feature_map"):
        if source in ours and source in other:
            metrics[source] = {
                name: paired(ours[source][name], other[source][name])._asdict() for name in COMPARED
            }
    return metrics


def paired(
    ours: np.ndarray,
    other: np.ndarray,
    seed: int = 0,
) -> Interval:
    """Mean of other - ours with its 95 % bootstrap interval over rows, the same rows of both.

    Args:
        ours, other: [row], or [row, head] whose mean over heads counts.
    """
    row_differences = (other - ours).reshape(len(ours), -1).mean(axis=1)
    return bootstrap_interval(row_differences, seed=seed)


def write(
    report: dict[str, Any],
    folder: Path,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{report['dictionary']}-{report['split']}"
    (folder / f"{stem}.json").write_text(json.dumps(report, allow_nan=False) + "\n")
    (folder / f"{stem}.md").write_text(render(report))
    n_tokens = report["evaluation"]["n_tokens"]
    densities_query = np.array(report["features"]["query"]["tokens"]) / n_tokens
    densities_key = np.array(report["features"]["key"]["tokens"]) / n_tokens
    density_histogram(densities_query, densities_key).savefig(folder / f"{stem}.png")
    if report["frontier"]:
        frontier_figure(report["frontier"]).savefig(folder / f"{stem}-frontier.png")
    print(f"wrote {stem}.md, .json and pictures to {folder}")


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(description=__doc__)
    parser.add_arguments(Arguments, dest="args")
    args: Arguments = parser.parse_args(argv).args
    dictionaries = load([args.dictionary, *args.beside, *args.frontier])
    first = next(iter(dictionaries.values()))
    model = qk.load_model(first)
    text = f"$QK_CORPUS/{args.split}.parquet"
    n_rows = args.n_tokens // args.context_size if args.n_tokens else sys.maxsize
    tokens = qk.token_rows(model, text, "text", n_rows, args.context_size)
    report = make_report(
        qk.compare(dictionaries, model, tokens, batch_size=args.batch_size, progress=True),
        beside=[Path(name).name for name in args.beside],
        frontier=[Path(name).name for name in args.frontier],
        model=first.cfg.model_name,
        layer=first.cfg.layer,
        original_sizes=list(first.cfg.original_sizes),
        split=args.split,
        context_size=args.context_size,
        batch_size=args.batch_size,
        command=f"QK_CORPUS=... python -m benchmarks.dictionaries.page {shlex.join(argv)}",
    )
    write(report, Path(args.output))


if __name__ == "__main__":
    main()
