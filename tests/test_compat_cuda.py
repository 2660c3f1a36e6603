"""What recurra.compat does with tensors on CUDA: which functions compute, that none waits for the
device, and, where there is a GPU, that they compute what the CPU does."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from compat_calls import CALLS, Call, FormerError
from recurra import _library, reference
from recurra.compat import _common
from recurra.compat.causal_conv1d import causal_conv1d_interface, causal_conv1d_varlen
from recurra.ops.linear_step import linear_step
from recurra.ops.rms_norm import rms_norm

every_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)

# Without those that make a module.
MODULES = ("Mamba", "RecurrentGemma block")
every_function = pytest.mark.parametrize(
    "call", [call for call in CALLS if call.name not in MODULES], ids=lambda call: call.name
)


class Ops(TorchDispatchMode):
    """Notes the ops of recurra that run, and refuses what would wait for a GPU: values that go to
    the host or come from there, and shapes that depend on values."""

    refused = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2",
               "unique_consecutive", "unique_dim", "lift_fresh", "_pin_memory")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.partition("::")
        if name[0] == "recurra":
            self.seen.add(name[2].removesuffix("_save").removeprefix("_selective_scan_"))
        by_mask = name[2].startswith("index") and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)
            for x in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        assert name[2].rstrip("_") not in self.refused and not by_mask, f"{op} waits for the device"
        out = op(*args, **(kwargs or {}))
        there = {x.device.type for x in (*args, out) if isinstance(x, Tensor) and x.dim()}
        assert len(there) < 2, f"{op} is of {there}"
        return out


class Seen(Ops):
    """Notes them and refuses tensors of two devices in one op alone."""

    refused = ()


@pytest.fixture
def guarded():
    """Lets a torch without CUDA index fake tensors on it, which it refuses for want of what makes
    a device current: for meta tensors that is something which does nothing, and it will do."""
    if torch.version.cuda is not None:
        yield
        return
    cuda, meta = 1, 14  # of c10::DeviceType
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError) as error:
        pytest.skip(f"this torch hides what makes a device current: {error}")
    before = guards[cuda]
    guards[cuda] = before or guards[meta]
    yield
    guards[cuda] = before


@pytest.fixture
def loaded(monkeypatch, guarded):
    """As where the CUDA library is, and a GPU for which it was built."""
    monkeypatch.setitem(_library._loaded, "cuda", "_ops_cuda.so")
    monkeypatch.setattr(_library, "_codes", {0: True})


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.delitem(_library._loaded, "cuda", raising=False)


@pytest.fixture
def unreadable(monkeypatch):
    """As if tensors of the CPU were on a device."""
    for module in (_common, causal_conv1d_interface, causal_conv1d_varlen):
        monkeypatch.setattr(module, "readable", lambda x: False)


def on(device: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arguments without values."""
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        for name, x in like.items()
    }


