"""A first look at a dictionary: its metrics, its heads, and texts on which its pairs fire.

python examples/quick_look.py            # 40,000 tokens of the package's own text: some minutes
python examples/quick_look.py --smoke    # 2,000
"""

import argparse
import sys

from rich.console import Console

import sae_lens_qk as qk
from sae_lens_qk.statistics.activations import ALWAYS_ON
from sae_lens_qk.statistics.heads import (
    dense_features,
    head_table,
    pair_importances,
    participation,
)
from sae_lens_qk.tables import rich_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dictionary", default="smollm2-135m-instruct-L23", help="name or folder")
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    # a file or pipe has no width of its own
    console = Console(width=None if sys.stdout.isatty() else 132)

    dictionaries = qk.pretrained_dictionaries()
    console.print(rich_table(dictionaries[["name", "layer", "status"]], "dictionaries"))
    d = qk.BilinearQKDictionary.from_pretrained(args.dictionary)
    model = qk.load_model(d)
    tokens = qk.token_rows(model, "", "text", 8 if args.smoke else 160, 256)
    evaluated_rows = tokens[: 4 if args.smoke else 16]
    console.print(qk.evaluate(d, model, evaluated_rows, baselines=("uniform",)))

    console.print(rich_table(head_table(d), "pairs by head"))

    # One pass over text: densities, strongest contexts of every feature and every pair.
    statistics = qk.collect_activations(d, qk.model_batches(model, d.cfg.layer, tokens))
    always_on = dense_features(statistics, ALWAYS_ON)  # these stand for the mean
    pairs = pair_importances(d, without=always_on)
    console.print(rich_table(participation(d, pairs).head(10), "how many heads a pair serves"))
    strongest = pairs[pairs["head"] == args.head].nlargest(3, "masked_importance")
    triples = strongest[["query_feature", "key_feature", "head"]].to_numpy()
    for triple, number in zip(triples, d.feature_map.find(triples).tolist(), strict=True):
        query_feature, key_feature, head = triple
        console.print(f"\nhead {head}: query {query_feature} x key {key_feature}")
        for context in statistics.pair_contexts(number)[:3]:
            words = [model.to_string(token) for token in statistics.tokens[context.row]]
            text = "".join(words[max(0, context.query_pos - 8) : context.query_pos])
            query = words[context.query_pos]
            key = words[context.key_pos]
            line = f"{context.value:+.2f}  {key!r} <- {text!r}, {query!r}"
            console.print(line, highlight=False, markup=False)


if __name__ == "__main__":
    main()
