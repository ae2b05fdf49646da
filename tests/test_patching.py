"""Patched models against patterns written by hand, and nothing left behind."""

import inspect
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny_dictionaries import (
    D_KEY,
    D_QUERY,
    LAYER,
    inputs_and_scores,
    kept_pairs,
    observe,
    pattern_by_hand,
    scores_by_hand,
    tiny_dictionary,
)
from tiny_models import KINDS, tiny_model

from sae_lens_qk.attention import attention_scores, pattern_from_scores
from sae_lens_qk.host.proof import FingerprintError
from sae_lens_qk.host.support import UnsupportedModelError
from sae_lens_qk.host.layer import attention_spec, hook_names, qk_weights
from sae_lens_qk.patching import _score_function
from sae_lens_qk.host.layer import pattern_hooks

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


def hooks_on(model) -> int:
    points = {id(point): point for point in model.hook_dict.values()}.values()
    return sum(
        len(point.fwd_hooks) + len(point.bwd_hooks) + len(point._forward_hooks) for point in points
    )


def largest(tensor) -> float:
    return float(tensor.abs().max())


def test_the_true_queries_and_keys_change_nothing(any_model, tokens):
    weights, spec = qk_weights(any_model, LAYER), attention_spec(any_model, LAYER)
    calls = []

    def true_pattern(x, scores):
        calls.append(x.shape)
        return pattern_from_scores(attention_scores(weights.queries(x), weights.keys(x), spec))

    clean = logits_of(any_model, tokens)
    hooks = pattern_hooks(any_model, LAYER, true_pattern)
    assert largest(logits_of(any_model, tokens, hooks) - clean) <= 1e-6 * max(1.0, largest(clean))
    assert calls == [(*tokens.shape, spec.d_model)]


@pytest.mark.parametrize("source", SOURCES)
def test_patched_equals_a_hand_written_patch(any_model, dictionary, tokens, source):
    x, _ = inputs_and_scores(any_model, tokens)
    made = dictionary.pattern(x, source)
    by_hand = logits_of(any_model, tokens, [(PATTERN, lambda pattern, hook: made)])
    clean = logits_of(any_model, tokens)
    with dictionary.patched(any_model, source=source) as inside:
        assert inside is any_model
        patched = any_model(tokens)
    torch.testing.assert_close(patched, by_hand, rtol=0, atol=1e-5)
    assert largest(patched - clean) > 0.01
    hooks = dictionary.fwd_hooks(any_model, source)
    assert all(
        name in any_model.hook_dict and any_model.hook_dict[name].name == name for name, _ in hooks
    )
    assert torch.equal(logits_of(any_model, tokens, hooks), patched)


def test_patches_of_the_two_sources_differ(any_model, dictionary, tokens):
    one, other = (
        logits_of(any_model, tokens, dictionary.fwd_hooks(any_model, source)) for source in SOURCES
    )
    assert largest(one - other) > 0.01


def test_leaving_the_context_restores_the_model(any_model, dictionary, tokens):
    before, n_hooks = any_model(tokens), hooks_on(any_model)
    for _ in range(3):
        with dictionary.patched(any_model):
            assert hooks_on(any_model) > n_hooks
            assert not torch.equal(any_model(tokens), before)
        assert torch.equal(any_model(tokens), before)

    with pytest.raises(KeyError, match="from the body"), dictionary.patched(any_model):  # noqa: PT012
        any_model(tokens)
        raise KeyError("from the body")
    assert torch.equal(any_model(tokens), before)
    assert hooks_on(any_model) == n_hooks


