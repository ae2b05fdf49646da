"""The README's pictures: an attention weight and a feature, as a report of the shipped dictionary shows them.

    python -m benchmarks.report_pictures    # writes docs/images/report-prompt.png and report-feature.png

The weight is the one that the README explains; the feature is the key feature of its strongest supporting pair, unless
another is asked for. Needs Playwright, and a Chromium on the path or Playwright's own.
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
from sae_lens_qk.__main__ import main as command

HEAD, KEY = 0, " Mary"


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
    prompt = qk.Prompt.of(d, model, IOI_PROMPT)
    a = qk.attribute(d, model, prompt, HEAD, query_pos=-1, key_pos=prompt.find(KEY))
    pairs = a.top(sign="supporting").query(
        "kind == 'pair' and key_feature != 0"
    )  # 0 stands for the mean
    views = {
        "prompt": f"/prompt/0/{'/'.join(str(number) for number in a.place)}",
        "feature": f"/feature/key/{pairs['key_feature'].iloc[0] if args.key_feature is None else args.key_feature}",
    }
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        report = Path(folder) / "report.html"
        if command(
            [
                "dashboard",
                "--dictionary",
                args.dictionary,
                "--prompts",
                IOI_PROMPT,
                "--output",
                str(report),
            ]
        ):
            raise SystemExit("the report could not be written")
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        take(browser, report.as_uri(), views, args.output)
        browser.close()


def take(browser: Browser, url: str, views: dict[str, str], output: Path) -> None:
    """Screenshots of views; how a view is addressed stands behind the # of the report's address."""
    for name, path in views.items():
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto(f"{url}#{path}")
        page.wait_for_selector("h1")
        page.screenshot(path=output / f"report-{name}.png", full_page=name == "prompt")
        page.close()


if __name__ == "__main__":
    main()
