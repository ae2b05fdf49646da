"""What a report says, against the dictionary and its statistics; what it lets in, token text above all."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
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
from sae_lens_qk.statistics.activations import ActivationStatistics, collect_activations, model_batches
from sae_lens_qk.explain.prompt import Prompt
from sae_lens_qk.dashboard import report
from sae_lens_qk.dashboard.data import MAX_PROMPT, ReportLimits, choose, kernel_stretches, pair_table, report_data
from sae_lens_qk.dashboard.report import json_for_script, render, write_report

N_ROWS, N_POS, N_PROMPT = 7, 41, 11
TEMPLATES = Path(report.__file__).parent / "templates"
CLOSE = {"rel": 6e-4, "abs": 1e-12}
"""4 significant digits."""

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><!--",
    "&lt;b&gt;",
    "\u2028",
    '" onload="alert(2)',
    "\n",
    "\x00",
    "é",
    "",
]


def words(ids):
    """Every third token is hostile."""
    return [HOSTILE[i // 3 % len(HOSTILE)] if i % 3 == 0 else f"w{i}" for i in ids]


@pytest.fixture(scope="module", params=["llama_bridge"])
def model(request):
    """Rotary embeddings and grouped keys."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def d(model):
    """With measured importance, and figures."""
    d = tiny_dictionary(model)
    kept = d.feature_map
    statistics = torch.rand(N_PAIRS, 3, generator=torch.Generator().manual_seed(3))
    sizes = kept.d_query, kept.d_key, kept.n_heads
    d.set_feature_map(qk.SparseFeatureMap(kept.indices, kept.weights, *sizes, statistics))
    d.metrics = {"n_tokens": 5, "sources": {"zero": {"ce_loss": 3.51953947, "pattern_kl": None}}}
    return d


@pytest.fixture(scope="module")
def x(model):
    return inputs_and_scores(model, tiny_tokens(N_ROWS, N_POS))[0]


@pytest.fixture(scope="module")
def statistics(d, model) -> ActivationStatistics:
    return collect_activations(
        d, model_batches(model, LAYER, tiny_tokens(N_ROWS, N_POS)), progress=False
    )


@pytest.fixture(scope="module")
def prompt(d, model):
    return Prompt.of(d, model, tiny_tokens(1, N_PROMPT, seed=5))


def made(d, statistics, prompts=(), limits=None, **more):
    return report_data(d, statistics, prompts, words, "a title", limits or ReportLimits(), **more)


@pytest.fixture(scope="module")
def data(d, statistics, prompt):
    return made(d, statistics, [prompt])


def kept(d) -> pd.DataFrame:
    """Pairs with importance times m^2, in the map's order."""
    frame = d.pair_frame()
    frame["importance"] *= frame["weight"] ** 2
    return frame


def word_at(texts, row, pos):
    for first, run in texts["rows"][str(row)]:
        if first <= pos < first + len(run):
            return texts["words"][run[pos - first]]
    raise AssertionError(f"row {row}, position {pos} is not in the report")


