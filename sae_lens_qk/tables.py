"""Tables of an explanation, for the terminal (rich) and for notebooks (HTML); token text is escaped."""

import html
from collections.abc import Sequence
from typing import Any

import pandas as pd
from jaxtyping import Float
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sae_lens_qk.config import BilinearQKConfig

_BARS = ["#d6604d", "#4393c3"]
"""Colours of negative and positive bars."""
_CELL = "width:13px;height:13px;padding:0;border:1px solid rgba(128,128,128,.25)"


def named_features(frame: pd.DataFrame, cfg: BilinearQKConfig) -> pd.DataFrame:
    """The frame with features as people read them: numbers, "constant", or a dash where there is none."""
    named = frame.copy()
    for column, constant in (("query_feature", cfg.d_query), ("key_feature", cfg.d_key)):
        if column in named:
            named[column] = [_name(feature, constant) for feature in named[column]]
    return named


def _name(feature: Any, constant: int) -> str:
    return "-" if pd.isna(feature) else "constant" if feature == constant else str(feature)


def rich_table(frame: pd.DataFrame, title: str) -> Table:
    """A frame as a table: numbers to the right with three decimals and a sign, dashes where nothing is."""
    table = Table(title=Text(title), box=SIMPLE, show_edge=False, title_justify="left")
    for column in frame:
        numeric = pd.api.types.is_numeric_dtype(frame[column])
        table.add_column(str(column).replace("_", " "), justify="right" if numeric else "left")
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if pd.isna(value) else f"{value:+.3f}"
    return "-" if pd.isna(value) else str(value)


def html_table(frame: pd.DataFrame, caption: str, bars: str | None = None) -> str:
    """A frame as an HTML table for notebooks, one column with bars around zero."""
    styled = frame.style.hide(axis="index").set_caption(html.escape(caption))
    if bars:
        styled.bar(subset=[bars], align=0, color=_BARS)
    styled.format(precision=3, escape="html", na_rep="-")
    return styled.to_html()


def html_pattern(pattern: Float[Tensor, "pos_q pos_k"], words: Sequence[str], caption: str) -> str:
    """One head's pattern as a small grid for notebooks: the darker, the more attention; pointing at a cell names it."""
    rows = []
    for i, row in enumerate(pattern.tolist()):
        cells = []
        for j, weight in enumerate(row[: i + 1]):
            title = html.escape(f"{words[i]!r} ({i}) to {words[j]!r} ({j}): {weight:.3f}")
            cells.append(
                f'<td title="{title}" style="background:rgba(33,102,172,{weight:.3f});{_CELL}"></td>'
            )
        rows.append(
            f'<tr><th style="font-weight:normal;padding:0 4px">{html.escape(words[i])}</th>{"".join(cells)}</tr>'
        )
    table = f'<table style="border-collapse:collapse;font-size:11px"><caption>{html.escape(caption)}</caption>'
    return f'<div style="display:inline-block;margin:4px 12px 4px 0">{table}{"".join(rows)}</table></div>'
