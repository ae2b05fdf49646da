"""What removals did to a real model's attention, and what its scores are made of, as Markdown."""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.quality.targets import CRITERIA, OURS, has_control
from benchmarks.show import (
    NONE,
    count,
    number,
    percent,
    share_interval,
    significant,
    value_interval,
)
from sae_lens_qk.tables import markdown_table

Report = dict[str, Any]
Metrics = dict[str, Any]

MAIN_RANKINGS = ("effect", "marginal")
ALL_CONTROLS = ("other", "matched", "rescaled")
SOURCES = ("transcoders", "feature_map")
_COMPARED_KS = ("2", "5", "10")
_PAIR_SETS = {
    "all": "all",
    "one_varies": "at least one feature of the pair not always on",
    "without_always_on": "both features not always on",
}


def causal(report: Report) -> list[str]:
    title = "## SmolLM2: removing what explains an attention weight"
    reason = report["skipped"].get("causal")
    if reason or not report["causal"]:
        return [title, "", f"Skipped: {reason}." if reason else "Nothing was measured."]
    lines = [title, "", *_INTRODUCTION, "", _TEXTS[report.get("text", "sample")]]
    for layer, dictionaries in report["causal"].items():
        lines += ["", f"### Layer {layer}", "", *_dictionaries(dictionaries)]
        for side in ("query", "key"):
            lines += ["", *_main_tables(dictionaries, side)]
        for table in (_all_rankings, _logits, _twins):
            lines += ["", *table(dictionaries)]
    return [
        *lines,
        "",
        "### Figures",
        "",
        "Ours, TV against k. Top features and controls are averaged over the same cases, those "
        "with the controls `other` and `matched`; k at which fewer than half of the cases have "
        "them are left out. `rescaled` is averaged over its own cases; dotted are the top "
        "features on all cases.",
        "",
        "![TV against k, ranking effect](quality-causal-effect.png)",
        "",
        "![TV against k, ranking marginal](quality-causal-marginal.png)",
    ]


_INTRODUCTION = [
    "For an attention weight P[i,j] of at least 0.1, the features of the k pairs that explain it "
    "best are removed from the model's own layer input, at the query or at the key, and the "
    "model's own weights make the new scores. *TV*: half the summed change of the attention row. "
    "*Score drop*: of the score of (i,j), less the row's mean under P. A case is *won* where the "
    "top k changes more than the control. Intervals are 95 %, by bootstrap over rows of text.",
    "",
    "Controls are active at the same place and outside the top k. *other*: as many, at random. "
    "*matched*: as many, each the nearest in size. *rescaled*: at random, scaled together to the "
    "size of the top ones.",
    "",
    "Rankings of pairs: `effect`, the pattern effect of the pair, is the explanation that the "
    "package gives; `effect_kept` the same within the feature map; `contribution` the pair's "
    "contribution to the score; `decoder` the interaction of the decoder rows; `importance` "
    "measured on other text; `random`. `marginal` ranks features by the pattern effect of all "
    "their terms at the place: there **k counts features, not pairs**, and takes more of them at "
    "the same k. `contribution` and `marginal` were added after it was seen that `effect` loses "
    "cases; like `effect`, they use no measured data.",
]


_TEXTS = {
    "corpus": "Explained is text of the corpus's test split; directions and importances are "
    "measured on its validation split.",
    "sample": "Explained is text of the sample that comes with the package; directions and "
    "importances are measured on another part of it. The metrics of a release are those on the "
    "corpus (`QK_CORPUS`).",
}


def _dictionaries(dictionaries: Metrics) -> list[str]:
    rows = []
    for name, results in dictionaries.items():
        row = [name, count(results["n_cases"])]
        row += map(percent, results["x_explained"].values())
        row.append(significant(results["in_score_check"]))
        rows.append(row)
    header = ["dictionary", "cases", "layer input explained, query", "key"]
    header.append("largest error of predicted terms")
    return [
        *markdown_table(header, rows),
        "",
        "*Layer input explained*: variance that the features' directions hold. *Largest error*: a "
        "check of the code, no evidence.",
    ]


def _explanations(dictionaries: Metrics) -> Iterator[tuple[str, str]]:
    """Ours by the main rankings, the others by `effect`."""
    for name, d in dictionaries.items():
        for ranking in MAIN_RANKINGS if name == OURS else MAIN_RANKINGS[:1]:
            if ranking in d["rankings"]:
                yield name, ranking


