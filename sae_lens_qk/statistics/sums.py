"""The running sums behind `activations`, and how encoded rows are added to them."""

# pyright: reportCallIssue=false
# (compiled functions take their arguments from several tuples)

from collections.abc import Iterator
from typing import NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.scoring.entries import ActiveEntries, active_entries
from sae_lens_qk.scoring.pairs import pair_kernel
from sae_lens_qk.statistics import kernels

TABLE_BYTES = 1 << 28
"""Of m M by pair and offset that are held at once."""
CO_OCCURRENCE_BYTES = 1 << 30
"""Of feature co-occurrence counts, both sides together; beyond it they are not counted."""


def _no_positions(*shape: int) -> np.ndarray:
    return np.full(shape, -1, np.int32)


class FeatureSums(NamedTuple):
    """Over the tokens, for one side."""

    count: np.ndarray
    """[d] tokens on which the feature fires."""
    total: np.ndarray
    """[d] sum of its activations."""
    top_value: np.ndarray
    """[d, n_top] strongest first."""
    top_position: np.ndarray
    """[d, n_top, 2] row and position, -1 where there is none."""
    co_firing: np.ndarray
    """[d, d] tokens on which a and b > a both fire; [0, 0] where that is not counted."""

    @classmethod
    def zeros(
        cls,
        d: int,
        n_top: int,
        count_co_firing: bool,
    ) -> "FeatureSums":
        d_table = d if count_co_firing else 0
        return cls(
            count=np.zeros(d, np.int64),
            total=np.zeros(d),
            top_value=np.zeros((d, n_top), np.float32),
            top_position=_no_positions(d, n_top, 2),
            co_firing=np.zeros((d_table, d_table), np.int32),
        )


class PairSums(NamedTuple):
    """Over the instances of each kept pair: (query, allowed key) where both its features fire."""

    count: np.ndarray
    total: np.ndarray
    highest: np.ndarray
    lowest: np.ndarray
    top_value: np.ndarray
    """[pair, n_top] largest magnitude first."""
    top_position: np.ndarray
    """[pair, n_top, 3] row, query and key position, -1 where there is none."""

    @classmethod
    def zeros(
        cls,
        n_pairs: int,
        n_top: int,
    ) -> "PairSums":
        return cls(
            count=np.zeros(n_pairs, np.int64),
            total=np.zeros(n_pairs),
            highest=np.full(n_pairs, -np.inf, np.float32),
            lowest=np.full(n_pairs, np.inf, np.float32),
            top_value=np.zeros((n_pairs, n_top), np.float32),
            top_position=_no_positions(n_pairs, n_top, 3),
        )

    def part(self, pairs: slice) -> "PairSums":
        return PairSums(*(array[pairs] for array in self))


