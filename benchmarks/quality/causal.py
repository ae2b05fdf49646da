"""Do the pairs named for an attention weight move it, more than others active at the same place, and by how much?

For each dictionary, ranking of a case's active feature x feature pairs, side and k: the distinct features of the top k
pairs are removed from the model's own x at the query or at the key (see `sae_lens_qk.explain.removals`), and so are those
of the controls. Features that are always on are in no ranking and no control.

    effect         pattern effect of the pair, supporting pairs alone: the explanation
    effect_kept    the same over the pairs of the feature map, times their weights
    contribution   c[i,j] of the pair, positive ones alone: a removal at key j leaves the other keys as they are
    decoder        |M(i - j)|
    importance     measured on other text, pairs among the candidates alone
    random
    marginal       k features instead of pairs, by the pattern effect of all their terms at the place, positive ones alone:
                   with a feature go all its pairs, those with constants and always-on features too
"""

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lens_qk.attention import SIDES, Side
from sae_lens_qk.explain.removals import Change, FeatureDirections, Place, ScoreRow, best_first, best_pairs, control_removals, top_features
from sae_lens_qk.explain.terms import ScoreTerms, pattern_effect
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.host.layer import layer_inputs
from sae_lens_qk.training.candidates import rank_pairs

from .cases import Case, LayerCases, Sizes
from .causal_figures import CONDITIONS, Table, correlations
from .causal_logits import logit_figures, next_token_kl

LOGITS_OF = ("effect", "key")
"""Ranking and side whose edited rows are followed to the next token."""
_CHECKED_PAIRS = 10


def run(layers: list[LayerCases], sizes: Sizes, seed: int = 0) -> dict[str, Any]:
    """Every figure by layer and dictionary, as plain JSON values."""
    return {str(cases.layer): _run_layer(cases, sizes, seed) for cases in layers}


@torch.no_grad()
def _run_layer(cases: LayerCases, sizes: Sizes, seed: int) -> dict[str, Any]:
    twins, logits_of = Twins.make(cases, sizes, seed), cases.subset(sizes.logit_cases, seed)
    results: dict[str, Any] = {}
    rows: dict[str, dict[int, EditedRows]] = {}
    for name, dictionary in cases.dictionaries.items():
        explainer = Explainer.fit(dictionary, cases, sizes)
        tables, rows[name] = measure(explainer, cases, sizes, logits_of, seed)
        results[name] = {
            "n_cases": len(cases.cases),
            "x_explained": explainer.x_explained(cases.x),
            "rankings": {
                ranking: {
                    side: tables[ranking, side].summary(sizes.bootstrap, seed) for side in SIDES
                }
                for ranking in dict.fromkeys(ranking for ranking, _ in tables)
            },
            "twins": twins.summary(dictionary, cases),
            "in_score_check": in_score_check(dictionary, cases, sizes),
        }
    kls = _logit_kls(cases, rows)
    for name, by_case in kls.items():
        texts = [cases.cases[number].row for number in by_case]
        results[name]["logits"] = logit_figures(
            list(by_case.values()), texts, sizes.logit_ks, sizes.bootstrap, seed
        )
    return results


class Ranking(NamedTuple):
    """What explains a case, best first: numbers in its usable active features of each side; `terms` predict."""

    query: Tensor
    key: Tensor
    terms: ScoreTerms

    @classmethod
    def of_pairs(cls, pairs: Tensor, terms: ScoreTerms) -> "Ranking":
        return cls(pairs[:, 0], pairs[:, 1], terms)


class Rankings(NamedTuple):
    """Every ranking of a case by name, and the usable features active at its query and key."""

    query_features: Tensor
    key_features: Tensor
    by_name: dict[str, Ranking]


