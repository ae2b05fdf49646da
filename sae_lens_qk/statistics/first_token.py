"""Which key features stand for the first token, and what they do to each head's attention to it."""

from collections.abc import Iterable
from typing import NamedTuple, SupportsIndex

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import Features
from sae_lens_qk.inputs import Batch
from sae_lens_qk.patching import Source
from sae_lens_qk.weights import QKWeights


@torch.no_grad()
def first_token_features(
    d: BilinearQKDictionary,
    batches: Iterable[Batch],
    least_rate: float = 0.95,
    least_share: float = 0.5,
) -> pd.DataFrame:
    """Key features that fire at the first token in nearly every row, and hardly anywhere else.

    Args:
        batches: (tokens [batch, pos], x [batch, pos, d_model]), x the layer's input for full rows
            from position 0: `cache_batches`, `model_batches`, or any iterable. Rows of some hundred
            tokens: of short ones position 0 is a large share anyway.
        least_rate: least share of rows in which the feature fires at position 0.
        least_share: least share of the feature's activation that lies at position 0.
    Returns:
        key_feature, first_rate and other_rate (share of first and of other positions where it
        fires), first_share (of its activation), first_activation (mean over rows); largest
        first_share first.
    Raises:
        ValueError: no rows of two positions or more.
    """
    n_rows = 0
    n_later = 0
    first_fired = torch.zeros(d.cfg.d_key, dtype=torch.float64)  # rows
    later_fired = torch.zeros_like(first_fired)  # positions
    first_sum = torch.zeros_like(first_fired)  # of activations
    later_sum = torch.zeros_like(first_fired)
    for _, x in batches:
        acts = d.encode_key(x.to(d.device))  # [batch, pos, d_key]
        acts = acts.double().cpu()
        first = acts[:, 0]
        later = acts[:, 1:].flatten(0, 1)
        first_fired += (first > 0).sum(dim=0)
        later_fired += (later > 0).sum(dim=0)
        first_sum += first.sum(dim=0)
        later_sum += later.sum(dim=0)
        n_rows += len(first)
        n_later += len(later)
    _require_rows(n_later)
    table = pd.DataFrame(
        {
            "key_feature": np.arange(d.cfg.d_key),
            "first_rate": first_fired.numpy() / n_rows,
            "other_rate": later_fired.numpy() / n_later,
            "first_share": (first_sum / (first_sum + later_sum)).numpy(),
            "first_activation": first_sum.numpy() / n_rows,
        }
    )
    table = table.query(f"first_rate >= {least_rate} and first_share >= {least_share}")
    return table.sort_values(
        "first_share",
        ascending=False,
        kind="stable",
        ignore_index=True,
    )


class FirstTokenUse(NamedTuple):
    """What some key features do to attention to the first token; see `first_token_use`."""

    features: pd.DataFrame
    """Each feature alone: key_feature, and the columns of `heads`."""
    heads: pd.DataFrame
    """All the features together: head, pairs, contribution, advantage, attention_true,
    attention_rebuilt, attention_without."""


