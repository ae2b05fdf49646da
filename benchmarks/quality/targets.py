"""What was aimed at, and whether the numbers reach it.

Data frames are annotated Any: the types of pandas say of too much that it may be something else.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.show import NONE, enumeration, percent, spread
from sae_lens_qk.tables import markdown_table

OURS = "ours"
JUDGED = (OURS, "shipped")
"""Dictionaries of SmolLM2 that the targets are about: one trained as the baselines were, and the
published one."""
SUPERVISED = ("contrastive covariances",)
"""Methods that are given the labels of the planted features: in the tables, but no competitors."""
SQUARED_ERROR = ("residual SAE", "L2 transcoders")
"""Baselines trained on squared error: of the residual stream, of queries and keys."""
RECOVERY = 0.95
F1 = 0.95
FLAT = 0.05
"""A metric between 0 and 1 that loses at most this much is flat; a KL is divided by that of the
uniform pattern."""
WON = 0.95
"""Share of the cases to be won."""
FIRST_K = 2
"""The k from which on they are to be won."""
COUNTS_FROM = 0.5
"""Share of the cases that must have a control for a k to count."""
EXPLAINED = 0.60
CONTROLS = ("other", "matched")
CRITERIA = {"score_drop": "score drop", "tv": "TV"}
TARGET_RANKINGS = ("effect", "contribution", "marginal")
WITHOUT = {"all": "with", "without_always_on": "without"}

Report = dict[str, Any]


class Verdict(NamedTuple):
    """One target in one setting; `met` is None where nothing was measured."""

    target: str
    setting: str
    result: str
    met: bool | None
    remark: str = ""

    def cells(self) -> list[str]:
        words = {True: "**met**", False: "**missed**", None: "not measured"}[self.met]
        verdict = f"{words}, {self.remark}" if self.remark else words
        return [self.target, self.setting, self.result, verdict]


def section(report: Report) -> list[str]:
    verdicts = [
        *easy(report),
        *hard(report),
        *variance(report),
        *causal(report),
        *explained(report),
    ]
    n_met = sum(verdict.met is True for verdict in verdicts)
    n_missed = sum(verdict.met is False for verdict in verdicts)
    n_unmeasured = len(verdicts) - n_met - n_missed
    unmeasured = f", {n_unmeasured} not measured" if n_unmeasured else ""
    rows = [verdict.cells() for verdict in verdicts]
    lines = [
        "## Targets",
        "",
        f"Computed from the numbers below: {n_met} met, {n_missed} missed{unmeasured}. On planted "
        "layers a target is about the mean over seeds; smallest and largest seed are in brackets. "
        "*Flat*: at no noise is recovery, F1 or average precision (AP) more than "
        f"{FLAT} below its value at the least noise, nor the KL higher by more than "
        f"{percent(FLAT)} of that of the uniform pattern. *Falls*: recovery and AP each lose more "
        f"than {FLAT}.",
        "",
        *markdown_table(["target", "where", "measured", "verdict"], rows),
    ]
    return [*lines, *_wins_table(report)]


def planted_frame(
    report: Report,
    section: str,
) -> Any:
    """The cases of a section that went through, and two columns.

    `recovery`, the mean of both sides, and `kl_share`, the transcoders' KL over that of the uniform
    pattern.
    """
    cases = []
    for case in report.get("cases", []):
        if case["section"] == section and "failed" not in case:
            cases.append(case)
    frame = pd.DataFrame(cases)
    if not frame.empty:
        frame["recovery"] = (frame["recovery_query"] + frame["recovery_key"]) / 2
        frame["kl_share"] = frame["transcoders_kl"] / frame["uniform_kl"]
    return frame


# Planted layers


def easy(report: Report) -> list[Verdict]:
    cases = planted_frame(report, "planted")
    verdicts = []
    for setting in _settings(cases, "easy"):
        ours = cases[(cases["setting"] == setting) & (cases["method"] == OURS)]
        query = spread(ours["recovery_query"])
        key = spread(ours["recovery_key"])
        recovery = f"{spread(ours['recovery'])}; query {query}, key {key}"
        verdicts += [
            _at_least("feature recovery", setting, recovery, ours["recovery"], RECOVERY),
            _at_least(
                "F1 at the true number of pairs", setting, spread(ours["f1"]), ours["f1"], F1
            ),
        ]
    return verdicts or [Verdict(f"feature recovery and F1 at least {F1}", "easy", NONE, None)]


def _at_least(
    words: str,
    setting: str,
    result: str,
    values: Any,
    least: float,
) -> Verdict:
    met = bool(values.mean() >= least) if len(values) else None
    remark = "not in every seed" if met and values.min() < least else ""
    return Verdict(f"{words} at least {least}", setting, result, met, remark)


def hard(report: Report) -> list[Verdict]:
    cases = planted_frame(report, "planted")
    target = "average precision ahead of every unsupervised baseline"
    verdicts = []
    for setting in _settings(cases, "hard"):
        margins = precision_margins(cases[cases["setting"] == setting])
        if margins.empty:
            verdicts.append(Verdict(target, setting, NONE, None))
            continue
        strongest = margins.mean().idxmin()
        n_ahead = int((margins.min(axis=1) > 0).sum())
        result = (
            f"strongest: {strongest}, our margin {spread(margins[strongest].dropna())}; "
            f"ahead of all in {n_ahead} of {len(margins)} seeds"
        )
        met = bool((margins.mean() > 0).all())
        remarks = ["not in every seed"] if met and n_ahead < len(margins) else []
        failed = {
            case["method"]
            for case in report["cases"]
            if "failed" in case and (case["section"], case["setting"]) == ("planted", setting)
        }
        if failed:
            remarks.append(f"but {enumeration(sorted(failed))} failed")
        verdicts.append(Verdict(target, setting, result, met, ", ".join(remarks)))
    return verdicts or [Verdict(target, "hard", NONE, None)]


def precision_margins(cases: Any) -> Any:
    """Our average precision less that of each unsupervised baseline [seed, baseline]."""
    precision = cases.pivot_table(
        index="seed", columns="method", values="average_precision", sort=False
    )
    if OURS not in precision:
        return pd.DataFrame()
    precision = precision.dropna(subset=OURS)
    baselines = precision.drop(columns=[OURS, *SUPERVISED], errors="ignore")
    return -baselines.sub(precision[OURS], axis=0).dropna(axis=1, how="all")


def variance(report: Report) -> list[Verdict]:
    cases = planted_frame(report, "variance")
    columns = {
        "recovery": "recovery",
        "f1": "F1",
        "average_precision": "AP",
        "transcoders_kl": "KL",
    }
    verdicts = []
    for setting in _settings(cases, ""):
        for method in (OURS, *SQUARED_ERROR):
            behaviour = "flat" if method == OURS else "falls"
            target = f"{method}: {behaviour} from the least noise to the most"
            method_cases = cases[(cases["setting"] == setting) & (cases["method"] == method)]
            means = noise_means(method_cases)
            if len(means) < 2:
                verdicts.append(Verdict(target, setting, NONE, None))
                continue
            result = ", ".join(f"{words} {_change(means[name])}" for name, words in columns.items())
            noise = _change(means.index.to_series(), "g")
            met = is_flat(means) if method == OURS else falls(means)
            verdicts.append(Verdict(target, f"{setting}, noise {noise}", result, met))
    nothing = Verdict("ours flat, squared-error baselines fall", "growing noise", NONE, None)
    return verdicts or [nothing]


def noise_means(cases: Any) -> Any:
    """Means over seeds [noise, metric]."""
    metrics = ["recovery", "f1", "average_precision", "transcoders_kl", "kl_share"]
    return cases.groupby("noise")[metrics].mean().sort_index()


def is_flat(means: Any) -> bool:
    """At no noise is a metric worse than at the least by more than `FLAT`."""
    shares = means[["recovery", "f1", "average_precision"]].assign(kl=-means["kl_share"])
    return bool((shares.iloc[0] - shares.min()).max() <= FLAT)


def falls(means: Any) -> bool:
    """At the most noise, recovery and average precision are each worse by more than `FLAT`."""
    shares = means[["recovery", "average_precision"]]
    return bool((shares.iloc[0] - shares.iloc[-1]).min() > FLAT)


def _settings(
    cases: Any,
    start: str,
) -> list[str]:
    if cases.empty:
        return []
    return [name for name in cases["setting"].unique() if name.startswith(start)]


def _change(
    values: Any,
    form: str = ".3f",
) -> str:
    return f"{values.iloc[0]:{form}} → {values.iloc[-1]:{form}}"


# The real model


def _judged(
    report: Report,
    section: str,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Dictionary, layer and results of each dictionary that is judged."""
    for name in JUDGED:
        for layer, dictionaries in report.get(section, {}).items():
            if name in dictionaries:
                yield name, layer, dictionaries[name]


