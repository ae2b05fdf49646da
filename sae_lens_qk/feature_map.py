"""The sparse feature map: which (query feature, key feature, head) triples carry attention.

A pair (a, b, h) with weight m adds to the scores of head h

    m * query_acts[i, a] * key_acts[j, b] * M[a, b, h](i - j),
    M[a, b, h](delta) = scale * <R_delta W_dec_q[a, h], W_dec_k[b, g(h)]>

Index `d_query` (`d_key`) is the constant feature: activation 1, decoder row b_dec. Constant x
constant belongs to every map with weight 1 and is not listed.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.scoring.pairs import Decoders, constant_scores
from sae_lens_qk.scoring.scorer import PairScorer

Pairs = Int[Tensor, "pair 3"] | np.ndarray | Sequence[Sequence[int]]
"""Triples (query feature, key feature, head)."""

Numbers = SupportsIndex | Iterable[SupportsIndex]
"""One number or several."""

STATISTICS = ("importance", "effect", "co_occurrence")
_DENSE_LIMIT = 1 << 28


class Features(NamedTuple):
    """The features of a batch, encoded once and handed on."""

    query: Float[Tensor, "batch pos_q d_query"]
    key: Float[Tensor, "batch pos_k d_key"]


class SparseFeatureMap(nn.Module):
    """(query feature, key feature, head) triples with weights in [0, 1], sorted by their indices.

    Args:
        indices: integers [pair, 3]: query feature in [0, d_query], key feature in [0, d_key], head.
        weights: [pair] in [0, 1].
        d_query, d_key, n_heads: the sizes that the indices refer to.
        statistics: [pair, 3] measured on data, zeros where nothing was (see `STATISTICS`):
            importance, what dropping the pair costs to leading order (nats per query); effect, mean
            of its unmasked score over the positions where both features fire; co_occurrence, the
            share of (query, allowed key) positions where they do.
    Raises:
        ValueError: wrong shapes, indices out of range, duplicate pairs, the constant x constant
            pair, or weights that are not finite numbers in [0, 1].
    """

    indices: Tensor
    weights: Tensor
    statistics: Tensor

    def __init__(
        self,
        indices: Pairs,
        weights: Tensor,
        d_query: int,
        d_key: int,
        n_heads: int,
        statistics: Tensor | None = None,
    ):
        super().__init__()
        self.d_query = d_query
        self.d_key = d_key
        self.n_heads = n_heads
        pairs = as_pairs(indices, weights.device)
        if statistics is None:
            statistics = weights.new_zeros(len(pairs), len(STATISTICS))
        _check_shapes(pairs, weights, statistics)
        if len(pairs) and not pairs.is_meta:
            self._check_pairs(pairs)
            self._check_weights(weights)
            if not statistics.isfinite().all():
                raise ValueError(
                    "Pair statistics must be finite: give zeros where nothing was measured."
                )
        # sorted, so that `find` can search and equal maps have equal tensors
        order = self._codes(pairs).argsort()
        self.register_buffer("indices", pairs[order])
        self.register_buffer("weights", weights.detach()[order])
        self.register_buffer("statistics", statistics.detach()[order])

    @classmethod
    def empty(
        cls,
        n_pairs: int,
        d_query: int,
        d_key: int,
        n_heads: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "SparseFeatureMap":
        """A map of unset pairs, to be filled by `load_state_dict`.

        SAELens builds modules on the device `meta` first.
        """
        no_weights = torch.empty(0, dtype=dtype, device=device)
        feature_map = cls([], no_weights, d_query, d_key, n_heads)
        # set afterwards: unset pairs are all alike, which the constructor refuses
        weights = torch.ones(n_pairs, dtype=dtype, device=device)
        feature_map.indices = feature_map.indices.new_zeros(n_pairs, 3)
        feature_map.weights = weights
        feature_map.statistics = weights.new_zeros(n_pairs, len(STATISTICS))
        return feature_map

    @classmethod
    def all_pairs(
        cls, d_query: int, d_key: int, n_heads: int, dtype: torch.dtype = torch.float32
    ) -> "SparseFeatureMap":
        """Every pair with weight 1, constants included; for small sizes."""
        features = torch.arange(d_query + 1), torch.arange(d_key + 1)
        pairs = torch.cartesian_prod(*features, torch.arange(n_heads))
        pairs = pairs[:-n_heads]  # constant x constant comes last
        weights = torch.ones(len(pairs), dtype=dtype)
        return cls(pairs, weights, d_query, d_key, n_heads)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(d_query, d_key, n_heads)."""
        return self.d_query, self.d_key, self.n_heads

    def __len__(self) -> int:
        return len(self.indices)

    def extra_repr(self) -> str:
        sides = f"{self.d_query} query features, {self.d_key} key features"
        return f"{len(self)} pairs of {sides}, {self.n_heads} heads"

    # What is refused

    def _check_pairs(self, pairs: Tensor) -> None:
        # the constants have the numbers d_query and d_key
        largest = pairs.new_tensor([self.d_query, self.d_key, self.n_heads - 1])
        foreign = (pairs < 0) | (pairs > largest)  # [pair, 3]
        if foreign.any():
            low = pairs.amin(dim=0).tolist()
            high = pairs.amax(dim=0).tolist()
            raise ValueError(
                f"Pair indices must lie in [0, {self.d_query}] x [0, {self.d_key}] x "
                f"[0, {self.n_heads - 1}] (query feature, key feature, head), got {low} to {high}: "
                "the map belongs to another dictionary."
            )
        is_constant = pairs[:, :2] == largest[:2]  # [pair, 2]
        if is_constant.all(dim=1).any():
            raise ValueError(
                "The constant x constant pair is part of every map and must not be listed."
            )
        codes, order = self._codes(pairs).sort()
        repeated = order[1:][codes.diff() == 0]
        if len(repeated):
            pair = tuple(pairs[repeated[0]].tolist())
            raise ValueError(f"The map lists the pair {pair} twice: merge duplicates first.")

    def _check_weights(self, weights: Tensor) -> None:
        if not ((weights >= 0) & (weights <= 1)).all():  # false for NaN
            raise ValueError("Pair weights must be finite numbers in [0, 1]: clamp them first.")

    # Pairs

    def _codes(self, pairs: Tensor) -> Int[Tensor, " pair"]:
        """One number per pair, ordered as the pairs are."""
        query, key, head = pairs.unbind(dim=1)
        features = query * (self.d_key + 1) + key
        return features * self.n_heads + head

    def find(self, pairs: Pairs) -> Int[Tensor, " pair"]:
        """Row of each pair in this map, -1 where it is not listed."""
        pairs = as_pairs(pairs, self.indices.device)
        codes = self._codes(pairs)
        if not len(self):
            return torch.full_like(codes, -1)
        own_codes = self._codes(self.indices)
        # clamped: a code past the last one has no row to compare with
        rows = torch.searchsorted(own_codes, codes).clamp(max=len(self) - 1)
        # compared as triples: pairs out of range may share a code
        is_listed = (self.indices[rows] == pairs).all(dim=1)  # [pair]
        return rows.where(is_listed, -1)

    def _rebuilt(
        self,
        indices: Tensor,
        weights: Tensor,
        statistics: Tensor,
    ) -> "SparseFeatureMap":
        return type(self)(indices, weights, *self.sizes, statistics)

    def select(self, rows: Tensor) -> "SparseFeatureMap":
        """The pairs at the given rows or where a bool mask is True."""
        indices = self.indices[rows]
        weights = self.weights[rows]
        return self._rebuilt(indices, weights, self.statistics[rows])

    def restrict(
        self,
        heads: Numbers | None = None,
        query_features: Numbers | None = None,
        key_features: Numbers | None = None,
    ) -> "SparseFeatureMap":
        """The pairs of the given heads, query features and key features; None: of all."""
        mask = torch.ones_like(self.weights, dtype=torch.bool)  # [pair]
        for column, numbers in enumerate((query_features, key_features, heads)):
            if numbers is not None:
                values = self.indices.new_tensor(_as_list(numbers))
                mask &= torch.isin(self.indices[:, column], values)
        return self.select(mask)

    def reweighted(self, weights: Tensor) -> "SparseFeatureMap":
        """These pairs with other weights."""
        return self._rebuilt(self.indices, weights, self.statistics)

    def measured_as(self, other: "SparseFeatureMap") -> "SparseFeatureMap":
        """These pairs and weights with the statistics that `other` has of them, zeros elsewhere."""
        rows = other.find(self.indices)
        is_listed = rows >= 0
        statistics = torch.zeros_like(self.statistics)
        other_rows = rows[is_listed]
        statistics[is_listed] = other.statistics[other_rows].to(statistics.dtype)
        return self._rebuilt(self.indices, self.weights, statistics)

    def __or__(self, other: "SparseFeatureMap") -> "SparseFeatureMap":
        """Union, with dict semantics: of pairs in both maps, the right one's weight and statistics.

        Raises:
            ValueError: the maps belong to dictionaries of other sizes.
        """
        if self.sizes != other.sizes:
            raise ValueError(
                f"Maps of (d_query, d_key, n_heads) = {self.sizes} and {other.sizes} "
                "cannot be merged."
            )
        is_unique = other.find(self.indices) < 0  # [pair]
        unique = self.select(is_unique)
        return self._rebuilt(
            torch.cat([unique.indices, other.indices]),
            torch.cat([unique.weights, other.weights]),
            torch.cat([unique.statistics, other.statistics]),
        )

    def to_dense(self) -> Float[Tensor, "d_query_1 d_key_1 head"]:
        """The mask as a dense array, constant x constant included (weight 1); for small sizes.

        Raises:
            MemoryError: more than 268M entries.
        """
        shape = (self.d_query + 1, self.d_key + 1, self.n_heads)
        if math.prod(shape) > _DENSE_LIMIT:
            raise MemoryError(
                f"A dense mask of {shape} entries is too large: work with indices and weights."
            )
        dense = self.weights.new_zeros(shape)
        # a tuple of three columns indexes three axes
        dense[tuple(self.indices.T)] = self.weights
        dense[self.d_query, self.d_key] = 1.0
        return dense

    # Scores

    def scores(
        self,
        features: Features,
        decoders: Decoders,
        spec: AttentionSpec,
        include_constant: bool = True,
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """Scores of the listed pairs at allowed keys, zero at the others.

        Differentiable in activations and decoders.

        Args:
            include_constant: add the constant x constant term, which belongs to every map.
        """
        scorer = PairScorer(self.indices, decoders, spec)
        scores = scorer(self.weights, features.query, features.key)
        if include_constant:
            n_pos = features.query.shape[1]
            scores = scores + constant_scores(decoders, spec, n_pos).to(scores.dtype)
        return scores

    def count_active(
        self,
        features: Features,
        spec: AttentionSpec,
    ) -> int:
        """Number of (sequence, query, allowed key, listed pair) at which both features fire."""
        # with unit decoders, activations and weights the score of a cell is its number of pairs
        unit_spec = AttentionSpec(
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            d_head=1,
            d_model=1,
            scale=1.0,
            window=spec.window,
        )
        device = features.query.device
        d_query_1 = self.d_query + 1
        d_key_1 = self.d_key + 1
        query_rows = torch.ones(d_query_1, self.n_heads, 1, device=device)
        key_rows = torch.ones(d_key_1, self.n_heads, 1, device=device)
        unit_decoders = Decoders(query_rows, key_rows)
        scorer = PairScorer(self.indices, unit_decoders, unit_spec)
        unit_weights = torch.ones(len(self), device=device)
        query_fires = (features.query > 0).float()
        key_fires = (features.key > 0).float()
        counts = scorer(unit_weights, query_fires, key_fires)  # [batch, head, pos_q, pos_k]
        # float64: float32 loses count at 2^24
        return int(counts.double().sum())


def as_pairs(
    pairs: Pairs,
    device: torch.device | str = "cpu",
) -> Int[Tensor, "pair 3"]:
    """Pairs as an int64 tensor [pair, 3].

    Raises:
        ValueError: not integers, or not triples.
    """
    # copied, because pandas hands out read-only views
    numbers = pairs if isinstance(pairs, Tensor) else np.array(pairs)
    triples = torch.as_tensor(numbers, device=device)
    if triples.numel() == 0:
        return torch.zeros(0, 3, dtype=torch.int64, device=device)
    are_triples = triples.ndim == 2 and triples.shape[1] == 3
    if triples.is_floating_point() or not are_triples:
        raise ValueError(
            "Pairs are integer triples (query feature, key feature, head), "
            f"got {triples.dtype} of shape {list(triples.shape)}."
        )
    return triples.to(torch.int64)


def _as_list(numbers: Numbers) -> list[int]:
    if isinstance(numbers, Tensor | np.ndarray):
        numbers = numbers.tolist()  # a single number where there are no axes
    if isinstance(numbers, Iterable):
        return [operator.index(number) for number in numbers]
    return [operator.index(numbers)]


def _check_shapes(
    pairs: Tensor,
    weights: Tensor,
    statistics: Tensor,
) -> None:
    n_pairs = len(pairs)
    statistics_shape = (n_pairs, len(STATISTICS))
    if weights.shape != (n_pairs,) or statistics.shape != statistics_shape:
        raise ValueError(
            "A feature map needs indices [n_pairs, 3], weights [n_pairs] and statistics "
            f"[n_pairs, 3], got {list(pairs.shape)}, {list(weights.shape)} and "
            f"{list(statistics.shape)}."
        )
