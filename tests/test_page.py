"""The file itself: what it lets in, token text above all; and a report in one call."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from dashboard_cases import (
    HOSTILE,
    N_POS,
    N_PROMPT,
    N_ROWS,
    hostile_words,
    page_data,
    ranked_dictionary,
    tiny_statistics,
)
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.dashboard import page as page_module
from sae_lens_qk.dashboard.page import SCRIPTS, json_for_script, render, write_page
from sae_lens_qk.dashboard.pages import ReportLimits
from sae_lens_qk.dashboard.report import write_report
from sae_lens_qk.explain.report import striking_positions
from sae_lens_qk.statistics.activations import ActivationStatistics

TEMPLATES = Path(page_module.__file__).parent / "templates"
TITLE = "A <b>title</b> & more"
SECTIONS = ("features", "overview", "pairs", "prompts", "texts")
FEW = ReportLimits(
    features=3,
    pairs=3,
    explanations=3,
)


@pytest.fixture(scope="module")
def model(llama_bridge):
    return llama_bridge


@pytest.fixture(scope="module")
def d(model):
    return ranked_dictionary(model)


@pytest.fixture(scope="module")
def statistics(d, model):
    return tiny_statistics(d, model)


@pytest.fixture(scope="module")
def prompt(d, model):
    return qk.RecordedPrompt.record(d, model, tiny_tokens(1, N_PROMPT, seed=5))


class Page(HTMLParser):
    """Every tag with its attributes, and what script and style elements hold."""

    def __init__(self, path_or_html):
        super().__init__()
        self.tags = []
        self.contents = []
        self._open = None
        is_path = isinstance(path_or_html, Path)
        self.html = path_or_html.read_text(encoding="utf-8") if is_path else path_or_html
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            tag, attributes = self._open
            self.contents.append((tag, attributes, data))

    def sections(self):
        """The page's data by name."""
        return {
            attributes["id"].removeprefix("data-"): json.loads(text)
            for _, attributes, text in self.contents
            if "type" in attributes
        }

    def code(self):
        """(tag, text) of what runs, or styles."""
        return [(tag, text) for tag, attributes, text in self.contents if "type" not in attributes]


