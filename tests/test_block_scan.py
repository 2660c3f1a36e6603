"""What is true of block_scan alone."""

from __future__ import annotations

import pytest
import torch

from recurra import block_scan, block_scan_step, linear_scan
from support import DTYPES, Draw, same_bits


@pytest.mark.parametrize("k", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_permutations_compose_exactly(dtype, k):
    """A thousand permutations in a row: a state that no diagonal recurrence could follow."""
    draw = Draw(k)
    N, T = 5, 1000
    moved = torch.stack([torch.randperm(k, generator=draw.generator) for _ in range(T * N)])
    A = torch.eye(k, dtype=dtype)[moved].view(1, T, N, k, k)
    h0 = torch.arange(1, k + 1).to(torch.promote_types(dtype, torch.float32)).expand(1, N, k)
    h, last = block_scan(A, torch.zeros(1, T, N, k, dtype=dtype), h0)
    want = torch.arange(k).expand(N, k)
    for t, rows in enumerate(moved.view(T, N, k)):
        want = want.gather(1, rows)
        assert torch.equal(h[0, t].long() - 1, want), t
    assert torch.equal(last[0].long() - 1, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_one_number_are_linear_scan(dtype):
    draw = Draw(1)
    a, b = draw.uniform(-1, 1, 2, 70, 33, dtype=dtype), draw.normal(2, 70, 33, dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in (a, b)]
    others = [x.clone().requires_grad_() for x in (a, b)]
    h, last = block_scan(leaves[0][..., None, None], leaves[1][..., None])
    want, want_last = linear_scan(*others)
    assert same_bits(h[..., 0], want) and same_bits(last[..., 0], want_last)
    dh = draw.normal(2, 70, 33, dtype=dtype)
    got = torch.autograd.grad(h, leaves, dh[..., None])
    for x, y in zip(got, torch.autograd.grad(want, others, dh), strict=True):
        assert same_bits(x, y)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 13, 16])
def test_every_size_of_block_and_remainder(k):
    """Blocks are read in runs: whatever is left over has the bits of blocks that are alone."""
    draw = Draw(k)
    for N in (1, 15, 16, 17, 31, 33, 65, 130):
        A = draw.uniform(-1, 1, 1, 6, N, k, k, dtype=torch.float32) / k
        b = draw.normal(1, 6, N, k, dtype=torch.float32)
        dh = draw.normal(1, 6, N, k, dtype=torch.float32)

        def both(*x, dh):
            x = [v.detach().requires_grad_() for v in x]
            h, _ = block_scan(*x)
            return [h, *torch.autograd.grad(h, x, dh)]

        whole = both(A, b, dh=dh)
        for n in {0, N // 2, N - 1}:
            alone = both(A[:, :, n : n + 1], b[:, :, n : n + 1], dh=dh[:, :, n : n + 1])
            for x, y in zip(whole, alone, strict=True):
                assert same_bits(x[:, :, n : n + 1], y), (k, N, n)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_four_have_the_same_bits_in_any_layout(dtype, reverse):
    """Where they lie side by side they are worked on as they lie, elsewhere by lanes."""
    draw = Draw(4)
    A = draw.uniform(-0.5, 0.5, 2, 37, 69, 4, 4, dtype=dtype)
    b, dh = (draw.normal(2, 37, 69, 4, dtype=dtype) for _ in range(2))
    h0 = draw.normal(2, 69, 4, dtype=torch.promote_types(dtype, torch.float32))

    def both(*x):
        x = [v.detach().requires_grad_() for v in x]
        h, last = block_scan(*x, reverse=reverse)
        return [h, last, *torch.autograd.grad([h, last], x, [dh, h0])]

    for other in (_apart(A), A.mT.contiguous().mT):
        for x, y in zip(both(A, b, h0), both(other, b, h0), strict=True):
            assert same_bits(x, y)


@pytest.mark.parametrize("N", [256, 69])
def test_blocks_of_four_past_the_caches(N):
    """Outputs of 8 MiB and more; of 69 blocks only every fourth step begins a cache line."""
    draw = Draw(N)
    T = (8 << 20) // (16 * N) + 1
    A = draw.uniform(-0.5, 0.5, 1, T, N, 4, 4, dtype=torch.float32)
    b, dh = (draw.normal(1, T, N, 4, dtype=torch.float32) for _ in range(2))

    def both(*x):
        x = [v.detach().requires_grad_() for v in x]
        h, _ = block_scan(*x)
        return [h, *torch.autograd.grad(h, x, dh)]

    for x, y in zip(both(A, b), both(_apart(A), b), strict=True):
        assert same_bits(x, y)


def _apart(A):
    """The same matrices in rows that do not lie side by side."""
    return A.new_empty(*A.shape[:-1], 5)[..., :4].copy_(A)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8, 9])
