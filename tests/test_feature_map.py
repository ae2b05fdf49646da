"""The sparse feature map, against the transcoders' scores, loops over pairs and dense masks."""

from itertools import product

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
    loop_pair_scores,
    make_spec,
    random_case,
    random_map,
    with_one,
)
from torch import Tensor

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.feature_map import SparseFeatureMap, as_pairs
from sae_lens_qk.scoring.pairs import Decoders, constant_scores
from sae_lens_qk.stored_form import (
    pack_indices,
    pack_statistics,
    unpack_indices,
    unpack_statistics,
)

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def transcoder_scores(
    case: Case,
    spec: AttentionSpec,
) -> Tensor:
    """The other code path: decode, then attend; zero where not allowed."""
    query_acts = with_one(case.features.query)
    key_acts = with_one(case.features.key)
    queries = torch.einsum("bia,ahd->bihd", query_acts, case.decoders.query)
    keys = torch.einsum("bja,ahd->bjhd", key_acts, case.decoders.key)
    scores = spec.scores(queries, keys)
    for i in range(scores.shape[2]):
        for j in range(scores.shape[3]):
            if not loop_allowed(i, j, spec.window):
                scores[:, :, i, j] = 0
    return scores


def weights_by_pair(feature_map: SparseFeatureMap) -> dict[tuple, float]:
    """With constant x constant, which belongs to every map."""
    pairs = map(tuple, feature_map.indices.tolist())
    weights = dict(zip(pairs, feature_map.weights.tolist(), strict=True))
    for head in range(N_HEADS):
        weights[D_QUERY, D_KEY, head] = 1.0
    return weights


