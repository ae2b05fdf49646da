"""The pictures of the page on indirect objects."""

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.ioi.interventions import MEASURES
from examples.ioi.prompts import Order
from examples.ioi.study import IOIResult
from examples.ioi.twins import twin_summary
from sae_lens_qk.attention import SIDES, Side
from sae_lens_qk.figures import BLUE, GREY, ORANGE, VERMILION

HEADS = [(23, 0), (23, 1), (23, 2), (23, 3), (23, 7), (24, 4), (24, 5)]
"""(layer, head) of those whose attention is shown."""
NAME_COLOURS = {"io": BLUE, "s1": ORANGE, "s2": VERMILION}
ABLATIONS = {
    "removed": (VERMILION, "o", "k best pairs removed"),
    "control": (GREY, "s", "k other pairs removed"),
    "kept": (BLUE, "^", "nothing but the k best pairs"),
}
"""Colour, marker and label by condition."""
LEVELS = {"model": "-", "transcoders": "--", "feature_map": ":"}
REMOVALS = {
    "top": (VERMILION, "o"),
    "rescaled": (GREY, "D"),
    "matched": (GREY, "s"),
    "other": (GREY, "^"),
}
ROLES: dict[Side, list[tuple[str, str]]] = {
    "query": [("end", "clean"), ("end", "third_name")],
    "key": [("io", "clean"), ("s1", "clean"), ("s2", "clean"), ("s2", "third_name")],
}
"""Roles and prompts at which features are counted."""
LOOK = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_BAR = 0.27  # from one bar of a group to the next


def pictures(
    result: IOIResult,
    features: dict[Side, list[int]],
) -> Iterator[tuple[str, Figure]]:
    yield "heads", heads_picture(result)
    yield "pairs", ablation_picture(result)
    yield "removals", removal_picture(result)
    yield "twins", twin_picture(result)
    yield "features", feature_picture(result, features)


def heads_picture(result: IOIResult) -> Figure:
    """Direct effect of every head; attention of the heads that matter."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    effect_ax, attention_ax = figure.subplots(1, 2, width_ratios=(3, 4))
    effects = result.scan.heads.pivot(
        index="layer",
        columns="head",
        values="direct_effect",
    )
    limit = effects.abs().to_numpy().max()
    image = effect_ax.imshow(
        effects,
        cmap="RdBu",
        vmin=-limit,
        vmax=limit,
        aspect="auto",
    )
    title = "direct effect on logit(IO) - logit(S)"
    effect_ax.set(
        xlabel="head",
        ylabel="layer",
        title=title,
        xticks=effects.columns,
    )
    figure.colorbar(image, ax=effect_ax)
    heads = result.scan.heads.set_index(["layer", "head"]).loc[HEADS]
    for n, (name, colour) in enumerate(NAME_COLOURS.items()):
        places = np.arange(len(heads)) + _BAR * (n - 1)
        attention = heads[f"attention_{name}"]
        attention_ax.bar(places, attention, 0.25, color=colour, label=f"to {name.upper()}")
    labels = []
    for (layer, head), effect in heads["direct_effect"].items():
        labels.append(f"{layer}.{head}\n{effect:+.2f}")
    attention_ax.set_xticks(range(len(heads)), labels)
    attention_ax.set(ylabel="attention from END", title="layer.head, and its direct effect")
    attention_ax.legend()
    return figure


def ablation_picture(result: IOIResult) -> Figure:
    """Attention to the name and logit difference, by the number of pairs removed or kept."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots(
        2,
        len(result.targets),
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    for column, (head, name) in zip(axes.T, result.targets.items(), strict=True):
        rows = result.ablations[result.ablations["head"] == head]
        _ablation_panel(column[0], rows, f"attention_{name}")
        _ablation_panel(column[1], rows, MEASURES[-1])
        column[0].set_title(f"head {head}, END to {name.upper()}")
        column[1].set_xlabel("pairs k")
    axes[0, 0].set(ylabel="attention to the name", ylim=(0, None))
    axes[1, 0].set(ylabel="logit difference", ylim=(0, None))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _ablation_panel(
    ax: Axes,
    rows: pd.DataFrame,
    measure: str,
) -> None:
    for condition, (colour, marker, label) in ABLATIONS.items():
        points = rows[rows["condition"] == condition]
        _curve(ax, points["k"], points[measure], colour, marker, label)
    levels = rows.set_index("condition")[measure]
    for condition, line in LEVELS.items():
        style = dict(
            color="black",
            linestyle=line,
            linewidth=0.8,
            label=condition,
        )
        ax.axhline(levels[condition], **style)
    ks = sorted(set(rows["k"]) - {0})
    ax.set_xscale("log")
    ax.set_xticks(ks, [str(k) for k in ks])
    ax.minorticks_off()


