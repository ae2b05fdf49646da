"""Losses of both training steps against plain loops, for every kind of attention a spec can say."""

import math

import pytest
import torch
from small_half import generator, small_half
from tiny_models import KINDS, tiny_model
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.host.layer import AttentionLayer, run_recording
from sae_lens_qk.training.losses import (
    AttentionOutput,
    TruePattern,
    dead_feature_loss,
    pattern_losses,
    sqrt_penalty,
)
from sae_lens_qk.training.selection import strengths
from sae_lens_qk.training.transcode import transcode
from sae_lens_qk.weights import OVWeights

N_POS = 7
N_HEADS = 4
SIZES = {"n_heads": N_HEADS, "n_kv_heads": 2, "d_head": 6, "d_model": 5, "scale": 0.4}
SLOPES = (0.5, 0.25, 0.125, 0.0625)
SINKS = (0.3, -1.0, 2.0, 0.0)
VARIANTS = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "bias": {"alibi_slopes": SLOPES},
    "sinks": {"sinks": SINKS},
    "all": {"window": 4, "softcap": 2.0, "alibi_slopes": SLOPES, "sinks": SINKS},
}


@pytest.fixture(params=VARIANTS)
def spec(request) -> qk.AttentionSpec:
    """Rotary attention, plain and with what other models have."""
    return qk.AttentionSpec(**SIZES, **VARIANTS[request.param], rotary_inv_freq=(1.0, 0.3))


