"""How much of a planted circuit a method has found."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.quality.planted import Circuit, Sample
from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.scoring.pairs import Decoders


class RankedPairs(NamedTuple):
    """What a method gives: a dictionary, and pairs of its features, the surest first."""

    dictionary: BilinearQKDictionary
    pairs: Int[Tensor, "pair 3"]
    weights: Float[Tensor, " pair"]


class Matching(NamedTuple):
    """Learned features of one side assigned one to one to the planted features of this side."""

    cosines: Float[Tensor, " planted"]
    """Of each planted query (key) vector with the decoder row assigned to it, over all heads."""
    planted_numbers: dict[int, int]
    """Learned feature -> planted feature."""


class CurvePoint(NamedTuple):
    """The first `n_pairs` of a ranking."""

    n_pairs: int
    precision: float
    recall: float
    f1: float
    pattern_kl: float | None
    """KL(true || pattern of those pairs alone), nats, position 0 left out."""


class PlantedScores(NamedTuple):
    """Everything measured on one circuit."""

    recovery_query: float
    """Mean cosine of the matching."""
    recovery_key: float
    average_precision: float
    """Sum over planted pairs of the precision at their rank, over their number; missing ones: 0."""
    f1: float
    """At the true number of pairs, where precision, recall and F1 are one number."""
    transcoders_kl: float | None
    """Pattern KL without a map."""
    l0_query: float | None
    l0_key: float | None
    curve: list[CurvePoint]


class PlantedPattern(NamedTuple):
    """The true pattern of test sequences."""

    log_pattern: Float[Tensor, "row head pos_q pos_k"]
    spec: AttentionSpec

    @classmethod
    def compute(
        cls,
        circuit: Circuit,
        x: Float[Tensor, "row pos d_model"],
    ) -> "PlantedPattern":
        weights = circuit.weights
        scores = circuit.spec.scores(weights.queries(x), weights.keys(x))
        return cls(circuit.spec.log_pattern(scores), circuit.spec)

    def mean_kl(self, scores: Float[Tensor, "row head pos_q pos_k"]) -> float:
        """KL to the pattern of these scores: mean over rows, heads, queries but position 0."""
        divergence = self.spec.kl(self.log_pattern, self.spec.log_pattern(scores))
        return float(divergence[..., 1:].mean())


def match(
    decoders: Float[Tensor, "feature d_out"],
    planted: Float[Tensor, "planted d_out"],
    numbers: list[int],
) -> Matching:
    """The assignment with the largest total cosine (Hungarian method).

    Args:
        numbers: which planted feature each row of `planted` is.
    """
    cosines = normalize(planted, dim=1) @ normalize(decoders, dim=1).T
    rows, columns = linear_sum_assignment(-cosines.numpy())
    planted_numbers = {int(column): numbers[row] for row, column in zip(rows, columns, strict=True)}
    return Matching(cosines[rows, columns], planted_numbers)


@torch.no_grad()
def score(
    best: RankedPairs,
    circuit: Circuit,
    test: Sample,
    sizes: list[int],
    trained_sizes: dict[int, RankedPairs] | None = None,
) -> PlantedScores:
    """Scores on fresh sequences.

    Args:
        sizes: numbers of pairs of the curve.
        trained_sizes: other results for some of them: masks trained for that number.
    """
    d = best.dictionary
    true = PlantedPattern.compute(circuit, test.x)
    features = d.features(test.x)
    curve = []
    for n in sizes:
        ranked = (trained_sizes or {}).get(n, best)
        hits = find_hits(ranked.dictionary.decoders, ranked.pairs, circuit).hits
        pattern_kl = true.mean_kl(_map_scores(ranked, n, test.x))
        curve.append(_curve_point(hits, n, circuit)._replace(pattern_kl=pattern_kl))
    scores = find_hits(d.decoders, best.pairs, circuit).scores(circuit)
    return scores._replace(
        transcoders_kl=true.mean_kl(d.scores(features)),
        l0_query=float((features.query > 0).sum(dim=-1).float().mean()),
        l0_key=float((features.key > 0).sum(dim=-1).float().mean()),
        curve=curve,
    )


def score_labelled(
    decoders: Decoders, pairs: Int[Tensor, "pair 3"], circuit: Circuit, sizes: list[int]
) -> PlantedScores:
    """Scores of a method that gives vectors and pairs but no encoder: no pattern KL and no L0."""
    ranking = find_hits(decoders, pairs, circuit)
    curve = [_curve_point(ranking.hits, n, circuit) for n in sizes]
    return ranking.scores(circuit)._replace(curve=curve)


class Hits(NamedTuple):
    """A ranking compared with the planted list."""

    query: Matching
    key: Matching
    hits: np.ndarray
    """1 where a ranked pair is a planted one."""

    def scores(self, circuit: Circuit) -> PlantedScores:
        n_planted = len(circuit.pairs)
        precision = self.hits.cumsum() / np.arange(1, len(self.hits) + 1)
        return PlantedScores(
            recovery_query=float(self.query.cosines.mean()),
            recovery_key=float(self.key.cosines.mean()),
            average_precision=float((precision * self.hits).sum() / n_planted),
            f1=_curve_point(self.hits, n_planted, circuit).f1,
            transcoders_kl=None,
            l0_query=None,
            l0_key=None,
            curve=[],
        )


def find_hits(
    decoders: Decoders,
    pairs: Int[Tensor, "pair 3"],
    circuit: Circuit,
) -> Hits:
    """Match the features of both sides to the planted ones, then the pairs."""
    query_vectors, key_vectors = circuit.vectors()
    query_numbers = circuit.pairs[:, 0].unique().tolist()
    key_numbers = circuit.pairs[:, 1].unique().tolist()
    query_rows = circuit.readable_part(decoders.query)
    key_rows = circuit.readable_part(decoders.key)
    query = match(query_rows, query_vectors[query_numbers], query_numbers)
    key = match(key_rows, key_vectors[key_numbers], key_numbers)
    planted = {tuple(pair) for pair in circuit.pairs.tolist()}
    hits = []
    for a, b, head in pairs.tolist():
        pair = (query.planted_numbers.get(a), key.planted_numbers.get(b), head)
        hits.append(float(pair in planted))
    return Hits(query, key, np.asarray(hits, dtype=float))


def _curve_point(
    hits: np.ndarray,
    n: int,
    circuit: Circuit,
) -> CurvePoint:
    n_right = float(hits[:n].sum())
    n_ranked = min(n, len(hits))
    n_planted = len(circuit.pairs)
    return CurvePoint(
        n_pairs=n,
        precision=n_right / max(1, n_ranked),
        recall=n_right / n_planted,
        f1=2 * n_right / (n_ranked + n_planted),
        pattern_kl=None,
    )


def _map_scores(
    ranked: RankedPairs,
    n: int,
    x: Tensor,
) -> Tensor:
    d = ranked.dictionary
    sizes = (d.cfg.d_query, d.cfg.d_key, d.spec.n_heads)
    feature_map = SparseFeatureMap(ranked.pairs[:n], ranked.weights[:n], *sizes)
    return feature_map.scores(d.features(x), d.decoders, d.spec)
