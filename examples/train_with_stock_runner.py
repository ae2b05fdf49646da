"""Train the transcoders of a QK dictionary with SAELens's own runner.

`BilinearQKTrainingRunner` does all of this and step 2; use the stock runner where a SAELens
training script exists already. Three things it cannot know: the layer's W_Q and W_K (attach), that
its evaluator splices outputs back into the input hook (turn it off), and that rows must stay whole
(mixing 0).

    python examples/train_with_stock_runner.py --smoke
"""

import argparse
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

import sae_lens_qk as qk

BATCH_ROWS = 8


def train(
    model: Any,
    layer: int,
    dataset: Any,
    context_size: int = 256,
    n_steps: int = 200,
    d_features: int = 2400,
) -> qk.BilinearQKDictionary:
    attention = qk.AttentionLayer(model, layer)
    weights = attention.qk_weights
    sae = qk.TranscodersTrainingConfig(
        d_in=attention.spec.d_model,
        d_query=d_features,
        d_key=d_features,
        attention=attention.spec.to_dict(),
        layer=layer,
        fingerprint=list(weights.fingerprint()),
    )
    batch_tokens = BATCH_ROWS * context_size
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        hook_name=attention.names.input,
        model_class_name="TransformerBridge",
        is_dataset_tokenized=False,
        streaming=False,
        context_size=context_size,
        train_batch_size_tokens=batch_tokens,
        store_batch_size_prompts=BATCH_ROWS,
        n_batches_in_buffer=8,
        activations_mixing_fraction=0.0,
        training_tokens=n_steps * batch_tokens,
        lr=4e-3,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset, override_model=model)
    runner.sae.attach(weights, context_size, first_batch=next(runner.activations_store))
    runner.evaluator = None
    return runner.run().to_dictionary()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two steps, few features")
    size = {"n_steps": 2, "d_features": 64} if parser.parse_args().smoke else {}
    dictionary = train(qk.load_model(), layer=23, dataset=qk.text_sample(), **size)
    print(
        f"trained {dictionary.cfg.d_query} query and {dictionary.cfg.d_key} key features of layer "
        f"{dictionary.cfg.layer}"
    )
