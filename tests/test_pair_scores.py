"""Scores of pairs and all their gradients, compiled and in torch operations, against dense einsums in float64."""

import numpy as np
import pytest
import torch
from oracles import (
    D_KEY,
    D_QUERY,
    N_HEADS,
    N_POS,
    ROTARY,
    dense_scores,
    loop_kernel,
    make_spec,
    random_case,
    random_map,
    with_one,
)
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec, allowed_keys, attention_scores, log_pattern, pattern_kl
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.scoring.pairs import Decoders, constant_scores, pair_kernel
from sae_lens_qk.scoring.scorer import PairScorer
from sae_lens_qk.scoring.entries import active_entries, with_constant
from sae_lens_qk.training.losses import TruePattern

PATHS = {"compiled": True, "torch": False}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}
"""Largest error over the largest value."""
LEAVES = ("weights", "query_acts", "key_acts", "W_Q", "W_K")


def scores_and_gradients(
    make_scores,
    spec: AttentionSpec,
    kept: SparseFeatureMap,
    case,
    wanted=LEAVES,
    device: str = "cpu",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores, and gradients of a loss that is not linear in them, reaching future keys too, in the wanted leaves."""
    query_acts, key_acts, decoders = case
    values = dict(zip(LEAVES, (kept.weights, query_acts, key_acts, *decoders), strict=True))
    leaves = {
        name: t.detach().clone().to(device).requires_grad_(name in wanted)
        for name, t in values.items()
    }
    weights, query_acts, key_acts, W_Q, W_K = leaves.values()
    scores = make_scores(weights, query_acts, key_acts, Decoders(W_Q, W_K))
    towards = torch.randn(
        scores.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    (scores * towards.to(scores)).sin().sum().backward()
    return scores.detach(), {name: leaves[name].grad for name in wanted}


def sparse(
    spec: AttentionSpec, kept: SparseFeatureMap, case, compiled: bool | None = None, **options
):
    def make_scores(weights, query_acts, key_acts, decoders):
        return PairScorer(kept.indices.to(weights.device), decoders, spec, compiled)(
            weights, query_acts, key_acts
        )

    return scores_and_gradients(make_scores, spec, kept, case, **options)


def dense(spec: AttentionSpec, kept: SparseFeatureMap, case):
    """The reference; gradients of activations at active entries only, as documented."""

    def make_scores(weights, query_acts, key_acts, decoders):
        mask = torch.zeros(D_QUERY + 1, D_KEY + 1, N_HEADS, dtype=torch.float64)
        mask = mask.index_put(tuple(kept.indices.T), weights)
        return dense_scores(mask, query_acts, key_acts, decoders, spec)

    exact = case[0].double(), case[1].double(), Decoders(*(side.double() for side in case[2]))
    scores, gradients = scores_and_gradients(make_scores, spec, kept.double(), exact)
    for name, acts in (("query_acts", case[0]), ("key_acts", case[1])):
        assert (gradients[name][acts == 0] != 0).any(), (
            "the derivative at inactive entries is not zero, it is left out"
        )
        gradients[name] = gradients[name] * (acts != 0)
    return scores, gradients


def assert_same(found, expected, tolerance: float) -> None:
    exact_values = {"scores": expected[0], **expected[1]}
    for name, value in {"scores": found[0], **found[1]}.items():
        exact = exact_values[name]
        assert value.shape == exact.shape, name
        largest = float(exact.abs().max())
        assert largest > 0.1, name
        assert float((value.double().cpu() - exact.double()).abs().max()) <= tolerance * largest, (
            name
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_kv_heads", [2, 6])
@pytest.mark.parametrize("rotary", ROTARY)
def test_scores_and_all_gradients_equal_autograd_of_the_dense_reference(
    rotary, n_kv_heads, path, dtype
):
    spec = make_spec(rotary, n_kv_heads)
    case, kept = random_case(spec, dtype), random_map(dtype=dtype)
    scores, gradients = found = sparse(spec, kept, case, PATHS[path])
    assert {scores.dtype, *(gradient.dtype for gradient in gradients.values())} == {dtype}
    assert scores[..., ~allowed_keys(N_POS)].eq(0).all()
    assert (gradients["weights"][kept.weights == 0] != 0).any(), (
        "pairs of weight 0 have a gradient too"
    )
    for name, acts in (("query_acts", case[0]), ("key_acts", case[1])):
        assert gradients[name][acts == 0].eq(0).all(), "a feature that does not fire has gradient 0"
    assert_same(found, dense(spec, kept, case), TOLERANCE[dtype])


@pytest.mark.parametrize("threads", [1, 3, 64])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("rotary", ["none", "partial"])
def test_blocks_of_rows_do_not_change_the_gradients(rotary, batch, threads, monkeypatch):
    """Rows are summed in as many blocks as threads need, also with more threads than rows."""
    monkeypatch.setattr("sae_lens_qk.pair_scores.numba.get_num_threads", lambda: threads)
    spec, kept = make_spec(rotary), random_map()
    case = random_case(spec, batch=batch)
    assert_same(sparse(spec, kept, case, True), dense(spec, kept, case), 1e-11)


@pytest.mark.parametrize("n_pos", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("rotary", ROTARY)
def test_every_length_of_a_sequence(rotary, n_pos):
    """The compiled loops take several queries at once; few positions leave an incomplete group."""
    spec, kept = (
        make_spec(rotary),
        SparseFeatureMap.all_pairs(D_QUERY, D_KEY, N_HEADS, torch.float64),
    )
    case = random_case(spec, n_pos=n_pos)
    found, again = sparse(spec, kept, case, True), sparse(spec, kept, case, False)
    assert found[0].shape == (2, N_HEADS, n_pos, n_pos)
    assert_same(found, dense(spec, kept, case), 1e-11)
    assert_same(again, found, 1e-11)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "wanted",
    [("weights",), ("key_acts",), ("W_Q",), ("weights", "W_K"), ("query_acts", "key_acts")],
)
@pytest.mark.parametrize("rotary", ["none", "full"])
def test_any_subset_of_gradients_is_that_of_the_whole(rotary, wanted, path):
    spec, kept = make_spec(rotary), random_map()
    case = random_case(spec)
    found = sparse(spec, kept, case, PATHS[path], wanted=wanted)
    assert set(found[1]) == set(wanted)
    assert_same(found, sparse(spec, kept, case, PATHS[path]), 1e-12)


def silenced(case, features: Tensor, row: int):
    """Some features of both sides never fire; in one sequence nothing but the constant does."""
    query_acts, key_acts = (acts.clone() for acts in case[:2])
    for acts in (query_acts, key_acts):
        acts[..., features] = 0
        acts[row] = 0
    return query_acts, key_acts, case[2]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rotary", ROTARY)
def test_silent_features_and_silent_sequences(rotary, path):
    spec, kept = make_spec(rotary), random_map(n_pairs=1009)
    features = torch.tensor([0, 3, 4, D_QUERY - 1])
    case = silenced(random_case(spec), features, row=1)
    scores, gradients = found = sparse(spec, kept, case, PATHS[path])
    assert_same(found, dense(spec, kept, case), 1e-11)
    assert scores[1].eq(0).all(), "constant x constant is not listed"
    for name, column in (("W_Q", 0), ("W_K", 1)):
        assert gradients[name][features].eq(0).all()
        assert gradients["weights"][torch.isin(kept.indices[:, column], features)].eq(0).all()
    nothing = silenced(case, features, row=0)
    scores, gradients = sparse(spec, kept, nothing, PATHS[path])
    assert scores.eq(0).all()
    assert all(gradient.eq(0).all() for gradient in gradients.values())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("rotary", ROTARY)
def test_nan_activations_give_nan(rotary, side, path):
    spec, kept = make_spec(rotary), random_map(n_pairs=1009)
    case = list(random_case(spec))
    clean = PairScorer(kept.indices, case[2], spec, PATHS[path])(kept.weights, *case[:2])
    case[side] = case[side].clone()
    case[side][1, 7, 5] = torch.nan
    scores, gradients = sparse(spec, kept, case, PATHS[path])
    fires = (with_one(case[1 - side])[1] != 0).double()
    touched = torch.zeros(
        N_HEADS, N_POS, N_POS, dtype=torch.bool
    )  # by a pair of feature 5 whose other feature fires
    for pair in kept.indices[(kept.indices[:, side] == 5) & (kept.weights > 0)].tolist():
        at = fires[:, pair[1 - side]] > 0
        (touched[pair[2], 7, :8] if side == 0 else touched[pair[2], 7:, 7]).logical_or_(
            at[:8] if side == 0 else at[7:]
        )
    assert touched.any()
    assert scores[1][touched].isnan().all()
    assert torch.equal(scores[0], clean[0]), "the other sequence is untouched"
    assert torch.equal(scores[1, :, :7, :7], clean[1, :, :7, :7]), "so are earlier positions"
    assert gradients["weights"].isnan().any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rotary", ["none", "partial"])
def test_no_pairs_and_heads_without_pairs(rotary, path):
    spec = make_spec(rotary)
    case, some = random_case(spec), random_map()
    for kept in (some.restrict(heads=[4]), some.restrict(heads=[])):
        scores, gradients = sparse(spec, kept, case, PATHS[path])
        others = [head for head in range(N_HEADS) if head not in kept.indices[:, 2]]
        assert len(others) == 6 - bool(len(kept))
        assert scores[:, others].eq(0).all()
        assert gradients["weights"].shape == (len(kept),)
        if len(kept):
            assert_same((scores, gradients), dense(spec, kept, case), 1e-11)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rotary", ["none", "full"])
def test_a_scorer_serves_many_batches(rotary, path):
    """Made once, called with other weights, sequences and lengths."""
    spec, kept = make_spec(rotary), random_map()
    case = random_case(spec)
    scorer = PairScorer(kept.indices, case[2], spec, PATHS[path])
    longest = scorer(kept.weights, *case[:2])
    for weights, n_pos in ((kept.weights.flip(0), 7), (kept.weights, N_POS)):
        acts = [side[1:, :n_pos] for side in case[:2]]
        expected = PairScorer(kept.indices, case[2], spec, PATHS[path])(weights, *acts)
        assert torch.equal(scorer(weights, *acts), expected)
    torch.testing.assert_close(expected, longest[1:], rtol=0, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rotary", ROTARY)
def test_scores_and_gradients_on_a_gpu(rotary, dtype):
    spec = make_spec(rotary)
    case, kept = random_case(spec, dtype), random_map(dtype=dtype)
    scores, gradients = found = sparse(spec, kept, case, device="cuda")
    assert {scores.device.type, *(gradient.device.type for gradient in gradients.values())} == {
        "cuda"
    }
    assert_same(found, dense(spec, kept, case), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_active_entries_list_every_activation_by_position_and_a_constant(dtype):
    acts = random_case(make_spec("none"), dtype)[0]
    acts[1, 4] = 0
    start, feature, value = active_entries(acts)
    assert start.shape == (2 * N_POS + 1,)
    assert value.dtype == acts.numpy().dtype
    for t, at_position in enumerate(acts.flatten(0, 1).tolist()):
        expected = [(a, act) for a, act in enumerate(at_position) if act != 0] + [(D_QUERY, 1.0)]
        at = slice(start[t], start[t + 1])
        assert list(zip(feature[at].tolist(), value[at].tolist(), strict=True)) == expected
    assert np.diff(start)[N_POS + 4] == 1
    assert start[-1] == len(feature) == len(value) == int((acts != 0).sum()) + 2 * N_POS


def test_with_constant_appends_a_one():
    acts = random_case(make_spec("none"), torch.float32)[1]
    assert torch.equal(with_constant(acts), with_one(acts))
    assert with_constant(acts).dtype == torch.float32


@pytest.mark.parametrize("rotary", ROTARY)
def test_pair_kernel_equals_rotate_and_dot(rotary):
    spec = make_spec(rotary)
    decoders = random_case(spec)[2]
    pairs = random_map(n_pairs=101).indices
    offsets = torch.tensor([0, 1, 2, 40, 255])
    kernel = pair_kernel(pairs, decoders, spec, offsets)
    assert kernel.shape == (101, 5 if ROTARY[rotary] else 1)
    expected = [
        [loop_kernel(pair, decoders, spec, int(offset)) for offset in offsets]
        for pair in pairs.tolist()
    ]
    exact = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(kernel.expand(-1, 5), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rotary", ROTARY)
def test_constant_scores_equal_the_loop(rotary):
    spec = make_spec(rotary)
    decoders = random_case(spec)[2]
    constant = constant_scores(decoders, spec, N_POS)
    assert constant.shape == (N_HEADS, N_POS, N_POS)
    assert constant.abs().max() > 0.05
    for h in range(N_HEADS):
        kernel = [
            loop_kernel((D_QUERY, D_KEY, h), decoders, spec, offset) for offset in range(N_POS)
        ]
        expected = [[kernel[i - j] if j <= i else 0.0 for j in range(N_POS)] for i in range(N_POS)]
        torch.testing.assert_close(
            constant[h], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
        )


# The compiled divergence


def true_and_made(dtype: torch.dtype, scale: float = 1.5):
    """A true pattern from queries and keys, and other scores, not contiguous."""
    generator = torch.Generator().manual_seed(0)
    spec = AttentionSpec(n_heads=3, n_kv_heads=3, d_head=5, d_model=7, scale=1.0)
    queries, keys = (
        torch.randn(2, 11, 3, 5, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    made = (scale * torch.randn(2, 3, 11, 11, generator=generator, dtype=torch.float64)).to(dtype)
    return TruePattern.of(queries, keys, spec), made.transpose(2, 3)


def kl_and_gradient(kl_of, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Rows are weighted unevenly, so that each row's gradient has its own factor."""
    leaf = scores.detach().requires_grad_()
    kl = kl_of(leaf)
    (kl * torch.linspace(-1, 2, kl.numel(), dtype=kl.dtype).view_as(kl)).sum().backward()
    return kl.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_compiled_kl_and_its_gradient_equal_autograd(dtype):
    true, scores = true_and_made(dtype)
    kl, gradient = kl_and_gradient(true.kl, scores)
    exact = true.log_pattern.double()
    expected, expected_gradient = kl_and_gradient(
        lambda s: pattern_kl(exact, log_pattern(s)), scores.double()
    )
    assert kl.dtype == gradient.dtype == dtype
    assert expected[..., 1:].min() > 0.01
    assert expected_gradient.abs().max() > 0.1
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}[dtype]
    torch.testing.assert_close(kl.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=tolerance)
    assert gradient[..., ~allowed_keys(11)].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_compiled_kl_of_extreme_scores_is_exact(dtype):
    """Scores of +-80 in either pattern: one key holds all, others underflow."""
    true, scores = true_and_made(dtype)
    extreme = 80 * scores.sign()
    sure = (
        torch.randn(true.pattern.shape, generator=torch.Generator().manual_seed(3)).sign().to(dtype)
    )
    of_extreme = log_pattern(80 * sure)
    for pattern in (true, TruePattern(of_extreme.exp(), of_extreme)):
        for made in (extreme, scores):
            kl, gradient = kl_and_gradient(pattern.kl, made)
            exact = pattern.log_pattern.double()
            expected, expected_gradient = kl_and_gradient(
                lambda s: pattern_kl(exact, log_pattern(s)), made.double()
            )
            assert kl.isfinite().all()
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
            torch.testing.assert_close(kl.double(), expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=tolerance)
            assert expected.max() > 1


def test_kl_of_a_pattern_with_its_own_scores_is_zero():
    generator = torch.Generator().manual_seed(0)
    spec = AttentionSpec(
        n_heads=3, n_kv_heads=1, d_head=5, d_model=7, scale=1.0, rotary_inv_freq=(1.0, 0.1)
    )
    queries, keys = (
        torch.randn(2, 11, n, 5, generator=generator, dtype=torch.float64) for n in (3, 1)
    )
    kl, gradient = kl_and_gradient(
        TruePattern.of(queries, keys, spec).kl, attention_scores(queries, keys, spec)
    )
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def test_nan_in_either_pattern_gives_nan():
    """A KL of 0 would let training step on with NaN gradients."""
    true, scores = true_and_made(torch.float32)
    spoiled = scores.clone()
    spoiled[1, 2, 7, 4] = torch.nan
    assert true.kl(spoiled)[1, 2, 7].isnan()
    assert true.kl(spoiled).isnan().sum() == 1
    log = true.log_pattern.clone()
    log[0, 1, 5, :6] = torch.nan
    assert TruePattern(log.exp(), log).kl(scores)[0, 1, 5].isnan()
