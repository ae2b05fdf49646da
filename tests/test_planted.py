"""Planted layers are what they say, and scores against them are right where the answer is known."""

from dataclasses import replace

import pytest
import torch

import sae_lens_qk as qk
from benchmarks.quality.methods import Budget
from benchmarks.quality.penalty import next_strength, sweep_penalty
from benchmarks.quality.planted import ALWAYS_ON, FIRST_TOKEN, Circuit, plant, sample
from benchmarks.quality.recovery import SETTINGS, SMOKE, Case, contrastive_covariances, run_case
from benchmarks.quality.scores import RankedPairs, match, score

EASY = SETTINGS["easy"]
ROTARY = SETTINGS["easy, rotary"]
HARD = SETTINGS["hard"]


def planted_dictionary(circuit: Circuit) -> qk.BilinearQKDictionary:
    """Dual basis as encoders, the features through W_Q and W_K as decoders."""
    n_features, d_model = circuit.features.shape
    cfg = qk.BilinearQKConfig(
        d_in=d_model,
        d_query=n_features,
        d_key=n_features,
        attention=circuit.spec.to_dict(),
        model_name="planted",
    )
    d = qk.BilinearQKDictionary(cfg).requires_grad_(False)
    for half, vectors in zip((d.query, d.key), circuit.vectors(), strict=True):
        half.W_enc.copy_(torch.linalg.pinv(circuit.features))
        half.b_enc.zero_()
        half.get_parameter("threshold").fill_(0.05)
        half.W_dec.copy_(vectors)
        half.b_dec.zero_()
    return d


def planted_pairs(circuit: Circuit) -> set[tuple[int, ...]]:
    return {tuple(pair) for pair in circuit.pairs.tolist()}


# What is planted


@pytest.mark.parametrize("setting", [EASY, ROTARY])
def test_scores_come_from_the_planted_pairs_alone(setting):
    circuit = plant(setting, seed=3)
    features = torch.arange(len(circuit.features))
    every_pair = torch.cartesian_prod(features, features, torch.arange(setting.n_heads))
    kernel = planted_dictionary(circuit).pair_kernel(every_pair, [0, 7])
    planted = planted_pairs(circuit)
    is_planted = torch.tensor([tuple(pair) in planted for pair in every_pair.tolist()])
    assert kernel[~is_planted].abs().max() < 1e-4
    assert kernel[is_planted][:, 0].min() > 0.5
    depends_on_offset = bool((kernel[is_planted][:, 0] != kernel[is_planted][:, 1]).any())
    assert depends_on_offset == setting.rotary
    assert len(planted) == len(circuit.pairs)
    assert len(planted) == setting.n_heads * (1 + setting.pairs_per_head)


@pytest.mark.parametrize("setting", [EASY, ROTARY, HARD])
def test_noise_is_in_queries_and_keys_and_in_no_score(setting):
    circuit = plant(setting, seed=3)
    x = sample(circuit, 2, 12, seed=5).x
    generator = torch.Generator().manual_seed(0)
    noise = 3 * torch.randn(2, 12, setting.d_noise, generator=generator) @ circuit.irrelevant

    def scores(x):
        return circuit.spec.scores(circuit.weights.queries(x), circuit.weights.keys(x))

    torch.testing.assert_close(scores(x), scores(x + noise), rtol=1e-4, atol=1e-3)
    assert circuit.weights.queries(noise).abs().max() > 1
    assert circuit.weights.keys(noise).abs().max() > 1


def test_special_features():
    circuit = plant(HARD, seed=4)
    acts = sample(circuit, 6, 10, seed=1).acts
    assert (acts[..., ALWAYS_ON] > 0).all()
    first_token_fires = (acts[..., FIRST_TOKEN] > 0).any(dim=0)
    assert first_token_fires.tolist() == [True] + [False] * 9
    always_on_pairs = circuit.pairs[circuit.pairs[:, 0] == ALWAYS_ON].tolist()
    assert always_on_pairs == [[ALWAYS_ON, FIRST_TOKEN, head] for head in range(HARD.n_heads)]
    special = circuit.features[[FIRST_TOKEN, ALWAYS_ON]]
    cosines = (special @ circuit.features.T).fill_diagonal_(0)
    assert cosines.abs().max() < 1e-5


def test_seeds_decide():
    circuit = plant(HARD, seed=4)
    x = sample(circuit, 6, 10, seed=1).x
    assert torch.equal(x, sample(circuit, 6, 10, seed=1).x)
    assert not torch.equal(x, sample(circuit, 6, 10, seed=2).x)
    assert torch.equal(circuit.pairs, plant(HARD, seed=4).pairs)
    assert not torch.equal(circuit.pairs, plant(HARD, seed=5).pairs)


