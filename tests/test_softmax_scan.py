"""What is true of softmax_scan alone: it is attention, it is RWKV-4, and its states."""

from __future__ import annotations

import pytest
import torch

from recurra import reference, softmax_scan, softmax_scan_step
from support import DTYPES, Draw, same_bits

FORMS = ((False, False), (True, False), (False, True), (True, True))
every_form = pytest.mark.parametrize(("with_decay", "with_bonus"), FORMS)


def _arguments(B, T, D, with_decay, with_bonus, dtype=torch.float64, seed=0):
    """Every third decay is negative."""
    draw = Draw(seed)
    return {
        "s": 3 * draw.normal(B, T, D, dtype=dtype),
        "v": draw.normal(B, T, D, dtype=dtype),
        "decay": draw.uniform(-0.1, 0.2, D, dtype=dtype) if with_decay else None,
        "bonus": draw.normal(D, dtype=dtype) if with_bonus else None,
    }


def _attention(s, v, decay=None, bonus=None):
    """Softmax over the whole score matrix (B, T, T, D), all of it at once."""
    T = s.shape[1]
    age = torch.arange(T)[:, None] - torch.arange(T)
    scores = s[:, None].expand(-1, T, -1, -1)
    if bonus is not None:
        # A step has not aged when the next one reads it, and reads itself with its bonus.
        scores = torch.where((age == 0)[..., None], scores + bonus, scores)
        age = age - 1
    if decay is not None:
        scores = scores - age.clamp(min=0)[..., None] * decay
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future[..., None], -torch.inf).softmax(2)
    return torch.einsum("btid,bid->btd", weights, v)


@every_form
def test_it_is_softmax_attention_with_a_fixed_query(with_decay, with_bonus):
    args = _arguments(2, 150, 19, with_decay, with_bonus)
    o, _ = softmax_scan(**args)
    assert (o - _attention(**args)).abs().max() < 1e-12


def test_one_score_a_step_is_scaled_dot_product_attention():
    """Aaren: a learned query, keys and values of a head, one score for all of its channels."""
    draw = Draw(1)
    q, k, v = (draw.normal(3, 60, 8, dtype=torch.float64) for _ in range(3))
    q = q[:, :1]
    s = (k * q).sum(-1, keepdim=True) / 8**0.5
    want = torch.nn.functional.scaled_dot_product_attention(q.expand_as(k), k, v, is_causal=True)
    assert (softmax_scan(s, v)[0] - want).abs().max() < 1e-12


def test_it_is_wkv_of_rwkv_4():
    """Against the sums themselves, which without a maximum overflow for larger scores."""
    args = _arguments(2, 200, 20, True, True)
    k, v, w, u = args["s"], args["v"], args["decay"], args["bonus"]
    num, den = torch.zeros(2, 20).double(), torch.zeros(2, 20).double()
    outputs = []
    for t in range(k.shape[1]):
        now = (k[:, t] + u).exp()
        outputs.append((num + now * v[:, t]) / (den + now))
        num = (-w).exp() * num + k[:, t].exp() * v[:, t]
        den = (-w).exp() * den + k[:, t].exp()
    o, h_last = softmax_scan(**args)
    assert (o - torch.stack(outputs, 1)).abs().max() < 1e-12
    m, c, a = h_last.unbind(1)
    torch.testing.assert_close(c * m.exp(), den, rtol=1e-12, atol=0)
    torch.testing.assert_close(a * m.exp(), num, rtol=1e-12, atol=1e-12 * den.max().item())


@every_form
def test_gradients_equal_autograd_of_attention(with_decay, with_bonus):
    args = _arguments(2, 90, 17, with_decay, with_bonus)
    given = {k: x.requires_grad_() for k, x in args.items() if x is not None}
    do = Draw(2).normal(2, 90, 17, dtype=torch.float64)
    got = torch.autograd.grad(softmax_scan(**args)[0], given.values(), do)
    want = torch.autograd.grad(_attention(**args), given.values(), do)
    for name, x, y in zip(given, got, want, strict=True):
        assert (x - y).abs().max() < 1e-8, name


