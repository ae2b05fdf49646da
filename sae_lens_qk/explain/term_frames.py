"""The terms of one score as tables: one row per term, and sums per feature.

pattern_effect   c[i,j] - sum_j' P[i,j'] c[i,j'], the derivative of log P[i,j] along the pair;
                 negative: an inhibitor
attention_drop   P[i,j] - softmax(score - c)[i,j], exact: the pair leaves the whole row of scores
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.config import BilinearQKConfig
from sae_lens_qk.explain.terms import AttentionRow, Numbers, Rows, ScoreTerms
from sae_lens_qk.patching import Source

SUMS = ("masked", "error")
"""Kinds that are no term of a feature or constant."""

Sign = Literal["both", "supporting", "inhibiting"]


class Marginals(NamedTuple):
    """Sums of each feature's terms over the other side; either table adds up to the model's score.

    Columns: feature (d_query / d_key: the constant; missing: errors and, with the source
    "feature_map", what the mask takes away), n_terms, contribution, pattern_effect (of the query
    feature's terms with all keys; of the key feature's at all its positions); the largest effect in
    size first.
    """

    query: pd.DataFrame
    key: pd.DataFrame


def term_frame(
    cfg: BilinearQKConfig,
    row: AttentionRow,
    terms: ScoreTerms,
    weights: Float[Tensor, "a entry"],
    key_pos: int,
    source: Source,
) -> pd.DataFrame:
    """The terms of one score; the contributions add up to it.

    Args:
        weights: m of each term's pair.
        source: "transcoders": every term, errors included, with its whole contribution;
            "feature_map": the map's pairs times their weights, a row for all that is masked, and
            one for all errors.
    Returns:
        kind: pair; query_constant (constant x key feature); key_constant; constant (both); error
        (anything x a reconstruction error); masked (with "feature_map", as errors summed: what the
        mask takes away). query_feature, key_feature, weight, contribution, pattern_effect,
        attention_drop. The largest pattern effect in size first.
    """
    key_mask = terms.key_positions == key_pos
    key_features = terms.key_features[key_mask]
    pairs = torch.cartesian_prod(terms.query_features, key_features)
    query_feature, key_feature = pairs.cpu().numpy().T
    weight = weights[:, key_mask].flatten()  # [term]
    rows = terms.pairs(terms.query_features, key_features).flatten(0, 1)  # [term, pos]
    kind = _kinds(query_feature - cfg.d_query, key_feature - cfg.d_key)
    is_error = torch.from_numpy(kind == "error").to(rows.device)
    feature_weight = weight.masked_fill(is_error, torch.nan)
    frame = pd.DataFrame(
        {
            "kind": kind,
            "query_feature": _nullable(query_feature, cfg.d_query),
            "key_feature": _nullable(key_feature, cfg.d_key),
            "weight": feature_weight.cpu().numpy(),
        }
    )
    if source == "feature_map":
        in_map = weight > 0  # never an error
        weighted = weight[:, None] * rows
        rest = (1 - weight)[:, None] * rows
        masked = rest[~is_error].sum(dim=0)  # [pos]
        errors = rows[is_error].sum(dim=0)
        sum_rows = torch.stack([masked, errors])
        rows = torch.cat([weighted[in_map], sum_rows])
        sums = pd.DataFrame({"kind": SUMS})
        pairs_in_map = frame[in_map.tolist()]
        frame = pd.concat([pairs_in_map, sums], ignore_index=True)
    measures = _measures(row, rows, key_pos)
    measures["attention_drop"] = row.attention_drop(rows, key_pos)
    return sorted_by_effect(frame.join(tensor_frame(measures)))


def marginal_tables(
    row: AttentionRow, terms: ScoreTerms, weights: Float[Tensor, "a entry"], key_pos: int
) -> Marginals:
    """What each feature adds over all features of the other side.

    Args:
        weights: share of each term that counts for its features; the rest is a row of its own.
    """
    key_mask = terms.key_positions == key_pos
    in_source = weights[:, key_mask] > 0  # [a, b]
    own = terms._replace(terms=terms.terms * weights)
    rest = terms._replace(terms=terms.terms * (1 - weights))
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
    # at every key where a key feature fires: that is what its terms do to the pattern
    key_table = _marginal_table(
        row,
        key_pos,
        key_features,
        in_source.sum(dim=0),
        own.pairs(query_features, key_features).sum(dim=0),
        rest.pairs(query_features, key_features).sum(dim=0),
    )
    return Marginals(query_table, key_table)


def feature_terms(frame: pd.DataFrame) -> pd.DataFrame:
    """Terms of features and constants alone: neither errors nor what the mask takes away."""
    return frame.query("kind not in @SUMS")


def top_terms(
    frame: pd.DataFrame,
    n: int,
    sign: Sign,
) -> pd.DataFrame:
    """The n terms with the largest effects above 0, the n with the lowest below it, or both.

    Raises:
        ValueError: unknown sign.
    """
    supporting = frame.query("pattern_effect > 0").nlargest(n, "pattern_effect")
    inhibiting = frame.query("pattern_effect < 0").nsmallest(n, "pattern_effect")
    tables = {
        "both": [supporting, inhibiting],
        "supporting": [supporting],
        "inhibiting": [inhibiting],
    }
    if sign not in tables:
        raise ValueError(f"sign must be 'both', 'supporting' or 'inhibiting', got {sign!r}.")
    return pd.concat(tables[sign], ignore_index=True)


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
    objects = frame.astype(object)
    return objects.where(frame.notna(), None).to_dict("records")  # type: ignore[return-value]


def tensor_frame(columns: Mapping[str, Tensor]) -> pd.DataFrame:
    """Tensors of one length as the columns of a table."""
    frame = pd.DataFrame()
    for name, values in columns.items():
        frame[name] = values.cpu().numpy()
    return frame


def _measures(
    row: AttentionRow,
    rows: Rows,
    key_pos: int,
) -> dict[str, Tensor]:
    """Columns that terms and sums of terms have in common; `rows`: in the whole row of scores."""
    effects = row.effect(rows, key_pos)
    return {"contribution": rows[:, key_pos], "pattern_effect": effects}


def _marginal_table(
    row: AttentionRow,
    key_pos: int,
    features: Numbers,
    n_terms: Int[Tensor, " n"],
    own_rows: Rows,
    rest_rows: Rows,
) -> pd.DataFrame:
    """Features with terms here or elsewhere in the row; a row without a feature for the rest."""
    rest_row = rest_rows.sum(dim=0, keepdim=True)
    rows = torch.cat([own_rows, rest_row])
    frame = pd.DataFrame()
    numbers = [*features.tolist(), pd.NA]
    frame["feature"] = pd.array(numbers, dtype="Int64")
    frame["n_terms"] = [*n_terms.tolist(), 0]
    frame = frame.join(tensor_frame(_measures(row, rows, key_pos)))
    return sorted_by_effect(frame.query("feature.isna() or n_terms > 0 or pattern_effect != 0"))


def _kinds(
    query_excess: np.ndarray,
    key_excess: np.ndarray,
) -> np.ndarray:
    """Kinds by how far each feature's number lies beyond the last: 0 constant, 1 error."""
    conditions = [
        (query_excess > 0) | (key_excess > 0),
        (query_excess == 0) & (key_excess == 0),
        query_excess == 0,
        key_excess == 0,
    ]
    return np.select(conditions, ["error", "constant", "query_constant", "key_constant"], "pair")


def _nullable(
    features: np.ndarray,
    constant: int,
) -> pd.Series:
    """Feature numbers, missing beyond the constant."""
    numbers = pd.Series(features, dtype="Int64")
    return numbers.mask(numbers > constant)
