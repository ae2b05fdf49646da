"""The PNG figures next to the report."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.planted_report import label, true_number_kl
from benchmarks.quality.targets import OURS, SQUARED_ERROR, has_control, planted_frame
from benchmarks.show import log_ticks
from sae_lens_qk.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

Report = dict[str, Any]

_LIGHT = "#bbbbbb"
STYLES = {
    "ours": (BLACK, "-", "o"),
    "frozen mask": (BLUE, "-", "s"),
    "importance": (SKY, "-", "^"),
    "decoder product": (ORANGE, "-", "v"),
    "diagonal": (GREY, "-", "D"),
    "authors": (VERMILION, "-", "P"),
    "residual SAE": (GREEN, "-", "X"),
    "L2 transcoders": (PURPLE, "-", "<"),
    "contrastive covariances": (GREY, "--", ">"),
}
"""Colour, line and marker."""
CAUSAL_STYLES = {
    "top": (BLACK, "-", "o", "top k"),
    "rescaled": (GREEN, "--", "D", "rescaled to size"),
    "matched": (VERMILION, "-", "s", "matched in size"),
    "other": (SKY, "-", "^", "other, at random"),
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
}


def write(
    report: Report,
    folder: Path,
) -> list[Path]:
    """Every figure there are numbers for, as quality-*.png."""
    paths = []
    with mpl.rc_context(cast(Any, _LOOK)):
        for name, figure in _figures(report):
            path = folder / f"quality-{name}.png"
            figure.savefig(path)
            paths.append(path)
    return paths


def _figures(report: Report) -> Iterator[tuple[str, Figure]]:
    planted = planted_frame(report, "planted")
    variance = planted_frame(report, "variance")
    if not planted.empty:
        yield "curves-f1", curves(planted, "f1", "F1")
        yield "curves-kl", curves(planted, "pattern_kl", "KL of the pattern, nats")
    if not variance.empty:
        yield "variance", noise_figure(variance)
    for ranking in ("effect", "marginal"):
        layers = {}
        for layer, dictionaries in report.get("causal", {}).items():
            results = dictionaries.get(OURS)
            if results and ranking in results["rankings"]:
                layers[layer] = results
        if layers:
            yield f"causal-{ranking}", causal(layers, ranking)


def curves(
    cases: Any,
    column: str,
    words: str,
) -> Figure:
    """A metric against the number of pairs kept, one panel per setting."""
    settings = list(cases["setting"].unique())
    n_columns = min(2, len(settings))
    n_rows = -(-len(settings) // n_columns)
    figure = Figure(figsize=(9, 0.9 + 3.1 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, sharex=True, squeeze=False)
    for ax, setting in zip(axes.flat, settings, strict=False):
        setting_cases = cases[cases["setting"] == setting]
        points = _points(setting_cases)
        for method, method_points in points.groupby("method", sort=False):
            _line(ax, str(method), method_points.groupby("ratio")[column])
        ax.axvline(
            1,
            color=_LIGHT,
            linewidth=0.8,
            zorder=0,
        )
        if column == "pattern_kl":
            _mark_uniform(ax, setting_cases["uniform_kl"].mean())
        else:
            ax.set_ylim(0, 1.02)
        log_ticks(ax, sorted(points["ratio"].unique()))
        ax.set_title(setting, fontsize=10)
    for ax in axes.flat[len(settings) :]:
        ax.set_visible(False)
    figure.supxlabel("pairs kept, in multiples of the planted number", fontsize=10)
    figure.supylabel(words, fontsize=10)
    _legend(figure, axes)
    return figure


def _mark_uniform(
    ax: Axes,
    uniform_kl: float,
) -> None:
    ax.axhline(
        uniform_kl,
        color=_LIGHT,
        linewidth=0.8,
        linestyle=":",
        zorder=0,
    )
    position: Any = ("axes fraction", "data")
    style = dict(
        ha="right",
        va="bottom",
        fontsize=8,
        color="#777777",
    )
    ax.annotate("uniform pattern", (1, uniform_kl), xycoords=position, **style)
    ax.set_ylim(bottom=0)


def _points(cases: Any) -> pd.DataFrame:
    """A row for each point of each curve."""
    rows = []
    for case in cases.to_dict("records"):
        for point in case["curve"]:
            ratio = round(point["n_pairs"] / case["planted_pairs"], 2)
            row = {"method": case["method"], "seed": case["seed"], "ratio": ratio, **point}
            rows.append(row)
    return pd.DataFrame(rows)


def noise_figure(cases: Any) -> Figure:
    """Recovery, pairs found and KL while noise grows; a row of panels per setting."""
    columns = {
        "recovery": "feature recovery",
        "average_precision": "average precision",
        "f1": "F1",
        "transcoders_kl": "KL, nats",
    }
    cases = cases.assign(pairs_kl=true_number_kl(cases))
    settings = list(cases["setting"].unique())
    figure = Figure(figsize=(9, 0.7 + 2.5 * len(settings)), layout="constrained")
    axes = figure.subplots(len(settings), len(columns), squeeze=False)
    for row, setting in zip(axes, settings, strict=True):
        setting_cases = cases[cases["setting"] == setting]
        for ax, (column, words) in zip(row, columns.items(), strict=True):
            for method, method_cases in setting_cases.groupby("method", sort=False):
                _line(ax, str(method), method_cases.groupby("noise")[column])
            log_ticks(ax, sorted(setting_cases["noise"].unique()))
            ax.set_ylim(bottom=0, top=None if column == "transcoders_kl" else 1.02)
            ax.set_title(words if len(settings) == 1 else f"{setting}: {words}", fontsize=10)
    figure.supxlabel("standard deviation of the noise", fontsize=10)
    _legend(figure, axes)
    return figure


def causal(
    layers: dict[str, Any],
    ranking: str,
) -> Figure:
    """TV against k, layers by sides; see the text of the report."""
    figure = Figure(figsize=(9, 0.9 + 2.8 * len(layers)), layout="constrained")
    axes = figure.subplots(
        len(layers),
        2,
        sharex=True,
        sharey="col",
        squeeze=False,
    )
    for row, (layer, results) in zip(axes, layers.items(), strict=True):
        for ax, side in zip(row, ("query", "key"), strict=True):
            _causal_panel(ax, results["rankings"][ranking][side]["by_k"], results["n_cases"])
            ax.set_title(f"layer {layer}, removed at the {side}", fontsize=10)
    for ax in axes[0]:
        ax.set_ylim(bottom=0)  # of the whole column, once everything is drawn
    unit = "features" if ranking == "marginal" else "pairs"
    figure.supxlabel(f"k: {unit} of the ranking “{ranking}”", fontsize=10)
    figure.supylabel("TV of the attention row", fontsize=10)
    _legend(figure, axes)
    return figure


def _causal_panel(
    ax: Axes,
    results: dict[str, Any],
    n_cases: int,
) -> None:
    """Top features on all their cases, and top features and controls on the same ones."""
    all_cases = {int(k): result["top"]["tv"] for k, result in results.items() if result["n"]}
    style = dict(
        color=BLACK,
        linestyle=":",
        linewidth=1.2,
        label="top k, all cases",
    )
    ax.plot(list(all_cases), list(all_cases.values()), **style)
    for name, (colour, line, marker, words) in CAUSAL_STYLES.items():
        control = "matched" if name == "top" else name
        part = "top" if name == "top" else "control"
        points = {}
        for k, result in results.items():
            if has_control(result, control, n_cases):
                points[int(k)] = result["controls"][control][part]["tv"]
        style = dict(
            color=colour,
            linestyle=line,
            marker=marker,
            label=words,
        )
        ax.plot(list(points), list(points.values()), **style)
    log_ticks(ax, sorted(map(int, results)))


def _line(
    ax: Axes,
    method: str,
    values: Any,
) -> None:
    """Mean over seeds, and the band from the smallest to the largest."""
    colour, line, marker = STYLES.get(method, ("#666666", ":", "o"))
    summary = values.agg(["mean", "min", "max"]).dropna()
    front = 3 if method == OURS else 2
    width = 2.2 if method == OURS or method in SQUARED_ERROR else 1.4
    band = dict(
        color=colour,
        alpha=0.13,
        linewidth=0,
        zorder=front - 1,
    )
    ax.fill_between(summary.index, summary["min"], summary["max"], **band)
    style = dict(
        color=colour,
        linestyle=line,
        marker=marker,
        linewidth=width,
        zorder=front,
    )
    ax.plot(summary.index, summary["mean"], label=label(method), **style)


def _legend(
    figure: Figure,
    axes: Any,
) -> None:
    handles = {}
    for ax in axes.flat:
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True):
            handles[text] = handle
    style = dict(
        loc="outside upper center",
        ncols=min(5, len(handles)),
        fontsize=9,
    )
    figure.legend(list(handles.values()), list(handles), **style)
