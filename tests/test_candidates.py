"""Ranking of pairs: statistics against dense float64, forgetting in a full table, and the ranking as a prediction."""

import logging
from typing import NamedTuple

import numpy as np
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
from sae_lens_qk.attention import AttentionSpec, log_pattern, pattern_kl
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.host.layer import qk_weights
from sae_lens_qk.scoring.pairs import Decoders
from sae_lens_qk.training.candidates import FeatureBatch, PairTable, firing_rates, rank_features, rank_pairs

N_POS = 17
EVERYTHING = 10_000


class Problem(NamedTuple):
    dictionary: qk.BilinearQKDictionary
    weights: object
    x: Tensor
    pattern: Tensor
    """The model's own, from its own scores, float64 [batch, head, pos_q, pos_k]."""

    def rank(self, n: int, rows: Tensor | None = None) -> SparseFeatureMap:
        x = self.x if rows is None else rows
        return rank_pairs(self.dictionary, self.weights, iter([x[:2], x[2:]]), n)


class Exact(NamedTuple):
    """[d_query + 1, d_key + 1, head] each, float64."""

    importance: Tensor
    effect: Tensor
    co_occurrence: Tensor
    mean_square: Tensor
    """First part of the importance: how large the numbers were that it is the difference of."""


def problem(kind: str, n_rows: int = 3) -> Problem:
    model = tiny_model(kind)
    x, scores = inputs_and_scores(model, tiny_tokens(n_rows, N_POS))
    return Problem(
        tiny_dictionary(model, n_pairs=0),
        qk_weights(model, LAYER),
        x,
        pattern_by_hand(scores.double()),
    )


def exact_statistics(p: Problem) -> Exact:
    """Every pair at once: c[n, a, b, h, i, j] in float64."""
    d, spec = p.dictionary, p.dictionary.spec
    offsets = (torch.arange(N_POS)[:, None] - torch.arange(N_POS)).clamp(min=0)
    kernel = dense_kernel(d.decoders, spec, N_POS)
    kernel = kernel.expand(*kernel.shape[:3], N_POS)[..., offsets].tril()
    query_acts, key_acts = (
        with_one(d.encode_query(p.x)).double(),
        with_one(d.encode_key(p.x)).double(),
    )
    c = torch.einsum("nia,njb,abhij->nabhij", query_acts, key_acts, kernel)
    together = torch.einsum(
        "nia,njb->nabij", (query_acts != 0).double(), (key_acts != 0).double()
    ).tril()
    mean_square = torch.einsum("nhij,nabhij->nabhi", p.pattern, c.square())
    mean = torch.einsum("nhij,nabhij->nabhi", p.pattern, c)
    n_queries = len(p.x) * N_POS
    count = together.sum(dim=(0, 3, 4))[..., None].expand(-1, -1, spec.n_heads)
    return Exact(
        0.5 * (mean_square - mean.square()).sum(dim=(0, 4)) / n_queries,
        c.sum(dim=(0, 4, 5)) / count.clamp(min=1),
        count / (len(p.x) * N_POS * (N_POS + 1) / 2),
        0.5 * mean_square.sum(dim=(0, 4)) / n_queries,
    )


def is_between_constants(indices: Tensor) -> Tensor:
    return (indices[..., 0] == D_QUERY) & (indices[..., 1] == D_KEY)


@pytest.fixture(scope="module", params=KINDS)
def ranked(request) -> tuple[Problem, Exact, SparseFeatureMap]:
    """Shared and not to be changed; all pairs fit into the table."""
    p = problem(request.param)
    return p, exact_statistics(p), p.rank(EVERYTHING)


def test_statistics_of_every_pair_equal_the_dense_reference(ranked):
    _, exact, kept = ranked
    assert kept.weights.eq(1).all()
    at = tuple(kept.indices.T)
    importance, effect, co_occurrence = kept.statistics.double().T
    torch.testing.assert_close(co_occurrence, exact.co_occurrence[at], rtol=1e-6, atol=0)
    torch.testing.assert_close(effect, exact.effect[at], rtol=1e-5, atol=1e-5)
    rounding = 1e-5 * exact.mean_square[at]
    assert (
        (importance - exact.importance[at]).abs() <= 1e-4 * exact.importance[at] + rounding
    ).all()
    assert importance.max() > 0.05


