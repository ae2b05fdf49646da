"""What a layer reads from and writes to the residual stream, norms and unembedding."""

import pytest
import torch
from comparing import assert_near
from tiny_models import KINDS, MODES, tiny_hf_model, tiny_model, tiny_tokens

from sae_lens_qk.host.layer import AttentionLayer, LayerReplay, run_recording
from sae_lens_qk.host.residual import (
    attention_input,
    logit_directions,
    residual_names,
    unembedded,
)

FINAL_NORM = {
    "gpt2": "transformer.ln_f",
    "neox": "gpt_neox.final_layer_norm",
    "llama": "model.norm",
}


def test_values_and_outputs_are_the_models_own(any_model):
    """z from pattern and W_V, and what layer 1 adds to the residual stream from z and W_O."""
    tokens = tiny_tokens(3, 7)
    layer = AttentionLayer(any_model, 1)
    names = residual_names(layer)
    x = layer.inputs(tokens)
    logits, values = run_recording(any_model, tokens, [*names, layer.names.pattern])
    weights = layer.ov_weights
    spec = layer.spec
    assert len(weights.W_V) == len(weights.b_V) == spec.n_kv_heads, "values must not be repeated"
    v = torch.einsum("npm,gmd->npgd", x, weights.W_V) + weights.b_V
    v = v.repeat_interleave(spec.heads_per_kv, dim=2)
    z = torch.einsum("nhij,njhd->nihd", values[layer.names.pattern], v)
    assert_near(values[names.z], z)
    output = torch.einsum("nihd,hdm->nim", z, weights.W_O) + weights.b_O
    assert output.abs().max() > 0.1
    final = values[names.resid_pre] + output + values[names.mlp_out]
    assert_near(unembedded(any_model, final), logits, 1e-4)
    assert_near(attention_input(layer, values[names.resid_pre]), x)
    assert not weights.W_O.requires_grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_logit_directions_by_the_formula_of_the_norm(kind, mode):
    """d/dr of <(r - mean) gain / scale, W_U difference>, from the Hugging Face model's weights."""
    hf_model = tiny_hf_model(kind)
    norm = hf_model.get_submodule(FINAL_NORM[kind])
    W_U = hf_model.get_output_embeddings().weight.detach().double()
    residual = torch.randn(3, len(norm.weight), generator=torch.Generator().manual_seed(0))
    plus = torch.tensor([5, 17, 90])
    minus = torch.tensor([41, 2, 89])
    actual = logit_directions(tiny_model(kind, mode), residual, plus, minus)
    difference = W_U[plus] - W_U[minus]
    direction = difference * norm.weight.detach().double()
    r = residual.double()
    bias = torch.zeros(r.shape[1], dtype=torch.float64)
    if kind != "llama":  # RMSNorm neither centres nor has a bias
        bias = norm.bias.detach().double()
        r = r - r.mean(dim=1, keepdim=True)
        direction = direction - direction.mean(dim=1, keepdim=True)
    direction = direction / (r.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    assert_near(actual.directions.double(), direction, 1e-4)
    assert_near(actual.constants.double(), difference @ bias, 1e-4)


@pytest.mark.parametrize(("exact", "positions"), [(True, slice(-1, None)), (False, slice(2, 5))])
def test_replay_at_some_positions(any_model, exact, positions):
    """Of the upper layers alone, and of full passes where those are not exact."""
    tokens = tiny_tokens(3, 7)
    replay = LayerReplay(AttentionLayer(any_model, 1))
    logits, _ = replay.record(tokens)
    replay.exact = exact and replay.exact
    assert_near(replay.run([], positions), logits[:, positions])
