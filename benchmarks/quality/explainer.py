"""Rankings of what explains an attention weight, by each dictionary.

Pairs of features that are active at the query and at the key, best first. Features that are always
on are in no ranking:

    effect         pattern effect of the pair, supporting pairs alone: the explanation
    effect_kept    the same over the pairs of the feature map, times their weights
    contribution   c[i,j] of the pair, positive ones alone: a removal at key j leaves the other keys
    decoder        |M(i - j)|
    importance     measured on other text, pairs among the candidates alone
    random
    marginal       k features instead of pairs, by the pattern effect of all their terms at the
                   site, positive ones alone: with a feature go all its pairs, those with constants
                   and always-on features too
"""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.quality.cases import Case, LayerCases, Sizes
from sae_lens_qk.attention import SIDES, Side
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.explain.removals import Directions, RemovalSite, ScoreRow, best_first, best_pairs
from sae_lens_qk.explain.terms import HeadTerms, ScoreTerms
from sae_lens_qk.feature_map import Features, SparseFeatureMap
from sae_lens_qk.training.candidates import rank_pairs


class Ranking(NamedTuple):
    """What explains a case, best first, and the terms that predict what a removal does.

    Numbers are places among the usable active features of each side.
    """

    query: Tensor
    key: Tensor
    terms: ScoreTerms


class ExplainedCase(NamedTuple):
    """A case, the usable features active at its query and key, and every ranking of it by name."""

    row: ScoreRow
    case: Case
    features: dict[Side, Tensor]
    rankings: dict[str, Ranking]


class Explainer(NamedTuple):
    """A dictionary, and what removals and rankings need besides it, measured on other text."""

    dictionary: BilinearQKDictionary
    directions: Directions
    ranked: SparseFeatureMap

    @classmethod
    def fit(
        cls,
        d: BilinearQKDictionary,
        cases: LayerCases,
        sizes: Sizes,
    ) -> "Explainer":
        rows = cases.fit_x[: sizes.ranking_rows].split(1)
        ranked = rank_pairs(d, cases.weights, rows, sizes.n_candidates)
        return cls(d, Directions.fit(d, list(cases.fit_x)), ranked)

    def x_explained(self, x: Tensor) -> dict[str, float]:
        """1 - sum |x - mean - sum_f act_f d_f|^2 / sum |x - average|^2 on some rows, by side."""
        average = x.mean(dim=(0, 1))
        total = float((x - average).double().square().sum())
        errors = dict.fromkeys(SIDES, 0.0)
        for row in x:
            features = self.dictionary.features(row[None])
            for side in SIDES:
                directions = getattr(self.directions, side)
                acts = getattr(features, side)[0]
                residual = directions.residual(row, acts)
                errors[side] += float(residual.double().square().sum())
        return {side: 1 - error / total for side, error in errors.items()}

    def explain(
        self,
        case: Case,
        features: Features,
        row: ScoreRow,
        seed: int,
    ) -> ExplainedCase:
        """Every ranking of a case.

        Args:
            features: of the case's row of text, batch 1.
        """
        d = self.dictionary
        j = case.key_pos
        terms = HeadTerms(d, features, case.head).row(case.query_pos)
        a = terms.active("query", j, self.directions.query.usable)
        b = terms.active("key", j, self.directions.key.usable)
        contributions = terms.pairs(a, b)  # [a, b, pos]
        key_contributions = contributions[..., j]
        query_acts = features.query[0, case.query_pos, a]
        key_acts = features.key[0, j, b]
        M = key_contributions / (query_acts[:, None] * key_acts)
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(M.shape, generator=generator)
        effects = row.effect(contributions, j)
        importance = self._importance(a, b, case.head)
        pair_rankings = {
            "effect": best_pairs(effects, positive=True),
            "contribution": best_pairs(key_contributions, positive=True),
            "decoder": best_pairs(M.abs()),
            "importance": best_pairs(importance, positive=True),
            "random": best_pairs(order),
        }
        rankings = {}
        for name, pairs in pair_rankings.items():
            rankings[name] = Ranking(pairs[:, 0], pairs[:, 1], terms)
        query_effects = row.effect(terms.rows("query", j, a), j)
        key_effects = row.effect(terms.rows("key", j, b), j)
        best_query = best_first(query_effects, positive=True)
        best_key = best_first(key_effects, positive=True)
        rankings["marginal"] = Ranking(best_query, best_key, terms)
        if d.has_feature_map:
            head_terms = HeadTerms(d, features, case.head, d.feature_map)
            map_terms = head_terms.row(case.query_pos)
            map_effects = row.effect(map_terms.pairs(a, b), j)
            pairs = best_pairs(map_effects, positive=True)
            rankings["effect_kept"] = Ranking(pairs[:, 0], pairs[:, 1], map_terms)
        return ExplainedCase(row, case, {"query": a, "key": b}, rankings)

    def _importance(
        self,
        a: Tensor,
        b: Tensor,
        head: int,
    ) -> Tensor:
        """[a, b], 0 for pairs that are not among the candidates."""
        rows = self.ranked.find(torch.cartesian_prod(a, b, a.new_tensor([head])))
        importance = self.ranked.statistics[rows.clamp(min=0), 0] * (rows >= 0)
        return importance.view(len(a), len(b))

    def components(
        self,
        explained: ExplainedCase,
        features: Features,
    ) -> dict[Side, Tensor]:
        """What each usable active feature adds to x at the query and at the key, by side."""
        query_acts = features.query[0, explained.case.query_pos]
        key_acts = features.key[0, explained.case.key_pos]
        query_features = explained.features["query"]
        key_features = explained.features["key"]
        return {
            "query": self.directions.query.components(query_acts, query_features),
            "key": self.directions.key.components(key_acts, key_features),
        }

    def site(
        self,
        explained: ExplainedCase,
        ranking: Ranking,
        side: Side,
        x: Tensor,
        components: Tensor,
    ) -> RemovalSite:
        """What can be removed at one side of a case; x: the case's row of text."""
        case = explained.case
        return RemovalSite(
            side=side,
            key_pos=case.key_pos,
            x=x[case.query_pos if side == "query" else case.key_pos],
            components=components,
            rows=ranking.terms.rows(side, case.key_pos, explained.features[side]),
        )
