"""Speed and memory: `make bench`, which writes benchmarks/results/cpu.md and cpu.json.

Each case runs in a process of its own, so that memory is clean:

    python -m benchmarks.speed                          everything (15 minutes on two cores)
    python -m benchmarks.speed --only step2 wide.plain  these groups or cases, printed
    python -m benchmarks.speed --smoke                  everything at tiny sizes, in one process
    python -m benchmarks.speed --before old/cpu.json    and a table of ratios to an older run
    python -m benchmarks.speed --case step2.live.sparse --json
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.speed import model_cases, synthetic_cases
from benchmarks.speed.report import compare, render
from benchmarks.speed.sizes import FULL, SMOKE, Sizes

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"


def main() -> int:
    options = _parser().parse_args()
    sizes = SMOKE if options.smoke else FULL
    names = matching_cases(list(all_cases(sizes)), options.case or options.only)
    if options.case:
        results = measure_here(names, sizes)
        print(json.dumps(results, indent=None if options.json else 2))
        return 0
    report = {
        "machine": {"cores": os.cpu_count(), "torch": version("torch")},
        "smoke": options.smoke,
        "sizes": sizes._asdict(),
        "results": collect(names, options.smoke),
    }
    if options.before:
        print(compare(json.loads(options.before.read_text()), report))
    is_complete = not (options.smoke or options.only)
    if is_complete or options.output:
        write(report, options.output or RESULTS)
    elif not options.before:
        print(render(report))
    return int(any("failed" in result for result in report["results"].values()))


def all_cases(sizes: Sizes) -> dict[str, Any]:
    return {**synthetic_cases.cases(sizes), **model_cases.cases(sizes)}


def measure_here(
    names: list[str],
    sizes: Sizes,
) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    cases = all_cases(sizes)
    return {name: cases[name]() for name in names}


def collect(
    names: list[str],
    smoke: bool,
) -> dict[str, Any]:
    """Results by case; one that fails does not stop the others."""
    environment = dict(os.environ)
    groups = [[name] for name in names]
    flags = ["--json"]
    if smoke:
        # tiny loops on two busy cores are slower than on one
        environment |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        groups = [names]
        flags.append("--smoke")
    results: dict[str, Any] = {}
    for group in groups:
        command = [sys.executable, "-m", "benchmarks.speed", *flags, "--case", *group]
        start = time.perf_counter()
        process = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=REPOSITORY
        )
        if process.returncode:
            last_lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
            results |= {name: {"failed": last_lines[-1]} for name in group}
            outcome = f"FAILED\n{process.stderr}"
        else:
            results |= json.loads(process.stdout.splitlines()[-1])
            outcome = "done"
        label = group[0] if len(group) == 1 else f"{len(group)} cases"
        duration = time.perf_counter() - start
        print(f"{label}: {outcome} in {duration:.0f} s", file=sys.stderr, flush=True)
    return results


def write(
    report: dict[str, Any],
    folder: Path,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.md").write_text(render(report))
    (folder / "cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {folder / 'cpu.md'} and {folder / 'cpu.json'}")


def matching_cases(
    names: list[str],
    patterns: list[str] | None,
) -> list[str]:
    """The cases that the patterns name: a case, or a group such as step2 or growth.plain."""
    if not patterns:
        return names

    def matches(
        name: str,
        pattern: str,
    ) -> bool:
        return name == pattern or name.startswith(f"{pattern}.")

    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise SystemExit(f"There is no case {pattern}; cases are {', '.join(names)}.")
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--only", nargs="+", metavar="NAMES", help="cases, or groups such as step2 or growth.plain"
    )
    parser.add_argument("--output", type=Path, help="folder for cpu.md and cpu.json")
    parser.add_argument("--before", type=Path, help="cpu.json of an older run to compare with")
    parser.add_argument(
        "--case", nargs="+", metavar="NAMES", help="measure in this process and print the numbers"
    )
    parser.add_argument("--json", action="store_true", help="the numbers on one line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
