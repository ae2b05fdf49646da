"""Scores of pairs and all their gradients, of every engine, against the oracles in float64."""

from typing import NamedTuple

import numba
import numpy as np
import pytest
import torch
from attention_oracles import loop_allowed
from comparing import assert_near
from oracles import (
    BATCH,
    D_KEY,
    D_QUERY,
    N_HEADS,
    N_POS,
    ROTARY,
    SIZES,
    WINDOWS,
    Case,
    dense_scores,
    loop_kernel,
    make_spec,
    random_case,
    random_map,
    with_one,
)
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.feature_map import Features, SparseFeatureMap
from sae_lens_qk.scoring.entries import active_entries, with_constant
from sae_lens_qk.scoring.pairs import Decoders, constant_scores, pair_kernel
from sae_lens_qk.scoring.scorer import PairScorer

ENGINES = ("compiled", "portable")
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4}
"""Largest error over the largest value."""
LEAVES = ("weights", "query_acts", "key_acts", "W_Q", "W_K")


class Result(NamedTuple):
    scores: Tensor
    gradients: dict[str, Tensor]


def differentiate(
    make_scores,
    pairs: SparseFeatureMap,
    case: Case,
    names,
    device: str,
) -> Result:
    """Scores and the named gradients of a loss that is not linear in them.

    Args:
        make_scores: (weights, case) -> scores.
        names: some of `LEAVES`.
    """
    tensors = (pairs.weights, *case.features, *case.decoders)
    leaves = {}
    for name, tensor in zip(LEAVES, tensors, strict=True):
        leaf = tensor.detach().clone().to(device)
        leaves[name] = leaf.requires_grad_(name in names)
    features = Features(leaves["query_acts"], leaves["key_acts"])
    decoders = Decoders(leaves["W_Q"], leaves["W_K"])
    scores = make_scores(leaves["weights"], Case(features, decoders))
    generator = torch.Generator().manual_seed(1)
    # keys that are not allowed enter the loss too
    directions = torch.randn(scores.shape, generator=generator, dtype=torch.float64)
    loss = (scores * directions.to(scores)).sin().sum()
    loss.backward()
    gradients = {name: leaves[name].grad for name in names}
    return Result(scores.detach(), gradients)


def sparse(
    spec: AttentionSpec,
    pairs: SparseFeatureMap,
    case: Case,
    engine: str | None = None,
    names=LEAVES,
    device: str = "cpu",
) -> Result:
    """Of the package; engine None: its own choice."""
    compiled = None if engine is None else engine == "compiled"

    def make_scores(
        weights: Tensor,
        case: Case,
    ) -> Tensor:
        scorer = PairScorer(pairs.indices.to(device), case.decoders, spec, compiled)
        return scorer(weights, *case.features)

    return differentiate(make_scores, pairs, case, names, device)


def dense(
    spec: AttentionSpec,
    pairs: SparseFeatureMap,
    case: Case,
) -> Result:
    """Of the reference; gradients of activations at active entries only, as documented."""

    def make_scores(
        weights: Tensor,
        case: Case,
    ) -> Tensor:
        mask = torch.zeros(D_QUERY + 1, D_KEY + 1, N_HEADS, dtype=torch.float64)
        mask = mask.index_put(tuple(pairs.indices.T), weights)
        return dense_scores(mask, case, spec)

    query_acts, key_acts = case.features
    features = Features(query_acts.double(), key_acts.double())
    exact_case = Case(features, case.decoders.to(torch.float64))
    result = differentiate(make_scores, pairs.double(), exact_case, LEAVES, "cpu")
    for name, acts in (("query_acts", query_acts), ("key_acts", key_acts)):
        gradient = result.gradients[name]
        assert (gradient[acts == 0] != 0).any(), "not zero at inactive entries, but left out"
        result.gradients[name] = gradient * (acts != 0)
    return result


def assert_same(
    result: Result,
    expected: Result,
    tolerance: float = 1e-11,
) -> None:
    """Scores and gradients, each within a tolerance relative to its largest value."""
    assert_relatively_near(result.scores, expected.scores, tolerance)
    for name, gradient in result.gradients.items():
        assert_relatively_near(gradient, expected.gradients[name], tolerance)


def assert_relatively_near(
    actual: Tensor,
    expected: Tensor,
    tolerance: float,
) -> None:
    largest = float(expected.abs().max())
    assert largest > 0.1
    assert_near(actual.double().cpu(), expected.double(), tolerance * largest)


# Against the dense reference


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n_kv_heads", [2, 6])
@pytest.mark.parametrize("rotary", ROTARY)
def test_scores_and_all_gradients_equal_autograd_of_the_reference(
    rotary, n_kv_heads, engine, dtype
):
    spec = make_spec(rotary, n_kv_heads)
    case = random_case(spec, dtype)
    pairs = random_map(dtype=dtype)
    result = sparse(spec, pairs, case, engine)
    dtypes = {gradient.dtype for gradient in result.gradients.values()}
    assert dtypes == {result.scores.dtype} == {dtype}
    zero_weight_gradient = result.gradients["weights"][pairs.weights == 0]
    assert zero_weight_gradient.count_nonzero() > 0, "pairs of weight 0 have a gradient too"
    assert_same(result, dense(spec, pairs, case), TOLERANCES[dtype])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rotary", ROTARY)
