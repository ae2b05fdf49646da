"""What the package does, on a real model and without a network: `make demo`.

Loads the shipped dictionary of SmolLM2 layer 23, measures it, names the feature pairs behind one
attention weight of an indirect-object prompt, and writes a report that opens in any browser.
"""

import logging
import sys
import warnings
from pathlib import Path

from rich.console import Console

import sae_lens_qk as qk

DICTIONARY = "smollm2-135m-instruct-L23"
PROMPT = "When Mary and John went to the store, John gave a drink to"
HEAD = 0
KEY = " Mary"
REPORT = Path("output/demo.html")


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    # a file or pipe has no width of its own
    console = Console(width=None if sys.stdout.isatty() else 132)
    d = qk.BilinearQKDictionary.from_pretrained(DICTIONARY)
    model = qk.load_model(d)
    # text drawn from the model itself, which comes with the package
    tokens = qk.token_rows(model, "", "text", 16, 256)

    question = f"How well does the dictionary carry the attention of layer {d.cfg.layer}?"
    console.print(f"[bold]1. {question}[/bold]")
    console.print(qk.evaluate(d, model, tokens))

    console.print("\n[bold]2. Why did this head attend there?[/bold]")
    prompt = qk.RecordedPrompt.record(d, model, PROMPT)
    key_pos = prompt.find(KEY)
    attribution = qk.attribute(d, model, prompt, HEAD, query_pos=-1, key_pos=key_pos)
    console.print(attribution.render(n=5))

    console.print("\n[bold]3. Everything it holds, as one page[/bold]")
    # without causal checks, which take half a minute more the first time
    path = qk.report(REPORT, d, model, [prompt], tokens, checks=0)
    size = path.stat().st_size / 1e6
    console.print(
        f"{path.resolve()}: {size:.1f} MB, contexts from {tokens.numel():,} tokens", soft_wrap=True
    )


if __name__ == "__main__":
    main()