def test_the_inner_of_two_contexts_counts_and_the_outer_survives_it(any_model, dictionary, tokens):
    before, n_hooks = any_model(tokens), hooks_on(any_model)
    alone = {
        source: logits_of(any_model, tokens, dictionary.fwd_hooks(any_model, source))
        for source in SOURCES
    }
    with dictionary.patched(any_model, source="transcoders"):
        with dictionary.patched(any_model, source="feature_map"):
            assert torch.equal(any_model(tokens), alone["feature_map"])
        assert torch.equal(any_model(tokens), alone["transcoders"])
        cached, _ = any_model.run_with_cache(tokens)
        assert torch.equal(cached, alone["transcoders"])
        assert torch.equal(logits_of(any_model, tokens), alone["transcoders"])
        assert torch.equal(any_model(tokens), alone["transcoders"])
    assert torch.equal(any_model(tokens), before)
    assert hooks_on(any_model) == n_hooks


@pytest.mark.parametrize("source", SOURCES)
def test_only_the_named_heads_are_replaced(any_model, dictionary, tokens, source):
    x, _ = inputs_and_scores(any_model, tokens)
    own = pattern_of(any_model, tokens)
    patched = pattern_of(any_model, tokens, dictionary.fwd_hooks(any_model, source, heads=[2, 0]))
    others = [head for head in range(own.shape[1]) if head not in (0, 2)]
    assert torch.equal(patched[:, others], own[:, others])
    torch.testing.assert_close(
        patched[:, [0, 2]], dictionary.pattern(x, source)[:, [0, 2]], rtol=0, atol=1e-6
    )
    for head in (0, 2):
        assert largest((patched - own)[:, head]) > 0.01


def base_by_hand(source, d, x, own_scores):
    """Scores to which edits are added as (factor - 1) * weight * term, and the weights of the terms."""
    if source == "feature_map":
        weights = kept_pairs(d)
        return scores_by_hand(d, x, weights), weights
    listed = dict.fromkeys(kept_pairs(d), 1.0)
    queries_keys = d.queries_keys(x)
    scores = attention_scores(*queries_keys, d.spec) if source == "transcoders" else own_scores
    return scores.double(), listed


