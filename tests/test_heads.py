"""Views of heads against a map of eight pairs worked by hand, and against plain loops."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_dictionaries import D_KEY, D_QUERY, inputs_and_scores, tiny_dictionary
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.statistics.activations import ALWAYS_ON, collect_activations
from sae_lens_qk.statistics.heads import (
    dense_features,
    head_table,
    pair_importances,
    participation,
    shared_reasons,
    superposition,
)

PAIRS = [  # query feature, key feature, head, weight, importance, effect
    (2, 3, 0, 1.0, 4.0, 0.5),
    (2, 3, 1, 0.5, 16.0, -0.25),
    (2, 3, 2, 1.0, 1.0, 0.125),
    (2, 5, 0, 1.0, 9.0, 1.0),
    (D_QUERY, 3, 1, 1.0, 1.0, 2.0),
    (7, D_KEY, 1, 0.5, 9.0, 1.0),
    (4, 4, 2, 1.0, None, None),  # never measured
    (4, 5, 2, 0.0, 5.0, 1.0),  # dropped
]
IMPORTANCES = [4, 4, 1, 9, 2.25, 1]
"""m^2 * importance of the first six, sorted by query feature, key feature and head."""


def dictionary_with(model, pairs) -> qk.BilinearQKDictionary:
    """A dictionary with these pairs, weights and statistics."""
    d = tiny_dictionary(model, n_pairs=0)
    indices = [pair[:3] for pair in pairs]
    weights = torch.tensor([pair[3] for pair in pairs])
    statistics = torch.zeros(len(pairs), 3)
    for row, (*_, importance, effect) in enumerate(pairs):
        if importance is not None:
            statistics[row] = torch.tensor([importance, effect, 0.1])
    sizes = (D_QUERY, D_KEY, d.spec.n_heads)
    d.set_feature_map(qk.SparseFeatureMap(indices, weights, *sizes, statistics))
    return d


@pytest.fixture(scope="module")
def d(llama_bridge):
    """Four heads; the last has no pairs."""
    return dictionary_with(llama_bridge, PAIRS)


# Importances


def test_pairs_that_carry_something(d):
    frame = pair_importances(d)
    assert frame["masked_importance"].tolist() == IMPORTANCES
    indices = frame[["query_feature", "key_feature", "head"]].to_numpy().tolist()
    feature_pairs = [[2, 3, 0], [2, 3, 1], [2, 3, 2], [2, 5, 0]]
    assert indices == [*feature_pairs, [7, D_KEY, 1], [D_QUERY, 3, 1]]
    columns = {"weight", "importance", "effect", "co_occurrence", "score_at_0"}
    assert columns < set(frame.columns)


@pytest.mark.parametrize(
    ("constants", "features", "expected"),
    [
        (False, [], [4, 4, 1, 9]),
        (True, [("key", 5), ("query", 7), ("query", 3)], [4, 4, 1, 1]),
        (False, [("key", 5)], [4, 4, 1]),
    ],
)
def test_constants_and_features_can_be_left_out(d, constants, features, expected):
    without = pd.DataFrame(features, columns=["side", "feature"]) if features else None
    frame = pair_importances(d, constants, without)
    assert frame["masked_importance"].tolist() == expected


def test_maps_without_statistics_are_refused(llama_bridge):
    with pytest.raises(ValueError, match="has statistics: rank its pairs on data"):
        pair_importances(tiny_dictionary(llama_bridge))
    with pytest.raises(ValueError, match="no feature map"):
        head_table(tiny_dictionary(llama_bridge, n_pairs=0))


# What each head has


def test_head_table_by_hand(d):
    table = head_table(d)
    assert table["head"].tolist() == [0, 1, 2, 3]
    assert table["pairs"].tolist() == [2, 3, 1, 0]
    assert table["query_constant"].tolist() == [0, 1, 0, 0]
    assert table["key_constant"].tolist() == [0, 1, 0, 0]
    assert table["query_features"].tolist() == [1, 2, 1, 0]
    assert table["key_features"].tolist() == [2, 1, 1, 0]
    assert table["masked_importance"].tolist() == [13, 7.25, 1, 0]
    assert table["top_1_percent"].tolist() == pytest.approx([9 / 13, 4 / 7.25, 1, 0])


def test_shares_of_the_strongest_pairs(llama_bridge):
    """23 pairs of head 1 with importance 1, ..., 23: a hundredth is one pair, a tenth three."""
    pairs = [(n, 30 - n, 1, 1.0, n + 1.0, 0.0) for n in range(23)]
    row = head_table(dictionary_with(llama_bridge, pairs)).iloc[1]
    assert row["top_1_percent"] == pytest.approx(23 / 276)
    assert row["top_10_percent"] == pytest.approx((23 + 22 + 21) / 276)


# How many heads a pair of features serves


def test_participation_by_hand(d):
    table = participation(d)
    features = table[["query_feature", "key_feature"]].to_numpy().tolist()
    assert features == [[2, 3], [2, 5], [7, D_KEY], [D_QUERY, 3]]
    assert table["masked_importance"].tolist() == [9, 9, 2.25, 1]
    assert table["heads"].tolist() == [3, 1, 1, 1]
    assert table["participation"].tolist() == pytest.approx([81 / 33, 1, 1, 1])
    assert table["leading_head"].tolist() == [0, 0, 1, 1]
    assert table["leading_share"].tolist() == pytest.approx([4 / 9, 1, 1, 1])
    assert len(participation(d, pair_importances(d, constants=False))) == 2


def test_participation_equals_a_loop(llama_bridge):
    generator = torch.Generator().manual_seed(0)
    importances: dict[tuple[int, int], dict[int, float]] = {}  # by features, then head
    pairs = []
    for a in range(5):
        for b in range(7):
            for head in range(4):
                weight, importance = torch.rand(2, generator=generator).tolist()
                if weight > 0.4:
                    pairs.append((a, b, head, weight, importance, 0.0))
                    heads = importances.setdefault((a, b), {})
                    heads[head] = weight * weight * importance
    table = participation(dictionary_with(llama_bridge, pairs))
    assert table["masked_importance"].is_monotonic_decreasing
    assert 25 < len(table) == len(importances)
    assert 1 < table["participation"].max() <= 4
    rows = table.set_index(["query_feature", "key_feature"])
    for features, heads in importances.items():
        row = rows.loc[features]
        total = sum(heads.values())
        squares = sum(value * value for value in heads.values())
        assert row["participation"] == pytest.approx(total**2 / squares, rel=1e-5)
        assert row["heads"] == len(heads)
        assert row["leading_head"] == max(heads, key=heads.get)
        assert row["leading_share"] == pytest.approx(max(heads.values()) / total, rel=1e-5)


def test_superposition_is_a_histogram():
    participations = pd.DataFrame(
        {
            "participation": [1.0, 1.4, 2.6, 3.2],
            "heads": [1, 2, 4, 4],
            "masked_importance": [1.0, 2.0, 4.0, 13.0],
        }
    )
    table = superposition(participations)
    assert table["heads_served"].tolist() == [1, 2, 3, 4]
    assert table["combinations"].tolist() == [2, 0, 2, 0]
    assert table["share_of_combinations"].tolist() == [0.5, 0, 0.5, 0]
    assert table["share_of_importance"].tolist() == pytest.approx([3 / 20, 0, 17 / 20, 0])


def test_shared_reasons_by_hand(d):
    similarity = shared_reasons(d).to_numpy()
    zero_one = 4 / math.sqrt(13 * 7.25)
    zero_two = 2 / math.sqrt(13)
    one_two = 2 / math.sqrt(7.25)
    expected = [[1, zero_one, zero_two], [zero_one, 1, one_two], [zero_two, one_two, 1]]
    assert np.abs(similarity[:3, :3] - expected).max() < 1e-12
    assert np.isnan(similarity[3]).all()
    assert np.isnan(similarity[:, 3]).all()
    features_only = shared_reasons(d, pair_importances(d, constants=False))
    assert features_only.loc[1, 2] == pytest.approx(1)  # all that the two have is the same pair


# Dense features


@pytest.fixture(scope="module")
def always_on(llama_bridge):
    """A dictionary whose query feature 4 is always on, its features, and their statistics."""
    d = tiny_dictionary(llama_bridge)
    d.query.b_enc[4] = 100.0
    tokens = tiny_tokens(5, 13)
    x, _ = inputs_and_scores(llama_bridge, tokens)
    return d.features(x), collect_activations(d, [(tokens, x)], progress=False)


def test_dense_features_are_those_that_fire_often(always_on):
    features, statistics = always_on
    frame = dense_features(statistics, threshold=0.4)
    expected = {}
    for side, acts in features._asdict().items():
        for feature in range(acts.shape[2]):
            density = float((acts[..., feature] > 0).double().mean())
            if density > 0.4:
                expected[side, feature] = density
    assert frame.set_index(["side", "feature"])["density"].to_dict() == expected
    assert set(frame["side"]) == {"query", "key"}
    assert 4 < len(frame) < D_QUERY
    assert frame["density"].is_monotonic_decreasing


def test_features_that_are_always_on_are_named_so(always_on):
    frame = dense_features(always_on[1], threshold=0.4).set_index(["side", "feature"])
    assert frame.loc[("query", 4), "kind"] == "always on"
    kinds = np.where(frame["density"] > ALWAYS_ON, "always on", "dense")
    assert frame["kind"].tolist() == kinds.tolist()
    assert set(kinds) == {"always on", "dense"}


def test_thresholds_that_are_no_share_are_refused(always_on):
    with pytest.raises(ValueError, match=r"share of tokens in \[0, 1\), got 1.5"):
        dense_features(always_on[1], threshold=1.5)