class Explainer(NamedTuple):
    """A dictionary, and what removals and rankings need beside it, measured on other text."""

    dictionary: BilinearQKDictionary
    query: FeatureDirections
    key: FeatureDirections
    ranked: SparseFeatureMap

    @classmethod
    def fit(cls, d: BilinearQKDictionary, cases: LayerCases, sizes: Sizes) -> "Explainer":
        ranked = rank_pairs(
            d, cases.weights, cases.fit_x[: sizes.ranking_rows].split(1), sizes.n_candidates
        )
        query, key = (
            FeatureDirections.fit(encode, cases.fit_x) for encode in (d.encode_query, d.encode_key)
        )
        return cls(d, query, key, ranked)

    def x_explained(self, x: Tensor) -> dict[str, float]:
        """1 - sum |x - mean - sum_f act_f d_f|^2 / sum |x - average|^2 on the given rows, by side."""
        total = (x - x.mean(dim=(0, 1))).double().square().sum()
        errors = {
            "query": sum(
                self.query.residual(row, self.dictionary.encode_query(row)).double().square().sum()
                for row in x
            ),
            "key": sum(
                self.key.residual(row, self.dictionary.encode_key(row)).double().square().sum()
                for row in x
            ),
        }
        return {side: float(1 - error / total) for side, error in errors.items()}

    def rankings(
        self, case: Case, acts: tuple[Tensor, Tensor], row: ScoreRow, seed: int
    ) -> Rankings:
        """acts: of the query [d_query], and of the keys up to it [pos, d_key]."""
        d, j = self.dictionary, case.key_pos
        terms = ScoreTerms.of(d, *acts, case.head)
        a, b = terms.active("query", j, self.query.usable), terms.active("key", j, self.key.usable)
        c = terms.pairs(a, b)
        M = c[..., j] / (acts[0][a][:, None] * acts[1][j, b])
        found = self.ranked.find(torch.cartesian_prod(a, b, a.new_tensor([case.head])))
        importance = (self.ranked.statistics[found.clamp(min=0), 0] * (found >= 0)).view_as(M)
        order = torch.rand(M.shape, generator=torch.Generator().manual_seed(seed))
        pairs = {
            "effect": best_pairs(pattern_effect(c, row.pattern, j), positive=True),
            "contribution": best_pairs(c[..., j], positive=True),
            "decoder": best_pairs(M.abs()),
            "importance": best_pairs(importance, positive=True),
            "random": best_pairs(order),
        }
        made = {name: Ranking.of_pairs(listed, terms) for name, listed in pairs.items()}
        query, key = (
            pattern_effect(terms.rows(side, j, at), row.pattern, j)
            for side, at in zip(SIDES, (a, b), strict=True)
        )
        made["marginal"] = Ranking(
            best_first(query, positive=True), best_first(key, positive=True), terms
        )
        if d.has_feature_map:
            kept = ScoreTerms.of(d, *acts, case.head, d.feature_map)
            effect = pattern_effect(kept.pairs(a, b), row.pattern, j)
            made["effect_kept"] = Ranking.of_pairs(best_pairs(effect, positive=True), kept)
        return Rankings(a, b, made)


EditedRows = dict[tuple[int, str], Tensor]
"""Pattern rows by k and condition; condition `predicted` for that of the top features."""


def measure(
    explainer: Explainer, cases: LayerCases, sizes: Sizes, logits_of: list[int], seed: int
) -> tuple[dict[tuple[str, Side], Table], dict[int, EditedRows]]:
    """All removals of all cases, by (ranking, side); the edited rows are kept for the cases whose logits are wanted."""
    d = explainer.dictionary
    tables: dict[tuple[str, Side], Table] = {}
    kept_rows: dict[int, EditedRows] = {}
    texts = [case.row for case in cases.cases]
    for row, numbered in cases.by_row():
        x = cases.x[row]
        query_acts, key_acts = d.encode_query(x), d.encode_key(x)
        for number, case in numbered:
            i, j = case.query_pos, case.key_pos
            score_row = ScoreRow(cases.weights, cases.spec, x[: i + 1], case.head)
            rankings = explainer.rankings(
                case, (query_acts[i], key_acts[: i + 1]), score_row, seed + number
            )
            generator = torch.Generator().manual_seed(seed + number)
            features: dict[Side, Tensor] = {
                "query": rankings.query_features,
                "key": rankings.key_features,
            }
            components: dict[Side, Tensor] = {
                "query": explainer.query.components(query_acts[i], features["query"]),
                "key": explainer.key.components(key_acts[j], features["key"]),
            }
            for (name, ranking), side in product(rankings.by_name.items(), SIDES):
                place = Place(components[side], ranking.terms.rows(side, j, features[side]))
                at, factors = _removals(getattr(ranking, side), place, sizes.ks, generator)
                measured, predicted = place.remove(
                    score_row, x[i if side == "query" else j], side, j, factors
                )
                table = tables.setdefault((name, side), Table(sizes.ks, texts))
                table.add(number, at, "measured", Change.of(score_row.scores, measured, j))
                table.add(number, at, "predicted", Change.of(score_row.scores, predicted, j))
                table.add(number, at, "size", [(factors @ place.components).norm(dim=1)])
                table.add(number, at, "count", [(factors != 0).sum(dim=1)])
                if number in logits_of and (name, side) == LOGITS_OF:
                    kept_rows[number] = _rows_for_logits(at, measured, predicted, sizes)
    return tables, kept_rows


def _removals(
    listed: Tensor, place: Place, ks: tuple[int, ...], generator: torch.Generator
) -> tuple[list[tuple[int, str]], Tensor]:
    """(k, condition) of each removal that exists, and their factors."""
    at, factors = [], [place.rows.new_zeros(0, len(place.rows))]
    for k in ks:
        top = top_features(listed, k, len(place.rows))
        if top.any():
            removals = {"top": top.to(place.rows.dtype), **control_removals(place, top, generator)}
            at += [(k, condition) for condition in removals]
            factors += [removal[None] for removal in removals.values()]
    return at, torch.cat(factors)


def _rows_for_logits(
    at: list[tuple[int, str]], measured: Tensor, predicted: Tensor, sizes: Sizes
) -> EditedRows:
    rows = dict(zip(at, measured.softmax(dim=-1), strict=True))
    for (k, condition), row in zip(at, predicted.softmax(dim=-1), strict=True):
        if condition == CONDITIONS[0]:
            rows[k, "predicted"] = row
    return {(k, condition): row for (k, condition), row in rows.items() if k in sizes.logit_ks}