def test_steps_that_follow_each_other_in_memory_change_no_bits(k, dtype, reverse):
    """They are turned sixteen at a time, of numbers as of blocks."""
    draw = Draw(k)
    for T, N, offsets in ((2, 1, None), (16, 16, None), (37, 21, None), (50, 5, (0, 3, 3, 20, 50))):
        B, S = (1, len(offsets) - 1) if offsets else (2, 2)
        A = draw.uniform(-1, 1, B, T, N, k, k, dtype=dtype) / k
        b, dh = (draw.normal(B, T, N, k, dtype=dtype) for _ in range(2))
        h0 = draw.normal(S, N, k, dtype=torch.promote_types(dtype, torch.float32))
        cu_seqlens = torch.tensor(offsets) if offsets else None

        def both(A, b, dh, h0, cu_seqlens=cu_seqlens):
            x = [v.detach().requires_grad_() for v in (A, b) + ((h0,) if h0 is not None else ())]
            h, last = block_scan(*x, reverse=reverse, cu_seqlens=cu_seqlens)
            return [h, last, *torch.autograd.grad([h, last], x, [dh, torch.ones_like(last)])]

        for first in (h0, None):
            expected = both(A, b, dh, first)
            for lie in (_by_number, _by_block):
                for given in (dh, lie(dh)):
                    got = both(lie(A), lie(b), given, first)
                    for x, y in zip(expected, got, strict=True):
                        assert same_bits(x, y), (T, N)


def _by_number(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _by_block(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("shape", [(1, 1, 9), (2, 1, 9), (1, 1, 1), (2, 40, 1), (1, 40, 9)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_shared_matrix_is_the_sum_of_its_copies(shape, turned):
    draw = Draw(7)
    A = draw.uniform(-1, 1, *shape, 3, 3, dtype=torch.float64) / 3
    A = (A.mT.contiguous().mT if turned else A).requires_grad_()
    b = draw.normal(2, 40, 9, 3, dtype=torch.float64)
    copies = A.detach().expand(2, 40, 9, 3, 3).contiguous().requires_grad_()
    h, _ = block_scan(A, b)
    want, _ = block_scan(copies, b)
    assert same_bits(h, want)
    dh = draw.normal(2, 40, 9, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad(h, A, dh)
    (full,) = torch.autograd.grad(want, copies, dh)
    assert got.stride() == A.stride() or A.numel() == 9
    torch.testing.assert_close(got, full.sum_to_size(A.shape), rtol=1e-13, atol=1e-13)


def test_a_shared_matrix_is_not_expanded():
    """A constant A over a long sequence: what the op allocates is a small multiple of b."""
    from torch.profiler import ProfilerActivity, profile

    A = torch.eye(16).view(1, 1, 1, 16, 16).clone().requires_grad_()
    b = torch.zeros(1, 4096, 4, 16, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        h, _ = block_scan(A, b)
        torch.autograd.grad(h, (A, b), torch.zeros_like(h))
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in seen.events())
    assert 2 * b.nbytes < allocated < 6 * b.nbytes


def test_the_step_refuses_what_the_op_refuses():
    for k in (0, 17):
        with pytest.raises(RuntimeError, match=r"b must have shape \(B, N, k=1\.\.16\), got"):
            block_scan_step(torch.zeros(2, 3, k), torch.zeros(1, 1, k, k), torch.zeros(2, 3, k))
