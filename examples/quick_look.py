"""A first look at a dictionary: how well it carries the pattern, its heads, and the texts its strongest pairs fire on.

python examples/quick_look.py            # 40,000 tokens of the text that comes with the package: some minutes
python examples/quick_look.py --smoke    # 2,000
"""

import argparse
import sys

from rich.console import Console

import sae_lens_qk as qk
from sae_lens_qk.statistics.activations import collect_activations, model_batches
from sae_lens_qk.statistics.activations import ALWAYS_ON
from sae_lens_qk.statistics.heads import dense_features, head_table, pair_energies, participation
from sae_lens_qk.tables import rich_table
from sae_lens_qk.text import token_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dictionary", default="smollm2-135m-instruct-L23", help="name or folder")
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    console = Console(
        width=None if sys.stdout.isatty() else 132
    )  # a file or pipe has no width of its own

    console.print(
        rich_table(qk.pretrained_dictionaries()[["name", "layer", "status"]], "dictionaries")
    )
    d = qk.BilinearQKDictionary.from_pretrained(args.dictionary)
    model = qk.load_model(d)
    tokens = token_rows(model, "", "text", 8 if args.smoke else 160, 256)
    console.print(qk.evaluate(d, model, tokens[: 4 if args.smoke else 16], baselines=("uniform",)))

    console.print(rich_table(head_table(d), "pairs by head"))

    # One pass over text: densities, strongest contexts of every feature and every pair.
    statistics = collect_activations(d, model_batches(model, d.cfg.layer, tokens))
    sparse = pair_energies(
        d, without=dense_features(statistics, ALWAYS_ON)
    )  # the others stand for the mean
    console.print(rich_table(participation(d, sparse).head(10), "how many heads a pair serves"))
    strongest = sparse.query("head == @args.head").nlargest(3, "energy")
    numbers = d.feature_map.find(
        strongest[["query_feature", "key_feature", "head"]].to_numpy()
    ).tolist()
    for number, (_, pair) in zip(numbers, strongest.iterrows(), strict=True):
        console.print(
            f"\nhead {pair['head']:.0f}: query {pair['query_feature']:.0f} x key {pair['key_feature']:.0f}"
        )
        for context in statistics.pair_contexts(number)[:3]:
            words = [model.to_string(token) for token in statistics.tokens[context.row]]
            before = "".join(words[max(0, context.query_pos - 8) : context.query_pos])
            query, key = words[context.query_pos], words[context.key_pos]
            console.print(
                f"{context.value:+.2f}  {key!r} <- {before!r}, {query!r}",
                highlight=False,
                markup=False,
            )


if __name__ == "__main__":
    main()