def test_windows(rotary, engine, window):
    spec = make_spec(rotary, window=window)
    case = random_case(spec)
    pairs = random_map()
    result = sparse(spec, pairs, case, engine)
    for i in range(N_POS):
        for j in range(N_POS):
            if not loop_allowed(i, j, window):
                assert (result.scores[:, :, i, j] == 0).all()
    assert_same(result, dense(spec, pairs, case))


@pytest.mark.parametrize("threads", [1, 3, 64])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("rotary", ["none", "partial"])
def test_blocks_of_rows_do_not_change_the_gradients(rotary, batch, threads, monkeypatch):
    """Rows are summed in as many blocks as threads need, also with more threads than rows."""
    monkeypatch.setattr(numba, "get_num_threads", lambda: threads)
    spec = make_spec(rotary)
    pairs = random_map()
    case = random_case(spec, batch=batch)
    assert_same(sparse(spec, pairs, case, "compiled"), dense(spec, pairs, case))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("n_pos", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("rotary", ROTARY)
def test_every_length_of_a_sequence(rotary, n_pos, window):
    """The compiled loops take several queries at once; few positions leave a group incomplete."""
    spec = make_spec(rotary, window=window)
    pairs = SparseFeatureMap.all_pairs(*SIZES, torch.float64)
    case = random_case(spec, n_pos=n_pos)
    expected = dense(spec, pairs, case)
    for engine in ENGINES:
        result = sparse(spec, pairs, case, engine)
        assert result.scores.shape == (BATCH, N_HEADS, n_pos, n_pos)
        assert_same(result, expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "names",
    [("weights",), ("key_acts",), ("W_Q",), ("weights", "W_K"), ("query_acts", "key_acts")],
)
@pytest.mark.parametrize("rotary", ["none", "full"])
def test_any_subset_of_gradients_is_that_of_the_whole(rotary, names, engine):
    spec = make_spec(rotary)
    pairs = random_map()
    case = random_case(spec)
    result = sparse(spec, pairs, case, engine, names)
    assert set(result.gradients) == set(names)
    assert_same(result, sparse(spec, pairs, case, engine), 1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rotary", ROTARY)
def test_scores_and_gradients_on_a_gpu(rotary, dtype, window):
    spec = make_spec(rotary, window=window)
    case = random_case(spec, dtype)
    pairs = random_map(dtype=dtype)
    result = sparse(spec, pairs, case, device="cuda")
    for tensor in (result.scores, *result.gradients.values()):
        assert tensor.device.type == "cuda"
    assert_same(result, dense(spec, pairs, case), TOLERANCES[dtype])


# Silent features, NaN, few pairs, many batches


def silenced(
    case: Case,
    features: Tensor,
    row: int,
) -> Case:
    """Some features of both sides never fire; in one sequence nothing but the constant does."""
    sides = []
    for acts in case.features:
        acts = acts.clone()
        acts[..., features] = 0
        acts[row] = 0
        sides.append(acts)
    return Case(Features(*sides), case.decoders)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rotary", ROTARY)
def test_silent_features_and_silent_sequences(rotary, engine):
    spec = make_spec(rotary)
    pairs = random_map(n_pairs=1009)
    features = torch.tensor([0, 3, 4, D_QUERY - 1])
    case = silenced(random_case(spec), features, row=1)
    result = sparse(spec, pairs, case, engine)
    assert_same(result, dense(spec, pairs, case))
    assert result.scores[1].eq(0).all(), "constant x constant is not listed"
    for name, column in (("W_Q", 0), ("W_K", 1)):
        assert result.gradients[name][features].eq(0).all()
        rows = torch.isin(pairs.indices[:, column], features)
        assert result.gradients["weights"][rows].eq(0).all()
    silent_case = silenced(case, features, row=0)
    result = sparse(spec, pairs, silent_case, engine)
    for tensor in (result.scores, *result.gradients.values()):
        assert tensor.eq(0).all()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("rotary", ROTARY)
def test_nan_activations_give_nan(rotary, side, engine, window):
    """NaN of feature 5 at position 7, where a pair of feature 5 meets a feature that fires."""
    spec = make_spec(rotary, window=window)
    pairs = random_map(n_pairs=1009)
    clean_case = random_case(spec)
    clean = sparse(spec, pairs, clean_case, engine)
    acts = getattr(clean_case.features, side).clone()
    acts[1, 7, 5] = torch.nan
    features = clean_case.features._replace(**{side: acts})
    result = sparse(spec, pairs, Case(features, clean_case.decoders), engine)

    fires = [with_one(acts)[1] != 0 for acts in features]  # [pos, feature] per side
    is_nan = torch.zeros(N_HEADS, N_POS, N_POS, dtype=torch.bool)
    for query_feature, key_feature, head in pairs.indices[pairs.weights > 0].tolist():
        for position in range(N_POS):
            i, j = (7, position) if side == "query" else (position, 7)
            feature = query_feature if side == "query" else key_feature
            both_fire = fires[0][i, query_feature] and fires[1][j, key_feature]
            if feature == 5 and both_fire and loop_allowed(i, j, window):
                is_nan[head, i, j] = True
    assert is_nan.any()
    assert result.scores[1][is_nan].isnan().all()
    assert result.gradients["weights"].isnan().any()
    # the other sequence and all other positions are untouched
    is_touched = torch.zeros(N_POS, N_POS, dtype=torch.bool)
    for position in range(N_POS):
        i, j = (7, position) if side == "query" else (position, 7)
        is_touched[i, j] = loop_allowed(i, j, window)
    assert torch.equal(result.scores[0], clean.scores[0])
    untouched = result.scores[1][:, ~is_touched]
    assert torch.equal(untouched, clean.scores[1][:, ~is_touched])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rotary", ["none", "partial"])
def test_no_pairs_and_heads_without_pairs(rotary, engine):
    spec = make_spec(rotary)
    case = random_case(spec)
    one_head = random_map().restrict(heads=4)
    result = sparse(spec, one_head, case, engine)
    assert_same(result, dense(spec, one_head, case))
    assert result.scores[:, [0, 1, 2, 3, 5]].eq(0).all()
    result = sparse(spec, random_map().restrict(heads=[]), case, engine)
    assert result.scores.eq(0).all()
    assert result.gradients["weights"].shape == (0,)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rotary", ["none", "full"])
def test_a_scorer_serves_many_batches(rotary, engine):
    """Made once, called with other weights, sequences and lengths."""
    spec = make_spec(rotary)
    pairs = random_map()
    features, decoders = random_case(spec)

    def new_scorer() -> PairScorer:
        return PairScorer(pairs.indices, decoders, spec, engine == "compiled")

    scorer = new_scorer()
    longest = scorer(pairs.weights, *features)
    for weights, n_pos in ((pairs.weights.flip(0), 7), (pairs.weights, N_POS)):
        query_acts = features.query[1:, :n_pos]
        key_acts = features.key[1:, :n_pos]
        expected = new_scorer()(weights, query_acts, key_acts)
        assert torch.equal(scorer(weights, query_acts, key_acts), expected)
    assert_near(expected, longest[1:], 1e-12)


# Entries, kernels, constants


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_active_entries_list_every_activation_by_position_and_a_constant(dtype):
    acts = random_case(make_spec("none"), dtype).features.query
    acts[1, 4] = 0
    entries = active_entries(acts)
    assert entries.start.shape == (BATCH * N_POS + 1,)
    assert entries.value.dtype == acts.numpy().dtype
    for t, values in enumerate(acts.flatten(0, 1).tolist()):
        active = [(feature, value) for feature, value in enumerate(values) if value != 0]
        rows = slice(entries.start[t], entries.start[t + 1])
        features = entries.feature[rows].tolist()
        listed = zip(features, entries.value[rows].tolist(), strict=True)
        assert list(listed) == [*active, (D_QUERY, 1.0)]
    assert np.diff(entries.start)[N_POS + 4] == 1
    n_entries = int((acts != 0).sum()) + BATCH * N_POS
    assert entries.start[-1] == len(entries.feature) == len(entries.value) == n_entries
    assert torch.equal(entries.scatter(entries.value, acts.shape), acts)


def test_with_constant_appends_a_one():
    acts = random_case(make_spec("none"), torch.float32).features.key
    assert torch.equal(with_constant(acts), with_one(acts))
    assert with_constant(acts).dtype == torch.float32


@pytest.mark.parametrize("rotary", ROTARY)
def test_pair_kernel_equals_rotate_and_dot(rotary):
    spec = make_spec(rotary)
    decoders = random_case(spec).decoders
    pairs = random_map(n_pairs=101).indices
    offsets = torch.tensor([0, 1, 2, 40, 255])
    kernel = pair_kernel(pairs, decoders, spec, offsets)
    assert kernel.shape == (101, 5 if ROTARY[rotary] else 1)
    for pair, row in zip(pairs.tolist(), kernel.expand(-1, 5).tolist(), strict=True):
        expected = [loop_kernel(pair, decoders, spec, offset) for offset in offsets.tolist()]
        assert row == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rotary", ROTARY)
def test_constant_scores_equal_the_loop(rotary, window):
    spec = make_spec(rotary, window=window)
    decoders = random_case(spec).decoders
    constant = constant_scores(decoders, spec, N_POS)
    assert constant.abs().max() > 0.05
    expected = torch.zeros(N_HEADS, N_POS, N_POS, dtype=torch.float64)
    for head in range(N_HEADS):
        for i in range(N_POS):
            for j in range(N_POS):
                if loop_allowed(i, j, window):
                    pair = (D_QUERY, D_KEY, head)
                    expected[head, i, j] = loop_kernel(pair, decoders, spec, i - j)
    assert_near(constant, expected, 1e-12)
