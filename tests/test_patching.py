"""Patched models against patterns written by hand, and nothing left behind."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from comparing import assert_near
from tiny_dictionaries import (
    D_KEY,
    D_QUERY,
    LAYER,
    inputs_and_scores,
    observe,
    pair_weights,
    pattern_by_hand,
    scores_by_hand,
    tiny_dictionary,
)
from tiny_models import KINDS, tiny_model

from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.host.proof import FingerprintError
from sae_lens_qk.host.support import UnsupportedModelError

PATTERN = f"blocks.{LAYER}.attn.hook_pattern"
SOURCES = ("transcoders", "feature_map")


@pytest.fixture(scope="session")
def dictionary(any_model):
    """A random dictionary of `any_model`."""
    return tiny_dictionary(any_model)


@pytest.fixture(scope="module")
def llama_dictionary(llama_bridge):
    return tiny_dictionary(llama_bridge)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def logits_of(model, tokens, hooks=()):
    return observe(model, tokens, hooks)[0]


def pattern_of(model, tokens, hooks=()):
    return observe(model, tokens, hooks, (PATTERN,))[1][PATTERN]


def n_hooks(model) -> int:
    """Number of hooks on all hook points of the model."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    return sum(
        len(point.fwd_hooks) + len(point.bwd_hooks) + len(point._forward_hooks) for point in points
    )


def largest(tensor) -> float:
    return float(tensor.abs().max())


# The whole pattern


def test_the_true_queries_and_keys_change_nothing(any_model, tokens):
    layer = AttentionLayer(any_model, LAYER)
    weights = layer.qk_weights
    spec = layer.spec
    shapes = []

    def true_pattern(x, scores):
        shapes.append(x.shape)
        return spec.pattern(spec.scores(weights.queries(x), weights.keys(x)))

    clean = logits_of(any_model, tokens)
    patched = logits_of(any_model, tokens, layer.pattern_hooks(true_pattern))
    assert largest(patched - clean) <= 1e-6 * max(1.0, largest(clean))
    assert shapes == [(*tokens.shape, spec.d_model)]


@pytest.mark.parametrize("source", SOURCES)
def test_patched_equals_a_hand_written_patch(any_model, dictionary, tokens, source):
    x, _ = inputs_and_scores(any_model, tokens)
    pattern = dictionary.pattern(x, source)
    expected = logits_of(any_model, tokens, [(PATTERN, lambda _, hook: pattern)])
    clean = logits_of(any_model, tokens)
    with dictionary.patched(any_model, source=source) as model:
        assert model is any_model
        patched = any_model(tokens)
    assert_near(patched, expected)
    assert largest(patched - clean) > 0.01

    hooks = dictionary.fwd_hooks(any_model, source)
    for name, _ in hooks:
        assert any_model.hook_dict[name].name == name
    assert torch.equal(logits_of(any_model, tokens, hooks), patched)


def test_patches_of_the_two_sources_differ(any_model, dictionary, tokens):
    transcoders = logits_of(any_model, tokens, dictionary.fwd_hooks(any_model, "transcoders"))
    feature_map = logits_of(any_model, tokens, dictionary.fwd_hooks(any_model, "feature_map"))
    assert largest(transcoders - feature_map) > 0.01


@pytest.mark.parametrize("heads", [[2, 0], np.array([2, 0]), torch.tensor([0, 2]), (0, 2)])
@pytest.mark.parametrize("source", SOURCES)
def test_only_the_named_heads_are_replaced(llama_bridge, llama_dictionary, tokens, source, heads):
    x, _ = inputs_and_scores(llama_bridge, tokens)
    own = pattern_of(llama_bridge, tokens)
    hooks = llama_dictionary.fwd_hooks(llama_bridge, source, heads=heads)
    patched = pattern_of(llama_bridge, tokens, hooks)
    rebuilt = llama_dictionary.pattern(x, source)
    assert torch.equal(patched[:, [1, 3]], own[:, [1, 3]])
    assert_near(patched[:, [0, 2]], rebuilt[:, [0, 2]], 1e-6)
    for head in (0, 2):
        assert largest((patched - own)[:, head]) > 0.01


# Nothing stays behind


def test_leaving_the_context_restores_the_model(any_model, dictionary, tokens):
    before = any_model(tokens)
    n_before = n_hooks(any_model)
    for _ in range(3):
        with dictionary.patched(any_model):
            assert n_hooks(any_model) > n_before
            assert not torch.equal(any_model(tokens), before)
        assert torch.equal(any_model(tokens), before)

    with pytest.raises(KeyError, match="from the body"), dictionary.patched(any_model):  # noqa: PT012
        any_model(tokens)
        raise KeyError("from the body")
    assert torch.equal(any_model(tokens), before)
    assert n_hooks(any_model) == n_before


