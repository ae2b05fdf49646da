"""Quality against the number of pairs: trained maps beside the centred ranking alone, on the same tokens.

    QK_CORPUS=... python benchmarks/pair_frontier.py --ranking output/step1 --sizes 10000 25000 50000 100000 \
        --dictionaries output/frozen-50000 output/tuned-50000 --output benchmarks/results/pair_frontier.md
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from simple_parsing import ArgumentParser, field
from simple_parsing.helpers import list_field

import sae_lens_qk as qk
from sae_lens_qk.evals import Evaluation, Interval
from sae_lens_qk.host.layer import layer_inputs, qk_weights
from sae_lens_qk.text import token_rows
from sae_lens_qk.training.candidates import rank_pairs


@dataclass
class Arguments:
    """Evaluate maps of several sizes."""

    ranking: str = "smollm2-135m-instruct-L23"
    """Dictionary whose pairs are ranked without training a mask."""
    sizes: list[int] = list_field(10_000, 25_000, 50_000, 100_000)
    """Numbers of pairs the ranking keeps."""
    dictionaries: list[str] = list_field()
    """Dictionaries with trained maps."""
    ranking_text: str = "$QK_CORPUS/train.parquet"
    ranking_tokens: int = 20_480
    evaluation_text: str = "$QK_CORPUS/validation.parquet"
    evaluation_tokens: int = 16_384
    context_size: int = 256
    output: str = field(default="", help="Markdown file for the table; printed in any case.")


def row(name: str, dictionary: qk.BilinearQKDictionary, result: Evaluation) -> dict[str, str]:
    """One line of the table: the feature map, and the transcoders it belongs to."""
    source, unmasked = result.sources["feature_map"], result.sources["transcoders"]
    return {
        "map": name,
        "pairs": f"{len(dictionary.feature_map):,}",
        "pattern KL": interval(source.pattern_kl),
        "unmasked KL": f"{unmasked.pattern_kl.value:.4f}" if unmasked.pattern_kl else "-",
        "loss recovered": interval(source.ce_recovered, percent=True),
        "logit KL recovered": interval(source.logit_kl_recovered, percent=True),
        "L0": f"{result.features.l0_query:.1f} / {result.features.l0_key:.1f}",
        "active pairs": f"{result.feature_map.active_pairs:.0f}" if result.feature_map else "-",
    }


def interval(figure: Interval | None, percent: bool = False) -> str:
    if figure is None:
        return "-"
    style = "{:.1%}" if percent else "{:.4f}"
    return "{} ({}, {})".format(*(style.format(number) for number in figure))


@torch.no_grad()
def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_arguments(Arguments, dest="args")
    args: Arguments = parser.parse_args().args
    base = qk.BilinearQKDictionary.from_pretrained(args.ranking).requires_grad_(False)
    model = qk.load_model(base)
    tokens = token_rows(
        model,
        args.evaluation_text,
        "text",
        args.evaluation_tokens // args.context_size,
        args.context_size,
    )

    def measure(name: str, dictionary: qk.BilinearQKDictionary) -> dict[str, str]:
        return row(
            name, dictionary, qk.evaluate(dictionary, model, tokens, baselines=(), progress=True)
        )

    ranking_tokens = token_rows(
        model,
        args.ranking_text,
        "text",
        args.ranking_tokens // args.context_size,
        args.context_size,
    )
    inputs = (layer_inputs(model, base.cfg.layer, batch) for batch in ranking_tokens.split(8))
    ranked = rank_pairs(base, qk_weights(model, base.cfg.layer), inputs, max(args.sizes))
    strongest = ranked.statistics[:, 0].argsort(descending=True)
    lines = []
    for size in args.sizes:
        base.set_feature_map(ranked.select(strongest[:size]))
        lines.append(measure("ranking alone", base))
    for path in args.dictionaries:
        lines.append(
            measure(
                Path(path).name, qk.BilinearQKDictionary.from_pretrained(path).requires_grad_(False)
            )
        )
    table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    print(table)
    if args.output:
        Path(args.output).write_text(
            f"{tokens.numel():,} tokens, rows of {args.context_size}\n\n{table}\n"
        )


if __name__ == "__main__":
    main()
