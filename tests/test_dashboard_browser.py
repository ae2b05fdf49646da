"""The report in a browser: every view, by mouse and by keyboard, in both themes, without a network."""

import dataclasses
import os
import re
import shutil

import pandas as pd
import pytest
from dashboard_cases import page_data, ranked_dictionary, tiny_statistics
from PIL import Image
from tiny_dictionaries import LAYER
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.dashboard.page import write_page
from sae_lens_qk.dashboard.pages import ReportLimits
from sae_lens_qk.explain.removals import Directions
from sae_lens_qk.explain.report import striking_positions

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need `pip install playwright`"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="the browser tests need chromium on the PATH (apt-get install chromium)",
    ),
]

ATTACK = "<script>alert(1)</script>"
MARKUP = "<b>bold</b>&amp;"
N_PROMPT = 13


def words(token_ids):
    """A third of the tokens would like to be markup or white space."""
    special = [ATTACK, MARKUP, "\n", " lead", "", "\u202e"]
    return [special[i // 3 % 6] if i % 3 == 0 else f"w{i}" for i in token_ids]


@pytest.fixture(scope="module")
def d(llama_bridge):
    d = ranked_dictionary(llama_bridge)
    d.metrics = qk.evaluate(d, llama_bridge, tiny_tokens(4, 17), batch_size=2)
    return d


@pytest.fixture(scope="module")
def prompts(d, llama_bridge):
    recorded = []
    for n_pos in (N_PROMPT, 31):
        prompt = qk.RecordedPrompt.record(d, llama_bridge, tiny_tokens(1, n_pos, seed=n_pos))
        recorded.append(dataclasses.replace(prompt, words=words(prompt.tokens.tolist())))
    return recorded


@pytest.fixture(scope="module")
def directions(d, llama_bridge):
    """Of features in the layer's input, for checks."""
    layer = qk.AttentionLayer(llama_bridge, LAYER)
    return Directions.fit(d, list(layer.inputs(tiny_tokens(16, 31))))


@pytest.fixture(scope="module")
def attribution(d, llama_bridge, prompts, directions):
    """Of the weight that the first prompt opens with, checked."""
    position = striking_positions(prompts[0], 1)[0]
    attribution = qk.attribute(d, llama_bridge, prompts[0], *position)
    return attribution.checked(directions=directions)


@pytest.fixture(scope="module")
def url(d, prompts, attribution, llama_bridge, tmp_path_factory):
    kinds = [f"{MARKUP} {n}" for n in range(31)]
    table = pd.DataFrame({"kind": kinds, "n": [(n * 7) % 31 for n in range(31)]})
    data = page_data(
        d,
        tiny_statistics(d, llama_bridge),
        prompts,
        [attribution],
        limits=ReportLimits(features=20, pairs=80, cells=300),
        words=words,
        title=f"Tiny {MARKUP}",
        inputs=qk.AttentionLayer(llama_bridge, LAYER).inputs,
        tables={MARKUP: table},
    )
    path = write_page(tmp_path_factory.mktemp("report") / "report.html", data)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        os.environ.setdefault("NO_AT_BRIDGE", "1")
        browser = started.chromium.launch(
            executable_path=CHROMIUM,
            args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, url):
    """Opens the report at a path; afterwards nothing may have been fetched, logged as an error or popped up."""
    contexts, wrong = [], []

    def opened(path="/", scheme="light", width=1280):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on(
            "request",
            lambda request: (
                request.url.split("#")[0] == url or wrong.append(f"request {request.url[:100]}")
            ),
        )
        page.on("console", lambda message: wrong.append(f"{message.type} {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error {error}"))
        page.on(
            "dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss())
        )
        page.goto(f"{url}#{path}")
        page.wait_for_selector("h1")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def section(page, name):
    """What the page itself holds as data."""
    return page.evaluate(f"JSON.parse(document.getElementById('data-{name}').textContent)")


def path_of(page):
    return page.url.split("#")[1]


def go(page, path):
    """To another view of the open report."""
    page.evaluate(
        """(path) => new Promise((done) => {
            addEventListener("hashchange", () => done(), { once: true });
            location.hash = path;
        })""",
        path,
    )


def shows(page, heading):
    """The view of this heading comes up."""
    playwright.expect(page.locator("h1")).to_have_text(heading)


def first_pair(page):
    return section(page, "pairs")["pair"][0]


VIEWS = {
    "/": "Tiny",
    "/prompt/0": "Prompt 1",
    "/prompt/1/2/30/3": "Prompt 2",
    "/features/query": "Query features",
    "/features/key": "Key features",
    "/feature/query/{query}": "Query feature {query}",
    "/feature/key/{key}": "Key feature {key}",
    "/pairs": "Pairs",
    "/pairs/2": "Pairs of head 2",
    "/pair/{pair}": "Pair {pair}",
    "/heads": "Heads",
    "/search/w1": "Search: w1",
    "/pair/999999": "Not here",
    "/prompt/0/0/3/5": "Not here",
    "/nowhere/%": "Not here",
}


@pytest.fixture(scope="module")
def numbers(browser, url):
    page = browser.new_page()
    page.goto(url)
    features = section(page, "features")
    found = {
        "query": features["query"]["feature"][0],
        "key": features["key"]["feature"][0],
        "pair": first_pair(page),
    }
    page.close()
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", VIEWS)
def test_every_view(open_page, numbers, path, scheme):
    page = open_page(path.format(**numbers), scheme)
    heading = VIEWS[path].format(**numbers)
    assert heading in page.locator("h1").inner_text().replace("“", "").replace("”", "")
    assert (
        page.title() == f"Tiny {MARKUP}"
        if path == "/"
        else page.title() == f"{heading} – Tiny {MARKUP}"
    )
    width, room = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width <= room
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert set(levels[1:]) <= {2}
    for landmark in ("main", "banner", "contentinfo", "search"):
        assert page.get_by_role(landmark).count() == 1
    for table in page.locator("table").all():
        assert table.locator("caption").text_content().strip()
        assert table.locator("thead th:not([scope=col])").count() == 0
    assert page.evaluate(POOR_CONTRAST) == []


POOR_CONTRAST = """() => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const luminance = (colors) => {
        for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const poor = new Set();
    for (const node of document.querySelectorAll("body *")) {
        const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
        if (!text || !node.checkVisibility() || node.closest(".hidden, .skip, [disabled], script")) continue;
        const behind = [];
        for (let up = node; up; up = up.parentElement) behind.unshift(getComputedStyle(up).backgroundColor);
        const [back, front] = [luminance(behind), luminance([...behind, getComputedStyle(node).color])];
        const contrast = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
        if (contrast < 4.5) poor.add(`${node.tagName} ${node.className}: ${contrast.toFixed(2)}`);
    }
    return [...poor];
}"""
"""Texts whose contrast with what lies behind them is below AA."""


HIDDEN_SHAPES = """(picture) => {
    const page = getComputedStyle(document.body).backgroundColor;
    const frame = picture.closest("figure").getBoundingClientRect();
    const hidden = [];
    for (const shape of picture.querySelectorAll("rect:not(.target), line, text")) {
        const style = getComputedStyle(shape);
        const color = shape.tagName === "line" ? style.stroke : style.fill;
        const { left, right, top, bottom } = shape.getBoundingClientRect();
        const inside = left >= frame.left - 12 && right <= frame.right + 2 && top >= frame.top && bottom <= frame.bottom;
        if (!inside || color === page || color === "none") hidden.push(shape.outerHTML);
    }
    return hidden;
}"""
"""Parts of a chart that lie outside of it, or have the colour of the page."""


def test_the_menu_leads_everywhere(open_page):
    page = open_page()
    for name in ("Prompts", "Query features", "Key features", "Pairs", "Heads", "Overview"):
        entry = page.get_by_role("navigation", name="Views").get_by_role(
            "link", name=name, exact=True
        )
        entry.click()
        playwright.expect(entry).to_have_attribute("aria-current", "page")
        assert page.locator("header [aria-current]").count() == 1
        assert page.evaluate("document.activeElement.tagName") == "H1"


def test_back_and_forward(open_page, numbers):
    page = open_page("/")
    page.get_by_role("link", name="Pairs", exact=True).click()
    shows(page, "Pairs")
    page.locator("tbody a").first.click()
    shows(page, f"Pair {numbers['pair']}")
    page.go_back()
    shows(page, "Pairs")
    page.go_back()
    shows(page, f"Tiny {MARKUP}")
    page.go_forward()
    shows(page, "Pairs")


def cell_name(prompt, head, i, j, source="feature_map"):
    at = i * (i + 1) // 2 + j
    shown = [
        prompt["words"][pos].replace("\n", "⏎").replace("\u202e", "U+202E") or "∅" for pos in (i, j)
    ]
    real, rebuilt = prompt["true"][head][at], prompt["rebuilt"][source][head][at]
    return f'head {head}, query "{shown[0]}" ({i}), key "{shown[1]}" ({j}): true {real:.2f}, rebuilt {rebuilt:.2f}'


def cell(page, i, j, pattern="true"):
    return page.locator(f'.pattern.{pattern} [data-i="{i}"][data-j="{j}"]')


def listed_pairs(page):
    """(contribution, effect) as shown, supporters then inhibitors."""
    values = []
    for table in page.locator(".cell-pairs table").all():
        for row in table.locator("tbody tr").all():
            texts = [
                text.replace("−", "-").replace("+", "")
                for text in row.locator("td.number").all_inner_texts()
            ]
            values.append(tuple(float(text) for text in texts))
    return values


class TestPrompt:
    def test_a_clicked_cell_lists_its_pairs(self, open_page):
        page = open_page("/prompt/0")
        (prompt, _) = section(page, "prompts")
        head, i, j = next(
            tuple(map(int, key.split("/")))
            for key, pairs in prompt["cells"].items()
            if min(p[3] for p in pairs) < 0 < max(p[3] for p in pairs)
        )
        page.get_by_role("radio", name=f"Head {head}").check(force=True)
        for pattern in ("true", "rebuilt", "difference"):
            cell(page, 0, 0, pattern).click()
            cell(page, i, j, pattern).click()
            assert path_of(page) == f"/prompt/0/{head}/{i}/{j}"
            assert page.locator(".cell[aria-selected]").count() == 3
            assert cell_name(prompt, head, i, j) in page.get_by_role("status").inner_text()
            expected = prompt["cells"][f"{head}/{i}/{j}"]
            expected = [p for p in expected if p[3] > 0] + [p for p in expected[::-1] if p[3] < 0]
            shown = listed_pairs(page)
            assert len(shown) == len(expected)
            for (contribution, effect), pair in zip(shown, expected, strict=True):
                assert contribution == pytest.approx(
                    pair[2], rel=6e-2
                )  # 3 digits, or 2 of very small ones
                assert effect == pytest.approx(pair[3], rel=6e-2)
        page.reload()
        assert len(listed_pairs(page)) == len(expected)  # the address says which cell

    def test_pairs_link_to_their_pages_and_back(self, open_page):
        page = open_page("/prompt/0")
        (prompt, _) = section(page, "prompts")
        pairs = section(page, "pairs")
        triples = zip(pairs["query_feature"], pairs["key_feature"], pairs["head"], strict=True)
        numbers = dict(zip(triples, pairs["pair"], strict=True))
        place, number = next(
            (key, numbers[p[0], p[1], int(key.split("/")[0])])
            for key, listed in prompt["cells"].items()
            for p in listed
            if (p[0], p[1], int(key.split("/")[0])) in numbers
        )
        go(page, f"/prompt/0/{place}")
        page.locator(".cell-pairs").get_by_role("link", name=f"pair {number}", exact=True).click()
        shows(page, f"Pair {number}")
        back = page.locator(f'a[href="#/prompt/0/{place}"]')
        assert back.count() == 1
        back.click()
        shows(page, "Prompt 1")
        assert path_of(page) == f"/prompt/0/{place}"

    def test_a_prompt_opens_with_its_explanation(self, open_page, attribution):
        page = open_page("/prompt/0")
        view = page.locator(".cell-pairs")
        assert view.locator("h2").inner_text().startswith(f"Head {attribution.position.head}: ")
        assert f"{attribution.attention:.3f}" in view.inner_text()
        verdict = attribution.causal_check.verdict
        assert f"the explanation {verdict}." in view.locator(".check").inner_text()
        rows = view.locator(".check tbody tr")
        assert rows.count() == len(attribution.causal_check.table)
        parts = view.locator("table", has_text="The score, by kind of term")
        assert parts.locator("tbody tr").count() == len(attribution.parts())
        links = page.locator(".explained a").evaluate_all("(as) => as.map((a) => a.hash)")
        assert links == [f"#/prompt/0/{'/'.join(map(str, attribution.position))}"]
        go(page, "/prompt/0/0/0/0")
        assert page.locator(".check").count() == 0

    def test_a_cell_without_list_says_why(self, open_page):
        page = open_page("/prompt/1")
        prompt = section(page, "prompts")[1]
        assert len(prompt["cells"]) <= 300 < prompt["n_cells"]
        i, j = next(
            (i, j) for i in range(31) for j in range(i + 1) if f"1/{i}/{j}" not in prompt["cells"]
        )
        go(page, f"/prompt/1/1/{i}/{j}")
        assert "not among them" in page.locator(".cell-pairs").inner_text()

    def test_heads_and_sources(self, open_page):
        page = open_page("/prompt/0/2/12/1")
        (prompt, _) = section(page, "prompts")
        for head in (1, 3, 0):
            page.get_by_role("radio", name=f"Head {head}").check(force=True)
            for i, j in ((0, 0), (5, 2), (12, 12)):
                assert cell(page, i, j).get_attribute("aria-label") == cell_name(prompt, head, i, j)
            assert path_of(page).startswith(f"/prompt/0/{head}/")
        page.get_by_label("Rebuilt from").select_option("transcoders")
        assert cell(page, 7, 3).get_attribute("aria-label") == cell_name(
            prompt, 0, 7, 3, "transcoders"
        )
        page.go_back()
        playwright.expect(page.get_by_role("radio", name="Head 3")).to_be_checked()
        assert path_of(page).startswith("/prompt/0/3/")

    def test_colors_grow_with_the_weight(self, open_page):
        page = open_page("/prompt/0/0/12/1")
        (prompt, _) = section(page, "prompts")
        level = "(node) => Number(node.style.getPropertyValue('--level'))"
        at = {(i, j): i * (i + 1) // 2 + j for i in range(N_PROMPT) for j in range(i + 1)}
        values = {place: prompt["true"][0][n] for place, n in at.items()}
        levels = {place: cell(page, *place).evaluate(level) for place in list(at)[::5]}
        by_value = sorted(levels, key=lambda place: values[place])
        assert [levels[place] for place in by_value] == sorted(levels.values())
        for i, j in list(at)[::7]:
            n = at[i, j]
            too_little = prompt["rebuilt"]["feature_map"][0][n] < prompt["true"][0][n]
            assert (
                "negative" in (cell(page, i, j, "difference").get_attribute("class") or "")
            ) == too_little

    def test_the_keyboard_alone(self, open_page):
        page = open_page("/prompt/0/2/6/3")
        (prompt, _) = section(page, "prompts")
        page.get_by_role("radio", name="Head 2").focus()
        page.keyboard.press("ArrowRight")
        assert page.get_by_role("radio", name="Head 3").is_checked()
        for _ in range(2):  # over the source
            page.keyboard.press("Tab")
        name = "document.activeElement.getAttribute('aria-label')"
        assert page.evaluate(name) == cell_name(prompt, 3, 6, 3)
        for key, place in (
            ("ArrowDown", (7, 3)),
            ("ArrowRight", (7, 4)),
            ("Home", (7, 0)),
            ("ArrowLeft", (7, 0)),
            ("End", (7, 7)),
            ("ArrowUp", (7, 7)),
            ("ArrowRight", (7, 7)),
            ("ArrowLeft", (7, 6)),
            ("ArrowUp", (6, 6)),
            ("Control+End", (12, 12)),
            ("ArrowDown", (12, 12)),
            ("Control+Home", (0, 0)),
        ):
            page.keyboard.press(key)
            assert page.evaluate(name) == cell_name(prompt, 3, *place), key
            assert page.locator(".readout").inner_text().startswith("head 3, query")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        assert path_of(page) == "/prompt/0/3/1/0"
        assert page.evaluate(name) == cell_name(prompt, 3, 1, 0)  # still there
        page.keyboard.press("Tab")
        assert (
            page.evaluate("document.activeElement.closest('.pattern').className")
            == "pattern rebuilt"
        )
        assert page.evaluate(name) == cell_name(prompt, 3, 1, 0)

    def test_grids_have_rows_and_headings(self, open_page):
        page = open_page("/prompt/0")
        grid = page.get_by_role("grid", name=re.compile("Model, head"))
        assert grid.get_by_role("row").count() == N_PROMPT + 1
        assert grid.get_by_role("gridcell").count() == N_PROMPT * (N_PROMPT + 1) // 2
        assert grid.get_by_role("rowheader").count() == N_PROMPT
        assert grid.get_by_role("columnheader").count() == N_PROMPT + 1


class TestSearch:
    def search(self, page, text):
        page.get_by_role("searchbox", name="Search features, pairs, heads").fill(text)
        page.keyboard.press("Enter")
        shows(page, f"Search: {text}")

    def test_tokens(self, open_page):
        page = open_page()
        texts, features = section(page, "texts"), section(page, "features")
        word = texts["words"][texts["labels"]["key"][features["key"]["feature"][0]][0]]
        plain = next(w for w in texts["words"] if w.startswith("w"))
        for text in (plain, ATTACK, word):
            self.search(page, text)
        self.search(page, plain.upper())
        found = page.locator("main table").first.locator("tbody tr")
        assert found.count() > 0
        self.search(page, "no such token")
        assert "No feature" in page.locator("main").inner_text()

    def test_found_features_fire_on_the_token(self, open_page):
        page = open_page()
        texts, features = section(page, "texts"), section(page, "features")
        plain = next(w for w in texts["words"] if w.startswith("w"))
        expected = 0
        for side in ("query", "key"):
            for feature, contexts in zip(
                features[side]["feature"], features[side]["contexts"], strict=True
            ):
                fired = {texts["words"][w] for w in texts["labels"][side][feature]}
                for row, pos, *_ in contexts:
                    runs = texts["rows"][str(row)]
                    fired |= {
                        texts["words"][run[pos - at]]
                        for at, run in runs
                        if at <= pos < at + len(run)
                    }
                expected += any(plain in word for word in fired)
        self.search(page, plain)
        assert (
            page.locator("main table caption").first.inner_text()
            == f"{expected} feature{'s' * (expected != 1)}"
        )

    def test_numbers(self, open_page, numbers):
        page = open_page()
        for text, name in (
            (f"query {numbers['query']}", f"query feature {numbers['query']}"),
            (f"K{numbers['key']}", f"key feature {numbers['key']}"),
            (f"pair {numbers['pair']}", f"Pair {numbers['pair']}"),
            ("head 2", "Head 2"),
            ("2", "Head 2"),
        ):
            self.search(page, text)
            listed = page.locator("main section").first.locator("li")
            assert [text for text in listed.all_text_contents() if name in text]
        self.search(page, "query 27")
        assert page.locator("main section").first.locator("li").count() == 1


class TestTables:
    @staticmethod
    def column(page, at):
        texts = (
            page.locator("main table")
            .first.locator(f"tbody tr > :nth-child({at})")
            .all_inner_texts()
        )
        return [float(text.replace("−", "-").replace("+", "").replace(",", "")) for text in texts]

    def test_sort_and_page(self, open_page):
        page = open_page("/pairs")
        pairs = section(page, "pairs")
        table = page.locator("main .table").first
        assert table.locator('th[aria-sort="descending"]').inner_text().startswith("Importance")
        heading = table.get_by_role("button", name="Weight")
        heading.click()
        assert self.column(page, 5) == pytest.approx(
            sorted(pairs["weight"], reverse=True)[:25], abs=6e-4
        )
        assert table.locator('th[aria-sort="descending"]').inner_text().startswith("Weight")
        heading.press("Enter")
        assert self.column(page, 5) == pytest.approx(sorted(pairs["weight"])[:25], abs=6e-4)
        assert table.locator('th[aria-sort="ascending"]').inner_text().startswith("Weight")
        assert "Sorted by Weight, ascending" in page.get_by_role("status").inner_text()
        assert table.locator(".count").inner_text() == "1–25 of 80"
        assert table.get_by_role("button", name="Previous").is_disabled()
        for _ in range(3):
            table.get_by_role("button", name="Next").click()
        assert table.locator(".count").inner_text() == "76–80 of 80"
        assert table.get_by_role("button", name="Next").is_disabled()
        assert self.column(page, 5) == pytest.approx(sorted(pairs["weight"])[75:], abs=6e-4)

    def test_what_is_not_known_comes_last(self, open_page):
        page = open_page("/pairs")
        pairs = section(page, "pairs")
        unknown = sum(value is None for value in pairs["mean"])
        assert unknown > 0
        heading = page.locator("main .table").first.get_by_role("button", name="Mean term")
        for _ in range(2):
            heading.click()
            for _ in range(3):
                page.get_by_role("button", name="Next").click()
            last = page.locator("main tbody tr > :nth-child(6)").all_inner_texts()
            assert last[-min(unknown, 5) :] == ["–"] * min(unknown, 5)

    def test_further_tables(self, open_page):
        page = open_page("/")
        part = page.locator("section", has=page.get_by_role("heading", name=MARKUP))
        assert part.locator("tbody th").first.inner_text() == f"{MARKUP} 0"
        part.get_by_role("button", name="n", exact=True).click()
        assert part.locator("tbody td").all_inner_texts() == [str(n) for n in range(30, 5, -1)]
        part.get_by_role("button", name="Next").click()
        assert part.locator("tbody td").all_inner_texts() == [str(n) for n in range(5, -1, -1)]

    def test_filter_by_head(self, open_page):
        page = open_page("/pairs")
        pairs = section(page, "pairs")
        page.get_by_label("Show").select_option("1")
        shows(page, "Pairs of head 1")
        assert path_of(page) == "/pairs/1"
        assert (
            self.column(page, 1)
            == [n for n, head in zip(pairs["pair"], pairs["head"], strict=True) if head == 1][:25]
        )


def test_the_pictures_show_the_views(browser, url, numbers, tmp_path):
    from benchmarks import report_pictures  # imports Playwright

    views = {"prompt": "/prompt/0/1/5/2", "feature": f"/feature/key/{numbers['key']}"}
    report_pictures.take(browser, url, views, tmp_path)
    sizes = {name: Image.open(tmp_path / f"report-{name}.png").size for name in views}
    assert sizes["feature"] == (1280, 900)
    assert sizes["prompt"][0] == 1280
    assert sizes["prompt"][1] > 900  # all of it, the pairs of the chosen weight below the patterns


class TestTexts:
    def test_tokens_stay_text(self, open_page, numbers):
        page = open_page(f"/feature/key/{numbers['key']}")
        page.locator(".passage").first.wait_for()
        before = page.locator("script").count()
        for path in (
            "/prompt/0",
            "/prompt/1",
            f"/pair/{numbers['pair']}",
            "/features/query",
            f"/search/{ATTACK}",
            "/",
        ):
            go(page, path)
            assert page.locator("script").count() == before
            assert page.locator("main b").count() == 0
        assert MARKUP in page.locator("h1").inner_text()
        go(page, "/prompt/1")
        text = page.locator(".prompt-text").evaluate("(node) => node.textContent")
        shown = {ATTACK, MARKUP, "⏎", "∅", "U+202E"}
        assert {word for word in shown if word in text} >= {ATTACK, "⏎"}

    def test_the_policy_holds(self, browser, url):
        page = browser.new_page()
        page.goto(url)
        for attack in (
            "document.body.innerHTML = '<b>x</b>'",
            "document.body.append(document.createElement('script'))",
        ):
            before = page.locator("body *").count()
            code = f"{attack}; document.querySelector('script:last-of-type').textContent = 'document.title = 1'"
            with pytest.raises(playwright.Error, match="Trusted"):
                page.evaluate(code)
            assert page.locator("body *").count() <= before + 1
        with pytest.raises(playwright.Error, match="Failed to fetch"):
            page.evaluate("fetch('https://example.org')")
        page.close()

    def test_feature_contexts_are_shaded_by_activation(self, open_page, numbers):
        page = open_page(f"/feature/query/{numbers['query']}")
        features = section(page, "features")["query"]
        acts = features["contexts"][0][0][3]
        first = page.locator(".contexts li").first
        shaded = first.locator(".firing").evaluate_all(
            "(ns) => ns.map((n) => Number(n.style.getPropertyValue('--level')))"
        )
        expected = [act / features["max"][0] for act in acts if act]
        assert shaded == pytest.approx(expected, abs=1e-3)
        assert first.locator("mark").count() == 1
        assert first.locator("mark").evaluate("(n) => n.textContent").startswith("fires on: ")

    def test_pair_contexts_mark_query_and_key(self, open_page, numbers):
        page = open_page(f"/pair/{numbers['pair']}")
        pairs, texts = section(page, "pairs"), section(page, "texts")
        for item, (row, i, j, _) in zip(
            page.locator(".contexts li").all(), pairs["contexts"][0], strict=True
        ):
            marks = dict(
                item.locator("mark").evaluate_all(
                    "(ns) => ns.map((n) => n.textContent.split(': '))"
                )
            )
            word = {
                pos: next(
                    texts["words"][run[pos - at]]
                    for at, run in texts["rows"][str(row)]
                    if at <= pos < at + len(run)
                )
                for pos in (i, j)
            }
            names = {"query and key token": i} if i == j else {"query token": i, "key token": j}
            shown = {
                name: word[pos].replace("\n", "⏎").replace("\u202e", "U+202E") or "∅"
                for name, pos in names.items()
            }
            assert marks == shown


class TestLooks:
    @pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
    def test_themes(self, open_page, scheme, dark):
        page = open_page(scheme=scheme)

        def is_dark():
            color = page.evaluate("getComputedStyle(document.body).backgroundColor")
            return sum(map(int, re.findall(r"\d+", color)[:3])) < 300

        toggle = page.get_by_role("button", name=re.compile("^Theme"))
        assert is_dark() == dark
        toggle.click()
        assert toggle.inner_text() == "Theme: light"
        assert not is_dark()
        toggle.click()
        assert toggle.inner_text() == "Theme: dark"
        assert is_dark()
        page.reload()
        assert is_dark()
        toggle.click()
        assert toggle.inner_text() == "Theme: system"
        assert is_dark() == dark
        page.emulate_media(color_scheme="light" if dark else "dark")
        assert is_dark() != dark

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("path", ["/", "/heads", "/pair/{pair}"])
    def test_charts_have_shapes_in_view_and_their_numbers(self, open_page, numbers, path, scheme):
        page = open_page(path.format(**numbers), scheme)
        charts = page.locator("figure.chart").all()
        assert charts
        for chart in charts:
            picture = chart.get_by_role("img")
            assert len(picture.get_attribute("aria-label")) > 10
            assert picture.evaluate(HIDDEN_SHAPES) == []
        for summary in page.locator("summary").all():
            summary.click()
        assert page.locator("details table").count() == page.locator("details").count()

    def test_bars_are_as_high_as_their_numbers(self, open_page):
        page = open_page("/heads")
        heads = section(page, "overview")["heads"]
        chart = page.locator("figure.chart").last
        heights = chart.locator("rect").evaluate_all(
            "(bars) => bars.map((bar) => bar.height.baseVal.value)"
        )
        largest = max(heads["importance"])
        expected = [value / largest * max(heights) for value in heads["importance"]]
        assert heights == pytest.approx(expected, abs=0.1)
        titles = chart.locator("rect title").all_text_contents()
        assert titles[0].startswith("0, Importance by head: ")

    @pytest.mark.parametrize("n_clicks", [0, 1, 2])
    def test_thumbnails_take_the_colour_of_the_theme(self, open_page, n_clicks):
        page = open_page("/prompt/0", scheme="dark")
        toggle = page.get_by_role("button", name=re.compile("^Theme"))
        for _ in range(n_clicks):  # to light, to dark
            toggle.click()
        thumbnail = page.locator(".heads canvas").first
        full_weight = """(canvas) => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, 1, 1);
            return `rgb(${data[0]}, ${data[1]}, ${data[2]})`;
        }"""
        expected = "rgb(8, 79, 156)" if n_clicks == 1 else "rgb(116, 184, 255)"
        assert thumbnail.evaluate(full_weight) == expected

    def test_skip_link(self, open_page):
        page = open_page("/heads")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to content"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "content"
        assert path_of(page) == "/heads"

    def test_focus_is_visible(self, open_page):
        page = open_page("/features/query")
        for _ in range(14):
            page.keyboard.press("Tab")
            outline = "((style) => style.outlineStyle + style.outlineWidth)(getComputedStyle(document.activeElement))"
            assert page.evaluate(outline) == "solid2px", page.evaluate(
                "document.activeElement.outerHTML"
            )

    @pytest.mark.parametrize("width", [1000, 1280, 1920])
    @pytest.mark.parametrize(
        "path", ["/", "/prompt/0", "/prompt/1", "/pair/{pair}", "/feature/key/{key}", "/pairs"]
    )
    def test_no_sideways_scrolling(self, open_page, numbers, path, width):
        page = open_page(path.format(**numbers), width=width)
        assert page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