@torch.no_grad()
def first_token_use(
    d: BilinearQKDictionary,
    batches: Iterable[Batch],
    key_features: Iterable[SupportsIndex],
    source: Source = "feature_map",
    weights: QKWeights | None = None,
) -> FirstTokenUse:
    """Which heads attend to the first token because of these key features, and how far.

    With s the scores of the source and c the sum of the features' terms, means over rows and over
    the queries after the first that may attend to key 0:

        advantage      s[i,0] - mean over other keys of s[i,j]   attention_rebuilt   pattern(s)[i,0]
        contribution   the same of c                             attention_without   pattern(s - c)

    Args:
        batches: as of `first_token_features`.
        key_features: such as `first_token_features(...)["key_feature"]`.
        source: "feature_map" (terms of the kept pairs) or "transcoders" (of all).
        weights: W_Q and W_K of the layer (`AttentionLayer.qk_weights`), for attention_true, the
            model's own; NaN without.
    Returns:
        A row per (feature, head), and a row per head; pairs: kept pairs with these features,
        whatever the source.
    Raises:
        ValueError: no rows, a feature that does not exist, or no feature map for the source
            "feature_map".
    """
    features = [int(feature) for feature in key_features]
    if not set(features) <= set(range(d.cfg.d_key)):
        raise ValueError(f"key_features must lie in [0, {d.cfg.d_key - 1}], got {features[:5]}.")
    removals = [*([feature] for feature in features), features]
    n_queries = 0
    # true, rebuilt, then without each removal; advantage and attention of each
    shape = (2 + len(removals), 2, d.spec.n_heads)
    sums = torch.zeros(shape, dtype=torch.float64)
    for _, x in batches:
        x = x.to(d.device)
        encoded = d.features(x)
        rebuilt = d.scores(encoded, source)
        true = torch.full_like(rebuilt, torch.nan)
        if weights is not None:
            queries = weights.queries(x)
            true = d.spec.scores(queries, weights.keys(x))
        sums[0] += _first_key(true, d.spec)
        sums[1] += _first_key(rebuilt, d.spec)
        for number, removed in enumerate(removals, start=2):
            terms = _terms(d, encoded, removed, source)
            sums[number] += _first_key(rebuilt - terms, d.spec)
        n_rows, n_pos, _ = x.shape
        n_queries += n_rows * (d.spec.n_offsets(n_pos) - 1)
    _require_rows(n_queries)
    means = (sums / n_queries).numpy()
    true, rebuilt, *without = means
    tables = []
    for removed, means_without in zip(removals, without, strict=True):
        tables.append(_use_table(d, removed, true, rebuilt, means_without))
    *alone, heads = tables
    key_feature = np.repeat(features, d.spec.n_heads)
    no_rows = heads[:0]
    feature_rows = pd.concat([no_rows, *alone], ignore_index=True)
    feature_rows.insert(0, "key_feature", key_feature)
    return FirstTokenUse(feature_rows, heads)


def _require_rows(n_later_positions: int) -> None:
    if not n_later_positions:
        raise ValueError(
            "`batches` gave no rows of two positions or more: it was empty, or an iterator used "
            "before."
        )


def _terms(
    d: BilinearQKDictionary, features: Features, key_features: list[int], source: Source
) -> Float[Tensor, "batch head pos_q pos_k"]:
    """Sum of all terms of some key features in the scores of a source."""
    key_acts = torch.zeros_like(features.key)
    key_acts[..., key_features] = features.key[..., key_features]
    if source == "transcoders":
        queries = d.spec.split_queries(d.query.decode(features.query))
        keys = d.spec.split_keys(key_acts @ d.key.W_dec)
        return d.spec.scores(queries, keys)
    pairs = d.feature_map.restrict(key_features=key_features)
    chosen = Features(features.query, key_acts)
    return pairs.scores(chosen, d.decoders, d.spec, include_constant=False)


def _first_key(
    scores: Float[Tensor, "batch head pos_q pos_k"], spec: AttentionSpec
) -> Float[Tensor, "2 head"]:
    """Sums over rows and the queries after the first: advantage of key 0, and attention to it.

    The advantage is over the mean of the other keys; only queries that may attend to key 0 count.
    """
    n_pos = scores.shape[-1]
    queries = slice(1, spec.n_offsets(n_pos))
    allowed = spec.allowed_mask(n_pos, scores.device)[queries, 1:]
    first = scores[:, :, queries, 0]
    others = scores[:, :, queries, 1:]
    other_sums = others.masked_fill(~allowed, 0.0).sum(dim=-1)
    advantage = first - other_sums / allowed.sum(dim=-1)
    attention = spec.pattern(scores)[:, :, queries, 0]
    measures = torch.stack([advantage, attention])  # [2, batch, head, pos_q]
    sums = measures.double().sum(dim=(1, 3))
    return sums.cpu()


def _use_table(
    d: BilinearQKDictionary,
    key_features: list[int],
    true: Float[np.ndarray, "2 head"],
    rebuilt: Float[np.ndarray, "2 head"],
    without: Float[np.ndarray, "2 head"],
) -> pd.DataFrame:
    """Rows of `FirstTokenUse.heads` from advantage and attention: true, rebuilt, without these."""
    pairs = d.feature_map.restrict(key_features=key_features)
    heads = pairs.indices[:, 2].cpu()
    return pd.DataFrame(
        {
            "head": np.arange(d.spec.n_heads),
            "pairs": np.bincount(heads, minlength=d.spec.n_heads),
            "contribution": rebuilt[0] - without[0],
            "advantage": rebuilt[0],
            "attention_true": true[1],
            "attention_rebuilt": rebuilt[1],
            "attention_without": without[1],
        }
    )
