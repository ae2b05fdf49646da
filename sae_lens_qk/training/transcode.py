"""A transcoder in training, whose output and gradients touch active entries only.

    out = acts W_dec + b_dec,   acts = relu(x W_enc + b_enc) where kept, 0 elsewhere

About 16 of thousands of features are active at a token. Only the strengths, which decide which ones, need a dense product;
activations, output and the gradients of W_enc, b_enc and W_dec are sums over active entries, compiled for the CPU.
"""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from sae_lens_qk.training import kernels

_FEW, _SPARSE = (
    1 << 14,
    0.05,
)  # kept entries, number and share, up to which sums over them are taken


class Transcoded(NamedTuple):
    strength: Float[Tensor, "tokens d"]
    """Outside the graph."""
    acts: Float[Tensor, "tokens d"]
    """Sparse (COO) where made from active entries."""
    output: Float[Tensor, "tokens d_out"]


@torch.no_grad()
def strengths(
    half: Transcoder, x: Float[Tensor, "tokens d_model"], dtype: torch.dtype | None = None
) -> Float[Tensor, "tokens d"]:
    """(x W_enc + b_enc) * ||decoder row||, by which features compete.

    Args:
        dtype: of the product and of the result, such as bfloat16; default: that of the weights.
    """
    norms = half.W_dec.norm(dim=1)
    b_enc, x, W_enc = (
        t.to(dtype or norms.dtype)
        for t in (half.b_enc * norms, half.process_sae_in(x), half.W_enc * norms)
    )
    return torch.addmm(b_enc, x, W_enc)


def transcode(
    half: Transcoder,
    x: Float[Tensor, "tokens d_model"],
    strength: Float[Tensor, "tokens d"],
    kept: Bool[Tensor, "tokens d"],
) -> Transcoded:
    """Features and output of `half` where exactly the `kept` entries fire; differentiable in its weights.

    Args:
        strength: what `kept` was decided by, passed on.
    """
    compiled = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    if not compiled or kept.count_nonzero() > max(_SPARSE * kept.numel(), _FEW):
        acts = (half.process_sae_in(x) @ half.W_enc + half.b_enc).relu() * kept
        return Transcoded(strength, acts, half.decode(acts))
    entries = _Entries(kept)
    values: Any = _Encode.apply(half.W_enc, half.b_enc, half.process_sae_in(x), entries)
    decoded: Any = _Decode.apply(half.W_dec, values, entries)
    acts = torch.sparse_coo_tensor(
        torch.stack(entries.at), values, kept.shape, is_coalesced=True, check_invariants=False
    )
    return Transcoded(strength, acts, decoded + half.b_dec)


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

    def summed_by_feature(
        self, weights: Float[Tensor, " entry"], rows: Float[Tensor, "tokens c"]
    ) -> Float[Tensor, "d c"]:
        """Sum over the entries of each feature of weight times the row of its token."""
        summed = rows.new_empty(self.shape[1], rows.shape[1])
        token, weight = self.token[self.order].numpy(), weights[self.order].numpy()
        kernels.sum_rows(summed.numpy(), self.by_feature, token, weight, rows.numpy())
        return summed


class _Encode(torch.autograd.Function):
    """The activations at the entries."""

    @staticmethod
    def forward(ctx, W_enc, b_enc, x, entries):  # type: ignore[override]
        ctx.x, ctx.entries = x, entries
        values, columns = x.new_empty(len(entries.feature)), W_enc.detach().T.contiguous().numpy()
        kernels.row_products(
            values.numpy(),
            entries.by_token,
            entries.feature.numpy(),
            x.contiguous().numpy(),
            columns,
        )
        return values.add_(b_enc.detach()[entries.feature]).clamp_(min=0)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        grad, entries = grad.contiguous(), ctx.entries
        of_W_enc = entries.summed_by_feature(grad, ctx.x.contiguous()).T.contiguous()
        of_b_enc = grad.new_zeros(entries.shape[1]).index_add_(0, entries.feature, grad)
        return of_W_enc, of_b_enc, None, None


class _Decode(torch.autograd.Function):
    """Sum over the entries of a token of value times decoder row."""

    @staticmethod
    def forward(ctx, W_dec, values, entries):  # type: ignore[override]
        ctx.save_for_backward(W_dec, values)
        ctx.entries = entries
        out, rows = values.new_empty(entries.shape[0], W_dec.shape[1]), W_dec.detach().numpy()
        kernels.sum_rows(
            out.numpy(), entries.by_token, entries.feature.numpy(), values.detach().numpy(), rows
        )
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