def _main_tables(
    dictionaries: Metrics,
    side: str,
) -> list[str]:
    change_rows = []
    win_rows = []
    for name, ranking in _explanations(dictionaries):
        results = dictionaries[name]
        explanation = name if name != OURS else f"{name}, `{ranking}`"
        for k, result in results["rankings"][ranking][side]["by_k"].items():
            change_rows.append([explanation, k, *_change_cells(result)])
            win_rows.append([explanation, k, *_win_cells(result, results["n_cases"])])
    header = ["explanation", "k"]
    changes = ["features", "cases", "top k", "cases there", "top k there", *ALL_CONTROLS]
    wins = [f"{words}: {control}" for words in CRITERIA.values() for control in ALL_CONTROLS]
    return [
        f"**Removed at the {side}: TV.** *There*: mean over the cases that have the controls "
        "`other` and `matched`. Baselines by `effect`.",
        "",
        *markdown_table([*header, *changes], change_rows),
        "",
        f"**Removed at the {side}: cases won** against each control; (n) where fewer than half of "
        "the cases have it.",
        "",
        *markdown_table([*header, *wins], win_rows),
    ]


def _change_cells(result: Metrics) -> list[str]:
    controls = result["controls"]
    matched = controls["matched"]
    return [
        number(result["features"], 1),
        count(result["n"]),
        number(result["top"]["tv"]),
        count(matched["n"]),
        number(matched["top"]["tv"]),
        *(number(controls[name]["control"]["tv"]) for name in ALL_CONTROLS),
    ]


def _win_cells(
    result: Metrics,
    n_cases: int,
) -> list[str]:
    cells = []
    for criterion in CRITERIA:
        for name in ALL_CONTROLS:
            control = result["controls"][name]
            few = "" if has_control(result, name, n_cases) else f" ({control['n']})"
            cells.append(share_interval(control["wins"][criterion]) + few)
    return cells


def _all_rankings(dictionaries: Metrics) -> list[str]:
    rows = []
    for name, results in dictionaries.items():
        for ranking, sides in results["rankings"].items():
            for side, metrics in sides.items():
                row = [name, f"`{ranking}`", side, *_area_cells(metrics["tv_area"])]
                row += [_wins(metrics, criterion, results["n_cases"]) for criterion in CRITERIA]
                rows.append([*row, *_prediction(metrics)])
    ks = ", ".join(_COMPARED_KS)
    header = ["dictionary", "ranking", "side"]
    header += [f"area, top / {name}" for name in ALL_CONTROLS]
    header += [f"won against matched, {words}" for words in CRITERIA.values()]
    header += ["Pearson", "Spearman", "slope"]
    return [
        "**All rankings.** *Area*: mean TV over log k, on the k at which half of the cases have "
        f"the control. *Won*: at k = {ks}; {NONE} where fewer than half have it. *Pearson, "
        "Spearman, slope*: measured score drop of the top 5 against the predicted.",
        "",
        *markdown_table(header, rows),
    ]


def _area_cells(areas: Metrics) -> list[str]:
    cells = []
    for name in ALL_CONTROLS:
        if name in areas:
            cells.append(f"{number(areas[name]['top'])} / {number(areas[name]['control'])}")
    return cells


def _wins(
    metrics: Metrics,
    criterion: str,
    n_cases: int,
) -> str:
    cells = []
    for k in _COMPARED_KS:
        result = metrics["by_k"].get(k)
        if result and has_control(result, "matched", n_cases):
            share, _, _ = result["controls"]["matched"]["wins"][criterion]
            cells.append(f"{100 * share:.0f}")
        else:
            cells.append(NONE)
    return ", ".join(cells) + " %"


def _prediction(metrics: Metrics) -> list[str]:
    result = metrics["by_k"].get("5", {"prediction": {"score_drop": {}}})
    return _correlations(result["prediction"]["score_drop"])


def _correlations(result: Metrics) -> list[str]:
    return [number(result.get(name), 2) for name in ("pearson", "spearman", "slope")]