@every_form
def test_gradients_of_every_part_of_the_state(with_decay, with_bonus):
    """From m, c and a of h_last alone, in every input and every part of h0."""
    args = _arguments(2, 40, 5, with_decay, with_bonus)
    draw = Draw(3)
    parts = [draw.normal(2, 5, dtype=torch.float64), draw.uniform(1, 2, 2, 5, dtype=torch.float64)]
    args["h0"] = torch.stack([parts[0] + 4, parts[1], parts[0]], 1)
    given = [x.requires_grad_() for x in args.values() if x is not None]
    for part in range(3):
        one = draw.normal(2, 5, dtype=torch.float64)
        got = torch.autograd.grad(softmax_scan(**args)[1][:, part], given, one)
        wanted = reference.softmax_scan(**args)[1][:, part]
        want = torch.autograd.grad(wanted, given, one, materialize_grads=True)
        for x, y in zip(got, want, strict=True):
            assert (x - y).abs().max() < 1e-8, part


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
def test_huge_scores_stay_finite(dtype, with_decay, with_bonus):
    """Values and gradients, for scores up to 1e4 of either sign."""
    args = _arguments(2, 100, 18, with_decay, with_bonus, dtype)
    args["s"] = Draw(4).uniform(-1e4, 1e4, 2, 100, 18, dtype=dtype)
    given = [x.requires_grad_() for x in args.values() if x is not None]
    o, h_last = softmax_scan(**args)
    assert o.isfinite().all() and h_last.isfinite().all()
    assert (o.abs() <= args["v"].abs().amax(1, keepdim=True) * 1.01).all()
    grads = torch.autograd.grad(o.float().square().sum() + h_last.float().sin().sum(), given)
    assert all(g.isfinite().all() for g in grads)
    if dtype == torch.float64:
        assert (o - _attention(**args)).abs().max() < 1e-10


def _far_apart(dtype):
    """Weights of the output that follow from those of the state, and such as do not."""
    draw, D = Draw(5), 64
    return {
        "s": draw.uniform(-60, 60, 2, 70, D, dtype=dtype),
        "v": draw.normal(2, 70, D, dtype=dtype),
        "decay": draw.uniform(0, 50, D, dtype=dtype),
        "bonus": draw.uniform(-50, 50, D, dtype=dtype),
    }


def test_weights_far_apart():
    args = {k: x.requires_grad_() for k, x in _far_apart(torch.float64).items()}
    o, want = softmax_scan(**args)[0], _attention(**args)
    assert (o - want).abs().max() < 1e-12
    do = Draw(6).normal(2, 70, 64, dtype=torch.float64)
    got = torch.autograd.grad(o, args.values(), do)
    for name, x, y in zip(args, got, torch.autograd.grad(want, args.values(), do), strict=True):
        assert (x - y).abs().max() < 1e-11, name


_EXTREMES = {
    # The state keeps the weight 1 at every step, and the output weighs it by e^(decay - bonus) more
    # or less against the score's, which is smaller still.
    "large values": (25, 0, -26, 1e30, None),
    "large values, near": (22, 0, -23, 1e36, None),
    "tiny values": (0, 25, -30, 1e-30, None),
    "tiny values, near": (0, 22, -23, 1e-26, None),
    "a large normaliser": (25, 0, -26, 1, 1e30),
    "a large normaliser, near": (22, 0, -23, 1, 1e36),
}


@pytest.mark.parametrize("name", _EXTREMES)
def test_weights_meet_no_limit_of_float32(name):
    """Nor do their products with a value or a normaliser."""
    decay, bonus, fall, size, normaliser = _EXTREMES[name]
    draw, D = Draw(7), 20
    steps = torch.arange(6)
    scores = fall * (steps + 1 if decay else (steps > 0)).float()
    args = {
        "s": scores[None, :, None].expand(1, 6, D).clone(),
        "v": size * draw.uniform(1, 2, 1, 6, D, dtype=torch.float32),
        "decay": torch.full((D,), float(decay)),
        "bonus": torch.full((D,), float(bonus)),
    }
    if normaliser is not None:
        c = normaliser * draw.uniform(1, 2, 1, D, dtype=torch.float32)
        args["h0"] = torch.stack([torch.zeros(1, D), c, c], 1)
    wide = {k: x.double() for k, x in args.items()}
    for v in (args["v"], wide["v"]):
        v.requires_grad_()
    o, want = softmax_scan(**args)[0], reference.softmax_scan(**wide)[0]
    torch.testing.assert_close(o.double(), want, rtol=1e-5, atol=0)
    # The other gradients are what is left of terms that are as large as they may be.
    got = torch.autograd.grad(o.sum(), args["v"])[0]
    wanted = torch.autograd.grad(want.sum(), wide["v"])[0]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_far_apart_concern_their_channel_alone(dtype):
    """Channels of a vector have the bits of each alone, however the weights of the others come."""
    args = {k: x.requires_grad_() for k, x in _far_apart(dtype).items()}
    do = Draw(6).normal(2, 70, 64, dtype=dtype)
    outputs = softmax_scan(**args)
    grads = torch.autograd.grad(outputs[0], args.values(), do)
    for c in range(0, 64, 5):
        alone = {k: x[..., c : c + 1].detach().requires_grad_() for k, x in args.items()}
        one = softmax_scan(**alone)
        assert all(same_bits(x[..., c : c + 1], y) for x, y in zip(outputs, one, strict=True))
        one_grads = torch.autograd.grad(one[0], alone.values(), do[..., c : c + 1])
        assert all(same_bits(x[..., c : c + 1], y) for x, y in zip(grads, one_grads, strict=True))


