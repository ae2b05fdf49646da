"""Pictures for papers: attention patterns, firing densities, figures of merit, kernels over offsets.

Every function returns a `matplotlib.figure.Figure` for `figure.savefig("name.pdf")`, made without pyplot: importing this
module and drawing choose no backend and open no window. In a notebook, `%matplotlib inline` shows them.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.evals import BASELINES, Evaluation
from sae_lens_qk.feature_map import Pairs, as_pairs

if TYPE_CHECKING:
    import matplotlib.figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by colour-blind readers too."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#888888"
PAGE, COLUMN = 7.0, 3.4
"""Widths in inches."""
FONT_SIZE, LEAST_FONT_SIZE = 8.0, 4.5
"""Points."""


def pattern_triptych(
    true: Float[Tensor, "*head pos_q pos_k"],
    made: Float[Tensor, "*head pos_q pos_k"],
    words: Sequence[str],
    heads: int | Sequence[int] | None = None,
    titles: Sequence[str] = ("model", "reconstructed", "reconstructed − model"),
    limit: float | None = None,
) -> "matplotlib.figure.Figure":
    """Attention patterns side by side: true, made, and made - true; one row of panels a head.

    Args:
        true, made: one head [pos_q, pos_k] or several [head, pos_q, pos_k], in [0, 1]. Future keys are left blank.
        words: the tokens as text; positions are numbered instead where they would be too small to read.
        heads: their numbers, written beside the rows.
        limit: end of the patterns' colour scale (most attention often goes to one key); default: the largest value.
    Raises:
        ValueError: shapes that differ, or another number of words or heads.
    """
    true, made = (
        pattern.detach().float().cpu().reshape(-1, *pattern.shape[-2:]) for pattern in (true, made)
    )
    numbers = [heads] if isinstance(heads, int) else list(heads or [])
    n_heads, n_pos, _ = true.shape
    if true.shape != made.shape or len(words) != n_pos or len(numbers) not in (0, n_heads):
        raise ValueError(
            "pattern_triptych needs two patterns of one shape, a word for each position and a number for each head, got "
            f"{list(true.shape)}, {list(made.shape)}, {len(words)} words and heads {numbers}."
        )
    shown = torch.stack([true, made, made - true], dim=1)
    shown = shown.masked_fill(torch.ones(n_pos, n_pos).triu(1).bool(), torch.nan)
    largest, widest = (float(part.nan_to_num().abs().max()) for part in (shown[:, :2], shown[:, 2]))
    top, widest = limit or largest, widest or 1.0  # equal patterns: evenly white
    figure = _figure(PAGE, 0.9 + 1.9 * n_heads, layout="compressed")
    panels = figure.subplots(n_heads, 3, squeeze=False)
    for row, by_source in zip(panels, shown.numpy(), strict=True):
        for ax, values in zip(row[:2], by_source[:2], strict=True):
            ax.imshow(values, cmap="Blues", vmin=0.0, vmax=top)
        row[2].imshow(by_source[2], cmap="RdBu_r", vmin=-widest, vmax=widest)
    for ax in panels.flat:
        _label_positions(ax, words, x=ax in panels[-1], y=ax in panels[:, 0])
    for ax, title in zip(panels[0], titles, strict=True):
        ax.set_title(_escaped(title), fontsize=FONT_SIZE)
    for ax, number in zip(panels[:, 0], numbers, strict=False):
        ax.set_ylabel(f"head {number}", fontsize=FONT_SIZE)
    _colour_bar(panels[0, 0], "max" if largest > top else "neither")
    _colour_bar(panels[0, 2], "neither")
    return figure


def density_histogram(
    densities_query: Sequence[float] | np.ndarray | pd.Series,
    densities_key: Sequence[float] | np.ndarray | pd.Series,
) -> "matplotlib.figure.Figure":
    """How often features fire: a histogram over the logarithm of the density, the dead ones counted in the legend.

    Args:
        densities_query, densities_key: share of tokens on which each feature fires, such as the column `density` of
            `ActivationStatistics.features`, by side.
    Raises:
        ValueError: a density outside [0, 1], or not a single feature that fires.
    """
    sides = {"query": np.asarray(densities_query, float), "key": np.asarray(densities_key, float)}
    together = np.concatenate(list(sides.values()))
    if not ((together >= 0) & (together <= 1)).all() or not together.any():
        raise ValueError(
            "Densities are shares of tokens in [0, 1], and some feature must fire: look at what was passed."
        )
    lowest = min(-1.0, np.floor(np.log10(together[together > 0].min()) * 4) / 4)
    bins = 10.0 ** np.arange(lowest, 0.25, 0.25)  # four a decade
    figure = _figure(COLUMN, 2.3)
    ax = _plain(figure.subplots(), "share of tokens on which the feature fires", "features")
    for (side, densities), colour, style in zip(sides.items(), COLOURS, ("-", "--"), strict=False):
        dead = int((densities == 0).sum())
        label = f"{side}: {len(densities) - dead:,} fire, {dead:,} never"
        ax.hist(densities, bins=bins, histtype="step", color=colour, linestyle=style, label=label)
    ax.set_xscale("log")
    _legend(figure)
    return figure


def recovery_bars(evaluation: Evaluation | Mapping[str, Any]) -> "matplotlib.figure.Figure":
    """Loss and logit KL recovered and pattern KL of each source and baseline, with 95 % bootstrap intervals over rows.

    Args:
        evaluation: of `evaluate`, or its dict, such as `d.metrics`.
    """
    measured = evaluation.to_dict() if isinstance(evaluation, Evaluation) else evaluation
    sources: Mapping[str, Any] = measured["sources"]
    figures = {
        "ce_recovered": "loss recovered",
        "logit_kl_recovered": "logit KL recovered",
        "pattern_kl": "pattern KL (nats)",
    }
    colours = [GREY if name in BASELINES else COLOURS[0] for name in sources]
    rows = range(len(sources))
    figure = _figure(PAGE, 0.7 + 0.2 * len(sources))
    panels = figure.subplots(1, len(figures), sharey=True)
    for ax, (name, title) in zip(panels, figures.items(), strict=True):
        _plain(ax, title, "")
        intervals = [
            source[name] or dict.fromkeys(("value", "low", "high"), np.nan)
            for source in sources.values()
        ]
        value, low, high = (
            np.array([interval[end] for interval in intervals]) for end in ("value", "low", "high")
        )
        ax.errorbar(
            value,
            rows,
            xerr=[value - low, high - value],
            fmt="none",
            ecolor="black",
            elinewidth=0.8,
        )
        if name == "pattern_kl":  # from a hundredth to some nats
            ax.scatter(value, rows, s=16, color=colours)
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
            continue
        ax.barh(rows, value, height=0.7, color=colours)
        ax.axvline(0, color="black", linewidth=0.6)
        ax.xaxis.set_major_formatter("{x:.0%}")
    panels[0].set_yticks(rows, [name.replace("_", " ") for name in sources], fontsize=FONT_SIZE)
    panels[0].invert_yaxis()
    return figure


def kl_against_pairs(
    table: pd.DataFrame, lines: Mapping[str, float] | None = None
) -> "matplotlib.figure.Figure":
    """Pattern KL against the number of pairs, one curve a dictionary.

    Args:
        table: columns dictionary (its name), n_pairs, pattern_kl (nats), and where known low and high (its interval).
        lines: pattern KL by name, drawn as horizontal lines: of the transcoders, of the uniform pattern.
    Raises:
        ValueError: a column is missing.
    """
    missing = {"dictionary", "n_pairs", "pattern_kl"} - set(table.columns)
    if missing:
        raise ValueError(
            f"The table needs columns dictionary, n_pairs and pattern_kl; there is no {sorted(missing)[0]}."
        )
    figure = _figure(COLUMN, 2.6)
    ax = _plain(figure.subplots(), "kept pairs", "pattern KL (nats)")
    drawn = []
    for n, (name, rows) in enumerate(table.groupby("dictionary", sort=False)):
        rows = rows.sort_values("n_pairs")
        style = {
            "color": COLOURS[n % len(COLOURS)],
            "marker": MARKERS[n % len(MARKERS)],
            "markersize": 4,
            "linewidth": 1,
        }
        ends = None
        if {"low", "high"} <= set(rows.columns):
            ends = [rows["pattern_kl"] - rows["low"], rows["high"] - rows["pattern_kl"]]
        label = _escaped(str(name))
        drawn.append(
            ax.errorbar(
                rows["n_pairs"], rows["pattern_kl"], yerr=ends, elinewidth=0.8, label=label, **style
            )
        )
    for n, (name, value) in enumerate((lines or {}).items()):
        style = ("--", ":", "-.")[n % 3]
        drawn.append(
            ax.axhline(value, color=GREY, linestyle=style, linewidth=1, label=_escaped(name))
        )
    ax.set_xscale("log")
    values = [*table["pattern_kl"], *(lines or {}).values()]
    if max(values) > 10 * min(values) > 0:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    else:
        ax.set_ylim(0, 1.1 * max(values))
    _legend(figure, handles=drawn)
    return figure


@torch.no_grad()
def offset_kernel(
    d: BilinearQKDictionary, pairs: Pairs, n_offsets: int = 256, labels: Sequence[str] | None = None
) -> "matplotlib.figure.Figure":
    """Score of each pair per unit of both activations, M[a,b,h](offset), against the relative position.

    Args:
        pairs: triples (query feature, key feature, head), kept or not; at most seven can be told apart.
        n_offsets: offsets 0 to n_offsets - 1; without rotary embeddings the curves are flat.
        labels: instead of the pairs' numbers.
    Raises:
        ValueError: no pair or more than seven, another number of labels, or pairs out of range.
    """
    listed = as_pairs(pairs).tolist()
    labels = (
        [_pair_name(d, *pair) for pair in listed]
        if labels is None
        else [_escaped(label) for label in labels]
    )
    if not 0 < len(listed) <= len(COLOURS) or len(labels) != len(listed):
        raise ValueError(
            f"offset_kernel draws 1 to {len(COLOURS)} pairs, with a label each, got {len(listed)} and {len(labels)} labels."
        )
    curves = d.pair_kernel(listed, range(n_offsets)).float().cpu().numpy()
    figure = _figure(COLUMN, 2.6)
    ax = _plain(
        figure.subplots(), "offset (query − key position)", "score per unit of both activations"
    )
    ax.axhline(0, color=GREY, linewidth=0.6)
    for curve, colour, label in zip(curves, COLOURS, labels, strict=False):
        ax.plot(curve, color=colour, linewidth=1, label=label)
    _legend(figure)
    return figure


def _pair_name(d: BilinearQKDictionary, query_feature: int, key_feature: int, head: int) -> str:
    query = "constant" if query_feature == d.cfg.d_query else query_feature
    key = "constant" if key_feature == d.cfg.d_key else key_feature
    return f"{query} × {key}, head {head}"


def _figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> "matplotlib.figure.Figure":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Figures need matplotlib: pip install sae-lens-qk[figures]"
        ) from error
    return Figure(figsize=(width, height), layout=layout, dpi=200)


def _plain(ax: Any, x_label: str, y_label: str) -> Any:
    ax.set_xlabel(x_label, fontsize=FONT_SIZE)
    ax.set_ylabel(y_label, fontsize=FONT_SIZE)
    ax.tick_params(which="both", labelsize=FONT_SIZE - 1, width=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_linewidth(0.5)
    return ax


def _legend(figure: Any, **handles: Any) -> None:
    """Above the panel, where it hides nothing."""
    figure.legend(
        loc="outside upper center",
        ncols=2,
        fontsize=FONT_SIZE - 1,
        frameon=False,
        columnspacing=1.2,
        **handles,
    )


def _colour_bar(ax: Any, extend: str) -> None:
    """Of a panel, in its corner of future keys."""
    bar = ax.figure.colorbar(
        ax.images[0], cax=ax.inset_axes((0.72, 0.5, 0.04, 0.45)), extend=extend
    )
    bar.ax.tick_params(labelsize=FONT_SIZE - 1, width=0.5, length=2)
    bar.outline.set_visible(False)


def _label_positions(ax: Any, words: Sequence[str], x: bool, y: bool) -> None:
    """Tokens at the panels' outer sides, as large as fits, positions where that would be too small."""
    font_size = min(FONT_SIZE, 0.9 * 72 * 1.9 / len(words))  # a panel is some 1.9 inches wide
    ax.tick_params(length=0, labelsize=FONT_SIZE - 1, labelbottom=x, labelleft=y)
    ax.spines[:].set_visible(False)
    if font_size >= LEAST_FONT_SIZE:
        shown = [_token(word) for word in words]
        ax.set_xticks(range(len(words)), shown if x else [], rotation=90, fontsize=font_size)
        ax.set_yticks(range(len(words)), shown if y else [], fontsize=font_size)


def _token(word: str) -> str:
    """A token as a label: without the space before it, other white space made visible, at most twelve characters."""
    visible = word.strip(" ").replace("\n", "↵").replace("\t", "→") or "␣"
    return _escaped(visible if len(visible) <= 12 else visible[:11] + "…")


def _escaped(text: str) -> str:
    """Dollar signs as such: matplotlib would read what stands between two of them as mathematics."""
    return text.replace("$", r"\$")
