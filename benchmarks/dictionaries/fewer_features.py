"""What a dictionary loses with its least important features, nothing trained again.

QK_CORPUS=... python -m benchmarks.dictionaries.fewer_features output/tuned-50000
"""

import sys

import torch
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.tables import fixed

SIZES = (2400, 1600, 1200, 800, 400)


def strongest(
    d: qk.BilinearQKDictionary,
    n: int,
) -> list[Tensor]:
    """Masks of the n features per side with the largest masked importance.

    That of a feature is the sum of m^2 * importance over its pairs.
    """
    feature_map = d.feature_map
    masked_importance = feature_map.weights.square() * feature_map.statistics[:, 0]
    masks = []
    for column, n_features in enumerate((d.cfg.d_query, d.cfg.d_key)):
        totals = torch.zeros(n_features + 1)  # the constant last
        totals.index_add_(0, feature_map.indices[:, column], masked_importance)
        best = totals[:n_features].topk(min(n, n_features)).indices
        masks.append(torch.zeros(n_features, dtype=torch.bool).index_fill(0, best, True))
    return masks


def main(name: str) -> None:
    dictionary = qk.BilinearQKDictionary.from_pretrained(name)
    model = qk.load_model(dictionary)
    tokens = qk.token_rows(model, "$QK_CORPUS/validation.parquet", "text", 32, 256)
    for n in SIZES:
        smaller = dictionary.compact(*strongest(dictionary, n))
        result = qk.evaluate(smaller, model, tokens, baselines=())
        map_kl = fixed(result.sources["feature_map"].pattern_kl.value)
        full_kl = fixed(result.sources["transcoders"].pattern_kl.value)
        l0 = f"{result.features.l0_query:.1f} / {result.features.l0_key:.1f}"
        print(
            f"{n} features per side, {len(smaller.feature_map):,} pairs: "
            f"KL map / transcoders {map_kl} / {full_kl}, L0 {l0}"
        )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct-L23")
