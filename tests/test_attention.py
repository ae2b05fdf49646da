"""Attention as pure functions, against plain Python loops in float64 and by hand."""

import json
import math

import pytest
import torch
from oracles import ROTARY, rotated

from sae_lens_qk.attention import AttentionSpec, allowed_keys, attention_scores, log_pattern, mask_scores, pattern_from_scores, pattern_kl, rotary_cos_sin, rotate

BATCH, POS_Q, POS_K = 2, 11, 7


def make_spec(rotary: str = "none", n_heads: int = 6, n_kv_heads: int = 3) -> AttentionSpec:
    return AttentionSpec(
        n_heads, n_kv_heads, d_head=10, d_model=13, scale=0.37, rotary_inv_freq=ROTARY[rotary]
    )


def random_queries_keys(
    spec: AttentionSpec, pos_q: int = POS_Q, pos_k: int = POS_K, dtype=torch.float64
):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(
        BATCH, pos_q, spec.n_heads, spec.d_head, generator=generator, dtype=torch.float64
    )
    keys = torch.randn(
        BATCH, pos_k, spec.n_kv_heads, spec.d_head, generator=generator, dtype=torch.float64
    )
    return queries.to(dtype), keys.to(dtype)


def loop_scores(queries: torch.Tensor, keys: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    batch, pos_q, pos_k = len(queries), queries.shape[1], keys.shape[1]
    group = spec.n_heads // spec.n_kv_heads
    scores = torch.zeros(batch, spec.n_heads, pos_q, pos_k, dtype=torch.float64)
    q_list, k_list = queries.double().tolist(), keys.double().tolist()
    for row in range(batch):
        for h in range(spec.n_heads):
            for i in range(pos_q):
                q = rotated(q_list[row][i][h], i, spec.rotary_inv_freq)
                for j in range(pos_k):
                    k = rotated(k_list[row][j][h // group], j, spec.rotary_inv_freq)
                    scores[row, h, i, j] = spec.scale * sum(
                        a * b for a, b in zip(q, k, strict=True)
                    )
    return scores


def loop_pattern(scores: torch.Tensor) -> torch.Tensor:
    pattern = torch.zeros_like(scores, dtype=torch.float64)
    for row, by_head in enumerate(scores.double().tolist()):
        for h, by_query in enumerate(by_head):
            for i, values in enumerate(by_query):
                largest = max(values[: i + 1])
                exponentials = [math.exp(value - largest) for value in values[: i + 1]]
                for j, exponential in enumerate(exponentials):
                    pattern[row, h, i, j] = exponential / sum(exponentials)
    return pattern


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("rotary", ROTARY)
def test_scores_equal_the_loop(rotary, n_kv_heads):
    spec = make_spec(rotary, n_kv_heads=n_kv_heads)
    queries, keys = random_queries_keys(spec)
    torch.testing.assert_close(
        attention_scores(queries, keys, spec), loop_scores(queries, keys, spec), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("rotary", ROTARY)
def test_pattern_equals_the_loop(rotary):
    spec = make_spec(rotary)
    queries, keys = random_queries_keys(spec, pos_q=11, pos_k=11)
    expected = loop_pattern(loop_scores(queries, keys, spec))
    pattern = pattern_from_scores(attention_scores(queries, keys, spec))
    assert pattern.dtype == torch.float64
    torch.testing.assert_close(pattern, expected, rtol=0, atol=1e-12)
    allowed = allowed_keys(11)
    log = log_pattern(attention_scores(queries, keys, spec))
    torch.testing.assert_close(log[..., allowed], expected[..., allowed].log(), rtol=0, atol=1e-12)
    assert (log[..., ~allowed] == -torch.inf).all()


def test_future_keys_have_no_probability_even_when_every_score_is_very_negative():
    """The authors' code fills with +1e-9, the largest score here, and leaves almost all probability to the future."""
    scores = -50.0 - torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    allowed = allowed_keys(7)
    authors = scores.masked_fill(~allowed, 1e-9).softmax(dim=-1)
    assert authors[..., 0, 1:].sum(dim=-1).min() > 0.99
    pattern = pattern_from_scores(scores)
    assert (pattern[..., ~allowed] == 0).all()
    torch.testing.assert_close(pattern.sum(dim=-1), torch.ones(2, 3, 7), rtol=0, atol=1e-6)
    torch.testing.assert_close(pattern.double(), loop_pattern(scores), rtol=0, atol=1e-6)
    assert (pattern[..., 0, 0] == 1).all()


def test_mask_fills_exactly_the_future_with_minus_infinity():
    scores = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    masked = mask_scores(scores)
    for i in range(7):
        for j in range(7):
            expected = scores[:, :, i, j] if j <= i else torch.full((2, 3), -torch.inf)
            assert torch.equal(masked[:, :, i, j], expected)


@pytest.mark.parametrize("rotary", ["partial", "full"])
def test_rotations_compose(rotary):
    """<R_i q, R_j k> depends on i - j only, and turns the norm not at all."""
    spec = make_spec(rotary)
    queries, keys = random_queries_keys(spec)
    q, k = queries[:1, :1, :1], keys[:1, :1, :1]

    def at(vector, position):
        return rotate(vector, spec, torch.tensor([position]))[0, 0, 0]

    for offset in (0, 1, 5, 17):
        products = torch.stack([at(q, j + offset) @ at(k, j) for j in (0, 3, 41, 200)])
        torch.testing.assert_close(products, products[:1].expand(4), rtol=0, atol=1e-12)
    assert abs(at(q, 5) @ at(k, 0) - at(q, 0) @ at(k, 5)) > 1e-3, (
        "the direction of the rotation does not show"
    )
    assert not torch.allclose(at(q, 1), at(q, 0), atol=1e-3)
    torch.testing.assert_close(at(q, 173).norm(), q.norm(), rtol=0, atol=1e-12)


def test_partial_rotation_passes_the_rest_through():
    spec = make_spec("partial")
    vectors = random_queries_keys(spec)[1]
    turned = rotate(vectors, spec)
    assert torch.equal(turned[..., 4:], vectors[..., 4:])
    assert not torch.equal(turned[:, 1:, :, :4], vectors[:, 1:, :, :4])
    assert torch.equal(turned[:, 0], vectors[:, 0])
    assert torch.equal(turned, rotate(vectors, spec, torch.arange(7)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_of_half_precision_are_float32(dtype):
    spec = make_spec("full")
    cos, sin = rotary_cos_sin(spec, torch.arange(256), dtype)
    angles = torch.arange(256, dtype=torch.float64)[:, None] * torch.tensor(
        spec.rotary_inv_freq, dtype=torch.float64
    )
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=3e-5)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotary", ROTARY)
def test_scores_and_pattern_of_half_precision_are_float32(rotary, dtype):
    spec = make_spec(rotary)
    queries, keys = random_queries_keys(spec, pos_q=7, dtype=dtype)
    scores = attention_scores(queries, keys, spec)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), loop_scores(queries, keys, spec), rtol=0, atol=1e-5)
    pattern = pattern_from_scores(scores.to(dtype))
    assert pattern.dtype == log_pattern(scores.to(dtype)).dtype == torch.float32
    torch.testing.assert_close(pattern.double(), loop_pattern(scores.to(dtype)), rtol=0, atol=1e-6)


def test_kl_equals_the_loop_and_is_finite_on_every_row():
    generator = torch.Generator().manual_seed(0)
    true, other = (
        3 * torch.randn(2, 3, 7, 7, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    kl = pattern_kl(log_pattern(true), log_pattern(other))
    P, Q = loop_pattern(true), loop_pattern(other)
    expected = torch.zeros(2, 3, 7, dtype=torch.float64)
    for row in range(2):
        for h in range(3):
            for i in range(7):
                expected[row, h, i] = sum(
                    float(P[row, h, i, j])
                    * math.log(float(P[row, h, i, j]) / float(Q[row, h, i, j]))
                    for j in range(i + 1)
                )
    assert kl.isfinite().all()
    assert (kl[..., 0] == 0).all()
    assert kl[..., 1:].min() > 0
    torch.testing.assert_close(kl, expected, rtol=0, atol=1e-12)


def test_kl_of_a_pattern_with_itself_is_zero_and_its_gradient_finite():
    scores = (
        30 * torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    log = log_pattern(scores)
    assert (pattern_kl(log, log) == 0).all()
    pattern_kl(log_pattern(torch.zeros(2, 3, 7, 7)), log).sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad.abs().max() > 0.1
    assert (scores.grad[..., ~allowed_keys(7)] == 0).all()


def test_three_tokens_by_hand():
    """One query of three tokens: scores ln 1, ln 2, ln 5 give 1/8, 2/8, 5/8; rotation by 90 degrees a position."""
    scores = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log().expand(1, 1, 3, 3)
    expected = torch.tensor(
        [[1, 0, 0], [1 / 3, 2 / 3, 0], [1 / 8, 2 / 8, 5 / 8]], dtype=torch.float64
    )
    torch.testing.assert_close(pattern_from_scores(scores)[0, 0], expected, rtol=0, atol=1e-15)
    uniform = log_pattern(torch.zeros(1, 1, 3, 3, dtype=torch.float64))
    last = math.log(3) + 1 / 8 * math.log(1 / 8) + 2 / 8 * math.log(2 / 8) + 5 / 8 * math.log(5 / 8)
    kl = pattern_kl(log_pattern(scores), uniform)[0, 0]
    assert kl.tolist() == pytest.approx(
        [0, math.log(2) + 1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3), last]
    )

    spec = AttentionSpec(1, 1, d_head=2, d_model=5, scale=3.0, rotary_inv_freq=(math.pi / 2,))
    queries = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 3, 1, 2)
    keys = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(1, 3, 1, 2)
    by_hand = torch.tensor(
        [[0, -3, 0], [3, 0, -3], [0, 3, 0]], dtype=torch.float64
    )  # 3 sin((i - j) pi/2)
    torch.testing.assert_close(
        attention_scores(queries, keys, spec)[0, 0], by_hand, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 0}, "n_heads must be at least 1, got 0"),
        ({"n_kv_heads": -2}, "n_kv_heads must be at least 1, got -2"),
        ({"d_head": 0}, "d_head must be at least 1, got 0"),
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"n_kv_heads": 4}, "n_heads must be a multiple of n_kv_heads, got 6 and 4"),
        ({"rotary_inv_freq": (1.0,) * 6}, "rotary_inv_freq covers 12 dimensions of a head of 10"),
    ],
)
def test_spec_refuses_sizes_that_do_not_fit(changes, message):
    values = {**make_spec("full").to_dict(), **changes}
    with pytest.raises(ValueError, match=message):
        AttentionSpec.from_dict(values)


@pytest.mark.parametrize("rotary", ROTARY)
def test_spec_survives_json(rotary):
    spec = make_spec(rotary)
    again = AttentionSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert isinstance(again.rotary_inv_freq, tuple)
    assert (spec.rotary_dim, spec.heads_per_kv, spec.d_queries, spec.d_keys) == (
        2 * len(ROTARY[rotary]),
        2,
        60,
        30,
    )


def test_heads_are_consecutive_blocks_of_the_flat_vector():
    spec = make_spec()
    queries, keys = (
        spec.split_queries(torch.arange(60.0)[None]),
        spec.split_keys(torch.arange(30.0)[None]),
    )
    assert queries.shape == (1, 6, 10)
    assert keys.shape == (1, 3, 10)
    assert queries[0, 4, 7] == 47
    assert keys[0, 2, 7] == 27
