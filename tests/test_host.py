"""What is read off a model is what the model computes, and what cannot be is refused by name."""

import logging
import math

import jaxtyping
import numpy as np
import pytest
import torch
from comparing import assert_near
from tiny_dictionaries import empty_dictionary
from tiny_models import KINDS, MODES, tiny_hf_model, tiny_model, tiny_tokens
from torch import nn

import sae_lens_qk as qk
from sae_lens_qk.host import proof
from sae_lens_qk.host.layer import (
    AttentionLayer,
    LayerReplay,
    check_attention_call,
    check_mask,
    run_recording,
)
from sae_lens_qk.host.proof import (
    FingerprintError,
    HostMismatchError,
    check_fingerprint,
    check_host,
    prove_once,
)
from sae_lens_qk.host.support import UnsupportedModelError, n_layers

# n_heads, n_kv_heads, d_head, d_model, rotary_dim
SIZES = {"gpt2": (3, 3, 8, 24, 0), "neox": (3, 3, 16, 48, 4), "llama": (4, 2, 6, 20, 6)}
ROTARY_BASE = {"gpt2": 1.0, "neox": 10000.0, "llama": 100.0}
FEATURES = {
    "qk_norm": "QK-norm",
    "softcap": "a softcap on attention scores",
    "sliding_window": "a sliding window",
    "alibi": "ALiBi",
    "scaled_rotary": "scaled rotary embeddings",
    "inert": "a pattern hook that is inert",
}


def plain_spec(**changes) -> qk.AttentionSpec:
    return qk.AttentionSpec(3, 3, d_head=2, d_model=5, scale=1.0, **changes)


# The proof


@pytest.mark.parametrize("layer", [0, 1])
def test_every_supported_model_is_proven(any_model, layer):
    report = check_host(any_model, layer)
    limit = 1e-5 * max(1.0, report.max_score)
    assert max(report.queries, report.keys, report.scores, report.pattern) <= limit
    assert report.max_score > 1, "scores too small to show an error"
    assert report.logit_change > 1e-2


@pytest.mark.parametrize("layer", [0, 1])
def test_proof_holds_on_other_tokens(any_model, layer):
    default_report = check_host(any_model, layer)
    report = check_host(any_model, layer, tiny_tokens(3, 29, seed=1))
    assert report.scores <= 1e-5 * max(1.0, report.max_score)
    assert report.max_score != default_report.max_score, "the tokens given are not used"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_reduced_precision_is_proven_on_a_float32_copy(kind, mode):
    model = tiny_model(kind, mode).to(torch.bfloat16, print_details=False)
    before = AttentionLayer(model, 1).qk_weights
    report = check_host(model, 1)
    errors = (report.queries, report.keys, report.scores, report.pattern)
    assert max(errors) <= 1e-5 * max(1.0, report.max_score)
    after = AttentionLayer(model, 1).qk_weights
    assert torch.equal(before.W_Q, after.W_Q)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    assert dtypes == {torch.bfloat16}, "the model itself was cast"


@pytest.mark.parametrize("mode", ["bridge", "hooked"])
@pytest.mark.parametrize("name", ["queries", "keys", "scores", "pattern"])
def test_a_tampered_model_is_found_out(name, mode):
    model = tiny_model("llama", mode)
    check_host(model, 1)
    hook_name = getattr(AttentionLayer(model, 1).names, name)
    model.add_hook(hook_name, lambda value, hook: value * 1.001)
    with pytest.raises(HostMismatchError, match=f"Rebuilding layer 1: {name} differ"):
        check_host(model, 1)
    check_host(model, 0)


def test_a_wrong_reading_of_the_scale_is_found_out():
    model = tiny_model("neox")
    check_host(model, 1)
    model.blocks[1].attn.original_component.scaling *= 1.001
    hooks = [("blocks.1.attn.hook_attn_scores", lambda scores, hook: scores / 1.001)]
    with model.hooks(fwd_hooks=hooks), pytest.raises(HostMismatchError, match="scores differ"):
        check_host(model, 1)


def test_a_pattern_that_moves_no_logit_is_refused():
    model = tiny_model("llama", "hooked")
    model.blocks[1].attn.W_O.zero_()
    with pytest.raises(UnsupportedModelError, match="does not change the logits"):
        check_host(model, 1)
    check_host(model, 0)


def test_nan_weights_are_no_proof():
    model = tiny_model("gpt2", "hooked")
    model.blocks[1].attn.W_Q[0, 0, 0] = torch.nan
    with pytest.raises(HostMismatchError, match="differ from the model's own by nan"):
        check_host(model, 1)


