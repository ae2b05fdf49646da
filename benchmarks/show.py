"""Numbers as cells of Markdown tables, and axes of pictures, for all benchmarks."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from sae_lens_qk.tables import NONE

# Cells


def number(
    value: Any,
    digits: int = 3,
) -> str:
    """Fixed decimals; counts of a hundred and more without any."""
    if pd.isna(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else _unsigned_zero(f"{value:.{digits}f}")


def significant(
    value: Any,
    sign: str = "",
) -> str:
    """Three digits, for what may be tiny; counts of a hundred and more without decimals."""
    if pd.isna(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:{sign}.3g}"


def count(value: Any) -> str:
    return NONE if pd.isna(value) else f"{value:,.0f}"


def percent(
    value: Any,
    digits: int = 0,
) -> str:
    return NONE if pd.isna(value) else _unsigned_zero(f"{100 * value:.{digits}f}") + " %"


def power(value: Any) -> str:
    """Two digits and a power of ten, for errors."""
    return NONE if pd.isna(value) else f"{value:.1e}"


def seconds(value: Any) -> str:
    if pd.isna(value):
        return NONE
    return f"{significant(1000 * value)} ms" if value < 1 else f"{significant(value)} s"


def size(n_bytes: Any) -> str:
    """Bytes in MB or GB."""
    if pd.isna(n_bytes):
        return NONE
    if n_bytes >= 1e9:
        return f"{significant(n_bytes / 1e9)} GB"
    return f"{significant(n_bytes / 1e6)} MB"


def ratio(
    numerator: float | None,
    denominator: float | None,
) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def times(value: float | None) -> str:
    """A ratio, in bold."""
    return NONE if value is None else f"**{significant(value)}x**"


def spread(
    values: Iterable[Any],
    digits: int = 3,
) -> str:
    """Mean, and smallest to largest where there are several."""
    series = pd.Series(list(values), dtype=float).dropna()
    if series.empty:
        return NONE
    mean = number(series.mean(), digits)
    if len(series) == 1:
        return mean
    return f"{mean} ({number(series.min(), digits)} to {number(series.max(), digits)})"


def share_interval(ends: Sequence[float] | None) -> str:
    """A share with the ends of its interval, in percent."""
    if ends is None:
        return NONE
    mean, low, high = (f"{100 * value:.0f}" for value in ends)
    return f"{mean} % [{low}, {high}]"


def value_interval(ends: Sequence[float] | None) -> str:
    """A mean with the ends of its interval."""
    if ends is None:
        return NONE
    mean, low, high = map(significant, ends)
    return f"{mean} [{low}, {high}]"


def enumeration(names: Iterable[Any]) -> str:
    """A, B and C."""
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}" if first else last


def failures(failed: dict[str, str]) -> list[str]:
    """The closing section of a report on what did not run; nothing where everything did."""
    if not failed:
        return []
    return ["", "## Failed", "", *(f"- {name}: {message}" for name, message in failed.items())]


def _unsigned_zero(text: str) -> str:
    return text.removeprefix("-") if not text.strip("-0.") else text


# Pictures


def log_ticks(
    ax: Any,
    values: Sequence[float],
) -> None:
    """A logarithmic axis with ticks at these values and nowhere else."""
    ax.set_xscale("log")
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.minorticks_off()
