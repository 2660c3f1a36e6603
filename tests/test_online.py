"""The learner of a stream: exact for one layer and for the top of a stack, flat in memory, resumed
to the bit; and the commands that use it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import recurra
from recurra._files import CheckpointError
from recurra.rtrl import Layer, OnlineLearner
from support import same_bits

KINDS = tuple(recurra.rtrl.recurrences())


def mean_square(output, target):
    return (output - target).square().sum() / output.shape[0]


def make(cell="elstm", depth=1, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    layers, inputs = [], 4
    for _ in range(depth):
        layers.append(Layer(inputs, 10, cell, dtype=dtype))
        inputs = layers[-1].out_features
    return OnlineLearner(layers, nn.Linear(inputs, 2, dtype=dtype), mean_square, **options)


def stream(T, B=3, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(B, T, 4, generator=g, dtype=torch.float64).to(dtype)
    target = u.cumsum(1)[..., :2].tanh()
    return u, target, torch.rand(B, T, generator=g) < 0.02


def through_all(learner, u, target, reset, state):
    """Gradients of backpropagation through the whole stream, by torch's autograd."""
    y = u
    for layer, h in zip(learner.layers, state, strict=True):
        y, _ = layer(y, h, reset)
    loss = mean_square(learner.readout(y), target)
    return torch.autograd.grad(loss, learner.parameters, allow_unused=True, materialize_grads=True)


def accumulated(learner, u, target, reset, state, sizes):
    learner.begin(u.shape[0], state)
    learner.optimizer.zero_grad()
    t = 0
    for size in sizes:
        part = slice(t, t + size)
        learner.accumulate(u[:, part], target[:, part], reset[:, part])
        t += size
    assert t == u.shape[1]
    return [p.grad for p in learner.parameters]


def error(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("cell", KINDS)
def test_one_layer_is_exact(cell):
    learner = make(cell)
    u, target, reset = stream(200)
    state = [0.5 + torch.rand(3, *learner.layers[0].initial_state(1).shape[1:]).double()]
    want = through_all(learner, u, target, reset, state)
    got = accumulated(learner, u, target, reset, state, [1, 2, 61, 36, 100])
    for g, w in zip(got, want, strict=True):
        assert not w.numel() or error(g, w) < 1e-10
    assert learner.exact == (True,) and "exact RTRL" in repr(learner)


def test_a_stack_is_exact_at_the_top_and_says_so():
    learner = make(depth=3)
    u, target, reset = stream(120)
    reset[:] = False
    state = [torch.rand_like(layer.initial_state(3)) for layer in learner.layers]
    want = through_all(learner, u, target, reset, state)
    got = accumulated(learner, u, target, reset, state, [10] * 12)
    errors = [error(g, w) for g, w in zip(got, want, strict=True)]
    # Three parameters a layer, then two of the readout.
    assert max(errors[6:]) < 1e-10 and min(errors[:6]) > 1e-4
    assert learner.exact == (False, False, True)
    assert "exact for the top layer, spatial for those below it" in repr(learner)
    whole = accumulated(learner, u, target, reset, state, [120])
    assert max(error(g, w) for g, w in zip(whole, want, strict=True)) < 1e-10


def test_truncated_backpropagation_is_not_exact():
    learner = make(algorithm="bptt")
    u, target, reset = stream(60)
    state = [torch.rand_like(learner.layers[0].initial_state(3))]
    want = through_all(learner, u, target, reset, state)
    got = accumulated(learner, u, target, reset, state, [10] * 6)
    assert error(got[0], want[0]) > 1e-2 and learner.exact == (False,)
    assert not learner.sensitivities and "truncated" in repr(learner)


def test_frozen_parameters_and_predictions():
    learner = make(depth=2)
    learner.layers[0].in_proj.weight.requires_grad_(False)
    u, target, _ = stream(20)
    before = learner.layers[0].in_proj.weight.clone()
    expected = learner.predict(u[:, :10])
    fed = learner.feed(u[:, :10], target[:, :10])
    assert same_bits(fed.output, expected)
    assert same_bits(before, learner.layers[0].in_proj.weight.detach())
    seen = [h.clone() for h in learner.state]
    learner.predict(u)
    assert all(map(same_bits, learner.state, seen))


@pytest.mark.parametrize("cell", ["elstm", "slstm", "linear-complex", "linear"])
def test_it_learns(cell):
    """A mean over many chunks of two steps."""
    options = {"optimizer": lambda p: torch.optim.Adam(p, lr=1e-2)}
    learner = make(cell, dtype=torch.float32, **options)
    losses, mean = [], torch.zeros(8, 2)
    g = torch.Generator().manual_seed(0)
    for _ in range(600):
        u = torch.randn(8, 2, 4, generator=g)
        targets = []
        for row in u.unbind(1):
            mean = 0.9 * mean + 0.3 * row[:, :2]
            targets.append(mean)
        losses.append(learner.feed(u, torch.stack(targets, 1)).loss.item())
    assert sum(losses[-50:]) < 0.4 * sum(losses[:50])
    if cell.startswith("linear"):
        assert learner.layers[0].params.abs().max() <= 1


# ---- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_resumed_to_the_bit(tmp_path, depth):
    options = {"optimizer": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True), "clip": 1.0}
    u, target, reset = stream(120, dtype=torch.float32)
    parts = [slice(t, t + 10) for t in range(0, 120, 10)]

    def feed(learner, some):
        return [learner.feed(u[:, p], target[:, p], reset[:, p]).loss for p in some]

    straight = make(depth=depth, dtype=torch.float32, **options)
    losses = feed(straight, parts)
    first = make(depth=depth, dtype=torch.float32, **options)
    feed(first, parts[:3])
    first.save(tmp_path / "run", place=3)
    feed(first, parts[3:5])
    first.save(tmp_path / "run", place=5)
    again = make(depth=depth, dtype=torch.float32, seed=9, **options)
    assert again.load(tmp_path / "run") == {"place": 5} and again.chunks == 5
    assert all(map(same_bits, feed(again, parts[5:]), losses[5:]))
    for a, b in ((again, straight),):
        assert all(map(same_bits, a.parameters, b.parameters))
        assert all(map(same_bits, a.state, b.state))
        for S, R in zip(a.sensitivities, b.sensitivities, strict=True):
            assert all(map(same_bits, S, R))


