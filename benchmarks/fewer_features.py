"""What a dictionary loses with its least important features, nothing trained again.

QK_CORPUS=... python benchmarks/fewer_features.py output/tuned-50000
"""

import sys

import torch

import sae_lens_qk as qk
from sae_lens_qk.evals import evaluate
from sae_lens_qk.text import token_rows

SIZES = (2400, 1600, 1200, 800, 400)


def strongest(d: qk.BilinearQKDictionary, n: int) -> list[torch.Tensor]:
    """The n features a side with the largest m^2 * importance, summed over their pairs."""
    kept, weight = d.feature_map, d.feature_map.weights.square() * d.feature_map.statistics[:, 0]
    masks = []
    for column, size in enumerate((d.cfg.d_query, d.cfg.d_key)):
        total = torch.zeros(size + 1).index_add(0, kept.indices[:, column], weight)[:size]
        masks.append(
            torch.zeros(size, dtype=torch.bool).index_fill(
                0, total.topk(min(n, size)).indices, True
            )
        )
    return masks


def main(name: str) -> None:
    dictionary = qk.BilinearQKDictionary.from_pretrained(name)
    model = qk.load_model(dictionary)
    tokens = token_rows(model, "$QK_CORPUS/validation.parquet", "text", 32, 256)
    for n in SIZES:
        smaller = dictionary.compact(*strongest(dictionary, n))
        result = evaluate(smaller, model, tokens, baselines=())
        kl = [result.sources[source].pattern_kl for source in ("feature_map", "transcoders")]
        figures = " / ".join(f"{one.value:.4f}" for one in kl if one)
        l0 = f"{result.features.l0_query:.1f} / {result.features.l0_key:.1f}"
        print(
            f"{n} features a side, {len(smaller.feature_map):,} pairs: KL map / transcoders {figures}, L0 {l0}"
        )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct-L23")
