"""The sparse feature map, against the transcoders' scores, dense einsums and plain loops."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from oracles import (
    BATCH,
    D_KEY,
    D_QUERY,
    N_POS,
    ROTARY,
    dense_scores,
    loop_kernel,
    make_spec,
    random_case,
    random_map,
)
from safetensors.torch import load_file, save_file

from sae_lens_qk.attention import AttentionSpec, allowed_keys, attention_scores
from sae_lens_qk.feature_map import SparseFeatureMap, as_pairs, pack_indices, pack_statistics, unpack_indices, unpack_statistics
from sae_lens_qk.scoring.pairs import Decoders, constant_scores
from sae_lens_qk.scoring.entries import with_constant

ALLOWED = allowed_keys(N_POS)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SIZES = D_QUERY, D_KEY, 6


def transcoder_scores(
    query_acts, key_acts, decoders: Decoders, spec: AttentionSpec
) -> torch.Tensor:
    """The other code path: decode, then attend."""
    queries = torch.einsum("bia,ahd->bihd", with_constant(query_acts), decoders.query)
    keys = torch.einsum("bja,ahd->bjhd", with_constant(key_acts), decoders.key)
    return attention_scores(queries, keys, spec)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n_kv_heads", [2, 6])
@pytest.mark.parametrize("rotary", ROTARY)
def test_all_pairs_give_the_scores_of_the_transcoders(rotary, n_kv_heads, dtype):
    spec = make_spec(rotary, n_kv_heads)
    query_acts, key_acts, decoders = random_case(spec, dtype)
    everything = SparseFeatureMap.all_pairs(D_QUERY, D_KEY, spec.n_heads, dtype)
    assert len(everything) == ((D_QUERY + 1) * (D_KEY + 1) - 1) * 6
    scores = everything.scores(query_acts, key_acts, decoders, spec)
    expected = transcoder_scores(query_acts, key_acts, decoders, spec)
    assert scores.dtype == dtype
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(scores, expected.tril(), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("rotary", ROTARY)
def test_scores_equal_the_plain_loop(rotary):
    spec = make_spec(rotary)
    query_acts, key_acts, decoders = random_case(spec)
    some = random_map()
    expected = torch.zeros(BATCH, spec.n_heads, N_POS, N_POS, dtype=torch.float64)
    constants = [((D_QUERY, D_KEY, h), 1.0) for h in range(spec.n_heads)]
    for pair, weight in [
        *zip(some.indices.tolist(), some.weights.tolist(), strict=True),
        *constants,
    ]:
        a, b, h = pair
        kernel = [loop_kernel(pair, decoders, spec, offset) for offset in range(N_POS)]
        for row, i in product(range(BATCH), range(N_POS)):
            query_act = 1.0 if a == D_QUERY else float(query_acts[row, i, a])
            if query_act == 0:
                continue
            for j in range(i + 1):
                key_act = 1.0 if b == D_KEY else float(key_acts[row, j, b])
                expected[row, h, i, j] += weight * query_act * key_act * kernel[i - j]
    torch.testing.assert_close(
        some.scores(query_acts, key_acts, decoders, spec), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rotary", ROTARY)
def test_a_subset_equals_the_dense_einsum(rotary, dtype):
    spec = make_spec(rotary)
    query_acts, key_acts, decoders = random_case(spec, dtype)
    some = random_map(dtype=dtype)
    dense = some.to_dense()
    assert dense.shape == (D_QUERY + 1, D_KEY + 1, 6)
    assert (dense[D_QUERY, D_KEY] == 1).all()
    assert int((dense != 0).sum()) == int((some.weights != 0).sum()) + 6
    scores = some.scores(query_acts, key_acts, decoders, spec)
    expected = dense_scores(dense, query_acts, key_acts, decoders, spec)
    assert scores[..., ~ALLOWED].eq(0).all()
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    full = transcoder_scores(query_acts, key_acts, decoders, spec).tril().double()
    assert (expected - full).abs().max() > 0.1, "the subset does not differ from the whole"


@pytest.mark.parametrize("rotary", ROTARY)
def test_include_constant_adds_constant_x_constant(rotary):
    spec = make_spec(rotary)
    query_acts, key_acts, decoders = random_case(spec)
    some = random_map()
    constant = constant_scores(decoders, spec, N_POS)
    for h, i, j in product(range(6), (0, 5, 12), (0, 5, 12)):
        expected = loop_kernel((D_QUERY, D_KEY, h), decoders, spec, i - j) if j <= i else 0.0
        assert float(constant[h, i, j]) == pytest.approx(expected, abs=1e-12)
    without = some.scores(query_acts, key_acts, decoders, spec, include_constant=False)
    with_it = some.scores(query_acts, key_acts, decoders, spec)
    assert constant.abs().max() > 0.05
    torch.testing.assert_close(
        with_it - without, constant.expand(BATCH, -1, -1, -1), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("rotary", ["none", "partial"])
def test_given_weights_replace_the_maps_own(rotary):
    spec = make_spec(rotary)
    case = random_case(spec)
    some = random_map()
    other = some.weights.flip(0)
    given = some.scores(*case, spec, weights=other)
    assert torch.equal(given, some.reweighted(other).scores(*case, spec))
    assert not torch.equal(given, some.scores(*case, spec))


@pytest.mark.parametrize("rotary", ROTARY)
def test_gradients_with_the_constants_equal_autograd_of_the_dense_mask(rotary):
    """Of weights and decoders; constant x constant has no weight, but its decoder rows have a gradient."""
    spec = make_spec(rotary)
    query_acts, key_acts, decoders = random_case(spec)
    some = random_map()
    towards = torch.randn(
        BATCH, 6, N_POS, N_POS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    def gradients(make_scores, weights):
        leaves = [tensor.clone().requires_grad_() for tensor in (weights, *decoders)]
        (make_scores(leaves[0], Decoders(*leaves[1:])) * towards).sin().sum().backward()
        return [leaf.grad for leaf in leaves]

    found = gradients(
        lambda w, d: some.scores(query_acts, key_acts, d, spec, weights=w), some.weights
    )
    expected = gradients(
        lambda m, d: dense_scores(m, query_acts, key_acts, d, spec), some.to_dense()
    )
    expected[0] = expected[0][tuple(some.indices.T)]
    for gradient, exact in zip(found, expected, strict=True):
        assert exact.abs().max() > 0.1
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rotary", ["none", "partial"])
def test_gradient_of_the_weights_equals_finite_differences(rotary):
    spec = make_spec(rotary)
    case = random_case(spec)
    some = random_map(n_pairs=23, seed=5)

    def loss(weights):
        return some.scores(*case, spec, weights=weights).square().sum()

    weights = some.weights.clone().requires_grad_()
    loss(weights).backward()
    step = 1e-3
    differences = torch.stack(
        [
            (loss(some.weights + step * unit) - loss(some.weights - step * unit)) / (2 * step)
            for unit in torch.eye(23).double()
        ]
    )
    assert differences.abs().max() > 0.1
    torch.testing.assert_close(
        weights.grad, differences, rtol=0, atol=1e-9
    )  # exact: the loss is quadratic


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_decoders_are_contracted_in_float32(dtype):
    spec = make_spec("full")
    query_acts, key_acts, decoders = random_case(spec, dtype)
    some = random_map(dtype=dtype)
    scores = some.scores(query_acts, key_acts, decoders, spec)
    assert scores.dtype == torch.float32
    expected = dense_scores(some.to_dense(), query_acts, key_acts, decoders, spec)
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_packed_indices_are_exact_in_every_dtype(dtype):
    features = torch.tensor(
        [0, 1, 255, 256, 257, 2047, 2049, 4099, 65535, 65537, 100_003, 16_777_217, 2**31 - 1]
    )
    indices = torch.stack([features, features.flip(0), features.roll(3)], dim=1)
    digits = pack_indices(indices).to(dtype)  # as the host's loader casts them
    assert digits.dtype == dtype
    assert digits.shape == (13, 3, 4)
    assert torch.equal(unpack_indices(digits), indices)
    if dtype.itemsize == 2:
        assert not torch.equal(indices.to(dtype).to(torch.int64), indices), (
            "packing would not be needed"
        )


@pytest.mark.parametrize("value", [torch.nan, -1.0, 256.0, 3.4, torch.inf])
def test_damaged_digits_are_refused(value):
    for at in range(4):
        digits = pack_indices(torch.tensor([[5, 7, 2], [11, 300, 1]])).float()
        digits[1, 1, at] = value
        with pytest.raises(ValueError, match="Packed pairs must be integers 0 to 255"):
            unpack_indices(digits)


@pytest.mark.parametrize("shape", [(7, 3, 5), (7, 2, 4), (7, 3), (7,), ()])
def test_digits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"of shape \[n_pairs, 3, 4\], got shape"):
        unpack_indices(torch.zeros(shape))


def test_find_gives_rows_and_minus_one():
    some = random_map()
    order = torch.randperm(len(some), generator=torch.Generator().manual_seed(2))
    assert torch.equal(some.find(some.indices[order]), order)
    listed = {tuple(pair) for pair in some.indices.tolist()}
    others = [
        pair
        for pair in product(range(D_QUERY + 1), range(D_KEY + 1), range(6))
        if pair not in listed
    ]
    assert (some.find(others) == -1).all()
    mixed = [others[0], tuple(some.indices[7].tolist()), others[5]]
    assert some.find(mixed).tolist() == [-1, 7, -1]


def test_find_does_not_take_pairs_out_of_range_for_others():
    """A head too large would otherwise name head 0 of the next key feature."""
    some = SparseFeatureMap([(5, 3, 0), (6, 0, 2)], torch.ones(2), D_QUERY, D_KEY, 6)
    assert some.find([(5, 3, 0), (6, 0, 2)]).tolist() == [0, 1]
    assert (
        some.find(
            [(5, 2, 6), (5, D_KEY + 1, 2), (6, 1, -4), (4, D_KEY + 1 + 3, 0), (7, -D_KEY - 1, 2)]
        )
        .eq(-1)
        .all()
    )


def as_dict(some: SparseFeatureMap) -> dict[tuple, tuple]:
    """Weight and statistics by pair."""
    values = torch.cat([some.weights[:, None], some.statistics], dim=1).tolist()
    return {
        tuple(pair): tuple(row) for pair, row in zip(some.indices.tolist(), values, strict=True)
    }


def is_sorted(some: SparseFeatureMap) -> bool:
    pairs = [tuple(pair) for pair in some.indices.tolist()]
    return pairs == sorted(pairs)


def test_pairs_are_sorted_and_weights_and_statistics_follow():
    some = random_map()
    assert is_sorted(some)
    shuffle = torch.randperm(len(some), generator=torch.Generator().manual_seed(4))
    again = SparseFeatureMap(
        some.indices[shuffle], some.weights[shuffle], *SIZES, some.statistics[shuffle]
    )
    assert as_dict(again) == as_dict(some)
    assert again.equals(some)
    assert torch.equal(again.statistics, some.statistics)
    listed = some.indices[shuffle].tolist()
    assert [tuple(pair) for pair in listed] != list(as_dict(again)), (
        "the order given was sorted already"
    )
    bare = SparseFeatureMap(listed, some.weights[shuffle], *SIZES)
    assert bare.statistics.eq(0).all()
    assert bare.statistics.shape == (len(some), 3)


def test_select_by_mask_or_rows_and_reweighted():
    some = random_map()
    heavy = some.weights > 0.5
    assert 0 < int(heavy.sum()) < len(some)
    for kept in (some.select(heavy), some.select(heavy.nonzero()[:, 0])):
        assert torch.equal(kept.indices, some.indices[heavy])
        assert torch.equal(kept.weights, some.weights[heavy])
        assert torch.equal(kept.statistics, some.statistics[heavy])
        assert (kept.d_query, kept.d_key, kept.n_heads) == (D_QUERY, D_KEY, 6)
    backwards = torch.arange(len(some) - 1, -1, -1)
    assert as_dict(some.select(backwards)) == as_dict(some)
    halved = some.reweighted(some.weights / 2)
    assert torch.equal(halved.indices, some.indices)
    assert torch.equal(halved.statistics, some.statistics)
    assert torch.equal(halved.to_dense()[:D_QUERY], some.to_dense()[:D_QUERY] / 2)
    assert some.weights.max() == 1, "the original is left alone"


@pytest.mark.parametrize(
    ("wanted", "keeps"),
    [
        ({}, lambda a, b, h: True),
        ({"heads": 4}, lambda a, b, h: h == 4),
        (
            {"heads": [0, 5], "query_features": range(3, 11)},
            lambda a, b, h: h in (0, 5) and 3 <= a < 11,
        ),
        ({"key_features": {D_KEY}}, lambda a, b, h: b == D_KEY),
        (
            {"query_features": 7, "key_features": (1, 2, 18, 3)},
            lambda a, b, h: a == 7 and b in (1, 2, 18, 3),
        ),
        ({"heads": range(1, 3), "key_features": 0}, lambda a, b, h: h in (1, 2) and b == 0),
        ({"heads": []}, lambda a, b, h: False),
        ({"heads": 99}, lambda a, b, h: False),
    ],
)
def test_restrict_equals_a_filter(wanted, keeps):
    some = random_map(n_pairs=1009)
    expected = {pair: values for pair, values in as_dict(some).items() if keeps(*pair)}
    assert 0 < len(expected) < 1009 or wanted in ({}, {"heads": []}, {"heads": 99})
    assert as_dict(some.restrict(**wanted)) == expected


def test_union_is_that_of_dicts():
    one, other = random_map(seed=0), random_map(n_pairs=1009, seed=1)
    both = set(as_dict(one)) & set(as_dict(other))
    assert both
    assert any(as_dict(one)[pair] != as_dict(other)[pair] for pair in both)
    for left, right in ((one, other), (other, one)):
        merged = left | right
        assert as_dict(merged) == as_dict(left) | as_dict(right)
        assert is_sorted(merged)
    empty = one.restrict(heads=[])
    assert as_dict(one | empty) == as_dict(empty | one) == as_dict(one)
    for sizes in ((D_QUERY + 1, D_KEY, 6), (D_QUERY, D_KEY - 1, 6), (D_QUERY, D_KEY, 3)):
        with pytest.raises(ValueError, match=r"\(17, 19, 6\) and .* cannot be merged"):
            one | SparseFeatureMap([], torch.ones(0), *sizes)


def test_statistics_measured_elsewhere():
    """Pairs and weights stay; statistics come from the other map, zeros for pairs that it does not list."""
    one, other = random_map(seed=0), random_map(n_pairs=1009, seed=1)
    made = one.measured_as(other)
    assert made.equals(one)
    expected = {
        pair: (row[0], *as_dict(other).get(pair, (0.0,) * 4)[1:])
        for pair, row in as_dict(one).items()
    }
    assert as_dict(made) == expected
    found = made.statistics.any(dim=1)
    assert 0 < int(found.sum()) < len(one)


def test_equals_is_bit_for_bit():
    some = random_map()
    assert some.equals(random_map())
    lighter = some.weights.clone()
    lighter[7] = torch.nextafter(lighter[7], torch.tensor(0.0, dtype=torch.float64))
    others = [
        some.reweighted(lighter),
        some.select(torch.arange(210)),
        some | random_map(seed=1),
        SparseFeatureMap(some.indices, some.weights, D_QUERY, D_KEY, 7),
        SparseFeatureMap(some.indices, some.weights, D_QUERY + 1, D_KEY, 6).restrict(),
    ]
    for other in others:
        assert not some.equals(other)
        assert not other.equals(some)
    unmeasured = SparseFeatureMap(some.indices, some.weights, *SIZES)
    assert some.equals(unmeasured), "statistics do not count"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_saved_map_comes_back(dtype, tmp_path):
    some = random_map(dtype=dtype)
    for kept in (some, some.restrict(heads=[])):
        kept.save(tmp_path / "map.safetensors")
        loaded = SparseFeatureMap.load(tmp_path / "map.safetensors")
        assert loaded.equals(kept)
        assert torch.equal(loaded.statistics, kept.statistics)
        assert loaded.weights.dtype == loaded.statistics.dtype == dtype


def changed(name: str, at: tuple[int, ...], value: float):
    def change(tensors):
        tensors[name][at] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("indices", (5, 0), D_QUERY + 1), "the map belongs to another dictionary"),
        (changed("indices", (5, 2), -1), "the map belongs to another dictionary"),
        (changed("weights", (3,), torch.nan), "Pair weights must be finite numbers"),
        (changed("weights", (3,), 1.5), "Pair weights must be finite numbers"),
        (
            lambda tensors: tensors["indices"][5].copy_(tensors["indices"][4]),
            "twice: merge duplicates first",
        ),
        (lambda tensors: tensors.update(weights=torch.ones(210)), "A feature map needs indices"),
        (
            lambda tensors: tensors.update(statistics=torch.ones(211, 2)),
            "A feature map needs indices",
        ),
    ],
)
def test_a_damaged_file_is_refused(change, message, tmp_path):
    path = tmp_path / "map.safetensors"
    random_map().save(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"sizes": json.dumps(SIZES)})
    with pytest.raises(ValueError, match=message):
        SparseFeatureMap.load(path)


def test_a_large_map_is_not_made_dense():
    fits = SparseFeatureMap([(1, 2, 0)], torch.ones(1), 99, 99, 1)
    assert fits.to_dense().shape == (100, 100, 1)
    with pytest.raises(
        MemoryError, match=r"dense mask of \(24577, 24577, 12\) entries is too large"
    ):
        SparseFeatureMap([(1, 2, 0)], torch.ones(1), 24_576, 24_576, 12).to_dense()
    with pytest.raises(MemoryError, match="too large"):
        SparseFeatureMap([], torch.ones(0), (1 << 14) - 1, 1 << 14, 1).to_dense()  # just above 2^28


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_packed_statistics_keep_their_range(dtype):
    """Importance spans 1e-9 to 1 nats; as it is, float16 would turn most of it into 0."""
    importance = torch.logspace(-9, 0, 41, dtype=torch.float64)
    co_occurrence, effect = importance.flip(0), torch.linspace(-9, 9, 41, dtype=torch.float64)
    statistics = torch.stack([importance, effect, co_occurrence], dim=1)
    packed = pack_statistics(statistics).to(dtype)
    assert packed.isfinite().all()
    back = unpack_statistics(packed.double())
    tolerance = {
        torch.float16: 0.01,
        torch.bfloat16: 0.07,
        torch.float32: 2e-6,
        torch.float64: 1e-12,
    }[dtype]
    torch.testing.assert_close(back[:, [0, 2]], statistics[:, [0, 2]], rtol=tolerance, atol=0)
    torch.testing.assert_close(back[:, 1], effect, rtol=tolerance, atol=1e-12)
    if dtype == torch.float16:
        assert ((statistics.half().double() / statistics)[:, 0] - 1).abs().max() > 0.02, (
            "packing would not be needed"
        )
    unmeasured = torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(
        unpack_statistics(pack_statistics(unmeasured).to(dtype).double()), unmeasured
    ), "zero stays zero"
    assert torch.equal(
        unpack_statistics(pack_statistics(unmeasured.to(dtype))), unmeasured.to(dtype)
    )


def test_count_active_equals_the_loop():
    spec = make_spec("partial")
    query_acts, key_acts, _ = random_case(spec)
    some = random_map()
    expected = 0
    q_fires, k_fires = ((with_constant(acts) > 0).tolist() for acts in (query_acts, key_acts))
    for (a, b, _), row, i in product(some.indices.tolist(), range(BATCH), range(N_POS)):
        expected += sum(q_fires[row][i][a] and k_fires[row][j][b] for j in range(i + 1))
    assert some.count_active(query_acts, key_acts) == expected
    assert expected > 1000


def test_features_that_never_fire_add_nothing():
    spec = make_spec("full")
    _, key_acts, decoders = random_case(spec)
    some = random_map()
    silent = torch.zeros(BATCH, N_POS, D_QUERY, dtype=torch.float64)
    scores = some.scores(silent, key_acts, decoders, spec)
    constants_only = some.select(some.indices[:, 0] == D_QUERY)
    alone = constants_only.scores(silent, key_acts, decoders, spec)
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-12)
    assert (scores - constant_scores(decoders, spec, N_POS)).abs().max() > 0.01


@pytest.mark.parametrize("rotary", ROTARY)
def test_one_position_is_offset_zero(rotary):
    spec = make_spec(rotary)
    query_acts, key_acts, decoders = random_case(spec)
    everything = SparseFeatureMap.all_pairs(D_QUERY, D_KEY, 6, torch.float64)
    first = query_acts[:, :1], key_acts[:, :1]
    expected = transcoder_scores(*first, decoders, spec)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(
        everything.scores(*first, decoders, spec), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("rotary", ROTARY)
def test_an_empty_map_is_constant_x_constant_alone(rotary):
    spec = make_spec(rotary)
    query_acts, key_acts, decoders = random_case(spec)
    empty = SparseFeatureMap([], torch.ones(0, dtype=torch.float64), D_QUERY, D_KEY, 6)
    assert len(empty) == 0
    assert empty.find([(0, 0, 0)]).tolist() == [-1]
    assert empty.count_active(query_acts, key_acts) == 0
    assert int((empty.to_dense() != 0).sum()) == 6
    scores = empty.scores(query_acts, key_acts, decoders, spec)
    torch.testing.assert_close(scores[0], constant_scores(decoders, spec, N_POS), rtol=0, atol=0)
    assert empty.scores(query_acts, key_acts, decoders, spec, include_constant=False).eq(0).all()


def test_unset_map_has_the_asked_size_and_fits_on_meta():
    made = SparseFeatureMap.empty(7, D_QUERY, D_KEY, 6, torch.bfloat16, "meta")
    assert made.indices.is_meta
    assert made.weights.is_meta
    assert (made.indices.shape, made.indices.dtype) == ((7, 3), torch.int64)
    assert (made.weights.shape, made.weights.dtype) == ((7,), torch.bfloat16)


@pytest.mark.parametrize(
    ("indices", "weights", "message"),
    [
        (
            [(0, 0, 0)],
            torch.ones(2),
            r"indices \[n_pairs, 3\], weights \[n_pairs\] and .*, got \[1, 3\], \[2\] and \[1, 3\]",
        ),
        ([(0, 0, 0)], torch.ones(1, 1), r"got \[1, 3\], \[1, 1\] and"),
        (
            [(D_QUERY + 1, 0, 0)],
            torch.ones(1),
            rf"lie in \[0, {D_QUERY}\] x \[0, {D_KEY}\] x \[0, 5\].*got \[18, 0, 0\]",
        ),
        ([(0, D_KEY + 1, 0)], torch.ones(1), r"got \[0, 20, 0\].*another dictionary"),
        ([(0, 0, 6)], torch.ones(1), r"got \[0, 0, 6\]"),
        ([(3, 4, 5), (0, -1, 0)], torch.ones(2), r"got \[0, -1, 0\] to \[3, 4, 5\]"),
        (
            [(1, 2, 3), (4, 5, 1), (1, 2, 3)],
            torch.ones(3),
            r"lists the pair \(1, 2, 3\) twice: merge duplicates first",
        ),
        ([(D_QUERY, D_KEY, 2)], torch.ones(1), "constant x constant pair is part of every map"),
        ([(0, 0, 0)], torch.tensor([torch.nan]), r"finite numbers in \[0, 1\]"),
        ([(0, 0, 0)], torch.tensor([torch.inf]), r"finite numbers in \[0, 1\]"),
        ([(0, 0, 0)], torch.tensor([1.001]), r"finite numbers in \[0, 1\]"),
        ([(0, 0, 0)], torch.tensor([-0.001]), r"finite numbers in \[0, 1\]"),
    ],
)
def test_bad_maps_are_refused(indices, weights, message):
    with pytest.raises(ValueError, match=message):
        SparseFeatureMap(indices, weights, D_QUERY, D_KEY, 6)


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (2,), (2, 3, 1)])
def test_statistics_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"statistics \[n_pairs, 3\], got \[2, 3\], \[2\] and \["):
        SparseFeatureMap([(0, 1, 2), (3, 4, 5)], torch.ones(2), *SIZES, torch.zeros(shape))


def test_bad_weights_are_refused_when_reweighting():
    with pytest.raises(ValueError, match="clamp them first"):
        random_map().reweighted(torch.full((211,), 1.5))


@pytest.mark.parametrize(
    "pairs",
    [
        np.zeros((2, 3)),
        np.zeros((5, 2), dtype=np.int64),
        np.zeros(3, dtype=np.int64),
        np.ones((1, 1, 3), dtype=int),
    ],
)
def test_pairs_must_be_integer_triples(pairs):
    with pytest.raises(ValueError, match=r"Pairs are integer triples .* of shape \["):
        as_pairs(pairs)


def test_pairs_may_come_as_lists_arrays_or_tensors():
    triples = [(1, 2, 3), (4, 5, 0)]
    for pairs in (
        triples,
        np.array(triples, dtype=np.int32),
        torch.tensor(triples, dtype=torch.int16),
    ):
        made = as_pairs(pairs)
        assert made.dtype == torch.int64
        assert made.tolist() == [list(triple) for triple in triples]
    assert as_pairs([]).shape == (0, 3)


def test_restrict_takes_numbers_from_a_frame_and_measured_as_an_empty_map():
    some = random_map()
    assert some.restrict(heads=np.int64(2)).equals(some.restrict(heads=[2]))
    assert some.restrict(heads=np.array([1, 2])).equals(some.restrict(heads=[1, 2]))
    empty = SparseFeatureMap([], torch.empty(0), some.d_query, some.d_key, some.n_heads)
    assert not some.measured_as(empty).statistics.any()


def test_foreign_and_damaged_files_are_refused(tmp_path):
    (tmp_path / "junk").write_bytes(b"x" * 50)
    save_file({"indices": torch.zeros(1)}, tmp_path / "foreign")
    for name in ("junk", "foreign"):
        with pytest.raises(ValueError, match="is not a feature map, or is damaged"):
            SparseFeatureMap.load(tmp_path / name)
    with pytest.raises(ValueError, match="Pair statistics must be finite"):
        SparseFeatureMap([(1, 2, 0)], torch.ones(1), 5, 5, 1, torch.full((1, 3), torch.nan))