def _curve(
    ax: Axes,
    x: Any,
    y: Any,
    colour: str,
    marker: str,
    label: str,
) -> None:
    ax.plot(
        x,
        y,
        color=colour,
        marker=marker,
        markersize=3.5,
        label=label,
    )


def removal_picture(result: IOIResult) -> Figure:
    """Drop of attention when features leave the model's own x, against controls.

    Where half of the prompts have as many features.
    """
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots(
        2,
        len(result.targets),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    removals = result.removals[result.removals["ranking"] == "features"]
    groups = removals.groupby(["head", "side", "condition", "k"])["attention_drop"]
    drops = groups.mean()[groups.size() >= result.n_prompts / 2].reset_index()
    for column, (head, name) in zip(axes.T, result.targets.items(), strict=True):
        for ax, side in zip(column, SIDES, strict=True):
            rows = drops[(drops["head"] == head) & (drops["side"] == side)]
            for condition, (colour, marker) in REMOVALS.items():
                points = rows[rows["condition"] == condition]
                _curve(ax, points["k"], points["attention_drop"], colour, marker, condition)
            ax.axhline(0, color="black", linewidth=0.5)
            role = "END" if side == "query" else name.upper()
            ax.set_title(f"head {head}: features at {role}")
            ax.set_xticks(sorted(set(drops["k"])))
        column[1].set_xlabel("features removed k")
    for ax in axes[:, 0]:
        ax.set_ylabel("drop of attention")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def twin_picture(result: IOIResult) -> Figure:
    """Attention to the three names by prompts, the model's own and as rebuilt."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    summary = twin_summary(result.twins)
    kinds = list(dict.fromkeys(result.twins["prompts"]))
    axes = figure.subplots(1, len(result.targets), squeeze=False, sharey=True)[0]
    for ax, head in zip(axes, result.targets, strict=True):
        rows = summary[summary["head"] == head].set_index("prompts")
        own = rows[rows["source"] == "model"].loc[kinds]
        rebuilt = rows[rows["source"] == "feature_map"].loc[kinds]
        for n, (name, colour) in enumerate(NAME_COLOURS.items()):
            places = np.arange(len(kinds)) + _BAR * (n - 1)
            column = f"attention_{name}"
            ax.bar(places, own[column], 0.25, color=colour, label=f"to {name.upper()}")
            label = "rebuilt from kept pairs" if name == "s2" else None
            ax.plot(places, rebuilt[column], "k_", markersize=7, label=label)
        ax.set_xticks(range(len(kinds)), [kind.replace("_", "\n") for kind in kinds], fontsize=8)
        ax.set_title(f"head {head}")
    axes[0].set_ylabel("attention from END")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def feature_picture(
    result: IOIResult,
    features: dict[Side, list[int]],
) -> Figure:
    """How often the features of the best pairs fire, by role, order of the names and twin."""
    active = result.features.set_index(["role", "prompts", "order", "feature"])["active"].to_dict()
    n_rows = max(map(len, features.values()))
    figure = Figure(figsize=(8, 1.7 + 0.17 * n_rows), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=(4, 8))
    for ax, side in zip(axes, SIDES, strict=True):
        labels = []
        columns = []
        for role, kind in ROLES[side]:
            for order in get_args(Order):
                twin = " 3rd name" if kind == "third_name" else ""
                labels.append(f"{role.upper()}{twin}\n{order}")
                key = (role, kind, order)
                columns.append([active.get((*key, feature), 0.0) for feature in features[side]])
        shares = np.array(columns).T  # [feature, column]
        image = ax.imshow(
            shares,
            cmap="Greys",
            vmin=0,
            vmax=1,
            aspect="auto",
        )
        ax.set_yticks(range(len(shares)), [str(feature) for feature in features[side]], fontsize=7)
        ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        ax.set_title(f"{side} features")
    figure.colorbar(image, ax=axes, label="fires in this share")
    return figure
