"""The terms of one score as tables: one row per term, and sums per feature.

pattern_effect   c[i,j] - sum_j' P[i,j'] c[i,j'], the derivative of log P[i,j] along the pair;
                 negative: an inhibitor
attention_drop   P[i,j] - softmax(score - c)[i,j], exact: the pair leaves the whole row of scores
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.config import BilinearQKConfig
from sae_lens_qk.explain.terms import AttentionRow, ScoreTerms

KINDS = ("pair", "query_constant", "key_constant", "constant", "masked", "error")
"""Feature x feature; constant x key feature; query feature x constant; constant x constant; with
the source "feature_map" what the mask takes away, summed; anything x a reconstruction error (with
"feature_map" summed)."""

SUMS = ("masked", "error")
"""Kinds that are no term of a feature or constant."""

Sign = Literal["both", "supporting", "inhibiting"]

COLUMNS = (
    "kind",
    "query_feature",
    "key_feature",
    "weight",
    "contribution",
    "pattern_effect",
    "attention_drop",
)


class Marginals(NamedTuple):
    """Sums of each feature's terms over the other side; either table adds up to the model's score.

    Columns: feature (d_query / d_key: the constant; missing: errors and, with the source
    "feature_map", what the mask takes away), n_terms, contribution, pattern_effect (of the query
    feature's terms with all keys; of the key feature's at all its positions); the largest effect in
    size first.
    """

    query: pd.DataFrame
    key: pd.DataFrame


def all_terms(
    cfg: BilinearQKConfig,
    row: AttentionRow,
    terms: ScoreTerms,
    weights: Float[Tensor, "a entry"],
    key_pos: int,
) -> pd.DataFrame:
    """Every term of one score with its whole contribution, errors included, one by one.

    Args:
        weights: m of each term's pair, for the column of that name.
    """
    query_feature, key_feature, rows, is_error = _term_rows(cfg, terms, key_pos)
    weight = weights[:, terms.key_positions == key_pos].flatten()
    weight = weight.masked_fill(is_error, torch.nan)
    return sorted_by_effect(_measured(cfg, row, key_pos, query_feature, key_feature, weight, rows))


def mapped_terms(
    cfg: BilinearQKConfig,
    row: AttentionRow,
    terms: ScoreTerms,
    weights: Float[Tensor, "a entry"],
    key_pos: int,
) -> pd.DataFrame:
    """The map's pairs times their weights; a row for all that is masked, one for all errors."""
    query_feature, key_feature, rows, is_error = _term_rows(cfg, terms, key_pos)
    weight = weights[:, terms.key_positions == key_pos].flatten()
    in_map = weight > 0
    pairs = _measured(
        cfg,
        row,
        key_pos,
        query_feature[in_map],
        key_feature[in_map],
        weight[in_map],
        weight[in_map, None] * rows[in_map],
    )
    masked = ((1 - weight)[:, None] * rows)[~is_error].sum(dim=0)  # [pos]
    errors = rows[is_error].sum(dim=0)
    beyond_query = torch.full_like(query_feature[:2], cfg.d_query + 1)
    beyond_key = torch.full_like(key_feature[:2], cfg.d_key + 1)
    sums = _measured(
        cfg,
        row,
        key_pos,
        beyond_query,
        beyond_key,
        weight.new_full((2,), torch.nan),
        torch.stack([masked, errors]),
    )
    return sorted_by_effect(pd.concat([pairs, sums.assign(kind=list(SUMS))]))


def marginal_tables(
    row: AttentionRow, terms: ScoreTerms, weights: Float[Tensor, "a entry"], key_pos: int
) -> Marginals:
    """What each feature adds over all features of the other side.

    Args:
        weights: share of each term that counts for its features; the rest is a row of its own.
    """
    key_mask = terms.key_positions == key_pos
    in_source = weights[:, key_mask] > 0  # [a, b]
    own = terms.weighted(weights)
    rest = terms.weighted(1 - weights)
    query_features = terms.query_features
    key_features = terms.key_features[key_mask]
    query_table = _marginal_table(
        row,
        key_pos,
        query_features,
        in_source.sum(dim=1),
        own.rows("query", key_pos, query_features),
        rest.rows("query", key_pos, query_features),
    )
    key_table = _marginal_table(
        row,
        key_pos,
        key_features,
        in_source.sum(dim=0),
        own.key_feature_rows(key_features),
        rest.key_feature_rows(key_features),
    )
    return Marginals(query_table, key_table)


def feature_terms(frame: pd.DataFrame) -> pd.DataFrame:
    """Terms of features and constants alone: neither errors nor what the mask takes away."""
    return frame.query("kind not in @SUMS")


