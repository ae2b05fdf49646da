"""Ranking of pairs: statistics in dense float64, forgetting in a full table, costs as predicted."""

import logging
from typing import NamedTuple

import pytest
import torch
from oracles import dense_kernel, with_one
from tiny_dictionaries import (
    D_KEY,
    D_QUERY,
    LAYER,
    inputs_and_scores,
    pair_term,
    pattern_by_hand,
    tiny_dictionary,
)
from tiny_models import KINDS, tiny_model, tiny_tokens
from torch import Tensor

import sae_lens_qk as qk
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.host.layer import AttentionLayer
from sae_lens_qk.scoring.pairs import Decoders
from sae_lens_qk.training.candidates import (
    FeatureBatch,
    PairTable,
    firing_rates,
    rank_features,
    rank_pairs,
)
from sae_lens_qk.weights import QKWeights

N_POS = 17
EVERYTHING = 10_000
"""More candidates than there are pairs."""


class Problem(NamedTuple):
    dictionary: qk.BilinearQKDictionary
    weights: QKWeights
    x: Tensor
    scores: Tensor
    """The model's own, float64 [batch, head, pos_q, pos_k]; 0 where not allowed."""

    def rank(self, n: int) -> SparseFeatureMap:
        batches = iter([self.x[:2], self.x[2:]])
        return rank_pairs(self.dictionary, self.weights, batches, n)

    @property
    def pattern(self) -> Tensor:
        return pattern_by_hand(self.scores)

    def features(self) -> FeatureBatch:
        return FeatureBatch(*self.dictionary.features(self.x), self.pattern)


class Exact(NamedTuple):
    """[d_query + 1, d_key + 1, head] each, float64."""

    importance: Tensor
    effect: Tensor
    co_occurrence: Tensor
    mean_square: Tensor
    """First part of the importance: how large the numbers were that it is the difference of."""


def make_problem(kind: str) -> Problem:
    model = tiny_model(kind)
    x, scores = inputs_and_scores(model, tiny_tokens(3, N_POS))
    is_masked = scores <= torch.finfo(scores.dtype).min / 2
    scores = scores.double().masked_fill(is_masked, 0.0)
    weights = AttentionLayer(model, LAYER).qk_weights
    return Problem(tiny_dictionary(model, n_pairs=0), weights, x, scores)


def exact_statistics(
    batch: FeatureBatch,
    decoders: Decoders,
    spec: qk.AttentionSpec,
) -> Exact:
    """Every pair at once: c[n, a, b, h, i, j] in float64."""
    pattern = batch.pattern.double()
    n_rows, _, n_pos, _ = pattern.shape
    positions = torch.arange(n_pos)
    offsets = positions[:, None] - positions
    allowed = offsets >= 0
    if spec.window is not None:
        allowed &= offsets < spec.window
    kernel = dense_kernel(decoders, spec, n_pos)  # [a, b, h, offset]
    kernel = kernel.expand(*kernel.shape[:3], n_pos)[..., offsets.clamp(min=0)] * allowed
    query_acts = with_one(batch.query_acts).double()
    key_acts = with_one(batch.key_acts).double()
    c = torch.einsum("nia,njb,abhij->nabhij", query_acts, key_acts, kernel)
    query_fires = (query_acts != 0).double()
    key_fires = (key_acts != 0).double()
    n_together = torch.einsum("nia,njb,ij->ab", query_fires, key_fires, allowed.double())
    n_together = n_together[..., None].expand(-1, -1, spec.n_heads)
    mean_square = torch.einsum("nhij,nabhij->nabhi", pattern, c.square())
    mean = torch.einsum("nhij,nabhij->nabhi", pattern, c)
    n_queries = n_rows * n_pos
    return Exact(
        importance=0.5 * (mean_square - mean.square()).sum(dim=(0, 4)) / n_queries,
        effect=c.sum(dim=(0, 4, 5)) / n_together.clamp(min=1),
        co_occurrence=n_together / (n_rows * allowed.sum()),
        mean_square=0.5 * mean_square.sum(dim=(0, 4)) / n_queries,
    )


