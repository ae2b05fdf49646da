"""What is read off a model is what the model computes, and what cannot be computed is refused by name."""

import logging
import math

import jaxtyping
import pytest
import torch
from tiny_models import KINDS, MODES, tiny_hf_model, tiny_model, tiny_tokens
from torch import nn

import sae_lens_qk as qk
from sae_lens_qk import host
from sae_lens_qk.attention import allowed_keys, attention_scores
from sae_lens_qk.host.proof import FingerprintError, HostMismatchError, check_fingerprint, check_host, prove_once
from sae_lens_qk.host.layer import LayerReplay, attention_spec, check_allowed_keys, check_attention_call, hook_names, input_completion, layer_inputs, qk_weights, run_recording
from sae_lens_qk.host.support import UnsupportedModelError, model_mode, n_layers

# n_heads, n_kv_heads, d_head, d_model, rotary_dim
SIZES = {"gpt2": (3, 3, 8, 24, 0), "neox": (3, 3, 16, 48, 4), "llama": (4, 2, 6, 20, 6)}
ROTARY_BASE = {"neox": 10000.0, "llama": 100.0}
FEATURES = {
    "qk_norm": "QK-norm",
    "softcap": "a softcap on attention scores",
    "sliding_window": "a sliding window",
    "alibi": "ALiBi",
    "scaled_rotary": "scaled rotary embeddings",
    "inert": "a pattern hook that is inert",
}


def dictionary_for(model, layer: int = 1) -> qk.BilinearQKDictionary:
    """A dictionary with random weights that belongs to this model."""
    spec = attention_spec(model, layer)
    cfg = qk.BilinearQKConfig(
        d_in=spec.d_model,
        d_query=29,
        d_key=31,
        attention=spec.to_dict(),
        model_name="tiny",
        layer=layer,
        model_mode=model_mode(model),
        fingerprint=list(qk_weights(model, layer).fingerprint()),
    )
    return qk.BilinearQKDictionary(cfg)


@pytest.mark.parametrize("layer", [0, 1])
def test_every_supported_model_is_proven(any_model, layer):
    report = check_host(any_model, layer)
    limit = 1e-5 * max(1.0, report.max_score)
    assert max(report.queries, report.keys, report.scores, report.pattern) <= limit
    assert report.max_score > 1, "scores too small to show an error"
    assert report.logit_change > 1e-2


