"""What the package does, on a real model and without a network: `make demo`.

Loads the shipped dictionary of SmolLM2 layer 23, measures it, names the feature pairs behind one attention weight of an
indirect-object prompt, and writes a report that opens in any browser.
"""

import logging
import sys
import warnings
from pathlib import Path

from rich.console import Console

import sae_lens_qk as qk
from sae_lens_qk.statistics.activations import model_batches
from sae_lens_qk.dashboard.data import ReportLimits
from sae_lens_qk.dashboard.report import write_report
from sae_lens_qk.text import token_rows

DICTIONARY = "smollm2-135m-instruct-L23"
PROMPT = "When Mary and John went to the store, John gave a drink to"
HEAD, KEY = 0, " Mary"
REPORT = Path("output/demo.html")


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    console = Console(
        width=None if sys.stdout.isatty() else 132
    )  # a file or pipe has no width of its own
    d = qk.BilinearQKDictionary.from_pretrained(DICTIONARY)
    model = qk.load_model(d)
    tokens = token_rows(
        model, "", "text", 16, 256
    )  # text drawn from the model itself, which comes with the package

    console.print(
        f"[bold]1. How well does the dictionary carry the attention of layer {d.cfg.layer}?[/bold]"
    )
    console.print(qk.evaluate(d, model, tokens))

    console.print("\n[bold]2. Why did this head attend there?[/bold]")
    prompt = qk.Prompt.of(d, model, PROMPT)
    console.print(
        qk.attribute(d, model, prompt, HEAD, query_pos=-1, key_pos=prompt.find(KEY)).shown(n=5)
    )

    console.print("\n[bold]3. Everything it has found, as one page[/bold]")
    statistics = qk.collect_activations(
        d, model_batches(model, d.cfg.layer, tokens), progress=False
    )
    path = write_report(
        REPORT,
        d,
        statistics,
        [prompt],
        words=lambda ids: model.tokenizer.batch_decode([[token] for token in ids]),
        limits=ReportLimits(features=400, pairs=2000),
    )
    console.print(
        f"{path.resolve()}: {path.stat().st_size / 1e6:.1f} MB, contexts from {tokens.numel():,} tokens",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