def test_another_learner_and_damage_are_refused(tmp_path):
    learner = make()
    u, target, _ = stream(10)
    learner.feed(u, target)
    where = learner.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint of a learner"):
        make().load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is of rtrl with .'elstm'., not of"):
        make("mgu").load(tmp_path)
    other = OnlineLearner(Layer(4, 11).double(), nn.Linear(11, 2).double(), mean_square)
    with pytest.raises(CheckpointError, match="must have shape"):
        other.load(tmp_path)
    before = [p.detach().clone() for p in other.parameters]
    assert all(map(same_bits, before, other.parameters))
    saved = learner.state_dict()
    saved["about"]["groups"] = []
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        make().load_state_dict(saved)
    saved = learner.state_dict()
    saved["tensors"]["optimizer.0.exp_avg"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="has shape"):
        make().load_state_dict(saved)
    file = where / "learner.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        make().load(tmp_path)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: OnlineLearner([], nn.Identity(), mean_square), "layers must hold at least one"),
        (
            lambda: OnlineLearner([Layer(4, 5), Layer(6, 5)], nn.Identity(), mean_square),
            "a layer with 6 inputs cannot follow one with 5 outputs",
        ),
        (lambda: make(algorithm="uoro"), 'algorithm must be "rtrl" or "bptt", got "uoro"'),
        (
            lambda: make().feed(torch.zeros(2, 3, 5), None),
            r"u must have shape \(B, T, D\) with D = 4, got \(2, 3, 5\)",
        ),
        (lambda: make().begin(2, [torch.zeros(2, 2, 10)]), r"state must have shapes \[\(2, 1, 10"),
    ],
)
def test_what_is_wrong_is_said(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_other_batches_are_refused():
    learner = make()
    u, target, _ = stream(5)
    learner.feed(u, target)
    with pytest.raises(ValueError, match="u must have B = 3 as the streams before it"):
        learner.feed(u[:2], target[:2])
    learner.begin(2)
    learner.feed(u[:2], target[:2])


_LONG = """
import resource, sys, torch
from torch import nn
from recurra.rtrl import Layer, OnlineLearner
torch.set_num_threads(1)
torch.manual_seed(0)
learner = OnlineLearner(Layer(8, 32), nn.Linear(32, 8), nn.functional.mse_loss)
u = torch.randn(4, 100, 8)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for chunk in range(1000):
    learner.feed(u, u)
    if chunk == 9:
        before = peak()
print(peak() - before)
"""


def test_memory_is_flat():
    """From T = 1,000 to T = 100,000 the process grows by less than 4 MiB."""
    out = subprocess.run(
        [sys.executable, "-c", _LONG], capture_output=True, text=True, check=True, timeout=300
    )
    assert int(out.stdout) < 4096
