"""docs/results.md, from the JSON files next to it: what ships, its targets, quality and cost.

    python -m benchmarks.results_page > docs/results.md

Reads pretrained/registry.yaml and the runner_cfg.json of what ships, and in benchmarks/results
dictionaries/*.json, quality.json, cpu.json, and notes.json for single measurements. The prose is in
results_page.md.j2; every number of a table is computed here.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks import show
from benchmarks.quality import targets
from sae_lens_qk.tables import fixed, interval, markdown_table, percent

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LAYER_23 = "smollm2-135m-instruct-L23"
SMALLER_MAP = f"{LAYER_23}-25000"
SOURCES = ("transcoders", "feature_map")
SETTINGS = ("easy", "easy, rotary", "hard")
CONTROLS = ("other", "matched")

Json = dict[str, Any]


def render() -> str:
    """The whole page."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    notes = load_json(RESULTS / "notes.json")
    quality = load_json(RESULTS / "quality.json")
    tables = {
        "shipped": shipped(notes["different_tokens"]["rows"]),
        "targets": aims_of_layer_23(),
        "recipes": recipes(notes["recipes"]["rows"]),
        "frontier": frontier(notes["frontier_live"]["rows"]),
        "planted": planted(quality),
        "removals": removals(quality),
        "speed": speed(load_json(RESULTS / "cpu.json")),
    }
    page = environment.get_template("results_page.md.j2").render(
        **{name: "\n".join(lines) for name, lines in tables.items()},
        verdicts=judged_targets(quality),
        layer_23=layer_23(),
        notes=notes,
        table=lambda *names: "\n".join(measurements([notes[name] for name in names])),
        commands=lambda *names: "; ".join(f"`{notes[name]['command']}`" for name in names) + ".",
    )
    return page


def load_json(path: Path) -> Json:
    return json.loads(path.read_text())


def dictionary_page(name: str) -> Json:
    """All metrics of a dictionary on the test split."""
    return load_json(RESULTS / "dictionaries" / f"{name}-test.json")


# Dictionaries


def shipped(different_tokens: Mapping[str, float]) -> list[str]:
    """A row per dictionary whose weights come with the package."""
    registry = yaml.safe_load((ROOT / "pretrained" / "registry.yaml").read_text())
    names = [name for name, entry in registry.items() if entry["status"] == "shipped"]
    header = [
        "dictionary",
        "pattern KL",
        "loss recovered",
        "logit KL recovered",
        "L0",
        "features",
        "pairs",
        "worth",
        "tokens",
        "batch",
    ]
    return markdown_table(header, [shipped_row(name, different_tokens) for name in names])


def shipped_row(
    name: str,
    different_tokens: Mapping[str, float],
) -> list[str]:
    page = dictionary_page(name)
    run = load_json(ROOT / "pretrained" / name / "runner_cfg.json")
    evaluation = page["evaluation"]
    features = page["features"]
    sources = evaluation["sources"]
    pairs = evaluation["feature_map"]
    n_query, n_key = page["original_sizes"]
    n_entries = n_query * n_key * len(pairs["pairs_per_head"])
    # nats that the model loses without this layer's attention: the scale of "recovered"
    worth = sources["zero"]["ce_loss"] - evaluation["ce_clean"]
    tokens = f"{millions(run['training_tokens'])} + {millions(run['mask']['training_tokens'])}"
    if name in different_tokens:
        tokens += f" ({different_tokens[name]}M different)"
    return [
        f"[{name}](../benchmarks/results/dictionaries/{name}-test.md)",
        both(sources, "pattern_kl", fixed),
        both(sources, "ce_recovered", percent),
        both(sources, "logit_kl_recovered", percent),
        sides(features, "l0", ".1f"),
        f"{sides(features, 'n')} of {n_query:,}",
        f"{pairs['n_pairs']:,} of {millions(n_entries)}",
        fixed(worth, 3),
        tokens,
        f"{run['train_batch_size_tokens']:,}",
    ]


def both(
    sources: Json,
    metric: str,
    number: Any,
) -> str:
    """A metric of transcoders and feature map; shares with their intervals."""
    if metric == "pattern_kl":
        return " / ".join(number(sources[name][metric]["value"]) for name in SOURCES)
    return " / ".join(interval(sources[name][metric], number) for name in SOURCES)


def sides(
    features: Json,
    name: str,
    form: str = ",",
) -> str:
    return " / ".join(f"{features[side][name]:{form}}" for side in ("query", "key"))


def millions(count: float) -> str:
    return f"{count / 1e6:.1f}M"


