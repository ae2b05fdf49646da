"""Numbers and tables as people read them."""

import io
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

import sae_lens_qk as qk
from sae_lens_qk.metrics import Interval
from sae_lens_qk.tables import (
    cell_table,
    fixed,
    html_pattern,
    html_table,
    interval,
    markdown_table,
    named_features,
    percent,
    rich_table,
    significant,
)

TOKEN = "<b>[red]&"
"""Text that HTML and rich would read as markup."""


def printed(table) -> list[str]:
    """Lines without the spaces around them."""
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    return [re.sub(" +", " ", line) for line in lines if line]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fixed(0.12345), "0.1235"),
        (fixed(2, digits=1), "2.0"),
        (fixed(None), "-"),
        (fixed(math.nan), "-"),
        (percent(0.98765), "98.8%"),
        (percent(None), "-"),
        (interval(Interval(0.5, 0.25, 1.0)), "0.5000 (0.2500, 1.0000)"),
        (interval({"value": 0.5, "low": 0.25, "high": 1.0}, percent), "50.0% (25.0%, 100.0%)"),
        (interval(None), "-"),
    ],
)
def test_numbers(text, expected):
    assert text == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.123456, 0.1235),
        (-3.0, -3),
        (123456.0, 123500),
        (1.23456e9, 1.235e9),
        (1e-7, 1e-7),
        (math.inf, None),
        (math.nan, None),
    ],
)
def test_significant_digits(value, expected):
    rounded = significant(value)
    assert rounded == expected
    assert type(rounded) is type(expected)


def test_features_have_names():
    cfg = qk.BilinearQKConfig(
        d_in=3,
        d_query=5,
        d_key=7,
    )
    columns = {"query_feature": [4, 5, None], "key_feature": [7, 6, 0], "score": [1.0, 2.0, 3.0]}
    frame = pd.DataFrame(columns).astype({"query_feature": "Int64"})
    named = named_features(frame, cfg)
    assert named["query_feature"].tolist() == ["4", "constant", "-"]
    assert named["key_feature"].tolist() == ["constant", "6", "0"]
    assert named["score"].tolist() == [1.0, 2.0, 3.0]
    assert frame["query_feature"].tolist() == [4, 5, pd.NA], "the frame itself stays"


def test_frames_in_terminals():
    frame = pd.DataFrame({"key_word": [TOKEN, "b"], "score": [1.5, np.nan], "n": [3, 4]})
    title, header, _, *rows = printed(rich_table(frame, TOKEN))
    assert title == TOKEN
    assert header == "key word score n"
    assert rows == [f"{TOKEN} +1.500 3", "b - 4"]


def test_cells_in_terminals():
    table = cell_table(["name", "loss"], [[TOKEN, "0.5"], ["longer", "10.25"]], ["name"])
    assert [column.justify for column in table.columns] == ["left", "right"]
    assert printed(table)[3] == f"│ {TOKEN} │ 0.5 │"


def test_markdown():
    lines = markdown_table(["name", "KL", "loss"], [["a", "1", "2"], ["b", "3", "4"]])
    assert lines == [
        "| name | KL | loss |",
        "| --- | ---: | ---: |",
        "| a | 1 | 2 |",
        "| b | 3 | 4 |",
    ]


def test_frames_in_notebooks():
    frame = pd.DataFrame({"word": [TOKEN], "score": [0.12345], "missing": [np.nan]})
    text = html_table(frame, caption=TOKEN, bars="score")
    assert "&lt;b&gt;[red]&amp;" in text
    assert TOKEN not in text
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", text)
    assert cells[1:] == ["0.123", "-"]
    assert "linear-gradient" in text  # the bar


def test_patterns_in_notebooks():
    pattern = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    text = html_pattern(pattern, [TOKEN, "b"], caption="head 3")
    assert TOKEN not in text
    opacities = re.findall(r"rgba\(33,102,172,([\d.]+)\)", text)
    assert opacities == ["1.000", "0.250", "0.750"], "keys after the query have no cell"
    assert "&#x27;b&#x27; (1) to" in text
    assert "head 3" in text
