"""The highest resident size of a process while something runs.

    with PeakMemory() as memory:
        ...
    memory.grown  # bytes above the resident size on entering

Another process samples: compiled loops hold the interpreter lock, so that a thread of the same
process would miss what they allocate and free. Run as a script, this file is that other process.
"""

import contextlib
import ctypes
import gc
import select
import subprocess
import sys
from pathlib import Path

import psutil

_INTERVAL = 0.002


class PeakMemory:
    """Context manager; memory freed earlier is given back first: it would hide growth."""

    before = 0
    """Resident bytes on entering."""
    peak = 0
    """Highest resident bytes until leaving."""

    @property
    def grown(self) -> int:
        return max(0, self.peak - self.before)

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        # glibc keeps freed memory, and has this call to give it back
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        process = psutil.Process()
        command = [sys.executable, str(Path(__file__)), str(process.pid)]
        self._sampler = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._sampler.stdout is not None
        self._sampler.stdout.readline()  # it is ready
        self.before = process.memory_info().rss
        return self

    def __exit__(self, *exception: object) -> None:
        answer, _ = self._sampler.communicate("stop\n")
        self.peak = int(answer)


def _sample(pid: int) -> None:
    """Sample until a line comes on stdin, then print the peak."""
    process = psutil.Process(pid)
    peak = 0
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], _INTERVAL)[0]:
        peak = max(peak, process.memory_info().rss)
    print(peak, flush=True)


if __name__ == "__main__":
    _sample(int(sys.argv[1]))
