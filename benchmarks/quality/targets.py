"""What was aimed at, and whether the numbers reach it.

Data frames are annotated Any: the types of pandas say of too much that it may be something else.
"""

from typing import Any, NamedTuple

import pandas as pd

from .tables import NONE, listed, percent, spread, table

OURS = "ours"
JUDGED = (OURS, "shipped")
"""Dictionaries of SmolLM2 that the targets are about: one trained as the baselines were, and the published one."""
SUPERVISED = ("contrastive covariances",)
"""Methods that are given the labels of the planted features: shown, but no competitors."""
SQUARED_ERROR = ("residual SAE", "L2 transcoders")
"""Baselines trained on squared error: of the residual stream, of queries and keys."""
RECOVERY = F1 = 0.95
FLAT = 0.05
"""A figure between 0 and 1 that loses at most this much is flat; a KL is divided by that of the uniform pattern."""
WON, FROM_K, COUNTED = 0.95, 2, 0.5
"""Share of the cases won, from this k on, at the k at which at least this share of the cases has the control."""
EXPLAINED = 0.60
CONTROLS = ("other", "matched")
CRITERIA = {"score_drop": "score drop", "tv": "TV"}
TARGET_RANKINGS = ("effect", "contribution", "marginal")
WITHOUT = {"all": "with", "without_always_on": "without"}

Report = dict[str, Any]


class Verdict(NamedTuple):
    """One target at one place; `met` is None where nothing was measured."""

    target: str
    where: str
    measured: str
    met: bool | None
    remark: str = ""

    def row(self) -> list[str]:
        verdict = {True: "**met**", False: "**missed**", None: "not measured"}[self.met]
        return [
            self.target,
            self.where,
            self.measured,
            verdict + (f", {self.remark}" if self.remark else ""),
        ]


def section(report: Report) -> list[str]:
    verdicts = [
        *easy(report),
        *hard(report),
        *variance(report),
        *causal(report),
        *explained(report),
    ]
    met = sum(verdict.met is True for verdict in verdicts)
    missed = sum(verdict.met is False for verdict in verdicts)
    unmeasured = len(verdicts) - met - missed
    rest = f", {unmeasured} not measured" if unmeasured else ""
    lines = [
        "## Targets",
        "",
        f"Computed from the numbers below: {met} met, {missed} missed{rest}. On planted layers a target is about the mean "
        "over seeds; smallest and largest seed are in brackets. *Flat*: at no noise is recovery, F1 or average precision "
        f"(AP) more than {FLAT} below its value at the least noise, nor the KL higher by more than {percent(FLAT)} of that "
        f"of the uniform pattern. *Falls*: recovery and AP each lose more than {FLAT}.",
        "",
        *table(["target", "where", "measured", "verdict"], [verdict.row() for verdict in verdicts]),
    ]
    return [*lines, *_wins_table(report)]


def frame(report: Report, section: str) -> Any:
    """The cases of a section that went through, with `recovery`, the mean of both sides, and `kl_share`, the
    transcoders' KL over that of the uniform pattern."""
    cases = [
        case
        for case in report.get("cases", [])
        if case["section"] == section and "failed" not in case
    ]
    made = pd.DataFrame(cases)
    if made.empty:
        return made
    return made.assign(
        recovery=(made["recovery_query"] + made["recovery_key"]) / 2,
        kl_share=made["transcoders_kl"] / made["uniform_kl"],
    )


def easy(report: Report) -> list[Verdict]:
    cases, found = frame(report, "planted"), []
    targets = (
        ("recovery", RECOVERY, "feature recovery"),
        ("f1", F1, "F1 at the true number of pairs"),
    )
    for setting in _settings(cases, "easy"):
        mine = cases[(cases["setting"] == setting) & (cases["method"] == OURS)]
        for column, least, words in targets:
            sides = f"; query {spread(mine['recovery_query'])}, key {spread(mine['recovery_key'])}"
            measured = spread(mine[column]) + (sides if column == "recovery" else "")
            found.append(
                _at_least(f"{words} at least {least}", setting, measured, mine[column], least)
            )
    return found or [Verdict(f"feature recovery and F1 at least {F1}", "easy", NONE, None)]


