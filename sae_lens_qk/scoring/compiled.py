"""The compiled engines: numba loops over active entries and listed pairs, and their gradients.

Both take tensors on the CPU. `PlainEngine` serves attention without rotary embeddings,
`RotaryEngine` attention with them; see `kernels.py` for their sums.
"""

import math
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.scoring import kernels
from sae_lens_qk.scoring.entries import active_entries
from sae_lens_qk.scoring.pairs import Decoders, pair_kernel

_REGISTER = 4  # heads per vector register


class QueryMajor(NamedTuple):
    """Pairs sorted by query feature, for `kernels.plain_scores`."""

    n_keys: int
    row_start: np.ndarray
    """[query feature + 1]"""
    slot: np.ndarray
    """[pair], key feature * number of lanes + head"""


class HeadMajor(NamedTuple):
    """Pairs sorted by head, then query feature, for `kernels.rotary_scores`."""

    row_start: np.ndarray
    """[head, query feature + 1]"""
    key: np.ndarray
    """[pair]"""


class RotaryDecoders(NamedTuple):
    """What `kernels.rotary_scores` takes as decoders."""

    W_Q: np.ndarray
    """[query feature, head, d_head], times the scale"""
    W_K: np.ndarray
    """[key feature, kv_head, d_head]"""
    cos: np.ndarray
    """[pos, freq]"""
    sin: np.ndarray
    """[pos, freq]"""


class PlainEngine:
    """Scores without rotary embeddings, on the CPU: all heads of a query at once.

    M is a number per pair and is folded into the weights.
    """

    def __init__(
        self,
        indices: Tensor,
        decoders: Decoders,
        spec: AttentionSpec,
    ):
        self.spec = spec
        self.M = pair_kernel(indices, decoders, spec, indices.new_zeros(1))[:, 0]
        query, key, head = indices.numpy().T
        n_lanes = math.ceil(spec.n_heads / _REGISTER) * _REGISTER
        self.lanes = (0,) * n_lanes
        self.pairs = QueryMajor(
            n_keys=len(decoders.key),
            row_start=np.searchsorted(query, np.arange(len(decoders.query) + 1)),
            slot=(key * n_lanes + head).astype(np.int32),
        )

    def scores(
        self,
        weights: Tensor,
        query_acts: Tensor,
        key_acts: Tensor,
    ) -> Tensor:
        """What `PairScorer` returns, of tensors of the decoders' dtype."""
        return _PlainScores.apply(weights * self.M, query_acts, key_acts, self)  # type: ignore[return-value]


class RotaryEngine:
    """Scores with rotary embeddings, on the CPU: one head at a time, a few queries at once."""

    def __init__(
        self,
        indices: Tensor,
        decoders: Decoders,
        spec: AttentionSpec,
    ):
        self.spec = spec
        self.decoders = decoders
        query, key, head = indices.numpy().T
        n_queries = len(decoders.query)
        order = np.argsort(head.astype(np.int16), kind="stable")  # radix sort, for small numbers
        row_codes = (head * (n_queries + 1) + query)[order]
        row_start = np.searchsorted(row_codes, np.arange(spec.n_heads * (n_queries + 1)))
        self.order = torch.from_numpy(order)
        self.pairs = HeadMajor(
            row_start=row_start.reshape(spec.n_heads, n_queries + 1),
            key=key[order].astype(np.int32),
        )

    def scores(
        self,
        weights: Tensor,
        query_acts: Tensor,
        key_acts: Tensor,
    ) -> Tensor:
        """What `PairScorer` returns, of tensors of the decoders' dtype."""
        W_Q = self.decoders.query * self.spec.scale
        W_K = self.decoders.key
        return _RotaryScores.apply(weights[self.order], query_acts, key_acts, W_Q, W_K, self)  # type: ignore[return-value]


