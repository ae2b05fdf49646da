"""A report of the quality benchmark in which every target is met, to be spoilt by tests."""

from copy import deepcopy
from typing import Any

from benchmarks.quality.sections import SECTIONS

CONTROLS = ("other", "matched", "rescaled")
KS = (1, 2, 5)
SEEDS = (0, 1)
N_CASES = 40

BASELINES = {
    "importance": 0.8,
    "residual SAE": 0.6,
    "L2 transcoders": 0.6,
    "contrastive covariances": 0.99,
}
"""Quality on planted layers."""
OURS = {"easy": 0.97, "hard": 0.9}
QUALITY_WITH_NOISE = {
    "ours": {1.0: 0.95, 10.0: 0.92},
    "residual SAE": {1.0: 0.8, 10.0: 0.4},
    "L2 transcoders": {1.0: 0.7, 10.0: 0.6},
}

CHANGE = {"tv": 0.2, "weight_drop": 0.1, "score_drop": 1.5}
CORRELATIONS = {"pearson": 0.9, "spearman": 0.8, "slope": 1.1}


def planted_case(
    setting: str,
    method: str,
    seed: int,
    quality: float,
    section: str = "planted",
    noise: float = 1.0,
) -> dict[str, Any]:
    """All metrics of a case follow from its quality in [0, 1]."""
    curve = []
    for n_pairs in (5, 10, 20):
        point = {"n_pairs": n_pairs, "precision": quality, "recall": quality, "f1": quality}
        curve.append({**point, "pattern_kl": 0.1 / n_pairs})
    return {
        "section": section,
        "setting": setting,
        "method": method,
        "seed": seed,
        "noise": noise,
        "seconds": 1.0,
        "planted_pairs": 10,
        "recovery_query": quality + 0.004,
        "recovery_key": quality - 0.004,
        "average_precision": quality,
        "f1": quality,
        "transcoders_kl": 1 - quality,
        "l0_query": 4.0,
        "l0_key": 5.0,
        "uniform_kl": 2.0,
        "curve": curve,
    }


def results_at_k(
    won: float,
    n: int = N_CASES,
) -> dict[str, Any]:
    """Removals at one k: every control is beaten in this share of n cases."""
    controls = {}
    for name in CONTROLS:
        ends = [won, won - 0.02, won + 0.01] if n else None
        controls[name] = {
            "n": n,
            "size": 0.9,
            "top": dict(CHANGE),
            "control": dict.fromkeys(CHANGE, 0.05),
            "wins": {metric: ends and list(ends) for metric in CHANGE},
        }
    return {
        "n": N_CASES,
        "features": 1.5,
        "top": dict(CHANGE),
        "controls": controls,
        "prediction": dict.fromkeys(CHANGE, CORRELATIONS),
    }


def removals(won: float = 0.97) -> dict[str, Any]:
    """Of one dictionary on one layer."""
    area = {"ks": list(KS), "top": 0.2, "control": 0.05}
    rankings = {}
    for ranking in ("effect", "contribution", "marginal", "random"):
        rankings[ranking] = {}
        for side in ("query", "key"):
            results = {str(k): results_at_k(0.8 if k == 1 else won) for k in KS}
            rankings[ranking][side] = {"by_k": results, "tv_area": dict.fromkeys(CONTROLS, area)}
    control = {"n": 4, "top": 1e-3, "control": 1e-4, "wins": [0.9, 0.8, 1.0]}
    logits = {
        "n": 4,
        "top": [1e-3, 5e-4, 2e-3],
        "predicted": 9e-4,
        "prediction": CORRELATIONS,
        "controls": dict.fromkeys(CONTROLS, control),
    }
    return {
        "n_cases": N_CASES,
        "x_explained": {"query": 0.6, "key": 0.5},
        "in_score_check": 1e-6,
        "rankings": rankings,
        "twins": {"n": 20, "mean_drop": 2.0, "transcoders": CORRELATIONS},
        "logits": {"1": logits},
    }


def explained(share: float) -> dict[str, Any]:
    """Of one dictionary on one layer: this share of the scores."""
    quartiles = {"lower": 2.0, "median": 5.0, "upper": 9.0}
    metrics = {
        "n": N_CASES,
        "pairs_for": {"0.5": quartiles, "0.9": quartiles},
        "weight_held": dict.fromkeys(quartiles, 0.9),
        "top_percent": 0.2,
        "active_pairs": 250.0,
        "supporting_pairs": 120.0,
    }
    for name in ("score_explained", "score_explained_unweighted", "norm_share"):
        metrics[name] = {"mean": share, "per_head": [share]}
    pair_sets = ("all", "one_varies", "without_always_on")
    transcoders = {name: deepcopy(metrics) for name in pair_sets}
    return {"always_on": {"query": 1, "key": 0}, "transcoders": transcoders}


def good_report() -> dict[str, Any]:
    """Every target met."""
    cases = []
    for setting, quality in OURS.items():
        for method, method_quality in {"ours": quality, **BASELINES}.items():
            for seed in SEEDS:
                cases.append(planted_case(setting, method, seed, method_quality + 0.005 * seed))
    for method, qualities in QUALITY_WITH_NOISE.items():
        for noise, quality in qualities.items():
            for seed in SEEDS:
                cases.append(planted_case("easy", method, seed, quality, "variance", noise))
    return {
        "machine": {"cores": 2, "torch": "1.2.3"},
        "smoke": False,
        "seeds": list(SEEDS),
        "wanted": list(SECTIONS),
        "sizes": {},
        "cases": cases,
        "causal": {"23": {"ours": removals(), "L2 transcoders": removals(0.7)}},
        "explained": {"23": {"ours": explained(0.7), "L2 transcoders": explained(0.1)}},
        "skipped": {},
        "failed": {},
        "seconds": {},
        "text": "corpus",
    }
