"""What was found of planted layers, as Markdown."""

from typing import Any

from benchmarks.quality.targets import SUPERVISED, planted_frame, precision_margins
from benchmarks.show import NONE, enumeration, number, spread
from sae_lens_qk.tables import markdown_table

Report = dict[str, Any]


def section(report: Report) -> list[str]:
    cases = planted_frame(report, "planted")
    lines = [
        "## Planted layers",
        "",
        "The pairs are known. *Recovery*: cosine of each planted feature's query (key) vector with "
        "the decoder row matched to it, mean over features. *AP*: average precision of the ranked "
        "pairs. *F1*, and the KL of the pattern that those pairs alone make, at the true number of "
        "pairs. *KL without a map*: of the transcoders with every pair. KL in nats, position 0 "
        "left out. Each cell is the mean over seeds, in brackets the smallest and largest.",
    ]
    if cases.empty:
        return [*lines, "", "Nothing was measured."]
    if cases["method"].isin(SUPERVISED).any():
        lines += [
            "",
            "† is given the labels of the planted features (supervised); the others see inputs and "
            "weights alone.",
        ]
    for setting, setting_cases in cases.groupby("setting", sort=False):
        lines += ["", *_setting(str(setting), setting_cases)]
    return [*lines, "", *_CURVES]


_CURVES = [
    "### Against the number of pairs kept",
    "",
    "The first n pairs of each method's ranking, n in multiples of the planted number; lines are "
    "means over seeds, bands reach from the smallest to the largest.",
    "",
    "![F1 against the number of pairs kept](quality-curves-f1.png)",
    "",
    "![KL against the number of pairs kept](quality-curves-kl.png)",
]


def _setting(
    setting: str,
    cases: Any,
) -> list[str]:
    margins = precision_margins(cases)
    rows = []
    for method, method_cases in cases.groupby("method", sort=False):
        margin = NONE
        if method in margins:
            values = margins[method].dropna()
            margin = f"{spread(values)}; {int((values > 0).sum())} of {len(values)}"
        columns = ("recovery_query", "recovery_key", "average_precision", "f1")
        l0_query = number(method_cases["l0_query"].mean(), 1)
        l0_key = number(method_cases["l0_key"].mean(), 1)
        row = [
            label(str(method)),
            *(spread(method_cases[name]) for name in columns),
            margin,
            *_kl_cells(method_cases),
            f"{l0_query} / {l0_key}",
            number(method_cases["seconds"].mean(), 0),
        ]
        rows.append(row)
    seeds = cases.drop_duplicates("seed")
    n_pairs = enumeration(f"{n:.0f}" for n in seeds["planted_pairs"].unique())
    header = ["method", "recovery, query", "recovery, key", "AP", "F1"]
    header += ["ours ahead in AP by; in seeds", "KL without a map", "KL of the pairs"]
    header += ["L0 query / key", "seconds"]
    return [
        f"### {setting}",
        "",
        f"{n_pairs} planted pairs, {len(seeds)} seed{'s' * (len(seeds) > 1)}; "
        f"KL of the uniform pattern {spread(seeds['uniform_kl'])}.",
        "",
        *markdown_table(header, rows),
        *_notes(cases),
    ]


def _kl_cells(cases: Any) -> list[str]:
    return [spread(cases["transcoders_kl"]), spread(true_number_kl(cases))]


def _notes(cases: Any) -> list[str]:
    if "notes" not in cases:
        return []
    noted_cases = cases.dropna(subset="notes").drop_duplicates(["method", "notes"])
    lines = []
    for case in noted_cases.to_dict("records"):
        if case["notes"]:
            lines.append(f"- {label(case['method'])}: {case['notes']}")
    return ["", *lines] if lines else []


def variance(report: Report) -> list[str]:
    cases = planted_frame(report, "variance")
    lines = [
        "## Variance that attention does not read",
        "",
        "Noise is added in directions of the layer's input that no planted pair uses, so that no "
        "score depends on it. Squared error of the residual stream, or of queries and keys, has to "
        "spend features on it; the pattern does not see it.",
    ]
    if cases.empty:
        return [*lines, "", "Nothing was measured."]
    header = ["method", "noise", "recovery, query", "recovery, key", "F1", "AP"]
    header += ["KL without a map", "KL of the pairs"]
    columns = ("recovery_query", "recovery_key", "f1", "average_precision")
    for setting, setting_cases in cases.groupby("setting", sort=False):
        rows = []
        for method, method_cases in setting_cases.groupby("method", sort=False):
            for noise, noise_cases in method_cases.groupby("noise"):
                metrics = [spread(noise_cases[name]) for name in columns]
                rows.append([label(str(method)), f"{noise:g}", *metrics, *_kl_cells(noise_cases)])
        lines += ["", f"### {setting}", "", *markdown_table(header, rows)]
    return [*lines, "", "![Metrics against noise](quality-variance.png)"]


def true_number_kl(cases: Any) -> list[float | None]:
    """Pattern KL of the first pairs at the true number, of each case; None without such a point."""
    values = []
    for curve, n_planted in zip(cases["curve"], cases["planted_pairs"], strict=True):
        kls = {point["n_pairs"]: point["pattern_kl"] for point in curve}
        values.append(kls.get(n_planted))
    return values


def label(method: str) -> str:
    return f"{method} †" if method in SUPERVISED else method
