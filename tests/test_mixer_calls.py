"""What every mixer does with any call: refusals, empty batches, steps without gradients."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses import FakeTensorMode

import recurra
from recurra.lm import LMConfig
from recurra.nn import (
    MIXERS,
    AttentionConfig,
    HGRNConfig,
    LRUConfig,
    MixerConfig,
    QRNNConfig,
    RGLRUConfig,
    RNNConfig,
    RWKV4ChannelConfig,
    S4DConfig,
    S5Config,
)

# Every mixer in its default form, and forms that go other ways.
FORMS: list[MixerConfig] = [
    *(config() for config in (*MIXERS, RWKV4ChannelConfig)),
    *(
        config(view=view)
        for config in MIXERS
        if issubclass(config, S4DConfig)
        for view in ("recurrent", "convolution")
    ),
    HGRNConfig(complex=True, eig_range=(-1, 1)),
    QRNNConfig(window=4),
    RNNConfig("sru", d_conv=1),
    AttentionConfig(heads=2, kv_heads=2, window=3),
]
WIDTH = 16

every_form = pytest.mark.parametrize(
    "config", FORMS, ids=lambda c: f"{c.kind} {getattr(c, 'view', '')}".strip()
)


def _mixer(config: MixerConfig, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """One in which nothing is without effect: some parameters begin as zeros."""
    torch.manual_seed(0)
    mixer = config.make(WIDTH).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def refused(sentence: str, call) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value) and "\n" not in str(error.value)


@every_form
def test_wrong_ends_of_packed_sequences_are_refused(config):
    mixer = config.make(WIDTH)
    name = type(mixer).__name__
    x = torch.randn(1, 6, WIDTH)

    def given(sentence: str, ends: torch.Tensor, x: torch.Tensor = x) -> None:
        refused(f"{name}: {sentence}", lambda: mixer(x, cu_seqlens=ends))

    given("cu_seqlens must have dtype int32 or int64, got float32", torch.tensor([0.0, 6.0]))
    given("cu_seqlens must have shape (S + 1,), got ()", torch.tensor(6))
    given("cu_seqlens must have shape (S + 1,), got (0,)", torch.tensor([], dtype=torch.int32))
    given("cu_seqlens must start at 0, got 1", torch.tensor([1, 6]))
    given("cu_seqlens must end at T = 6, got 5", torch.tensor([0, 5], dtype=torch.int32))
    given("cu_seqlens must ascend, got 2 after 4 at index 2", torch.tensor([0, 4, 2, 6]))
    wide = torch.randn(2, 6, WIDTH)
    given(
        "x must have batch size B = 1 with cu_seqlens, got (2, 6, 16)", torch.tensor([0, 6]), wide
    )


@every_form
def test_inputs_that_do_not_fit_are_refused(config):
    mixer = config.make(WIDTH)
    name = type(mixer).__name__
    state = mixer.initial_state(2)
    before = [s.clone() for s in state]

    def given(sentence: str, x: torch.Tensor, one: torch.Tensor) -> None:
        refused(f"{name}: x must have {sentence.format('B, T', tuple(x.shape))}", lambda: mixer(x))
        sentence = f"{name}: x must have {sentence.format('B', tuple(one.shape))}"
        refused(sentence, lambda: mixer.step(one, state))
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))

    for x in (torch.randn(2, 6, WIDTH - 1), torch.randn(2, 6, WIDTH + 1), torch.randn(2, 6, 1)):
        given(f"shape ({{}}, {WIDTH}), got {{}}", x, x[:, 0])
    x = torch.randn(2, 6, WIDTH)
    given(f"shape ({{}}, {WIDTH}), got {{}}", x[0], x[:, :1])
    given(f"shape ({{}}, {WIDTH}), got {{}}", x[None], x[0, 0])
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        bad = x.to(dtype)
        given(f"dtype float32, got {str(dtype).removeprefix('torch.')}", bad, bad[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        given("dtype float32, got float64", x.double(), x[:, 0].double())
        given("dtype float32, got float16", x.half(), x[:, 0].half())
        low = config.make(WIDTH).bfloat16()
        sentence = f"{name}: x must have dtype bfloat16, got float32"
        refused(sentence, lambda: low.step(x[:, 0], low.initial_state(2)))


@every_form
def test_autocast_takes_what_it_casts(config):
    mixer = _mixer(config, torch.float32)
    x, state = torch.randn(2, 6, WIDTH).bfloat16().float(), mixer.initial_state(2)
    want = mixer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            y, after = mixer(x.to(dtype))
            assert (y - want).norm() < 0.05 * want.norm()
            assert [s.dtype for s in after] == [s.dtype for s in state]
            stepped = mixer.initial_state(2)
            y = torch.stack([mixer.step(one, stepped) for one in x.to(dtype).unbind(1)], 1)
            assert (y - want).norm() < 0.05 * want.norm()


@every_form
def test_states_that_do_not_fit_are_refused(config):
    mixer = config.make(WIDTH)
    name = type(mixer).__name__
    x, ends = torch.randn(2, 6, WIDTH), torch.tensor([0, 2, 2, 6])
    right = mixer.initial_state(2)
    for n, field in enumerate(right._fields):
        shape = tuple(right[n].shape)
        for bad in ((1, *shape[1:]), (3, *shape[1:]), (*shape, 1), (*shape[:-1], shape[-1] + 1)):
            state = list(right)
            state[n] = right[n].new_zeros(bad)
            state = type(right)(*state)
            sentence = f"{name}: {field} of the state must have shape {shape}, got {bad}"
            refused(sentence, lambda state=state: mixer(x, state))
            refused(sentence, lambda state=state: mixer.step(x[:, 0], state))
    rows = f"{name}: {right._fields[0]} of the state must have shape (3, "
    refused(rows, lambda: mixer(x[:1], right, cu_seqlens=ends))
    refused(
        f"{name}: the state must be {type(right).__name__}, got Tensor", lambda: mixer(x, right[0])
    )
    many = f"{name}: the state must have {len(right)} tensors, got {len(right) + 1}"
    refused(many, lambda: mixer(x, (*right, right[0])))


@every_form
def test_nothing_at_all(config):
    """No sequences, no inputs, no packed sequences."""
    mixer = config.make(WIDTH)
    for shape, ends in [
        *(((B, T), None) for B, T in ((0, 5), (2, 0), (0, 0))),
        ((1, 0), [0]),
        ((1, 0), [0, 0]),
    ]:
        rows = shape[0] if ends is None else len(ends) - 1
        x = torch.randn(*shape, WIDTH, requires_grad=True)
        packed = None if ends is None else torch.tensor(ends)
        y, state = mixer(x, mixer.initial_state(rows), cu_seqlens=packed)
        y.sum().backward()
        assert y.shape == x.shape == x.grad.shape
        before = mixer.initial_state(rows)
        assert [s.shape for s in state] == [s.shape for s in before]
        if rows == 0:
            assert mixer.step(torch.randn(0, WIDTH), state).shape == (0, WIDTH)
        else:
            assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@every_form
def test_steps_have_no_gradients(config):
    mixer = config.make(WIDTH)
    with torch.no_grad():
        state = mixer.initial_state(2)
    y = mixer.step(torch.randn(2, WIDTH, requires_grad=True), state)
    assert not y.requires_grad and not any(s.requires_grad for s in state)


@every_form
@torch.no_grad()
def test_steps_follow_their_parameters(config):
    """What steps keep of parameters is that of their values, however these came."""
    torch.manual_seed(0)
    mixer = config.make(WIDTH).double()
    x = torch.randn(2, WIDTH, dtype=torch.float64)

    def check(mixer, x=x, **bounds):
        _, before = mixer(x[:, None])  # gates matter where there is something to keep
        want = mixer(x[:, None], before)[0][:, 0]
        for _ in range(2):
            got = mixer.step(x, type(before)(*(s.clone() for s in before)))
            torch.testing.assert_close(got, want, **(bounds or {"rtol": 1e-9, "atol": 1e-10}))

    check(mixer)
    for p in mixer.parameters():
        p.data.mul_(1.1)
        check(mixer)
    again = copy.deepcopy(mixer)
    for p in again.parameters():
        p.data.mul_(0.9)
    check(again)
    check(mixer)
    mixer.load_state_dict(again.state_dict())
    check(mixer)
    check(mixer.float(), x.float(), rtol=1e-4, atol=1e-5)


def _assert_same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@every_form
def test_compiles_without_graph_breaks(config):
    mixer = _mixer(config)
    x = _randn(2, 5, WIDTH)
    state = mixer(x)[1]
    torch.compiler.reset()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    (y, after), (want, wanted) = compiled(x, state), mixer(x, state)
    _assert_same([y, *after], [want, *wanted])


@every_form
def test_compiles_packed_sequences_without_graph_breaks(config):
    mixer = _mixer(config)
    before = mixer(_randn(4, 7, WIDTH))[1]
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixer, backend=counter, fullgraph=True)
    for ends in ([0, 3, 3, 4, 9], [0, 0, 1, 9, 9]):
        x, ends = _randn(1, 9, WIDTH), torch.tensor(ends)
        for state in (before, None):
            got, want = (f(x, state, cu_seqlens=ends) for f in (compiled, mixer))
            _assert_same([got[0], *got[1]], [want[0], *want[1]])
    assert counter.frame_count == 2, "other lengths are no other program"


def _steps(config: MixerConfig, backend: str) -> None:
    """Compiles a step, and one with slots, and compares their outputs and states with a mixer's."""
    mixer = _mixer(config)
    torch.compiler.reset()
    compiled = torch.compile(mixer.step, backend=backend, fullgraph=True)
    for slots in (None, torch.tensor([2, -1, 0]))[: 1 + mixer.slotted]:
        state = mixer(_randn(3, 4, WIDTH))[1]
        state = type(state)(*(s.detach() for s in state))
        wanted = type(state)(*(s.clone() for s in state))
        before = type(state)(*(s.clone() for s in state))
        given = () if slots is None else (slots,)
        for x in _randn(2, 3, WIDTH):
            _assert_same([compiled(x, state, *given)], [mixer.step(x, wanted, *given)])
        _assert_same(state, wanted)
        both = zip(state, before, strict=True)
        assert not any(torch.equal(a, b) for a, b in both if a.numel())


