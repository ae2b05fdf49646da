"""The compiled divergence of a pattern from that of scores, and its gradient."""

import pytest
import torch
from comparing import assert_near
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.training.losses import TruePattern

SHAPE = (2, 3, 11, 11)
"""[batch, head, pos_q, pos_k]"""
WINDOWS = (None, 1, 3, 11)
DTYPES = (torch.float64, torch.float32)


def make_spec(window: int | None = None) -> AttentionSpec:
    return AttentionSpec(
        n_heads=3,
        n_kv_heads=1,
        d_head=5,
        d_model=7,
        scale=1.0,
        rotary_inv_freq=(1.0, 0.1),
        window=window,
    )


def random_scores(
    seed: int,
    dtype: torch.dtype,
) -> Tensor:
    """Not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    scores = 1.5 * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return scores.to(dtype).transpose(2, 3)


def kl_and_gradient(kl_function, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Rows are weighted unevenly, so that each row's gradient has its own factor."""
    leaf = scores.detach().requires_grad_()
    kl = kl_function(leaf)
    row_weights = torch.linspace(-1, 2, kl.numel(), dtype=kl.dtype).view_as(kl)
    (kl * row_weights).sum().backward()
    return kl.detach(), leaf.grad


def assert_exact(
    true: TruePattern,
    scores: Tensor,
    tolerance: float,
) -> Tensor:
    """Divergence and gradient equal autograd of the spec's equation in float64.

    Returns:
        The expected divergence.
    """
    spec = true.spec
    exact = true.log_pattern.double()
    kl, gradient = kl_and_gradient(true.kl, scores)
    expected, expected_gradient = kl_and_gradient(
        lambda leaf: spec.kl(exact, spec.log_pattern(leaf)), scores.double()
    )
    assert kl.dtype == gradient.dtype == scores.dtype
    assert kl.isfinite().all()
    torch.testing.assert_close(kl.double(), expected, rtol=tolerance, atol=tolerance)
    assert_near(gradient.double(), expected_gradient, tolerance)
    assert gradient[..., ~spec.allowed_mask(SHAPE[-1])].eq(0).all()
    return expected


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_kl_and_its_gradient_equal_autograd(dtype, window):
    true = TruePattern.from_scores(random_scores(0, dtype), make_spec(window))
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    expected = assert_exact(true, random_scores(1, dtype), tolerance)
    if window != 1:  # a window of one key leaves no choice
        assert expected[..., 1:].min() > 0.001


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_kl_of_extreme_scores_is_exact(dtype):
    """Scores of +-80 in either pattern: one key holds all, others underflow."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    mild = random_scores(0, dtype)
    extreme = 80 * random_scores(1, dtype).sign()
    other_extreme = 80 * random_scores(2, dtype).sign()
    for true_scores in (mild, other_extreme):
        true = TruePattern.from_scores(true_scores, make_spec())
        for scores in (extreme, random_scores(3, dtype)):
            assert assert_exact(true, scores, tolerance).max() > 1


def test_kl_of_a_pattern_with_its_own_scores_is_zero():
    spec = make_spec()
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 11, 3, 5, generator=generator, dtype=torch.float64)
    keys = torch.randn(2, 11, 1, 5, generator=generator, dtype=torch.float64)
    true = TruePattern.of(queries, keys, spec)
    kl, gradient = kl_and_gradient(true.kl, spec.scores(queries, keys))
    assert_near(kl, torch.zeros_like(kl), 1e-14)
    assert_near(gradient, torch.zeros_like(gradient), 1e-14)


def test_nan_in_either_pattern_gives_nan():
    """A KL of 0 would let training step on with NaN gradients."""
    true = TruePattern.from_scores(random_scores(0, torch.float32), make_spec())
    scores = random_scores(1, torch.float32)
    spoiled = scores.clone()
    spoiled[1, 2, 7, 4] = torch.nan
    is_nan = true.kl(spoiled).isnan()
    assert is_nan[1, 2, 7]
    assert is_nan.sum() == 1
    log_pattern = true.log_pattern.clone()
    log_pattern[0, 1, 5, :6] = torch.nan
    spoiled_true = TruePattern(log_pattern.exp(), log_pattern, true.spec)
    assert spoiled_true.kl(scores)[0, 1, 5].isnan()
