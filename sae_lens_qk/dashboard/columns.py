"""Features and pairs as columns: one entry per page, most important first."""

from typing import Any

import numpy as np
import torch

from sae_lens_qk.attention import SIDES, Side
from sae_lens_qk.dashboard.pages import PAIR, Material, feature_table
from sae_lens_qk.dashboard.texts import Contexts
from sae_lens_qk.dashboard.values import numbers, records

_PAIR_NUMBERS = (
    "weight",
    "score_at_0",
    "importance",
    "effect",
    "co_occurrence",
    "mean",
    "max",
    "min",
)


def feature_columns(
    material: Material,
    side: Side,
    contexts: Contexts,
) -> dict[str, Any]:
    """Columns over the features of a side.

    partners are [feature, head, weight, importance, mean], neighbours [feature, share].
    """
    features = material.pages.query if side == "query" else material.pages.key
    groups = _pairs_by_feature(material, side, features)
    importance = material.pairs["importance"].to_numpy()  # [pair]
    columns: dict[str, Any] = {"feature": features.tolist()}
    table = feature_table(material.statistics, side).iloc[features]
    for name in ("density", "mean", "max"):
        columns[name] = numbers(table[name])
    columns["pairs"] = [len(pairs) for pairs in groups]
    columns["importance"] = numbers(importance[pairs].sum() for pairs in groups)
    columns["contexts"] = [contexts.feature(side, feature) for feature in features]
    partner = "key_feature" if side == "query" else "query_feature"
    partners = material.pairs[[partner, "head", "weight", "importance", "mean"]]
    n_partners = material.limits.partners
    shown_pairs = [pairs[:n_partners] for pairs in groups]  # the most important ones
    columns["partners"] = [records(partners.iloc[pairs]) for pairs in shown_pairs]
    columns["neighbours"] = [_neighbours(material, side, feature) for feature in features]
    return columns


def _pairs_by_feature(
    material: Material,
    side: Side,
    features: np.ndarray,
) -> list[np.ndarray]:
    """Rows of the map with each of the features, most important first."""
    importance = material.pairs["importance"].to_numpy()
    order = np.argsort(-importance, kind="stable")  # [pair]
    pair_features = material.pairs[f"{side}_feature"].to_numpy()[order]
    # stable: within a feature the pairs stay in the order of their importance
    feature_order = np.argsort(pair_features, kind="stable")
    runs = _runs(pair_features[feature_order], features)
    grouped = order[feature_order]
    return [grouped[run] for run in runs]


def _neighbours(
    material: Material,
    side: Side,
    feature: int,
) -> list[list[Any]]:
    """[feature, share] of those of the same side that fire along."""
    statistics = material.statistics
    # of very wide dictionaries this is not counted
    if not statistics.sums.query.co_firing.size:
        return []
    frame = statistics.feature_co_occurrence(side, feature, material.limits.neighbours)
    return records(frame.reindex(columns=["feature", "share"]))


def pair_columns(
    material: Material,
    contexts: Contexts,
) -> dict[str, Any]:
    """Columns over the pairs.

    heads are [head, weight, importance, effect] of the same features. kernel is the typical score,
    m times both mean activations times M, by distance: means over the [first, last] distances of
    `stretches`; None without rotary embeddings.
    """
    pairs = material.pages.pairs
    table = material.pairs.iloc[pairs]
    columns: dict[str, Any] = {"pair": pairs.tolist()}
    for name in PAIR:
        columns[name] = table[name].tolist()
    for name in _PAIR_NUMBERS:
        columns[name] = numbers(table[name])
    columns["contexts"] = [contexts.pair(number) for number in pairs]
    columns["heads"] = _same_features(material, pairs)
    return columns | _kernels(material, pairs)


def _same_features(
    material: Material,
    pairs: np.ndarray,
) -> list[list[list[Any]]]:
    """The heads in which the map has the features of each pair."""
    table = material.pairs
    n_keys = material.d.cfg.d_key + 1  # with the constant
    # a number per (query feature, key feature); sorted, as the pairs of a map are
    codes = table["query_feature"] * n_keys + table["key_feature"]
    codes = codes.to_numpy()  # [pair of the map]
    heads = table[["head", "weight", "importance", "effect"]]
    runs = _runs(codes, codes[pairs])
    return [records(heads.iloc[run]) for run in runs]


def _kernels(
    material: Material,
    pairs: np.ndarray,
) -> dict[str, Any]:
    d = material.d
    if not d.spec.rotary_dim:
        return {"stretches": [], "kernel": None}
    n_pos = material.statistics.tokens.shape[1]
    table = material.pairs.iloc[pairs]
    typical = table["weight"].to_numpy(float, copy=True)  # [pair]
    for side in SIDES:
        activations = feature_table(material.statistics, side)["mean"]
        activations = np.append(activations, 1.0)  # [feature], the constant last
        typical *= activations[table[f"{side}_feature"]]
    triples = d.feature_map.indices[torch.from_numpy(pairs)]
    kernel = d.pair_kernel(triples, range(n_pos))  # [pair, offset]
    kernel = kernel.double().cpu().numpy()  # bfloat16 has no numpy counterpart
    stretches = kernel_stretches(n_pos)
    means = []
    for first, last in stretches:
        offsets = slice(first, last + 1)
        means.append(kernel[:, offsets].mean(axis=1))
    scores = np.stack(means, axis=1) * typical[:, None]  # [pair, stretch]
    return {
        "stretches": stretches,
        "kernel": [numbers(row, digits=3) for row in scores],
    }


def kernel_stretches(n_pos: int) -> list[tuple[int, int]]:
    """Distances 0 to 31 one by one, then in stretches that grow with the distance.

    A rotary kernel oscillates: a mean over near distances would hide it.
    """
    first = min(32, n_pos)
    stretches = [(offset, offset) for offset in range(first)]
    while first < n_pos:
        length = 1 << (first.bit_length() - 3)  # an eighth to a quarter of the distance
        last = min(first + length, n_pos) - 1
        stretches.append((first, last))
        first = last + 1
    return stretches


def _runs(
    sorted_values: np.ndarray,
    values: np.ndarray,
) -> list[slice]:
    """Where each of the values stands among the sorted ones."""
    starts = np.searchsorted(sorted_values, values, side="left")
    ends = np.searchsorted(sorted_values, values, side="right")
    return list(map(slice, starts, ends))
