"""Do the pairs named for an attention weight move it, and more than others active there?

For each dictionary, ranking of a case's active pairs of features (`explainer`), side and k: the
distinct features of the top k pairs are removed from the model's own x at the query or at the key
(see `sae_lens_qk.explain.removals`), and so are those of the controls. Features that are always on
are in no control.
"""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.cases import LayerCases, Sizes
from benchmarks.quality.causal_logits import logit_metrics, next_token_kl
from benchmarks.quality.causal_metrics import Outcomes, Removal
from benchmarks.quality.explainer import Explainer
from benchmarks.quality.twins import Twins, in_score_check
from sae_lens_qk.attention import SIDES, Side
from sae_lens_qk.explain.removals import RemovalSite, ScoreRow, control_removals, top_features

FOLLOWED = ("effect", "key")
"""Ranking and side whose edited rows are followed to the next token."""

EditedRows = dict[Removal, Tensor]
"""Pattern rows by k and condition; condition `predicted` for that of the top features."""


def run(
    layers: list[LayerCases],
    sizes: Sizes,
    seed: int = 0,
) -> dict[str, Any]:
    """Every metric by layer and dictionary, as plain JSON values."""
    return {str(cases.layer.index): _run_layer(cases, sizes, seed) for cases in layers}


@torch.no_grad()
def _run_layer(
    cases: LayerCases,
    sizes: Sizes,
    seed: int,
) -> dict[str, Any]:
    twins = Twins.make(cases, sizes, seed)
    followed_cases = cases.subset(sizes.logit_cases, seed)
    results: dict[str, Any] = {}
    rows: dict[str, dict[int, EditedRows]] = {}
    for name, dictionary in cases.dictionaries.items():
        explainer = Explainer.fit(dictionary, cases, sizes)
        outcomes, rows[name] = measure(explainer, cases, sizes, followed_cases, seed)
        rankings: dict[str, dict[Side, Any]] = {}
        for (ranking, side), outcome in outcomes.items():
            rankings.setdefault(ranking, {})[side] = outcome.summary(sizes.bootstrap, seed)
        results[name] = {
            "n_cases": len(cases.cases),
            "x_explained": explainer.x_explained(cases.x),
            "rankings": rankings,
            "twins": twins.summary(dictionary, cases),
            "in_score_check": in_score_check(dictionary, cases, sizes),
        }
    for name, kls in _logit_kls(cases, rows).items():
        texts = [cases.cases[number].row for number in kls]
        results[name]["logits"] = logit_metrics(
            list(kls.values()), texts, sizes.logit_ks, sizes.bootstrap, seed
        )
    return results


def measure(
    explainer: Explainer, cases: LayerCases, sizes: Sizes, followed_cases: list[int], seed: int
) -> tuple[dict[tuple[str, Side], Outcomes], dict[int, EditedRows]]:
    """All removals of all cases, by (ranking, side), and edited rows of the cases to follow."""
    outcomes: dict[tuple[str, Side], Outcomes] = {}
    edited_rows: dict[int, EditedRows] = {}
    texts = [case.row for case in cases.cases]
    for row, numbered_cases in cases.rows():
        x = cases.x[row]
        features = explainer.dictionary.features(x[None])
        for number, case in numbered_cases:
            score_row = ScoreRow(cases.weights, cases.spec, x[: case.query_pos + 1], case.head)
            explained = explainer.explain(case, features, score_row, seed + number)
            components = explainer.components(explained, features)
            generator = torch.Generator().manual_seed(seed + number)
            for (name, ranking), side in product(explained.rankings.items(), SIDES):
                site = explainer.site(explained, ranking, side, x, components[side])
                order = ranking.query if side == "query" else ranking.key
                removals, factors = _removals(order, site, sizes.ks, generator)
                actual = site.measure(score_row, factors)
                predicted = site.predict(score_row, factors)
                outcome = outcomes.setdefault((name, side), Outcomes(sizes.ks, texts))
                outcome.add(
                    number,
                    removals,
                    actual=score_row.change(actual, case.key_pos),
                    predicted=score_row.change(predicted, case.key_pos),
                    sizes=(factors @ site.components).norm(dim=1),
                    counts=(factors != 0).sum(dim=1),
                )
                if number in followed_cases and (name, side) == FOLLOWED:
                    edited_rows[number] = _rows_to_follow(
                        removals,
                        score_row.row_pattern(actual),
                        score_row.row_pattern(predicted),
                        sizes,
                    )
    return outcomes, edited_rows


def _removals(
    order: Tensor, site: RemovalSite, ks: tuple[int, ...], generator: torch.Generator
) -> tuple[list[Removal], Tensor]:
    """Each removal that exists, and their factors [removal, feature]."""
    n_features = len(site.rows)
    removals: list[Removal] = []
    factors = [site.rows.new_zeros(0, n_features)]
    for k in ks:
        top = top_features(order, k, n_features)
        if top.any():
            conditions = {"top": top.to(site.rows.dtype)}
            conditions |= control_removals(site, top, generator)
            removals += [Removal(k, condition) for condition in conditions]
            factors += [condition[None] for condition in conditions.values()]
    return removals, torch.cat(factors)


def _rows_to_follow(
    removals: list[Removal], actual: Tensor, predicted: Tensor, sizes: Sizes
) -> EditedRows:
    """The edited pattern rows, at the k whose logits are wanted."""
    rows: EditedRows = {}
    for n, removal in enumerate(removals):
        if removal.k not in sizes.logit_ks:
            continue
        rows[removal] = actual[n]
        if removal.condition == "top":
            rows[Removal(removal.k, "predicted")] = predicted[n]
    return rows


def _logit_kls(
    cases: LayerCases, rows: dict[str, dict[int, EditedRows]]
) -> dict[str, dict[int, dict[Removal, float]]]:
    """KL(clean || patched) at the query by dictionary, case and edited row.

    A case is run once for all dictionaries.
    """
    kls: dict[str, dict[int, dict[Removal, float]]] = {name: {} for name in rows}
    numbers = sorted({number for edited_rows in rows.values() for number in edited_rows})
    for number in numbers:
        labels = []
        patterns = []
        for name, edited_rows in rows.items():
            for removal, pattern in edited_rows.get(number, {}).items():
                labels.append((name, removal))
                patterns.append(pattern)
        if not patterns:
            continue
        case = cases.cases[number]
        tokens = cases.tokens[case.row, : case.query_pos + 1]
        values = next_token_kl(cases.layer, case.head, tokens, torch.stack(patterns))
        for (name, removal), kl in zip(labels, values.tolist(), strict=True):
            kls[name].setdefault(number, {})[removal] = kl
    return kls
