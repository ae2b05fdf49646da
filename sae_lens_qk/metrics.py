"""The metrics of `evals` as equations, of patterns, predictions and scores; their intervals."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec

_POSITIONS = 64  # whose predictions over the vocabulary are compared at a time


class Interval(NamedTuple):
    """A metric with its 95 % bootstrap interval over rows."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    values: Num[np.ndarray, " row"],
    weights: Num[np.ndarray, " row"] | None = None,
    n_draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """sum(values) / sum(weights) over rows, with its 2.5 and 97.5 percentiles over resampled rows.

    With the same seed and number of rows the same rows are drawn: intervals are paired.

    Args:
        values: one number per independent row; of a ratio the numerators, such as sums over the
            cases of a text.
        weights: denominators, such as numbers of cases; default: 1 each, which makes the mean.
        n_draws: resampled sets of rows.
        seed: of the draws.
    """
    n_rows = len(values)
    if weights is None:
        weights = np.ones(n_rows)
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, n_rows, (n_draws, n_rows))
    sums = values[draws].sum(axis=1)
    ratios = sums / weights[draws].sum(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5]).tolist()
    value = float(values.sum() / weights.sum())
    return Interval(value, low, high)


def uniform_pattern(
    spec: AttentionSpec, n_pos: int, device: torch.device
) -> Float[Tensor, "pos_q pos_k"]:
    """The baseline: equal weights for the allowed keys, and for the sink where there is one."""
    allowed = spec.allowed_mask(n_pos, device)
    n_choices = allowed.sum(dim=-1, keepdim=True)
    if spec.sinks:
        n_choices = n_choices + 1
    return allowed / n_choices


def pattern_metrics(
    log_true: Float[Tensor, "row head pos_q pos_k"],
    log_pattern: Float[Tensor, "row head pos_q pos_k"] | None,
    spec: AttentionSpec,
) -> dict[str, Tensor]:
    """pattern_tv [row]; of a pattern other than zero (None) pattern_kl [row, head] and
    argmax_agreement [row]. Position 0, whose pattern is trivial, is left out.
    """
    later = slice(1, None)
    true = log_true[:, :, later].exp()  # [row, head, pos_q - 1, pos_k]
    if log_pattern is None:
        row_sums = true.sum(dim=-1)  # of a zero pattern the distance
        return {"pattern_tv": row_sums.mean(dim=(1, 2)) / 2}
    pattern = log_pattern[:, :, later].exp()
    l1_distance = (true - pattern).abs().sum(dim=-1)
    divergence = spec.kl(log_true, log_pattern)  # [row, head, pos_q]
    strongest_key = true.argmax(dim=-1)
    agrees = pattern.argmax(dim=-1) == strongest_key
    return {
        "pattern_tv": l1_distance.mean(dim=(1, 2)) / 2,
        "pattern_kl": divergence[:, :, later].mean(dim=2),
        "argmax_agreement": agrees.double().mean(dim=(1, 2)),
    }


def next_token_loss(
    log_probs: Float[Tensor, "row pos vocab"], tokens: Int[Tensor, "row pos"]
) -> Float[Tensor, " row"]:
    """Mean cross-entropy of each row, nats."""
    next_tokens = tokens[:, 1:, None]
    next_log_probs = log_probs[:, :-1].gather(2, next_tokens)  # [row, pos - 1, 1]
    return -next_log_probs.mean(dim=(1, 2))


def prediction_metrics(
    logits: Float[Tensor, "row pos vocab"],
    clean_log_probs: Float[Tensor, "row pos vocab"],
    tokens: Int[Tensor, "row pos"],
) -> dict[str, Float[Tensor, " row"]]:
    """ce_loss of patched logits, and logit_kl = KL(clean || patched), by row."""
    flat_logits = logits.flatten(0, 1)
    flat_clean = clean_log_probs.flatten(0, 1)
    next_tokens = tokens.roll(-1, dims=1).flatten()  # of the last position no token is known
    next_log_probs = []
    divergences = []
    # a few positions at a time stay in the processor's cache
    for start in range(0, len(next_tokens), _POSITIONS):
        chunk = slice(start, start + _POSITIONS)
        patched = flat_logits[chunk].float().log_softmax(dim=-1)
        next_log_probs.append(patched.gather(1, next_tokens[chunk, None]))
        clean = flat_clean[chunk]
        terms = clean.exp() * (clean - patched)
        divergences.append(terms.sum(dim=-1))
    log_probs = torch.cat(next_log_probs).view(tokens.shape)
    divergence = torch.cat(divergences).view(tokens.shape)
    ce_loss = -log_probs[:, :-1].mean(dim=1)
    return {"ce_loss": ce_loss, "logit_kl": divergence.mean(dim=1)}


def explained_sums(
    scores: Float[Tensor, "batch head pos_q pos_k"],
    feature_scores: Float[Tensor, "batch head pos_q pos_k"],
    pattern: Float[Tensor, "batch head pos_q pos_k"],
    spec: AttentionSpec,
) -> Float[Tensor, "6 head"]:
    """Sums that `explained_shares` is made of, to be added over batches.

    s^2, f^2, then weighted by the pattern and by equal weights: (s~ - f~)^2 and s~^2.
    """
    allowed = spec.allowed_mask(scores.shape[-1], scores.device)
    s = scores.masked_fill(~allowed, 0.0).double()
    f = feature_scores.masked_fill(~allowed, 0.0).double()
    n_allowed = allowed.sum(dim=-1, keepdim=True)
    terms = [s.square(), f.square()]
    for weights in (pattern.double(), allowed.double() / n_allowed):
        s_centred = _centred(s, weights)
        f_centred = _centred(f, weights)
        terms.append(weights * (s_centred - f_centred).square())
        terms.append(weights * s_centred.square())
    stacked = torch.stack(terms)  # [6, batch, head, pos_q, pos_k]
    return stacked.sum(dim=(1, 3, 4))


def _centred(
    values: Tensor,
    weights: Tensor,
) -> Tensor:
    """Minus the weighted mean over keys, the last axis."""
    mean = (weights * values).sum(dim=-1, keepdim=True)
    return values - mean


def explained_shares(
    sums: Float[Tensor, "6 head"],
) -> tuple[Tensor, Tensor, Tensor]:
    """`score_explained`, its unweighted version and `norm_share` of each head; see `evals`."""
    s2, f2, error, variance, error_equal, variance_equal = sums
    return 1 - error / variance, 1 - error_equal / variance_equal, f2 / s2