@every_form
def test_steps_compile_without_graph_breaks(config):
    _steps(config, "aot_eager")


@pytest.mark.parametrize("config", [LRUConfig(), QRNNConfig()], ids=lambda c: c.kind)
def test_inductor_compiles_steps(config):
    _steps(config, "inductor")


def test_steps_of_models_with_complex_states_compile():
    torch.manual_seed(0)
    lm = recurra.LM(LMConfig(d_model=16, n_layers=2, mixer=LRUConfig())).double()
    torch.compiler.reset()
    step = torch.compile(lm.step, backend="aot_eager", fullgraph=True)
    state, wanted = lm.initial_state(2), lm.initial_state(2)
    for tokens in torch.randint(0, 200, (3, 2)):
        _assert_same([step(tokens, state)], [lm.step(tokens, wanted)])
    for got, want in zip(state, wanted, strict=True):
        _assert_same(got, want)


def _calls(mixer: torch.nn.Module, device: str) -> None:
    """Every kind of call, long enough for a convolution."""
    x = torch.randn(2, 80, WIDTH, device=device)
    y, state = mixer(x)
    assert y.shape == x.shape and y.device == x.device
    y, state = mixer(x[:1], state, cu_seqlens=torch.tensor([0, 3, 80], device=device))
    assert y.shape == (1, 80, WIDTH)
    assert mixer.step(x[:, 0], state).shape == (2, WIDTH)
    refused("x must have dtype float32, got bfloat16", lambda: mixer(x.bfloat16()))


