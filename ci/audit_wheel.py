"""Checks a built wheel as a user would receive it; anything that is not expected is a failure, and
so is anything that cannot be told.

    python ci/audit_wheel.py dist/recurra-0.1.0-cp311-*.whl --source . --build build/cp311-... \\
        [--without-cuda] [--platform manylinux_2_28]

--source is the tree that it was built from; --build the folder that it was built in, whose
libraries still have the names of their functions; --without-cuda says that there was no nvcc;
--platform is what the platform tag must start with. Needs binutils, and torch-abi-audit from pip.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

MIB = 1 << 20
LIMITS = {
    "_ops_cpu.so": 20 * MIB,
    "_ops_cuda.so": 2 * MIB,
    "_xla_cuda.so": 2 * MIB,
    "librecurra.so": 20 * MIB,
    "librecurra_cuda.so": 40_000_000,
}
# What is linked to librecurra_cuda.so and finds it beside, wherever the package lies.
ON_CUDA_KERNELS = ("_ops_cuda.so", "_xla_cuda.so")
WITH_KERNELS = ("_ops_cpu.so", "librecurra.so")
OTHER_LIMIT = 20 * MIB  # the pybind11 module, which has the kernels too
WHEEL_LIMIT = {False: 20 * MIB, True: 120 * MIB}  # without and with the CUDA library
# What torch brings, and what glibc is made of, in one piece or, before 2.34, in several.
NEEDED = re.compile(
    r"(libtorch_cpu\.so|libgomp\.so\.1|libstdc\+\+\.so\.6|libm\.so\.6|libc\.so\.6|libgcc_s\.so\.1"
    r"|libdl\.so\.2|libpthread\.so\.0|librt\.so\.1|ld-linux[\w.-]*\.so\.\d)"
)
# Besides the module, what the C++ runtime wants to find once in the process, type information and
# statics of std, and what old linkers put everywhere.
EXPORTED = re.compile(
    r"PyInit__native|_ZT[ISV]N?K?St\w*|_ZGV(Z?N)?K?St\w*|_ZZ?N?K?St\w*|__bss_start|_edata|_end"
)
# What some are there for. librecurra.so: functions of the namespace, but not one for each
# instruction set.
EXPORTED_BY = {
    "librecurra.so": re.compile(r"_ZN7recurra(?!4avx2|6avx512|6scalar)\d+[a-z_\d]+E\w+"),
    "librecurra_cuda.so": re.compile(r"_ZN7recurra4cuda\d+[a-z_\d]+(B5cxx11)?E\w+"),
    "_xla_cuda.so": re.compile(r"recurra_xla_cuda|recurra_cuda_status"),
}
DIST_INFO = (
    "METADATA",
    "RECORD",
    "WHEEL",
    "entry_points.txt",
    "licenses/LICENSE",
    "sboms/recurra.cdx.json",
)
# What find_package(recurra) reads.
CMAKE = ("config", "config-version", "targets", "targets-release")
# csrc/NAME/NAME.h, every header of these folders, and what recurra.jit compiles.
HEADERS = re.compile(
    r"csrc/((cells|cuda|math|simd)/[\w.]+\.h|[\w.]+\.h|(\w+)/\3\.h|rnn/[\w.]+|parallel\.cpp)"
)
MACHINES = {"x86_64": "X86-64", "aarch64": "AArch64"}
# Instructions that older machines lack: with a VEX or EVEX prefix, all of those that begin with v.
WIDE = re.compile(
    r"\t(v[a-z]\w*|k(add|and|mov|not|or|shift|test|unpck|xn?or)\w*"
    r"|andn|bextr|bls(i|msk|r)|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx)\b.*|.*%[yz]mm\d.*"
)
MIN_TORCH = "2.11.0"


class Name(NamedTuple):
    """What the name of a wheel says."""

    version: str
    python: str
    platform: str

    @property
    def machine(self) -> str:
        return next((m for m in MACHINES if self.platform.endswith(m)), "")

    @property
    def native(self) -> str:
        python = self.python.removeprefix("cp")
        return f"_native.cpython-{python}-{self.machine}-linux-gnu.so"


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse_name(filename: str) -> Name | None:
    match = re.fullmatch(r"recurra-([\w.]+)-(cp3\d+)-\2-([\w.]+)\.whl", filename)
    name = Name(match[1], match[2], match[3]) if match else None
    return name if name and name.machine else None


def source_files(root: Path) -> list[str]:
    """The files of a tree that git does not ignore, with slashes; or, without git, all of them."""
    if (root / ".git").exists():
        # In a container the tree belongs to somebody else, which git would refuse.
        git = ("git", "-c", "safe.directory=*", "-C", str(root))
        names = run(*git, "ls-files", "-co", "--exclude-standard").splitlines()
    else:
        names = [str(path.relative_to(root)) for path in root.rglob("*.*")]
    cache = re.compile(r"(^|/)(__pycache__|build)/")
    return [name for name in names if (root / name).is_file() and not cache.search(name)]


def expected_files(tree: Iterable[str], name: Name, cuda: bool) -> set[str]:
    """The files of a wheel, from those of the tree that it was built from."""
    files = {f"recurra-{name.version}.dist-info/{file}" for file in DIST_INFO}
    files |= {"recurra/_ops_cpu.so", f"recurra/{name.native}", "recurra/lib/librecurra.so"}
    files |= {f"recurra/lib/cmake/recurra/recurra-{file}.cmake" for file in CMAKE}
    files.add("recurra/include/recurra/simd/flags.txt")
    if cuda:
        files |= {f"recurra/{file}" for file in (*ON_CUDA_KERNELS, "lib/librecurra_cuda.so")}
    for path in tree:
        if path.startswith("python/recurra/"):
            files.add(path.removeprefix("python/"))
        elif HEADERS.fullmatch(path):
            files.add(f"recurra/include/recurra/{path.removeprefix('csrc/')}")
    return files


def check_names(names: list[str], expected: set[str]) -> list[str]:
    """The problems of the list of files in the wheel."""
    problems = [f"{name} is missing" for name in sorted(expected - set(names))]
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            problems.append(f"{name} leaves the folder that it is installed in")
        elif name.endswith("/") and any(file.startswith(name) for file in expected):
            continue  # auditwheel lists folders too
        elif name not in expected:
            problems.append(f"{name} is not expected in the wheel")
        elif names.count(name) > 1:
            problems.append(f"{name} is in the wheel {names.count(name)} times")
    return problems


def check_record(record: str, contents: dict[str, bytes]) -> list[str]:
    """Whether RECORD lists every file with its hash and size."""
    rows = {row[0]: row[1:] for row in csv.reader(record.splitlines()) if row}
    problems = [f"RECORD lists {name}, which is not there" for name in rows.keys() - contents]
    for name, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        if name.endswith(".dist-info/RECORD"):
            continue
        if rows.get(name) != [f"sha256={digest}", str(len(content))]:
            problems.append(f"RECORD has not the hash and size of {name}")
    return problems


def check_sbom(text: str, version: str, cuda: bool) -> list[str]:
    """The problems of the list of what is inside."""
    try:
        sbom = json.loads(text)
        own = sbom["metadata"]["component"]
        parts = {part["name"]: part["version"] for part in sbom["components"]}
        form = (sbom["bomFormat"], sbom["specVersion"])
        named = (own["name"], own["version"])
        linked = sbom["dependencies"][0]["dependsOn"]
    except (ValueError, LookupError, TypeError) as error:
        return [f"the SBOM is not in CycloneDX: {error!r}"]
    problems = []
    if form != ("CycloneDX", "1.6"):
        problems.append(f"the SBOM is in {form}, not in CycloneDX 1.6")
    if named != ("recurra", version):
        problems.append(f"the SBOM is of {named}, not of recurra {version}")
    for part in ("torch", "pybind11", *(["cudart_static"] if cuda else [])):
        if not re.fullmatch(r"\d+\.\d+[\w.+]*", str(parts.get(part))):
            problems.append(f"the SBOM does not name the version of {part}")
    if not cuda and "cudart_static" in parts:
        problems.append("the SBOM names cudart_static, which is not there")
    if len(linked) != len(parts):
        problems.append("the SBOM's dependencies are not its components")
    if "timestamp" in sbom["metadata"] or "serialNumber" in sbom:
        problems.append("the SBOM is another one in every build")
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
        beside = name in ON_CUDA_KERNELS and needed == "librecurra_cuda.so"
        if not NEEDED.fullmatch(needed) and not beside:
            problems.append(f"needs {needed}")
    if name.startswith("_ops_") and "[libtorch_cpu.so]" not in dynamic:
        problems.append("does not need libtorch_cpu.so, so that torch need not be loaded first")
    if not name.startswith("_ops_") and "torch" in dynamic:
        problems.append("needs torch")
    places = re.findall(r"\((RPATH|RUNPATH)\).*\[(.*)\]", dynamic)
    if name in ON_CUDA_KERNELS:
        if not any(path == "$ORIGIN/lib" for _, path in places):
            problems.append("does not look for librecurra_cuda.so where that is")
        places = [(tag, path) for tag, path in places if path != "$ORIGIN/lib"]
    problems += [f"has {tag} {path}" for tag, path in places]
    if "(TEXTREL)" in dynamic:
        problems.append("has TEXTREL")
    if "GNU_RELRO" not in segments or not re.search(r"BIND_NOW|\bNOW\b", dynamic):
        problems.append("is not fully RELRO")
    if re.search(r"GNU_STACK.*RWE", segments) or "GNU_STACK" not in segments:
        problems.append("has an executable stack")
    if re.search(r"LOAD.*RWE", segments):
        problems.append("has a segment that is writable and executable")
    for line in symbols.splitlines():
        symbol = line.split()[-1].split("@")[0]
        own = name in EXPORTED_BY and EXPORTED_BY[name].fullmatch(symbol)
        if not own and not EXPORTED.fullmatch(symbol):
            problems.append(f"exports {symbol}")
    if size > LIMITS.get(name, OTHER_LIMIT):
        problems.append(f"has {size} bytes, at most {LIMITS.get(name, OTHER_LIMIT)} are allowed")
    return [f"{name} {problem}" for problem in problems]


def check_machine(name: str, header: str, machine: str) -> list[str]:
    """Whether `readelf -h` names the machine of the wheel's tag."""
    found = re.search(r"Machine:\s+(.*)", header)
    if found and found[1].endswith(MACHINES[machine]):
        return []
    return [f"{name} is for {found[1] if found else 'nobody knows what'}, not for {machine}"]


