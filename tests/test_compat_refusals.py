"""What the stand-ins refuse, with sentences in the caller's words, and that nothing is changed."""

from __future__ import annotations

import re

import pytest
import torch

from recurra.compat import causal_conv1d, mamba_ssm
from recurra.compat.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from recurra.compat.fla.modules.convolution import causal_conv1d as fla_conv
from recurra.compat.fla.ops.hgrn import fused_recurrent_hgrn
from recurra.compat.mamba_ssm.modules.mamba_simple import Mamba
from recurra.compat.mamba_ssm.ops.triton import layer_norm, layernorm_gated
from recurra.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update
from recurra.compat.mamba_ssm.utils.generation import InferenceParams

X = torch.randn(2, 3, 5)  # (batch, dim, seqlen)
ROWS = torch.randn(2, 5, 3)  # (batch, seqlen, dim)
WEIGHT = torch.randn(3, 4)
A = -torch.rand(3, 4)
B = torch.randn(2, 4, 5)
ONES = torch.ones(5)


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def convolve(x=X, weight=WEIGHT, *args, **kwargs):
    return causal_conv1d.causal_conv1d_fn(x, weight, *args, **kwargs)


def scan(*, u=X, delta=X, A=A, B=B, C=B, **kwargs):
    return mamba_ssm.selective_scan_fn(u, delta, A, B, C, **kwargs)


def inner(**kwargs):
    arguments = {
        "xz": torch.randn(2, 6, 5), "conv1d_weight": WEIGHT[:, None], "conv1d_bias": None,
        "x_proj_weight": torch.randn(9, 3), "delta_proj_weight": torch.randn(3, 1),
        "out_proj_weight": torch.randn(2, 3), "out_proj_bias": None, "A": A,
    }  # fmt: skip
    return mamba_ssm.mamba_inner_fn(**(arguments | kwargs))


def fla(x=ROWS, weight=WEIGHT, **kwargs):
    return fla_conv(x, weight, **kwargs)


def norm(*args, **kwargs):
    return layer_norm.rms_norm_fn(X, *args, **kwargs)


