"""BilinearQKDictionary: a SAELens SAE that encodes, scores, casts and refuses as it should."""

import importlib
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from comparing import assert_near
from oracles import loop_kernel
from random_dictionaries import (
    D_KEY,
    D_QUERY,
    N_PAIRS,
    SOURCES,
    SPEC,
    is_in_step,
    random_dictionary,
    random_x,
)
from sae_lens import SAE, HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.transcoder import JumpReLUTranscoder, Transcoder
from tiny_models import KINDS, tiny_hf_model, tiny_model, tiny_tokenizer, tiny_tokens
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.host.layer import AttentionLayer, run_recording


@pytest.fixture(scope="module")
def dictionary() -> qk.BilinearQKDictionary:
    """Shared and not to be changed."""
    return random_dictionary()


# As an SAE


def test_is_a_registered_sae(dictionary):
    assert isinstance(dictionary, SAE)
    assert SAE_CLASS_REGISTRY["bilinear_qk"] == (qk.BilinearQKDictionary, qk.BilinearQKConfig)
    assert dictionary.cfg.architecture() == "bilinear_qk"
    assert isinstance(SAE.from_dict(dictionary.cfg.to_dict()), qk.BilinearQKDictionary)
    assert type(dictionary.query) is JumpReLUTranscoder
    assert type(random_dictionary("transcoder").key) is Transcoder


def test_a_second_import_does_not_fail(monkeypatch):
    name = "sae_lens_qk.dictionary"
    first = sys.modules[name]
    registered = dict(SAE_CLASS_REGISTRY)
    monkeypatch.setattr(qk, "dictionary", first)  # put back at the end, as is sys.modules
    monkeypatch.delitem(sys.modules, name)
    again = importlib.import_module(name)
    assert again is not first
    assert registered == SAE_CLASS_REGISTRY


def test_metadata_say_where_the_dictionary_belongs():
    d = random_dictionary(hook_name="blocks.3.attn.hook_in", layer=3)
    assert d.cfg.metadata.model_name == "tiny"
    assert d.cfg.metadata.hook_name == "blocks.3.attn.hook_in"
    assert d.query.cfg.metadata.hook_name == "blocks.3.attn.q.hook_in"
    assert d.key.cfg.metadata.hook_name_out == "blocks.3.attn.k.hook_out"


def test_d_sae_is_derived(dictionary):
    assert dictionary.cfg.d_sae == D_QUERY + D_KEY
    assert (
        qk.BilinearQKConfig(
            d_in=13,
            d_sae=5,
            d_query=7,
            d_key=11,
        ).d_sae
        == 18
    )


def test_features_are_those_of_the_two_halves(dictionary):
    x = random_x()
    features = dictionary.features(x)
    for half, acts in zip((dictionary.query, dictionary.key), features, strict=True):
        hidden = x @ half.W_enc + half.b_enc
        expected = hidden * (hidden > half.threshold)
        assert_near(acts, expected, 1e-6)
        assert 0.01 < (acts > 0).float().mean() < 0.5
        assert (acts >= 0).all()
    assert torch.equal(dictionary.encode_query(x), features.query)
    assert torch.equal(dictionary.encode_key(x), features.key)
    assert torch.equal(dictionary.encode(x), torch.cat(features, dim=-1))


def test_decode_gives_queries_then_keys(dictionary):
    x = random_x()
    features = dictionary.features(x)
    queries = features.query @ dictionary.query.W_dec + dictionary.query.b_dec
    keys = features.key @ dictionary.key.W_dec + dictionary.key.b_dec
    decoded = dictionary.decode(dictionary.encode(x))
    assert_near(decoded, torch.cat([queries, keys], dim=-1), 1e-6)
    assert torch.equal(dictionary(x), decoded)
    by_head = dictionary.reconstruct(x)
    assert torch.equal(by_head.queries.flatten(2), decoded[..., :60])
    assert torch.equal(by_head.keys, decoded[..., 60:].unflatten(-1, (3, 10)))


# Scores and patterns