def test_the_inner_of_two_contexts_counts_and_the_outer_survives_it(any_model, dictionary, tokens):
    before = any_model(tokens)
    n_before = n_hooks(any_model)
    transcoders = logits_of(any_model, tokens, dictionary.fwd_hooks(any_model, "transcoders"))
    feature_map = logits_of(any_model, tokens, dictionary.fwd_hooks(any_model, "feature_map"))
    with dictionary.patched(any_model, source="transcoders"):
        with dictionary.patched(any_model, source="feature_map"):
            assert torch.equal(any_model(tokens), feature_map)
        assert torch.equal(any_model(tokens), transcoders)
        cached, _ = any_model.run_with_cache(tokens)
        assert torch.equal(cached, transcoders)
        assert torch.equal(logits_of(any_model, tokens), transcoders)
        assert torch.equal(any_model(tokens), transcoders)
    assert torch.equal(any_model(tokens), before)
    assert n_hooks(any_model) == n_before


@pytest.mark.parametrize("mode", ["bridge", "bridge_compatibility", "hooked_processed"])
def test_the_users_own_hooks_survive(mode, tokens):
    model = tiny_model("gpt2", mode)
    d = tiny_dictionary(model)
    names = AttentionLayer(model, LAYER).names
    calls: list[str] = []
    for name in (names.input, names.scores, names.pattern, "blocks.0.attn.hook_pattern"):
        model.add_hook(name, lambda value, hook, name=name: calls.append(name))
    model.add_hook("blocks.0.attn.hook_z", lambda value, hook: 0.5 * value, is_permanent=True)
    before = model(tokens)
    expected = sorted(calls)
    assert len(set(expected)) == 4

    with d.patched(model):
        calls.clear()  # entering proves the host, in calls of its own
        assert not torch.equal(model(tokens), before)
    assert sorted(calls) == expected
    with pytest.raises(KeyError), d.patched(model):
        raise KeyError
    logits_of(model, tokens, d.fwd_hooks(model))
    calls.clear()
    assert torch.equal(model(tokens), before)
    assert sorted(calls) == expected
    model.reset_hooks(including_permanent=True)
    assert largest(model(tokens) - before) > 1e-3


# Edited pairs


def scores_before_edits(source, d, x, own_scores):
    """Scores of a source, and the weight that each kept pair's term has in them."""
    weights = pair_weights(d)
    if source == "feature_map":
        return scores_by_hand(d, x, weights), weights
    unit_weights = dict.fromkeys(weights, 1.0)
    if source == "model":
        return own_scores.double(), unit_weights
    return d.spec.scores(*d.reconstruct(x)).double(), unit_weights


def edits_and_factors(d):
    """Arguments of `fwd_hooks`, and the factor that they give to each edited pair."""
    pairs = list(pair_weights(d))
    ablated = pairs[:30]
    scaled = {pair: 3.0 * i / 30 - 1.0 for i, pair in enumerate(pairs[30:60])}
    zeros = dict.fromkeys(ablated, 0.0)
    return [
        ({"ablate_pairs": ablated}, zeros),
        ({"ablate_pairs": torch.tensor(ablated)}, zeros),
        ({"scale_pairs": scaled}, scaled),
        ({"ablate_pairs": ablated, "scale_pairs": scaled}, {**zeros, **scaled}),
    ]


@pytest.mark.parametrize("source", [*SOURCES, "model"])
def test_edited_pairs_against_a_loop(any_model, dictionary, tokens, source):
    d = dictionary
    edited = list(pair_weights(d))[:60]
    kinds = {(a == D_QUERY, b == D_KEY) for a, b, _ in edited}
    assert kinds == {(False, False), (True, False), (False, True)}
    x, own_scores = inputs_and_scores(any_model, tokens)
    scores, weights = scores_before_edits(source, d, x, own_scores)
    unedited = pattern_by_hand(scores)
    for edit, factors in edits_and_factors(d):
        changes = {pair: (factor - 1) * weights[pair] for pair, factor in factors.items()}
        terms = scores_by_hand(d, x, changes, include_constant=False)
        expected = pattern_by_hand(scores + terms)
        assert largest(expected - unedited) > 0.01
        pattern = pattern_of(any_model, tokens, d.fwd_hooks(any_model, source, **edit))
        assert_near(pattern.double(), expected)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("n_kept", [60, 0])
def test_kept_pairs_against_a_loop(any_model, dictionary, tokens, source, n_kept):
    all_weights = pair_weights(dictionary)
    pairs = list(all_weights)[:n_kept]
    weights = {pair: all_weights[pair] if source == "feature_map" else 1.0 for pair in pairs}
    x, _ = inputs_and_scores(any_model, tokens)
    expected = pattern_by_hand(scores_by_hand(dictionary, x, weights))
    hooks = dictionary.fwd_hooks(any_model, source, keep_pairs=pairs)
    pattern = pattern_of(any_model, tokens, hooks)
    assert_near(pattern.double(), expected)