# The sentence without the function, and the call.
REFUSED = [
    # causal_conv1d
    ('activation must be None, "silu" or "swish", got "relu"', lambda: convolve(activation="relu")),
    ("x must have shape (batch, dim, seqlen), got (3, 5)", lambda: convolve(X[0])),
    ("x must have dtype float32, float64, bfloat16 or float16, got int64",
     lambda: convolve(X.long())),
    ("weight must have shape (dim, width) with dim = 3 as in x, got (2, 4)",
     lambda: convolve(weight=WEIGHT[:2])),
    ("weight must have shape (dim, width), got (3, 1, 4)",
     lambda: convolve(weight=WEIGHT[:, None])),
    ("weight must have dtype float32 where x has float32, got float64",
     lambda: convolve(weight=WEIGHT.double())),
    ("bias must have shape (dim,) = (3,), got (4,)", lambda: convolve(bias=torch.zeros(4))),
    ("seq_idx must be None with initial or final states",
     lambda: convolve(seq_idx=torch.zeros(2, 5).int(), return_final_states=True)),
    ("seq_idx must be None with initial or final states",
     lambda: convolve(seq_idx=torch.zeros(2, 5).int(), initial_states=X[..., :3])),
    ("seq_idx must have shape (batch, seqlen) = (2, 5), got (5,)",
     lambda: convolve(seq_idx=torch.zeros(5).int())),
    ("seq_idx must have dtype int32 or int64, got float32",
     lambda: convolve(seq_idx=torch.zeros(2, 5))),
    ("initial_states must have shape (batch, dim, width - 1) = (2, 3, 3), got (2, 3, 4)",
     lambda: convolve(initial_states=X[..., :4])),
    ("final_states_out must have shape (batch, dim, width - 1) = (1, 3, 3), got (2, 3, 3)",
     lambda: convolve(X[:1], return_final_states=True, final_states_out=torch.zeros(2, 3, 3))),
    ("final_states_out is written in place and must not be expanded, got strides (0, 3, 1)",
     lambda: convolve(return_final_states=True,
                      final_states_out=torch.zeros(1, 3, 3).expand(2, 3, 3))),
    ("cu_seqlens must have dtype int32 or int64, got float32",
     lambda: causal_conv1d_varlen_states(ROWS[0], torch.tensor([0.0, 5.0]), 4)),
    ("state_len must be at least 0, got -1",
     lambda: causal_conv1d_varlen_states(ROWS[0], integers(0, 5), -1)),
    ("x must have shape (total, dim), got (2, 5, 3)",
     lambda: causal_conv1d_varlen_states(ROWS, integers(0, 5), 4)),
    # selective_scan_fn
    ("u must have shape (batch, dim, seqlen), got (3, 5)", lambda: scan(u=X[0])),
    ("delta must have shape (batch, dim, seqlen) = (2, 3, 5), got (1, 3, 5)",
     lambda: scan(delta=X[:1])),
    ("delta must have dtype float32 where u has float32, got bfloat16",
     lambda: scan(delta=X.bfloat16())),
    ("A must have shape (dim, dstate) = (3, 4), got (2, 4)", lambda: scan(A=A[:2])),
    ("A must have dtype", lambda: scan(A=A.long())),
    ("B must have shape (batch, dstate, seqlen) = (2, 4, 5), got (2, 4, 4)",
     lambda: scan(B=B[..., :4])),
    ("C must have shape (batch, dstate, 2 seqlen) = (2, 4, 10), got (2, 4, 5)",
     lambda: scan(A=A.cfloat(), B=B.repeat(1, 1, 2))),
    ("B must be real, parts alternating along 2 seqlen",
     lambda: scan(A=A.cfloat(), B=B.cfloat())),
    ("B must be real where it is constant and A is real", lambda: scan(B=A.cfloat())),
    ("C must be complex where it is constant and A is complex",
     lambda: scan(A=A.cfloat(), B=A.cfloat(), C=A)),
    ("C must have shape (dim, dstate) = (3, 4), got (2, 4)", lambda: scan(C=A[:2])),
    ("the number of groups of B must divide dim = 3, got 2",
     lambda: scan(B=B[:, None].expand(-1, 2, -1, -1))),
    ("C must have the dtype of u, torch.float32, got torch.bfloat16",
     lambda: scan(B=A, C=B.bfloat16())),
    ("z must have shape (batch, dim, seqlen) = (2, 3, 5), got (3, 5)", lambda: scan(z=X[0])),
    ("D must have shape (dim,) = (3,), got (3, 5)", lambda: scan(D=X[0])),
    ("delta_bias must have shape (dim,) = (3,), got (2,)", lambda: scan(delta_bias=ONES[:2])),
    # mamba_inner_fn
    ("checkpoint_lvl must be 0 or 1, got 2", lambda: inner(checkpoint_lvl=2)),
    ("xz must have shape (batch, 2 dim, seqlen), got (2, 3, 5)", lambda: inner(xz=X)),
    ("conv1d_weight must have shape (dim, 1, width), got (3, 4)",
     lambda: inner(conv1d_weight=WEIGHT)),
    ("x_proj_weight must have shape (rank + 2 dstate, dim) = (9, 3), got (10, 3)",
     lambda: inner(x_proj_weight=torch.randn(10, 3))),
    ("x_proj_weight must have shape (rank + 2 dstate, dim) = (9, 3), got (4, 3)",
     lambda: inner(x_proj_weight=torch.randn(4, 3), B=B)),
    ("delta_proj_weight must have shape (dim, rank) = (3, 1), got (2, 1)",
     lambda: inner(delta_proj_weight=torch.randn(2, 1))),
    ("out_proj_weight must have shape (d_model, dim) = (2, 3), got (2, 4)",
     lambda: inner(out_proj_weight=torch.randn(2, 4))),
    ("b_rms_weight must have shape (dstate,) = (4,), got (5,)", lambda: inner(b_rms_weight=ONES)),
    ("dt_rms_weight must have shape (dim,) = (3,), got (1,)",
     lambda: inner(dt_rms_weight=ONES[:1])),
    ("C must be (batch, 1, dstate, seqlen) to be normed, got (3, 4)",
     lambda: inner(C=A, c_rms_weight=ONES[:4])),
    # norms
    ("rms_norm_fn: weight must have shape (dim,) = (5,), got (4,)", lambda: norm(ONES[:4], None)),
    ("bias must have shape (dim,) = (5,), got (1,)", lambda: norm(ONES, ONES[:1])),
    ("bias1 must have shape (dim,) = (5,), got (1,)",
     lambda: norm(ONES, None, weight1=ONES, bias1=ONES[:1])),
    ("x1 must have shape of x = (2, 3, 5), got (3, 5)", lambda: norm(ONES, None, x1=X[0])),
    ("residual must have shape of x = (2, 3, 5), got (5,)", lambda: norm(ONES, None, ONES)),
    ("rowscale must be None beside x1",
     lambda: norm(ONES, None, x1=X, rowscale=torch.ones(2, 3))),
    ("rowscale must have shape (2, 3), one factor a row of x, got (3,)",
     lambda: norm(ONES, None, rowscale=ONES[:3])),
    ("dropout_p must be between 0 and 1, got 2.0", lambda: norm(ONES, None, dropout_p=2.0)),
    ("layer_norm_fn: x must have dtype",
     lambda: layer_norm.layer_norm_fn(X.long(), ONES, None)),
    ("rmsnorm_fn: group_size must divide dim = 5, got 2",
     lambda: layernorm_gated.rmsnorm_fn(X, ONES, None, group_size=2)),
    ("group_size must divide dim = 5, got 0",
     lambda: layernorm_gated.rmsnorm_fn(X, ONES, None, group_size=0)),
    ("layernorm_fn: z must have shape of x = (2, 3, 5), got (5,)",
     lambda: layernorm_gated.layernorm_fn(X, ONES, None, ONES)),
    # fla
    ("cp_context must be None", lambda: fla(cp_context=object())),
    ("seq_idx must be None, cu_seqlens tells", lambda: fla(seq_idx=integers(0))),
    ("weight must have shape (D, W), got None", lambda: fla(weight=None)),
    ("residual must have shape of x = (2, 5, 3), got (2, 5, 1)",
     lambda: fla(residual=ROWS[..., :1])),
    ("initial_state must have shape (N, D, W) = (2, 3, 4), got (2, 3, 3)",
     lambda: fla(initial_state=torch.zeros(2, 3, 3))),
    ("x must have batch size B = 1 with cu_seqlens", lambda: fla(cu_seqlens=integers(0, 5))),
    ("g must have shape of x = (2, 5, 3), got (1, 5, 3)",
     lambda: fused_recurrent_hgrn(ROWS, ROWS[:1])),
    ("initial_state must have shape (N, D) = (2, 3), got (3,)",
     lambda: fused_recurrent_hgrn(ROWS, ROWS, ROWS[0, 0])),
    # Mamba
    ("hidden_states must be one input, got 2",
     lambda: Mamba(8).step(torch.randn(1, 2, 8), None, None)),
    ("layer_idx must be given where inference_params are used",
     lambda: Mamba(8)(torch.randn(1, 2, 8), InferenceParams(9, 1))),
]  # fmt: skip