def test_scores_are_those_of_the_reconstruction(dictionary):
    x = random_x()
    queries, keys = dictionary(x).split([60, 30], dim=-1)
    expected = SPEC.scores(queries.unflatten(-1, (6, 10)), keys.unflatten(-1, (3, 10)))
    assert_near(dictionary.scores(x), expected, 1e-6)
    assert torch.equal(dictionary.pattern(x), SPEC.pattern(dictionary.scores(x)))


@pytest.mark.parametrize("source", SOURCES)
def test_encoded_features_serve_as_well_as_x(dictionary, source):
    x = random_x()
    features = dictionary.features(x)
    assert torch.equal(dictionary.scores(features, source), dictionary.scores(x, source))
    assert torch.equal(dictionary.pattern(features, source), dictionary.pattern(x, source))


@pytest.mark.parametrize("source", SOURCES)
def test_patterns_sum_to_one(dictionary, source):
    pattern = dictionary.pattern(random_x(), source)
    assert pattern.shape == (2, 6, 11, 11)
    assert_near(pattern.sum(dim=-1), torch.ones(2, 6, 11))


def test_a_map_of_all_pairs_gives_the_transcoders_pattern(dictionary):
    x = random_x()
    d = random_dictionary(
        d_query=29,
        d_key=31,
        n_pairs=0,
    )
    d.set_feature_map(qk.SparseFeatureMap.all_pairs(29, 31, 6))
    assert d.cfg.n_pairs == (30 * 32 - 1) * 6
    pattern = d.pattern(x, "transcoders")
    assert_near(d.pattern(x, "feature_map"), pattern)
    assert (dictionary.pattern(x, "feature_map") - dictionary.pattern(x)).abs().max() > 0.05


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("source", SOURCES)
def test_hooks_on_the_halves_act_on_both_sources(dictionary, side, source):
    """Silencing a side leaves its bias: what the scores become is known."""
    x = random_x()
    before = dictionary.scores(x, source)
    silence = [(f"{side}.hook_sae_acts_post", lambda acts, hook: acts * 0)]
    with dictionary.hooks(fwd_hooks=silence):
        scores = dictionary.scores(x, source)
        pattern = dictionary.pattern(x, source)
    assert (pattern - SPEC.pattern(before)).abs().max() > 0.01
    expected = scores_with_silent_side(dictionary, x, side, source)
    assert_near(scores, expected)
    assert torch.equal(dictionary.scores(x, source), before), "the hook stayed behind"


def scores_with_silent_side(
    d,
    x: Tensor,
    side: str,
    source: str,
) -> Tensor:
    """Scores of which only the constant of a side is left."""
    if source == "feature_map":
        column = 0 if side == "query" else 1
        constant = D_QUERY if side == "query" else D_KEY
        constant_pairs = d.feature_map.select(d.feature_map.indices[:, column] == constant)
        assert len(constant_pairs) > 0
        return constant_pairs.scores(d.features(x), d.decoders, SPEC)
    queries, keys = d.reconstruct(x)
    if side == "query":
        queries = d.query.b_dec.unflatten(0, (6, 10)).expand_as(queries)
    else:
        keys = d.key.b_dec.unflatten(0, (3, 10)).expand_as(keys)
    return SPEC.scores(queries, keys)


@pytest.mark.parametrize("source", SOURCES)
def test_nan_inputs_give_nan(dictionary, source):
    """From the position of the NaN on; what comes before, and the other sequence, stays."""
    x = random_x()
    clean = dictionary.pattern(x, source)
    x[1, 5] = torch.nan
    pattern = dictionary.pattern(x, source)
    assert pattern[1, :, 5:, :].isnan().any(dim=-1).all()
    assert_near(pattern[0], clean[0], 1e-6)
    assert_near(pattern[1, :, :5], clean[1, :, :5], 1e-6)


# Casts and moves


CASTS = {
    "half": (lambda d: d.half(), torch.float16),
    "bfloat16": (lambda d: d.bfloat16(), torch.bfloat16),
    "to bfloat16": (lambda d: d.to(torch.bfloat16), torch.bfloat16),
    "to cpu float16": (lambda d: d.to("cpu", torch.float16), torch.float16),
    "to float64": (lambda d: d.to(dtype=torch.float64), torch.float64),
    "double": (lambda d: d.double(), torch.float64),
    "half float": (lambda d: d.half().float(), torch.float32),
    "cpu": (lambda d: d.cpu(), torch.float32),
}