def test_packed_pairs_look_aligned_and_never_meet():
    circuit = plant(HARD, seed=4)
    fires = sample(circuit, 64, 16, seed=1).acts.sum(dim=1) > 0  # [row, feature]
    pairs = circuit.pairs[circuit.pairs[:, 2] == 0]
    query_feature, first_key, _ = pairs[1]
    last_query, key_feature, _ = pairs[-HARD.n_packed]
    assert circuit.topics[query_feature] == circuit.topics[first_key] == 0
    assert circuit.topics[last_query] == circuit.topics[key_feature] == 1
    assert not (fires[:, query_feature] & fires[:, key_feature]).any()
    query_vectors, key_vectors = circuit.vectors()
    query = query_vectors.unflatten(1, (HARD.n_heads, -1))[query_feature, 0]
    key = key_vectors.unflatten(1, (HARD.n_heads, -1))[key_feature, 0]
    assert query @ key * circuit.spec.scale > 0.3 * HARD.strength


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pairs_per_head": 16}, "holds 16 pairs"), ({"n_packed": 7}, "at most half are packed")],
)
def test_heads_hold_only_so_many_pairs(changes, message):
    with pytest.raises(ValueError, match=message):
        plant(replace(EASY, **changes), seed=0)


# Scores


@pytest.mark.parametrize("setting", [EASY, ROTARY])
def test_the_planted_dictionary_has_full_marks(setting):
    circuit = plant(setting, seed=3)
    test = sample(circuit, 8, 24, seed=9)
    n_planted = len(circuit.pairs)
    best = RankedPairs(planted_dictionary(circuit), circuit.pairs, torch.ones(n_planted))
    scores = score(best, circuit, test, [n_planted // 2, n_planted])
    assert min(scores.recovery_query, scores.recovery_key) > 0.999
    assert scores.average_precision == scores.f1 == 1.0
    assert scores.transcoders_kl < 1e-5
    half, full = scores.curve
    assert (full.precision, full.recall, full.f1) == (1.0, 1.0, 1.0)
    assert full.pattern_kl < 1e-5 < half.pattern_kl
    assert half.precision == 1.0
    assert half.recall == pytest.approx(n_planted // 2 / n_planted)


def test_wrong_pairs_cost():
    """Every second pair of the ranking is wrong."""
    circuit = plant(EASY, seed=3)
    test = sample(circuit, 4, 16, seed=9)
    n_planted = len(circuit.pairs)
    other_heads = circuit.pairs.clone()
    other_heads[:, 2] = (other_heads[:, 2] + 1) % EASY.n_heads
    planted = planted_pairs(circuit)
    wrong = [pair for pair in other_heads.tolist() if tuple(pair) not in planted]
    right = circuit.pairs[: len(wrong)]
    mixed = torch.stack([right, torch.tensor(wrong)], dim=1).flatten(0, 1)
    best = RankedPairs(planted_dictionary(circuit), mixed, torch.ones(len(mixed)))
    scores = score(best, circuit, test, [n_planted])
    precisions = [(i + 1) / (2 * i + 1) for i in range(len(wrong))]
    assert scores.average_precision == pytest.approx(sum(precisions) / n_planted)
    assert scores.f1 == pytest.approx(0.5, abs=0.02)


def test_missing_pairs_cost():
    circuit = plant(EASY, seed=3)
    test = sample(circuit, 4, 16, seed=9)
    n_planted = len(circuit.pairs)
    best = RankedPairs(planted_dictionary(circuit), circuit.pairs[:10], torch.ones(10))
    scores = score(best, circuit, test, [n_planted])
    assert scores.average_precision == pytest.approx(10 / n_planted)
    assert scores.curve[0].precision == 1.0
    assert scores.curve[0].recall == pytest.approx(10 / n_planted)


def test_matching_is_one_to_one_and_optimal():
    planted = torch.eye(3)
    learned = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.1, 2.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    matching = match(learned, planted, [10, 20, 30])
    assert matching.planted_numbers == {2: 10, 0: 20, 1: 30}
    assert matching.cosines[0] == 1.0


# Methods


def test_labels_make_contrasts_find_the_easy_pairs():
    circuit = plant(EASY, seed=3)
    scores = contrastive_covariances(circuit, Budget(), 3, [len(circuit.pairs)])
    assert scores.f1 > 0.85
    assert scores.transcoders_kl is None


@pytest.mark.parametrize(
    ("ratios", "strength"),
    [
        ({1.0: 2.0}, 3.0),
        ({1.0: 0.5}, 1 / 3),
        ({1.0: 2.0, 4.0: 0.5}, 2.0),
    ],
)
def test_penalties_are_searched_between_too_weak_and_too_strong(ratios, strength):
    assert next_strength(ratios) == pytest.approx(strength)


def test_the_search_of_a_penalty_ends_at_the_right_l0():
    def train(strength):
        return strength, 2 / strength  # the L0, right at a strength of 2

    swept = sweep_penalty(train, 0.5)
    assert swept.dictionary == pytest.approx(2.0, rel=0.1)
    assert swept.ratio == pytest.approx(1, abs=0.1)
    assert swept.n_trials == 5


def test_a_training_gives_rows_of_plain_numbers():
    rows = run_case(Case("planted", "easy, rotary", "ours", 0, 0.25), SMOKE)
    methods = [row["method"] for row in rows]
    assert methods == ["ours", "frozen mask", "importance", "decoder product"]
    for row in rows:
        assert 0 <= row["average_precision"] <= 1
        assert row["uniform_kl"] > 0.1
        assert row["planted_pairs"] in [at["n_pairs"] for at in row["curve"]]
