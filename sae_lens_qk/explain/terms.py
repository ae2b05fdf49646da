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

Row = Float[Tensor, " pos"]
"""One row of scores, of logits or of the pattern, over the keys 0 to the query's position."""
Rows = Float[Tensor, "*row pos"]
"""Several rows: edited ones, or terms as they lie in the row of scores."""
PerRow = Float[Tensor, "*row"]
Numbers = Int[Tensor, " n"]
"""Feature numbers, sorted; d_query and d_key: the constant, one more: the error."""


class Errors(NamedTuple):
    """What reconstruction misses of one head at every position: q - q_hat and k - k_hat."""

    query: Float[Tensor, "pos d_head"]
    key: Float[Tensor, "pos d_head"]


class Change(NamedTuple):
    """What n edits of a row of scores do to it; s' and P' are the edited row and its pattern."""

    tv: PerRow
    """Half the L1 distance of P and P'."""
    weight_drop: PerRow
    """P[j] - P'[j]."""
    score_drop: PerRow
    """(s - s')[j] - sum_j' P[j'] (s - s')[j']."""


def rotate(
    spec: AttentionSpec,
    vectors: Float[Tensor, "n d_head"],
    positions: Int[Tensor, " n"],
) -> Float[Tensor, "n d_head"]:
    """R_pos v of single vectors of one head."""
    rotated = spec.rotate(vectors[None, :, None], positions)  # [1, n, 1, d_head]
    return rotated[0, :, 0]


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
        scores: Row,
        pattern: Row | None = None,
    ):
        self.spec = spec
        self.head = head
        self.query_pos = query_pos
        self.scores = scores
        self.pattern = self.row_pattern(scores) if pattern is None else pattern

    def row_pattern(self, scores: Rows) -> Rows:
        """The pattern that other scores would give in this row."""
        return self.spec.row_pattern(scores, self.head, self.query_pos)

    @cached_property
    def slopes(self) -> Row:
        """Derivative of each logit along its score: 1, unless a softcap flattens it."""
        if self.spec.softcap is None:
            return torch.ones_like(self.scores)
        tanh = self.spec.capped(self.scores) / self.spec.softcap
        return 1 - tanh.square()

    def effect(
        self,
        rows: Rows,
        key_pos: int,
    ) -> PerRow:
        """Pattern effect of terms: the derivative of log P[j] along each, c[j] - sum P[j'] c[j'].

        Args:
            rows: each term in the whole row of scores.
            key_pos: the key j.
        """
        return self._centred(rows * self.slopes, key_pos)

    def attention_drop(
        self,
        rows: Rows,
        key_pos: int,
    ) -> PerRow:
        """P[j] less what remains of it when each term leaves the whole row of scores."""
        patterns = self.row_pattern(self.scores - rows)
        return self.pattern[key_pos] - patterns[:, key_pos]

    def change(
        self,
        edited: Rows,
        key_pos: int,
    ) -> Change:
        """What the row becomes with other scores."""
        patterns = self.row_pattern(edited)
        pattern_changes = (patterns - self.pattern).abs()
        logits = self.spec.capped(self.scores)
        return Change(
            tv=pattern_changes.sum(dim=-1) / 2,
            weight_drop=self.pattern[key_pos] - patterns[:, key_pos],
            score_drop=self._centred(logits - self.spec.capped(edited), key_pos),
        )

    def _centred(
        self,
        rows: Rows,
        key_pos: int,
    ) -> PerRow:
        """c[j] - sum_j' P[j'] c[j'], the derivative of log P[j] along a change c of the logits."""
        means = (rows * self.pattern).sum(dim=-1)
        return rows[..., key_pos] - means


