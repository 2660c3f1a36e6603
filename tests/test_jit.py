"""Cells at run time: the stock ones through NVRTC, and those of a user on the CPU."""

from __future__ import annotations

import errno
import gc
import importlib.util
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck

import recurra
from recurra.jit import compile as compiling
from recurra.jit import gpu
from recurra.jit import source as jit_source

compiler = pytest.mark.skipif(compiling.compiler() is None, reason="no C++ compiler")
nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None,
    reason="cuda.core is not installed: pip install 'recurra[cuda]'",
)


# The forward in float on every architecture; what takes as long again each on one of them.
@nvrtc
@pytest.mark.parametrize(
    "arch, kernels",
    [
        ("sm_80", ("advance<CELL, float>",)),
        ("sm_90", ("advance<CELL, float>", "advance<CELL, double>")),
        ("sm_120", ("advance<CELL, float>", "walk_back<CELL, float>")),
    ],
)
def test_nvrtc_compiles_every_stock_cell(arch, kernels):
    from cuda.core import Program, ProgramOptions

    backward = [kernel for kernel in kernels if "back" in kernel]
    options = ProgramOptions(
        arch=arch,
        std="c++20",
        fma=False,
        device_as_default_execution_space=True,
        use_bundled_headers=False,
        include_path=recurra.include_path(),
        define_macro=[("RECURRA_ISA", "cuda"), ("BACKWARD", "1" if backward else "0")],
    )
    # C++ has the names of the cells; this finds their kernels by number.
    source = """
        #include "recurra/math/taped.h"
        #include "recurra/rnn/rnn.cu"
        #if BACKWARD
        #include "recurra/rnn/backward_f32.cu"
        #endif
        namespace recurra::cuda {
        template <int N, class First, class... Rest>
        auto cell(CellList<First, Rest...>) {
          if constexpr (N == 0) return First{};
          else return cell<N - 1>(CellList<Rest...>{});
        }
        template <int N> using CellAt = decltype(cell<N>(Cells{}));
        }
    """
    names = [
        f"recurra::cuda::rnn_detail::{kernel}".replace("CELL", f"recurra::cuda::CellAt<{n}>")
        for n in range(len(recurra.cells()))
        for kernel in kernels
    ]
    cubin = Program(source, "c++", options).compile("cubin", name_expressions=names)
    assert cubin.code[:4] == b"\x7fELF"
    assert len(set(cubin.symbol_mapping.values())) == len(names)


# ---- cells of a user -----------------------------------------------------------------------------

