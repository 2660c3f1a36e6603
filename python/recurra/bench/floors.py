"""The least time that this machine needs for a case: bytes over its measured bandwidth, or
operations over their measured rates."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

# Floats per nanosecond are measured over this long, in every round of a case.
_PROBE_MS = 4.0


@dataclasses.dataclass(frozen=True)
class Floor:
    """What a case has to move and to compute at least.

    Attributes:
        bytes: read and written.
        footprint: bytes of the distinct memory that this touches.
        work: elements for each loop of ``recurra._native.rate``; ``fma`` stands for one vector
            operation of any kind.
    """

    bytes: int = 0
    footprint: int = 0
    work: dict[str, int] = dataclasses.field(default_factory=dict)

    def seconds(self, measured: dict[str, float]) -> float:
        """The floor by the medians of :meth:`probes`: memory or arithmetic, whichever is longer."""
        moving = self.bytes / bandwidth(measured) if self.bytes else 0.0
        computing = sum(count / measured[loop] * 1e-9 for loop, count in self.work.items())
        return max(moving, computing)

    def probes(self) -> dict[str, Callable[[], float]]:
        """The measurements that :meth:`seconds` needs."""
        native = module()
        probes: dict[str, Callable[[], float]] = {
            loop: (lambda loop=loop: native.rate(loop, _PROBE_MS)) for loop in self.work
        }
        if self.bytes:
            probes |= stream_probes(self.footprint)
        return probes


def module():
    """``recurra._native`` with the instruction set and threads of ``torch.ops.recurra``."""
    try:
        from recurra import _native
    except ImportError as error:
        raise RuntimeError(
            "recurra bench measures its floors with recurra._native, which is not built: install "
            f"pybind11 and recurra again ({error})"
        ) from error
    _native.isa(torch.ops.recurra._isa())
    _native.threads(torch.ops.recurra._threads())
    return _native


def stream_probes(footprint: int) -> dict[str, Callable[[], float]]:
    """Bytes per second of c = 3 a + b over ``footprint`` bytes, with plain and streaming stores."""
    native = module()
    count = max(footprint // 12, 1 << 12)
    # Tensors, because their memory is aligned and mapped as that of the ops.
    arrays = [torch.ones(count).numpy() for _ in range(3)]

    def probe(kind: str) -> Callable[[], float]:
        def run() -> float:
            # Twice the arrays where they are small, so that a clock tick does not matter.
            passes = 1 + (8 << 20) // (12 * count)
            return 12 * count * passes / sum(native.stream(kind, *arrays) for _ in range(passes))

        return run

    return {kind: probe(kind) for kind in ("triad", "triad_past_caches")}


def bandwidth(measured: dict[str, float]) -> float:
    """Bytes per second: the better of the two kinds of stores."""
    return max(measured["triad"], measured["triad_past_caches"])


def describe(measured: dict[str, float]) -> str:
    """The measurements in words, for the line of the floor."""
    parts = []
    if "triad" in measured:
        better = max(("triad", "triad_past_caches"), key=measured.__getitem__)
        how = "plain" if better == "triad" else "streaming"
        parts.append(f"{measured[better] * 1e-9:.1f} GB/s ({how} stores)")
    for loop, value in measured.items():
        if loop == "fma":
            parts.append(f"fma {2 * value:.0f} GFLOP/s")
        elif not loop.startswith("triad"):
            parts.append(f"{loop} {value:.1f}/ns")
    return ", ".join(parts)


def cpu_model() -> str:
    """The processor's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """What to name beside a figure."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.ops.recurra._threads(),
        "isa": torch.ops.recurra._isa(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }


def ceilings(milliseconds: float = 20.0) -> dict[str, object]:
    """Every rate on one thread and on all, the bandwidth at several footprints, and exp2's error.

    The loop of the exponential must reach a fourteenth of the multiply-add rate, or the floors
    that it sets would be too easy.
    """
    native = module()
    every = native.threads()
    loops = ("fma", "exp2", "exp", "sigmoid", "tanh", "softplus", "silu")
    out: dict[str, object] = {}

    def best(loop: str) -> float:
        return max(native.rate(loop, milliseconds) for _ in range(5))

    try:
        native.threads(1)
        out["one"] = {loop: best(loop) for loop in loops}
    finally:
        native.threads(every)
    out["all"] = {loop: best(loop) for loop in loops}
    out["exp2_ulp"] = native.exp2_max_ulp()
    out["exp2_operations"] = {k: out[k]["fma"] / out[k]["exp2"] for k in ("one", "all")}
    out["bandwidth"] = {}
    for mebibytes in (6, 24, 192, 768):
        arrays = [torch.ones((mebibytes << 20) // 12).numpy() for _ in range(3)]
        row = {}
        for kind, size in (("triad", 12), ("triad_past_caches", 12), ("read", 4)):
            native.stream(kind, *arrays)
            best_time = min(native.stream(kind, *arrays) for _ in range(7))
            row[kind] = size * arrays[0].size / best_time
        out["bandwidth"][mebibytes] = row
    return out
