"""A transcoder in training, whose output and gradients touch active entries only.

    out = acts W_dec + b_dec,   acts = hidden_pre where kept, 0 elsewhere,   hidden_pre = x W_enc + b_enc

About 16 of thousands of features are active at a token. Only `hidden_pre`, which decides which ones, needs a dense product;
the output and the gradients of W_enc, b_enc and W_dec are sums over active entries, compiled for the CPU.
"""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from sae_lens_qk import kernels

_FEW, _SPARSE = 1 << 14, 0.05  # kept entries, number and share, up to which sums over them are taken


class Transcoded(NamedTuple):
    hidden_pre: Float[Tensor, "tokens d"]
    """Outside the graph."""
    acts: Float[Tensor, "tokens d"]
    """Sparse (COO) where made from active entries."""
    output: Float[Tensor, "tokens d_out"]


def transcode(
    half: Transcoder,
    x: Float[Tensor, "tokens d_model"],
    hidden_pre: Float[Tensor, "tokens d"],
    kept: Bool[Tensor, "tokens d"],
) -> Transcoded:
    """Features and output of `half` where exactly the `kept` entries fire; differentiable in its weights.

    Args:
        hidden_pre: of `half` at x; its graph is not used.
    """
    hidden_pre = hidden_pre.detach()
    compiled = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    if not compiled or kept.count_nonzero() > max(_SPARSE * kept.numel(), _FEW):
        acts = (half.process_sae_in(x) @ half.W_enc + half.b_enc) * kept
        return Transcoded(hidden_pre, acts, half.decode(acts))
    entries = _Entries(kept)
    values: Any = _Encode.apply(half.W_enc, half.b_enc, x, hidden_pre[entries.at], entries)
    decoded: Any = _Decode.apply(half.W_dec, values, entries)
    acts = torch.sparse_coo_tensor(torch.stack(entries.at), values, kept.shape, is_coalesced=True, check_invariants=False)
    return Transcoded(hidden_pre, acts, decoded + half.b_dec)


class _Entries:
    """Where features fire: by token, and for sums over tokens by feature."""

    def __init__(self, kept: Bool[Tensor, "tokens d"]):
        self.shape = kept.shape
        self.token, self.feature = self.at = kept.nonzero(as_tuple=True)
        self.by_token = _starts(self.token, len(kept))

    @cached_property
    def order(self) -> Int[Tensor, " entry"]:
        return self.feature.argsort(stable=True)

    @cached_property
    def by_feature(self) -> NDArray[np.int64]:
        return _starts(self.feature[self.order], self.shape[1])

    def summed_by_feature(self, weights: Float[Tensor, " entry"], rows: Float[Tensor, "tokens c"]) -> Float[Tensor, "d c"]:
        """Sum over the entries of each feature of weight times the row of its token."""
        summed = rows.new_empty(self.shape[1], rows.shape[1])
        token, weight = self.token[self.order].numpy(), weights[self.order].numpy()
        kernels.sum_rows(summed.numpy(), self.by_feature, token, weight, rows.numpy())
        return summed


class _Encode(torch.autograd.Function):
    """The pre-activations at the entries, given as `values`."""

    @staticmethod
    def forward(ctx, W_enc, b_enc, x, values, entries):  # type: ignore[override]
        ctx.x, ctx.entries = x, entries
        return values.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        grad, entries = grad.contiguous(), ctx.entries
        of_W_enc = entries.summed_by_feature(grad, ctx.x.contiguous()).T.contiguous()
        of_b_enc = grad.new_zeros(entries.shape[1]).index_add_(0, entries.feature, grad)
        return of_W_enc, of_b_enc, None, None, None


class _Decode(torch.autograd.Function):
    """Sum over the entries of a token of value times decoder row."""

    @staticmethod
    def forward(ctx, W_dec, values, entries):  # type: ignore[override]
        ctx.save_for_backward(W_dec, values)
        ctx.entries = entries
        out, rows = values.new_empty(entries.shape[0], W_dec.shape[1]), W_dec.detach().numpy()
        kernels.sum_rows(out.numpy(), entries.by_token, entries.feature.numpy(), values.detach().numpy(), rows)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        W_dec, values = ctx.saved_tensors
        grad, entries, of_values = grad.contiguous(), ctx.entries, torch.empty_like(values)
        feature, rows = entries.feature.numpy(), W_dec.detach().numpy()
        kernels.row_products(of_values.numpy(), entries.by_token, feature, grad.numpy(), rows)
        return entries.summed_by_feature(values.detach(), grad), of_values, None


def _starts(sorted_index: Int[Tensor, " entry"], n: int) -> NDArray[np.int64]:
    """Where the entries of 0, 1, ... n - 1 begin, and where the last end."""
    return torch.searchsorted(sorted_index, torch.arange(n + 1)).numpy()
