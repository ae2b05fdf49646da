"""Losses of both training steps, as functions of tensors."""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.training.kernels import softmax_kl
from sae_lens_qk.training.selection import Selection
from sae_lens_qk.training.transcode import transcode
from sae_lens_qk.weights import OVWeights


class NonFiniteLossError(FloatingPointError):
    """The loss is NaN or infinite.

    Training stops before the weights are touched; the last checkpoint is good.
    """


class PatternComparison(NamedTuple):
    kl: Float[Tensor, "batch head pos_q"]
    """KL(P || P') in nats."""
    difference: Float[Tensor, "batch head pos_q pos_k"]
    """P' - P."""


class TruePattern(NamedTuple):
    """The model's own pattern P, what both steps are trained on."""

    pattern: Float[Tensor, "batch head pos_q pos_k"]
    log_pattern: Float[Tensor, "batch head pos_q pos_k"]
    spec: AttentionSpec

    @classmethod
    @torch.no_grad()
    def from_scores(
        cls, scores: Float[Tensor, "batch head pos_q pos_k"], spec: AttentionSpec
    ) -> "TruePattern":
        log_pattern = spec.log_pattern(scores)  # -inf where a key is not allowed
        return cls(log_pattern.exp(), log_pattern, spec)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        queries: Float[Tensor, "batch pos head d_head"],
        keys: Float[Tensor, "batch pos kv_head d_head"],
        spec: AttentionSpec,
    ) -> "TruePattern":
        return cls.from_scores(spec.scores(queries, keys), spec)

    def kl(
        self, scores: Float[Tensor, "batch head pos_q pos_k"]
    ) -> Float[Tensor, "batch head pos_q"]:
        """KL(P || P') in nats of each attention row, P' the pattern of the scores."""
        return self.compare(scores).kl

    def compare(self, scores: Float[Tensor, "batch head pos_q pos_k"]) -> PatternComparison:
        """P and the pattern P' of the scores; compiled on the CPU."""
        # one compiled pass instead of some ten over [batch, head, pos_q, pos_k]
        if scores.device.type == "cpu" and _is_softmax_of_scores(self.spec):
            first_keys = self.spec.first_keys(scores.shape[-1])
            kl, difference = _SoftmaxKL.apply(  # type: ignore[misc]
                scores, self.pattern, self.log_pattern, first_keys
            )
            return PatternComparison(kl, difference)
        log_pattern = self.spec.log_pattern(scores)
        kl = self.spec.kl(self.log_pattern, log_pattern)  # [batch, head, pos_q]
        return PatternComparison(kl, log_pattern.exp() - self.pattern)


def _is_softmax_of_scores(spec: AttentionSpec) -> bool:
    """No cap, bias or sink: what the compiled loop computes, over any window of keys."""
    return replace(spec, window=None).is_plain


class _SoftmaxKL(torch.autograd.Function):
    """One pass for the divergence and its gradient, softmax - P, which is the second result."""

    @staticmethod
    def forward(ctx, scores, pattern, log_pattern, first_keys):  # type: ignore[override]
        kl = scores.new_empty(scores.shape[:3])
        difference = torch.empty_like(scores, memory_format=torch.contiguous_format)
        softmax_kl(
            kl.numpy(),
            difference.numpy(),
            scores.detach().contiguous().numpy(),
            pattern.detach().contiguous().numpy(),
            log_pattern.detach().contiguous().numpy(),
            first_keys,
        )
        ctx.save_for_backward(difference, pattern)
        # Most losses use the divergence alone: no zeros of the size of the pattern for the other.
        ctx.set_materialize_grads(False)
        return kl, difference

    @staticmethod
    def backward(ctx, kl_grad, difference_grad):  # type: ignore[override]
        difference, pattern = ctx.saved_tensors
        grad = 0.0
        if kl_grad is not None:
            grad = difference * kl_grad[..., None]
        if difference_grad is not None:  # of the softmax: P' (g - <P', g>)
            softmax = difference + pattern
            # <P', g>, [batch, head, pos_q, 1]
            mean = (softmax * difference_grad).sum(dim=-1, keepdim=True)
            grad = grad + softmax * (difference_grad - mean)
        return grad, None, None, None


class AttentionOutput(NamedTuple):
    """What the heads add to the residual stream under a pattern, for fixed values."""

    values: Float[Tensor, "batch pos kv_head d_head"]
    weights: OVWeights

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        x: Float[Tensor, "batch pos d_model"],
        weights: OVWeights,
    ) -> "AttentionOutput":
        return cls(weights.values(x), weights)

    def error(
        self,
        pattern: Float[Tensor, "batch head pos_q pos_k"],
        difference: Float[Tensor, "batch head pos_q pos_k"],
    ) -> Float[Tensor, ""]:
        """Squared error of the output, over its variance, if the pattern is off by a difference."""
        with torch.no_grad():
            output = self.weights.outputs(pattern, self.values)
            output = output.flatten(0, 1)  # [tokens, d_model]
        # the output is linear in the pattern
        error = self.weights.outputs(difference, self.values)  # [batch, pos_q, d_model]
        error = error.flatten(0, 1)
        return _mean_square(error) / variance(output)