@pytest.mark.parametrize("source", [*SOURCES, "model"])
def test_factor_one_changes_nothing_and_factor_zero_ablates(any_model, dictionary, tokens, source):
    pairs = list(pair_weights(dictionary))[:40]

    def edited_logits(**edit):
        return logits_of(any_model, tokens, dictionary.fwd_hooks(any_model, source, **edit))

    times_one = edited_logits(scale_pairs=dict.fromkeys(pairs, 1.0))
    times_zero = edited_logits(scale_pairs=dict.fromkeys(pairs, 0.0))
    ablated = edited_logits(ablate_pairs=pairs)
    unedited = logits_of(any_model, tokens) if source == "model" else edited_logits()
    assert largest(times_one - unedited) <= 1e-6 * max(1.0, largest(unedited))
    assert torch.equal(times_zero, ablated)
    assert largest(ablated - unedited) > 0.01


def test_edits_act_on_the_named_heads_only(llama_bridge, llama_dictionary, tokens):
    pairs = [pair for pair in pair_weights(llama_dictionary) if pair[2] == 2]
    assert len(pairs) > 20
    own = pattern_of(llama_bridge, tokens)
    hooks = llama_dictionary.fwd_hooks(llama_bridge, "model", ablate_pairs=pairs)
    edited = pattern_of(llama_bridge, tokens, hooks)
    assert_near(edited[:, [0, 1, 3]], own[:, [0, 1, 3]], 1e-6)
    assert largest((edited - own)[:, 2]) > 0.01


# What is refused

LISTED = "listed"
"""Stands for a pair that the map keeps."""
UNLISTED = "unlisted"
"""Stands for a pair that it does not keep."""


def with_real_pairs(options, d):
    """The options with pairs in place of `LISTED` and `UNLISTED`."""
    weights = pair_weights(d)
    unlisted = next((a, 0, 0) for a in range(D_QUERY) if (a, 0, 0) not in weights)
    pairs = {LISTED: next(iter(weights)), UNLISTED: unlisted}
    real_options = {}
    for name, value in options.items():
        if isinstance(value, dict):
            value = {pairs[item]: factor for item, factor in value.items()}
        elif isinstance(value, list):
            value = [pairs.get(item, item) for item in value]
        real_options[name] = value
    return real_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": [0, 4]}, r"heads must lie in \[0, 3\], got \[0, 4\]"),
        ({"heads": [-1]}, r"heads must lie in \[0, 3\], got \[-1\]"),
        ({"source": "model"}, "give ablate_pairs or scale_pairs"),
        ({"source": "model", "keep_pairs": [LISTED]}, "keep_pairs keeps nothing else"),
        ({"keep_pairs": [LISTED], "ablate_pairs": [LISTED]}, "keep_pairs keeps nothing else"),
        ({"keep_pairs": [LISTED], "scale_pairs": {LISTED: 2.0}}, "keep_pairs keeps nothing else"),
        ({"ablate_pairs": [UNLISTED]}, "does not keep the pair"),
        ({"keep_pairs": [UNLISTED]}, "does not keep the pair"),
        ({"scale_pairs": {LISTED: float("nan")}}, "finite factors"),
        ({"keep_pairs": [LISTED, LISTED]}, "twice"),
        ({"ablate_pairs": np.array([[0.5, 1.0, 0.0]])}, "integer triples"),
        ({"ablate_pairs": np.array([[1, 2]])}, "integer triples"),
    ],
)
def test_wrong_options_are_refused(llama_bridge, llama_dictionary, options, message):
    real_options = with_real_pairs(options, llama_dictionary)
    n_before = n_hooks(llama_bridge)
    with pytest.raises(ValueError, match=message):
        llama_dictionary.fwd_hooks(llama_bridge, **real_options)
    context = llama_dictionary.patched(llama_bridge, **real_options)
    with pytest.raises(ValueError, match=message), context:
        raise AssertionError("the context was entered")
    assert n_hooks(llama_bridge) == n_before


def test_unknown_sources_are_refused(llama_bridge, llama_dictionary, monkeypatch):
    # what users meet outside pytest
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match="source must be 'transcoders', 'feature_map' or"):
        llama_dictionary.fwd_hooks(llama_bridge, "maps")


@pytest.mark.parametrize("source", [*SOURCES, "model"])
def test_contradictory_pairs_are_refused(llama_bridge, llama_dictionary, source):
    pair = next(iter(pair_weights(llama_dictionary)))
    edits = [
        {"ablate_pairs": [pair], "scale_pairs": {pair: 2.0}},
        {"ablate_pairs": [pair, pair]},
    ]
    for edit in edits:
        with pytest.raises(ValueError, match="name each pair once"):
            llama_dictionary.fwd_hooks(llama_bridge, source, **edit)


