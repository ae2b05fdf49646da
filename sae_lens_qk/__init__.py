"""Why did this attention head attend there? Sparse pairs of query and key features for SAELens.

Importing this package registers its architectures with SAELens.
"""

# WHILE THE HOUSE IS REBUILT: lazy, so that one broken module does not block the others.
import importlib

_PLACES = {
    "AttentionSpec": "attention",
    "BilinearQKConfig": "config",
    "BilinearQKRunnerConfig": "run_config",
    "CardConfig": "run_config",
    "MaskStepConfig": "config",
    "MaskTrainingConfig": "config",
    "TranscodersTrainingConfig": "config",
    "SparseFeatureMap": "feature_map",
    "Features": "feature_map",
    "AttentionLayer": "host.layer",
    "check_host": "host.proof",
    "load_model": "host.models",
    "pretrained_dictionaries": "pretrained.registry",
    "BilinearQKDictionary": "dictionary",
    "evaluate": "evals",
    "rounding_loss": "evals",
    "BilinearQKTrainingRunner": "training.runner",
    "collect_activations": "statistics.activations",
    "attribute": "explain.attribution",
    "Attribution": "explain.attribution",
    "RecordedPrompt": "explain.prompt",
    "report": "explain.report",
    "token_rows": "text",
    "text_sample": "text",
}


def __getattr__(name: str):
    if name in _PLACES:
        return getattr(importlib.import_module(f"sae_lens_qk.{_PLACES[name]}"), name)
    raise AttributeError(name)


__version__ = "0.1.0"
