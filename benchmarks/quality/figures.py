"""The PNG figures beside the report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .planted_report import label, true_number_kl
from .targets import OURS, SQUARED_ERROR, frame, has_control

Report = dict[str, Any]

STYLES = {
    "ours": ("#000000", "-", "o"),
    "frozen mask": ("#0072B2", "-", "s"),
    "importance": ("#56B4E9", "-", "^"),
    "decoder product": ("#E69F00", "-", "v"),
    "diagonal": ("#999999", "-", "D"),
    "authors": ("#D55E00", "-", "P"),
    "residual SAE": ("#009E73", "-", "X"),
    "L2 transcoders": ("#CC79A7", "-", "<"),
    "contrastive covariances": ("#999999", "--", ">"),
}
"""Colour, line and marker; colours of Okabe and Ito, told apart by the colour-blind."""
CAUSAL_STYLES = {
    "top": ("#000000", "-", "o", "top k"),
    "rescaled": ("#009E73", "--", "D", "rescaled to size"),
    "matched": ("#D55E00", "-", "s", "matched in size"),
    "other": ("#56B4E9", "-", "^", "other, at random"),
}
"""Top features and their controls."""
_LOOK = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "savefig.dpi": 180,
    "lines.markersize": 4,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.use": True,
}


def write(report: Report, folder: Path) -> list[Path]:
    """Every figure there are numbers for, as quality-*.png."""
    written = []
    with mpl.rc_context(cast(Any, _LOOK)):
        for name, figure in _figures(report):
            written.append(folder / f"quality-{name}.png")
            figure.savefig(written[-1])
            plt.close(figure)
    return written


def _figures(report: Report) -> Iterator[tuple[str, Figure]]:
    planted, variance = frame(report, "planted"), frame(report, "variance")
    if not planted.empty:
        yield "curves-f1", curves(planted, "f1", "F1")
        yield "curves-kl", curves(planted, "pattern_kl", "KL of the pattern, nats")
    if not variance.empty:
        yield "variance", against_noise(variance)
    for ranking in ("effect", "marginal"):
        mine = {
            layer: dictionaries[OURS]
            for layer, dictionaries in report.get("causal", {}).items()
            if ranking in dictionaries.get(OURS, {"rankings": {}})["rankings"]
        }
        if mine:
            yield f"causal-{ranking}", causal(mine, ranking)


def curves(cases: Any, column: str, words: str) -> Figure:
    """A figure against the number of pairs kept, one panel a setting."""
    settings = list(cases["setting"].unique())
    n_columns = min(2, len(settings))
    n_rows = -(-len(settings) // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(9, 0.9 + 3.1 * n_rows), sharex=True, squeeze=False
    )
    for ax, setting in zip(axes.flat, settings, strict=False):
        some = cases[cases["setting"] == setting]
        points = _points(some)
        for method, of_method in points.groupby("method", sort=False):
            _line(ax, str(method), of_method.groupby("ratio")[column])
        ax.axvline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        if column == "pattern_kl":
            ax.axhline(
                some["uniform_kl"].mean(), color="#bbbbbb", linewidth=0.8, linestyle=":", zorder=0
            )
            ax.annotate(
                "uniform pattern",
                (1, some["uniform_kl"].mean()),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
                color="#777777",
            )
            ax.set_ylim(bottom=0)
        else:
            ax.set_ylim(0, 1.02)
        _log_ticks(ax, sorted(points["ratio"].unique()))
        ax.set_title(setting, fontsize=10)
    for ax in axes.flat[len(settings) :]:
        ax.set_visible(False)
    figure.supxlabel("pairs kept, in multiples of the planted number", fontsize=10)
    figure.supylabel(words, fontsize=10)
    _legend(figure, axes)
    return figure


def _points(cases: Any) -> pd.DataFrame:
    """A row for each point of each curve."""
    rows = [
        {"method": method, "seed": seed, "ratio": round(point["n_pairs"] / n, 2), **point}
        for method, seed, n, curve in cases[
            ["method", "seed", "planted_pairs", "curve"]
        ].itertuples(index=False)
        for point in curve
    ]
    return pd.DataFrame(rows)


def against_noise(cases: Any) -> Figure:
    """Recovery, pairs found and KL while noise grows; a row of panels a setting."""
    figures = {
        "recovery": "feature recovery",
        "average_precision": "average precision",
        "f1": "F1",
        "transcoders_kl": "KL, nats",
    }
    cases = cases.assign(pairs_kl=true_number_kl(cases))
    settings = list(cases["setting"].unique())
    figure, axes = plt.subplots(
        len(settings), len(figures), figsize=(9, 0.7 + 2.5 * len(settings)), squeeze=False
    )
    for row, setting in zip(axes, settings, strict=True):
        some = cases[cases["setting"] == setting]
        for ax, (column, words) in zip(row, figures.items(), strict=True):
            for method, of_method in some.groupby("method", sort=False):
                _line(ax, str(method), of_method.groupby("noise")[column])
            _log_ticks(ax, sorted(some["noise"].unique()))
            ax.set_ylim(*((0, None) if column == "transcoders_kl" else (0, 1.02)))
            ax.set_title(words if len(settings) == 1 else f"{setting}: {words}", fontsize=10)
    figure.supxlabel("standard deviation of the noise", fontsize=10)
    _legend(figure, axes)
    return figure


def causal(mine: dict[str, Any], ranking: str) -> Figure:
    """TV against k, layers by sides; see the text of the report."""
    figure, axes = plt.subplots(
        len(mine), 2, figsize=(9, 0.9 + 2.8 * len(mine)), sharex=True, sharey="col", squeeze=False
    )
    for row, (layer, d) in zip(axes, mine.items(), strict=True):
        for ax, side in zip(row, ("query", "key"), strict=True):
            by_k = d["rankings"][ranking][side]["by_k"]
            there = {int(k): at["top"]["tv"] for k, at in by_k.items() if at["n"]}
            ax.plot(
                list(there),
                list(there.values()),
                color="#000000",
                linestyle=":",
                linewidth=1.2,
                label="top k, all cases",
            )
            for name, (colour, line, marker, words) in CAUSAL_STYLES.items():
                control, part = ("matched", "top") if name == "top" else (name, "control")
                counted = {
                    int(k): at["controls"][control]
                    for k, at in by_k.items()
                    if has_control(at, control, d["n_cases"])
                }
                values = [at[part]["tv"] for at in counted.values()]
                ax.plot(
                    list(counted), values, color=colour, linestyle=line, marker=marker, label=words
                )
            _log_ticks(ax, sorted(map(int, by_k)))
            ax.set_title(f"layer {layer}, removed at the {side}", fontsize=10)
    for ax in axes[0]:
        ax.set_ylim(bottom=0)  # of the whole column, once everything is drawn
    unit = "features" if ranking == "marginal" else "pairs"
    figure.supxlabel(f"k: {unit} of the ranking “{ranking}”", fontsize=10)
    figure.supylabel("TV of the attention row", fontsize=10)
    _legend(figure, axes)
    return figure


def _line(ax: Axes, method: str, values: Any) -> None:
    """Mean over seeds, and the band from the smallest to the largest."""
    colour, line, marker = STYLES.get(method, ("#666666", ":", "o"))
    found = values.agg(["mean", "min", "max"]).dropna()
    front = 3 if method == OURS else 2
    width = 2.2 if method == OURS or method in SQUARED_ERROR else 1.4
    ax.fill_between(
        found.index,
        found["min"],
        found["max"],
        color=colour,
        alpha=0.13,
        linewidth=0,
        zorder=front - 1,
    )
    ax.plot(
        found.index,
        found["mean"],
        color=colour,
        linestyle=line,
        marker=marker,
        linewidth=width,
        label=label(method),
        zorder=front,
    )


def _log_ticks(ax: Axes, at: list[Any]) -> None:
    ax.set_xscale("log")
    ax.set_xticks(at, [f"{value:g}" for value in at])
    ax.minorticks_off()


def _legend(figure: Figure, axes: Any, n_columns: int = 5) -> None:
    handles = {
        text: handle
        for ax in axes.flat
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=min(n_columns, len(handles)),
        fontsize=9,
    )