class TestPage:
    @pytest.fixture(scope="class")
    def data(self, d, statistics, prompt):
        words = [HOSTILE[pos % len(HOSTILE)] for pos in range(N_PROMPT)]
        hostile = dataclasses.replace(prompt, words=words)
        table = pd.DataFrame({"<i>": ["</script><script>alert(3)</script>"]})
        return page_data(d, statistics, [hostile], title=TITLE, tables={"<u>": table})

    @pytest.fixture(scope="class")
    def path(self, data, tmp_path_factory):
        path = tmp_path_factory.mktemp("report") / "new folder" / "report.html"
        assert write_page(path, data) == path
        return path

    @pytest.fixture(scope="class")
    def page(self, path):
        return Page(path)

    def test_sections_are_read_back(self, page, data):
        assert sorted(page.sections()) == list(SECTIONS)
        assert page.sections() == json.loads(json.dumps(data))
        assert {*HOSTILE} <= {*page.sections()["texts"]["words"]}

    def test_data_adds_no_markup(self, page):
        empty = {name: {} for name in SECTIONS} | {"overview": {"title": "none"}, "prompts": []}
        menu_entry = ("li", "a")  # to the prompts, where there are any
        tags = [tag for tag, _ in page.tags if tag not in menu_entry]
        empty_tags = [tag for tag, _ in Page(render(empty)).tags if tag not in menu_entry]
        assert tags == empty_tags
        assert "alert(1)</script>" not in page.html
        assert "A &lt;b&gt;title&lt;/b&gt; &amp; more" in page.html
        assert "\u2028" not in page.html
        assert "\x00" not in page.html

    def test_the_policy_allows_this_script_and_nothing_else(self, page):
        policies = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
        (policy,) = policies
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert [tag for tag, _ in page.code()] == ["style", "script"]
        for tag, text in page.code():
            digest = hashlib.sha256(text.encode()).digest()
            assert rules[f"{tag}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert rules["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in policy

    def test_nothing_points_outside(self, page):
        for tag, attrs in page.tags:
            assert "src" not in attrs
            assert not [name for name in attrs if name.startswith("on") or name == "style"]
            assert attrs.get("href", "#").startswith(("#", "data:")), (tag, attrs)
        reaches_out = r"//[\w-]+\.\w|@import|url\(|fetch\(|XMLHttpRequest|import\("
        for _, text in page.code():
            # the name of a kind of element, not an address
            text = text.replace("http://www.w3.org/2000/svg", "")
            assert not re.search(reaches_out, text)

    def test_the_file_is_the_same_everywhere(self, path, data, tmp_path):
        again = write_page(tmp_path / "again.html", data)
        assert again.read_bytes() == path.read_bytes()
        assert b"\r" not in path.read_bytes()


class TestTemplates:
    @pytest.mark.parametrize("name", SCRIPTS)
    def test_scripts_never_turn_text_into_markup(self, name):
        source = (TEMPLATES / name).read_text()
        markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\.srcdoc"
        assert not re.findall(rf"{markup}|\beval\b|new Function", source)

    def test_every_script_is_used(self):
        names = sorted(path.name for path in TEMPLATES.rglob("*.js"))
        assert names == sorted(SCRIPTS)

    def test_json_keeps_no_character_of_markup(self):
        value = {"<a>": "</script>&amp;\u2028\u2029é<!--"}
        text = str(json_for_script(value))
        assert not set("<>&\u2028\u2029é") & set(text)
        assert json.loads(text) == value

    def test_json_refuses_what_is_not_json(self):
        with pytest.raises(ValueError, match="not JSON compliant"):
            json_for_script([float("nan")])


class TestReport:
    TOKENS = tiny_tokens(N_ROWS, N_POS)

    def report(self, path, d, model, prompts=(), tokens=TOKENS, **options):
        options = {"limits": FEW, "checks": 0} | options
        assert qk.report(path, d, model, prompts, tokens, **options) == path
        return Page(path).sections()

    def test_prompts_of_every_kind(self, d, model, prompt, tmp_path):
        token_ids = tiny_tokens(1, 5)
        prompts = ["w[h9b", token_ids, token_ids[0].tolist(), token_ids.numpy(), prompt]
        sections = self.report(tmp_path / "r.html", d, model, prompts)
        record = qk.RecordedPrompt.record
        expected = [record(d, model, given).words for given in prompts[:4]] + [prompt.words]
        assert [section["words"] for section in sections["prompts"]] == expected

    def test_one_text_is_one_prompt(self, d, model, tmp_path):
        sections = self.report(tmp_path / "r.html", d, model, "w[h9b")
        assert len(sections["prompts"]) == 1

    def test_words_title_and_tables_come_from_the_model(self, d, model, statistics, tmp_path):
        sections = self.report(tmp_path / "r.html", d, model)
        assert sections["overview"]["title"] == "tiny, layer 1"
        assert sections["overview"]["n_tokens"] == N_ROWS * N_POS
        assert len(sections["overview"]["tables"]) >= 3
        words = sections["texts"]["words"]
        assert words == [
            model.tokenizer.decode([i]) for i in model.tokenizer.convert_tokens_to_ids(words)
        ]
        feature = sections["features"]["key"]["feature"][0]
        contexts = sections["features"]["key"]["contexts"][0]
        expected = statistics.feature_contexts("key", feature)[: FEW.contexts]
        assert [context[:2] for context in contexts] == [list(c[:2]) for c in expected]
        assert len(contexts[0]) == 4  # with the activations around

    def test_the_sample_text_is_the_default(self, d, model, tmp_path, monkeypatch):
        rows = []

        def token_rows(model, path, text_column, n_rows, context_size):
            rows.append((path, n_rows, context_size))
            return self.TOKENS

        monkeypatch.setattr("sae_lens_qk.dashboard.report.token_rows", token_rows)
        self.report(tmp_path / "r.html", d, model, tokens=None)
        assert rows == [("", 100, min(256, model.cfg.n_ctx))]

    def test_statistics_in_place_of_tokens(self, d, model, statistics, tmp_path):
        expected = self.report(tmp_path / "a.html", d, model)
        given = self.report(tmp_path / "b.html", d, model, tokens=None, statistics=statistics)
        assert given == expected
        folder = tmp_path / "statistics"
        saved = self.report(tmp_path / "c.html", d, model, statistics=folder)
        assert saved == expected
        assert ActivationStatistics.load(folder).n_tokens == statistics.n_tokens

    def test_explanations_are_of_the_largest_weights(self, d, model, prompt, tmp_path):
        (section,) = self.report(tmp_path / "r.html", d, model, [prompt])["prompts"]
        weights = {}
        for head in range(d.spec.n_heads):
            for i in range(N_PROMPT):
                for j in range(1, i):
                    weights[f"{head}/{i}/{j}"] = float(prompt.pattern[head, i, j])
        ranked = sorted(weights, key=weights.get, reverse=True)
        last = next(cell for cell in ranked if f"/{N_PROMPT - 1}/" in cell)
        others = [cell for cell in ranked if cell != last]
        assert list(section["explanations"]) == [last, *others[:2]]

    def test_a_prompt_of_two_tokens_has_no_weight_to_explain(self, d, model):
        prompt = qk.RecordedPrompt.record(d, model, tiny_tokens(1, 2))
        assert striking_positions(prompt, 5) == []

    def test_the_first_explanations_are_checked(self, d, model, prompt, tmp_path, monkeypatch):
        monkeypatch.setenv("SAE_LENS_QK_CACHE", str(tmp_path))
        (section,) = self.report(tmp_path / "r.html", d, model, [prompt], checks=1)["prompts"]
        first, *others = section["explanations"].items()
        position = [int(number) for number in first[0].split("/")]
        attribution = qk.attribute(d, model, prompt, *position)
        assert first[1]["check"]["verdict"] == attribution.check().verdict
        assert len(first[1]["check"]["table"]) == len(attribution.check().table)
        assert [fields["check"] for _, fields in others] == [None, None]

    def test_one_attribution(self, d, model, prompt, tmp_path):
        attribution = qk.attribute(d, model, prompt, 1, 5, 2)
        path = tmp_path / "why.html"
        assert attribution.report(path, self.TOKENS, title="Why", limits=FEW) == path
        sections = Page(path).sections()
        (section,) = sections["prompts"]
        assert sections["overview"]["title"] == "Why"
        assert section["words"] == prompt.words
        assert list(section["explanations"]) == ["1/5/2"]

    def test_tokens_and_statistics(self, d, model, statistics, tmp_path):
        with pytest.raises(ValueError, match="tokens or statistics, not both"):
            self.report(tmp_path / "r.html", d, model, statistics=statistics)

    def test_negative_checks(self, d, model, tmp_path):
        with pytest.raises(ValueError, match="checks must be 0 or more"):
            self.report(tmp_path / "r.html", d, model, checks=-1)

    def test_the_old_function_warns(self, d, statistics, prompt, tmp_path):
        with pytest.warns(DeprecationWarning, match=r"sae_lens_qk\.report"):
            path = write_report(
                tmp_path / "old.html", d, statistics, [prompt], words=hostile_words, limits=FEW
            )
        assert Page(path).sections()["overview"]["title"] == "tiny, layer 1"