def aims_of_layer_23() -> list[str]:
    """Layer 23 against what was aimed at."""
    page = dictionary_page(LAYER_23)
    sources = page["evaluation"]["sources"]
    smaller = page["beside"][SMALLER_MAP]["evaluation"]["sources"]
    l0 = max(page["features"][side]["l0"] for side in ("query", "key"))
    # what, its metrics, least loss recovered, least logit KL recovered
    aims = [
        ("transcoders", sources["transcoders"], 0.98, 0.95),
        ("map of at most 50,000 pairs", sources["feature_map"], 0.96, 0.92),
        ("map of at most 25,000 pairs", smaller["feature_map"], 0.94, 0.94),
    ]
    rows = [["L0 per side", "at most 20", sides(page["features"], "l0", ".1f"), verdict(l0 <= 20)]]
    for what, source, loss, logit_kl in aims:
        shares = [source["ce_recovered"], source["logit_kl_recovered"]]
        met = shares[0]["value"] >= loss and shares[1]["value"] >= logit_kl
        rows.append(
            [
                f"{what}, loss / logit KL recovered",
                f"at least {loss:.0%} / {logit_kl:.0%}",
                " / ".join(interval(share, percent) for share in shares),
                verdict(met),
            ]
        )
    return markdown_table(["", "target", "measured", ""], rows)


def verdict(met: bool | None) -> str:
    if met is None:
        return ""
    return "met" if met else "**missed**"


def layer_23() -> Json:
    """Single numbers of layer 23 that the prose names."""
    page = dictionary_page(LAYER_23)
    smaller = page["beside"][SMALLER_MAP]
    transcoders = page["evaluation"]["sources"]["transcoders"]
    difference = smaller["difference"]["transcoders"]
    return {
        "n_tokens": page["evaluation"]["n_tokens"],
        "n_rows": page["evaluation"]["n_rows"],
        "live": sides(page["features"], "live"),
        "density": percent(page["features"]["query"]["density_quantiles"]["0.5"], 2),
        "active_pairs": round(page["evaluation"]["feature_map"]["active_pairs"]),
        "norm_share": [min(transcoders["norm_share"]), max(transcoders["norm_share"])],
        "smaller_loss": interval(
            smaller["evaluation"]["sources"]["transcoders"]["ce_recovered"], percent
        ),
        "smaller_ce": interval(difference["ce_loss"]),
        "smaller_kl": fixed(difference["pattern_kl"]["value"]),
    }


def recipes(runs: Sequence[Json]) -> list[str]:
    """Training recipes on the same tokens; ratios are to the authors' recipe as published."""
    # their recipe with their batch size
    (reference,) = [run for run in runs if run["recipe"].startswith("authors (")]
    rows = [
        [
            run["recipe"],
            f"{run['tokens_per_step']:,}",
            fixed(run["pattern_kl"]),
            fixed(run["pattern_kl"] / reference["pattern_kl"], 2),
            " / ".join(map(str, run["l0"])),
            " / ".join(f"{n:,}" for n in run["live"]),
        ]
        for run in runs
    ]
    header = [
        "recipe",
        "tokens per step",
        "pattern KL",
        "ratio",
        "L0 query / key",
        "live query / key",
    ]
    return markdown_table(header, rows)


def frontier(live: Mapping[str, Sequence[int]]) -> list[str]:
    """Transcoders by L0 on the validation split, and the two recipes on the same rows.

    Args:
        live: features that fire in training tokens, (query, key) by name of the run.
    """
    page = load_json(RESULTS / "dictionaries" / f"{LAYER_23}-validation.json")
    equal = {name: other["evaluation"] for name, other in page["beside"].items()}
    # all on the same rows; the page itself was made for version 4
    evaluations = {
        **page["frontier"],
        "version 4 of layer 23, 26.2M tokens": page["evaluation"],
        "ours, k 12.75": equal["sae.k=12.75"],
        "authors' recipe": equal["sae.sparsity_coefficient=0.0105"],
    }
    rows = []
    for name, evaluation in evaluations.items():
        features = evaluation["features"]
        transcoders = evaluation["sources"]["transcoders"]
        rows.append(
            [
                name.replace("sae.k=", "k "),
                f"{features['l0_query']:.1f} / {features['l0_key']:.1f}",
                interval(transcoders["pattern_kl"], fixed),
                interval(transcoders["ce_recovered"], percent),
                interval(transcoders["logit_kl_recovered"], percent),
                " / ".join(f"{n:,}" for n in live[name]) if name in live else "",
            ]
        )
    header = [
        "transcoders",
        "L0 query / key",
        "pattern KL",
        "loss recovered",
        "logit KL recovered",
        "live query / key",
    ]
    return markdown_table(header, rows)


# Quality


