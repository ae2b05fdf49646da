"""The README's pictures: an attention weight and a feature, as a report shows them.

    python -m benchmarks.report_pictures

writes docs/images/report-prompt.png and report-feature.png, of the shipped dictionary. The weight
is the one that the README explains; the feature is the key feature of its strongest supporting
pair, unless another is asked for. Needs Playwright, and a Chromium on the path or Playwright's own.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from playwright.sync_api import Browser, sync_playwright

import sae_lens_qk as qk
from sae_lens_qk.__main__ import IOI_PROMPT

HEAD = 0
KEY = " Mary"
MEAN_FEATURE = 0
"""Key feature that stands for the mean, shown to nobody."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dictionary", default="smollm2-135m-instruct-L23", help="name or folder")
    parser.add_argument("--key_feature", type=int)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    d = qk.BilinearQKDictionary.from_pretrained(args.dictionary)
    model = qk.load_model(d)
    prompt = qk.RecordedPrompt.record(d, model, IOI_PROMPT)
    key_pos = prompt.find(KEY)
    attribution = qk.attribute(d, model, prompt, HEAD, query_pos=-1, key_pos=key_pos)
    feature = args.key_feature
    if feature is None:
        pairs = attribution.top(sign="supporting")
        pairs = pairs[(pairs["kind"] == "pair") & (pairs["key_feature"] != MEAN_FEATURE)]
        feature = pairs["key_feature"].iloc[0]
    position = "/".join(map(str, attribution.position))
    views = {"prompt": f"/prompt/0/{position}", "feature": f"/feature/key/{feature}"}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        report = Path(folder) / "report.html"
        qk.report(report, d, model, prompts=[IOI_PROMPT])
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        take(browser, report.as_uri(), views, args.output)
        browser.close()


def take(
    browser: Browser,
    url: str,
    views: dict[str, str],
    output: Path,
) -> None:
    """Screenshots of views; how a view is addressed stands behind the # of the report's address."""
    for name, path in views.items():
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto(f"{url}#{path}")
        page.wait_for_selector("h1")
        page.screenshot(path=output / f"report-{name}.png", full_page=name == "prompt")
        page.close()


if __name__ == "__main__":
    main()