def test_every_pair_that_ever_fired_together_is_listed(ranked):
    _, exact, kept = ranked
    listed = torch.zeros_like(exact.importance, dtype=torch.bool)
    listed[tuple(kept.indices.T)] = True
    fired = exact.co_occurrence > 0
    everything = torch.cartesian_prod(*(torch.arange(n) for n in listed.shape)).view(
        *listed.shape, 3
    )
    between_constants = is_between_constants(everything)
    assert not (listed & ~fired).any()
    assert not (listed & between_constants).any()
    matters = exact.importance > 1e-5 * exact.mean_square + 1e-12
    assert listed[matters & ~between_constants].all()
    assert 500 < int(listed.sum()) < len(everything.flatten(0, 2)) * 0.9
    for column, constant in ((0, D_QUERY), (1, D_KEY)):
        assert (kept.indices[:, column] == constant).any()


def test_importance_of_single_pairs_equals_the_plain_loop(ranked):
    """Pairs of every kind: both features, query constant, key constant."""
    p, _, kept = ranked
    acts = tuple(
        side(p.x).double().numpy() for side in (p.dictionary.encode_query, p.dictionary.encode_key)
    )
    kinds = kept, kept.restrict(query_features=D_QUERY), kept.restrict(key_features=D_KEY)
    for strongest in (some.select(some.statistics[:, 0].topk(2).indices) for some in kinds):
        for (a, b, h), (importance, _, _) in zip(
            strongest.indices.tolist(), strongest.statistics.tolist(), strict=True
        ):
            c, expected = pair_term(p.dictionary, acts, (a, b, h)), 0.0
            for row in range(len(c)):
                for i in range(N_POS):
                    P = p.pattern[row, h, i, : i + 1].numpy()
                    expected += 0.5 * float(
                        P @ c[row, i, : i + 1] ** 2 - (P @ c[row, i, : i + 1]) ** 2
                    )
            assert importance == pytest.approx(expected / (len(c) * N_POS), rel=1e-4, abs=1e-6)


def test_terms_constant_over_keys_are_worth_nothing():
    """Without rotary embeddings, query feature x key bias cancels in the softmax however large it is."""
    p = problem("gpt2")
    exact, kept = exact_statistics(p), p.rank(EVERYTHING)
    assert exact.mean_square[:D_QUERY, D_KEY].max() > 0.05
    assert kept.restrict(key_features=D_KEY).statistics[:, 0].lt(1e-6).all()
    assert (
        problem("llama").rank(EVERYTHING).restrict(key_features=D_KEY).statistics[:, 0].max() > 1e-3
    )


@pytest.mark.parametrize("n", [600, 1500])
def test_fewer_candidates_are_the_most_important(ranked, n):
    p, exact, kept = ranked
    best = p.rank(n)
    assert len(best) == n
    assert best.equals(kept.select(kept.statistics[:, 0].topk(n).indices))
    assert torch.equal(best.statistics, kept.statistics[kept.find(best.indices)])
    left_out = exact.importance.clone()
    left_out[tuple(best.indices.T)] = 0
    left_out[D_QUERY, D_KEY] = 0
    assert left_out.max() <= exact.importance[tuple(best.indices.T)].min() * 1.001


def test_rows_may_come_in_any_batches_and_features_in_any_parts(monkeypatch):
    p = problem("llama")
    whole = rank_pairs(p.dictionary, p.weights, [p.x], 1500)
    by_row = rank_pairs(p.dictionary, p.weights, iter(p.x[:, None]), 1500)
    monkeypatch.setattr("sae_lens_qk.training.candidates._ROWS_AT_ONCE", 7)
    in_parts = rank_pairs(p.dictionary, p.weights, [p.x], 1500)
    for made in (by_row, in_parts):
        assert torch.equal(whole.indices, made.indices)
        torch.testing.assert_close(whole.statistics, made.statistics, rtol=1e-5, atol=1e-7)


def random_features(
    d_query: int, d_key: int, n_rows: int
) -> tuple[list[FeatureBatch], Decoders, AttentionSpec]:
    """Features that fire at rates from rare to frequent, by the row, and random patterns."""
    spec = AttentionSpec(6, 3, d_head=10, d_model=11, scale=0.5, rotary_inv_freq=(1.0, 0.3))
    generator = torch.Generator().manual_seed(0)
    sizes = ((d_query, spec.n_heads), (d_key, spec.n_kv_heads))
    decoders = Decoders(*(torch.randn(d + 1, heads, 10, generator=generator) for d, heads in sizes))
    rates = [0.03 * torch.randn(d, generator=generator).exp() for d, _ in sizes]
    batches = []
    for _ in range(n_rows):
        acts = [torch.rand(2, 1, 23, len(rate), generator=generator) for rate in rates]
        query_acts, key_acts = (
            fires.lt(rate) * strength for (fires, strength), rate in zip(acts, rates, strict=True)
        )
        scores = 1.5 * torch.randn(1, spec.n_heads, 23, 23, generator=generator)
        batches.append(FeatureBatch(query_acts, key_acts, pattern_by_hand(scores)))
    return batches, decoders, spec


