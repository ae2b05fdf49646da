"""Pictures for papers: attention patterns, firing densities, what dictionaries recover.

Every function returns a `matplotlib.figure.Figure` for `figure.savefig("name.pdf")`, made without
pyplot: importing this module and drawing choose no backend and open no window. In a notebook,
`%matplotlib inline` shows them.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_qk.evals import BASELINES
from sae_lens_qk.results import Evaluation

if TYPE_CHECKING:
    import matplotlib.figure

BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
ORANGE = "#E69F00"
SKY = "#56B4E9"
BLACK = "#000000"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
"""Okabe and Ito's, told apart by colour-blind readers too; in this order for curves."""
GREY = "#888888"
"""Of baselines and lines to compare with."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PAGE = 7.0
COLUMN = 3.4
"""Widths in inches."""
FONT_SIZE = 8.0
LEAST_FONT_SIZE = 4.5
"""Points."""

_PANEL = 1.9  # inches of a pattern's side
_BINS_PER_DECADE = 4
_LONGEST_WORD = 12
_WHITE_SPACE = str.maketrans("\n\t", "↵→")

_RECOVERY = {
    "ce_recovered": "loss recovered",
    "logit_kl_recovered": "logit KL recovered",
    "pattern_kl": "pattern KL (nats)",
}


def pattern_triptych(
    true: Float[Tensor, "*head pos_q pos_k"],
    rebuilt: Float[Tensor, "*head pos_q pos_k"],
    words: Sequence[str],
    heads: int | Sequence[int] | np.ndarray | Tensor | None = None,
    titles: Sequence[str] = ("model", "reconstructed", "reconstructed − model"),
    limit: float | None = None,
) -> "matplotlib.figure.Figure":
    """Attention patterns side by side: true, rebuilt, and rebuilt - true; panels in a row per head.

    Args:
        true, rebuilt: one head [pos_q, pos_k] or several [head, pos_q, pos_k], in [0, 1]. Keys
            after the query are left blank.
        words: the tokens as text; positions are numbered where words would be too small to read.
        heads: their numbers, written next to the rows.
        limit: end of the patterns' colour scale (most attention often goes to one key); default:
            the largest value.
    Raises:
        ValueError: shapes that differ, or another number of words or heads.
    """
    true = _as_heads(true)
    rebuilt = _as_heads(rebuilt)
    numbers = [] if heads is None else np.atleast_1d(heads).tolist()
    n_heads, n_pos, _ = true.shape
    has_equal_sizes = true.shape == rebuilt.shape and len(words) == n_pos
    if not has_equal_sizes or len(numbers) not in (0, n_heads):
        raise ValueError(
            "pattern_triptych needs two patterns of one shape, a word for each position and a "
            f"number for each head, got {list(true.shape)}, {list(rebuilt.shape)}, "
            f"{len(words)} words and heads {numbers}."
        )
    panels_by_head = torch.stack([true, rebuilt, rebuilt - true], dim=1)
    positions = torch.arange(n_pos)
    after_query = positions > positions[:, None]  # left blank, whatever the mask
    images = panels_by_head.masked_fill(after_query, torch.nan).numpy()
    largest = float(np.nanmax(images[:, :2]))
    top = limit or largest
    differences = images[:, 2]
    widest = float(np.nanmax(np.abs(differences)))
    widest = widest or 1.0  # equal patterns: evenly white

    figure = _new_figure(PAGE, 0.9 + _PANEL * n_heads, layout="compressed")
    panels = figure.subplots(n_heads, 3, squeeze=False)
    for row, head_images in zip(panels, images, strict=True):
        true_ax, rebuilt_ax, difference_ax = row
        true_image, rebuilt_image, difference = head_images
        true_ax.imshow(true_image, "Blues", vmin=0.0, vmax=top)
        rebuilt_ax.imshow(rebuilt_image, "Blues", vmin=0.0, vmax=top)
        difference_ax.imshow(difference, "RdBu_r", vmin=-widest, vmax=widest)
    lowest = panels[-1]
    leftmost = panels[:, 0]
    for ax in panels.flat:
        _label_positions(ax, words, ax in lowest, ax in leftmost)
    for ax, title in zip(panels[0], titles, strict=True):
        ax.set_title(escape_dollars(title), fontsize=FONT_SIZE)
    for ax, number in zip(leftmost, numbers, strict=False):
        ax.set_ylabel(f"head {number}", fontsize=FONT_SIZE)
    _colour_bar(panels[0, 0], "max" if largest > top else "neither")
    _colour_bar(panels[0, 2], "neither")
    return figure


def _as_heads(pattern: Tensor) -> Float[Tensor, "head pos_q pos_k"]:
    """Of one head [pos_q, pos_k], or of several."""
    heads = pattern.reshape(-1, *pattern.shape[-2:])
    return heads.detach().float().cpu()


def density_histogram(
    densities_query: Sequence[float] | np.ndarray | pd.Series,
    densities_key: Sequence[float] | np.ndarray | pd.Series,
) -> "matplotlib.figure.Figure":
    """How often features fire: a histogram over the logarithm of the density.

    Dead features are counted in the legend.

    Args:
        densities_query, densities_key: share of tokens on which each feature fires, such as the
            column `density` of `ActivationStatistics.features`, by side.
    Raises:
        ValueError: a density outside [0, 1], or not a single feature that fires.
    """
    query = np.asarray(densities_query, float)
    key = np.asarray(densities_key, float)
    densities = np.concatenate([query, key])
    is_share = (densities >= 0) & (densities <= 1)
    if not is_share.all() or not densities.any():
        raise ValueError(
            "Densities are shares of tokens in [0, 1], and some feature must fire: "
            "look at what was passed."
        )
    least = np.log10(densities[densities > 0].min())
    first_edge = np.floor(least * _BINS_PER_DECADE) / _BINS_PER_DECADE
    width = 1 / _BINS_PER_DECADE
    exponents = np.arange(min(-1.0, first_edge), width, width)
    bins = (10.0**exponents).tolist()
    figure = _new_figure(COLUMN, 2.3)
    ax = figure.subplots()
    _style(ax, "share of tokens on which the feature fires", "features")
    # told apart in black and white too
    sides = {
        "query": (query, BLUE, "-"),
        "key": (key, VERMILION, "--"),
    }
    for side, (values, colour, line) in sides.items():
        n_alive = np.count_nonzero(values)
        label = f"{side}: {n_alive:,} fire, {len(values) - n_alive:,} never"
        ax.hist(
            values,
            bins,
            histtype="step",
            color=colour,
            linestyle=line,
            label=label,
        )
    ax.set_xscale("log")
    # above the panel, where it hides nothing
    figure.legend(
        loc="outside upper center",
        ncols=2,
        columnspacing=1.2,
        frameon=False,
        fontsize=FONT_SIZE - 1,
    )
    return figure


def recovery_bars(evaluation: Evaluation | Mapping[str, Any]) -> "matplotlib.figure.Figure":
    """Loss and logit KL recovered and pattern KL of each source and baseline.

    With 95 % bootstrap intervals over rows.

    Args:
        evaluation: of `evaluate`, or its dict, such as `d.metrics`.
    """
    metrics = evaluation.to_dict() if isinstance(evaluation, Evaluation) else evaluation
    sources: Mapping[str, Any] = metrics["sources"]
    colours = [GREY if name in BASELINES else BLUE for name in sources]
    rows = range(len(sources))
    figure = _new_figure(PAGE, 0.7 + 0.2 * len(sources))
    panels = figure.subplots(1, len(_RECOVERY), sharey=True)
    line: dict[str, Any] = dict(ecolor="black", elinewidth=0.8)
    for ax, name in zip(panels, _RECOVERY, strict=True):
        _style(ax, _RECOVERY[name], "")
        # the zero pattern has no divergence
        measured = [source[name] or {} for source in sources.values()]
        intervals = pd.DataFrame(measured)
        value = intervals["value"]
        errors = [value - intervals["low"], intervals["high"] - value]
        ax.errorbar(value, rows, xerr=errors, fmt="none", **line)
        if name == "pattern_kl":  # from a hundredth to some nats
            ax.scatter(value, rows, s=16, color=colours)
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
        else:
            ax.barh(rows, value, height=0.7, color=colours)
            ax.axvline(0, color="black", linewidth=0.6)
            ax.xaxis.set_major_formatter("{x:.0%}")
    labels = [name.replace("_", " ") for name in sources]
    panels[0].set_yticks(rows, labels, fontsize=FONT_SIZE)
    panels[0].invert_yaxis()
    return figure


def escape_dollars(text: str) -> str:
    """Text as it stands: matplotlib would read what is between two dollar signs as mathematics."""
    return text.replace("$", r"\$")


def _new_figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> "matplotlib.figure.Figure":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Figures need matplotlib: pip install sae-lens-qk[figures]"
        ) from error
    return Figure(
        figsize=(width, height),
        layout=layout,
        dpi=200,
    )


def _style(
    ax: Any,
    x_label: str,
    y_label: str,
) -> None:
    ax.set_xlabel(x_label, fontsize=FONT_SIZE)
    ax.set_ylabel(y_label, fontsize=FONT_SIZE)
    ax.tick_params(
        which="both",
        labelsize=FONT_SIZE - 1,
        width=0.5,
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_linewidth(0.5)


def _colour_bar(
    ax: Any,
    extend: str,
) -> None:
    """Of a panel, in its blank corner."""
    corner = ax.inset_axes((0.72, 0.5, 0.04, 0.45))
    image = ax.images[0]
    bar = ax.figure.colorbar(image, cax=corner, extend=extend)
    bar.ax.tick_params(
        labelsize=FONT_SIZE - 1,
        width=0.5,
        length=2,
    )
    bar.outline.set_visible(False)


def _label_positions(
    ax: Any,
    words: Sequence[str],
    x_labels: bool,
    y_labels: bool,
) -> None:
    """Tokens at the panels' outer sides, as large as fits; numbers where that is too small."""
    ax.tick_params(length=0, labelsize=FONT_SIZE - 1)
    ax.tick_params(labelbottom=x_labels, labelleft=y_labels)
    ax.spines[:].set_visible(False)
    font_size = min(FONT_SIZE, 0.9 * 72 * _PANEL / len(words))  # 72 points per inch
    if font_size >= LEAST_FONT_SIZE:
        positions = range(len(words))
        labels = [_token_label(word) for word in words]
        # labels that do not show take room all the same
        x_words = labels if x_labels else []
        y_words = labels if y_labels else []
        ax.set_xticks(positions, x_words, rotation=90, fontsize=font_size)
        ax.set_yticks(positions, y_words, fontsize=font_size)


def _token_label(word: str) -> str:
    """A token without the space before it, other white space made visible, cut when long."""
    visible = word.strip(" ").translate(_WHITE_SPACE) or "␣"
    if len(visible) > _LONGEST_WORD:
        visible = visible[: _LONGEST_WORD - 1] + "…"
    return escape_dollars(visible)
