"""AttentionSpec against plain Python loops in float64, by hand, and against transformers' own."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_oracles import loop_allowed, loop_kl, loop_pattern, loop_row, loop_scores
from comparing import assert_near
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sink_attention

from sae_lens_qk.attention import AttentionSpec

BATCH = 2
POS_Q = 11
POS_K = 7
N_HEADS = 6

ROTARY = {"none": (), "partial": (1.0, 0.3), "full": (1.0, 0.3, 0.1, 0.02, 0.007)}
WINDOWS = (None, 1, 3, 50)
SINKS = (0.4, -1.0, 2.0, 0.0, 1.3, -3.0)
SLOPES = (0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
VARIANTS = [
    {"window": window, "softcap": softcap, "sinks": sinks, "alibi_slopes": slopes}
    for window, softcap, sinks, slopes in itertools.product(
        WINDOWS, (None, 2.5), ((), SINKS), ((), SLOPES)
    )
]
"""Every combination of window, softcap, sinks and bias."""


def make_spec(
    rotary: str = "none",
    n_kv_heads: int = 3,
    **changes,
) -> AttentionSpec:
    return AttentionSpec(
        n_heads=N_HEADS,
        n_kv_heads=n_kv_heads,
        d_head=10,
        d_model=13,
        scale=0.37,
        rotary_inv_freq=ROTARY[rotary],
        **changes,
    )


def random_queries_keys(spec, pos_q=POS_Q, pos_k=POS_K, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    query_shape = (BATCH, pos_q, spec.n_heads, spec.d_head)
    key_shape = (BATCH, pos_k, spec.n_kv_heads, spec.d_head)
    queries = torch.randn(query_shape, generator=generator, dtype=torch.float64)
    keys = torch.randn(key_shape, generator=generator, dtype=torch.float64)
    return queries.to(dtype), keys.to(dtype)


def random_scores(
    n_pos: int = POS_K,
    seed: int = 0,
) -> torch.Tensor:
    """float64 [batch, head, pos_q, pos_k], a few units large."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, N_HEADS, n_pos, n_pos)
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64)


# Scores