@pytest.mark.parametrize("top", [-torch.inf, -1e38, torch.finfo(torch.float32).min])
@every_form
def test_an_empty_state_is_none(top, with_decay, with_bonus):
    """However it is written; nor does its gradient hold a NaN."""
    args = _arguments(2, 40, 18, with_decay, with_bonus, torch.float32)
    want = softmax_scan(**args)
    empty = torch.zeros(2, 3, 18)
    empty[:, 0] = top
    got = softmax_scan(**args, h0=empty)
    assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))
    empty.requires_grad_()
    o, h_last = softmax_scan(**args, h0=empty)
    assert torch.autograd.grad((o.sum() + h_last.sum()), empty)[0].isfinite().all()
    h = empty.detach().clone()
    parameters = {k: args[k] for k in ("decay", "bonus")}
    steps = [
        softmax_scan_step(h, args["s"][:, t], args["v"][:, t], **parameters) for t in range(40)
    ]
    assert same_bits(torch.stack(steps, 1), want[0]) and same_bits(h, want[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
def test_a_score_of_minus_infinity_leaves_its_step_out(dtype, with_decay, with_bonus):
    """Padding before a sequence changes no bit of it; its outputs and gradients are 0, not NaN."""
    args = _arguments(2, 30, 18, with_decay, with_bonus, dtype)
    want, want_last = softmax_scan(**args)
    padded = {**args}
    padded["s"] = torch.cat([torch.full((2, 40, 18), -torch.inf, dtype=dtype), args["s"]], 1)
    padded["v"] = torch.cat([torch.ones(2, 40, 18, dtype=dtype), args["v"]], 1)
    given = [padded[k].requires_grad_() for k in ("s", "v")]
    o, last = softmax_scan(**padded)
    assert same_bits(o[:, 40:], want) and same_bits(last, want_last)
    assert not o[:, :40].any()
    for g in torch.autograd.grad(o.float().square().sum(), given):
        assert not g[:, :40].any() and g[:, 40:].isfinite().all()


def test_decays_too_large_for_numbers_forget_everything():
    args = _arguments(1, 12, 5, False, False, torch.float32)
    for decay in (1e6, 1e36, torch.inf):
        o, last = softmax_scan(**{**args, "decay": torch.full((5,), decay)})
        assert same_bits(o, args["v"]) and last.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bonus", [False, True], ids=["", "bonus"])
@pytest.mark.parametrize("decay", [-1e3, -1e20, -1e36, -torch.inf], ids=str)
def test_decays_far_below_zero_learn_nothing_after_the_first_score(dtype, decay, with_bonus):
    """But for the second with a bonus, read before the state grows. No gradient is NaN."""
    args = _arguments(2, 70, 18, False, with_bonus, dtype)
    args["decay"] = torch.full((18,), decay)
    args["s"][:, :5] = -torch.inf
    given = {k: x.requires_grad_() for k, x in args.items() if x is not None}
    o, last = softmax_scan(**args)
    alone = [t for t in range(5, 70) if not (with_bonus and t == 6)]
    first = args["v"][:, 5:6].expand(2, len(alone), 18)
    assert not o[:, :5].any() and same_bits(o[:, alone], first) and last.isfinite().all()
    assert same_bits(last[:, 1:], reference.softmax_scan(**args)[1][:, 1:])
    grads = torch.autograd.grad(o[:, alone].float().sum() + last[:, 2].sum(), given.values())
    assert all(g.isfinite().all() for g in grads)
    to_v = dict(zip(given, grads, strict=True))["v"]
    assert (to_v[:, 5] == len(alone) + 1).all()
    assert not to_v[:, :5].any() and not to_v[:, 6:].any()
    steps = torch.zeros(2, 3, 18, dtype=last.dtype)
    steps[:, 0] = -torch.inf
    parameters = {k: args[k].detach() for k in ("decay", "bonus") if args[k] is not None}
    with torch.no_grad():
        rows = [
            softmax_scan_step(steps, args["s"][:, t], args["v"][:, t], **parameters)
            for t in range(70)
        ]
    assert same_bits(torch.stack(rows, 1), o.detach()) and same_bits(steps, last.detach())


def test_equal_scores_share_the_gradient_of_the_maximum():
    s = torch.zeros(1, 3, 1, dtype=torch.float64, requires_grad=True)
    _, last = softmax_scan(s, torch.ones_like(s))
    grad = torch.autograd.grad(last[0, 0].sum(), s)[0]
    want = torch.autograd.grad(reference.softmax_scan(s, torch.ones_like(s))[1][0, 0].sum(), s)[0]
    assert torch.equal(grad, want) and grad.sum() == 1