class TestFeatures:
    @pytest.mark.parametrize("side", ["query", "key"])
    def test_columns_are_the_statistics(self, data, d, statistics, side):
        of_side = data["features"][side]
        measured = statistics.features.query("side == @side").set_index("feature")
        frame = kept(d)
        assert len(of_side["feature"]) > 20
        for at, feature in enumerate(of_side["feature"]):
            assert of_side["density"][at] == pytest.approx(measured["density"][feature], **CLOSE)
            for name in ("mean", "max"):
                value = measured[name][feature]
                assert of_side[name][at] == (
                    None if np.isnan(value) else pytest.approx(value, **CLOSE)
                )
            own = frame[frame[f"{side}_feature"] == feature]
            assert of_side["pairs"][at] == len(own)
            assert of_side["importance"][at] == pytest.approx(own["importance"].sum(), **CLOSE)
        assert of_side["importance"] == sorted(of_side["importance"], reverse=True)

    @pytest.mark.parametrize("side", ["query", "key"])
    def test_contexts_point_at_the_words_around(self, data, statistics, side):
        of_side, limits = data["features"][side], ReportLimits()
        for feature, contexts in zip(of_side["feature"], of_side["contexts"], strict=True):
            expected = statistics.feature_contexts(side, feature)[: limits.contexts]
            assert [tuple(c[:2]) for c in contexts] == [c[:2] for c in expected]
            for (row, pos, value), context in zip(contexts, expected, strict=True):
                assert value == pytest.approx(context.value, **CLOSE)
                for at in range(max(0, pos - limits.before), min(N_POS, pos + limits.after + 1)):
                    assert word_at(data["texts"], row, at) == words([statistics.tokens[row, at]])[0]

    @pytest.mark.parametrize("side", ["query", "key"])
    def test_partners_are_kept_pairs_by_importance(self, data, d, statistics, side):
        other = "key_feature" if side == "query" else "query_feature"
        frame, mean = kept(d), statistics.pairs["mean"]
        of_side = data["features"][side]
        for feature, partners in zip(of_side["feature"], of_side["partners"], strict=True):
            own = sorted(
                frame[frame[f"{side}_feature"] == feature].itertuples(),
                key=lambda pair: -pair.importance,
            )
            assert [p[:2] for p in partners] == [
                [getattr(pair, other), pair.head] for pair in own[:24]
            ]
            for (_, _, weight, importance, term), pair in zip(partners, own, strict=False):
                assert [weight, importance] == pytest.approx(
                    [pair.weight, pair.importance], **CLOSE
                )
                assert term == (
                    None if np.isnan(mean[pair.Index]) else pytest.approx(mean[pair.Index], **CLOSE)
                )

    def test_neighbours_fire_along(self, data, statistics):
        for feature, listed in zip(
            data["features"]["key"]["feature"], data["features"]["key"]["neighbours"], strict=True
        ):
            expected = statistics.feature_co_occurrence("key", feature, 8)
            assert [n[0] for n in listed] == expected["feature"].tolist()
            assert [n[1] for n in listed] == pytest.approx(expected["share"].tolist(), **CLOSE)

    def test_labels_are_the_distinct_words_of_the_strongest_contexts(self, data, statistics):
        for side, size in (("query", D_QUERY), ("key", D_KEY)):
            labels = data["texts"]["labels"][side]
            assert len(labels) == size
            for feature, label in enumerate(labels):
                fired_on = [
                    int(statistics.tokens[c.row, c.pos])
                    for c in statistics.feature_contexts(side, feature)
                ]
                distinct = sorted(set(fired_on), key=fired_on.index)[:3]
                assert [data["texts"]["words"][w] for w in label] == words(distinct)

    def test_activations_around_are_those_of_the_model(self, d, statistics, x, model):
        asked = []

        def inputs(rows):
            asked.extend(rows.tolist())
            return inputs_and_scores(model, rows)[0]

        data, limits = made(d, statistics, inputs=inputs), ReportLimits()
        assert asked == statistics.tokens.tolist()  # each row once, for both sides
        for side, acts in (("query", d.encode_query(x)), ("key", d.encode_key(x))):
            of_side = data["features"][side]
            for feature, contexts in zip(of_side["feature"], of_side["contexts"], strict=True):
                for row, pos, value, around in contexts:
                    window = acts[
                        row, max(0, pos - limits.before) : pos + limits.after + 1, feature
                    ]
                    assert around == pytest.approx(window.tolist(), rel=6e-4, abs=1e-5)
                    assert value == pytest.approx(around[min(pos, limits.before)], rel=1e-3)


