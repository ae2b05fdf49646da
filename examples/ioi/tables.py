"""The tables of the page on indirect objects."""

from typing import Any

import pandas as pd

import sae_lens_qk as qk
from examples.ioi.interventions import removal_summary
from examples.ioi.pairs import name_pairs
from examples.ioi.prompts import Order, ioi_prompts
from examples.ioi.study import IOIResult
from examples.ioi.twins import twin_summary
from sae_lens_qk.attention import Side
from sae_lens_qk.explain.removals import CONTROLS
from sae_lens_qk.host.support import Model
from sae_lens_qk.statistics.activations import ALWAYS_ON, ActivationStatistics
from sae_lens_qk.tables import fixed, markdown_table

SOURCES = ("model", "transcoders", "feature_map")


def preferring_pairs(
    d: qk.BilinearQKDictionary, model: Model, head: int, order: Order, n_prompts: int, n: int = 6
) -> pd.DataFrame:
    """The n kept pairs of a head that add most to s[END, IO] - s[END, S1].

    In prompts of one order of the names.
    """
    prompts = ioi_prompts(model.tokenizer, n_prompts, seed=1, orders=[order])
    pairs = name_pairs(d, model, prompts, [head], ["io", "s1"])
    columns = ["active", "contribution"]
    table = pairs[pairs["weight"] > 0].pivot(
        index=["head", "query_feature", "key_feature"], columns="name", values=columns
    )
    table.columns = [f"{column}_{name}" for column, name in table.columns]
    table = table.fillna(0.0)
    table["preference"] = table["contribution_io"] - table["contribution_s1"]
    table["order"] = order
    return table.nlargest(n, "preference").reset_index()


def strongest_pairs(
    result: IOIResult,
    n: int,
) -> dict[int, pd.DataFrame]:
    """The n kept pairs with the largest effects by head."""
    pairs = result.pairs[result.pairs["weight"] > 0]
    strongest = {}
    for head, name in result.targets.items():
        is_target = (pairs["head"] == head) & (pairs["name"] == name)
        strongest[head] = pairs[is_target].head(n)
    return strongest


def frequent_features(
    result: IOIResult, preferring: pd.DataFrame, contexts: ActivationStatistics, side: Side
) -> list[int]:
    """Features of the strongest pairs in order, without those that are always on."""
    pairs = pd.concat([*strongest_pairs(result, 10).values(), preferring])
    rows = contexts.features[contexts.features["side"] == side]
    density = rows.set_index("feature")["density"]
    features = []
    for feature in pairs[f"{side}_feature"].unique().tolist():
        if density.get(feature, 1.0) <= ALWAYS_ON:  # the constant has no density
            features.append(feature)
    return features


def result_tables(result: IOIResult) -> dict[str, pd.DataFrame]:
    heads = result.scan.heads
    largest = heads.loc[heads["direct_effect"].abs().nlargest(11).index]
    parts = result.scan.parts.groupby("part", sort=False)["direct_effect"].sum()
    clean = result.twins[result.twins["prompts"] == "clean"]
    preference = clean.pivot_table(
        index=["head", "order"], columns="source", values="preference", sort=False
    )
    tables = {
        "Heads": largest.sort_values("direct_effect", ascending=False),
        "Parts": parts.reset_index(),
        "Ablation of pairs": result.ablations.drop(columns="name"),
        "Removal of features": removal_table(result),
        "Preference": preference[list(SOURCES)].reset_index(),
        "Twins": twin_summary(result.twins),
    }
    for head, pairs in strongest_pairs(result, 12).items():
        title = f"Pairs of head {head}, END to {result.targets[head]}"
        tables[title] = pairs.drop(columns=["head", "name"])
    return tables


def removal_table(result: IOIResult) -> pd.DataFrame:
    """Drops by the top features; of each control its drop of attention and how often it is beaten.

    Where half of the prompts have both.
    """
    identity = ["head", "side", "ranking", "k"]
    summary = removal_summary(result.removals)
    summary = summary[summary["n"] >= result.n_prompts / 2]
    drops = ["attention_drop", "predicted_drop", "logit_drop"]
    table = summary.groupby(identity, sort=False)[drops].mean()
    for control in CONTROLS:
        rows = summary[summary["control"] == control].set_index(identity)
        table[control] = rows["control_attention_drop"]
        table[f"beats {control}"] = rows["wins"]
    return table.sort_index(level="ranking", sort_remaining=False).reset_index()


def context_table(
    features: dict[Side, list[int]], contexts: ActivationStatistics, tokenizer: Any, n: int = 5
) -> pd.DataFrame:
    """Where the features fire most in the text that comes with the package; the token in bold."""
    density = contexts.features.set_index(["side", "feature"])["density"]
    rows = []
    for side, side_features in features.items():
        for feature in side_features:
            strongest = contexts.feature_contexts(side, feature)[:n]
            texts = [
                _context(contexts, tokenizer, context.row, context.pos) for context in strongest
            ]
            row = {
                "side": side,
                "feature": feature,
                "density": density[side, feature],
                "contexts": "; ".join(texts),
            }
            rows.append(row)
    return pd.DataFrame(rows)


def _context(
    contexts: ActivationStatistics,
    tokenizer: Any,
    row: int,
    pos: int,
) -> str:
    window, index = contexts.window(row, pos, before=8, after=2)
    words = []
    for token in window:
        word = tokenizer.decode([int(token)])
        words.append(word.replace("\n", "↵").replace("|", "¦"))
    words[index] = f" **{words[index].strip()}** "
    return " ".join("".join(words).split())


def markdown(table: pd.DataFrame) -> str:
    rows = []
    for row in table.to_numpy(object):
        cells = [fixed(value, 3) if isinstance(value, float) else str(value) for value in row]
        rows.append(cells)
    return "\n".join(markdown_table([str(name) for name in table.columns], rows))