@every_form
def test_calls_without_values(config):
    _calls(config.make(WIDTH).to("meta"), "meta")
    with FakeTensorMode():
        _calls(config.make(WIDTH), "cpu")


@every_form
def test_mixers_are_mapped(config):
    mixer, x = _mixer(config), _randn(3, 2, 5, WIDTH)
    y, state = torch.func.vmap(mixer)(x)
    _assert_same(y, [mixer(one)[0] for one in x])
    y, _ = torch.func.vmap(mixer)(x, state)
    _assert_same(y, [mixer(one, mixer(one)[1])[0] for one in x])


@pytest.mark.parametrize(
    "config", [AttentionConfig(), LRUConfig(), RGLRUConfig()], ids=lambda c: c.kind
)
def test_steps_are_exported_for_any_batch(config):
    mixer = _mixer(config)

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = mixer

        def forward(self, x, *state):
            return self.mixer.step(x, mixer.State(*state))

    def given(batch: int) -> tuple[torch.Tensor, ...]:
        state = mixer(_randn(batch, 4, WIDTH))[1]
        return _randn(batch, WIDTH), *(s.detach() for s in state)

    x, *state = given(2)
    batch = {0: torch.export.Dim("B", min=2, max=64)}
    program = torch.export.export(
        Step(), (x, *state), dynamic_shapes=(batch, tuple(batch for _ in state))
    )
    x, *state = given(5)
    wanted = mixer.State(*(s.clone() for s in state))
    _assert_same([program.module()(x, *state)], [mixer.step(x, wanted)])
    _assert_same(state, wanted)


