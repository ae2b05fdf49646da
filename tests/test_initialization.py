"""Where step 1 starts: what the encoders read of the layer's input."""

import pytest
import torch

import sae_lens_qk as qk
from sae_lens_qk.attention import rotate
from sae_lens_qk.weights import QKWeights
from sae_lens_qk.training import initialization
from sae_lens_qk.training.transcoders import TranscodersTrainingSAE

N_POS, D_MODEL, D_HEAD = 8, 12, 6


def layer(
    n_heads: int, n_kv_heads: int, inv_freq: tuple[float, ...] = ()
) -> tuple[QKWeights, qk.AttentionSpec]:
    """A layer that reads the first half of its input; its keys' last dimension is read by no query."""
    generator = torch.Generator().manual_seed(0)
    W_Q, W_K = (torch.randn(n, D_MODEL, D_HEAD, generator=generator) for n in (n_heads, n_kv_heads))
    W_Q[:, D_MODEL // 2 :], W_K[:, D_MODEL // 2 :] = 0.0, 0.0
    W_Q[..., -1] = 0.0
    W_K[:, -1, -1] = 5.0  # the last input direction reaches keys, and no score
    weights = QKWeights(W_Q, torch.zeros(n_heads, D_HEAD), W_K, torch.zeros(n_kv_heads, D_HEAD))
    return weights, qk.AttentionSpec(n_heads, n_kv_heads, D_HEAD, D_MODEL, D_HEAD**-0.5, inv_freq)


def tokens(n: int = 40 * N_POS) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(1)) + 1


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("side", ["query", "key"])
def test_encoders_read_only_what_scores_depend_on(side, n_heads, n_kv_heads):
    weights, spec = layer(n_heads, n_kv_heads)
    x = tokens()
    scored = initialization.from_scores(x, 16, side, weights, spec, N_POS, seed=0)
    assert scored.encoders.norm(dim=1).allclose(torch.ones(16))
    assert scored.encoders[:, D_MODEL // 2 :].abs().max() < 1e-5
    plain = initialization.from_data(x, 16, side, weights, seed=0)
    assert plain.encoders[:, D_MODEL // 2 :].abs().max() > 0.1


@pytest.mark.parametrize("inv_freq", [(), (1.0, 0.1)])
def test_likeness_of_two_tokens_is_that_of_their_scores(inv_freq):
    weights, spec = layer(4, 2, inv_freq)
    x = tokens()
    offsets = torch.randint(N_POS, (len(x),), generator=torch.Generator().manual_seed(3))
    reads = initialization._reads(x, "key", weights, spec, N_POS, torch.Generator().manual_seed(3))
    first, second = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(2))
    queries = rotate(weights.queries(x)[None], spec, offsets)[0]
    expected = torch.zeros(())
    for head in range(4):
        W = weights.W_K[head // 2]
        expected += ((queries[:, head] @ (first @ W)) * (queries[:, head] @ (second @ W))).mean()
    torch.testing.assert_close((first @ reads) @ (second @ reads), expected, rtol=1e-4, atol=1e-4)


def test_the_same_token_is_not_chosen_twice():
    weights, spec = layer(2, 2)
    x = torch.cat([tokens(1).repeat(300, 1), tokens(20)])
    encoders = initialization.from_scores(x, 12, "key", weights, spec, N_POS, seed=0).encoders
    likeness = (encoders @ encoders.T).fill_diagonal_(0)
    assert likeness.max() < 0.999
    drawn = initialization.from_data(x, 12, "key", weights, seed=0).encoders
    assert (drawn @ drawn.T).fill_diagonal_(0).max() > 0.999  # most of the tokens are one


@pytest.mark.parametrize("name", ["scores", "data"])
def test_the_start_is_a_least_squares_fit(name):
    weights, spec = layer(2, 2)
    x = tokens()
    cfg = qk.TranscodersTrainingConfig(
        d_in=D_MODEL,
        d_query=24,
        d_key=24,
        k=4.0,
        initialization=name,
        attention=spec.to_dict(),
        model_name="made",
    )
    sae = TranscodersTrainingSAE(cfg)
    sae.attach(weights, N_POS, x)
    (query, _), true = sae.encode_halves(x[: 8 * N_POS]), weights.queries(x[: 8 * N_POS]).flatten(1)
    wanted, given = true - sae.query.b_dec, query.acts @ sae.query.W_dec
    assert float((wanted - given).pow(2).sum()) < float(wanted.pow(2).sum())
    torch.testing.assert_close((given * wanted).sum(), given.pow(2).sum(), rtol=0.05, atol=0.05)
