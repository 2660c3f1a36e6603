"""The stand-ins' modules and names, and recurra.install() of packages."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import recurra
from recurra.compat import _common, causal_conv1d, mamba_ssm
from recurra.compat.mamba_ssm.modules.mamba_simple import Mamba
from recurra.compat.mamba_ssm.ops import selective_scan_interface as scan
from recurra.compat.mamba_ssm.ops.triton import layer_norm, layernorm_gated
from recurra.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from recurra.compat.mamba_ssm.utils.generation import InferenceParams
from test_compat_kernels import conv_formula, rand, same, same_gradients, scan_formula


@pytest.fixture(autouse=True)
def alone():
    torch.manual_seed(0)
    yield
    recurra.uninstall()


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("form", ["projected", "norms", "given", "given norms", "one group"])
def test_inner(form, is_complex):
    D, L, N, R, M = 4, 7, 3, 2, 5
    size = 2 * N if is_complex else N
    A = -torch.rand(D, N, dtype=torch.float64)
    A = torch.complex(A, torch.randn_like(A)) if is_complex else A
    given, normed = (
        form in ("given", "given norms", "one group"),
        form not in ("projected", "given"),
    )
    group = (1,) if form == "one group" else ()
    long = 2 * L if is_complex else L
    inputs = {
        "xz": rand(2, 2 * D, L),
        "conv1d_weight": rand(D, 1, 4),
        "conv1d_bias": rand(D),
        "x_proj_weight": rand(R + 2 * size, D),
        "delta_proj_weight": rand(D, R),
        "out_proj_weight": rand(M, D),
        "out_proj_bias": rand(M),
        "A": A.requires_grad_(),
        "B": rand(2, *group, N, long) if given else None,
        "C": rand(2, *group, N, long) if given else None,
        "D": rand(D),
        "delta_bias": rand(D),
        "B_proj_bias": None if given else rand(size),
        "C_proj_bias": None if given else rand(size),
    }
    if normed:
        inputs |= {"b_rms_weight": rand(size), "c_rms_weight": rand(size)}
        inputs |= {"dt_rms_weight": rand(D)}

    def ours(*values):
        return scan.mamba_inner_fn(**dict(zip(inputs, values, strict=True)), b_c_dt_rms_eps=0.1)

    def oracle(*values):
        v = dict(zip(inputs, values, strict=True))
        x, z = v["xz"].chunk(2, 1)
        x, _ = conv_formula(x, v["conv1d_weight"][:, 0], v["conv1d_bias"])
        both = x.transpose(1, 2) @ v["x_proj_weight"].T
        delta = both[..., :R] @ v["delta_proj_weight"].T
        if normed:
            delta = rms(delta, v["dt_rms_weight"], 0.1)

        def rows(x, bias, weight):
            x = x if bias is None else x + bias
            x = rms(x, weight, 0.1) if weight is not None else x
            if is_complex:
                x = torch.view_as_complex(x.unflatten(2, (-1, 2)))
                return torch.view_as_real(x).permute(0, 2, 1, 3).flatten(2)
            return x.transpose(1, 2)

        def unrolled(x):
            x = x.flatten(1, 2) if group else x
            return x.unflatten(2, (L, -1)).transpose(1, 2).flatten(2)

        B, C = v["B"], v["C"]
        if given and normed:
            B = rows(unrolled(B), None, v["b_rms_weight"])
            C = rows(unrolled(C), None, v["c_rms_weight"])
        if not given:
            B = rows(both[..., R : R + size], v["B_proj_bias"], v.get("b_rms_weight"))
            C = rows(both[..., R + size :], v["C_proj_bias"], v.get("c_rms_weight"))
        y, _ = scan_formula(x, delta.transpose(1, 2), v["A"], B, C, v["D"], z, v["delta_bias"])
        return y.transpose(1, 2) @ v["out_proj_weight"].T + v["out_proj_bias"]

    # A complex parameter's gradient is compared as such; used ones only.
    used = {k: v for k, v in inputs.items() if not (given and k in ("B_proj_bias", "C_proj_bias"))}
    inputs = used
    same_gradients(ours, oracle, list(inputs.values()), 1e-9)
    if form == "projected":
        same(scan.mamba_inner_ref(**inputs), oracle(*inputs.values()), 1e-9)


def test_mamba_is_the_mixer():
    ours = recurra.nn.Mamba(24)
    theirs = Mamba(24, layer_idx=3)
    theirs.load_state_dict(ours.state_dict())
    assert list(theirs.state_dict()) == [
        "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight",
        "dt_proj.weight", "dt_proj.bias", "out_proj.weight",
    ]  # fmt: skip
    x = torch.randn(2, 9, 24)
    want, _ = ours(x)
    same(theirs(x), want, 1e-5)
    with torch.no_grad():
        params = InferenceParams(max_seqlen=9, max_batch_size=2)
        outputs = [theirs(x[:, :5], inference_params=params)]
        for t in range(5, 9):
            params.seqlen_offset = t
            outputs.append(theirs(x[:, t : t + 1], inference_params=params))
        same(torch.cat(outputs, 1), want, 1e-5)
        states = theirs.allocate_inference_cache(2, 9)
        assert [tuple(s.shape) for s in states] == [(2, 48, 4), (2, 48, 16)]
        first = theirs.step(x[:, :1], *states)
        same(first[0], want[:, :1], 1e-5)
    short = Mamba(8, d_state=2, d_conv=3, expand=3, dt_rank=5, bias=True, dtype=torch.bfloat16)
    assert short(torch.randn(1, 4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert short.A_log._no_weight_decay and short.dt_proj.bias._no_reinit
    with pytest.raises(NotImplementedError, match="dt_init"):
        Mamba(8, dt_init="zeros")


@pytest.mark.parametrize("is_rms", [False, True])
def test_norms_of_sums(is_rms):
    x, residual, x1, weight, weight1 = rand(2, 3, 8), rand(2, 3, 8), rand(2, 3, 8), rand(8), rand(8)
    bias, bias1, scale = rand(8), rand(8), rand(2, 3)

    def norm(x, weight, bias):
        return rms(x, weight, 1e-6) + bias if is_rms else F.layer_norm(x, (8,), weight, bias, 1e-6)

    def ours(x, residual, weight, bias, scale):
        return layer_norm.layer_norm_fn(
            x, weight, bias, residual, rowscale=scale, prenorm=True, is_rms_norm=is_rms
        )

    def oracle(x, residual, weight, bias, scale):
        total = x * scale[..., None] + residual
        return norm(total, weight, bias), total

    same_gradients(ours, oracle, [x, residual, weight, bias, scale])
    flat = layer_norm.layer_norm_fn(x, weight, bias, rowscale=scale.view(-1), is_rms_norm=is_rms)
    same(flat, norm(x * scale[..., None], weight, bias))

    def two(x, weight, bias, residual, x1, weight1, bias1):
        return layer_norm.layer_norm_fn(
            x, weight, bias, residual, x1, weight1, bias1, prenorm=True, is_rms_norm=is_rms
        )

    def both(x, weight, bias, residual, x1, weight1, bias1):
        total = x + x1 + residual
        return norm(total, weight, bias), norm(total, weight1, bias1), total

    inputs = [x, weight, bias, residual, x1, weight1, bias1]
    same_gradients(two, both, inputs)
    reference = layer_norm.rms_norm_ref if is_rms else layer_norm.layer_norm_ref
    same(reference(*inputs, prenorm=True), both(*inputs))
    same(reference(x, weight, bias, residual), norm(x + residual, weight, bias))
    want = norm(x * scale[..., None], weight, bias)
    same(reference(x, weight, bias, rowscale=scale), want)
    half = reference(x.bfloat16(), weight.bfloat16(), None, upcast=True)
    want = norm(x.bfloat16().double(), weight.bfloat16().double(), 0 * bias)
    torch.testing.assert_close(half.double(), want, rtol=2**-8, atol=1e-5)


def test_norm_module_and_dropout():
    norm = layer_norm.RMSNorm(8, dropout_p=0.5)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    norm = norm.bfloat16().eval()
    y, kept = norm(x, torch.zeros(4, 8, dtype=torch.float32), prenorm=True)
    assert y.dtype == torch.bfloat16 and kept.dtype == torch.float32
    y, kept = norm(x, prenorm=True, residual_in_fp32=True)
    assert kept.dtype == torch.float32 and torch.equal(kept, x.float())
    same(y.float(), rms(x.float(), 1, 1e-5), 2**-7)
    ones, weight = torch.ones(50, 64), torch.ones(64)
    y, total, mask, mask1 = layer_norm.rms_norm_fn(
        ones, weight, None, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    assert mask1 is None and 0.65 < mask.float().mean() < 0.85
    same(total, mask / 0.75, 1e-6)
    x, x1 = torch.randn(2, 50, 64)
    y, total, *masks = layer_norm.rms_norm_fn(
        x, weight, None, None, x1, dropout_p=0.5, prenorm=True, return_dropout_mask=True
    )
    assert not torch.equal(*masks)
    same(total, 2 * (x * masks[0] + x1 * masks[1]), 1e-6)
    same(y, rms(total, 1, 1e-6), 1e-5)
    again = layer_norm.rms_norm_ref(
        x, weight, None, None, x1, None, None, 1e-6, 0.5, None, True, *masks
    )
    same((y, total), again, 1e-5)
    assert not layer_norm.rms_norm_fn(x, weight, None, dropout_p=1.0).any()
    train = layer_norm.RMSNorm(64, dropout_p=0.5)
    assert (train(x) == 0).any() and not (train.eval()(x) == 0).any()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group", [None, 4])
def test_gated_norms(before, group):
    x, z, weight, bias = rand(3, 8), rand(3, 8), rand(8), rand(8)

    def oracle(x, z, weight, bias):
        x = x if before else x * F.silu(z)
        y = rms(x.unflatten(1, (-1, group or 8)), 1, 1e-5).flatten(1) * weight + bias
        return y * F.silu(z) if before else y

    def ours(x, z, weight, bias):
        return layernorm_gated.rmsnorm_fn(x, weight, bias, z, 1e-5, group, before)

    same_gradients(ours, oracle, [x, z, weight, bias])
    args = (x.float(), weight.float(), bias.float(), z.float(), 1e-5, group, before)
    same(layernorm_gated.rms_norm_ref(*args).double(), oracle(x, z, weight, bias), 1e-4)
    norm = layernorm_gated.RMSNorm(8, group_size=group, norm_before_gate=before).double()
    same(norm(x, z), oracle(x, z, torch.ones(8), 0))
    centred = layernorm_gated.LayerNorm(8).double()
    same(centred(x), F.layer_norm(x, (8,), eps=1e-5))


ABSENT = [
    "mamba_ssm.Mamba2",
    "mamba_ssm.MambaLMHeadModel",
    "mamba_ssm.ops.triton.selective_state_update.other",
    "mamba_ssm.modules.mamba_simple.Block",
    "causal_conv1d.causal_conv1d_interface.CausalConv1dFn",
    "fla.ops.chunk_gla",
    "fla.modules.ShortConvolution",
]


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_missing_is_absent(name):
    module, _, attribute = f"recurra.compat.{name}".rpartition(".")
    found = importlib.import_module(module)
    assert not hasattr(found, attribute)
    with pytest.raises(AttributeError, match=f"recurra.*does not have {attribute}"):
        getattr(found, attribute)
    with pytest.raises(ImportError, match="recurra"):
        exec(f"from {module} import {attribute}")


def test_install_of_packages(monkeypatch):
    with recurra.install(transformers=False) as done:
        assert done.packages == ("causal_conv1d", "fla", "mamba_ssm")
        import causal_conv1d as package
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update as one

        assert one is selective_state_update
        assert package is causal_conv1d
        for missing in ("mamba_ssm.ops.triton.ssd_combined", "fla.ops.kda", "causal_conv1d.cpp"):
            with pytest.raises(ModuleNotFoundError, match=f"recurra.*does not have {missing}"):
                importlib.import_module(missing)
    assert not [m for m in sys.modules if m.partition(".")[0] in done.packages]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mamba_ssm")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match="there is no transformers"):
        recurra.install(transformers=True)


def test_real_packages_stay_unless_forced(tmp_path, monkeypatch):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("real = True\n")
    (tmp_path / "mamba_ssm" / "inner.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    done = recurra.install(transformers=False)
    assert done.real == ("mamba_ssm",) and "force=True" in str(done)
    real = importlib.import_module("mamba_ssm")
    inner = importlib.import_module("mamba_ssm.inner")
    assert real.real
    recurra.install(force=True, transformers=False)
    assert importlib.import_module("mamba_ssm") is mamba_ssm
    recurra.uninstall()
    assert sys.modules["mamba_ssm"] is real and sys.modules["mamba_ssm.inner"] is inner
    del sys.modules["mamba_ssm"], sys.modules["mamba_ssm.inner"]


def test_importing_recurra_touches_nothing():
    code = (
        "import sys; before = list(sys.meta_path); import recurra; assert sys.meta_path == before; "
        "assert not {'mamba_ssm', 'causal_conv1d', 'fla', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stand_ins_compile():
    u, delta = torch.randn(2, 2, 6, 9)
    A, B, C, z = -torch.rand(6, 4), torch.randn(2, 4, 9), torch.randn(2, 4, 9), torch.randn(2, 6, 9)
    weight = torch.randn(6, 4)

    def whole(u, delta):
        x = causal_conv1d.causal_conv1d_fn(u, weight, activation="silu")
        return mamba_ssm.selective_scan_fn(x, delta, A, B, C, None, z, None, True, True)

    def step(x, dt, conv_state, state):
        x = causal_conv1d.causal_conv1d_update(x, conv_state, weight, None, "silu")
        return selective_state_update(state, x, dt, A, B[..., 0], C[..., 0], dt_softplus=True)

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    same(compiled(u, delta), whole(u, delta), 1e-6)
    states = [torch.randn(2, 6, 5), torch.randn(2, 6, 4)]
    copies = [s.clone() for s in states]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        same(
            compiled(u[..., 0], delta[..., 0], *copies),
            step(u[..., 0], delta[..., 0], *states),
            1e-6,
        )
    same(copies, states, 1e-6)


class Subclass(torch.Tensor):
    """One that only has another name."""


def test_compiled_steps_in_slots():
    """An index that is too large is refused there too, or skipped, where nobody can look."""
    x, dt, state = torch.randn(2, 6), torch.randn(2, 6), torch.randn(3, 6, 4).double()
    A, B, conv_state = -torch.rand(6, 4), torch.randn(2, 4), torch.randn(3, 6, 5)

    def ssm(state, slots):
        return selective_state_update(state, x, dt, A, B, B, state_batch_indices=slots)

    def conv(state, slots):
        return causal_conv1d.causal_conv1d_update(x, state, A, conv_state_indices=slots)

    for step, whole, name in (
        (ssm, state, "state_batch_indices"),
        (conv, conv_state, "conv_state_indices"),
    ):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got, want = whole.clone(), whole.clone()
        slots = torch.tensor([2, -1])
        same(compiled(got, slots), step(want, slots), 1e-6)
        same(got, want, 1e-6)
        with pytest.raises(RuntimeError, match=f"{name} must be less than the number of states"):
            compiled(got, torch.tensor([1, 3]))
    for subclass in (Subclass, lambda x: torch.nn.Parameter(x, requires_grad=False)):
        with pytest.raises(RuntimeError, match="state_batch_indices must be less than"):
            ssm(state, subclass(torch.tensor([1, 3])))
    rows, used = _common.in_slots(torch.tensor([2, -1, 3, 0]), 3)
    assert rows.tolist() == [2, 0, 0, 0] and used.tolist() == [True, False, False, True]
