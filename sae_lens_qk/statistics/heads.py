"""What the heads of a feature map have in common, and which features make them attend to the first token.

The energy of a kept pair is what dropping it costs, to leading order (nats a query): e = m^2 * importance. With e_h the
energies that one (query feature a, key feature b) has in the heads,

    participation[a, b] = (sum_h e_h)^2 / sum_h e_h^2      1: it serves one head; n: it serves n heads alike
    similarity[h, g] = sum_ab sqrt(e_h e_g) / sqrt(sum_ab e_h * sum_ab e_g)      1: both attend for the same reasons

The constants, and features that are always on, take part in most of what heads have in common. `pair_energies` leaves
them out on demand; its rows, filtered in any way, are what the tables here are made of.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_qk.statistics.activations import ActivationStatistics, Batch
from sae_lens_qk.statistics.activations import ALWAYS_ON
from sae_lens_qk.attention import attention_scores, pattern_from_scores
from sae_lens_qk.dictionary import BilinearQKDictionary, Source
from sae_lens_qk.weights import QKWeights

_PAIR = ["query_feature", "key_feature"]


def pair_energies(
    d: BilinearQKDictionary, constants: bool = True, without: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Kept pairs that carry something, with what dropping each costs.

    Args:
        constants: list pairs with a constant feature too.
        without: a table with the columns side and feature, such as `dense_features` gives: no pairs with these.
    Returns:
        `d.pair_frame()` and energy = weight^2 * importance, nats a query; pairs without (weight 0, or never measured)
        are left out.
    Raises:
        ValueError: no feature map, or one whose pairs were never measured.
    """
    d.require_feature_map()
    pairs = d.pair_frame()
    query, key = (pairs[name].to_numpy() for name in _PAIR)
    energy = pairs["weight"].to_numpy(float) ** 2 * pairs["importance"].to_numpy(float)
    if np.isnan(energy).all():
        raise ValueError(
            "No pair of this feature map has statistics: rank its pairs on data, or pass pairs with an energy column."
        )
    keep = energy > 0
    if not constants:
        keep &= (query < d.cfg.d_query) & (key < d.cfg.d_key)
    if without is not None:
        for side, features in (("query", query), ("key", key)):
            keep &= ~np.isin(features, without.query(f"side == '{side}'")["feature"])
    return pairs.assign(energy=energy).take(np.flatnonzero(keep)).reset_index(drop=True)


def head_table(d: BilinearQKDictionary, pairs: pd.DataFrame | None = None) -> pd.DataFrame:
    """What each head's pairs are, one row a head.

    Args:
        pairs: rows of `pair_energies(d)`; default: all.
    Returns:
        head, pairs, of them with query_constant and with key_constant, distinct query_features and key_features
        (constants not counted), energy (sum, nats a query), and the shares of it in the strongest 1 % and 10 % of the
        head's pairs, rounded up: top_1_percent, top_10_percent. Zeros for a head without pairs.
    """
    pairs = pair_energies(d) if pairs is None else pairs
    of_query, of_key = (pairs[name].to_numpy() for name in _PAIR)
    constant_query, constant_key = of_query == d.cfg.d_query, of_key == d.cfg.d_key
    listed = pairs.assign(
        query_constant=constant_query,
        query_features=np.where(constant_query, np.nan, of_query),
        key_constant=constant_key,
        key_features=np.where(constant_key, np.nan, of_key),
    )
    by_head = listed.groupby("head").agg(
        pairs=("energy", "size"),
        query_constant=("query_constant", "sum"),
        key_constant=("key_constant", "sum"),
        query_features=("query_features", "nunique"),
        key_features=("key_features", "nunique"),
        energy=("energy", "sum"),
        top_1_percent=("energy", lambda energy: _top_share(energy, 0.01)),
        top_10_percent=("energy", lambda energy: _top_share(energy, 0.1)),
    )
    return by_head.reindex(pd.RangeIndex(d.spec.n_heads, name="head"), fill_value=0).reset_index()


def _top_share(energy: pd.Series, share: float) -> float:
    return energy.nlargest(math.ceil(share * len(energy))).sum() / energy.sum()


def participation(d: BilinearQKDictionary, pairs: pd.DataFrame | None = None) -> pd.DataFrame:
    """How many heads each (query feature, key feature) serves: (sum_h e_h)^2 / sum_h e_h^2.

    Args:
        pairs: rows of `pair_energies(d)`; default: all.
    Returns:
        query_feature, key_feature, heads (in how many it is kept), participation in [1, heads], leading_head,
        leading_share (of the energy) and energy (sum over heads), largest energy first.
    """
    pairs = pair_energies(d) if pairs is None else pairs
    listed = pairs.assign(squared=pairs["energy"].to_numpy() ** 2).sort_values(
        "energy", ascending=False, kind="stable"
    )
    table = listed.groupby(_PAIR, as_index=False).agg(
        heads=("head", "size"),
        leading_head=("head", "first"),
        leading=("energy", "first"),
        energy=("energy", "sum"),
        squared=("squared", "sum"),
    )
    table = table.assign(
        participation=table.eval("energy ** 2 / squared"),
        leading_share=table.eval("leading / energy"),
    )
    columns = [*_PAIR, "heads", "participation", "leading_head", "leading_share", "energy"]
    return table.reindex(columns=columns).sort_values(
        "energy", ascending=False, kind="stable", ignore_index=True
    )