def assert_statistics(
    ranked: SparseFeatureMap,
    exact: Exact,
) -> None:
    entries = tuple(ranked.indices.T)
    importance, effect, co_occurrence = ranked.statistics.double().T
    expected = exact.importance[entries]
    torch.testing.assert_close(co_occurrence, exact.co_occurrence[entries], rtol=1e-6, atol=0)
    torch.testing.assert_close(effect, exact.effect[entries], rtol=1e-5, atol=1e-5)
    rounding = 1e-5 * exact.mean_square[entries]
    assert ((importance - expected).abs() <= 1e-4 * expected + rounding).all()


@pytest.fixture(scope="module", params=KINDS)
def ranked(request) -> tuple[Problem, Exact, SparseFeatureMap]:
    """Shared and not to be changed; all pairs fit into the table."""
    problem = make_problem(request.param)
    d = problem.dictionary
    exact = exact_statistics(problem.features(), d.decoders, d.spec)
    return problem, exact, problem.rank(EVERYTHING)


def test_statistics_of_every_pair_equal_the_dense_reference(ranked):
    _, exact, candidates = ranked
    assert candidates.weights.eq(1).all()
    assert_statistics(candidates, exact)
    assert candidates.statistics[:, 0].max() > 0.05


def test_every_pair_that_ever_fired_together_is_listed(ranked):
    _, exact, candidates = ranked
    is_listed = torch.zeros_like(exact.importance, dtype=torch.bool)
    is_listed[tuple(candidates.indices.T)] = True
    ever_fired = exact.co_occurrence > 0
    assert not (is_listed & ~ever_fired).any()
    assert not is_listed[D_QUERY, D_KEY].any()
    matters = exact.importance > 1e-5 * exact.mean_square + 1e-12
    matters[D_QUERY, D_KEY] = False
    assert is_listed[matters].all()
    assert 500 < int(is_listed.sum()) < is_listed.numel() * 0.9
    assert is_listed[D_QUERY].any()
    assert is_listed[:, D_KEY].any()


def test_importance_of_single_pairs_equals_the_plain_loop(ranked):
    """Pairs of every kind: both features, query constant, key constant."""
    problem, _, candidates = ranked
    query_acts, key_acts, pattern = (tensor.double().numpy() for tensor in problem.features())
    kinds = [
        candidates,
        candidates.restrict(query_features=D_QUERY),
        candidates.restrict(key_features=D_KEY),
    ]
    for pairs in kinds:
        strongest = pairs.select(pairs.statistics[:, 0].topk(2).indices)
        importances = strongest.statistics[:, 0].tolist()
        for pair, importance in zip(strongest.indices.tolist(), importances, strict=True):
            c = pair_term(problem.dictionary, query_acts, key_acts, pair)
            total = 0.0
            for row in range(len(c)):
                for i in range(N_POS):
                    P = pattern[row, pair[2], i, : i + 1]
                    term = c[row, i, : i + 1]
                    total += 0.5 * float(P @ term**2 - (P @ term) ** 2)
            assert importance == pytest.approx(total / (len(c) * N_POS), rel=1e-4, abs=1e-6)


def test_terms_constant_over_keys_are_worth_nothing():
    """Without rotary embeddings query feature x key bias cancels in the softmax, however large."""
    learned = make_problem("gpt2")
    d = learned.dictionary
    exact = exact_statistics(learned.features(), d.decoders, d.spec)
    assert exact.mean_square[:D_QUERY, D_KEY].max() > 0.05
    constant = learned.rank(EVERYTHING).restrict(key_features=D_KEY)
    assert constant.statistics[:, 0].lt(1e-6).all()
    rotary_constant = make_problem("llama").rank(EVERYTHING).restrict(key_features=D_KEY)
    assert rotary_constant.statistics[:, 0].max() > 1e-3


