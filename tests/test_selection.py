"""Which features fire, against plain loops, and what they compute, against dense autograd."""

import pytest
import torch
from small_half import generator, small_half
from tiny_dictionaries import tiny_dictionary
from tiny_models import tiny_model

from sae_lens_qk.training.selection import (
    Selection,
    batch_cutoff,
    calibrated_threshold,
    strengths,
)
from sae_lens_qk.training.transcode import transcode


def test_rules_against_loops():
    strength = torch.randn(11, 7, generator=generator())
    rows = strength.tolist()
    topk = Selection("topk", 3).fires(strength).fires.tolist()
    relu = Selection("relu").fires(strength).fires.tolist()
    for values, topk_fires, relu_fires in zip(rows, topk, relu, strict=True):
        third = sorted(values)[-3]
        assert topk_fires == [value >= third and value > 0 for value in values]
        assert relu_fires == [value > 0 for value in values]
    descending = sorted((value for values in rows for value in values), reverse=True)
    fires, cutoff = Selection("batchtopk", 1.5).fires(strength)
    assert float(cutoff) == descending[int(1.5 * 11) - 1]
    assert fires.tolist() == [[value >= float(cutoff) for value in values] for values in rows]


@pytest.mark.parametrize("rule", ["batchtopk", "topk", "relu"])
def test_only_positive_strengths_fire(rule):
    strength = torch.full((5, 7), -1.0)
    strength[2, 3] = 1.0
    fires, cutoff = Selection(rule, 4).fires(strength)
    assert fires.nonzero().tolist() == [[2, 3]]
    assert cutoff == 0


def test_position_0_takes_no_part():
    half = small_half()
    x = torch.randn(12, 6, generator=generator())
    strength = Selection("batchtopk", 2.0, context_size=4).strengths(half, x)
    assert (strength[::4] == -torch.inf).all()
    expected = (x @ half.W_enc + half.b_enc) * half.W_dec.norm(dim=1)
    competes = torch.arange(12) % 4 > 0
    torch.testing.assert_close(strength[competes], expected[competes].detach())


@pytest.mark.parametrize("k", [0.01, 1.0, 3.7, 64.0, 122.0])
def test_batch_cutoff_is_the_exact_one(k):
    """Also where the sample is far off: features that differ in strength, at any place."""
    feature = torch.arange(122)
    scales = [
        torch.ones(122),
        torch.rand(122, generator=generator()),
        (feature % 61 == 0).float(),  # the features of the sample's first rows, and no others
        (feature % 61 == 1).float(),
    ]
    for scale in scales:
        strength = torch.randn(301, 122, generator=generator(1)) * scale
        expected = strength.flatten().sort(descending=True).values[int(k * 301) - 1]
        assert batch_cutoff(strength, k) == expected


def test_selection_in_bfloat16_keeps_float32_activations():
    half = small_half()
    x = torch.randn(301, 6, generator=generator())
    selection = Selection("batchtopk", 2.0)
    exact = selection.strengths(half, x)
    rounded = selection.strengths(half, x, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.01 * exact.abs().max()
    fires = selection.fires(rounded).fires
    assert 2.0 <= fires.sum() / len(x) < 2.1
    acts = transcode(half, x, fires).acts.to_dense()
    assert torch.allclose(acts, (x @ half.W_enc + half.b_enc) * fires, atol=1e-5)


@pytest.mark.parametrize("k", [1.5, 4.0])
def test_threshold_over_several_batches_is_that_of_all_tokens_at_once(k):
    """Batches differ in strength: cutting each of them to its share would lower the threshold."""
    half = tiny_dictionary(tiny_model("llama")).query
    random = generator()
    x = torch.randn(3, 53, half.cfg.d_in, generator=random)
    x = x * torch.tensor([3.0, 1.0, 0.3])[:, None, None]
    tokens = x.flatten(0, 1)
    threshold = calibrated_threshold(half, [tokens], k)
    assert torch.equal(calibrated_threshold(half, list(x), k), threshold)
    assert int((strengths(half, tokens) > threshold).sum()) == int(k * len(tokens))


# Transcoding


@pytest.mark.parametrize("few", [0, 1 << 14], ids=["dense", "active entries"])
def test_activations_are_never_negative(few, monkeypatch):
    """Strengths are rounded otherwise than pre-activations: one may be positive, the other not.

    The square root of the authors' penalty was NaN there.
    """
    monkeypatch.setattr("sae_lens_qk.training.transcode._FEW", few)
    half = small_half()
    x = torch.randn(11, 6, generator=generator())
    acts = transcode(half, x, torch.ones(11, 7, dtype=torch.bool)).acts
    assert acts.is_sparse == (few > 0)
    hidden_pre = x @ half.W_enc + half.b_enc
    assert (hidden_pre < 0).any()
    assert torch.allclose(acts.to_dense(), hidden_pre.relu(), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_through_active_entries_are_the_dense_ones(dtype):
    """With a token at which nothing fires, a feature that never fires and one that always does."""
    half = small_half(dtype)
    dense = small_half(dtype)
    random = generator()
    x = torch.randn(11, 6, generator=random, dtype=half.dtype)
    output_direction = torch.randn(11, 5, generator=random, dtype=half.dtype)
    acts_direction = torch.randn(11, 7, generator=random, dtype=half.dtype)
    lowest = float((x @ dense.W_enc + dense.b_enc)[:, 2].min())
    for either in (half, dense):
        either.b_enc.data[2] -= lowest - 0.1  # so that it is positive everywhere
    hidden_pre = x @ dense.W_enc + dense.b_enc
    fires = (torch.rand(11, 7, generator=random) < 0.7) & (hidden_pre > 0)
    fires[:, 2] = True
    fires[:, 3] = False
    fires[4] = False

    acts, output = transcode(half, x, fires)
    expected_acts = hidden_pre * fires
    expected_output = expected_acts @ dense.W_dec + dense.b_dec
    assert torch.allclose(acts.to_dense(), expected_acts, atol=1e-5)
    assert torch.allclose(output, expected_output, atol=1e-5)

    loss = (output * output_direction).sum() + (acts.to_dense() * acts_direction).sum()
    loss.backward()
    dense_loss = (expected_output * output_direction).sum()
    dense_loss = dense_loss + (expected_acts * acts_direction).sum()
    dense_loss.backward()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        grad = half.get_parameter(name).grad
        assert grad.is_contiguous()
        assert torch.allclose(grad, dense.get_parameter(name).grad, atol=1e-5), name
    assert half.W_dec.grad[3].abs().max() == 0