@pytest.mark.parametrize("layer", [0, 1])
def test_proof_holds_on_other_tokens(any_model, layer):
    tokens = tiny_tokens(3, 29, seed=1)
    report = check_host(any_model, layer, tokens)
    assert report.scores <= 1e-5 * max(1.0, report.max_score)
    assert report.max_score != check_host(any_model, layer).max_score, (
        "the tokens given are not used"
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_spec_is_what_the_model_was_built_with(kind, mode):
    model = tiny_model(kind, mode)
    spec = attention_spec(model, 1)
    assert (spec.n_heads, spec.n_kv_heads, spec.d_head, spec.d_model, spec.rotary_dim) == SIZES[
        kind
    ]
    assert spec.scale == pytest.approx(spec.d_head**-0.5, rel=1e-7)
    expected = [
        ROTARY_BASE.get(kind, 1.0) ** (-2 * f / spec.rotary_dim)
        for f in range(spec.rotary_dim // 2)
    ]
    assert spec.rotary_inv_freq == pytest.approx(expected, rel=1e-6)
    assert model_mode(model) == mode
    assert n_layers(model) == 2


@pytest.mark.parametrize("mode", ["bridge", "hooked"])
def test_weights_are_those_of_the_hugging_face_layer(mode):
    """q of head h is block h of q_proj's output, whatever the wrapper does on the way."""
    attn = tiny_hf_model("llama").model.layers[1].self_attn
    weights = qk_weights(tiny_model("llama", mode), 1)
    x = torch.randn(3, 7, 20, generator=torch.Generator().manual_seed(0))
    assert weights.W_Q.shape == (4, 20, 6)
    assert weights.W_K.shape == (2, 20, 6), "grouped keys must not be repeated"
    torch.testing.assert_close(
        weights.queries(x).flatten(2), attn.q_proj(x).detach(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        weights.keys(x).flatten(2), attn.k_proj(x).detach(), rtol=0, atol=1e-5
    )
    assert not weights.W_Q.requires_grad
    assert weights.to(torch.float64).b_K.dtype == torch.float64


def test_fused_projections_with_biases_are_split_by_head():
    attn = tiny_hf_model("neox").gpt_neox.layers[1].attention
    weights = qk_weights(tiny_model("neox"), 1)
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0))
    fused = attn.query_key_value(x).detach().unflatten(-1, (3, 3, 16))  # head, (q, k, v), d_head
    assert weights.b_Q.abs().max() > 0.05
    torch.testing.assert_close(weights.queries(x), fused[..., 0, :], rtol=0, atol=1e-5)
    torch.testing.assert_close(weights.keys(x), fused[..., 1, :], rtol=0, atol=1e-5)


def test_layer_input_is_what_the_weights_multiply(any_model, tokens):
    """Seen from outside check_host: pattern from weights and the completed input, against the model's own."""
    names = hook_names(any_model, 1)
    _, seen = run_recording(any_model, tokens, [names.input, names.pattern])
    x = layer_inputs(any_model, 1, tokens)
    assert torch.equal(x, input_completion(any_model, 1)(seen[names.input]))
    weights, x = qk_weights(any_model, 1).to(torch.float64), x.double()
    scores = attention_scores(weights.queries(x), weights.keys(x), attention_spec(any_model, 1))
    expected = scores.masked_fill(~allowed_keys(17), -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(seen[names.pattern].double(), expected, rtol=0, atol=1e-5)
    assert (layer_inputs(any_model, 0, tokens) - x).abs().max() > 0.1


def test_recording_leaves_the_run_as_it_is(any_model, tokens):
    names = hook_names(any_model, 1)
    halved = [(names.pattern, lambda pattern, hook: pattern / 2)]
    clean, seen = run_recording(any_model, tokens, names)
    assert list(seen) == list(names)
    assert torch.equal(clean, any_model(tokens, prepend_bos=False))
    logits, seen_after = run_recording(any_model, tokens, [names.pattern], halved)
    assert torch.equal(
        logits, any_model.run_with_hooks(tokens, fwd_hooks=halved, prepend_bos=False)
    )
    assert torch.equal(seen_after[names.pattern], seen[names.pattern] / 2), (
        "recorded before the hooks given"
    )
    with pytest.raises(UnsupportedModelError, match=f"The hook {names.pattern} never fires"):
        run_recording(any_model, tokens, [names.pattern], stop_at_layer=1)


def test_unsupported_models_are_refused_by_the_name_of_the_feature(unsupported_model, request):
    name = request.node.callspec.id.rsplit("-", 1)[0]
    with pytest.raises(UnsupportedModelError, match=f"Layer 1 of this model uses {FEATURES[name]}"):
        check_host(unsupported_model, 1)
    with pytest.raises(UnsupportedModelError, match=FEATURES[name]):
        attention_spec(unsupported_model, 0)


@pytest.mark.parametrize("layer", [-1, 2, 7])
@pytest.mark.parametrize(
    "function", [attention_spec, qk_weights, hook_names, check_host, prove_once]
)
def test_layers_out_of_range_are_refused(gpt2_bridge, function, layer):
    with pytest.raises(ValueError, match=rf"layer must lie in \[0, 1\], got {layer}"):
        function(gpt2_bridge, layer)


def test_other_objects_are_no_models(monkeypatch):
    monkeypatch.setattr(
        jaxtyping.config, "jaxtyping_disable", True
    )  # what users meet outside pytest
    with pytest.raises(
        UnsupportedModelError,
        match=r"Expected a TransformerBridge or a HookedTransformer, got Linear.*load_model",
    ):
        check_host(nn.Linear(2, 3), 0)


@pytest.mark.parametrize("mode", ["bridge", "hooked"])
@pytest.mark.parametrize("what", ["queries", "keys", "scores", "pattern"])
def test_a_tampered_model_is_found_out(what, mode):
    model = tiny_model("llama", mode)
    check_host(model, 1)
    name = getattr(hook_names(model, 1), what)
    model.add_hook(name, lambda value, hook: value * 1.001)
    with pytest.raises(
        HostMismatchError,
        match=f"Rebuilding layer 1: {what} differ from the model's own by .*more than",
    ):
        check_host(model, 1)
    check_host(model, 0)


def test_a_wrong_reading_of_the_scale_is_found_out(monkeypatch):
    model = tiny_model("neox")
    spec = attention_spec(model, 1)
    wrong = qk.AttentionSpec.from_dict({**spec.to_dict(), "scale": spec.scale * 1.001})
    monkeypatch.setattr(host, "attention_spec", lambda model, layer: wrong)
    with pytest.raises(HostMismatchError, match="scores differ"):
        check_host(model, 1)


def test_a_pattern_that_moves_no_logit_is_refused():
    model = tiny_model("llama", "hooked")
    model.blocks[1].attn.W_O.zero_()
    with pytest.raises(
        UnsupportedModelError,
        match=r"Overwriting blocks.1.attn.hook_pattern does not change the logits",
    ):
        check_host(model, 1)
    check_host(model, 0)


def test_nan_weights_are_no_proof():
    model = tiny_model("gpt2", "hooked")
    model.blocks[1].attn.W_Q[0, 0, 0] = torch.nan
    with pytest.raises(HostMismatchError, match="differ from the model's own by nan"):
        check_host(model, 1)


def test_a_proof_is_remembered_until_the_weights_change(monkeypatch):
    calls = []
    monkeypatch.setattr(host, "check_host", lambda model, layer: calls.append(layer))
    model, twin = tiny_model("gpt2", "hooked"), tiny_model("gpt2", "hooked")
    for layer in (1, 1, 0, 1):
        prove_once(model, layer)
    assert calls == [1, 0]
    prove_once(twin, 1)
    assert calls == [1, 0, 1]
    model.blocks[1].attn.W_K[2, 5, 3] += 0.1
    prove_once(model, 1)
    prove_once(model, 0)
    assert calls == [1, 0, 1, 1]


def test_a_failed_proof_is_not_remembered():
    model = tiny_model("gpt2")
    model.add_hook(hook_names(model, 1).queries, lambda value, hook: value * 1.1)
    for _ in range(2):
        with pytest.raises(HostMismatchError):
            prove_once(model, 1)


@pytest.mark.parametrize(("n_query", "n_key"), [(1, 7), (7, 8), (8, 7), (5, 5)])
def test_patterns_of_other_calls_are_refused(n_query, n_key):
    x = torch.zeros(2, 1 if n_query == 1 else 7, 20)
    with pytest.raises(
        UnsupportedModelError, match=f"{n_query} queries and {n_key} keys.*use_past_kv_cache=False"
    ):
        check_attention_call(x, torch.zeros(2, 3, n_query, n_key))
    check_attention_call(torch.zeros(2, 7, 20), torch.zeros(2, 3, 7, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", ["-inf", "smallest"])
def test_only_the_causal_mask_is_accepted(dtype, fill):
    lowest = -torch.inf if fill == "-inf" else torch.finfo(dtype).min
    causal = torch.full((2, 3, 7, 7), -20.0, dtype=dtype).masked_fill(~allowed_keys(7), lowest)
    check_allowed_keys(causal)
    padded = causal.clone()
    padded[1, :, :, 0] = lowest
    windowed = causal.clone()
    windowed[..., 6, 0] = lowest
    unmasked = torch.full((2, 3, 7, 7), -20.0, dtype=dtype)
    for scores in (padded, windowed, unmasked):
        with pytest.raises(
            UnsupportedModelError,
            match="masks more than future keys: padded input is not supported",
        ):
            check_allowed_keys(scores)


def test_padded_input_is_refused_by_the_hooks(any_model, tokens):
    hooks = dictionary_for(any_model).fwd_hooks(any_model, "transcoders")
    patched = any_model.run_with_hooks(tokens, fwd_hooks=hooks, prepend_bos=False)
    everything = torch.ones_like(tokens)
    full = any_model.run_with_hooks(
        tokens, fwd_hooks=hooks, attention_mask=everything, prepend_bos=False
    )
    torch.testing.assert_close(full, patched, rtol=0, atol=1e-4)
    left_padded = everything.clone()
    left_padded[1, :3] = 0
    with pytest.raises(UnsupportedModelError, match="padded input is not supported"):
        any_model.run_with_hooks(
            tokens, fwd_hooks=hooks, attention_mask=left_padded, prepend_bos=False
        )


def test_cached_generation_is_refused_and_uncached_works(any_model):
    prompt = tiny_tokens(2, 5)
    options = dict(
        max_new_tokens=2, do_sample=False, prepend_bos=False, stop_at_eos=False, verbose=False
    )
    with dictionary_for(any_model).patched(any_model, source="transcoders"):
        with pytest.raises(
            UnsupportedModelError,
            match="1 queries and 6 keys for 1 positions: generation with a KV cache",
        ):
            any_model.generate(prompt, use_past_kv_cache=True, return_type="tokens", **options)
        made = any_model.generate(prompt, use_past_kv_cache=False, return_type="tokens", **options)
    assert made.shape == (2, 7)
    assert torch.equal(made[:, :5], prompt)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_reduced_precision_is_proven_on_a_float32_copy(kind, mode):
    dtype = torch.bfloat16
    model = tiny_model(kind, mode).to(dtype, print_details=False)
    before = qk_weights(model, 1)
    report = check_host(model, 1)
    assert max(report.queries, report.keys, report.scores, report.pattern) <= 1e-5 * max(
        1.0, report.max_score
    )
    after = qk_weights(model, 1)
    assert before.W_Q.dtype == after.W_Q.dtype == dtype, "the model itself was cast"
    assert torch.equal(before.W_Q, after.W_Q)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["bridge", "hooked"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_reduced_precision_are_recognised(kind, mode, dtype):
    """A float16 bridge masks with -65504."""
    model = tiny_model(kind, mode).to(dtype, print_details=False)
    tokens = tiny_tokens(3, 17)
    name = hook_names(model, 1).scores
    scores = run_recording(model, tokens, [name])[1][name]
    assert scores.dtype == dtype
    check_allowed_keys(scores)
    padded = torch.ones_like(tokens)
    padded[1, :3] = 0
    with pytest.raises(UnsupportedModelError, match="padded input"):
        check_allowed_keys(run_recording(model, tokens, [name], attention_mask=padded)[1][name])


def fingerprint(kind: str) -> tuple[float, ...]:
    return qk_weights(tiny_model(kind), 1).fingerprint()


def test_a_fingerprint_is_both_weights_times_a_fixed_vector():
    model = tiny_model("llama")
    expected = []
    for W in (qk_weights(model, 1).W_Q, qk_weights(model, 1).W_K):
        for head in W.double().tolist():
            expected += [
                sum(row[d] * math.sin((m + 1) ** 2) for m, row in enumerate(head)) for d in range(6)
            ]
    found = qk_weights(model, 1).fingerprint()
    assert len(found) == (4 + 2) * 6
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", ["bridge", "hooked"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights_pass_in_silence(kind, mode, caplog):
    with caplog.at_level(logging.DEBUG, logger="sae_lens_qk"):
        check_fingerprint(fingerprint(kind), tiny_model(kind, mode), 1, "layer 1 of tiny")
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_weights_leave_a_notice(kind, caplog):
    model = tiny_model(kind)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())
    with caplog.at_level(logging.INFO, logger="sae_lens_qk"):
        check_fingerprint(fingerprint(kind), model, 1, "layer 1 of tiny")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "are those of layer 1 of tiny, rounded (relative distance 0.00" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_small_noise_warns_with_the_distance(kind, caplog):
    model = tiny_model(kind)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    with caplog.at_level(logging.INFO, logger="sae_lens_qk"):
        check_fingerprint(fingerprint(kind), model, 1, "layer 1 of tiny")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    distance = float(caplog.messages[0].split(" by ")[1].split()[0])
    assert 0.02 < distance < 0.1
    assert "differ from those of layer 1 of tiny" in caplog.text


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
    model = tiny_model(kind, mode, seed)
    expected = fingerprint(kind)
    message = rf"trained on layer 1 of tiny; layer {layer} of this model \({mode}\) has other weights .*load_model"
    with pytest.raises(FingerprintError, match=message):
        check_fingerprint(expected, model, layer, "layer 1 of tiny")


def test_fingerprints_of_other_sizes_or_nan_are_refused():
    with pytest.raises(FingerprintError, match="relative distance inf"):
        check_fingerprint(fingerprint("gpt2"), tiny_model("llama"), 1, "layer 1 of tiny")
    broken = tiny_model("gpt2", "hooked")
    broken.blocks[1].attn.W_K[0, 0, 0] = torch.nan
    with pytest.raises(FingerprintError, match="relative distance nan"):
        check_fingerprint(fingerprint("gpt2"), broken, 1, "layer 1 of tiny")


def test_a_dictionary_meets_only_its_own_model():
    d = dictionary_for(tiny_model("llama"))
    tokens = tiny_tokens(2, 7)
    own = tiny_model("llama")
    assert not torch.equal(
        own.run_with_hooks(tokens, fwd_hooks=d.fwd_hooks(own, "transcoders")), own(tokens)
    )
    with pytest.raises(FingerprintError, match=r"trained on layer 1 of tiny \(bridge\)"):
        d.fwd_hooks(tiny_model("llama", seed=1), "transcoders")
    with pytest.raises(FingerprintError, match=r"\(bridge_compatibility\) has other weights"):
        d.fwd_hooks(tiny_model("llama", "bridge_compatibility"), "transcoders")


@pytest.mark.parametrize("layer", [0, 1])
def test_replay_from_a_layer_equals_the_whole_pass(any_model, layer, tokens):
    replay, name = LayerReplay(any_model, layer), hook_names(any_model, layer).pattern
    for batch in (tokens, tokens[:2, :11]):
        logits, seen = replay.record(batch, [name])
        uniform = [(name, lambda pattern, hook: torch.full_like(pattern, 0.1))]
        assert replay.exact
        assert seen[name].shape[0] == len(batch)
        torch.testing.assert_close(replay.run([]), logits, rtol=0, atol=1e-5)
        expected = any_model.run_with_hooks(batch, fwd_hooks=uniform, prepend_bos=False)
        assert (expected - logits).abs().max() > 1e-3
        torch.testing.assert_close(replay.run(uniform), expected, rtol=0, atol=1e-5)


def test_replay_falls_back_to_whole_passes(llama_bridge, tokens):
    replay, name = LayerReplay(llama_bridge, 1), hook_names(llama_bridge, 1).pattern
    logits, _ = replay.record(tokens, [name])
    replay.exact, replay._call = False, ((), {})
    torch.testing.assert_close(replay.run([]), logits, rtol=0, atol=1e-5)
