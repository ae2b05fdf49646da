"""The compiled engine: numba loops over active x kept entries, and their gradients."""

# pyright: reportCallIssue=false
# (compiled functions take their arguments from several tuples)

from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from sae_lens_qk.scoring import kernels
from sae_lens_qk.scoring.entries import ActiveEntries, _dense_gradient, active_entries


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