def superposition(served: pd.DataFrame) -> pd.DataFrame:
    """Histogram of the participation ratio, rounded: is the map made of pairs that serve one head, or many?

    Args:
        served: rows of `participation`.
    Returns:
        heads_served from 1 to the largest number of heads, combinations (how many (query feature, key feature)),
        share_of_combinations and share_of_energy.
    """
    bins, energy = (
        served["participation"].to_numpy().round().astype(int),
        served["energy"].to_numpy(),
    )
    n_bins = served["heads"].to_numpy().max() + 1
    combinations, energies = (
        np.bincount(bins, minlength=n_bins)[1:],
        np.bincount(bins, energy, n_bins)[1:],
    )
    return pd.DataFrame(
        {
            "heads_served": np.arange(1, n_bins),
            "combinations": combinations,
            "share_of_combinations": combinations / combinations.sum(),
            "share_of_energy": energies / energies.sum(),
        }
    )


def shared_reasons(d: BilinearQKDictionary, pairs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Similarity of heads: cosine of their vectors of sqrt energy over (query feature, key feature).

    Args:
        pairs: rows of `pair_energies(d)`; default: all.
    Returns:
        [head, head] in [0, 1], heads as index and columns; NaN for a head without pairs.
    """
    pairs = pair_energies(d) if pairs is None else pairs
    heads = pd.RangeIndex(d.spec.n_heads, name="head")
    energies = (
        pairs.pivot(index=_PAIR, columns="head", values="energy")
        .reindex(columns=heads)
        .fillna(0.0)
        .to_numpy()
    )
    sums = energies.sum(axis=0)
    vectors = np.sqrt(energies / np.where(sums > 0, sums, np.nan))
    return pd.DataFrame(vectors.T @ vectors, index=heads, columns=heads)


def shared_pairs(
    d: BilinearQKDictionary, head_a: int, head_b: int, pairs: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Pairs kept in two heads, those that make the heads most alike first.

    Args:
        pairs: rows of `pair_energies(d)`; default: all.
    Returns:
        query_feature, key_feature, similarity = sqrt(e_a e_b) / sqrt(sum e_a * sum e_b), which adds up to the heads'
        entry in `shared_reasons`, and for each head energy_a, energy_b and effect_a, effect_b (the mean score of the
        pair where both features fire: opposite signs mean that one head is drawn where the other is repelled).
    Raises:
        ValueError: heads out of range.
    """
    if not {head_a, head_b} <= set(range(d.spec.n_heads)):
        raise ValueError(f"heads must lie in [0, {d.spec.n_heads - 1}], got {head_a} and {head_b}.")
    pairs = pair_energies(d) if pairs is None else pairs
    columns = [*_PAIR, "energy", "effect"]
    of_a, of_b = (
        pairs.query(f"head == {head}").reindex(columns=columns) for head in (head_a, head_b)
    )
    both = of_a.merge(of_b, on=_PAIR, suffixes=("_a", "_b"))
    size = math.sqrt(of_a["energy"].to_numpy().sum() * of_b["energy"].to_numpy().sum())
    both.insert(2, "similarity", both.eval("sqrt(energy_a * energy_b)") / size)
    return both.sort_values("similarity", ascending=False, kind="stable", ignore_index=True)


def dense_features(statistics: ActivationStatistics, threshold: float = 0.1) -> pd.DataFrame:
    """Features that fire on more than a share of all tokens, densest first.

    Returns:
        side, feature, density (share of tokens), mean (activation where it fires), max, and kind: "always on" above
        `causal.ALWAYS_ON` (it stands for the mean), else "dense".
    Raises:
        ValueError: the threshold is no share.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be a share of tokens in [0, 1), got {threshold}.")
    found = statistics.features.query(f"density > {threshold}")
    found = found.assign(kind=np.where(found["density"] > ALWAYS_ON, "always on", "dense"))
    return found.sort_values("density", ascending=False, kind="stable", ignore_index=True)


@torch.no_grad()
def first_token_features(
    d: BilinearQKDictionary,
    batches: Iterable[Batch],
    least_rate: float = 0.95,
    least_share: float = 0.5,
) -> pd.DataFrame:
    """Key features that stand for the first token: they fire there in nearly every row, and hardly anywhere else.

    Args:
        batches: (tokens [batch, pos], x [batch, pos, d_model]), x the layer's input for full rows from position 0:
            `cache_batches`, `model_batches`, or any iterable. Rows of some hundred tokens: of short ones position 0 is a
            large share anyway.
        least_rate: least share of rows in which the feature fires at position 0.
        least_share: least share of the feature's activation that lies at position 0.
    Returns:
        key_feature, first_rate and other_rate (share of first and of other positions where it fires), first_share (of its
        activation), first_activation (mean over rows); largest first_share first.
    Raises:
        ValueError: no rows of two positions or more.
    """
    n_rows, n_other = 0, 0
    fired, activation = torch.zeros(
        2, 2, d.cfg.d_key, dtype=torch.float64
    )  # at position 0, elsewhere
    for _, x in batches:
        acts = d.encode_key(x.to(d.device)).double().cpu()
        fired += torch.stack(
            [(some > 0).double().sum(dim=(0, 1)) for some in (acts[:, :1], acts[:, 1:])]
        )
        activation += torch.stack([some.sum(dim=(0, 1)) for some in (acts[:, :1], acts[:, 1:])])
        n_rows, n_other = n_rows + len(x), n_other + len(x) * (x.shape[1] - 1)
    _require_rows(n_other)
    table = pd.DataFrame(
        {
            "key_feature": np.arange(d.cfg.d_key),
            "first_rate": fired[0].numpy() / n_rows,
            "other_rate": fired[1].numpy() / n_other,
            "first_share": (activation[0] / activation.sum(dim=0)).numpy(),
            "first_activation": activation[0].numpy() / n_rows,
        }
    )
    found = table.query(f"first_rate >= {least_rate} and first_share >= {least_share}")
    return found.sort_values("first_share", ascending=False, kind="stable", ignore_index=True)


def first_token_contributions(
    d: BilinearQKDictionary, batches: Iterable[Batch], source: Source = "feature_map"
) -> pd.DataFrame:
    """What each key feature adds to the first token's advantage over other keys, whether it fires there or elsewhere.

    With c the sum of a feature's terms, contribution = mean over rows, heads and queries i >= 1 of

        c[i,0] - mean over keys 1..i of c[i,j]

    so that features which push all other keys down count too. Scores are linear in key activations: it is slope times
    activation, exactly.

    Args:
        batches: as of `first_token_features`.
        source: "feature_map" (terms of the kept pairs) or "transcoders" (of all).
    Returns:
        key_feature, contribution, first_activation and other_activation (mean at position 0 and at others), of features
        that contribute, largest contribution first.
    Raises:
        ValueError: no rows of two positions or more, or no feature map for the source "feature_map".
    """
    if source == "feature_map":
        d.require_feature_map()
    everything, sums = list(range(d.cfg.d_key)), torch.zeros(3, d.cfg.d_key, dtype=torch.float64)
    n_queries, n_rows = 0, 0
    for _, x in batches:
        with torch.no_grad():
            query_acts, key_acts = d.encode_query(x.to(d.device)), d.encode_key(x.to(d.device))
        key_acts.requires_grad_()
        advantage = _first_key(_terms(d, query_acts, key_acts, everything, source))[0].mean()
        (slope,) = torch.autograd.grad(advantage, key_acts)
        acts = key_acts.detach().double()
        parts = (slope * acts).sum(dim=(0, 1)), acts[:, 0].sum(dim=0), acts[:, 1:].sum(dim=(0, 1))
        sums += torch.stack(parts).cpu()
        n_rows, n_queries = n_rows + len(x), n_queries + len(x) * (x.shape[1] - 1)
    _require_rows(n_queries)
    table = pd.DataFrame(
        {
            "key_feature": everything,
            "contribution": sums[0].numpy() / n_queries,
            "first_activation": sums[1].numpy() / n_rows,
            "other_activation": sums[2].numpy() / n_queries,
        }
    )
    return table.query("contribution != 0").sort_values(
        "contribution", ascending=False, kind="stable", ignore_index=True
    )


class FirstTokenUse(NamedTuple):
    """What some key features do to each head's attention to the first token; see `first_token_use`."""

    features: pd.DataFrame
    """Each feature alone: key_feature, and the columns of `heads`."""
    heads: pd.DataFrame
    """All the features together: head, pairs, contribution, advantage, attention_true, attention_made, attention_without."""


@torch.no_grad()
def first_token_use(
    d: BilinearQKDictionary,
    batches: Iterable[Batch],
    key_features: Iterable[int],
    source: Source = "feature_map",
    weights: QKWeights | None = None,
) -> FirstTokenUse:
    """Which heads attend to the first token because of these key features, and how far.

    With s the scores of the source and c the sum of the features' terms, means over rows and queries i >= 1:

        advantage        s[i,0] - mean over keys 1..i of s[i,j]        attention_made        softmax(s)[i,0]
        contribution     the same of c                                 attention_without     softmax(s - c)[i,0]

    Args:
        batches: as of `first_token_features`.
        key_features: such as `first_token_features(...)["key_feature"]`, or the first of `first_token_contributions`.
        source: "feature_map" (terms of the kept pairs) or "transcoders" (of all).
        weights: W_Q and W_K of the layer (`host.qk_weights`), for attention_true, the model's own; NaN without.
    Returns:
        One row a (feature, head), and one a head; pairs: kept pairs with these features, whatever the source.
    Raises:
        ValueError: no rows, a feature that does not exist, or no feature map for the source "feature_map".
    """
    features = [int(feature) for feature in key_features]
    if not set(features) <= set(range(d.cfg.d_key)):
        raise ValueError(f"key_features must lie in [0, {d.cfg.d_key - 1}], got {features[:5]}.")
    removals = [*([feature] for feature in features), features]
    n_queries, sums = 0, torch.zeros(2 + len(removals), 2, d.spec.n_heads, dtype=torch.float64)
    for _, x in batches:
        x = x.to(d.device)
        acts, made = (d.encode_query(x), d.encode_key(x)), d.scores(x, source)
        true = torch.full_like(made, torch.nan)
        if weights is not None:
            true = attention_scores(weights.queries(x), weights.keys(x), d.spec)
        without = (made - _terms(d, *acts, removed, source) for removed in removals)
        sums += torch.stack([_first_key(scores) for scores in (true, made, *without)])
        n_queries += x.shape[0] * (x.shape[1] - 1)
    _require_rows(n_queries)
    figures = sums / n_queries
    tables = [
        _use_table(d, removed, figures[[0, 1, n]]) for n, removed in enumerate(removals, start=2)
    ]
    alone = [
        table.assign(key_feature=feature)
        for feature, table in zip(features, tables[:-1], strict=True)
    ]
    by_feature = pd.concat(alone or [tables[-1][:0].assign(key_feature=0)], ignore_index=True)
    return FirstTokenUse(
        by_feature.reindex(columns=["key_feature", *tables[-1].columns]), tables[-1]
    )


def _require_rows(n_later_positions: int) -> None:
    if not n_later_positions:
        raise ValueError(
            "`batches` gave no rows of two positions or more: it was empty, or an iterator used before."
        )


def _terms(
    d: BilinearQKDictionary,
    query_acts: Float[Tensor, "batch pos_q d_query"],
    key_acts: Float[Tensor, "batch pos_k d_key"],
    key_features: list[int],
    source: Source,
) -> Float[Tensor, "batch head pos_q pos_k"]:
    """Sum of all terms of some key features in the scores of a source."""
    others = torch.ones(d.cfg.d_key, dtype=torch.bool, device=d.device)
    others[key_features] = False
    key_acts = key_acts.masked_fill(others, 0.0)
    if source == "transcoders":
        queries, keys = d.query.decode(query_acts), key_acts @ d.key.W_dec
        return attention_scores(d.spec.split_queries(queries), d.spec.split_keys(keys), d.spec)
    kept = d.feature_map.restrict(key_features=key_features)
    return kept.scores(query_acts, key_acts, d.decoders, d.spec, include_constant=False)


def _first_key(scores: Float[Tensor, "batch head pos_q pos_k"]) -> Float[Tensor, "2 head"]:
    """Sums over rows and queries from position 1 on: advantage of key 0 over the mean of the other keys, and its pattern."""
    first, n_other = scores[:, :, 1:, 0], torch.arange(1, scores.shape[-1], device=scores.device)
    others = (scores.tril().sum(dim=-1)[:, :, 1:] - first) / n_other
    pattern = pattern_from_scores(scores)[:, :, 1:, 0]
    return torch.stack(
        [figure.double().sum(dim=(0, 2)) for figure in (first - others, pattern)]
    ).cpu()


def _use_table(
    d: BilinearQKDictionary, removed: list[int], figures: Float[Tensor, "3 2 head"]
) -> pd.DataFrame:
    """Rows of `FirstTokenUse.heads`; figures: advantage and attention in truth, as made, and without the features."""
    heads = d.feature_map.restrict(key_features=removed).indices[:, 2].cpu()
    (_, attention_true), (advantage, attention_made), (advantage_without, attention_without) = (
        figures.numpy()
    )
    return pd.DataFrame(
        {
            "head": np.arange(d.spec.n_heads),
            "pairs": np.bincount(heads, minlength=d.spec.n_heads),
            "contribution": advantage - advantage_without,
            "advantage": advantage,
            "attention_true": attention_true,
            "attention_made": attention_made,
            "attention_without": attention_without,
        }
    )