class _PlainScores(torch.autograd.Function):
    """Scores and gradients of a `PlainEngine`; `weights` are m M."""

    @staticmethod
    def forward(ctx, weights, query_acts, key_acts, engine):  # type: ignore[override]
        batch, n_pos, _ = query_acts.shape
        ctx.engine = engine
        ctx.shapes = query_acts.shape, key_acts.shape
        ctx.queries = active_entries(query_acts)
        ctx.keys = active_entries(key_acts)
        ctx.first_keys = engine.spec.first_keys(n_pos)
        ctx.save_for_backward(weights)
        scores = query_acts.new_zeros(batch, engine.spec.n_heads, n_pos, n_pos)
        kernels.plain_scores(
            scores.numpy(),
            engine.lanes,
            ctx.first_keys,
            engine.pairs,
            weights.detach().numpy(),
            ctx.queries,
            ctx.keys,
        )
        return scores

    @staticmethod
    def backward(ctx, grad_scores):  # type: ignore[override]
        (weights,) = ctx.saved_tensors
        query_shape, key_shape = ctx.shapes
        needs_acts = any(ctx.needs_input_grad[1:3])
        # gradients of activations are empty where nobody needs them
        grad_weights = weights.new_zeros(_n_blocks(len(grad_scores), 1), len(weights))
        grad_query_values = weights.new_zeros(needs_acts * len(ctx.queries.value)).numpy()
        grad_key_values = weights.new_zeros(needs_acts * len(ctx.keys.value)).numpy()
        kernels.plain_gradients(
            grad_weights.numpy(),
            grad_query_values,
            grad_key_values,
            grad_scores.contiguous().numpy(),
            ctx.engine.lanes,
            ctx.first_keys,
            ctx.engine.pairs,
            weights.detach().numpy(),
            ctx.queries,
            ctx.keys,
        )
        if not needs_acts:
            return grad_weights.sum(dim=0), None, None, None
        grad_query_acts = ctx.queries.scatter(grad_query_values, query_shape)
        grad_key_acts = ctx.keys.scatter(grad_key_values, key_shape)
        return grad_weights.sum(dim=0), grad_query_acts, grad_key_acts, None


class _RotaryScores(torch.autograd.Function):
    """Scores and gradients of a `RotaryEngine`; weights in its order, W_Q times the scale."""

    @staticmethod
    def forward(ctx, weights, query_acts, key_acts, W_Q, W_K, engine):  # type: ignore[override]
        batch, n_pos, _ = query_acts.shape
        cos, sin = engine.spec.cos_sin(torch.arange(n_pos), W_Q.dtype)
        ctx.engine = engine
        ctx.shapes = query_acts.shape, key_acts.shape
        ctx.queries = active_entries(query_acts)
        ctx.keys = active_entries(key_acts)
        ctx.first_keys = engine.spec.first_keys(n_pos)
        ctx.decoders = RotaryDecoders(
            W_Q=W_Q.detach().contiguous().numpy(),
            W_K=W_K.detach().contiguous().numpy(),
            cos=cos.numpy(),
            sin=sin.numpy(),
        )
        ctx.save_for_backward(weights)
        scores = query_acts.new_zeros(batch, engine.spec.n_heads, n_pos, n_pos)
        kernels.rotary_scores(
            scores.numpy(),
            ctx.first_keys,
            engine.pairs,
            weights.detach().numpy(),
            ctx.queries,
            ctx.keys,
            ctx.decoders,
        )
        return scores

    @staticmethod
    def backward(ctx, grad_scores):  # type: ignore[override]
        (weights,) = ctx.saved_tensors
        query_shape, key_shape = ctx.shapes
        n_queries, n_heads, d_head = ctx.decoders.W_Q.shape
        n_keys, n_kv_heads, _ = ctx.decoders.W_K.shape
        needs_all = any(ctx.needs_input_grad[1:5])
        n_blocks = _n_blocks(len(grad_scores), n_heads)
        # all but the weights' gradients are empty where nobody needs them
        grad_weights = weights.new_zeros(n_blocks, len(weights))
        grad_query_values = weights.new_zeros(n_heads, needs_all * len(ctx.queries.value))
        grad_key_values = weights.new_zeros(n_heads, needs_all * len(ctx.keys.value))
        grad_W_Q = weights.new_zeros(n_blocks, n_heads, needs_all * n_queries, d_head)
        grad_W_K = weights.new_zeros(n_blocks, n_heads, needs_all * n_keys, d_head)
        kernels.rotary_gradients(
            grad_weights.numpy(),
            grad_query_values.numpy(),
            grad_key_values.numpy(),
            grad_W_Q.numpy(),
            grad_W_K.numpy(),
            grad_scores.contiguous().numpy(),
            ctx.first_keys,
            ctx.engine.pairs,
            weights.detach().numpy(),
            ctx.queries,
            ctx.keys,
            ctx.decoders,
        )
        if not needs_all:
            return grad_weights.sum(dim=0), None, None, None, None, None
        # query heads that share a key head add up
        grad_W_K = grad_W_K.sum(dim=0).unflatten(0, (n_kv_heads, -1)).sum(dim=1)
        return (
            grad_weights.sum(dim=0),
            ctx.queries.scatter(grad_query_values.sum(dim=0).numpy(), query_shape),
            ctx.keys.scatter(grad_key_values.sum(dim=0).numpy(), key_shape),
            grad_W_Q.sum(dim=0).transpose(0, 1),
            grad_W_K.transpose(0, 1),
            None,
        )


def _n_blocks(
    batch: int,
    tasks_per_block: int,
) -> int:
    """Blocks of rows whose gradients are summed apart, so that every thread has work."""
    return min(batch, math.ceil(numba.get_num_threads() / tasks_per_block))