def _logits(dictionaries: Metrics) -> list[str]:
    rows = []
    for name, results in dictionaries.items():
        for k, result in results.get("logits", {}).items():
            controls = [result["controls"][control] for control in ALL_CONTROLS]
            row = [
                name,
                k,
                count(result["n"]),
                value_interval(result["top"]),
                significant(result["predicted"]),
                number(result["prediction"]["pearson"], 2),
                *(significant(control["control"]) for control in controls),
                *(share_interval(control["wins"]) for control in controls),
            ]
            rows.append(row)
    header = ["dictionary", "k", "cases", "top k", "predicted", "Pearson", *ALL_CONTROLS]
    header += [f"won: {control}" for control in ALL_CONTROLS]
    return [
        "**To the next token.** The attention row with the top k of `effect` removed at the key, "
        "put into the model: KL of the prediction at the query, in nats. *Predicted*: the same "
        "with the row that the terms predict.",
        "",
        *markdown_table(header, rows),
    ]


def _twins(dictionaries: Metrics) -> list[str]:
    rows = []
    for name, results in dictionaries.items():
        twins = results["twins"]
        for source in SOURCES:
            if source in twins:
                row = [name, source.replace("_", " "), count(twins["n"])]
                row += [number(twins["mean_drop"], 2), *_correlations(twins[source])]
                rows.append(row)
    header = ["dictionary", "terms of", "cases", "mean drop", "Pearson", "Spearman", "slope"]
    return [
        "**Twin prompts.** The token at the key becomes another one of the same text; the drop of "
        "the score that all terms predict against the model's own. No feature directions are "
        "fitted.",
        "",
        *markdown_table(header, rows),
    ]


def explained(report: Report) -> list[str]:
    title = "## SmolLM2: what feature pairs hold"
    reason = report["skipped"].get("explained")
    if reason or not report["explained"]:
        return [title, "", f"Skipped: {reason}." if reason else "Nothing was measured."]
    lines = [
        title,
        "",
        "*score_explained*: share of the score's variance within a row, weighted by the pattern, "
        "that the feature x feature terms hold; *equal*: every key counts the same. *Norm share*: "
        "|f|² / |s|². *Pairs for 50 % (90 %)*: supporting pairs, strongest first, whose removal "
        "from the score lowers the attention weight by that share of what removing all of them "
        "does; median and quartiles over cases. *Weight held*: that whole drop. *Strongest 1 %*: "
        "share of the summed size of the active pairs.",
    ]
    header = ["dictionary", "terms of", "pairs counted", "score_explained", "equal", "norm share"]
    header += ["pairs for 50 %", "pairs for 90 %", "weight held", "strongest 1 %", "active pairs"]
    always_on = []
    for layer, dictionaries in report["explained"].items():
        rows = []
        for name, results in dictionaries.items():
            rows += _explained_rows(name, results)
            n = results["always_on"]
            always_on.append(f"layer {layer}, {name}: {n['query']} query, {n['key']} key")
        lines += ["", f"### Layer {layer}", "", *markdown_table(header, [*rows, _OTHER_WORK])]
    return [*lines, "", f"Features that are always on: {'; '.join(always_on)}.", "", *_COMPARISON]


def _explained_rows(
    name: str,
    results: Metrics,
) -> Iterator[list[str]]:
    for source in SOURCES:
        if source not in results:
            continue
        for pair_set, words in _PAIR_SETS.items():
            metrics = results[source][pair_set]
            yield [
                name,
                source.replace("_", " "),
                words,
                percent(metrics["score_explained"]["mean"], 1),
                percent(metrics["score_explained_unweighted"]["mean"], 1),
                percent(metrics["norm_share"]["mean"], 1),
                _quartiles(metrics["pairs_for"]["0.5"], count),
                _quartiles(metrics["pairs_for"]["0.9"], count),
                _quartiles(metrics["weight_held"], percent),
                percent(metrics["top_percent"]),
                count(metrics["active_pairs"]),
            ]


def _quartiles(
    values: dict[str, float] | None,
    cell: Callable[[Any], str],
) -> str:
    """The median with the quartiles."""
    if values is None:
        return NONE
    return f"{cell(values['median'])} ({cell(values['lower'])} to {cell(values['upper'])})"


_OTHER_WORK = [
    "*other work*",
    "MLP transcoders",
    "all",
    NONE,
    NONE,
    "8–21 %, up to 31 %, up to 63 %",
    "25 features",
    "197 features",
    NONE,
    "30 %",
    NONE,
]
_COMPARISON = [
    "*Other work*: metrics published for Qwen3-0.6B to 4B with MLP transcoders as the dictionary: "
    "share of the score norm, features (not pairs) for half and for 90 % of the feature-driven "
    "movement, and magnitude held by the strongest 1 % of pairs. Other models, other dictionaries "
    "and other definitions: they say where the field stands, and are no baseline.",
]
