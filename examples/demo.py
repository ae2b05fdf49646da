"""What the package does, on a real model and without a network: `make demo`.

Loads the shipped dictionary of SmolLM2 layer 23, measures it, names the feature pairs behind one attention weight of an
indirect-object prompt, and trains a small dictionary from scratch.
"""

import logging
import sys
import tempfile
import warnings

from rich.console import Console

import sae_lens_qk as qk
from sae_lens_qk.text import text_sample, token_rows

PROMPT = "When Mary and John went to the store, John gave a drink to"
HEAD, KEY = 0, " Mary"
console = Console(width=None if sys.stdout.isatty() else 132)  # a file or pipe has no width of its own


def train_small(model) -> None:
    """Both steps, a few dozen each: enough to see the losses fall."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = qk.BilinearQKRunnerConfig(
            layer=23,
            sae=qk.TranscodersTrainingConfig(d_in=1, d_query=512, d_key=512),
            training_tokens=40 * 2048,
            lr_warm_up_steps=5,
            mask=qk.MaskStepConfig(training_tokens=20 * 2048, n_pairs=5_000, n_candidates=20_000, ranking_tokens=2048),
            input_cache_path=f"{folder}/inputs",
            input_cache_tokens=8 * 2048,
            checkpoint_path=None,
            output_path=f"{folder}/dictionary",
        )
        trained = qk.BilinearQKTrainingRunner(cfg, override_model=model, override_dataset=text_sample()).run()
        rows = token_rows(model, "", "text", 100, 256)[80:88]  # not among the cached rows
        result = qk.evaluate(trained, model, rows, baselines=("uniform",))
    kl = {name: source.pattern_kl.value for name, source in result.sources.items() if source.pattern_kl}
    console.print(
        f"trained 512 + 512 features on 82k tokens: pattern KL {kl['transcoders']:.3f} with transcoders, "
        f"{kl['feature_map']:.3f} with {len(trained.feature_map):,} pairs; uniform attention {kl['uniform']:.3f}"
    )


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    dictionary = qk.BilinearQKDictionary.from_pretrained("smollm2-135m-instruct-L23")
    model = qk.load_model(dictionary)
    tokens = token_rows(model, "", "text", 16, 256)
    console.print("[bold]1. How well does the dictionary carry the attention of layer 23?[/bold]")
    console.print(qk.evaluate(dictionary, model, tokens, progress=True))
    console.print("\n[bold]2. Why did this head attend there?[/bold]")
    prompt = qk.Prompt.of(dictionary, model, PROMPT)
    console.print(qk.attribute(dictionary, model, prompt, HEAD, query_pos=-1, key_pos=prompt.find(KEY)).shown(n=5))
    console.print("\n[bold]3. Train your own[/bold] (both steps, short)")
    train_small(model)


if __name__ == "__main__":
    main()