def planted(quality: Json) -> list[str]:
    """Methods on planted layers: recovery, average precision, F1 and KL, means over seeds."""
    cases = pd.DataFrame([case for case in quality["cases"] if case["section"] == "planted"])
    cases["pairs_kl"] = [kl_of_planted_pairs(case) for _, case in cases.iterrows()]
    metrics = ["recovery_query", "recovery_key", "average_precision", "f1", "pairs_kl"]
    groups = cases.groupby(["method", "setting"], sort=False)
    # over seeds
    means = groups[[*metrics, "transcoders_kl"]].mean()
    rows = []
    for method in cases["method"].unique():
        cells = []
        for setting in SETTINGS:
            mean = means.loc[(method, setting)]
            recovery = f"{mean['recovery_query']:.2f} / {mean['recovery_key']:.2f}"
            precision = f"{fixed(mean['average_precision'], 2)} / {fixed(mean['f1'], 2)}"
            cells += [recovery, precision, fixed(mean["pairs_kl"], 3)]
        rows.append([f"**{method}**" if method == "ours" else method, *cells])
    header = ["method"]
    for setting in SETTINGS:
        header += [f"{setting}: recovery", "AP / F1", "KL"]
    return markdown_table(header, rows)


def kl_of_planted_pairs(case: Any) -> float | None:
    """KL of the pattern that the first pairs of a ranking make, as many as are planted."""
    for point in case["curve"]:
        # None for a method without decoders: it makes no pattern
        if point["n_pairs"] == case["planted_pairs"]:
            return point["pattern_kl"]
    return None


def removals(quality: Json) -> list[str]:
    """SmolLM2 by dictionary: cases won against both controls, predictions, score explained."""
    header = ["layer, dictionary", "`effect`, query: k = 2", "10", "key: k = 2", "10"]
    header += ["`marginal`, query: k = 2", "10", "key: k = 2", "10", "predicted", "twins"]
    rows = []
    # the layer of the shipped dictionary first
    layers = sorted(quality["causal"].items(), reverse=True)
    dictionaries = [(layer, name) for layer, values in layers for name in values]
    for layer, name in dictionaries:
        outcomes = quality["causal"][layer][name]
        cells = []
        for ranking in ("effect", "marginal"):
            for side in ("query", "key"):
                sizes = outcomes["rankings"][ranking][side]["by_k"]
                cells += [won(sizes["2"]), won(sizes["10"])]
        drops = [
            outcomes["rankings"]["effect"][side]["by_k"]["5"]["prediction"]["score_drop"]
            for side in ("query", "key")
        ]
        cells.append(" / ".join(fixed(drop["pearson"], 2) for drop in drops))
        cells.append(fixed(outcomes["twins"]["transcoders"]["pearson"], 2))
        parts = quality["explained"][layer][name]["transcoders"]
        for part in ("all", "without_always_on"):
            cells.append(percent(parts[part]["score_explained"]["mean"]))
        rows.append([f"{layer}, {name}", *cells])
    return markdown_table([*header, "explained", "sparse"], rows)


def won(outcome: Json) -> str:
    """Cases with a larger drop of the score than as many others / the ones matched on size."""
    controls = outcome["controls"]
    shares = [controls[name]["wins"]["score_drop"][0] for name in CONTROLS]
    return " / ".join(f"{100 * share:.0f}" for share in shares)


def judged_targets(quality: Json) -> list[targets.Verdict]:
    """Verdicts on the method and on the shipped dictionary."""
    verdicts = [*targets.easy(quality), *targets.hard(quality), *targets.variance(quality)]
    for result in [*targets.causal(quality), *targets.explained(quality)]:
        if "shipped" in result.setting:
            verdicts.append(result)
    return verdicts


# Cost


def speed(report: Json) -> list[str]:
    """What `make bench` measures, against its targets."""
    results = report["results"]
    rows = []
    # data, times faster, times less memory
    aims = [("random", 30, 10), ("clustered", 30, 10), ("live", 10, None)]
    for data, faster, less in aims:
        dense = results[f"step2.{data}.dense"]
        sparse = results[f"step2.{data}.sparse"]
        time = dense["seconds"] / sparse["seconds"]
        memory = dense["step_bytes"] / sparse["step_bytes"]
        aim = f"{faster}x faster" + (f", {less}x less memory" if less else "")
        met = time >= faster and memory >= (less or 0)
        what = (
            f"step 2 against the dense computation, {data} activations, {sparse['pairs']:,} pairs"
        )
        rows.append([what, aim, f"{time:.0f}x, {memory:.1f}x", verdict(met)])
    errors = [results[f"step2.{data}.agreement"] for data, _, _ in aims]
    loss = max(error["loss"] for error in errors)
    gradient = max(error["kl_gradient"] for error in errors)
    rows.append(
        [
            "loss and gradient against the dense ones, relative error",
            "1e-5",
            f"{scientific(loss)}, {scientific(gradient)}",
            verdict(max(loss, gradient) <= 1e-5),
        ]
    )
    wide = [results["wide.plain.24576"], results["wide.rotary.24576"]]
    narrow = results["wide.plain.1536"]
    gigabytes = " / ".join(f"{case['process_bytes'] / 1e9:.2f}" for case in wide)
    times = " / ".join(show.seconds(case["seconds"]) for case in wide)
    growth = " / ".join(f"{case['seconds'] / narrow['seconds']:.2f}x" for case in wide)
    rows.append(
        [
            f"24,576 features per side, 12 heads, {wide[0]['pairs']:,} pairs, plain / rotary",
            "below 8 GB",
            f"{gigabytes} GB, {times} per step, {growth} the time at 1,536 features, plain",
            verdict(max(case["process_bytes"] for case in wide) < 8e9),
        ]
    )
    return markdown_table(["", "target", "measured", ""], [*rows, *model_speed(results)])


