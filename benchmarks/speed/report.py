"""The collected results as Markdown tables: ratios within a run, and the numbers they come from.

`compare` sets two runs side by side.
"""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.show import (
    NONE,
    count,
    failures,
    power,
    ratio,
    seconds,
    significant,
    size,
    times,
)
from benchmarks.speed.synthetic_cases import KINDS
from sae_lens_qk.tables import markdown_table

Report = dict[str, Any]
Results = dict[str, dict[str, Any]]
Sizes = dict[str, Any]

TIME_TARGETS = {"random": 30, "clustered": 30, "live": 10}
"""How many times faster step 2 should be than the dense reference."""
MEMORY_TARGETS = {"random": 10, "clustered": 10}
AGREEMENT_TARGET = 1e-5
PATCHED_TARGET = 1.5
PROCESS_TARGET = 8e9


def render(report: Report) -> str:
    """`report` as `__main__` collects it: machine, sizes, smoke, results by case."""
    machine = report["machine"]
    results = report["results"]
    lines = [
        "# Benchmarks",
        "",
        f"One run of `make bench` on {machine['cores']} CPU cores, torch {machine['torch']}, "
        "float32. Times are medians of steps; memory of a step is the peak resident size during "
        "the first one, which makes the optimizer's state, less that just before it. Ratios "
        "compare numbers of this run.",
    ]
    if report["smoke"]:
        lines += ["", "**A smoke run at tiny sizes: the numbers mean nothing.**"]
    for prefix, section in SECTIONS.items():
        if any(name.startswith(prefix) for name in results):
            lines += ["", *section(results, report["sizes"])]
    failed = {name: result["failed"] for name, result in results.items() if "failed" in result}
    return "\n".join([*lines, *failures(failed)]) + "\n"


def compare(
    before: Report,
    after: Report,
) -> str:
    """A table of times and memory of two runs, for the cases that both have.

    A ratio above 1: the later run is faster, or takes less memory.
    """
    columns = {"seconds": seconds, "step_bytes": size}
    old_rows = dict(_measurements(before["results"]))
    rows = []
    for name, result in _measurements(after["results"]):
        old_result = old_rows.get(name)
        if old_result is None:
            continue
        cells = [name]
        for key, cell in columns.items():
            change = ratio(old_result.get(key), result.get(key))
            cells += [cell(old_result.get(key)), cell(result.get(key)), times(change)]
        rows.append(cells)
    header = ["case"]
    for words in ("time", "memory"):
        header += [f"{words} before", f"{words} after", "before / after"]
    lines = markdown_table(header, rows)
    if before["sizes"] != after["sizes"]:
        lines = ["**The two runs have different sizes.**", "", *lines]
    return "\n".join(lines) + "\n"


