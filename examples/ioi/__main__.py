"""Indirect objects in SmolLM2: which heads, which feature pairs, and what is left without them (docs/ioi.md).

python examples/ioi.py --output docs/images    # every table and picture of the page: some minutes on two cores
python examples/ioi.py --smoke                 # a few prompts and one head, under a minute
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import sae_lens_qk as qk
from sae_lens_qk.statistics.activations import ActivationStatistics, Side, collect_activations
from sae_lens_qk.statistics.activations import ALWAYS_ON
from sae_lens_qk.explain.removals import CONTROLS, Directions
from sae_lens_qk.analysis.ioi import MEASURES, IOIResult, Name, name_pairs, removal_summary, study_ioi, twin_summary
from sae_lens_qk.analysis.ioi_prompts import TEMPLATES, Order, ioi_prompts
from sae_lens_qk.host.layer import layer_inputs
from sae_lens_qk.text import token_rows

TARGETS: dict[int, Name] = {3: "s2", 0: "io", 7: "io"}
"""Heads of layer 23, and the name attention to which is explained."""
NAME_MOVER = 0
SHOWN_HEADS = [(23, 0), (23, 1), (23, 2), (23, 3), (23, 7), (24, 4), (24, 5)]
SIDES: tuple[Side, Side] = ("query", "key")

COLOURS = {"io": "#0072B2", "s1": "#E69F00", "s2": "#D55E00"}
ABLATIONS = {
    "removed": ("#D55E00", "o", "k best pairs removed"),
    "control": ("#999999", "s", "k other pairs removed"),
    "kept": ("#0072B2", "^", "nothing but the k best pairs"),
}
LEVELS = {"model": "-", "transcoders": "--", "feature_map": ":"}
REMOVALS = {
    "top": ("#D55E00", "o"),
    "rescaled": ("#999999", "D"),
    "matched": ("#999999", "s"),
    "other": ("#999999", "^"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dictionary", default="smollm2-135m-instruct-L23", help="name or folder")
    parser.add_argument("--output", type=Path, default=Path("output/ioi"))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    n_prompts, n_rows, ks = (4, 4, (1, 5)) if args.smoke else (48, 128, (1, 2, 5, 10, 20, 50))
    targets = {3: TARGETS[3]} if args.smoke else TARGETS
    templates = TEMPLATES[:1] if args.smoke else TEMPLATES

    d = qk.BilinearQKDictionary.from_pretrained(args.dictionary)
    model = qk.load_model(d)

    # Other text: where features lie in x, and what they fire on.
    tokens = token_rows(model, "", "text", n_rows, 256)
    x = torch.cat([layer_inputs(model, d.cfg.layer, rows) for rows in tokens.split(8)])
    contexts = collect_activations(d, [(tokens, x)])

    # Heads, pairs, ablations, removals, twins.
    result = study_ioi(
        d, model, targets, n_prompts, Directions.fit(d, list(x)), ks, templates=templates
    )
    preferring = pd.concat(
        preferring_pairs(d, model, NAME_MOVER, order, n_prompts // 2) for order in get_args(Order)
    )
    features = {side: features_of(result, preferring, contexts, side) for side in SIDES}

    scan = result.scan
    print(
        f"logit difference {scan.logit_difference:.2f}, positive in {scan.accuracy:.0%} of {n_prompts} prompts"
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "ioi.json").write_text(json.dumps(result.to_dict(), indent=1))
    tables = {**result_tables(result), "Pairs that prefer IO to S1": preferring}
    tables["Strongest contexts"] = context_table(features, contexts, model)
    text = "\n\n".join(f"## {name}\n\n{markdown(table)}" for name, table in tables.items())
    (args.output / "ioi-tables.md").write_text(text + "\n")
    with mpl.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    ):
        for name, figure in pictures(result, features):
            figure.savefig(args.output / f"ioi-{name}.png", dpi=150)
    print(f"tables and pictures are in {args.output}")


def preferring_pairs(
    d: qk.BilinearQKDictionary, model: Any, head: int, order: Order, n_prompts: int
) -> pd.DataFrame:
    """The kept pairs of a head that add most to s[END, IO] - s[END, S1], in prompts of one order of the names."""
    prompts = ioi_prompts(model.tokenizer, n_prompts, seed=1, orders=[order])
    pairs = name_pairs(d, model, prompts, [head], ["io", "s1"]).query("weight > 0")
    by_name = pairs.pivot(
        index=["head", "query_feature", "key_feature"],
        columns="name",
        values=["active", "contribution"],
    )
    by_name = by_name.fillna(0.0)
    by_name.columns = [f"{value}_{name}" for value, name in by_name.columns]
    by_name["preference"] = by_name["contribution_io"] - by_name["contribution_s1"]
    return by_name.nlargest(6, "preference").reset_index().assign(order=order)


def strongest_pairs(result: IOIResult, n: int) -> dict[int, pd.DataFrame]:
    """The n kept pairs with the largest effects by head."""
    kept = result.pairs[result.pairs["weight"] > 0]
    return {
        head: kept[(kept["head"] == head) & (kept["name"] == name)].head(n)
        for head, name in result.targets.items()
    }


def features_of(
    result: IOIResult, preferring: pd.DataFrame, contexts: ActivationStatistics, side: Side
) -> list[int]:
    """Features of the strongest pairs in order, without those that are always on."""
    listed = pd.concat([*strongest_pairs(result, 10).values(), preferring])[f"{side}_feature"]
    of_side = contexts.features[contexts.features["side"] == side].set_index("feature")["density"]
    return [
        feature for feature in listed.unique().tolist() if of_side.get(feature, 1.0) <= ALWAYS_ON
    ]


# Tables


def result_tables(result: IOIResult) -> dict[str, pd.DataFrame]:
    heads, parts = result.scan.heads, result.scan.parts
    largest = heads.loc[heads["direct_effect"].abs().nlargest(11).index]
    clean = result.twins.query("prompts == 'clean'")
    preference = clean.pivot_table(
        index=["head", "order"], columns="source", values="preference", sort=False
    )
    tables = {
        "Heads": largest.sort_values("direct_effect", ascending=False),
        "Parts": parts.groupby("part", sort=False)["direct_effect"].sum().reset_index(),
        "Ablation of pairs": result.ablations.drop(columns="name"),
        "Removal of features": removal_table(result),
        "Preference": preference[list(LEVELS)].reset_index(),
        "Twins": twin_summary(result.twins),
    }
    for head, listed in strongest_pairs(result, 12).items():
        tables[f"Pairs of head {head}, END to {result.targets[head]}"] = listed.drop(
            columns=["head", "name"]
        )
    return tables


def removal_table(result: IOIResult) -> pd.DataFrame:
    """Drops by the top features; of each control its drop of attention and the share of prompts in which that is less."""
    what = ["head", "side", "ranking", "k"]
    summary = removal_summary(result.removals).query("n >= @result.n_prompts / 2")
    made = summary.groupby(what, sort=False)[
        ["attention_drop", "predicted_drop", "logit_drop"]
    ].mean()
    for control in CONTROLS:
        of_control = summary[summary["control"] == control].set_index(what)
        made[control], made[f"beats {control}"] = (
            of_control["control_attention_drop"],
            of_control["wins"],
        )
    return made.sort_index(level="ranking", sort_remaining=False).reset_index()


def context_table(
    features: dict[Side, list[int]], contexts: ActivationStatistics, model: Any, n: int = 5
) -> pd.DataFrame:
    """Where the features fire most in the text that comes with the package; the token in bold."""
    densities = contexts.features.set_index(["side", "feature"])["density"]
    rows = []
    for side, feature in [
        (side, feature) for side, listed in features.items() for feature in listed
    ]:
        shown = []
        for context in contexts.feature_contexts(side, feature)[:n]:
            window, at = contexts.window(context.row, context.pos, before=8, after=2)
            words = [
                model.tokenizer.decode([int(token)]).replace("\n", "↵").replace("|", "¦")
                for token in window
            ]
            words[at] = f" **{words[at].strip()}** "
            shown.append(" ".join("".join(words).split()))
        rows.append(
            {
                "side": side,
                "feature": feature,
                "density": densities[side, feature],
                "contexts": "; ".join(shown),
            }
        )
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    shown = [
        [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row]
        for row in table.to_numpy(object)
    ]
    lines = [[str(name) for name in table.columns], ["---"] * table.shape[1], *shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Pictures


def pictures(result: IOIResult, features: dict[Side, list[int]]) -> Iterator[tuple[str, Figure]]:
    yield "heads", heads_picture(result)
    yield "pairs", ablation_picture(result)
    yield "removals", removal_picture(result)
    yield "twins", twin_picture(result)
    yield "features", feature_picture(result, features)


def heads_picture(result: IOIResult) -> Figure:
    """Direct effect of every head; attention of the heads that matter."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 4))
    effects = result.scan.heads.pivot(index="layer", columns="head", values="direct_effect")
    limit = effects.abs().to_numpy().max()
    image = left.imshow(effects, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    left.set(
        xlabel="head",
        ylabel="layer",
        title="direct effect on logit(IO) - logit(S)",
        xticks=effects.columns,
    )
    figure.colorbar(image, ax=left)
    heads = result.scan.heads.set_index(["layer", "head"]).loc[SHOWN_HEADS]
    for n, (name, colour) in enumerate(COLOURS.items()):
        places = np.arange(len(heads)) + 0.27 * (n - 1)
        right.bar(
            places, heads[f"attention_{name}"], 0.25, color=colour, label=f"to {name.upper()}"
        )
    effects_shown = zip(SHOWN_HEADS, heads["direct_effect"], strict=True)
    right.set_xticks(
        range(len(heads)),
        [f"{layer}.{head}\n{effect:+.2f}" for (layer, head), effect in effects_shown],
    )
    right.set(ylabel="attention from END", title="layer.head, and its direct effect")
    right.legend()
    return figure


def ablation_picture(result: IOIResult) -> Figure:
    """Attention to the name and logit difference, by the number of pairs removed or kept."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots(2, len(result.targets), squeeze=False, sharex=True, sharey="row")
    ks = sorted(set(result.ablations["k"]) - {0})
    for column, (head, name) in zip(axes.T, result.targets.items(), strict=True):
        of_head = result.ablations[result.ablations["head"] == head].set_index("condition")
        for ax, measure in zip(column, (f"attention_{name}", MEASURES[-1]), strict=True):
            for condition, (colour, marker, label) in ABLATIONS.items():
                rows = of_head.loc[of_head.index == condition]
                ax.plot(
                    rows["k"],
                    rows[measure],
                    color=colour,
                    marker=marker,
                    markersize=3.5,
                    label=label,
                )
            for condition, line in LEVELS.items():
                ax.axhline(
                    of_head.loc[condition, measure],
                    color="black",
                    linestyle=line,
                    linewidth=0.8,
                    label=condition,
                )
            ax.set_xscale("log")
            ax.set_xticks(ks, [str(k) for k in ks])
            ax.minorticks_off()
        column[0].set_title(f"head {head}, END to {name.upper()}")
        column[1].set_xlabel("pairs k")
    axes[0, 0].set(ylabel="attention to the name", ylim=(0, None))
    axes[1, 0].set(ylabel="logit difference", ylim=(0, None))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def removal_picture(result: IOIResult) -> Figure:
    """Drop of attention when features leave the model's own x, against controls, where half of the prompts have as many."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots(2, len(result.targets), squeeze=False, sharex=True, sharey=True)
    of_features = result.removals[result.removals["ranking"] == "features"]
    drops = of_features.groupby(["head", "side", "condition", "k"])["attention_drop"].agg(
        ["mean", "size"]
    )
    drops = drops[drops["size"] >= result.n_prompts / 2]["mean"].reset_index()
    for column, (head, name) in zip(axes.T, result.targets.items(), strict=True):
        for ax, side in zip(column, SIDES, strict=True):
            for condition, (colour, marker) in REMOVALS.items():
                rows = drops.query("head == @head and side == @side and condition == @condition")
                ax.plot(
                    rows["k"],
                    rows["mean"],
                    color=colour,
                    marker=marker,
                    markersize=3.5,
                    label=condition,
                )
            ax.axhline(0, color="black", linewidth=0.5)
            ax.set_title(f"head {head}: features at {'END' if side == 'query' else name.upper()}")
            ax.set_xticks(sorted(set(drops["k"])))
        column[1].set_xlabel("features removed k")
    for ax in axes[:, 0]:
        ax.set_ylabel("drop of attention")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def twin_picture(result: IOIResult) -> Figure:
    """Attention to the three names by prompts, the model's own and as rebuilt."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    summary = twin_summary(result.twins).set_index(["head", "prompts", "source"])
    kinds = list(dict.fromkeys(result.twins["prompts"]))
    axes = figure.subplots(1, len(result.targets), squeeze=False, sharey=True)[0]
    for ax, head in zip(axes, result.targets, strict=True):
        for n, (name, colour) in enumerate(COLOURS.items()):
            places = np.arange(len(kinds)) + 0.27 * (n - 1)
            own, made = (
                [summary.loc[(head, kind, source), f"attention_{name}"] for kind in kinds]
                for source in ("model", "feature_map")
            )
            ax.bar(places, own, 0.25, color=colour, label=f"to {name.upper()}")
            ax.plot(
                places,
                made,
                "k_",
                markersize=7,
                label="rebuilt from kept pairs" if n == 2 else None,
            )
        ax.set_xticks(range(len(kinds)), [kind.replace("_", "\n") for kind in kinds], fontsize=8)
        ax.set_title(f"head {head}")
    axes[0].set_ylabel("attention from END")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def feature_picture(result: IOIResult, features: dict[Side, list[int]]) -> Figure:
    """How often the features of the best pairs fire, by place, order of the names and twin."""
    of_key = [("io", "clean"), ("s1", "clean"), ("s2", "clean"), ("s2", "third_name")]
    roles = {"query": [("end", "clean"), ("end", "third_name")], "key": of_key}
    active = result.features.set_index(["role", "prompts", "order", "feature"])["active"].to_dict()
    n_rows = max(map(len, features.values()))
    figure = Figure(figsize=(8, 1.7 + 0.17 * n_rows), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=(4, 8))
    for ax, side in zip(axes, SIDES, strict=True):
        columns = [(role, kind, order) for role, kind in roles[side] for order in get_args(Order)]
        shares = np.array(
            [
                [active.get((*column, feature), 0.0) for column in columns]
                for feature in features[side]
            ]
        )
        image = ax.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        ax.set_yticks(range(len(shares)), [str(feature) for feature in features[side]], fontsize=7)
        labels = [
            f"{role.upper()}{' 3rd name' * (kind != 'clean')}\n{order}"
            for role, kind, order in columns
        ]
        ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        ax.set_title(f"{side} features")
    figure.colorbar(image, ax=axes, label="fires in this share")
    return figure


if __name__ == "__main__":
    main()
