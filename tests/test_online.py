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
from recurra.cli import main
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


# ---- commands ---------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    return path


SMALL = ["--batch", "4", "--length", "10", "--channels", "24", "--lr", "0.01"]


def bits_of(err: str) -> list[float]:
    return [
        float(line.split(" over all")[0].split()[-1]) for line in err.splitlines() if "%" in line
    ]


def test_a_byte_stream_is_learned_and_said(tmp_path, text, capsys):
    run = str(tmp_path / "run")
    assert main(["train", run, "--online", "--data", str(text), *SMALL]) == 0
    err = capsys.readouterr().err
    assert "exact RTRL" in err and "bytes/s" in err and "done; " in err
    assert bits_of(err)[-1] < 5  # of 8 at the beginning
    assert main(["train", run, "--online", "--data", str(text)]) == 1
    assert "holds a run already: --resume" in capsys.readouterr().err


@pytest.mark.parametrize("layers", ["1", "2"])
def test_a_resumed_stream_has_the_bits_of_the_whole(tmp_path, text, monkeypatch, capsys, layers):
    from recurra.rtrl import stream

    options = ["--online", "--data", str(text), "--save-every", "20", "--layers", layers, *SMALL]
    assert main(["train", str(tmp_path / "whole"), *options]) == 0
    feed, fed = OnlineLearner.feed, []

    def stops(self, *args):
        fed.append(None)
        if len(fed) == 55:
            raise OSError("power cut")
        return feed(self, *args)

    monkeypatch.setattr(OnlineLearner, "feed", stops)
    assert main(["train", str(tmp_path / "cut"), *options]) == 1
    monkeypatch.undo()
    assert main(["train", str(tmp_path / "cut"), "--online", "--resume"]) == 0
    assert "goes on after 1,600 bytes" in capsys.readouterr().err
    files = [
        stream.find(tmp_path / name / stream.FOLDER) / "learner.safetensors"
        for name in ("whole", "cut")
    ]
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()


def test_an_interrupted_stream_is_saved(tmp_path, text):
    long = tmp_path / "long.txt"
    long.write_bytes(text.read_bytes() * 400)
    code = f"""
import os, signal, sys
from recurra.cli import main
from recurra.rtrl import OnlineLearner
feed = OnlineLearner.feed
def stops(self, *args):
    if self.chunks == 30:
        os.kill(os.getpid(), signal.SIGINT)
    return feed(self, *args)
OnlineLearner.feed = stops
sys.exit(main({["train", str(tmp_path / "run"), "--online", "--data", str(long), *SMALL]!r}))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert out.returncode == 130, out.stderr
    assert [p.name for p in (tmp_path / "run" / "online").iterdir()] == ["step-00000031"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--online", "--cell", "lstn"], "cell must be one of elstm, "),
        (["--online", "--channels", "0"], "channels must be at least 1, got 0"),
        (["--online", "--lr", "-1"], "lr must be positive, got -1.0"),
        (["--online", "--length", "9999"], "4 parts of it in chunks of 9999 need at least 40000"),
        (["--cell", "elstm"], "--cell goes with --online"),
    ],
)
def test_what_is_wrong_with_a_stream_is_said(tmp_path, text, capsys, options, message):
    arguments = ["train", str(tmp_path / "run"), "--data", str(text), "--batch", "4", *options]
    assert main(arguments) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and message in err[0]


def test_a_stream_does_not_change_on_the_way(tmp_path, text, capsys):
    run = str(tmp_path / "run")
    assert main(["train", run, "--online", "--data", str(text), *SMALL]) == 0
    assert main(["train", run, "--online", "--resume", "--channels", "25"]) == 1
    assert "--channels cannot change while a stream is learned" in capsys.readouterr().err
    text.write_text(text.read_text().replace("fox", "cat"))
    assert main(["train", run, "--online", "--resume"]) == 1
    assert "was learned from another text" in capsys.readouterr().err


def test_diag_bias_shows_that_the_top_is_exact(tmp_path, capsys):
    arguments = ["--length", "24", "--channels", "6", "--chunks", "1", "6", "24", "--depths", "2"]
    picture = tmp_path / "bias.png"
    assert main(["diag", "bias", *arguments, "--picture", str(picture)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "layer " in line]
    errors = {row[1]: [float(v) for v in row[2::2]] for row in rows if len(row) == 8}
    assert errors["1"] == [0, 0, 0]
    assert errors["0"][0] > errors["0"][1] > errors["0"][2] == 0
    assert picture.is_file() or "no picture" in capsys.readouterr().out
    assert main(["diag", "bias", "--chunks", "0"]) == 1
    assert "--chunks must be at least 1, got 0" in capsys.readouterr().err


def test_diag_copy_reaches_its_accuracy_or_says_so(tmp_path, capsys):
    easy = ["--symbols", "1", "--delay", "4", "--chunk", "2", "--channels", "16", "--lr", "0.01"]
    easy += ["--picture", str(tmp_path / "copy.png")]
    threads = torch.get_num_threads()
    try:
        assert main(["diag", "copy", *easy, "--min-acc", "0.99", "--seconds", "60"]) == 0
        assert "exact RTRL" in capsys.readouterr().out
        # One batch, of eight symbols: no machine is fast enough to learn them.
        few = [*easy, "--symbols", "8", "--delay", "40", "--algo", "bptt"]
        few += ["--min-acc", "0.99", "--seconds", "1e-9"]
        assert main(["diag", "copy", *few]) == 1
    finally:
        torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert "truncated backpropagation" in out and "--min-acc asks for 0.99" in err


@pytest.mark.parametrize(
    "option", ["--steps 3", "--config tiny", "--carry", "--precision bf16", "--reference"]
)
def test_options_that_would_change_nothing_are_refused(option, tmp_path, text, capsys):
    run = str(tmp_path / "run")
    assert main(["train", run, "--online", "--data", str(text), *option.split()]) == 1
    assert f"{option.split()[0]} does not go with --online" in capsys.readouterr().err
