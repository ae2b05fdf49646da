"""The collected results as Markdown tables: ratios within the run, and the absolute numbers they come from."""

from collections.abc import Callable, Sequence
from typing import Any

from synthetic_cases import KINDS

Results = dict[str, dict[str, Any]]
Sizes = dict[str, Any]

TARGETS = {"random": (30, 10), "clustered": (30, 10), "live": (10, None)}
"""How many times faster, and how many times less memory, step 2 should be than the dense reference."""
AGREEMENT_TARGET, PATCHED_TARGET, PROCESS_TARGET = 1e-5, 1.5, 8e9
_NONE = "–"


def render(report: dict[str, Any]) -> str:
    """`report` as bench.py collects it: machine, sizes, smoke, results by case."""
    machine, results, sizes = report["machine"], report["results"], report["sizes"]
    lines = [
        "# Benchmarks",
        "",
        f"One run of `make bench` on {machine['cores']} CPU cores, torch {machine['torch']}, float32. Times are medians of "
        "steps; memory of a step is the peak resident size during the first one, which makes the optimizer's state, less "
        "that just before it. Ratios compare numbers of this run.",
    ]
    if report["smoke"]:
        lines += ["", "**A smoke run at tiny sizes: the numbers mean nothing.**"]
    for prefix, section in SECTIONS.items():
        if any(name.startswith(prefix) for name in results):
            lines += ["", *section(results, sizes)]
    failed = {name: result["failed"] for name, result in results.items() if "failed" in result}
    if failed:
        lines += [
            "",
            "## Failed",
            "",
            *(f"- {name}: {message}" for name, message in failed.items()),
        ]
    return "\n".join(lines) + "\n"


def step_2(results: Results, sizes: Sizes) -> list[str]:
    rows, agreement = [], []
    for kind in KINDS:
        dense, sparse, same = (
            results.get(f"step2.{kind}.{part}", {}) for part in ("dense", "sparse", "agreement")
        )
        faster, less = (
            _ratio(dense.get(key), sparse.get(key)) for key in ("seconds", "step_bytes")
        )
        targets = [_NONE if target is None else f"{target}x" for target in TARGETS[kind]]
        rows.append(
            [
                kind,
                _count(sparse.get("pairs")),
                _bold(faster),
                targets[0],
                _bold(less),
                targets[1],
                _seconds(dense.get("seconds")),
                _seconds(sparse.get("seconds")),
                _bytes(dense.get("step_bytes")),
                _bytes(sparse.get("step_bytes")),
                _number(sparse.get("active_pairs")),
                _seconds(sparse.get("ranking_seconds")),
            ]
        )
        agreement.append(
            [kind, *(_power(same.get(key)) for key in ("loss", "gradient", "kl_gradient"))]
        )
    entries = next(
        (
            r["entries"]
            for name, r in results.items()
            if name.startswith("step2") and "entries" in r
        ),
        None,
    )
    return [
        "## Step 2 against the dense computation",
        "",
        f"{sizes['d']} features a side, {_layer(sizes)}, L0 {sizes['l0']}, no rotary embeddings. Dense trains all "
        f"{_count(entries)} entries of the mask; ours the most important pairs on that data. *random*: features drawn "
        "uniformly; *clustered*: most of a token's features come from a topic that lasts; *live*: only "
        f"{sizes['live'][0]} query and {sizes['live'][1]} key features ever fire, ours holds all their pairs. From feature "
        "activations and true pattern on, encoders excluded, on both sides.",
        "",
        *_table(
            [
                "data",
                "pairs of ours",
                "faster",
                "target",
                "less memory",
                "target",
                "dense step",
                "our step",
                "dense memory",
                "our memory",
                "active pairs per score",
                "ranking (once)",
            ],
            rows,
        ),
        "",
        "Both on the same pairs with the same random weights, the dense mask zero elsewhere; relative errors, target "
        f"{AGREEMENT_TARGET:.0e}:",
        "",
        *_table(["data", "loss", "gradient", "gradient of the KL alone"], agreement),
    ]


def wide(results: Results, sizes: Sizes) -> list[str]:
    found = {
        name: result
        for name, result in results.items()
        if name.startswith("wide.") and "d" in result
    }
    first = next(iter(found.values()), {})
    rows = []
    for name, r in found.items():
        rows.append(
            [
                f"{r['d']}{', rotary' if 'rotary' in name else ''}",
                _count(r["entries"]),
                _bytes(4 * r["entries"]),
                _bold(_ratio(r["seconds"], first["seconds"])),
                _bold(_ratio(r["step_bytes"], first["step_bytes"])),
                _seconds(r["seconds"]),
                _bytes(r["step_bytes"]),
                _bytes(r["process_bytes"]),
                _count(r["pairs"]),
                _number(r["active_pairs"]),
                f"{_seconds(r['ranking_seconds'])} on {r['ranking_rows']} rows",
            ]
        )
    return [
        "## Wide dictionaries",
        "",
        f"Step 2 with {_count(sizes['wide_pairs'])} candidates, {_layer(sizes)}, L0 {sizes['l0']}, clustered data. The "
        "dense map is only counted, not made, and one copy of it (dense training holds map, mask, gradient and Adam's "
        "state). Candidates are ranked on as few rows as hold that many pairs. The whole process, "
        f"ranking and data included, should stay below {_bytes(PROCESS_TARGET)}.",
        "",
        *_table(
            [
                "features a side",
                "dense entries",
                "dense map",
                "time against the first",
                "memory against the first",
                "step",
                "memory",
                "process peak",
                "pairs",
                "active pairs per score",
                "ranking",
            ],
            rows,
        ),
    ]


