"""Steps in a report that is open in a browser, and what its tokens would like to be."""

import shutil

import pytest
from playwright import sync_api as playwright

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, _BROWSERS) if path), None)

needs_browser = [
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
