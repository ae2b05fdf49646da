"""Which pairs enter mask training: one pass over data, in memory bounded by their number."""

import logging
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.scoring.entries import ActiveEntries, active_entries
from sae_lens_qk.scoring.kernels import firing_ranks, first_firings
from sae_lens_qk.scoring.pairs import Decoders
from sae_lens_qk.training.kernels import add_statistics, insert_all
from sae_lens_qk.weights import QKWeights

logger = logging.getLogger("sae_lens_qk")

_TABLES = 16
_ROWS_AT_ONCE = 1024
_BYTES_PER_SLOT = 8 + 3 * 4
_FULL = 0.75
"""Share of a table's slots that may be taken."""


class FeatureBatch(NamedTuple):
    """Features of both sides and the model's own pattern for some sequences."""

    query_acts: Float[Tensor, "batch pos_q d_query"]
    key_acts: Float[Tensor, "batch pos_k d_key"]
    pattern: Float[Tensor, "batch head pos_q pos_k"]


@torch.no_grad()
def rank_pairs(
    dictionary: BilinearQKDictionary,
    weights: QKWeights,
    rows: Iterable[Float[Tensor, "batch pos d_model"]],
    n_candidates: int,
) -> SparseFeatureMap:
    """The most important pairs of a dictionary on whole sequences; see `rank_features`.

    Args:
        weights: `AttentionLayer.qk_weights` of the dictionary's layer.
        rows: layer inputs.
        n_candidates: pairs to return, at most.
    """
    spec = dictionary.spec
    weights = weights.to(dictionary.device)

    def encode(x: Tensor) -> FeatureBatch:
        x = x.to(dictionary.device)
        queries = weights.queries(x)  # [batch, pos, head, d_head]
        keys = weights.keys(x)  # [batch, pos, kv_head, d_head]
        pattern = spec.pattern(spec.scores(queries, keys))  # [batch, head, pos_q, pos_k]
        return FeatureBatch(*dictionary.features(x), pattern)

    return rank_features(map(encode, rows), dictionary.decoders, spec, n_candidates)


@torch.no_grad()
def rank_features(
    batches: Iterable[FeatureBatch], decoders: Decoders, spec: AttentionSpec, n_candidates: int
) -> SparseFeatureMap:
    """The n most important pairs that ever fired together, constants included, with weight 1.

    What dropping a pair costs, to leading order, is half the variance of its contribution under the
    true pattern:

        importance[a,b,h] = 1/2 mean_i [ sum_j P[i,j] c[i,j]^2 - (sum_j P[i,j] c[i,j])^2 ],
        c[i,j] = query_acts[i,a] key_acts[j,b] M[a,b,h](i-j)

    The second term matters: contributions constant over keys cancel in the softmax. Where more
    pairs fire together than six times `n_candidates`, the less important half is forgotten whenever
    a table is full.

    Returns:
        A map with weights 1 and `statistics`: importance in nats per query, mean c, share of
        (query, allowed key) positions.
    Raises:
        ValueError: fewer than one candidate, more than fit in memory (before any batch is read), no
            pair ever fired, or features that are not finite.
    """
    decoders = decoders.to("cpu", torch.float32)
    n_queries = len(decoders.query)  # features, the constant included
    n_keys = len(decoders.key)
    table = PairTable(n_candidates, n_queries, n_keys, spec.n_heads)
    n_query_positions = 0
    n_positions = 0
    for batch in batches:
        query_acts = batch.query_acts.float().cpu()
        key_acts = batch.key_acts.float().cpu()
        pattern = batch.pattern.float().cpu()
        n_rows, n_pos = query_acts.shape[:2]
        n_query_positions += n_rows * n_pos
        n_positions += n_rows * spec.n_allowed(n_pos)
        for row in range(n_rows):
            # slices, not indices: active_entries takes a batch, here of one sequence
            queries = active_entries(query_acts[row : row + 1])
            keys = active_entries(key_acts[row : row + 1])
            _add_row(table, queries, keys, pattern[row], decoders, spec)
    return table.best(n_query_positions, n_positions)


