"""Why did this head attend there? One attention weight of SmolLM2, explained and checked.

python examples/explain_prompt.py            # half a minute more the first time, to fit where features lie in x
python examples/explain_prompt.py --smoke    # without the causal check
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

import sae_lens_qk as qk
from sae_lens_qk.explain.attribution import overview
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
    console = Console(
        width=None if sys.stdout.isatty() else 132
    )  # a file or pipe has no width of its own

    d = qk.BilinearQKDictionary.from_pretrained("smollm2-135m-instruct-L23")
    model = qk.load_model(d)
    prompt = qk.Prompt.of(d, model, args.prompt)

    # Where do the heads look from the last token?
    looks = overview(prompt)
    console.print(rich_table(looks, f"from {prompt.words[-1]!r}"))

    # All terms of one score: they add up to the model's own.
    key_pos = int(looks["key_pos"].iloc[args.head])
    a = qk.attribute(d, model, prompt, head=args.head, query_pos=-1, key_pos=key_pos)
    console.print(a)
    console.print(
        f"terms add up to {a.to_frame()['contribution'].sum():+.5f}, the model's score is {a.score:+.5f}"
    )

    # Is it the reason? Features leave the model's own input, W_Q and W_K say what remains.
    if not args.smoke:
        console.print(a.check())

    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "attribution.json").write_text(a.to_json(indent=2))
    figure = pattern_triptych(
        prompt.pattern[args.head], prompt.made()[args.head], prompt.words, heads=args.head
    )
    figure.savefig(args.output / "pattern.png", dpi=150)
    console.print(f"wrote {args.output / 'attribution.json'} and {args.output / 'pattern.png'}")


if __name__ == "__main__":
    main()
