"""The running sums behind `activations`, and how encoded rows are added to them."""

# pyright: reportCallIssue=false
# (compiled functions take their arguments from several tuples)

from collections.abc import Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_qk.statistics import kernels as activation_kernels
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.scoring.entries import ActiveEntries, active_entries
from sae_lens_qk.scoring.pairs import pair_kernel

TABLE_BYTES = 1 << 28
"""Of m M by pair and offset that are held at once."""
CO_OCCURRENCE_BYTES = 1 << 30
"""Of feature co-occurrence counts, both sides together; beyond it they are not counted."""


class FeatureSums(NamedTuple):
    """Over the tokens, for one side."""

    count: np.ndarray
    """[d] tokens on which the feature fires."""
    total: np.ndarray
    """[d] sum of its activations."""
    top_value: np.ndarray
    """[d, n_top] strongest first."""
    top_place: np.ndarray
    """[d, n_top, 2] row and position, -1 where there is none."""
    together: np.ndarray
    """[d, d] tokens on which a and b > a both fire; [0, 0] where that is not counted."""

    @classmethod
    def zeros(cls, d: int, n_top: int, counted: bool) -> "FeatureSums":
        top_value, top_place = _empty_lists(d, n_top, 2)
        together = np.zeros((d * counted, d * counted), np.int32)
        return cls(np.zeros(d, np.int64), np.zeros(d), top_value, top_place, together)


class PairSums(NamedTuple):
    """Over the instances of each kept pair, the (query, key <= query) where both of its features fire."""

    count: np.ndarray
    total: np.ndarray
    highest: np.ndarray
    lowest: np.ndarray
    top_value: np.ndarray
    """[pair, n_top] largest magnitude first."""
    top_place: np.ndarray
    """[pair, n_top, 3] row, query and key position, -1 where there is none."""

    @classmethod
    def zeros(cls, n_pairs: int, n_top: int) -> "PairSums":
        top_value, top_place = _empty_lists(n_pairs, n_top, 3)
        highest, lowest = (
            np.full(n_pairs, -np.inf, np.float32),
            np.full(n_pairs, np.inf, np.float32),
        )
        return cls(
            np.zeros(n_pairs, np.int64), np.zeros(n_pairs), highest, lowest, top_value, top_place
        )

    def part(self, pairs: slice) -> "PairSums":
        return PairSums(*(array[pairs] for array in self))


