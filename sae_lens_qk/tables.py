"""Tables and the numbers in them: for terminals (rich), notebooks (HTML) and Markdown.

The one place for both. Text of a model's tokens is escaped; what is missing is a dash.
"""

import html
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from jaxtyping import Float
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sae_lens_qk.config import BilinearQKConfig

NONE = "-"

_BAR_COLOURS = ["#d6604d", "#4393c3"]
"""Of negative and positive bars."""
_CELL = "width:13px;height:13px;padding:0;border:1px solid rgba(128,128,128,.25)"


# Numbers


def fixed(
    value: float | None,
    digits: int = 4,
) -> str:
    """So many decimals; a dash for None and NaN."""
    return NONE if _is_missing(value) else f"{value:.{digits}f}"


def percent(
    value: float | None,
    digits: int = 1,
) -> str:
    """A share in percent; a dash for None and NaN."""
    return NONE if _is_missing(value) else f"{value:.{digits}%}"


def interval(
    value: Mapping[str, float] | Sequence[float] | None,
    number: Callable[[float | None], str] = fixed,
) -> str:
    """A value with the ends of its interval in brackets.

    Args:
        value: (value, low, high), or a mapping with these names; None: a dash.
        number: `fixed` or `percent`.
    """
    if value is None:
        return NONE
    if isinstance(value, Mapping):
        value = [value[name] for name in ("value", "low", "high")]
    middle, low, high = map(number, value)
    return f"{middle} ({low}, {high})"


def significant(
    value: float,
    digits: int = 4,
) -> float | int | None:
    """So many significant digits, for JSON: integers without a point, None for infinity and NaN."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    # beyond a million a float is shorter: 1e+09
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e6 else rounded


def _is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


# Frames


def named_features(
    frame: pd.DataFrame,
    cfg: BilinearQKConfig,
) -> pd.DataFrame:
    """The frame with features as people read them: numbers, "constant", or a dash for none."""
    named = frame.copy()
    constants = {"query_feature": cfg.d_query, "key_feature": cfg.d_key}
    for column, constant in constants.items():
        if column in named:
            named[column] = [_feature_name(feature, constant) for feature in named[column]]
    return named


def _feature_name(
    feature: Any,
    constant: int,
) -> str:
    if pd.isna(feature):
        return NONE
    return "constant" if feature == constant else str(feature)


# Terminals


def rich_table(
    frame: pd.DataFrame,
    title: str,
) -> Table:
    """A frame as a table: numbers to the right, floats with a sign and three decimals."""
    header = [str(column).replace("_", " ") for column in frame]
    text_columns = frame.select_dtypes(exclude=["number", "bool"])
    texts = [str(column).replace("_", " ") for column in text_columns]
    rows = map(_cells, frame.itertuples(index=False))
    table = cell_table(header, rows, texts, box=SIMPLE, show_edge=False)
    table.title = Text(title)
    table.title_justify = "left"
    return table


def _cells(row: Iterable[Any]) -> Iterator[str]:
    for value in row:
        if pd.isna(value):
            yield NONE
        elif isinstance(value, float):
            yield f"{value:+.3f}"
        else:
            yield str(value)


def cell_table(
    header: Sequence[str],
    rows: Iterable[Iterable[str]],
    text_columns: Collection[str],
    unbroken: Collection[str] = (),
    **options: Any,
) -> Table:
    """Finished cells as a rich table, without markup in them.

    Args:
        text_columns: names of the columns set to the left; the others are numbers.
        unbroken: names of the columns whose cells are not wrapped.
        **options: of `rich.table.Table`.
    """
    table = Table(**options)
    for name in header:
        justify = "left" if name in text_columns else "right"
        table.add_column(name, justify=justify, no_wrap=name in unbroken)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


# Markdown


def markdown_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
) -> list[str]:
    """Finished cells as the lines of a Markdown table: the first column left, numbers right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


# Notebooks


def html_table(
    frame: pd.DataFrame,
    caption: str,
    bars: str | None = None,
) -> str:
    """A frame as an HTML table for notebooks.

    Args:
        bars: name of a column that gets bars around zero.
    """
    styled = frame.style.hide(axis="index")
    styled.set_caption(html.escape(caption))
    if bars:
        styled.bar(
            subset=[bars],
            align=0,
            color=_BAR_COLOURS,
        )
    styled.format(
        precision=3,
        escape="html",
        na_rep=NONE,
    )
    return styled.to_html()


def html_pattern(
    pattern: Float[Tensor, "pos_q pos_k"],
    words: Sequence[str],
    caption: str,
) -> str:
    """One head's pattern as a small grid for notebooks: the darker, the more attention.

    Pointing at a cell names it.
    """
    rows = []
    for i, weights in enumerate(pattern.tolist()):
        cells = []
        for j, weight in enumerate(weights[: i + 1]):
            title = html.escape(f"{words[i]!r} ({i}) to {words[j]!r} ({j}): {weight:.3f}")
            colour = f"rgba(33,102,172,{weight:.3f})"
            cells.append(f'<td title="{title}" style="background:{colour};{_CELL}"></td>')
        word = html.escape(words[i])
        heading = f'<th style="font-weight:normal;padding:0 4px">{word}</th>'
        rows.append(f"<tr>{heading}{''.join(cells)}</tr>")
    opening = '<table style="border-collapse:collapse;font-size:11px">'
    table = f"{opening}<caption>{html.escape(caption)}</caption>{''.join(rows)}</table>"
    return f'<div style="display:inline-block;margin:4px 12px 4px 0">{table}</div>'
