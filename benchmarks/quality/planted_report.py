"""What was found of planted layers, as Markdown."""

from typing import Any

from .tables import NONE, listed, number, spread, table
from .targets import SUPERVISED, frame, margins

Report = dict[str, Any]


def section(report: Report) -> list[str]:
    cases = frame(report, "planted")
    lines = [
        "## Planted layers",
        "",
        "The pairs are known. *Recovery*: cosine of each planted feature's query (key) vector with the decoder row matched "
        "to it, mean over features. *AP*: average precision of the ranked pairs. *F1*, and the KL of the pattern that those "
        "pairs alone make, at the true number of pairs. *KL without a map*: of the transcoders with every pair. KL in nats, "
        "position 0 left out. Each cell is the mean over seeds, in brackets the smallest and largest.",
    ]
    if cases.empty:
        return [*lines, "", "Nothing was measured."]
    if cases["method"].isin(SUPERVISED).any():
        lines += [
            "",
            "† is given the labels of the planted features (supervised); the others see inputs and weights alone.",
        ]
    for setting, some in cases.groupby("setting", sort=False):
        lines += ["", *_setting(str(setting), some)]
    return [*lines, "", *curves(report)]


def _setting(setting: str, cases: Any) -> list[str]:
    ahead = margins(cases)
    rows = []
    for method, some in cases.groupby("method", sort=False):
        margin = NONE
        if method in ahead:
            there = ahead[method].dropna()
            margin = f"{spread(there)}; {int((there > 0).sum())} of {len(there)}"
        figures = [
            spread(some[name])
            for name in ("recovery_query", "recovery_key", "average_precision", "f1")
        ]
        kls = [spread(some["transcoders_kl"]), spread(true_number_kl(some))]
        l0 = f"{number(some['l0_query'].mean(), 1)} / {number(some['l0_key'].mean(), 1)}"
        rows.append(
            [label(str(method)), *figures, margin, *kls, l0, number(some["seconds"].mean(), 0)]
        )
    by_seed = cases.drop_duplicates("seed")
    pairs = listed(f"{n:.0f}" for n in by_seed["planted_pairs"].unique())
    header = [
        "method",
        "recovery, query",
        "recovery, key",
        "AP",
        "F1",
        "ours ahead in AP by; in seeds",
        "KL without a map",
        "KL of the pairs",
        "L0 query / key",
        "seconds",
    ]
    return [
        f"### {setting}",
        "",
        f"{pairs} planted pairs, {len(by_seed)} seed{'s' * (len(by_seed) > 1)}; "
        f"KL of the uniform pattern {spread(by_seed['uniform_kl'])}.",
        "",
        *table(header, rows),
        *_notes(cases),
    ]


def _notes(cases: Any) -> list[str]:
    if "notes" not in cases:
        return []
    noted = cases.dropna(subset="notes").drop_duplicates(["method", "notes"])
    lines = [
        f"- {label(method)}: {notes}"
        for method, notes in noted[["method", "notes"]].itertuples(index=False)
        if notes
    ]
    return ["", *lines] if lines else []


def curves(report: Report) -> list[str]:
    return [
        "### Against the number of pairs kept",
        "",
        "The first n pairs of each method's ranking, n in multiples of the planted number; lines are means over seeds, "
        "bands reach from the smallest to the largest.",
        "",
        "![F1 against the number of pairs kept](quality-curves-f1.png)",
        "",
        "![KL against the number of pairs kept](quality-curves-kl.png)",
    ]


def variance(report: Report) -> list[str]:
    cases = frame(report, "variance")
    lines = [
        "## Variance that attention does not read",
        "",
        "Noise is added in directions of the layer's input that no planted pair uses, so that no score depends on it. "
        "Squared error of the residual stream, or of queries and keys, has to spend features on it; the pattern does "
        "not see it.",
    ]
    if cases.empty:
        return [*lines, "", "Nothing was measured."]
    header = [
        "method",
        "noise",
        "recovery, query",
        "recovery, key",
        "F1",
        "AP",
        "KL without a map",
        "KL of the pairs",
    ]
    for setting, of_setting in cases.groupby("setting", sort=False):
        rows = []
        for (method, noise), some in of_setting.sort_values("noise", kind="stable").groupby(
            ["method", "noise"], sort=False
        ):
            figures = [
                spread(some[name])
                for name in ("recovery_query", "recovery_key", "f1", "average_precision")
            ]
            kls = [spread(some["transcoders_kl"]), spread(true_number_kl(some))]
            rows.append([label(str(method)), f"{noise:g}", *figures, *kls])
        order = list(of_setting["method"].unique())
        rows.sort(key=lambda row: order.index(row[0].removesuffix(" †")))
        lines += ["", f"### {setting}", "", *table(header, rows)]
    return [*lines, "", "![Figures against noise](quality-variance.png)"]


def true_number_kl(cases: Any) -> list[float | None]:
    """Pattern KL of the first pairs at the true number, of each case; None where the curve has no such point."""
    made = []
    for curve, n in zip(cases["curve"], cases["planted_pairs"], strict=True):
        made.append(next((point["pattern_kl"] for point in curve if point["n_pairs"] == n), None))
    return made


def label(method: str) -> str:
    return f"{method} †" if method in SUPERVISED else method