@pytest.mark.parametrize("n", [600, 1500])
def test_fewer_candidates_are_the_most_important(ranked, n):
    problem, exact, candidates = ranked
    best = problem.rank(n)
    assert len(best) == n
    strongest = candidates.select(candidates.statistics[:, 0].topk(n).indices)
    assert torch.equal(best.indices, strongest.indices)
    assert torch.equal(best.statistics, candidates.statistics[candidates.find(best.indices)])
    entries = tuple(best.indices.T)
    others = exact.importance.clone()
    others[entries] = 0
    others[D_QUERY, D_KEY] = 0
    assert others.max() <= exact.importance[entries].min() * 1.001


def test_rows_may_come_in_any_batches_and_features_in_any_parts(monkeypatch):
    problem = make_problem("llama")

    def rank(batches) -> SparseFeatureMap:
        return rank_pairs(problem.dictionary, problem.weights, batches, 1500)

    whole = rank([problem.x])
    single_rows = rank(iter(problem.x[:, None]))
    monkeypatch.setattr("sae_lens_qk.training.candidates._ROWS_AT_ONCE", 7)
    small_parts = rank([problem.x])
    for either in (single_rows, small_parts):
        assert torch.equal(whole.indices, either.indices)
        torch.testing.assert_close(whole.statistics, either.statistics, rtol=1e-5, atol=1e-7)


class RandomFeatures(NamedTuple):
    batches: list[FeatureBatch]
    decoders: Decoders
    spec: qk.AttentionSpec

    def rank(self, n: int) -> SparseFeatureMap:
        return rank_features(self.batches, self.decoders, self.spec, n)


def random_features(
    d_query: int, d_key: int, n_rows: int, n_pos: int = 23, window: int | None = None
) -> RandomFeatures:
    """Features that fire at rates from rare to frequent, and random patterns."""
    spec = qk.AttentionSpec(
        n_heads=6,
        n_kv_heads=3,
        d_head=10,
        d_model=11,
        scale=0.5,
        rotary_inv_freq=(1.0, 0.3),
        window=window,
    )
    generator = torch.Generator().manual_seed(0)
    query_rows = torch.randn(d_query + 1, spec.n_heads, 10, generator=generator)
    key_rows = torch.randn(d_key + 1, spec.n_kv_heads, 10, generator=generator)
    query_rates = 0.03 * torch.randn(d_query, generator=generator).exp()
    key_rates = 0.03 * torch.randn(d_key, generator=generator).exp()

    def random_acts(rates: Tensor) -> Tensor:
        chances = torch.rand(1, n_pos, len(rates), generator=generator)
        return (chances < rates) * torch.rand(chances.shape, generator=generator)

    batches = []
    for _ in range(n_rows):
        query_acts = random_acts(query_rates)
        key_acts = random_acts(key_rates)
        scores = 1.5 * torch.randn(1, spec.n_heads, n_pos, n_pos, generator=generator)
        batches.append(FeatureBatch(query_acts, key_acts, spec.pattern(scores)))
    return RandomFeatures(batches, Decoders(query_rows, key_rows), spec)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_keys_outside_the_window_do_not_count(window):
    features = random_features(
        d_query=17,
        d_key=19,
        n_rows=5,
        n_pos=11,
        window=window,
    )
    whole = FeatureBatch(*(torch.cat(tensors) for tensors in zip(*features.batches, strict=True)))
    exact = exact_statistics(whole, features.decoders, features.spec)
    if window == 1:  # one key leaves no choice
        with pytest.raises(ValueError, match="No pair of features ever fired together"):
            features.rank(EVERYTHING)
        return
    candidates = features.rank(EVERYTHING)
    assert len(candidates) > 100
    assert_statistics(candidates, exact)


