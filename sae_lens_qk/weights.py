"""W_Q, W_K, W_V and W_O of one layer, by head, and what they make of its input."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class QKWeights(NamedTuple):
    """W_Q and W_K of one layer, by head."""

    W_Q: Float[Tensor, "head d_model d_head"]
    b_Q: Float[Tensor, "head d_head"]
    W_K: Float[Tensor, "kv_head d_model d_head"]
    b_K: Float[Tensor, "kv_head d_head"]

    def queries(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch head d_head"]:
        """q[i,h] = x[i] W_Q[h] + b_Q[h]."""
        return _project(x, self.W_Q, self.b_Q)

    def keys(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch kv_head d_head"]:
        """k[j,g] = x[j] W_K[g] + b_K[g]."""
        return _project(x, self.W_K, self.b_K)

    def to(self, *args: Any) -> "QKWeights":
        return QKWeights(*(tensor.to(*args) for tensor in self))

    def fingerprint(self) -> tuple[float, ...]:
        """W_Q r, then W_K r, for the fixed r_i = sin(i^2), to seven digits."""
        d_model = self.W_Q.shape[1]
        numbers = torch.arange(d_model, device=self.W_Q.device) + 1.0
        r = numbers.double().square().sin()
        projected = []
        for W in (self.W_Q, self.W_K):
            product = torch.einsum("hmd,m->hd", W.double(), r)
            projected += product.flatten().tolist()
        return tuple(float(f"{value:.7g}") for value in projected)


class OVWeights(NamedTuple):
    """W_V and W_O of one layer, by head.

    Head h moves z[i,h] = sum_j P[h,i,j] v[j,g(h)] and adds z[i,h] W_O[h] to the residual stream.
    """

    W_V: Float[Tensor, "kv_head d_model d_head"]
    b_V: Float[Tensor, "kv_head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"]

    def values(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch kv_head d_head"]:
        """v[j,g] = x[j] W_V[g] + b_V[g]."""
        return _project(x, self.W_V, self.b_V)

    def outputs(
        self,
        pattern: Float[Tensor, "batch head pos_q pos_k"],
        values: Float[Tensor, "batch pos_k kv_head d_head"],
    ) -> Float[Tensor, "batch pos_q d_model"]:
        """sum over heads of z[i,h] W_O[h], without b_O: linear in the pattern."""
        batch, n_heads, pos_q, pos_k = pattern.shape
        n_kv_heads = values.shape[2]
        # One matrix product per key head: its query heads are stacked along the position axis.
        stacked = pattern.reshape(batch, n_kv_heads, -1, pos_k)
        z = stacked @ values.transpose(1, 2)  # [batch, kv_head, stacked, d_head]
        z = z.reshape(batch, n_heads, pos_q, -1)
        z = z.transpose(1, 2)  # [batch, pos_q, head, d_head]
        return z.flatten(2) @ self.W_O.flatten(0, 1)

    def to(self, *args: Any) -> "OVWeights":
        return OVWeights(*(tensor.to(*args) for tensor in self))


def _project(
    x: Float[Tensor, "*batch d_model"],
    W: Float[Tensor, "heads d_model d_head"],
    b: Float[Tensor, "heads d_head"],
) -> Float[Tensor, "*batch heads d_head"]:
    """x W[h] + b[h] for every head in one matrix product."""
    matrix = W.transpose(0, 1).flatten(1)  # [d_model, heads * d_head]
    return (x @ matrix).unflatten(-1, b.shape) + b
