"""The sparse feature map: which (query feature, key feature, head) triples carry attention, and how strongly.

A pair (a, b, h) with weight m adds to the scores of head h

    m * query_acts[i, a] * key_acts[j, b] * M[a, b, h](i - j),
    M[a, b, h](delta) = scale * <R_delta W_dec_q[a, h], W_dec_k[b, g(h)]>

Index `d_query` (`d_key`) is the constant feature: activation 1, decoder row b_dec. Constant x constant belongs to every
map with weight 1 and is not listed.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.scoring.pairs import Decoders, constant_scores
from sae_lens_qk.scoring.scorer import PairScorer

Pairs = Int[Tensor, "pair 3"] | np.ndarray | Sequence[Sequence[int]]
"""Triples (query feature, key feature, head)."""

Wanted = int | np.integer | Iterable[int] | np.ndarray | None
"""One number, several, or (None) all."""

_DIGITS = 4  # base 256: bfloat16 holds integers up to 256 exactly
_DENSE_LIMIT = 1 << 28
_LEAST = 1e-30  # stands for zero where statistics are stored as logarithms
STATISTICS = ("importance", "effect", "co_occurrence")


class Features(NamedTuple):
    """The features of a batch, encoded once and handed on."""

    query: Float[Tensor, "batch pos_q d_query"]
    key: Float[Tensor, "batch pos_k d_key"]


class SparseFeatureMap(nn.Module):
    """Kept (query feature, key feature, head) triples with weights in [0, 1], sorted by their indices.

    Args:
        indices: [n_pairs, 3] integers, one row a pair: query feature in [0, d_query], key feature in [0, d_key], head.
        weights: [n_pairs] in [0, 1].
        d_query, d_key, n_heads: the sizes the indices refer to.
        statistics: [n_pairs, 3] measured on data, zeros where nothing was (see `STATISTICS`): importance, what dropping
            the pair costs to leading order (nats a query); effect, mean of its unmasked score over the positions where
            both features fire; co_occurrence, the share of (query, allowed key) positions where they do.
    Raises:
        ValueError: wrong shapes, indices out of range, duplicate pairs, the constant x constant pair, or weights that
            are not finite numbers in [0, 1].
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
        self.d_query, self.d_key, self.n_heads = d_query, d_key, n_heads
        listed = as_pairs(indices, weights.device)
        if statistics is None:
            statistics = weights.new_zeros(len(listed), len(STATISTICS))
        self._check_values(listed, weights, statistics)
        order = self._codes(listed).argsort()
        self.register_buffer("indices", listed[order])
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
        """A map of unset pairs, to be filled by `load_state_dict` (SAELens builds modules on `meta` first)."""
        made = cls([], torch.empty(0, dtype=dtype, device=device), d_query, d_key, n_heads)
        made.indices = torch.zeros(n_pairs, 3, dtype=torch.int64, device=device)
        made.weights = torch.ones(n_pairs, dtype=dtype, device=device)
        made.statistics = torch.zeros(n_pairs, len(STATISTICS), dtype=dtype, device=device)
        return made

    @classmethod
    def all_pairs(
        cls, d_query: int, d_key: int, n_heads: int, dtype: torch.dtype = torch.float32
    ) -> "SparseFeatureMap":
        """Every pair with weight 1, constants included; for small sizes."""
        everything = torch.cartesian_prod(
            torch.arange(d_query + 1), torch.arange(d_key + 1), torch.arange(n_heads)
        )
        constant = (everything[:, 0] == d_query) & (everything[:, 1] == d_key)
        listed = everything[~constant]
        return cls(listed, torch.ones(len(listed), dtype=dtype), d_query, d_key, n_heads)

    def __len__(self) -> int:
        return len(self.indices)

    def extra_repr(self) -> str:
        return f"{len(self)} pairs of {self.d_query} query features, {self.d_key} key features, {self.n_heads} heads"

    def _check_values(self, indices: Tensor, weights: Tensor, statistics: Tensor) -> None:
        if (
            indices.shape != (len(weights), 3)
            or weights.ndim != 1
            or statistics.shape != (len(weights), len(STATISTICS))
        ):
            raise ValueError(
                "A feature map needs indices [n_pairs, 3], weights [n_pairs] and statistics [n_pairs, 3], "
                f"got {list(indices.shape)}, {list(weights.shape)} and {list(statistics.shape)}."
            )
        if indices.is_meta or not len(indices):
            return
        upper = torch.tensor([self.d_query, self.d_key, self.n_heads - 1], device=indices.device)
        low, high = indices.amin(dim=0), indices.amax(dim=0)
        if (low < 0).any() or (high > upper).any():
            raise ValueError(
                f"Pair indices must lie in [0, {self.d_query}] x [0, {self.d_key}] x [0, {self.n_heads - 1}] (query "
                f"feature, key feature, head), got {low.tolist()} to {high.tolist()}: the map belongs to another dictionary."
            )
        if ((indices[:, 0] == self.d_query) & (indices[:, 1] == self.d_key)).any():
            raise ValueError(
                "The constant x constant pair is part of every map and must not be listed."
            )
        codes, order = self._codes(indices).sort()
        repeated = order[1:][codes.diff() == 0]
        if len(repeated):
            raise ValueError(
                f"The map lists the pair {tuple(indices[repeated[0]].tolist())} twice: merge duplicates first."
            )
        self._check_weights(weights)
        if not statistics.isfinite().all():
            raise ValueError(
                "Pair statistics must be finite: give zeros where nothing was measured."
            )

    def _check_weights(self, weights: Tensor) -> None:
        if not (weights.isfinite() & (weights >= 0) & (weights <= 1)).all():
            raise ValueError("Pair weights must be finite numbers in [0, 1]: clamp them first.")

    def _codes(self, pairs: Tensor) -> Int[Tensor, " pair"]:
        """One number a pair, ordered as the pairs are."""
        return (pairs[:, 0] * (self.d_key + 1) + pairs[:, 1]) * self.n_heads + pairs[:, 2]

    def find(self, pairs: Pairs) -> Int[Tensor, " pair"]:
        """Row of each pair in this map, -1 where it is not listed."""
        pairs = as_pairs(pairs, self.indices.device)
        wanted = self._codes(pairs)
        if not len(self):
            return torch.full_like(wanted, -1)
        at = torch.searchsorted(self._codes(self.indices), wanted).clamp(max=len(self) - 1)
        return torch.where(
            (self.indices[at] == pairs).all(dim=1), at, -1
        )  # foreign pairs may share a code

    def select(self, keep: Tensor) -> "SparseFeatureMap":
        """The pairs at the given rows or where a bool mask is True."""
        return type(self)(
            self.indices[keep],
            self.weights[keep],
            self.d_query,
            self.d_key,
            self.n_heads,
            self.statistics[keep],
        )

    def restrict(
        self,
        heads: Wanted = None,
        query_features: Wanted = None,
        key_features: Wanted = None,
    ) -> "SparseFeatureMap":
        """The pairs of the given heads, query features and key features; None: of all."""
        keep = torch.ones(len(self), dtype=torch.bool, device=self.indices.device)
        for column, wanted in enumerate((query_features, key_features, heads)):
            if wanted is not None:
                values = list(wanted) if isinstance(wanted, Iterable) else [wanted]
                keep &= torch.isin(self.indices[:, column], self.indices.new_tensor(values))
        return self.select(keep)

    def reweighted(self, weights: Tensor) -> "SparseFeatureMap":
        return type(self)(
            self.indices, weights, self.d_query, self.d_key, self.n_heads, self.statistics
        )

    def measured_as(self, other: "SparseFeatureMap") -> "SparseFeatureMap":
        """These pairs and weights with the statistics that `other` has of them, zeros where it does not list them."""
        at = other.find(self.indices)
        statistics = torch.zeros_like(self.statistics)
        statistics[at >= 0] = other.statistics[at[at >= 0]].to(statistics.dtype)
        return type(self)(self.indices, self.weights, *self._sizes, statistics)

    def __or__(self, other: "SparseFeatureMap") -> "SparseFeatureMap":
        """The pairs of both, as of dicts: where both list a pair, the right one's weight and statistics.

        Raises:
            ValueError: the maps belong to dictionaries of other sizes.
        """
        if self._sizes != other._sizes:
            raise ValueError(
                f"Maps of (d_query, d_key, n_heads) = {self._sizes} and {other._sizes} cannot be merged."
            )
        mine = self.select(other.find(self.indices) < 0)
        parts = [
            torch.cat([getattr(m, name) for m in (mine, other)])
            for name in ("indices", "weights", "statistics")
        ]
        return type(self)(parts[0], parts[1], *self._sizes, parts[2])

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.d_query, self.d_key, self.n_heads

    def to_dense(self) -> Float[Tensor, "d_query_1 d_key_1 head"]:
        """The mask as a dense array, constant x constant included (weight 1); for small sizes.

        Raises:
            MemoryError: more than 268M entries.
        """
        shape = self.d_query + 1, self.d_key + 1, self.n_heads
        if np.prod(shape, dtype=float) > _DENSE_LIMIT:
            raise MemoryError(
                f"A dense mask of {shape} entries is too large: work with indices and weights."
            )
        dense = self.weights.new_zeros(shape)
        dense[tuple(self.indices.T)] = self.weights
        dense[self.d_query, self.d_key] = 1.0
        return dense

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

    def count_active(self, features: Features, spec: AttentionSpec) -> int:
        """Number of (sequence, query, allowed key, listed pair) at which both features fire."""
        # with unit decoders, activations and weights the score of a cell is its number of pairs
        unit_spec = AttentionSpec(
            self.n_heads, self.n_heads, d_head=1, d_model=1, scale=1.0, window=spec.window
        )
        device = features.query.device
        unit_decoders = Decoders(
            query=torch.ones(self.d_query + 1, self.n_heads, 1, device=device),
            key=torch.ones(self.d_key + 1, self.n_heads, 1, device=device),
        )
        scorer = PairScorer(self.indices, unit_decoders, unit_spec)
        unit_weights = torch.ones(len(self), device=device)
        counts = scorer(unit_weights, (features.query > 0).float(), (features.key > 0).float())
        return int(counts.double().sum())


