"""Why did this attention head attend there? Sparse pairs of query and key features for SAELens.

Importing this package registers its architectures with SAELens.
"""

import warnings
from typing import Any

from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.config import (
    BilinearQKConfig,
    MaskStepConfig,
    MaskTrainingConfig,
    TranscodersTrainingConfig,
)
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.evals import compare, evaluate, rounding_loss
from sae_lens_qk.explain.attribution import Attribution, Attributions, attribute, overview
from sae_lens_qk.explain.check import Check, check
from sae_lens_qk.explain.prompt import RecordedPrompt
from sae_lens_qk.explain.report import report
from sae_lens_qk.feature_map import Features, SparseFeatureMap
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.models import load_model
from sae_lens_qk.host.proof import check_host
from sae_lens_qk.inputs import model_batches
from sae_lens_qk.pretrained.registry import pretrained_dictionaries
from sae_lens_qk.run_config import BilinearQKRunnerConfig, CardConfig
from sae_lens_qk.statistics.activations import ActivationStatistics, collect_activations
from sae_lens_qk.text import text_sample, token_rows
from sae_lens_qk.training.runner import BilinearQKTrainingRunner

__all__ = [
    "ActivationStatistics",
    "AttentionLayer",
    "AttentionSpec",
    "Attribution",
    "Attributions",
    "BilinearQKConfig",
    "BilinearQKDictionary",
    "BilinearQKRunnerConfig",
    "BilinearQKTrainingRunner",
    "CardConfig",
    "Check",
    "Features",
    "MaskStepConfig",
    "MaskTrainingConfig",
    "RecordedPrompt",
    "SparseFeatureMap",
    "TranscodersTrainingConfig",
    "attribute",
    "check",
    "check_host",
    "collect_activations",
    "compare",
    "evaluate",
    "load_model",
    "model_batches",
    "overview",
    "pretrained_dictionaries",
    "report",
    "rounding_loss",
    "text_sample",
    "token_rows",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Names of version 0.1.0 that work for one more release."""
    if name == "Prompt":
        warnings.warn("qk.Prompt is now qk.RecordedPrompt.", DeprecationWarning, stacklevel=2)
        return RecordedPrompt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