def check_code(name: str, code: str) -> list[str]:
    """Instructions that a machine may lack, where nothing has asked whether it has them.

    Args:
        name: of the library.
        code: what `objdump -d` says of it, with the names of the functions.
    """
    problems = []
    function = "no function"
    seen = set()
    for line in code.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1].removesuffix(">:")
            if isa := re.search(r"7recurra(4avx2|6avx512|6scalar)?", function):
                seen.add(isa[1] or "recurra")
        elif (found := WIDE.search(line)) and not re.search(r"7recurra(4avx2|6avx512)", function):
            problems.append(f"{name}: {found[0].strip()} in {function}, which must run anywhere")
    kernels = name in WITH_KERNELS or name.startswith("_native.")
    wanted = {"4avx2", "6avx512", "6scalar"} if kernels else set()
    if not wanted <= seen or not seen:
        problems.append(f"{name}: its functions have no names, so what may run cannot be told")
    return problems[:10]


def named_twin(name: str, text: bytes, build: Path | None, scratch: Path) -> Path | None:
    """The library in the build folder with the very code of the wheel's, which is stripped."""
    for path in sorted(build.rglob(name)) if build else []:
        if section(path, scratch) == text:
            return path
    return None


def section(library: Path, scratch: Path) -> bytes:
    """The machine code of a library."""
    out = scratch / "text"
    out.unlink(missing_ok=True)
    run("objcopy", "-O", "binary", "--only-section=.text", str(library), str(out))
    return out.read_bytes()