def _logit_kls(
    cases: LayerCases, rows: dict[str, dict[int, EditedRows]]
) -> dict[str, dict[int, dict[tuple[int, str], float]]]:
    """KL(clean || patched) at the query by dictionary, case and edited row; a case is run once for all dictionaries."""
    made: dict[str, dict[int, dict[tuple[int, str], float]]] = {name: {} for name in rows}
    for number in sorted({number for by_case in rows.values() for number in by_case}):
        case = cases.cases[number]
        listed = [
            (name, at, row) for name in rows for at, row in rows[name].get(number, {}).items()
        ]
        if not listed:
            continue
        tokens = cases.tokens[case.row, : case.query_pos + 1]
        kls = next_token_kl(
            cases.model, cases.layer, case.head, tokens, torch.stack([row for _, _, row in listed])
        )
        for (name, at, _), kl in zip(listed, kls.tolist(), strict=True):
            made[name].setdefault(number, {})[at] = kl
    return made


class Twins(NamedTuple):
    """Inputs at the key of prompts in which that token is another one of the same text; free of decoders and fits."""

    numbers: list[int]
    x: Tensor
    """[twin, d_model]"""

    @classmethod
    def make(cls, cases: LayerCases, sizes: Sizes, seed: int) -> "Twins":
        numbers, generator, inputs = (
            cases.subset(sizes.twins, seed + 1),
            torch.Generator().manual_seed(seed + 1),
            [],
        )
        for number in numbers:
            case = cases.cases[number]
            tokens = cases.tokens[case.row]
            others = tokens[(tokens != tokens[case.key_pos]) & (tokens != tokens[0])]
            twin = tokens[None, : case.key_pos + 1].clone()
            twin[0, -1] = others[torch.randint(len(others), (1,), generator=generator)]
            inputs.append(layer_inputs(cases.model, cases.layer, twin)[0, -1])
        return cls(numbers, torch.stack(inputs))

    def summary(self, d: BilinearQKDictionary, cases: LayerCases) -> dict[str, Any]:
        """Drop of the centred score when x_j becomes the twin's: from all terms of each source against measured."""
        sources = {
            "transcoders": None,
            **({"feature_map": d.feature_map} if d.has_feature_map else {}),
        }
        measured: list[float] = []
        predicted: dict[str, list[float]] = {name: [] for name in sources}
        for number, twin in zip(self.numbers, self.x, strict=True):
            case = cases.cases[number]
            x, j = cases.x[case.row, : case.query_pos + 1], case.key_pos
            row = ScoreRow(cases.weights, cases.spec, x, case.head)
            drop = row.scores - row.edited("key", j, twin[None])[0]
            measured.append(float(pattern_effect(drop, row.pattern, j)))
            key_acts = torch.stack(
                [d.encode_key(x), d.encode_key(x.index_copy(0, torch.tensor([j]), twin[None]))]
            )
            for name, kept in sources.items():
                clean, other = (
                    ScoreTerms.of(d, d.encode_query(x[-1]), acts, case.head, kept).scores
                    for acts in key_acts
                )
                predicted[name].append(float(pattern_effect(clean - other, row.pattern, j)))
        figures = {name: correlations(values, measured) for name, values in predicted.items()}
        return {"n": len(measured), "mean_drop": sum(measured) / len(measured), **figures}


def in_score_check(d: BilinearQKDictionary, cases: LayerCases, sizes: Sizes) -> float:
    """Code check, no evidence: largest error of the score drop predicted for the top pairs' terms.

    Against the same pairs subtracted inside the scores of the whole sequence by `SparseFeatureMap.scores`.
    """
    worst = 0.0
    for number in cases.subset(sizes.checks, 0):
        case = cases.cases[number]
        x, j = cases.x[case.row, : case.query_pos + 1], case.key_pos
        row = ScoreRow(cases.weights, cases.spec, x, case.head)
        query_acts, key_acts = d.encode_query(x), d.encode_key(x)
        terms = ScoreTerms.of(d, query_acts[-1], key_acts, case.head)
        a, b = query_acts[-1].nonzero()[:, 0], key_acts[j].nonzero()[:, 0]
        effects = pattern_effect(terms.pairs(a, b), row.pattern, j)
        best = best_pairs(effects)[:_CHECKED_PAIRS]
        triples = torch.stack(
            [a[best[:, 0]], b[best[:, 1]], torch.full_like(best[:, 0], case.head)], dim=1
        )
        listed = SparseFeatureMap(
            triples, torch.ones(len(best)), d.cfg.d_query, d.cfg.d_key, d.spec.n_heads
        )
        made = listed.scores(
            query_acts[None], key_acts[None], d.decoders, d.spec, include_constant=False
        )
        drop = pattern_effect(made[0, case.head, -1], row.pattern, j)
        worst = max(worst, abs(float(effects[best[:, 0], best[:, 1]].sum() - drop)))
    return worst