# Two states, a parameter that is not affine and one that is.
LEAKY = """
// A leaky pair.
struct Leaky {
  static constexpr const char* name = "leaky";
  static constexpr auto inputs = names("x", "gate");
  static constexpr auto states = names("c", "h");
  static constexpr auto params = names("a", "rate");
  static constexpr auto affine_params = affine(Affine{0, 0, 1});
  static constexpr int output = 1;

  template <class X, class H, class P>
  RECURRA_FN static auto step(X inputs, H states, P params) {
    auto [x, gate] = inputs;
    auto [c, h] = states;
    auto [a, rate] = params;
    auto f = sigmoid(gate * rate);
    auto new_c = fma(f, c, (1 - f) * fma(a, h, x));
    return pack(new_c, tanh(new_c));
  }
};
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jit") / "cells"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECURRA_JIT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def leaky(cache):
    return recurra.jit.cell(LEAKY)


def example(dtype=torch.float64, B=2, T=70, N=5):
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x, params = torch.randn(B, T, 2, N, dtype=dtype), torch.randn(2, N, dtype=dtype)
    return [t.requires_grad_() for t in (x, params, torch.randn(B, 2, N, dtype=state))]


@compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_header_has_the_bits_of_the_librarys_own_cell(cache, dtype):
    name = "janet"
    path = Path(recurra.include_path(), "recurra", "cells", f"{name}.h")
    cell, info = recurra.jit.cell(path.read_text()), recurra.cells()[name]
    assert cell.info._replace(affine=info.affine) == info
    K = len(info.states)
    x = torch.randn(1, 200, len(info.inputs), 20, dtype=dtype, requires_grad=True)
    params = torch.randn(len(info.params), 20, dtype=dtype, requires_grad=True)
    held = torch.float64 if dtype == torch.float64 else torch.float32
    packed = torch.tensor([0, 33, 33, 150, 200])
    for options in (
        {},
        {"return_states": True, "reset": torch.rand(1, 200) < 0.1},
        {"cu_seqlens": packed},
    ):
        S = 4 if "cu_seqlens" in options else 1
        h0 = torch.randn(S, K, 20, dtype=held, requires_grad=True)
        results = []
        for run, more in ((recurra.rnn, {"cell": name, "algorithm": "sequential"}), (cell, {})):
            y, h_last, passes, mismatch = run(x, params, h0, **more, **options)
            loss = y.float().square().sum() + h_last.sum()
            grads = torch.autograd.grad(loss, (x, params, h0))
            results.append((y, h_last, passes, mismatch, *grads))
        for ours, theirs in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@compiler
def test_gradients(leaky):
    x, params, h0 = example(T=7)
    assert gradcheck(lambda *a: leaky(*a, return_states=True)[:2], (x, params, h0))
    y, h_last, *_ = recurra.rnn(x, params, h0, cell=leaky)
    assert torch.equal(y, leaky(x, params, h0)[0])
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative of rnn is not implemented"):
        dx.sum().backward()
    (only,) = torch.autograd.grad(leaky(x.detach(), params)[1].sum(), params)
    assert only.isfinite().all()


@compiler
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_models(leaky, packed):
    """A call is one node, of any length, with the results and gradients that it has alone."""

    def model(x, params, h0, ends):
        y, h_last, *_ = recurra.rnn(torch.sin(x), params, h0, cell=leaky, cu_seqlens=ends)
        return torch.tanh(y), h_last

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (5, 9):
        x, params, h0 = example(B=1, T=T)
        ends = torch.tensor([0, 2, T]) if packed else None
        h0 = h0.detach().expand(2, -1, -1).clone().requires_grad_() if packed else h0
        results = []
        for run in (model, compiled):
            y, h_last = run(x, params, h0, ends)
            results.append(
                (y, h_last, *torch.autograd.grad(y.sum() + h_last.sum(), (x, params, h0)))
            )
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
        with torch.no_grad():
            assert torch.equal(compiled(x, params, h0, ends)[0], results[0][0])
    with pytest.raises(RuntimeError, match="rnn: x must have G = 2"):
        compiled(x[:, :, :1], params, h0, ends)


@compiler
def test_compiled_graphs_know_a_cell_by_its_text(leaky):
    """Since torch keeps graphs on disk for other processes, where another cell may come first."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    x, params, h0 = (t.detach() for t in example())
    again = recurra.jit.cell(leaky.source)
    other = recurra.jit.cell(leaky.source.replace("leaky", "softer"))
    for cell in (leaky, again, other):
        torch._dynamo.reset()
        torch.compile(lambda x, cell=cell: cell(x, params, h0)[0], backend=keep)(x)
    first, same, another = (graph.code for graph in graphs)
    assert first == same != another
    want = leaky(x, params, h0)[0]
    del again
    gc.collect()
    assert torch.equal(torch.compile(lambda x: leaky(x, params, h0)[0], backend="eager")(x), want)


@compiler
def test_a_backward_keeps_its_cell(cache):
    x, params, h0 = example(T=3)
    y = recurra.jit.cell(LEAKY)(x, params, h0)[0]
    gc.collect()
    y.sum().backward()
    assert params.grad.any()


@compiler
def test_lazy_negation(leaky):
    def negated(t):
        """t, as what torch gets from the imaginary part of a conjugate: memory holds -t."""
        lazy = torch.complex(torch.zeros_like(t), -t).conj().imag
        assert lazy.is_neg() and torch.equal(lazy, t)
        return lazy

    given = [t.detach() for t in example()]
    cots = torch.randn(2, 70, 5).double(), torch.randn(2, 2, 5).double()
    results = []
    for of in (lambda t: t, negated):
        leaves = [t.requires_grad_() for t in given]
        y, h_last, *_ = leaky(*map(of, leaves))
        grads = torch.autograd.grad((y, h_last), leaves, [of(c) for c in cots])
        results.append((y, h_last, *grads))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@compiler
def test_strides_and_empty_sizes(leaky):
    x, params, h0 = (t.detach() for t in example())
    y, h_last, *_ = leaky(x, params, h0)
    strided = torch.empty(5, 2, 70, 2).permute(2, 1, 3, 0).transpose(0, 1).double()
    again, *_ = leaky(strided.copy_(x), params.T.contiguous().T, h0)
    assert torch.equal(again, y)
    for B, T, N in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        shape = (torch.zeros(B, T, 2, N), torch.zeros(2, N), torch.ones(B, 2, N))
        y, h_last, *_ = leaky(*(t.requires_grad_() for t in shape))
        (y.sum() + h_last.sum()).backward()
        assert y.shape == (B, T, N) and h_last.shape == (B, 2, N)
        assert shape[2].grad.shape == (B, 2, N)


