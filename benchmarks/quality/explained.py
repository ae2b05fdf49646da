"""How much of the scores the feature x feature terms hold, and how many pairs hold an attention weight.

For each dictionary, over all pairs (`transcoders`) and over those of its map times their weights (`feature_map`); with and
without the features that are always on, which stand for the mean:

    all                 every pair of features
    one_varies          without the pairs of two always-on features
    without_always_on   without the pairs of even one

    score_explained   as `sae_lens_qk.evals` defines it, with the unweighted version and the norm share
    pairs_for         number of supporting pairs (positive pattern effect, strongest first) whose terms, subtracted from the
                      model's own scores, lower P[i,j] by 50 % and 90 % of what subtracting all of them does
    weight_held       that whole drop as a share of P[i,j]
    top_percent       share of sum |c[i,j]| held by the strongest 1 % of the active pairs (at least one)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lens_qk.statistics.activations import ALWAYS_ON
from sae_lens_qk.explain.removals import ScoreRow, best_pairs
from sae_lens_qk.explain.terms import ScoreTerms, pattern_effect
from sae_lens_qk.attention import attention_scores, pattern_from_scores
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.evals import explained_shares, explained_sums
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.training.candidates import firing_rates

from .cases import LayerCases

SHARES = (0.5, 0.9)
FIGURES = ("score_explained", "score_explained_unweighted", "norm_share")
COUNTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all": lambda query_varies, key_varies: torch.ones_like(query_varies & key_varies),
    "one_varies": lambda query_varies, key_varies: query_varies | key_varies,
    "without_always_on": lambda query_varies, key_varies: query_varies & key_varies,
}
"""Which pairs count, by whether their features vary, that is, are not always on."""


class Varies(NamedTuple):
    """Features of both sides that are not always on."""

    query: Bool[Tensor, " d_query"]
    key: Bool[Tensor, " d_key"]


def run(layers: list[LayerCases]) -> dict[str, Any]:
    """Every figure by layer and dictionary, as plain JSON values."""
    return {
        str(cases.layer): {
            name: _run_dictionary(d, cases) for name, d in cases.dictionaries.items()
        }
        for cases in layers
    }


@torch.no_grad()
def _run_dictionary(d: BilinearQKDictionary, cases: LayerCases) -> dict[str, Any]:
    varies = Varies(*(rate <= ALWAYS_ON for rate in firing_rates(d, cases.fit_x.split(1))))
    made: dict[str, Any] = {
        "always_on": {side: int((~some).sum()) for side, some in varies._asdict().items()}
    }
    for source, kept in {
        "transcoders": None,
        **({"feature_map": d.feature_map} if d.has_feature_map else {}),
    }.items():
        shares, counts = explained(d, cases, varies, kept), pair_counts(d, cases, varies, kept)
        made[source] = {name: {**shares[name], **counts[name]} for name in COUNTED}
    return made


def explained(
    d: BilinearQKDictionary, cases: LayerCases, varies: Varies, kept: SparseFeatureMap | None
) -> dict[str, dict[str, dict[str, Any]]]:
    """By `COUNTED`, each of `FIGURES` per head and as their mean, over all rows of the cases."""
    feature_scores, sums = _feature_scores(d, varies, kept), dict.fromkeys(COUNTED, torch.zeros(()))
    for x in cases.x.split(1):
        scores = attention_scores(cases.weights.queries(x), cases.weights.keys(x), cases.spec)
        pattern = pattern_from_scores(scores)
        for name, f in feature_scores(x).items():
            sums[name] = sums[name] + explained_sums(scores, f, pattern)
    made: dict[str, dict[str, dict[str, Any]]] = {}
    for name, of_name in sums.items():
        figures = zip(FIGURES, explained_shares(of_name), strict=True)
        made[name] = {
            figure: {"mean": float(values.mean()), "per_head": values.tolist()}
            for figure, values in figures
        }
    return made


def _feature_scores(
    d: BilinearQKDictionary, varies: Varies, kept: SparseFeatureMap | None
) -> Callable[
    [Float[Tensor, "batch pos d_model"]], dict[str, Float[Tensor, "batch head pos_q pos_k"]]
]:
    """Scores of the feature x feature terms by `COUNTED`, as a function of x; kept: of this map's pairs."""
    if kept is None:
        return lambda x: _all_pairs_scores(d, varies, x)
    query, key, _ = kept.indices.unbind(dim=1)
    between = (query < d.cfg.d_query) & (key < d.cfg.d_key)
    query_varies, key_varies = (
        torch.nn.functional.pad(some, (0, 1))[at]
        for some, at in zip(varies, (query, key), strict=True)
    )
    maps = {
        name: kept.select(between & counted(query_varies, key_varies))
        for name, counted in COUNTED.items()
    }

    def of_map(x: Tensor) -> dict[str, Tensor]:
        acts = d.encode_query(x), d.encode_key(x)
        return {
            name: some.scores(*acts, d.decoders, d.spec, include_constant=False)
            for name, some in maps.items()
        }

    return of_map