def _add_row(
    table: "PairTable",
    queries: ActiveEntries,
    keys: ActiveEntries,
    pattern: Float[Tensor, "head pos_q pos_k"],
    decoders: Decoders,
    spec: AttentionSpec,
) -> None:
    """Add one sequence to the table, a head and some thousand contributions at a time."""
    # By feature, and by position within a feature (stable): the table adds up a feature at a time.
    order = np.argsort(queries.feature, kind="stable")
    features = queries.feature[order]
    q_pos = _positions(queries)[order]
    k_pos = _positions(keys)
    # the scale goes into the smaller factor, not into [q_entry, k_entry] contributions
    q_values = torch.from_numpy(queries.value[order]) * spec.scale
    k_values = torch.from_numpy(keys.value)
    q_vectors = _rotated_rows(decoders.query, features, q_values, q_pos, spec)
    # [q_entry, head, d_head] and [k_entry, kv_head, d_head]
    k_vectors = _rotated_rows(decoders.key, keys.feature, k_values, k_pos, spec)
    first_keys = spec.first_keys(pattern.shape[1])  # [pos_q]
    for head in range(spec.n_heads):
        head_keys = k_vectors[:, head // spec.heads_per_kv]  # [k_entry, d_head]
        for part in _whole_features(features):
            contributions = q_vectors[part, head] @ head_keys.T  # [q_entry, k_entry]
            table.add(
                head,
                features[part],
                q_pos[part],
                keys,
                k_pos,
                contributions,
                pattern[head],
                first_keys,
            )


class FiringRates(NamedTuple):
    """Share of tokens on which each feature fires; their sum is the mean L0."""

    query: Float[Tensor, " d_query"]
    key: Float[Tensor, " d_key"]


@torch.no_grad()
def firing_rates(
    dictionary: BilinearQKDictionary, rows: Iterable[Float[Tensor, "batch pos d_model"]]
) -> FiringRates:
    """Firing rates over the given layer inputs."""
    n_tokens = 0
    query_counts = torch.zeros(dictionary.cfg.d_query, device=dictionary.device)
    key_counts = torch.zeros(dictionary.cfg.d_key, device=dictionary.device)
    for x in rows:
        n_tokens += x.shape[:-1].numel()
        features = dictionary.features(x.to(dictionary.device))
        query_fires = (features.query > 0).flatten(0, -2)  # [tokens, d_query]
        key_fires = (features.key > 0).flatten(0, -2)  # [tokens, d_key]
        query_counts += query_fires.sum(dim=0)
        key_counts += key_fires.sum(dim=0)
    return FiringRates(query_counts / n_tokens, key_counts / n_tokens)


class PairTable:
    """Sums over data for the pairs that matter most, in hash tables of fixed size.

    There is one table for each class of query features.

    Args:
        n_candidates: pairs wanted at the end.
        n_queries, n_keys, n_heads: features of both sides, constants included, and heads.
    """

    def __init__(
        self,
        n_candidates: int,
        n_queries: int,
        n_keys: int,
        n_heads: int,
    ):
        self.n_candidates = n_candidates
        self.sizes = (n_queries, n_keys, n_heads)
        n_slots = self.check_memory(n_candidates, n_keys)
        # codes of pairs, -1 where a slot is empty
        self._keys = np.full((_TABLES, n_slots), -1, np.int64)
        # importance, effect and count, as float32: half the memory, and ranks need no more
        self._sums = np.zeros((_TABLES, n_slots, 3), np.float32)
        self._filled = np.zeros(_TABLES, np.int64)
        # importance below which a new pair is turned away; rises whenever pairs are forgotten
        self._floor = np.float32(0)

    @staticmethod
    def check_memory(
        n_candidates: int,
        n_keys: int,
    ) -> int:
        """Slots of each table.

        Raises:
            ValueError: fewer than one candidate, or more than fit in memory.
        """
        if n_candidates < 1:
            raise ValueError(f"n_candidates must be at least 1, got {n_candidates}.")
        # a single query feature may fire with every key feature: its table must take them all
        n_entries = max(8 * n_candidates / _TABLES, 8 * n_keys)
        n_slots = 1 << int(np.ceil(np.log2(n_entries)))
        # twice: forgetting copies the entries before it inserts them again
        needed = 2 * _TABLES * n_slots * _BYTES_PER_SLOT
        available = psutil.virtual_memory().available
        if needed > available:
            raise ValueError(
                f"{n_candidates:,} candidates need {needed / 2**30:.1f} GiB while pairs are ranked "
                f"and {available / 2**30:.1f} GiB are free: ask for fewer."
            )
        return n_slots

    def add(
        self,
        head: int,
        features: np.ndarray,
        q_pos: np.ndarray,
        keys: ActiveEntries,
        k_pos: np.ndarray,
        contributions: Float[Tensor, "q_entry k_entry"],
        pattern: Float[Tensor, "pos_q pos_k"],
        first_keys: np.ndarray,
    ) -> None:
        """Add one head of one sequence.

        Args:
            features, q_pos: of the query entries, sorted by feature.
            keys, k_pos: the key entries, sorted by position.
            contributions: term of each pair of entries in the score.
            first_keys: first allowed key of each query.
        """
        _, n_keys, n_heads = self.sizes
        firing, n_fired = first_firings(n_keys, keys.start, keys.feature)
        # Key features by their rank among those that fire here: the kernel's sums stay small.
        k_local = firing_ranks(firing, n_keys)[keys.feature]
        present, first_row = np.unique(features, return_index=True)
        first_row = np.append(first_row, len(features))
        next_feature = np.zeros(_TABLES, np.int64)
        limit = int(_FULL * self._keys.shape[1])
        # Each table goes on from the feature before which it was full.
        while True:
            add_statistics(
                self._keys,
                self._sums,
                self._filled,
                next_feature,
                self._floor,
                limit,
                contributions.numpy(),
                pattern.numpy(),
                first_keys,
                present,
                first_row,
                q_pos,
                k_pos,
                k_local,
                firing,
                n_fired,
                n_keys,
                n_heads,
                head,
            )
            if (next_feature == len(present)).all():
                return
            self._forget()

    def _forget(self) -> None:
        """Keep the strongest half of what the tables may hold."""
        codes, sums = self._entries()
        n_strongest = int(_FULL * self._keys.size / 2)
        importance_order = np.argsort(-sums[:, 0], kind="stable")
        strongest = importance_order[:n_strongest]
        # an eighth: a pair that enters late has had less data to add up
        weakest_importance = sums[strongest[-1], 0]
        self._floor = np.float32(weakest_importance / 8)
        _, n_keys, n_heads = self.sizes
        table_numbers = codes[strongest] // (n_keys * n_heads) % _TABLES
        self._keys.fill(-1)
        self._sums.fill(0)
        half_table = self._keys.shape[1] // 2
        for table in range(_TABLES):
            # at most half full even where the strongest pairs crowd in one table
            rows = strongest[table_numbers == table][:half_table]
            table_keys = self._keys[table]  # views, filled in place
            table_sums = self._sums[table]
            insert_all(table_keys, table_sums, codes[rows], sums[rows])
            self._filled[table] = len(rows)
        n_forgotten = len(codes) - int(self._filled.sum())
        logger.debug("forgot %d of %d pairs", n_forgotten, len(codes))

    def _entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes and sums of the pairs in the tables."""
        is_filled = self._keys >= 0
        return self._keys[is_filled], self._sums[is_filled]

    def best(
        self,
        n_queries: int,
        n_positions: int,
    ) -> SparseFeatureMap:
        """The candidates, with sums turned into means.

        Args:
            n_queries: queries seen.
            n_positions: (query, allowed key) positions seen.
        """
        codes, sums = self._entries()
        if not np.isfinite(sums).all():
            raise ValueError(
                "Features or patterns are not finite: check the layer inputs and the dictionary's "
                "weights."
            )
        # A code is the flat index of (query feature, key feature, head).
        columns = np.unravel_index(codes, self.sizes)
        indices = np.stack(columns, axis=1)  # [pair, 3]
        query_constant = self.sizes[0] - 1
        key_constant = self.sizes[1] - 1
        # Constant with constant is no pair: its score is always added whole.
        is_constant = indices[:, :2] == (query_constant, key_constant)  # [pair, 2]
        between_constants = is_constant.all(axis=1)
        is_usable = (sums[:, 0] > 0) & ~between_constants
        usable = np.flatnonzero(is_usable)
        if not len(usable):
            raise ValueError(
                "No pair of features ever fired together: train step 1 longer, or rank on more "
                "tokens."
            )
        importance_order = np.argsort(-sums[usable, 0], kind="stable")
        rows = usable[importance_order[: self.n_candidates]]
        importance, effect, count = sums[rows].T
        means = [importance / n_queries, effect / count, count / n_positions]
        statistics = np.stack(means, axis=1).astype(np.float32)
        return SparseFeatureMap(
            indices[rows],
            torch.ones(len(rows)),
            query_constant,
            key_constant,
            self.sizes[2],
            torch.from_numpy(statistics),
        )


def _positions(entries: ActiveEntries) -> np.ndarray:
    """Position of each entry of one sequence."""
    n_pos = len(entries.start) - 1
    positions = np.arange(n_pos, dtype=np.int32)
    return np.repeat(positions, np.diff(entries.start))


def _rotated_rows(
    W: Float[Tensor, "d heads d_head"],
    features: np.ndarray,
    values: Float[Tensor, " entry"],
    positions: np.ndarray,
    spec: AttentionSpec,
) -> Float[Tensor, "entry heads d_head"]:
    """Decoder rows of active entries, times activation, rotated to their positions."""
    rows = W[torch.from_numpy(features).long()]  # [entry, heads, d_head]
    vectors = rows * values[:, None, None]
    return spec.rotate(vectors[None], torch.from_numpy(positions))[0]


def _whole_features(features: np.ndarray) -> list[slice]:
    """Slices of some thousand entries, each feature in one slice."""
    starts = np.flatnonzero(np.diff(features, prepend=-1))  # where another feature begins
    cuts = [0]
    for start in starts:
        if start - cuts[-1] >= _ROWS_AT_ONCE:
            cuts.append(int(start))
    cuts.append(len(features))
    return [slice(start, end) for start, end in pairwise(cuts)]
