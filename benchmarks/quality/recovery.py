"""Planted circuits: what is planted, which methods meet it, and their scores.

Settings and hyper-parameters were chosen on seeds from 100 on; reports use others.
"""

import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.quality.methods import METHODS, Budget, rank_by_decoders
from benchmarks.quality.planted import ALWAYS_ON, FIRST_TOKEN, Circuit, Setting, plant, sample
from benchmarks.quality.scores import PlantedPattern, PlantedScores, score, score_labelled
from sae_lens_qk.config import BilinearQKConfig
from sae_lens_qk.dictionary import BilinearQKDictionary

_EASY = Setting()
_HARD = Setting(
    n_features=98,
    d_signal=50,
    density=0.05,
    correlation_scale=0.15,
    n_packed=4,
)
SETTINGS: dict[str, Setting] = {
    "easy": _EASY,
    "easy, rotary": replace(_EASY, rotary=True, d_head=32),
    "hard": _HARD,
}
LABELLED = "contrastive covariances"
_BUDGETS = {"easy": Budget(d=160), "easy, rotary": Budget(d=160), "hard": Budget(d=196)}
_CURVE = (0.25, 0.5, 1.0, 1.4, 2.0, 4.0)
"""Numbers of pairs, in multiples of the planted number."""

# Seeds of fresh sequences, apart from those of training
_TEST_SEED = 9_000_000
_LABELLED_SEED = 7_000_000


class Sizes(NamedTuple):
    """What is run."""

    settings: tuple[str, ...]
    noises: tuple[float, ...]
    """Standard deviations for the test with irrelevant variance, on the easy setting."""
    shrink: int
    """Training steps, and rows of a batch, are divided by this."""
    test_rows: int


FULL = Sizes(tuple(SETTINGS), (0.25, 0.45, 0.79), 1, 128)
SMOKE = Sizes(("easy, rotary", "hard"), (0.25, 0.79), 50, 4)
_VARIANCE_METHODS = ("ours", "residual SAE", "L2 transcoders")


class Case(NamedTuple):
    """One training."""

    section: str
    setting: str
    method: str
    seed: int
    noise: float


def cases(
    sizes: Sizes,
    seeds: list[int],
) -> list[Case]:
    """All trainings of both sections, one setting after the other."""
    planted = [
        Case("planted", setting, method, seed, SETTINGS[setting].noise)
        for setting in sizes.settings
        for seed in seeds
        for method in (*METHODS, LABELLED)
    ]
    variance = [
        Case("variance", "easy", method, seed, noise)
        for noise in sizes.noises
        for seed in seeds
        for method in _VARIANCE_METHODS
    ]
    return planted + variance


def run_case(
    case: Case,
    sizes: Sizes,
) -> list[dict[str, Any]]:
    """Train, and score every method that the training serves."""
    budget = _shrunk(_BUDGETS[case.setting], sizes.shrink)
    circuit = plant(replace(SETTINGS[case.setting], noise=case.noise), case.seed)
    curve = [round(factor * len(circuit.pairs)) for factor in _CURVE]
    test = sample(circuit, sizes.test_rows, budget.n_pos, _TEST_SEED + case.seed)
    true = PlantedPattern.compute(circuit, test.x)
    uniform_kl = true.mean_kl(torch.zeros_like(true.log_pattern))
    start = time.perf_counter()

    def row(
        name: str,
        scores: PlantedScores,
        notes: str = "",
    ) -> dict[str, Any]:
        return {
            **case._asdict(),
            "method": name,
            "planted_pairs": len(circuit.pairs),
            "uniform_kl": uniform_kl,
            **scores._asdict(),
            "curve": [point._asdict() for point in scores.curve],
            "notes": notes,
            "seconds": time.perf_counter() - start,
        }

    if case.method == LABELLED:
        return [row(LABELLED, contrastive_covariances(circuit, budget, case.seed, curve))]
    rows = []
    for name, result in METHODS[case.method](circuit, budget, case.seed):
        scores = score(result.best, circuit, test, curve, result.trained_sizes)
        rows.append(row(name, scores, result.notes))
        if case.section == "variance":
            break
    return rows


def _shrunk(
    budget: Budget,
    factor: int,
) -> Budget:
    return replace(
        budget,
        steps=budget.steps // factor,
        mask_steps=max(4, budget.mask_steps // factor),
        n_rows=max(4, budget.n_rows // factor),
        ranking_rows=max(8, budget.ranking_rows // factor),
    )


def contrastive_covariances(
    circuit: Circuit, budget: Budget, seed: int, curve: list[int]
) -> PlantedScores:
    """E[q k^T | both on] - E[q k^T | one off], for every query feature, key feature and head.

    Supervised: it is told when each planted feature is on. Query and key being drawn apart, the
    doubly contrasted covariance is the outer product of mean(q | a on) - mean(q | a off) and the
    same of k: those vectors are its feature directions, and its trace their interaction, by which
    pairs are ranked.
    """
    data = sample(circuit, budget.ranking_rows, budget.n_pos, _LABELLED_SEED + seed)
    labels = (data.acts > 0).flatten(0, 1).double()  # [token, feature]
    # the feature that is always on has no contrast but the first position
    labels[:, ALWAYS_ON] = 1.0 - labels[:, FIRST_TOKEN]
    cfg = BilinearQKConfig(
        d_in=circuit.spec.d_model,
        d_query=labels.shape[1],
        d_key=labels.shape[1],
        attention=circuit.spec.to_dict(),
        model_name="planted",
    )
    labelled = BilinearQKDictionary(cfg).requires_grad_(False)
    labelled.query.W_dec.copy_(_contrast(labels, circuit.weights.queries(data.x)))
    labelled.key.W_dec.copy_(_contrast(labels, circuit.weights.keys(data.x)))
    ranked = rank_by_decoders(labelled, circuit, budget)
    return score_labelled(labelled.decoders, ranked.pairs, circuit, curve)


def _contrast(
    labels: Tensor,
    vectors: Tensor,
) -> Tensor:
    """mean(vector | on) - mean(vector | off) [feature, d], of vectors [row, pos, head, d_head]."""
    vectors = vectors.flatten(2).flatten(0, 1).double()
    n_on = labels.sum(dim=0)[:, None]
    n_off = len(labels) - n_on
    mean_on = labels.T @ vectors / n_on.clamp(min=1)
    mean_off = (1 - labels).T @ vectors / n_off.clamp(min=1)
    return mean_on - mean_off
