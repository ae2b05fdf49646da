"""Plain JSON values of a page: numbers of few digits, null for what is not known."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from sae_lens_qk.tables import significant

DIGITS = 4
"""Significant digits of what a page shows."""


def numbers(
    values: Iterable[float],
    digits: int = DIGITS,
) -> list[float | int | None]:
    """Every value with few digits."""
    return [significant(float(value), digits) for value in values]


def records(frame: pd.DataFrame) -> list[list[Any]]:
    """The rows of a frame, its index left out."""
    columns = []
    for _, column in frame.items():
        # features, heads and positions stay whole
        is_float = column.dtype.kind == "f"
        columns.append(numbers(column) if is_float else column.tolist())
    return [list(row) for row in zip(*columns, strict=True)]


def plain(
    value: Any,
    digits: int = DIGITS,
) -> Any:
    """The same with floats shortened, numpy's numbers as Python's and anything else as text."""
    match value:
        case dict():
            return {str(name): plain(item, digits) for name, item in value.items()}
        case list() | tuple():
            return [plain(item, digits) for item in value]
        case bool() | np.bool_():
            return bool(value)
        case int() | np.integer():
            return int(value)
        case float() | np.floating():
            return significant(float(value), digits)
        case None:
            return None
    return str(value)


def table_values(
    title: str,
    table: pd.DataFrame,
) -> dict[str, Any]:
    """A table to be shown as it is.

    An index that has a name, or is more than a count, becomes its first column.
    """
    is_count = isinstance(table.index, pd.RangeIndex) and table.index.name is None
    if not is_count:
        table = table.reset_index()
    return {
        "title": title,
        "columns": [str(name) for name in table.columns],
        # as objects: one dtype for all columns would make floats of whole numbers
        "rows": plain(table.to_numpy(object).tolist()),
    }