class Sums(NamedTuple):
    query: FeatureSums
    key: FeatureSums
    pairs: PairSums

    @classmethod
    def zeros(
        cls,
        d: BilinearQKDictionary,
        n_top: int,
    ) -> "Sums":
        d_query, d_key, _ = d.feature_map.sizes
        count_co_firing = 4 * (d_query**2 + d_key**2) <= CO_OCCURRENCE_BYTES
        return cls(
            query=FeatureSums.zeros(d_query, n_top, count_co_firing),
            key=FeatureSums.zeros(d_key, n_top, count_co_firing),
            pairs=PairSums.zeros(len(d.feature_map), n_top),
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Every array by `part.name`."""
        arrays = {}
        for part, sums in self._asdict().items():
            for name, array in sums._asdict().items():
                arrays[f"{part}.{name}"] = array
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Sums":
        """Inverse of `to_arrays`; KeyError where one is missing."""
        parts = []
        kinds = (FeatureSums, FeatureSums, PairSums)
        for part, kind in zip(cls._fields, kinds, strict=True):
            fields = [arrays[f"{part}.{name}"] for name in kind._fields]
            parts.append(kind(*fields))
        return cls(*parts)


class EncodedRow(NamedTuple):
    """The active features of one row of tokens [pos]."""

    tokens: np.ndarray
    query: ActiveEntries
    key: ActiveEntries

    @classmethod
    def encode(
        cls, d: BilinearQKDictionary, tokens: np.ndarray, x: Float[Tensor, "pos d_model"]
    ) -> "EncodedRow":
        """Rows are encoded one at a time: the same numbers, however they come in batches."""
        features = d.features(x[None].to(d.device))
        return cls(tokens, _finite_entries(features.query), _finite_entries(features.key))


def _finite_entries(acts: Float[Tensor, "1 pos d"]) -> ActiveEntries:
    entries = active_entries(acts.float().cpu())
    is_firing = np.isfinite(entries.value) & (entries.value > 0)
    if not is_firing.all():
        raise ValueError(
            "Features must be finite numbers >= 0: check the layer inputs and the dictionary's "
            "weights."
        )
    return entries


class FeatureEntries(NamedTuple):
    """Active entries by row and feature instead of by position."""

    start: np.ndarray
    """[row * n_features + 1]"""
    position: np.ndarray
    """Ascending within a feature's entries."""
    value: np.ndarray

    @classmethod
    def sort(
        cls,
        entries: ActiveEntries,
        n_pos: int,
        n_features: int,
    ) -> "FeatureEntries":
        n_tokens = len(entries.start) - 1
        n_rows = n_tokens // n_pos
        n_firing = np.diff(entries.start)  # [token]
        token = np.repeat(np.arange(n_tokens), n_firing)  # [entry]
        row, position = np.divmod(token, n_pos)
        code = row * n_features + entries.feature
        order = np.argsort(code, kind="stable")
        counts = np.bincount(code + 1, minlength=n_rows * n_features + 1)
        position = position[order].astype(np.int32)
        return cls(np.cumsum(counts), position, entries.value[order])


class RowAdder:
    """Adds rows to the sums of a dictionary; how they are chunked changes nothing."""

    def __init__(
        self,
        d: BilinearQKDictionary,
        sums: Sums,
    ):
        self.sums = sums
        self._d = d
        pairs = d.feature_map.indices.cpu().numpy()  # sorted: pairs of a group follow each other
        self._query, self._key, _ = pairs.T
        features = pairs[:, :2]
        steps = np.diff(features, axis=0, prepend=-1)
        is_first = steps.any(axis=1)  # [pair]
        self._groups = np.append(np.flatnonzero(is_first), len(pairs))
        """Boundaries of the pairs that differ in the head alone."""
        self._term_table: tuple[slice, np.ndarray] | None = None

    def add(
        self,
        first_row: int,
        rows: list[EncodedRow],
    ) -> None:
        """Add rows first_row, first_row + 1, ..."""
        n_pos = len(rows[0].tokens)
        n_offsets = self._d.spec.n_offsets(n_pos)
        queries = _concatenate([row.query for row in rows])
        keys = _concatenate([row.key for row in rows])
        kernels.add_features(*self.sums.query, first_row, n_pos, *queries)
        kernels.add_features(*self.sums.key, first_row, n_pos, *keys)
        n_queries = len(self.sums.query.count) + 1  # the constants are features here
        n_keys = len(self.sums.key.count) + 1
        query_entries = FeatureEntries.sort(queries, n_pos, n_queries)
        key_entries = FeatureEntries.sort(keys, n_pos, n_keys)
        for groups in self._blocks(n_pos):
            first, *_, end = groups.tolist()
            pairs = slice(first, end)
            kernels.add_pairs(
                *self.sums.pairs.part(pairs),
                numba.get_num_threads(),
                first_row,
                n_pos,
                n_offsets,
                self._terms(pairs, n_pos),
                groups - pairs.start,
                self._query[groups[:-1]],
                self._key[groups[:-1]],
                n_queries,
                n_keys,
                *query_entries,
                *key_entries,
            )

    def _n_columns(self, n_pos: int) -> int:
        """Offsets in the table of terms: one where they do not matter."""
        spec = self._d.spec
        return n_pos if spec.rotary_dim or spec.window else 1

    def _blocks(self, n_pos: int) -> Iterator[np.ndarray]:
        """Boundaries of successive groups whose table fits; a single group always does."""
        pairs_per_block = TABLE_BYTES // (4 * self._n_columns(n_pos))
        begin = 0
        last = len(self._groups) - 1
        while begin < last:
            limit = self._groups[begin] + pairs_per_block
            fits = np.searchsorted(self._groups, limit, side="right")
            end = max(int(fits) - 1, begin + 1)
            yield self._groups[begin : end + 1]
            begin = end

    def _terms(
        self,
        pairs: slice,
        n_pos: int,
    ) -> np.ndarray:
        """m M by pair and offset; a table that serves all pairs is computed once."""
        if self._term_table is None or self._term_table[0] != pairs:
            self._term_table = None  # free it before the next one is there
            feature_map = self._d.feature_map
            indices = feature_map.indices[pairs]
            offsets = torch.arange(self._n_columns(n_pos), device=indices.device)
            table = pair_kernel(indices, self._d.decoders, self._d.spec, offsets)
            table = table * feature_map.weights[pairs, None]  # [pair, offset], or [pair, 1]
            table = table.expand(-1, len(offsets)).contiguous()
            terms = table.float().cpu().numpy()
            self._term_table = (pairs, terms)
        return self._term_table[1]


def _concatenate(rows: list[ActiveEntries]) -> ActiveEntries:
    """Entries of successive rows as those of one batch."""
    n_firing = [np.diff(row.start) for row in rows]  # [pos] each
    counts = np.concatenate([[0], *n_firing])
    return ActiveEntries(
        start=np.cumsum(counts),
        feature=np.concatenate([row.feature for row in rows]),
        value=np.concatenate([row.value for row in rows]),
    )
