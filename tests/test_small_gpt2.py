"""GPT-2's architecture with trained weights: `gpt2-3m` and its dictionary, both shipped."""

import math

import pytest
import torch
import yaml
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import sae_lens_qk as qk
from sae_lens_qk.host.layer import AttentionLayer, run_recording
from sae_lens_qk.host.proof import FingerprintError
from sae_lens_qk.pretrained.registry import recipe_file
from sae_lens_qk.text import text_sample, token_rows

NAME = "gpt2-3m-L2"
MODEL = "gpt2-3m"
LAYER = 2


@pytest.fixture(scope="module")
def dictionary() -> qk.BilinearQKDictionary:
    return qk.BilinearQKDictionary.from_pretrained(NAME, verify="strict").requires_grad_(False)


@pytest.fixture(scope="module")
def model(dictionary) -> TransformerBridge:
    return qk.load_model(dictionary)


@pytest.fixture(scope="module")
def tokens(model) -> Tensor:
    """Text of another model, which neither of the two was trained on."""
    return token_rows(model, "", "text", 8, 256)


def test_the_model_has_learned(model, tokens):
    with torch.no_grad():
        loss = float(model(tokens, return_type="loss"))
    assert loss < 0.65 * math.log(model.cfg.d_vocab)


@pytest.mark.parametrize("compatibility", [False, True])
def test_the_host_is_rebuilt(compatibility):
    model = qk.load_model(MODEL, compatibility_mode=compatibility)
    for layer in range(4):
        report = qk.check_host(model, layer)
        limit = 1e-5 * max(1.0, report.max_score)
        assert report.queries <= limit
        assert report.keys <= limit
        assert report.scores <= limit
        assert report.pattern <= limit
    spec = AttentionLayer(model, LAYER).spec
    assert (spec.n_heads, spec.n_kv_heads) == (6, 6)
    assert (spec.d_head, spec.d_model, spec.rotary_dim) == (32, 192, 0)


def test_the_dictionary_refuses_folded_weights(dictionary):
    with pytest.raises(FingerprintError):
        dictionary.fwd_hooks(qk.load_model(MODEL, compatibility_mode=True))


def test_the_dictionary_carries_the_attention(dictionary, model, tokens):
    result = qk.evaluate(dictionary, model, tokens)
    kl = {
        name: source.pattern_kl.value for name, source in result.sources.items() if name != "zero"
    }
    recovered = {name: source.logit_kl_recovered.value for name, source in result.sources.items()}
    assert kl["transcoders"] < 0.1 * kl["uniform"]
    assert kl["feature_map"] < 0.2 * kl["uniform"]
    assert recovered["feature_map"] > 0.8 > recovered["mean"]
    assert result.features.l0_query < 20
    assert result.features.l0_key < 20


def test_terms_add_up_to_the_models_score(dictionary, model, tokens):
    prompt = tokens[:1, :40]
    a = qk.attribute(
        dictionary,
        model,
        prompt,
        head=2,
        query_pos=-1,
        key_pos=-2,
    )
    record = AttentionLayer(model, LAYER).record(prompt)
    score = float(record.scores[0, 2, -1, -2])
    assert float(a.to_frame()["contribution"].sum()) == pytest.approx(score, abs=1e-4)


def test_without_the_pairs_of_a_head_it_attends_elsewhere(dictionary, model, tokens):
    frame = dictionary.pair_frame().query("head == 2")
    pairs = frame[["query_feature", "key_feature", "head"]].to_numpy()
    name = AttentionLayer(model, LAYER).names.pattern
    hooks = dictionary.fwd_hooks(model, source="model", ablate_pairs=pairs)
    _, clean = run_recording(model, tokens[:2], [name])
    _, removed = run_recording(model, tokens[:2], [name], hooks)
    change = (removed[name] - clean[name]).abs().sum(dim=-1).mean(dim=(0, 2))  # [head]
    assert change[2] > 0.3
    assert change[[0, 1, 3, 4, 5]].max() < 1e-5


@pytest.mark.slow
def test_the_recipe_trains_it_further(tmp_path, model):
    """A few steps of each kind on the sample text, settings as in the recipe."""
    recipe = yaml.safe_load(recipe_file(NAME).read_text())
    short = {
        "dataset_path": "",
        "training_tokens": 4 * 2048,
        "input_cache_path": None,
        "input_cache_tokens": None,
    }
    folders = {"checkpoint_path": None, "output_path": str(tmp_path / "output")}
    mask = recipe["mask"] | {"training_tokens": 4 * 2048, "ranking_tokens": 2048}
    cfg = qk.BilinearQKRunnerConfig.from_dict(recipe | short | folders | {"mask": mask})
    runner = qk.BilinearQKTrainingRunner(cfg, override_model=model, override_dataset=text_sample())
    trained = runner.run()
    assert trained.cfg.model_name == MODEL
    assert trained.cfg.layer == LAYER
    assert trained.cfg.original_sizes == (768, 768)
    x = AttentionLayer(model, LAYER).inputs(token_rows(model, "", "text", 2, 256))
    assert trained.pattern(x, source="feature_map").isfinite().all()
    with trained.patched(model, source="feature_map"):
        assert model(model.to_tokens("It was a")).isfinite().all()
