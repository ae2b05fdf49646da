"""Scores of a list of feature pairs and their gradients, touching only active entries.

    scores[h,i,j] = sum over pairs (a, b, h) of weight query_act[i,a] key_act[j,b] M[a,b,h](i-j)

Every engine mixes the query side first (see `kernels.py`), so that no table over pairs and offsets
and nothing of size d_query * d_key exists.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.scoring.compiled import PlainEngine, RotaryEngine
from sae_lens_qk.scoring.pairs import Decoders
from sae_lens_qk.scoring.portable import PortableEngine


class PairScorer:
    """The scores of a list of pairs, prepared for one pair of decoders, called on many batches.

    Differentiable in weights, activations (where they are not zero) and decoders. Float32 at least,
    whatever the inputs are.

    Args:
        indices: pairs sorted by query feature, key feature, head; the constant feature has index
            d_query, d_key.
        decoders: rows by head, constants last.
        spec: the layer's attention.
        compiled: use a compiled engine; default: on the CPU.
    """

    def __init__(
        self,
        indices: Int[Tensor, "pair 3"],
        decoders: Decoders,
        spec: AttentionSpec,
        compiled: bool | None = None,
    ):
        if compiled is None:
            compiled = indices.device.type == "cpu"
        self.dtype = torch.promote_types(decoders.query.dtype, torch.float32)
        engine_class = PortableEngine
        if compiled:
            engine_class = RotaryEngine if spec.rotary_dim else PlainEngine
        self.engine = engine_class(indices, decoders.to(self.dtype), spec)

    def __call__(
        self,
        weights: Float[Tensor, " pair"],
        query_acts: Float[Tensor, "batch pos_q d_query"],
        key_acts: Float[Tensor, "batch pos_k d_key"],
    ) -> Float[Tensor, "batch head pos_q pos_k"]:
        """Scores at allowed keys, zero at the others."""
        dtype = self.dtype
        return self.engine.scores(weights.to(dtype), query_acts.to(dtype), key_acts.to(dtype))
