"""Why did this head attend there? One attention weight of SmolLM2, explained and checked.

python examples/explain_prompt.py            # half a minute more the first time, to fit where
                                             # features lie in the layer's input
python examples/explain_prompt.py --smoke    # without the causal check
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

import sae_lens_qk as qk
from sae_lens_qk.figures import pattern_triptych
from sae_lens_qk.tables import rich_table

PROMPT = "When Mary and John went to the store, John gave a drink to"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output/explain_prompt"))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    # a file or pipe has no width of its own
    console = Console(width=None if sys.stdout.isatty() else 132)

    d = qk.BilinearQKDictionary.from_pretrained("smollm2-135m-instruct-L23")
    model = qk.load_model(d)
    prompt = qk.RecordedPrompt.record(d, model, args.prompt)

    # Where do the heads look from the last token?
    looks = qk.overview(prompt)
    console.print(rich_table(looks, f"from {prompt.words[-1]!r}"))

    # All terms of one score: they add up to the model's own.
    key_pos = int(looks["key_pos"].iloc[args.head])
    attribution = qk.attribute(
        d,
        model,
        prompt,
        head=args.head,
        query_pos=-1,
        key_pos=key_pos,
    )
    console.print(attribution)
    total = attribution.to_frame()["contribution"].sum()
    console.print(f"terms add up to {total:+.5f}, the model's score is {attribution.score:+.5f}")

    # Is the explanation causal? Features are removed from the model's own input; W_Q and W_K say
    # what remains of the attention.
    if not args.smoke:
        console.print(attribution.check())

    args.output.mkdir(parents=True, exist_ok=True)
    json_path = args.output / "attribution.json"
    json_path.write_text(attribution.to_json(indent=2))
    own = prompt.pattern[args.head]
    rebuilt = prompt.rebuilt_pattern()[args.head]
    figure = pattern_triptych(own, rebuilt, prompt.words, heads=args.head)
    figure_path = args.output / "pattern.png"
    figure.savefig(figure_path, dpi=150)
    console.print(f"wrote {json_path} and {figure_path}")


if __name__ == "__main__":
    main()
