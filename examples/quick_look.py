"""A first look at a dictionary: how well it carries the pattern, its heads, and the texts its strongest pairs fire on.

python examples/quick_look.py            # 40,000 tokens of the text that comes with the package: some minutes
python examples/quick_look.py --smoke    # 2,000
"""

import argparse

from rich.console import Console

import sae_lens_qk as qk
from sae_lens_qk.analysis.activations import collect_activations, model_batches
from sae_lens_qk.analysis.heads import head_table, participation
from sae_lens_qk.text import token_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionary", default="smollm2-135m-instruct-L23", help="name or folder")
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    console = Console()

    console.print(qk.pretrained_dictionaries()[["name", "layer", "n_pairs", "pattern_kl", "status"]].to_string(index=False))
    d = qk.BilinearQKDictionary.from_pretrained(args.dictionary)
    model = qk.load_model(d)
    tokens = token_rows(model, "", "text", 8 if args.smoke else 160, 256)
    console.print(qk.evaluate(d, model, tokens[: 4 if args.smoke else 16], baselines=("uniform",)))

    console.print("pairs by head", head_table(d).round(3).to_string(index=False), sep="\n")
    console.print("how many heads a pair serves", participation(d).head(10).round(3).to_string(index=False), sep="\n")

    # One pass over text: densities, strongest contexts of every feature and every pair.
    statistics = collect_activations(d, model_batches(model, d.cfg.layer, tokens))
    pairs = d.pair_frame().query("head == @args.head").nlargest(3, "importance")
    for number, pair in pairs.iterrows():
        console.print(f"\nhead {pair['head']:.0f}: query {pair['query_feature']:.0f} x key {pair['key_feature']:.0f}")
        for context in statistics.pair_contexts(int(number))[:3]:
            words = [model.to_string(token) for token in statistics.tokens[context.row]]
            before = "".join(words[max(0, context.query_pos - 8) : context.query_pos])
            query, key = words[context.query_pos], words[context.key_pos]
            console.print(f"{context.value:+.2f}  {key!r} <- {before!r}, {query!r}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