def _empty_lists(n: int, n_top: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((n, n_top), np.float32), np.full((n, n_top, width), -1, np.int32)


class Sums(NamedTuple):
    query: FeatureSums
    key: FeatureSums
    pairs: PairSums

    @classmethod
    def zeros(cls, d_query: int, d_key: int, n_pairs: int, n_top: int) -> "Sums":
        counted = 4 * (d_query**2 + d_key**2) <= CO_OCCURRENCE_BYTES
        query, key = (FeatureSums.zeros(d, n_top, counted) for d in (d_query, d_key))
        return cls(query, key, PairSums.zeros(n_pairs, n_top))

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {
            f"{part}.{name}": array
            for part, sums in self._asdict().items()
            for name, array in sums._asdict().items()
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Sums":
        """Inverse of `to_arrays`; KeyError where one is missing."""

        def part(name: str, kind: Any) -> Any:
            return kind(*(arrays[f"{name}.{field}"] for field in kind._fields))

        return cls(part("query", FeatureSums), part("key", FeatureSums), part("pairs", PairSums))


class EncodedRow(NamedTuple):
    """The active features of one row of tokens [pos]."""

    tokens: np.ndarray
    query: ActiveEntries
    key: ActiveEntries

    @classmethod
    def of(
        cls, d: BilinearQKDictionary, tokens: np.ndarray, x: Float[Tensor, "pos d_model"]
    ) -> "EncodedRow":
        """Rows are encoded one at a time: the same numbers, however they come in batches."""
        row = x[None].to(d.device)
        return cls(tokens, *(_entries(acts) for acts in (d.encode_query(row), d.encode_key(row))))


def _entries(acts: Float[Tensor, "1 pos d"]) -> ActiveEntries:
    entries = active_entries(acts.float().cpu())
    if not (np.isfinite(entries.value) & (entries.value > 0)).all():
        raise ValueError(
            "Features must be finite numbers >= 0: check the layer inputs and the dictionary's weights."
        )
    return entries


class RowAdder:
    """Adds rows to the sums of a dictionary, a chunk at a time; how they are chunked changes nothing."""

    def __init__(self, d: BilinearQKDictionary, sums: Sums):
        self.sums, self._feature_map, self._decoders, self._spec = (
            sums,
            d.feature_map,
            d.decoders,
            d.spec,
        )
        self._query, self._key, _ = d.feature_map.indices.cpu().numpy().T
        is_first = (np.diff(self._query, prepend=-1) != 0) | (np.diff(self._key, prepend=-1) != 0)
        self._groups = np.append(np.flatnonzero(is_first), len(is_first))
        """Boundaries of the pairs that differ in the head alone."""
        self._held: tuple[slice, np.ndarray] | None = None

    def add(self, first_row: int, rows: list[EncodedRow]) -> None:
        """Add rows first_row, first_row + 1, ..."""
        n_pos, sizes = (
            len(rows[0].tokens),
            [len(side.count) + 1 for side in (self.sums.query, self.sums.key)],
        )
        queries, keys = _joined([row.query for row in rows]), _joined([row.key for row in rows])
        for side, entries in ((self.sums.query, queries), (self.sums.key, keys)):
            activation_kernels.add_features(*side, first_row, n_pos, *entries)
        by_feature = _by_feature(queries, n_pos, sizes[0]), _by_feature(keys, n_pos, sizes[1])
        for groups in self._blocks(n_pos):
            pairs = slice(int(groups[0]), int(groups[-1]))
            features = self._query[groups[:-1]], self._key[groups[:-1]]
            activation_kernels.add_pairs(
                *self.sums.pairs.part(pairs),
                numba.get_num_threads(),
                first_row,
                n_pos,
                self._terms(pairs, n_pos),
                groups - pairs.start,
                *features,
                *sizes,
                *by_feature[0],
                *by_feature[1],
            )

    def _blocks(self, n_pos: int) -> Iterator[np.ndarray]:
        """Boundaries of successive groups whose table fits; a single group always does."""
        per_block = TABLE_BYTES // (4 * (n_pos if self._spec.rotary_dim else 1))
        begin, last = 0, len(self._groups) - 1
        while begin < last:
            end = (
                int(np.searchsorted(self._groups, self._groups[begin] + per_block, side="right"))
                - 1
            )
            end = max(end, begin + 1)
            yield self._groups[begin : end + 1]
            begin = end

    def _terms(self, pairs: slice, n_pos: int) -> np.ndarray:
        """m M by pair and offset; a table that serves all pairs is made once."""
        if self._held is None or self._held[0] != pairs:
            self._held = None
            indices, weights = (
                self._feature_map.indices[pairs],
                self._feature_map.weights[pairs, None],
            )
            table = pair_kernel(
                indices, self._decoders, self._spec, torch.arange(n_pos, device=indices.device)
            )
            self._held = pairs, table.mul_(weights).float().cpu().numpy()
        return self._held[1]


def _joined(rows: list[ActiveEntries]) -> ActiveEntries:
    before = np.cumsum([0, *(len(row.feature) for row in rows)])
    starts = [row.start[:-1] + n for row, n in zip(rows, before[:-1], strict=True)]
    features, values = ([getattr(row, name) for row in rows] for name in ("feature", "value"))
    return ActiveEntries(
        np.concatenate([*starts, before[-1:]]), np.concatenate(features), np.concatenate(values)
    )


def _by_feature(
    entries: ActiveEntries, n_pos: int, n_features: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Active entries by row and feature: start, positions (ascending), values."""
    n_tokens = len(entries.start) - 1
    row, pos = np.divmod(np.repeat(np.arange(n_tokens), np.diff(entries.start)), n_pos)
    code = row * n_features + entries.feature
    order = np.argsort(code, kind="stable")
    start = np.cumsum(np.bincount(code + 1, minlength=n_tokens // n_pos * n_features + 1))
    return start, pos[order].astype(np.int32), entries.value[order]
