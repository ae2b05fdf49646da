"""Markdown tables, and numbers as their cells."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

NONE = "–"
Row = Sequence[str]


def table(header: Row, rows: Iterable[Row]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def number(value: Any, digits: int = 3) -> str:
    """Fixed decimals; counts of a hundred and more without any."""
    if _missing(value):
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else _plain(f"{value:.{digits}f}")


def significant(value: Any) -> str:
    """Three digits, for what may be tiny."""
    return NONE if _missing(value) else f"{value:.3g}"


def count(value: Any) -> str:
    return NONE if _missing(value) else f"{value:,.0f}"


def percent(value: Any, digits: int = 0) -> str:
    return NONE if _missing(value) else _plain(f"{100 * value:.{digits}f}") + " %"


def spread(values: Iterable[Any], digits: int = 3) -> str:
    """Mean, and smallest to largest where there are several."""
    there = pd.Series(list(values), dtype=float).dropna()
    if there.empty:
        return NONE
    mean = number(there.mean(), digits)
    return (
        mean
        if len(there) == 1
        else f"{mean} ({number(there.min(), digits)} to {number(there.max(), digits)})"
    )


def interval(figures: Sequence[float] | None, share: bool = True) -> str:
    """A mean with the ends of its interval."""
    if figures is None:
        return NONE
    if share:
        mean, low, high = (f"{100 * value:.0f}" for value in figures)
        return f"{mean} % [{low}, {high}]"
    mean, low, high = map(significant, figures)
    return f"{mean} [{low}, {high}]"


def quartiles(figures: dict[str, float] | None, share: bool = False) -> str:
    """The median with the quartiles."""
    if figures is None:
        return NONE
    lower, median, upper = (
        percent(figures[name]) if share else count(figures[name])
        for name in ("lower", "median", "upper")
    )
    return f"{median} ({lower} to {upper})"


def listed(names: Iterable[Any]) -> str:
    """A, B and C."""
    *some, last = map(str, names)
    return f"{', '.join(some)} and {last}" if some else last


def _missing(value: Any) -> bool:
    return value is None or value != value


def _plain(text: str) -> str:
    return text.removeprefix("-") if not text.strip("-0.") else text  # no minus zero
