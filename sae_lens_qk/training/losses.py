"""Losses of both training steps, as functions of tensors."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec, attention_scores, log_pattern, pattern_kl
from sae_lens_qk.kernels import softmax_kl
from sae_lens_qk.training.transcode import transcode


class TruePattern(NamedTuple):
    """The model's own pattern, what both steps are trained on."""

    pattern: Float[Tensor, "batch head pos_q pos_k"]
    log_pattern: Float[Tensor, "batch head pos_q pos_k"]

    @classmethod
    @torch.no_grad()
    def of(cls, queries: Tensor, keys: Tensor, spec: AttentionSpec) -> "TruePattern":
        """From true queries [batch, pos, head, d_head] and keys [batch, pos, kv_head, d_head]."""
        log = log_pattern(attention_scores(queries, keys, spec))
        return cls(log.exp(), log)

    def kl(self, scores: Float[Tensor, "batch head pos_q pos_k"]) -> Float[Tensor, "batch head pos_q"]:
        """KL(P || softmax of scores) in nats of each attention row, as `attention.pattern_kl`; compiled on the CPU."""
        if scores.device.type != "cpu":
            return pattern_kl(self.log_pattern, log_pattern(scores))
        return _SoftmaxKL.apply(scores, *self)  # type: ignore[return-value]


class _SoftmaxKL(torch.autograd.Function):
    """One pass for the divergence and its gradient, softmax - P."""

    @staticmethod
    def forward(ctx, scores, pattern, log_true):  # type: ignore[override]
        kl, gradient = scores.new_empty(scores.shape[:3]), torch.empty_like(scores, memory_format=torch.contiguous_format)
        softmax_kl(kl.numpy(), gradient.numpy(), *(t.detach().contiguous().numpy() for t in (scores, pattern, log_true)))
        ctx.save_for_backward(gradient)
        return kl

    @staticmethod
    def backward(ctx, grad_kl):  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad_kl[..., None], None, None


def pattern_losses(
    queries: Float[Tensor, "batch pos head d_head"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    q_hat: Float[Tensor, "batch pos head d_head"],
    k_hat: Float[Tensor, "batch pos kv_head d_head"],
    spec: AttentionSpec,
) -> dict[str, Float[Tensor, ""]]:
    """KL(P || P[q_hat, k_hat]), KL(P || P[q_hat, k]), KL(P || P[q, k_hat]): means over batch, head and query, in nats.

    The half-reconstruction terms fix the gauge q -> A^T q, k -> A^-1 k that the full one leaves free.
    Source: kwynroe/sparse_QK, training loss since May 2024.
    """
    true = TruePattern.of(queries, keys, spec)
    pairs = {"kl_full": (q_hat, k_hat), "kl_query": (q_hat, keys), "kl_key": (queries, k_hat)}
    return {name: true.kl(attention_scores(q, k, spec)).mean() for name, (q, k) in pairs.items()}


def sqrt_penalty(acts: Float[Tensor, "tokens d"], W_dec: Float[Tensor, "d d_out"], eps: float = 1e-7) -> Float[Tensor, ""]:
    """mean over tokens of sum over features of sqrt(act * ||decoder row|| + eps): independent of the batch size."""
    if not acts.is_sparse:
        return (acts * W_dec.norm(dim=1) + eps).sqrt().sum(dim=1).mean()
    values, (_, feature) = acts.values(), acts.indices()
    of_active = (values * W_dec.norm(dim=1)[feature] + eps).sqrt().sum()
    return (of_active + (acts.numel() - len(values)) * eps**0.5) / len(acts)


def relative_mse(
    target: Float[Tensor, "tokens d_out"], output: Float[Tensor, "tokens d_out"], scale_from: Tensor | None = None
) -> Float[Tensor, ""]:
    """Squared error over the variance of `scale_from` (default: of the target)."""
    reference = target if scale_from is None else scale_from
    variance = (reference - reference.mean(dim=0)).pow(2).sum(dim=1).mean()
    return (output - target).pow(2).sum(dim=1).mean() / variance.clamp(min=1e-12)


def dead_feature_loss(
    residual: Float[Tensor, "tokens d_out"],
    x: Float[Tensor, "tokens d_model"],
    hidden_pre: Float[Tensor, "tokens d"],
    half: Transcoder,
    dead: Bool[Tensor, " d"],
    k: int,
) -> Float[Tensor, ""]:
    """The k strongest dead features of each token reconstruct what the live ones left over.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A.2.
    """
    n_dead = int(dead.sum())
    if n_dead == 0:
        return residual.new_zeros(())
    strongest = hidden_pre[:, dead].topk(min(k, n_dead), dim=1)
    kept = torch.zeros_like(hidden_pre, dtype=torch.bool)
    kept.scatter_(1, dead.nonzero()[:, 0][strongest.indices], strongest.values > 0)
    made = transcode(half, x, hidden_pre, kept).output - half.b_dec
    return relative_mse(residual.detach(), made) * min(1.0, n_dead / k)
