"""What the heads of a feature map have in common.

The masked importance of a kept pair is what dropping it costs, to leading order (nats per query):
e = m^2 * importance. With e_h those that one (query feature a, key feature b) has in the heads,

    participation[a, b] = (sum_h e_h)^2 / sum_h e_h^2     1: it serves one head; n: n heads alike
    similarity[h, g] = sum_ab sqrt(e_h e_g) / sqrt(sum_ab e_h * sum_ab e_g)     1: heads that attend
                                                                                by the same pairs

The constants, and features that are always on, take part in most of what heads have in common.
`pair_importances` leaves them out on demand; its rows, filtered in any way, are what the tables
here are computed from.
"""

import math

import numpy as np
import pandas as pd

from sae_lens_qk.attention import Side
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.statistics.activations import ALWAYS_ON, ActivationStatistics

_PAIR = ["query_feature", "key_feature"]


def pair_importances(
    d: BilinearQKDictionary, constants: bool = True, without: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Kept pairs that carry something, with what dropping each costs.

    Args:
        constants: list pairs with a constant feature too.
        without: a table with the columns side and feature, such as `dense_features` gives: no pairs
            with these.
    Returns:
        `d.pair_frame()` and masked_importance = weight^2 * importance, nats per query; pairs
        without (weight 0, or never measured) are left out.
    Raises:
        ValueError: no feature map, or one whose pairs were never measured.
    """
    d.require_feature_map()
    pairs = d.pair_frame()
    # in float64: the columns are float32
    weight = pairs["weight"].astype(float)
    masked_importance = weight**2 * pairs["importance"].astype(float)
    if np.isnan(masked_importance).all():
        raise ValueError(
            "No pair of this feature map has statistics: rank its pairs on data, or pass pairs "
            "with a masked_importance column."
        )
    keep = masked_importance > 0
    for side, constant in _constants(d).items():
        feature = pairs[f"{side}_feature"]
        if not constants:
            keep &= feature < constant
        if without is not None:
            keep &= ~feature.isin(without.query("side == @side")["feature"])
    pairs["masked_importance"] = masked_importance
    return pairs.loc[keep].reset_index(drop=True)


def head_table(
    d: BilinearQKDictionary,
    pairs: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """What each head's pairs are, a row per head.

    Args:
        pairs: rows of `pair_importances(d)`; default: all.
    Returns:
        head, pairs, of them with query_constant and with key_constant, distinct query_features and
        key_features (constants not counted), masked_importance (sum, nats per query), and the
        shares of it in the strongest 1 % and 10 % of the head's pairs, rounded up: top_1_percent,
        top_10_percent. Zeros for a head without pairs.
    """
    pairs = pair_importances(d) if pairs is None else pairs
    columns = pairs[["head", "masked_importance"]].copy()
    for side, constant in _constants(d).items():
        feature = pairs[f"{side}_feature"]
        columns[f"{side}_constant"] = feature == constant
        columns[f"{side}_features"] = feature.mask(feature == constant)
    heads = columns.groupby("head").agg(
        pairs=("masked_importance", "size"),
        query_constant=("query_constant", "sum"),
        key_constant=("key_constant", "sum"),
        query_features=("query_features", "nunique"),
        key_features=("key_features", "nunique"),
        masked_importance=("masked_importance", "sum"),
        top_1_percent=("masked_importance", lambda values: _top_share(values, 0.01)),
        top_10_percent=("masked_importance", lambda values: _top_share(values, 0.1)),
    )
    # heads without pairs have a row too
    all_heads = pd.RangeIndex(d.spec.n_heads, name="head")
    return heads.reindex(all_heads, fill_value=0).reset_index()


def _top_share(
    values: pd.Series,
    share: float,
) -> float:
    """Share of the sum that lies in the largest `share` of the values."""
    n_top = math.ceil(share * len(values))
    return values.nlargest(n_top).sum() / values.sum()


def participation(
    d: BilinearQKDictionary,
    pairs: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """How many heads each (query feature, key feature) serves: (sum_h e_h)^2 / sum_h e_h^2.

    Args:
        pairs: rows of `pair_importances(d)`; default: all.
    Returns:
        query_feature, key_feature, heads (in how many it is kept), participation in [1, heads],
        leading_head, leading_share (of the masked importance) and masked_importance (sum over
        heads), the largest first.
    """
    pairs = pair_importances(d) if pairs is None else pairs
    squared = pairs["masked_importance"] ** 2
    strongest_first = _largest_first(pairs.assign(squared=squared), "masked_importance")
    table = strongest_first.groupby(_PAIR, as_index=False).agg(
        heads=("head", "size"),
        leading_head=("head", "first"),
        leading=("masked_importance", "first"),
        masked_importance=("masked_importance", "sum"),
        squared=("squared", "sum"),
    )
    table["participation"] = table["masked_importance"] ** 2 / table["squared"]
    table["leading_share"] = table["leading"] / table["masked_importance"]
    measures = ["heads", "participation", "leading_head", "leading_share", "masked_importance"]
    return _largest_first(table.reindex(columns=[*_PAIR, *measures]), "masked_importance")


def superposition(participations: pd.DataFrame) -> pd.DataFrame:
    """Histogram of the participation ratio, rounded: do pairs serve one head, or many?

    Args:
        participations: rows of `participation`.
    Returns:
        heads_served from 1 to the largest number of heads, combinations (how many (query feature,
        key feature)), share_of_combinations and share_of_importance.
    """
    # participation lies in [1, heads]
    bins = participations["participation"].to_numpy().round().astype(int)
    importance = participations["masked_importance"].to_numpy()
    n_bins = participations["heads"].to_numpy().max() + 1
    combinations = np.bincount(bins, minlength=n_bins)[1:]
    importances = np.bincount(bins, importance, n_bins)[1:]
    return pd.DataFrame(
        {
            "heads_served": np.arange(1, n_bins),
            "combinations": combinations,
            "share_of_combinations": combinations / combinations.sum(),
            "share_of_importance": importances / importances.sum(),
        }
    )


def shared_reasons(
    d: BilinearQKDictionary,
    pairs: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Which heads use the same feature pairs: cosine of their vectors of sqrt masked importance.

    Args:
        pairs: rows of `pair_importances(d)`; default: all.
    Returns:
        [head, head] in [0, 1], heads as index and columns; NaN for a head without pairs.
    """
    pairs = pair_importances(d) if pairs is None else pairs
    heads = pd.RangeIndex(d.spec.n_heads, name="head")
    # NaN where a head lacks the pair
    table = pairs.pivot(
        index=_PAIR,
        columns="head",
        values="masked_importance",
    )
    importances = table.reindex(columns=heads).fillna(0.0).to_numpy()  # [pair, head]
    sums = importances.sum(axis=0)
    shares = importances / np.where(sums > 0, sums, np.nan)
    vectors = np.sqrt(shares)  # unit columns
    return pd.DataFrame(vectors.T @ vectors, index=heads, columns=heads)


def dense_features(
    statistics: ActivationStatistics,
    threshold: float = 0.1,
) -> pd.DataFrame:
    """Features that fire on more than a share of all tokens, densest first.

    Returns:
        side, feature, density (share of tokens), mean (activation where it fires), max, and kind:
        "always on" above `ALWAYS_ON` (it stands for the mean), else "dense".
    Raises:
        ValueError: the threshold is no share.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be a share of tokens in [0, 1), got {threshold}.")
    features = statistics.features.query(f"density > {threshold}")
    kind = np.where(features["density"] > ALWAYS_ON, "always on", "dense")
    return _largest_first(features.assign(kind=kind), "density")


def _largest_first(
    frame: pd.DataFrame,
    column: str,
) -> pd.DataFrame:
    return frame.sort_values(
        column,
        ascending=False,
        kind="stable",
        ignore_index=True,
    )


def _constants(d: BilinearQKDictionary) -> dict[Side, int]:
    return {"query": d.cfg.d_query, "key": d.cfg.d_key}
