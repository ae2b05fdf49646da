"""What a report says about features, pairs and prompts, against dictionary and statistics."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from dashboard_cases import (
    N_POS,
    N_PROMPT,
    N_ROWS,
    hostile_words,
    page_data,
    ranked_dictionary,
    tiny_statistics,
)
from tiny_dictionaries import (
    D_KEY,
    D_QUERY,
    LAYER,
    N_PAIRS,
    inputs_and_scores,
    pair_term,
    tiny_dictionary,
)
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.dashboard.columns import kernel_stretches
from sae_lens_qk.dashboard.pages import ReportLimits, choose_pages, pair_table
from sae_lens_qk.dashboard.prompts import prompt_section

SIDES = ("query", "key")
SIZES = {"query": D_QUERY, "key": D_KEY}
TRIPLE = ["query_feature", "key_feature", "head"]
TEXT_COLUMNS = ["co_occurrence", "mean", "max", "min"]


@pytest.fixture(scope="module", params=["llama_bridge"])
def model(request):
    """Rotary embeddings and grouped keys."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def d(model):
    d = ranked_dictionary(model)
    d.metrics = {"n_tokens": 5, "sources": {"zero": {"ce_loss": 3.51953947, "pattern_kl": None}}}
    return d


@pytest.fixture(scope="module")
def statistics(d, model):
    return tiny_statistics(d, model)


@pytest.fixture(scope="module")
def prompt(d, model):
    return qk.RecordedPrompt.record(d, model, tiny_tokens(1, N_PROMPT, seed=5))


@pytest.fixture(scope="module")
def explanations(d, model, prompt):
    return [qk.attribute(d, model, prompt, head, 9, 4) for head in (2, 0)]


@pytest.fixture(scope="module")
def data(d, statistics, prompt, explanations):
    return page_data(d, statistics, [prompt], explanations)


def assert_digits(actual, expected) -> None:
    """Equal to the four digits of a page; None stands for NaN."""
    actual = np.array(actual, dtype=float)
    np.testing.assert_allclose(actual, expected, rtol=6e-4, atol=1e-12)


def ranked_pairs(d, statistics) -> pd.DataFrame:
    """Pairs with importance times m^2 and what the texts gave, in the map's order."""
    pairs = d.pair_frame()
    pairs["importance"] *= pairs["weight"] ** 2
    pairs[TEXT_COLUMNS] = statistics.pairs[TEXT_COLUMNS]
    return pairs


def feature_pages(data, side) -> pd.DataFrame:
    """A row per feature with a page, by its number."""
    return pd.DataFrame(data["features"][side]).set_index("feature")


def pair_pages(data) -> pd.DataFrame:
    """A row per pair with a page, by its number."""
    columns = {name: column for name, column in data["pairs"].items() if name != "stretches"}
    return pd.DataFrame(columns).set_index("pair")


def word_at(data, row, pos) -> str:
    texts = data["texts"]
    for first, words in texts["rows"][str(row)]:
        if first <= pos < first + len(words):
            number = words[pos - first]
            return texts["words"][number]
    raise AssertionError(f"row {row}, position {pos} is not in the report")


def assert_words(data, statistics, row, positions) -> None:
    tokens = statistics.tokens[row, list(positions)]
    words = [word_at(data, row, pos) for pos in positions]
    assert words == hostile_words(tokens)


