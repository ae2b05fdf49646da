"""The page of a dictionary as Markdown, and its picture of several dictionaries by L0; see `dictionary_page`."""

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.quality.tables import NONE, count, number, percent, table
from sae_lens_qk.figures import COLOURS, FONT_SIZE, MARKERS, PAGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = dict[str, Any]
Figures = dict[str, Any]
"""An `Evaluation` as plain values."""

ALWAYS_ON = 0.9
"""Share of tokens above which a feature stands for the mean."""
SOURCES = {"transcoders": "transcoders", "feature_map": "feature map"}


def render(report: Report) -> str:
    """`report` as `make_report` gives it."""
    evaluation, name = report["evaluation"], report["dictionary"]
    lines = [
        f"# {name} on the {report['split']} split",
        "",
        f"Layer {report['layer']} of {report['model']}, the saved form as loaded (float32). {evaluation['n_tokens']:,} "
        f"tokens in {evaluation['n_rows']:,} rows of {report['context_size']}, BOS first, documents joined by BOS; clean "
        f"loss {evaluation['ce_clean']:.4f} nats. In brackets: 95 % bootstrap intervals over rows. Made by",
        "",
        f"    {report['command']}",
        "",
        "## What it reproduces",
        "",
        *sources(report),
        "",
        "## Heads",
        "",
        *heads(evaluation),
        "",
        "## Features",
        "",
        *features(report),
        "",
        "## Pairs",
        "",
        *pairs(report),
    ]
    if report["beside"]:
        lines += ["", "## Beside other dictionaries", "", *beside(report)]
    if report["frontier"]:
        lines += [
            "",
            "## By L0",
            "",
            *comparison(by_l0(report["frontier"])),
            "",
            f"![Pattern KL, loss recovered and logit KL recovered against L0]({name}-{report['split']}-frontier.png)",
        ]
    return "\n".join(lines) + "\n"


def sources(report: Report) -> list[str]:
    header = (
        "pattern from",
        "pattern KL",
        "TV",
        "argmax agreement",
        "loss",
        "logit KL",
        "loss recovered",
        "logit KL recovered",
    )
    rows = [
        [
            SOURCES.get(name, name),
            nats(row["pattern_kl"]),
            number(row["pattern_tv"], 4),
            number(row["argmax_agreement"], 4),
            number(row["ce_loss"], 4),
            number(row["logit_kl"], 4),
            share(row["ce_recovered"]),
            share(row["logit_kl_recovered"]),
        ]
        for name, row in report["evaluation"]["sources"].items()
    ]
    return [
        *table(header, rows),
        "",
        "KL and loss in nats, means over queries, heads and rows, position 0 left out of the pattern's figures. *zero*: no "
        "attention; *mean*: the average pattern of these rows; *uniform*: over the allowed keys; *shuffled*: the pattern of "
        f"another row, in batches of {report['batch_size']}. Recovered: 100 % is the model itself, 0 % the zero pattern.",
    ]


def heads(evaluation: Figures) -> list[str]:
    """A row a head; transcoders first, feature map second."""
    there = [evaluation["sources"][name] for name in SOURCES if name in evaluation["sources"]]
    per_head = evaluation["feature_map"]["pairs_per_head"] if evaluation["feature_map"] else None
    written = {
        "pattern_kl_per_head": partial(number, digits=4),
        **dict.fromkeys(
            ("score_explained", "score_explained_unweighted", "norm_share"),
            partial(percent, digits=1),
        ),
    }
    rows = [
        [
            str(head),
            *(
                " / ".join(write(source[figure][head]) for source in there)
                for figure, write in written.items()
            ),
            count(per_head[head]) if per_head else NONE,
        ]
        for head in range(len(there[0]["norm_share"]))
    ]
    header = (
        "head",
        "pattern KL",
        "score explained",
        "the same, keys weighted equally",
        "norm share",
        "pairs",
    )
    return [
        *table(header, rows),
        "",
        f"{' / '.join(list(SOURCES.values())[: len(there)]).capitalize()}. *Score explained*: share of the variance of a "
        "row of scores, keys weighted by the model's pattern, that feature x feature terms account for. *Norm share*: their "
        "sum of squares over that of the scores, rows not centred.",
    ]


def features(report: Report) -> list[str]:
    sides: Figures = report["features"]
    quantiles = list(sides["query"]["density_quantiles"])
    rows = [
        [
            side,
            count(found["n"]),
            count(found["live"]),
            number(found["l0"], 2),
            count(found["always_on"]),
            *(density(found["density_quantiles"][q]) for q in quantiles),
        ]
        for side, found in sides.items()
    ]
    header = (
        "side",
        "features",
        "live",
        "L0",
        "always on",
        *(f"density: {percent(float(q))}" for q in quantiles),
    )
    n_tokens = f"{report['evaluation']['n_tokens']:,}"
    return [
        *table(header, rows),
        "",
        f"*Live*: fires at least once in these {n_tokens} tokens. *L0*: features that fire on a token, mean. *Always on*: "
        f"on more than {percent(ALWAYS_ON)} of tokens. *Density*: share of tokens on which a live feature fires; quantiles.",
        "",
        f"![Share of tokens on which features fire]({report['dictionary']}-{report['split']}.png)",
    ]