@compiler
def test_compiled_once_and_again_where_damaged(leaky, cache, monkeypatch):
    (path,) = (p for p in cache.iterdir() if p.name in str(leaky._library()._library))
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert not [p for p in cache.iterdir() if p.name.startswith(".tmp-")]
    runs = []
    monkeypatch.setattr(compiling, "_run", lambda command, folder: runs.append(command) or "no")
    recurra.jit.cell(LEAKY)
    assert not runs
    # In its place, since the library that is loaded lives in the old file.
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-40])
    with pytest.raises(recurra.jit.CompileError):
        recurra.jit.cell(LEAKY)
    assert runs
    path.unlink()
    path.write_bytes(whole)


@compiler
def test_errors_have_the_lines_of_the_text(cache):
    wrong = LEAKY.replace("sigmoid(", "sigmoyd(")
    line = next(n for n, text in enumerate(wrong.split("\n"), 1) if "sigmoyd" in text)
    with pytest.raises(recurra.jit.CompileError, match=rf"cell\.h:{line}:\d+: .*sigmoyd") as raised:
        recurra.jit.cell(wrong)
    assert len(str(raised.value)) < 3000


@compiler
def test_wrong_affine_params_are_found(cache):
    with pytest.raises(ValueError, match="the derivatives of leaky are not those of its step"):
        recurra.jit.cell(LEAKY.replace("Affine{0, 0, 1}", "Affine{0, 0, 0}"))