@pytest.mark.parametrize("sentence, call", REFUSED, ids=[sentence for sentence, _ in REFUSED])
def test_wrong_calls_get_a_sentence(sentence, call):
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        call()


# What is wrong beside a call that is right; for conv_state and state a shape.
CONV_STEPS = [
    ({"x": X[..., 0], "activation": "relu"},
     'activation must be None, "silu" or "swish", got "relu"'),
    ({"activation": "relu"}, 'activation must be None, "silu" or "swish", got "relu"'),
    ({"x": X[..., 0], "bias": torch.zeros(4)}, "bias must have shape (dim,) = (3,), got (4,)"),
    ({"weight": WEIGHT[:2]}, "weight must have shape (dim, width) with dim = 3"),
    ({"conv_state": (2, 3, 2)}, "state_len must be at least width - 1 = 3, got 2"),
    ({"conv_state": (2, 3)}, "conv_state must have shape (batch, dim, state_len), got (2, 3)"),
    ({"conv_state": (3, 3, 6)}, "(batch, dim, state_len) = (2, 3, 6), got (3, 3, 6)"),
    ({"conv_state": (2, 5, 6), "cache_seqlens": integers(0, 1)}, "= (2, 3, 6), got (2, 5, 6)"),
    ({"cache_seqlens": integers(0)}, "cache_seqlens must have shape (batch,) = (2,), got (1,)"),
    ({"cache_seqlens": ONES[:2]}, "cache_seqlens must have dtype int32 or int64, got float32"),
    ({"conv_state_indices": integers(0, 1, 2)}, "must have shape (batch,) = (2,), got (3,)"),
    ({"conv_state_indices": integers(0, 2)},
     "conv_state_indices must be less than the number of states, 2, got 2"),
    ({"conv_state_indices": integers(1, 1)},
     "conv_state_indices must not repeat a state, got 1 more than once"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong, sentence", CONV_STEPS)
def test_refused_convolution_steps_leave_the_state(wrong, sentence, dtype):
    state = torch.randn(wrong.get("conv_state", (2, 3, 6))).to(dtype)
    before = state.clone()
    arguments = {"x": X, "weight": WEIGHT} | wrong | {"conv_state": state}
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        causal_conv1d.causal_conv1d_update(**arguments)
    assert torch.equal(state, before)


H, P, N = 4, 3, 5
HEADS = torch.randn(2, H, P)
STEPS = [
    ({"state": (2, 3)}, "state must have 3 or 4 dimensions, got 2"),
    ({"state": (3, H, P, N)}, "x must have shape (batch, heads, dim) = (3, 4, 3), got (2, 4, 3)"),
    ({"dt": HEADS.flatten(1)}, "dt must have shape (batch, heads, dim) = (2, 4, 3), got (2, 12)"),
    ({"z": HEADS.mT}, "z must have shape (batch, heads, dim) = (2, 4, 3), got (2, 3, 4)"),
    ({"A": -torch.rand(H, P, 1)}, "A must have shape (heads, dim, dstate) = (4, 3, 5)"),
    ({"D": torch.ones(P, H)}, "D must have shape (heads, dim) = (4, 3), got (3, 4)"),
    ({"dt_bias": torch.ones(H)}, "dt_bias must have shape (heads, dim) = (4, 3), got (4,)"),
    ({"B": torch.randn(2, 3, N)}, "the number of groups must divide heads = 4, got 3"),
    ({"B": torch.randn(2, 4)}, "B must have shape (batch, dstate) = (2, 5), got (2, 4)"),
    ({"C": torch.randn(2, 1, N)}, "C must have shape of B = (2, 2, 5), got (2, 1, 5)"),
    ({"state_batch_indices": integers(0, 2)},
     "state_batch_indices must be less than the number of states, 2, got 2"),
    ({"state_batch_indices": integers(1, 1)},
     "state_batch_indices must not repeat a state, got 1 more than once"),
    ({"state_batch_indices": ONES[:2]},
     "state_batch_indices must have dtype int32 or int64, got float32"),
    ({"state_batch_indices": integers(0, 1)[:, None]},
     "state_batch_indices must have shape (batch,) = (2,), got (2, 1)"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong, sentence", STEPS)
def test_refused_steps_leave_the_state(wrong, sentence, dtype):
    state = torch.randn(wrong.get("state", (2, H, P, N))).to(dtype)
    before = state.clone()
    group = torch.randn(2, 2, N)
    arguments = {"x": HEADS, "dt": HEADS, "A": -torch.rand(H, P, N), "B": group, "C": group}
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        selective_state_update(**(arguments | wrong | {"state": state}))
    assert torch.equal(state, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_cannot_be_written(dtype):
    shared = torch.zeros(1, 3, 4, dtype=dtype).expand(2, -1, -1)
    x, group = X[..., 0], B[..., 0]
    with pytest.raises(RuntimeError, match="state is written in place and must not be expanded"):
        selective_state_update(shared, x, x, A, group, group)
    with pytest.raises(RuntimeError, match="conv_state is written in place and must not be"):
        causal_conv1d.causal_conv1d_update(x, shared, WEIGHT)
    whole = torch.zeros(2, 3, 4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="conv_state must have dtype float32, .* got int32"):
        causal_conv1d.causal_conv1d_update(x, whole, WEIGHT)
