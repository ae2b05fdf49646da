"""Interventions on feature pairs: take them out of the true scores, turn them up, keep nothing but them.

python examples/patch_and_steer.py [--smoke]
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

import sae_lens_qk as qk

PROMPT = "When Mary and John went to the store, John gave a drink to"
IO, S = " Mary", " John"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="the strongest two pairs alone")
    args = parser.parse_args()

    d = qk.BilinearQKDictionary.from_pretrained("smollm2-135m-instruct-L23")
    model = qk.load_model(d)
    prompt = qk.Prompt.of(d, model, PROMPT)
    tokens, key_pos = prompt.tokens[None], prompt.words.index(IO)
    answers = [int(model.to_single_token(name)) for name in (IO, S)]
    a = qk.attribute(d, model, prompt, head=args.head, query_pos=-1, key_pos=key_pos)
    pairs = a.triples(
        2 if args.smoke else 10
    )  # (query feature, key feature, head), strongest first
    doubled = {tuple(pair): 2.0 for pair in pairs.tolist()}
    pattern_hook = f"blocks.{d.cfg.layer}.attn.hook_pattern"

    table = Table(
        "intervention",
        f"attention to {IO!r}",
        f"logit {IO!r} - {S!r}",
        title=f"head {args.head}, {len(pairs)} pairs",
    )
    for name, edits in {
        "none": None,
        "pairs out of the true scores": {"source": "model", "ablate_pairs": pairs},
        "pairs doubled in the true scores": {"source": "model", "scale_pairs": doubled},
        "the whole feature map": {"source": "feature_map", "heads": [args.head]},
        "these pairs alone": {"source": "feature_map", "heads": [args.head], "keep_pairs": pairs},
    }.items():
        seen = {}
        hooks = d.fwd_hooks(model, **edits) if edits else []
        watch = (
            pattern_hook,
            lambda pattern, hook, seen=seen: seen.update(
                at=float(pattern[0, args.head, -1, key_pos])
            ),
        )
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=[*hooks, watch], prepend_bos=False)[
                0, -1
            ]
        table.add_row(name, f"{seen['at']:.3f}", f"{logits[answers[0]] - logits[answers[1]]:+.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
