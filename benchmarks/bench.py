"""All benchmarks: `make bench`, which writes benchmarks/results/cpu.md and cpu.json.

Each case runs in a process of its own, so that memory is clean:

    python benchmarks/bench.py                          everything (some 15 minutes on two cores)
    python benchmarks/bench.py --only step2 wide.plain  these groups or cases, printed
    python benchmarks/bench.py --smoke                  everything at tiny sizes, in one process, printed
    python benchmarks/bench.py --case step2.live.sparse --json
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

import model_cases
import synthetic_cases
from report import render
from sizes import FULL, SMOKE, Sizes

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    options = _parser().parse_args()
    sizes = SMOKE if options.smoke else FULL
    names = _chosen(list(all_cases(sizes)), options.case or options.only)
    if options.case:
        results = measure_here(names, sizes)
        print(json.dumps(results) if options.json else json.dumps(results, indent=2))
        return 0
    report = {
        "machine": {"cores": os.cpu_count(), "torch": version("torch")},
        "smoke": options.smoke,
        "sizes": sizes._asdict(),
        "results": collect(names, options.smoke),
    }
    complete = not (options.smoke or options.only)
    if complete or options.output:
        write(report, options.output or RESULTS)
    else:
        print(render(report))
    return int(any("failed" in result for result in report["results"].values()))


def all_cases(sizes: Sizes) -> dict[str, Any]:
    return {**synthetic_cases.cases(sizes), **model_cases.cases(sizes)}


def measure_here(names: list[str], sizes: Sizes) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    cases = all_cases(sizes)
    return {name: cases[name]() for name in names}


def collect(names: list[str], smoke: bool) -> dict[str, Any]:
    """Results by case; one that fails does not stop the others."""
    results: dict[str, Any] = {}
    one_thread = {
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }  # tiny loops on two busy cores are slower than on one
    environment = {**os.environ, **(one_thread if smoke else {})}
    for group in [names] if smoke else [[name] for name in names]:
        command = [sys.executable, __file__, "--json", "--case", *group, *["--smoke"] * smoke]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            message = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            results.update({name: {"failed": message} for name in group})
        else:
            results.update(json.loads(done.stdout.splitlines()[-1]))
        outcome = f"FAILED\n{done.stderr}" if done.returncode else "done"
        label = group[0] if len(group) == 1 else f"{len(group)} cases"
        print(
            f"{label}: {outcome} in {time.perf_counter() - start:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return results


def write(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.md").write_text(render(report))
    (folder / "cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {folder / 'cpu.md'} and {folder / 'cpu.json'}")


def _chosen(names: list[str], wanted: list[str] | None) -> list[str]:
    if not wanted:
        return names
    unknown = [
        w for w in wanted if not any(name == w or name.startswith(f"{w}.") for name in names)
    ]
    if unknown:
        raise SystemExit(f"There is no case {unknown[0]}; cases are {', '.join(names)}.")
    return [name for name in names if any(name == w or name.startswith(f"{w}.") for w in wanted)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--only", nargs="+", metavar="NAMES", help="cases, or groups such as step2 or growth.plain"
    )
    parser.add_argument("--output", type=Path, help="folder for cpu.md and cpu.json")
    parser.add_argument(
        "--case", nargs="+", metavar="NAMES", help="measure in this process and print the numbers"
    )
    parser.add_argument("--json", action="store_true", help="the numbers on one line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