@pytest.mark.parametrize("n", [101, 1009])
def test_a_full_table_forgets_the_least_important(n, caplog):
    """More pairs fire together than the tables hold: the best stay, with their true numbers."""
    features = random_features(
        d_query=97,
        d_key=101,
        n_rows=53,
    )
    exact = features.rank(300_000)
    assert len(exact) > 50 * n
    with caplog.at_level(logging.DEBUG, logger="sae_lens_qk"):
        bounded = features.rank(n)
    assert sum("forgot" in message for message in caplog.messages) > 2
    assert len(bounded) == n
    best = exact.select(exact.statistics[:, 0].topk(n).indices)
    assert (best.find(bounded.indices) >= 0).double().mean() >= 0.9
    importance = exact.statistics[exact.find(bounded.indices), 0]
    # what was forgotten cannot be made up
    assert (bounded.statistics[:, 0] <= importance * 1.0001).all()
    assert (bounded.statistics[:, 0] >= 0.9 * importance).double().mean() >= 0.9


@pytest.mark.parametrize(
    ("n_candidates", "message"),
    [
        (0, "n_candidates must be at least 1, got 0"),
        (-3, "n_candidates must be at least 1, got -3"),
        (10**12, "GiB are free: ask for fewer"),
    ],
)
def test_impossible_numbers_are_refused_before_any_row_is_read(n_candidates, message):
    problem = make_problem("gpt2")

    def rows():
        raise AssertionError("a row was read")
        yield

    with pytest.raises(ValueError, match=message):
        rank_pairs(problem.dictionary, problem.weights, rows(), n_candidates)
    with pytest.raises(ValueError, match=message):
        PairTable(n_candidates, D_QUERY + 1, D_KEY + 1, 3)


def test_nothing_that_fires_is_an_error():
    problem = make_problem("gpt2")
    d = problem.dictionary
    d.query.b_enc.fill_(-100.0)
    d.key.b_enc.fill_(-100.0)
    d.key.W_dec.zero_()
    with pytest.raises(ValueError, match="No pair of features ever fired together"):
        problem.rank(10)


def test_firing_rates_are_shares_of_tokens():
    problem = make_problem("neox")
    rates = firing_rates(problem.dictionary, iter([problem.x[:2], problem.x[2:]]))
    features = problem.dictionary.features(problem.x)
    for side in ("query", "key"):
        tokens = getattr(features, side).flatten(0, 1).tolist()
        side_rates = getattr(rates, side)
        expected = [
            sum(act > 0 for act in acts) / len(tokens) for acts in zip(*tokens, strict=True)
        ]
        assert side_rates.tolist() == pytest.approx(expected, rel=1e-6)
        assert side_rates[-5:].eq(0).all()
        assert 0.1 < side_rates.mean() < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_a_pair_costs_what_was_predicted(kind):
    """KL after a small part of a pair leaves the model's own scores, for weak and strong pairs."""
    problem = make_problem(kind)
    d = problem.dictionary
    spec = d.spec
    candidates = problem.rank(EVERYTHING)
    true = spec.log_pattern(problem.scores)
    query_acts, key_acts, _ = (tensor.double().numpy() for tensor in problem.features())
    order = candidates.statistics[:, 0].argsort(descending=True)
    for row in order[[0, 1, 2, 10, 50, 200]].tolist():
        pair = candidates.indices[row].tolist()
        head = pair[2]
        term = torch.from_numpy(pair_term(d, query_acts, key_acts, pair))
        step = 0.03 / float(term.abs().max())  # where the leading order holds
        changed = problem.scores.clone()
        changed[:, head] -= step * term
        cost = spec.kl(true, spec.log_pattern(changed))
        other_heads = [other for other in range(spec.n_heads) if other != head]
        assert cost[:, other_heads].abs().max() == 0
        predicted = step**2 * float(candidates.statistics[row, 0])
        assert predicted > 1e-9
        assert float(cost[:, head].mean()) == pytest.approx(predicted, rel=0.05)
