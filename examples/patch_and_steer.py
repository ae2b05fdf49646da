"""Interventions on feature pairs: remove them from the true scores, double them, keep them alone.

python examples/patch_and_steer.py [--smoke]
"""

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sae_lens_qk as qk

PROMPT = "When Mary and John went to the store, John gave a drink to"
IO = " Mary"
S = " John"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="the strongest two pairs alone")
    args = parser.parse_args()

    d = qk.BilinearQKDictionary.from_pretrained("smollm2-135m-instruct-L23")
    model = qk.load_model(d)
    prompt = qk.RecordedPrompt.record(d, model, PROMPT)
    key_pos = prompt.find(IO)
    io_token = int(model.to_single_token(IO))
    s_token = int(model.to_single_token(S))
    attribution = qk.attribute(
        d,
        model,
        prompt,
        head=args.head,
        query_pos=-1,
        key_pos=key_pos,
    )
    # (query feature, key feature, head), the strongest first
    pairs = attribution.triples(2 if args.smoke else 10)
    doubled = {tuple(pair): 2.0 for pair in pairs.tolist()}
    heads = [args.head]
    interventions: dict[str, dict[str, Any] | None] = {
        "none": None,
        "pairs out of the true scores": {"source": "model", "ablate_pairs": pairs},
        "pairs doubled in the true scores": {"source": "model", "scale_pairs": doubled},
        "the whole feature map": {"source": "feature_map", "heads": heads},
        "these pairs alone": {"source": "feature_map", "heads": heads, "keep_pairs": pairs},
    }
    table = Table(
        "intervention",
        f"attention to {IO!r}",
        f"logit {IO!r} - {S!r}",
        title=f"head {args.head}, {len(pairs)} pairs",
    )
    attention: list[float] = []

    def record_attention(
        pattern: torch.Tensor,
        hook: Any,
    ) -> None:
        attention.append(float(pattern[0, args.head, -1, key_pos]))

    recorder = (f"blocks.{d.cfg.layer}.attn.hook_pattern", record_attention)
    for name, edits in interventions.items():
        hooks = [] if edits is None else d.fwd_hooks(model, **edits)
        with torch.no_grad():
            logits = model.run_with_hooks(
                prompt.tokens[None], fwd_hooks=[*hooks, recorder], prepend_bos=False
            )
        difference = logits[0, -1, io_token] - logits[0, -1, s_token]
        table.add_row(name, f"{attention[-1]:.3f}", f"{difference:+.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