def top_terms(frame: pd.DataFrame, n: int, sign: Sign) -> pd.DataFrame:
    """The n terms with the largest effects above 0, the n with the lowest below it, or both.

    Raises:
        ValueError: unknown sign.
    """
    if sign not in ("both", "supporting", "inhibiting"):
        raise ValueError(f"sign must be 'both', 'supporting' or 'inhibiting', got {sign!r}.")
    supporting = frame.query("pattern_effect > 0").nlargest(n, "pattern_effect")
    inhibiting = frame.query("pattern_effect < 0").nsmallest(n, "pattern_effect")
    if sign == "supporting":
        return supporting.reset_index(drop=True)
    if sign == "inhibiting":
        return inhibiting.reset_index(drop=True)
    return pd.concat([supporting, inhibiting], ignore_index=True)


def sums_by_kind(frame: pd.DataFrame) -> pd.DataFrame:
    """Terms summed by kind: kind, n_terms, contribution, pattern_effect; largest effect first."""
    sums = frame.groupby("kind").agg(
        n_terms=("kind", "size"),
        contribution=("contribution", "sum"),
        pattern_effect=("pattern_effect", "sum"),
    )
    return sorted_by_effect(sums.reset_index())


def sorted_by_effect(frame: pd.DataFrame) -> pd.DataFrame:
    """The largest pattern effect in size first."""
    return frame.sort_values(
        "pattern_effect", key=abs, ascending=False, kind="stable", ignore_index=True
    )


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table as plain JSON values: Python's numbers, None where something is missing."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")  # type: ignore[return-value]


def _term_rows(
    cfg: BilinearQKConfig, terms: ScoreTerms, key_pos: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every term of one score: both features, its row [term, pos], whether it is an error."""
    key_features = terms.key_features[terms.key_positions == key_pos]
    rows = terms.pairs(terms.query_features, key_features).flatten(0, 1)
    query_feature = terms.query_features.repeat_interleave(len(key_features))
    key_feature = key_features.repeat(len(terms.query_features))
    is_error = (query_feature > cfg.d_query) | (key_feature > cfg.d_key)
    return query_feature, key_feature, rows, is_error


def _measured(
    cfg: BilinearQKConfig,
    row: AttentionRow,
    key_pos: int,
    query_feature: Int[Tensor, " term"],
    key_feature: Int[Tensor, " term"],
    weight: Float[Tensor, " term"],
    rows: Float[Tensor, "term pos"],
) -> pd.DataFrame:
    """The `COLUMNS` of some terms; `rows`: each in the whole row of scores."""
    query_numbers = query_feature.cpu().numpy()
    key_numbers = key_feature.cpu().numpy()
    columns = {
        "kind": _kinds(query_numbers - cfg.d_query, key_numbers - cfg.d_key),
        "query_feature": _nullable(query_numbers, cfg.d_query),
        "key_feature": _nullable(key_numbers, cfg.d_key),
        "weight": weight.cpu().numpy(),
        "contribution": rows[:, key_pos].cpu().numpy(),
        "pattern_effect": row.effect(rows, key_pos).cpu().numpy(),
        "attention_drop": row.attention_drop(rows, key_pos).cpu().numpy(),
    }
    return pd.DataFrame(columns, columns=list(COLUMNS))


def _marginal_table(
    row: AttentionRow,
    key_pos: int,
    features: Int[Tensor, " n"],
    n_terms: Int[Tensor, " n"],
    own_rows: Float[Tensor, "n pos"],
    rest_rows: Float[Tensor, "n pos"],
) -> pd.DataFrame:
    """Features with terms here or elsewhere in the row; a row without a feature for the rest."""
    rest_row = rest_rows.sum(dim=0)
    rows = torch.cat([own_rows, rest_row[None]])
    frame = pd.DataFrame(
        {
            "feature": pd.array([*features.tolist(), pd.NA], dtype="Int64"),
            "n_terms": [*n_terms.tolist(), 0],
            "contribution": rows[:, key_pos].cpu().numpy(),
            "pattern_effect": row.effect(rows, key_pos).cpu().numpy(),
        }
    )
    return sorted_by_effect(frame.query("feature.isna() or n_terms > 0 or pattern_effect != 0"))


def _kinds(query_excess: np.ndarray, key_excess: np.ndarray) -> np.ndarray:
    """Kinds by how far each feature's number lies beyond the last: 0 constant, 1 error."""
    conditions = [
        (query_excess > 0) | (key_excess > 0),
        (query_excess == 0) & (key_excess == 0),
        query_excess == 0,
        key_excess == 0,
    ]
    return np.select(conditions, ["error", "constant", "query_constant", "key_constant"], "pair")


def _nullable(features: np.ndarray, constant: int) -> pd.Series:
    """Feature numbers, missing beyond the constant."""
    numbers = pd.Series(features, dtype="Int64")
    return numbers.mask(numbers > constant)
