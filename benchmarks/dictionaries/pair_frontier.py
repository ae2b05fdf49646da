"""Quality against the number of pairs: trained maps next to the ranking alone, on the same tokens.

    QK_CORPUS=... python -m benchmarks.dictionaries.pair_frontier --ranking output/step1 \
        --sizes 10000 25000 50000 100000 --dictionaries output/frozen-50000 output/tuned-50000 \
        --output benchmarks/results/pair_frontier.md
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from simple_parsing import ArgumentParser, field
from simple_parsing.helpers import list_field
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.support import Model
from sae_lens_qk.tables import fixed, interval, markdown_table, percent
from sae_lens_qk.training.candidates import rank_pairs

HEADER = (
    "map",
    "pairs",
    "pattern KL",
    "unmasked KL",
    "loss recovered",
    "logit KL recovered",
    "L0",
    "active pairs",
)


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


def row(
    name: str,
    dictionary: qk.BilinearQKDictionary,
    model: Model,
    tokens: Tensor,
) -> list[str]:
    """One line of the table: the feature map, and the transcoders it belongs to."""
    evaluation = qk.evaluate(dictionary, model, tokens, baselines=(), progress=True)
    mapped = evaluation.sources["feature_map"]
    unmasked = evaluation.sources["transcoders"]
    features = evaluation.features
    return [
        name,
        f"{len(dictionary.feature_map):,}",
        interval(mapped.pattern_kl),
        fixed(unmasked.pattern_kl.value),
        interval(mapped.ce_recovered, percent),
        interval(mapped.logit_kl_recovered, percent),
        f"{features.l0_query:.1f} / {features.l0_key:.1f}",
        fixed(evaluation.feature_map.active_pairs, 0),
    ]


@torch.no_grad()
def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_arguments(Arguments, dest="args")
    args: Arguments = parser.parse_args().args
    base = qk.BilinearQKDictionary.from_pretrained(args.ranking).requires_grad_(False)
    model = qk.load_model(base)
    layer = AttentionLayer(model, base.cfg.layer)

    def text_rows(
        path: str,
        n_tokens: int,
    ) -> Tensor:
        n_rows = n_tokens // args.context_size
        return qk.token_rows(model, path, "text", n_rows, args.context_size)

    tokens = text_rows(args.evaluation_text, args.evaluation_tokens)
    ranking_rows = text_rows(args.ranking_text, args.ranking_tokens)
    inputs = (layer.inputs(batch) for batch in ranking_rows.split(8))
    ranked = rank_pairs(base, layer.qk_weights, inputs, max(args.sizes))
    order = ranked.statistics[:, 0].argsort(descending=True)
    rows = []
    for size in args.sizes:
        base.set_feature_map(ranked.select(order[:size]))
        rows.append(row("ranking alone", base, model, tokens))
    for path in args.dictionaries:
        dictionary = qk.BilinearQKDictionary.from_pretrained(path).requires_grad_(False)
        rows.append(row(Path(path).name, dictionary, model, tokens))
    table = "\n".join(markdown_table(HEADER, rows))
    print(table)
    if args.output:
        title = f"{tokens.numel():,} tokens, rows of {args.context_size}"
        Path(args.output).write_text(f"{title}\n\n{table}\n")


if __name__ == "__main__":
    main()
