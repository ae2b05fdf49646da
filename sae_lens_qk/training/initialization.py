"""Where the transcoders of step 1 start: one data point per feature, as encoder and as decoder.

    data      encoder = centred data point of unit norm, decoder = that point through W_Q (W_K)
    scores    two tokens are alike as keys where queries score them alike,
              k_1^T C k_2 = E_q[<q, k_1> <q, k_2>], and as queries where centred keys do: the
              encoder is the gradient of that likeness, so that it does not read variance of x which
              no score depends on

With few steps of training the second is far better where much of x is irrelevant to attention
(docs/results.md, planted circuits), and equal to the first on SmolLM2.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lens_qk.attention import AttentionSpec, Side
from sae_lens_qk.weights import QKWeights


class Start(NamedTuple):
    """Encoder and decoder rows; decoders still lack one common factor."""

    encoders: Float[Tensor, "d d_model"]
    decoders: Float[Tensor, "d d_out"]


def data_start(
    x: Float[Tensor, "tokens d_model"], d: int, side: Side, weights: QKWeights, seed: int
) -> Start:
    """Random tokens; every token is taken once before one is taken twice.

    Args:
        d: number of features.
    """
    generator = torch.Generator().manual_seed(seed)
    n_tokens = len(x)
    n_rounds = 1 + d // n_tokens
    # drawn on the CPU, so that every device starts alike
    rounds = []
    for _ in range(n_rounds):
        rounds.append(torch.randperm(n_tokens, generator=generator))
    tokens = torch.cat(rounds)[:d].to(x.device)
    centred = x[tokens] - x.mean(dim=0)  # [d, d_model]
    directions = nn.functional.normalize(centred, dim=1)
    return Start(directions, _outputs(directions, side, weights))


def scores_start(
    x: Float[Tensor, "tokens d_model"],
    d: int,
    side: Side,
    weights: QKWeights,
    spec: AttentionSpec,
    context_size: int,
    seed: int,
) -> Start:
    """Tokens unlike those already in, drawn with probability (1 - likeness to the nearest)^2.

    Args:
        d: number of features.
        context_size: length of the sequences, that of the offsets between queries and keys.
    """
    generator = torch.Generator().manual_seed(seed)
    centred = x - x.mean(dim=0)
    directions = score_directions(x, side, weights, spec, context_size, generator)
    readings = centred @ directions  # [tokens, d_out], what scores depend on
    unit = nn.functional.normalize(readings, dim=1)
    tokens: list[int] = []
    # [tokens], likeness to the most similar token drawn so far; none yet
    nearest = unit.new_full((len(x),), -1.0)
    for _ in range(d):
        # clamped: with fewer distinct tokens than features all would get probability 0
        distance = (1 - nearest).clamp(min=1e-4)
        probability = distance.square().cpu()
        token = int(torch.multinomial(probability, 1, generator=generator))
        tokens.append(token)
        nearest = torch.maximum(nearest, unit @ unit[token])
    likeness_gradients = unit[tokens] @ directions.T  # [d, d_model]
    encoders = nn.functional.normalize(likeness_gradients, dim=1)
    norms = readings[tokens].norm(dim=1, keepdim=True)  # [d, 1]
    outputs = _outputs(centred[tokens], side, weights)  # [d, d_out]
    return Start(encoders, outputs / norms.clamp(min=1e-12))


def _outputs(
    directions: Float[Tensor, "d d_model"], side: Side, weights: QKWeights
) -> Float[Tensor, "d d_out"]:
    W = weights.W_Q if side == "query" else weights.W_K
    return torch.einsum("nm,hmd->nhd", directions, W).flatten(1)


def score_directions(
    x: Float[Tensor, "tokens d_model"],
    side: Side,
    weights: QKWeights,
    spec: AttentionSpec,
    context_size: int,
    generator: torch.Generator,
) -> Float[Tensor, "d_model d_out"]:
    """G with G G^T = W C W^T summed over heads: what the other side reads of x.

    C are the second moments of the other side's vectors at random offsets.
    """
    n_offsets = spec.n_offsets(context_size)
    offsets = torch.randint(n_offsets, (len(x),), generator=generator)  # [tokens]
    offsets = offsets.to(x.device)
    if side == "query":
        W = weights.W_Q
        keys = weights.keys(x)
        keys = keys - keys.mean(dim=0)  # what all keys share cancels in the softmax
        # A key that lies `offset` before its query, seen from the query: rotated back.
        moments = _moments(spec.rotate(keys[None], -offsets)[0])  # [kv_head, d_head, d_head]
        moments = moments.repeat_interleave(spec.heads_per_kv, dim=0)
    else:
        W = weights.W_K
        queries = weights.queries(x)
        moments = _moments(spec.rotate(queries[None], offsets)[0])  # [head, d_head, d_head]
        # a shared key is read by every query head of its group
        grouped = moments.unflatten(0, (spec.n_kv_heads, spec.heads_per_kv))
        moments = grouped.sum(dim=1)
    eigenvalues, eigenvectors = torch.linalg.eigh(moments)
    # rounding makes the smallest eigenvalues negative
    lengths = eigenvalues.clamp(min=0).sqrt()  # [heads, d_head]
    roots = eigenvectors * lengths[:, None]  # [heads, d_head, d_head]
    return torch.cat(list(W @ roots), dim=1)


def _moments(
    vectors: Float[Tensor, "tokens heads d_head"],
) -> Float[Tensor, "heads d_head d_head"]:
    return torch.einsum("thd,the->hde", vectors, vectors) / len(vectors)