class TestFeatures:
    @pytest.mark.parametrize("side", SIDES)
    def test_columns_are_the_statistics(self, data, d, statistics, side):
        pages = feature_pages(data, side)
        assert len(pages) > 20
        features = statistics.features.query("side == @side").set_index("feature")
        for name in ("density", "mean", "max"):
            assert_digits(pages[name], features[name][pages.index])
        pairs = ranked_pairs(d, statistics)
        for feature, page in pages.iterrows():
            own = pairs[pairs[f"{side}_feature"] == feature]
            assert page.pairs == len(own)
            assert_digits(page.importance, own["importance"].sum())
        assert pages["importance"].is_monotonic_decreasing

    @pytest.mark.parametrize("side", SIDES)
    def test_contexts_point_at_the_words_around(self, data, statistics, side):
        limits = ReportLimits()
        for feature, page in feature_pages(data, side).iterrows():
            contexts = statistics.feature_contexts(side, feature)
            expected = pd.DataFrame(contexts[: limits.contexts])
            assert len(page.contexts) == len(expected)
            if len(expected):
                assert_digits(page.contexts, expected)
            for row, pos, _ in page.contexts:
                first = max(0, pos - limits.before)
                end = min(N_POS, pos + limits.after + 1)
                assert_words(data, statistics, row, range(first, end))

    @pytest.mark.parametrize(("side", "other"), [("query", "key"), ("key", "query")])
    def test_partners_are_kept_pairs_by_importance(self, data, d, statistics, side, other):
        pairs = ranked_pairs(d, statistics)
        pairs = pairs.sort_values("importance", ascending=False, kind="stable")
        columns = [f"{other}_feature", "head", "weight", "importance", "mean"]
        for feature, page in feature_pages(data, side).iterrows():
            own = pairs[pairs[f"{side}_feature"] == feature]
            assert_digits(page.partners, own[columns][:24])

    def test_neighbours_fire_along(self, data, statistics):
        for feature, page in feature_pages(data, "key").iterrows():
            expected = statistics.feature_co_occurrence("key", feature, 8)
            assert len(page.neighbours) == len(expected)
            if len(expected):
                assert_digits(page.neighbours, expected[["feature", "share"]])

    @pytest.mark.parametrize("side", SIDES)
    def test_labels_are_the_distinct_words_of_the_strongest_contexts(self, data, statistics, side):
        labels = data["texts"]["labels"][side]
        assert len(labels) == SIZES[side]
        for feature, label in enumerate(labels):
            distinct = []
            for row, pos, _ in statistics.feature_contexts(side, feature):
                token = statistics.tokens[row, pos]
                if token not in distinct:
                    distinct.append(token)
            words = [data["texts"]["words"][number] for number in label]
            assert words == hostile_words(distinct[:3])

    def test_activations_around_are_those_of_the_model(self, d, statistics, model):
        requested = []

        def inputs(rows):
            requested.extend(rows.tolist())
            return inputs_and_scores(model, rows)[0]

        data = page_data(d, statistics, inputs=inputs)
        assert requested == statistics.tokens.tolist()  # each row once, for both sides
        x, _ = inputs_and_scores(model, tiny_tokens(N_ROWS, N_POS))
        features = d.features(x)
        limits = ReportLimits()
        for side, acts in zip(SIDES, features, strict=True):
            for feature, page in feature_pages(data, side).iterrows():
                for row, pos, value, window in page.contexts:
                    first = max(0, pos - limits.before)
                    end = pos + limits.after + 1
                    expected = acts[row, first:end, feature].tolist()
                    assert window == pytest.approx(expected, rel=6e-4, abs=1e-5)
                    assert window[pos - first] == pytest.approx(value, rel=1e-3)


class TestPairs:
    def test_columns_are_map_and_statistics(self, data, d, statistics):
        pages = pair_pages(data)
        assert sorted(pages.index) == list(range(N_PAIRS))
        triples = d.feature_map.indices[pages.index.tolist()]
        assert pages[TRIPLE].to_numpy().tolist() == triples.tolist()
        pairs = ranked_pairs(d, statistics)
        columns = ["weight", "score_at_0", "importance", "effect", *TEXT_COLUMNS]
        assert_digits(pages[columns], pairs.loc[pages.index, columns])
        assert pages["importance"].is_monotonic_decreasing

    def test_contexts_point_at_query_and_key(self, data, statistics):
        n_contexts = 0
        for number, page in pair_pages(data).iterrows():
            expected = pd.DataFrame(statistics.pair_contexts(number)[:5])
            assert len(page.contexts) == len(expected)
            if len(expected):
                assert_digits(page.contexts, expected)
            for row, i, j, _ in page.contexts:
                last_shown = min(i + 5, N_POS - 1)
                first_shown = max(j - 14, 0)
                assert_words(data, statistics, row, (i, j, last_shown, first_shown))
                n_contexts += 1
        assert n_contexts > 100

    def test_the_same_features_in_other_heads(self, data, d, statistics):
        pairs = ranked_pairs(d, statistics)
        columns = ["head", "weight", "importance", "effect"]
        for _, page in pair_pages(data).iterrows():
            same_query = pairs["query_feature"] == page.query_feature
            same_key = pairs["key_feature"] == page.key_feature
            assert_digits(page.heads, pairs.loc[same_query & same_key, columns])

    def test_kernel_is_the_score_of_mean_activations_by_distance(self, data, d, statistics):
        acts = {}
        for side in SIDES:
            means = statistics.features.query("side == @side")["mean"].to_numpy()
            acts[side] = np.broadcast_to(means, (1, N_POS, len(means)))
        weights = d.feature_map.weights.tolist()
        for number, page in pair_pages(data).iterrows():
            triple = tuple(page[TRIPLE])
            term = pair_term(d, acts["query"], acts["key"], triple)
            scores = weights[number] * term[0, :, 0]  # by distance to key 0
            expected = [*scores[:32], scores[32:40].mean(), scores[40]]
            kernel = np.array(page.kernel, dtype=float)
            np.testing.assert_allclose(kernel, expected, rtol=6e-3, atol=1e-6)

    @pytest.mark.parametrize("model", ["gpt2_bridge"], indirect=True)
    def test_without_rotary_embeddings_there_is_no_kernel(self, data):
        assert data["pairs"]["kernel"] is None
        assert data["overview"]["rotary"] is False

    @pytest.mark.parametrize("n_pos", [1, 7, 31, 32, 33, 256, 2048])
    def test_stretches_cover_every_distance_once(self, n_pos):
        stretches = kernel_stretches(n_pos)
        offsets = []
        for first, last in stretches:
            offsets += range(first, last + 1)
        assert offsets == list(range(n_pos))
        assert len(stretches) <= 64


