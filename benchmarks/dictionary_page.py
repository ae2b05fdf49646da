"""The page of one dictionary: what it reproduces on a whole split of the corpus, its features and its pairs.

    QK_CORPUS=... python -m benchmarks.dictionary_page smollm2-135m-instruct-L23 --split test \
        --beside output/authors --frontier output/l0-8 output/l0-32 --output benchmarks/results/dictionaries

Writes NAME-SPLIT.md, NAME-SPLIT.json (every number), NAME-SPLIT.png (how often features fire) and, where dictionaries are
shown by L0, NAME-SPLIT-frontier.png. All dictionaries see the same rows, so differences are paired.
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
from benchmarks.dictionary_tables import ALWAYS_ON, frontier_figure, render
from sae_lens_qk.figures import density_histogram
from sae_lens_qk.evals import Evaluation, Interval, compare
from sae_lens_qk.text import token_rows

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
COMPARED = ("pattern_kl", "ce_loss", "logit_kl")
_N_BOOTSTRAP = 2000


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
    """Dictionaries to show by L0, likewise; the page's own is among them if it is named here too."""
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
        if paths.setdefault(path.name, path) != path:
            raise ValueError(
                f"The page calls dictionaries by their folder's name: {paths[path.name]} and {path} are alike."
            )
    loaded = {
        name: qk.BilinearQKDictionary.from_pretrained(str(path)) for name, path in paths.items()
    }
    layers = {name: d.cfg.layer for name, d in loaded.items()}
    if len(set(layers.values())) > 1:
        raise ValueError(f"Dictionaries on one page must be of one layer, got {layers}.")
    return loaded


def make_report(
    measured: dict[str, Evaluation],
    beside: Iterable[str] = (),
    frontier: Iterable[str] = (),
    **facts: Any,
) -> dict[str, Any]:
    """Plain JSON values: the facts, then all figures of the first dictionary, and the others beside it."""
    name, ours = next(iter(measured.items()))
    rows, n_tokens = (
        {other: evaluation.by_row for other, evaluation in measured.items()},
        ours.n_tokens,
    )
    return {
        "dictionary": name,
        **facts,
        "evaluation": ours.to_dict(),
        "features": {
            "query": firing(rows[name].fired_query, n_tokens),
            "key": firing(rows[name].fired_key, n_tokens),
        },
        "beside": {
            other: {
                "evaluation": measured[other].to_dict(),
                "difference": differences(rows[name].sources, rows[other].sources),
            }
            for other in beside
        },
        "frontier": {other: measured[other].to_dict() for other in frontier},
    }


def firing(fired: np.ndarray, n_tokens: int) -> dict[str, Any]:
    """How often the features of one side fire.

    Args:
        fired: tokens on which each feature fires [feature].
    """
    density = fired / n_tokens
    live = density[fired > 0]
    return {
        "n": len(fired),
        "live": len(live),
        "l0": float(density.sum()),
        "always_on": int((density > ALWAYS_ON).sum()),
        "density_quantiles": {
            f"{q:g}": float(np.quantile(live, q)) if len(live) else None for q in QUANTILES
        },
        "tokens": fired.tolist(),
    }


def differences(
    ours: dict[str, dict[str, np.ndarray]], other: dict[str, dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Figures of the other dictionary minus ours, by source that both have, then figure."""
    return {
        source: {
            figure: paired(ours[source][figure], other[source][figure])._asdict()
            for figure in COMPARED
        }
        for source in ("transcoders", "feature_map")
        if source in ours and source in other
    }


def paired(ours: np.ndarray, other: np.ndarray, seed: int = 0) -> Interval:
    """Mean of other - ours with its 95 % bootstrap interval over rows, the same rows of both drawn each time.

    Args:
        ours, other: [row], or [row, head] whose mean over heads counts.
    """
    by_row = (other - ours).reshape(len(ours), -1).mean(axis=1)
    picks = np.random.default_rng(seed).integers(0, len(by_row), (_N_BOOTSTRAP, len(by_row)))
    low, high = np.percentile(by_row[picks].mean(axis=1), [2.5, 97.5])
    return Interval(float(by_row.mean()), float(low), float(high))


def write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{report['dictionary']}-{report['split']}"
    (folder / f"{stem}.json").write_text(json.dumps(report, allow_nan=False) + "\n")
    (folder / f"{stem}.md").write_text(render(report))
    n_tokens = report["evaluation"]["n_tokens"]
    densities = (
        np.array(report["features"][side]["tokens"]) / n_tokens for side in ("query", "key")
    )
    density_histogram(*densities).savefig(folder / f"{stem}.png")
    if report["frontier"]:
        frontier_figure(report["frontier"]).savefig(folder / f"{stem}-frontier.png")
    print(f"wrote {stem}.md, .json and pictures to {folder}")


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser(description=__doc__)
    parser.add_arguments(Arguments, dest="args")
    args: Arguments = parser.parse_args(given).args
    dictionaries = load([args.dictionary, *args.beside, *args.frontier])
    first = next(iter(dictionaries.values()))
    model = qk.load_model(first)
    n_rows = args.n_tokens // args.context_size if args.n_tokens else sys.maxsize
    tokens = token_rows(
        model, f"$QK_CORPUS/{args.split}.parquet", "text", n_rows, args.context_size
    )
    report = make_report(
        compare(dictionaries, model, tokens, batch_size=args.batch_size, progress=True),
        beside=[Path(name).name for name in args.beside],
        frontier=[Path(name).name for name in args.frontier],
        model=first.cfg.model_name,
        layer=first.cfg.layer,
        original_sizes=list(first.cfg.original_sizes),
        split=args.split,
        context_size=args.context_size,
        batch_size=args.batch_size,
        command=f"QK_CORPUS=... python -m benchmarks.dictionary_page {shlex.join(given)}",
    )
    write(report, Path(args.output))


if __name__ == "__main__":
    main()
