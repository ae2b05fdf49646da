"""Planted circuits: what is planted, which methods meet it, and their scores.

Settings and hyper-parameters were chosen on seeds from 100 on; reports use others.
"""

import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from sae_lens_qk.config import BilinearQKConfig
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.training.losses import TruePattern

from .methods import METHODS, Budget, by_decoder_product
from .planted import ALWAYS_ON, FIRST_TOKEN, Circuit, Setting, plant, sample
from .scores import PlantedScores, score, score_labelled

_EASY = Setting()
_HARD = Setting(n_features=98, d_signal=50, density=0.05, correlation_scale=0.15, n_packed=4)
SETTINGS: dict[str, Setting] = {
    "easy": _EASY,
    "easy, rotary": replace(_EASY, rotary=True, d_head=32),
    "hard": _HARD,
}
LABELLED = "contrastive covariances"
_BUDGETS = {name: Budget(d=160) if name.startswith("easy") else Budget(d=196) for name in SETTINGS}
_CURVE = (0.25, 0.5, 1.0, 1.4, 2.0, 4.0)
"""Numbers of pairs, in multiples of the planted number."""


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


def cases(sizes: Sizes, seeds: list[int]) -> list[Case]:
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


def run_case(case: Case, sizes: Sizes) -> list[dict[str, Any]]:
    """Train, and score every method that the training serves."""
    budget = _BUDGETS[case.setting]
    budget = replace(
        budget,
        steps=budget.steps // sizes.shrink,
        mask_steps=max(4, budget.mask_steps // sizes.shrink),
        n_rows=max(4, budget.n_rows // sizes.shrink),
        ranking_rows=max(8, budget.ranking_rows // sizes.shrink),
    )
    circuit = plant(replace(SETTINGS[case.setting], noise=case.noise), case.seed)
    curve = [round(factor * len(circuit.pairs)) for factor in _CURVE]
    test = sample(circuit, sizes.test_rows, budget.n_pos, 9_000_000 + case.seed)
    true = TruePattern.of(
        circuit.weights.queries(test.x), circuit.weights.keys(test.x), circuit.spec
    )
    uniform = float(true.kl(torch.zeros_like(true.pattern))[..., 1:].mean())

    def row(name: str, scores: PlantedScores, notes: str = "") -> dict[str, Any]:
        return {
            **case._asdict(),
            "method": name,
            "planted_pairs": len(circuit.pairs),
            "uniform_kl": uniform,
            **scores._asdict(),
            "curve": [at._asdict() for at in scores.curve],
            "notes": notes,
            "seconds": time.perf_counter() - start,
        }

    start = time.perf_counter()
    if case.method == LABELLED:
        return [row(LABELLED, contrastive_covariances(circuit, budget, case.seed, curve))]
    found = METHODS[case.method](circuit, budget, case.seed)
    if case.section == "variance":
        found = iter([next(found)])
    return [row(name, score(f.best, circuit, test, curve, f.by_size), f.notes) for name, f in found]


def contrastive_covariances(
    circuit: Circuit, budget: Budget, seed: int, curve: list[int]
) -> PlantedScores:
    """E[q k^T | both on] - E[q k^T | one off], for every query feature, key feature and head: supervised.

    It is told when each planted feature is on. Query and key being drawn apart, the doubly contrasted covariance is the
    outer product of mean(q | a on) - mean(q | a off) and the same of k: those vectors are its feature directions, and its
    trace their interaction, by which pairs are ranked.
    """
    data = sample(circuit, budget.ranking_rows, budget.n_pos, 7_000_000 + seed)
    on = (data.acts > 0).flatten(0, 1).double()
    on[:, ALWAYS_ON] = (
        1.0 - on[:, FIRST_TOKEN]
    )  # the feature that is always on has no contrast but the first position
    n_on = on.sum(dim=0)[:, None]
    cfg = BilinearQKConfig(
        d_in=circuit.spec.d_model,
        d_query=on.shape[1],
        d_key=on.shape[1],
        attention=circuit.spec.to_dict(),
        model_name="planted",
    )
    labelled = BilinearQKDictionary(cfg).requires_grad_(False)
    for half, vectors in zip(
        (labelled.query, labelled.key),
        (circuit.weights.queries(data.x), circuit.weights.keys(data.x)),
        strict=True,
    ):
        flat = vectors.flatten(0, 1).flatten(1).double()
        contrast = on.T @ flat / n_on.clamp(min=1) - (1 - on).T @ flat / (len(on) - n_on).clamp(
            min=1
        )
        half.W_dec.copy_(contrast)
    ranked = by_decoder_product(labelled, circuit, budget)
    return score_labelled(labelled.decoders, ranked.pairs, circuit, curve)