def pair_weights(
    feature_map: SparseFeatureMap,
    head: int,
    query_features: Int[Tensor, " a"],
    key_features: Int[Tensor, " b"],
) -> Float[Tensor, "a b"]:
    """m of each pair of one head in a map: 0 where it is not listed, 0 for the errors.

    Constant x constant belongs to every map with weight 1.
    """
    pairs = feature_map.restrict(head, query_features, key_features)
    query, key, _ = pairs.indices.T.contiguous()
    rows = torch.searchsorted(query_features, query)
    columns = torch.searchsorted(key_features, key)
    table = pairs.weights.new_zeros(len(query_features), len(key_features))
    table[rows, columns] = pairs.weights
    is_query_constant = query_features == feature_map.d_query
    is_key_constant = key_features == feature_map.d_key
    is_constant = is_query_constant[:, None] & is_key_constant  # [a, b]
    return table.masked_fill(is_constant, 1.0)


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
    def scores(self) -> Row:
        """Sum of all terms: the dictionary's row of scores, 0 at keys that are not allowed."""
        zeros = self.terms.new_zeros(self.n_pos)
        entry_sums = self.terms.sum(dim=0)
        return zeros.index_add(0, self.key_positions, entry_sums)

    def weights(
        self,
        feature_map: SparseFeatureMap,
        head: int,
    ) -> Float[Tensor, "a entry"]:
        """m of each term's pair; see `pair_weights`."""
        distinct, columns = self.key_features.unique(return_inverse=True)
        table = pair_weights(feature_map, head, self.query_features, distinct)
        return table.to(self.terms.dtype)[:, columns]

    def active(
        self,
        side: Side,
        key_pos: int,
        usable: Bool[Tensor, " d"],
    ) -> Numbers:
        """Usable features that fire at the query, or at this key; neither constants nor errors."""
        if side == "query":
            features = self.query_features
        else:
            features = self.key_features[self.key_positions == key_pos]
        is_usable = pad(usable, (0, 2))  # [d + 2]
        return features[is_usable[features]]

    def rows(
        self,
        side: Side,
        key_pos: int,
        features: Numbers,
    ) -> Rows:
        """All terms of each feature at one place, summed, in the whole row of scores.

        Args:
            side: "query": the place is the query, and the terms lie at all keys; "key": the place
                is one key, and so are the terms.
            features: that fire at the place.
        """
        rows = self.terms.new_zeros(len(features), self.n_pos)
        if side == "query":
            numbers = torch.searchsorted(self.query_features, features)
            return rows.index_add(1, self.key_positions, self.terms[numbers])
        is_here = self.key_positions == key_pos
        key_sums = self.terms[:, is_here].sum(dim=0)  # [entry at the key]
        numbers = torch.searchsorted(self.key_features[is_here], features)
        rows[:, key_pos] = key_sums[numbers]
        return rows

    def pairs(
        self, query_features: Int[Tensor, " a"], key_features: Int[Tensor, " b"]
    ) -> Float[Tensor, "a b pos"]:
        """c of each pair in the whole row, wherever its key feature fires; both lists sorted."""
        rows = torch.searchsorted(self.query_features, query_features)
        is_asked = torch.isin(self.key_features, key_features)
        columns = torch.searchsorted(key_features, self.key_features[is_asked])
        shape = (len(query_features), len(key_features), self.n_pos)
        pairs = self.terms.new_zeros(shape)
        positions = self.key_positions[is_asked]
        pairs[:, columns, positions] = self.terms[rows][:, is_asked]
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
        n_pos = features.key.shape[1]
        self._first_keys = spec.first_keys(n_pos).tolist()
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
        queries = self._queries
        keys = self._keys
        rows = slice(queries.start[query_pos], queries.start[query_pos + 1])
        columns = slice(keys.start[first_key], keys.start[query_pos + 1])
        terms = queries.vectors[rows] @ keys.vectors[columns].T  # [a, entry]
        if self._table is not None:
            # rows first: the table has a column for every feature that fires anywhere
            table_rows = self._table[self._row_numbers[rows]]
            terms = terms * table_rows[:, self._column_numbers[columns]]
        return ScoreTerms(
            query_features=queries.features[rows],
            key_features=keys.features[columns],
            key_positions=keys.positions[columns],
            terms=terms,
            n_pos=query_pos + 1,
        )


def _entries(
    acts: Float[Tensor, "pos d"],
    decoder: Float[Tensor, "d_1 d_head"],
    errors: Float[Tensor, "pos d_head"] | None,
    spec: AttentionSpec,
) -> _Entries:
    n_always = 1 if errors is None else 2  # the constant fires everywhere, and so do errors
    acts = pad(acts, (0, n_always), value=1.0)
    positions, features = acts.nonzero().unbind(dim=1)
    values = acts[positions, features]
    n_decoders = len(decoder)
    decoder = pad(decoder, (0, 0, 0, 1))  # a row for the errors, which differ by position
    vectors = decoder[features] * values[:, None]  # [entry, d_head]
    if errors is not None:
        vectors[features == n_decoders] = errors  # one per position, in order
    vectors = rotate(spec, vectors, positions)
    # one start more than positions: where the last one ends
    bounds = torch.arange(len(acts) + 1, device=acts.device)
    start = torch.searchsorted(positions, bounds)
    return _Entries(features, positions, vectors, start.tolist())
