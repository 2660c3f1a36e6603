"""How a time is taken: medians of runs that alternate with those of everything compared."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

_SLOW = 2.0  # seconds of a run from which three runs must do
_SHORT = 0.5  # seconds of a run up to which what ran before it matters


@dataclasses.dataclass
class Timing:
    """Seconds of every run of one thing."""

    runs: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)


_TUNABLE = "glibc.malloc.tcache_count=0:glibc.malloc.hugetlb=1"


def restart_for_warm_memory() -> None:
    """Starts this process anew, once, with glibc's cache of small blocks off and huge pages.

    The cache holds the few bytes that aligning a block splits off its front. A large block that is
    freed has then become too small for the next one of its size, and every result lies in memory
    that is new to the process. Huge pages spare all that is timed the misses of small ones, which
    differ from run to run. Only the environment of a starting process can set either.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and sys.executable and _TUNABLE not in given:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, _TUNABLE)))
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_memory_warm() -> bool:
    """Keeps freed memory in the process, as a training loop's allocator would like to.

    glibc returns every block above 32 MiB to the system, so that each large result is zeroed and
    mapped again page by page, which costs several times as much as computing it. With this, the
    times of everything that runs in this process, peers included, are those of warm memory.

    Returns:
        Whether that is so: see also :func:`restart_for_warm_memory`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_MAX = 1, -1, -4
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_MXFAST: 0}
    done = all([mallopt(k, v) for k, v in settings.items()])
    return done and _TUNABLE in os.environ.get("GLIBC_TUNABLES", "")


def interleave(
    runners: dict[str, Callable[[], object]],
    probes: dict[str, Callable[[], float]],
    repeat: int,
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Times all runners in turn, ``repeat`` rounds after a warm-up, with the probes in between.

    Args:
        runners: what is timed. One that takes longer than two seconds runs three times only.
        probes: measurements of the machine, each returning one number.
        repeat: rounds.

    Returns:
        The times of each runner and the median of each probe over the same rounds, so that a
        machine that is slow today is slow for both.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    values: dict[str, list[float]] = {name: [] for name in probes}
    rounds, short = {}, {}
    for name, run in runners.items():
        run()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        rounds[name] = repeat if seconds < _SLOW else min(repeat, 3)
        short[name] = seconds < _SHORT
    for n in range(repeat):
        for name, probe in probes.items():
            values[name].append(probe())
        for name, run in runners.items():
            if n < rounds[name]:
                if short[name]:
                    run()  # finds its own data in the caches and the threads awake, as probes do
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    return (
        {name: Timing(runs) for name, runs in times.items()},
        {name: statistics.median(v) for name, v in values.items()},
    )


def per_call(call: Callable[[], object], calls: int = 200) -> Callable[[], float]:
    """A runner of many calls; divide its time by ``calls``."""

    def run():
        for _ in range(calls):
            call()

    return run


def import_seconds(repeat: int) -> tuple[float, float]:
    """Median seconds of ``import torch``, and of ``import recurra`` after it, in new processes."""
    code = (
        "from time import perf_counter as now; start = now(); import torch; middle = now(); "
        "import recurra; print(middle - start, now() - middle)"
    )
    runs = []
    for _ in range(repeat + 1):  # the first one reads the files
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        runs.append([float(word) for word in out.stdout.split()])
    alone, beyond = (statistics.median(column) for column in zip(*runs[1:], strict=True))
    return alone, beyond
