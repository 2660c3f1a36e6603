"""find_package(recurra) and the programs of examples/cpp, built as docs/cpp.md says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import recurra
from support import ROOT, Draw, same_bits

EXAMPLES = ROOT / "examples" / "cpp"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
CMAKE = shutil.which("cmake")
pytestmark = pytest.mark.skipif(
    not (CMAKE and COMPILER and EXAMPLES.exists()),
    reason="needs cmake, a C++ compiler and the sources",
)


def run(*command, **options) -> str:
    command = [str(word) for word in command]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert ran.returncode == 0, f"{command}\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    return ran.stdout


def refusal(*command) -> str:
    """What a program says that ends with an error."""
    ran = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 1, ran
    return ran.stderr


def build_examples(folder: Path, prefix: str, *options: str) -> Path:
    run(CMAKE, "-S", EXAMPLES, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}", *options)
    run(CMAKE, "--build", folder, "-j", "2")
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """The programs over the installed package, and that of torch's stable ABI."""
    return build_examples(
        tmp_path_factory.mktemp("examples"),
        recurra.cmake_prefix_path(),
        f"-DTORCH_DIR={Path(torch.__file__).parent}",
        "-DCMAKE_CXX_FLAGS=-Wall -Wextra",
    )


def write(path: Path, *tensors: torch.Tensor) -> None:
    path.write_bytes(b"".join(x.contiguous().numpy().tobytes() for x in tensors))


