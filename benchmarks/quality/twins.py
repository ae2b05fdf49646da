"""Tests that need no feature directions: other tokens at the key, and terms inside the scores."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.quality.cases import Case, LayerCases, Sizes
from benchmarks.quality.causal_metrics import correlations
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.explain.removals import ScoreRow, best_pairs
from sae_lens_qk.explain.terms import HeadTerms
from sae_lens_qk.feature_map import SparseFeatureMap

_CHECKED_PAIRS = 10


class Twins(NamedTuple):
    """Inputs at the key of prompts in which that token is another one of the same text."""

    numbers: list[int]
    x: Tensor
    """[twin, d_model]"""

    @classmethod
    def make(
        cls,
        cases: LayerCases,
        sizes: Sizes,
        seed: int,
    ) -> "Twins":
        numbers = cases.subset(sizes.twins, seed + 1)
        generator = torch.Generator().manual_seed(seed + 1)
        inputs = []
        for number in numbers:
            case = cases.cases[number]
            tokens = cases.tokens[case.row]
            bos = tokens[0]
            is_other = (tokens != tokens[case.key_pos]) & (tokens != bos)
            others = tokens[is_other]
            choice = torch.randint(len(others), (1,), generator=generator)
            twin = tokens[None, : case.key_pos + 1].clone()
            twin[0, -1] = others[choice]
            x = cases.layer.inputs(twin)  # [1, pos, d_model]
            inputs.append(x[0, -1])
        return cls(numbers, torch.stack(inputs))

    def summary(
        self,
        d: BilinearQKDictionary,
        cases: LayerCases,
    ) -> dict[str, Any]:
        """Drop of the centred score when x_j becomes the twin's: predicted against measured.

        Predicted is the drop of all terms of a source.
        """
        sources = map_sources(d)
        actual: list[float] = []
        predicted: dict[str, list[float]] = {source: [] for source in sources}
        for number, twin in zip(self.numbers, self.x, strict=True):
            case = cases.cases[number]
            j = case.key_pos
            x, row = _score_row(cases, case)
            edited_scores = row.edited("key", j, twin[None])[0]
            drop = row.effect(row.scores - edited_scores, j)
            actual.append(float(drop))
            twin_x = x.clone()
            twin_x[j] = twin
            features = d.features(x[None])
            twin_features = d.features(twin_x[None])
            for source, feature_map in sources.items():
                clean = HeadTerms(d, features, case.head, feature_map)
                changed = HeadTerms(d, twin_features, case.head, feature_map)
                clean_scores = clean.row(case.query_pos).scores
                changed_scores = changed.row(case.query_pos).scores
                predicted_drop = row.effect(clean_scores - changed_scores, j)
                predicted[source].append(float(predicted_drop))
        agreement = {}
        for source, drops in predicted.items():
            agreement[source] = correlations(drops, actual)
        mean_drop = sum(actual) / len(actual)
        return {"n": len(actual), "mean_drop": mean_drop, **agreement}


def map_sources(d: BilinearQKDictionary) -> dict[str, SparseFeatureMap | None]:
    """The dictionary's sources, with the map whose pairs count; None: all pairs."""
    sources: dict[str, SparseFeatureMap | None] = {"transcoders": None}
    if d.has_feature_map:
        sources["feature_map"] = d.feature_map
    return sources


def in_score_check(
    d: BilinearQKDictionary,
    cases: LayerCases,
    sizes: Sizes,
) -> float:
    """Code check, no evidence: largest error of the score drop predicted for the top pairs' terms.

    Against the same pairs subtracted inside the scores of the whole sequence by
    `SparseFeatureMap.scores`.
    """
    errors = []
    for number in cases.subset(sizes.checks, 0):
        case = cases.cases[number]
        j = case.key_pos
        x, row = _score_row(cases, case)
        features = d.features(x[None])
        terms = HeadTerms(d, features, case.head).row(case.query_pos)
        a = features.query[0, -1].nonzero()[:, 0]
        b = features.key[0, j].nonzero()[:, 0]
        effects = row.effect(terms.pairs(a, b), j)  # [a, b]
        best = best_pairs(effects)[:_CHECKED_PAIRS]
        best_a, best_b = best.unbind(dim=1)
        predicted = effects[best_a, best_b].sum()
        heads = torch.full_like(best_a, case.head)
        pairs = torch.stack([a[best_a], b[best_b], heads], dim=1)
        weights = torch.ones(len(pairs))
        pair_map = SparseFeatureMap(pairs, weights, d.cfg.d_query, d.cfg.d_key, d.spec.n_heads)
        scores = pair_map.scores(features, d.decoders, d.spec, include_constant=False)
        drop = row.effect(scores[0, case.head, -1], j)
        errors.append(abs(float(predicted - drop)))
    return max(errors, default=0.0)


def _score_row(
    cases: LayerCases,
    case: Case,
) -> tuple[Tensor, ScoreRow]:
    """The layer's input up to the query [pos, d_model], and the case's row of scores."""
    x = cases.x[case.row, : case.query_pos + 1]
    return x, ScoreRow(cases.weights, cases.spec, x, case.head)
