"""Decoders of both sides and what a pair of features adds to a score."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec

_CHUNK = 1 << 16  # pairs whose decoder rows are gathered at once


class Decoders(NamedTuple):
    """Both decoders with the constant feature as their last row."""

    query: Float[Tensor, "d_query_1 head d_head"]
    key: Float[Tensor, "d_key_1 kv_head d_head"]

    def to(self, *args: Any) -> "Decoders":
        return Decoders(self.query.to(*args), self.key.to(*args))


def pair_kernel(
    indices: Int[Tensor, "pair 3"],
    decoders: Decoders,
    spec: AttentionSpec,
    offsets: Int[Tensor, " offset"],
) -> Float[Tensor, "pair _"]:
    """M[a, b, h](offset) = scale * <R_offset W_dec_q[a, h], W_dec_k[b, g(h)]>.

    With (q1, q2), (k1, k2) the halves of the rotating dimensions and theta the inverse frequencies,

        <R_d q, k> = sum_f (q1 k1 + q2 k2)_f cos(theta_f d) + (q1 k2 - q2 k1)_f sin(theta_f d)
                     + <q, k> of the other dimensions

    Returns:
        [pair, offset], or [pair, 1] without rotary embeddings: the same at every offset.
    """
    dtype = torch.promote_types(decoders.query.dtype, torch.float32)
    cos, sin = spec.cos_sin(offsets, dtype)  # [offset, freq]
    rotary_dim = spec.rotary_dim
    chunks = []
    for chunk in indices.split(_CHUNK):
        query, key, head = chunk.unbind(dim=1)
        q = decoders.query[query, head].to(dtype) * spec.scale  # [pair, d_head]
        k = decoders.key[key, head // spec.heads_per_kv].to(dtype)
        kernel = (q[:, rotary_dim:] * k[:, rotary_dim:]).sum(dim=1, keepdim=True)
        if rotary_dim:
            q1, q2 = q[:, :rotary_dim].chunk(2, dim=1)  # [pair, freq]
            k1, k2 = k[:, :rotary_dim].chunk(2, dim=1)
            even = q1 * k1 + q2 * k2
            odd = q1 * k2 - q2 * k1
            kernel = kernel + even @ cos.T + odd @ sin.T
        chunks.append(kernel)
    return torch.cat(chunks)


def constant_scores(
    decoders: Decoders, spec: AttentionSpec, n_pos: int
) -> Float[Tensor, "head pos_q pos_k"]:
    """The constant x constant term, scale * <R_i b_q[h], R_j b_k[g(h)]>; zero where not allowed."""
    queries = decoders.query[-1].expand(1, n_pos, -1, -1)
    keys = decoders.key[-1].expand(1, n_pos, -1, -1)
    scores = spec.scores(queries, keys)[0]
    return scores.masked_fill(~spec.allowed_mask(n_pos, scores.device), 0.0)