class TestPrompts:
    def test_patterns_are_those_of_model_and_dictionary(self, data, d, prompt):
        (section,) = data["prompts"]
        assert section["words"] == prompt.words
        assert section["first_keys"] == [0] * N_PROMPT
        patterns = {
            "true": prompt.pattern,
            "feature_map": d.pattern(prompt.x[None], "feature_map")[0],
            "transcoders": d.pattern(prompt.x[None], "transcoders")[0],
        }
        weights = {"true": section["true"], **section["rebuilt"]}
        for name, pattern in patterns.items():
            for head in range(d.spec.n_heads):
                expected = []
                for i in range(N_PROMPT):
                    expected += pattern[head, i, : i + 1].tolist()
                assert weights[name][head] == pytest.approx(expected, abs=6e-5)

    def test_only_allowed_keys_have_cells(self):
        spec = qk.AttentionSpec(
            1,
            1,
            d_head=2,
            d_model=2,
            scale=1.0,
            window=2,
        )
        pattern = torch.arange(16.0).reshape(1, 4, 4)
        columns = ["head", "query_pos", "key_pos", *TRIPLE, "contribution", "pattern_effect"]
        no_pairs = pd.DataFrame(columns=columns)
        prompt = SimpleNamespace(
            words=list("abcd"), pattern=pattern, rebuilt_pattern=lambda source: pattern
        )
        d = SimpleNamespace(spec=spec)
        section = prompt_section(d, prompt, no_pairs, [], ReportLimits())
        assert section["first_keys"] == [0, 0, 1, 2]
        assert section["true"] == [[0.0, 4.0, 5.0, 9.0, 10.0, 14.0, 15.0]]
        assert section["n_cells"] == 7

    def test_cells_list_the_strongest_pairs(self, data, d, prompt):
        (section,) = data["prompts"]
        cells = section["cells"]
        strongest = prompt.strongest(8)
        assert section["n_cells"] == d.spec.n_heads * N_PROMPT * (N_PROMPT + 1) // 2
        assert sum(map(len, cells.values())) == len(strongest) > 500
        columns = ["query_feature", "key_feature", "contribution", "pattern_effect"]
        for (head, i, j), pairs in strongest.groupby(["head", "query_pos", "key_pos"]):
            assert_digits(cells[f"{head}/{i}/{j}"], pairs[columns])

    def test_only_the_largest_weights_have_lists(self, d, statistics, prompt):
        data = page_data(d, statistics, [prompt], limits=ReportLimits(cells=13))
        largest = torch.maximum(prompt.pattern, prompt.rebuilt_pattern("feature_map"))
        least = sorted(largest.flatten().tolist(), reverse=True)[12]
        cells = list(data["prompts"][0]["cells"])
        assert 0 < len(cells) <= 13
        for cell in cells:
            head, i, j = map(int, cell.split("/"))
            assert float(largest[head, i, j]) >= least

    def test_explanations_are_the_attributions(self, data, explanations):
        (section,) = data["prompts"]
        shown = section["explanations"]
        assert list(shown) == ["2/9/4", "0/9/4"]
        for attribution, fields in zip(explanations, shown.values(), strict=True):
            expected = attribution.to_dict(n=8)
            assert fields["title"] == str(attribution)
            for name in ("score", "attention", "rebuilt"):
                assert_digits(fields[name], expected[name])
            for name in ("parts", "supporting", "inhibiting"):
                rows = pd.DataFrame(fields[name])
                expected_rows = pd.DataFrame(expected[name])
                numeric = ["contribution", "pattern_effect"]
                assert_digits(rows[numeric], expected_rows[numeric])

    def test_explanations_and_cells_list_the_same_pairs(self, data):
        (section,) = data["prompts"]
        for cell, fields in section["explanations"].items():
            rows = pd.DataFrame(fields["supporting"] + fields["inhibiting"])
            effects = rows.set_index(TRIPLE[:2])["pattern_effect"]
            pairs = section["cells"][cell]
            assert len(effects) == len(pairs)
            for query_feature, key_feature, _, effect in pairs:
                expected = effects[query_feature, key_feature]
                assert effect == pytest.approx(expected, rel=2e-3, abs=1e-6)


