"""The page of a dictionary as Markdown, and its picture of dictionaries by L0; see `page`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.show import NONE, count, number, percent
from sae_lens_qk.figures import COLOURS, FONT_SIZE, MARKERS, PAGE
from sae_lens_qk.tables import fixed, interval, markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = dict[str, Any]
Metrics = dict[str, Any]
"""An `Evaluation` as plain values."""

ALWAYS_ON = 0.9
"""Share of tokens above which a feature stands for the mean."""
SOURCES = {"transcoders": "transcoders", "feature_map": "feature map"}


def render(report: Report) -> str:
    """`report` as `make_report` gives it."""
    evaluation = report["evaluation"]
    name = report["dictionary"]
    lines = [
        f"# {name} on the {report['split']} split",
        "",
        f"Layer {report['layer']} of {report['model']}, the saved form as loaded (float32). "
        f"{evaluation['n_tokens']:,} tokens in {evaluation['n_rows']:,} rows of "
        f"{report['context_size']}, BOS first, documents joined by BOS; clean loss "
        f"{evaluation['ce_clean']:.4f} nats. In brackets: 95 % bootstrap intervals over rows. "
        "Made by",
        "",
        f"    {report['command']}",
    ]
    sections = {
        "What it reproduces": sources(report),
        "Heads": heads(evaluation),
        "Features": features(report),
        "Pairs": pairs(report),
    }
    if report["beside"]:
        sections["Next to other dictionaries"] = other_dictionaries(report)
    if report["frontier"]:
        picture = f"{name}-{report['split']}-frontier.png"
        sections["By L0"] = [
            *comparison(sorted_by_l0(report["frontier"])),
            "",
            f"![Pattern KL, loss recovered and logit KL recovered against L0]({picture})",
        ]
    for title, section in sections.items():
        lines += ["", f"## {title}", "", *section]
    return "\n".join(lines) + "\n"


def sources(report: Report) -> list[str]:
    header = ["pattern from", "pattern KL", "TV", "argmax agreement", "loss", "logit KL"]
    header += ["loss recovered", "logit KL recovered"]
    rows = []
    for name, result in report["evaluation"]["sources"].items():
        row = [
            SOURCES.get(name, name),
            interval(result["pattern_kl"]),
            number(result["pattern_tv"], 4),
            number(result["argmax_agreement"], 4),
            *_prediction_cells(result),
        ]
        rows.append(row)
    return [
        *markdown_table(header, rows),
        "",
        "KL and loss in nats, means over queries, heads and rows, position 0 left out of the "
        "pattern's metrics. *zero*: no attention; *mean*: the average pattern of these rows; "
        "*uniform*: over the allowed keys; *shuffled*: the pattern of another row, in batches of "
        f"{report['batch_size']}. Recovered: 100 % is the model itself, 0 % the zero pattern.",
    ]


def heads(evaluation: Metrics) -> list[str]:
    """A row per head; transcoders first, feature map second."""
    labels = [label for name, label in SOURCES.items() if name in evaluation["sources"]]
    results = [result for _, result in _own_sources(evaluation)]
    feature_map = evaluation["feature_map"]
    rows = []
    for head in range(len(results[0]["norm_share"])):
        row = [
            str(head),
            " / ".join(number(result["pattern_kl_per_head"][head], 4) for result in results),
        ]
        for metric in ("score_explained", "score_explained_unweighted", "norm_share"):
            row.append(" / ".join(percent(result[metric][head], 1) for result in results))
        row.append(count(feature_map["pairs_per_head"][head]) if feature_map else NONE)
        rows.append(row)
    header = ["head", "pattern KL", "score explained", "the same, keys weighted equally"]
    header += ["norm share", "pairs"]
    return [
        *markdown_table(header, rows),
        "",
        f"{' / '.join(labels).capitalize()}. *Score explained*: share of the variance of a row of "
        "scores, keys weighted by the model's pattern, that feature x feature terms account for. "
        "*Norm share*: their sum of squares over that of the scores, rows not centred.",
    ]


def features(report: Report) -> list[str]:
    sides: Metrics = report["features"]
    quantiles = list(sides["query"]["density_quantiles"])
    rows = []
    for side, firing in sides.items():
        row = [side, count(firing["n"]), count(firing["live"])]
        row += [number(firing["l0"], 2), count(firing["always_on"])]
        row += [density(firing["density_quantiles"][q]) for q in quantiles]
        rows.append(row)
    header = ["side", "features", "live", "L0", "always on"]
    header += [f"density: {percent(float(q))}" for q in quantiles]
    picture = f"{report['dictionary']}-{report['split']}.png"
    return [
        *markdown_table(header, rows),
        "",
        "*Live*: fires at least once in these "
        f"{report['evaluation']['n_tokens']:,} tokens. *L0*: features that fire on a token, mean. "
        f"*Always on*: on more than {percent(ALWAYS_ON)} of tokens. *Density*: share of tokens on "
        "which a live feature fires; quantiles.",
        "",
        f"![Share of tokens on which features fire]({picture})",
    ]


def pairs(report: Report) -> list[str]:
    feature_map = report["evaluation"]["feature_map"]
    if feature_map is None:
        return ["There is no feature map."]
    n_pairs = feature_map["n_pairs"]
    n_between = feature_map["n_pairs_without_constants"]
    per_head = feature_map["pairs_per_head"]
    n_query, n_key = report["original_sizes"]
    entries = f"{n_query:,} x {n_key:,} x {len(per_head)} entries"
    rows = [
        ("pairs", count(n_pairs)),
        ("between two features", count(n_between)),
        ("with a constant", count(n_pairs - n_between)),
        ("pairs per head", f"{min(per_head):,} to {max(per_head):,}"),
        (f"zero among all {entries}", percent(feature_map["sparsity_of_all"], 4)),
        ("zero among entries of live features", percent(feature_map["sparsity_of_live"], 4)),
        ("active at a (query, key), mean, all heads", number(feature_map["active_pairs"], 1)),
    ]
    return markdown_table(("kept pairs", ""), rows)


def other_dictionaries(report: Report) -> list[str]:
    ours = report["dictionary"]
    evaluations = {ours: report["evaluation"]}
    rows = []
    for name, other in report["beside"].items():
        evaluations[name] = other["evaluation"]
        for source, metrics in other["difference"].items():
            cells = [interval(metric, signed) for metric in metrics.values()]
            rows.append([name, SOURCES[source], *cells])
    header = ("dictionary", "pattern from", "pattern KL", "loss", "logit KL")
    return [
        *comparison(evaluations),
        "",
        f"Minus {ours}, in nats, paired over rows; above zero: worse.",
        "",
        *markdown_table(header, rows),
    ]


def comparison(evaluations: dict[str, Metrics]) -> list[str]:
    """Dictionaries on the same rows, a line for each source."""
    header = ["dictionary", "pattern from", "L0 query / key", "live", "pairs", "pattern KL"]
    header += ["loss", "logit KL", "loss recovered", "logit KL recovered"]
    rows = []
    for name, evaluation in evaluations.items():
        firing = evaluation["features"]
        feature_map = evaluation["feature_map"] or {}
        for source, result in _own_sources(evaluation):
            has_pairs = source == "feature_map"
            row = [
                name,
                SOURCES[source],
                f"{firing['l0_query']:.1f} / {firing['l0_key']:.1f}",
                f"{firing['live_query']:,} / {firing['live_key']:,}",
                count(feature_map.get("n_pairs")) if has_pairs else NONE,
                interval(result["pattern_kl"]),
                *_prediction_cells(result),
            ]
            rows.append(row)
    return markdown_table(header, rows)


def _prediction_cells(result: Metrics) -> list[str]:
    return [
        number(result["ce_loss"], 4),
        number(result["logit_kl"], 4),
        share(result["ce_recovered"]),
        share(result["logit_kl_recovered"]),
    ]


def sorted_by_l0(evaluations: dict[str, Metrics]) -> dict[str, Metrics]:
    return dict(sorted(evaluations.items(), key=lambda item: mean_l0(item[1])))


def mean_l0(evaluation: Metrics) -> float:
    """Mean of both sides."""
    firing = evaluation["features"]
    return (firing["l0_query"] + firing["l0_key"]) / 2


def frontier_figure(evaluations: dict[str, Metrics]) -> "Figure":
    """Pattern KL, loss and logit KL recovered against mean L0, with 95 % intervals.

    One curve per source.
    """
    from matplotlib.figure import Figure

    panels = {
        "pattern_kl": "pattern KL (nats)",
        "ce_recovered": "loss recovered",
        "logit_kl_recovered": "logit KL recovered",
    }
    figure = Figure(
        figsize=(PAGE, 2.6),
        layout="constrained",
        dpi=200,
    )
    axes = figure.subplots(1, len(panels))
    for ax, (metric, title) in zip(axes, panels.items(), strict=True):
        for n, source in enumerate(SOURCES):
            _frontier_curve(ax, evaluations, source, metric, COLOURS[n], MARKERS[n])
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_title(title, fontsize=FONT_SIZE)
        ax.tick_params(labelsize=FONT_SIZE - 1)
        ax.spines[["top", "right"]].set_visible(False)
        if metric == "pattern_kl":
            ax.set_ylim(bottom=0)
        else:
            ax.yaxis.set_major_formatter("{x:.0%}")
    figure.supxlabel("features that fire on a token (L0), mean of both sides", fontsize=FONT_SIZE)
    handles, labels = axes[0].get_legend_handles_labels()
    style = dict(
        loc="outside upper center",
        ncols=2,
        fontsize=FONT_SIZE,
        frameon=False,
    )
    figure.legend(handles, labels, **style)
    return figure


def _frontier_curve(
    ax: "Axes",
    evaluations: dict[str, Metrics],
    source: str,
    metric: str,
    colour: str,
    marker: str,
) -> None:
    """One metric of one source against L0, where a dictionary has the source."""
    l0 = []
    values = []
    errors: list[list[float]] = [[], []]  # below and above
    for evaluation in sorted_by_l0(evaluations).values():
        if source not in evaluation["sources"]:
            continue
        ends = evaluation["sources"][source][metric]
        l0.append(mean_l0(evaluation))
        values.append(ends["value"])
        errors[0].append(ends["value"] - ends["low"])
        errors[1].append(ends["high"] - ends["value"])
    if not l0:
        return
    style = dict(
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1,
        elinewidth=0.8,
    )
    ax.errorbar(l0, values, yerr=errors, label=SOURCES[source], **style)


def _own_sources(evaluation: Metrics) -> Iterator[tuple[str, Metrics]]:
    """Those of the dictionary, baselines left out."""
    for name in SOURCES:
        if name in evaluation["sources"]:
            yield name, evaluation["sources"][name]


def signed(value: float | None) -> str:
    return fixed(value) if value is None else f"{value:+.4f}"


def share(ends: Metrics) -> str:
    value, low, high = (percent(ends[name], 1) for name in ("value", "low", "high"))
    return f"{value} ({low.removesuffix(' %')}, {high.removesuffix(' %')})"


def density(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.3g} %"
