"""Time and memory of a training step."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.speed.peak_memory import PeakMemory

_TIME_LIMIT = 60.0
"""Seconds after which `_MIN_STEPS` are enough."""
_MIN_STEPS = 3


def measure(
    step: Callable[[], Any],
    n_steps: int,
) -> dict[str, Any]:
    """Memory of the first step, which makes the optimizer's state, then the time of n more.

    Returns:
        seconds: median of a step; all_seconds; step_bytes: peak resident size during the first step
        less that just before it; resident_bytes: that just before it.
    """
    with PeakMemory() as memory:
        step()
    times = step_times(step, n_steps)
    return {
        "seconds": statistics.median(times),
        "all_seconds": times,
        "step_bytes": memory.grown,
        "resident_bytes": memory.before,
    }


def step_times(
    step: Callable[[], Any],
    n_steps: int,
) -> list[float]:
    """Seconds of each of n calls; after a minute three are enough."""
    times: list[float] = []
    while len(times) < n_steps and not (sum(times) > _TIME_LIMIT and len(times) >= _MIN_STEPS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def process_peak_bytes() -> int:
    """Highest resident size of this process since it started."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
