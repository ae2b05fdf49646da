"""Indirect objects in SmolLM2: which heads, which feature pairs, and what is left without them.

python -m examples.ioi --output docs/images    # every table and picture of docs/ioi.md: minutes
python -m examples.ioi --smoke                 # a few prompts and one head, under a minute
"""

import argparse
import json
from pathlib import Path
from typing import get_args

import matplotlib as mpl
import pandas as pd
import torch

import sae_lens_qk as qk
from examples.ioi.pictures import LOOK, pictures
from examples.ioi.prompts import TEMPLATES, Name, Order
from examples.ioi.study import study_ioi
from examples.ioi.tables import (
    context_table,
    frequent_features,
    markdown,
    preferring_pairs,
    result_tables,
)
from sae_lens_qk.attention import SIDES
from sae_lens_qk.explain.removals import Directions
from sae_lens_qk.host.layer import AttentionLayer

TARGETS: dict[int, Name] = {3: "s2", 0: "io", 7: "io"}
"""Heads of layer 23, and the name attention to which is explained."""
NAME_MOVER = 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dictionary", default="smollm2-135m-instruct-L23", help="name or folder")
    parser.add_argument("--output", type=Path, default=Path("output/ioi"))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    n_prompts = 4 if args.smoke else 48
    n_rows = 4 if args.smoke else 128
    ks = (1, 5) if args.smoke else (1, 2, 5, 10, 20, 50)
    targets = {3: TARGETS[3]} if args.smoke else TARGETS
    templates = TEMPLATES[:1] if args.smoke else TEMPLATES

    d = qk.BilinearQKDictionary.from_pretrained(args.dictionary)
    model = qk.load_model(d)
    layer = AttentionLayer(model, d.cfg.layer)

    # Other text: where features lie in x, and what they fire on
    tokens = qk.token_rows(model, "", "text", n_rows, 256)
    x = torch.cat([layer.inputs(batch) for batch in tokens.split(8)])
    contexts = qk.collect_activations(d, [(tokens, x)])
    directions = Directions.fit(d, list(x))

    # Heads, pairs, ablations, removals, twins
    result = study_ioi(d, model, targets, n_prompts, directions, ks, templates=templates)
    preferences = [
        preferring_pairs(d, model, NAME_MOVER, order, n_prompts // 2) for order in get_args(Order)
    ]
    preferring = pd.concat(preferences)
    features = {side: frequent_features(result, preferring, contexts, side) for side in SIDES}
    scan = result.scan
    print(
        f"logit difference {scan.logit_difference:.2f}, positive in {scan.accuracy:.0%} of "
        f"{n_prompts} prompts"
    )

    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "ioi.json").write_text(json.dumps(result.to_dict(), indent=1))
    tables = result_tables(result)
    tables["Pairs that prefer IO to S1"] = preferring
    tables["Strongest contexts"] = context_table(features, contexts, model.tokenizer)
    text = "\n\n".join(f"## {name}\n\n{markdown(table)}" for name, table in tables.items())
    (args.output / "ioi-tables.md").write_text(text + "\n")
    with mpl.rc_context(LOOK):
        for name, figure in pictures(result, features):
            figure.savefig(args.output / f"ioi-{name}.png", dpi=150)
    print(f"tables and pictures are in {args.output}")


if __name__ == "__main__":
    main()