def _measurements(results: Results) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every result with a time in it, by case and, where a case has rows, by row."""
    for name, result in results.items():
        if "seconds" in result:
            yield name, result
        if "dense_seconds" in result:
            yield f"{name}, dense products", {"seconds": result["dense_seconds"]}
        for row in result.get("rows", []):
            if "patched_seconds" in row:
                shape = " x ".join(map(str, row["tokens"]))
                yield f"{name}, {shape}", {"seconds": row["patched_seconds"]}
            elif "fine_tune" in row:
                yield f"{name}, {_step_2_label(row)}", row
            else:
                yield f"{name} {row['value']}", row


def step_2(
    results: Results,
    sizes: Sizes,
) -> list[str]:
    rows = []
    agreement_rows = []
    entries = None
    for kind in KINDS:
        dense = results.get(f"step2.{kind}.dense", {})
        sparse = results.get(f"step2.{kind}.sparse", {})
        errors = results.get(f"step2.{kind}.agreement", {})
        entries = entries or dense.get("entries") or sparse.get("entries")
        cells = {
            "data": kind,
            "pairs of ours": count(sparse.get("pairs")),
            "faster": times(ratio(dense.get("seconds"), sparse.get("seconds"))),
            "target": _target(TIME_TARGETS.get(kind)),
            "less memory": times(ratio(dense.get("step_bytes"), sparse.get("step_bytes"))),
            "target ": _target(MEMORY_TARGETS.get(kind)),
            "dense step": seconds(dense.get("seconds")),
            "our step": seconds(sparse.get("seconds")),
            "dense memory": size(dense.get("step_bytes")),
            "our memory": size(sparse.get("step_bytes")),
            "active pairs per score": significant(sparse.get("active_pairs")),
            "ranking (once)": seconds(sparse.get("ranking_seconds")),
        }
        rows.append(cells)
        relative = [power(errors.get(key)) for key in ("loss", "gradient", "kl_gradient")]
        agreement_rows.append([kind, *relative])
    n_query, n_key = sizes["live"]
    return [
        "## Step 2 against the dense computation",
        "",
        f"{sizes['d']} features per side, {_layer(sizes)}, L0 {sizes['l0']}, no rotary embeddings. "
        f"Dense trains all {count(entries)} entries of the mask; ours the most important pairs on "
        "that data. *random*: features drawn uniformly; *clustered*: most of a token's features "
        f"come from a topic that lasts; *live*: only {n_query} query and {n_key} key features ever "
        "fire, ours holds all their pairs. From feature activations and true pattern on, encoders "
        "excluded, on both sides.",
        "",
        *_table(rows),
        "",
        "Both on the same pairs with the same random weights, the dense mask zero elsewhere; "
        f"relative errors, target {AGREEMENT_TARGET:.0e}:",
        "",
        *markdown_table(["data", "loss", "gradient", "gradient of the KL alone"], agreement_rows),
    ]


def wide(
    results: Results,
    sizes: Sizes,
) -> list[str]:
    rows = []
    first = None
    for name, result in results.items():
        if not name.startswith("wide.") or "d" not in result:
            continue
        first = first or result
        ranking = f"{seconds(result['ranking_seconds'])} on {result['ranking_rows']} rows"
        cells = {
            "features per side": f"{result['d']}{', rotary' if 'rotary' in name else ''}",
            "dense entries": count(result["entries"]),
            "dense map": size(4 * result["entries"]),
            "time against the first": times(ratio(result["seconds"], first["seconds"])),
            "memory against the first": times(ratio(result["step_bytes"], first["step_bytes"])),
            "step": seconds(result["seconds"]),
            "memory": size(result["step_bytes"]),
            "process peak": size(result["process_bytes"]),
            "pairs": count(result["pairs"]),
            "active pairs per score": significant(result["active_pairs"]),
            "ranking": ranking,
        }
        rows.append(cells)
    return [
        "## Wide dictionaries",
        "",
        f"Step 2 with {count(sizes['wide_pairs'])} candidates, {_layer(sizes)}, L0 {sizes['l0']}, "
        "clustered data. The dense map is only counted, not made, and one copy of it (dense "
        "training holds map, mask, gradient and Adam's state). Candidates are ranked on as few "
        "rows as hold that many pairs. The whole process, ranking and data included, should stay "
        f"below {size(PROCESS_TARGET)}.",
        "",
        *_table(rows),
    ]


def growth(
    results: Results,
    sizes: Sizes,
) -> list[str]:
    lines = [
        "## What step 2 grows with",
        "",
        f"{sizes['d']} features per side, {sizes['n_heads']} heads of {sizes['d_head']}, "
        f"{sizes['n_tokens']} tokens per step, clustered data; where it is not what grows, "
        f"L0 {sizes['l0']}, context {sizes['context']}, {count(sizes['growth_pairs'])} pairs.",
    ]
    for axis, values in sizes["growing"]:
        series = {
            "": results.get(f"growth.plain.{axis}", {}).get("rows", []),
            "rotary: ": results.get(f"growth.rotary.{axis}", {}).get("rows", []),
        }
        rows = []
        for n, value in enumerate(values):
            cells = {axis if axis != "l0" else "L0": count(value)}
            for prefix, points in series.items():
                point = points[n] if n < len(points) else {}
                first = points[0] if points else {}
                change = ratio(point.get("seconds"), first.get("seconds"))
                cells[f"{prefix}time against the first"] = times(change)
                cells[f"{prefix}step"] = seconds(point.get("seconds"))
                cells[f"{prefix}memory"] = size(point.get("step_bytes"))
            pairs = [count(points[n]["pairs"]) for points in series.values() if n < len(points)]
            cells["pairs "] = " / ".join(pairs)
            rows.append(cells)
        lines += ["", *_table(rows)]
    return lines


def smollm2(
    results: Results,
    sizes: Sizes,
) -> list[str]:
    lines = ["## SmolLM2-135M-Instruct, layer 23", ""]
    for name, result in results.items():
        if name.startswith("smollm2") and "skipped" in result:
            return [*lines, f"Skipped: {result['skipped']}."]
    load = results.get("smollm2.load", {})
    patched = results.get("smollm2.patched", {})
    step2 = results.get("smollm2.step2", {})
    load_time = seconds(load.get("seconds"))
    return [
        *lines,
        f"The shipped dictionary on {sizes['model_rows']} x {sizes['model_context']} tokens; "
        "training steps are forward, backward and Adam from the layer's inputs on, encoders and "
        "the true pattern included. Ranking the candidates took "
        f"{seconds(step2.get('ranking_seconds'))} once.",
        "",
        *_training_times(results, sizes),
        "",
        "A forward pass that attends as the feature map says "
        f"({count(patched.get('pairs'))} pairs):",
        "",
        *_patched_times(patched.get("rows", [])),
        "",
        f"`from_pretrained` takes {load_time} after imports, from {size(load.get('bytes'))} "
        "on disk.",
    ]


def _training_times(
    results: Results,
    sizes: Sizes,
) -> list[str]:
    runs = results.get("smollm2.patched", {}).get("rows", [])
    step1 = results.get("smollm2.step1", {})
    forward_pass = runs[0]["plain_seconds"] if runs else None
    durations = {
        "plain forward pass of the model": forward_pass,
        "step 1: both transcoders": step1.get("seconds"),
        "the same with dense products": step1.get("dense_seconds"),
    }
    for row in results.get("smollm2.step2", {}).get("rows", []):
        durations[f"step 2: {_step_2_label(row)}"] = row["seconds"]
    n_tokens = sizes["model_rows"] * sizes["model_context"]
    rows = []
    for name, duration in durations.items():
        rate = ratio(n_tokens, duration)
        change = times(ratio(duration, forward_pass))
        rows.append([name, change, seconds(duration), count(rate)])
    return markdown_table(["", "against the forward pass", "time", "tokens per second"], rows)


def _step_2_label(row: dict[str, Any]) -> str:
    mode = "transcoders tuned along" if row["fine_tune"] else "frozen"
    return f"{count(row['pairs'])} pairs, {mode}"


def _patched_times(runs: list[dict[str, Any]]) -> list[str]:
    rows = []
    for n, run in enumerate(runs):
        cells = {
            "tokens": " x ".join(map(str, run["tokens"])),
            "patched against plain": times(ratio(run["patched_seconds"], run["plain_seconds"])),
            "target": _target(PATCHED_TARGET if n == 0 else None),
            "plain": seconds(run["plain_seconds"]),
            "patched": seconds(run["patched_seconds"]),
        }
        rows.append(cells)
    return _table(rows)


SECTIONS: dict[str, Callable[[Results, Sizes], list[str]]] = {
    "step2": step_2,
    "wide": wide,
    "growth": growth,
    "smollm2": smollm2,
}


def _layer(sizes: Sizes) -> str:
    rows = sizes["n_tokens"] // sizes["context"]
    return f"{sizes['n_heads']} heads of {sizes['d_head']}, {rows} x {sizes['context']} tokens"


def _target(factor: float | None) -> str:
    return NONE if factor is None else f"{factor}x"


def _table(rows: list[dict[str, str]]) -> list[str]:
    """Cells by column; spaces around a column's name only tell it from another of the same name."""
    if not rows:
        return []
    header = [name.strip() for name in rows[0]]
    return markdown_table(header, [list(row.values()) for row in rows])
