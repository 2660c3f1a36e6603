"""What is true of linear_scan alone."""

from __future__ import annotations

import pytest
import torch

from bounds import unit
from recurra import linear_scan
from support import DTYPES, bits, same_bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_gate_starts_anew(dtype):
    """What follows a zero gate does not depend on any finite past; 0 * NaN and 0 * Inf are NaN."""
    torch.manual_seed(0)
    a, b = torch.rand(2, 40, 33).to(dtype), torch.randn(2, 40, 33).to(dtype)
    a[:, 20] = 0
    h, last = linear_scan(a, b)
    other = b.clone()
    other[:, :20] *= -7
    again, last_again = linear_scan(a, other)
    assert same_bits(h[:, 20:], again[:, 20:]) and same_bits(last, last_again)
    assert same_bits(h[:, 20], b[:, 20])
    for bad in (float("nan"), float("inf")):
        other = b.clone()
        other[1, 3, 5] = bad
        h, _ = linear_scan(a, other)
        assert h[1, 20:, 5].isnan().all() and h[1, :3, 5].isfinite().all()
        assert h[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_million_steps_near_decay_one(dtype):
    """T = 2^20 at decay 1 - 2^-20: the bound is itself a linear scan, run in float64."""
    T = 2**20
    torch.manual_seed(0)
    a = torch.full((1, 1, 1), 1 - 2.0**-20, dtype=torch.float32)
    b = torch.randn(1, T, 2).to(dtype)
    log_a = dtype != torch.float32  # no 16-bit number lies that near to 1
    if log_a:
        a = torch.full((1, 1, 1), -(2.0**-20)).to(dtype)
    h, last = linear_scan(a, b, log_a=log_a)
    wide, x = a.double(), b.double()
    exact, _ = linear_scan(wide, x, log_a=log_a)
    u = unit(dtype)
    gate = wide.exp() if log_a else wide
    before = torch.cat([torch.zeros(1, 1, 2).double(), exact[:, :-1]], 1)
    gate_error = 4 * u.u * gate if log_a else 0 * gate
    source = u.u * ((gate * before).abs() + x.abs() + exact.abs()) + gate_error * before.abs()
    E, _ = linear_scan(gate, source)
    assert ((h.double() - exact).abs() <= 2 * E + u.storage_u * exact.abs()).all()
    assert ((last.double() - exact[:, -1]).abs() <= 2 * E[:, -1] + u.u * exact[:, -1].abs()).all()


@pytest.mark.parametrize("log_a", [False, True])
def test_long_complex_memories(log_a):
    """|lambda| = 0.9999 over 65536 steps, constant over time: the bound is a scan too."""
    T, D = 65536, 8
    torch.manual_seed(0)
    angle = torch.linspace(-3, 3, D)
    a = torch.polar(torch.full((D,), 0.9999), angle)[None, None]
    if log_a:
        a = torch.complex(torch.full((D,), 0.9999).log(), angle)[None, None]
    b = torch.randn(1, T, D, dtype=torch.complex64)
    h, last = linear_scan(a, b, log_a=log_a)
    wide, x = a.to(torch.complex128), b.to(torch.complex128)
    exact, _ = linear_scan(wide, x, log_a=log_a)
    u = unit(torch.complex64).u
    gate = (wide.exp() if log_a else wide).abs()
    before = torch.cat([torch.zeros(1, 1, D).double(), exact[:, :-1].abs()], 1)
    # Three roundings of a product, one of the sum; an exponential is within twelve units.
    source = u * (3 * gate * before + exact.abs() + (12 * gate * before if log_a else 0))
    E, _ = linear_scan(gate, source)
    assert ((h.to(torch.complex128) - exact).abs() <= 2 * E + u * exact.abs()).all()
    assert torch.equal(last, h[:, -1])


def test_a_constant_gate_is_not_expanded():
    """Neither memory nor bits tell it from one that was written out."""
    torch.manual_seed(0)
    b = torch.randn(2, 300, 40, dtype=torch.complex64)
    a = torch.polar(torch.rand(1, 1, 40), torch.rand(1, 1, 40))
    for log_a in (False, True):
        written_out = a.expand(2, 300, 40).clone()
        for reverse in (False, True):
            got = linear_scan(a, b, log_a=log_a, reverse=reverse)
            want = linear_scan(written_out, b, log_a=log_a, reverse=reverse)
            assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])


def test_what_comes_as_a_conjugate_view():
    torch.manual_seed(0)
    a, b = torch.rand(2, 9, 5), torch.randn(2, 9, 5, dtype=torch.complex64)
    a = torch.polar(a, a)
    h, _ = linear_scan(a.conj(), b.conj())
    assert same_bits(h, linear_scan(a, b)[0].conj())


def test_the_state_is_not_a_view_of_the_output():
    a, b = torch.rand(2, 3, 4), torch.randn(2, 3, 4)
    h, last = linear_scan(a, b)
    before = bits(h).clone()
    last.zero_()
    assert torch.equal(bits(h), before)
