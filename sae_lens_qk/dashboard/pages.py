"""How much a report holds, and which features and pairs have pages in it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import pandas as pd

from sae_lens_qk.attention import SIDES, Side
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.statistics.activations import ActivationStatistics

PAIR = ["query_feature", "key_feature", "head"]


@dataclass(frozen=True)
class ReportLimits:
    """How much a report holds; what is left out is said on its first page.

    Raises:
        ValueError: a limit below 1.
    """

    features: int = 1000
    """Features per side: those that the prompts name and the most important ones."""
    pairs: int = 5000
    """Pairs with pages of their own, among the features with pages."""
    contexts: int = 8
    """Contexts per feature."""
    pair_contexts: int = 5
    """Contexts per pair."""
    before: int = 14
    """Tokens shown before one that fires."""
    after: int = 5
    """Tokens shown after one that fires."""
    partners: int = 24
    """Features of the other side listed per feature."""
    neighbours: int = 8
    """Features of the same side, listed per feature, that fire along with it."""
    cells: int = 1500
    """Attention weights per prompt whose pairs are listed, the largest ones."""
    cell_pairs: int = 8
    """Supporters, and as many inhibitors, per attention weight."""
    explanations: int = 12
    """Attention weights per prompt that are explained in full, the largest ones."""

    def __post_init__(self):
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value < 1:
                raise ValueError(f"{limit.name} must be at least 1, got {value}.")


class Pages(NamedTuple):
    """Features of each side and rows of the feature map that have pages, most important first."""

    query: np.ndarray
    key: np.ndarray
    pairs: np.ndarray


class Material(NamedTuple):
    """What the sections of a page are derived from."""

    d: BilinearQKDictionary
    statistics: ActivationStatistics
    pairs: pd.DataFrame
    """`pair_table`."""
    pages: Pages
    limits: ReportLimits


def feature_table(
    statistics: ActivationStatistics,
    side: Side,
) -> pd.DataFrame:
    """`statistics.features` of one side, in the order of the features."""
    return statistics.features.query(f"side == '{side}'")


def pair_table(
    d: BilinearQKDictionary,
    statistics: ActivationStatistics,
) -> pd.DataFrame:
    """One row per kept pair, in the map's order: `d.pair_frame()` and what the texts gave.

    importance is m^2 times the map's, what dropping the pair costs; of a map that was never
    measured, half of co-occurrence times the squared mean term.
    """
    frame = d.pair_frame()
    for name in ("co_occurrence", "mean", "max", "min"):
        frame[name] = statistics.pairs[name].to_numpy()
    if d.feature_map.statistics.any():
        importance = frame["importance"] * frame["weight"] ** 2
    else:
        importance = 0.5 * frame["co_occurrence"] * frame["mean"] ** 2
    frame["importance"] = np.nan_to_num(importance.to_numpy())
    return frame


def choose_pages(
    d: BilinearQKDictionary,
    statistics: ActivationStatistics,
    pairs: pd.DataFrame,
    cells: Sequence[pd.DataFrame],
    limits: ReportLimits,
) -> Pages:
    """What has a page: up to half of it what the prompts name, the rest by importance.

    Args:
        pairs: `pair_table`.
        cells: pairs of each prompt, with their pattern effects.
    """
    # every pair that a prompt names, cell by cell, and its effect there
    cell_triples = [frame[PAIR].to_numpy() for frame in cells]
    cell_effects = [frame["pattern_effect"].abs().to_numpy() for frame in cells]
    # the empty ones are for reports without prompts
    no_triples = np.zeros((0, 3), dtype=int)
    triples = np.concatenate([no_triples, *cell_triples])  # [named pair, 3]
    effects = np.concatenate([np.zeros(0), *cell_effects])  # [named pair]
    importance = pairs["importance"].to_numpy()
    features: dict[Side, np.ndarray] = {}
    both_have_pages = np.ones(len(pairs), dtype=bool)
    for column, side in enumerate(SIDES):
        density = feature_table(statistics, side)["density"].to_numpy()  # [feature]
        constant = len(density)
        pair_features = pairs[f"{side}_feature"].to_numpy()
        effect = _largest(effects, triples[:, column], constant + 1)
        total = np.bincount(pair_features, importance, minlength=constant + 1)
        effect = effect[:constant]  # the constant has no page
        total = total[:constant]
        is_alive = (density > 0) | (total > 0) | (effect > 0)
        features[side] = _first(effect, total, is_alive, limits.features)
        both_have_pages &= np.isin(pair_features, [*features[side], constant])
    # rows of the map; -1 is constant x constant, which is not listed there
    rows = d.feature_map.find(triples).cpu().numpy()
    effect = _largest(effects, rows, len(pairs) + 1)
    effect = effect[: len(pairs)]
    numbers = _first(effect, importance, both_have_pages, limits.pairs)
    return Pages(features["query"], features["key"], numbers)


def _largest(
    values: np.ndarray,
    groups: np.ndarray,
    n_groups: int,
) -> np.ndarray:
    """The largest value of each group, 0 for those that have none; group -1 is the last."""
    largest = np.zeros(n_groups)
    np.maximum.at(largest, groups, values)
    return largest


def _first(
    effect: np.ndarray, importance: np.ndarray, is_possible: np.ndarray, limit: int
) -> np.ndarray:
    """At most `limit` numbers, most important first.

    Half of them by effect, where there is one, the others by importance.
    """
    order = np.argsort(-importance, kind="stable")
    order = order[is_possible[order]]
    effective = order[np.argsort(-effect[order], kind="stable")]
    effective = effective[effect[effective] > 0][: limit // 2]
    is_effective = np.isin(order, effective)
    others = order[~is_effective][: limit - len(effective)]
    # one list by importance again, whichever reason chose its numbers
    return order[is_effective | np.isin(order, others)]