def pattern_losses(
    queries: Float[Tensor, "batch pos head d_head"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    q_hat: Float[Tensor, "batch pos head d_head"],
    k_hat: Float[Tensor, "batch pos kv_head d_head"],
    spec: AttentionSpec,
) -> dict[str, Float[Tensor, ""]]:
    """KL(P || P[q_hat, k_hat]), KL(P || P[q_hat, k]), KL(P || P[q, k_hat]).

    Means over batch, head and query, in nats. The half-reconstruction terms fix the gauge
    q -> A^T q, k -> A^-1 k that the full one leaves free.

    Source: kwynroe/sparse_QK, training loss since May 2024.
    """
    # Each vector enters two scores: rotate once, then score.
    q = _rotated(queries, spec)
    k = _rotated(keys, spec)
    q_hat = _rotated(q_hat, spec)
    k_hat = _rotated(k_hat, spec)
    true = TruePattern.from_scores(spec.dot(q, k), spec)
    return {
        "kl_full": true.kl(spec.dot(q_hat, k_hat)).mean(),
        "kl_query": true.kl(spec.dot(q_hat, k)).mean(),
        "kl_key": true.kl(spec.dot(q, k_hat)).mean(),
    }


def _rotated(
    vectors: Float[Tensor, "batch pos heads d_head"], spec: AttentionSpec
) -> Float[Tensor, "batch pos heads d_head"]:
    """In float32 at least, as `AttentionSpec.scores`."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return spec.rotate(vectors.to(dtype))


def sqrt_penalty(
    acts: Float[Tensor, "tokens d"], W_dec: Float[Tensor, "d d_out"], eps: float = 1e-7
) -> Float[Tensor, ""]:
    """Mean over tokens of the sum over features of sqrt(act * ||decoder row|| + eps).

    Independent of the batch size.
    """
    norms = W_dec.norm(dim=1)
    if not acts.is_sparse:
        roots = (acts * norms + eps).sqrt()  # [tokens, d]
        return roots.sum(dim=1).mean()
    # a silent entry adds sqrt(eps) and has no gradient
    values = acts.values()
    _, feature = acts.indices()
    active_sum = (values * norms[feature] + eps).sqrt().sum()
    n_silent = acts.numel() - len(values)
    return (active_sum + n_silent * eps**0.5) / len(acts)


def relative_mse(
    target: Float[Tensor, "tokens d_out"], output: Float[Tensor, "tokens d_out"]
) -> Float[Tensor, ""]:
    """Squared error over the variance of the target."""
    return _mean_square(output - target) / variance(target)


def variance(vectors: Float[Tensor, "tokens d_out"]) -> Float[Tensor, ""]:
    """Mean squared distance from the mean; at least 1e-12, to be divided by."""
    centred = vectors - vectors.mean(dim=0)
    return _mean_square(centred).clamp(min=1e-12)


def _mean_square(vectors: Float[Tensor, "tokens d_out"]) -> Float[Tensor, ""]:
    """Mean squared length."""
    return vectors.pow(2).sum(dim=1).mean()


def dead_feature_loss(
    residual: Float[Tensor, "tokens d_out"],
    x: Float[Tensor, "tokens d_model"],
    strength: Float[Tensor, "tokens d"],
    half: Transcoder,
    dead: Bool[Tensor, " d"],
    k: int,
) -> Float[Tensor, ""]:
    """The k strongest dead features of each token reconstruct what the live ones left over.

    Args:
        residual: of the target.
        strength: see `selection.strengths`.
        dead: features that have not fired for long.
        k: dead features per token.
    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A.2.
    """
    n_dead = int(dead.sum())
    if n_dead == 0:
        return residual.new_zeros(())
    selection = Selection("topk", min(k, n_dead))
    # only dead features compete, each token picks its own
    fires = torch.zeros_like(strength, dtype=torch.bool)
    fires[:, dead] = selection.fires(strength[:, dead]).fires
    # without the bias: the residual has lost it already
    reconstruction = transcode(half, x, fires).output - half.b_dec
    # detached: the live features are not to leave something over for the dead
    error = relative_mse(residual.detach(), reconstruction)
    return error * min(1.0, n_dead / k)


def total_loss(
    losses: dict[str, Float[Tensor, ""]],
    step: int,
    name: str,
) -> Float[Tensor, ""]:
    """Sum of the losses.

    Args:
        step: number of the training step.
        name: what the sum is called in the error.
    Raises:
        NonFiniteLossError: it is NaN or infinite.
    """
    total = torch.stack(list(losses.values())).sum()
    if not total.isfinite():
        terms = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
        raise NonFiniteLossError(
            f"The {name} is {total.item()} at step {step} ({terms}): training stopped before the "
            "update. Check the inputs, or resume with a lower lr."
        )
    return total