def test_models_are_made_of_fake_tensors_and_real_ones_after_them():
    config = LMConfig(d_model=16, n_layers=1, mixer=S5Config(d_state=14))
    with FakeTensorMode():
        recurra.LM(config)
    recurra.LM(config)(torch.zeros(1, 3, dtype=torch.int64))


def test_a_state_of_another_dtype_is_refused():
    mixer = S4DConfig().make(8)
    state = mixer.initial_state(1)
    with pytest.raises(ValueError, match="S4D: h of the state must have dtype float32, got float"):
        mixer(torch.zeros(1, 100, 8), type(state)(state.h.double()))


def test_a_refused_step_changes_nothing():
    def griffin(window: int) -> recurra.LM:
        mixers = RGLRUConfig(), AttentionConfig(window=window)
        return recurra.LM(LMConfig(d_model=16, n_layers=2, mixer=mixers, pattern="RA"))

    state = griffin(4).initial_state(1)
    with pytest.raises(ValueError, match="Attention: k of the state must have shape"):
        griffin(8).step(torch.tensor([1]), state)
    assert not any(x.any() for part in state for x in part)


@pytest.mark.parametrize("example", [9, 128])
def test_attention_is_exported_for_any_length(example):
    mixer = _mixer(AttentionConfig(heads=2, kv_heads=1, window=3))

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = mixer

        def forward(self, x, *state):
            y, state = self.mixer(x, mixer.State(*state))
            return y, *state

    def given(batch: int, time: int) -> tuple[torch.Tensor, ...]:
        state = mixer(_randn(batch, 4, WIDTH))[1]
        return _randn(batch, time, WIDTH), *(s.detach() for s in state)

    x, *state = given(3, example)
    rows = torch.export.Dim("B", min=1, max=64)
    shapes = {0: rows, 1: torch.export.Dim("T", min=1, max=4096)}, tuple({0: rows} for _ in state)
    program = torch.export.export(Whole(), (x, *state), dynamic_shapes=shapes)
    for batch, time in ((1, 1), (2, 300), (4, 256)):
        args = given(batch, time)
        _assert_same(program.module()(*args), Whole()(*args))


def test_s4d_is_exported_for_any_length():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = S4DConfig(d_state=4).make(8)

        def forward(self, x):
            return self.mixer(x)[0]

    module = Mixed()
    dims = {"x": {1: torch.export.Dim("T", min=2, max=4096)}}
    program = torch.export.export(module, (torch.randn(1, 100, 8),), dynamic_shapes=dims)
    x = torch.randn(1, 150, 8)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)


def test_s4d_convolves_long_packed_sequences(monkeypatch):
    mixer = S4DConfig(d_state=4).make(8).double()
    x, ends = torch.randn(1, 300, 8, dtype=torch.float64), [0, 70, 70, 75, 300]
    parts = [mixer(x[:, a:b]) for a, b in itertools.pairwise(ends)]
    lengths, recurrence = [], mixer._recurrence

    def spy(u, h, cu_seqlens):
        lengths.append(u.shape[1])
        return recurrence(u, h, cu_seqlens)

    monkeypatch.setattr(mixer, "_recurrence", spy)
    y, state = mixer(x, cu_seqlens=torch.tensor(ends))
    assert lengths == [0, 5]  # the others are long enough for a convolution
    torch.testing.assert_close(y, torch.cat([part[0] for part in parts], 1))
    torch.testing.assert_close(state.h, torch.cat([part[1].h for part in parts]))


def test_models_are_pickled():
    # As spawned processes and torch.save do.
    for name in ("griffin", "s4d", "rwkv4"):
        config = dataclasses.replace(recurra.lm.CONFIGS[name], d_model=32, n_layers=1)
        lm = recurra.LM(config)
        again = pickle.loads(pickle.dumps(lm))
        tokens = torch.arange(5)[None]
        assert torch.equal(again(tokens)[0], lm(tokens)[0])


def test_s4d_without_decay_is_finite():
    mixer = S4DConfig(d_state=4).make(8)
    with torch.no_grad():
        mixer.A_real_log.fill_(-200.0)
    y, state = mixer(torch.randn(1, 100, 8))
    assert y.isfinite().all() and state.h.isfinite().all()