@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS)
def test_casts_keep_config_and_halves_in_step(cast, dtype):
    d = random_dictionary()
    indices = d.feature_map.indices.clone()
    assert cast(d) is d
    assert is_in_step(d, dtype)
    assert torch.equal(d.feature_map.indices, indices)
    acts = d.encode(random_x())
    assert acts.dtype == dtype
    assert (acts > 0).any()
    for source in SOURCES:
        assert d.pattern(random_x(), source).isfinite().all()


def test_moves_keep_config_and_halves_in_step():
    assert is_in_step(random_dictionary().to("meta"), torch.float32, "meta")


@pytest.mark.parametrize("half", ["transcoder", "jumprelu_transcoder"])
def test_folding_decoder_norms_leaves_the_pattern(half):
    d = random_dictionary(half)
    x = random_x()
    patterns = {source: d.pattern(x, source) for source in SOURCES}
    acts = d.encode(x)
    norms = d.get_W_dec_norm()
    assert norms.shape == (D_QUERY + D_KEY,)
    assert norms.std() > 0.01
    d.fold_W_dec_norm()
    for source, pattern in patterns.items():
        assert_near(d.pattern(x, source), pattern)
    assert_near(d.get_W_dec_norm(), torch.ones(D_QUERY + D_KEY))
    assert_near(d.encode(x), acts * norms)


# What is refused