class TestPairs:
    def test_columns_are_map_and_statistics(self, data, d, statistics):
        pairs, frame = data["pairs"], kept(d)
        assert sorted(pairs["pair"]) == list(range(N_PAIRS))
        assert pairs["importance"] == sorted(pairs["importance"], reverse=True)
        for at, number in enumerate(pairs["pair"]):
            indices = [pairs[name][at] for name in ("query_feature", "key_feature", "head")]
            assert indices == d.feature_map.indices[number].tolist()
            for name in ("weight", "score_at_0", "importance", "effect"):
                assert pairs[name][at] == pytest.approx(frame[name][number], **CLOSE)
            for name in ("co_occurrence", "mean", "max", "min"):
                value = statistics.pairs[name][number]
                assert pairs[name][at] == (
                    None if np.isnan(value) else pytest.approx(value, **CLOSE)
                )

    def test_contexts_point_at_query_and_key(self, data, statistics):
        seen = 0
        for number, contexts in zip(data["pairs"]["pair"], data["pairs"]["contexts"], strict=True):
            expected = statistics.pair_contexts(number)[:5]
            assert [tuple(c[:3]) for c in contexts] == [c[:3] for c in expected]
            for (row, i, j, value), context in zip(contexts, expected, strict=True):
                assert value == pytest.approx(context.value, **CLOSE)
                for at in (i, j, min(i + 5, N_POS - 1), max(j - 14, 0)):
                    assert word_at(data["texts"], row, at) == words([statistics.tokens[row, at]])[0]
                seen += 1
        assert seen > 100

    def test_the_same_features_in_other_heads(self, data, d):
        pairs, frame = data["pairs"], kept(d)
        for a, b, listed in zip(
            pairs["query_feature"], pairs["key_feature"], pairs["heads"], strict=True
        ):
            same = frame[(frame["query_feature"] == a) & (frame["key_feature"] == b)]
            assert [row[0] for row in listed] == same["head"].tolist()
            for row, pair in zip(listed, same.itertuples(), strict=True):
                assert row[1:] == pytest.approx(
                    [pair.weight, pair.importance, pair.effect], **CLOSE
                )

    def test_kernel_is_the_score_of_mean_activations_by_distance(self, data, d, statistics):
        features = statistics.features
        means = [features.query("side == @side")["mean"].to_numpy() for side in ("query", "key")]
        acts = [np.broadcast_to(mean, (1, N_POS, len(mean))) for mean in means]
        for number, kernel in zip(data["pairs"]["pair"], data["pairs"]["kernel"], strict=True):
            pair = tuple(d.feature_map.indices[number].tolist())
            by_distance = float(d.feature_map.weights[number]) * pair_term(d, acts, pair)[0, :, 0]
            expected = [*by_distance[:32], by_distance[32:40].mean(), by_distance[40]]
            if np.isnan(expected).any():
                assert kernel == [None] * len(expected)
            else:
                assert kernel == pytest.approx(expected, rel=6e-3, abs=1e-6)

    @pytest.mark.parametrize("model", ["gpt2_bridge"], indirect=True)
    def test_without_rotary_embeddings_there_is_no_kernel(self, data):
        assert data["pairs"]["kernel"] is None
        assert data["overview"]["rotary"] is False

    @pytest.mark.parametrize("n_pos", [1, 7, 31, 32, 33, 256, 2048])
    def test_stretches_cover_every_distance_once(self, n_pos):
        stretches = kernel_stretches(n_pos)
        assert [offset for first, last in stretches for offset in range(first, last + 1)] == list(
            range(n_pos)
        )
        assert len(stretches) <= 64


class TestPrompts:
    def test_patterns_are_those_of_model_and_dictionary(self, data, d, prompt):
        (shown,) = data["prompts"]
        assert shown["words"] == prompt.words
        for name, pattern in (
            ("true", prompt.pattern),
            ("feature_map", d.pattern(prompt.x[None], "feature_map")[0]),
            ("transcoders", d.pattern(prompt.x[None], "transcoders")[0]),
        ):
            listed = shown["true"] if name == "true" else shown["rebuilt"][name]
            for head in range(d.spec.n_heads):
                expected = [
                    float(pattern[head, i, j]) for i in range(N_PROMPT) for j in range(i + 1)
                ]
                assert listed[head] == pytest.approx(expected, abs=6e-5)

    def test_cells_list_the_strongest_pairs(self, data, d, prompt):
        (shown,) = data["prompts"]
        strongest = prompt.strongest(8)
        assert shown["n_cells"] == d.spec.n_heads * N_PROMPT * (N_PROMPT + 1) // 2
        assert sum(map(len, shown["cells"].values())) == len(strongest) > 500
        for (head, i, j), expected in strongest.groupby(["head", "query_pos", "key_pos"]):
            listed = shown["cells"][f"{head}/{i}/{j}"]
            assert [row[:2] for row in listed] == expected[
                ["query_feature", "key_feature"]
            ].to_numpy().tolist()
            for column, name in ((2, "contribution"), (3, "pattern_effect")):
                assert [row[column] for row in listed] == pytest.approx(
                    expected[name].tolist(), **CLOSE
                )

    def test_only_the_largest_weights_have_lists(self, d, statistics, prompt):
        data = made(d, statistics, [prompt], ReportLimits(cells=13))
        largest = torch.maximum(prompt.pattern, prompt.made("feature_map"))
        weights = sorted((float(w) for w in largest.flatten()), reverse=True)
        listed = [tuple(map(int, cell.split("/"))) for cell in data["prompts"][0]["cells"]]
        assert 0 < len(listed) <= 13
        assert all(float(largest[cell]) >= weights[12] for cell in listed)


