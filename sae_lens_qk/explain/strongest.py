"""The strongest feature pairs of every (query, key) in rows of scores, for pages and overviews."""

from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.explain.terms import AttentionRow, ScoreTerms


class _PairEffects(NamedTuple):
    """Terms of pairs with their pattern effects, as columns."""

    head: Int[Tensor, " term"]
    query_pos: Int[Tensor, " term"]
    key_pos: Int[Tensor, " term"]
    query_feature: Int[Tensor, " term"]
    key_feature: Int[Tensor, " term"]
    contribution: Float[Tensor, " term"]
    pattern_effect: Float[Tensor, " term"]

    def select(self, terms: Tensor) -> "_PairEffects":
        return _PairEffects(*(column[terms] for column in self))


def strongest_pairs(rows: Iterable[tuple[AttentionRow, ScoreTerms]], n: int) -> pd.DataFrame:
    """Of every (head, query, key) the n pairs that support it most, and the n that inhibit it most.

    Args:
        rows: rows of scores in the order of the result, each with its terms.
    Returns:
        head, query_pos, key_pos, query_feature, key_feature, contribution, pattern_effect;
        supporters by key, the largest effect first, then inhibitors likewise.
    """
    supporting: list[_PairEffects] = []
    inhibiting: list[_PairEffects] = []
    for row, terms in rows:
        effects = _pair_effects(row, terms)
        order, rank, rank_backwards = _ranks(effects, terms.n_pos)
        ordered = effects.select(order)
        supporting.append(ordered.select((ordered.pattern_effect > 0) & (rank < n)))
        inhibiting.append(ordered.select((ordered.pattern_effect < 0) & (rank_backwards < n)))
    columns = zip(*supporting, *inhibiting, strict=True)
    names = _PairEffects._fields
    return pd.DataFrame(
        {
            name: torch.cat(column).cpu().numpy()
            for name, column in zip(names, columns, strict=True)
        },
        columns=list(names),
    )


def _pair_effects(row: AttentionRow, terms: ScoreTerms) -> _PairEffects:
    """All terms of a row that are not zero, with the effect of each one's pair on its key."""
    a, entry = terms.terms.nonzero(as_tuple=True)
    key_pos = terms.key_positions[entry]
    key_feature = terms.key_features[entry]
    contribution = terms.terms[a, entry]
    sloped = contribution * row.slopes[key_pos]
    # a pair's terms at all keys share a number
    pair = a * (int(terms.key_features.max()) + 1) + key_feature
    mean = torch.bincount(pair, weights=sloped * row.pattern[key_pos])
    return _PairEffects(
        head=torch.full_like(a, row.head),
        query_pos=torch.full_like(a, row.query_pos),
        key_pos=key_pos,
        query_feature=terms.query_features[a],
        key_feature=key_feature,
        contribution=contribution,
        pattern_effect=sloped - mean[pair],
    )


def _ranks(effects: _PairEffects, n_pos: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order by key, then falling effect, and each one's rank at its key from either end."""
    order = effects.pattern_effect.argsort(descending=True, stable=True)
    order = order[effects.key_pos[order].argsort(stable=True)]
    key_pos = effects.key_pos[order]
    counts = torch.bincount(key_pos, minlength=n_pos)
    first = counts.cumsum(dim=0) - counts
    rank = torch.arange(len(order), device=order.device) - first[key_pos]
    return order, rank, counts[key_pos] - 1 - rank
