"""Prompts and texts of the report in a browser: by mouse and keyboard, and never as markup."""

import re

import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need `pip install playwright`"
)
from page_steps import (  # noqa: E402
    ATTACK,
    MARKUP,
    N_PROMPT,
    go,
    needs_browser,
    path_of,
    section,
    shows,
)

pytest_plugins = ["report_browser"]
pytestmark = needs_browser


def visible(word):
    return word.replace("\n", "⏎").replace("\u202e", "U+202E") or "∅"


def cell_name(prompt, head, i, j, source="feature_map"):
    cell_number = i * (i + 1) // 2 + j
    query = visible(prompt["words"][i])
    key = visible(prompt["words"][j])
    true = prompt["true"][head][cell_number]
    rebuilt = prompt["rebuilt"][source][head][cell_number]
    weights = f"true {true:.2f}, rebuilt {rebuilt:.2f}"
    return f'head {head}, query "{query}" ({i}), key "{key}" ({j}): {weights}'


def word_at(texts, row, pos):
    for first, words in texts["rows"][str(row)]:
        if first <= pos < first + len(words):
            return texts["words"][words[pos - first]]
    raise AssertionError(f"row {row}, position {pos} is not in the report")


def cell(page, i, j, pattern="true"):
    return page.locator(f'.pattern.{pattern} [data-i="{i}"][data-j="{j}"]')


def number_in(text):
    return float(text.replace("−", "-").replace("+", ""))


def pair_rows(page):
    """(contribution, effect) of each pair in view, supporters then inhibitors."""
    rows = []
    for row in page.locator(".halves tbody tr").all():
        texts = row.locator("td.number").all_inner_texts()
        contribution = number_in(texts[0])
        effect = number_in(texts[1])
        rows.append((contribution, effect))
    return rows


class TestPrompt:
    def test_a_clicked_cell_lists_its_pairs(self, open_page):
        page = open_page("/prompt/0")
        prompt, _ = section(page, "prompts")
        both_signs = []
        for cell_key, pairs in prompt["cells"].items():
            effects = [effect for *_, effect in pairs]
            if min(effects) < 0 < max(effects):
                both_signs.append((cell_key, pairs))
        cell_key, pairs = both_signs[0]
        head, i, j = map(int, cell_key.split("/"))
        supporting = [pair for pair in pairs if pair[3] > 0]
        inhibiting = [pair for pair in pairs if pair[3] < 0]
        expected = supporting + inhibiting[::-1]
        page.get_by_role("radio", name=f"Head {head}").check(force=True)
        for pattern in ("true", "rebuilt", "difference"):
            cell(page, 0, 0, pattern).click()
            cell(page, i, j, pattern).click()
            assert path_of(page) == f"/prompt/0/{cell_key}"
            assert page.locator(".cell[aria-selected]").count() == 3
            assert cell_name(prompt, head, i, j) in page.get_by_role("status").inner_text()
            for row, pair in zip(pair_rows(page), expected, strict=True):
                assert row == pytest.approx(pair[2:], rel=6e-2)  # 3 digits; 2 of very small ones
        page.reload()
        assert len(pair_rows(page)) == len(expected)  # the address says which cell

    def test_pairs_link_to_their_pages_and_back(self, open_page):
        page = open_page("/prompt/0")
        prompt, _ = section(page, "prompts")
        pairs = section(page, "pairs")
        triples = zip(pairs["query_feature"], pairs["key_feature"], pairs["head"], strict=True)
        numbers = dict(zip(triples, pairs["pair"], strict=True))
        links = []
        for cell_key, cell_pairs in prompt["cells"].items():
            head = int(cell_key.split("/")[0])
            for query_feature, key_feature, *_ in cell_pairs:
                triple = (query_feature, key_feature, head)
                if triple in numbers:
                    links.append((cell_key, numbers[triple]))
        cell_key, number = links[0]
        go(page, f"/prompt/0/{cell_key}")
        page.locator(".cell-pairs").get_by_role("link", name=f"pair {number}", exact=True).click()
        shows(page, f"Pair {number}")
        back = page.locator(f'a[href="#/prompt/0/{cell_key}"]')
        assert back.count() == 1
        back.click()
        shows(page, "Prompt 1")
        assert path_of(page) == f"/prompt/0/{cell_key}"

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
        prompt, _ = section(page, "prompts")
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
        prompt, _ = section(page, "prompts")
        true = prompt["true"][0]
        rebuilt = prompt["rebuilt"]["feature_map"][0]
        positions = [(i, j) for i in range(N_PROMPT) for j in range(i + 1)]
        levels = []
        for number in range(0, len(positions), 5):
            style = "(node) => Number(node.style.getPropertyValue('--level'))"
            level = cell(page, *positions[number]).evaluate(style)
            levels.append((true[number], level))
        levels.sort()
        assert [level for _, level in levels] == sorted(level for _, level in levels)
        for number in range(0, len(positions), 7):
            difference = cell(page, *positions[number], "difference")
            is_negative = "negative" in (difference.get_attribute("class") or "")
            assert is_negative == (rebuilt[number] < true[number])

    def test_the_keyboard_alone(self, open_page):
        page = open_page("/prompt/0/2/6/3")
        prompt, _ = section(page, "prompts")
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
            script = "document.querySelector('script:last-of-type')"
            code = f"{attack}; {script}.textContent = 'document.title = 1'"
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
        texts = section(page, "texts")
        contexts = section(page, "pairs")["contexts"][0]
        items = page.locator(".contexts li").all()
        for item, (row, i, j, _) in zip(items, contexts, strict=True):
            marks = item.locator("mark").evaluate_all(
                "(ns) => ns.map((n) => n.textContent.split(': '))"
            )
            query = visible(word_at(texts, row, i))
            key = visible(word_at(texts, row, j))
            expected = {"query token": query, "key token": key}
            if i == j:
                expected = {"query and key token": query}
            assert dict(marks) == expected