class TestOverview:
    def test_sizes_and_figures(self, data, d, statistics):
        shown = data["overview"]
        assert (shown["d_query"], shown["d_key"], shown["n_pairs"]) == (D_QUERY, D_KEY, N_PAIRS)
        assert (shown["n_heads"], shown["layer"], shown["n_tokens"]) == (
            d.spec.n_heads,
            LAYER,
            N_ROWS * N_POS,
        )
        assert shown["metrics"]["sources"]["zero"] == {"ce_loss": 3.51954, "pattern_kl": None}
        assert shown["importance_measured"] is True
        for side in ("query", "key"):
            often = statistics.features.query("side == @side and density > 0.9")["feature"].tolist()
            assert shown["always_on"][side] == often
        assert shown["importance_shown"] == 1

    def test_density_histogram(self, data, statistics):
        density = data["overview"]["density"]
        edges = 10 ** np.array(density["log10_edges"])
        for side in ("query", "key"):
            values = statistics.features.query("side == @side and density > 0")["density"]
            assert data["overview"]["live"][side] == len(values) == sum(density[side])
            for low, high, count in zip(edges, edges[1:], density[side], strict=False):
                assert count == sum(low <= value < high or value == high == 1 for value in values)

    def test_pairs_of_heads(self, data, d):
        frame = kept(d)
        for head in range(d.spec.n_heads):
            own = frame[frame["head"] == head]
            constant = [
                a == D_QUERY or b == D_KEY
                for a, b in zip(own["query_feature"], own["key_feature"], strict=True)
            ]
            assert data["overview"]["heads"]["pairs"][head] == len(own)
            assert data["overview"]["heads"]["with_constant"][head] == sum(constant)
            assert data["overview"]["heads"]["importance"][head] == pytest.approx(
                own["importance"].sum(), **CLOSE
            )

    def test_further_tables_keep_a_named_index(self, d, statistics):
        table = pd.DataFrame(
            {"share": [0.123456, np.nan], "n": [3, 4]},
            index=pd.Index(["first", "<b>"], name="kind"),
        )
        counted = table.reset_index(drop=True)
        tables = {"By kind": table, "By head": counted.rename_axis("head"), "Plain": counted}
        by_kind, by_head, plain = made(d, statistics, tables=tables)["overview"]["tables"]
        rows = [["first", 0.1235, 3], ["<b>", None, 4]]
        assert by_kind == {"title": "By kind", "columns": ["kind", "share", "n"], "rows": rows}
        assert by_head["columns"] == ["head", "share", "n"]
        assert by_head["rows"] == [[at, *row[1:]] for at, row in enumerate(rows)]
        assert plain == {
            "title": "Plain",
            "columns": ["share", "n"],
            "rows": [row[1:] for row in rows],
        }


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
        data, frame = made(d, statistics, limits=self.LIMITS), kept(d)
        chosen = {}
        for side, size in (("query", D_QUERY), ("key", D_KEY)):
            total = frame.groupby(f"{side}_feature")["importance"].sum().drop(size)
            chosen[side] = total.sort_values(ascending=False).index[:6].tolist()
            assert data["features"][side]["feature"] == chosen[side]
        possible = frame[
            frame["query_feature"].isin([*chosen["query"], D_QUERY])
            & frame["key_feature"].isin([*chosen["key"], D_KEY])
        ]
        best = possible["importance"].sort_values(ascending=False).index[:5]
        assert data["pairs"]["pair"] == best.tolist()
        share = frame.loc[best, "importance"].sum() / frame["importance"].sum()
        assert data["overview"]["importance_shown"] == pytest.approx(share, **CLOSE)
        assert data["overview"]["limits"] == dataclasses.asdict(self.LIMITS)

    def test_every_list_is_cut(self, d, statistics):
        data = made(d, statistics, limits=self.LIMITS)
        for side in ("query", "key"):
            for name, most in (("contexts", 2), ("partners", 2), ("neighbours", 1)):
                assert max(map(len, data["features"][side][name])) == most
        assert max(map(len, data["pairs"]["contexts"])) == 1
        for row, *positions, _ in (
            context for listed in data["pairs"]["contexts"] for context in listed
        ):
            for pos in positions:
                assert word_at(data["texts"], row, pos) == words([statistics.tokens[row, pos]])[0]
        n_words = sum(len(run) for runs in data["texts"]["rows"].values() for _, run in runs)
        contexts = sum(
            len(c) for side in ("query", "key") for c in data["features"][side]["contexts"]
        )
        assert n_words <= 3 * (contexts + 2 * 5) < N_ROWS * N_POS

    def test_half_goes_to_what_the_prompts_name(self, d, statistics, prompt):
        data = made(d, statistics, [prompt], self.LIMITS)
        strongest = prompt.strongest(8)
        effect = strongest["pattern_effect"].abs()
        for side, size in (("query", D_QUERY), ("key", D_KEY)):
            named = effect.groupby(strongest[f"{side}_feature"]).max().drop(size, errors="ignore")
            assert set(named.sort_values(ascending=False).index[:3]) <= set(
                data["features"][side]["feature"]
            )
            assert len(data["features"][side]["feature"]) == 6
        pages = [
            tuple(data["pairs"][name][at] for name in ("query_feature", "key_feature", "head"))
            for at in range(5)
        ]
        named = effect.groupby(
            [strongest[name] for name in ("query_feature", "key_feature", "head")]
        ).max()
        shown = {
            side: {*data["features"][side]["feature"], size}
            for side, size in (("query", D_QUERY), ("key", D_KEY))
        }
        possible = [
            (a, b, head)
            for a, b, head in named.sort_values(ascending=False).index
            if a in shown["query"] and b in shown["key"] and (a, b) != (D_QUERY, D_KEY)
        ]
        assert set(possible[:2]) <= set(pages)

    def test_a_feature_that_only_a_prompt_knows(self, d, statistics):
        pairs, features = pair_table(d, statistics), statistics.features.copy()
        pairs.loc[pairs["query_feature"] == 4, "importance"] = 0.0
        features.loc[features.eval("side == 'query' and feature == 4"), "density"] = 0.0
        texts = SimpleNamespace(features=features)
        cells = pd.DataFrame(
            {"query_feature": [4], "key_feature": [2], "head": [0], "pattern_effect": [-0.1]}
        )
        assert 4 in choose(d, texts, pairs, [cells], ReportLimits()).query
        assert 4 not in choose(d, texts, pairs, [], ReportLimits()).query

    def test_without_measured_importance_the_texts_rank(self, model):
        d = tiny_dictionary(model)
        statistics = collect_activations(
            d, model_batches(model, LAYER, tiny_tokens(N_ROWS, N_POS)), progress=False
        )
        data = made(d, statistics)
        assert data["overview"]["importance_measured"] is False
        expected = (0.5 * statistics.pairs["co_occurrence"] * statistics.pairs["mean"] ** 2).fillna(
            0
        )
        numbers = data["pairs"]["pair"]
        assert data["pairs"]["importance"] == pytest.approx(
            [expected[number] for number in numbers], **CLOSE
        )
        assert data["pairs"]["importance"] == sorted(data["pairs"]["importance"], reverse=True)


