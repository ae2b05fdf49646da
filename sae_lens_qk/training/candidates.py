"""Which pairs enter mask training: one pass over data, in memory bounded by the number of candidates."""

import logging
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_qk.scoring import kernels
from sae_lens_qk.attention import AttentionSpec, attention_scores, pattern_from_scores, rotate
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.weights import QKWeights
from sae_lens_qk.scoring.entries import ActiveEntries, active_entries
from sae_lens_qk.scoring.pairs import Decoders

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
    """The most important pairs of a dictionary on the given layer inputs (whole sequences); see `rank_features`."""
    spec, weights = dictionary.spec, weights.to(dictionary.device)

    def features(x: Tensor) -> FeatureBatch:
        x = x.to(dictionary.device)
        pattern = pattern_from_scores(attention_scores(weights.queries(x), weights.keys(x), spec))
        return FeatureBatch(dictionary.encode_query(x), dictionary.encode_key(x), pattern)

    return rank_features(map(features, rows), dictionary.decoders, spec, n_candidates)


@torch.no_grad()
def rank_features(
    batches: Iterable[FeatureBatch], decoders: Decoders, spec: AttentionSpec, n_candidates: int
) -> SparseFeatureMap:
    """The n most important pairs that ever fired together, constants included, with weight 1 and their statistics.

    What dropping a pair costs, to leading order, is half the variance of its contribution under the true pattern:

        importance[a,b,h] = 1/2 mean_i [ sum_j P[i,j] c[i,j]^2 - (sum_j P[i,j] c[i,j])^2 ],
        c[i,j] = query_acts[i,a] key_acts[j,b] M[a,b,h](i-j)

    The second term matters: contributions constant over keys cancel in the softmax. Where more pairs fire together than
    six times `n_candidates`, the less important half is forgotten whenever a table is full.

    Returns:
        A map with weights 1 and `statistics`: importance in nats a query, mean c, share of (query, key) positions.
    Raises:
        ValueError: fewer than one candidate, more than fit in memory (before any batch is read), no pair ever fired, or
            features that are not finite.
    """
    W_Q, W_K = decoders.to("cpu", torch.float32)
    table = PairTable(n_candidates, len(W_Q), len(W_K), spec.n_heads)
    n_queries, n_positions = 0, 0
    for batch in batches:
        query_acts, key_acts, pattern = (tensor.float().cpu() for tensor in batch)
        n_rows, n_pos = query_acts.shape[:2]
        n_queries, n_positions = (
            n_queries + n_rows * n_pos,
            n_positions + n_rows * n_pos * (n_pos + 1) // 2,
        )
        for row in range(n_rows):
            queries, keys = (
                active_entries(query_acts[row : row + 1]),
                active_entries(key_acts[row : row + 1]),
            )
            by_feature = np.argsort(queries.feature, kind="stable")
            features, q_pos, k_pos = (
                queries.feature[by_feature],
                _positions(queries)[by_feature],
                _positions(keys),
            )
            q_values = torch.from_numpy(queries.value[by_feature]) * spec.scale
            q_vectors = _rotated(W_Q, features, q_values, q_pos, spec)
            k_vectors = _rotated(W_K, keys.feature, torch.from_numpy(keys.value), k_pos, spec)
            for head in range(spec.n_heads):
                k_head = k_vectors[:, head // spec.heads_per_kv]
                for part in _whole_features(features):
                    contributions = q_vectors[part, head] @ k_head.T
                    table.add(
                        head,
                        features[part],
                        q_pos[part],
                        keys,
                        k_pos,
                        contributions,
                        pattern[row, head],
                    )
    return table.best(n_queries, n_positions)


class FiringRates(NamedTuple):
    """Share of tokens on which each feature fires; their sum is the mean L0."""

    query: Float[Tensor, " d_query"]
    key: Float[Tensor, " d_key"]


@torch.no_grad()
def firing_rates(
    dictionary: BilinearQKDictionary, rows: Iterable[Float[Tensor, "batch pos d_model"]]
) -> FiringRates:
    """Firing rates over the given layer inputs."""
    n_tokens, fired = (
        0,
        [
            torch.zeros(d, device=dictionary.device)
            for d in (dictionary.cfg.d_query, dictionary.cfg.d_key)
        ],
    )
    for x in rows:
        n_tokens += x[..., 0].numel()
        batch = x.to(dictionary.device)
        for total, acts in zip(
            fired, (dictionary.encode_query(batch), dictionary.encode_key(batch)), strict=True
        ):
            total += (acts > 0).flatten(0, -2).sum(dim=0)
    return FiringRates(*(total / n_tokens for total in fired))


class PairTable:
    """Sums over data for the pairs that matter most: hash tables of fixed size, one for each class of query features.

    Args:
        n_candidates: pairs wanted at the end.
        n_queries, n_keys, n_heads: features of both sides, constants included, and heads.
    """

    def __init__(self, n_candidates: int, n_queries: int, n_keys: int, n_heads: int):
        self.n_candidates, self.sizes = n_candidates, (n_queries, n_keys, n_heads)
        n_slots = self.check_memory(n_candidates, n_keys)
        self._keys = np.full((_TABLES, n_slots), -1, np.int64)
        self._sums = np.zeros((_TABLES, n_slots, 3), np.float32)
        self._filled = np.zeros(_TABLES, np.int64)
        self._floor = np.float32(0)

    @staticmethod
    def check_memory(n_candidates: int, n_keys: int) -> int:
        """Slots of each table.

        Raises:
            ValueError: fewer than one candidate, or more than fit in memory.
        """
        if n_candidates < 1:
            raise ValueError(f"n_candidates must be at least 1, got {n_candidates}.")
        n_slots = 1 << int(np.ceil(np.log2(max(8 * n_candidates / _TABLES, 8 * n_keys))))
        needed, available = (
            2 * _TABLES * n_slots * _BYTES_PER_SLOT,
            psutil.virtual_memory().available,
        )
        if needed > available:
            raise ValueError(
                f"{n_candidates:,} candidates need {needed / 2**30:.1f} GiB while pairs are ranked and "
                f"{available / 2**30:.1f} GiB are free: ask for fewer."
            )
        return n_slots

    def add(
        self,
        head: int,
        features: np.ndarray,
        q_pos: np.ndarray,
        keys: ActiveEntries,
        k_pos: np.ndarray,
        contributions: Tensor,
        pattern: Tensor,
    ) -> None:
        """Add one head of one sequence: contributions [q_entry, k_entry], query entries sorted by feature."""
        n_pos, (_, n_keys, n_heads) = len(pattern), self.sizes
        firing, n_fired = kernels.first_firings(n_keys, 0, n_pos, keys.start, keys.feature)
        local = kernels.numbers(firing, n_keys)[keys.feature]
        present, first_row = np.unique(features, return_index=True)
        first_row = np.append(first_row, len(features))
        done, limit = np.zeros(_TABLES, np.int64), int(_FULL * self._keys.shape[1])
        while True:
            kernels.add_statistics(
                self._keys,
                self._sums,
                self._filled,
                done,
                self._floor,
                limit,
                contributions.numpy(),
                pattern.numpy(),
                present,
                first_row,
                q_pos,
                k_pos,
                local,
                firing,
                n_fired,
                n_keys,
                n_heads,
                head,
            )
            if (done == len(present)).all():
                return
            self._forget()

    def _forget(self) -> None:
        """Keep the strongest half of what the tables may hold."""
        codes, sums = self._listed()
        order = np.argsort(-sums[:, 0], kind="stable")[: int(_FULL * self._keys.size / 2)]
        self._floor = np.float32(sums[order[-1], 0] / 8)
        table_of = codes // (self.sizes[1] * self.sizes[2]) % _TABLES
        self._keys.fill(-1)
        self._sums.fill(0)
        for table in range(_TABLES):
            kept = order[table_of[order] == table][: self._keys.shape[1] // 2]
            kernels.insert_all(self._keys[table], self._sums[table], codes[kept], sums[kept])
            self._filled[table] = len(kept)
        logger.debug("forgot %d of %d pairs", len(codes) - int(self._filled.sum()), len(codes))

    def _listed(self) -> tuple[np.ndarray, np.ndarray]:
        used = self._keys >= 0
        return self._keys[used], self._sums[used]

    def best(self, n_queries: int, n_positions: int) -> SparseFeatureMap:
        """The candidates, with sums turned into means over `n_queries` queries and `n_positions` (query, key) positions."""
        codes, sums = self._listed()
        n_queries_1, n_keys_1, n_heads = self.sizes
        indices = np.stack(np.unravel_index(codes, (n_queries_1, n_keys_1, n_heads)), axis=1)
        between_constants = (indices[:, 0] == n_queries_1 - 1) & (indices[:, 1] == n_keys_1 - 1)
        if not np.isfinite(sums).all():
            raise ValueError(
                "Features or patterns are not finite: check the layer inputs and the dictionary's weights."
            )
        usable = np.flatnonzero((sums[:, 0] > 0) & ~between_constants)
        if not len(usable):
            raise ValueError(
                "No pair of features ever fired together: train step 1 longer, or rank on more tokens."
            )
        chosen = usable[np.argsort(-sums[usable, 0], kind="stable")[: self.n_candidates]]
        importance, effect, count = sums[chosen].T
        statistics = np.stack(
            [importance / n_queries, effect / count, count / n_positions], axis=1
        ).astype(np.float32)
        return SparseFeatureMap(
            indices[chosen],
            torch.ones(len(chosen)),
            n_queries_1 - 1,
            n_keys_1 - 1,
            n_heads,
            torch.from_numpy(statistics),
        )


def _positions(entries: ActiveEntries) -> np.ndarray:
    return np.repeat(np.arange(len(entries.start) - 1, dtype=np.int32), np.diff(entries.start))


def _rotated(
    W: Tensor, features: np.ndarray, values: Tensor, positions: np.ndarray, spec
) -> Tensor:
    """Decoder rows of active entries, times activation, rotated to their positions: [entry, heads, d_head]."""
    vectors = W[torch.from_numpy(features).long()] * values[:, None, None]
    return rotate(vectors[None], spec, torch.from_numpy(positions))[0]


def _whole_features(features: np.ndarray) -> list[slice]:
    """Slices of some thousand entries, each feature in one slice."""
    starts = np.flatnonzero(np.diff(features, prepend=-1))
    cuts = [0]
    for start in starts:
        if start - cuts[-1] >= _ROWS_AT_ONCE:
            cuts.append(int(start))
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(features)], strict=True)]