def test_a_proof_is_remembered_until_the_weights_change(monkeypatch):
    proven_layers = []
    monkeypatch.setattr(proof, "check_host", lambda model, layer: proven_layers.append(layer))
    model = tiny_model("gpt2", "hooked")
    twin = tiny_model("gpt2", "hooked")
    for layer in (1, 1, 0, 1):
        prove_once(AttentionLayer(model, layer))
    assert proven_layers == [1, 0]
    prove_once(AttentionLayer(twin, 1))
    assert proven_layers == [1, 0, 1]
    model.blocks[1].attn.W_K[2, 5, 3] += 0.1
    prove_once(AttentionLayer(model, 1))
    prove_once(AttentionLayer(model, 0))
    assert proven_layers == [1, 0, 1, 1]


def test_a_failed_proof_is_not_remembered():
    model = tiny_model("gpt2")
    layer = AttentionLayer(model, 1)
    model.add_hook(layer.names.queries, lambda value, hook: value * 1.1)
    for _ in range(2):
        with pytest.raises(HostMismatchError):
            prove_once(layer)


# What a layer is read as


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_spec_is_what_the_model_was_built_with(kind, mode):
    layer = AttentionLayer(tiny_model(kind, mode), 1)
    spec = layer.spec
    sizes = (spec.n_heads, spec.n_kv_heads, spec.d_head, spec.d_model, spec.rotary_dim)
    assert sizes == SIZES[kind]
    assert spec.scale == pytest.approx(spec.d_head**-0.5, rel=1e-7)
    n_freq = spec.rotary_dim // 2
    expected = [ROTARY_BASE[kind] ** (-2 * f / spec.rotary_dim) for f in range(n_freq)]
    assert spec.rotary_inv_freq == pytest.approx(expected, rel=1e-6)
    assert spec.is_plain
    assert layer.mode == mode
    assert layer.n_heads == spec.n_heads
    assert n_layers(layer.model) == 2


@pytest.mark.parametrize("mode", ["bridge", "hooked"])
def test_weights_are_those_of_the_hugging_face_layer(mode):
    """q of head h is block h of q_proj's output, whatever the wrapper does on the way."""
    attn = tiny_hf_model("llama").model.layers[1].self_attn
    layer = AttentionLayer(tiny_model("llama", mode), 1)
    qk_weights = layer.qk_weights
    ov_weights = layer.ov_weights
    x = torch.randn(3, 7, 20, generator=torch.Generator().manual_seed(0))
    assert qk_weights.W_Q.shape == (4, 20, 6)
    assert qk_weights.W_K.shape == (2, 20, 6), "grouped keys must not be repeated"
    projections = [
        (qk_weights.queries(x), attn.q_proj),
        (qk_weights.keys(x), attn.k_proj),
        (ov_weights.values(x), attn.v_proj),
    ]
    for vectors, projection in projections:
        expected = projection(x).detach()
        assert_near(vectors.flatten(2), expected)
    assert not qk_weights.W_Q.requires_grad
    assert qk_weights.to(torch.float64).b_K.dtype == torch.float64


def test_fused_projections_with_biases_are_split_by_head():
    attn = tiny_hf_model("neox").gpt_neox.layers[1].attention
    weights = AttentionLayer(tiny_model("neox"), 1).qk_weights
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0))
    # [batch, pos, head, (q, k, v), d_head]
    fused = attn.query_key_value(x).detach().unflatten(-1, (3, 3, 16))
    assert weights.b_Q.abs().max() > 0.05
    assert_near(weights.queries(x), fused[..., 0, :])
    assert_near(weights.keys(x), fused[..., 1, :])


def test_attention_output_is_the_models_own(any_model, tokens):
    """sum_j P v W_O + b_O against the output that the host's own attention adds."""
    layer = AttentionLayer(any_model, 1)
    weights = layer.ov_weights
    name = "blocks.1.hook_attn_out"
    _, values = run_recording(any_model, tokens, [name])
    record = layer.record(tokens)
    output = weights.outputs(record.pattern, weights.values(record.x)) + weights.b_O
    assert_near(output, values[name], 1e-4)


def test_layer_input_is_what_the_weights_multiply(any_model, tokens):
    """Seen from outside check_host: pattern from weights and x, against the model's own."""
    layer = AttentionLayer(any_model, 1)
    record = layer.record(tokens)
    assert torch.equal(record.x, layer.inputs(tokens))
    weights = layer.qk_weights.to(torch.float64)
    x = record.x.double()
    scores = layer.spec.scores(weights.queries(x), weights.keys(x))
    for i in range(tokens.shape[1]):
        expected = scores[:, :, i, : i + 1].softmax(dim=-1)
        row = record.pattern[:, :, i, : i + 1].double()
        assert_near(row, expected)
    other_x = AttentionLayer(any_model, 0).inputs(tokens)
    assert (other_x - record.x).abs().max() > 0.1


