"""ci/cuda_budget.py on what ptxas prints, each rule broken once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

CI = Path(__file__).resolve().parent.parent / "ci"
_spec = importlib.util.spec_from_file_location("cuda_budget", CI / "cuda_budget.py")
budget = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(budget)

TEXT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
ptxas info    : Function properties for _Z1fv
    {stack} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, {shared} bytes smem
ptxas info    : Compiling entry function '_Z1gv' for 'sm_90'
ptxas info    : Function properties for _Z1gv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    0 bytes stack frame, 9 bytes spill stores, 9 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def _told(budgets, **changed):
    numbers = {"stack": 0, "spills": 0, "registers": 40, "shared": 128} | changed
    return budget.problems(*budget.parse(TEXT.format(**numbers)), budgets)


def test_every_rule():
    uses, spilling = budget.parse(TEXT.format(stack=0, spills=0, registers=40, shared=128))
    assert uses == {"_Z1fv": budget.Use(40, 0, 128), "_Z1gv": budget.Use(8, 0, 0)}
    assert spilling == []
    nvcc, budgets = budget.read_table(budget.write_table("13.0", uses))
    assert (nvcc, budgets) == ("13.0", uses)
    assert _told(budgets) == []
    assert _told(budgets, registers=32) == []
    assert _told(budgets, registers=41) == ["_Z1fv: registers 41, at most 40 by cuda_budget.txt"]
    assert "stack 8" in _told(budgets, stack=8)[0]
    assert "shared 129" in _told(budgets, shared=129)[0]
    assert _told(budgets, spills=4) == ["_Z1fv spills registers"]
    assert _told(None, spills=4, registers=99) == ["_Z1fv spills registers"]
    gone = budgets | {"_Z1hv": budget.Use(1, 0, 0)}
    assert _told(gone) == ["_Z1hv of cuda_budget.txt is not in the build"]
    del budgets["_Z1gv"]
    assert "_Z1gv is not in cuda_budget.txt" in _told(budgets)[0]


def test_names():
    assert (
        budget.short_name(
            "void recurra::cuda::scan_detail::forward<recurra::cuda::Half, 4>"
            "(recurra::cuda::scan_detail::Forward<recurra::cuda::Half>)"
        )
        == "scan_detail::forward<Half, 4>"
    )


def test_the_table_is_as_it_is_written():
    text = budget.TABLE.read_text()
    assert budget.write_table(*budget.read_table(text)) == text