def hard(report: Report) -> list[Verdict]:
    cases, found = frame(report, "planted"), []
    target = "average precision ahead of every unsupervised baseline"
    for setting in _settings(cases, "hard"):
        ahead = margins(cases[cases["setting"] == setting])
        if ahead.empty:
            found.append(Verdict(target, setting, NONE, None))
            continue
        strongest = ahead.mean().idxmin()
        in_all = int((ahead.min(axis=1) > 0).sum())
        margin = spread(ahead[strongest].dropna())
        measured = f"strongest: {strongest}, our margin {margin}; ahead of all in {in_all} of {len(ahead)} seeds"
        met = bool((ahead.mean() > 0).all())
        remarks = ["not in every seed"] if met and in_all < len(ahead) else []
        failed = {
            c["method"]
            for c in report["cases"]
            if "failed" in c and (c["section"], c["setting"]) == ("planted", setting)
        }
        if failed:
            remarks.append(f"but {listed(sorted(failed))} failed")
        found.append(Verdict(target, setting, measured, met, ", ".join(remarks)))
    return found or [Verdict(target, "hard", NONE, None)]


def margins(cases: Any) -> Any:
    """Our average precision less that of each unsupervised baseline [seed, baseline], in one setting."""
    by_seed = cases.pivot_table(
        index="seed", columns="method", values="average_precision", sort=False
    )
    if OURS not in by_seed:
        return pd.DataFrame()
    baselines = (
        by_seed[[OURS]].dropna().join(by_seed.drop(columns=[OURS, *SUPERVISED], errors="ignore"))
    )
    return -baselines.drop(columns=OURS).sub(baselines[OURS], axis=0).dropna(axis=1, how="all")


def variance(report: Report) -> list[Verdict]:
    cases, found = frame(report, "variance"), []
    for setting in _settings(cases, ""):
        for method in (OURS, *SQUARED_ERROR):
            target = f"{method}: {'flat' if method == OURS else 'falls'} from the least noise to the most"
            at_noise = by_noise(cases[(cases["setting"] == setting) & (cases["method"] == method)])
            if len(at_noise) < 2:
                found.append(Verdict(target, setting, NONE, None))
                continue
            figures = {
                "recovery": "recovery",
                "f1": "F1",
                "average_precision": "AP",
                "transcoders_kl": "KL",
            }
            measured = ", ".join(
                f"{words} {_from_to(at_noise[name])}" for name, words in figures.items()
            )
            met = is_flat(at_noise) if method == OURS else falls(at_noise)
            found.append(
                Verdict(
                    target,
                    f"{setting}, noise {_from_to(at_noise.index.to_series(), 'g')}",
                    measured,
                    met,
                )
            )
    return found or [
        Verdict("ours flat, squared-error baselines fall", "growing noise", NONE, None)
    ]


def by_noise(cases: Any) -> Any:
    """Means over seeds [noise, figure]."""
    figures = ["recovery", "f1", "average_precision", "transcoders_kl", "kl_share"]
    return cases.groupby("noise")[figures].mean().sort_index()


def is_flat(at_noise: Any) -> bool:
    """At no noise is a figure worse than at the least by more than `FLAT`."""
    shares = at_noise[["recovery", "f1", "average_precision"]].assign(kl=-at_noise["kl_share"])
    return bool((shares.iloc[0] - shares.min()).max() <= FLAT)


def falls(at_noise: Any) -> bool:
    """At the most noise, recovery and average precision are each worse by more than `FLAT`."""
    shares = at_noise[["recovery", "average_precision"]]
    return bool((shares.iloc[0] - shares.iloc[-1]).min() > FLAT)


def causal(report: Report) -> list[Verdict]:
    target = (
        f"top k beats both controls in at least {percent(WON)} of the cases from k = {FROM_K} on"
    )
    found = wins(report)
    if found.empty:
        return [Verdict(target, "SmolLM2", NONE, None)]
    verdicts = []
    for (name, ranking), some in found.groupby(["dictionary", "ranking"], sort=False):
        met = int(some["met"].sum())
        measured = f"{met} of {len(some)} combinations of layer, side and win criterion"
        verdicts.append(
            Verdict(target, f"SmolLM2, {name}, ranking `{ranking}`", measured, met == len(some))
        )
    return verdicts


