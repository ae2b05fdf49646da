"""Dictionaries of SmolLM2 that the causal benchmark compares: loaded from `trained/`, and the commands that train them.

    QK_CORPUS=<folder with train.parquet> python -m benchmarks.quality.trained --layer 23 --method authors

All see the same tokens for the same number of steps, with as many features a side; the authors' penalty is swept until its
L0 is within 10 % of the others'. They are small on purpose: what is compared is the method. Weights are stored in float16.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

import sae_lens_qk as qk
from sae_lens_qk.training.candidates import firing_rates
from sae_lens_qk.training.runner import BilinearQKTrainingRunner

from .methods import AUTHORS_RECIPE, SQUARED_ERROR, sweep_penalty, through_weights

LAYERS = (17, 23)
SHIPPED = {23: "smollm2-135m-instruct-L23"}
FOLDER = Path(__file__).parent / "trained"
METHODS = ("ours", "authors", "residual SAE", "L2 transcoders")
D, K, STEPS, CACHED_TOKENS = 1000, 15.7, 300, 400_000
_FIRST_STRENGTH, _RATE_ROWS = 1.2e-2, 64


def load(layer: int) -> dict[str, qk.BilinearQKDictionary]:
    """The trained dictionaries of a layer by method, those that are there; and the one that the package ships."""
    found = {method: FOLDER / folder_name(layer, method) for method in METHODS}
    shipped = (
        {"shipped": qk.BilinearQKDictionary.from_pretrained(SHIPPED[layer])}
        if layer in SHIPPED
        else {}
    )
    return shipped | {
        method: qk.BilinearQKDictionary.load_from_disk(path, dtype="float32")
        for method, path in found.items()
        if path.is_dir()
    }


def folder_name(layer: int, method: str) -> str:
    return f"L{layer}-{method.replace(' ', '-')}"


def config(layer: int, cache: str, **sae: Any) -> qk.BilinearQKRunnerConfig:
    """The run that all methods share; `sae` changes step 1. There is no step 2: every pair takes part."""
    return qk.BilinearQKRunnerConfig(
        layer=layer,
        dataset_path="$QK_CORPUS/train.parquet",
        training_tokens=STEPS * 2048,
        lr=1e-3,
        lr_warm_up_steps=50,
        input_cache_path=cache,
        input_cache_tokens=CACHED_TOKENS,
        checkpoint_path=None,
        output_path=None,
        mask=qk.MaskStepConfig(training_tokens=0),
        sae=qk.TranscodersTrainingConfig(
            d_in=1, d_query=D, d_key=D, **{"k": K, "decoder_bias": False, **sae}
        ),
    )


def train(layer: int, method: str, cache: str) -> qk.BilinearQKDictionary:
    """Train one dictionary from the cached inputs of the layer (filled on the first run)."""
    if method == "ours":
        return BilinearQKTrainingRunner(config(layer, cache)).run()
    if method == "L2 transcoders":
        return BilinearQKTrainingRunner(config(layer, cache, **SQUARED_ERROR)).run()
    if method == "authors":
        return sweep_penalty(
            lambda strength: _train_authors(layer, cache, strength), _FIRST_STRENGTH
        ).dictionary
    return _train_residual_sae(layer, cache)


def _train_authors(
    layer: int, cache: str, strength: float
) -> tuple[qk.BilinearQKDictionary, float]:
    runner = BilinearQKTrainingRunner(
        config(layer, cache, **AUTHORS_RECIPE, sparsity_coefficient=strength)
    )
    dictionary = runner.run()
    rates = firing_rates(dictionary, runner.fill_input_cache().rows(slice(0, _RATE_ROWS)).split(8))
    l0 = float(rates.query.sum() + rates.key.sum()) / 2
    print(f"penalty {strength:.3g}: L0 {l0:.1f}", flush=True)
    return dictionary, l0 / K


def _train_residual_sae(layer: int, cache: str) -> qk.BilinearQKDictionary:
    runner = BilinearQKTrainingRunner(config(layer, cache))
    torch.manual_seed(runner.cfg.seed)
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=runner.cfg.sae.d_in, d_sae=D, k=K))
    data = runner.fill_input_cache().batches(runner.cfg.rows_per_batch, seed=runner.cfg.seed)
    SAETrainer(runner.cfg.to_sae_trainer_config(), sae, data).fit()  # type: ignore[arg-type]
    dictionary = through_weights(sae, runner.weights, runner.cfg.sae.spec)
    for name in ("model_name", "model_mode", "layer", "hook_name", "fingerprint"):
        setattr(dictionary.cfg, name, getattr(runner.cfg.sae, name))
    return dictionary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layer", type=int, choices=LAYERS, required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument(
        "--cache",
        help="folder of the layer's inputs; default: cache/smollm2-135m-instruct-L<layer>",
    )
    options = parser.parse_args()
    cache = options.cache or f"cache/smollm2-135m-instruct-L{options.layer}"
    dictionary = train(options.layer, options.method, cache)
    dictionary.runner_cfg = None
    path = FOLDER / folder_name(options.layer, options.method)
    dictionary.to(torch.float16).save_model(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
