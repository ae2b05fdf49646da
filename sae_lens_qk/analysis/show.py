"""Tables of an explanation, for the terminal (rich) and for notebooks (HTML); token text is escaped."""

import html
from typing import Any

import pandas as pd
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from sae_lens_qk.analysis.prompt import Prompt

_BARS = ["#d6604d", "#4393c3"]
"""Colours of negative and positive bars."""


def named_features(frame: pd.DataFrame, prompt: Prompt) -> pd.DataFrame:
    """The frame with features as people read them: numbers, "constant", or a dash where there is none."""
    cfg, named = prompt.dictionary.cfg, frame.copy()
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