# Scores


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("n_kv_heads", [2, 6])
@pytest.mark.parametrize("rotary", ROTARY)
def test_all_pairs_give_the_scores_of_the_transcoders(rotary, n_kv_heads, dtype):
    spec = make_spec(rotary, n_kv_heads)
    case = random_case(spec, dtype)
    every_pair = SparseFeatureMap.all_pairs(*SIZES, dtype)
    assert len(every_pair) == ((D_QUERY + 1) * (D_KEY + 1) - 1) * 6
    scores = every_pair.scores(*case, spec)
    expected = transcoder_scores(case, spec)
    assert scores.dtype == dtype
    assert expected.abs().max() > 0.5
    assert_near(scores, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rotary", ROTARY)
def test_scores_equal_the_loop_over_pairs(rotary, window):
    spec = make_spec(rotary, window=window)
    case = random_case(spec)
    feature_map = random_map()
    expected = loop_pair_scores(weights_by_pair(feature_map), case, spec)
    assert_near(feature_map.scores(*case, spec), expected, 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rotary", ROTARY)
def test_a_subset_equals_the_dense_mask(rotary, dtype):
    spec = make_spec(rotary)
    case = random_case(spec, dtype)
    feature_map = random_map(dtype=dtype)
    mask = feature_map.to_dense()
    assert mask.shape == (D_QUERY + 1, D_KEY + 1, 6)
    assert (mask[D_QUERY, D_KEY] == 1).all()
    assert mask.count_nonzero() == feature_map.weights.count_nonzero() + 6
    scores = feature_map.scores(*case, spec)
    expected = dense_scores(mask, case, spec)
    assert_near(scores.double(), expected, TOLERANCES[dtype])
    difference = expected - transcoder_scores(case, spec)
    assert difference.abs().max() > 0.1, "the subset does not differ from the whole"


@pytest.mark.parametrize("rotary", ROTARY)
def test_include_constant_adds_constant_x_constant(rotary):
    spec = make_spec(rotary)
    case = random_case(spec)
    feature_map = random_map()
    constant = constant_scores(case.decoders, spec, N_POS)
    without = feature_map.scores(*case, spec, include_constant=False)
    scores = feature_map.scores(*case, spec)
    assert constant.abs().max() > 0.05
    assert_near(scores - without, constant.expand(BATCH, -1, -1, -1), 1e-12)


@pytest.mark.parametrize("rotary", ROTARY)
def test_gradients_of_decoders_equal_autograd_of_the_dense_mask(rotary):
    """Constant x constant has no weight, but its decoder rows have a gradient."""
    spec = make_spec(rotary)
    features, decoders = random_case(spec)
    feature_map = random_map()
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, 6, N_POS, N_POS)
    directions = torch.randn(shape, dtype=torch.float64, generator=generator)

    def gradients(score_function) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in decoders]
        scores = score_function(Case(features, Decoders(*leaves)))
        (scores * directions).sin().sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients(lambda case: dense_scores(feature_map.to_dense(), case, spec))
    actual = gradients(lambda case: feature_map.scores(*case, spec))
    for gradient, exact in zip(actual, expected, strict=True):
        assert exact[-1].abs().max() > 0.1
        assert_near(gradient, exact, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_decoders_are_contracted_in_float32(dtype):
    spec = make_spec("full")
    case = random_case(spec, dtype)
    feature_map = random_map(dtype=dtype)
    scores = feature_map.scores(*case, spec)
    assert scores.dtype == torch.float32
    expected = dense_scores(feature_map.to_dense(), case, spec)
    assert_near(scores.double(), expected, 1e-5)


def test_features_that_never_fire_add_nothing():
    spec = make_spec("full")
    features, decoders = random_case(spec)
    feature_map = random_map()
    silent = features._replace(query=torch.zeros_like(features.query))
    scores = feature_map.scores(silent, decoders, spec)
    constant_pairs = feature_map.restrict(query_features=D_QUERY)
    assert_near(scores, constant_pairs.scores(silent, decoders, spec), 1e-12)
    assert (scores - constant_scores(decoders, spec, N_POS)).abs().max() > 0.01


@pytest.mark.parametrize("rotary", ROTARY)
def test_one_position_is_offset_zero(rotary):
    spec = make_spec(rotary)
    case = random_case(spec, n_pos=1)
    every_pair = SparseFeatureMap.all_pairs(*SIZES, torch.float64)
    expected = transcoder_scores(case, spec)
    assert expected.abs().max() > 0.1
    assert_near(every_pair.scores(*case, spec), expected, 1e-12)


@pytest.mark.parametrize("rotary", ROTARY)
def test_an_empty_map_is_constant_x_constant_alone(rotary):
    spec = make_spec(rotary)
    case = random_case(spec)
    empty = SparseFeatureMap([], torch.ones(0, dtype=torch.float64), *SIZES)
    assert len(empty) == 0
    assert empty.find([(0, 0, 0)]).tolist() == [-1]
    assert empty.count_active(case.features, spec) == 0
    assert empty.to_dense().count_nonzero() == 6
    scores = empty.scores(*case, spec)
    assert torch.equal(scores[0], constant_scores(case.decoders, spec, N_POS))
    assert empty.scores(*case, spec, include_constant=False).eq(0).all()


@pytest.mark.parametrize("window", WINDOWS)
def test_count_active_equals_the_loop(window):
    spec = make_spec("partial", window=window)
    features = random_case(spec).features
    feature_map = random_map()
    query_fires = (with_one(features.query) > 0).tolist()
    key_fires = (with_one(features.key) > 0).tolist()
    pairs = feature_map.indices.tolist()
    expected = 0
    for row, i, j in product(range(BATCH), range(N_POS), range(N_POS)):
        if loop_allowed(i, j, window):
            query = query_fires[row][i]
            key = key_fires[row][j]
            expected += sum(query[a] and key[b] for a, b, _ in pairs)
    assert feature_map.count_active(features, spec) == expected
    assert expected > 100


# Lists of pairs


def rows_by_pair(feature_map: SparseFeatureMap) -> dict[tuple, tuple]:
    """Weight and statistics by pair."""
    columns = torch.cat([feature_map.weights[:, None], feature_map.statistics], dim=1)
    pairs = map(tuple, feature_map.indices.tolist())
    rows = map(tuple, columns.tolist())
    return dict(zip(pairs, rows, strict=True))


def is_sorted(feature_map: SparseFeatureMap) -> bool:
    pairs = feature_map.indices.tolist()
    return pairs == sorted(pairs)


def test_pairs_are_sorted_and_weights_and_statistics_follow():
    feature_map = random_map()
    order = torch.randperm(len(feature_map), generator=torch.Generator().manual_seed(4))
    pairs = feature_map.indices[order]
    weights = feature_map.weights[order]
    assert pairs.tolist() != sorted(pairs.tolist())
    again = SparseFeatureMap(pairs, weights, *SIZES, feature_map.statistics[order])
    assert is_sorted(again)
    assert again.sizes == SIZES
    assert rows_by_pair(again) == rows_by_pair(feature_map)
    unmeasured = SparseFeatureMap(pairs.tolist(), weights, *SIZES)
    assert unmeasured.statistics.shape == (len(feature_map), 3)
    assert unmeasured.statistics.eq(0).all()


def test_find_gives_rows_and_minus_one():
    feature_map = random_map()
    order = torch.randperm(len(feature_map), generator=torch.Generator().manual_seed(2))
    assert torch.equal(feature_map.find(feature_map.indices[order]), order)
    every_pair = set(product(range(D_QUERY + 1), range(D_KEY + 1), range(6)))
    others = sorted(every_pair - set(rows_by_pair(feature_map)))
    assert (feature_map.find(others) == -1).all()
    mixed = [others[0], tuple(feature_map.indices[7].tolist()), others[5]]
    assert feature_map.find(mixed).tolist() == [-1, 7, -1]


@pytest.mark.parametrize(
    "pair",
    [(5, 2, 6), (5, D_KEY + 1, 2), (6, 1, -4), (4, D_KEY + 1 + 3, 0), (7, -D_KEY - 1, 2)],
)
def test_find_does_not_take_pairs_out_of_range_for_others(pair):
    """A head too large would otherwise name head 0 of the next key feature."""
    feature_map = SparseFeatureMap([(5, 3, 0), (6, 0, 2)], torch.ones(2), *SIZES)
    assert feature_map.find([(5, 3, 0), (6, 0, 2)]).tolist() == [0, 1]
    assert feature_map.find([pair]).tolist() == [-1]


def test_select_by_mask_or_rows():
    feature_map = random_map()
    heavy = feature_map.weights > 0.5
    assert 0 < heavy.count_nonzero() < len(feature_map)
    for rows in (heavy, heavy.nonzero()[:, 0]):
        subset = feature_map.select(rows)
        assert torch.equal(subset.indices, feature_map.indices[heavy])
        assert torch.equal(subset.weights, feature_map.weights[heavy])
        assert torch.equal(subset.statistics, feature_map.statistics[heavy])
        assert subset.sizes == SIZES
    backwards = torch.arange(len(feature_map)).flip(0)
    assert rows_by_pair(feature_map.select(backwards)) == rows_by_pair(feature_map)


def test_reweighted_changes_weights_alone():
    feature_map = random_map()
    halved = feature_map.reweighted(feature_map.weights / 2)
    assert torch.equal(halved.indices, feature_map.indices)
    assert torch.equal(halved.weights, feature_map.weights / 2)
    assert torch.equal(halved.statistics, feature_map.statistics)
    assert feature_map.weights.max() == 1, "the original is left alone"
    with pytest.raises(ValueError, match="clamp them first"):
        feature_map.reweighted(torch.full((211,), 1.5))


RESTRICTIONS = {
    "all": ({}, lambda a, b, h: True),
    "one head": ({"heads": 4}, lambda a, b, h: h == 4),
    "heads, a range": (
        {"heads": [0, 5], "query_features": range(3, 11)},
        lambda a, b, h: h in (0, 5) and 3 <= a < 11,
    ),
    "a set": ({"key_features": {D_KEY}}, lambda a, b, h: b == D_KEY),
    "both sides": (
        {"query_features": 7, "key_features": (1, 2, 18, 3)},
        lambda a, b, h: a == 7 and b in (1, 2, 18, 3),
    ),
    "zero": (
        {"heads": range(1, 3), "key_features": 0},
        lambda a, b, h: h in (1, 2) and b == 0,
    ),
    "none": ({"heads": []}, lambda a, b, h: False),
    "no such head": ({"heads": 99}, lambda a, b, h: False),
    "numpy integer": ({"heads": np.int64(2)}, lambda a, b, h: h == 2),
    "numpy array": ({"heads": np.array([1, 2])}, lambda a, b, h: h in (1, 2)),
    "0-d array": ({"heads": np.array(2)}, lambda a, b, h: h == 2),
    "tensor": ({"query_features": torch.tensor([3, 5])}, lambda a, b, h: a in (3, 5)),
    "0-d tensor": ({"key_features": torch.tensor(4)}, lambda a, b, h: b == 4),
    "0-d tensors": ({"heads": [torch.tensor(4), np.int32(1)]}, lambda a, b, h: h in (1, 4)),
}


@pytest.mark.parametrize("name", RESTRICTIONS)
def test_restrict_equals_a_filter(name):
    arguments, keeps = RESTRICTIONS[name]
    feature_map = random_map(n_pairs=1009)
    expected = {}
    for pair, row in rows_by_pair(feature_map).items():
        if keeps(*pair):
            expected[pair] = row
    assert rows_by_pair(feature_map.restrict(**arguments)) == expected
    is_trivial = len(expected) in (0, 1009)
    assert is_trivial == (name in ("all", "none", "no such head"))


def test_restrict_refuses_what_is_no_whole_number():
    for heads in (1.0, [0.5], torch.tensor([0.0])):
        with pytest.raises(TypeError):
            random_map().restrict(heads=heads)


def test_union_has_dict_semantics():
    one = random_map(seed=0)
    other = random_map(n_pairs=1009, seed=1)
    one_rows = rows_by_pair(one)
    other_rows = rows_by_pair(other)
    assert any(one_rows[pair] != other_rows[pair] for pair in set(one_rows) & set(other_rows))
    assert rows_by_pair(one | other) == one_rows | other_rows
    assert rows_by_pair(other | one) == other_rows | one_rows
    assert is_sorted(one | other)
    empty = one.restrict(heads=[])
    assert rows_by_pair(one | empty) == rows_by_pair(empty | one) == one_rows


@pytest.mark.parametrize(
    "sizes", [(D_QUERY + 1, D_KEY, 6), (D_QUERY, D_KEY - 1, 6), (D_QUERY, D_KEY, 3)]
)
def test_maps_of_other_sizes_have_no_union(sizes):
    with pytest.raises(ValueError, match=r"\(17, 19, 6\) and .* cannot be merged"):
        random_map() | SparseFeatureMap([], torch.ones(0), *sizes)


def test_statistics_measured_elsewhere():
    """Pairs and weights stay; statistics come from the other map, zeros for pairs it lacks."""
    one = random_map(seed=0)
    other = random_map(n_pairs=1009, seed=1)
    other_rows = rows_by_pair(other)
    expected = {}
    for pair, (weight, *_) in rows_by_pair(one).items():
        _, *statistics = other_rows.get(pair, (0.0,) * 4)
        expected[pair] = (weight, *statistics)
    measured = one.measured_as(other)
    assert rows_by_pair(measured) == expected
    assert 0 < measured.statistics.any(dim=1).count_nonzero() < len(one)
    empty = SparseFeatureMap([], torch.empty(0), *SIZES)
    assert not one.measured_as(empty).statistics.any()


def test_a_large_map_is_not_made_dense():
    fits = SparseFeatureMap([(1, 2, 0)], torch.ones(1), 99, 99, 1)
    assert fits.to_dense().shape == (100, 100, 1)
    large = SparseFeatureMap([(1, 2, 0)], torch.ones(1), 24_576, 24_576, 12)
    with pytest.raises(MemoryError, match=r"\(24577, 24577, 12\) entries is too large"):
        large.to_dense()
    just_above = SparseFeatureMap([], torch.ones(0), (1 << 14) - 1, 1 << 14, 1)  # 2^28 entries
    with pytest.raises(MemoryError, match="too large"):
        just_above.to_dense()


def test_unset_map_has_the_asked_size_and_fits_on_meta():
    unset = SparseFeatureMap.empty(7, *SIZES, torch.bfloat16, "meta")
    for tensor in (unset.indices, unset.weights, unset.statistics):
        assert tensor.is_meta
        assert len(tensor) == 7
    assert unset.indices.dtype == torch.int64
    assert unset.weights.dtype == torch.bfloat16


# What is refused

ONE = torch.ones(1)
PAIR = [(0, 0, 0)]
BAD_MAPS = {
    "lengths": (PAIR, torch.ones(2), r"got \[1, 3\], \[2\] and \[1, 3\]"),
    "axes": (PAIR, torch.ones(1, 1), r"got \[1, 3\], \[1, 1\] and"),
    "query feature": ([(D_QUERY + 1, 0, 0)], ONE, r"got \[18, 0, 0\]"),
    "key feature": ([(0, D_KEY + 1, 0)], ONE, r"got \[0, 20, 0\].*another dictionary"),
    "head": ([(0, 0, 6)], ONE, r"x \[0, 5\] .*got \[0, 0, 6\]"),
    "negative": ([(3, 4, 5), (0, -1, 0)], torch.ones(2), r"got \[0, -1, 0\] to \[3, 4, 5\]"),
    "twice": (
        [(1, 2, 3), (4, 5, 1), (1, 2, 3)],
        torch.ones(3),
        r"\(1, 2, 3\) twice: merge duplicates first",
    ),
    "constant x constant": ([(D_QUERY, D_KEY, 2)], ONE, "is part of every map"),
    "NaN": (PAIR, ONE * torch.nan, r"finite numbers in \[0, 1\]"),
    "infinite": (PAIR, ONE * torch.inf, r"finite numbers in \[0, 1\]"),
    "above 1": (PAIR, ONE * 1.001, r"finite numbers in \[0, 1\]"),
    "below 0": (PAIR, ONE * -0.001, r"finite numbers in \[0, 1\]"),
}


@pytest.mark.parametrize(("pairs", "weights", "message"), BAD_MAPS.values(), ids=BAD_MAPS)
def test_bad_maps_are_refused(pairs, weights, message):
    with pytest.raises(ValueError, match=message):
        SparseFeatureMap(pairs, weights, *SIZES)


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (2,), (2, 3, 1)])
def test_statistics_of_another_shape_are_refused(shape):
    pairs = [(0, 1, 2), (3, 4, 5)]
    with pytest.raises(ValueError, match=r"got \[2, 3\], \[2\] and \["):
        SparseFeatureMap(pairs, torch.ones(2), *SIZES, torch.zeros(shape))