class Page(HTMLParser):
    """Every tag with its attributes, and what script and style elements hold."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.raw, self._inside = [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, text):
        if self._inside:
            self.raw.append((*self._inside, text))


class TestPage:
    TITLE = "A <b>title</b> & more"

    @pytest.fixture(scope="class")
    def path(self, d, statistics, prompt, tmp_path_factory):
        hostile = dataclasses.replace(
            prompt, words=[HOSTILE[i % len(HOSTILE)] for i in range(N_PROMPT)]
        )
        path = tmp_path_factory.mktemp("report") / "new folder" / "report.html"
        table = pd.DataFrame({"<i>": ["</script><script>alert(3)</script>"]})
        assert (
            write_report(
                path, d, statistics, [hostile], words=words, title=self.TITLE, tables={"<u>": table}
            )
            == path
        )
        return path

    @pytest.fixture(scope="class")
    def page(self, path):
        return Page(path.read_text(encoding="utf-8"))

    def test_sections_are_read_back(self, page, d, statistics, prompt):
        sections = {attrs["id"]: json.loads(text) for _, attrs, text in page.raw if "type" in attrs}
        assert sorted(sections) == [
            f"data-{name}" for name in ("features", "overview", "pairs", "prompts", "texts")
        ]
        expected = json.loads(json.dumps(made(d, statistics, [prompt])))
        assert sections["data-features"] == expected["features"]
        assert sections["data-texts"] == expected["texts"]
        assert {*HOSTILE} <= {*sections["data-texts"]["words"]}
        assert sections["data-prompts"][0]["words"] == [
            HOSTILE[i % len(HOSTILE)] for i in range(N_PROMPT)
        ]
        assert sections["data-overview"]["title"] == self.TITLE

    def test_data_adds_no_markup(self, page, path):
        html = path.read_text(encoding="utf-8")
        plain = Page(render(empty_data()))
        prompts_link = {"li", "a"}  # in the menu where there are prompts
        assert [tag for tag, _ in page.tags if tag not in prompts_link] == [
            tag for tag, _ in plain.tags if tag not in prompts_link
        ]
        assert "alert(1)</script>" not in html
        assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in html
        assert "\u2028" not in html
        assert "\x00" not in html

    def test_the_policy_allows_these_scripts_and_nothing_else(self, page):
        policy = next(
            attrs["content"]
            for tag, attrs in page.tags
            if attrs.get("http-equiv") == "Content-Security-Policy"
        )
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        hashes = {"script-src": [], "style-src": []}
        for tag, attrs, text in page.raw:
            if "type" not in attrs:
                hashes[f"{tag}-src"].append(
                    base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                )
        assert len(hashes["script-src"]) == 2
        for name, listed in hashes.items():
            assert rules[name].split() == [f"'sha256-{value}'" for value in listed]
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert "unsafe" not in policy

    def test_nothing_points_outside(self, page):
        for tag, attrs in page.tags:
            assert "src" not in attrs
            assert not [name for name in attrs if name.startswith("on") or name == "style"]
            assert attrs.get("href", "#").startswith(("#", "data:")), (tag, attrs)
        own = [text for tag, attrs, text in page.raw if "Chart.js v" not in text]
        assert len(own) == len(page.raw) - 1
        assert not [
            text
            for text in own
            if re.search(r"//[\w-]+\.\w|@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
        ]

    def test_the_file_is_the_same_everywhere(self, path, d, statistics, tmp_path):
        assert b"\r" not in path.read_bytes()
        one, other = (
            write_report(tmp_path / name, d, statistics, words=words)
            for name in ("one.html", "other.html")
        )
        assert one.read_bytes() == other.read_bytes()


def empty_data():
    return {
        "overview": {"title": "none"},
        **{name: {} for name in ("features", "pairs", "texts")},
        "prompts": [],
    }


class TestTemplates:
    @pytest.mark.parametrize("name", report.SCRIPTS)
    def test_scripts_never_turn_text_into_markup(self, name):
        source = (TEMPLATES / name).read_text()
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|\.srcdoc"
        assert not re.findall(forbidden, source)

    def test_every_script_is_used(self):
        assert sorted(path.name for path in TEMPLATES.glob("*.js")) == sorted(report.SCRIPTS)

    def test_the_chart_library_says_what_it_is(self):
        source = (TEMPLATES / report.CHARTS).read_text()
        head = source[: source.index("*/")]
        assert re.search(r"chart\.js \d+\.\d+\.\d+", head)
        assert "MIT" in head
        assert "Permission is hereby granted" in head
        assert "sourceMappingURL" not in source
        assert "</script" not in source

    def test_json_keeps_no_character_of_markup(self):
        text = str(json_for_script({"<a>": "</script>&amp;\u2028\u2029é<!--"}))
        assert not set("<>&\u2028\u2029é") & set(text)
        assert json.loads(text) == {"<a>": "</script>&amp;\u2028\u2029é<!--"}

    def test_json_refuses_what_is_not_json(self):
        with pytest.raises(ValueError, match="not JSON compliant"):
            json_for_script([float("nan")])


class TestErrors:
    def test_no_map(self, model, statistics):
        with pytest.raises(ValueError, match="has no feature map"):
            made(tiny_dictionary(model, n_pairs=0), statistics)

    def test_statistics_of_another_dictionary(self, model, statistics):
        with pytest.raises(ValueError, match="collect them with this dictionary"):
            made(tiny_dictionary(model, seed=1), statistics)

    def test_prompt_of_another_dictionary(self, model, d, statistics, prompt):
        other = Prompt.of(tiny_dictionary(model), model, tiny_tokens(1, 3))
        with pytest.raises(ValueError, match="Prompt 1 was made with another dictionary"):
            made(d, statistics, [prompt, other])

    def test_long_prompt(self, d, statistics, prompt):
        long = SimpleNamespace(dictionary=d, tokens=torch.zeros(MAX_PROMPT + 1))
        with pytest.raises(
            ValueError, match="Prompt 1 has 129 tokens, the report shows at most 128"
        ):
            made(d, statistics, [prompt, long])

    def test_words_of_another_number(self, d, statistics):
        with pytest.raises(ValueError, match="one string a token id, got 1 for"):
            report_data(d, statistics, [], lambda ids: ["x"], "", ReportLimits())

    @pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ReportLimits)])
    def test_limits_below_one(self, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            ReportLimits(**{name: 0})
