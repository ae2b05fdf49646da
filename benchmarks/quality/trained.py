"""The dictionaries of SmolLM2 that the causal benchmark compares; trained where they are missing.

    QK_CORPUS=<folder> python -m benchmarks.quality.trained --layer 23 --method authors

trains one anew, from train.parquet of the corpus; without a corpus from the sample that comes with
the package. They lie in `benchmarks/` of the package's cache folder (`$SAE_LENS_QK_CACHE`), in
float16. All see the same tokens for the same number of steps, with as many features per side; the
authors' penalty is swept until its L0 is within 10 % of the others'. They are small on purpose:
what is compared is the method.
"""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

import sae_lens_qk as qk
from benchmarks.quality.methods import AUTHORS_RECIPE, SQUARED_ERROR, through_weights
from benchmarks.quality.penalty import sweep_penalty
from sae_lens_qk.host.models import cache_folder
from sae_lens_qk.host.support import Model
from sae_lens_qk.training.candidates import firing_rates

logger = logging.getLogger("sae_lens_qk")

LAYERS = (17, 23)
SHIPPED = {23: "smollm2-135m-instruct-L23"}
METHODS = {
    17: ("ours", "residual SAE"),
    23: ("ours", "authors", "residual SAE", "L2 transcoders"),
}
"""What is compared on each layer."""
CORPUS = "QK_CORPUS"
D = 1000
K = 15.7
STEPS = 300
STEP_TOKENS = 2048
CACHED_TOKENS = 400_000
_FIRST_STRENGTH = 1.2e-2
_RATE_ROWS = 64


def load(
    layer: int,
    steps: int = STEPS,
) -> dict[str, qk.BilinearQKDictionary]:
    """The dictionaries of a layer by method, missing ones trained; and the shipped one if any."""
    dictionaries = {}
    if layer in SHIPPED:
        dictionaries["shipped"] = qk.BilinearQKDictionary.from_pretrained(SHIPPED[layer])
    model = None
    for method in METHODS[layer]:
        folder = dictionary_folder(layer, method, steps)
        if not (folder / "cfg.json").is_file():
            logger.warning("%s is missing: training it, %d steps", folder, steps)
            model = model or qk.load_model()
            save(train(model, layer, method, steps), folder)
        dictionaries[method] = qk.BilinearQKDictionary.load_from_disk(folder, dtype="float32")
    return dictionaries


def dictionary_folder(
    layer: int,
    method: str,
    steps: int = STEPS,
) -> Path:
    """Where a dictionary lies: told apart by the number of steps, and by the text."""
    text = "corpus" if CORPUS in os.environ else "sample"
    name = f"L{layer}-{method.replace(' ', '-')}"
    return cache_folder() / "benchmarks" / f"{text}-{steps}-steps" / name


def save(
    dictionary: qk.BilinearQKDictionary,
    folder: Path,
) -> None:
    dictionary.runner_cfg = None
    dictionary.to(torch.float16).save_model(folder)


def config(
    layer: int,
    steps: int,
    **sae: Any,
) -> qk.BilinearQKRunnerConfig:
    """The run that all methods share; there is no step 2: every pair takes part.

    Args:
        **sae: changes of step 1.
    """
    settings = {"k": K, "decoder_bias": False, **sae}
    folder = dictionary_folder(layer, "inputs", steps)
    return qk.BilinearQKRunnerConfig(
        layer=layer,
        dataset_path="$QK_CORPUS/train.parquet",
        training_tokens=steps * STEP_TOKENS,
        lr=1e-3,
        lr_warm_up_steps=min(50, steps // 4),
        input_cache_path=str(folder),
        input_cache_tokens=min(CACHED_TOKENS, steps * STEP_TOKENS),
        checkpoint_path=None,
        output_path=None,
        mask=qk.MaskStepConfig(training_tokens=0),
        sae=qk.TranscodersTrainingConfig(d_in=1, d_query=D, d_key=D, **settings),
    )


def runner(
    model: Model,
    layer: int,
    steps: int,
    **sae: Any,
) -> qk.BilinearQKTrainingRunner:
    """See `config`; on the corpus, or on the sample where there is none."""
    dataset = None if CORPUS in os.environ else qk.text_sample()
    cfg = config(layer, steps, **sae)
    return qk.BilinearQKTrainingRunner(cfg, override_dataset=dataset, override_model=model)


def train(
    model: Model,
    layer: int,
    method: str,
    steps: int = STEPS,
) -> qk.BilinearQKDictionary:
    """Train one dictionary from the cached inputs of the layer (filled on the first run)."""
    if method == "ours":
        return runner(model, layer, steps).run()
    if method == "L2 transcoders":
        return runner(model, layer, steps, **SQUARED_ERROR).run()
    if method == "authors":
        return _train_authors(model, layer, steps)
    return _train_residual_sae(model, layer, steps)


def _train_authors(
    model: Model,
    layer: int,
    steps: int,
) -> qk.BilinearQKDictionary:
    def train_at(strength: float) -> tuple[qk.BilinearQKDictionary, float]:
        run = runner(model, layer, steps, **AUTHORS_RECIPE, sparsity_coefficient=strength)
        dictionary = run.run()
        rows = run.fill_input_cache().rows(slice(0, _RATE_ROWS))
        rates = firing_rates(dictionary, rows.split(8))
        l0 = float(rates.query.sum() + rates.key.sum()) / 2
        logger.info("penalty %.3g: L0 %.1f", strength, l0)
        return dictionary, l0 / K

    return sweep_penalty(train_at, _FIRST_STRENGTH).dictionary


def _train_residual_sae(
    model: Model,
    layer: int,
    steps: int,
) -> qk.BilinearQKDictionary:
    run = runner(model, layer, steps)
    cfg = run.cfg
    torch.manual_seed(cfg.seed)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=cfg.sae.d_in,
            d_sae=D,
            k=K,
        )
    )
    data = run.fill_input_cache().batches(cfg.rows_per_batch, seed=cfg.seed)
    SAETrainer(cfg.to_sae_trainer_config(), sae, data).fit()  # type: ignore[arg-type]
    dictionary = through_weights(sae, run.layer.qk_weights, run.layer.spec)
    for name in ("model_name", "model_mode", "layer", "hook_name", "fingerprint"):
        setattr(dictionary.cfg, name, getattr(cfg.sae, name))
    return dictionary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layer",
        type=int,
        choices=LAYERS,
        required=True,
    )
    parser.add_argument("--method", choices=METHODS[23], required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    folder = dictionary_folder(options.layer, options.method)
    save(train(qk.load_model(), options.layer, options.method), folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