def _all_pairs_scores(d: BilinearQKDictionary, varies: Varies, x: Tensor) -> dict[str, Tensor]:
    query_acts, key_acts = d.encode_query(x), d.encode_key(x)

    def scores(query: Tensor, key: Tensor) -> Tensor:
        queries, keys = (query_acts * query) @ d.query.W_dec, (key_acts * key) @ d.key.W_dec
        return attention_scores(d.spec.split_queries(queries), d.spec.split_keys(keys), d.spec)

    every = scores(varies.query | True, varies.key | True)
    of_two_fixed = scores(~varies.query, ~varies.key)
    return {
        "all": every,
        "one_varies": every - of_two_fixed,
        "without_always_on": scores(varies.query, varies.key),
    }


class _Counts:
    """What `pair_counts` collects over cases."""

    def __init__(self):
        self.needed: dict[float, list[int]] = {share: [] for share in SHARES}
        self.held: list[float] = []
        self.top_percent: list[float] = []
        self.n_active: list[int] = []
        self.n_supporting: list[int] = []

    def add(
        self, c: Float[Tensor, "a b pos"], counted: Bool[Tensor, "a b"], row: ScoreRow, key_pos: int
    ) -> None:
        strengths = c[..., key_pos][counted].abs().sort(descending=True).values
        strengths = strengths[strengths > 0]
        self.n_active.append(len(strengths))
        if len(strengths):
            self.top_percent.append(
                float(strengths[: math.ceil(len(strengths) / 100)].sum() / strengths.sum())
            )
        best = best_pairs(
            pattern_effect(c, row.pattern, key_pos).masked_fill(~counted, 0.0), positive=True
        )
        self.n_supporting.append(len(best))
        without = row.scores - c[best[:, 0], best[:, 1]].cumsum(dim=0)
        drops = row.pattern[key_pos] - without.softmax(dim=-1)[:, key_pos]
        if len(drops) and drops[-1] > 0:
            self.held.append(float(drops[-1] / row.pattern[key_pos]))
            for share, needed in self.needed.items():
                needed.append(int((drops >= share * drops[-1]).nonzero()[0]) + 1)

    def result(self) -> dict[str, Any]:
        return {
            "n": len(self.held),
            "pairs_for": {str(share): _quartiles(needed) for share, needed in self.needed.items()},
            "weight_held": _quartiles(self.held),
            "top_percent": float(np.mean(self.top_percent)) if self.top_percent else None,
            "active_pairs": float(np.mean(self.n_active)),
            "supporting_pairs": float(np.mean(self.n_supporting)),
        }


def pair_counts(
    d: BilinearQKDictionary, cases: LayerCases, varies: Varies, kept: SparseFeatureMap | None
) -> dict[str, dict[str, Any]]:
    """By `COUNTED`, how many pairs are behind an attention weight: quartiles over cases; see the module."""
    counts = {name: _Counts() for name in COUNTED}
    every = Varies(varies.query | True, varies.key | True)
    for row, numbered in cases.by_row():
        x = cases.x[row]
        query_acts, key_acts = d.encode_query(x), d.encode_key(x)
        for _, case in numbered:
            i, j = case.query_pos, case.key_pos
            score_row = ScoreRow(cases.weights, cases.spec, x[: i + 1], case.head)
            terms = ScoreTerms.of(d, query_acts[i], key_acts[: i + 1], case.head, kept)
            a, b = terms.active("query", j, every.query), terms.active("key", j, every.key)
            c = terms.pairs(a, b)
            for name, counted in COUNTED.items():
                counts[name].add(c, counted(varies.query[a][:, None], varies.key[b]), score_row, j)
    return {name: some.result() for name, some in counts.items()}


def _quartiles(values: list[Any]) -> dict[str, float] | None:
    if not values:
        return None
    return dict(
        zip(("lower", "median", "upper"), np.percentile(values, [25, 50, 75]).tolist(), strict=True)
    )
