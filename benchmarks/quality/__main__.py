"""Quality of dictionaries: `make bench-quality`, which writes quality.md, .json and quality-*.png.

    python -m benchmarks.quality                       everything (an hour on two cores)
    python -m benchmarks.quality --only planted        these sections, printed
    python -m benchmarks.quality --smoke               everything at tiny sizes, printed
    python -m benchmarks.quality --report FILE.json    Markdown and figures again, next to that
                                                       file; several are merged

They go to benchmarks/results. QK_CORPUS names the folder with the corpus; without it the sample
that comes with the package is explained.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.quality.quality_report import render
from benchmarks.quality.sections import SECTIONS, collect, merge

RESULTS = Path(__file__).parents[1] / "results"


def main() -> int:
    options = _parser().parse_args()
    if options.report:
        report = merge([json.loads(path.read_text()) for path in options.report])
        write(report, options.output or options.report[-1].parent)
        return 0
    names = [name for name in SECTIONS if name in (options.only or SECTIONS)]
    seeds = options.seeds or ([0] if options.smoke else [0, 1, 2])
    report = collect(names, options.smoke, seeds)
    if options.output or not (options.smoke or options.only):
        write(report, options.output or RESULTS)
    else:
        print(render(report))
    return int(bool(report["failed"]))


def write(
    report: dict[str, Any],
    folder: Path,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.json").write_text(json.dumps(report) + "\n")
    (folder / "quality.md").write_text(render(report))
    from benchmarks.quality import figures  # needs Matplotlib, which printing does without

    names = [path.name for path in figures.write(report, folder)]
    print(f"wrote quality.md, quality.json and {', '.join(names) or 'no figures'} to {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTIONS", help=f"of {', '.join(SECTIONS)}"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEEDS", help="of the planted layers; default 0 1 2"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for quality.md, quality.json and the figures"
    )
    parser.add_argument(
        "--report", nargs="+", type=Path, metavar="FILES", help="quality.json files to render again"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