def test_statistics_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="Pair statistics must be finite"):
        SparseFeatureMap(PAIR, ONE, *SIZES, torch.full((1, 3), torch.nan))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 3), float), ((5, 2), int), ((3,), int), ((1, 1, 3), int)]
)
def test_pairs_must_be_integer_triples(shape, dtype):
    with pytest.raises(ValueError, match=r"Pairs are integer triples .* of shape \["):
        as_pairs(np.ones(shape, dtype=dtype))


@pytest.mark.parametrize(
    "container",
    [list, lambda pairs: np.array(pairs, np.int32), lambda pairs: torch.tensor(pairs).short()],
    ids=["list", "array", "tensor"],
)
def test_pairs_may_come_as_lists_arrays_or_tensors(container):
    triples = [(1, 2, 3), (4, 5, 0)]
    pairs = as_pairs(container(triples))
    assert pairs.dtype == torch.int64
    assert list(map(tuple, pairs.tolist())) == triples
    assert as_pairs([]).shape == (0, 3)


# The stored form of indices and statistics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_indices_are_exact_in_every_dtype(dtype):
    small = [0, 1, 255, 256, 257, 2047, 2049, 4099]
    large = [65535, 65537, 100_003, 16_777_217, 2**31 - 1]
    features = torch.tensor(small + large)
    indices = torch.stack([features, features.flip(0), features.roll(3)], dim=1)
    digits = pack_indices(indices).to(dtype)  # as the host's loader casts them
    assert digits.shape == (13, 3, 4)
    assert torch.equal(unpack_indices(digits), indices)
    if dtype.itemsize == 2:
        cast = indices.to(dtype).to(torch.int64)
        assert not torch.equal(cast, indices), "packing would not be needed"


