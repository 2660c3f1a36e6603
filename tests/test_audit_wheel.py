"""Every rule of ci/audit_wheel.py finds what it is for, and no more."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "audit_wheel", Path(__file__).resolve().parent.parent / "ci" / "audit_wheel.py"
)
audit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(audit)

NAME = audit.parse_name("recurra-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl")
TREE = [
    "python/recurra/__init__.py",
    "python/recurra/ops/linear_scan.py",
    "python/recurra/py.typed",
    "csrc/view.h",
    "csrc/cells/tanh.h",
    "csrc/linear_scan/linear_scan.h",
    "csrc/linear_scan/inner.h",
    "csrc/rnn/rows.simd.cpp",
    "csrc/torch/check.h",
    "csrc/linear_scan/linear_scan.cu",
    "tests/cpp/check.h",
    "ci/lint.py",
]
EXPECTED = audit.expected_files(TREE, NAME, cuda=True)
DYNAMIC = """
 0x1 (NEEDED)  Shared library: [libtorch_cpu.so]
 0x1 (NEEDED)  Shared library: [libgomp.so.1]
 0x1 (NEEDED)  Shared library: [libpthread.so.0]
 0x1 (NEEDED)  Shared library: [ld-linux-x86-64.so.2]
 0x1e (FLAGS)  BIND_NOW
"""
SEGMENTS = """
  LOAD       0x0 0x0 0x0 0x1 0x1 R E 0x1000
  GNU_STACK  0x0 0x0 0x0 0x0 0x0 RW  0x10
  GNU_RELRO  0x1 0x1 0x1 0x1 0x1 R   0x1
"""
SYMBOLS = "0000 V _ZTISt19_Sp_make_shared_tag\n0000 T PyInit__native\n"
CODE = """
0000000000001000 <_ZN7recurra6scalar4scanEv>:
    1000:\taddss  %xmm0,%xmm1
0000000000001010 <_ZN7recurra4avx24scanEv>:
    1010:\tvaddps %ymm0,%ymm1,%ymm2
0000000000001020 <_ZZN7recurra6avx5124scanEvENKUlvE_clEv.cold>:
    1020:\tkmovw  %eax,%k1
0000000000001030 <_ZN7recurra3isaEv>:
    1030:\tmovups %xmm0,(%rax)