def check_torch(report: str, libraries: list[str]) -> list[str]:
    """Whether `torch-abi-audit --json` finds only the stable ABI of torch 2.11 in every library."""
    try:
        said = json.loads(report)
        found = {
            PurePosixPath(library["path"]).name: library
            for package in said.get("packages", [said])  # of a single library there is no list
            for library in package["extensions"] + package["bundled_libs"]
        }
        verdicts = {
            name: (entry["torch"]["stable"], entry["torch"]["min_torch_version"], entry["error"])
            for name, entry in found.items()
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"torch-abi-audit says nothing that can be read: {error!r}"]
    return [
        f"{name}: (stable, least torch, error) is {verdicts.get(name)}"
        for name in libraries
        if verdicts.get(name) != (True, MIN_TORCH, None)
    ]


def check_paths(name: str, content: bytes, folders: list[str]) -> list[str]:
    """Paths of the machine that built a library, in its strings."""
    problems = []
    for folder in folders:
        if folder.encode() in content:
            problems.append(f"{name} contains the path {folder}")
    if found := re.search(rb"/(home|root|Users|tmp|build|work)/[\w./+-]{3,}", content):
        problems.append(f"{name} contains the path {found[0].decode()}")
    return problems


def check_libraries(args: argparse.Namespace, name: Name, scratch: Path) -> list[str]:
    """The problems of the libraries under `scratch`."""
    problems = []
    libraries = sorted(scratch.rglob("*.so"))
    for path in libraries:
        print(f"audit: {path.name} {path.stat().st_size / MIB:.2f} MiB")
        problems += check_library(
            path.name,
            run("readelf", "-dW", str(path)),
            run("readelf", "-lW", str(path)),
            run("nm", "-D", "--defined-only", str(path)),
            path.stat().st_size,
        )
        problems += check_machine(path.name, run("readelf", "-hW", str(path)), name.machine)
        if name.machine != "x86_64":
            continue  # the scalar form alone, in the instructions that every such machine has
        twin = named_twin(path.name, section(path, scratch), args.build, scratch)
        if twin is None:
            problems.append(f"{path.name}: not in the build folder, so what may run is unknown")
        else:
            code = run("objdump", "-d", "--no-show-raw-insn", str(twin))
            problems += check_code(path.name, code)
    ops = [path for path in libraries if path.name.startswith("_ops_")]
    beside = Path(sysconfig.get_path("scripts")) / "torch-abi-audit"
    command = str(beside) if beside.exists() else "torch-abi-audit"
    # Its exit code says less than its report.
    report = subprocess.run(
        [command, "--json", *map(str, ops)], check=False, capture_output=True, text=True
    )
    return problems + check_torch(report.stdout, [path.name for path in ops])


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks a wheel.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--source", type=Path, required=True, help="the tree of the sources")
    parser.add_argument("--build", type=Path, help="the folder of the build")
    parser.add_argument("--without-cuda", action="store_true", help="there was no nvcc")
    parser.add_argument("--platform", default="", help="what the platform tag must start with")
    args = parser.parse_args()
    cuda = not args.without_cuda
    name = parse_name(args.wheel.name)
    if name is None:
        sys.exit(f"audit: {args.wheel.name} is no name of a wheel of recurra")
    problems = []
    # auditwheel may find that an older C library does as well, and then says both.
    tags = name.platform.split(".")
    if not any(tag.startswith(args.platform) for tag in tags):
        problems.append(f"the platform is {name.platform}, not {args.platform}")
    version = re.search(
        r'__version__ = "(.*)"', (args.source / "python/recurra/__init__.py").read_text()
    )
    if not version or version[1] != name.version:
        problems.append(f"the version is {name.version}, not that of the sources")
    size, limit = args.wheel.stat().st_size, WHEEL_LIMIT[cuda]
    if size > limit:
        problems.append(f"the wheel has {size} bytes, at most {limit} are allowed")
    tree = source_files(args.source)
    folders = [str(folder.resolve()) for folder in (args.source, args.build) if folder]
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(args.wheel) as wheel:
        names = wheel.namelist()
        print(f"audit: {args.wheel.name}, {size / MIB:.2f} MiB, {len(names)} entries")
        problems += check_names(names, expected_files(tree, name, cuda))
        names = [file for file in names if not file.endswith("/")]
        contents = {file: wheel.read(file) for file in names}
        for file, content in contents.items():
            problems += check_paths(file, content, folders) if file.endswith(".so") else []
            if file.endswith("/RECORD"):
                problems += check_record(content.decode(), contents)
            if file.endswith(".cdx.json"):
                problems += check_sbom(content.decode(), name.version, cuda)
        scratch = Path(temporary)
        for file in names:
            if file.endswith(".so"):
                wheel.extract(file, scratch)
        problems += check_libraries(args, name, scratch)
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    print("audit: " + (f"{len(problems)} problems" if problems else "clean"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
