"""Checks a built wheel as a user would receive it; anything that is not expected is a failure.

    python ci/audit_wheel.py dist/recurra-0.1.0-*.whl [--source DIR] [--build DIR]

--source and --build name folders whose paths must not appear in the binaries.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

MIB = 1 << 20
LIMITS = {"_ops_cpu.so": 20 * MIB, "_ops_cuda.so": 100 * MIB}
OTHER_LIMIT = 4 * MIB  # the pybind11 module
WHEEL_LIMIT = {False: 20 * MIB, True: 120 * MIB}  # without and with the CUDA library
NEEDED = re.compile(
    r"(libtorch_cpu\.so|libgomp\.so\.1|libstdc\+\+\.so\.6|libm\.so\.6|libc\.so\.6|libgcc_s\.so\.1"
    r"|ld-linux[\w.-]*\.so\.\d)"
)
# Besides the module, what the C++ runtime wants to find once in the process, type information and
# statics of std, and what old linkers put everywhere.
EXPORTED = re.compile(
    r"PyInit__native|_ZT[ISV]N?K?St\w*|_ZGV(Z?N)?K?St\w*|_ZZ?N?K?St\w*|__bss_start|_edata|_end"
)
LIBRARIES = re.compile(r"_ops_cpu\.so|_ops_cuda\.so|_native[\w.-]*\.so")
EXPECTED = re.compile(
    r"recurra/([\w/-]+\.pyi?|py\.typed)"
    r"|recurra-[\w.]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE)"
)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_names(names: list[str]) -> list[str]:
    """The problems of the list of files in the wheel."""
    problems = []
    libraries = set()
    for name in names:
        path = PurePosixPath(name)
        rest = "/".join(path.parts[1:])
        if path.is_absolute() or ".." in path.parts:
            problems.append(f"{name} leaves the folder that it is installed in")
        elif path.parts[0] == "recurra" and LIBRARIES.fullmatch(rest):
            libraries.add(rest)
        elif not EXPECTED.fullmatch(name):
            problems.append(f"{name} is not expected in the wheel")
    if "_ops_cpu.so" not in libraries:
        problems.append("recurra/_ops_cpu.so is missing")
    return problems


def check_library(name: str, dynamic: str, segments: str, symbols: str, size: int) -> list[str]:
    """The problems of one library.

    Args:
        name: its file name.
        dynamic: what `readelf -dW` says.
        segments: what `readelf -lW` says.
        symbols: what `nm -D --defined-only` says.
        size: in bytes.
    """
    problems = []
    for needed in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        if not NEEDED.fullmatch(needed):
            problems.append(f"needs {needed}")
    if name.startswith("_ops_") and "[libtorch_cpu.so]" not in dynamic:
        problems.append("does not need libtorch_cpu.so, so that torch need not be loaded first")
    for tag in ("RPATH", "RUNPATH", "TEXTREL"):
        if f"({tag})" in dynamic:
            problems.append(f"has {tag}")
    if "GNU_RELRO" not in segments or not re.search(r"BIND_NOW|\bNOW\b", dynamic):
        problems.append("is not fully RELRO")
    if re.search(r"GNU_STACK.*RWE", segments) or "GNU_STACK" not in segments:
        problems.append("has an executable stack")
    if re.search(r"LOAD.*RWE", segments):
        problems.append("has a segment that is writable and executable")
    for line in symbols.splitlines():
        symbol = line.split()[-1].split("@")[0]
        if not EXPORTED.fullmatch(symbol):
            problems.append(f"exports {symbol}")
    if size > LIMITS.get(name, OTHER_LIMIT):
        problems.append(f"has {size} bytes, at most {LIMITS.get(name, OTHER_LIMIT)} are allowed")
    return [f"{name} {problem}" for problem in problems]


def check_paths(name: str, content: bytes, folders: list[str]) -> list[str]:
    """Paths of the machine that built a library, in its strings."""
    problems = []
    for folder in folders:
        if folder.encode() in content:
            problems.append(f"{name} contains the path {folder}")
    if found := re.search(rb"/(home|root|Users|tmp|build|work)/[\w./+-]{3,}", content):
        problems.append(f"{name} contains the path {found[0].decode()}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks a wheel.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--source", help="the folder of the sources")
    parser.add_argument("--build", help="the folder of the build")
    args = parser.parse_args()
    folders = [folder for folder in (args.source, args.build) if folder]
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(args.wheel) as wheel:
        names = wheel.namelist()
        problems = check_names(names)
        size = args.wheel.stat().st_size
        limit = WHEEL_LIMIT["recurra/_ops_cuda.so" in names]
        if size > limit:
            problems.append(f"the wheel has {size} bytes, at most {limit} are allowed")
        print(f"audit: {args.wheel.name}, {size / MIB:.2f} MiB, {len(names)} files")
        for name in names:
            if not name.endswith(".so"):
                continue
            path = wheel.extract(name, scratch)
            content = Path(path).read_bytes()
            base = PurePosixPath(name).name
            print(f"audit: {base} {len(content) / MIB:.2f} MiB")
            problems += check_library(
                base,
                run("readelf", "-dW", path),
                run("readelf", "-lW", path),
                run("nm", "-D", "--defined-only", path),
                len(content),
            )
            problems += check_paths(base, content, folders)
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    print("audit: " + (f"{len(problems)} problems" if problems else "clean"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
