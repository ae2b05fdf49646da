"""The report in a browser: every view, tables, search, charts, both themes, without a network."""

import re

import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need `pip install playwright`"
)
from page_steps import (  # noqa: E402
    ATTACK,
    MARKUP,
    needs_browser,
    path_of,
    section,
    shows,
)
from PIL import Image  # noqa: E402

pytest_plugins = ["report_browser"]
pytestmark = needs_browser

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
        const isText = (child) => child.nodeType === 3 && child.textContent.trim();
        const left_out = node.closest(".hidden, .skip, [disabled], script");
        if (![...node.childNodes].some(isText) || !node.checkVisibility() || left_out) continue;
        const behind = [];
        for (let up = node; up; up = up.parentElement)
            behind.unshift(getComputedStyle(up).backgroundColor);
        const back = luminance(behind);
        const front = luminance([...behind, getComputedStyle(node).color]);
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
        const inWidth = left >= frame.left - 12 && right <= frame.right + 2;
        const inHeight = top >= frame.top && bottom <= frame.bottom;
        const isPainted = color !== page && color !== "none";
        if (!inWidth || !inHeight || !isPainted) hidden.push(shape.outerHTML);
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
            outline = page.evaluate(
                """() => {
                    const style = getComputedStyle(document.activeElement);
                    return style.outlineStyle + style.outlineWidth;
                }"""
            )
            assert outline == "solid2px", page.evaluate("document.activeElement.outerHTML")

    @pytest.mark.parametrize("width", [1000, 1280, 1920])
    @pytest.mark.parametrize(
        "path", ["/", "/prompt/0", "/prompt/1", "/pair/{pair}", "/feature/key/{key}", "/pairs"]
    )
    def test_no_sideways_scrolling(self, open_page, numbers, path, width):
        page = open_page(path.format(**numbers), width=width)
        assert page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
