"""The results as Markdown: targets first, then what they are judged by."""

from typing import Any

from . import model_report, planted_report, targets

Report = dict[str, Any]


def render(report: Report) -> str:
    """`report` as `sections.collect` makes it: machine, seeds, smoke, wanted, cases, causal, explained, skipped, failed."""
    machine, seeds = report["machine"], ", ".join(map(str, report["seeds"]))
    lines = [
        "# Quality",
        "",
        f"Made by `make bench-quality` on {machine['cores']} CPU cores, torch {machine['torch']}, seeds {seeds}.",
    ]
    if report["smoke"]:
        lines += ["", "**A smoke run at tiny sizes: the numbers mean nothing.**"]
    lines += ["", *targets.section(report)]
    for name, section in SECTIONS.items():
        if name in report["wanted"]:
            lines += ["", *section(report)]
    if report["failed"]:
        lines += [
            "",
            "## Failed",
            "",
            *(f"- {name}: {message}" for name, message in report["failed"].items()),
        ]
    return "\n".join(lines) + "\n"


SECTIONS = {
    "planted": planted_report.section,
    "variance": planted_report.variance,
    "causal": model_report.causal,
    "explained": model_report.explained,
}