@pytest.mark.parametrize("value", [torch.nan, -1.0, 256.0, 3.4, torch.inf])
def test_damaged_digits_are_refused(value):
    for digit in range(4):
        digits = pack_indices(torch.tensor([[5, 7, 2], [11, 300, 1]])).float()
        digits[1, 1, digit] = value
        with pytest.raises(ValueError, match="must be integers 0 to 255"):
            unpack_indices(digits)


@pytest.mark.parametrize("shape", [(7, 3, 5), (7, 2, 4), (7, 3), (7,), ()])
def test_digits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[n_pairs, 3, 4\], got shape"):
        unpack_indices(torch.zeros(shape))


STATISTICS_TOLERANCES = {
    torch.float16: 0.01,
    torch.bfloat16: 0.07,
    torch.float32: 2e-6,
    torch.float64: 1e-12,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_statistics_keep_their_range(dtype):
    """Importance spans 1e-9 to 1 nats; as it is, float16 would turn most of it into 0."""
    importance = torch.logspace(-9, 0, 41, dtype=torch.float64)
    effect = torch.linspace(-9, 9, 41, dtype=torch.float64)
    statistics = torch.stack([importance, effect, importance.flip(0)], dim=1)
    packed = pack_statistics(statistics).to(dtype)
    unpacked = unpack_statistics(packed.double())
    tolerance = STATISTICS_TOLERANCES[dtype]
    torch.testing.assert_close(unpacked, statistics, rtol=tolerance, atol=1e-12)
    if dtype == torch.float16:
        relative_error = (statistics.half().double() / statistics)[:, 0] - 1
        assert relative_error.abs().max() > 0.02, "packing would not be needed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_zeros_stay_zero(dtype):
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    cast_when_packed = pack_statistics(zeros).to(dtype)
    assert torch.equal(unpack_statistics(cast_when_packed.double()), zeros)
    cast_before = pack_statistics(zeros.to(dtype))
    assert torch.equal(unpack_statistics(cast_before), zeros.to(dtype))
