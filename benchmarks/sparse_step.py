"""A step of step 2 as the package computes it, from dense activation tensors on, and its candidates."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from data import Case
from torch import Tensor

from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.scoring.scorer import PairScorer
from sae_lens_qk.scoring.pairs import constant_scores
from sae_lens_qk.training.candidates import FeatureBatch, rank_features

STRENGTH, LR = 1e-6, 1e-2
"""lambda and the learning rate, the same on both sides."""


class Ranking(NamedTuple):
    candidates: SparseFeatureMap
    n_rows: int
    seconds: float


def rank(case: Case, n_candidates: int, n_rows: int | None = None) -> Ranking:
    """The most important pairs on n rows; by default on as few as hold that many pairs (1, 2, 4, ... rows)."""
    available = len(case.query_acts)
    n = n_rows or 1
    while True:
        rows = case.rows(n)
        batches = (
            FeatureBatch(*one)
            for one in zip(*(t.split(1) for t in (*rows[:2], rows.true.pattern)), strict=True)
        )
        start = time.perf_counter()
        candidates = rank_features(batches, case.decoders, case.spec, n_candidates)
        seconds = time.perf_counter() - start
        if n_rows or len(candidates) == n_candidates or n == available:
            return Ranking(candidates, n, seconds)
        n = min(2 * n, available)


def loss_of(scorer: PairScorer, mask: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Mean KL, and lambda times the penalty."""
    constant = constant_scores(scorer.decoders, case.spec, case.query_acts.shape[1])
    scores = scorer(mask, case.query_acts, case.key_acts) + constant
    return case.true.kl(scores).mean(), STRENGTH * (mask + 1e-7).sqrt().sum()


def make_step(case: Case, candidates: SparseFeatureMap) -> Callable[[], float]:
    """A training step of the mask over the candidates, from 1 on; call it for the next step and its loss."""
    scorer = PairScorer(candidates.indices, case.decoders, case.spec)
    mask = candidates.weights.clone().requires_grad_()
    optimizer = torch.optim.Adam([mask], lr=LR)

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.stack(loss_of(scorer, mask, case)).sum()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
        return loss.item()

    return step


def active_pairs(case: Case, candidates: SparseFeatureMap) -> float:
    """Mean number of listed pairs, over heads and allowed (query, key) positions, whose features both fire."""
    n_rows, n_pos, _ = case.query_acts.shape
    positions = n_rows * n_pos * (n_pos + 1) // 2 * case.spec.n_heads
    return candidates.count_active(case.query_acts, case.key_acts) / positions
