"""The results as Markdown: targets first, then what they are judged by."""

from typing import Any

from benchmarks.quality import model_report, planted_report, targets
from benchmarks.show import failures

Report = dict[str, Any]


def render(report: Report) -> str:
    """`report` as `sections.collect` makes it."""
    machine = report["machine"]
    seeds = ", ".join(map(str, report["seeds"]))
    lines = [
        "# Quality",
        "",
        f"Made by `make bench-quality` on {machine['cores']} CPU cores, torch {machine['torch']}, "
        f"seeds {seeds}.",
    ]
    if report["smoke"]:
        lines += ["", "**A smoke run at tiny sizes: the numbers mean nothing.**"]
    lines += ["", *targets.section(report)]
    for name, section in SECTIONS.items():
        if name in report["wanted"]:
            lines += ["", *section(report)]
    return "\n".join([*lines, *failures(report["failed"])]) + "\n"


SECTIONS = {
    "planted": planted_report.section,
    "variance": planted_report.variance,
    "causal": model_report.causal,
    "explained": model_report.explained,
}