"""
SBOM = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "metadata": {"component": {"name": "recurra", "version": "0.1.0"}},
    "components": [
        {"name": "torch", "version": "2.13.0"},
        {"name": "pybind11", "version": "3.1.0"},
        {"name": "cudart_static", "version": "12.9.86"},
    ],
    "dependencies": [{"ref": "recurra", "dependsOn": ["a", "b", "c"]}],
}


def library(name="_ops_cpu.so", dynamic=DYNAMIC, segments=SEGMENTS, symbols=SYMBOLS, size=1000):
    return audit.check_library(name, dynamic, segments, symbols, size)


def record(**contents: bytes) -> str:
    lines = ["recurra-0.1.0.dist-info/RECORD,,"]
    for name, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
        lines.append(f"{name},sha256={digest.decode()},{len(content)}")
    return "\n".join(lines) + "\n"


def report(stable=True, least="2.11.0", error=None) -> str:
    def entry(name, stable, least, error):
        torch = {"stable": stable, "min_torch_version": least}
        return {"path": f"/x/{name}", "torch": torch, "error": error}

    good = entry("_ops_cpu.so", True, "2.11.0", None)
    other = entry("_ops_cuda.so", stable, least, error)
    return json.dumps({"packages": [{"extensions": [good], "bundled_libs": [other]}]})


def test_good_wheel_passes():
    assert audit.check_names([*EXPECTED, "recurra/", "recurra/include/"], EXPECTED) == []
    assert library() == []
    assert audit.check_paths("a.so", b"csrc/torch/check.cpp /usr/lib", ["/somewhere"]) == []
    contents = {"a": b"1", "b": b"2", "recurra-0.1.0.dist-info/RECORD": b""}
    assert audit.check_record(record(a=b"1", b=b"2"), contents) == []
    assert audit.check_sbom(json.dumps(SBOM), "0.1.0", cuda=True) == []
    assert audit.check_machine("a.so", "  Machine:  Advanced X86-64", "x86_64") == []
    assert audit.check_code("_ops_cpu.so", CODE) == []
    assert audit.check_torch(report(), ["_ops_cpu.so", "_ops_cuda.so"]) == []


def test_expected_files():
    assert {name for name in EXPECTED if "dist-info" not in name} == {
        "recurra/__init__.py",
        "recurra/ops/linear_scan.py",
        "recurra/py.typed",
        "recurra/_ops_cpu.so",
        "recurra/_ops_cuda.so",
        "recurra/_xla_cuda.so",
        "recurra/_native.cpython-311-x86_64-linux-gnu.so",
        "recurra/lib/librecurra.so",
        "recurra/lib/librecurra_cuda.so",
        "recurra/lib/cmake/recurra/recurra-config.cmake",
        "recurra/lib/cmake/recurra/recurra-config-version.cmake",
        "recurra/lib/cmake/recurra/recurra-targets.cmake",
        "recurra/lib/cmake/recurra/recurra-targets-release.cmake",
        "recurra/include/recurra/view.h",
        "recurra/include/recurra/cells/tanh.h",
        "recurra/include/recurra/linear_scan/linear_scan.h",
        "recurra/include/recurra/rnn/rows.simd.cpp",
        "recurra/include/recurra/simd/flags.txt",
    }
    without = audit.expected_files(TREE, NAME, cuda=False)
    assert EXPECTED - without == {
        "recurra/_ops_cuda.so",
        "recurra/_xla_cuda.so",
        "recurra/lib/librecurra_cuda.so",
    }


@pytest.mark.parametrize(
    "name",
    [
        "recurra/libgomp.so.1",
        "recurra/kernel.cpp",
        "recurra/empty/",
        "recurra/ops/other.py",
        "recurra/__pycache__/__init__.cpython-311.pyc",
        "recurra/include/recurra/torch/check.h",
        "recurra.libs/libx.so",
        "recurra/lib/librecurra.a",
        "recurra/_native.cpython-312-x86_64-linux-gnu.so",
        "recurra-0.1.0.dist-info/sboms/auditwheel.cdx.json",
        "recurra-0.1.0.data/scripts/run",
        "other/__init__.py",
        "../recurra/a.py",
        "/etc/a.py",
    ],
)
def test_unexpected_file(name):
    assert len(audit.check_names([*EXPECTED, name], EXPECTED)) == 1


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_missing_file(name):
    assert audit.check_names(sorted(EXPECTED - {name}), EXPECTED) == [f"{name} is missing"]


def test_a_file_twice():
    assert "2 times" in audit.check_names([*EXPECTED, "recurra/__init__.py"], EXPECTED)[0]


@pytest.mark.parametrize(
    "name",
    [
        "other-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        "recurra-0.1.0-py3-none-any.whl",
        "recurra-0.1.0-cp311-cp312-linux_x86_64.whl",
        "recurra-0.1.0-cp311-cp311-linux_riscv64.whl",
        "recurra-0.1.0-cp311-cp311-linux_x86_64.zip",
    ],
)
def test_bad_name(name):
    assert audit.parse_name(name) is None


@pytest.mark.parametrize(
    "contents",
    [
        {"a": b"1"},
        {"a": b"1", "b": b"3"},
        {"a": b"1", "b": b"2", "c": b""},
    ],
)
def test_bad_record(contents):
    contents = {**contents, "recurra-0.1.0.dist-info/RECORD": b""}
    assert len(audit.check_record(record(a=b"1", b=b"2"), contents)) == 1


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"bomFormat": "SPDX"}, "not in CycloneDX 1.6"),
        ({"metadata": {"component": {"name": "recurra", "version": "0.2.0"}}}, "0.2.0"),
        ({"metadata": {}}, "not in CycloneDX"),
        ({"components": []}, "version of torch"),
        ({"components": SBOM["components"][:2]}, "version of cudart_static"),
        ({"components": [{"name": "torch", "version": ""}]}, "version of torch"),
        ({"dependencies": [{"ref": "recurra", "dependsOn": []}]}, "dependencies"),
        ({"serialNumber": "urn:uuid:1"}, "every build"),
        ({"metadata": {**SBOM["metadata"], "timestamp": "now"}}, "every build"),
    ],
)
def test_bad_sbom(changed, problem):
    found = audit.check_sbom(json.dumps({**SBOM, **changed}), "0.1.0", cuda=True)
    assert any(problem in text for text in found)


def test_sbom_that_is_none():
    assert audit.check_sbom("{", "0.1.0", cuda=True)
    assert audit.check_sbom("[]", "0.1.0", cuda=True)
    assert "not there" in audit.check_sbom(json.dumps(SBOM), "0.1.0", cuda=False)[0]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"dynamic": DYNAMIC + "(NEEDED) Shared library: [libtorch_cuda.so]"}, "libtorch_cuda"),
        ({"dynamic": DYNAMIC + "(NEEDED) Shared library: [libcudart.so.13]"}, "libcudart"),
        ({"dynamic": DYNAMIC.replace("libtorch_cpu", "libm")}, "does not need"),
        ({"dynamic": DYNAMIC + "(RPATH) Library rpath: [/x]"}, "RPATH"),
        ({"dynamic": DYNAMIC + "(RUNPATH) Library runpath: [/x]"}, "RUNPATH"),
        ({"dynamic": DYNAMIC + "(TEXTREL)"}, "TEXTREL"),
        ({"dynamic": DYNAMIC.replace("BIND_NOW", "")}, "RELRO"),
        ({"segments": SEGMENTS.replace("GNU_RELRO", "NOTE")}, "RELRO"),
        ({"segments": SEGMENTS.replace("RW  0x10", "RWE 0x10")}, "stack"),
        ({"segments": SEGMENTS.replace("R E", "RWE")}, "writable and executable"),
        ({"symbols": "0000 T _ZN7recurra11linear_scanEv\n"}, "exports _ZN7recurra"),
        ({"symbols": "0000 T exec_anything\n"}, "exports exec_anything"),
        ({"size": 21 << 20}, "at most"),
        ({"name": "_native.cpython-311-x86_64-linux-gnu.so", "size": 21 << 20}, "at most"),
    ],
)
def test_bad_library(changed, problem):
    assert any(problem in found for found in library(**changed))


def test_the_library_of_cpp_programs():
    def named(**changed):
        plain = DYNAMIC.replace("0x1 (NEEDED)  Shared library: [libtorch_cpu.so]", "")
        return library("librecurra.so", **{"dynamic": plain, **changed})

    kernels = "0000 T _ZN7recurra3rnnERKNS_3RnnE\n0000 T _ZN7recurra3isaEv\n"
    assert named(symbols=kernels) == []
    assert "needs torch" in named(dynamic=DYNAMIC)[0]
    assert "exports exec_anything" in named(symbols=kernels + "0000 T exec_anything\n")[0]
    assert "exports _ZN7recurra4avx23rnn" in named(symbols=kernels.replace("3rnn", "4avx23rnn"))[0]
    assert "exports _ZTIN7recurra" in named(symbols=kernels + "0000 V _ZTIN7recurra4CellE\n")[0]
    assert "at most" in named(size=21 << 20)[0]
    assert any("cannot be told" in text for text in audit.check_code("librecurra.so", ""))


def test_the_libraries_of_cuda():
    plain = DYNAMIC.replace("0x1 (NEEDED)  Shared library: [libtorch_cpu.so]", "")
    near = (
        "(NEEDED) Shared library: [librecurra_cuda.so]\n(RUNPATH) Library runpath: [$ORIGIN/lib]\n"
    )
    kernel = "0000 T _ZN7recurra4cuda3rnnERKNS_3RnnE\n"
    handler = "0000 T recurra_xla_cuda\n"
    assert library("librecurra_cuda.so", plain, symbols=kernel) == []
    assert library("_ops_cuda.so", DYNAMIC + near) == []
    assert library("_xla_cuda.so", plain + near, symbols=handler) == []
    for name, dynamic, symbols, problem in (
        ("librecurra_cuda.so", DYNAMIC, kernel, "needs torch"),
        ("librecurra_cuda.so", plain + near, kernel, "needs librecurra_cuda.so"),
        ("librecurra_cuda.so", plain + near, kernel, "has RUNPATH $ORIGIN/lib"),
        ("librecurra_cuda.so", plain, kernel.replace("4cuda", "6scalar"), "exports _ZN7recurra6"),
        ("librecurra_cuda.so", plain, kernel.replace("3rnn", "3rnn4loopI"), "exports _ZN7recurra4"),
        ("_xla_cuda.so", DYNAMIC + near, handler, "needs torch"),
        ("_xla_cuda.so", plain, handler, "does not look for librecurra_cuda.so"),
        ("_xla_cuda.so", plain + near, kernel, "exports _ZN7recurra4cuda"),
        ("_ops_cuda.so", DYNAMIC + near.replace("$ORIGIN/lib", "/x"), "", "has RUNPATH /x"),
        ("_ops_cpu.so", DYNAMIC + near, "", "needs librecurra_cuda.so"),
    ):
        assert any(problem in found for found in library(name, dynamic, symbols=symbols)), problem
    assert "at most" in library("librecurra_cuda.so", plain, symbols=kernel, size=41 << 20)[0]


@pytest.mark.parametrize("header", ["  Machine:  AArch64", "", "  Machine: Intel 80386"])
def test_other_machine(header):
    assert len(audit.check_machine("a.so", header, "x86_64")) == 1


@pytest.mark.parametrize(
    "instruction",
    [
        "vaddss %xmm0,%xmm1,%xmm2",
        "vmovdqu64 %zmm0,(%rax)",
        "vzeroupper",
        "kmovq  %rax,%k1",
        "mulx   %rax,%rbx,%rcx",
        "shlx   %rax,%rbx,%rcx",
    ],
)
@pytest.mark.parametrize("place", ["addss", "movups"])
def test_wide_instruction_in_baseline_code(instruction, place):
    code = "\n".join(
        f"    1000:\t{instruction}" if place in line else line for line in CODE.split("\n")
    )
    found = audit.check_code("_ops_cpu.so", code)
    assert len(found) == 1 and instruction in found[0]


def test_code_that_cannot_be_told():
    for isa in ("4avx2", "6avx512", "6scalar"):
        nameless = CODE.replace(f"7recurra{isa}", "7recurra5other")
        assert any("cannot be told" in text for text in audit.check_code("_ops_cpu.so", nameless))
    assert audit.check_code("_native.so", "") and audit.check_code("_ops_cuda.so", "")


@pytest.mark.parametrize(
    "changed", [{"stable": False}, {"least": "2.12.0"}, {"least": None}, {"error": "unreadable"}]
)
def test_unstable_torch(changed):
    libraries = ["_ops_cpu.so", "_ops_cuda.so"]
    assert len(audit.check_torch(report(**changed), libraries)) == 1


def test_torch_report_of_one_library():
    one = json.dumps(json.loads(report())["packages"][0])
    assert audit.check_torch(one, ["_ops_cpu.so"]) == []


def test_torch_report_that_says_nothing():
    assert audit.check_torch("", ["_ops_cpu.so"])
    assert audit.check_torch("{}", ["_ops_cpu.so"])
    assert audit.check_torch("[]", ["_ops_cpu.so"])
    assert len(audit.check_torch(report(), ["_ops_cpu.so", "_ops_other.so"])) == 1


def test_build_path():
    found = audit.check_paths("a.so", b"x /opt/src/recurra/a.cpp y", ["/opt/src/recurra"])
    assert len(found) == 1
    assert audit.check_paths("a.so", b"/home/someone/recurra/csrc/a.cpp", [])