@pytest.mark.parametrize("n_kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("rotary", ROTARY)
def test_scores_equal_the_loop(rotary, n_kv_heads):
    spec = make_spec(rotary, n_kv_heads)
    queries, keys = random_queries_keys(spec)
    expected = loop_scores(queries, keys, spec)
    assert_near(spec.scores(queries, keys), expected, 1e-12)
    rotated_queries = spec.rotate(queries)
    rotated_keys = spec.rotate(keys)
    assert torch.equal(spec.dot(rotated_queries, rotated_keys), spec.scores(queries, keys))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rotary", ROTARY)
def test_scores_and_pattern_of_half_precision_are_float32(rotary, dtype):
    spec = make_spec(rotary)
    queries, keys = random_queries_keys(spec, pos_q=7, dtype=dtype)
    scores = spec.scores(queries, keys)
    assert scores.dtype == torch.float32
    assert_near(scores.double(), loop_scores(queries.double(), keys.double(), spec))
    rounded = scores.to(dtype)
    pattern = spec.pattern(rounded)
    assert pattern.dtype == spec.log_pattern(rounded).dtype == torch.float32
    assert_near(pattern.double(), loop_pattern(rounded, spec)[..., :-1], 1e-6)


@pytest.mark.parametrize("rotary", ["partial", "full"])
def test_rotations_compose(rotary):
    """<R_i q, R_j k> depends on i - j only, and turns the norm not at all."""
    spec = make_spec(rotary)
    queries, keys = random_queries_keys(spec)
    q = queries[:1, :1, :1]
    k = keys[:1, :1, :1]

    def turned(vector, position):
        return spec.rotate(vector, torch.tensor([position]))[0, 0, 0]

    for offset in (0, 1, 5, 17):
        products = [turned(q, j + offset) @ turned(k, j) for j in (0, 3, 41, 200)]
        assert_near(torch.stack(products), products[0].expand(4), 1e-12)
    forward = turned(q, 5) @ turned(k, 0)
    backward = turned(q, 0) @ turned(k, 5)
    assert abs(forward - backward) > 1e-3, "the direction of the rotation does not show"
    assert not torch.allclose(turned(q, 1), turned(q, 0), atol=1e-3)
    assert_near(turned(q, 173).norm(), q.norm(), 1e-12)


def test_partial_rotation_passes_the_rest_through():
    spec = make_spec("partial")
    _, vectors = random_queries_keys(spec)
    turned = spec.rotate(vectors)
    assert torch.equal(turned[..., 4:], vectors[..., 4:])
    assert not torch.equal(turned[:, 1:, :, :4], vectors[:, 1:, :, :4])
    assert torch.equal(turned[:, 0], vectors[:, 0])
    assert torch.equal(turned, spec.rotate(vectors, torch.arange(7)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_of_half_precision_are_float32(dtype):
    spec = make_spec("full")
    positions = torch.arange(256)
    cos, sin = spec.cos_sin(positions, dtype)
    inv_freq = torch.tensor(spec.rotary_inv_freq, dtype=torch.float64)
    angles = positions.double()[:, None] * inv_freq
    assert cos.dtype == sin.dtype == torch.float32
    assert_near(cos.double(), angles.cos(), 3e-5)
    assert_near(sin.double(), angles.sin(), 3e-5)


# Which keys are allowed


@pytest.mark.parametrize("window", WINDOWS)
def test_allowed_keys_equal_the_loop(window):
    spec = make_spec(window=window)
    n_pos = 9
    mask = spec.allowed_mask(n_pos)
    first_keys = spec.first_keys(n_pos)
    n_allowed = 0
    offsets = set()
    for i in range(n_pos):
        keys = [j for j in range(n_pos) if loop_allowed(i, j, window)]
        assert mask[i].nonzero()[:, 0].tolist() == keys
        assert first_keys[i] == keys[0]
        assert keys[-1] == i
        assert [j for j in range(n_pos) if spec.allowed(i, j)] == keys
        n_allowed += len(keys)
        offsets |= {i - j for j in keys}
    assert spec.n_allowed(n_pos) == n_allowed
    assert spec.n_offsets(n_pos) == len(offsets)
    assert first_keys.dtype == np.int64


@pytest.mark.parametrize("window", WINDOWS)
def test_masked_logits_hold_minus_infinity_at_keys_that_are_not_allowed(window):
    scores = random_scores()
    logits = make_spec(window=window).masked_logits(scores)
    for i in range(POS_K):
        for j in range(POS_K):
            if loop_allowed(i, j, window):
                assert torch.equal(logits[:, :, i, j], scores[:, :, i, j])
            else:
                assert (logits[:, :, i, j] == -torch.inf).all()


def test_future_keys_have_no_probability_even_when_every_score_is_very_negative():
    """The authors' code fills with +1e-9, the largest score here: the future gets nearly all."""
    spec = make_spec()
    scores = -50.0 - random_scores().abs().float()
    allowed = spec.allowed_mask(POS_K)
    authors = scores.masked_fill(~allowed, 1e-9).softmax(dim=-1)
    assert authors[..., 0, 1:].sum(dim=-1).min() > 0.99
    pattern = spec.pattern(scores)
    assert (pattern[..., ~allowed] == 0).all()
    assert_near(pattern.sum(dim=-1), torch.ones(BATCH, N_HEADS, POS_K), 1e-6)
    assert (pattern[..., 0, 0] == 1).all()


# Pattern and divergence, every variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_pattern_equals_the_loop(variant):
    spec = make_spec(**variant)
    scores = random_scores()
    expected = loop_pattern(scores, spec)[..., :-1]
    pattern = spec.pattern(scores)
    assert pattern.dtype == torch.float64
    assert_near(pattern, expected, 1e-12)
    allowed = spec.allowed_mask(POS_K)
    log_pattern = spec.log_pattern(scores)
    assert_near(log_pattern[..., allowed], expected[..., allowed].log(), 1e-12)
    assert (log_pattern[..., ~allowed] == -torch.inf).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_rows_equal_the_loop(variant):
    spec = make_spec(**variant)
    scores = random_scores()
    for head in (0, 4):
        for i in range(POS_K):
            rows = scores[:, head, i, : i + 1]  # [batch, key]
            pattern = spec.row_pattern(rows, head, i)
            for row, shares in zip(rows.tolist(), pattern.tolist(), strict=True):
                assert shares == pytest.approx(loop_row(row, spec, head, i)[:-1], abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_divergence_equals_the_loop(variant):
    spec = make_spec(**variant)
    true_scores = random_scores()
    other_scores = random_scores(seed=1)
    kl = spec.kl(spec.log_pattern(true_scores), spec.log_pattern(other_scores))
    expected = loop_kl(loop_pattern(true_scores, spec), loop_pattern(other_scores, spec))
    assert kl.isfinite().all()
    assert_near(kl, expected, 1e-10)
    if spec.window != 1 or spec.sinks:
        assert kl[..., 1:].min() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_divergence_of_a_pattern_with_itself_is_zero_and_its_gradient_finite(variant):
    spec = make_spec(**variant)
    scores = (10 * random_scores().float()).requires_grad_()
    log_pattern = spec.log_pattern(scores)
    assert spec.kl(log_pattern, log_pattern).abs().max() == 0
    flat = spec.log_pattern(torch.zeros_like(scores))
    spec.kl(flat, log_pattern).sum().backward()
    assert scores.grad.isfinite().all()
    assert (scores.grad[..., ~spec.allowed_mask(POS_K)] == 0).all()
    if spec.is_plain:
        assert scores.grad.abs().max() > 0.1


@pytest.mark.parametrize("sink", [-5.0, -10.0, -15.0, -40.0])
def test_a_sink_that_takes_next_to_nothing_adds_no_noise(sink):
    """Its share is the rest of a sum of 1, where float32 rounds to 1e-7."""
    spec = make_spec(sinks=(sink,) * N_HEADS)
    scores = random_scores(n_pos=29)
    other_scores = scores + 0.1 * random_scores(n_pos=29, seed=1)
    exact = spec.kl(spec.log_pattern(scores), spec.log_pattern(other_scores))
    log_pattern = spec.log_pattern(scores.float())
    kl = spec.kl(log_pattern, spec.log_pattern(other_scores.float()))
    assert_near(kl.double(), exact, 2e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_is_the_causal_softmax_and_nothing_else(variant):
    assert make_spec(**variant).is_plain == (not any(variant.values()))


# transformers' own attention of models with these variants


def as_transformers(spec, n_pos=POS_K):
    """Queries and keys [batch, head, pos, d_head] and the additive mask."""
    queries, keys = random_queries_keys(spec, n_pos, n_pos, torch.float32)
    mask = torch.zeros(n_pos, n_pos)
    for i in range(n_pos):
        for j in range(n_pos):
            if not loop_allowed(i, j, spec.window):
                mask[i, j] = torch.finfo(torch.float32).min
    return queries, keys, mask[None, None]


def test_windows_and_softcap_are_those_of_gemma2():
    spec = make_spec(window=3, softcap=2.5)
    queries, keys, mask = as_transformers(spec)
    module = SimpleNamespace(
        num_key_value_groups=spec.heads_per_kv,
        head_dim=10,
        training=False,
    )
    q = queries.transpose(1, 2)
    k = keys.transpose(1, 2)
    _, pattern = gemma2_attention(module, q, k, k, mask, scaling=spec.scale, softcap=spec.softcap)
    assert_near(spec.pattern(spec.scores(queries, keys)), pattern, 1e-6)


def test_sinks_are_those_of_gpt_oss():
    spec = make_spec(window=4, sinks=SINKS)
    queries, keys, mask = as_transformers(spec)
    module = SimpleNamespace(
        num_key_value_groups=spec.heads_per_kv, sinks=torch.tensor(SINKS), training=False
    )
    q = queries.transpose(1, 2)
    k = keys.transpose(1, 2)
    _, pattern = sink_attention(module, q, k, k, mask, scaling=spec.scale)
    assert_near(spec.pattern(spec.scores(queries, keys)), pattern, 1e-6)


# By hand


def test_patterns_of_three_tokens_by_hand():
    """Scores ln 1, ln 2, ln 5 give 1/8, 2/8, 5/8."""
    spec = AttentionSpec(
        1,
        1,
        d_head=2,
        d_model=5,
        scale=3.0,
    )
    scores = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log().expand(1, 1, 3, 3)
    rows = [[1, 0, 0], [1 / 3, 2 / 3, 0], [1 / 8, 2 / 8, 5 / 8]]
    expected = torch.tensor(rows, dtype=torch.float64)
    assert_near(spec.pattern(scores)[0, 0], expected, 1e-15)

    uniform = spec.log_pattern(torch.zeros(1, 1, 3, 3, dtype=torch.float64))
    kl = spec.kl(spec.log_pattern(scores), uniform)[0, 0]
    expected_kl = []
    for row in rows:
        shares = [share for share in row if share]
        entropy = -sum(share * math.log(share) for share in shares)
        expected_kl.append(math.log(len(shares)) - entropy)
    assert kl.tolist() == pytest.approx(expected_kl)


def test_rotations_of_three_tokens_by_hand():
    """90 degrees per position: scores are 3 sin((i - j) pi / 2)."""
    spec = AttentionSpec(
        1,
        1,
        d_head=2,
        d_model=5,
        scale=3.0,
        rotary_inv_freq=(math.pi / 2,),
    )
    queries = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 3, 1, 2)
    keys = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(1, 3, 1, 2)
    expected = torch.tensor([[0, -3, 0], [3, 0, -3], [0, 3, 0]], dtype=torch.float64)
    assert_near(spec.scores(queries, keys)[0, 0], expected, 1e-14)


def test_heads_are_consecutive_blocks_of_the_flat_vector():
    spec = make_spec()
    queries = spec.split_queries(torch.arange(60.0)[None])
    keys = spec.split_keys(torch.arange(30.0)[None])
    assert queries.shape == (1, 6, 10)
    assert keys.shape == (1, 3, 10)
    assert queries[0, 4, 7] == 47
    assert keys[0, 2, 7] == 27


# The spec as a value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 0}, "n_heads must be at least 1, got 0"),
        ({"n_kv_heads": -2}, "n_kv_heads must be at least 1, got -2"),
        ({"d_head": 0}, "d_head must be at least 1, got 0"),
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"n_kv_heads": 4}, "multiple of n_kv_heads, got 6 and 4"),
        ({"rotary_inv_freq": (1.0,) * 6}, "covers 12 dimensions of a head of 10"),
        ({"window": 0}, "window must be at least 1 key, got 0"),
        ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ({"softcap": math.nan}, "softcap must be positive, got nan"),
        ({"sinks": (1.0,)}, "sinks must have a number per head, got 1"),
        ({"alibi_slopes": SLOPES[:5]}, "alibi_slopes must have a number per head, got 5"),
    ],
)
def test_spec_refuses_what_does_not_fit(changes, message):
    values = {**make_spec("full").to_dict(), **changes}
    with pytest.raises(ValueError, match=message):
        AttentionSpec.from_dict(values)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rotary", ROTARY)
def test_spec_survives_json(rotary, variant):
    spec = make_spec(rotary, **variant)
    again = AttentionSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert spec.rotary_dim == 2 * len(ROTARY[rotary])
    assert (spec.heads_per_kv, spec.d_queries, spec.d_keys) == (2, 60, 30)


def test_a_plain_spec_is_written_as_ever():
    names = ["n_heads", "n_kv_heads", "d_head", "d_model", "scale", "rotary_inv_freq"]
    assert list(make_spec().to_dict()) == names
    assert list(make_spec(window=3).to_dict()) == [*names, "window"]
