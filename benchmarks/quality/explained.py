"""How much of the scores the feature x feature terms hold, and how many pairs hold a weight.

For each dictionary, over all pairs (`transcoders`) and over those of its map times their weights
(`feature_map`); with and without the features that are always on, which stand for the mean:

    all                 every pair of features
    one_varies          without the pairs of two always-on features
    without_always_on   without the pairs of even one

    score_explained   as `sae_lens_qk.evals` defines it, with the unweighted version and norm share
    pairs_for         number of supporting pairs (positive pattern effect, strongest first) whose
                      terms, subtracted from the model's own scores, lower P[i,j] by 50 % and 90 %
                      of what subtracting all of them does
    weight_held       that whole drop as a share of P[i,j]
    top_percent       share of sum |c[i,j]| held by the strongest 1 % of the active pairs (one or
                      more)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.quality.cases import LayerCases
from benchmarks.quality.twins import map_sources
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.explain.removals import ScoreRow, best_pairs
from sae_lens_qk.explain.terms import HeadTerms
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.metrics import explained_shares, explained_sums
from sae_lens_qk.statistics.activations import ALWAYS_ON
from sae_lens_qk.training.candidates import firing_rates

SHARES = (0.5, 0.9)
METRICS = ("score_explained", "score_explained_unweighted", "norm_share")
PAIR_SETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all": lambda query_varies, key_varies: torch.ones_like(query_varies & key_varies),
    "one_varies": lambda query_varies, key_varies: query_varies | key_varies,
    "without_always_on": lambda query_varies, key_varies: query_varies & key_varies,
}
"""Which pairs count, by whether their features vary, that is, are not always on."""

SetScores = dict[str, Float[Tensor, "batch head pos_q pos_k"]]
"""Scores by `PAIR_SETS`."""


class Varies(NamedTuple):
    """Features of both sides that are not always on."""

    query: Bool[Tensor, " d_query"]
    key: Bool[Tensor, " d_key"]


def run(layers: list[LayerCases]) -> dict[str, Any]:
    """Every metric by layer and dictionary, as plain JSON values."""
    results: dict[str, Any] = {}
    for cases in layers:
        results[str(cases.layer.index)] = {
            name: _run_dictionary(d, cases) for name, d in cases.dictionaries.items()
        }
    return results


@torch.no_grad()
def _run_dictionary(
    d: BilinearQKDictionary,
    cases: LayerCases,
) -> dict[str, Any]:
    rates = firing_rates(d, cases.fit_x.split(1))
    varies = Varies(rates.query <= ALWAYS_ON, rates.key <= ALWAYS_ON)
    n_always_on = {side: int((~mask).sum()) for side, mask in varies._asdict().items()}
    results: dict[str, Any] = {"always_on": n_always_on}
    for source, feature_map in map_sources(d).items():
        shares = explained(d, cases, varies, feature_map)
        counts = pair_counts(d, cases, varies, feature_map)
        results[source] = {name: {**shares[name], **counts[name]} for name in PAIR_SETS}
    return results


def explained(
    d: BilinearQKDictionary,
    cases: LayerCases,
    varies: Varies,
    feature_map: SparseFeatureMap | None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """By `PAIR_SETS`, each of `METRICS` per head and as their mean, over all rows of the cases."""
    spec = cases.spec
    score_function = _set_scores(d, varies, feature_map)
    sums = {name: torch.zeros(6, spec.n_heads, dtype=torch.float64) for name in PAIR_SETS}
    for x in cases.x.split(1):
        scores = spec.scores(cases.weights.queries(x), cases.weights.keys(x))
        pattern = spec.pattern(scores)
        for name, feature_scores in score_function(x).items():
            sums[name] += explained_sums(scores, feature_scores, pattern, spec)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, set_sums in sums.items():
        shares = dict(zip(METRICS, explained_shares(set_sums), strict=True))
        results[name] = {
            metric: {"mean": float(values.mean()), "per_head": values.tolist()}
            for metric, values in shares.items()
        }
    return results


def _set_scores(
    d: BilinearQKDictionary, varies: Varies, feature_map: SparseFeatureMap | None
) -> Callable[[Float[Tensor, "batch pos d_model"]], SetScores]:
    """Scores of the feature x feature terms as a function of x.

    Args:
        feature_map: its pairs alone, times their weights.
    """
    if feature_map is None:
        return lambda x: _all_pairs_scores(d, varies, x)
    query, key, _ = feature_map.indices.unbind(dim=1)
    is_between_features = (query < d.cfg.d_query) & (key < d.cfg.d_key)
    query_varies = pad(varies.query, (0, 1))[query]
    key_varies = pad(varies.key, (0, 1))[key]
    maps = {}
    for name, counts in PAIR_SETS.items():
        maps[name] = feature_map.select(is_between_features & counts(query_varies, key_varies))

    def map_scores(x: Tensor) -> SetScores:
        features = d.features(x)
        return {
            name: pairs.scores(features, d.decoders, d.spec, include_constant=False)
            for name, pairs in maps.items()
        }

    return map_scores


def _all_pairs_scores(
    d: BilinearQKDictionary,
    varies: Varies,
    x: Tensor,
) -> SetScores:
    features = d.features(x)

    def scores(
        query_mask: Tensor,
        key_mask: Tensor,
    ) -> Tensor:
        queries = (features.query * query_mask) @ d.query.W_dec
        keys = (features.key * key_mask) @ d.key.W_dec
        return d.spec.scores(d.spec.split_queries(queries), d.spec.split_keys(keys))

    every_pair = scores(torch.ones_like(varies.query), torch.ones_like(varies.key))
    two_always_on = scores(~varies.query, ~varies.key)
    return {
        "all": every_pair,
        "one_varies": every_pair - two_always_on,
        "without_always_on": scores(varies.query, varies.key),
    }


class _Counts:
    """What `pair_counts` collects over cases."""

    def __init__(self):
        self.pairs_for: dict[float, list[int]] = {share: [] for share in SHARES}
        self.weight_shares: list[float] = []
        self.top_percent: list[float] = []
        self.n_active: list[int] = []
        self.n_supporting: list[int] = []

    def add(
        self,
        contributions: Float[Tensor, "a b pos"],
        mask: Bool[Tensor, "a b"],
        row: ScoreRow,
        key_pos: int,
    ) -> None:
        """One case; mask: the pairs that count."""
        sizes = contributions[..., key_pos][mask].abs().sort(descending=True).values
        sizes = sizes[sizes > 0]
        self.n_active.append(len(sizes))
        if len(sizes):
            n_top = math.ceil(len(sizes) / 100)
            self.top_percent.append(float(sizes[:n_top].sum() / sizes.sum()))
        effects = row.effect(contributions, key_pos).masked_fill(~mask, 0.0)
        best = best_pairs(effects, positive=True)
        self.n_supporting.append(len(best))
        # the row without the best pair, without the best two, ...
        removed = contributions[best[:, 0], best[:, 1]].cumsum(dim=0)
        drops = row.pattern[key_pos] - row.row_pattern(row.scores - removed)[:, key_pos]
        if len(drops) and drops[-1] > 0:
            self.weight_shares.append(float(drops[-1] / row.pattern[key_pos]))
            for share, numbers in self.pairs_for.items():
                first = (drops >= share * drops[-1]).nonzero()[0]
                numbers.append(int(first) + 1)

    def result(self) -> dict[str, Any]:
        quartiles = {str(share): _quartiles(numbers) for share, numbers in self.pairs_for.items()}
        return {
            "n": len(self.weight_shares),
            "pairs_for": quartiles,
            "weight_held": _quartiles(self.weight_shares),
            "top_percent": float(np.mean(self.top_percent)) if self.top_percent else None,
            "active_pairs": float(np.mean(self.n_active)),
            "supporting_pairs": float(np.mean(self.n_supporting)),
        }


def pair_counts(
    d: BilinearQKDictionary,
    cases: LayerCases,
    varies: Varies,
    feature_map: SparseFeatureMap | None,
) -> dict[str, dict[str, Any]]:
    """By `PAIR_SETS`, how many pairs are behind an attention weight: quartiles over cases."""
    counts = {name: _Counts() for name in PAIR_SETS}
    for row, numbered_cases in cases.rows():
        x = cases.x[row]
        features = d.features(x[None])
        for _, case in numbered_cases:
            j = case.key_pos
            score_row = ScoreRow(cases.weights, cases.spec, x[: case.query_pos + 1], case.head)
            terms = HeadTerms(d, features, case.head, feature_map).row(case.query_pos)
            a = terms.active("query", j, torch.ones_like(varies.query))
            b = terms.active("key", j, torch.ones_like(varies.key))
            contributions = terms.pairs(a, b)
            for name, pair_set in PAIR_SETS.items():
                mask = pair_set(varies.query[a][:, None], varies.key[b])
                counts[name].add(contributions, mask, score_row, j)
    return {name: set_counts.result() for name, set_counts in counts.items()}


def _quartiles(values: list[Any]) -> dict[str, float] | None:
    if not values:
        return None
    lower, median, upper = np.percentile(values, [25, 50, 75]).tolist()
    return {"lower": lower, "median": median, "upper": upper}
