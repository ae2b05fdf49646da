"""Terms of a row of scores against terms written out by hand, effects against autograd."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from comparing import assert_near
from random_dictionaries import SPEC, random_dictionary, random_x
from tiny_dictionaries import (
    D_KEY,
    D_QUERY,
    inputs_and_scores,
    pair_term,
    pair_weights,
    tiny_dictionary,
)
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.attention import SIDES
from sae_lens_qk.explain.terms import AttentionRow, Errors, HeadTerms
from sae_lens_qk.explain.terms import pair_weights as weight_table
from sae_lens_qk.feature_map import Features

N_POS = 13
QUERY = 10
KEY = 4
ROW = slice(QUERY + 1)


@pytest.fixture(scope="module", params=["gpt2_bridge", "neox_bridge", "llama_bridge"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def x(model) -> torch.Tensor:
    return inputs_and_scores(model, tiny_tokens(1, N_POS))[0]


@pytest.fixture(scope="module")
def d(model):
    return tiny_dictionary(model)


@pytest.fixture(scope="module", params=[0, 2])
def head(request):
    return request.param


@pytest.fixture(scope="module")
def terms(d, x, head):
    return HeadTerms(d, d.features(x), head).row(QUERY)


def query_row(scores, head) -> torch.Tensor:
    """[key], of the query, from [batch, head, pos_q, pos_k]."""
    return scores[0, head, QUERY, ROW]


def scores_without(d, x, head, feature, side, positions) -> torch.Tensor:
    """[key], of the query, with a feature set to zero at some positions."""
    features = d.features(x)
    query_acts = features.query.clone()
    key_acts = features.key.clone()
    acts = query_acts if side == "query" else key_acts
    acts[0, positions, feature] = 0
    head_terms = HeadTerms(d, Features(query_acts, key_acts), head)
    return head_terms.row(QUERY).scores


def term_by_hand(d, x, pair) -> np.ndarray:
    """[key], of the query."""
    query_acts = d.encode_query(x).double().numpy()
    key_acts = d.encode_key(x).double().numpy()
    return pair_term(d, query_acts, key_acts, pair)[0, QUERY, ROW]


def test_terms_add_up_to_the_dictionarys_scores(d, x, head, terms):
    expected = query_row(d.scores(x), head)
    assert_near(terms.scores, expected, 1e-4)


def test_terms_are_the_pairs_terms(d, x, head, terms):
    query_features = terms.query_features
    key_features = terms.key_features[terms.key_positions == KEY]
    assert int(query_features[-1]) == D_QUERY
    assert int(key_features[-1]) == D_KEY
    pairs = terms.pairs(query_features, key_features)
    last_query = len(query_features) - 1
    last_key = len(key_features) - 1
    with_constants = [(last_query, 2), (1, last_key), (last_query, last_key)]
    for a, b in [(0, 0), (2, 1), *with_constants]:
        query_feature = int(query_features[a])
        key_feature = int(key_features[b])
        expected = term_by_hand(d, x, (query_feature, key_feature, head))
        difference = pairs[a, b].numpy() - expected
        assert np.abs(difference).max() < 1e-4
        assert np.abs(expected).max() > 1e-3


def test_terms_of_a_map_are_its_pairs_times_their_weights(d, x, head):
    head_terms = HeadTerms(d, d.features(x), head, d.feature_map)
    expected = query_row(d.scores(x, "feature_map"), head)
    assert_near(head_terms.row(QUERY).scores, expected, 1e-4)


def test_errors_make_the_scores_of_other_queries_and_keys(d, x, head):
    """Scores of the reconstruction plus random vectors."""
    generator = torch.Generator().manual_seed(0)
    reconstruction = d.reconstruct(x)
    query_errors = torch.randn(reconstruction.queries.shape, generator=generator)
    key_errors = torch.randn(reconstruction.keys.shape, generator=generator)
    expected = d.spec.scores(
        reconstruction.queries + query_errors, reconstruction.keys + key_errors
    )
    kv_head = head // d.spec.heads_per_kv
    head_errors = query_errors[0, :, head]  # [pos, d_head]
    errors = Errors(head_errors, key_errors[0, :, kv_head])
    head_terms = HeadTerms(d, d.features(x), head, errors=errors)
    terms = head_terms.row(QUERY)
    assert_near(terms.scores, query_row(expected, head), 1e-4)
    assert int(terms.query_features[-1]) == D_QUERY + 1


def test_weights_are_the_maps(d, head, terms):
    weights = pair_weights(d)
    actual = terms.weights(d.feature_map, head)
    n_positive = 0
    for row, a in enumerate(terms.query_features.tolist()):
        for column, b in enumerate(terms.key_features.tolist()):
            is_constant = (a, b) == (D_QUERY, D_KEY)
            expected = 1.0 if is_constant else weights.get((a, b, head), 0.0)
            assert float(actual[row, column]) == pytest.approx(expected)
            n_positive += expected > 0
    assert n_positive > 10


def test_errors_have_no_weight(d, head):
    query_features = torch.tensor([3, D_QUERY + 1])
    key_features = torch.tensor([5, D_KEY + 1])
    table = weight_table(d.feature_map, head, query_features, key_features)
    assert not table[1].any()
    assert not table[:, 1].any()


@pytest.mark.parametrize("side", SIDES)
def test_rows_are_what_a_feature_adds_at_its_site(d, x, head, terms, side):
    """Against the scores without the feature, at the query or at the key."""
    usable = torch.ones(D_QUERY if side == "query" else D_KEY, dtype=torch.bool)
    usable[::5] = False
    active = terms.active(side, KEY, usable)
    assert not (active % 5 == 0).any()
    assert len(active) > 3
    rows = terms.rows(side, KEY, active)
    position = QUERY if side == "query" else KEY
    for row, feature in zip(rows, active, strict=True):
        without = scores_without(d, x, head, feature, side, position)
        assert_near(row, terms.scores - without, 1e-4)


def test_rows_of_key_features_count_every_key_where_they_fire(d, x, head, terms):
    usable = torch.ones(D_KEY, dtype=torch.bool)
    features = terms.active("key", KEY, usable)
    rows = terms.pairs(terms.query_features, features).sum(dim=0)
    for row, feature in zip(rows, features, strict=True):
        without = scores_without(d, x, head, feature, "key", slice(None))
        assert_near(row, terms.scores - without, 1e-4)


def test_keys_outside_the_window_have_no_terms():
    spec = dataclasses.replace(SPEC, window=4)
    d = random_dictionary(spec=spec)
    x = random_x()[:1]
    terms = HeadTerms(d, d.features(x), 1).row(QUERY)
    assert terms.key_positions.unique().tolist() == [7, 8, 9, 10]
    scores = d.scores(x)[0, 1, QUERY, ROW]
    assert_near(terms.scores[7:], scores[7:], 1e-4)
    assert not terms.scores[:7].any()


# What terms do to a row


def some_scores(n: int) -> torch.Tensor:
    """[n, 5]"""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 5, dtype=torch.float64, generator=generator)


def two_head_spec(**variant) -> qk.AttentionSpec:
    return qk.AttentionSpec(2, 1, 4, 6, scale=0.5, **variant)


SPECS = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": (0.5, 2.0)},
    "alibi": {"alibi_slopes": (0.1, 0.7)},
}


@pytest.mark.parametrize("variant", SPECS)
def test_effects_are_derivatives_of_the_log_pattern(variant):
    spec = two_head_spec(**SPECS[variant])
    scores, term = some_scores(2)
    row = AttentionRow(
        spec,
        head=1,
        query_pos=4,
        scores=scores,
    )
    strength = torch.zeros((), dtype=torch.float64, requires_grad=True)
    pattern = row.row_pattern(scores + strength * term)
    pattern[3].log().backward()
    effect = float(row.effect(term, 3))
    assert effect == pytest.approx(float(strength.grad))


@pytest.mark.parametrize("variant", SPECS)
def test_attention_drops_are_those_of_the_row_without_the_term(variant):
    spec = two_head_spec(**SPECS[variant])
    scores, *terms = some_scores(3)
    matrix = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    matrix[0, 1, 4] = scores
    before = spec.pattern(matrix)[0, 1, 4, 3]
    row = AttentionRow(
        spec,
        head=1,
        query_pos=4,
        scores=scores,
    )
    drops = row.attention_drop(torch.stack(terms), 3)
    for term, drop in zip(terms, drops, strict=True):
        matrix[0, 1, 4] = scores - term
        after = spec.pattern(matrix)[0, 1, 4, 3]
        assert float(drop) == pytest.approx(float(before - after))


def test_change_of_three_keys_by_hand():
    uniform = torch.zeros(3, dtype=torch.float64)
    scores = uniform.clone()
    scores[1] = math.log(2)  # P = 1/4, 1/2, 1/4
    row = AttentionRow(
        two_head_spec(),
        head=0,
        query_pos=2,
        scores=scores,
    )
    edited = torch.stack([uniform, scores + 7])
    change = row.change(edited, key_pos=1)
    # 1/4, 1/2, 1/4 becomes 1/3 each; adding 7 to all changes nothing
    distance = 1 / 12 + 1 / 6 + 1 / 12
    assert change.tv.tolist() == pytest.approx([distance / 2, 0])
    assert change.weight_drop.tolist() == pytest.approx([1 / 6, 0])
    score_drop = math.log(2) * (1 - 1 / 2)
    assert change.score_drop.tolist() == pytest.approx([score_drop, 0])
