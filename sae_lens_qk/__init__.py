"""Why did this attention head attend there? Sparse pairs of query and key features for SAELens.

Importing this package registers its architectures with SAELens.
"""

from sae_lens_qk.statistics.activations import collect_activations
from sae_lens_qk.explain.attribution import attribute
from sae_lens_qk.explain.prompt import Prompt
from sae_lens_qk.attention import AttentionSpec
from sae_lens_qk.config import BilinearQKConfig, BilinearQKRunnerConfig, CardConfig, MaskStepConfig, MaskTrainingConfig, TranscodersTrainingConfig
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.evals import evaluate
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.host.proof import check_host
from sae_lens_qk.host.models import load_model
from sae_lens_qk.pretrained.registry import pretrained_dictionaries
from sae_lens_qk.evals import rounding_loss
from sae_lens_qk.training.runner import BilinearQKTrainingRunner

__all__ = [
    "AttentionSpec",
    "BilinearQKConfig",
    "BilinearQKDictionary",
    "BilinearQKRunnerConfig",
    "BilinearQKTrainingRunner",
    "CardConfig",
    "MaskStepConfig",
    "MaskTrainingConfig",
    "Prompt",
    "SparseFeatureMap",
    "TranscodersTrainingConfig",
    "attribute",
    "check_host",
    "collect_activations",
    "evaluate",
    "load_model",
    "pretrained_dictionaries",
    "rounding_loss",
]
__version__ = "0.1.0"
