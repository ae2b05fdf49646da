"""What removals did, by k and condition, and its summary.

A case has no control of a kind where too few features remain outside the top ones; how many cases count is reported, and
the top features' means stand beside a control's for the same cases. A case is won where the top features change more than
the control does; `agree` is the share of cases in which prediction and measurement name the same winner. Intervals: 95 %
bootstrap over rows of text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

from sae_lens_qk.explain.removals import CONTROLS, Change

CONDITIONS = ("top", *CONTROLS)
FIGURES = Change._fields
_LEAST_SHARE = 0.5
"""Areas go over the k at which at least this share of the cases has the control."""


class Table:
    """Figures of every case [case, k, condition, figure], NaN where a case has none.

    Args:
        ks: numbers of pairs.
        texts: the row of text of each case, over which intervals resample.
    """

    def __init__(self, ks: tuple[int, ...], texts: list[int]):
        self.ks, self.texts = ks, texts
        self.arrays: dict[str, np.ndarray] = {}

    def add(
        self, number: int, at: list[tuple[int, str]], name: str, values: Sequence[Tensor]
    ) -> None:
        """values: for each figure [removal], the removals being those of `at`, as (k, condition)."""
        shape = len(self.texts), len(self.ks), len(CONDITIONS), len(values)
        array = self.arrays.setdefault(name, np.full(shape, np.nan))
        for figure, made in enumerate(values):
            for (k, condition), value in zip(at, made.tolist(), strict=True):
                array[number, self.ks.index(k), CONDITIONS.index(condition), figure] = value

    def summary(self, n_bootstrap: int, seed: int) -> dict[str, Any]:
        return {
            "by_k": {str(k): self._at(n, n_bootstrap, seed) for n, k in enumerate(self.ks)},
            "tv_area": {name: self._area(CONDITIONS.index(name)) for name in CONTROLS},
        }

    def _at(self, n: int, n_bootstrap: int, seed: int) -> dict[str, Any]:
        measured, predicted = self.arrays["measured"][:, n], self.arrays["predicted"][:, n]
        size = self.arrays["size"][:, n, :, 0]
        there = np.isfinite(measured[:, 0, 0])
        made: dict[str, Any] = {
            "n": int(there.sum()),
            "features": _mean(self.arrays["count"][there, n, 0, 0]),
            "top": _means(measured[there, 0]),
            "controls": {},
            "prediction": {
                figure: correlations(predicted[there, 0, f], measured[there, 0, f])
                for f, figure in enumerate(FIGURES)
            },
        }
        for condition, name in enumerate(CONDITIONS[1:], start=1):
            counted = np.isfinite(measured[:, condition, 0])
            top, control = measured[counted, 0], measured[counted, condition]
            expected = predicted[counted, 0] > predicted[counted, condition]
            texts = np.array(self.texts)[counted]
            made["controls"][name] = {
                "n": int(counted.sum()),
                "size": _mean(size[counted, condition]) / _mean(size[counted, 0])
                if counted.any()
                else None,
                "top": _means(top),
                "control": _means(control),
                "wins": {
                    f: share(top[:, k] > control[:, k], texts, n_bootstrap, seed)
                    for k, f in enumerate(FIGURES)
                },
                "predicted_wins": {f: _mean(expected[:, k]) for k, f in enumerate(FIGURES)},
                "agree": {
                    f: _mean((top > control)[:, k] == expected[:, k]) for k, f in enumerate(FIGURES)
                },
            }
        return made

    def _area(self, condition: int) -> dict[str, Any]:
        """Mean TV over log k, for top features and control on the same cases."""
        tv = self.arrays["measured"][..., FIGURES.index("tv")]
        counted = np.isfinite(tv[:, :, condition])
        used = np.flatnonzero(counted.mean(axis=0) >= _LEAST_SHARE)
        top, control = ([tv[counted[:, n], n, c].mean() for n in used] for c in (0, condition))
        log_ks = np.log([self.ks[n] for n in used])
        return {
            "ks": [self.ks[n] for n in used],
            "top": _area(top, log_ks),
            "control": _area(control, log_ks),
        }


def share(won: np.ndarray, texts: np.ndarray, n_bootstrap: int, seed: int) -> list[float] | None:
    """Share of the cases won, with the ends of its 95 % bootstrap interval over texts; None of no cases."""
    return mean_interval(won.astype(float), texts, n_bootstrap, seed) if len(won) else None


def mean_interval(
    values: np.ndarray, texts: np.ndarray, n_bootstrap: int, seed: int
) -> list[float]:
    """Mean over cases, and the 2.5 and 97.5 percentiles of it when whole texts are resampled."""
    _, text = np.unique(texts, return_inverse=True)
    sums, counts = np.bincount(text, values), np.bincount(text)
    picks = np.random.default_rng(seed).integers(0, len(counts), (n_bootstrap, len(counts)))
    low, high = np.percentile(sums[picks].sum(axis=1) / counts[picks].sum(axis=1), [2.5, 97.5])
    return [float(values.mean()), float(low), float(high)]


def correlations(
    predicted: Sequence[float] | np.ndarray, measured: Sequence[float] | np.ndarray
) -> dict[str, float | None]:
    """Pearson and Spearman, and the least-squares slope of measured on predicted through the origin."""
    p, m = np.asarray(predicted, dtype=float), np.asarray(measured, dtype=float)
    if len(p) < 3 or np.ptp(p) == 0 or np.ptp(m) == 0:
        return {"pearson": None, "spearman": None, "slope": None}
    return {
        "pearson": float(np.corrcoef(p, m)[0, 1]),
        "spearman": float(np.corrcoef(rankdata(p), rankdata(m))[0, 1]),
        "slope": float((p @ m) / (p @ p)),
    }


def _area(values: list[float], log_ks: np.ndarray) -> float | None:
    return float(np.trapezoid(values, log_ks) / np.ptp(log_ks)) if len(log_ks) > 1 else None


def _means(values: np.ndarray) -> dict[str, float | None]:
    return {figure: _mean(values[:, f]) for f, figure in enumerate(FIGURES)}


def _mean(values: np.ndarray) -> Any:
    return float(values.mean()) if len(values) else None
