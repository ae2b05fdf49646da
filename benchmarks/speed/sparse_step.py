"""A step of step 2 as the package computes it, from dense activations on, and its candidates."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.speed.data import Case
from sae_lens_qk.feature_map import SparseFeatureMap
from sae_lens_qk.scoring.pairs import constant_scores
from sae_lens_qk.scoring.scorer import PairScorer
from sae_lens_qk.training.candidates import FeatureBatch, rank_features

STRENGTH = 1e-6
"""lambda, the same on both sides."""
LR = 1e-2


class Ranking(NamedTuple):
    candidates: SparseFeatureMap
    n_rows: int
    seconds: float


def rank(
    case: Case,
    n_candidates: int,
    n_rows: int | None = None,
) -> Ranking:
    """The most important pairs on n rows.

    By default on as few rows as hold that many pairs (1, 2, 4, ... rows).
    """
    available = len(case.query_acts)
    n = n_rows or 1
    while True:
        batches = _single_rows(case.rows(n))
        start = time.perf_counter()
        candidates = rank_features(batches, case.decoders, case.spec, n_candidates)
        seconds = time.perf_counter() - start
        if n_rows or len(candidates) == n_candidates or n == available:
            return Ranking(candidates, n, seconds)
        n = min(2 * n, available)


def _single_rows(case: Case) -> Iterator[FeatureBatch]:
    for row in range(len(case.query_acts)):
        single = slice(row, row + 1)
        yield FeatureBatch(
            case.query_acts[single], case.key_acts[single], case.true.pattern[single]
        )


def losses(
    scorer: PairScorer,
    mask: Tensor,
    case: Case,
) -> tuple[Tensor, Tensor]:
    """Mean KL, and lambda times the penalty."""
    constant = constant_scores(case.decoders, case.spec, case.n_pos)
    scores = scorer(mask, case.query_acts, case.key_acts) + constant
    penalty = (mask + 1e-7).sqrt().sum()
    return case.true.kl(scores).mean(), STRENGTH * penalty


def make_step(
    case: Case,
    candidates: SparseFeatureMap,
) -> Callable[[], float]:
    """A training step of the mask over the candidates, from 1 on.

    Call it for the next step and its loss.
    """
    scorer = PairScorer(candidates.indices, case.decoders, case.spec)
    mask = candidates.weights.clone().requires_grad_()
    optimizer = torch.optim.Adam([mask], lr=LR)

    def step() -> float:
        optimizer.zero_grad()
        kl, penalty = losses(scorer, mask, case)
        loss = kl + penalty
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
        return loss.item()

    return step


def active_pairs(
    case: Case,
    candidates: SparseFeatureMap,
) -> float:
    """Mean number of listed pairs whose features both fire.

    The mean runs over heads and (query, allowed key) positions.
    """
    n_positions = len(case.query_acts) * case.spec.n_allowed(case.n_pos) * case.spec.n_heads
    return candidates.count_active(case.features, case.spec) / n_positions
