"""Both training steps on the text that comes with the package, then the figures: a small dictionary of another layer.

python examples/train_your_own.py            # some ten minutes on two cores
python examples/train_your_own.py --smoke    # a few steps
"""

import argparse
from pathlib import Path

from rich.console import Console

import sae_lens_qk as qk
from sae_lens_qk.text import text_sample, token_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("output/train_your_own"))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    step = 2048  # tokens
    cfg = qk.BilinearQKRunnerConfig(
        layer=args.layer,
        sae=qk.TranscodersTrainingConfig(
            d_in=1, d_query=512, d_key=512, k=16.0, decoder_bias=False
        ),
        training_tokens=(4 if args.smoke else 300) * step,
        lr_warm_up_steps=2 if args.smoke else 20,
        mask=qk.MaskStepConfig(
            training_tokens=(2 if args.smoke else 100) * step,
            n_pairs=5_000,
            n_candidates=20_000,
            ranking_tokens=step,
        ),
        input_cache_path=str(args.output / "inputs"),  # the layer's inputs, read by both steps
        input_cache_tokens=(4 if args.smoke else 80) * step,
        checkpoint_path=None,
        output_path=str(args.output / "dictionary"),
    )
    model = qk.load_model()
    d = qk.BilinearQKTrainingRunner(cfg, override_model=model, override_dataset=text_sample()).run()
    held_out = token_rows(model, "", "text", 648, 256)[640:]  # not among the cached rows
    Console().print(qk.evaluate(d, model, held_out, baselines=("uniform",)))

    again = qk.BilinearQKDictionary.load_from_disk(
        cfg.output_path
    )  # what push_to_hub would publish
    Console().print(f"{cfg.output_path} holds {len(again.feature_map):,} pairs; next:")
    Console().print(f"python -m sae_lens_qk dashboard --dictionary {cfg.output_path}", markup=False)


if __name__ == "__main__":
    main()
