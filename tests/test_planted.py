"""Planted layers are what they say, and scores against them are right where the answer is known."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sae_lens_qk as qk
from sae_lens_qk.attention import attention_scores
from sae_lens_qk.config import BilinearQKConfig

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.quality.methods import Budget, next_strength, sweep_penalty
from benchmarks.quality.planted import ALWAYS_ON, FIRST_TOKEN, Circuit, plant, sample
from benchmarks.quality.recovery import SETTINGS, SMOKE, Case, contrastive_covariances, run_case
from benchmarks.quality.scores import Ranked, match, score

EASY, ROTARY, HARD = (SETTINGS[name] for name in ("easy", "easy, rotary", "hard"))


def oracle(circuit: Circuit) -> qk.BilinearQKDictionary:
    """The dictionary that was planted: dual basis as encoders, the features through W_Q and W_K as decoders."""
    n, d_model = circuit.features.shape
    cfg = BilinearQKConfig(
        d_in=d_model, d_query=n, d_key=n, attention=circuit.spec.to_dict(), model_name="planted"
    )
    made = qk.BilinearQKDictionary(cfg).requires_grad_(False)
    for half, vectors in zip((made.query, made.key), circuit.vectors(), strict=True):
        half.W_enc.copy_(torch.linalg.pinv(circuit.features))
        half.b_enc.zero_()
        half.get_parameter("threshold").fill_(0.05)
        half.W_dec.copy_(vectors)
        half.b_dec.zero_()
    return made


def scores_of(circuit: Circuit, x: torch.Tensor) -> torch.Tensor:
    return attention_scores(circuit.weights.queries(x), circuit.weights.keys(x), circuit.spec)


@pytest.mark.parametrize("setting", [EASY, ROTARY])
def test_scores_come_from_the_planted_pairs_alone(setting):
    circuit = plant(setting, seed=3)
    everything = torch.cartesian_prod(
        *(torch.arange(len(circuit.features)),) * 2, torch.arange(setting.n_heads)
    )
    kernel = oracle(circuit).pair_kernel(everything, [0, 7])
    planted = {tuple(pair) for pair in circuit.pairs.tolist()}
    listed = torch.tensor([tuple(pair) in planted for pair in everything.tolist()])
    assert kernel[~listed].abs().max() < 1e-4
    assert kernel[listed][:, 0].min() > 0.5
    assert (kernel[listed][:, 0] != kernel[listed][:, 1]).any() == setting.rotary
    assert len(planted) == len(circuit.pairs) == setting.n_heads * (1 + setting.pairs_per_head)


@pytest.mark.parametrize("setting", [EASY, ROTARY, HARD])
def test_noise_is_in_queries_and_keys_and_in_no_score(setting):
    circuit = plant(setting, seed=3)
    data = sample(circuit, 2, 12, seed=5)
    noise = (
        3
        * torch.randn(2, 12, setting.d_noise, generator=torch.Generator().manual_seed(0))
        @ circuit.irrelevant
    )
    clean, noisy = scores_of(circuit, data.x), scores_of(circuit, data.x + noise)
    torch.testing.assert_close(clean, noisy, rtol=1e-4, atol=1e-3)
    assert circuit.weights.queries(noise).abs().max() > 1
    assert circuit.weights.keys(noise).abs().max() > 1


def test_special_features_and_seeds():
    circuit = plant(HARD, seed=4)
    data = sample(circuit, 6, 10, seed=1)
    assert (data.acts[..., ALWAYS_ON] > 0).all()
    assert ((data.acts[..., FIRST_TOKEN] > 0).any(dim=0) == (torch.arange(10) == 0)).all()
    asks = {tuple(pair) for pair in circuit.pairs[circuit.pairs[:, 0] == ALWAYS_ON].tolist()}
    assert asks == {(ALWAYS_ON, FIRST_TOKEN, head) for head in range(HARD.n_heads)}
    assert torch.equal(data.x, sample(circuit, 6, 10, seed=1).x)
    assert not torch.equal(data.x, sample(circuit, 6, 10, seed=2).x)
    assert torch.equal(circuit.pairs, plant(HARD, seed=4).pairs)
    assert not torch.equal(circuit.pairs, plant(HARD, seed=5).pairs)
    special = circuit.features[[FIRST_TOKEN, ALWAYS_ON]]
    assert (special @ circuit.features.T).fill_diagonal_(0).abs().max() < 1e-5


def test_packed_pairs_look_aligned_and_never_meet():
    circuit = plant(HARD, seed=4)
    acts = sample(circuit, 64, 16, seed=1).acts.sum(dim=1) > 0
    first, last = circuit.pairs[circuit.pairs[:, 2] == 0][[1, -HARD.n_packed]]
    assert (circuit.topics[first[:2]] == 0).all()
    assert (circuit.topics[last[:2]] == 1).all()
    assert not (acts[:, first[0]] & acts[:, last[1]]).any()
    query, key = (rows.unflatten(1, (HARD.n_heads, -1))[:, 0] for rows in circuit.vectors())
    crossed = query[first[0]] @ key[last[1]] * circuit.spec.scale
    assert crossed > 0.3 * HARD.strength


def test_heads_hold_only_so_many_pairs():
    with pytest.raises(ValueError, match="holds 16 pairs"):
        plant(replace(EASY, pairs_per_head=16), seed=0)
    with pytest.raises(ValueError, match="at most half are packed"):
        plant(replace(EASY, n_packed=7), seed=0)


@pytest.mark.parametrize("setting", [EASY, ROTARY])
def test_the_planted_dictionary_has_full_marks(setting):
    circuit = plant(setting, seed=3)
    test = sample(circuit, 8, 24, seed=9)
    n = len(circuit.pairs)
    found = score(Ranked(oracle(circuit), circuit.pairs, torch.ones(n)), circuit, test, [n // 2, n])
    assert min(found.recovery_query, found.recovery_key) > 0.999
    assert found.average_precision == found.f1 == 1.0
    assert found.transcoders_kl < 1e-5
    half, full = found.curve
    assert (full.precision, full.recall, full.f1) == (1.0, 1.0, 1.0)
    assert full.pattern_kl < 1e-5 < half.pattern_kl
    assert (half.precision, half.recall) == (1.0, pytest.approx(n // 2 / n))


def test_wrong_and_missing_pairs_cost():
    circuit = plant(EASY, seed=3)
    test, n = sample(circuit, 4, 16, seed=9), len(circuit.pairs)
    wrong = circuit.pairs.clone()
    wrong[:, 2] = (wrong[:, 2] + 1) % EASY.n_heads
    planted = {tuple(pair) for pair in circuit.pairs.tolist()}
    wrong = torch.tensor([pair for pair in wrong.tolist() if tuple(pair) not in planted])
    mixed = torch.stack([circuit.pairs[: len(wrong)], wrong], dim=1).flatten(0, 1)
    found = score(Ranked(oracle(circuit), mixed, torch.ones(len(mixed))), circuit, test, [n])
    precisions = [(i + 1) / (2 * i + 1) for i in range(len(wrong))]
    assert found.average_precision == pytest.approx(sum(precisions) / n)
    assert found.f1 == pytest.approx(0.5, abs=0.02)
    some = score(Ranked(oracle(circuit), circuit.pairs[:10], torch.ones(10)), circuit, test, [n])
    assert some.average_precision == pytest.approx(10 / n)
    assert (some.curve[0].precision, some.curve[0].recall) == (1.0, pytest.approx(10 / n))


def test_matching_is_one_to_one_and_optimal():
    planted = torch.eye(3)
    learned = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.1, 2.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    matching = match(learned, planted, [10, 20, 30])
    assert matching.planted_of == {2: 10, 0: 20, 1: 30}
    assert matching.cosines[0] == 1.0


def test_labels_make_contrasts_find_the_easy_pairs():
    circuit = plant(EASY, seed=3)
    n = len(circuit.pairs)
    found = contrastive_covariances(circuit, Budget(), 3, [n])
    assert found.f1 > 0.85
    assert found.transcoders_kl is None


def test_penalties_are_searched_between_too_weak_and_too_strong():
    assert next_strength({1.0: 2.0}) == 3.0
    assert next_strength({1.0: 0.5}) == pytest.approx(1 / 3)
    assert next_strength({1.0: 2.0, 4.0: 0.5}) == 2.0
    swept = sweep_penalty(
        lambda strength: (strength, 2 / strength), 0.5
    )  # L0 is right at a strength of 2
    assert (swept.dictionary, swept.ratio, swept.n_tried) == (
        pytest.approx(2.0, rel=0.1),
        pytest.approx(1, abs=0.1),
        5,
    )


def test_a_training_gives_rows_of_plain_numbers():
    rows = run_case(Case("planted", "easy, rotary", "ours", 0, 0.25), SMOKE)
    assert [row["method"] for row in rows] == [
        "ours",
        "frozen mask",
        "importance",
        "decoder product",
    ]
    for row in rows:
        assert 0 <= row["average_precision"] <= 1
        assert row["uniform_kl"] > 0.1
        assert {at["n_pairs"] for at in row["curve"]} >= {row["planted_pairs"]}
