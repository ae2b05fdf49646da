"""A transcoder in training, whose output and gradients touch active entries only.

    out = acts W_dec + b_dec,   acts = relu(x W_enc + b_enc) where a feature fires, 0 elsewhere

About 16 of thousands of features are active at a token. Only the strengths, which decide which
ones, need a dense product; activations, output and the gradients of W_enc, b_enc and W_dec are sums
over active entries, compiled for the CPU.
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

# Number and share of active entries up to which sums over them are faster than dense products
_FEW = 1 << 14
_SPARSE = 0.05


class Transcoded(NamedTuple):
    acts: Float[Tensor, "tokens d"]
    """Sparse (COO) where computed from active entries."""
    output: Float[Tensor, "tokens d_out"]


def transcode(
    half: Transcoder, x: Float[Tensor, "tokens d_model"], fires: Bool[Tensor, "tokens d"]
) -> Transcoded:
    """Features and output where exactly the given entries fire; differentiable in the weights."""
    x = half.process_sae_in(x)
    is_full_precision = x.dtype in (torch.float32, torch.float64)
    is_compiled = x.device.type == "cpu" and is_full_precision
    most_entries = max(_SPARSE * fires.numel(), _FEW)
    if not is_compiled or fires.count_nonzero() > most_entries:
        acts = (x @ half.W_enc + half.b_enc).relu() * fires
        return Transcoded(acts, half.decode(acts))
    entries = _Entries(fires)
    values: Any = _Encode.apply(half.W_enc, half.b_enc, x, entries)
    decoded: Any = _Decode.apply(half.W_dec, values, entries)
    acts = torch.sparse_coo_tensor(
        torch.stack([entries.token, entries.feature]),
        values,
        fires.shape,
        is_coalesced=True,
        check_invariants=False,
    )
    return Transcoded(acts, decoded + half.b_dec)


class _Entries:
    """Where features fire: by token, and for sums over tokens by feature."""

    def __init__(self, fires: Bool[Tensor, "tokens d"]):
        self.shape = fires.shape
        self.token, self.feature = fires.nonzero(as_tuple=True)
        self.token_start = _starts(self.token, len(fires))

    @cached_property
    def order(self) -> Int[Tensor, " entry"]:
        """Entries by feature."""
        return self.feature.argsort(stable=True)

    @cached_property
    def feature_start(self) -> NDArray[np.int64]:
        return _starts(self.feature[self.order], self.shape[1])

    def sum_over_tokens(
        self, weights: Float[Tensor, " entry"], rows: Float[Tensor, "tokens c"]
    ) -> Float[Tensor, "d c"]:
        """Sum over the entries of each feature of weight times the row of its token."""
        sums = rows.new_empty(self.shape[1], rows.shape[1])
        kernels.sum_rows(
            sums.numpy(),
            self.feature_start,
            self.token[self.order].numpy(),
            weights[self.order].numpy(),
            rows.numpy(),
        )
        return sums


class _Encode(torch.autograd.Function):
    """The activations at the entries."""

    @staticmethod
    def forward(ctx, W_enc, b_enc, x, entries):  # type: ignore[override]
        ctx.x = x
        ctx.entries = entries
        values = x.new_empty(len(entries.feature))
        kernels.row_products(
            values.numpy(),
            entries.token_start,
            entries.feature.numpy(),
            x.contiguous().numpy(),
            W_enc.detach().T.contiguous().numpy(),
        )
        values += b_enc.detach()[entries.feature]
        # Strengths are rounded otherwise: one may be positive where this is not.
        return values.clamp_(min=0)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        entries = ctx.entries
        grad = grad.contiguous()
        sums = entries.sum_over_tokens(grad, ctx.x.contiguous())  # [d, d_model]
        W_enc_grad = sums.T.contiguous()
        b_enc_grad = grad.new_zeros(entries.shape[1])
        b_enc_grad.index_add_(0, entries.feature, grad)
        return W_enc_grad, b_enc_grad, None, None


class _Decode(torch.autograd.Function):
    """Sum over the entries of a token of value times decoder row."""

    @staticmethod
    def forward(ctx, W_dec, values, entries):  # type: ignore[override]
        ctx.save_for_backward(W_dec, values)
        ctx.entries = entries
        output = values.new_empty(entries.shape[0], W_dec.shape[1])
        kernels.sum_rows(
            output.numpy(),
            entries.token_start,
            entries.feature.numpy(),
            values.detach().numpy(),
            W_dec.detach().numpy(),
        )
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        W_dec, values = ctx.saved_tensors
        entries = ctx.entries
        grad = grad.contiguous()
        values_grad = torch.empty_like(values)
        kernels.row_products(
            values_grad.numpy(),
            entries.token_start,
            entries.feature.numpy(),
            grad.numpy(),
            W_dec.detach().numpy(),
        )
        return entries.sum_over_tokens(values.detach(), grad), values_grad, None


def _starts(
    sorted_numbers: Int[Tensor, " entry"],
    n: int,
) -> NDArray[np.int64]:
    """Where the entries of 0, 1, ... n - 1 begin, and where the last end."""
    numbers = torch.arange(n + 1)
    return torch.searchsorted(sorted_numbers, numbers).numpy()
