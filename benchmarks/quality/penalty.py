"""A search for the strength of a sparsity penalty that gives a wanted L0."""

import math
from collections.abc import Callable
from typing import NamedTuple

import sae_lens_qk as qk

_MIN_TRIALS = 3
_MAX_TRIALS = 6
_TOLERANCE = 0.1

Train = Callable[[float], tuple[qk.BilinearQKDictionary, float]]
"""Strength -> dictionary, and its L0 over the wanted one."""


class PenaltySweep(NamedTuple):
    """The dictionary whose L0 came nearest, its L0 over the wanted one, how many were trained."""

    dictionary: qk.BilinearQKDictionary
    ratio: float
    n_trials: int


def sweep_penalty(
    train: Train,
    first: float,
) -> PenaltySweep:
    """At least 3 strengths of a penalty, at most 6, until L0 is within 10 % of the wanted one.

    Args:
        train: see `Train`.
        first: strength to begin with.
    """
    ratios: dict[float, float] = {}
    best: tuple[qk.BilinearQKDictionary, float] | None = None
    strength = first
    for n_trials in range(1, _MAX_TRIALS + 1):
        dictionary, ratio = train(strength)
        ratios[strength] = ratio
        if best is None or abs(ratio - 1) < abs(best[1] - 1):
            best = (dictionary, ratio)
        if n_trials >= _MIN_TRIALS and abs(best[1] - 1) <= _TOLERANCE:
            break
        strength = next_strength(ratios)
    return PenaltySweep(*best, n_trials)


def next_strength(ratios: dict[float, float]) -> float:
    """A stronger or weaker penalty; between the two that enclose a ratio of 1 if there are such.

    Args:
        ratios: L0 over the wanted one, by strength.
    """
    too_weak = [strength for strength, ratio in ratios.items() if ratio > 1]
    too_strong = [strength for strength, ratio in ratios.items() if ratio <= 1]
    if too_weak and too_strong:
        return math.sqrt(max(too_weak) * min(too_strong))
    return 3 * max(too_weak) if too_weak else min(too_strong) / 3
