"""Losses of both training steps, as functions of tensors."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec, attention_scores, log_pattern, pattern_kl
from sae_lens_qk.weights import OVWeights
from sae_lens_qk.training.kernels import softmax_kl
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

    def kl(
        self, scores: Float[Tensor, "batch head pos_q pos_k"]
    ) -> Float[Tensor, "batch head pos_q"]:
        """KL(P || P') in nats of each attention row, P' the softmax of scores, as `attention.pattern_kl`."""
        return self.compare(scores)[0]

    def compare(
        self, scores: Float[Tensor, "batch head pos_q pos_k"]
    ) -> tuple[Float[Tensor, "batch head pos_q"], Float[Tensor, "batch head pos_q pos_k"]]:
        """KL(P || P') of each attention row and P' - P; compiled on the CPU."""
        if scores.device.type != "cpu":
            made = log_pattern(scores)
            return pattern_kl(self.log_pattern, made), made.exp() - self.pattern
        return _SoftmaxKL.apply(scores, *self)  # type: ignore[return-value]


class _SoftmaxKL(torch.autograd.Function):
    """One pass for the divergence and its gradient, softmax - P, which is the second result."""

    @staticmethod
    def forward(ctx, scores, pattern, log_true):  # type: ignore[override]
        kl, gradient = (
            scores.new_empty(scores.shape[:3]),
            torch.empty_like(scores, memory_format=torch.contiguous_format),
        )
        softmax_kl(
            kl.numpy(),
            gradient.numpy(),
            *(t.detach().contiguous().numpy() for t in (scores, pattern, log_true)),
        )
        ctx.save_for_backward(gradient, pattern)
        ctx.set_materialize_grads(False)
        return kl, gradient

    @staticmethod
    def backward(ctx, grad_kl, grad_difference):  # type: ignore[override]
        difference, pattern = ctx.saved_tensors
        grad = 0.0 if grad_kl is None else difference * grad_kl[..., None]
        if grad_difference is not None:  # of the softmax: P' (g - <P', g>)
            made = difference + pattern
            grad = grad + made * (
                grad_difference - (made * grad_difference).sum(dim=-1, keepdim=True)
            )
        return grad, None, None


class Moved(NamedTuple):
    """What the heads move with a pattern: out[i] = sum over heads of sum_j P[h,i,j] v[j,g(h)] W_O[h]."""

    values: Float[Tensor, "batch pos kv_head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]

    @classmethod
    @torch.no_grad()
    def of(cls, x: Float[Tensor, "batch pos d_model"], weights: OVWeights) -> "Moved":
        values = (x @ weights.W_V.transpose(0, 1).flatten(1)).unflatten(
            -1, weights.b_V.shape
        ) + weights.b_V
        return cls(values, weights.W_O)

    def output(
        self, pattern: Float[Tensor, "batch head pos_q pos_k"]
    ) -> Float[Tensor, "batch pos_q d_model"]:
        """For a pattern, or linear in it for a difference of two."""
        (batch, n_heads, n_pos, _), n_kv_heads = pattern.shape, self.values.shape[2]
        stacked = pattern.reshape(batch, n_kv_heads, n_heads // n_kv_heads * n_pos, n_pos)
        z = (stacked @ self.values.transpose(1, 2)).reshape(batch, n_heads, n_pos, -1)
        return z.transpose(1, 2).flatten(2) @ self.W_O.flatten(0, 1)

    def error(
        self,
        pattern: Float[Tensor, "batch head pos_q pos_k"],
        difference: Float[Tensor, "batch head pos_q pos_k"],
    ) -> Float[Tensor, ""]:
        """Squared error of the output when the pattern is off by `difference`, over the variance of the output."""
        with torch.no_grad():
            written = self.output(pattern).flatten(0, 1)
        return relative_mse(
            torch.zeros_like(written), self.output(difference).flatten(0, 1), written
        )


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


def sqrt_penalty(
    acts: Float[Tensor, "tokens d"], W_dec: Float[Tensor, "d d_out"], eps: float = 1e-7
) -> Float[Tensor, ""]:
    """mean over tokens of sum over features of sqrt(act * ||decoder row|| + eps): independent of the batch size."""
    if not acts.is_sparse:
        return (acts * W_dec.norm(dim=1) + eps).sqrt().sum(dim=1).mean()
    values, (_, feature) = acts.values(), acts.indices()
    of_active = (values * W_dec.norm(dim=1)[feature] + eps).sqrt().sum()
    return (of_active + (acts.numel() - len(values)) * eps**0.5) / len(acts)


def relative_mse(
    target: Float[Tensor, "tokens d_out"],
    output: Float[Tensor, "tokens d_out"],
    scale_from: Tensor | None = None,
) -> Float[Tensor, ""]:
    """Squared error over the variance of `scale_from` (default: of the target)."""
    reference = target if scale_from is None else scale_from
    variance = (reference - reference.mean(dim=0)).pow(2).sum(dim=1).mean()
    return (output - target).pow(2).sum(dim=1).mean() / variance.clamp(min=1e-12)


def dead_feature_loss(
    residual: Float[Tensor, "tokens d_out"],
    x: Float[Tensor, "tokens d_model"],
    strength: Float[Tensor, "tokens d"],
    half: Transcoder,
    dead: Bool[Tensor, " d"],
    k: int,
) -> Float[Tensor, ""]:
    """The k strongest dead features of each token reconstruct what the live ones left over; see `transcode.strengths`.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A.2.
    """
    n_dead = int(dead.sum())
    if n_dead == 0:
        return residual.new_zeros(())
    strongest = strength[:, dead].topk(min(k, n_dead), dim=1)
    kept = torch.zeros_like(strength, dtype=torch.bool)
    kept.scatter_(1, dead.nonzero()[:, 0][strongest.indices], strongest.values > 0)
    made = transcode(half, x, strength, kept).output - half.b_dec
    return relative_mse(residual.detach(), made) * min(1.0, n_dead / k)
