"""The strongest feature pairs of every (query, key) in rows of scores, for pages and overviews."""

from collections.abc import Iterable

import pandas as pd
import torch
from torch import Tensor

from sae_lens_qk.explain.term_frames import tensor_frame
from sae_lens_qk.explain.terms import AttentionRow, ScoreTerms

_Effects = dict[str, Tensor]
"""Terms of pairs as columns: the names of `strongest_pairs`, [term] each."""


_COLUMNS = (
    "head",
    "query_pos",
    "key_pos",
    "query_feature",
    "key_feature",
    "contribution",
    "pattern_effect",
)


def strongest_pairs(
    rows: Iterable[tuple[AttentionRow, ScoreTerms]],
    n: int,
) -> pd.DataFrame:
    """Of every (head, query, key) the n pairs that support it most, and the n that inhibit it most.

    Args:
        rows: rows of scores in the order of the result, each with its terms.
    Returns:
        head, query_pos, key_pos, query_feature, key_feature, contribution, pattern_effect;
        supporters by key, the largest effect first, then inhibitors likewise.
    """
    supporting: list[_Effects] = []
    inhibiting: list[_Effects] = []
    for row, terms in rows:
        effects = _pair_effects(row, terms)
        order, rank, rank_backwards = _ranks(effects, terms.n_pos)
        sorted_effects = effects["pattern_effect"][order]
        supports = (sorted_effects > 0) & (rank < n)
        inhibits = (sorted_effects < 0) & (rank_backwards < n)
        supporting.append(_select(effects, order[supports]))
        inhibiting.append(_select(effects, order[inhibits]))
    parts = [*supporting, *inhibiting]
    if not parts:
        return pd.DataFrame(columns=_COLUMNS)
    columns = {}
    for name in parts[0]:
        columns[name] = torch.cat([part[name] for part in parts])
    return tensor_frame(columns)


def _select(
    effects: _Effects,
    terms: Tensor,
) -> _Effects:
    return {name: column[terms] for name, column in effects.items()}


def _pair_effects(
    row: AttentionRow,
    terms: ScoreTerms,
) -> _Effects:
    """All terms of a row that are not zero, with the effect of each one's pair on its key."""
    a, entry = terms.terms.nonzero(as_tuple=True)  # [term]
    key_pos = terms.key_positions[entry]
    key_feature = terms.key_features[entry]
    contribution = terms.terms[a, entry]
    sloped = contribution * row.slopes[key_pos]
    # a pair's terms at all keys share a number, and so their mean over the pattern
    n_key_features = int(terms.key_features.max()) + 1
    pair = a * n_key_features + key_feature
    mean = torch.bincount(pair, weights=sloped * row.pattern[key_pos])
    return {
        "head": torch.full_like(a, row.head),
        "query_pos": torch.full_like(a, row.query_pos),
        "key_pos": key_pos,
        "query_feature": terms.query_features[a],
        "key_feature": key_feature,
        "contribution": contribution,
        "pattern_effect": sloped - mean[pair],
    }


def _ranks(
    effects: _Effects,
    n_pos: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The order by key, then falling effect, and each one's rank at its key from either end."""
    # two stable sorts, the second key first
    order = effects["pattern_effect"].argsort(descending=True, stable=True)
    order = order[effects["key_pos"][order].argsort(stable=True)]
    key_pos = effects["key_pos"][order]
    counts = torch.bincount(key_pos, minlength=n_pos)
    first = counts.cumsum(dim=0) - counts
    numbers = torch.arange(len(order), device=order.device)
    rank = numbers - first[key_pos]
    return order, rank, counts[key_pos] - 1 - rank
