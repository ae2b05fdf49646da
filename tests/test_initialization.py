"""Where step 1 starts: what the encoders read of the layer's input."""

import pytest
import torch
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.training.initialization import data_start, score_directions, scores_start
from sae_lens_qk.training.transcoders import TranscodersTrainingSAE
from sae_lens_qk.weights import QKWeights

N_POS = 8
D_MODEL = 12
D_HEAD = 6


def make_spec(
    n_heads: int,
    n_kv_heads: int,
    inv_freq: tuple[float, ...] = (),
) -> qk.AttentionSpec:
    return qk.AttentionSpec(n_heads, n_kv_heads, D_HEAD, D_MODEL, D_HEAD**-0.5, inv_freq)


def make_weights(spec: qk.AttentionSpec) -> QKWeights:
    """They read the first half of the input; the keys' last dimension is read by no query."""
    generator = torch.Generator().manual_seed(0)
    W_Q = torch.randn(spec.n_heads, D_MODEL, D_HEAD, generator=generator)
    W_K = torch.randn(spec.n_kv_heads, D_MODEL, D_HEAD, generator=generator)
    W_Q[:, D_MODEL // 2 :] = 0.0
    W_K[:, D_MODEL // 2 :] = 0.0
    W_Q[..., -1] = 0.0
    W_K[:, -1, -1] = 5.0  # the last input direction reaches keys, and no score
    b_Q = torch.zeros(spec.n_heads, D_HEAD)
    b_K = torch.zeros(spec.n_kv_heads, D_HEAD)
    return QKWeights(W_Q, b_Q, W_K, b_K)


def random_tokens(n: int = 40 * N_POS) -> Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(1)) + 1


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("side", ["query", "key"])
def test_encoders_read_only_what_scores_depend_on(side, n_heads, n_kv_heads):
    spec = make_spec(n_heads, n_kv_heads)
    weights = make_weights(spec)
    x = random_tokens()
    encoders = scores_start(x, 16, side, weights, spec, N_POS, seed=0).encoders
    assert encoders.norm(dim=1).allclose(torch.ones(16))
    assert encoders[:, D_MODEL // 2 :].abs().max() < 1e-5
    data_encoders = data_start(x, 16, side, weights, seed=0).encoders
    assert data_encoders[:, D_MODEL // 2 :].abs().max() > 0.1


@pytest.mark.parametrize("inv_freq", [(), (1.0, 0.1)])
def test_likeness_of_two_tokens_is_that_of_their_scores(inv_freq):
    spec = make_spec(4, 2, inv_freq)
    weights = make_weights(spec)
    x = random_tokens()
    offsets = torch.randint(N_POS, (len(x),), generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    directions = score_directions(x, "key", weights, spec, N_POS, generator)
    first, second = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(2))
    queries = spec.rotate(weights.queries(x)[None], offsets)[0]
    expected = torch.zeros(())
    for head in range(4):
        W = weights.W_K[head // 2]
        first_scores = queries[:, head] @ (first @ W)
        second_scores = queries[:, head] @ (second @ W)
        expected += (first_scores * second_scores).mean()
    likeness = (first @ directions) @ (second @ directions)
    torch.testing.assert_close(likeness, expected, rtol=1e-4, atol=1e-4)


def test_the_same_token_is_not_taken_twice():
    spec = make_spec(2, 2)
    weights = make_weights(spec)
    # most of the tokens are one
    x = torch.cat([random_tokens(1).repeat(300, 1), random_tokens(20)])

    def largest_likeness(encoders: Tensor) -> float:
        return float((encoders @ encoders.T).fill_diagonal_(0).max())

    assert largest_likeness(scores_start(x, 12, "key", weights, spec, N_POS, 0).encoders) < 0.999
    assert largest_likeness(data_start(x, 12, "key", weights, 0).encoders) > 0.999


@pytest.mark.parametrize("name", ["scores", "data"])
def test_the_start_is_a_least_squares_fit(name):
    spec = make_spec(2, 2)
    weights = make_weights(spec)
    x = random_tokens()
    cfg = qk.TranscodersTrainingConfig(
        d_in=D_MODEL,
        d_query=24,
        d_key=24,
        k=4.0,
        initialization=name,
        attention=spec.to_dict(),
    )
    sae = TranscodersTrainingSAE(cfg)
    sae.attach(weights, N_POS, x)
    first = x[: 8 * N_POS]
    query, _ = sae.encode_halves(first)
    target = weights.queries(first).flatten(1) - sae.query.b_dec
    output = query.acts @ sae.query.W_dec
    assert float((target - output).pow(2).sum()) < float(target.pow(2).sum())
    torch.testing.assert_close((output * target).sum(), output.pow(2).sum(), rtol=0.05, atol=0.05)