def wins(report: Report) -> Any:
    """For each dictionary that is judged, layer, side, ranking and criterion: the k that count, those that reach the
    target, whether all do."""
    rows = []
    judged = [
        (n, layer, of[n])
        for n in JUDGED
        for layer, of in report.get("causal", {}).items()
        if n in of
    ]
    for name, layer, mine in judged:
        for ranking in TARGET_RANKINGS:
            for side, figures in mine["rankings"].get(ranking, {}).items():
                at = {int(k): value for k, value in figures["by_k"].items()}
                counted = [
                    k
                    for k, value in at.items()
                    if all(has_control(value, c, mine["n_cases"]) for c in CONTROLS)
                ]
                for criterion in CRITERIA:
                    reached = [
                        k
                        for k in counted
                        if all(at[k]["controls"][c]["wins"][criterion][0] >= WON for c in CONTROLS)
                    ]
                    wanted = [k for k in counted if k >= FROM_K]
                    met = bool(wanted) and set(wanted) <= set(reached)
                    rows.append((name, layer, ranking, side, criterion, counted, reached, met))
    columns = ["dictionary", "layer", "ranking", "side", "criterion", "counted", "reached", "met"]
    return pd.DataFrame(rows, columns=columns)


def has_control(at_k: dict[str, Any], control: str, n_cases: int) -> bool:
    """Enough of the cases have this control at this k for its figures to count."""
    n = at_k["controls"].get(control, {"n": 0})["n"]
    return n > 0 and n >= COUNTED * n_cases


def explained(report: Report) -> list[Verdict]:
    verdicts = []
    places = [
        (n, layer, of[n])
        for n in JUDGED
        for layer, of in report.get("explained", {}).items()
        if n in of
    ]
    for name, layer, mine in places:
        for source in ("transcoders", "feature_map"):
            if source in mine:
                values = {
                    words: mine[source][part]["score_explained"]["mean"]
                    for part, words in WITHOUT.items()
                }
                measured = ", ".join(
                    f"{percent(value, 1)} {words}" for words, value in values.items()
                )
                met = all(value is not None and value > EXPLAINED for value in values.values())
                verdicts.append(
                    Verdict(
                        f"score_explained above {percent(EXPLAINED)} with and without always-on features",
                        f"SmolLM2, layer {layer}, {name}, {source.replace('_', ' ')}",
                        measured,
                        met,
                    )
                )
    return verdicts or [
        Verdict(f"score_explained above {percent(EXPLAINED)}", "SmolLM2", NONE, None)
    ]


def _wins_table(report: Report) -> list[str]:
    found = wins(report)
    if found.empty:
        return []
    rows = []
    for (name, layer, ranking, side), some in found.groupby(
        ["dictionary", "layer", "ranking", "side"], sort=False
    ):
        cells = []
        for criterion in CRITERIA:
            one = some[some["criterion"] == criterion].iloc[0]
            cells += [
                listed(one["reached"]) if one["reached"] else "none",
                "**met**" if one["met"] else "**missed**",
            ]
        counted = some.iloc[0]["counted"]
        rows.append(
            [
                f"{name}, layer {layer}, `{ranking}`",
                side,
                listed(counted) if counted else "none",
                *cells,
            ]
        )
    header = ["", "side", "k that count"]
    for words in CRITERIA.values():
        header += [f"{words}: reached at k", "verdict"]
    return [
        "",
        f"SmolLM2: the k at which the top k changes more than `other` and more than `matched`, each in at least "
        f"{percent(WON)} of the cases. A k counts where at least {percent(COUNTED)} of the cases have both controls: where "
        "k takes most of the active features, too few are left to compare with.",
        "",
        *table(header, rows),
    ]


def _settings(cases: Any, start: str) -> list[str]:
    return (
        []
        if cases.empty
        else [name for name in cases["setting"].unique() if name.startswith(start)]
    )


def _from_to(values: Any, form: str = ".3f") -> str:
    return f"{values.iloc[0]:{form}} → {values.iloc[-1]:{form}}"


def _at_least(target: str, where: str, measured: str, values: Any, least: float) -> Verdict:
    met = bool(values.mean() >= least) if len(values) else None
    return Verdict(
        target, where, measured, met, "not in every seed" if met and values.min() < least else ""
    )
