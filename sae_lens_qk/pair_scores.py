"""Scores of feature pairs and their gradients, touching only active x kept entries: compiled on the CPU, torch elsewhere.

    scores[h,i,j] = sum over pairs (a, b, h) of weight query_act[i,a] key_act[j,b] M[a,b,h](i-j)

Both paths mix the query side first (see `kernels.py`), so that no table over pairs and offsets and nothing of size
d_query * d_key exists. The compiled one is faster by far on the CPU; the torch one runs on any device and is its test.
"""

# pyright: reportCallIssue=false
# (compiled functions take their arguments from several tuples)

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk import kernels
from sae_lens_qk.attention import AttentionSpec, allowed_keys, rotary_cos_sin, rotate

_CHUNK = 1 << 16  # pairs whose decoder rows are gathered at once


class Decoders(NamedTuple):
    """Both decoders with the constant feature as their last row."""

    query: Float[Tensor, "d_query_1 head d_head"]
    key: Float[Tensor, "d_key_1 kv_head d_head"]

    def to(self, *args: Any) -> "Decoders":
        return Decoders(self.query.to(*args), self.key.to(*args))


class PairScorer:
    """The scores of a list of pairs, prepared for one pair of decoders: made once, called on many batches.

    Differentiable in weights, activations and decoders. Float32 at least, whatever the inputs are.

    Args:
        indices: pairs sorted by query feature, key feature, head; the constant feature has index d_query, d_key.
        decoders: rows by head, constants last.
        spec: the layer's attention.
        compiled: use the compiled loops; default: on the CPU.
    """

    def __init__(
        self,
        indices: Int[Tensor, "pair 3"],
        decoders: Decoders,
        spec: AttentionSpec,
        compiled: bool | None = None,
    ):
        self.spec, self.indices = spec, indices
        dtype = torch.promote_types(decoders.query.dtype, torch.float32)
        self.decoders = decoders.to(dtype)
        self.rotary = spec.rotary_dim > 0
        self._M = (
            None
            if self.rotary
            else pair_kernel(indices, self.decoders, spec, indices.new_zeros(1))[:, 0]
        )
        compiled = indices.device.type == "cpu" if compiled is None else compiled
        self._layout: _HeadMajor | _QueryMajor | None = None
        if compiled:
            layout = _HeadMajor if self.rotary else _QueryMajor
            self._layout = layout.of(indices, len(decoders.query), len(decoders.key), spec.n_heads)

    def __call__(
        self,
        weights: Float[Tensor, " pair"],
        query_acts: Float[Tensor, "batch pos_q d_query"],
        key_acts: Float[Tensor, "batch pos_k d_key"],
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """Scores at allowed keys, zero at future keys."""
        dtype = self.decoders.query.dtype
        weights, query_acts, key_acts = weights.to(dtype), query_acts.to(dtype), key_acts.to(dtype)
        if self._M is not None:
            weights = weights * self._M
        if self._layout is None:
            return self._by_torch(weights, query_acts, key_acts)
        if isinstance(self._layout, _QueryMajor):
            return _PlainScores.apply(
                weights, query_acts, key_acts, self._layout, self.spec.n_heads
            )  # type: ignore[return-value]
        cos, sin = rotary_cos_sin(self.spec, torch.arange(query_acts.shape[1]), dtype)
        W_Q, W_K = self.decoders.query * self.spec.scale, self.decoders.key
        weights = weights[self._layout.order]
        return _RotaryScores.apply(weights, query_acts, key_acts, W_Q, W_K, self._layout, cos, sin)  # type: ignore[return-value]

    def _by_torch(self, weights: Tensor, query_acts: Tensor, key_acts: Tensor) -> Tensor:
        (q_at, q_values), (k_at, k_values) = _active(query_acts), _active(key_acts)
        if self.rotary:
            n_pos = query_acts.shape[1]
            q_rows = self.decoders.query[q_at[1]] * (self.spec.scale * q_values[:, None, None])
            q_vectors = rotate(q_rows[None], self.spec, q_at[0] % n_pos)[0]
            k_vectors = rotate(
                (self.decoders.key[k_at[1]] * k_values[:, None, None])[None],
                self.spec,
                k_at[0] % n_pos,
            )[0]
        else:
            q_vectors, k_vectors = (values[:, None, None] for values in (q_values, k_values))
        sizes = (
            *query_acts.shape[:2],
            self.spec.n_heads,
            len(self.decoders.query),
            len(self.decoders.key),
        )
        return _TorchScores.apply(weights, q_vectors, k_vectors, q_at, k_at, self.indices, sizes)  # type: ignore[return-value]


def pair_kernel(
    indices: Int[Tensor, "pair 3"],
    decoders: Decoders,
    spec: AttentionSpec,
    offsets: Int[Tensor, " offset"],
) -> Float[Tensor, "pair _"]:
    """M[a, b, h](offset) = scale * <R_offset W_dec_q[a, h], W_dec_k[b, g(h)]>: [pair, offset], or [pair, 1] without rotary.

    With (q1, q2), (k1, k2) the halves of the rotating dimensions and theta the inverse frequencies,

        <R_d q, k> = sum_f (q1 k1 + q2 k2)_f cos(theta_f d) + (q1 k2 - q2 k1)_f sin(theta_f d) + <q, k> of the rest.
    """
    dtype = torch.promote_types(decoders.query.dtype, torch.float32)
    cos, sin = rotary_cos_sin(spec, offsets, dtype)
    made = []
    for chunk in indices.split(_CHUNK):
        query, key, head = chunk.unbind(dim=1)
        q = decoders.query[query, head].to(dtype) * spec.scale
        k = decoders.key[key, head // spec.heads_per_kv].to(dtype)
        values = (q[:, spec.rotary_dim :] * k[:, spec.rotary_dim :]).sum(dim=1, keepdim=True)
        if spec.rotary_dim:
            q1, q2 = q[:, : spec.rotary_dim].chunk(2, dim=1)
            k1, k2 = k[:, : spec.rotary_dim].chunk(2, dim=1)
            values = values + (q1 * k1 + q2 * k2) @ cos.T + (q1 * k2 - q2 * k1) @ sin.T
        made.append(values)
    return torch.cat(made)


def constant_scores(
    decoders: Decoders, spec: AttentionSpec, n_pos: int
) -> Float[Tensor, "head pos_q pos_k"]:
    """The constant x constant term, scale * <R_i b_q[h], R_j b_k[g(h)]>, at allowed keys; zero at future keys."""
    positions = torch.arange(n_pos, device=decoders.query.device)
    heads = positions.new_tensor(range(spec.n_heads))
    constant = torch.stack(
        [heads * 0 + len(decoders.query) - 1, heads * 0 + len(decoders.key) - 1, heads], dim=1
    )
    kernel = pair_kernel(constant, decoders, spec, positions)
    offsets = (positions[:, None] - positions).clamp(min=0)
    return kernel.expand(-1, n_pos)[:, offsets].tril()


class ActiveEntries(NamedTuple):
    """Active features by position of the flattened batch, the constant feature last at each."""

    start: np.ndarray
    """[batch * pos + 1]"""
    feature: np.ndarray
    value: np.ndarray


def active_entries(acts: Float[Tensor, "batch pos d"]) -> ActiveEntries:
    """The non-zero activations of a CPU batch, and a constant of 1 at every position."""
    flat = acts.detach().flatten(0, 1).contiguous().numpy()
    counts = np.empty(len(flat), np.int64)
    kernels.count_active(counts, flat)
    start = np.concatenate([[0], np.cumsum(counts + 1)])
    feature, value = np.empty(start[-1], np.int32), np.empty(start[-1], flat.dtype)
    kernels.list_active(start, feature, value, flat)
    return ActiveEntries(start, feature, value)


class _QueryMajor(NamedTuple):
    """Pairs by query feature, for `kernels.plain_*`."""

    lanes: tuple[int, ...]
    n_keys: int
    row_start: np.ndarray
    slot: np.ndarray

    @classmethod
    def of(cls, indices: Tensor, n_queries: int, n_keys: int, n_heads: int) -> "_QueryMajor":
        query, key, head = indices.numpy().T
        lanes = (0,) * (-(-n_heads // 4) * 4)  # whole vector registers
        row_start = np.searchsorted(query, np.arange(n_queries + 1))
        return cls(lanes, n_keys, row_start, (key * len(lanes) + head).astype(np.int32))


class _HeadMajor(NamedTuple):
    """Pairs by head, then query feature, for `kernels.rotary_*`; `order` sorts them so."""

    order: Tensor
    row_start: np.ndarray
    key: np.ndarray

    @classmethod
    def of(cls, indices: Tensor, n_queries: int, n_keys: int, n_heads: int) -> "_HeadMajor":
        query, key, head = indices.numpy().T
        order = np.argsort(head.astype(np.int16), kind="stable")
        row_of = (head * (n_queries + 1) + query)[order]
        row_start = np.searchsorted(row_of, np.arange(n_heads * (n_queries + 1))).reshape(
            n_heads, n_queries + 1
        )
        return cls(torch.from_numpy(order), row_start, key[order].astype(np.int32))


class _PlainScores(torch.autograd.Function):
    """Without rotary embeddings; `weights` are m M."""

    @staticmethod
    def forward(ctx, weights, query_acts, key_acts, layout, n_heads):  # type: ignore[override]
        batch, n_pos = query_acts.shape[:2]
        scores = query_acts.new_zeros(batch, n_heads, n_pos, n_pos)
        queries, keys = active_entries(query_acts), active_entries(key_acts)
        kernels.plain_scores(scores.numpy(), *layout, weights.detach().numpy(), *queries, *keys)
        ctx.save_for_backward(weights)
        ctx.problem = layout, queries, keys, query_acts.shape, key_acts.shape
        return scores

    @staticmethod
    def backward(ctx, grad_scores):  # type: ignore[override]
        (weights,), (layout, queries, keys, q_shape, k_shape) = ctx.saved_tensors, ctx.problem
        of_acts = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad_weights = weights.new_zeros(_n_blocks(q_shape[0], 1), len(weights))
        grad_queries, grad_keys = (
            np.zeros(len(side.value) * of_acts, side.value.dtype) for side in (queries, keys)
        )
        kernels.plain_gradients(
            grad_weights.numpy(),
            grad_queries,
            grad_keys,
            grad_scores.contiguous().numpy(),
            *layout,
            weights.detach().numpy(),
            *queries,
            *keys,
        )
        of_queries, of_keys = (
            _dense_gradient(grad, side, shape) if of_acts else None
            for grad, side, shape in ((grad_queries, queries, q_shape), (grad_keys, keys, k_shape))
        )
        return grad_weights.sum(dim=0), of_queries, of_keys, None, None


class _RotaryScores(torch.autograd.Function):
    """With rotary embeddings; weights in the layout's order, W_Q times the scale."""

    @staticmethod
    def forward(ctx, weights, query_acts, key_acts, W_Q, W_K, layout, cos, sin):  # type: ignore[override]
        batch, n_pos = query_acts.shape[:2]
        scores = query_acts.new_zeros(batch, W_Q.shape[1], n_pos, n_pos)
        queries, keys = active_entries(query_acts), active_entries(key_acts)
        dense = [tensor.detach().contiguous().numpy() for tensor in (W_Q, W_K, cos, sin)]
        pairs = layout.row_start, layout.key, weights.detach().numpy()
        kernels.rotary_scores(scores.numpy(), *pairs, *queries, *keys, *dense)
        ctx.problem = pairs, queries, keys, dense, query_acts.shape, key_acts.shape
        return scores

    @staticmethod
    def backward(ctx, grad_scores):  # type: ignore[override]
        pairs, queries, keys, dense, q_shape, k_shape = ctx.problem
        (n_queries, n_heads, d_head), (n_keys, n_kv_heads, _) = dense[0].shape, dense[1].shape
        of_all = any(ctx.needs_input_grad[1:5])
        n_blocks = _n_blocks(q_shape[0], n_heads)
        new = grad_scores.new_zeros
        grad_weights = new(n_blocks, len(pairs[2]))
        grad_values = [new(n_heads, len(side.value) * of_all) for side in (queries, keys)]
        grad_decoders = [new(n_blocks, n_heads, n * of_all, d_head) for n in (n_queries, n_keys)]
        kernels.rotary_gradients(
            grad_weights.numpy(),
            *(grad.numpy() for grad in (*grad_values, *grad_decoders)),
            grad_scores.contiguous().numpy(),
            *pairs,
            *queries,
            *keys,
            *dense,
        )
        if not of_all:
            return grad_weights.sum(dim=0), *[None] * 7
        of_queries, of_keys = (
            _dense_gradient(grad.sum(dim=0).numpy(), side, shape)
            for grad, side, shape in zip(
                grad_values, (queries, keys), (q_shape, k_shape), strict=True
            )
        )
        of_W_Q = grad_decoders[0].sum(dim=0).transpose(0, 1)
        of_W_K = (
            grad_decoders[1].sum(dim=0).unflatten(0, (n_kv_heads, -1)).sum(dim=1).transpose(0, 1)
        )
        return grad_weights.sum(dim=0), of_queries, of_keys, of_W_Q, of_W_K, None, None, None


def _n_blocks(batch: int, tasks_per_block: int) -> int:
    """Blocks of rows whose gradients are summed apart, so that every thread has work."""
    return min(batch, -(-numba.get_num_threads() // tasks_per_block))


def _dense_gradient(by_entry: np.ndarray, entries: ActiveEntries, shape: torch.Size) -> Tensor:
    """Gradient of the activations [batch, pos, d] from that of their entries; the constant's falls away."""
    batch, n_pos, d = shape
    dense = np.zeros((batch * n_pos, d + 1), by_entry.dtype)
    dense[np.repeat(np.arange(batch * n_pos), np.diff(entries.start)), entries.feature] = by_entry
    return torch.from_numpy(dense[:, :d]).view(shape)


def _active(
    acts: Float[Tensor, "batch pos d"],
) -> tuple[Int[Tensor, "2 entry"], Float[Tensor, " entry"]]:
    """(position in the flattened batch, feature) and value of every active entry, constants included."""
    flat = with_constant(acts).flatten(0, 1)
    at = flat.detach().nonzero().T
    return at, flat[at[0], at[1]]


class _TorchScores(torch.autograd.Function):
    """The same sums in torch operations, one coordinate of the vectors at a time; for any device.

    q_vectors [entry, head or 1, width], k_vectors [entry, kv_head or 1, width]: rotated, times activation and scale.
    """

    @staticmethod
    def forward(ctx, weights, q_vectors, k_vectors, q_at, k_at, indices, sizes):  # type: ignore[override]
        batch, n_pos, n_heads, _, _ = sizes
        ctx.save_for_backward(weights, q_vectors, k_vectors)
        ctx.problem = q_at, k_at, indices, sizes
        scores = weights.new_zeros(batch, n_heads, n_pos, n_pos)
        for head, _, kept, Q, K, _, _ in _coordinates(weights, q_vectors, k_vectors, *ctx.problem):
            mixed = torch.sparse.mm(kept, Q).T.unflatten(
                0, (batch, n_pos)
            )  # [batch, pos_q, d_key_1]
            scores[:, head] += mixed @ K
        return scores * allowed_keys(n_pos, scores.device)

    @staticmethod
    def backward(ctx, grad_scores):  # type: ignore[override]
        weights, q_vectors, k_vectors = ctx.saved_tensors
        q_at, k_at, indices, sizes = ctx.problem
        batch, n_pos = sizes[:2]
        grad_scores = grad_scores * allowed_keys(n_pos, grad_scores.device)
        grad_weights, grad_q, grad_k = (
            torch.zeros_like(t) for t in (weights, q_vectors, k_vectors)
        )
        for head, rows, kept, Q, K, of_q, of_k in _coordinates(
            weights, q_vectors, k_vectors, *ctx.problem
        ):
            of_mixed = (grad_scores[:, head] @ K.mT).flatten(0, 1).T  # [d_key_1, batch * pos]
            query, key, _ = indices[rows].unbind(dim=1)
            per_chunk = max(1, (1 << 24) // Q.shape[1])
            for chunk, a, b in zip(
                rows.split(per_chunk), query.split(per_chunk), key.split(per_chunk), strict=True
            ):
                grad_weights[chunk] += (Q[a] * of_mixed[b]).sum(dim=1)
            grad_q[of_q] += torch.sparse.mm(kept.T, of_mixed)[q_at[1], q_at[0]]
            mixed = torch.sparse.mm(kept, Q).T.unflatten(0, (batch, n_pos))
            grad_k[of_k] += (grad_scores[:, head].mT @ mixed).flatten(0, 1)[k_at[0], k_at[1]]
        return grad_weights, grad_q, grad_k, None, None, None, None


def _coordinates(weights, q_vectors, k_vectors, q_at, k_at, indices, sizes):
    """For each head and coordinate: the head, its pairs, their weights [d_key_1, d_query_1], and both sides densely."""
    batch, n_pos, n_heads, n_queries, n_keys = sizes
    for head in range(n_heads):
        rows = (indices[:, 2] == head).nonzero()[:, 0]
        query, key, _ = indices[rows].unbind(dim=1)
        kept = torch.sparse_coo_tensor(
            torch.stack([key, query]), weights[rows], (n_keys, n_queries), check_invariants=False
        ).coalesce()
        q_head, k_head = (head * t.shape[1] // n_heads for t in (q_vectors, k_vectors))
        for d in range(q_vectors.shape[2]):
            of_q, of_k = (slice(None), q_head, d), (slice(None), k_head, d)
            Q = weights.new_zeros(n_queries, batch * n_pos)
            Q[q_at[1], q_at[0]] = q_vectors[of_q]
            K = weights.new_zeros(n_keys, batch * n_pos)
            K[k_at[1], k_at[0]] = k_vectors[of_k]
            yield head, rows, kept, Q, K.unflatten(1, (batch, n_pos)).transpose(0, 1), of_q, of_k


def with_constant(acts: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d_1"]:
    """Append the constant feature, activation 1."""
    return torch.cat([acts, acts.new_ones(*acts.shape[:-1], 1)], dim=-1)
