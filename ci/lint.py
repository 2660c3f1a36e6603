"""What a review would otherwise have to look for, checked by `python ci/lint.py` from any folder.

    python ci/lint.py                   ruff, clang-format and the rules below on every source
    python ci/lint.py --objects DIR     the object files of a build in DIR

The rules for sources are in check_text(), those for objects in check_object().
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 600
MAX_KERNELS = 120  # per instruction set
LIMITED = (".py", ".cpp", ".h", ".cu", ".cuh")
CODE = (*LIMITED, ".sh", ".toml", ".cmake", ".txt", ".yml", ".yaml")
# These two name what they forbid.
SELF = ("ci/lint.py", "tests/test_lint.py")

INTRINSICS = re.compile(
    r"\b_mm\d*_\w+|\b__m(128|256|512)\w*|immintrin|x86intrin|arm_neon|\bcpuid\b|__builtin_cpu_"
    r"|__attribute__\s*\(\(\s*target"
)
MACHINE_FLAGS = re.compile(
    r"(?<![\w-])-m(avx|sse|fma|f16c|bmi|arch|tune|cpu|prefer-vector)[\w=.-]*"
)
FAST_MATH = re.compile(
    r"-ffast-math|-Ofast|-funsafe-math|-fassociative-math|-freciprocal-math"
    r"|-ffinite-math-only|use_fast_math"
)
UNSAFE = {
    "pickle": re.compile(
        r"\b(import|from)\s+(pickle|cPickle|dill|joblib|marshal|shelve)\b|pickle\."
    ),
    "torch.load(": re.compile(r"\btorch\.load\("),
    "eval(": re.compile(r"(?<![\w.])eval\("),
    "exec(": re.compile(r"(?<![\w.])exec\("),
    "yaml.load(": re.compile(r"\byaml\.load\("),
    "shell=True": re.compile(r"\bshell\s*=\s*True"),
    "trust_remote_code": re.compile(r"\btrust_remote_code\b"),
}
SWALLOWED = re.compile(r"except[^\n]*:[ \t]*(#[^\n]*)?\n?\s*pass\b")
# What a child process runs stands in strings and prints for its parent to read.
STRINGS = re.compile(r'"""[\s\S]*?"""')
PRINT = re.compile(r"(?<![\w.])print\(")
XFAIL = re.compile(r"\bxfail\b")
UNNAMED = re.compile(r"\bnamespace\s*\{")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
# An include points at its own layer or a lower one. A folder that is not named here is an op.
# csrc/torch is also compiled without torch, over csrc/native, into the module of csrc/python.
LAYERS = {"simd": 0, "math": 1, "cells": 2, "": 3, "cuda": 3, "native": 4, "torch": 5, "python": 6}
OP = 4


def layer(path: str) -> tuple[str, int]:
    """The folder under csrc of a path relative to csrc, and its layer."""
    folder = path.split("/")[0] if "/" in path else ""
    return folder, LAYERS.get(folder, OP)


def check_includes(path: str, text: str) -> list[str]:
    folder, own = layer(path.removeprefix("csrc/"))
    problems = []
    for kind, name in INCLUDE.findall(text):
        top = name.split("/")[0]
        if kind == "<":
            if own < 5 and (
                top in ("torch", "ATen", "c10", "pybind11", "xla") or name == "Python.h"
            ):
                problems.append(f"<{name}> belongs in csrc/torch and csrc/python only")
            continue
        other, theirs = layer(name)
        if theirs > own:
            problems.append(f'an include never points upward: "{name}"')
    return problems


def check_text(path: str, text: str) -> list[str]:
    """The problems of one file; `path` is relative to the root, with slashes."""
    problems = []
    lines = text.count("\n")
    if path.endswith(LIMITED) and lines > MAX_LINES:
        problems.append(f"{lines} lines, at most {MAX_LINES} are allowed")
    if path in SELF:
        return problems
    if path.endswith(CODE):
        if found := FAST_MATH.search(text):
            problems.append(f"{found[0]} changes the numbers, of the whole process even")
        if not path.startswith("csrc/simd/"):
            if found := INTRINSICS.search(text):
                problems.append(f"{found[0]}: intrinsics and CPU features belong in csrc/simd")
            allowed = (
                re.compile(r"set\(RECURRA_FLAGS_[^)]*\)") if path == "CMakeLists.txt" else None
            )
            found = MACHINE_FLAGS.search(allowed.sub("", text) if allowed else text)
            if found and not path.startswith("ci/"):  # whose programs run where they are built
                problems.append(
                    f"{found[0]}: -m flags belong in the RECURRA_FLAGS_* of CMakeLists.txt"
                )
    if path.startswith("csrc/") and path.endswith(LIMITED):
        problems += check_includes(path, text)
    if path.endswith(".cu") and UNNAMED.search(text):
        problems.append("nvcc names what is in an unnamed namespace after the file's path")
    if path.startswith("python/") and path.endswith(".py"):
        problems += [f"{name} is unsafe" for name, rule in UNSAFE.items() if rule.search(text)]
    if path.endswith(".py") and SWALLOWED.search(text):
        problems.append("`except: pass` hides failures")
    if path.startswith("tests/") and path.endswith(".py"):
        if PRINT.search(STRINGS.sub("", text)):
            problems.append("a test asserts, it does not print(")
        if XFAIL.search(text):
            problems.append("xfail hides failures")
    return problems


def check_object(path: str, isa: str | None, symbols: str, code: str) -> list[str]:
    """The problems of one object file.

    Args:
        path: its name.
        isa: the instruction set that it was compiled for, or None for the rest of the library.
        symbols: what `nm -C --defined-only` says of it.
        code: its disassembly; not looked at for avx2 and avx512.
    """
    problems = []
    if isa not in ("avx2", "avx512") and (found := re.search(r"%[yz]mm\d+", code)):
        problems.append(f"{path}: {found[0]} in code that must run on any machine")
    if isa is not None:
        # The linker keeps one of equal weak symbols, whose instructions another machine may lack.
        # What is too deep for nm to demangle names its namespace first.
        mangled = re.compile(rf"_Z(?:GV)?Z*NK?7recurra{len(isa)}{isa}\d")
        for line in symbols.splitlines():
            fields = line.split(maxsplit=2)
            if len(fields) < 3 or fields[1] not in "WVu" or fields[2].startswith("DW.ref."):
                continue
            if f"recurra::{isa}::" not in fields[2] and not mangled.match(fields[2]):
                problems.append(f"{path}: weak symbol outside recurra::{isa}: {fields[2]}")
    return problems


def kernels(isa: str, symbols: str) -> set[str]:
    """The compiled kernels among the symbols: every one starts its tasks through parallel()."""
    start = f"recurra::{isa}::parallel<"
    return {line.split(maxsplit=2)[2] for line in symbols.splitlines() if start in line}


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_objects(folder: Path) -> list[str]:
    problems: list[str] = []
    counts: dict[str, set[str]] = {}
    objects = sorted(folder.rglob("*.o"))
    if not objects:
        return [f"{folder}: no object files"]
    for path in objects:
        match = re.search(r"_(scalar|avx2|avx512)\.dir/", str(path))
        isa = match[1] if match else None
        symbols = run(["nm", "-C", "--defined-only", str(path)])
        wide = isa in ("avx2", "avx512")
        code = "" if wide else run(["objdump", "-d", "--no-show-raw-insn", str(path)])
        problems += check_object(str(path.relative_to(folder)), isa, symbols, code)
        if isa:
            counts.setdefault(isa, set()).update(kernels(isa, symbols))
    for isa, found in counts.items():
        print(f"{isa}: {len(found)} kernels, at most {MAX_KERNELS} are allowed")
        if not 0 < len(found) <= MAX_KERNELS:
            problems.append(f"{isa}: {len(found)} kernels, from 1 to {MAX_KERNELS} are allowed")
    return problems


def sources() -> list[str]:
    """The files of the tree, tracked or new, that git does not ignore."""
    listed = run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]).splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def tool(name: str) -> str:
    """The program of this Python's environment, or else of the PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        sys.exit(f"lint: {name} is missing; install the extra `test` of the package")
    return found


def passes(command: list[str]) -> bool:
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Lint of sources or of object files.")
    parser.add_argument("--objects", type=Path, metavar="DIR", help="check a build instead")
    args = parser.parse_args()
    if args.objects:
        problems = check_objects(args.objects)
    else:
        problems = []
        names = sources()
        for name in names:
            if name.endswith(CODE):
                text = (ROOT / name).read_text(encoding="utf-8")
                problems += [f"{name}: {problem}" for problem in check_text(name, text)]
        python = [name for name in names if name.endswith(".py")]
        native = [n for n in names if n.endswith((".cpp", ".h", ".cu", ".cuh"))]
        for command in (
            [tool("ruff"), "check", "--quiet", *python],
            [tool("ruff"), "format", "--quiet", "--check", *python],
            [tool("clang-format"), "--dry-run", "-Werror", *native],
        ):
            if not passes(command):
                problems.append(f"{Path(command[0]).name} found something, see above")
    for problem in problems:
        print(f"lint: {problem}", file=sys.stderr)
    print("lint: " + (f"{len(problems)} problems" if problems else "clean"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