def read(path: Path, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
    counts = [int(torch.tensor(shape).prod()) for shape in shapes]
    assert sum(counts) == len(data)
    return [x.view(shape) for x, shape in zip(data.split(counts), shapes, strict=True)]


def scan_has_the_bits_of_torch(program: Path, tmp_path: Path, B: int, T: int, D: int) -> None:
    draw = Draw(B + T + D)
    a, b, dh = (draw.normal(B, T, D, dtype=torch.float32) for _ in range(3))
    h0 = draw.normal(B, D, dtype=torch.float32)
    write(tmp_path / "in", a, b, dh, h0)
    run(program, B, T, D, tmp_path / "in", tmp_path / "out")
    leaves = [x.requires_grad_() for x in (a, b, h0)]
    h, h_last = recurra.linear_scan(*leaves)
    da, db, dh0 = torch.autograd.grad(h, leaves, dh)
    want = {"h": h, "h_last": h_last, "da": da, "db": db, "dh0": dh0}
    got = read(tmp_path / "out", *(x.shape for x in want.values()))
    for (name, x), y in zip(want.items(), got, strict=True):
        assert same_bits(x, y), name


@pytest.mark.parametrize("B, T, D", [(2, 37, 19), (1, 1, 1), (3, 300, 64)])
def test_linear_scan(programs, tmp_path, B, T, D):
    scan_has_the_bits_of_torch(programs / "linear_scan", tmp_path, B, T, D)


def test_timing(programs):
    printed = run(programs / "linear_scan", 1, 64, 32)
    assert "float32, " + torch.ops.recurra._isa() in printed
    assert printed.count("GB/s") == 2 and "forward" in printed and "backward" in printed


@pytest.mark.parametrize("name", ["paragru", "slstm"])
def test_cell(programs, tmp_path, name):
    T, N = 250, 37
    line = next(x for x in torch.ops.recurra._cells().splitlines() if x.split()[0] == name)
    inputs, states, params = (len(words.split(",")) for words in line.split()[1:4])
    draw = Draw(0)
    x = draw.normal(1, T, inputs, N, dtype=torch.float32)
    weights = draw.normal(params, N, dtype=torch.float32)
    write(tmp_path / "in", x, weights)
    run(programs / "cell", name, T, N, tmp_path / "in", tmp_path / "out")
    want, want_last, *_ = recurra.rnn(x, weights, cell=name, algorithm="sequential")
    y, h_last = read(tmp_path / "out", (1, T, N), (1, states, N))
    assert same_bits(y, want) and same_bits(h_last, want_last)
    assert "same bits in pieces" in run(programs / "cell", name)


def test_what_the_programs_refuse(programs, tmp_path):
    with pytest.raises(RuntimeError) as error:
        recurra.rnn(torch.zeros(1, 2, 3, 4), torch.zeros(3, 4), cell="gru")
    assert refusal(programs / "cell", "gru").strip() == f"cell: {error.value}".replace("rnn: ", "")
    write(tmp_path / "short", torch.zeros(5))
    said = refusal(programs / "linear_scan", 1, 2, 3, tmp_path / "short", tmp_path / "out")
    assert "short has not a, b, dh and h0 of these sizes" in said
    capped = subprocess.run(
        [programs / "linear_scan", "1", "2", "3"],
        env={**os.environ, "RECURRA_ISA": "sse"},
        capture_output=True,
        text=True,
    )
    assert "RECURRA_ISA must be scalar, avx2 or avx512, got sse" in capped.stderr


def test_sizes_that_the_programs_refuse(programs, tmp_path):
    """Also those whose product wraps around to something small."""
    words = "sizes must be whole numbers from 0 with a product of at most 2^40, got"
    files = tmp_path / "in", tmp_path / "out"
    scan, libtorch = [programs / "linear_scan"], [programs / "libtorch", *recurra.library_paths()]
    large = 1 << 22
    for program in (scan, libtorch):
        for sizes, got in (
            ((large, large, large), large),
            ((1 << 31, 0, 1 << 31), 1 << 31),
            ((1, -2, -3), -2),
            ((1, "2x", 3), "2x"),
            (("", 2, 3), ""),
            ((1, 2, 1 << 64), 1 << 64),
        ):
            assert f"{words} {got}".strip() in refusal(*program, *sizes, *files)
    cell = programs / "cell", "paragru"
    for sizes, got in (((1 << 33, 1 << 31), 1 << 31), ((-1, 4), -1), (("4.5", 4), "4.5")):
        assert f"{words} {got}" in refusal(*cell, *sizes, *files)


def test_libtorch_calls_an_op(programs, tmp_path):
    B, T, D = 2, 61, 24
    draw = Draw(4)
    a, b = (draw.normal(B, T, D, dtype=torch.float32) for _ in range(2))
    write(tmp_path / "in", a, b)
    program, libraries = programs / "libtorch", recurra.library_paths()
    run(program, *libraries, B, T, D, tmp_path / "in", tmp_path / "out")
    got = read(tmp_path / "out", (B, T, D), (B, D))
    for x, y in zip(got, recurra.linear_scan(a, b), strict=True):
        assert same_bits(x, y)
    with pytest.raises(RuntimeError) as error:
        recurra.linear_scan(torch.zeros(B, T, D), torch.zeros(B, T * D))
    assert str(error.value).splitlines()[0] in run(program, *libraries, B, T, D)
    assert "libpython" not in run("ldd", program)


def test_a_program_without_the_package(tmp_path):
    """What is missing is named: CMake's own words, and the folder that has the package."""
    said = subprocess.run(
        [CMAKE, "-S", EXAMPLES, "-B", tmp_path], capture_output=True, text=True, timeout=60
    )
    assert said.returncode != 0 and "recurra" in said.stderr


def test_other_versions_are_refused(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(other LANGUAGES CXX)\n"
        "find_package(recurra 99 REQUIRED)\n"
    )
    prefix = f"-DCMAKE_PREFIX_PATH={recurra.cmake_prefix_path()}"
    said = subprocess.run(
        [CMAKE, "-S", tmp_path, "-B", tmp_path / "build", prefix], capture_output=True, text=True
    )
    assert said.returncode != 0 and f"version: {recurra.__version__}" in said.stderr


def test_torch_ops_are_targets(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(other LANGUAGES CXX)\n"
        "find_package(recurra REQUIRED)\nget_target_property(path recurra::torch_ops LOCATION)\n"
        'message(STATUS "at ${path}.")\n'
    )
    prefix = f"-DCMAKE_PREFIX_PATH={recurra.cmake_prefix_path()}"
    printed = run(CMAKE, "-S", tmp_path, "-B", tmp_path / "build", prefix)
    assert f"at {recurra.library_paths()[0]}." in printed


def test_the_sources_alone_need_neither_python_nor_torch(tmp_path):
    run(CMAKE, "-S", ROOT, "-B", tmp_path, "-DRECURRA_TORCH=OFF")
    cache = (tmp_path / "CMakeCache.txt").read_text()
    assert "Python_EXECUTABLE" not in cache and "pybind11_DIR" not in cache
    assert f"CMAKE_PROJECT_VERSION:STATIC={recurra.__version__}" in cache


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["OFF", "ON"])
def test_installed_from_the_sources(tmp_path, shared):
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    options = ("-DRECURRA_TORCH=OFF", f"-DBUILD_SHARED_LIBS={shared}")
    run(CMAKE, "-S", ROOT, "-B", build, *options)
    subprocess.run([CMAKE, "--build", build, "-j", "2"], check=True, timeout=3000)
    run(CMAKE, "--install", build, "--prefix", prefix)
    library = "librecurra.so" if shared == "ON" else "librecurra.a"
    assert [path.name for path in (prefix / "lib").iterdir() if path.is_file()] == [library]
    moved = tmp_path / "moved"  # the package goes wherever its folder goes
    prefix.rename(moved)
    shutil.rmtree(build)
    programs = build_examples(tmp_path / "examples", str(moved))
    scan_has_the_bits_of_torch(programs / "linear_scan", tmp_path, 3, 100, 40)


@pytest.mark.slow
def test_aotinductor_without_python(tmp_path):
    D = 16
    package = tmp_path / "model.pt2"
    run(sys.executable, EXAMPLES / "export_model.py", package)
    programs = build_examples(
        tmp_path / "examples",
        recurra.cmake_prefix_path(),
        f"-DTORCH_DIR={Path(torch.__file__).parent}",
        "-DAOTI=ON",
    )
    loaded = torch._inductor.aoti_load_package(str(package))
    for T in (1, 2, 37, 500):
        x = Draw(T).normal(1, T, D, dtype=torch.float32)
        write(tmp_path / "in", x)
        library = recurra.library_paths()[0]
        run(programs / "aoti", library, package, D, tmp_path / "in", tmp_path / "out")
        (y,) = read(tmp_path / "out", (1, T, D))
        assert same_bits(y, loaded(x))
    for unreadable in (tmp_path / "none", tmp_path):
        said = refusal(programs / "aoti", library, package, D, unreadable, tmp_path / "out")
        assert f"{unreadable} cannot be read" in said
    for D, got in ((0, "0"), (-16, "-16"), ("16x", "16x")):
        said = refusal(programs / "aoti", library, package, D, tmp_path / "in", tmp_path / "out")
        assert (
            f"sizes must be whole numbers from 1 with a product of at most 2^40, got {got}" in said
        )
