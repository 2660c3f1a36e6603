"""log_space_scan: what logcumsumexp gives in float64, in any chunks, with its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recurra.nn import log_space_scan


def by_logcumsumexp(log_coeffs, log_values, h0):
    """Heinsen's formula, h0 positive and in front of the values as in the paper."""
    log_values = torch.cat([h0.log()[:, None], log_values], 1)
    total = F.pad(log_coeffs.cumsum(1), (0, 0, 1, 0))
    return (total + (log_values - total).logcumsumexp(1)).exp()[:, 1:]


def inputs(T: int = 200, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Those of minGRU: gates of a sigmoid, candidates of its positive function."""
    torch.manual_seed(0)
    gate, candidate = torch.randn(2, 3, T, 5, dtype=torch.float64)
    positive = torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid()).log()
    h0 = torch.rand(3, 5, dtype=torch.float64) + 0.1
    return tuple(x.to(dtype) for x in (-F.softplus(gate), positive - F.softplus(-gate), h0))


def test_it_is_logcumsumexp():
    given = [x.requires_grad_() for x in inputs()]
    (h, last), want = log_space_scan(*given), by_logcumsumexp(*given)
    torch.testing.assert_close(h, want, rtol=1e-12, atol=0)
    assert torch.equal(last, h[:, -1])
    weight = torch.randn_like(h)
    got = torch.autograd.grad((h * weight).sum(), given)
    for a, b in zip(got, torch.autograd.grad((want * weight).sum(), given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_chunks_give_the_same_bits(dtype):
    log_a, log_b, h0 = inputs(dtype=dtype)
    state = h0.float() if dtype == torch.bfloat16 else h0
    whole, last = log_space_scan(log_a, log_b, state)
    chunks = []
    for a, b in zip(log_a.split([1, 64, 135], 1), log_b.split([1, 64, 135], 1), strict=True):
        h, state = log_space_scan(a, b, state)
        chunks.append(h)
    assert torch.equal(torch.cat(chunks, 1), whole) and torch.equal(state, last)


def test_long_float32_sequences_keep_their_digits():
    log_a, log_b, h0 = inputs(T=20000)
    want = by_logcumsumexp(log_a, log_b, h0)
    got, _ = log_space_scan(log_a.float(), log_b.float(), h0.float())
    there = by_logcumsumexp(log_a.float(), log_b.float(), h0.float())

    def error(h: torch.Tensor) -> float:
        return ((h.double() - want) / want).abs().max().item()

    assert error(got) < 2e-6 < 1e-4 < error(there)


def test_zeros_packing_and_no_state():
    log_a, log_b, _ = inputs(T=30)
    log_a[:, 7], log_b[:, 7:9] = -torch.inf, -torch.inf
    h, _ = log_space_scan(log_a, log_b)
    assert torch.equal(h[:, 0], log_b[:, 0].exp()) and not h[:, 7:9].any() and h[:, 9:].all()
    packed, last = log_space_scan(log_a[:1], log_b[:1], cu_seqlens=torch.tensor([0, 12, 12, 30]))
    apart = [log_space_scan(log_a[:1, s], log_b[:1, s])[0] for s in (slice(12), slice(12, 30))]
    assert torch.equal(packed, torch.cat(apart, 1)) and not last[1].any()