def causal(report: Report) -> list[Verdict]:
    target = (
        f"top k beats both controls in at least {percent(WON)} of the cases from k = {FIRST_K} on"
    )
    wins = wins_frame(report)
    if wins.empty:
        return [Verdict(target, "SmolLM2", NONE, None)]
    verdicts = []
    for (name, ranking), rows in wins.groupby(["dictionary", "ranking"], sort=False):
        n_met = int(rows["met"].sum())
        result = f"{n_met} of {len(rows)} combinations of layer, side and win criterion"
        setting = f"SmolLM2, {name}, ranking `{ranking}`"
        verdicts.append(Verdict(target, setting, result, n_met == len(rows)))
    return verdicts


def wins_frame(report: Report) -> Any:
    """A row for each judged dictionary, layer, side, ranking and criterion.

    With the k that count, those that reach the target, and whether all do.
    """
    rows = []
    for name, layer, results in _judged(report, "causal"):
        for ranking in TARGET_RANKINGS:
            for side, metrics in results["rankings"].get(ranking, {}).items():
                for criterion in CRITERIA:
                    row = {
                        "dictionary": name,
                        "layer": layer,
                        "ranking": ranking,
                        "side": side,
                        "criterion": criterion,
                        **_wins(metrics["by_k"], criterion, results["n_cases"]),
                    }
                    rows.append(row)
    return pd.DataFrame(rows)