def on_the_cpu(call: Call, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same, where a slot that is too large is refused instead of being skipped."""
    given = call.make(dtype)
    if "slots" in given:
        given["slots"][given["slots"] > 6] = -1
    return given


@every_call
@torch.no_grad()
def test_fake_tensors_on_cuda_run_the_ops(call, loaded):
    given = on_the_cpu(call)
    with FakeTensorMode():
        there = on("cuda", given)
        with Ops() as ops:
            out = call.run(there)
    assert ops.seen >= set(call.ops) and all(x.is_cuda for x in out)
    want = call.run(given)
    assert [(x.shape, x.dtype) for x in out] == [(x.shape, x.dtype) for x in want]


@every_call
@torch.no_grad()
def test_meta_tensors_run_the_ops(call):
    given = on("meta", call.make())
    with Ops() as ops:
        out = call.run(given)
    assert ops.seen >= set(call.ops) and all(x.is_meta for x in out)


@every_call
@torch.no_grad()
@pytest.mark.parametrize("reason", ["no library", "another architecture"])
def test_what_is_not_served_is_left_to_torch(call, reason, monkeypatch, loaded):
    if reason == "no library":
        monkeypatch.delitem(_library._loaded, "cuda")
    else:
        monkeypatch.setattr(_library, "_codes", {0: False})
    given, left, ops = call.make(), False, Seen()
    # Plain torch walks sequences and slots by their values.
    walks = contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException)
    with FakeTensorMode(), ops, walks:
        try:
            call.run(on("cuda", given))
        except FormerError:
            left = True
    assert not ops.seen and left == call.former


@every_call
def test_nothing_waits_for_the_device(call, unreadable, monkeypatch):
    """On the CPU, where there are values, and with gradients."""

    def evaluate(mode) -> list[Tensor]:
        given = on_the_cpu(call)
        rows = [x.requires_grad_(not call.step) for x in given.values() if x.is_floating_point()]
        with mode:
            out = call.run(given)
            loss = sum(x.double().square().sum() for x in out)
            if not call.step:
                out += torch.autograd.grad(loss, rows, allow_unused=True, materialize_grads=True)
        return [x.detach() for x in out]

    got = evaluate(Ops())
    monkeypatch.undo()
    want = evaluate(contextlib.nullcontext())
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@every_function
@torch.no_grad()
def test_compiles_on_cuda(call, loaded):
    """Whole, so that whether recurra serves is known when a call is traced."""
    found = set()

    def backend(graph, _):
        found.update(
            node.target._schema.name.removeprefix("recurra::")
            for node in graph.graph.nodes
            if isinstance(node.target, torch._ops.OpOverload)
        )
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(call.function, backend=backend, fullgraph=True)
    given = call.make()
    with FakeTensorMode():
        compiled(**on("cuda", given))
    assert found >= set(call.ops)


# ---- what serves --------------------------------------------------------------------------------


def test_served(loaded, monkeypatch):
    asked = []
    monkeypatch.setattr(_library, "_codes", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    op = torch.ops.recurra._has_cuda_code
    monkeypatch.setattr(
        torch.ops.recurra, "_has_cuda_code", lambda index: asked.append(index) or index == 0
    )
    devices = [torch.device(d) for d in ("cpu", "meta", "cuda:0", "cuda:1", "cuda:2", "mps", "xpu")]
    for _ in range(2):
        assert [_library.serves(d) for d in devices] == [
            True,
            True,
            True,
            False,
            True,
            False,
            False,
        ]
    assert asked == [0, 1], "a device is asked once, and one that is not there never"
    monkeypatch.delitem(_library._loaded, "cuda")
    assert not _library.serves(devices[2]) and op._schemas


@pytest.fixture
def autocast():
    """To float16 on CUDA, which torch.autocast does not turn on where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


def test_linear_step_leaves_many_rows_on_cuda_to_torch(loaded, autocast):
    """And what holds for few rows holds for many: no autocast, float32 parameters, no gradient."""
    narrow, wide = torch.bfloat16, torch.float32
    for rows, dtype, parameters, torch_has in (
        (4, wide, wide, False),
        (5, wide, wide, True),
        (5, narrow, narrow, True),
        (4, narrow, wide, False),
        (5, narrow, wide, False),
    ):
        with FakeTensorMode():
            x = torch.empty(rows, 3, device="cuda", dtype=dtype)
            weight = torch.empty(5, 3, device="cuda", dtype=parameters)
            bias = weight[:, 0]
            with torch.no_grad(), Ops() as ops:
                for y in (linear_step(x, weight), linear_step(x, weight, bias)):
                    assert y.shape == (rows, 5) and y.dtype == dtype
            assert ops.seen == (set() if torch_has else {"_linear_step"})
            with pytest.raises(RuntimeError, match="bias must have shape"):
                linear_step(x, weight, bias[:1])
            with pytest.raises(RuntimeError, match="linear_step has no gradient"):
                linear_step(x.requires_grad_(), weight)


def test_the_norm_casts_where_torch_computes_it(unloaded):
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda", dtype=torch.bfloat16)
        assert rms_norm(x, torch.empty(3, device="cuda"), 1e-5).dtype == torch.bfloat16


def test_the_switch():
    program = (
        "import recurra; from recurra import _library, info\n"
        "assert 'cuda' not in _library.loaded()\n"
        "assert dict(info.lines())['cuda library'] == 'not loaded: RECURRA_CUDA is 0'\n"
    )
    environment = os.environ | {"RECURRA_CUDA": "0"}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=environment)