@pytest.mark.parametrize("index", [1, np.int64(1), torch.tensor(1)])
def test_layers_take_any_whole_number(llama_bridge, index):
    assert AttentionLayer(llama_bridge, index).index == 1


@pytest.mark.parametrize("index", [-1, 2, 7])
def test_layers_out_of_range_are_refused(gpt2_bridge, index):
    for function in (AttentionLayer, check_host):
        with pytest.raises(ValueError, match=rf"layer must lie in \[0, 1\], got {index}"):
            function(gpt2_bridge, index)


def test_unsupported_models_are_refused_by_the_name_of_the_feature(unsupported_model, request):
    name = request.node.callspec.id.rsplit("-", 1)[0]
    with pytest.raises(UnsupportedModelError, match=f"uses {FEATURES[name]}"):
        check_host(unsupported_model, 1)
    with pytest.raises(UnsupportedModelError, match=FEATURES[name]):
        _ = AttentionLayer(unsupported_model, 0).spec


def test_other_objects_are_no_models(monkeypatch):
    # what users meet outside pytest
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UnsupportedModelError, match=r"Expected a TransformerBridge.*got Linear"):
        check_host(nn.Linear(2, 3), 0)


# Recording and replaying


def test_recording_leaves_the_run_as_it_is(any_model, tokens):
    names = AttentionLayer(any_model, 1).names
    halved = [(names.pattern, lambda pattern, hook: pattern / 2)]
    logits, values = run_recording(any_model, tokens, names)
    assert list(values) == list(names)
    assert torch.equal(logits, any_model(tokens, prepend_bos=False))

    halved_logits, halved_values = run_recording(any_model, tokens, [names.pattern], halved)
    expected = any_model.run_with_hooks(tokens, fwd_hooks=halved, prepend_bos=False)
    assert torch.equal(halved_logits, expected)
    recorded = halved_values[names.pattern]
    assert torch.equal(recorded, values[names.pattern] / 2), "recorded before the hooks given"
    with pytest.raises(UnsupportedModelError, match="never fires"):
        run_recording(any_model, tokens, [names.pattern], stop_at_layer=1)


@pytest.mark.parametrize("index", [0, 1])
def test_replay_from_a_layer_equals_the_whole_pass(any_model, index, tokens):
    layer = AttentionLayer(any_model, index)
    replay = LayerReplay(layer)
    uniform = [(layer.names.pattern, lambda pattern, hook: torch.full_like(pattern, 0.1))]
    for batch in (tokens, tokens[:2, :11]):
        logits, record = replay.record(batch)
        assert replay.exact
        assert record.pattern.shape[0] == len(batch)
        assert_near(replay.run([]), logits)
        expected = any_model.run_with_hooks(batch, fwd_hooks=uniform, prepend_bos=False)
        assert (expected - logits).abs().max() > 1e-3
        assert_near(replay.run(uniform), expected)


def test_replay_falls_back_to_whole_passes(llama_bridge, tokens):
    replay = LayerReplay(AttentionLayer(llama_bridge, 1))
    replay.exact = False
    logits, _ = replay.record(tokens)
    passes = []
    counter = ("blocks.0.hook_in", lambda value, hook: passes.append(hook.name))
    assert_near(replay.run([counter]), logits)
    assert len(passes) == 1, "the layer below did not run again"


# Calls that are refused


@pytest.mark.parametrize(("n_query", "n_key"), [(1, 7), (7, 8), (8, 7), (5, 5)])
def test_patterns_of_other_calls_are_refused(n_query, n_key):
    n_pos = 1 if n_query == 1 else 7
    with pytest.raises(UnsupportedModelError, match=f"{n_query} queries and {n_key} keys"):
        check_attention_call(torch.zeros(2, n_pos, 20), torch.zeros(2, 3, n_query, n_key))
    check_attention_call(torch.zeros(2, 7, 20), torch.zeros(2, 3, 7, 7))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", ["-inf", "smallest"])
