"""The attention of a layer as plain loops over floats: written from the equations alone.

score    scale <R_i q[i,h], R_j k[j,g(h)]>
capped   cap tanh(score / cap)
biased   capped + slope[h] (j - i)
P[i,j]   exp(biased) / (sum over allowed keys + exp(sink[h])),  allowed: i - window < j <= i
"""

import cmath
import math

import torch
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec


def rotated(
    vector: list[float],
    position: int,
    inv_freq: tuple[float, ...],
) -> list[float]:
    """Dimension f turns with dimension f + len(inv_freq), by position * inv_freq[f]."""
    turned = list(vector)
    n_freq = len(inv_freq)
    for f, frequency in enumerate(inv_freq):
        z = complex(vector[f], vector[n_freq + f])
        z = z * cmath.exp(1j * position * frequency)
        turned[f] = z.real
        turned[n_freq + f] = z.imag
    return turned


def loop_scores(
    queries: Tensor,
    keys: Tensor,
    spec: AttentionSpec,
) -> Tensor:
    """float64 [batch, head, pos_q, pos_k], of queries and keys by head."""
    n_rows, n_queries, n_heads, _ = queries.shape
    n_keys = keys.shape[1]
    scores = torch.zeros(n_rows, n_heads, n_queries, n_keys, dtype=torch.float64)
    for row in range(n_rows):
        for head in range(n_heads):
            kv_head = head * spec.n_kv_heads // n_heads
            for i in range(n_queries):
                q = rotated(queries[row, i, head].tolist(), i, spec.rotary_inv_freq)
                for j in range(n_keys):
                    k = rotated(keys[row, j, kv_head].tolist(), j, spec.rotary_inv_freq)
                    product = sum(a * b for a, b in zip(q, k, strict=True))
                    scores[row, head, i, j] = spec.scale * product
    return scores


def loop_allowed(
    i: int,
    j: int,
    window: int | None,
) -> bool:
    if j > i:
        return False
    return window is None or j > i - window


def loop_logit(
    score: float,
    spec: AttentionSpec,
    head: int,
    i: int,
    j: int,
) -> float:
    """What enters the softmax at an allowed key."""
    logit = score
    if spec.softcap is not None:
        logit = spec.softcap * math.tanh(logit / spec.softcap)
    if spec.alibi_slopes:
        logit += spec.alibi_slopes[head] * (j - i)
    return logit


def loop_row(
    scores: list[float],
    spec: AttentionSpec,
    head: int,
    i: int,
) -> list[float]:
    """Attention of query i to keys 0 to i, then to the sink (0 where there is none)."""
    weights = []
    for j in range(i + 1):
        if loop_allowed(i, j, spec.window):
            weights.append(math.exp(loop_logit(scores[j], spec, head, i, j)))
        else:
            weights.append(0.0)
    sink = math.exp(spec.sinks[head]) if spec.sinks else 0.0
    total = sum(weights) + sink
    return [weight / total for weight in [*weights, sink]]


def loop_pattern(
    scores: Tensor,
    spec: AttentionSpec,
) -> Tensor:
    """float64 [batch, head, pos_q, pos_k + 1]: the pattern, and in the last column the sink."""
    n_rows, n_heads, n_pos, _ = scores.shape
    pattern = torch.zeros(n_rows, n_heads, n_pos, n_pos + 1, dtype=torch.float64)
    for row in range(n_rows):
        for head in range(n_heads):
            for i in range(n_pos):
                shares = loop_row(scores[row, head, i].double().tolist(), spec, head, i)
                pattern[row, head, i, : i + 1] = torch.tensor(shares[:-1], dtype=torch.float64)
                pattern[row, head, i, -1] = shares[-1]
    return pattern


def loop_kl(
    pattern: Tensor,
    other: Tensor,
) -> Tensor:
    """sum of P ln(P / Q) over the keys and the sink of `loop_pattern`: [batch, head, pos_q]."""
    n_rows, n_heads, n_pos, _ = pattern.shape
    divergence = torch.zeros(n_rows, n_heads, n_pos, dtype=torch.float64)
    for row in range(n_rows):
        for head in range(n_heads):
            for i in range(n_pos):
                shares = pattern[row, head, i].tolist()
                other_shares = other[row, head, i].tolist()
                for p, q in zip(shares, other_shares, strict=True):
                    if p > 0:
                        divergence[row, head, i] += p * math.log(p / q)
    return divergence