FOREIGN = [(D_QUERY + 1, 0, 0), (0, D_KEY + 1, 0), (0, 0, 4), (-1, 0, 0), (0, 0, -1)]


@pytest.mark.parametrize("pair", FOREIGN)
@pytest.mark.parametrize("source", [*SOURCES, "model"])
def test_foreign_pairs_are_refused(llama_bridge, llama_dictionary, source, pair):
    edits = [{"ablate_pairs": [pair]}, {"scale_pairs": {pair: 2.0}}]
    if source != "model":
        edits.append({"keep_pairs": [pair]})
    for edit in edits:
        with pytest.raises(ValueError, match=r"Pair indices must lie in|does not keep the pair"):
            llama_dictionary.fwd_hooks(llama_bridge, source, **edit)


def test_the_constant_pair_cannot_be_edited(llama_bridge, llama_dictionary):
    with pytest.raises(ValueError, match="constant x constant"):
        llama_dictionary.fwd_hooks(llama_bridge, ablate_pairs=[(D_QUERY, D_KEY, 0)])


def test_a_dictionary_without_map_is_told_so(llama_bridge, tokens):
    d = tiny_dictionary(llama_bridge, n_pairs=0)
    with pytest.raises(ValueError, match="has no feature map"):
        d.fwd_hooks(llama_bridge)
    clean = logits_of(llama_bridge, tokens)
    patched = logits_of(llama_bridge, tokens, d.fwd_hooks(llama_bridge, "transcoders"))
    assert largest(patched - clean) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_are_refused(kind):
    model = tiny_model(kind)
    d = tiny_dictionary(model)
    trained_on = r"trained on layer 1 of tiny \(bridge\)"
    with pytest.raises(FingerprintError, match=trained_on):
        d.fwd_hooks(tiny_model(kind, seed=1))
    with pytest.raises(FingerprintError, match=f"{trained_on}.*bridge_compatibility"):
        d.fwd_hooks(tiny_model(kind, "bridge_compatibility"))
    with pytest.raises(FingerprintError, match="relative distance"):
        d.fwd_hooks(tiny_model("llama" if kind != "llama" else "gpt2"))
    d.cfg.layer = 0
    with pytest.raises(FingerprintError, match="layer 0 of this model"):
        d.fwd_hooks(model)
    d.cfg.layer = 2
    with pytest.raises(ValueError, match=r"layer must lie in \[0, 1\], got 2"):
        d.fwd_hooks(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_serves_every_host_of_the_same_weights(kind, tokens):
    bridge = tiny_model(kind)
    hooked = tiny_model(kind, "hooked")
    d = tiny_dictionary(bridge)
    bridge_logits = logits_of(bridge, tokens, d.fwd_hooks(bridge))
    hooked_logits = logits_of(hooked, tokens, d.fwd_hooks(hooked))
    assert_near(bridge_logits, hooked_logits, 1e-4)


GENERATION = {
    "max_new_tokens": 3,
    "do_sample": False,
    "stop_at_eos": False,
    "verbose": False,
    "prepend_bos": False,
}


def test_generation_with_a_cache_is_refused_and_without_one_works(any_model, dictionary, tokens):
    before = any_model(tokens)
    n_before = n_hooks(any_model)
    prompt = tokens[:1]
    with pytest.raises(UnsupportedModelError, match="KV cache"), dictionary.patched(any_model):
        any_model.generate(prompt, use_past_kv_cache=True, **GENERATION)
    assert torch.equal(any_model(tokens), before)
    assert n_hooks(any_model) == n_before
    with dictionary.patched(any_model):
        generated = any_model.generate(prompt, use_past_kv_cache=False, **GENERATION)
        next_token = any_model(generated[:, :-1])[:, -1].argmax(dim=-1)
    assert generated.shape == (1, prompt.shape[1] + 3)
    assert torch.equal(generated[:, -1], next_token)


@pytest.mark.parametrize("padded", [slice(0, 2), slice(-2, None)], ids=["left", "right"])
def test_padded_input_is_refused(any_model, dictionary, tokens, padded):
    everything = torch.ones_like(tokens)
    mask = everything.clone()
    mask[1, padded] = 0
    n_before = n_hooks(any_model)
    refused = pytest.raises(UnsupportedModelError, match="padded input is not supported")
    with refused, dictionary.patched(any_model):
        any_model(tokens, attention_mask=mask)
    assert n_hooks(any_model) == n_before
    with dictionary.patched(any_model):
        patched = any_model(tokens)
        unpadded = any_model(tokens, attention_mask=everything)
    assert_near(unpadded, patched)
