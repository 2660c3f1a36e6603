"""16 bits around a recurrence do not bend what its gates remember over thousands of steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from recurra.nn import (
    AarenConfig,
    HGRNConfig,
    LRNNConfig,
    LRUConfig,
    LSSLConfig,
    MambaConfig,
    MixerConfig,
    QRNNConfig,
    RGLRUConfig,
    RNNConfig,
    RWKV4Config,
    S4DConfig,
    S5Config,
    SCRNConfig,
)

WIDTH, STEPS = 8, 3000
# Of eight roundings from an input to what it adds to the state, each of half a unit in the last
# place. Inputs and weights are positive, so relative errors add up and no step adds to them. The
# logarithm of a gate is rounded by as much, which changes a memory of many steps by less.
BOUND = 8 * torch.finfo(torch.bfloat16).eps / 2
# Gates that 16 bits cannot tell from 1, and of logarithms that they can.
FAR = 8.0


def open_gate(layer: nn.Linear, rows: slice, gate: float) -> None:
    """Rows that are ``gate`` for any input, whose first channel is 1."""
    layer.weight[rows] = 0
    if layer.bias is None:
        layer.weight[rows, 0] = gate
    else:
        layer.bias[rows] = gate


def hgrn(m: nn.Module) -> None:
    open_gate(m.in_proj, slice(0, m.N), FAR)
    if m.theta is not None:
        m.theta.zero_()


def mamba(m: nn.Module) -> None:
    open_gate(m.dt_proj, slice(None), -FAR)


def rg_lru(m: nn.Module) -> None:
    m.recurrent_param.fill_(-FAR)


def lru(m: nn.Module) -> None:
    m.theta_log.fill_(-20)  # no turns, which would add states of either sign


def state_space(m: nn.Module) -> None:
    m.log_dt.fill_(-7)
    if hasattr(m, "A_imag"):
        m.A_imag.zero_()
    else:
        m.A.copy_(-0.5 * torch.eye(m.A.shape[0]))


# A configuration, what brings its gates close to 1, and which tensor of its state they keep.
CASES: dict[str, tuple[MixerConfig, Callable[[nn.Module], None], int]] = {
    "qrnn": (QRNNConfig(window=1), lambda m: open_gate(m.in_proj, slice(8, 16), FAR), 1),
    "qrnn of signed gates": (
        QRNNConfig(window=1, eig_range=(-1, 1)),
        lambda m: open_gate(m.in_proj, slice(8, 16), FAR),
        1,
    ),
    "hgrn": (HGRNConfig(), hgrn, 0),
    "hgrn of signed gates": (HGRNConfig(eig_range=(-1, 1)), hgrn, 0),
    "complex hgrn": (HGRNConfig(complex=True), hgrn, 0),
    "complex hgrn of signed gates": (HGRNConfig(complex=True, eig_range=(-1, 1)), hgrn, 0),
    "scrn": (SCRNConfig(alpha=0.9995), lambda m: None, 0),
    "rg_lru": (RGLRUConfig(), rg_lru, 1),
    "mamba": (MambaConfig(), mamba, 1),
    "rnn": (
        RNNConfig("mingru", d_conv=1),
        lambda m: open_gate(m.cell_proj, slice(0, 8), -FAR),
        1,
    ),
    "rnn of signed gates": (
        RNNConfig("mingru", d_conv=1, eig_range=(-1, 1)),
        lambda m: open_gate(m.cell_proj, slice(0, 8), -FAR),
        1,
    ),
    "lrnn": (LRNNConfig(block=3, p=1.0), lambda m: None, 0),
    "lru": (LRUConfig(r_min=0.999), lru, 0),
    "s4d": (S4DConfig(view="recurrent"), state_space, 0),
    "s4d as convolution": (S4DConfig(view="convolution"), state_space, 0),
    "s5": (S5Config(), state_space, 0),
    "lssl": (LSSLConfig(), state_space, 0),
    "rwkv4": (RWKV4Config(), lambda m: m.time_decay.fill_(-FAR), 1),
    "aaren": (AarenConfig(), lambda m: None, 0),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A mixer of 16-bit weights, an input, and the state after it as float32 makes it."""
    config, shut, which = CASES[request.param]
    torch.manual_seed(0)
    mixer = config.make(WIDTH)
    with torch.no_grad():
        for layer in mixer.modules():
            if isinstance(layer, nn.Linear | nn.Conv1d):
                layer.weight.uniform_(0.1, 0.5)
                if layer.bias is not None:
                    layer.bias.zero_()
        shut(mixer)
        x = torch.cat([torch.ones(1, 1, 1), torch.rand(1, 1, WIDTH - 1)], -1)
        x = x.bfloat16().float().expand(1, STEPS, WIDTH)
        want = mixer.bfloat16().float()(x)[1][which]
    return mixer, x, which, want.clone()


def check(state: tuple, which: int, want: torch.Tensor) -> None:
    got = state[which]
    assert got.dtype == torch.float32 and want.abs().max() > 0
    assert ((got - want).abs() <= BOUND * want.abs()).all()


@torch.no_grad()
def test_bfloat16_models(case):
    mixer, x, which, want = case
    mixer.bfloat16()
    y, state = mixer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    check(state, which, want)
    state = mixer.initial_state(1)
    for now in x.bfloat16().unbind(1):
        y = mixer.step(now, state)
    assert y.dtype == torch.bfloat16
    check(state, which, want)


@torch.no_grad()
def test_autocast(case):
    mixer, x, which, want = case
    mixer.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        check(state, which, want)
        state = mixer.initial_state(1)
        for now in x.unbind(1):
            mixer.step(now, state)
    assert y.dtype == torch.bfloat16
    check(state, which, want)