class TestOverview:
    def test_sizes_and_metrics(self, data, d, statistics):
        overview = data["overview"]
        sizes = [overview[name] for name in ("d_query", "d_key", "n_pairs", "n_heads", "layer")]
        assert sizes == [D_QUERY, D_KEY, N_PAIRS, d.spec.n_heads, LAYER]
        assert overview["n_tokens"] == N_ROWS * N_POS
        assert overview["metrics"]["sources"]["zero"] == {"ce_loss": 3.51954, "pattern_kl": None}
        assert overview["importance_measured"] is True
        assert overview["importance_shown"] == 1
        for side in SIDES:
            dense = statistics.features.query("side == @side and density > 0.9")
            assert overview["always_on"][side] == dense["feature"].tolist()

    @pytest.mark.parametrize("side", SIDES)
    def test_density_histogram(self, data, statistics, side):
        histogram = data["overview"]["density"]
        live = statistics.features.query("side == @side and density > 0")
        assert data["overview"]["live"][side] == len(live) == sum(histogram[side])
        edges = [10**exponent for exponent in histogram["log10_edges"]]
        for bin_number, count in enumerate(histogram[side]):
            low = edges[bin_number]
            high = edges[bin_number + 1]
            expected = 0
            for density in live["density"]:
                expected += low <= density < high or density == high == 1
            assert count == expected

    def test_pairs_of_heads(self, data, d, statistics):
        pairs = ranked_pairs(d, statistics)
        heads = data["overview"]["heads"]
        for head in range(d.spec.n_heads):
            own = pairs[pairs["head"] == head]
            constant_query = own["query_feature"] == D_QUERY
            constant_key = own["key_feature"] == D_KEY
            assert heads["pairs"][head] == len(own)
            assert heads["with_constant"][head] == sum(constant_query | constant_key)
            assert_digits(heads["importance"][head], own["importance"].sum())

    def test_further_tables_keep_an_index_that_says_something(self, d, statistics):
        columns = {"share": [0.123456, np.nan], "n": [3, 4]}
        kinds = pd.Index(["first", "<b>"], name="kind")
        plain = pd.DataFrame(columns)
        tables = {
            "By kind": pd.DataFrame(columns, index=kinds),
            "By head": plain.rename_axis("head"),
            "Plain": plain,
        }
        data = page_data(d, statistics, tables=tables)
        kind_table, head_table, plain_table = data["overview"]["tables"]
        assert kind_table["title"] == "By kind"
        assert kind_table["columns"] == ["kind", "share", "n"]
        assert kind_table["rows"] == [["first", 0.1235, 3], ["<b>", None, 4]]
        assert head_table["columns"] == ["head", "share", "n"]
        assert head_table["rows"] == [[0, 0.1235, 3], [1, None, 4]]
        assert plain_table["columns"] == ["share", "n"]
        assert plain_table["rows"] == [[0.1235, 3], [None, 4]]