def growth(results: Results, sizes: Sizes) -> list[str]:
    lines = [
        "## What step 2 grows with",
        "",
        f"{sizes['d']} features a side, {sizes['n_heads']} heads of {sizes['d_head']}, {sizes['n_tokens']} tokens a step, "
        f"clustered data; where it is not what grows, L0 {sizes['l0']}, context {sizes['context']}, "
        f"{_count(sizes['growth_pairs'])} pairs.",
    ]
    for axis, values in sizes["growing"]:
        both = [
            results.get(f"growth.{kind}.{axis}", {}).get("rows", []) for kind in ("plain", "rotary")
        ]
        rows = []
        for at, value in enumerate(values):
            cells = [_count(value)]
            for measured in both:
                here, first = (measured[n] if n < len(measured) else {} for n in (at, 0))
                against = _ratio(here.get("seconds"), first.get("seconds"))
                cells += [
                    _bold(against),
                    _seconds(here.get("seconds")),
                    _bytes(here.get("step_bytes")),
                ]
            pairs = [measured[at]["pairs"] for measured in both if at < len(measured)]
            rows.append([*cells, " / ".join(map(_count, pairs))])
        header = [axis if axis != "l0" else "L0", "time against the first", "step", "memory"]
        lines += [
            "",
            *_table([*header, *(f"rotary: {name}" for name in header[1:]), "pairs"], rows),
        ]
    return lines


def smollm2(results: Results, sizes: Sizes) -> list[str]:
    title = ["## SmolLM2-135M-Instruct, layer 23", ""]
    skipped = next(
        (
            r["skipped"]
            for name, r in results.items()
            if name.startswith("smollm2") and "skipped" in r
        ),
        None,
    )
    if skipped:
        return [*title, f"Skipped: {skipped}."]
    load, patched, step1, step2 = (
        results.get(f"smollm2.{case}", {}) for case in ("load", "patched", "step1", "step2")
    )
    plain = patched["rows"][0]["plain_seconds"] if "rows" in patched else None
    n_tokens = sizes["model_rows"] * sizes["model_context"]
    timed = [
        ("plain forward pass of the model", plain),
        ("step 1: both transcoders", step1.get("seconds")),
    ]
    timed.append(("the same with dense products", step1.get("dense_seconds")))
    for row in step2.get("rows", []):
        mode = "transcoders tuned along" if row["fine_tune"] else "frozen"
        timed.append((f"step 2: {_count(row['pairs'])} pairs, {mode}", row["seconds"]))
    rows = [
        [
            name,
            _bold(_ratio(seconds, plain)),
            _seconds(seconds),
            _count(None if not seconds else round(n_tokens / seconds)),
        ]
        for name, seconds in timed
    ]
    runs = [
        [
            " x ".join(map(str, r["tokens"])),
            _bold(_ratio(r["patched_seconds"], r["plain_seconds"])),
            f"{PATCHED_TARGET}x" if at == 0 else _NONE,
            _seconds(r["plain_seconds"]),
            _seconds(r["patched_seconds"]),
        ]
        for at, r in enumerate(patched.get("rows", []))
    ]
    return [
        *title,
        f"The shipped dictionary on {sizes['model_rows']} x {sizes['model_context']} tokens; training steps are forward, "
        "backward and Adam from the layer's inputs on, encoders and the true pattern included. Ranking the candidates took "
        f"{_seconds(step2.get('ranking_seconds'))} once.",
        "",
        *_table(["", "against the forward pass", "time", "tokens a second"], rows),
        "",
        f"A forward pass that attends as the feature map says ({_count(patched.get('pairs'))} pairs):",
        "",
        *_table(["tokens", "patched against plain", "target", "plain", "patched"], runs),
        "",
        f"`from_pretrained` takes {_seconds(load.get('seconds'))} after imports, from {_bytes(load.get('bytes'))} on disk.",
    ]


SECTIONS: dict[str, Callable[[Results, Sizes], list[str]]] = {
    "step2": step_2,
    "wide": wide,
    "growth": growth,
    "smollm2": smollm2,
}


def _layer(sizes: Sizes) -> str:
    rows = sizes["n_tokens"] // sizes["context"]
    return f"{sizes['n_heads']} heads of {sizes['d_head']}, {rows} x {sizes['context']} tokens"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _bold(ratio: float | None) -> str:
    return _NONE if ratio is None else f"**{_number(ratio)}x**"


def _number(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _count(value: int | None) -> str:
    return _NONE if value is None else f"{value:,}"


def _power(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1e}"


def _seconds(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{_number(1000 * value)} ms" if value < 1 else f"{_number(value)} s"


def _bytes(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{_number(value / 1e9)} GB" if value >= 1e9 else f"{_number(value / 1e6)} MB"