def test_without_a_compiler(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    # A text of its own: another cell of the same, compiled before, would serve.
    cell = recurra.jit.cell(LEAKY.replace('"leaky"', '"unseen"'))
    with pytest.raises(RuntimeError, match="apt-get install g\\+\\+"):
        cell(*example())
    monkeypatch.setenv("CXX", "/nowhere/c++ -O")
    with pytest.raises(RuntimeError, match="the compiler /nowhere/c\\+\\+ -O: .*No such file"):
        recurra.jit.cell(LEAKY)


def test_the_folder_must_be_the_users_own(tmp_path, monkeypatch):
    monkeypatch.delenv("RECURRA_JIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compiling.folder()
    assert folder == tmp_path / "recurra" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match="other users may write to the folder"):
        compiling.folder()
    folder.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(RuntimeError, match="belongs to another user.*RECURRA_JIT_CACHE"):
        compiling.folder()


@pytest.mark.parametrize(
    "change, message",
    [
        (('names("c", "h")', "lists"), "static constexpr auto states = names"),
        (('names("c", "h")', "names()"), "states must be from 1 to 4 names, got 0"),
        (("names(" + '"x", "gate")', "names(x)"), "inputs must be names in quotes, got x"),
        (("output = 1", "output = 2"), "N < 2, got 2"),
        (("struct Leaky {", "namespace leaky {"), "must hold a struct"),
        (("\n// A", "\ufeff// A"), "plain text, got U+FEFF in line 1"),
        (("A leaky", "\0"), "plain text, got U+0000 in line 2"),
        (("A leaky", "\udc80"), "plain text, got U+DC80 in line 2"),
    ],
)
def test_what_is_not_a_cell(change, message):
    with pytest.raises(ValueError, match="jit.cell: ") as raised:
        recurra.jit.cell(LEAKY.replace(*change))
    assert message in str(raised.value)


HELPERS = r"""
struct Base { static constexpr int base = 1'000; };
struct Nothing;  // {
class Leaky final
    : Base {  /* struct Wrong { */
  struct In { int z; };
  enum class Kind : int { one };
  static constexpr char brace = '{', quote = '\'';
  static constexpr const char* braces = "struct Wrong { \" // /*";
  static constexpr const char* raw = R"x(" struct Wrong { )" )x";
 public:
"""


@compiler
def test_the_cell_is_the_struct_around_its_names(cache):
    source = LEAKY.replace("struct Leaky {", HELPERS)
    assert recurra.jit.cell(source).info.name == "leaky"
    assert jit_source.read(source)[0] == "jit::Leaky"
    chosen = "#if 1\nstruct Leaky {\n#else\nstruct Leaky : Base {\n#endif"
    assert jit_source.read(LEAKY.replace("struct Leaky {", chosen))[0] == "jit::Leaky"


@pytest.mark.parametrize(
    "change, line, message",
    [
        (("};", ""), "struct Leaky", "this { is never closed"),
        (("  }\n", ""), "struct Leaky", "this { is never closed"),
        (("};", "}; /* {\n*/ }  // {"), "*/ }", "this } closes nothing"),
    ],
)
def test_an_unbalanced_brace_is_said_with_its_line(change, line, message):
    source = LEAKY.replace(*change)
    number = next(n for n, text in enumerate(source.split("\n"), 1) if line in text)
    with pytest.raises(recurra.jit.CompileError, match=f"cell.h:{number}: error: {message}$"):
        recurra.jit.cell(source)


@pytest.mark.parametrize("command", ['g++ "', "/bin/true"])
def test_what_cxx_names_is_no_compiler(cache, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    message = "CXX must be a command.*No closing" if '"' in command else "true made no library"
    with pytest.raises(RuntimeError, match=f"^jit.cell: .*{message}"):
        recurra.jit.cell(LEAKY.replace('"leaky"', '"unmade"'))


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@compiler
@pytest.mark.parametrize("where", ["write_sealed", "write_bytes", "tempfile.TemporaryDirectory"])
def test_a_library_that_cannot_be_kept(cache, monkeypatch, where):
    monkeypatch.setattr(f"recurra.jit.compile.{where}", full)
    with pytest.raises(RuntimeError, match="cannot be kept: .*No space.*RECURRA_JIT_CACHE"):
        recurra.jit.cell(LEAKY.replace('"leaky"', '"unkept"'))


@nvrtc
def test_a_cubin_that_cannot_be_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RECURRA_JIT_CACHE", str(tmp_path / "cells"))
    monkeypatch.setattr(compiling, "compiler", lambda: None)
    monkeypatch.setattr(compiling, "write_sealed", full)
    cell = recurra.jit.cell(LEAKY.replace('"leaky"', '"unkept"'))
    assert cell.cubin("sm_80") == cell.cubin("sm_80")
    assert not list(compiling.folder().glob("*.cubin"))


@compiler
def test_refusals(leaky):
    x, params, h0 = (t.detach() for t in example())
    with pytest.raises(RuntimeError, match="rnn: x must have G = 2 for the inputs of leaky"):
        leaky(x[:, :, :1], params, h0)
    with pytest.raises(RuntimeError, match='rnn: algorithm must be "auto" or "sequential"'):
        leaky(x, params, h0, algorithm="newton")
    with pytest.raises(RuntimeError, match="rnn: cu_seqlens must end at T = 70, got 69"):
        leaky(x[:1], params, cu_seqlens=torch.tensor([0, 69]))
    with pytest.raises(RuntimeError, match="rnn: x must be on cpu or cuda.*got meta"):
        leaky(x.to("meta"), params.to("meta"))
    with pytest.raises(RuntimeError, match="forward-mode|torch.func"):
        torch.func.grad(lambda x: leaky(x, params)[0].sum())(x)


@nvrtc
def test_cubin(cache, monkeypatch):
    monkeypatch.setattr(compiling, "compiler", lambda: None)
    cell = recurra.jit.cell(LEAKY)
    first = cell.cubin("sm_80")
    assert first[:4] == b"\x7fELF" and cell.cubin("sm_80") == first != cell.cubin("sm_90")
    wrong = LEAKY.replace("sigmoid(", "sigmoyd(")
    line = next(n for n, text in enumerate(wrong.split("\n"), 1) if "sigmoyd" in text)
    with pytest.raises(recurra.jit.CompileError, match=rf"cell\.h\({line}\): error"):
        recurra.jit.cell(wrong).cubin()
    with pytest.raises(RuntimeError, match="jit.cell: "):
        cell.cubin("sm_1")


@nvrtc
def test_nvrtc_counts_what_a_step_keeps():
    """As it runs, wherever the text has the functions, and with the lines where it cannot."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch="sm_90",
        std="c++20",
        device_as_default_execution_space=True,
        use_bundled_headers=False,
        include_path=[recurra.include_path(), f"{recurra.include_path()}/recurra"],
        define_macro=("RECURRA_ISA", "cuda"),
    )
    more = """
    auto again = [](auto v) { return tanh(v); };
    auto u = again(again(again(softplus(x) + silu(x))));
    for (int i = 0; i < 40; ++i) u = exp(u);
    // tanh(u)
    """
    source = LEAKY.replace("auto f =", f"{more}auto f =").replace(
        "return pack(", "return pack(u + "
    )
    struct, info = jit_source.read(source)

    def count(source):
        program = gpu.program(source, struct, info).rpartition("#include")[0]
        program += '#include "recurra/rnn/kept.h"\nnamespace recurra::RECURRA_ISA {\n'
        program += "static_assert(count_kept<RECURRA_CELL>() == 2 + 3 + 4 + 40);\n}"
        return Program(program, "c++", options).compile("cubin")

    assert count(source)
    with pytest.raises(Exception, match=r"assert.*failed|static assertion"):
        count(source.replace("again(again(", "again(("))
    line = next(n for n, text in enumerate(source.split("\n"), 1) if "auto u =" in text)
    with pytest.raises(Exception, match=rf"must have a constant value[\s\S]*cell.h\({line}\)"):
        count(source.replace("{ return tanh(v)", "{ static int n; ++n; return tanh(v)"))


def test_cubin_without_cuda_core(cache, monkeypatch):
    monkeypatch.setattr(compiling, "compiler", lambda: None)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(RuntimeError, match=r"pip install 'recurra\[cuda\]'"):
        recurra.jit.cell(LEAKY).cubin()
