"""Step 2 as the authors compute it, from the equations: every entry of map and mask.

    M[a,b,h] = s <W_dec_q[a,h], W_dec_k[b,h]>
    scores[h,i,j] = sum_ab query_acts[i,a] key_acts[j,b] m[a,b,h] M[a,b,h],   -inf at future keys
    loss = mean over batch, head, query of KL(P || softmax of scores)
           + lambda * sum over a, b, h of sqrt(m + 1e-7)

Both sides hold the constant feature as their last: activation 1, decoder row the bias. Nothing of
the package is used here. The map is computed once, where the authors compute it at every step.
Source: kwynroe/sparse_QK, sparsify_feature_map.py (with -inf, and the constant maskable on both
sides).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class DenseProblem(NamedTuple):
    """What a dense step trains on, constants included on both sides."""

    M: Tensor
    """[d_query, d_key, head], from `full_map`."""
    query_acts: Tensor
    """[batch, pos, d_query]"""
    key_acts: Tensor
    pattern: Tensor
    """P [batch, head, pos_q, pos_k]."""
    log_pattern: Tensor

    def scores(self, mask: Tensor) -> Tensor:
        """Scores [batch, head, pos_q, pos_k] of all pairs, -inf at future keys."""
        mixed = torch.einsum("nia,abh->nibh", self.query_acts, mask * self.M)
        scores = torch.einsum("nibh,njb->nhij", mixed, self.key_acts)
        return scores.masked_fill(future_keys(scores.shape[-1]), -torch.inf)

    def mean_kl(self, scores: Tensor) -> Tensor:
        """KL(P || softmax of scores), mean over batch, head and query, in nats."""
        log_ratio = self.log_pattern - scores.log_softmax(dim=-1)
        log_ratio = log_ratio.masked_fill(future_keys(scores.shape[-1]), 0)
        return (self.pattern * log_ratio).sum(dim=-1).mean()


def full_map(
    W_dec_q: Tensor,
    W_dec_k: Tensor,
    scale: float,
) -> Tensor:
    """M [d_query, d_key, head] from decoders [d, head, d_head]; no rotary embeddings."""
    return scale * torch.einsum("ahd,bhd->abh", W_dec_q, W_dec_k)


def future_keys(n_pos: int) -> Tensor:
    """Bool [pos_q, pos_k], True where key > query."""
    return torch.ones(n_pos, n_pos, dtype=torch.bool).triu(diagonal=1)


def penalty(mask: Tensor) -> Tensor:
    """Sum over entries of sqrt(m + 1e-7)."""
    return (mask + 1e-7).sqrt().sum()


def make_step(
    problem: DenseProblem,
    strength: float,
    lr: float,
) -> Callable[[], float]:
    """A training step of the whole mask, from 1 on; call it for the next step and its loss.

    Args:
        strength: lambda.
        lr: learning rate of Adam.
    """
    mask = torch.ones_like(problem.M, requires_grad=True)
    optimizer = torch.optim.Adam([mask], lr=lr)

    def step() -> float:
        optimizer.zero_grad()
        kl = problem.mean_kl(problem.scores(mask))
        loss = kl + strength * penalty(mask)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
        return loss.item()

    return step
