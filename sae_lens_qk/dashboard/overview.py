"""The first page: sizes, metrics, histograms, heads, and tables over heads."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from sae_lens_qk.attention import SIDES
from sae_lens_qk.dashboard.pages import PAIR, Material, feature_table
from sae_lens_qk.dashboard.values import numbers, plain
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.inputs import Batch
from sae_lens_qk.statistics.activations import ALWAYS_ON, ActivationStatistics
from sae_lens_qk.statistics.first_token import first_token_features, first_token_use
from sae_lens_qk.statistics.heads import (
    dense_features,
    pair_importances,
    participation,
    shared_reasons,
    superposition,
)
from sae_lens_qk.tables import significant

_DENSITY_BINS = np.arange(-6.0, 0.01, 0.25)
"""Powers of ten."""


def overview_fields(
    material: Material,
    title: str,
) -> dict[str, Any]:
    """The first page as JSON, without its tables."""
    cfg = material.d.cfg
    spec = material.d.spec
    n_live = {}
    always_on = {}
    histogram: dict[str, Any] = {"log10_edges": _DENSITY_BINS.tolist()}
    for side in SIDES:
        density = feature_table(material.statistics, side)["density"].to_numpy()  # [feature]
        always_on[side] = np.flatnonzero(density > ALWAYS_ON).tolist()
        n_live[side] = int((density > 0).sum())
        exponents = np.log10(density[density > 0])
        # rarer features are counted in the first bin
        exponents = exponents.clip(_DENSITY_BINS[0], 0.0)
        counts, _ = np.histogram(exponents, _DENSITY_BINS)
        histogram[side] = counts.tolist()
    importance = material.pairs["importance"].to_numpy()  # [pair]
    # the share of it that the pairs with pages have
    total = importance.sum()
    paged = importance[material.pages.pairs].sum()
    return {
        "title": title,
        "model": cfg.model_name,
        "layer": cfg.layer,
        "n_heads": spec.n_heads,
        "rotary": spec.rotary_dim > 0,
        "d_query": cfg.d_query,
        "d_key": cfg.d_key,
        "n_pairs": len(importance),
        "n_tokens": material.statistics.n_tokens,
        "live": n_live,
        "always_on": always_on,
        "metrics": plain(material.d.metrics, digits=6),
        "density": histogram,
        "heads": _head_columns(material),
        "importance_measured": bool(material.d.feature_map.statistics.any()),
        "importance_shown": significant(paged / total) if total else None,
        "limits": asdict(material.limits),
    }


def _head_columns(material: Material) -> dict[str, Any]:
    cfg = material.d.cfg
    n_heads = material.d.spec.n_heads
    pairs = material.pairs
    head = pairs["head"]
    # the constant comes after the features
    is_constant = pairs[PAIR[:2]] == [cfg.d_query, cfg.d_key]  # [pair, side]
    constant_head = head[is_constant.any(axis=1)]
    importance = np.bincount(head, pairs["importance"], minlength=n_heads)  # [head]
    return {
        "pairs": np.bincount(head, minlength=n_heads).tolist(),
        "with_constant": np.bincount(constant_head, minlength=n_heads).tolist(),
        "importance": numbers(importance),
    }


def head_tables(
    d: BilinearQKDictionary, statistics: ActivationStatistics, batches: Iterable[Batch] = ()
) -> dict[str, pd.DataFrame]:
    """Tables over heads by title; pairs with features that are always on are left out.

    Args:
        batches: some (tokens, x) on which the features of the first token are looked for.
    Returns:
        What can be said: a map whose pairs were never measured gives nothing on shared pairs.
    """
    tables: dict[str, pd.DataFrame] = {}
    if d.feature_map.statistics.any():
        pairs = pair_importances(d, without=dense_features(statistics, ALWAYS_ON))
        heads = [f"head {head}" for head in range(d.spec.n_heads)]
        similarity = shared_reasons(d, pairs)  # [head, head]
        similarity = similarity.set_axis(heads, axis=1).reset_index()
        tables["How many heads a pair of features serves"] = superposition(participation(d, pairs))
        tables["How alike the heads' reasons are (cosine)"] = similarity
    batches = list(batches)
    if batches:
        features = first_token_features(d, batches)
        tables["Key features of the first token"] = features
        if len(features):
            use = first_token_use(d, batches, features["key_feature"])
            tables["What they do to attention to the first token"] = use.heads
    return tables
