"""Both training steps, a few dozen each: enough to see the pattern KL fall. `make demo-train`."""

import logging
import sys
import tempfile
import warnings

from rich.console import Console

import sae_lens_qk as qk

STEP = 2048  # tokens
N_STEPS = 60


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    model = qk.load_model()
    with tempfile.TemporaryDirectory() as folder:
        cfg = qk.BilinearQKRunnerConfig(
            layer=23,
            sae=qk.TranscodersTrainingConfig(
                d_in=1,
                d_query=512,
                d_key=512,
                decoder_bias=False,
            ),
            training_tokens=N_STEPS * STEP,
            lr=4e-3,
            lr_warm_up_steps=5,
            mask=qk.MaskStepConfig(
                training_tokens=20 * STEP,
                fine_tune_lr=1e-3,
                n_pairs=5_000,
                n_candidates=20_000,
                ranking_tokens=STEP,
            ),
            input_cache_path=f"{folder}/inputs",  # the layer's inputs, read by both steps
            input_cache_tokens=16 * STEP,
            checkpoint_path=None,
            output_path=f"{folder}/dictionary",
        )
        runner = qk.BilinearQKTrainingRunner(
            cfg, override_dataset=qk.text_sample(), override_model=model
        )
        d = runner.run()
    held_out = qk.token_rows(model, "", "text", 168, 256)[160:]  # not among the cached rows
    sources = qk.evaluate(d, model, held_out, baselines=("uniform",)).sources
    # a file or pipe has no width of its own
    Console(width=None if sys.stdout.isatty() else 132).print(
        f"trained 512 + 512 features on {N_STEPS * STEP:,} tokens: "
        f"pattern KL {sources['transcoders'].pattern_kl.value:.3f} with transcoders, "
        f"{sources['feature_map'].pattern_kl.value:.3f} with {len(d.feature_map):,} pairs; "
        f"uniform attention {sources['uniform'].pattern_kl.value:.3f}"
    )


if __name__ == "__main__":
    main()
