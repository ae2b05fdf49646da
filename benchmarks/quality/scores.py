"""How much of a planted circuit a method has found."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.scoring.pairs import Decoders
from sae_lens_qk.training.losses import TruePattern

from .planted import Circuit, Sample


class Ranked(NamedTuple):
    """What a method found: a dictionary, and pairs of its features from the one it is surest of on."""

    dictionary: BilinearQKDictionary
    pairs: Int[Tensor, "pair 3"]
    weights: Float[Tensor, " pair"]


class Matching(NamedTuple):
    """Learned features of one side assigned one to one to the planted features that this side uses."""

    cosines: Float[Tensor, " planted"]
    """Of each planted feature's query (key) vector with the decoder row assigned to it, over all heads."""
    planted_of: dict[int, int]
    """Learned feature -> planted feature."""


class AtSize(NamedTuple):
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
    """Sum over planted pairs of the precision at their place in the ranking, over their number; missing ones give 0."""
    f1: float
    """At the true number of pairs, where precision, recall and F1 are one number."""
    transcoders_kl: float | None
    """Pattern KL without a map."""
    l0_query: float | None
    l0_key: float | None
    curve: list[AtSize]


def match(
    decoders: Float[Tensor, "feature d_out"],
    planted: Float[Tensor, "planted d_out"],
    numbers: list[int],
) -> Matching:
    """The assignment with the largest total cosine (Hungarian method).

    Args:
        numbers: which planted feature each row of `planted` is.
    """
    unit_decoders, unit_planted = (
        torch.nn.functional.normalize(t, dim=1) for t in (decoders, planted)
    )
    cosine = unit_planted @ unit_decoders.T
    rows, columns = linear_sum_assignment(-cosine.numpy())
    return Matching(
        cosine[rows, columns],
        {int(column): numbers[row] for row, column in zip(rows, columns, strict=True)},
    )


@torch.no_grad()
def score(
    found: Ranked,
    circuit: Circuit,
    test: Sample,
    sizes: list[int],
    by_size: dict[int, Ranked] | None = None,
) -> PlantedScores:
    """Scores on fresh sequences.

    Args:
        sizes: numbers of pairs of the curve.
        by_size: other findings for some of them: masks trained for that number.
    """
    d = found.dictionary
    true = TruePattern.of(
        circuit.weights.queries(test.x), circuit.weights.keys(test.x), circuit.spec
    )
    query_acts, key_acts = d.encode_query(test.x), d.encode_key(test.x)
    curve = []
    for n in sizes:
        at_size = (by_size or {}).get(n, found)
        hits = find_hits(at_size.dictionary.decoders, at_size.pairs, circuit).hits
        curve.append(
            _at_size(hits, n, circuit)._replace(
                pattern_kl=_kl(true, _map_scores(at_size, n, test.x))
            )
        )
    return (
        find_hits(d.decoders, found.pairs, circuit)
        .scores(circuit)
        ._replace(
            transcoders_kl=_kl(true, d.scores(test.x)),
            l0_query=float((query_acts > 0).sum(dim=-1).float().mean()),
            l0_key=float((key_acts > 0).sum(dim=-1).float().mean()),
            curve=curve,
        )
    )


def score_labelled(
    decoders: Decoders, pairs: Int[Tensor, "pair 3"], circuit: Circuit, sizes: list[int]
) -> PlantedScores:
    """Scores of a method that gives vectors and pairs but no encoder: no pattern KL and no L0."""
    found = find_hits(decoders, pairs, circuit)
    return found.scores(circuit)._replace(curve=[_at_size(found.hits, n, circuit) for n in sizes])


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
            f1=_at_size(self.hits, n_planted, circuit).f1,
            transcoders_kl=None,
            l0_query=None,
            l0_key=None,
            curve=[],
        )


def find_hits(decoders: Decoders, pairs: Int[Tensor, "pair 3"], circuit: Circuit) -> Hits:
    """Match the features of both sides to the planted ones, then the pairs."""
    sides = []
    for column, (vectors, rows) in enumerate(zip(circuit.vectors(), decoders, strict=True)):
        used = circuit.pairs[:, column].unique().tolist()
        sides.append(match(circuit.read(rows), vectors[used], used))
    query, key = sides
    planted = {tuple(pair) for pair in circuit.pairs.tolist()}
    hits = [
        (query.planted_of.get(a), key.planted_of.get(b), h) in planted for a, b, h in pairs.tolist()
    ]
    return Hits(query, key, np.asarray(hits, dtype=float))


def _at_size(hits: np.ndarray, n: int, circuit: Circuit) -> AtSize:
    right, listed, n_planted = float(hits[:n].sum()), min(n, len(hits)), len(circuit.pairs)
    return AtSize(
        n, right / max(1, listed), right / n_planted, 2 * right / (listed + n_planted), None
    )


def _map_scores(found: Ranked, n: int, x: Tensor) -> Tensor:
    d = found.dictionary
    kept = SparseFeatureMap(
        found.pairs[:n], found.weights[:n], d.cfg.d_query, d.cfg.d_key, d.spec.n_heads
    )
    return kept.scores(d.encode_query(x), d.encode_key(x), d.decoders, d.spec)


def _kl(true: TruePattern, scores: Tensor) -> float:
    """Mean over rows, heads and queries, position 0 left out."""
    return float(true.kl(scores)[..., 1:].mean())
