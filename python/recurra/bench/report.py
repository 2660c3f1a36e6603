"""Runs cases and prints them: floor, time, fraction, ratio to each target, peers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from recurra.bench import floors
from recurra.bench.cases import AXES, Built, Case, Measured, Target
from recurra.bench.timing import interleave, keep_memory_warm


def header(warm: bool) -> dict[str, object]:
    """Prints and returns what the figures belong to."""
    about = floors.machine() | {"warm_memory": warm and keep_memory_warm()}
    print(
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['isa']}, "
        f"torch {about['torch']}, load {about['load']:.1f}"
    )
    print(
        "memory: freed blocks stay in the process, for every package timed here"
        if about["warm_memory"]
        else "memory: large blocks go back to the system and are mapped anew on every call"
    )
    if about["load"] > 0.3 * about["cores"]:
        print("the machine is busy: times are upper bounds, and floors are too high as well")
    return about


def print_rates() -> dict[str, object]:
    """The ceilings of this machine, best of several runs."""
    rates = floors.ceilings()
    print(f"\n{'values per ns':26}{'1 thread':>12}{'all threads':>14}")
    for loop in rates["one"]:
        print(f"  {loop:24}{rates['one'][loop]:12.2f}{rates['all'][loop]:14.2f}")
    one, every = (2 * rates[k]["fma"] for k in ("one", "all"))
    print(f"  {'fma, GFLOP/s':24}{one:12.1f}{every:14.1f}")
    print(
        f"exp2 takes as long as {rates['exp2_operations']['one']:.1f} multiply-adds on one thread "
        f"and {rates['exp2_operations']['all']:.1f} on all, at most 14: "
        f"{_verdict(max(rates['exp2_operations'].values()) <= 14)}; "
        f"its largest error is {rates['exp2_ulp']:.2f} ulp"
    )
    print(f"\n{'GB/s at a footprint of':26}{'triad':>12}{'streaming':>14}{'read':>10}")
    for mebibytes, row in rates["bandwidth"].items():
        figures = [row[k] * 1e-9 for k in ("triad", "triad_past_caches", "read")]
        # What is read is one array of three.
        print(f"  {mebibytes:>4} MiB{'':16}{figures[0]:12.1f}{figures[1]:14.1f}{figures[2]:10.1f}")
    return rates


def run(case: Case, with_peers: bool, repeat: int) -> dict[str, object]:
    """Verifies and times a case, prints it and returns what was printed.

    Raises:
        AssertionError: a result is wrong.
    """
    print(f"\n{_title(case)}")
    if case.missing:
        print("  not available: this build of recurra does not have the op")
        return {"case": case.name, "available": False}
    torch.manual_seed(0)
    start = time.perf_counter()
    built = case.build(with_peers)
    if isinstance(built, list):
        return _measured(case, built)
    fraction = built.verify()
    print(
        f"  verified against float64, largest error {fraction:.2f} of what is allowed "
        f"({time.perf_counter() - start:.1f} s)"
    )
    probes = built.floor.probes() if built.floor else {}
    times, measured = interleave(built.runs | built.peers, probes, repeat)
    seconds = {name: t.median / built.calls for name, t in times.items() if name in built.runs}
    seconds |= {name: t.median for name, t in times.items() if name not in built.runs}
    out: dict[str, object] = {
        "case": case.name,
        "available": True,
        "error_of_allowed": fraction,
        "seconds": seconds,
        "runs": {name: len(t.runs) for name, t in times.items()},
        "measured": measured,
        "absent_peers": built.absent,
    }
    if built.floor:
        out["floor"] = seconds["floor"] = built.floor.seconds(measured)
        print(f"  {'floor':28}{_time(seconds['floor']):>12}  {floors.describe(measured)}")
    out["targets"] = _print_times(case, built, seconds, out["runs"])
    return out


def _print_times(case: Case, built: Built, seconds: dict, runs: dict) -> list[dict[str, object]]:
    results = []
    for name in (*built.runs, *built.peers):
        if name == "recurra":
            words = f"{seconds['floor'] / seconds[name]:.0%} of the floor" if built.floor else ""
            if built.calls > 1:
                words = "a call"
        elif name in built.runs:
            words = f"{seconds[name] / seconds['recurra']:.2f} x ours"
        else:
            words = f"{seconds[name] / seconds['recurra']:.1f} x ours"
            words += f", {runs[name]} runs" if runs[name] < 7 else ""
        line = f"  {name:28}{_time(seconds[name]):>12}  {words}"
        for target in case.targets:
            if target.time == name:
                line += f"; {_judge(target, seconds, results)}"
        print(line)
    for name, reason in built.absent.items():
        print(f"  {name:28}{'':>12}  {reason}")
    return results


def _judge(target: Target, seconds: dict[str, float], results: list) -> str:
    divisor = 1e-6 if target.over == "microseconds" else seconds[target.over]
    ratio = seconds[target.time] / divisor
    met = ratio >= target.limit if target.at_least else ratio <= target.limit
    results.append(
        {
            "what": f"{target.time} / {target.over}",
            "ratio": ratio,
            "limit": target.limit,
            "at_least": target.at_least,
            "met": met,
        }
    )
    bound = "at least" if target.at_least else "at most"
    if target.over == "floor":
        return f"{ratio:.2f} x floor, {bound} {target.limit:.2f} ({_verdict(met)})"
    return f"{bound} {target.limit:g} ({_verdict(met)})"


def _measured(case: Case, values: list[Measured]) -> dict[str, object]:
    targets = []
    for m in values:
        if m.limit is None:
            print(f"  {m.value:.3g} {m.unit}: {m.text}")
            continue
        met = m.value >= m.limit if m.at_least else m.value <= m.limit
        bound = "at least" if m.at_least else "at most"
        print(f"  {m.value:.3g} {m.unit}, {bound} {m.limit:g} ({_verdict(met)}): {m.text}")
        targets.append(
            {
                "what": m.unit,
                "ratio": m.value,
                "limit": m.limit,
                "at_least": m.at_least,
                "met": met,
            }
        )
    return {"case": case.name, "available": True, "targets": targets}


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _title(case: Case) -> str:
    if not case.shape:
        return f"{case.op} {case.kind}".rstrip()
    axes = case.axes or AXES[case.op]
    axes = axes if len(case.shape) == len(axes) else ("B", "D")
    sizes = ", ".join(map(str, case.shape))
    return f"{case.op} {case.kind}, ({', '.join(axes)}) = ({sizes})"


def summary(results: list[dict[str, object]]) -> list[str]:
    """Prints how many targets are met, and names the others, which it returns."""
    judged = [(r["case"], t) for r in results for t in r.get("targets", ())]
    missed = [
        f"{name}: {t['what']} is {t['ratio']:.3g}, {_limit(t)}"
        for name, t in judged
        if not t["met"]
    ]
    absent = [r["case"] for r in results if not r["available"]]
    print(f"\n{len(judged) - len(missed)} of {len(judged)} targets met")
    for line in missed:
        print(f"  missed  {line}")
    if absent:
        print(f"  not available  {', '.join(absent)}")
    return missed


def _limit(target: dict[str, object]) -> str:
    return f"{'at least' if target['at_least'] else 'at most'} {target['limit']:.3g}"


def write_json(path: str, about: dict, rates: dict | None, results: list[dict]) -> None:
    """Everything that was printed, for a machine to read."""
    data = {"date": time.strftime("%Y-%m-%d"), "machine": about, "rates": rates, "cases": results}
    Path(path).write_text(json.dumps(data, indent=1) + "\n")
