"""Every rule of ci/audit_wheel.py finds what it is for, and no more."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "audit_wheel", Path(__file__).resolve().parent.parent / "ci" / "audit_wheel.py"
)
audit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(audit)

NAMES = [
    "recurra/__init__.py",
    "recurra/ops/linear_scan.py",
    "recurra/_ops_cpu.so",
    "recurra/_ops_cuda.so",
    "recurra/_native.cpython-311-x86_64-linux-gnu.so",
    "recurra-0.1.0.dist-info/METADATA",
    "recurra-0.1.0.dist-info/licenses/LICENSE",
]
DYNAMIC = """
 0x1 (NEEDED)  Shared library: [libtorch_cpu.so]
 0x1 (NEEDED)  Shared library: [libgomp.so.1]
 0x1 (NEEDED)  Shared library: [ld-linux-x86-64.so.2]
 0x1e (FLAGS)  BIND_NOW
"""
SEGMENTS = """
  LOAD       0x0 0x0 0x0 0x1 0x1 R E 0x1000
  GNU_STACK  0x0 0x0 0x0 0x0 0x0 RW  0x10
  GNU_RELRO  0x1 0x1 0x1 0x1 0x1 R   0x1
"""
SYMBOLS = "0000 V _ZTISt19_Sp_make_shared_tag\n0000 T PyInit__native\n"


def library(name="_ops_cpu.so", dynamic=DYNAMIC, segments=SEGMENTS, symbols=SYMBOLS, size=1000):
    return audit.check_library(name, dynamic, segments, symbols, size)


def test_good_wheel_passes():
    assert audit.check_names(NAMES) == []
    assert library() == []
    assert audit.check_paths("a.so", b"csrc/torch/check.cpp /usr/lib", ["/somewhere"]) == []


@pytest.mark.parametrize(
    "name",
    [
        "recurra/libgomp.so.1",
        "recurra/kernel.cpp",
        "recurra/secret.txt",
        "recurra.libs/libx.so",
        "other/__init__.py",
        "../recurra/a.py",
        "/etc/a.py",
        "recurra-0.1.0.data/scripts/run",
    ],
)
def test_unexpected_file(name):
    assert len(audit.check_names([*NAMES, name])) == 1


def test_missing_library():
    assert "missing" in audit.check_names(["recurra/__init__.py"])[0]


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
        ({"name": "_native.cpython-311-x86_64-linux-gnu.so", "size": 5 << 20}, "at most"),
    ],
)
def test_bad_library(changed, problem):
    assert any(problem in found for found in library(**changed))


def test_build_path():
    found = audit.check_paths("a.so", b"x /opt/src/recurra/a.cpp y", ["/opt/src/recurra"])
    assert len(found) == 1
    assert audit.check_paths("a.so", b"/home/someone/recurra/csrc/a.cpp", [])