@pytest.mark.parametrize("length", [0, 1, 4])
def test_last_inputs_stay_inside(length):
    """Whatever the ends are, which nobody checks on a GPU."""
    x = torch.randn(length, 3)
    for ends in ([0, 7, 90], [-5, 2**31, 1], [3, -9, 0]):
        got = _common.last_inputs(x, torch.tensor(ends), 4, torch.randn(2, 3, 4))
        assert got.shape == (2, 3, 4)


def test_put_in_slots():
    """Also its gradients, those of whatever a row does not write among them."""
    for rows in ([2, 0, 4], [-1, 3, -1], [-1, 9, -1, 1], [-1, -1], []):
        leaves = [torch.randn(n, 2, 3, requires_grad=True) for n in (5, len(rows))]
        got, want = leaves[0].clone(), leaves[0].clone()
        for row, index in enumerate(rows):
            if 0 <= index < 5:
                want[index] = leaves[1][row]
        indices = torch.tensor(rows, dtype=torch.int32)
        _common.put_in_slots(got, *_common.in_slots(indices, 5), leaves[1])
        assert torch.equal(got, want)
        gradients = [
            torch.autograd.grad(x.square().sum(), leaves, allow_unused=True, materialize_grads=True)
            for x in (got, want)
        ]
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)


def test_the_reference_skips_slots_that_are_not_there():
    h, a, b = torch.randn(3, 4), torch.rand(4, 4), torch.randn(4, 4)
    want = h.clone()
    want[2] = a[0] * h[2] + b[0]
    y = reference.linear_scan_step(h, a, b, slots=torch.tensor([2, 3, -1, 90]))
    torch.testing.assert_close(h, want)
    assert torch.equal(y[0], h[2]) and not y[1:].any()


# ---- on a GPU -----------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextlib.contextmanager
def without_waiting():
    """torch raises where something of its own would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
@every_call
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_computes_what_the_cpu_does(call, dtype):
    """Beside float64 on the CPU, of the same numbers, with gradients."""

    def evaluate(given, guard) -> list[Tensor]:
        rows = [x.requires_grad_(not call.step) for x in given.values() if x.is_floating_point()]
        with guard:
            out = call.run(given)
            if not call.step:
                loss = sum(x.double().square().sum() for x in out)
                out += torch.autograd.grad(loss, rows, allow_unused=True, materialize_grads=True)
        return [x.detach().cpu() for x in out]

    wide = {
        k: x.double() if x.is_floating_point() else x for k, x in on_the_cpu(call, dtype).items()
    }
    there = {k: x.cuda() for k, x in call.make(dtype).items()}
    guard = without_waiting() if call.name != "Mamba" else contextlib.nullcontext()
    got, want = evaluate(there, guard), evaluate(wide, contextlib.nullcontext())
    eps = 2.0**-23 if call.narrow and dtype == torch.float64 else torch.finfo(dtype).eps
    # What is stored in 16 bits is rounded a few times; of the others the arithmetic counts.
    bound = (16 if dtype.itemsize == 2 else 200) * eps
    for one, other in zip(got, want, strict=True):
        scale = max(other.abs().max().item(), 1.0)
        error = (one.to(other.dtype) - other).abs().max().item() / scale
        assert error <= bound, error


@pytest.mark.gpu
@on_gpu
@every_function
@torch.no_grad()
def test_a_graph_replays(call):
    given = {k: x.cuda() for k, x in call.make(torch.float32).items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = call.run(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call.run(given)
    graph.replay()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