@pytest.mark.parametrize("source", [*SOURCES, "model"])
def test_edited_pairs_against_a_loop(any_model, dictionary, tokens, source):
    d, pairs = dictionary, list(kept_pairs(dictionary))
    kinds = {(a == D_QUERY, b == D_KEY) for a, b, _ in pairs[:60]}
    assert kinds == {(False, False), (True, False), (False, True)}
    x, own_scores = inputs_and_scores(any_model, tokens)
    base, weights = base_by_hand(source, d, x, own_scores)
    unedited = pattern_by_hand(base)
    ablated, scaled = pairs[:30], {pair: 3.0 * i / 30 - 1.0 for i, pair in enumerate(pairs[30:60])}
    edits = [
        ({"ablate_pairs": ablated}, dict.fromkeys(ablated, 0.0)),
        ({"ablate_pairs": torch.tensor(ablated)}, dict.fromkeys(ablated, 0.0)),
        ({"scale_pairs": scaled}, scaled),
        (
            {"ablate_pairs": ablated, "scale_pairs": scaled},
            {**dict.fromkeys(ablated, 0.0), **scaled},
        ),
    ]
    for edit, factors in edits:
        changes = {pair: (factor - 1) * weights[pair] for pair, factor in factors.items()}
        expected = pattern_by_hand(base + scores_by_hand(d, x, changes, include_constant=False))
        assert largest(expected - unedited) > 0.01
        made = pattern_of(any_model, tokens, d.fwd_hooks(any_model, source, **edit))
        torch.testing.assert_close(made.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_kept_pairs_against_a_loop(any_model, dictionary, tokens, source):
    pairs = list(kept_pairs(dictionary))[:60]
    x, _ = inputs_and_scores(any_model, tokens)
    weights = {
        pair: kept_pairs(dictionary)[pair] if source == "feature_map" else 1.0 for pair in pairs
    }
    expected = pattern_by_hand(scores_by_hand(dictionary, x, weights))
    made = pattern_of(any_model, tokens, dictionary.fwd_hooks(any_model, source, keep_pairs=pairs))
    torch.testing.assert_close(made.double(), expected, rtol=0, atol=1e-5)
    only_constants = pattern_of(
        any_model, tokens, dictionary.fwd_hooks(any_model, source, keep_pairs=[])
    )
    expected = pattern_by_hand(scores_by_hand(dictionary, x, {}))
    torch.testing.assert_close(only_constants.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", [*SOURCES, "model"])
def test_factor_one_changes_nothing_and_factor_zero_ablates(any_model, dictionary, tokens, source):
    pairs = list(kept_pairs(dictionary))[:40]
    edits = (
        {"scale_pairs": dict.fromkeys(pairs, 1.0)},
        {"scale_pairs": dict.fromkeys(pairs, 0.0)},
        {"ablate_pairs": pairs},
    )
    kept, zeroed, ablated = (
        logits_of(any_model, tokens, dictionary.fwd_hooks(any_model, source, **edit))
        for edit in edits
    )
    hooks = () if source == "model" else dictionary.fwd_hooks(any_model, source)
    unedited = logits_of(any_model, tokens, hooks)
    assert largest(kept - unedited) <= 1e-6 * max(1.0, largest(unedited))
    assert torch.equal(zeroed, ablated)
    assert largest(ablated - unedited) > 0.01


def test_edits_act_on_the_named_heads_only(llama_bridge, llama_dictionary, tokens):
    pairs = [pair for pair in kept_pairs(llama_dictionary) if pair[2] == 2]
    assert len(pairs) > 20
    own = pattern_of(llama_bridge, tokens)
    made = pattern_of(
        llama_bridge, tokens, llama_dictionary.fwd_hooks(llama_bridge, "model", ablate_pairs=pairs)
    )
    torch.testing.assert_close(made[:, [0, 1, 3]], own[:, [0, 1, 3]], rtol=0, atol=1e-6)
    assert largest((made - own)[:, 2]) > 0.01


LISTED, UNLISTED = "listed", "unlisted"  # stand for a pair the map keeps, and one it does not keep


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
    kept = kept_pairs(llama_dictionary)
    unlisted = next((a, 0, 0) for a in range(D_QUERY) if (a, 0, 0) not in kept)
    real = {LISTED: next(iter(kept)), UNLISTED: unlisted}
    for name, value in options.items():
        if isinstance(value, dict):
            options = {**options, name: {real[pair]: factor for pair, factor in value.items()}}
        elif isinstance(value, list):
            options = {**options, name: [real.get(item, item) for item in value]}
    n_hooks = hooks_on(llama_bridge)
    with pytest.raises(ValueError, match=message):
        llama_dictionary.fwd_hooks(llama_bridge, **options)
    with (
        pytest.raises(ValueError, match=message),
        llama_dictionary.patched(llama_bridge, **options),
    ):
        raise AssertionError("the context was entered")
    assert hooks_on(llama_bridge) == n_hooks


def test_unknown_sources_are_refused(llama_dictionary):
    unchecked = inspect.unwrap(_score_function)  # under pytest jaxtyping would be faster
    with pytest.raises(
        ValueError, match="source must be 'transcoders', 'feature_map' or 'model', got 'maps'"
    ):
        unchecked(llama_dictionary, "maps", None, None, None)


@pytest.mark.parametrize("source", [*SOURCES, "model"])
def test_contradictory_and_foreign_pairs_are_refused(llama_bridge, llama_dictionary, source):
    pair = next(iter(kept_pairs(llama_dictionary)))
    for edit in (
        {"ablate_pairs": [pair], "scale_pairs": {pair: 2.0}},
        {"ablate_pairs": [pair, pair]},
    ):
        with pytest.raises(ValueError, match="name each pair once"):
            llama_dictionary.fwd_hooks(llama_bridge, source, **edit)

    edits = (
        ("ablate_pairs", "scale_pairs")
        if source == "model"
        else ("ablate_pairs", "scale_pairs", "keep_pairs")
    )
    for foreign in ((D_QUERY + 1, 0, 0), (0, D_KEY + 1, 0), (0, 0, 4), (-1, 0, 0), (0, 0, -1)):
        for edit in edits:
            value = {foreign: 2.0} if edit == "scale_pairs" else [foreign]
            with pytest.raises(ValueError, match="Pair indices must lie in"):
                llama_dictionary.fwd_hooks(llama_bridge, source, **{edit: value})
        with pytest.raises(ValueError, match="constant x constant"):
            llama_dictionary.fwd_hooks(llama_bridge, source, ablate_pairs=[(D_QUERY, D_KEY, 0)])


def test_a_dictionary_without_map_is_told_so(llama_bridge, tokens):
    d = tiny_dictionary(llama_bridge, n_pairs=0)
    with pytest.raises(ValueError, match="has no feature map"):
        d.fwd_hooks(llama_bridge)
    clean = logits_of(llama_bridge, tokens)
    assert (
        largest(logits_of(llama_bridge, tokens, d.fwd_hooks(llama_bridge, "transcoders")) - clean)
        > 0.01
    )


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_are_refused(kind):
    model = tiny_model(kind)
    d = tiny_dictionary(model)
    wrong = {
        "other seed": tiny_model(kind, seed=1),
        "folded": tiny_model(kind, "bridge_compatibility"),
    }
    for name, other in wrong.items():
        with pytest.raises(
            FingerprintError, match=r"trained on layer 1 of tiny \(bridge\).*has other weights"
        ) as error:
            d.fwd_hooks(other)
        assert ("bridge_compatibility" in str(error.value)) == (name == "folded")
    d.cfg.layer = 0
    with pytest.raises(FingerprintError, match="layer 0 of this model"):
        d.fwd_hooks(model)
    d.cfg.layer = 2
    with pytest.raises(ValueError, match=r"layer must lie in \[0, 1\], got 2"):
        d.fwd_hooks(model)
    d.cfg.layer = 1
    with pytest.raises(FingerprintError, match=r"relative distance"):
        d.fwd_hooks(tiny_model("llama" if kind != "llama" else "gpt2"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_serves_every_host_of_the_same_weights(kind, tokens):
    bridge, hooked = tiny_model(kind), tiny_model(kind, "hooked")
    d = tiny_dictionary(bridge)
    one, other = (logits_of(model, tokens, d.fwd_hooks(model)) for model in (bridge, hooked))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_generation_with_a_cache_is_refused(any_model, dictionary, tokens):
    before, n_hooks = any_model(tokens), hooks_on(any_model)
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
        "prepend_bos": False,
    }
    with pytest.raises(UnsupportedModelError, match="KV cache"), dictionary.patched(any_model):
        any_model.generate(tokens[:1], use_past_kv_cache=True, **options)
    assert torch.equal(any_model(tokens), before)
    assert hooks_on(any_model) == n_hooks
    with dictionary.patched(any_model):
        made = any_model.generate(tokens[:1], use_past_kv_cache=False, **options)
        next_token = any_model(made[:, :-1])[:, -1].argmax(dim=-1)
    assert made.shape == (1, tokens.shape[1] + 3)
    assert torch.equal(made[:, -1], next_token)


@pytest.mark.parametrize("padded", [slice(0, 2), slice(-2, None)], ids=["left", "right"])
def test_padded_input_is_refused(any_model, dictionary, tokens, padded):
    mask = torch.ones_like(tokens)
    mask[1, padded] = 0
    n_hooks = hooks_on(any_model)
    with (
        pytest.raises(UnsupportedModelError, match="padded input is not supported"),
        dictionary.patched(any_model),
    ):
        any_model(tokens, attention_mask=mask)
    assert hooks_on(any_model) == n_hooks
    with dictionary.patched(any_model):
        patched = any_model(tokens)
        torch.testing.assert_close(
            any_model(tokens, attention_mask=torch.ones_like(tokens)), patched, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("mode", ["bridge", "bridge_compatibility", "hooked_processed"])
def test_the_users_own_hooks_survive(mode, tokens):
    model = tiny_model("gpt2", mode)
    d = tiny_dictionary(model)
    names = hook_names(model, LAYER)
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
