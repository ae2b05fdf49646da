"""What removals did, by k and condition, and its summary.

A case has no control of a kind where too few features remain outside the top ones; how many cases
count is reported, and the top features' means stand next to a control's for the same cases. A case
is won where the top features change more than the control does; `agree` is the share of cases in
which prediction and measurement name the same winner. Intervals: 95 % bootstrap over rows of text.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

from sae_lens_qk.explain.removals import CONTROLS
from sae_lens_qk.explain.terms import Change
from sae_lens_qk.metrics import bootstrap_interval

CONDITIONS = ("top", *CONTROLS)
METRICS = Change._fields
_LEAST_SHARE = 0.5
"""Areas go over the k at which at least this share of the cases has the control."""


class Removal(NamedTuple):
    """One edit of a case."""

    k: int
    condition: str
    """One of `CONDITIONS`."""


class Outcomes:
    """What removals did to every case, NaN where a case has none.

    Args:
        ks: numbers of pairs.
        texts: the row of text of each case, over which intervals resample.
    """

    def __init__(
        self,
        ks: tuple[int, ...],
        texts: list[int],
    ):
        self.ks = ks
        self.texts = np.array(texts)
        shape = (len(texts), len(ks), len(CONDITIONS))
        self.actual = np.full((*shape, len(METRICS)), np.nan)  # [case, k, condition, metric]
        self.predicted = np.full((*shape, len(METRICS)), np.nan)
        self.sizes = np.full(shape, np.nan)  # norm of what leaves x
        self.counts = np.full(shape, np.nan)  # number of features that leave x

    def add(
        self,
        number: int,
        removals: list[Removal],
        actual: Change,
        predicted: Change,
        sizes: Tensor,
        counts: Tensor,
    ) -> None:
        """The removals of one case; every tensor is [removal]."""
        for n, (k, condition) in enumerate(removals):
            entry = (number, self.ks.index(k), CONDITIONS.index(condition))
            self.actual[entry] = [float(metric[n]) for metric in actual]
            self.predicted[entry] = [float(metric[n]) for metric in predicted]
            self.sizes[entry] = float(sizes[n])
            self.counts[entry] = float(counts[n])

    def summary(
        self,
        n_bootstrap: int,
        seed: int,
    ) -> dict[str, Any]:
        return {
            "by_k": {str(k): self._summary_at(n, n_bootstrap, seed) for n, k in enumerate(self.ks)},
            "tv_area": {name: self._area(CONDITIONS.index(name)) for name in CONTROLS},
        }

    def _summary_at(
        self,
        n: int,
        n_bootstrap: int,
        seed: int,
    ) -> dict[str, Any]:
        """All conditions at the n-th k."""
        top = self.actual[:, n, 0]  # [case, metric]
        predicted_top = self.predicted[:, n, 0]
        exists = np.isfinite(top[:, 0])
        controls = {
            name: self._control(n, CONDITIONS.index(name), n_bootstrap, seed) for name in CONTROLS
        }
        prediction = {
            metric: correlations(predicted_top[exists, m], top[exists, m])
            for m, metric in enumerate(METRICS)
        }
        return {
            "n": int(exists.sum()),
            "features": _mean(self.counts[exists, n, 0]),
            "top": _means(top[exists]),
            "controls": controls,
            "prediction": prediction,
        }

    def _control(
        self,
        n: int,
        condition: int,
        n_bootstrap: int,
        seed: int,
    ) -> dict[str, Any]:
        """A control at the n-th k, with the top features on the same cases."""
        exists = np.isfinite(self.actual[:, n, condition, 0])
        top = self.actual[exists, n, 0]
        control = self.actual[exists, n, condition]
        top_wins = top > control
        predicted_wins = self.predicted[exists, n, 0] > self.predicted[exists, n, condition]
        texts = self.texts[exists]
        size = None
        if exists.any():
            size = self.sizes[exists, n, condition].mean() / self.sizes[exists, n, 0].mean()
        wins = {
            metric: mean_interval(top_wins[:, m], texts, n_bootstrap, seed)
            for m, metric in enumerate(METRICS)
        }
        return {
            "n": int(exists.sum()),
            "size": None if size is None else float(size),
            "top": _means(top),
            "control": _means(control),
            "wins": wins,
            "predicted_wins": _means(predicted_wins),
            "agree": _means(top_wins == predicted_wins),
        }

    def _area(self, condition: int) -> dict[str, Any]:
        """Mean TV over log k, for top features and control on the same cases."""
        tv = self.actual[..., METRICS.index("tv")]  # [case, k, condition]
        exists = np.isfinite(tv[:, :, condition])
        numbers = np.flatnonzero(exists.mean(axis=0) >= _LEAST_SHARE)
        top = [tv[exists[:, n], n, 0].mean() for n in numbers]
        control = [tv[exists[:, n], n, condition].mean() for n in numbers]
        ks = [self.ks[n] for n in numbers]
        return {"ks": ks, "top": _log_mean(top, ks), "control": _log_mean(control, ks)}


def mean_interval(
    values: np.ndarray, texts: np.ndarray, n_bootstrap: int, seed: int
) -> list[float] | None:
    """Mean over cases with its 95 % interval when whole texts are resampled; None of no cases."""
    if not len(values):
        return None
    _, text_numbers = np.unique(texts, return_inverse=True)
    sums = np.bincount(text_numbers, values)
    counts = np.bincount(text_numbers)
    return list(bootstrap_interval(sums, counts, n_bootstrap, seed))


def correlations(
    predicted: Sequence[float] | np.ndarray, actual: Sequence[float] | np.ndarray
) -> dict[str, float | None]:
    """Pearson, Spearman, and the slope of actual on predicted values, through the origin."""
    p = np.asarray(predicted, dtype=float)
    a = np.asarray(actual, dtype=float)
    if len(p) < 3 or np.ptp(p) == 0 or np.ptp(a) == 0:
        return {"pearson": None, "spearman": None, "slope": None}
    return {
        "pearson": float(np.corrcoef(p, a)[0, 1]),
        "spearman": float(np.corrcoef(rankdata(p), rankdata(a))[0, 1]),
        "slope": float((p @ a) / (p @ p)),
    }


def _log_mean(
    values: list[float],
    ks: list[int],
) -> float | None:
    """Mean over log k, by the trapezoidal rule."""
    if len(ks) < 2:
        return None
    log_ks = np.log(ks)
    return float(np.trapezoid(values, log_ks) / np.ptp(log_ks))


def _means(values: np.ndarray) -> dict[str, float | None]:
    return {metric: _mean(values[:, m]) for m, metric in enumerate(METRICS)}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