def _wins(
    results: dict[str, Any],
    criterion: str,
    n_cases: int,
) -> dict[str, Any]:
    valid_ks = []
    reached_ks = []
    for k, result in results.items():
        if not all(has_control(result, control, n_cases) for control in CONTROLS):
            continue
        valid_ks.append(int(k))
        shares = [result["controls"][control]["wins"][criterion][0] for control in CONTROLS]
        if min(shares) >= WON:
            reached_ks.append(int(k))
    judged_ks = {k for k in valid_ks if k >= FIRST_K}
    met = bool(judged_ks) and judged_ks <= set(reached_ks)
    return {"valid_ks": valid_ks, "reached_ks": reached_ks, "met": met}


def has_control(
    result: dict[str, Any],
    control: str,
    n_cases: int,
) -> bool:
    """Enough of the cases have this control at this k for its metrics to count."""
    n = result["controls"].get(control, {"n": 0})["n"]
    return n > 0 and n >= COUNTS_FROM * n_cases


def explained(report: Report) -> list[Verdict]:
    target = f"score_explained above {percent(EXPLAINED)}"
    verdicts = []
    for name, layer, results in _judged(report, "explained"):
        for source in ("transcoders", "feature_map"):
            if source not in results:
                continue
            shares = {
                words: results[source][pair_set]["score_explained"]["mean"]
                for pair_set, words in WITHOUT.items()
            }
            result = ", ".join(f"{percent(share, 1)} {words}" for words, share in shares.items())
            met = all(share is not None and share > EXPLAINED for share in shares.values())
            setting = f"SmolLM2, layer {layer}, {name}, {source.replace('_', ' ')}"
            verdicts.append(
                Verdict(f"{target} with and without always-on features", setting, result, met)
            )
    return verdicts or [Verdict(target, "SmolLM2", NONE, None)]


def _wins_table(report: Report) -> list[str]:
    wins = wins_frame(report)
    if wins.empty:
        return []
    rows = []
    columns = ["dictionary", "layer", "ranking", "side"]
    for (name, layer, ranking, side), criteria in wins.groupby(columns, sort=False):
        cells = [f"{name}, layer {layer}, `{ranking}`", side, _ks(criteria.iloc[0]["valid_ks"])]
        for _, result in criteria.iterrows():
            cells += [_ks(result["reached_ks"]), "**met**" if result["met"] else "**missed**"]
        rows.append(cells)
    header = ["", "side", "k that count"]
    for words in CRITERIA.values():
        header += [f"{words}: reached at k", "verdict"]
    return [
        "",
        "SmolLM2: the k at which the top k changes more than `other` and more than `matched`, each "
        f"in at least {percent(WON)} of the cases. A k counts where at least "
        f"{percent(COUNTS_FROM)} of the cases have both controls: where k takes most of the active "
        "features, too few are left to compare with.",
        "",
        *markdown_table(header, rows),
    ]


def _ks(ks: list[int]) -> str:
    return enumeration(ks) if ks else "none"
