"""The sparse feature map: which (query feature, key feature, head) triples carry attention, and how strongly.

A pair (a, b, h) with weight m adds to the scores of head h

    m * query_acts[i, a] * key_acts[j, b] * M[a, b, h](i - j),
    M[a, b, h](delta) = scale * <R_delta W_dec_q[a, h], W_dec_k[b, g(h)]>

Index `d_query` (`d_key`) is the constant feature: activation 1, decoder row b_dec. Constant x constant belongs to every
map with weight 1 and is not listed. Everything here touches only active x kept entries.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lens_qk.attention import AttentionSpec, rotary_cos_sin
from sae_lens_qk.kernels import gather_gradient, scatter_scores

Pairs = Int[Tensor, "pair 3"] | np.ndarray | Sequence[Sequence[int]]
"""Triples (query feature, key feature, head)."""

_DIGITS = 4  # base 256: bfloat16 holds integers up to 256 exactly


class Decoders(NamedTuple):
    """Both decoders with the constant feature as their last row."""

    query: Float[Tensor, "d_query_1 head d_head"]
    key: Float[Tensor, "d_key_1 kv_head d_head"]


class SparseFeatureMap(nn.Module):
    """Kept (query feature, key feature, head) triples with weights in [0, 1].

    Args:
        indices: [n_pairs, 3] integers, one row a pair: query feature in [0, d_query], key feature in [0, d_key], head.
        weights: [n_pairs] in [0, 1].
        d_query, d_key, n_heads: the sizes the indices refer to.
    Raises:
        ValueError: wrong shapes, indices out of range, duplicate pairs, the constant x constant pair, or weights that
            are not finite numbers in [0, 1].
    """

    indices: Tensor
    weights: Tensor

    def __init__(self, indices: Pairs, weights: Tensor, d_query: int, d_key: int, n_heads: int):
        super().__init__()
        self.d_query, self.d_key, self.n_heads = d_query, d_key, n_heads
        self.register_buffer("indices", as_pairs(indices, weights.device))
        self.register_buffer("weights", weights.detach().clone())
        self.validate()

    @classmethod
    def empty(
        cls, n_pairs: int, d_query: int, d_key: int, n_heads: int, dtype: torch.dtype, device: torch.device | str
    ) -> "SparseFeatureMap":
        """A map of unset pairs, to be filled by `load_state_dict` (SAELens builds modules on `meta` first)."""
        made = cls([], torch.empty(0, dtype=dtype, device=device), d_query, d_key, n_heads)
        made.indices = torch.zeros(n_pairs, 3, dtype=torch.int64, device=device)
        made.weights = torch.ones(n_pairs, dtype=dtype, device=device)
        return made

    def __len__(self) -> int:
        return len(self.indices)

    def validate(self) -> None:
        if self.indices.shape != (len(self.weights), 3) or self.weights.ndim != 1:
            raise ValueError(
                "A feature map needs indices [n_pairs, 3] and weights [n_pairs], "
                f"got {list(self.indices.shape)} and {list(self.weights.shape)}."
            )
        if self.indices.is_meta or not len(self):
            return
        upper = torch.tensor([self.d_query, self.d_key, self.n_heads - 1], device=self.indices.device)
        low, high = self.indices.amin(dim=0), self.indices.amax(dim=0)
        if (low < 0).any() or (high > upper).any():
            raise ValueError(
                f"Pair indices must lie in [0, {self.d_query}] x [0, {self.d_key}] x [0, {self.n_heads - 1}] (query "
                f"feature, key feature, head), got {low.tolist()} to {high.tolist()}: the map belongs to another dictionary."
            )
        if ((self.indices[:, 0] == self.d_query) & (self.indices[:, 1] == self.d_key)).any():
            raise ValueError("The constant x constant pair is part of every map and must not be listed.")
        if self._codes().unique().numel() != len(self):
            raise ValueError("The map lists a pair twice: merge duplicates first.")
        if not (self.weights.isfinite() & (self.weights >= 0) & (self.weights <= 1)).all():
            raise ValueError("Pair weights must be finite numbers in [0, 1]: clamp them first.")

    def _codes(self) -> Int[Tensor, " pair"]:
        query, key, head = self.indices.unbind(dim=1)
        return (query * (self.d_key + 1) + key) * self.n_heads + head

    def find(self, pairs: Pairs) -> Int[Tensor, " pair"]:
        """Row of each pair in this map, -1 where it is not listed."""
        pairs = as_pairs(pairs, self.indices.device)
        wanted = SparseFeatureMap._codes_of(pairs, self.d_key, self.n_heads)
        if not len(self):
            return torch.full_like(wanted, -1)
        codes, order = self._codes().sort()
        at = order[torch.searchsorted(codes, wanted).clamp(max=len(codes) - 1)]
        return torch.where((self.indices[at] == pairs).all(dim=1), at, -1)  # foreign pairs may share a code

    @staticmethod
    def _codes_of(pairs: Tensor, d_key: int, n_heads: int) -> Tensor:
        return (pairs[:, 0] * (d_key + 1) + pairs[:, 1]) * n_heads + pairs[:, 2]

    def select(self, keep: Tensor) -> "SparseFeatureMap":
        """The pairs at the given rows or where a bool mask is True."""
        return SparseFeatureMap(self.indices[keep], self.weights[keep], self.d_query, self.d_key, self.n_heads)

    def reweighted(self, weights: Tensor) -> "SparseFeatureMap":
        return SparseFeatureMap(self.indices, weights, self.d_query, self.d_key, self.n_heads)

    def to_dense(self) -> Float[Tensor, "d_query_1 d_key_1 head"]:
        """The mask as a dense array, constant x constant included (weight 1); for small sizes."""
        dense = self.weights.new_zeros(self.d_query + 1, self.d_key + 1, self.n_heads)
        dense[tuple(self.indices.T)] = self.weights
        dense[self.d_query, self.d_key] = 1.0
        return dense

    @classmethod
    def all_pairs(cls, d_query: int, d_key: int, n_heads: int, dtype: torch.dtype = torch.float32) -> "SparseFeatureMap":
        """Every pair with weight 1, constants included; for small sizes."""
        everything = torch.cartesian_prod(torch.arange(d_query + 1), torch.arange(d_key + 1), torch.arange(n_heads))
        constant = (everything[:, 0] == d_query) & (everything[:, 1] == d_key)
        listed = everything[~constant]
        return cls(listed, torch.ones(len(listed), dtype=dtype), d_query, d_key, n_heads)

    def scores(
        self,
        query_acts: Float[Tensor, "batch pos_q d_query"],
        key_acts: Float[Tensor, "batch pos_k d_key"],
        decoders: Decoders,
        spec: AttentionSpec,
        include_constant: bool = True,
        weights: Float[Tensor, " pair"] | None = None,
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """Scores of the listed pairs at allowed keys (zero at future keys).

        Args:
            include_constant: add the constant x constant term, which belongs to every map.
            weights: used instead of the map's own, and differentiable: what step 2 trains.
        """
        n_pos = query_acts.shape[1]
        kernel = pair_kernel(self.indices, decoders, spec, torch.arange(n_pos, device=query_acts.device))
        query_acts, key_acts = with_constant(query_acts).to(kernel.dtype), with_constant(key_acts).to(kernel.dtype)
        weights = (self.weights if weights is None else weights).to(kernel.dtype)
        scores = _PairScores.apply(weights, query_acts, key_acts, self.indices, kernel, self.n_heads)
        assert isinstance(scores, Tensor)
        if include_constant:
            scores = scores + constant_scores(decoders, spec, n_pos).to(scores.dtype)
        return scores

    def count_active(
        self, query_acts: Float[Tensor, "batch pos_q d_query"], key_acts: Float[Tensor, "batch pos_k d_key"]
    ) -> int:
        """Number of (sequence, query, allowed key, listed pair) at which both features fire."""
        fires = [(with_constant(acts) > 0).float() for acts in (query_acts, key_acts)]
        ones = torch.ones(len(self), 1)
        counts = _PairScores.apply(ones[:, 0], *fires, self.indices, ones, self.n_heads)
        assert isinstance(counts, Tensor)
        return int(counts.double().sum())


def as_pairs(pairs: Pairs, device: torch.device | str = "cpu") -> Int[Tensor, "pair 3"]:
    """Pairs as an int64 tensor [n, 3].

    Raises:
        ValueError: not integers, or not triples.
    """
    made = torch.as_tensor(np.asarray(pairs) if not isinstance(pairs, Tensor) else pairs, device=device)
    if made.numel() == 0:
        return torch.zeros(0, 3, dtype=torch.int64, device=device)
    if made.is_floating_point() or made.ndim != 2 or made.shape[1] != 3:
        raise ValueError(
            f"Pairs are integer triples (query feature, key feature, head), got {made.dtype} of shape {list(made.shape)}."
        )
    return made.to(torch.int64)


def with_constant(acts: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d_1"]:
    """Append the constant feature, activation 1."""
    return torch.cat([acts, acts.new_ones(*acts.shape[:-1], 1)], dim=-1)


def pair_kernel(
    indices: Int[Tensor, "pair 3"], decoders: Decoders, spec: AttentionSpec, offsets: Int[Tensor, " offset"]
) -> Float[Tensor, "pair _"]:
    """M[a, b, h](offset) = scale * <R_offset W_dec_q[a, h], W_dec_k[b, g(h)]>: [pair, offset], or [pair, 1] without rotary.

    With (q1, q2), (k1, k2) the halves of the rotating dimensions and theta the inverse frequencies,

        <R_d q, k> = sum_f (q1 k1 + q2 k2)_f cos(theta_f d) + (q1 k2 - q2 k1)_f sin(theta_f d) + <q, k> of the rest.
    """
    query, key, head = indices.unbind(dim=1)
    dtype = torch.promote_types(decoders.query.dtype, torch.float32)
    q = decoders.query[query, head].to(dtype) * spec.scale
    k = decoders.key[key, head // spec.heads_per_kv].to(dtype)
    passing = (q[:, spec.rotary_dim :] * k[:, spec.rotary_dim :]).sum(dim=1, keepdim=True)
    if not spec.rotary_dim:
        return passing
    q1, q2 = q[:, : spec.rotary_dim].chunk(2, dim=1)
    k1, k2 = k[:, : spec.rotary_dim].chunk(2, dim=1)
    cos, sin = rotary_cos_sin(spec, offsets, dtype)
    return (q1 * k1 + q2 * k2) @ cos.T + (q1 * k2 - q2 * k1) @ sin.T + passing


def constant_scores(decoders: Decoders, spec: AttentionSpec, n_pos: int) -> Float[Tensor, "head pos_q pos_k"]:
    """The constant x constant term, scale * <R_i b_q[h], R_j b_k[g(h)]>, at allowed keys; zero at future keys."""
    device = decoders.query.device
    heads = torch.arange(spec.n_heads, device=device)
    constant = torch.tensor([len(decoders.query) - 1, len(decoders.key) - 1], device=device).expand(spec.n_heads, 2)
    positions = torch.arange(n_pos, device=device)
    kernel = pair_kernel(torch.cat([constant, heads[:, None]], dim=1), decoders, spec, positions)
    offsets = (positions[:, None] - positions).clamp(min=0)
    toeplitz = kernel.expand(-1, n_pos)[:, offsets]
    return toeplitz.tril()


def pack_indices(indices: Int[Tensor, "pair 3"], dtype: torch.dtype) -> Tensor:
    """Base-256 digits [n_pairs, 3, 4], least significant first: exact in every dtype, bfloat16 included."""
    shifts = torch.arange(_DIGITS, device=indices.device) * 8
    return ((indices[..., None] >> shifts) & 255).to(dtype)


def unpack_indices(digits: Tensor) -> Int[Tensor, "pair 3"]:
    """Inverse of `pack_indices`.

    Raises:
        ValueError: not the digits of triples, as in a damaged file.
    """
    if digits.shape[1:] != (3, _DIGITS) or not ((digits >= 0) & (digits <= 255) & (digits == digits.round())).all():
        raise ValueError(
            f"Packed pairs must be integers 0 to 255 of shape [n_pairs, 3, {_DIGITS}], got shape {list(digits.shape)} with "
            "other values or axes: the file is damaged."
        )
    shifts = torch.arange(_DIGITS, device=digits.device) * 8
    return (digits.round().to(torch.int64) << shifts).sum(dim=-1)


class _PairScores(torch.autograd.Function):
    """scores of pairs and the gradient of their weights, by the active entries of each pair."""

    @staticmethod
    def forward(ctx, weights, query_acts, key_acts, indices, kernel, n_heads):  # type: ignore[override]
        if query_acts.is_cuda:
            raise NotImplementedError("The sparse feature map runs on the CPU: move the dictionary and its inputs there.")
        entries = (*active_entries(query_acts), *active_entries(key_acts), indices.numpy(), kernel.detach().numpy())
        batch, n_pos = query_acts.shape[:2]
        scores = weights.new_zeros(batch, n_heads, n_pos, n_pos)
        head_order = np.argsort(entries[6][:, 2], kind="stable")
        head_start = np.searchsorted(entries[6][head_order, 2], np.arange(n_heads + 1))
        scatter_scores(scores.numpy(), weights.detach().numpy(), head_order, head_start, *entries)
        ctx.entries = entries
        return scores

    @staticmethod
    def backward(ctx, grad_scores):  # type: ignore[override]
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] or ctx.needs_input_grad[4]:
            raise NotImplementedError("A feature map has gradients for pair weights only: detach activations and decoders.")
        grad_weights = np.zeros(len(ctx.entries[6]), dtype=grad_scores.numpy().dtype)
        gather_gradient(grad_weights, grad_scores.contiguous().numpy(), *ctx.entries)
        return torch.from_numpy(grad_weights), None, None, None, None, None


def active_entries(acts: Float[Tensor, "batch pos d"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Active entries sorted by (sequence, feature, position): start [batch, d + 1], position and value of each entry."""
    batch, _, d = acts.shape
    by_feature = acts.detach().transpose(1, 2).contiguous()
    sequence, feature, position = by_feature.nonzero(as_tuple=True)
    counts = torch.bincount(sequence * d + feature, minlength=batch * d).view(batch, d)
    start = torch.zeros(batch, d + 1, dtype=torch.int64)
    start[:, 1:] = counts.cumsum(dim=1)
    start += (torch.cat([counts.new_zeros(1), counts.sum(dim=1).cumsum(0)[:-1]]))[:, None]
    return start.numpy(), position.to(torch.int32).numpy(), by_feature[sequence, feature, position].numpy()