@pytest.mark.parametrize("n", [101, 1009])
def test_a_full_table_forgets_the_least_important(n, caplog):
    """Far more pairs fire together than the tables hold: the best are found all the same, with their true figures."""
    batches, decoders, spec = random_features(d_query=97, d_key=101, n_rows=53)
    exact = rank_features(batches, decoders, spec, 300_000)
    assert len(exact) > 50 * n
    with caplog.at_level(logging.DEBUG, logger="sae_lens_qk"):
        bounded = rank_features(batches, decoders, spec, n)
    assert sum("forgot" in message for message in caplog.messages) > 2
    assert len(bounded) == n
    best = exact.select(exact.statistics[:, 0].topk(n).indices)
    assert (best.find(bounded.indices) >= 0).double().mean() >= 0.9
    importance = exact.statistics[exact.find(bounded.indices), 0]
    assert (bounded.statistics[:, 0] <= importance * 1.0001).all(), (
        "what was forgotten cannot be made up"
    )
    assert (bounded.statistics[:, 0] >= 0.9 * importance).double().mean() >= 0.9


@pytest.mark.parametrize("n_candidates", [0, -3, 10**12])
def test_impossible_numbers_are_refused_before_any_row_is_read(n_candidates):
    p = problem("gpt2")

    def rows():
        raise AssertionError("a row was read")
        yield

    message = (
        "GiB are free: ask for fewer"
        if n_candidates > 0
        else f"n_candidates must be at least 1, got {n_candidates}"
    )
    with pytest.raises(ValueError, match=message):
        rank_pairs(p.dictionary, p.weights, rows(), n_candidates)
    with pytest.raises(ValueError, match=message):
        PairTable(n_candidates, D_QUERY + 1, D_KEY + 1, 3)


def test_nothing_that_fires_is_an_error():
    p = problem("gpt2")
    for half in (p.dictionary.query, p.dictionary.key):
        half.b_enc.fill_(-100.0)
    p.dictionary.key.W_dec.zero_()
    with pytest.raises(ValueError, match="No pair of features ever fired together"):
        p.rank(10)


def test_firing_rates_are_shares_of_tokens():
    p = problem("neox")
    rates = firing_rates(p.dictionary, iter([p.x[:2], p.x[2:]]))
    for found, encode in (
        (rates.query, p.dictionary.encode_query),
        (rates.key, p.dictionary.encode_key),
    ):
        fires = np.mean(
            [[act > 0 for act in token] for token in encode(p.x).flatten(0, 1).tolist()], axis=0
        )
        assert found.tolist() == pytest.approx(fires.tolist(), rel=1e-6)
        assert found[-5:].eq(0).all()
        assert 0.1 < found.mean() < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_a_pair_costs_what_was_predicted(kind):
    """KL after taking a small part of a pair out of the model's own scores, for weak and strong pairs of every kind."""
    p = problem(kind)
    d, kept = p.dictionary, p.rank(EVERYTHING)
    _, scores = inputs_and_scores(tiny_model(kind), tiny_tokens(3, N_POS))
    scores = scores.double().masked_fill(scores <= torch.finfo(scores.dtype).min / 2, 0.0)
    true = log_pattern(scores)
    acts = tuple(side(p.x).double().numpy() for side in (d.encode_query, d.encode_key))
    order = kept.statistics[:, 0].argsort(descending=True)
    for row in order[[0, 1, 2, 10, 50, 200]].tolist():
        a, b, h = kept.indices[row].tolist()
        term = torch.from_numpy(pair_term(d, acts, (a, b, h)))
        step = 0.03 / float(term.abs().max())  # where the leading order holds
        changed = scores.clone()
        changed[:, h] -= step * term
        cost = pattern_kl(true, log_pattern(changed))
        others = [head for head in range(d.spec.n_heads) if head != h]
        assert cost[:, others].abs().max() == 0
        predicted = step**2 * float(kept.statistics[row, 0])
        assert predicted > 1e-9
        assert float(cost[:, h].mean()) == pytest.approx(predicted, rel=0.05)