def random64(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def row_probabilities(
    scores: Tensor, spec: qk.AttentionSpec, head: int, i: int
) -> tuple[list[float], float]:
    """Probability of each allowed key, and of the sink, for one row of scores."""
    first = 0 if spec.window is None else max(0, i - spec.window + 1)
    exponentials = []
    for j in range(first, i + 1):
        logit = float(scores[j])
        if spec.softcap is not None:
            logit = spec.softcap * math.tanh(logit / spec.softcap)
        if spec.alibi_slopes:
            logit += spec.alibi_slopes[head] * (j - i)
        exponentials.append(math.exp(logit))
    sink = math.exp(spec.sinks[head]) if spec.sinks else 0.0
    total = sum(exponentials) + sink
    return [exponential / total for exponential in exponentials], sink / total


def kl_by_hand(
    true_scores: Tensor,
    scores: Tensor,
    spec: qk.AttentionSpec,
) -> Tensor:
    """KL of each row in nats, sink included, float64 [batch, head, pos_q]."""
    kl = torch.zeros(true_scores.shape[:3], dtype=torch.float64)
    for row, head, i in torch.cartesian_prod(*map(torch.arange, kl.shape)).tolist():
        keys, sink = row_probabilities(true_scores[row, head, i], spec, head, i)
        other_keys, other_sink = row_probabilities(scores[row, head, i], spec, head, i)
        terms = [p * math.log(p / other) for p, other in zip(keys, other_keys, strict=True)]
        if sink:
            terms.append(sink * math.log(sink / other_sink))
        kl[row, head, i] = sum(terms)
    return kl


# Pattern


def test_pattern_losses_against_loops(spec):
    queries = random64(2, N_POS, N_HEADS, 6, seed=1)
    q_hat = random64(2, N_POS, N_HEADS, 6, seed=2)
    keys = random64(2, N_POS, 2, 6, seed=3)
    k_hat = random64(2, N_POS, 2, 6, seed=4)
    losses = pattern_losses(queries, keys, q_hat, k_hat, spec)
    true_scores = spec.scores(queries, keys)
    rebuilt = {"kl_full": (q_hat, k_hat), "kl_query": (q_hat, keys), "kl_key": (queries, k_hat)}
    assert set(losses) == set(rebuilt)
    for name, vectors in rebuilt.items():
        expected = kl_by_hand(true_scores, spec.scores(*vectors), spec).mean()
        assert float(losses[name]) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("kl_weight", [0.0, 1.7], ids=["difference", "both"])
def test_comparison_of_patterns_and_its_gradient(kl_weight, spec):
    """The divergence by hand; the gradient against autograd through the spec's own softmax."""
    shape = (2, N_HEADS, N_POS, N_POS)
    true_scores = random64(*shape, seed=1)
    true = TruePattern.from_scores(true_scores, spec)
    direction = random64(*shape, seed=2)
    scores = random64(*shape, seed=3).requires_grad_()
    other_scores = scores.detach().clone().requires_grad_()

    kl, difference = true.compare(scores)
    log_pattern = spec.log_pattern(other_scores)
    expected_difference = log_pattern.exp() - true.pattern
    torch.testing.assert_close(kl, kl_by_hand(true_scores, scores, spec))
    torch.testing.assert_close(difference, expected_difference)

    loss = (difference * direction).sum()
    if kl_weight:
        loss = loss + kl_weight * kl.sum()
    loss.backward()
    expected_kl = spec.kl(true.log_pattern, log_pattern)
    ((expected_difference * direction).sum() + kl_weight * expected_kl.sum()).backward()
    torch.testing.assert_close(scores.grad, other_scores.grad)


# Penalties


def test_penalty_against_loops():
    acts = torch.rand(3, 5, generator=generator())
    W_dec = torch.randn(5, 2, generator=generator(1))
    total = 0.0
    for t in range(3):
        for f in range(5):
            total += (float(acts[t, f]) * float(W_dec[f].norm()) + 1e-7) ** 0.5
    assert float(sqrt_penalty(acts, W_dec)) == pytest.approx(total / 3, rel=1e-5)


def test_the_penalty_on_active_entries_alone_is_the_same():
    half = small_half("float64")
    dense = small_half("float64")
    x = random64(11, 6)
    hidden_pre = x @ dense.W_enc + dense.b_enc
    acts = transcode(half, x, hidden_pre > 0).acts
    penalty = sqrt_penalty(acts, half.W_dec)
    dense_penalty = sqrt_penalty(hidden_pre.relu(), dense.W_dec)
    assert float(penalty) == pytest.approx(float(dense_penalty), rel=1e-12)
    penalty.backward()
    dense_penalty.backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        assert torch.allclose(half.get_parameter(name).grad, dense.get_parameter(name).grad), name


def test_dead_feature_loss_wakes_only_dead_features():
    half = small_half()
    dead = torch.tensor([True, False, False, True, False, False, True])
    residual = torch.randn(11, 5, generator=generator())
    x = torch.randn(11, 6, generator=generator(2))
    strength = strengths(half, x).detach()
    dead_feature_loss(residual, x, strength, half, dead, k=2).backward()
    for grad in (half.W_dec.grad, half.W_enc.grad.T, half.b_enc.grad):
        assert (grad[~dead] == 0).all()
        assert (grad[dead] != 0).any()


# Attention output


@pytest.mark.parametrize("kind", KINDS)
def test_attention_output_is_the_hosts(kind):
    """The model's own pattern and its own inputs give its attention output, up to b_O."""
    model = tiny_model(kind)
    ov = AttentionLayer(model, 1).ov_weights
    names = [f"blocks.1.attn.{name}" for name in ("hook_in", "hook_pattern", "hook_out")]
    tokens = torch.randint(0, model.cfg.d_vocab, (3, 13), generator=generator())
    _, values = run_recording(model, tokens, names)
    x, pattern, expected = (values[name] for name in names)
    output = ov.outputs(pattern, AttentionOutput.of(x, ov).values) + ov.b_O
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_error_of_the_attention_output_is_a_share_of_its_variance():
    values = torch.randn(2, N_POS, 2, 3, generator=generator())
    W_O = torch.randn(4, 3, 5, generator=generator(1))
    weights = OVWeights(torch.empty(2, 5, 3), torch.empty(2, 3), W_O, torch.empty(5))
    patterns = torch.rand(2, 2, 4, N_POS, N_POS, generator=generator(2)).softmax(dim=-1)
    pattern = patterns[0]
    difference = patterns[1] - pattern

    def output_by_hand(weights_over_keys: Tensor) -> Tensor:
        output = torch.zeros(2, N_POS, 5)
        for row, i, head, j in torch.cartesian_prod(*map(torch.arange, (2, N_POS, 4, N_POS))):
            value = values[row, j, head // 2] @ W_O[head]
            output[row, i] += weights_over_keys[row, head, i, j] * value
        return output.flatten(0, 1)

    output = output_by_hand(pattern)
    squared_error = output_by_hand(difference).square().sum()
    expected = squared_error / (output - output.mean(dim=0)).square().sum()
    error = AttentionOutput(values, weights).error(pattern, difference)
    assert float(error) == pytest.approx(float(expected), rel=1e-4)