class TestLimits:
    LIMITS = ReportLimits(
        features=6,
        pairs=5,
        contexts=2,
        pair_contexts=1,
        before=1,
        after=1,
        partners=2,
        neighbours=1,
    )

    def test_the_most_important_stay(self, d, statistics):
        data = page_data(d, statistics, limits=self.LIMITS)
        pairs = ranked_pairs(d, statistics)
        have_pages = np.ones(len(pairs), dtype=bool)
        for side, constant in SIZES.items():
            features = pairs[f"{side}_feature"]
            totals = pairs.groupby(features)["importance"].sum().drop(constant)
            best = totals.sort_values(ascending=False).index[:6].tolist()
            assert data["features"][side]["feature"] == best
            have_pages &= features.isin([*best, constant])
        importance = pairs["importance"][have_pages]
        numbers = importance.sort_values(ascending=False).index[:5]
        assert data["pairs"]["pair"] == numbers.tolist()
        share = importance[numbers].sum() / pairs["importance"].sum()
        assert_digits(data["overview"]["importance_shown"], share)
        assert data["overview"]["limits"] == dataclasses.asdict(self.LIMITS)

    def test_every_list_is_cut(self, d, statistics):
        data = page_data(d, statistics, limits=self.LIMITS)
        n_contexts = 0
        for side in SIDES:
            columns = data["features"][side]
            for name, limit in (("contexts", 2), ("partners", 2), ("neighbours", 1)):
                assert max(map(len, columns[name])) == limit
            n_contexts += sum(map(len, columns["contexts"]))
        assert max(map(len, data["pairs"]["contexts"])) == 1
        for contexts in data["pairs"]["contexts"]:
            for row, i, j, _ in contexts:
                assert_words(data, statistics, row, (i, j))
        n_words = 0
        for runs in data["texts"]["rows"].values():
            n_words += sum(len(words) for _, words in runs)
        assert n_words <= 3 * (n_contexts + 2 * 5) < N_ROWS * N_POS

    def test_half_goes_to_what_the_prompts_name(self, d, statistics, prompt):
        data = page_data(d, statistics, [prompt], limits=self.LIMITS)
        strongest = prompt.strongest(8)
        effect = strongest["pattern_effect"].abs()
        have_pages = {}
        for side, constant in SIZES.items():
            effects = effect.groupby(strongest[f"{side}_feature"]).max()
            effects = effects.drop(constant, errors="ignore").sort_values(ascending=False)
            features = data["features"][side]["feature"]
            assert len(features) == 6
            assert set(effects.index[:3]) <= set(features)
            have_pages[side] = {*features, constant}
        triples = pair_pages(data)[TRIPLE].to_numpy().tolist()
        effects = effect.groupby([strongest[name] for name in TRIPLE]).max()
        candidates = []
        for a, b, head in effects.sort_values(ascending=False).index:
            is_listed = (a, b) != (D_QUERY, D_KEY)
            if a in have_pages["query"] and b in have_pages["key"] and is_listed:
                candidates.append([a, b, head])
        assert all(triple in triples for triple in candidates[:2])

    def test_a_feature_that_only_a_prompt_knows(self, d, statistics):
        pairs = pair_table(d, statistics)
        pairs.loc[pairs["query_feature"] == 4, "importance"] = 0.0
        features = statistics.features.copy()
        is_feature = (features["side"] == "query") & (features["feature"] == 4)
        features.loc[is_feature, "density"] = 0.0
        texts = SimpleNamespace(features=features)
        cells = pd.DataFrame(
            {"query_feature": [4], "key_feature": [2], "head": [0], "pattern_effect": [-0.1]}
        )
        assert 4 in choose_pages(d, texts, pairs, [cells], ReportLimits()).query
        assert 4 not in choose_pages(d, texts, pairs, [], ReportLimits()).query

    def test_without_measured_importance_the_texts_rank(self, model):
        d = tiny_dictionary(model)
        statistics = tiny_statistics(d, model)
        data = page_data(d, statistics)
        assert data["overview"]["importance_measured"] is False
        pairs = statistics.pairs
        expected = (0.5 * pairs["co_occurrence"] * pairs["mean"] ** 2).fillna(0)
        importance = data["pairs"]["importance"]
        assert_digits(importance, expected[data["pairs"]["pair"]])
        assert importance == sorted(importance, reverse=True)

    @pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ReportLimits)])
    def test_a_limit_below_one(self, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            ReportLimits(**{name: 0})


class TestErrors:
    def test_no_map(self, model, statistics):
        with pytest.raises(ValueError, match="has no feature map"):
            page_data(tiny_dictionary(model, n_pairs=0), statistics)

    def test_statistics_of_another_dictionary(self, model, statistics):
        with pytest.raises(ValueError, match="collect them with this dictionary"):
            page_data(tiny_dictionary(model, seed=1), statistics)

    def test_a_prompt_of_another_dictionary(self, model, d, statistics, prompt):
        other = qk.RecordedPrompt.record(tiny_dictionary(model), model, tiny_tokens(1, 3))
        with pytest.raises(ValueError, match="recorded with another dictionary"):
            page_data(d, statistics, [prompt, other])

    def test_a_long_prompt(self, d, statistics, prompt):
        words = ["w"] * 129
        long_prompt = SimpleNamespace(words=words, require=lambda dictionary: None)
        with pytest.raises(ValueError, match="Prompt 1 has 129 tokens"):
            page_data(d, statistics, [prompt, long_prompt])

    def test_words_of_another_number(self, d, statistics):
        with pytest.raises(ValueError, match="one string per token id, got 1 for"):
            page_data(d, statistics, words=lambda token_ids: ["x"])