def test_only_the_mask_of_the_spec_is_accepted(dtype, fill, window):
    lowest = -torch.inf if fill == "-inf" else torch.finfo(dtype).min
    spec = plain_spec(window=window)
    scores = torch.full((2, 3, 7, 7), -20.0, dtype=dtype)
    masked = scores.masked_fill(~spec.allowed_mask(7), lowest)
    check_mask(masked, spec)
    padded = masked.clone()
    padded[1, :, :, 0] = lowest
    narrower = masked.clone()
    narrower[..., 6, spec.first_keys(7)[6]] = lowest
    for wrong_scores in (padded, narrower, scores):
        with pytest.raises(UnsupportedModelError, match="padded input is not supported"):
            check_mask(wrong_scores, spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["bridge", "hooked"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_reduced_precision_are_recognised(kind, mode, dtype):
    """A float16 bridge masks with -65504."""
    model = tiny_model(kind, mode).to(dtype, print_details=False)
    layer = AttentionLayer(model, 1)
    tokens = tiny_tokens(3, 17)
    scores = layer.record(tokens).scores
    assert scores.dtype == dtype
    check_mask(scores, layer.spec)
    attention_mask = torch.ones_like(tokens)
    attention_mask[1, :3] = 0
    name = layer.names.scores
    _, values = run_recording(model, tokens, [name], attention_mask=attention_mask)
    with pytest.raises(UnsupportedModelError, match="padded input"):
        check_mask(values[name], layer.spec)


# Fingerprints


def fingerprint(kind: str) -> tuple[float, ...]:
    return AttentionLayer(tiny_model(kind), 1).qk_weights.fingerprint()


def compare(
    kind: str,
    model,
    layer: int = 1,
) -> None:
    check_fingerprint(fingerprint(kind), AttentionLayer(model, layer), "layer 1 of tiny")


def test_a_fingerprint_is_both_weights_times_a_fixed_vector():
    weights = AttentionLayer(tiny_model("llama"), 1).qk_weights
    expected = []
    for W in (weights.W_Q, weights.W_K):
        for matrix in W.double().tolist():  # [d_model, d_head]
            for d in range(6):
                product = sum(row[d] * math.sin((m + 1) ** 2) for m, row in enumerate(matrix))
                expected.append(product)
    assert len(expected) == (4 + 2) * 6
    assert weights.fingerprint() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", ["bridge", "hooked"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights_pass_in_silence(kind, mode, caplog):
    with caplog.at_level(logging.DEBUG, logger="sae_lens_qk"):
        compare(kind, tiny_model(kind, mode))
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_weights_leave_a_notice(kind, caplog):
    model = tiny_model(kind)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())
    with caplog.at_level(logging.INFO, logger="sae_lens_qk"):
        compare(kind, model)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "are those of layer 1 of tiny, rounded (relative distance 0.00" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_small_noise_warns_with_the_distance(kind, caplog):
    model = tiny_model(kind)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    with caplog.at_level(logging.INFO, logger="sae_lens_qk"):
        compare(kind, model)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "differ from those of layer 1 of tiny" in caplog.text
    distance = float(caplog.messages[0].split(" by ")[1].split()[0])
    assert 0.02 < distance < 0.1


@pytest.mark.parametrize(
    ("mode", "layer", "seed"),
    [
        ("bridge", 1, 1),
        ("bridge", 0, 0),
        ("bridge_compatibility", 1, 0),
        ("hooked_processed", 1, 0),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_are_refused(kind, mode, layer, seed):
    """Another seed, another layer, LayerNorm folded."""
    message = rf"trained on layer 1 of tiny; layer {layer} of this model \({mode}\)"
    with pytest.raises(FingerprintError, match=message):
        compare(kind, tiny_model(kind, mode, seed), layer)


def test_fingerprints_of_other_sizes_or_nan_are_refused():
    with pytest.raises(FingerprintError, match="relative distance inf"):
        compare("gpt2", tiny_model("llama"))
    broken = tiny_model("gpt2", "hooked")
    broken.blocks[1].attn.W_K[0, 0, 0] = torch.nan
    with pytest.raises(FingerprintError, match="relative distance nan"):
        compare("gpt2", broken)


def test_a_dictionary_meets_only_its_own_model():
    own = tiny_model("llama")
    d = empty_dictionary(own, 29, 31, "jumprelu_transcoder")
    tokens = tiny_tokens(2, 7)
    patched = own.run_with_hooks(tokens, fwd_hooks=d.fwd_hooks(own, "transcoders"))
    assert not torch.equal(patched, own(tokens))
    with pytest.raises(FingerprintError, match=r"trained on layer 1 of tiny \(bridge\)"):
        d.fwd_hooks(tiny_model("llama", seed=1), "transcoders")
    with pytest.raises(FingerprintError, match=r"\(bridge_compatibility\) has other weights"):
        d.fwd_hooks(tiny_model("llama", "bridge_compatibility"), "transcoders")
