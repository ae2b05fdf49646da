"""Where the transcoders of step 1 start: one data point a feature, as encoder and as decoder.

    data      encoder = centred data point of unit norm, decoder = that point through W_Q (W_K)
    scores    two tokens are alike as keys where queries score them alike, k_1^T C k_2 = E_q[<q, k_1> <q, k_2>], and as
              queries where centred keys do: the encoder is the gradient of that likeness, so that it does not read variance
              of x which no score depends on

With few steps of training the second is far better where much of x is irrelevant to attention (docs/results.md, planted
circuits), and equal to the first on SmolLM2.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lens_qk.attention import AttentionSpec, rotate
from sae_lens_qk.weights import QKWeights

Side = Literal["query", "key"]


class Start(NamedTuple):
    """Encoder and decoder rows; decoders still lack one common factor."""

    encoders: Float[Tensor, "d d_model"]
    decoders: Float[Tensor, "d d_out"]


def from_data(
    x: Float[Tensor, "tokens d_model"], d: int, side: Side, weights: QKWeights, seed: int
) -> Start:
    """Random tokens; every token is taken once before one is taken twice."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.cat(
        [torch.randperm(len(x), generator=generator) for _ in range(1 + d // len(x))]
    )[:d]
    directions = nn.functional.normalize(x[chosen.to(x.device)] - x.mean(dim=0), dim=1)
    return Start(directions, _through(directions, side, weights))


def from_scores(
    x: Float[Tensor, "tokens d_model"],
    d: int,
    side: Side,
    weights: QKWeights,
    spec: AttentionSpec,
    context_size: int,
    seed: int,
) -> Start:
    """Tokens unlike those already chosen, drawn with probability (1 - likeness to the nearest)^2."""
    generator = torch.Generator().manual_seed(seed)
    centred = x - x.mean(dim=0)
    reads = _reads(x, side, weights, spec, context_size, generator)
    seen = centred @ reads
    unit = nn.functional.normalize(seen, dim=1)
    chosen, nearest = [], unit.new_full((len(x),), -1.0)
    for _ in range(d):
        chosen.append(
            int(
                torch.multinomial(
                    (1 - nearest).clamp(min=1e-4).square().cpu(), 1, generator=generator
                )
            )
        )
        nearest = torch.maximum(nearest, unit @ unit[chosen[-1]])
    encoders = nn.functional.normalize(unit[chosen] @ reads.T, dim=1)
    return Start(
        encoders,
        _through(centred[chosen], side, weights)
        / seen[chosen].norm(dim=1, keepdim=True).clamp(min=1e-12),
    )


def _through(directions: Tensor, side: Side, weights: QKWeights) -> Float[Tensor, "d d_out"]:
    W = weights.W_Q if side == "query" else weights.W_K
    return torch.einsum("nm,hmd->nhd", directions, W).flatten(1)


def _reads(
    x: Tensor,
    side: Side,
    weights: QKWeights,
    spec: AttentionSpec,
    context_size: int,
    generator: torch.Generator,
) -> Float[Tensor, "d_model d_out"]:
    """G with G G^T = W C W^T summed over heads: what the other side's vectors, at random offsets, read of x."""
    W, other = (
        (weights.W_Q, weights.keys(x)) if side == "query" else (weights.W_K, weights.queries(x))
    )
    if side == "query":
        other = other - other.mean(dim=0)  # what all keys share cancels in the softmax
    offsets = torch.randint(context_size, (len(x),), generator=generator).to(x.device)
    turned = rotate(other[None], spec, -offsets if side == "query" else offsets)[0]
    moments = torch.einsum("thd,the->hde", turned, turned) / len(x)
    if side == "query":
        moments = moments.repeat_interleave(spec.heads_per_kv, dim=0)
    else:
        moments = moments.unflatten(0, (spec.n_kv_heads, spec.heads_per_kv)).sum(dim=1)
    values, vectors = torch.linalg.eigh(moments)
    roots = vectors * values.clamp(min=0).sqrt()[:, None]
    return torch.cat(list(W @ roots), dim=1)
