"""Without a C++ compiler a build says what is missing, before CMake says it in its own way."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from support import ROOT


@pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja") and (ROOT / "CMakeLists.txt").exists()),
    reason="needs cmake, ninja and the sources",
)
def test_says_so(tmp_path):
    for tool in ("cmake", "ninja"):  # either may be a script that looks for its neighbours
        script = tmp_path / tool
        script.write_text(f'#!/bin/sh\nexec "{shutil.which(tool)}" "$@"\n')
        script.chmod(0o755)
    ran = subprocess.run(
        [str(tmp_path / "cmake"), "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = " ".join(ran.stderr.split())
    assert ran.returncode != 0
    assert "recurra: no C++ compiler was found" in said and "apt-get install g++" in said
    assert "wheels for Python 3.10 to 3.13" in said and "CMAKE_CXX_COMPILER" not in said