REFUSALS = {
    "use_error_term": (
        lambda d: qk.BilinearQKDictionary(d.cfg, use_error_term=True),
        "two outputs and no error term",
    ),
    "setting use_error_term": (
        lambda d: setattr(d, "use_error_term", True),
        "two outputs and no error term",
    ),
    "scaling factor": (
        lambda d: d.fold_activation_norm_scaling_factor(2.0),
        "without activation normalisation",
    ),
    "whitening": (
        lambda d: d.fold_activation_whitening(*torch.ones(3, 13)),
        "without activation whitening",
    ),
    "fold and get": (lambda d: d.fold_and_get_W_dec_norm(), "two decoders: fold d.query"),
    "hook_z": (lambda d: d.turn_on_forward_pass_hook_z_reshaping(), "not hook_z"),
    "reshaping mode": (
        lambda d: setattr(d, "hook_z_reshaping_mode", True),
        "cannot be attached with add_sae",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_has_no_meaning_here_is_refused(dictionary, call, message):
    before = {name: tensor.clone() for name, tensor in dictionary.state_dict().items()}
    with pytest.raises(NotImplementedError, match=message):
        call(dictionary)
    for name, tensor in dictionary.state_dict().items():
        assert torch.equal(tensor, before[name])


def sae_model(
    mode: str,
    kind: str = "gpt2",
):
    """The model in SAELens's own classes, to which SAEs can be attached."""
    if mode == "bridge":
        model = SAETransformerBridge.boot_transformers(
            "tiny", hf_model=tiny_hf_model(kind), tokenizer=tiny_tokenizer(), device="cpu"
        )
        return model.requires_grad_(False).eval()
    hooked = tiny_model(kind, "hooked")
    model = HookedSAETransformer(hooked.cfg, tokenizer=tiny_tokenizer(), move_to_device=False)
    model.load_state_dict(hooked.state_dict())
    return model.requires_grad_(False).eval()


def dictionary_of(layer: AttentionLayer) -> qk.BilinearQKDictionary:
    return random_dictionary(
        spec=layer.spec,
        d_query=29,
        d_key=31,
        layer=layer.index,
        hook_name=layer.names.input,
        fingerprint=list(layer.qk_weights.fingerprint()),
    )


@pytest.mark.parametrize("mode", ["bridge", "hooked"])
def test_add_sae_is_refused(mode):
    model = sae_model(mode)
    d = dictionary_of(AttentionLayer(model, 1))
    logits = model(tiny_tokens(2, 7))
    with pytest.raises(NotImplementedError, match="cannot be attached with add_sae"):
        model.add_sae(d)
    assert not model.acts_to_saes
    assert torch.equal(model(tiny_tokens(2, 7)), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_halves_can_be_attached_as_the_refusal_says(kind):
    """Stock SAELens with both halves attached attends as the dictionary reconstructs."""
    model = sae_model("bridge", kind)
    layer = AttentionLayer(model, 1)
    d = dictionary_of(layer)
    names = layer.names
    model.add_sae(d.query)
    model.add_sae(d.key)
    _, values = run_recording(model, tiny_tokens(2, 7), (names.input, names.pattern))
    expected = d.pattern(values[names.input])
    assert_near(values[names.pattern], expected)


@pytest.mark.parametrize(
    "method",
    [
        "encode",
        "encode_query",
        "encode_key",
        "features",
        "forward",
        "reconstruct",
        "scores",
        "pattern",
    ],
)
def test_inputs_of_another_width_are_refused(dictionary, method):
    with pytest.raises(ValueError, match=r"width d_in = 13 .* got shape \[2, 11, 12\]"):
        getattr(dictionary, method)(torch.zeros(2, 11, 12))


def test_the_map_is_needed_for_its_pattern():
    d = random_dictionary(n_pairs=0)
    assert not d.has_feature_map
    assert len(d.pair_frame()) == 0
    with pytest.raises(ValueError, match="no feature map: run step 2"):
        d.pattern(random_x(), source="feature_map")


def test_unknown_sources_are_refused(dictionary, monkeypatch):
    # what users meet outside pytest
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"source must be .* got 'model'"):
        dictionary.pattern(random_x(), source="model")


@pytest.mark.parametrize("sizes", [(306, 311, 6), (307, 312, 6), (307, 311, 5)])
def test_maps_of_another_dictionary_are_refused(dictionary, sizes):
    """Their constant feature would be taken for a real one."""
    foreign = qk.SparseFeatureMap([(0, 1, 2)], torch.ones(1), *sizes)
    own = dictionary.feature_map
    with pytest.raises(ValueError, match=r"= \(307, 311, 6\), got one for"):
        dictionary.set_feature_map(foreign)
    assert dictionary.feature_map is own
    assert dictionary.cfg.n_pairs == N_PAIRS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be False"),
        ({"normalize_activations": "layer_norm"}, "must be 'none', got 'layer_norm'"),
        ({"d_in": 12}, "d_in must be the attention's d_model 13, got 12"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    values = {"d_in": 13, "d_query": 7, "d_key": 11, "attention": SPEC.to_dict()}
    with pytest.raises(ValueError, match=message):
        qk.BilinearQKConfig(**{**values, **changes})


def test_a_dictionary_needs_its_attention():
    with pytest.raises(ValueError, match=r"cfg\.attention is empty"):
        qk.BilinearQKDictionary(
            qk.BilinearQKConfig(
                d_in=13,
                d_query=7,
                d_key=11,
            )
        )


# Pairs


def score_at_0(
    d,
    query_feature: int,
    key_feature: int,
    head: int,
) -> float:
    """scale <W_dec_q[a, h], W_dec_k[b, g(h)]>, of slices of the flat decoder rows."""
    q = d.query.b_dec if query_feature == D_QUERY else d.query.W_dec[query_feature]
    k = d.key.b_dec if key_feature == D_KEY else d.key.W_dec[key_feature]
    kv_head = head // 2
    q_head = q[10 * head : 10 * head + 10]
    k_head = k[10 * kv_head : 10 * kv_head + 10]
    return float(q_head @ k_head) * SPEC.scale


def test_pair_frame_lists_every_pair_with_its_score_and_statistics(dictionary):
    before = {name: tensor.clone() for name, tensor in dictionary.state_dict().items()}
    frame = dictionary.pair_frame()
    feature_map = dictionary.feature_map
    index_columns = ["query_feature", "key_feature", "head"]
    statistic_columns = ["importance", "effect", "co_occurrence"]
    assert list(frame) == [*index_columns, "weight", "score_at_0", *statistic_columns]
    assert len(frame) == N_PAIRS
    assert np.array_equal(frame[index_columns], feature_map.indices)
    assert np.array_equal(frame["weight"], feature_map.weights)
    expected = [score_at_0(dictionary, *pair) for pair in feature_map.indices.tolist()]
    np.testing.assert_allclose(frame["score_at_0"], expected, rtol=0, atol=1e-6)

    is_measured = feature_map.statistics[:, 2] > 0
    assert 0 < int(is_measured.sum()) < N_PAIRS
    statistics = frame[statistic_columns].to_numpy()
    assert np.isnan(statistics[~is_measured]).all()
    assert np.array_equal(statistics[is_measured], feature_map.statistics[is_measured])
    for name, tensor in dictionary.state_dict().items():
        assert torch.equal(tensor, before[name]), "the dictionary was changed"


def test_pair_frame_survives_saving(dictionary, tmp_path):
    dictionary.save_model(tmp_path)
    frame = qk.BilinearQKDictionary.load_from_disk(tmp_path).pair_frame()
    pd.testing.assert_frame_equal(frame, dictionary.pair_frame(), rtol=1e-5)


OFFSETS = (0, 1, 5, 40)


@pytest.mark.parametrize("rotary", [(), (1.0, 0.3, 0.02)], ids=["none", "partial"])
def test_pair_kernel_equals_the_loop(rotary):
    spec = qk.AttentionSpec(
        6,
        3,
        d_head=10,
        d_model=13,
        scale=0.4,
        rotary_inv_freq=rotary,
    )
    d = random_dictionary(spec=spec)
    pairs = [(7, 5, 4), (D_QUERY, 5, 4), (7, D_KEY, 1), (D_QUERY, D_KEY, 5), (300, 310, 0)]
    kernel = d.pair_kernel(pairs, OFFSETS)
    assert kernel.shape == (5, 4)
    for pair, scores in zip(pairs, kernel.tolist(), strict=True):
        expected = [loop_kernel(pair, d.decoders, spec, offset) for offset in OFFSETS]
        assert scores == pytest.approx(expected, abs=1e-5)
    assert torch.equal(kernel, d.pair_kernel(torch.tensor(pairs), torch.tensor(OFFSETS)))
    is_constant = bool((kernel[:, 1:] == kernel[:, :1]).all())
    assert is_constant == (not rotary)
    assert d.pair_kernel([], OFFSETS).shape == (0, 4)


def test_pair_kernel_is_what_a_unit_of_both_activations_adds(dictionary):
    """Second difference of the scores: more of the query feature, of the key feature, of both."""
    x = random_x()
    query_feature, key_feature = 300, 17
    i, j = 9, 2
    row = 1

    def scores(
        query_more: float,
        key_more: float,
    ) -> Tensor:
        def add_to_query(acts, hook):
            acts[row, i, query_feature] += query_more
            return acts

        def add_to_key(acts, hook):
            acts[row, j, key_feature] += key_more
            return acts

        hooks = [
            ("query.hook_sae_acts_post", add_to_query),
            ("key.hook_sae_acts_post", add_to_key),
        ]
        with dictionary.hooks(fwd_hooks=hooks):
            return dictionary.scores(x)[row]

    difference = scores(1, 1) - scores(1, 0) - scores(0, 1) + scores(0, 0)
    pairs = [(query_feature, key_feature, head) for head in range(6)]
    kernel = dictionary.pair_kernel(pairs, [i - j])[:, 0]
    assert_near(difference[:, i, j], kernel)
    assert kernel[4].abs() > 1e-3
    difference[:, i, j] = 0
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("pair", "offset"),
    [
        ((D_QUERY + 1, 0, 0), 0),
        ((0, D_KEY + 1, 0), 0),
        ((0, 0, 6), 0),
        ((-1, 0, 0), 0),
        ((0, 0, 0), -1),
    ],
)
def test_pair_kernel_refuses_what_is_out_of_range(dictionary, pair, offset):
    with pytest.raises(ValueError, match="and offsets be at least 0"):
        dictionary.pair_kernel([(1, 2, 3), pair], [1, offset])


def test_decoders_end_with_the_biases(dictionary):
    decoders = dictionary.decoders
    assert decoders.query.shape == (D_QUERY + 1, 6, 10)
    assert decoders.key.shape == (D_KEY + 1, 3, 10)
    assert torch.equal(decoders.query[-1].flatten(), dictionary.query.b_dec)
    assert torch.equal(decoders.key[-1].flatten(), dictionary.key.b_dec)
