"""Nothing compiled goes untested, undocumented or unmeasured."""

from __future__ import annotations

import importlib
import importlib.util
import itertools

import pytest
import torch

import recurra
from opdb import CELLS, OPS
from recurra import reference
from recurra.bench.cases import table as bench_table
from support import ROOT


def schemas() -> list[str]:
    """Every public whole-sequence op that the libraries registered."""
    names = {
        schema.name.removeprefix("recurra::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("recurra::")
    }
    return sorted(n for n in names if not n.startswith("_") and not n.endswith("_step"))


def missing(name: str) -> list[str]:
    """What an op lacks, in words."""
    entry = next((op for op in OPS if op.name == name), None)
    found = []
    if entry is None:
        found.append("an entry in tests/opdb.py")
    for module, what in ((recurra, "a public function"), (reference, "an oracle")):
        found += [] if hasattr(module, name) else [f"{what} {module.__name__}.{name}"]
        step = f"{name}_step"
        if hasattr(torch.ops.recurra, step) and not hasattr(module, step):
            found.append(f"{what} {module.__name__}.{step}")
    if not (ROOT / f"docs/{name}.md").is_file():
        found.append(f"a page docs/{name}.md")
    if not any(case.op == name for case in bench_table()):
        found.append("a case in recurra bench")
    return found


def test_there_are_ops():
    assert "linear_scan" in schemas()


@pytest.mark.parametrize("name", schemas())
def test_every_op_is_complete(name):
    assert missing(name) == []


def test_every_entry_is_an_op():
    assert sorted(op.name for op in OPS) == sorted({op.name for op in OPS} & set(schemas()))
    assert all(op.name in recurra.__all__ and op.name in reference.__all__ for op in OPS)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_entry_covers_its_schema(op):
    """No tensor argument of the schema is missing from the table, nor ever absent from samples."""
    arguments = {a.name: a for a in op.overload._schema.arguments}
    optional = {n: a for n, a in arguments.items() if "Tensor" in str(a.type)}
    assert set(op.axes) == set(optional) - {"cu_seqlens"}
    smooth = set(op.axes) - set(op.masks)
    assert set(op.differentiable) == smooth, "every input must have a gradient"
    quick = list(op.samples(torch.float32, "quick"))
    small = [s for packed in (False, True) for s in op.samples(torch.float64, "small", packed)]
    for samples, (name, argument) in itertools.product((quick, small), arguments.items()):
        values = [s.get(name) for s in samples]
        if "Tensor" in str(argument.type):
            assert any(v is not None for v in values), f"{name} is never given"
            if "Optional" in str(argument.type):
                assert any(v is None for v in values), f"{name} is always given"
        elif name not in op.tested_apart:
            assert len({str(v) for v in values}) > 1, f"{name} never varies"
    _, errors = op.errors()
    assert len(errors) >= 8
    assert set(op.func) == {"grad", "jvp", "vmap"} and set(op.func.values()) <= {"right", "raises"}


def test_a_made_up_op_would_be_found_incomplete():
    lacking = missing("made_up_scan")
    assert len(lacking) == 5, lacking
    library = torch.library.Library("recurra", "FRAGMENT")
    try:
        library.define("made_up_scan(Tensor x) -> Tensor")
        assert "made_up_scan" in schemas()
    finally:
        library._destroy()
    assert "made_up_scan" not in schemas()


@pytest.mark.skipif(
    importlib.util.find_spec("recurra._native") is None, reason="recurra._native is not built"
)
def test_every_cell_is_complete():
    names = importlib.import_module("recurra._native").cell_names()
    assert sorted(cell.name for cell in CELLS) == sorted(names)
    for cell in CELLS:
        assert callable(cell.oracle), cell.name
        assert (ROOT / cell.docs).is_file(), cell.docs


def test_every_op_takes_numpy_arrays():
    pytest.importorskip("recurra._native", reason="recurra._native is not built")
    module = importlib.import_module("recurra.numpy")
    names = {n for op in schemas() for n in (op, f"{op}_step")}
    assert set(module.__all__) == {n for n in names if hasattr(torch.ops.recurra, n)}