def pairs(report: Report) -> list[str]:
    found = report["evaluation"]["feature_map"]
    if found is None:
        return ["There is no feature map."]
    n, between, per_head = (
        found["n_pairs"],
        found["n_pairs_without_constants"],
        found["pairs_per_head"],
    )
    n_query, n_key = report["original_sizes"]
    rows = [
        ("pairs", count(n)),
        ("between two features", count(between)),
        ("with a constant", count(n - between)),
        ("pairs a head", f"{min(per_head):,} to {max(per_head):,}"),
        (
            f"zero among all {n_query:,} x {n_key:,} x {len(per_head)} entries",
            percent(found["sparsity_of_all"], 4),
        ),
        ("zero among entries of live features", percent(found["sparsity_of_live"], 4)),
        ("active at a (query, key), mean, all heads", number(found["active_pairs"], 1)),
    ]
    return table(("kept pairs", ""), rows)


def beside(report: Report) -> list[str]:
    ours, others = report["dictionary"], report["beside"]
    evaluations = {
        ours: report["evaluation"],
        **{name: other["evaluation"] for name, other in others.items()},
    }
    rows = [
        [name, SOURCES[source], *(nats(interval, "+") for interval in found.values())]
        for name, other in others.items()
        for source, found in other["difference"].items()
    ]
    return [
        *comparison(evaluations),
        "",
        f"Minus {ours}, in nats, paired over rows; above zero: worse.",
        "",
        *table(("dictionary", "pattern from", "pattern KL", "loss", "logit KL"), rows),
    ]


def comparison(evaluations: dict[str, Figures]) -> list[str]:
    """Dictionaries on the same rows, a line for each source."""
    header = (
        "dictionary",
        "pattern from",
        "L0 query / key",
        "live",
        "pairs",
        "pattern KL",
        "loss",
        "logit KL",
        "loss recovered",
        "logit KL recovered",
    )
    rows = []
    for name, evaluation in evaluations.items():
        firing, n_pairs = evaluation["features"], (evaluation["feature_map"] or {}).get("n_pairs")
        for source, row in _own_sources(evaluation):
            rows.append(
                [
                    name,
                    SOURCES[source],
                    f"{firing['l0_query']:.1f} / {firing['l0_key']:.1f}",
                    f"{firing['live_query']:,} / {firing['live_key']:,}",
                    count(n_pairs) if source == "feature_map" else NONE,
                    nats(row["pattern_kl"]),
                    number(row["ce_loss"], 4),
                    number(row["logit_kl"], 4),
                    share(row["ce_recovered"]),
                    share(row["logit_kl_recovered"]),
                ]
            )
    return table(header, rows)


def by_l0(evaluations: dict[str, Figures]) -> dict[str, Figures]:
    return dict(sorted(evaluations.items(), key=lambda item: mean_l0(item[1])))


def mean_l0(evaluation: Figures) -> float:
    """Mean of both sides."""
    return (evaluation["features"]["l0_query"] + evaluation["features"]["l0_key"]) / 2


def frontier_figure(evaluations: dict[str, Figures]) -> "Figure":
    """Pattern KL, loss and logit KL recovered against mean L0, with 95 % intervals; one curve a source."""
    from matplotlib.figure import Figure

    panels = {
        "pattern_kl": "pattern KL (nats)",
        "ce_recovered": "loss recovered",
        "logit_kl_recovered": "logit KL recovered",
    }
    figure = Figure(figsize=(PAGE, 2.6), layout="constrained", dpi=200)
    axes = figure.subplots(1, len(panels))
    for ax, (name, title) in zip(axes, panels.items(), strict=True):
        for source, colour, marker in zip(SOURCES, COLOURS, MARKERS, strict=False):
            points = [
                (mean_l0(evaluation), *row[name].values())
                for evaluation in by_l0(evaluations).values()
                for there, row in _own_sources(evaluation)
                if there == source
            ]
            if points:
                l0, value, low, high = map(list, zip(*points, strict=True))
                ends = [
                    [v - e for v, e in zip(value, low, strict=True)],
                    [e - v for v, e in zip(value, high, strict=True)],
                ]
                ax.errorbar(
                    l0,
                    value,
                    yerr=ends,
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=1,
                    elinewidth=0.8,
                    label=SOURCES[source],
                )
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_title(title, fontsize=FONT_SIZE)
        ax.tick_params(labelsize=FONT_SIZE - 1)
        ax.spines[["top", "right"]].set_visible(False)
        if name == "pattern_kl":
            ax.set_ylim(bottom=0)
        else:
            ax.yaxis.set_major_formatter("{x:.0%}")
    figure.supxlabel("features that fire on a token (L0), mean of both sides", fontsize=FONT_SIZE)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=2, fontsize=FONT_SIZE, frameon=False
    )
    return figure


def _own_sources(evaluation: Figures) -> list[tuple[str, Figures]]:
    """Those of the dictionary, baselines left out."""
    return [(name, row) for name, row in evaluation["sources"].items() if name in SOURCES]


def nats(interval: Figures | None, sign: str = "") -> str:
    if interval is None:
        return NONE
    value, low, high = (f"{interval[end]:{sign}.4f}" for end in ("value", "low", "high"))
    return f"{value} ({low}, {high})"


def share(interval: Figures) -> str:
    value, low, high = (percent(interval[end], 1) for end in ("value", "low", "high"))
    return f"{value} ({low.removesuffix(' %')}, {high.removesuffix(' %')})"


def density(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.3g} %"