def as_pairs(pairs: Pairs, device: torch.device | str = "cpu") -> Int[Tensor, "pair 3"]:
    """Pairs as an int64 tensor [n, 3].

    Raises:
        ValueError: not integers, or not triples.
    """
    writable = (
        pairs if isinstance(pairs, Tensor) else np.array(pairs)
    )  # pandas hands out read-only views
    made = torch.as_tensor(writable, device=device)
    if made.numel() == 0:
        return torch.zeros(0, 3, dtype=torch.int64, device=device)
    if made.is_floating_point() or made.ndim != 2 or made.shape[1] != 3:
        raise ValueError(
            f"Pairs are integer triples (query feature, key feature, head), got {made.dtype} of shape {list(made.shape)}."
        )
    return made.to(torch.int64)


def pack_indices(indices: Int[Tensor, "pair 3"]) -> Tensor:
    """Base-256 digits [n_pairs, 3, 4] as bytes, least significant first: exact in every dtype a loader may cast them to."""
    shifts = torch.arange(_DIGITS, device=indices.device) * 8
    return ((indices[..., None] >> shifts) & 255).to(torch.uint8)


def unpack_indices(digits: Tensor) -> Int[Tensor, "pair 3"]:
    """Inverse of `pack_indices`.

    Raises:
        ValueError: not the digits of triples, as in a damaged file.
    """
    if (
        digits.shape[1:] != (3, _DIGITS)
        or not ((digits >= 0) & (digits <= 255) & (digits == digits.round())).all()
    ):
        raise ValueError(
            f"Packed pairs must be integers 0 to 255 of shape [n_pairs, 3, {_DIGITS}], got shape {list(digits.shape)} with "
            "other values or axes: the file is damaged."
        )
    shifts = torch.arange(_DIGITS, device=digits.device) * 8
    return (digits.round().to(torch.int64) << shifts).sum(dim=-1)


def pack_statistics(statistics: Float[Tensor, "pair 3"]) -> Tensor:
    """Importance and co-occurrence as logarithms: their range is beyond float16's. Inverse: `unpack_statistics`."""
    importance, effect, co_occurrence = _at_least_float32(statistics).unbind(dim=1)
    logs = [values.clamp(min=_LEAST).log() for values in (importance, co_occurrence)]
    return torch.stack([logs[0], effect, logs[1]], dim=1).to(statistics.dtype)


def unpack_statistics(packed: Float[Tensor, "pair 3"]) -> Tensor:
    importance, effect, co_occurrence = _at_least_float32(packed).unbind(dim=1)
    values = [
        log.exp() * (log > np.log(4 * _LEAST)) for log in (importance, co_occurrence)
    ]  # zero stays zero
    return torch.stack([values[0], effect, values[1]], dim=1).to(packed.dtype)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
