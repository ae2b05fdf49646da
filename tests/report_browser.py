"""A report of a tiny dictionary in a browser: fixtures and steps of the browser tests.

A test module asks for them with `pytest_plugins = ["report_browser"]`.
"""

import dataclasses
import os

import pandas as pd
import pytest
from dashboard_cases import page_data, ranked_dictionary, tiny_statistics
from page_steps import CHROMIUM, MARKUP, N_PROMPT, section, words
from playwright import sync_api as playwright
from tiny_dictionaries import LAYER
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.dashboard.page import write_page
from sae_lens_qk.dashboard.pages import ReportLimits
from sae_lens_qk.explain.removals import Directions
from sae_lens_qk.explain.report import striking_positions


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
        limits=ReportLimits(
            features=20,
            pairs=80,
            cells=300,
        ),
        words=words,
        title=f"Tiny {MARKUP}",
        inputs=qk.AttentionLayer(llama_bridge, LAYER).inputs,
        tables={MARKUP: table},
    )
    path = write_page(tmp_path_factory.mktemp("report") / "report.html", data)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as playwright_driver:
        os.environ.setdefault("NO_AT_BRIDGE", "1")
        browser = playwright_driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, url):
    """Opens the report at a path.

    Afterwards nothing may have been fetched, logged as an error or popped up.
    """
    contexts = []
    events = []

    def on_request(request):
        if request.url.split("#")[0] != url:
            events.append(f"request {request.url[:100]}")

    def on_dialog(dialog):
        events.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def open_at(path="/", scheme="light", width=1280):
        viewport = {"width": width, "height": 800}
        context = browser.new_context(
            viewport=viewport,
            color_scheme=scheme,
            offline=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", on_request)
        page.on("dialog", on_dialog)
        page.on("console", lambda message: events.append(f"{message.type} {message.text}"))
        page.on("pageerror", lambda error: events.append(f"error {error}"))
        page.goto(f"{url}#{path}")
        page.wait_for_selector("h1")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert not events


@pytest.fixture(scope="module")
def numbers(browser, url):
    page = browser.new_page()
    page.goto(url)
    features = section(page, "features")
    numbers = {
        "query": features["query"]["feature"][0],
        "key": features["key"]["feature"][0],
        "pair": section(page, "pairs")["pair"][0],
    }
    page.close()
    return numbers
