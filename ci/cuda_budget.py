"""Holds the CUDA kernels of a build against ci/cuda_budget.txt: registers, stack and shared memory.

    python ci/cuda_budget.py BUILD            fails where a kernel spills or exceeds its budget
    python ci/cuda_budget.py BUILD --write    makes the table anew

BUILD is a build folder of the package, in which ``cmake/ptxas_report.sh`` left what ptxas said. The
table is of one architecture and one nvcc, which it names: with another nvcc, which allocates
registers otherwise, spills alone are looked for.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("cuda_budget.txt")
ARCHITECTURE = "sm_90"
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'\n.*\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)


class Use(NamedTuple):
    """What one kernel takes: registers of a thread, bytes of stack and of shared memory."""

    registers: int
    stack: int
    shared: int


def parse(text: str) -> tuple[dict[str, Use], list[str]]:
    """The kernels in what ``ptxas -v`` printed, by mangled name, and those that spill."""
    uses, spilling = {}, []
    for found in KERNEL.finditer(text):
        if found["arch"] != ARCHITECTURE:
            continue
        uses[found["name"]] = Use(
            int(found["registers"]), int(found["stack"]), int(found["shared"] or 0)
        )
        if int(found["stores"]) or int(found["loads"]):
            spilling.append(found["name"])
    return uses, spilling


def short_name(demangled: str) -> str:
    """The name without return type, parameters and the namespaces that all have."""
    depth, end = 0, len(demangled)
    for i, c in enumerate(demangled):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    return demangled[:end].removeprefix("void ").replace("recurra::", "").replace("cuda::", "")


def demangled(names: list[str]) -> list[str]:
    """Short readable names, by the C++ compiler's own tool."""
    out = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return [short_name(line) for line in out.stdout.splitlines()]


def read_table(text: str) -> tuple[str, dict[str, Use]]:
    """The nvcc of a table, and its budgets."""
    head, *rows = text.splitlines()
    budgets = {}
    for row in rows:
        if row and not row.startswith("#"):
            registers, stack, shared, name = row.split(maxsplit=3)
            budgets[name] = Use(int(registers), int(stack), int(shared))
    return head.rpartition("nvcc ")[2], budgets


def write_table(nvcc: str, uses: dict[str, Use]) -> str:
    """The text of a table."""
    lines = [
        f"# What kernels may take on {ARCHITECTURE}, from nvcc {nvcc}",
        "# registers, stack, shared memory (bytes), kernel: made by ci/cuda_budget.py --write",
    ]
    for name, use in sorted(uses.items()):
        lines.append(f"{use.registers:4} {use.stack:6} {use.shared:6}  {name}")
    return "\n".join(lines) + "\n"


def problems(
    uses: dict[str, Use], spilling: list[str], budgets: dict[str, Use] | None
) -> list[str]:
    """A sentence for each kernel that takes what it may not. Without budgets, of spills alone."""
    out = [f"{name} spills registers" for name in spilling]
    if budgets is None:
        return out
    out += [f"{name} of {TABLE.name} is not in the build" for name in budgets if name not in uses]
    for name, use in uses.items():
        budget = budgets.get(name)
        if budget is None:
            out.append(f"{name} is not in {TABLE.name}: python ci/cuda_budget.py BUILD --write")
            continue
        for what, has, may in zip(use._fields, use, budget, strict=True):
            if has > may:
                out.append(f"{name}: {what} {has}, at most {may} by {TABLE.name}")
    return out


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--write", action="store_true", help="make the table anew")
    options = parser.parse_args()
    reports = sorted(options.build.rglob("*.cu.o.ptxas"))
    if not reports:
        print("cuda budget: the build has no CUDA kernels")
        return 0
    uses: dict[str, Use] = {}
    spilling: list[str] = []
    for report in reports:
        found, spills = parse(report.read_text())
        names = dict(zip(found, demangled(list(found)), strict=True)) if found else {}
        uses |= {names[k]: v for k, v in found.items()}
        spilling += [names[k] for k in spills]
    if not uses:
        print(f"cuda budget: nothing in {len(reports)} reports of ptxas is understood")
        return 1
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    nvcc = re.search(r"release ([\d.]+)", version.stdout)[1]
    if options.write:
        TABLE.write_text(write_table(nvcc, uses))
        return 0
    of, budgets = read_table(TABLE.read_text())
    told = problems(uses, spilling, budgets if of == nvcc else None)
    for line in told:
        print(line)
    print(f"cuda budget: {len(uses)} kernels, nvcc {nvcc}" + (": clean" if not told else ""))
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
