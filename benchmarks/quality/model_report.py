"""What removals did to a real model's attention, and what its scores are made of, as Markdown."""

from collections.abc import Iterator
from typing import Any

from .tables import NONE, count, interval, number, percent, quartiles, significant, table
from .targets import CRITERIA, OURS, has_control

Report = dict[str, Any]
Figures = dict[str, Any]

MAIN_RANKINGS = ("effect", "marginal")
ALL_CONTROLS = ("other", "matched", "rescaled")
SOURCES = ("transcoders", "feature_map")
_COMPARED_KS = ("2", "5", "10")
_COUNTED = {
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
        lines += [
            "",
            *_all_rankings(dictionaries),
            "",
            *_logits(dictionaries),
            "",
            *_twins(dictionaries),
        ]
    return [
        *lines,
        "",
        "### Figures",
        "",
        "Ours, TV against k. Top features and controls are averaged over the same cases, those with the controls `other` "
        "and `matched`; k at which fewer than half of the cases have them are left out. `rescaled` is averaged over its own "
        "cases; dotted are the top features on all cases.",
        "",
        "![TV against k, ranking effect](quality-causal-effect.png)",
        "",
        "![TV against k, ranking marginal](quality-causal-marginal.png)",
    ]


_INTRODUCTION = [
    "For an attention weight P[i,j] of at least 0.1, the features of the k pairs that explain it best are removed from the "
    "model's own layer input, at the query or at the key, and the model's own weights make the new scores. *TV*: half the "
    "summed change of the attention row. *Score drop*: of the score of (i,j), less the row's mean under P. A case is *won* "
    "where the top k changes more than the control. Intervals are 95 %, by bootstrap over rows of text.",
    "",
    "Controls are active at the same place and outside the top k. *other*: as many, at random. *matched*: as many, each the "
    "nearest in size. *rescaled*: at random, scaled together to the size of the top ones.",
    "",
    "Rankings of pairs: `effect`, the pattern effect of the pair, is the explanation that the package gives; `effect_kept` "
    "the same within the feature map; `contribution` the pair's contribution to the score; `decoder` the interaction of the "
    "decoder rows; `importance` measured on other text; `random`. `marginal` ranks features by the pattern effect of all "
    "their terms at the place: there **k counts features, not pairs**, and takes more of them at the same k. `contribution` "
    "and `marginal` were added after it was seen that `effect` loses cases; like `effect`, they use no measured data.",
]


_TEXTS = {
    "corpus": "Explained is text of the corpus's test split; directions and importances are measured on its validation "
    "split.",
    "sample": "Explained is text of the sample that comes with the package; directions and importances are measured on "
    "another part of it. The figures of a release are those on the corpus (`QK_CORPUS`).",
}


def _dictionaries(dictionaries: Figures) -> list[str]:
    rows = [
        [
            name,
            count(d["n_cases"]),
            *map(percent, d["x_explained"].values()),
            significant(d["in_score_check"]),
        ]
        for name, d in dictionaries.items()
    ]
    header = [
        "dictionary",
        "cases",
        "layer input explained, query",
        "key",
        "largest error of predicted terms",
    ]
    return [
        *table(header, rows),
        "",
        "*Layer input explained*: variance that the features' directions hold. *Largest error*: a check of the code, "
        "no evidence.",
    ]


def _explanations(dictionaries: Figures) -> Iterator[tuple[str, str]]:
    """Ours by the main rankings, the others by `effect`."""
    for name, d in dictionaries.items():
        for ranking in MAIN_RANKINGS if name == OURS else MAIN_RANKINGS[:1]:
            if ranking in d["rankings"]:
                yield name, ranking


def _main_tables(dictionaries: Figures, side: str) -> list[str]:
    changes, wins = [], []
    for name, ranking in _explanations(dictionaries):
        d = dictionaries[name]
        for k, at in d["rankings"][ranking][side]["by_k"].items():
            shown = name if name != OURS else f"{name}, `{ranking}`"
            changes.append([shown, k, *_change_cells(at)])
            wins.append([shown, k, *_win_cells(at, d["n_cases"])])
    header = ["explanation", "k"]
    compared = [f"{words}: {control}" for words in CRITERIA.values() for control in ALL_CONTROLS]
    return [
        f"**Removed at the {side}: TV.** *There*: mean over the cases that have the controls `other` and `matched`. "
        "Baselines by `effect`.",
        "",
        *table(
            [*header, "features", "cases", "top k", "cases there", "top k there", *ALL_CONTROLS],
            changes,
        ),
        "",
        f"**Removed at the {side}: cases won** against each control; (n) where fewer than half of the cases have it.",
        "",
        *table([*header, *compared], wins),
    ]


def _change_cells(at: Figures) -> list[str]:
    controls = at["controls"]
    tv = [controls[name]["control"]["tv"] for name in ALL_CONTROLS]
    matched = controls["matched"]
    top = [
        number(at["features"], 1),
        count(at["n"]),
        number(at["top"]["tv"]),
        count(matched["n"]),
        number(matched["top"]["tv"]),
    ]
    return [*top, *map(number, tv)]


def _win_cells(at: Figures, n_cases: int) -> list[str]:
    cells = []
    for criterion in CRITERIA:
        for name in ALL_CONTROLS:
            few = "" if has_control(at, name, n_cases) else f" ({at['controls'][name]['n']})"
            cells.append(interval(at["controls"][name]["wins"][criterion]) + few)
    return cells


def _all_rankings(dictionaries: Figures) -> list[str]:
    rows = []
    for name, d in dictionaries.items():
        for ranking, sides in d["rankings"].items():
            for side, figures in sides.items():
                areas = [
                    f"{number(a['top'])} / {number(a['control'])}"
                    for a in map(figures["tv_area"].get, ALL_CONTROLS)
                    if a
                ]
                won = [_won(figures, criterion, d["n_cases"]) for criterion in CRITERIA]
                rows.append([name, f"`{ranking}`", side, *areas, *won, *_prediction(figures)])
    ks = ", ".join(_COMPARED_KS)
    header = [
        "dictionary",
        "ranking",
        "side",
        *(f"area, top / {name}" for name in ALL_CONTROLS),
        *(f"won against matched, {words}" for words in CRITERIA.values()),
        "Pearson",
        "Spearman",
        "slope",
    ]
    return [
        f"**All rankings.** *Area*: mean TV over log k, on the k at which half of the cases have the control. *Won*: at k = "
        f"{ks}; – where fewer than half have it. *Pearson, Spearman, slope*: measured score drop of the top 5 against "
        f"the predicted.",
        "",
        *table(header, rows),
    ]


def _won(figures: Figures, criterion: str, n_cases: int) -> str:
    cells = []
    for k in _COMPARED_KS:
        at = figures["by_k"].get(k)
        counted = at is not None and has_control(at, "matched", n_cases)
        cells.append(
            f"{100 * at['controls']['matched']['wins'][criterion][0]:.0f}"
            if at and counted
            else NONE
        )
    return ", ".join(cells) + " %"


def _prediction(figures: Figures) -> list[str]:
    found = figures["by_k"].get("5", {"prediction": {"score_drop": {}}})["prediction"]["score_drop"]
    return _correlations(found)


def _correlations(found: Figures) -> list[str]:
    return [number(found.get(name), 2) for name in ("pearson", "spearman", "slope")]


def _logits(dictionaries: Figures) -> list[str]:
    rows = []
    for name, d in dictionaries.items():
        for k, at in d.get("logits", {}).items():
            controls = [significant(at["controls"][c]["control"]) for c in ALL_CONTROLS]
            won = [interval(at["controls"][c]["wins"]) for c in ALL_CONTROLS]
            predicted = [significant(at["predicted"]), number(at["prediction"]["pearson"], 2)]
            rows.append(
                [
                    name,
                    k,
                    count(at["n"]),
                    interval(at["top"], share=False),
                    *predicted,
                    *controls,
                    *won,
                ]
            )
    header = [
        "dictionary",
        "k",
        "cases",
        "top k",
        "predicted",
        "Pearson",
        *ALL_CONTROLS,
        *(f"won: {c}" for c in ALL_CONTROLS),
    ]
    return [
        "**To the next token.** The attention row with the top k of `effect` removed at the key, put into the model: KL of "
        "the prediction at the query, in nats. *Predicted*: the same with the row that the terms predict.",
        "",
        *table(header, rows),
    ]


def _twins(dictionaries: Figures) -> list[str]:
    rows = []
    for name, d in dictionaries.items():
        twins = d["twins"]
        for source in SOURCES:
            if source in twins:
                rows.append(
                    [
                        name,
                        source.replace("_", " "),
                        count(twins["n"]),
                        number(twins["mean_drop"], 2),
                        *_correlations(twins[source]),
                    ]
                )
    return [
        "**Twin prompts.** The token at the key becomes another one of the same text; the drop of the score that all terms "
        "predict against the model's own. No feature directions are fitted.",
        "",
        *table(
            ["dictionary", "terms of", "cases", "mean drop", "Pearson", "Spearman", "slope"], rows
        ),
    ]


def explained(report: Report) -> list[str]:
    title = "## SmolLM2: what feature pairs hold"
    reason = report["skipped"].get("explained")
    if reason or not report["explained"]:
        return [title, "", f"Skipped: {reason}." if reason else "Nothing was measured."]
    lines = [
        title,
        "",
        "*score_explained*: share of the score's variance within a row, weighted by the pattern, that the feature x feature "
        "terms hold; *equal*: every key counts the same. *Norm share*: |f|² / |s|². *Pairs for 50 % (90 %)*: supporting "
        "pairs, strongest first, whose removal from the score lowers the attention weight by that share of what removing "
        "all of them does; median and quartiles over cases. *Weight held*: that whole drop. *Strongest 1 %*: share of "
        "the summed size of the active pairs.",
    ]
    header = [
        "dictionary",
        "terms of",
        "pairs counted",
        "score_explained",
        "equal",
        "norm share",
        "pairs for 50 %",
        "pairs for 90 %",
        "weight held",
        "strongest 1 %",
        "active pairs",
    ]
    for layer, dictionaries in report["explained"].items():
        rows = [row for name, d in dictionaries.items() for row in _explained_rows(name, d)]
        lines += ["", f"### Layer {layer}", "", *table(header, [*rows, _OTHER_WORK])]
    always = [
        f"layer {layer}, {name}: {d['always_on']['query']} query, {d['always_on']['key']} key"
        for layer, dictionaries in report["explained"].items()
        for name, d in dictionaries.items()
    ]
    return [*lines, "", f"Features that are always on: {'; '.join(always)}.", "", *_COMPARISON]


def _explained_rows(name: str, d: Figures) -> Iterator[list[str]]:
    for source in SOURCES:
        for counted, words in _COUNTED.items():
            if source in d:
                some = d[source][counted]
                shares = [
                    percent(some[f]["mean"], 1)
                    for f in ("score_explained", "score_explained_unweighted", "norm_share")
                ]
                pairs = [quartiles(some["pairs_for"][share]) for share in ("0.5", "0.9")]
                held = [
                    quartiles(some["weight_held"], share=True),
                    percent(some["top_percent"]),
                    count(some["active_pairs"]),
                ]
                yield [name, source.replace("_", " "), words, *shares, *pairs, *held]


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
    "*Other work*: figures published for Qwen3-0.6B to 4B with MLP transcoders as the dictionary: share of the score norm, "
    "features (not pairs) for half and for 90 % of the feature-driven movement, and magnitude held by the strongest 1 % of "
    "pairs. Other models, other dictionaries and other definitions: they say where the field stands, and are no baseline.",
]