def model_speed(results: Json) -> list[list[str]]:
    """Training steps and patched forward passes of SmolLM2."""
    forward = results["smollm2.patched"]["rows"]
    step1 = results["smollm2.step1"]["seconds"]
    # seconds by (number of pairs, transcoders tuned along)
    steps = {
        (row["pairs"], row["fine_tune"]): row["seconds"] for row in results["smollm2.step2"]["rows"]
    }
    frozen = [steps[200_000, False], steps[50_000, False]]
    tuned = [steps[200_000, True], steps[50_000, True]]
    plain = forward[0]["plain_seconds"]
    columns = [" / ".join(f"{time:.2f} s" for time in times) for times in (frozen, tuned)]
    rows = [
        [
            "SmolLM2, 2,048 tokens: forward pass, step 1, step 2 (200,000 / 50,000 pairs), "
            "with the transcoders tuned along",
            "step 2 not the slowest",
            f"{plain:.2f} s, {step1:.2f} s, {columns[0]}, {columns[1]}",
            verdict(max(frozen) < max(plain, step1)),
        ]
    ]
    ratios = [row["patched_seconds"] / row["plain_seconds"] for row in forward]
    sizes = ["{} x {}".format(*row["tokens"]) for row in forward]
    rows.append(
        [
            f"patched forward pass over the plain one, {', '.join(sizes)} tokens",
            "1.5x",
            ", ".join(f"{ratio:.2f}x" for ratio in ratios),
            verdict(max(ratios) <= 1.5),
        ]
    )
    return rows


# Single measurements


def measurements(groups: Sequence[Json]) -> list[str]:
    """A table of what stands in notes.json: value, target, and when it was measured."""
    rows = []
    for group in groups:
        for row in group["rows"]:
            value = f"{written_value(row)} {row.get('unit', '')}".rstrip()
            limit = row.get("at_most")
            aim = "" if limit is None else f"at most {numbers(limit, 'g')}"
            when = f"{group['date']}, {group['commit']}"
            rows.append([row["what"], value, aim, verdict(within(row)), when])
    return markdown_table(["", "measured", "target", "", "when, commit"], rows)


def written_value(row: Json) -> str:
    value = row["value"]
    if isinstance(value, dict):
        return f"{value['low']:g} to {value['high']:g}"
    return numbers(value, row.get("format", "g"))


def numbers(
    value: float | Sequence[float],
    form: str | Sequence[str],
) -> str:
    """Numbers between slashes; one format, or one per number."""
    values = value if isinstance(value, list) else [value]
    forms = form if isinstance(form, list) else [form] * len(values)
    return " / ".join(plain(number, each) for number, each in zip(values, forms, strict=True))


def plain(
    number: float,
    form: str,
) -> str:
    """A number as people write it: thousands apart, exponents without a leading zero."""
    if form != "g":  # digits as they were reported
        return f"{number:{form}}"
    return f"{number:,}" if isinstance(number, int) else scientific(number, "g")


def scientific(
    number: float,
    form: str = ".2g",
) -> str:
    return f"{number:{form}}".replace("e-0", "e-")


def within(row: Json) -> bool | None:
    """Whether every number of a row keeps to its limit; None where there is no limit."""
    limit = row.get("at_most")
    if limit is None:
        return None
    value = row["value"]
    # a range keeps to its limit where both ends do
    values = list(value.values()) if isinstance(value, dict) else value
    values = values if isinstance(values, list) else [values]
    limits = limit if isinstance(limit, list) else [limit] * len(values)
    return all(number <= most for number, most in zip(values, limits, strict=True))


if __name__ == "__main__":
    sys.stdout.write(render())
