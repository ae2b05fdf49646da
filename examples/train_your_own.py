"""Both training steps on the package's own text: a small dictionary of another layer, evaluated.

python examples/train_your_own.py            # some ten minutes on two cores
python examples/train_your_own.py --smoke    # a few steps
"""

import argparse
from pathlib import Path

from rich.console import Console

import sae_lens_qk as qk

STEP = 2048  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("output/train_your_own"))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    sae = qk.TranscodersTrainingConfig(
        d_in=1,
        d_query=512,
        d_key=512,
        k=16.0,
        decoder_bias=False,
    )
    cfg = qk.BilinearQKRunnerConfig(
        layer=args.layer,
        sae=sae,
        training_tokens=(4 if args.smoke else 300) * STEP,
        lr_warm_up_steps=2 if args.smoke else 20,
        mask=qk.MaskStepConfig(
            training_tokens=(2 if args.smoke else 100) * STEP,
            n_pairs=5_000,
            n_candidates=20_000,
            ranking_tokens=STEP,
        ),
        input_cache_path=str(args.output / "inputs"),  # the layer's inputs, read by both steps
        input_cache_tokens=(4 if args.smoke else 80) * STEP,
        checkpoint_path=None,
        output_path=str(args.output / "dictionary"),
    )
    model = qk.load_model()
    runner = qk.BilinearQKTrainingRunner(
        cfg, override_dataset=qk.text_sample(), override_model=model
    )
    d = runner.run()
    held_out = qk.token_rows(model, "", "text", 648, 256)[640:]  # not among the cached rows
    console = Console()
    console.print(qk.evaluate(d, model, held_out, baselines=("uniform",)))

    folder = cfg.output_path  # what push_to_hub would publish
    saved = qk.BilinearQKDictionary.load_from_disk(folder)
    console.print(f"{folder} holds {len(saved.feature_map):,} pairs; next:")
    console.print(f"python -m sae_lens_qk report --dictionary {folder}", markup=False)


if __name__ == "__main__":
    main()
