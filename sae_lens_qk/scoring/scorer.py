"""Scores of feature pairs and their gradients, touching only active x kept entries.

    scores[h,i,j] = sum over pairs (a, b, h) of weight query_act[i,a] key_act[j,b] M[a,b,h](i-j)
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.scoring.compiled import _HeadMajor, _PlainScores, _QueryMajor, _RotaryScores
from sae_lens_qk.scoring.entries import _active
from sae_lens_qk.scoring.pairs import Decoders, pair_kernel
from sae_lens_qk.scoring.portable import _TorchScores


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
        cos, sin = self.spec.cos_sin(torch.arange(query_acts.shape[1]), dtype)
        W_Q, W_K = self.decoders.query * self.spec.scale, self.decoders.key
        weights = weights[self._layout.order]
        return _RotaryScores.apply(weights, query_acts, key_acts, W_Q, W_K, self._layout, cos, sin)  # type: ignore[return-value]

    def _by_torch(self, weights: Tensor, query_acts: Tensor, key_acts: Tensor) -> Tensor:
        (q_at, q_values), (k_at, k_values) = _active(query_acts), _active(key_acts)
        if self.rotary:
            n_pos = query_acts.shape[1]
            q_rows = self.decoders.query[q_at[1]] * (self.spec.scale * q_values[:, None, None])
            q_vectors = self.spec.rotate(q_rows[None], q_at[0] % n_pos)[0]
            k_rows = self.decoders.key[k_at[1]] * k_values[:, None, None]
            k_vectors = self.spec.rotate(k_rows[None], k_at[0] % n_pos)[0]
        else:
            q_vectors, k_vectors = (values[:, None, None] for values in (q_values, k_values))
        sizes = (
            *query_acts.shape[:2],
            self.spec.n_heads,
            len(self.decoders.query),
            len(self.decoders.key),
        )
        return _TorchScores.apply(weights, q_vectors, k_vectors, q_at, k_at, self.indices, sizes, self.spec)  # type: ignore[return-value]
