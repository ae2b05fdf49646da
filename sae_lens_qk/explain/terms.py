"""Every term of one row of attention scores, exactly.

With head h, query i and a dictionary's features,

    c[a,b] = query_acts[i,a] key_acts[j,b] M[a,b,h](i-j)        at every allowed key j

The constants take part as features with activation 1, and what reconstruction misses as one more
feature per side; then the terms add up to the model's own row of scores.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sae_lens_qk.attention import AttentionSpec, Side
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import Features, SparseFeatureMap


class Errors(NamedTuple):
    """What reconstruction misses of one head at every position: q - q_hat and k - k_hat."""

    query: Float[Tensor, "pos d_head"]
    key: Float[Tensor, "pos d_head"]


class Change(NamedTuple):
    """What n edits of a row of scores do to it; s' and P' are the edited row and its pattern."""

    tv: Float[Tensor, " n"]
    """Half the L1 distance of P and P'."""
    weight_drop: Float[Tensor, " n"]
    """P[j] - P'[j]."""
    score_drop: Float[Tensor, " n"]
    """(s - s')[j] - sum_j' P[j'] (s - s')[j']."""


class AttentionRow:
    """One row of scores, what the softmax makes of it, and what changes of the scores do.

    Args:
        spec: the layer's attention.
        head, query_pos: whose row it is.
        scores: [pos], of keys 0 to `query_pos`, scaled and uncapped.
        pattern: [pos]; None: the spec's softmax of the scores.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        head: int,
        query_pos: int,
        scores: Float[Tensor, " pos"],
        pattern: Float[Tensor, " pos"] | None = None,
    ):
        self.spec = spec
        self.head = head
        self.query_pos = query_pos
        self.scores = scores
        self.pattern = self.row_pattern(scores) if pattern is None else pattern

    def row_pattern(self, scores: Float[Tensor, "*n pos"]) -> Float[Tensor, "*n pos"]:
        """The pattern that other scores would give in this row."""
        return self.spec.row_pattern(scores, self.head, self.query_pos)

    @cached_property
    def slopes(self) -> Float[Tensor, " pos"]:
        """Derivative of each logit along its score: 1, unless a softcap flattens it."""
        if self.spec.softcap is None:
            return torch.ones_like(self.scores)
        return 1 - (self.spec.capped(self.scores) / self.spec.softcap).square()

    def effect(self, rows: Float[Tensor, "*n pos"], key_pos: int) -> Float[Tensor, "*n"]:
        """Pattern effect of terms: the derivative of log P[j] along each, c[j] - sum P[j'] c[j'].

        Args:
            rows: each term in the whole row of scores.
            key_pos: the key j.
        """
        return pattern_effect(rows * self.slopes, self.pattern, key_pos)

    def attention_drop(self, rows: Float[Tensor, "n pos"], key_pos: int) -> Float[Tensor, " n"]:
        """P[j] less what remains of it when each term leaves the whole row of scores."""
        return self.pattern[key_pos] - self.row_pattern(self.scores - rows)[:, key_pos]

    def change(self, edited: Float[Tensor, "n pos"], key_pos: int) -> Change:
        """What the row becomes with other scores."""
        pattern = self.row_pattern(edited)
        logit_drops = self.spec.capped(self.scores) - self.spec.capped(edited)
        return Change(
            tv=(pattern - self.pattern).abs().sum(dim=-1) / 2,
            weight_drop=self.pattern[key_pos] - pattern[:, key_pos],
            score_drop=pattern_effect(logit_drops, self.pattern, key_pos),
        )


def pattern_effect(
    rows: Float[Tensor, "*n pos"], pattern: Float[Tensor, " pos"], key_pos: int
) -> Float[Tensor, "*n"]:
    """c[j] - sum_j' P[j'] c[j'], the derivative of log P[j] along a change c of the logits."""
    return rows[..., key_pos] - (rows * pattern).sum(dim=-1)


def pair_weights(
    feature_map: SparseFeatureMap,
    head: int,
    query_features: Int[Tensor, " a"],
    key_features: Int[Tensor, " b"],
) -> Float[Tensor, "a b"]:
    """m of each pair of one head in a map: 0 where it is not listed, 0 for the errors.

    Constant x constant belongs to every map with weight 1.
    """
    d_query = feature_map.d_query
    d_key = feature_map.d_key
    pairs_query, pairs_key, pairs_head = feature_map.indices.unbind(dim=1)
    # row and column of each feature in the table, -1: none; the errors are last
    rows = query_features.new_full((d_query + 2,), -1)
    rows[query_features] = torch.arange(len(query_features), device=rows.device)
    columns = key_features.new_full((d_key + 2,), -1)
    columns[key_features] = torch.arange(len(key_features), device=columns.device)
    in_table = (pairs_head == head) & (rows[pairs_query] >= 0) & (columns[pairs_key] >= 0)
    table = feature_map.weights.new_zeros(len(query_features), len(key_features))
    table[rows[pairs_query[in_table]], columns[pairs_key[in_table]]] = feature_map.weights[in_table]
    if rows[d_query] >= 0 and columns[d_key] >= 0:
        table[rows[d_query], columns[d_key]] = 1.0
    return table


class ScoreTerms(NamedTuple):
    """Every term in one row of scores: c = query_act key_act M(i - j), the constants included.

    A feature that does not fire at the query has no row, one that does not fire at a key no column
    there; keys that are not allowed have no columns. Rows and columns are sorted by feature, at
    each key; d_query and d_key stand for the constants, d_query + 1 and d_key + 1 for the errors.
    """

    query_features: Int[Tensor, " a"]
    key_features: Int[Tensor, " entry"]
    key_positions: Int[Tensor, " entry"]
    terms: Float[Tensor, "a entry"]
    n_pos: int
    """Keys in the row: the query's position + 1."""

    @property
    def scores(self) -> Float[Tensor, " pos"]:
        """Sum of all terms: the dictionary's row of scores, 0 at keys that are not allowed."""
        zeros = self.terms.new_zeros(self.n_pos)
        return zeros.index_add(0, self.key_positions, self.terms.sum(dim=0))

    def weights(self, feature_map: SparseFeatureMap, head: int) -> Float[Tensor, "a entry"]:
        """m of each term's pair; see `pair_weights`."""
        distinct, numbers = self.key_features.unique(return_inverse=True)
        table = pair_weights(feature_map, head, self.query_features, distinct)
        return table.to(self.terms.dtype)[:, numbers]

    def weighted(self, weights: Float[Tensor, "a entry"]) -> "ScoreTerms":
        """The same terms, each times its weight."""
        return self._replace(terms=self.terms * weights)

    def active(self, side: Side, key_pos: int, usable: Bool[Tensor, " d"]) -> Int[Tensor, " n"]:
        """Usable features that fire at the query, or at this key; neither constants nor errors."""
        if side == "query":
            features = self.query_features
        else:
            features = self.key_features[self.key_positions == key_pos]
        return features[pad(usable, (0, 2))[features]]

    def rows(self, side: Side, key_pos: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n pos"]:
        """All terms of each feature at one place, summed, in the whole row of scores.

        Args:
            side: "query": the place is the query, and the terms lie at all keys; "key": the place
                is one key, and so are the terms.
            features: that fire at the place.
        """
        rows = self.terms.new_zeros(len(features), self.n_pos)
        if side == "query":
            feature_terms = self.terms[torch.searchsorted(self.query_features, features)]
            return rows.index_add(1, self.key_positions, feature_terms)
        entries = (self.key_positions == key_pos).nonzero()[:, 0]
        entries = entries[torch.searchsorted(self.key_features[entries], features)]
        rows[:, key_pos] = self.terms[:, entries].sum(dim=0)
        return rows

    def key_feature_rows(self, features: Int[Tensor, " n"]) -> Float[Tensor, "n pos"]:
        """All terms of each key feature, at every key where it fires; sorted features."""
        return self.pairs(self.query_features, features).sum(dim=0)

    def pairs(
        self, query_features: Int[Tensor, " a"], key_features: Int[Tensor, " b"]
    ) -> Float[Tensor, "a b pos"]:
        """c of each pair in the whole row, wherever its key feature fires; both lists sorted."""
        pairs = self.terms.new_zeros(len(query_features), len(key_features), self.n_pos)
        entries = torch.isin(self.key_features, key_features).nonzero()[:, 0]
        columns = torch.searchsorted(key_features, self.key_features[entries])
        rows = torch.searchsorted(self.query_features, query_features)
        pairs[:, columns, self.key_positions[entries]] = self.terms[rows][:, entries]
        return pairs


class _Entries(NamedTuple):
    """Features that fire on one side of one head, by position; constants and errors included."""

    features: Int[Tensor, " entry"]
    positions: Int[Tensor, " entry"]
    vectors: Float[Tensor, "entry d_head"]
    """act R_pos W_dec[feature]."""
    start: list[int]
    """Entries start[p] to start[p + 1] stand at position p."""


class HeadTerms:
    """All terms of one head in a sequence: rotated once, shared by the rows of all queries.

    Args:
        dictionary: whose features they are.
        features: of one sequence from position 0, batch 1.
        head: query head.
        feature_map: count its pairs alone, times their weights; None: every pair, weight 1.
        errors: makes the terms of a row add up to the model's own scores.
    """

    @torch.no_grad()
    def __init__(
        self,
        dictionary: BilinearQKDictionary,
        features: Features,
        head: int,
        feature_map: SparseFeatureMap | None = None,
        errors: Errors | None = None,
    ):
        spec = dictionary.spec
        decoders = dictionary.decoders
        query_decoder = decoders.query[:, head] * spec.scale
        key_decoder = decoders.key[:, head // spec.heads_per_kv]
        query_errors = None if errors is None else errors.query * spec.scale
        key_errors = None if errors is None else errors.key
        self._queries = _entries(features.query[0], query_decoder, query_errors, spec)
        self._keys = _entries(features.key[0], key_decoder, key_errors, spec)
        self._first_keys = spec.first_keys(features.key.shape[1]).tolist()
        self._table = None
        if feature_map is not None:
            query_features, self._row_numbers = self._queries.features.unique(return_inverse=True)
            key_features, self._column_numbers = self._keys.features.unique(return_inverse=True)
            table = pair_weights(feature_map, head, query_features, key_features)
            self._table = table.to(self._queries.vectors.dtype)

    @torch.no_grad()
    def row(self, query_pos: int) -> ScoreTerms:
        """All terms of one query, at the keys that it may attend to."""
        first_key = self._first_keys[query_pos]
        rows = slice(self._queries.start[query_pos], self._queries.start[query_pos + 1])
        columns = slice(self._keys.start[first_key], self._keys.start[query_pos + 1])
        terms = self._queries.vectors[rows] @ self._keys.vectors[columns].T
        if self._table is not None:
            table_rows = self._table[self._row_numbers[rows]]
            terms = terms * table_rows[:, self._column_numbers[columns]]
        return ScoreTerms(
            query_features=self._queries.features[rows],
            key_features=self._keys.features[columns],
            key_positions=self._keys.positions[columns],
            terms=terms,
            n_pos=query_pos + 1,
        )


def _entries(
    acts: Float[Tensor, "pos d"],
    decoder: Float[Tensor, "d_1 d_head"],
    errors: Float[Tensor, "pos d_head"] | None,
    spec: AttentionSpec,
) -> _Entries:
    acts = pad(acts, (0, 1), value=1.0)  # the constant feature
    positions, features = acts.nonzero().unbind(dim=1)
    vectors = decoder[features] * acts[positions, features][:, None]
    all_positions = torch.arange(len(acts), device=acts.device)
    if errors is not None:
        positions = torch.cat([positions, all_positions])
        features = torch.cat([features, torch.full_like(all_positions, len(decoder))])
        vectors = torch.cat([vectors, errors])
        order = positions.argsort(stable=True)  # the error last at each position
        positions = positions[order]
        features = features[order]
        vectors = vectors[order]
    vectors = spec.rotate(vectors[None, :, None], positions)[0, :, 0]
    start = torch.searchsorted(positions, torch.arange(len(acts) + 1, device=acts.device))
    return _Entries(features, positions, vectors, start.tolist())
