"""What the package does, on a real model and without a network: `make demo`.

Loads the shipped dictionary of SmolLM2 layer 23, measures it, names the feature pairs behind one attention weight of an
indirect-object prompt, and trains a small dictionary from scratch.
"""

import logging
import sys
import tempfile
import warnings

from rich.console import Console
from rich.table import Table

import sae_lens_qk as qk
from sae_lens_qk.attention import attention_scores, pattern_from_scores
from sae_lens_qk.host import layer_inputs, qk_weights
from sae_lens_qk.text import text_sample, token_rows

PROMPT = "When Mary and John went to the store, John gave a drink to"
HEAD, KEY = 0, " Mary"
console = Console(width=None if sys.stdout.isatty() else 132)  # a file or pipe has no width of its own


def explain(dictionary: qk.BilinearQKDictionary, model) -> None:
    """The strongest kept pairs from the last token to " Mary" in head 0, the name mover."""
    tokens = model.to_tokens(PROMPT)
    words = model.to_str_tokens(tokens[0])
    key_pos = words.index(KEY)
    x, weights = layer_inputs(model, dictionary.cfg.layer, tokens), qk_weights(model, dictionary.cfg.layer)
    true = pattern_from_scores(attention_scores(weights.queries(x), weights.keys(x), dictionary.spec))
    made = dictionary.pattern(x, "feature_map")
    console.print(f'\n[bold]"{PROMPT}"[/bold]')
    console.print(
        f'head {HEAD} attends from "{words[-1]}" to "{KEY}" with {true[0, HEAD, -1, key_pos]:.3f}; '
        f"rebuilt from feature pairs: {made[0, HEAD, -1, key_pos]:.3f}"
    )
    pairs = dictionary.active_pairs(x[0], HEAD, -1, key_pos)
    table = Table(title=f"strongest of {len(pairs)} kept pairs (score contributions)")
    for column in ("query feature", "key feature", "weight", "contribution"):
        table.add_column(column, justify="right")
    for pair in pairs.head(10).itertuples():
        query = "constant" if pair.query_feature == dictionary.cfg.d_query else str(pair.query_feature)
        key = "constant" if pair.key_feature == dictionary.cfg.d_key else str(pair.key_feature)
        table.add_row(query, key, f"{pair.weight:.2f}", f"{pair.contribution:+.2f}")
    console.print(table)


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
    explain(dictionary, model)
    console.print("\n[bold]3. Train your own[/bold] (both steps, short)")
    train_small(model)


if __name__ == "__main__":
    main()
